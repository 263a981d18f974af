"""Attention in plain XLA that never holds `[S, S]` logits: for CPUs, and wherever no kernel fits.

The queries are cut into at most `SPANS` spans. A span attends to the keys before its end, so most of what lies above
the diagonal is never computed. A span is worked through in blocks of queries: the logits of one block exist at a time,
`[block, S]` a head. The backward pass is given the result and the logsumexp of each query, and computes logits again.

Letters: B sequences, S tokens, N query heads, M key/value heads, G = N / M, H head size of queries and keys, W that of
values, Q queries of a block, K keys that a span sees.
"""

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


def spans(length: int) -> list[Span]:
    """Cuts a sequence of `length` tokens. The last span may end behind it, on padding."""
    fewest, most = BLOCK
    number = min(SPANS, -(-length // fewest))
    if number == 1:
        return [Span(0, length, length)]
    blocks = -(-length // (number * most))  # of a span
    block = -(-length // (number * blocks * 8)) * 8  # a multiple of 8
    size = block * blocks
    return [Span(start, start + size, block) for start in range(0, length, size)]


@jax.custom_vjp
def chunked_attention(
    q: Float[Array, "B S N H"],
    k: Float[Array, "B S M H"],
    v: Float[Array, "B S M W"],
    segments: Int[Array, "B S"] | None,
) -> Float[Array, "B S N W"]:
    """Computes causal softmax(q·k/√H) · v inside each segment. Logits and sums are float32."""
    return _forward(q, k, v, segments)[0]


def _forward(q, k, v, segments):
    """Returns the result, and the logsumexp of each query, `[B, S, N]` in float32."""
    cut = spans(q.shape[1])
    padded_q, k, v, ids = (_pad(x, cut[-1].stop) for x in (_grouped(q, k), k, v, segments))

    def block(start, q, ids_q, keys, values, ids_k):
        logits = _logits(start, q, ids_q, keys, ids_k)
        largest = jnp.max(logits, axis=-1, keepdims=True)
        p = jnp.exp(logits - largest)
        total = jnp.sum(p, axis=-1, keepdims=True)
        y = _dot("bmgqk,bkmw->bqmgw", p.astype(values.dtype), values) / jnp.moveaxis(total, 3, 1)
        return (y.astype(values.dtype), jnp.moveaxis(largest + jnp.log(total), 3, 1)), ()

    parts = [_over_blocks(span, block, (padded_q, ids), (k, v, ids))[0] for span in cut]
    y, lse = (jnp.concatenate(xs, axis=1)[:, : q.shape[1]] for xs in zip(*parts, strict=True))
    return keep((y.reshape(*q.shape[:3], -1), lse.reshape(q.shape[:3])), "attention")


def _backward(saved, dy):
    q, k, v, segments, y, lse = saved
    cut, scale = spans(q.shape[1]), q.shape[-1] ** -0.5
    # Σ_k p · dp of a query, which its softmax subtracts, is y · dy.
    inner = jnp.sum(y.astype(jnp.float32) * dy.astype(jnp.float32), axis=-1)
    of_queries = (_grouped(x, k) for x in (q, dy, lse[..., None], inner[..., None]))
    q_, dy_, lse_, inner_, k_, v_, ids = (_pad(x, cut[-1].stop) for x in (*of_queries, k, v, segments))

    def block(start, q, dy, lse, inner, ids_q, keys, values, ids_k):
        p = jnp.exp(_logits(start, q, ids_q, keys, ids_k) - jnp.moveaxis(lse, 1, 3))
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


def _forward_rule(q, k, v, segments):
    y, lse = _forward(q, k, v, segments)
    return y, (q, k, v, segments, y, lse)


chunked_attention.defvjp(_forward_rule, _backward)


# --- blocks ----------------------------------------------------------------------------------------------------------


def _over_blocks(span: Span, block, of_queries: tuple, of_keys: tuple) -> tuple[tuple, tuple]:
    """Calls `block(start, *queries, *keys)` on each block of a span's queries, and all keys that the span sees.

    It returns a tuple of values for each query, which are joined, and one of values for each key, which are summed.
    """
    queries = tuple(None if x is None else x[:, span.start : span.stop] for x in of_queries)
    keys = tuple(None if x is None else x[:, : span.stop] for x in of_keys)
    if span.stop - span.start == span.block:
        return block(span.start, *queries, *keys)

    def split(x):
        return jnp.moveaxis(x.reshape(x.shape[0], -1, span.block, *x.shape[2:]), 1, 0)

    def step(sums, x):
        joined, new = block(x[0], *x[1], *keys)
        return jax.tree.map(jnp.add, sums, new), joined

    starts = jnp.arange(span.start, span.stop, span.block)
    xs = starts, jax.tree.map(split, queries)
    shapes = jax.eval_shape(lambda: block(span.start, *jax.tree.map(lambda x: split(x)[0], queries), *keys)[1])
    zeros = tuple(varying_like(jnp.zeros(x.shape, x.dtype), keys[0]) for x in shapes)
    sums, joined = jax.lax.scan(step, zeros, xs)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:]), joined), sums


def _logits(start, q, ids_q, keys, ids_k) -> Float[Array, "B M G Q K"]:
    """The logits of queries start, start + 1, …; those of keys that a query must not see are `MASKED`."""
    visible = ((start + jnp.arange(q.shape[1]))[:, None] >= jnp.arange(keys.shape[1])[None, :])[None]
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
