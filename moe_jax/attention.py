"""Causal self-attention with grouped queries, optional QK-norm, and a KV cache: back ends behind one function.

Letters: N query heads, M key/value heads, H head size, Z cache length.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from moe_jax import sharding
from moe_jax.config import ModelConfig
from moe_jax.layers import Init, rms_norm, rope, weight


class KVCache(NamedTuple):
    """Keys and values seen so far; the layer scan adds a leading L."""

    k: Float[Array, "*L B Z M H"]
    v: Float[Array, "*L B Z M H"]


def choose_attention(name: str, platform: str, segment_mask: bool) -> tuple[str, str]:
    """The back end for a platform, and why: printed once at start-up."""
    if name != "auto":
        return name, "set in the config"
    if platform in ("gpu", "cuda") and not segment_mask:
        return "cudnn", "GPU without segment mask"
    return "xla", "segment mask" if platform in ("gpu", "cuda") else platform


def attend(
    q: Float[Array, "B S N H"],
    k: Float[Array, "B Z M H"],
    v: Float[Array, "B Z M H"],
    segments: Int[Array, "B S"] | None,
    backend: str,
) -> Float[Array, "B S N H"]:
    """softmax(q·k/√H) · v, causal; with `segments` a query sees keys of its own segment only. Z = S here.

    `xla` materialises `[B, N, S, S]` and is the reference; `cudnn` is flash attention and refuses segments.
    """
    if backend == "cudnn" and segments is not None:
        raise ValueError("attention='cudnn' cannot honour segment_mask=True; use attention='xla' or segment_mask=False")
    if backend != "xla":
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=backend)

    def local(q, k, v, segments):
        mask = None if segments is None else segments[:, None, :, None] == segments[:, None, None, :]
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation="xla")

    return sharding.per_device(local, 4)(q, k, v, segments)


def attend_cache(q: Float[Array, "B S N H"], cache: KVCache, start: Int[Array, ""]) -> Float[Array, "B S N H"]:
    """Attention of S new tokens, at positions start … start+S−1, to everything in the cache up to themselves."""

    def local(q, cache, start):
        places, steps = cache.k.shape[1], q.shape[1]
        seen: Bool[Array, "S Z"] = jnp.arange(places)[None, :] <= start + jnp.arange(steps)[:, None]
        return jax.nn.dot_product_attention(q, cache.k, cache.v, mask=seen[None, None], implementation="xla")

    return sharding.per_device(local, 2, 1)(q, cache, start)


class Attention(nnx.Module):
    def __init__(self, cfg: ModelConfig, init: Init, out_std: float, backend: str):
        self.cfg, self.backend = cfg, backend
        d, n, m, h = cfg.d_model, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        self.w_q = init.normal((d, n * h), "embed heads")
        self.w_k = init.normal((d, m * h), "embed heads")
        self.w_v = init.normal((d, m * h), "embed heads")
        self.w_o = init.normal((n * h, d), "heads embed", out_std)
        self.q_norm = init.ones((h,), "norm") if cfg.qk_norm else None
        self.k_norm = init.ones((h,), "norm") if cfg.qk_norm else None

    def __call__(
        self,
        x: Float[Array, "B S D"],
        positions: Int[Array, "B S"],
        segments: Int[Array, "B S"] | None,
        cache: KVCache | None = None,
        start: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B S D"], KVCache | None]:
        """With a cache, the S tokens are written to it from place `start` and attend to it; segments are not used."""
        cfg = self.cfg
        heads = lambda w: sharding.reshape_tail(x @ weight(w, x.dtype), 2, -1, cfg.head_dim)
        q, k, v = heads(self.w_q), heads(self.w_k), heads(self.w_v)
        if self.q_norm is not None:
            q, k = rms_norm(q, self.q_norm[...], cfg.norm_eps), rms_norm(k, self.k_norm[...], cfg.norm_eps)
        q, k = rope(q, positions, cfg.rope_theta), rope(k, positions, cfg.rope_theta)
        if cache is None:
            y = attend(q, k, v, segments, self.backend)
        else:
            write = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), start, axis=1)
            cache = KVCache(write(cache.k, k), write(cache.v, v))
            y = attend_cache(q, cache, start)
        return sharding.reshape_tail(y, 2, -1) @ weight(self.w_o, x.dtype), cache
