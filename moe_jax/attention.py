"""Causal self-attention with grouped queries, QK-norm or QK-clip, and a KV cache. Back ends: attend.py; MLA: mla.py.

Letters: N query heads, M key/value heads, H head size, Z cache length.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from moe_jax import sharding
from moe_jax.attend import attend, plain_attention
from moe_jax.config import ModelConfig
from moe_jax.layers import Init, rms_norm, rope, rope_frequencies, weight
from moe_jax.remat import keep

BLOCK = 512  # queries and keys whose logits exist at one time while their maximum is taken


class KVCache(NamedTuple):
    """Keys and values seen so far; the layer scan adds a leading L."""

    k: Float[Array, "*L B Z M H"]
    v: Float[Array, "*L B Z M H"] | None  # None: the keys are the values (MLA)

    def write(self, k: Float[Array, "B S M H"], v: Float[Array, "B S M H"] | None, start: Int[Array, ""]) -> "KVCache":
        """With those of S new tokens from place `start` on."""
        put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), start, axis=1)
        return KVCache(put(self.k, k), None if v is None else put(self.v, v))


def attend_cache(
    q: Float[Array, "B S N H"], cache: KVCache, start: Int[Array, ""], scale: float
) -> Float[Array, "B S N H"]:
    """Attention of S new tokens, at positions start … start+S−1, to everything in the cache up to themselves."""

    def local(q, cache, start):
        places, steps = cache.k.shape[1], q.shape[1]
        seen: Bool[Array, "S Z"] = jnp.arange(places)[None, :] <= start + jnp.arange(steps)[:, None]
        values = cache.k if cache.v is None else cache.v
        return plain_attention(q, cache.k, values, mask=seen[None, None], scale=scale)

    return sharding.per_device(local, 2, 1)(q, cache, start)


def max_logits(
    q: Float[Array, "B S N H"],
    k: Float[Array, "B S M H"],
    segments: Int[Array, "B S"] | None,
    counted: Bool[Array, "B S"],
) -> Float[Array, "B N"]:
    """Largest q·k/√H of a counted query and a key it attends to, of every sequence and head; −∞ without such a pair.

    Computed beside the attention, whose result stays what it is: flash attention keeps no logits, and its logsumexp is
    only a bound (it exceeds the maximum by up to the log of the number of keys). Block by block up to the diagonal, so
    `[B, N, S, S]` never exists. Cost: S·N·H FLOPs a token and layer, one sixth of the attention's own (forward and
    backward, causal), with every logit written and read once; nothing in the backward pass or when recomputing.
    """

    def local(q, k, segments, counted):
        b, s, n, h = q.shape
        m, count = k.shape[2], -(-s // BLOCK)
        size = -(-s // count)

        def blocks(x):
            """`[B, S, …]` → `[S/C, B, C, …]`; what is padded comes last, so that no counted query sees it."""
            x = jnp.pad(x, [(0, 0), (0, count * size - s)] + [(0, 0)] * (x.ndim - 2))
            return jnp.swapaxes(x.reshape(b, count, size, *x.shape[2:]), 0, 1)

        q, k, counted = blocks(q.reshape(b, s, m, n // m, h)), blocks(k), blocks(counted)
        segments = None if segments is None else blocks(segments)
        place = jnp.arange(size)

        def largest(pair):
            i, j = pair
            logits = jnp.einsum("bsmrh,bzmh->bmrsz", q[i], k[j], preferred_element_type=jnp.float32)
            seen = (i * size + place[:, None] >= j * size + place[None, :])[None] & counted[i][:, :, None]
            if segments is not None:
                seen &= segments[i][:, :, None] == segments[j][:, None, :]
            return jnp.max(jnp.where(seen[:, None, None], logits, -jnp.inf), axis=(3, 4)).reshape(b, n)

        return jnp.max(jax.lax.map(largest, np.tril_indices(count)), axis=0) / h**0.5

    return sharding.per_device(local, 4)(*jax.lax.stop_gradient((q, k)), segments, counted)


def qk_clip(w: dict, max_logit: Float[Array, "L N"], threshold: float) -> dict:
    """The weights of L attention layers such that logits up to S > threshold would have been up to threshold.

    w_q and w_k of a head times √γ, γ = min(1, threshold/S). Query heads that share keys share the largest S and with it
    γ, as in Megatron. A head at or below the threshold keeps every bit. The optimizer's momentum is left as it is.
    Source: arXiv:2507.20534, §2.1.
    """
    layers, n = max_logit.shape
    m = w["w_k"].shape[-1] * n // w["w_q"].shape[-1]
    largest = jnp.max(max_logit.reshape(layers, m, n // m), axis=2)
    root = jnp.sqrt(threshold / jnp.maximum(largest, threshold))
    scaled = {name: w[name] * jnp.repeat(root, w[name].shape[-1] // m, axis=1)[:, None] for name in ("w_q", "w_k")}
    return {**w, **scaled}


class Attention(nnx.Module):
    def __init__(self, cfg: ModelConfig, init: Init, out_std: float, backend: str):
        self.cfg, self.backend = cfg, backend
        d, n, m, h = cfg.d_model, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        self.w_q = init.normal((d, n * h), "embed heads")
        self.w_k = init.normal((d, m * h), "embed heads")
        self.w_v = init.normal((d, m * h), "embed heads")
        self.w_o = init.normal((n * h, d), "heads embed", out_std)
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
        """With a cache, the S tokens are written to it from place `start` and attend to it; segments are not used.

        With `counted`, not with a cache, the third result is `max_logits` of those queries.
        """
        cfg = self.cfg
        heads = lambda x: sharding.reshape_tail(x, 2, -1, cfg.head_dim)
        q, k, v = keep(tuple(x @ weight(w, x.dtype) for w in (self.w_q, self.w_k, self.w_v)), "qkv")
        if cfg.qk_norm_over == "head":
            q, k = heads(q), heads(k)
        if self.q_norm is not None:
            q, k = rms_norm(q, self.q_norm[...], cfg.norm_eps), rms_norm(k, self.k_norm[...], cfg.norm_eps)
        if cfg.qk_norm_over == "projection":
            q, k = heads(q), heads(k)
        v, freq = heads(v), rope_frequencies(cfg, cfg.head_dim)
        q, k = rope(q, positions, freq), rope(k, positions, freq)
        top = None if counted is None else max_logits(q, k, segments, counted)
        if cache is None:
            y = attend(q, k, v, segments, self.backend)
        else:
            cache = cache.write(k, v, start)
            y = attend_cache(q, cache, start, cfg.head_dim**-0.5)
        return sharding.reshape_tail(y, 2, -1) @ weight(self.w_o, x.dtype), cache, top
