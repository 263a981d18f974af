"""The matrix products of a Newton–Schulz step, for stacks of matrices with m rows and n columns.

On Hopper one Pallas Mosaic-GPU kernel computes them. It adds terms to a product at almost no cost, and rounds once.
Of a symmetric product it computes only the tiles on and below the diagonal (5/8 of the tiles at m = 1024, 9/16 at 2048)
and writes them twice. Elsewhere, and for float32, the products are einsums.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from moe_jax.chips import is_hopper
from moe_jax.kernels.tiles import PART, SMS, layout
from moe_jax.parallel.axes import varying_like

# A tile is 256 × 128: two warpgroups compute 128 × 128 each, one above the other. Operands are copied 64 columns at a
# time, and three such copies are in flight.
_ROWS, _COLUMNS, _DEPTH, _STAGES = 256, 128, 64, 3
_HALF = _ROWS // 2
_PARTS = [(i, j) for i in range(0, _HALF, PART) for j in range(0, _COLUMNS, PART)]  # of a half, stored one at a time
SMALLEST = 512  # with fewer rows the kernel saves almost nothing


def symmetric_product(
    x: Float[Array, "stack m n"], a: Float[Array, " stack"], b: Float[Array, " stack"] | None, c: Float[Array, " stack"]
) -> Float[Array, "stack m m"]:
    """Computes a·X·Xᵀ + b·X + c·I for every matrix, in float32, and rounds to the dtype of x.

    b needs a symmetric X; None stands for 0.
    """
    if uses_kernel(x.shape, x.dtype):
        return _kernel(x, x, x if b is not None else None, a, b, c, symmetric=True)
    y = _column(a) * _einsum("lmk,lnk->lmn", x, x) + _column(c) * jnp.eye(x.shape[1], dtype=jnp.float32)[None]
    return (y if b is None else y + _column(b) * x).astype(x.dtype)


def residual_product(
    p: Float[Array, "stack m m"], x: Float[Array, "stack m n"], b: Float[Array, " stack"]
) -> Float[Array, "stack m n"]:
    """Computes P·X + b·X for every matrix, in float32, and rounds to the dtype of x."""
    if uses_kernel(x.shape, x.dtype):
        return _kernel(p, x, x, jnp.ones_like(b), b, jnp.zeros_like(b), symmetric=False)
    return (_einsum("lmk,lkn->lmn", p, x) + _column(b) * x).astype(x.dtype)


def uses_kernel(shape: tuple[int, ...], dtype) -> bool:
    """Whether the devices of the current mesh (or, without one, of the process) use the kernel for this shape."""
    m, n = shape[-2:]
    fits = dtype == jnp.bfloat16 and SMALLEST <= m <= n and m % _ROWS == 0 and n % _COLUMNS == 0
    # Older versions of jax find no layout for the transposed store.
    return fits and jax.__version_info__ >= (0, 11) and is_hopper(_device_kind())


def _device_kind() -> str:
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    return device.device_kind if device else jax.devices()[0].device_kind


def _column(v: Array) -> Array:
    return v[:, None, None]


def _einsum(letters: str, x: Array, y: Array) -> Array:
    # Without HIGHEST accelerators would multiply float32 in tf32 or bf16.
    return jnp.einsum(letters, x, y, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


# --- Hopper ----------------------------------------------------------------------------------------------------------


def _kernel(x, y, z, a, b, c, *, symmetric: bool):
    """Computes a·X·Y + b·Z + c·I, or a·X·Yᵀ + b·Z + c·I where that is known to be symmetric."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    count, m = x.shape[:2]
    n = y.shape[1] if symmetric else y.shape[2]
    tiles = jnp.asarray(_tiles(m, n, symmetric))
    factors = jnp.stack([a, jnp.zeros_like(a) if b is None else b, c], axis=1)
    kernel = plgpu.kernel(
        functools.partial(_block, symmetric=symmetric),
        out_type=jax.ShapeDtypeStruct((count, m, n), x.dtype),
        grid=(SMS,),
        grid_names=("block",),
        num_threads=3,  # warpgroups: two multiply, one copies
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    return varying_like(kernel(tiles, factors, x, y, *(() if z is None else (z,))), x)


def _tiles(m: int, n: int, symmetric: bool) -> np.ndarray:
    """(row, column) of the tiles, in units of a tile: of all, or of those on and below the diagonal."""
    columns = lambda i: _ROWS // _COLUMNS * (i + 1) if symmetric else n // _COLUMNS
    return np.asarray([(i, j) for i in range(m // _ROWS) for j in range(columns(i))], np.int32)


class _Tile(NamedTuple):
    """The half of a tile that one warpgroup computes."""

    matrix: Array
    top: Array  # first row of the tile
    row: Array  # first row of the half
    left: Array  # first column

    def part(self, i: int, j: int) -> tuple:
        """Rows and columns of a part in the matrix."""
        from jax.experimental import pallas as pl

        return pl.ds(self.row + i, PART), pl.ds(self.left + j, PART)


def _block(tiles, factors, x, y, *rest, symmetric: bool):
    """One of SMS blocks, which computes every SMS-th tile of all matrices. The arguments refer to device memory."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    *z, out = rest
    pipeline = functools.partial(_pipeline, x.shape[2] // _DEPTH, symmetric)
    nothing = lambda *_: None

    @functools.partial(
        pl.run_scoped,
        buffers=pipeline(nothing, nothing).get_allocations(x.at[0], y.at[0]),
        parts=plgpu.SMEM((2, len(_PARTS), PART, PART), out.dtype, transforms=layout(PART)),
        arrived=plgpu.Barrier(num_barriers=2 * len(_PARTS)) if z else None,
        collective_axes="warpgroup",
    )
    def _(buffers, parts, arrived):
        warpgroup = jax.lax.axis_index("warpgroup")

        @plgpu.nd_loop((x.shape[0] * tiles.shape[0],), collective_axes="block")
        def _(loop):
            matrix, number = (f(loop.index[0], jnp.int32(tiles.shape[0])) for f in (jax.lax.div, jax.lax.rem))
            top, left = tiles[number, 0] * _ROWS, tiles[number, 1] * _COLUMNS
            tile = _Tile(matrix, top, top + warpgroup * _HALF, left)

            def around(run):
                """Runs the pipeline of a tile, with z fetched before it and the results stored after it."""
                own, own_arrived = parts.at[warpgroup], lambda slot: arrived.at[warpgroup * len(_PARTS) + slot]
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                if z:
                    _fetch(tile, z[0], own, own_arrived)

                @functools.partial(pl.run_scoped, total=plgpu.ACC((_HALF, _COLUMNS), jnp.float32))
                def _(total):
                    run(total)
                    results = _store(tile, total[...], factors, out, own, own_arrived if z else None, symmetric)
                    if symmetric:
                        _store_mirrored(tile, results, out, own)

            def multiply(_, left_part, right_part, total):
                right = right_part.transpose((1, 0)) if symmetric else right_part
                plgpu.wgmma(total, left_part.at[pl.ds(warpgroup * _HALF, _HALF)], right)
                plgpu.wgmma_wait(0)
                return total

            stripe = (pl.ds(left, _COLUMNS), slice(None)) if symmetric else (slice(None), pl.ds(left, _COLUMNS))
            pipeline(multiply, around)(x.at[matrix, pl.ds(top, _ROWS), :], y.at[matrix, *stripe], allocations=buffers)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _pipeline(steps: int, symmetric: bool, multiply, around):
    """Copies x and y in `steps` steps of _DEPTH, and multiplies them in two warpgroups, inside `around`."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    by_row = lambda rows: plgpu.BlockSpec(
        (rows, _DEPTH), lambda k: (0, k), transforms=layout(_DEPTH), memory_space=plgpu.SMEM
    )
    by_column = plgpu.BlockSpec(
        (_DEPTH, _COLUMNS), lambda k: (k, 0), transforms=layout(_COLUMNS), memory_space=plgpu.SMEM
    )
    return plgpu.emit_pipeline_warp_specialized(
        multiply,
        grid=(steps,),
        in_specs=[by_row(_ROWS), by_row(_COLUMNS) if symmetric else by_column],
        memory_registers=40,
        wg_axis="warpgroup",
        num_compute_wgs=2,
        max_concurrent_steps=_STAGES,
        compute_context=around,
    )


def _fetch(tile: _Tile, z, parts, arrived):
    """Starts copying what is added to the product, so that it arrives while the product is computed."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    for slot, (i, j) in enumerate(_PARTS):
        plgpu.copy_gmem_to_smem(z.at[tile.matrix, *tile.part(i, j)], parts.at[slot], arrived(slot))


def _store(tile: _Tile, total, factors, out, parts, arrived, symmetric: bool) -> list[Array]:
    """Stores a·total + b·Z + c·I, and returns it part by part. arrived: the barriers of `_fetch`; None without Z."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    a, b, c = factors[tile.matrix, 0], factors[tile.matrix, 1], factors[tile.matrix, 2]
    c = jnp.where(tile.row == tile.left, c, 0.0)
    results = []
    for slot, (i, j) in enumerate(_PARTS):
        part, (rows, columns) = parts.at[slot], tile.part(i, j)
        value = a * total[i : i + PART, j : j + PART]
        if symmetric and i == j:
            index = lambda axis: plgpu.broadcasted_iota(jnp.int32, (PART, PART), axis, layout=plgpu.Layout.WGMMA)
            value = value + jnp.where(index(0) == index(1), c, 0.0)
        if arrived is not None:
            plgpu.barrier_wait(arrived(slot))
            value = value + b * part[...].astype(jnp.float32)
        results.append(value.astype(out.dtype))
        part[...] = results[-1]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(part, out.at[tile.matrix, rows, columns])
    return results


def _store_mirrored(tile: _Tile, results: list[Array], out, parts):
    """Stores the transposed results of a tile below the diagonal. Tiles on it are computed on both sides of it."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    @pl.when(tile.left < tile.top)
    def _():
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for slot, (i, j) in enumerate(_PARTS):
            rows, columns = tile.part(i, j)
            parts.at[slot].transpose((1, 0))[...] = results[slot]
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(parts.at[slot], out.at[tile.matrix, columns, rows])
