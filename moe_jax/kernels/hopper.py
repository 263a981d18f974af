"""Grouped matmul on Hopper GPUs: Pallas Mosaic-GPU kernels. Letters: R rows sorted by group, E groups, D in, F out.

A table of tiles, computed once from the group sizes, says what each block computes. A tile has rows of one group only.
Reads begin at a multiple of 8 rows and may reach into the groups before and after; those rows are not written.
"""

import functools
import json
import math
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.kernels import tiles
from moe_jax.kernels.tiles import DEPTH, FLAT, STAGES, TALL, UNIT, WIDE, Tiling
from moe_jax.parallel.axes import varying_like

TABLE = Path(__file__).with_name("hopper_tilings.json")  # tilings measured as faster than the first candidate
ALIGN = 8  # reads begin at multiples of this number of rows


def candidates(kind: str, inner: int, columns: int) -> list[Tiling]:
    """The tilings that fit, with the default first. kind: "rows", "rows transposed" or "weights".

    inner: for "rows" the size of the axis summed over, for "weights" the number of rows of the gradient.
    """
    tilings = [t._replace(cluster=cluster) for t in (WIDE, FLAT, TALL) for cluster in (1, 2)]
    fits = lambda t: columns % (t.columns * t.cluster) == 0 and (kind != "weights" or inner % t.rows == 0)
    return [t for t in tilings if fits(t)]


@functools.cache
def _tuned() -> dict[str, list]:
    return json.loads(TABLE.read_text(encoding="utf-8"))["tilings"] if TABLE.is_file() else {}


def best_tiling(kind: str, inner: int, columns: int) -> Tiling:
    """The tiling that was measured as fastest (`benchmarks/tune_grouped_matmul.py`), or else the first candidate."""
    found = _tuned().get(f"{kind} {inner} {columns}")
    return Tiling(*found) if found else candidates(kind, inner, columns)[0]


class RowTiles(NamedTuple):
    """A table of tiles: tile i reads x from row `base`; rows `first` to `last`, counted from there, are its group's.

    Rows past the last group form group number E, whose results are zeros.
    """

    table: Int[Array, "tiles 4"]  # group, base, first, last
    before: Int[Array, " E+2"]  # number of tiles before each group; the last entry is the number in use


class Groups(NamedTuple):
    """The first rows of groups, and their tiles, for every product with them."""

    start: Int[Array, " E+1"]  # first row of each group, and the row after the last
    short: RowTiles  # of UNIT rows
    tall: RowTiles  # of 2·UNIT rows


def find_groups(sizes: Int[Array, " E"], rows: int) -> Groups:
    """Computes the `Groups` of these sizes. rows: R, the number of rows of x."""
    start = _before(sizes)
    return Groups(start, row_tiles(start, rows, UNIT), row_tiles(start, rows, 2 * UNIT))


def row_tiles(start: Int[Array, " E+1"], rows: int, height: int) -> RowTiles:
    """The tiles of `height` rows for groups that begin at `start`. x has `rows` rows, padded as by `_at_least`.

    Each step is a reduction over the groups, which XLA compiles to one GPU kernel: three in all, with `start`.
    Cumulative sums, searches and gathers would take nine, 2 to 3 % of the time of a product of 131072 × 2048 × 1024.
    """
    rows = _padded(rows, height)
    end = jnp.append(start[1:], rows)
    aligned = start // ALIGN * ALIGN
    before = _before(jnp.where(end > start, (end - aligned + height - 1) // height, 0))

    def row(tile):
        top = aligned + (tile - before[:-1]) * height
        base = jnp.clip(top, 0, rows - height)  # no read ends past x
        first, last = jnp.maximum(top, start) - base, jnp.minimum(top + height, end) - base
        own = (before[:-1] <= tile) & (tile < before[1:])  # the group of this tile
        rows_of_groups = jnp.stack([jnp.arange(start.shape[0]), base, first, last], axis=1)
        return jnp.sum(jnp.where(own[:, None], rows_of_groups, 0), axis=0, dtype=jnp.int32)

    return RowTiles(jax.vmap(row)(jnp.arange(rows // height + 2 * start.shape[0])), before)


def _before(sizes: Int[Array, " n"]) -> Int[Array, " n+1"]:
    """The sum of the sizes before each, and of all."""
    numbers = jnp.arange(sizes.shape[0])
    until = lambda end: jnp.sum(jnp.where(numbers < end, sizes, 0), dtype=jnp.int32)
    return jax.vmap(until)(jnp.arange(sizes.shape[0] + 1))


def _padded(rows: int, least: int) -> int:
    return max(rows + -rows % ALIGN, least)


def _at_least(x: Array, least: int) -> Array:
    """Pads x with zero rows to at least `least`, and to a multiple of ALIGN."""
    return jnp.pad(x, ((0, _padded(x.shape[0], least) - x.shape[0]), (0, 0)))


def rows_times_weights(
    xs: tuple[Float[Array, "R D"], ...],
    ws: tuple[Float[Array, "E D F"], ...],
    groups: Groups,
    *,
    transpose: bool = False,
    tiling: Tiling | None = None,
) -> tuple[Float[Array, "R F"], ...]:
    """Computes x[r]·w[e], or with `transpose` x[r]·w[e]ᵀ, where w is `[E, F, D]`.

    One x is multiplied by every w; the products of several xs with their ws are summed. Rows past the last group give
    zeros.
    """
    rows, inner = xs[0].shape
    columns = ws[0].shape[1] if transpose else ws[0].shape[2]
    t = tiling or best_tiling("rows transposed" if transpose else "rows", inner, columns)
    xs = [_at_least(x, t.rows) for x in xs]
    table, before = groups.short if t.rows == UNIT else groups.tall
    body = functools.partial(_rows_block, inputs=len(xs), weights=len(ws), t=t, transpose=transpose)
    y = jax.ShapeDtypeStruct((xs[0].shape[0], columns), xs[0].dtype)
    ys = tiles.launch(body, [y] * (len(ws) if len(xs) == 1 else 1), t)(table, before, *xs, *ws)
    return tuple(varying_like(y[:rows], *xs, *ws, before) for y in ys)


def weight_gradients(
    x: Float[Array, "R D"], dys: tuple[Float[Array, "R F"], ...], groups: Groups, tiling: Tiling | None = None
) -> tuple[Float[Array, "E D F"], ...]:
    """Computes xᵀ·dy of the rows of every group, in the dtype of x; zero for an empty group."""
    t = tiling or best_tiling("weights", x.shape[1], dys[0].shape[1])
    dw = jax.ShapeDtypeStruct((groups.start.shape[0] - 1, x.shape[1], dys[0].shape[1]), x.dtype)
    x, *dys = (_at_least(a, DEPTH) for a in (x, *dys))
    dws = tiles.launch(functools.partial(_weights_block, t=t), [dw] * len(dys), t)(groups.start, x, *dys)
    return tuple(varying_like(dw, x, *dys, groups.start) for dw in dws)


class Hopper:
    """The back end. It computes in bf16, whatever the dtypes are, and pads widths with zeros to multiples of tiles."""

    groups = staticmethod(find_groups)

    def forward(self, x, ws, groups):
        return self._rows((x,), ws, groups, False)

    def backward(self, dys, ws, groups):
        return self._rows(dys, ws, groups, True)[0]

    def _rows(self, xs, ws, groups, transpose):
        dtype, (columns, inner) = xs[0].dtype, (ws[0].shape[1:] if transpose else ws[0].shape[:0:-1])
        wide = _up(columns, UNIT), _up(inner, DEPTH)
        xs = tuple(_bf16(x, wide[1]) for x in xs)
        ws = tuple(_bf16(w, *(wide if transpose else wide[::-1])) for w in ws)
        return tuple(y[:, :columns].astype(dtype) for y in rows_times_weights(xs, ws, groups, transpose=transpose))

    def weights(self, x, dys, groups):
        d, f = x.shape[1], dys[0].shape[1]
        wide = min(((_up(d, UNIT), _up(f, 2 * UNIT)), (_up(d, 2 * UNIT), _up(f, UNIT))), key=math.prod)
        dws = weight_gradients(_bf16(x, wide[0]), tuple(_bf16(dy, wide[1]) for dy in dys), groups)
        return tuple(dw[:, :d, :f] for dw in dws)


def _up(width: int, unit: int) -> int:
    return width + -width % unit


def _bf16(a: Array, *widths: int) -> Array:
    """Converts to bfloat16 and pads the last dimensions with zeros to `widths`."""
    missing = [(0, 0)] * (a.ndim - len(widths)) + [
        (0, w - n) for w, n in zip(widths, a.shape[-len(widths) :], strict=True)
    ]
    return jnp.pad(a.astype(jnp.bfloat16), missing)


# --- the kernels -----------------------------------------------------------------------------------------------------


def _split(number, size: int, parts: int) -> tuple:
    """Splits a number into that of a part of `size`, and the number within the part."""
    return (jax.lax.div(number, jnp.int32(size)), jax.lax.rem(number, jnp.int32(size))) if parts > 1 else (0, number)


def _pick(number, refs, use) -> None:
    """Calls `use(i, refs[i])` for the i that equals `number`, a traced value."""
    from jax.experimental import pallas as pl

    if len(refs) == 1:
        use(0, refs[0])
    else:
        for i, ref in enumerate(refs):
            pl.when(number == i)(functools.partial(use, i, ref))


def _rows_block(table, before, *refs, inputs: int, weights: int, t: Tiling, transpose: bool):
    """Computes tiles, each x[base : base + rows] times a stripe of one group's weights, summed over pairs of x and w.

    With one x and several ws, a tile is of one w. A band of rows is multiplied by all ws before the next band, so that
    x comes from the L2 cache for all but the first w.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    xs, ws, outs = refs[:inputs], refs[inputs : inputs + weights], refs[inputs + weights :]
    depths, experts, dtype = xs[0].shape[1] // DEPTH, ws[0].shape[0], xs[0].dtype
    count = before[experts + 1]
    across = outs[0].shape[1] // (t.columns * t.cluster)  # tiles in a row of one output
    peer = jax.lax.axis_index("cluster") if t.cluster > 1 else 0

    def tile_of(index):
        i, n = tiles.in_bands(index, count, len(outs) * across)
        group, base, first, last = (table[i, j] for j in range(4))
        which, n = _split(n, across, len(outs))
        return group, pl.multiple_of(base, ALIGN), first, last, (n * t.cluster + peer) * t.columns, which

    def fetch(tile, k, a, b, arrived):
        group, base, _, _, left, which = tile
        stripe = pl.ds(left, t.columns)
        shared = dict(collective_axes="cluster") if t.cluster > 1 else {}
        current = which if inputs == 1 else jax.lax.div(k, jnp.int32(depths))

        def copy(i, w):
            pair = i if inputs > 1 else 0
            inner = pl.ds((k - pair * depths) * DEPTH, DEPTH)
            plgpu.copy_gmem_to_smem(xs[pair].at[pl.ds(base, t.rows), inner], a, arrived, **shared)
            plgpu.copy_gmem_to_smem(w.at[group, stripe, inner] if transpose else w.at[group, inner, stripe], b, arrived)

        _pick(current, ws, copy)

    def multiply(tile, k, a, b, total, me):
        if t.stacked:
            a = a.at[pl.ds(me * t.own_rows, t.own_rows)]
        else:
            own = pl.ds(me * t.own_columns, t.own_columns)
            b = b.at[own] if transpose else b.at[:, own]
        plgpu.wgmma(total, a, b.transpose((1, 0)) if transpose else b)

    def finish(tile, total, me, parts, plain):
        _, base, first, last, left, which = tile
        down, right = t.half(me)
        first, last = (jnp.clip(v - down, 0, t.own_rows) for v in (first, last))
        total = total.astype(dtype)

        def write(_, out):
            jax.lax.cond(
                (first == 0) & (last == t.own_rows),
                lambda: tiles.store(out, total, parts, base + down, left + right),
                lambda: tiles.store_some(out, total, plain, base + down, left + right, first, last),
            )

        _pick(which, outs, write)

    tiles.run(
        count * (len(outs) * across),
        tile_of,
        lambda tile: jnp.where(tile[0] < experts, inputs * depths, 0),
        fetch,
        multiply,
        finish,
        t,
        slots=1,
        a=plgpu.SMEM((STAGES, t.rows, DEPTH), dtype, transforms=tiles.layout(DEPTH)),
        b=plgpu.SMEM((STAGES, t.columns, DEPTH), dtype, transforms=tiles.layout(DEPTH))
        if transpose
        else plgpu.SMEM((STAGES, DEPTH, t.columns), dtype, transforms=tiles.layout(t.columns)),
        plain=plgpu.SMEM((2, tiles.PART, tiles.PART), dtype),
    )


def _weights_block(start, x, *refs, t: Tiling):
    """Computes tiles, each x[rows of a group, columns]ᵀ · dy[the same rows, columns] of one of the dys."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    dys, outs = refs[: len(refs) // 2], refs[len(refs) // 2 :]
    experts, height, width = outs[0].shape
    shape = (height // t.rows, width // t.columns // t.cluster)
    peer = jax.lax.axis_index("cluster") if t.cluster > 1 else 0

    def tile_of(index):
        group, tile = (f(index, jnp.int32(len(outs) * shape[0] * shape[1])) for f in (jax.lax.div, jax.lax.rem))
        i, j = tiles.in_bands(tile, jnp.int32(shape[0]), len(outs) * shape[1])
        which, j = _split(j, shape[1], len(outs))
        return group, start[group], start[group + 1], i * t.rows, (j * t.cluster + peer) * t.columns, which

    def rows_of_step(tile, k):
        """Returns the first row read at step k, and the range of the DEPTH rows read that are the group's."""
        _, start, end, *_ = tile
        top = jax.lax.div(start, jnp.int32(ALIGN)) * ALIGN + k * DEPTH
        base = pl.multiple_of(jnp.minimum(top, x.shape[0] - DEPTH), ALIGN)
        return base, jnp.maximum(top, start) - base, jnp.minimum(top + DEPTH, end) - base

    def steps_of(tile):
        _, start, end, *_ = tile
        return jnp.where(
            end > start,
            jax.lax.div(end - jax.lax.div(start, jnp.int32(ALIGN)) * ALIGN + DEPTH - 1, jnp.int32(DEPTH)),
            0,
        )

    def fetch(tile, k, a, b, arrived):
        base, _, _ = rows_of_step(tile, k)
        shared = dict(collective_axes="cluster") if t.cluster > 1 else {}
        plgpu.copy_gmem_to_smem(x.at[pl.ds(base, DEPTH), pl.ds(tile[3], t.rows)], a, arrived, **shared)
        copy = lambda _, dy: plgpu.copy_gmem_to_smem(dy.at[pl.ds(base, DEPTH), pl.ds(tile[4], t.columns)], b, arrived)
        _pick(tile[5], dys, copy)

    def multiply(tile, k, a, b, total, me):
        _, first, last = rows_of_step(tile, k)
        if t.stacked:
            a = a.at[:, pl.ds(me * t.own_rows, t.own_rows)]
        else:
            b = b.at[:, pl.ds(me * t.own_columns, t.own_columns)]

        @pl.when((first > 0) | (last < DEPTH))
        def _():  # zeroes the rows of other groups; both warpgroups do so in what both read
            for part in (a, b):
                row = plgpu.layout_cast(jax.lax.broadcasted_iota(jnp.int32, part.shape, 0), plgpu.Layout.WGMMA)
                part[...] = jnp.where((row >= first) & (row < last), part[...], jnp.zeros((), part.dtype))
            plgpu.commit_smem()

        plgpu.wgmma(total, a.transpose((1, 0)), b)

    def finish(tile, total, me, parts):
        group, _, _, top, left, which = tile
        down, right = t.half(me)
        total = total.astype(x.dtype)
        _pick(which, outs, lambda _, out: tiles.store(out.at[group], total, parts, top + down, left + right))

    tiles.run(
        jnp.int32(len(outs) * experts * shape[0] * shape[1]),
        tile_of,
        steps_of,
        fetch,
        multiply,
        finish,
        t,
        slots=2,
        a=plgpu.SMEM((STAGES, DEPTH, t.rows), x.dtype, transforms=tiles.layout(t.rows)),
        b=plgpu.SMEM((STAGES, DEPTH, t.columns), x.dtype, transforms=tiles.layout(t.columns)),
    )
