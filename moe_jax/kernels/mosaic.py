"""Grouped matmul on Hopper GPUs: the example Pallas Mosaic-GPU kernels inside JAX, as a back end.

They are a first back end: fixed 128×128×64 tiles, one consumer warpgroup, a scan over all group boundaries per tile.
"""

import jax.numpy as jnp

# Best of the tilings tried on one H100 at E=64, D=2048, F=1408, 65,536 rows.
_TILES = dict(block_m=128, block_n=128, block_k=64, max_concurrent_steps=4, grid_block_n=8)


def supports(device_kind: str) -> bool:
    return any(name in device_kind for name in ("H100", "H200", "H800", "GH200"))


class MosaicGPU:
    def _check(self, **widths: int) -> None:
        for name, width in widths.items():
            if width % _TILES["block_n"]:
                raise ValueError(
                    f"grouped_matmul='mosaic_gpu' needs {name}={width} to be a multiple of 128; use 'reference'"
                )

    def rows(self, x, w, sizes, transpose):
        from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu

        self._check(rows=x.shape[0], D=w.shape[1], F=w.shape[2])
        return ragged_dot_mgpu.ragged_dot(
            x.astype(jnp.bfloat16), w.astype(jnp.bfloat16), group_sizes=sizes, transpose_rhs=transpose, **_TILES
        ).astype(x.dtype)

    def weights(self, x, dy, sizes):
        from jax.experimental.pallas.ops.gpu import transposed_ragged_dot_mgpu

        self._check(rows=x.shape[0], D=x.shape[1], F=dy.shape[1])
        return transposed_ragged_dot_mgpu.transposed_ragged_dot(
            x.astype(jnp.bfloat16), dy.astype(jnp.bfloat16), group_sizes=sizes, **_TILES
        )
