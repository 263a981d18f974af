"""Grouped matmul on any GPU, from XLA's own products. Letters: R rows, E groups (experts), D in, F out.

The library that XLA calls multiplies many matrices of one shape at once, and groups have many sizes. So the first C
rows of every group, where C is 1.25 times the mean size, are copied to a buffer `[E, C, D]` and multiplied by all
matrices in one product. Only groups with more rows than C have further blocks, of about C/3 rows each. A loop
multiplies them, eight blocks a pass, each by a copy of its group's matrix. So the FLOPs are those of 1.25·R rows and of
the rows past C, in whole passes. The buffers are those of the first product and of one pass.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

SHARE = 1.25  # rows of a group in the first product, as a multiple of the mean
PARTS = 3  # a further block has this part of them
PASS = 8  # further blocks in one pass of the loop


class Groups(NamedTuple):
    """The places of the rows of every group: in x, in the buffer of the first product, and in further blocks."""

    start: Int[Array, " E"]  # first row
    end: Int[Array, " E"]  # the row after the last
    before: Int[Array, " E+1"]  # number of further blocks before each group, and of all
    place: Int[Array, " R"]  # of each row in the flat buffer `[E·C]`, or E·C for a row that is not in it


def heights(rows: int, experts: int) -> tuple[int, int]:
    """The rows of a group in the first product (C), and those of a further block: multiples of 8, or of 64 if many."""
    first = _up(min(SHARE, experts) * rows / experts)  # at most all rows
    return first, _up(first / PARTS)


def _up(rows: float) -> int:
    unit = 64 if rows >= 256 else 8
    return max(unit, math.ceil(rows / unit) * unit)


def find_groups(sizes: Int[Array, " E"], rows: int) -> Groups:
    """Computes the `Groups` of these sizes. rows: R, the number of rows of x."""
    first, block = heights(rows, sizes.shape[0])
    end = jnp.cumsum(sizes)
    start = end - sizes
    further = -(-jnp.maximum(sizes - first, 0) // block)
    before = jnp.append(0, jnp.cumsum(further))
    row = jnp.arange(rows)
    group = jnp.sum(end[None, :] <= row[:, None], axis=1)  # E for a row past the last group
    offset = row - jnp.append(start, 0)[group]
    nowhere = sizes.shape[0] * first
    place = jnp.where((group < sizes.shape[0]) & (offset < first), group * first + offset, nowhere)
    return Groups(start, end, before, place)


class Batched:
    """The back end. It computes in the dtype of x; every product sums in float32."""

    groups = staticmethod(find_groups)

    def forward(self, x, ws, groups):
        return self._rows((x,), ws, groups, lambda xs, ws: [jnp.einsum("ncd,ndf->ncf", xs[0], w) for w in ws])

    def backward(self, dys, ws, groups):
        transposed = lambda dys, ws: [sum(jnp.einsum("ncf,ndf->ncd", dy, w) for dy, w in zip(dys, ws, strict=True))]
        return self._rows(dys, ws, groups, transposed)[0]

    def _rows(self, xs, ws, groups: Groups, products: Callable):
        """products: (blocks `[n, c, D]` of every x, the `[n, D, F]` of every w) → the results `[n, c, F]`."""
        rows, experts = xs[0].shape[0], ws[0].shape[0]
        first, block = heights(rows, experts)
        ys = products([_blocks(x, groups.start, first) for x in xs], ws)
        ys = [_take(y.reshape(experts * first, -1), groups.place) for y in ys]

        def body(i, ys):
            group, row, end = _further(groups, i, first, block)
            own_xs = [_blocks(x, row, block) for x in xs]
            own_ys = products(own_xs, [w[group] for w in ws])
            at = _runs(row, block)
            # The rows after a group's end belong to others. They go past the end of y, each to a place of its own.
            at = jnp.where(at < end[:, None], at, rows + jnp.arange(PASS * block).reshape(PASS, block)).reshape(-1)
            write = lambda y, own: y.at[at].set(own.reshape(at.shape[0], -1), mode="drop", unique_indices=True)
            return [write(y, own) for y, own in zip(ys, own_ys, strict=True)]

        return tuple(jax.lax.fori_loop(0, _passes(groups), body, ys))

    def weights(self, x, dys, groups: Groups):
        rows, experts = x.shape[0], groups.start.shape[0]
        first, block = heights(rows, experts)

        def products(start, end, height):
            own = (_runs(start, height) < end[:, None])[:, :, None]
            x_own, *dys_own = (jnp.where(own, _blocks(a, start, height), 0) for a in (x, *dys))
            return [jnp.einsum("ncd,ncf->ndf", x_own, dy, preferred_element_type=jnp.float32) for dy in dys_own]

        def body(i, dws):
            group, row, end = _further(groups, i, first, block)
            added = products(row, end, block)
            for n in range(PASS):  # in turn: a scatter would add blocks of one group in any order
                dws = [dw.at[group[n]].add(own[n]) for dw, own in zip(dws, added, strict=True)]
            return dws

        return tuple(jax.lax.fori_loop(0, _passes(groups), body, products(groups.start, groups.end, first)))


def _passes(groups: Groups) -> Array:
    return -(-groups.before[-1] // PASS)


def _further(groups: Groups, i: Array, first: int, block: int) -> tuple[Array, Array, Array]:
    """Returns groups, first rows, and the ends of groups for the further blocks of pass i.

    A block past the last one is of the last group, and begins past its end.
    """
    number = i * PASS + jnp.arange(PASS)
    group = jnp.minimum(jnp.sum(groups.before[None, 1:] <= number[:, None], axis=1), groups.start.shape[0] - 1)
    return group, groups.start[group] + first + (number - groups.before[group]) * block, groups.end[group]


def _blocks(x: Float[Array, "R D"], start: Int[Array, " n"], height: int) -> Float[Array, "n c D"]:
    """Copies the `height` rows from every `start`. Those past the end of x repeat its last row."""
    at = jnp.minimum(_runs(start, height), x.shape[0] - 1)
    return _take(x, at.reshape(-1)).reshape(*at.shape, -1)


def _runs(start: Int[Array, " n"], height: int) -> Int[Array, "n c"]:
    """Numbers the `height` rows from every `start`."""
    return start[:, None] + jnp.arange(height)[None, :]


def _take(x: Float[Array, "R D"], at: Int[Array, " n"]) -> Float[Array, "n D"]:
    """Returns x[at], and zeros for an index past the end. It copies 2-byte numbers in pairs, which GPUs do faster."""
    if x.dtype.itemsize != 2 or x.shape[1] % 2:
        return x.at[at].get(mode="fill", fill_value=0)
    pairs = jax.lax.bitcast_convert_type(x.reshape(x.shape[0], -1, 2), jnp.uint32)
    return jax.lax.bitcast_convert_type(pairs.at[at].get(mode="fill", fill_value=0), x.dtype).reshape(len(at), -1)
