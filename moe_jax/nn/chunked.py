"""Attention in plain XLA that never holds `[S, S]` logits: for CPUs, and wherever no kernel fits.

The queries are cut into at most `SPANS` spans. A span attends to the keys before its end, so most of what lies above
the diagonal is never computed. A span is worked through in blocks of queries: the logits of one block exist at a time,
`[block, S]` a head. The backward pass is given the result and the logsumexp of each query, and computes logits again.
With a window all blocks are one span, and a block attends to its own keys and the window's before it, no others.

Letters: B sequences, S tokens, N query heads, M key/value heads, G = N / M, H head size of queries and keys, W that of
values, Q queries of a block, K keys that a span sees.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.nn.remat import keep
from moe_jax.parallel.axes import varying_like

SPANS = 4
BLOCK = (64, 256)  # queries of a block: the fewest of a sequence that is cut, and the most
MASKED = -1e30  # a logit that does not count; finite, so that the difference of two is a number


class Span(NamedTuple):
    """The queries start … stop − 1, in blocks of `block`, and the keys before `stop`."""

    start: int
    stop: int
    block: int
    back: int | None = None  # of a block the keys before its first query; None: the span's, all before `stop`


def spans(length: int, window: int = 0) -> list[Span]:
    """Cuts a sequence of `length` tokens. The last span may end behind it, on padding."""
    fewest, most = BLOCK
    if window and length > fewest:
        blocks = -(-length // most)
        block = -(-length // (blocks * 8)) * 8
        if window - 1 + block < length:
            return [Span(0, blocks * block, block, window - 1)]
    number = min(SPANS, -(-length // fewest))
    if number == 1:
        return [Span(0, length, length)]
    blocks = -(-length // (number * most))  # of a span
    block = -(-length // (number * blocks * 8)) * 8  # a multiple of 8
    size = block * blocks
    return [Span(start, start + size, block) for start in range(0, length, size)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def chunked_attention(
    q: Float[Array, "B S N H"],
    k: Float[Array, "B S M H"],
    v: Float[Array, "B S M W"],
    segments: Int[Array, "B S"] | None,
    window: int = 0,
) -> Float[Array, "B S N W"]:
    """Computes causal softmax(q·k/√H) · v inside each segment. Logits and sums are float32.

    window: number of tokens that a query sees, its own included; 0: all before it.
    """
    return _forward(q, k, v, segments, window)[0]


def _forward(q, k, v, segments, window):
    """Returns the result, and the logsumexp of each query, `[B, S, N]` in float32."""
    cut = spans(q.shape[1], window)
    padded_q, k, v, ids = (_pad(x, cut[-1].stop) for x in (_grouped(q, k), k, v, segments))

    def block(start, first, q, ids_q, keys, values, ids_k):
        logits = _logits(start, first, q, ids_q, keys, ids_k, window)
        largest = jnp.max(logits, axis=-1, keepdims=True)
        p = jnp.exp(logits - largest)
        total = jnp.sum(p, axis=-1, keepdims=True)
        y = _dot("bmgqk,bkmw->bqmgw", p.astype(values.dtype), values) / jnp.moveaxis(total, 3, 1)
        return (y.astype(values.dtype), jnp.moveaxis(largest + jnp.log(total), 3, 1)), ()

    parts = [_over_blocks(span, block, (padded_q, ids), (k, v, ids))[0] for span in cut]
    y, lse = (jnp.concatenate(xs, axis=1)[:, : q.shape[1]] for xs in zip(*parts, strict=True))
    return keep((y.reshape(*q.shape[:3], -1), lse.reshape(q.shape[:3])), "attention")


def _backward(window, saved, dy):
    q, k, v, segments, y, lse = saved
    cut, scale = spans(q.shape[1], window), q.shape[-1] ** -0.5
    # Σ_k p · dp of a query, which its softmax subtracts, is y · dy.
    inner = jnp.sum(y.astype(jnp.float32) * dy.astype(jnp.float32), axis=-1)
    of_queries = (_grouped(x, k) for x in (q, dy, lse[..., None], inner[..., None]))
    q_, dy_, lse_, inner_, k_, v_, ids = (_pad(x, cut[-1].stop) for x in (*of_queries, k, v, segments))

    def block(start, first, q, dy, lse, inner, ids_q, keys, values, ids_k):
        p = jnp.exp(_logits(start, first, q, ids_q, keys, ids_k, window) - jnp.moveaxis(lse, 1, 3))
        dp = _dot("bqmgw,bkmw->bmgqk", dy, values)
        ds = (p * (dp - jnp.moveaxis(inner, 1, 3)) * scale).astype(keys.dtype)
        dq = _dot("bmgqk,bkmh->bqmgh", ds, keys).astype(q.dtype)
        return (dq,), (_dot("bmgqk,bqmgh->bkmh", ds, q), _dot("bmgqk,bqmgw->bkmw", p.astype(dy.dtype), dy))

    dqs, dk, dv = [], 0, 0
    for span in cut:
        (dq,), (dk_span, dv_span) = _over_blocks(span, block, (q_, dy_, lse_, inner_, ids), (k_, v_, ids))
        dqs.append(dq)
        dk, dv = dk + _pad(dk_span, cut[-1].stop), dv + _pad(dv_span, cut[-1].stop)
    dq = jnp.concatenate(dqs, axis=1)[:, : q.shape[1]].reshape(q.shape)
    return dq, dk[:, : k.shape[1]].astype(k.dtype), dv[:, : v.shape[1]].astype(v.dtype), None


def _forward_rule(q, k, v, segments, window):
    y, lse = _forward(q, k, v, segments, window)
    return y, (q, k, v, segments, y, lse)


chunked_attention.defvjp(_forward_rule, _backward)


# --- blocks ----------------------------------------------------------------------------------------------------------


def _over_blocks(span: Span, block, of_queries: tuple, of_keys: tuple) -> tuple[tuple, tuple]:
    """Calls `block(start, first, *queries, *keys)` on each block of a span's queries, and the keys first, first + 1, …
    that it sees.

    It returns a tuple of values for each query, which are joined, and one of values for each key, which are summed.
    """
    queries = tuple(None if x is None else x[:, span.start : span.stop] for x in of_queries)
    keys, back = tuple(None if x is None else x[:, : span.stop] for x in of_keys), span.back
    if back is not None:  # padding in front, which no query sees
        keys = tuple(None if x is None else jnp.pad(x, [(0, 0), (back, 0)] + [(0, 0)] * (x.ndim - 2)) for x in keys)
    elif span.stop - span.start == span.block:
        return block(span.start, 0, *queries, *keys)

    def split(x):
        return jnp.moveaxis(x.reshape(x.shape[0], -1, span.block, *x.shape[2:]), 1, 0)

    def step(sums, x):
        if back is None:
            joined, new = block(x[0], 0, *x[1], *keys)
            return jax.tree.map(jnp.add, sums, new), joined
        part = lambda y: jax.lax.dynamic_slice_in_dim(y, x[0], back + span.block, axis=1)
        joined, new = block(x[0], x[0] - back, *x[1], *jax.tree.map(part, keys))
        add = lambda y, z: jax.lax.dynamic_update_slice_in_dim(y, part(y) + z, x[0], axis=1)
        return jax.tree.map(add, sums, new), joined

    starts = jnp.arange(span.start, span.stop, span.block)
    xs = starts, jax.tree.map(split, queries)
    shapes = jax.eval_shape(lambda: block(span.start, 0, *jax.tree.map(lambda x: split(x)[0], queries), *keys)[1])
    zeros = tuple(varying_like(jnp.zeros(x.shape, x.dtype), keys[0]) for x in shapes)
    sums, joined = jax.lax.scan(step, zeros, xs)
    if back:
        sums = jax.tree.map(lambda x: x[:, back:], sums)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:]), joined), sums


def _logits(start, first, q, ids_q, keys, ids_k, window) -> Float[Array, "B M G Q K"]:
    """The logits of queries start, start + 1, … and keys first, first + 1, …; those that do not count are `MASKED`."""
    at_q, at_k = (start + jnp.arange(q.shape[1]))[:, None], jnp.arange(keys.shape[1])[None, :]
    if window:
        at_k = at_k + first
        visible = ((at_q >= at_k) & (at_q - at_k < window) & (at_k >= 0))[None]
    else:
        visible = (at_q >= at_k)[None]
    if ids_q is not None:
        visible &= ids_q[:, :, None] == ids_k[:, None, :]
    return jnp.where(visible[:, None, None], _dot("bqmgh,bkmh->bmgqk", q, keys) * q.shape[-1] ** -0.5, MASKED)


def _dot(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _grouped(x: Float[Array, "B S N X"], k: Float[Array, "B S M H"]) -> Float[Array, "B S M G X"]:
    """Splits query heads into the groups that share keys and values."""
    return x.reshape(*x.shape[:2], k.shape[2], -1, x.shape[-1])


def _pad(x: Array | None, length: int) -> Array | None:
    if x is None or x.shape[1] == length:
        return x
    return jnp.pad(x, [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
