"""Grouped matmul on Hopper GPUs: Pallas Mosaic-GPU kernels. R rows sorted by group, E groups, D in, F out.

What each block does comes from a table of tiles, computed once from the group sizes. A tile has rows of one group only.
What is read begins at a multiple of 8 rows and may reach into the groups before and after; those rows are not written.
"""

import functools
import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.kernels import tiles
from moe_jax.kernels.common import varying_like
from moe_jax.kernels.tiles import DEPTH, HALF, Tiling

TABLE = Path(__file__).with_name("hopper_tilings.json")  # the fastest tiling by shape
ALIGN = 8  # rows read begin at multiples of this


def fits(d_model: int, d_expert: int) -> bool:
    """Whether all products of an expert can be cut into tiles."""
    return d_model % HALF == d_expert % HALF == 0 and (d_model % (2 * HALF) == 0 or d_expert % (2 * HALF) == 0)


def candidates(kind: str, inner: int, columns: int) -> list[Tiling]:
    """The tilings that can do it, the one to take untried first. kind: "rows" or "weights".

    inner: what is summed over for "rows", and the rows of the gradient for "weights".
    """
    wide = [Tiling(False, 3, cluster) for cluster in (1, 2) if columns % (2 * HALF * cluster) == 0]
    tall = [Tiling(True, 3, cluster) for cluster in (1, 2) if columns % (HALF * cluster) == 0]
    return wide + (tall if kind == "rows" or inner % (2 * HALF) == 0 else [])


@functools.cache
def _tuned() -> dict[str, list]:
    return json.loads(TABLE.read_text())["tilings"] if TABLE.is_file() else {}


def best_tiling(kind: str, inner: int, columns: int) -> Tiling:
    """The fastest measured (`python -m benchmarks.tune_grouped_matmul`), or the first that can do it."""
    found = _tuned().get(f"{kind} {inner} {columns}")
    return Tiling(*found) if found else candidates(kind, inner, columns)[0]


class RowTiles(NamedTuple):
    """Tile i reads x from row `base`, of which rows `first` to `last` (counted from base) are its group's."""

    table: Int[Array, "tiles 4"]  # group, base, first, last
    count: Int[Array, " 1"]  # tiles in use


class Groups(NamedTuple):
    """Where the groups are, for every product with them."""

    bounds: Int[Array, "E 2"]  # first row and the one after the last
    short: RowTiles  # of HALF rows
    tall: RowTiles  # of 2·HALF rows


def find_groups(sizes: Int[Array, " E"], rows: int) -> Groups:
    """rows: R of the x that they are in."""
    end = jnp.cumsum(sizes)
    padded = lambda height: max(rows + -rows % ALIGN, height)
    tiles_of = lambda height: row_tiles(sizes, padded(height), height)
    bounds = jnp.stack([end - sizes, end], axis=1).astype(jnp.int32)
    return Groups(bounds, tiles_of(HALF), tiles_of(2 * HALF))


def row_tiles(sizes: Int[Array, " E"], rows: int, height: int) -> RowTiles:
    """The tiles of `height` rows for groups of these sizes. rows: of x, a multiple of ALIGN, at least height."""
    end = jnp.cumsum(sizes)
    start = end - sizes
    aligned = start // ALIGN * ALIGN
    in_group = jnp.where(sizes > 0, -((aligned - end) // height), 0)
    last_tile = jnp.cumsum(in_group)
    tile = jnp.arange(rows // height + 2 * sizes.shape[0], dtype=jnp.int32)
    group = jnp.minimum(jnp.sum(last_tile[None, :] <= tile[:, None], axis=1), sizes.shape[0] - 1)
    top = aligned[group] + (tile - (last_tile - in_group)[group]) * height
    base = jnp.clip(top, 0, rows - height)  # no read ends past x
    first, last = jnp.maximum(top, start[group]) - base, jnp.minimum(top + height, end[group]) - base
    return RowTiles(jnp.stack([group, base, first, last], axis=1).astype(jnp.int32), last_tile[-1:].astype(jnp.int32))


def rows_times_weights(
    x: Float[Array, "R D"],
    w: Float[Array, "E D F"],
    groups: Groups,
    *,
    transpose: bool = False,
    tiling: Tiling | None = None,
) -> Float[Array, "R F"]:
    """y[r] = x[r]·w[e], or x[r]·w[e]ᵀ with w `[E, F, D]`. Rows past the last group are left as they are found."""
    rows = x.shape[0]
    columns = w.shape[1] if transpose else w.shape[2]
    t = tiling or best_tiling("rows", x.shape[1], columns)
    x = _at_least(x, t.rows)
    table, count = groups.tall if t.tall else groups.short
    body = functools.partial(_rows_block, t=t, transpose=transpose)
    out = tiles.launch(body, (x.shape[0], columns), x.dtype, t)(table, count, x, w)
    return varying_like(out[:rows], x, w, count)


def weight_gradient(
    x: Float[Array, "R D"], dy: Float[Array, "R F"], groups: Groups, tiling: Tiling | None = None
) -> Float[Array, "E D F"]:
    """xᵀ·dy of every group's rows, in the dtype of x; zero for an empty group. Rows past the last do not count."""
    t = tiling or best_tiling("weights", x.shape[1], dy.shape[1])
    shape = (groups.bounds.shape[0], x.shape[1], dy.shape[1])
    x, dy = _at_least(x, DEPTH), _at_least(dy, DEPTH)
    out = tiles.launch(functools.partial(_weights_block, t=t), shape, x.dtype, t)(groups.bounds, x, dy)
    return varying_like(out, x, dy, groups.bounds)


def _at_least(x: Array, rows: int) -> Array:
    """x with zero rows up to `rows`, and to a multiple of ALIGN."""
    return jnp.pad(x, ((0, max(rows - x.shape[0], -x.shape[0] % ALIGN)), (0, 0)))


class Hopper:
    """The back end. In bf16, whatever it is given."""

    groups = staticmethod(find_groups)

    def rows(self, x, w, groups, transpose):
        bf16 = jnp.bfloat16
        return rows_times_weights(x.astype(bf16), w.astype(bf16), groups, transpose=transpose).astype(x.dtype)

    def weights(self, x, dy, groups):
        return weight_gradient(x.astype(jnp.bfloat16), dy.astype(jnp.bfloat16), groups)


# --- the kernels -----------------------------------------------------------------------------------------------------


def _rows_block(table, count, x, w, out, *, t: Tiling, transpose: bool):
    """Every tile is x[base : base + rows] times a stripe of one group's weights."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    across = -(-out.shape[1] // (t.columns * t.cluster))
    peer = jax.lax.axis_index("cluster") if t.cluster > 1 else 0

    def tile_of(index):
        i, n = jax.lax.div(index, jnp.int32(across)), jax.lax.rem(index, jnp.int32(across))
        group, base, first, last = (table[i, j] for j in range(4))
        return group, pl.multiple_of(base, ALIGN), first, last, (n * t.cluster + peer) * t.columns

    def fetch(tile, k, a, b, arrived):
        group, base, _, _, left = tile
        inner, stripe = pl.ds(k * DEPTH, DEPTH), pl.ds(left, t.columns)
        shared = dict(collective_axes="cluster") if t.cluster > 1 else {}
        plgpu.copy_gmem_to_smem(x.at[pl.ds(base, t.rows), inner], a, arrived, **shared)
        plgpu.copy_gmem_to_smem(w.at[group, stripe, inner] if transpose else w.at[group, inner, stripe], b, arrived)

    def multiply(tile, k, a, b, total, me):
        own = pl.ds(me * HALF, HALF)
        a = a.at[own] if t.tall else a
        if transpose:
            b = b.transpose((1, 0)) if t.tall else b.at[own].transpose((1, 0))
        else:
            b = b if t.tall else b.at[:, own]
        plgpu.wgmma(total, a, b)

    def finish(tile, total, me, parts, plain):
        _, base, first, last, left = tile
        down, right = (me * HALF, 0) if t.tall else (0, me * HALF)
        first, last = (jnp.clip(v - down, 0, HALF) for v in (first, last))
        total = total.astype(out.dtype)
        jax.lax.cond(
            (first == 0) & (last == HALF),
            lambda: tiles.store(out, total, parts, base + down, left + right),
            lambda: tiles.store_some(out, total, plain, base + down, left + right, first, last),
        )

    tiles.run(
        count[0] * across,
        tile_of,
        lambda tile: x.shape[1] // DEPTH,
        fetch,
        multiply,
        finish,
        t,
        a=plgpu.SMEM((t.stages, t.rows, DEPTH), x.dtype, transforms=tiles.layout(DEPTH)),
        b=plgpu.SMEM((t.stages, t.columns, DEPTH), w.dtype, transforms=tiles.layout(DEPTH))
        if transpose
        else plgpu.SMEM((t.stages, DEPTH, t.columns), w.dtype, transforms=tiles.layout(t.columns)),
        plain=plgpu.SMEM((2, tiles.PART, tiles.PART), out.dtype),
    )


def _weights_block(groups, x, dy, out, *, t: Tiling):
    """Every tile is x[rows of a group, columns]ᵀ · dy[the same rows, columns]."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    experts, height, width = out.shape
    shape = (height // t.rows, width // t.columns // t.cluster)
    peer = jax.lax.axis_index("cluster") if t.cluster > 1 else 0

    def tile_of(index):
        group, tile = (f(index, jnp.int32(shape[0] * shape[1])) for f in (jax.lax.div, jax.lax.rem))
        i, j = (f(tile, jnp.int32(shape[1])) for f in (jax.lax.div, jax.lax.rem))
        return group, groups[group, 0], groups[group, 1], i * t.rows, (j * t.cluster + peer) * t.columns

    def place(tile, k):
        """First row read at step k, and which of the DEPTH rows read are the group's."""
        _, start, end, _, _ = tile
        top = jax.lax.div(start, jnp.int32(ALIGN)) * ALIGN + k * DEPTH
        base = pl.multiple_of(jnp.minimum(top, x.shape[0] - DEPTH), ALIGN)
        return base, jnp.maximum(top, start) - base, jnp.minimum(top + DEPTH, end) - base

    def steps_of(tile):
        _, start, end, _, _ = tile
        return jnp.where(
            end > start,
            jax.lax.div(end - jax.lax.div(start, jnp.int32(ALIGN)) * ALIGN + DEPTH - 1, jnp.int32(DEPTH)),
            0,
        )

    def fetch(tile, k, a, b, arrived):
        base, _, _ = place(tile, k)
        shared = dict(collective_axes="cluster") if t.cluster > 1 else {}
        plgpu.copy_gmem_to_smem(x.at[pl.ds(base, DEPTH), pl.ds(tile[3], t.rows)], a, arrived, **shared)
        plgpu.copy_gmem_to_smem(dy.at[pl.ds(base, DEPTH), pl.ds(tile[4], t.columns)], b, arrived)

    def multiply(tile, k, a, b, total, me):
        _, first, last = place(tile, k)
        own = pl.ds(me * HALF, HALF)
        a, b = (a.at[:, own], b) if t.tall else (a, b.at[:, own])

        @pl.when((first > 0) | (last < DEPTH))
        def _():  # rows of another group; of what both warpgroups read, both zero the same
            row = plgpu.layout_cast(jax.lax.broadcasted_iota(jnp.int32, (DEPTH, HALF), 0), plgpu.Layout.WGMMA)
            for part in (a, b):
                part[...] = jnp.where((row >= first) & (row < last), part[...], jnp.zeros((), part.dtype))
            plgpu.commit_smem()

        plgpu.wgmma(total, a.transpose((1, 0)), b)

    def finish(tile, total, me, parts):
        group, _, _, top, left = tile
        down, right = (me * HALF, 0) if t.tall else (0, me * HALF)
        tiles.store(out.at[group], total.astype(out.dtype), parts, top + down, left + right)

    tiles.run(
        jnp.int32(experts * shape[0] * shape[1]),
        tile_of,
        steps_of,
        fetch,
        multiply,
        finish,
        t,
        a=plgpu.SMEM((t.stages, DEPTH, t.rows), x.dtype, transforms=tiles.layout(t.rows)),
        b=plgpu.SMEM((t.stages, DEPTH, t.columns), dy.dtype, transforms=tiles.layout(t.columns)),
    )
