"""Causal self-attention with grouped queries, QK-norm or QK-clip, and a KV cache. Back ends: attend.py; MLA: mla.py.

Letters: N query heads, M key/value heads, H head size, Z cache length.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from moe_jax.config import ModelConfig
from moe_jax.nn.attend import attend, plain_attention
from moe_jax.nn.layers import Init, linear, rms_norm, rope, rope_frequencies
from moe_jax.nn.qk_clip import max_logits
from moe_jax.nn.remat import keep
from moe_jax.parallel import sharding


class KVCache(NamedTuple):
    """Keys and values of the tokens so far. The scan over layers adds a leading L."""

    k: Float[Array, "*L B Z M H"]
    v: Float[Array, "*L B Z M H"] | None  # None: the keys are the values (MLA)

    def write(self, k: Float[Array, "B S M H"], v: Float[Array, "B S M H"] | None, start: Int[Array, ""]) -> "KVCache":
        """Returns the cache with S new tokens written at `start`."""
        update = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), start, axis=1)
        return KVCache(update(self.k, k), None if v is None else update(self.v, v))


def attend_cache(
    q: Float[Array, "B S N H"], cache: KVCache, start: Int[Array, ""], scale: float
) -> Float[Array, "B S N H"]:
    """Attention of S new tokens, at positions start … start+S−1, to all tokens of the cache up to their own."""

    def local(q, cache, start):
        length, new = cache.k.shape[1], q.shape[1]
        visible: Bool[Array, "S Z"] = jnp.arange(length)[None, :] <= start + jnp.arange(new)[:, None]
        values = cache.k if cache.v is None else cache.v
        return plain_attention(q, cache.k, values, mask=visible[None, None], scale=scale)

    return sharding.per_device(local, 2, 1)(q, cache, start)


class Attention(nnx.Module):
    """Multi-head attention with grouped queries."""

    def __init__(self, cfg: ModelConfig, init: Init, out_std: float, backend: str):
        self.cfg, self.backend = cfg, backend
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
    ) -> tuple[Float[Array, "B S D"], KVCache | None, Float[Array, "B N"] | None]:
        """Returns attention, the cache, and the largest logits.

        With a cache, the S tokens are written to it at `start` and attend to it; segments are not used. With `counted`,
        and without a cache, the third result is `max_logits` of the counted queries; otherwise it is None.
        """
        cfg = self.cfg
        heads = lambda x: sharding.reshape_tail(x, 2, -1, cfg.head_dim)
        q, k, v = keep(tuple(linear(x, self, name) for name in ("w_q", "w_k", "w_v")), "qkv")
        if cfg.qk_norm_over == "head":
            q, k = heads(q), heads(k)
        if self.q_norm is not None:
            q, k = rms_norm(q, self.q_norm[...], cfg.norm_eps), rms_norm(k, self.k_norm[...], cfg.norm_eps)
        if cfg.qk_norm_over == "projection":
            q, k = heads(q), heads(k)
        v, freq = heads(v), rope_frequencies(cfg, cfg.head_dim)
        q, k = rope(q, positions, freq), rope(k, positions, freq)
        max_logit = None if counted is None else max_logits(q, k, segments, counted)
        if cache is None:
            y = attend(q, k, v, segments, self.backend)
        else:
            cache = cache.write(k, v, start)
            y = attend_cache(q, cache, start, cfg.head_dim**-0.5)
        return linear(sharding.reshape_tail(y, 2, -1), self, "w_o"), cache, max_logit
