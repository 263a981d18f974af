"""Makes experts of a bank different from each other: noise, Drop-Upcycling, masks.

Letters: L layers, E experts, D model, f hidden width of an expert.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from moe_jax.config import ModelConfig
from moe_jax.upcycle.chain import Transform, require
from moe_jax.upcycle.experts import BLOCK, Blocks

EXPERTS = ("w_gate", "w_up", "w_down")


def _each_expert_matrix(
    cfg: ModelConfig, params: dict[str, Array], key: Key[Array, ""], keys: int, change: Callable[..., Array]
) -> dict[str, Array]:
    """The parameters with change(name, matrices, experts, keys of the block) in the place of the experts' matrices.

    keys: number of keys that a block has.
    """
    blocks = Blocks.of(cfg)

    def changed(path, w):
        if not (found := re.fullmatch(rf"{BLOCK}/moe/({'|'.join(EXPERTS)})", path)):
            return w
        name = found[1]
        return change(name, w, blocks.experts(path), jax.random.split(blocks.key(key, path), keys))

    return {path: changed(path, w) for path, w in params.items()}


def _require_experts(cfg: ModelConfig, name: str, value: Any) -> None:
    rule = "needs a model with experts"
    require(cfg.num_moe_layers > 0, name, value, rule, "put it after the transform that makes them")


@dataclass(frozen=True)
class Noise(Transform):
    """Adds normal noise to every routed expert, of `std` times the standard deviation of the expert's own matrix."""

    std: float = 0.01

    def config(self, cfg: ModelConfig) -> ModelConfig:
        require(self.std >= 0, "noise", self.std, "must be ≥ 0", "nearest valid: 0.0")
        _require_experts(cfg, "noise", self.std)
        return cfg

    def params(self, cfg: ModelConfig, params: dict[str, Array], key: Key[Array, ""]) -> dict[str, Array]:
        def noisy(name, w, experts, keys):
            w32 = w.astype(jnp.float32)
            size = self.std * jnp.std(w32, axis=(2, 3), keepdims=True)
            return (w32 + size * jax.random.normal(keys[EXPERTS.index(name)], w.shape, jnp.float32)).astype(w.dtype)

        return _each_expert_matrix(cfg, params, key, len(EXPERTS), noisy)

    def changes(self, cfg: ModelConfig) -> str:
        return f"noise on the experts ({self.std:g})" if self.std else ""


@dataclass(frozen=True)
class Drop(Transform):
    """Drop-Upcycling: draws a random share `ratio` of each routed expert's hidden units again.

    The normal distribution has the mean and standard deviation of the weights that are replaced. Source:
    arXiv:2502.19261.
    shared_indices: True draws the same units in gate, up and down, as in the paper; False draws different units for
        each matrix, as in its code.
    """

    ratio: float = 0.5
    shared_indices: bool = True

    def config(self, cfg: ModelConfig) -> ModelConfig:
        nearest = min(max(self.ratio, 0.0), 1.0)
        require(0 <= self.ratio <= 1, "drop", self.ratio, "must be in [0, 1]", f"nearest valid: {nearest}")
        _require_experts(cfg, "drop", self.ratio)
        return cfg

    def params(self, cfg: ModelConfig, params: dict[str, Array], key: Key[Array, ""]) -> dict[str, Array]:
        f = cfg.moe.d_expert
        count = round(self.ratio * f)

        def redrawn(name, w, experts, keys):
            key_of_units, *rest = keys
            which, values = jax.random.split(rest[EXPERTS.index(name)])
            # A mask [L, E, f] of `count` random units of every expert.
            drawn = jax.random.uniform(key_of_units if self.shared_indices else which, (w.shape[0], experts, f))
            picked = jnp.argsort(jnp.argsort(drawn, axis=-1), axis=-1) < count
            picked = picked[..., None] if name == "w_down" else picked[:, :, None, :]
            w32 = w.astype(jnp.float32)
            n = max(count, 1) * cfg.expert_dim
            over = lambda x: jnp.sum(jnp.where(picked, x, 0.0), axis=(2, 3), keepdims=True) / n
            mean = over(w32)
            std = jnp.sqrt(over(jnp.square(w32 - mean)))
            new = mean + std * jax.random.normal(values, w.shape, jnp.float32)
            return jnp.where(picked, new, w32).astype(w.dtype)

        return _each_expert_matrix(cfg, params, key, 1 + len(EXPERTS), redrawn)

    def changes(self, cfg: ModelConfig) -> str:
        return f"{self.ratio:.0%} of the experts' hidden units are new" if round(self.ratio * cfg.moe.d_expert) else ""


@dataclass(frozen=True)
class Mask(Transform):
    """Sets a random share of each routed expert's weights to zero, other weights for each expert and matrix.

    So the copies that EvoMoE spawns of one expert differ (arXiv:2112.14397; its code does not have this step, so
    that the share is a choice). The other weights stay as they are.
    """

    share: float = 0.2

    def config(self, cfg: ModelConfig) -> ModelConfig:
        nearest = min(max(self.share, 0.0), 1.0)
        require(0 <= self.share <= 1, "mask", self.share, "must be in [0, 1]", f"nearest valid: {nearest}")
        _require_experts(cfg, "mask", self.share)
        return cfg

    def params(self, cfg: ModelConfig, params: dict[str, Array], key: Key[Array, ""]) -> dict[str, Array]:
        def masked(name, w, experts, keys):
            kept = jax.random.uniform(keys[EXPERTS.index(name)], w.shape) >= self.share
            return jnp.where(kept, w, 0)

        return _each_expert_matrix(cfg, params, key, len(EXPERTS), masked)

    def changes(self, cfg: ModelConfig) -> str:
        return f"{self.share:.0%} of the experts' weights are 0" if self.share else ""
