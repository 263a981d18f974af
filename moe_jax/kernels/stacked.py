"""The matrix products of a Newton–Schulz step, for stacks of matrices. L matrices, m rows, n columns.

On Hopper they are one Pallas Mosaic-GPU kernel: what is added to a product costs next to nothing there and is rounded
together with it, and of a symmetric product only the tiles on and under the diagonal are computed, each written twice
(5/8 of the tiles at m = 1024, 9/16 at 2048). Elsewhere, and for float32, they are einsums.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from moe_jax.chips import is_hopper
from moe_jax.parallel.axes import varying_like

# Two warpgroups of 128 × 128 each, one above the other, 64 columns at a time, three such steps in flight.
_ROWS, _COLUMNS, _DEPTH, _STAGES = 256, 128, 64, 3
_PART = 64  # rows and columns of what is stored at a time
_SMS = 132  # of H100 and H200: one block each, which goes from tile to tile
SMALLEST = 512  # with fewer rows there is next to nothing to save


def symmetric_product(
    x: Float[Array, "L m n"], a: Float[Array, " L"], b: Float[Array, " L"] | None, c: Float[Array, " L"]
) -> Float[Array, "L m m"]:
    """a·X·Xᵀ + b·X + c·I of every matrix, summed in float32, in the dtype of x. b needs X symmetric; None is 0."""
    if uses_kernel(x.shape, x.dtype):
        return _kernel(x, x, x if b is not None else None, a, b, c, symmetric=True)
    y = _column(a) * _einsum("lmk,lnk->lmn", x, x) + _column(c) * jnp.eye(x.shape[1], dtype=jnp.float32)[None]
    return (y if b is None else y + _column(b) * x).astype(x.dtype)


def residual_product(
    p: Float[Array, "L m m"], x: Float[Array, "L m n"], b: Float[Array, " L"]
) -> Float[Array, "L m n"]:
    """P·X + b·X of every matrix, summed in float32, in the dtype of x."""
    if uses_kernel(x.shape, x.dtype):
        return _kernel(p, x, x, jnp.ones_like(b), b, jnp.zeros_like(b), symmetric=False)
    return (_einsum("lmk,lkn->lmn", p, x) + _column(b) * x).astype(x.dtype)


def uses_kernel(shape: tuple[int, ...], dtype) -> bool:
    """Whether a stack of this shape takes the kernel on the devices of the current mesh (of the process, without)."""
    m, n = shape[-2:]
    fits = dtype == jnp.bfloat16 and SMALLEST <= m <= n and m % _ROWS == 0 and n % _COLUMNS == 0
    # Older versions find no layout for the transposed store.
    return fits and jax.__version_info__ >= (0, 11) and is_hopper(_device_kind())


def _device_kind() -> str:
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    return device.device_kind if device else jax.devices()[0].device_kind


def _column(v: Array) -> Array:
    return v[:, None, None]


def _einsum(letters: str, x: Array, y: Array) -> Array:
    # HIGHEST matters for float32 only: accelerators would otherwise multiply in tf32 or bf16.
    return jnp.einsum(letters, x, y, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


# --- Hopper ----------------------------------------------------------------------------------------------------------


def _kernel(x, y, z, a, b, c, *, symmetric: bool):
    """a·X·Y + b·Z + c·I, or a·X·Yᵀ + b·Z + c·I, of which it is known that it is symmetric."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    count, m = x.shape[:2]
    n = y.shape[1] if symmetric else y.shape[2]
    tiles = jnp.asarray(_tiles(m, n, symmetric))
    numbers = jnp.stack([a, jnp.zeros_like(a) if b is None else b, c], axis=1)
    kernel = plgpu.kernel(
        functools.partial(_block, symmetric=symmetric),
        out_type=jax.ShapeDtypeStruct((count, m, n), x.dtype),
        grid=(_SMS,),
        grid_names=("block",),
        num_threads=3,  # warpgroups: two multiply, one copies
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    return varying_like(kernel(tiles, numbers, x, y, *(() if z is None else (z,))), x)


def _tiles(m: int, n: int, symmetric: bool) -> np.ndarray:
    """(row, column) of the tiles, in _ROWS and _COLUMNS: all, or those on and under the diagonal."""
    reach = lambda i: _ROWS // _COLUMNS * (i + 1) if symmetric else n // _COLUMNS
    return np.asarray([(i, j) for i in range(m // _ROWS) for j in range(reach(i))], np.int32)


class _Tile(NamedTuple):
    """What a warpgroup works on: its half of a tile, in a matrix."""

    matrix: Array
    top: Array  # first row of the tile
    row: Array  # first row of this warpgroup's half
    left: Array  # first column


def _block(tiles, numbers, x, y, *rest, symmetric: bool):
    """One of _SMS blocks: every _SMS-th tile of all matrices. The arguments are references to device memory."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    *z, out = rest
    half = _ROWS // 2
    parts_of_half = [(i, j) for i in range(0, half, _PART) for j in range(0, _COLUMNS, _PART)]

    def layout(columns):
        swizzle = plgpu.find_swizzle(columns * 16)  # bits
        return plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle)

    def pipeline(multiply, around):
        by_row = lambda rows: plgpu.BlockSpec(
            (rows, _DEPTH), lambda k: (0, k), transforms=layout(_DEPTH), memory_space=plgpu.SMEM
        )
        by_column = plgpu.BlockSpec(
            (_DEPTH, _COLUMNS), lambda k: (k, 0), transforms=layout(_COLUMNS), memory_space=plgpu.SMEM
        )
        return plgpu.emit_pipeline_warp_specialized(
            multiply,
            grid=(x.shape[2] // _DEPTH,),
            in_specs=[by_row(_ROWS), by_row(_COLUMNS) if symmetric else by_column],
            memory_registers=40,
            wg_axis="warpgroup",
            num_compute_wgs=2,
            max_concurrent_steps=_STAGES,
            compute_context=around,
        )

    def place(t: _Tile, i, j):
        return pl.ds(t.row + i, _PART), pl.ds(t.left + j, _PART)

    def fetch(t: _Tile, parts, arrived):
        """What is to be added, while the product is computed."""
        for slot, (i, j) in enumerate(parts_of_half):
            plgpu.copy_gmem_to_smem(z[0].at[t.matrix, *place(t, i, j)], parts.at[slot], arrived(slot))

    def store(t: _Tile, total, parts, arrived):
        a, b, c = numbers[t.matrix, 0], numbers[t.matrix, 1], numbers[t.matrix, 2]
        c = jnp.where(t.row == t.left, c, 0.0)
        sums = []
        for slot, (i, j) in enumerate(parts_of_half):
            part, (rows, columns) = parts.at[slot], place(t, i, j)
            value = a * total[i : i + _PART, j : j + _PART]
            if symmetric and i == j:
                index = lambda axis: plgpu.broadcasted_iota(jnp.int32, (_PART, _PART), axis, layout=plgpu.Layout.WGMMA)
                value = value + jnp.where(index(0) == index(1), c, 0.0)
            if z:
                plgpu.barrier_wait(arrived(slot))
                value = value + b * part[...].astype(jnp.float32)
            sums.append(value.astype(out.dtype))
            part[...] = sums[-1]
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(part, out.at[t.matrix, rows, columns])
        if symmetric:

            @pl.when(t.left < t.top)  # the tiles beside the diagonal are computed on both sides of it
            def _():
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                for slot, (i, j) in enumerate(parts_of_half):
                    rows, columns = place(t, i, j)
                    parts.at[slot].transpose((1, 0))[...] = sums[slot]
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(parts.at[slot], out.at[t.matrix, columns, rows])

    nothing = lambda *_: None

    @functools.partial(
        pl.run_scoped,
        buffers=pipeline(nothing, nothing).get_allocations(x.at[0], y.at[0]),
        parts=plgpu.SMEM((2, len(parts_of_half), _PART, _PART), out.dtype, transforms=layout(_PART)),
        arrived=plgpu.Barrier(num_barriers=2 * len(parts_of_half)) if z else None,
        collective_axes="warpgroup",
    )
    def _(buffers, parts, arrived):
        me = jax.lax.axis_index("warpgroup")

        @plgpu.nd_loop((x.shape[0] * tiles.shape[0],), collective_axes="block")
        def _(loop):
            matrix, tile = (f(loop.index[0], jnp.int32(tiles.shape[0])) for f in (jax.lax.div, jax.lax.rem))
            top, left = tiles[tile, 0] * _ROWS, tiles[tile, 1] * _COLUMNS
            t = _Tile(matrix, top, top + me * half, left)

            def around(run):
                own = parts.at[me], lambda slot: arrived.at[me * len(parts_of_half) + slot]
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                if z:
                    fetch(t, *own)

                @functools.partial(pl.run_scoped, total=plgpu.ACC((half, _COLUMNS), jnp.float32))
                def _(total):
                    run(total)
                    store(t, total[...], *own)

            def multiply(_, left_part, right_part, total):
                right = right_part.transpose((1, 0)) if symmetric else right_part
                plgpu.wgmma(total, left_part.at[pl.ds(me * half, half)], right)
                plgpu.wgmma_wait(0)
                return total

            other = (pl.ds(left, _COLUMNS), slice(None)) if symmetric else (slice(None), pl.ds(left, _COLUMNS))
            pipeline(multiply, around)(x.at[matrix, pl.ds(top, _ROWS), :], y.at[matrix, *other], allocations=buffers)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
