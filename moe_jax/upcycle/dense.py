"""Makes experts beside a dense layer, or of its most important hidden units.

Letters: L layers, D model, F hidden width of the dense layer, f hidden width of an expert, E experts.
"""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from moe_jax import model
from moe_jax.config import ModelConfig, nearest_divisor
from moe_jax.moe.routers import draw_table
from moe_jax.tree import flatten
from moe_jax.upcycle.chain import Scores, Transform, by_table, require, require_dense, shapes_of
from moe_jax.upcycle.experts import BLOCK, NOT_OF_COPIES, Blocks, moe_config, shards, with_experts


def _new_router(blocks: Blocks, d_model: int, std: float, key: Key[Array, ""]):
    """The rule of a fresh linear router, whose weights have the standard deviation `std`."""

    def router(_, path):
        shape = (len(blocks.depths(path)), d_model, blocks.experts(path))
        return std * jax.random.truncated_normal(blocks.key(key, path), -3.0, 3.0, shape, jnp.float32)

    return (rf"{BLOCK}/moe/w_router", "", router)


@dataclass(frozen=True)
class Beside(Transform):
    """Keeps each dense layer, unscaled, as the shared expert of its layer, and puts routed experts beside it.

    init: "zero" draws gate and up anew and sets down to 0, so that experts add nothing at first: the same function
        (zero-initialised adapters beside frozen layers, as in MixDA, arXiv:2306.05406). "copy" makes expert e shard
        e mod F/f of the dense layer, which is then added twice.
    moe: more fields of MoEConfig, e.g. `renormalize`.
    """

    num_experts: int = 8
    d_expert: int = 0  # f; 0: the width of the dense layer
    top_k: int = 2
    init: Literal["zero", "copy"] = "zero"
    router_std: float = 0.02
    dense_layers: int = 0  # number of layers at the start that stay dense
    layers: str = ""  # which layers get experts, as `model.layers` of the result; "": all but dense_layers
    moe: dict[str, Any] = dataclasses.field(default_factory=dict)

    def config(self, cfg: ModelConfig) -> ModelConfig:
        require_dense(cfg)
        width, dense = self.d_expert or cfg.d_ff, cfg.d_ff
        require(self.init in ("zero", "copy"), "init", self.init, "must be zero or copy", "nearest valid: 'zero'")
        require(self.router_std >= 0, "router_std", self.router_std, "must be ≥ 0", "nearest valid: 0.0")
        rule = f"must divide the dense d_ff={dense}, which becomes whole shared experts of this width"
        nearest = nearest_divisor(dense, max(1, width))
        require(width >= 1 and dense % width == 0, "d_expert", self.d_expert, rule, f"nearest valid: {nearest}")
        own = {"num_experts": self.num_experts, "top_k": self.top_k, "d_expert": width}
        moe = moe_config(self.moe, **own, num_shared_experts=dense // width)
        for name, usual in NOT_OF_COPIES.items():
            rule = "has weights for which there is no rule beside a dense layer"
            require(getattr(moe, name) == usual, f"moe.{name}", getattr(moe, name), rule, f"nearest valid: {usual!r}")
        return with_experts(cfg, moe, self.dense_layers, self.layers)

    def params(self, cfg: ModelConfig, params: dict[str, Array], key: Key[Array, ""]) -> dict[str, Array]:
        final = self.config(cfg)
        blocks, width = Blocks.of(final), final.moe.d_expert

        def experts(w, path):
            name, n = path.rsplit("/", 1)[-1], blocks.experts(path)
            w = blocks.take(w, path)
            if self.init == "copy":
                return jnp.take(shards(w, name, cfg.d_ff // width), jnp.arange(n) % (cfg.d_ff // width), axis=1)
            shape = (w.shape[0], n, width, cfg.d_model) if name == "w_down" else (w.shape[0], n, cfg.d_model, width)
            if name == "w_down":
                return jnp.zeros(shape, w.dtype)
            own = jax.random.fold_in(blocks.key(key, path), 1 + (name == "w_up"))
            return (cfg.init_std * jax.random.truncated_normal(own, -3.0, 3.0, shape, jnp.float32)).astype(w.dtype)

        rules = (
            *blocks.carried(),
            (rf"{BLOCK}/moe/(w_gate|w_up|w_down)", r"dense_layers/mlp/\1", experts),
            (rf"{BLOCK}/moe/shared/(w_gate|w_up|w_down)", r"dense_layers/mlp/\1", blocks.take),
            _new_router(blocks, cfg.d_model, self.router_std, key),
        )
        return by_table(rules, flatten(model.abstract(final).shapes), params)

    def changes(self, cfg: ModelConfig) -> str:
        return "copies of the dense layer are added to it" if self.init == "copy" else ""


@dataclass(frozen=True)
class Importance(Transform):
    """Makes experts of the hidden units of each dense layer that matter most; the rest is left out.

    The `shared` units with the largest scores are in every expert. Those after them are dealt out: expert e gets the
    ranks shared + e, shared + e + E, … until it has `d_expert` units. A chosen expert weighs 1. Scores: `[L, F]` of
    "dense_layers"; `unit_scores` computes those of the paper. Source: MoEBERT, arXiv:2204.07675, §3.1.

    layers: which layers get experts, as `model.layers` of the result; "4*table" for experts that a table names. "": all
        but `dense_layers`, whose routers are fresh.
    """

    num_experts: int = 4
    shared: int = 0
    d_expert: int = 0  # f; 0: shared + (F − shared) / E, so that no unit is left out, or fewer than E
    top_k: int = 1
    router_std: float = 0.02
    dense_layers: int = 0
    layers: str = ""
    needs_scores = True

    def config(self, cfg: ModelConfig) -> ModelConfig:
        require_dense(cfg)
        e, s, total = self.num_experts, self.shared, cfg.d_ff
        require(e >= 1, "num_experts", e, "must be ≥ 1", "nearest valid: 1")
        require(0 <= s <= total, "shared", s, f"must be in [0, {total}], the hidden units of a dense layer",
                f"nearest valid: {min(max(s, 0), total)}")  # fmt: skip
        most = s + (total - s) // e
        rule = f"{total} hidden units, {s} of them in every expert, are not enough for {e} experts"
        require(most >= 1, "num_experts", e, rule, f"nearest valid: {total}")
        width, least = self.d_expert or most, max(s, 1)
        rule = f"must be in [{least}, {most}]: the shared units, and a share of the {total - s} others"
        require(least <= width <= most, "d_expert", width, rule, f"nearest valid: {min(max(width, least), most)}")
        require(self.router_std >= 0, "router_std", self.router_std, "must be ≥ 0", "nearest valid: 0.0")
        moe = moe_config(num_experts=e, top_k=self.top_k, d_expert=width, combine="one")
        final = with_experts(cfg, moe, self.dense_layers, self.layers, tables=True)
        rule = f"a layer's hidden units are dealt to num_experts={e} experts, in each layer with experts"
        require(final.expert_counts == (e,), "layers", self.layers, rule, "nearest valid: no numbers of experts")
        return final

    def score_shapes(self, cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
        """The shapes of the scores of a model, by the path of the block."""
        return {"dense_layers": (cfg.num_layers, cfg.d_ff)}

    def units(self, scores: Float[Array, "L F"], width: int) -> Int[Array, "L E f"]:
        """The hidden units of each expert, the most important ones first. Of equal scores the lower number is first."""
        ranked = jnp.argsort(-jnp.asarray(scores, jnp.float32), axis=1, stable=True)
        e, s = self.num_experts, self.shared
        dealt = ranked[:, s : s + e * (width - s)].reshape(ranked.shape[0], width - s, e)
        common = jnp.broadcast_to(ranked[:, None, :s], (ranked.shape[0], e, s))
        return jnp.concatenate([common, jnp.swapaxes(dealt, 1, 2)], axis=2)

    def params(
        self, cfg: ModelConfig, params: dict[str, Array], key: Key[Array, ""], scores: Scores
    ) -> dict[str, Array]:
        final = self.config(cfg)
        blocks, e, width = Blocks.of(final), self.num_experts, final.moe.d_expert
        chosen = self.units(scores["dense_layers"], width).reshape(cfg.num_layers, e * width)

        def experts(w, path):
            unit, w = blocks.take(chosen, path), blocks.take(w, path)
            if path.endswith("w_down"):
                return jnp.take_along_axis(w, unit[..., None], axis=1).reshape(w.shape[0], e, width, w.shape[2])
            picked = jnp.take_along_axis(w, unit[:, None], axis=2)
            return jnp.moveaxis(picked.reshape(*w.shape[:2], e, width), 2, 1)

        def table(_, path):
            draw = functools.partial(draw_table, vocab=cfg.vocab_size, experts=e, top_k=self.top_k)
            return jax.vmap(draw)(jax.random.split(blocks.key(key, path), len(blocks.depths(path))))

        rules = (
            *blocks.carried(),
            (rf"{BLOCK}/moe/(w_gate|w_up|w_down)", r"dense_layers/mlp/\1", experts),
            (rf"{BLOCK}/moe/table", "", table),
            _new_router(blocks, cfg.d_model, self.router_std, key),
        )
        return by_table(rules, shapes_of(final), params)

    def changes(self, cfg: ModelConfig) -> str:
        width = self.config(cfg).moe.d_expert
        if width == cfg.d_ff and self.top_k == 1:
            return ""
        used = f"a token uses {self.top_k} of " if self.top_k > 1 else ""
        return f"{used}{self.num_experts} experts with {width} of the {cfg.d_ff} hidden units of a layer"
