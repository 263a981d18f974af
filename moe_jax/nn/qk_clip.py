"""QK-clip: finds the largest attention logits of a forward pass, and scales weights to keep them below a threshold.

Source: arXiv:2507.20534, §2.1. Letters: N query heads, M key/value heads, H head size, L layers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from moe_jax.parallel import sharding
from moe_jax.tree import update_at

CLIPPED = ("w_q", "w_q_up", "w_k", "w_k_up", "b_q", "b_k")  # what clipping scales
BLOCK = 512  # queries and keys of a block; the logits of one block exist at a time


def max_logits(
    q: Float[Array, "B S N H"],
    k: Float[Array, "B S M H"],
    segments: Int[Array, "B S"] | None,
    counted: Bool[Array, "B S"],
    window: int = 0,
) -> Float[Array, "B N"]:
    """The largest q·k/√H of counted queries and keys they attend to, by sequence and head; −∞ if there are none.

    This is computed apart from attention, because flash attention keeps no logits, and its logsumexp is only a bound:
    it exceeds the maximum by up to the log of the number of keys. Blocks up to the diagonal are computed one at a time,
    so `[B, N, S, S]` never exists. It costs S·N·H FLOPs a token and layer, one sixth of the attention's own (forward
    and backward, causal), and writes and reads each logit once. The backward pass and recomputation cost nothing.
    window: number of tokens that a query sees, its own included; 0: all before it.
    """

    def local(q, k, segments, counted):
        b, s, n, h = q.shape
        m, count = k.shape[2], -(-s // BLOCK)
        size = -(-s // count)

        def blocks(x):
            """Splits `[B, S, …]` into `[blocks, B, size, …]`. Padding comes last: no counted query attends to it."""
            x = jnp.pad(x, [(0, 0), (0, count * size - s)] + [(0, 0)] * (x.ndim - 2))
            return jnp.swapaxes(x.reshape(b, count, size, *x.shape[2:]), 0, 1)

        q, k, counted = blocks(q.reshape(b, s, m, n // m, h)), blocks(k), blocks(counted)
        segments = None if segments is None else blocks(segments)
        position = jnp.arange(size)

        def largest(pair):
            i, j = pair
            logits = jnp.einsum("bsmrh,bzmh->bmrsz", q[i], k[j], preferred_element_type=jnp.float32)
            visible = (i * size + position[:, None] >= j * size + position[None, :])[None] & counted[i][:, :, None]
            if window:
                visible &= ((i - j) * size + position[:, None] - position[None, :] < window)[None]
            if segments is not None:
                visible &= segments[i][:, :, None] == segments[j][:, None, :]
            return jnp.max(jnp.where(visible[:, None, None], logits, -jnp.inf), axis=(3, 4)).reshape(b, n)

        pairs = np.tril_indices(count)
        if window:  # blocks of which no key is near enough are left out
            pairs = tuple(x[(pairs[0] - pairs[1] - 1) * size + 1 < window] for x in pairs)
        return jnp.max(jax.lax.map(largest, pairs), axis=0) / h**0.5

    return sharding.per_device(local, 4)(*jax.lax.stop_gradient((q, k)), segments, counted)


def clip_attention(w: dict, max_logit: Float[Array, "L N"], threshold: float) -> dict:
    """Scales the weights of L attention layers so that the largest logit of a head would have been at most `threshold`.

    w_q and w_k of a head, and their biases, are multiplied by √γ, γ = min(1, threshold / its largest logit). Query
    heads that share keys share the largest logit and so γ, as in Megatron. A head at or below the threshold keeps every
    bit. The optimizer's momentum is not changed.
    Source: arXiv:2507.20534, §2.1.
    """
    layers, n = max_logit.shape
    m = w["w_k"].shape[-1] * n // w["w_q"].shape[-1]
    largest = jnp.max(max_logit.reshape(layers, m, n // m), axis=2)
    root = jnp.sqrt(threshold / jnp.maximum(largest, threshold))
    scale = lambda a: jnp.repeat(root, a.shape[-1] // m, axis=1)
    scaled = {name: w[name] * scale(w[name])[:, None] for name in ("w_q", "w_k")}
    return {**w, **scaled, **{name: w[name] * scale(w[name]) for name in ("b_q", "b_k") if name in w}}


def clip_mla(w: dict, max_logit: Float[Array, "L N"], threshold: float) -> dict:
    """Scales MLA layers as `clip_attention` does: a head's own weights by √γ, its rotated queries by γ.

    Rotated queries take all of γ, because all heads share the rotated keys, which are not scaled.

    Source: arXiv:2507.20534, §2.1.
    """
    layers, n = max_logit.shape
    gamma: Float[Array, "L N"] = threshold / jnp.maximum(max_logit, threshold)
    queries = "w_q" if "w_q" in w else "w_q_up"
    size, plain = w[queries].shape[-1] // n, w["w_k_up"].shape[-1] // n
    rotated = jnp.arange(size) >= plain
    query_scale = jnp.where(rotated[None, None, :], gamma[:, :, None], jnp.sqrt(gamma)[:, :, None])
    key_scale = jnp.repeat(jnp.sqrt(gamma), plain, axis=1)
    return {**w, queries: w[queries] * query_scale.reshape(layers, 1, -1), "w_k_up": w["w_k_up"] * key_scale[:, None]}


class Maxima(NamedTuple):
    """Statistics that are combined by maximum over micro-batches, devices and hosts; all others are summed."""

    logit: dict[str, Float[Array, "L N"]]  # by block, see `max_logits`


def clip(
    params: dict, maxima: Maxima | None, threshold: float, frozen: frozenset[str] = frozenset()
) -> tuple[dict, dict]:
    """Applies QK-clip to all layers, from the maxima of the step's own forward pass. Also returns what is logged.

    frozen: paths of parameters that must not change. Layers in which a scaled weight is frozen are not clipped.
    """
    if maxima is None:
        return params, {}
    fixed = lambda path: any(f"{path}/attention/{name}" in frozen for name in CLIPPED)
    able = {path: max_logit for path, max_logit in maxima.logit.items() if not fixed(path)}

    for path, max_logit in able.items():

        def clipped(w: dict, max_logit=max_logit) -> dict:
            return (clip_mla if "w_kv_down" in w else clip_attention)(w, max_logit, threshold)

        params = update_at(params, f"{path}/attention", clipped)
    largest = jnp.concatenate(list(maxima.logit.values()))
    counted = jnp.concatenate([largest[:0], *able.values()]) if frozen else largest
    scalars = {"max_logit": jnp.max(largest), "clipped_heads": jnp.sum(counted > threshold).astype(jnp.float32)}
    return params, scalars
