"""QK-clip: the largest attention logits of a forward pass, and weights that keep them below a threshold.

Source: arXiv:2507.20534, §2.1. Letters: N query heads, M key/value heads, H head size, L layers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from moe_jax.parallel import sharding

BLOCK = 512  # queries and keys whose logits exist at one time while their maximum is taken


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


def clip_attention(w: dict, max_logit: Float[Array, "L N"], threshold: float) -> dict:
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


def clip_mla(w: dict, max_logit: Float[Array, "L N"], threshold: float) -> dict:
    """As `clip_attention`: √γ on what a head alone has, γ on its rotated queries, whose keys the heads share.

    Source: arXiv:2507.20534, §2.1.
    """
    layers, n = max_logit.shape
    gamma: Float[Array, "L N"] = threshold / jnp.maximum(max_logit, threshold)
    queries = "w_q" if "w_q" in w else "w_q_up"
    size, plain = w[queries].shape[-1] // n, w["w_k_up"].shape[-1] // n
    rotated = jnp.arange(size) >= plain
    of_query = jnp.where(rotated[None, None, :], gamma[:, :, None], jnp.sqrt(gamma)[:, :, None])
    of_key = jnp.repeat(jnp.sqrt(gamma), plain, axis=1)
    return {**w, queries: w[queries] * of_query.reshape(layers, 1, -1), "w_k_up": w["w_k_up"] * of_key[:, None]}


class Maxima(NamedTuple):
    """Combined by maximum over micro-batches, devices and hosts; all other statistics are summed."""

    logit: dict[str, Float[Array, "L N"]]  # by stack of layers, see `max_logits`


def clip(params: dict, maxima: Maxima | None, threshold: float) -> tuple[dict, dict]:
    """QK-clip of all layers, from the maxima of the step's own forward pass, and what is logged of it."""
    if maxima is None:
        return params, {}
    of = lambda weights: clip_mla if "w_kv_down" in weights else clip_attention
    clip = lambda name, top: {
        **params[name],
        "attention": of(params[name]["attention"])(params[name]["attention"], top, threshold),
    }
    tops = jnp.concatenate(list(maxima.logit.values()))
    scalars = {"max_logit": jnp.max(tops), "clipped_heads": jnp.sum(tops > threshold).astype(jnp.float32)}
    return {**params, **{name: clip(name, top) for name, top in maxima.logit.items()}}, scalars
