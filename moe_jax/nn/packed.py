"""cuDNN's attention to documents packed in one row: the lists of segments that its calls are given.

A call takes a list of segments, each by offset and size, and works through all places of the list times the length of a
row, whether they are taken or not. Two kinds of calls keep that small:

- The first call has a place for every `PIECE` tokens, up to `MOST` a row. It takes all segments that are longer than
  a piece, then the first ones of the device's rows.
- Further calls take the rest, all of them short. They are shown each row as pieces, so that no place is longer than a
  piece. A segment may still lie anywhere, over the border of pieces too, since pieces of a row lie one after another in
  memory. Where documents are long there is no rest.

Results do not depend on these numbers. Letters: B rows of S tokens, T = B·S, N query heads, M key/value heads, H head
size, R segments of a call.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_jax.nn import cudnn
from moe_jax.nn.remat import keep
from moe_jax.parallel.axes import varying_like

PIECE = 512  # tokens of a piece, at least; rows shorter than that are one piece
MOST = 32  # pieces of a row: the memory of the first call is that of as many rows of logsumexps and sums
WHOLE = 8  # segments of a row that the first call has place for, on average; in longer rows one for each piece
PLACES = 16  # segments of a piece that a further call has place for, on average
COUNTED = 128  # tokens of a block of `count`


class Shapes(NamedTuple):
    """The sizes of the calls for a device's rows."""

    whole: int  # segments of the first call
    rows: int  # pieces of all rows
    length: int  # tokens of a piece
    rest: int  # segments of a further call


def shapes(rows: int, length: int) -> Shapes:
    """Cuts each row into pieces of one length, which must divide the row's."""
    pieces = next(n for n in range(min(max(length // PIECE, 1), MOST), 0, -1) if length % n == 0)
    return Shapes(rows * max(WHOLE, pieces), rows * pieces, length // pieces, rows * pieces * PLACES)


def logsumexps(length: int) -> int:
    """The numbers that the backward pass is given for a row and a query head: a call has one for each place and token.

    For long documents, whose rest is empty, it is given as many.
    """
    sizes = shapes(1, length)
    return sizes.whole * length + sizes.rest * sizes.length


class Lists(NamedTuple):
    """The segments of T tokens in their order, at most T, and the call that handles each token's segment."""

    offset: Int[Array, "T"]  # a segment's first token; T: there is no such segment
    size: Int[Array, "T"]  # its tokens; 0: there is no such segment
    place: Int[Array, "T"]  # its number among the segments of the first call, or −1 − its number among the rest
    of_token: Int[Array, "T"]  # `place` of a token's segment
    rest: Int[Array, ""]  # the number of segments that the first call does not handle

    def first_call(self, shapes: Shapes) -> cudnn.Packed:
        """The list of the first call."""
        return self._list(self.place, shapes.whole)

    def further_call(self, shapes: Shapes, i: Int[Array, ""] | int) -> cudnn.Packed:
        """The list of the i-th further call."""
        return self._list(-1 - self.place - i * shapes.rest, shapes.rest)

    def _list(self, place: Int[Array, "T"], number: int) -> cudnn.Packed:
        tokens = len(self.size)
        at = jnp.where(place < 0, number, place)  # `number` and more: not in the list
        put = lambda empty, x: varying_like(jnp.full(number, empty, jnp.int32), x).at[at].set(x, mode="drop")
        return cudnn.Packed(put(tokens, self.offset), put(0, self.size))

    def in_first_call(self) -> Bool[Array, "T"]:
        """Whether the first call handles a token's segment."""
        return self.of_token >= 0

    def in_further_call(self, shapes: Shapes, i: Int[Array, ""] | int) -> Bool[Array, "T"]:
        """Whether the i-th further call handles a token's segment."""
        place = -1 - self.of_token - i * shapes.rest
        return (place >= 0) & (place < shapes.rest)


def count(which: Bool[Array, "T"]) -> Int[Array, "T"]:
    """The number of entries that are true up to each one, itself included.

    Computed in two steps, within blocks and over blocks. JAX's `cumsum` on a GPU is a tree of many small operations.
    """
    blocks = -(-len(which) // COUNTED)
    x = jnp.pad(which, (0, blocks * COUNTED - len(which))).reshape(blocks, COUNTED)

    def up_to(x, strictly: int):
        before = jnp.tri(x.shape[-1], k=-strictly, dtype=bool)
        return jnp.sum(jnp.where(before, x[..., None, :], 0), axis=-1, dtype=jnp.int32)

    totals = jnp.sum(x, axis=1, dtype=jnp.int32)
    return (jax.vmap(functools.partial(up_to, strictly=0))(x) + up_to(totals, 1)[:, None]).reshape(-1)[: len(which)]


def lists(segments: Int[Array, "B S"]) -> Lists:
    """Sorts segments into calls: those longer than a piece into the first, of which a row has fewer than pieces."""
    tokens, sizes = segments.size, shapes(*segments.shape)
    first = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True).reshape(-1)
    number = count(first) - 1  # of a token's segment
    at = varying_like(jnp.arange(tokens, dtype=jnp.int32), segments)
    empty = varying_like(jnp.full(tokens + 1, tokens, jnp.int32), segments)
    offset = empty.at[jnp.where(first, number, tokens + 1)].set(at, mode="drop")
    size = offset[1:] - offset[:-1]
    long = size > sizes.length
    longs = count(long)
    shorts, room = at + 1 - longs, sizes.whole - longs[-1]
    whole = long | (shorts <= room)
    place = jnp.where(whole, longs + jnp.minimum(shorts, room) - 1, room - shorts)
    return Lists(offset[:-1], size, place, place[number], number[-1] + 1 - longs[-1] - room)


def packed_attention(
    q: Float[Array, "B S N H"],
    k: Float[Array, "B S M H"],
    v: Float[Array, "B S M H"],
    segments: Int[Array, "B S"],
    scale: float,
    window: int = 0,
) -> Float[Array, "B S N H"]:
    """Computes causal softmax(scale · q·k) · v inside each segment, a run of equal ids. Needs Hopper or newer.

    window: number of tokens that a query sees, its own included; 0: all before it in its segment.
    """
    return _packed(q, k, v, segments, scale, window)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _packed(q, k, v, segments, scale, window):
    return _forward(q, k, v, segments, scale, window)[1]


def _forward(q, k, v, segments, scale, window):
    cut, sizes = lists(segments), shapes(*segments.shape)
    inside = lambda which: which.reshape(*segments.shape, 1, 1)
    pieces = lambda x: x.reshape(sizes.rows, sizes.length, *x.shape[2:])

    def call(i, y):
        new, lse = cudnn.forward(*map(pieces, (q, k, v)), cut.further_call(sizes, i), scale, window)
        return jnp.where(inside(cut.in_further_call(sizes, i)), new.reshape(y.shape), y), lse

    def rest(y):
        y, lse = call(0, y)
        return _further_calls(cut, sizes, lambda i, y: call(i, y)[0], y), lse

    y, lse = cudnn.forward(q, k, v, cut.first_call(sizes), scale, window)
    y = jnp.where(inside(cut.in_first_call()), y, 0)
    none = varying_like(jnp.zeros((sizes.rest, q.shape[2], sizes.length), jnp.float32), q)
    y, lse_rest = jax.lax.cond(cut.rest > 0, rest, lambda y: (y, none), y)
    return cut, *keep((y, lse, lse_rest), "attention")


def _further_calls(cut: Lists, sizes: Shapes, call, carry):
    """Returns the carry after call(i, carry) for i = 1, 2, … until no segment is left; usually call 0 left none."""
    step = lambda carry: (carry[0] + 1, call(*carry))
    start = varying_like(jnp.asarray(1, jnp.int32), cut.rest), carry
    return jax.lax.while_loop(lambda carry: carry[0] * sizes.rest < cut.rest, step, start)[1]


def _forward_rule(q, k, v, segments, scale, window):
    cut, y, lse, lse_rest = _forward(q, k, v, segments, scale, window)
    return y, (q, k, v, cut, y, lse, lse_rest)


def _backward(scale, window, saved, dy):
    q, k, v, cut, y, lse, lse_rest = saved
    sizes = shapes(*q.shape[:2])
    inside = lambda which: which.reshape(*q.shape[:2], 1, 1)
    pieces = lambda x: x.reshape(sizes.rows, sizes.length, *x.shape[2:])

    def call(i, gradients, lse=None):
        packed, operands = cut.further_call(sizes, i), tuple(map(pieces, (q, k, v)))
        if lse is None:
            _, lse = cudnn.forward(*operands, packed, scale, window)
        new = cudnn.backward(*operands, packed, scale, lse, pieces(y), pieces(dy), window)
        which = inside(cut.in_further_call(sizes, i))
        return tuple(jnp.where(which, a.reshape(b.shape), b) for a, b in zip(new, gradients, strict=True))

    def rest(*gradients):
        return _further_calls(cut, sizes, call, call(0, gradients, lse_rest))

    gradients = cudnn.backward(q, k, v, cut.first_call(sizes), scale, lse, y, dy, window)
    gradients = tuple(jnp.where(inside(cut.in_first_call()), x, 0) for x in gradients)
    return *jax.lax.cond(cut.rest > 0, rest, lambda *same: same, *gradients), None


_packed.defvjp(_forward_rule, _backward)
