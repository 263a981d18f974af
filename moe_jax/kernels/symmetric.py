"""Products of stacks of matrices on a Hopper GPU: a Pallas Mosaic-GPU kernel that adds terms and rounds once.

Matrices consist of blocks of 128 × 128. A tile is two blocks of one column of blocks, so that its operands are three
strips of 128 rows or columns. Of a symmetric product one of two mirrored blocks is computed, and written twice: 36 of
64 blocks at m = 1024.

A fixed number of thread blocks runs, each of three warpgroups. One copies operands in steps of DEPTH, and runs ahead
into the next tile; two multiply, one block of the tile each. What is added to a product is copied like an operand.
Results go where the last operands were, and from there to device memory while the next tile is multiplied.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from moe_jax.kernels.tiles import DEPTH, PART, SMS, STAGES, UNIT, layout
from moe_jax.parallel.axes import varying_like

TERM = UNIT // DEPTH  # steps that hold what is added to a tile; in as many, the last, results go
OWN = 2  # parts of results that a warpgroup stores from memory of its own
PARTS = [(i, j) for j in range(0, UNIT, PART) for i in range(0, UNIT, PART)]  # of a block, stored one at a time


def supports(shape: tuple[int, ...], dtype) -> bool:
    """Whether the kernel multiplies matrices of this shape, `[…, m, n]`, and dtype."""
    whole = all(size >= 2 * UNIT and size % UNIT == 0 for size in shape[-2:])
    return whole and jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)


def product(
    x: Float[Array, "stack m k"],
    y: Float[Array, "stack i j"],
    z: Float[Array, "stack m n"] | None,
    a: Float[Array, " stack"],
    b: Float[Array, " stack"] | None,
    c: Float[Array, " stack"] | None,
    *,
    symmetric: bool,
) -> Float[Array, "stack m n"]:
    """Computes a·X·Yᵀ + b·Z + c·I for every matrix, which must be symmetric, or, with symmetric=False, a·X·Y + b·Z.

    Sums are in float32 and are rounded once, to the dtype of x. y is `[stack, m, k]` for a symmetric product, else
    `[stack, k, n]`. z and b may be None, and so may c, which only a symmetric product takes. A z that is x (the same
    object) is read from the copies of x, which then come last.
    """
    if not symmetric and c is not None:
        raise ValueError("c is for symmetric products only")
    zero = jnp.zeros_like(a)
    factors = jnp.stack([a, zero if b is None else b, zero if c is None else c], axis=1)
    held = symmetric and z is x
    return _product(factors, x, y, None if held else z, symmetric=symmetric, held=held, diagonal=c is not None)


@functools.partial(jax.jit, static_argnames=("symmetric", "held", "diagonal"))
def _product(factors, x, y, z, *, symmetric: bool, held: bool, diagonal: bool):
    """A program of its own: all products of one kind and shape share it, as lowering a kernel takes seconds."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    count, m = x.shape[:2]
    n = m if symmetric else y.shape[2]
    tiles = _symmetric_tiles(m // UNIT) if symmetric else _tiles(m // UNIT, n // UNIT)
    kernel = plgpu.kernel(
        functools.partial(_block, symmetric=symmetric, held=held, diagonal=diagonal),
        out_type=jax.ShapeDtypeStruct((count, m, n), x.dtype),
        grid=(SMS,),
        grid_names=("block",),
        cluster=(1,),
        cluster_names=("cluster",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    return varying_like(kernel(jnp.asarray(tiles), factors, x, y, *(() if z is None else (z,))), x)


def _tiles(rows: int, columns: int) -> np.ndarray:
    """(column, first row, second row) of tiles, numbers of blocks. Of an odd number of rows one is computed twice."""
    first = [min(i, rows - 2) for i in range(0, rows, 2)]
    return np.asarray([(j, i, i + 1) for j in range(columns) for i in first], np.int32)


def _symmetric_tiles(blocks: int) -> np.ndarray:
    """(column, first row, second row) of tiles, numbers of blocks, that hold one of every two mirrored blocks.

    Column j has blocks j to the last. Where their number is odd, block (next, j) is left, where `next` is the column
    after j with one left too: mirrored, it shares a tile with the block of the diagonal in that column.
    """
    tiles, alone = [], None
    for j in range(blocks):
        rows = list(range(j, blocks))
        if len(rows) % 2 and alone is not None:
            tiles.append((j, alone, rows.pop(0)))
            alone = None
        elif len(rows) % 2:
            alone = j
            rows.remove(min(j + 2, blocks - 1))
        tiles += [(j, *pair) for pair in zip(rows[::2], rows[1::2], strict=True)]
    if alone is not None:
        last = min(alone + 2, blocks - 1)
        tiles.append((alone, last, last))
    return np.asarray(tiles, np.int32)


class _Tile(NamedTuple):
    """Two blocks of a matrix, by numbers of blocks."""

    matrix: Array
    column: Array
    first: Array
    second: Array

    def strips(self, symmetric: bool) -> list[tuple]:
        """(begin in the tile, begin in the matrix, size) of rows that are copied at a time."""
        if not symmetric:  # neighbours
            return [(0, self.first * UNIT, 2 * UNIT)]
        return [(0, self.first * UNIT, UNIT), (UNIT, self.second * UNIT, UNIT)]


def _block(tiles, factors, x, y, *rest, symmetric: bool, held: bool, diagonal: bool):
    """One thread block, which computes every SMS-th tile. The arguments refer to device memory."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    *z, out = rest
    depths = x.shape[2] // DEPTH
    steps = depths + TERM * bool(z)  # of a tile
    limit = depths if z else depths - TERM  # steps whose memory is free when they are multiplied
    wide = (UNIT, DEPTH) if symmetric else (DEPTH, UNIT)
    slot_of = lambda step: jax.lax.rem(step, jnp.int32(STAGES))

    def tile_of(index):
        matrix, number = (f(index, jnp.int32(tiles.shape[0])) for f in (jax.lax.div, jax.lax.rem))
        return _Tile(matrix, *(tiles[number, i] for i in range(3)))

    @functools.partial(
        pl.run_scoped,
        a=plgpu.SMEM((STAGES, 2 * UNIT, DEPTH), x.dtype, transforms=layout(DEPTH)),
        b=plgpu.SMEM((STAGES, *wide), x.dtype, transforms=layout(wide[1])),
        own=plgpu.SMEM((2, OWN, PART, PART), x.dtype, transforms=layout(PART)),
        full=plgpu.Barrier(num_arrivals=_copies(symmetric), num_barriers=STAGES),
        # A barrier of clusters takes one arrival of a warpgroup, others one of every thread.
        free=plgpu.ClusterBarrier(collective_axes=("cluster",), num_arrivals=2, num_barriers=STAGES),
        collective_axes="warpgroup",
    )
    def _(a, b, own, full, free):
        me, block, blocks = jax.lax.axis_index("warpgroup"), jax.lax.axis_index("block"), jax.lax.axis_size("block")
        own_tiles = jax.lax.div(x.shape[0] * tiles.shape[0] - block + (blocks - 1), jnp.int32(blocks))

        def copy():
            plgpu.set_max_registers(40, action="decrease")

            def claim(step):
                """Waits until the memory of a step is free."""
                slot = slot_of(step)

                @pl.when(step >= STAGES)
                def _():
                    plgpu.barrier_wait(free.at[slot])

                return a.at[slot], b.at[slot], full.at[slot]

            def one_tile(i, step):
                tile = tile_of(block + i * blocks)

                def one(k, _):
                    inner = k
                    if held:  # the columns of the tile come last
                        inner = k + (tile.column + 1) * TERM
                        inner = jnp.where(inner >= depths, inner - depths, inner)
                    _copy_operands(x, y, tile, inner, *claim(step + k), symmetric)

                jax.lax.fori_loop(0, depths, one, None)
                for k in range(TERM if z else 0):
                    _copy_term(z[0], tile, k, *claim(step + depths + k), symmetric)
                return step + steps

            total = jax.lax.fori_loop(0, own_tiles, one_tile, jnp.int32(0))

            def release(step, _):  # a kernel must not end with a barrier in use
                plgpu.barrier_wait(free.at[slot_of(step)])

            jax.lax.fori_loop(jnp.maximum(total - STAGES, 0), total, release, None)

        def compute():
            plgpu.set_max_registers(232, action="increase")
            mine = lambda i: pl.ds(me * UNIT + i, PART)
            done = lambda step: plgpu.barrier_arrive(free.at[slot_of(step)])

            def stored(step):
                """Waits until the results of the tile before `step` have left, and frees their memory."""
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                for k in range(TERM):
                    done(step - TERM + k)

            def one_tile(i, step):
                tile = tile_of(block + i * blocks)
                scale = [factors[tile.matrix, i] for i in range(3)]

                def sum_up(total):
                    def one(k, _):
                        slot = slot_of(step + k)
                        plgpu.barrier_wait(full.at[slot])
                        left = a.at[slot].at[pl.ds(me * UNIT, UNIT)]
                        plgpu.wgmma(total, left, b.at[slot].transpose((1, 0)) if symmetric else b.at[slot])

                        @pl.when((k == 0) & (i > 0))
                        def _():
                            stored(step)

                        plgpu.wgmma_wait(1)

                        @pl.when((k > 0) & (k <= limit))
                        def _():
                            done(step + k - 1)

                    jax.lax.fori_loop(0, depths, one, None)
                    plgpu.wgmma_wait(0)
                    if limit == depths:
                        done(step + depths - 1)
                    return total[...]

                total = pl.run_scoped(sum_up, plgpu.ACC((UNIT, UNIT), jnp.float32))
                last = step + steps
                for k in range(TERM if z else 0):
                    plgpu.barrier_wait(full.at[slot_of(last - TERM + k)])
                row, values = jnp.where(me == 0, tile.first, tile.second), {}
                for i, j in PARTS:
                    value = scale[0] * total[i : i + PART, j : j + PART]
                    if z or held:
                        term = a.at[slot_of(last - TERM + j // DEPTH)].at[mine(i)]
                        value = value + scale[1] * term[...].astype(jnp.float32)
                    if diagonal and i == j:
                        value = value + jnp.where(_diagonal(), jnp.where(row == tile.column, scale[2], 0.0), 0.0)
                    values[i, j] = value.astype(x.dtype)
                plgpu.commit_smem()  # all threads of the warpgroup have multiplied and read
                kept = [a.at[slot_of(last - TERM + k)].at[mine(i)] for k in range(TERM) for i in (0, PART)]
                _store(values, [own.at[me, i] for i in range(OWN)] + kept, row, tile, out.at[tile.matrix], symmetric)
                return last

            total = jax.lax.fori_loop(0, own_tiles, one_tile, jnp.int32(0))

            @pl.when(own_tiles > 0)
            def _():
                stored(total)

        jax.lax.cond(me == 2, copy, compute)


def _copies(symmetric: bool) -> int:
    """The number of copies a step waits for."""
    return 3 if symmetric else 2


def _copy_operands(x, y, tile: _Tile, k, a, b, arrived, symmetric: bool) -> None:
    """Copies step k of the rows of x to a, and of the rows or columns of y to b."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    inner, column = pl.ds(k * DEPTH, DEPTH), pl.ds(tile.column * UNIT, UNIT)
    for to, begin, size in tile.strips(symmetric):
        plgpu.copy_gmem_to_smem(x.at[tile.matrix, pl.ds(begin, size), inner], a.at[pl.ds(to, size)], arrived)
    strip = (column, inner) if symmetric else (inner, column)
    plgpu.copy_gmem_to_smem(y.at[tile.matrix, *strip], b, arrived)


def _copy_term(z, tile: _Tile, k: int, a, b, arrived, symmetric: bool) -> None:
    """Copies DEPTH columns of what is added to a tile to a."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    columns, strips = pl.ds(tile.column * UNIT + k * DEPTH, DEPTH), tile.strips(symmetric)
    for to, begin, size in strips:
        plgpu.copy_gmem_to_smem(z.at[tile.matrix, pl.ds(begin, size), columns], a.at[pl.ds(to, size)], arrived)
    for _ in range(_copies(symmetric) - len(strips)):
        plgpu.barrier_arrive(arrived)


def _diagonal() -> Array:
    """Marks the elements of a part that lie on its diagonal."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    index = lambda axis: plgpu.broadcasted_iota(jnp.int32, (PART, PART), axis, layout=plgpu.Layout.WGMMA)
    return index(0) == index(1)


def _store(values, places: list, row, tile: _Tile, out, symmetric: bool) -> None:
    """Stores a block from `places` in shared memory; one off the diagonal of a symmetric product also mirrored."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def put(part, places, mirrored=False):
        """Stores some parts, one from each place."""
        for (_, value), place in zip(part, places, strict=True):
            target = place.transpose((1, 0)) if mirrored else place
            target[...] = value
        plgpu.commit_smem()
        for ((i, j), _), place in zip(part, places, strict=True):
            to = (row * UNIT + i, tile.column * UNIT + j)
            to = [pl.ds(begin, PART) for begin in (to[::-1] if mirrored else to)]
            plgpu.copy_smem_to_gmem(place, out.at[*to])

    parts, used = list(values.items()), len(values)
    put(parts, places[:used])

    def mirror():
        """Takes the places left, then those used, first the one whose results were sent first."""
        free, rest = places[used:], list(parts)
        if free:
            put(rest[: len(free)], free, mirrored=True)
            rest = rest[len(free) :]
        pending = used + len(free)
        again = places[: len(rest)]
        plgpu.wait_smem_to_gmem(pending - len(again), wait_read_only=True)
        put(rest, again, mirrored=True)

    if symmetric:
        pl.when(row != tile.column)(mirror)
