"""Grouped matmul on Hopper GPUs: the example Pallas Mosaic-GPU kernels inside JAX, as a back end.

They are a first back end: fixed 128×128×64 tiles, one consumer warpgroup, a scan over all group boundaries per tile.
"""

import jax
import jax.numpy as jnp

# Best of the tilings tried on one H100 at E=64, D=2048, F=1408, 65,536 rows.
_TILES = dict(block_m=128, block_n=128, block_k=64, max_concurrent_steps=4, grid_block_n=8)

WIDTH = 128  # D and F must be multiples of this


def fits(*widths: int) -> bool:
    """The kernels cut D and F into whole tiles."""
    return all(width % WIDTH == 0 for width in widths)


def _whole_tiles(x: jax.Array) -> jax.Array:
    """x with zero rows up to a whole tile: a decoding step has a handful of rows."""
    return jnp.pad(x.astype(jnp.bfloat16), ((0, -x.shape[0] % _TILES["block_m"]), (0, 0)))


class MosaicGPU:
    def groups(self, sizes, rows):
        return sizes

    def rows(self, x, w, sizes, transpose):
        from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu

        y = ragged_dot_mgpu.ragged_dot(
            _whole_tiles(x), w.astype(jnp.bfloat16), group_sizes=sizes, transpose_rhs=transpose, **_TILES
        )
        return y[: x.shape[0]].astype(x.dtype)

    def weights(self, x, dy, sizes):
        from jax.experimental.pallas.ops.gpu import transposed_ragged_dot_mgpu

        return transposed_ragged_dot_mgpu.transposed_ragged_dot(
            _whole_tiles(x), _whole_tiles(dy), group_sizes=sizes, **_TILES
        )
