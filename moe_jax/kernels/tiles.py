"""Tiles of a matrix product on a Hopper GPU, and the blocks that compute them: what the Pallas kernels here share.

A fixed number of blocks runs, each of three warpgroups: one copies, and two multiply a tile together. The copying one
runs ahead, even into the next tile, so that its operands arrive while the results of the tile before are stored.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

UNIT = 128  # rows and columns of every tile are multiples of it
PART = 64  # rows and columns that a warpgroup stores at a time
DEPTH = 64  # of the inner dimension, multiplied at a time
STAGES = 4  # copies of operands in flight: as many as fit into shared memory beside the results
BAND = 8  # rows of tiles that are computed together
SMS = 132  # streaming multiprocessors of H100 and H200: one block runs on each


class Tiling(NamedTuple):
    """The shape of a tile, which two warpgroups compute together, `own_rows` × `own_columns` each.

    stacked: the two halves lie one above the other, not side by side. cluster: the number of blocks that share the
    copies of an operand (1 or 2).
    """

    own_rows: int
    own_columns: int
    stacked: bool
    cluster: int = 1

    @property
    def rows(self) -> int:
        return self.own_rows * (1 + self.stacked)

    @property
    def columns(self) -> int:
        return self.own_columns * (2 - self.stacked)

    def half(self, me) -> tuple[Any, Any]:
        """Returns the row and column of a tile at which the half of warpgroup `me` begins."""
        return (me * self.own_rows, 0) if self.stacked else (0, me * self.own_columns)


WIDE, FLAT, TALL = Tiling(128, 128, False), Tiling(64, 256, True), Tiling(128, 128, True)


def launch(body: Callable, outs: list[jax.ShapeDtypeStruct], t: Tiling):
    """Makes the kernel that runs `body` in SMS blocks of three warpgroups."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    cluster = dict(cluster=(t.cluster,), cluster_names=("cluster",)) if t.cluster > 1 else {}
    return plgpu.kernel(
        body,
        out_type=outs,
        grid=(SMS // t.cluster,),
        grid_names=("block",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        **cluster,
    )


def layout(columns: int) -> tuple:
    """The layout of a bf16 buffer in shared memory, as tensor cores and copies need it."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    swizzle = plgpu.find_swizzle(columns * 16)  # bits
    return plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle)


def in_bands(index, rows, columns: int):
    """Returns row and column of tile number `index`. Tiles go down the columns of one band of rows after another.

    Tiles that run at the same time are then close in both directions, and find their operands in the L2 cache.
    """
    div, rem = (lambda a, b, f=f: f(a, jnp.int32(b)) for f in (jax.lax.div, jax.lax.rem))
    band, rest = div(index, BAND * columns), rem(index, BAND * columns)
    height = jnp.minimum(BAND, rows - band * BAND)
    return band * BAND + rem(rest, height), div(rest, height)


def run(count, tile_of, steps_of, fetch, multiply, finish, t: Tiling, *, a, b, slots: int, **more):
    """Computes all tiles of this block: `fetch` runs in one warpgroup, `multiply` and `finish` in the other two.

    slots: parts of a warpgroup's half that may be stored at the same time (1, 2 or 4).
    Slot s of the buffers is full when both operands have arrived, and free when both warpgroups have used it.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    free = plgpu.Barrier(num_arrivals=2, num_barriers=STAGES)
    if t.cluster > 1:
        free = plgpu.ClusterBarrier(collective_axes=("cluster",), num_arrivals=2, num_barriers=STAGES)

    @functools.partial(
        pl.run_scoped,
        a=a,
        b=b,
        full=plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        free=free,
        parts=plgpu.SMEM((2, slots, PART, PART), a.dtype, transforms=layout(PART)),
        **more,
        collective_axes="warpgroup",
    )
    def _(a, b, full, free, parts, **more):
        me, block, blocks = jax.lax.axis_index("warpgroup"), jax.lax.axis_index("block"), jax.lax.axis_size("block")
        own_tiles = jax.lax.div(count - block + (blocks - 1), jnp.int32(blocks))
        slot_of = lambda step: jax.lax.rem(step, jnp.int32(STAGES))

        def copy():
            plgpu.set_max_registers(40, action="decrease")

            def tiles(i, step):
                tile = tile_of(block + i * blocks)

                def one(k, _):
                    slot = slot_of(step + k)

                    @pl.when(step + k >= STAGES)
                    def _():
                        plgpu.barrier_wait(free.at[slot])

                    fetch(tile, k, a.at[slot], b.at[slot], full.at[slot])

                steps = steps_of(tile)
                jax.lax.fori_loop(0, steps, one, None)
                return step + steps

            total = jax.lax.fori_loop(0, own_tiles, tiles, jnp.int32(0))

            def release(step, _):  # a kernel must not end with a barrier in use
                plgpu.barrier_wait(free.at[slot_of(step)])

            jax.lax.fori_loop(jnp.maximum(total - STAGES, 0), total, release, None)

        def compute():
            plgpu.set_max_registers(232, action="increase")
            own = {name: buffer.at[me] for name, buffer in more.items()}

            def tiles(i, step):
                tile = tile_of(block + i * blocks)
                steps = steps_of(tile)

                def sum_up(total):
                    def one(k, _):
                        slot = slot_of(step + k)
                        plgpu.barrier_wait(full.at[slot])
                        multiply(tile, k, a.at[slot], b.at[slot], total, me)
                        plgpu.wgmma_wait(1)

                        @pl.when(k > 0)
                        def _():
                            plgpu.barrier_arrive(free.at[slot_of(step + k - 1)])

                    jax.lax.fori_loop(0, steps, one, None)
                    plgpu.wgmma_wait(0)

                    @pl.when(steps > 0)
                    def _():
                        plgpu.barrier_arrive(free.at[slot_of(step + steps - 1)])

                    return total[...]

                total = pl.run_scoped(sum_up, plgpu.ACC((t.own_rows, t.own_columns), jnp.float32))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                finish(tile, total, me, parts.at[me], **own)
                return step + steps

            jax.lax.fori_loop(0, own_tiles, tiles, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        jax.lax.cond(me == 2, copy, compute)


def _parts(shape):
    """Rows and columns at which the parts of a half begin."""
    return [(i, j) for i in range(0, shape[0], PART) for j in range(0, shape[1], PART)]


def store(out, total, parts, top, left):
    """Stores the half tile of a warpgroup."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    slots = parts.shape[0]
    for n, (i, j) in enumerate(_parts(total.shape)):
        if n >= slots:
            plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
        part = parts.at[n % slots]
        part[...] = total[i : i + PART, j : j + PART]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(part, out.at[pl.ds(top + i, PART), pl.ds(left + j, PART)])


def store_some(out, total, plain, top, left, first, last):
    """Stores rows `first` to `last` of a half tile. Copies have fixed sizes, so there is one for every power of two."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    for i, j in _parts(total.shape):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plain[...] = total[i : i + PART, j : j + PART]
        plgpu.commit_smem()
        row, end = (jnp.clip(v - i, 0, PART) for v in (first, last))
        rows, size = end - row, PART
        while size:

            @pl.when((rows & size) != 0)
            def _(row=row, size=size, i=i, j=j):
                to = out.at[pl.ds(top + i + row, size), pl.ds(left + j, PART)]
                plgpu.copy_smem_to_gmem(plain.at[pl.ds(row, size)], to)

            row, size = row + (rows & size), size // 2
