"""A dense feed-forward layer → experts: virtual groups (copies are those of one shard), noise, Drop-Upcycling.

Letters: L layers, D model, F hidden width of the dense layer, f = F/G of an expert, E experts, K experts per token,
G shards of a dense layer, S shared experts. docs/upcycling.md has the formulas.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from moe_jax import model
from moe_jax.config import ModelConfig, MoEConfig, nearest_divisor
from moe_jax.errors import ConfigError
from moe_jax.nn.layers import ACTIVATIONS
from moe_jax.tree import flatten
from moe_jax.upcycle.chain import Transform, by_table, require, require_dense, scaled

# Exponents of κ by matrix. A product of the three must scale the layer's output by κ: that of `exact` does, because the
# hidden activations are linear in `up` (SwiGLU), or homogeneous of degree 2 in it (squared ReLU); GELU is neither.
# `paper`: arXiv:2410.07524, §2.3.1, and the code it points to (Megatron-Core). Its cube root treats SiLU as linear.
SCALES: dict[str, dict[str, dict[str, float]]] = {
    "exact": {
        "swiglu": {"w_gate": 0.0, "w_up": 1 / 2, "w_down": 1 / 2},
        "gelu": {"w_up": 0.0, "w_down": 1.0},
        "relu2": {"w_up": 1 / 3, "w_down": 1 / 3},
    },
    "paper": {
        "swiglu": {"w_gate": 1 / 3, "w_up": 1 / 3, "w_down": 1 / 3},
        "gelu": {"w_up": 1 / 2, "w_down": 1 / 2},
        "relu2": {"w_up": 1 / 3, "w_down": 1 / 3},
    },
    "none": {name: {"w_gate": 0.0, "w_up": 0.0, "w_down": 0.0} for name in ACTIVATIONS},
}


def expected_weight(moe: MoEConfig) -> float:
    """The combine weight of a chosen expert, as a mean over the chosen, that the scale reckons with.

    Exactly so, whatever the router says, where a token's weights have a fixed sum; else at a router of zeros.
    """
    if moe.combine == "one":
        return moe.routed_scaling
    if moe.renormalize or moe.score_order == "topk_score":
        return moe.routed_scaling / moe.top_k
    return moe.routed_scaling * (1 / moe.num_experts if moe.score == "softmax" else 1 / 2)


def fixed_sum(moe: MoEConfig) -> bool:
    """Whether a token's combine weights have the same sum for every token."""
    return moe.combine == "one" or moe.renormalize or moe.score_order == "topk_score"


def kappa(moe: MoEConfig, granularity: int) -> float:
    """How much smaller than the dense layer's the sum of the routed experts is: T/G copies, each of weight w̄.

    G / (K · w̄): G for weights that sum to 1, E·G/K for softmax over all E experts (arXiv:2410.07524 writes E·G²/T, its
    E being ours / G), and either divided by `routed_scaling`.
    """
    return granularity / (moe.top_k * expected_weight(moe))


def shards(w: Float[Array, "L m n"], name: str, granularity: int) -> Float[Array, "L G m n"]:
    """Cut along F: the last dimension of gate and up, the first of down. Shard g of each belongs together."""
    layers, rows, columns = w.shape
    if name == "w_down":
        return w.reshape(layers, granularity, rows // granularity, columns)
    return jnp.moveaxis(w.reshape(layers, rows, granularity, columns // granularity), 2, 1)


@dataclass(frozen=True)
class VirtualGroups(Transform):
    """Sparse upcycling into `expansion` copies of each dense layer, each cut into `granularity` experts.

    Expert e·G + g is shard g of copy e. Router rows are drawn once a copy, and the G experts of a copy share theirs: so
    the top K, a multiple of G, are whole copies. Source: arXiv:2410.07524, §2.3; G = 1: arXiv:2212.05055.
    """

    expansion: int = 8
    granularity: int = 1
    top_k: int = 2
    scale: Literal["exact", "paper", "none"] = "exact"
    score: Literal["softmax", "sigmoid"] = "softmax"
    score_order: Literal["topk_score", "score_topk"] = "topk_score"
    renormalize: bool = False
    routed_scaling: float = 1.0
    router_std: float = 0.02
    dense_layers: int = 0  # the first so many layers stay dense
    num_shared_experts: int = 0  # always on, made of the dense layer, too: S/G whole copies
    moe: dict[str, Any] = dataclasses.field(default_factory=dict)  # more fields of MoEConfig, e.g. selection_bias

    def config(self, cfg: ModelConfig) -> ModelConfig:
        require_dense(cfg)
        f, g, k, e, s = cfg.d_ff, self.granularity, self.top_k, self.expansion, self.num_shared_experts
        for name in ("granularity", "expansion", "top_k"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be ≥ 1", "nearest valid: 1")
        require(f % g == 0, "granularity", g, f"must divide the dense d_ff={f}",
                f"nearest valid: {nearest_divisor(f, g)}")  # fmt: skip
        near = min(max(g, round(k / g) * g), e * g)
        rule = f"must be a multiple of granularity={g}, so that a token uses whole copies of the dense layer"
        require(k % g == 0, "top_k", k, rule, f"nearest valid: {near}")
        require(k <= e * g, "top_k", k, f"must be ≤ expansion × granularity = {e * g}", f"nearest valid: {e * g}")
        require(s >= 0 and s % g == 0, "num_shared_experts", s,
                f"must be a multiple of granularity={g}: whole copies of the dense layer",
                f"nearest valid: {max(0, round(s / g) * g)}")  # fmt: skip
        require(self.scale in SCALES, "scale", self.scale, f"must be one of {', '.join(SCALES)}",
                "nearest valid: 'exact'")  # fmt: skip
        require(self.router_std >= 0, "router_std", self.router_std, "must be ≥ 0", "nearest valid: 0.0")
        check_dense_layers(self.dense_layers, cfg)
        routing = {name: getattr(self, name) for name in ("score", "score_order", "renormalize", "routed_scaling")}
        moe = moe_config(num_experts=e * g, top_k=k, d_expert=f // g, num_shared_experts=s, **routing, **self.moe)
        require(moe.routed_scaling > 0, "routed_scaling", moe.routed_scaling, "must be > 0", "nearest valid: 1.0")
        require(e % moe.num_groups == 0, "num_groups", moe.num_groups,
                f"must divide expansion={e}, so that no copy lies in two of them",
                f"nearest valid: {nearest_divisor(e, moe.num_groups)}")  # fmt: skip
        return dataclasses.replace(cfg, num_dense_layers=self.dense_layers, moe=moe)

    def params(self, cfg: ModelConfig, params: dict[str, Array], key: Key[Array, ""]) -> dict[str, Array]:
        final = self.config(cfg)
        moe, g, n = final.moe, self.granularity, self.dense_layers
        slots, k, s = moe.top_k + moe.num_shared_experts, moe.top_k, moe.num_shared_experts
        # Shared experts do the share of the layer that their number has in the slots of a token.
        routed, shared = kappa(moe, g) * k / slots, g / slots
        exponents = SCALES[self.scale][cfg.activation]

        def experts(w, path):
            name = path.rsplit("/", 1)[-1]
            return jnp.tile(scaled(shards(w[n:], name, g), routed ** exponents[name]), (1, self.expansion, 1, 1))

        def always_on(w, path):
            name = path.rsplit("/", 1)[-1]
            copies = (1, s // g, 1) if name == "w_down" else (1, 1, s // g)
            return jnp.tile(scaled(w[n:], shared ** exponents[name]), copies)

        def router(_, path):
            shape = (cfg.num_layers - n, cfg.d_model, self.expansion)
            rows = self.router_std * jax.random.truncated_normal(key, -3.0, 3.0, shape, jnp.float32)
            return jnp.repeat(rows, g, axis=-1)

        rules = (
            *carried(n),
            (r"layers/moe/(w_gate|w_up|w_down)", r"dense_layers/mlp/\1", experts),
            (r"layers/moe/shared/(w_gate|w_up|w_down)", r"dense_layers/mlp/\1", always_on),
            (r"layers/moe/w_router", "", router),
        )
        return by_table(rules, flatten(model.abstract(final).shapes), params)

    def changes(self, cfg: ModelConfig) -> str:
        moe = self.config(cfg).moe
        if self.scale != "exact" and not self._harmless(cfg, moe):
            return f"scale={self.scale!r}"
        if not fixed_sum(moe) and self.router_std:
            return f"the combine weights of {moe.score} over all experts have another sum for every token"
        return "compute='capacity' drops tokens" if moe.compute == "capacity" else ""

    def _harmless(self, cfg: ModelConfig, moe: MoEConfig) -> bool:
        """Whether another scale is an exact one after all: κ = 1, or the paper's for squared ReLU."""
        one = kappa(moe, self.granularity) == 1.0 and not self.num_shared_experts
        return one or SCALES[self.scale][cfg.activation] == SCALES["exact"][cfg.activation]


def copy(expansion: int = 8, top_k: int = 2, **fields) -> VirtualGroups:
    """Every expert a copy of the dense layer: virtual groups of granularity 1."""
    return VirtualGroups(expansion, 1, top_k, **fields)


def moe_config(**fields) -> MoEConfig:
    """MoEConfig, its rules named after this package's fields."""
    known = {f.name for f in dataclasses.fields(MoEConfig)}
    for name in set(fields) - known:
        raise ConfigError(f"upcycle.moe.{name}", fields[name], "is not a field of MoEConfig", "see config/schema.py")
    try:
        return MoEConfig(**fields)
    except ConfigError as e:
        raise e.inside("upcycle") from None


def check_dense_layers(n: int, cfg: ModelConfig) -> None:
    last = cfg.num_layers - 1
    rule = f"must be in [0, {last}]: the first so many of {last + 1} layers stay dense, all others get experts"
    require(0 <= n <= last, "dense_layers", n, rule, f"nearest valid: {min(max(n, 0), last)}")


def carried(n: int) -> tuple:
    """Rules for all that is not a feed-forward layer: the very same arrays, the first n layers kept as they are."""
    return (
        (r"embed|head|final_norm", r"\g<0>", lambda w, _: w),
        (r"dense_layers/.+", r"\g<0>", lambda w, _: w[:n]),
        (r"layers/(attention/.+|attention_norm|mlp_norm)", r"dense_layers/\1", lambda w, _: w[n:]),
    )


# --- telling experts apart -------------------------------------------------------------------------------------------

EXPERTS = ("layers/moe/w_gate", "layers/moe/w_up", "layers/moe/w_down")


def _require_experts(cfg: ModelConfig, name: str, value: Any) -> None:
    rule = "needs a model with experts"
    require(cfg.num_dense_layers < cfg.num_layers, name, value, rule, "put it after the transform that makes them")


@dataclass(frozen=True)
class Noise(Transform):
    """Normal noise on every routed expert, `std` times the standard deviation of the expert's own matrix."""

    std: float = 0.01

    def config(self, cfg: ModelConfig) -> ModelConfig:
        require(self.std >= 0, "noise", self.std, "must be ≥ 0", "nearest valid: 0.0")
        _require_experts(cfg, "noise", self.std)
        return cfg

    def params(self, cfg: ModelConfig, params: dict[str, Array], key: Key[Array, ""]) -> dict[str, Array]:
        def noisy(w, key):
            w32 = w.astype(jnp.float32)
            size = self.std * jnp.std(w32, axis=(2, 3), keepdims=True)
            return (w32 + size * jax.random.normal(key, w.shape, jnp.float32)).astype(w.dtype)

        keys = dict(zip(EXPERTS, jax.random.split(key, len(EXPERTS)), strict=True))
        return {path: noisy(w, keys[path]) if path in keys else w for path, w in params.items()}

    def changes(self, cfg: ModelConfig) -> str:
        return f"noise on the experts ({self.std:g})" if self.std else ""


@dataclass(frozen=True)
class Drop(Transform):
    """Drop-Upcycling: a random share `ratio` of each routed expert's hidden units is drawn anew, from a normal
    distribution with mean and standard deviation of what it replaces. Source: arXiv:2502.19261.

    shared_indices: the same units in gate, up and down, as in the paper; False: each matrix its own, as in its code.
    """

    ratio: float = 0.5
    shared_indices: bool = True

    def config(self, cfg: ModelConfig) -> ModelConfig:
        near = min(max(self.ratio, 0.0), 1.0)
        require(0 <= self.ratio <= 1, "drop", self.ratio, "must be in [0, 1]", f"nearest valid: {near}")
        _require_experts(cfg, "drop", self.ratio)
        return cfg

    def params(self, cfg: ModelConfig, params: dict[str, Array], key: Key[Array, ""]) -> dict[str, Array]:
        layers, e, f = cfg.num_layers - cfg.num_dense_layers, cfg.moe.num_experts, cfg.moe.d_expert
        count = round(self.ratio * f)

        def units(key) -> Array:
            """`[L, E, f]`: `count` units of every expert."""
            order = jnp.argsort(jax.random.uniform(key, (layers, e, f)), axis=-1)
            return jnp.argsort(order, axis=-1) < count

        def redrawn(path, w, key):
            which, values = jax.random.split(key)
            picked = units(key_of_units if self.shared_indices else which)
            picked = picked[..., None] if path.endswith("w_down") else picked[:, :, None, :]
            w32 = w.astype(jnp.float32)
            n = max(count, 1) * cfg.d_model
            over = lambda x: jnp.sum(jnp.where(picked, x, 0.0), axis=(2, 3), keepdims=True) / n
            mean = over(w32)
            std = jnp.sqrt(over(jnp.square(w32 - mean)))
            new = mean + std * jax.random.normal(values, w.shape, jnp.float32)
            return jnp.where(picked, new, w32).astype(w.dtype)

        key_of_units, *rest = jax.random.split(key, 1 + len(EXPERTS))
        keys = dict(zip(EXPERTS, rest, strict=True))
        return {path: redrawn(path, w, keys[path]) if path in keys else w for path, w in params.items()}

    def changes(self, cfg: ModelConfig) -> str:
        return f"{self.ratio:.0%} of the experts' hidden units are new" if round(self.ratio * cfg.moe.d_expert) else ""
