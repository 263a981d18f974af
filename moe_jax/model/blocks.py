"""A block of the decoder: attention, then a dense or a Mixture-of-Experts feed-forward layer; and a unit of blocks."""

from typing import NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from moe_jax.config import ModelConfig
from moe_jax.config.layers import Kind
from moe_jax.moe.layer import MoE, TokenInfo
from moe_jax.moe.product_keys import ProductKeys
from moe_jax.moe.program import Program
from moe_jax.moe.routing import Knobs
from moe_jax.moe.stats import Choices, RouterStats
from moe_jax.nn.attention import Attention
from moe_jax.nn.cache import KVCache
from moe_jax.nn.layers import GLU, Init, rms_norm, times
from moe_jax.nn.mla import MLA
from moe_jax.nn.remat import keep
from moe_jax.nn.residual import ResidualScale
from moe_jax.nn.untied import ByLabel, own


class Ahead(NamedTuple):
    """The tokens that layers of multi-token prediction read: layer k, at the place of a token, the k-th after it."""

    tokens: Int[Array, "K B S"]
    counted: Bool[Array, "K B S"]  # False: padding, or no such token in the document


class Inputs(NamedTuple):
    """A (micro-)batch: the input of the model."""

    tokens: Int[Array, "B S"]
    positions: Int[Array, "B S"]
    segments: Int[Array, "B S"] | None
    info: TokenInfo
    knobs: Knobs | None = None  # of the step; None in evaluation
    ahead: Ahead | None = None  # where the program runs layers of multi-token prediction
    # Experts that are switched off (−1) or on (1), by the block's path in the parameters; in evaluation.
    switches: dict[str, Int[Array, "L C"]] | None = None
    by: ByLabel | None = None  # the order of tokens by label, which the model makes of `info.label` (`model.untie`)


class BlockOutput(NamedTuple):
    """The result of one block. A scan over blocks adds a leading axis of layers; `state` and `late` are None there."""

    x: Float[Array, "B S D"] | None  # None after the scan, unless `Program.residual`
    state: Float[Array, "B S R"] | None  # of the routers so far; None where no router has one
    late: Float[Array, "B S D"] | None  # what a late block's experts add after the last block of its unit
    stats: RouterStats | None  # None in a block without experts
    cache: KVCache | None
    choices: Choices | None
    max_logit: Float[Array, "B N"] | None


class Block(nnx.Module):
    """A block: x + attention(norm(x)), then x + feed-forward(norm(x)); with `model.norm="post"` x + norm(attention(x))
    and x + norm(feed-forward(x)). The feed-forward is a GLU, an MoE, both, or a GLU plus a memory.

    In a late block both read the same, and the result of the MoE waits (`BlockOutput.late`).
    """

    def __init__(self, cfg: ModelConfig, init: Init, kind: Kind, program: Program):
        out_std = cfg.init_std / (2 * cfg.num_layers) ** 0.5  # 2·L branches add to the residual stream
        self.eps, self.post, self.max_logit = cfg.norm_eps, cfg.norm == "post", program.max_logit
        self.multiplier = cfg.residual_multiplier
        norms = init.by_label(cfg.untie)
        self.attention_norm = norms.ones((cfg.d_model,), "norm")
        made = (cfg, init, out_std, program.attention, kind.attends)
        self.attention = MLA(*made) if cfg.mla.kv_rank else Attention(*made, program.grouped_matmul)
        self.mlp_norm = norms.ones((cfg.d_model,), "norm")
        self.moe = MoE(cfg, kind, init, out_std, program) if kind.experts else None
        fed = kind.name in ("dense", "late", "memory")
        self.mlp = GLU(cfg.d_model, cfg.d_ff, init, out_std, cfg.activation) if fed else None
        self.memory = ProductKeys(cfg, init) if kind.name == "memory" else None
        scaled = lambda: ResidualScale(cfg.d_model, init) if cfg.residual_scale else None
        self.attention_residual, self.mlp_residual = scaled(), scaled()

    def __call__(
        self,
        x: Float[Array, "B S D"],
        state: Float[Array, "B S R"] | None,
        layer: Int[Array, ""] | None,
        inputs: Inputs,
        cache: KVCache | None,
        start: Int[Array, ""] | None,
        switches: Int[Array, " C"] | None = None,
    ) -> BlockOutput:
        """Runs the block. state: of the routers before. layer: number of the block in the decoder, for noise.

        switches: of its experts.
        """
        by = inputs.by
        h = self._read(x, self.attention_norm, by)
        counted = inputs.info.counted if self.max_logit else None
        with jax.named_scope("attention"):
            pool = None if cache is None else cache.pool
            of_label = () if by is None else (by,)
            operands = (h, inputs.positions, inputs.segments, cache, start, counted, *of_label)
            y, cache, max_logit = self.attention(*operands)
        x = keep(self._add(x, y, self.attention_norm, self.attention_residual, by), "residual")
        h, add = self._read(x, self.mlp_norm, by), lambda y: self._add(x, y, self.mlp_norm, self.mlp_residual, by)
        routed, stats, choices = None, None, None
        if self.moe is not None:
            with jax.named_scope("moe"):
                knobs = inputs.knobs and inputs.knobs._replace(key=jax.random.fold_in(inputs.knobs.key, layer))
                out = self.moe(h, inputs.info, inputs.tokens, state, knobs, switches, pool)
                routed, stats, choices, state, pool = out
                cache = cache if pool is None else cache._replace(pool=pool)
        if self.mlp is None:
            return BlockOutput(add(routed), state, None, stats, cache, choices, max_logit)
        with jax.named_scope("mlp"):
            y = self.mlp(h)
        if self.memory is not None:
            y = y + self.memory(h)
        return BlockOutput(add(y), state, routed, stats, cache, choices, max_logit)

    def _read(self, x: Float[Array, "B S D"], scale: nnx.Param, by: ByLabel | None) -> Float[Array, "B S D"]:
        """Returns what a branch reads of the residual stream."""
        return x if self.post else self._normed(x, scale, by)

    def _add(
        self, x, y: Float[Array, "B S D"], scale: nnx.Param, residual: ResidualScale | None, by: ByLabel | None
    ) -> Array:
        """Returns the residual stream x plus the result y of a branch."""
        y = times(self._normed(y, scale, by) if self.post else y, self.multiplier)
        return x + y if residual is None else residual(x, y)

    def _normed(self, x: Float[Array, "B S D"], scale: nnx.Param, by: ByLabel | None) -> Float[Array, "B S D"]:
        return rms_norm(x, scale[...] if by is None else own(scale[...], by), self.eps)


class Unit(nnx.Module):
    """Several blocks that follow each other. What late blocks hold back is added after the last one."""

    def __init__(self, blocks: list[Block]):
        self.size = len(blocks)
        for i, block in enumerate(blocks):
            setattr(self, f"block_{i}", block)


def blocks_of(unit: Block | Unit) -> list[Block]:
    """The blocks of a unit. A unit of one block is the block itself, without a level of its own in the parameters."""
    return [unit] if isinstance(unit, Block) else [getattr(unit, f"block_{i}") for i in range(unit.size)]
