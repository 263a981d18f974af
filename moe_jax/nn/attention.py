"""Causal self-attention with grouped queries, QK-norm or QK-clip, and a KV cache. Back ends: attend.py; MLA: mla.py.

Letters: N query heads, M key/value heads, H head size.
"""

from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from moe_jax.config import ModelConfig
from moe_jax.config.positions import FULL, Attends
from moe_jax.nn import untied
from moe_jax.nn.attend import attend
from moe_jax.nn.cache import KVCache, attend_and_write
from moe_jax.nn.layers import Init, linear, rms_norm, times
from moe_jax.nn.qk_clip import max_logits
from moe_jax.nn.remat import keep
from moe_jax.nn.rope import rotate, rotation
from moe_jax.parallel import sharding


def scaled_queries(q: Float[Array, "B S N H"], cfg: ModelConfig) -> Float[Array, "B S N H"]:
    """q such that q·k/√H is q·k times `attention_multiplier`, where that is set.

    The scale is that of queries and not of each back end. In bfloat16 it is exact where it is a power of two, as in
    Granite, whose multiplier is 1/H with heads of 64.
    """
    return times(q, cfg.attention_multiplier * cfg.head_dim**0.5) if cfg.attention_multiplier else q


class Attention(nnx.Module):
    """Multi-head attention with grouped queries."""

    def __init__(self, cfg: ModelConfig, init: Init, out_std: float, backend: str, attends: Attends = FULL,
                 matmul: str = "reference"):  # fmt: skip
        """matmul: back end of grouped matmuls, with `model.untie`."""
        self.cfg, self.backend, self.attends, self.matmul = cfg, backend, attends, matmul
        init = init.by_label(cfg.untie)
        d, n, m, h = cfg.d_model, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        self.w_q = init.normal((d, n * h), "embed heads")
        self.w_k = init.normal((d, m * h), "embed heads")
        self.w_v = init.normal((d, m * h), "embed heads")
        self.w_o = init.normal((n * h, d), "heads embed", out_std)
        self.b_q, self.b_k, self.b_v = (init.filled((x * h,), "norm", 0.0) if cfg.qkv_bias else None for x in (n, m, m))
        normed = (h, h) if cfg.qk_norm_over == "head" else (n * h, m * h)
        self.q_norm, self.k_norm = (init.ones((x,), "norm") if cfg.qk_norm else None for x in normed)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        positions: Int[Array, "B S"],
        segments: Int[Array, "B S"] | None,
        cache: KVCache | None = None,
        start: Int[Array, ""] | None = None,
        counted: Bool[Array, "B S"] | None = None,
        by: untied.ByLabel | None = None,
    ) -> tuple[Float[Array, "B S D"], KVCache | None, Float[Array, "B N"] | None]:
        """Returns attention, the cache, and the largest logits.

        With a cache, the S tokens are written to it at `start` and attend to it; segments are not used. With `counted`,
        and without a cache, the third result is `max_logits` of the counted queries; otherwise it is None.
        by: the labels of the tokens, with `model.untie`.
        """
        cfg = self.cfg
        heads = lambda x: sharding.reshape_tail(x, 2, -1, cfg.head_dim)
        q, k, v = keep(self._products(x, ("w_q", "w_k", "w_v"), by), "qkv")
        if cfg.qk_norm_over == "head":
            q, k = heads(q), heads(k)
        if self.q_norm is not None:
            q, k = self._normed(q, self.q_norm, by), self._normed(k, self.k_norm, by)
        if cfg.qk_norm_over == "projection":
            q, k = heads(q), heads(k)
        v, turn = heads(v), rotation(cfg, self.attends, x.shape[1] if cache is None else start + x.shape[1])
        q, k = scaled_queries(rotate(q, positions, turn), cfg), rotate(k, positions, turn)
        window = cfg.window if self.attends.window else 0
        max_logit = None if counted is None else max_logits(q, k, segments, counted, window)
        if cache is None:
            y = attend(q, k, v, segments, self.backend, window)
        else:
            y, cache = attend_and_write(q, k, v, cache, start, cfg.head_dim**-0.5, window)
        (y,) = self._products(sharding.reshape_tail(y, 2, -1), ("w_o",), by)
        return y, cache, max_logit

    def _products(
        self, x: Float[Array, "B S D"], names: tuple[str, ...], by: untied.ByLabel | None
    ) -> tuple[Float[Array, "B S F"], ...]:
        if by is None:
            return tuple(linear(x, self, name) for name in names)
        return untied.linear(x, self, names, by, self.matmul)

    def _normed(self, x: Float[Array, "B S *N H"], scale: nnx.Param, by: untied.ByLabel | None) -> Array:
        scale = scale[...]
        if by is not None:
            scale = untied.own(scale, by)
            scale = scale[:, :, None] if x.ndim == 4 else scale
        return rms_norm(x, scale, self.cfg.norm_eps)
