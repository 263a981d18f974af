"""Grouped matmul: multiplies every group of rows by its own matrix. Letters: R rows, E groups (experts), D in, F out.

| back end     | platform   | what it does                                                                      |
|--------------|------------|-----------------------------------------------------------------------------------|
| `reference`  | any        | a loop over blocks of one group each; its work grows with the rows in use         |
| `ragged_dot` | TPU        | `jax.lax.ragged_dot` (expands densely over E on CPU and GPU: never chosen there)  |
| `hopper`     | Hopper GPU | Pallas Mosaic-GPU kernels, bf16 (hopper.py)                                       |
| `batched`    | other GPUs | XLA's batched products of rows copied to blocks of one size (batched.py)          |
"""

import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from moe_jax.chips import is_hopper
from moe_jax.kernels import batched, hopper
from moe_jax.parallel.axes import varying_like

BLOCK = 128  # rows of a reference block. On 2 CPU cores 64, 128 and 256 are equally fast


class Backend(Protocol):
    """The three products that a back end provides."""

    def groups(self, sizes: Array, rows: int) -> Any:
        """The groups in the form that the products take. It is computed once, and kept for the backward pass."""

    def forward(self, x: Array, ws: tuple[Array, ...], groups: Any) -> tuple[Array, ...]:
        """Computes x[r] · w[e] for every w; the rows past the last group are zeros, whatever x holds there."""

    def backward(self, dys: tuple[Array, ...], ws: tuple[Array, ...], groups: Any) -> Array:
        """Computes Σᵢ dys[i][r] · ws[i][e]ᵀ; the rows past the last group are zeros, whatever dys hold there."""

    def weights(self, x: Array, dys: tuple[Array, ...], groups: Any) -> tuple[Array, ...]:
        """Computes xᵀ·dy of every group, for every dy, without the rows past the last group."""


def choose_backend(name: str, platform: str, device_kind: str, dtype: str) -> tuple[str, str]:
    """Chooses the back end for a platform, if `name` is "auto". Also returns the reason, printed at start-up."""
    if name != "auto":
        return name, "set in the config"
    if platform == "tpu":
        return "ragged_dot", "TPU"
    if platform in ("gpu", "cuda") and is_hopper(device_kind):
        return ("hopper", device_kind) if dtype == "bfloat16" else ("batched", "the Hopper kernel is bfloat16")
    if platform in ("gpu", "cuda"):
        return "batched", f"no kernel for {device_kind}; measured on an H200 only"
    return "reference", platform


def grouped_matmul(
    x: Float[Array, "R D"], w: Float[Array, "E D F"], sizes: Int[Array, " E"], backend: str
) -> Float[Array, "R F"]:
    """Computes y[r] = x[r] · w[e] for the rows r of group e. Rows are sorted by group; `sizes` are those of the groups.

    Rows past sum(sizes) give zeros and are not computed. Empty groups and any sizes are allowed; sum(sizes) ≤ R.
    Inside a `shard_map`, x, w and sizes must vary over the same mesh axes.
    It is differentiable in x and w.
    """
    return grouped_matmuls(x, (w,), sizes, backend)[0]


def grouped_matmuls(
    x: Float[Array, "R D"], ws: tuple[Float[Array, "E D F"], ...], sizes: Int[Array, " E"], backend: str
) -> tuple[Float[Array, "R F"], ...]:
    """Computes `grouped_matmul` of the same rows for ws of one shape. One product sums their gradients in x."""
    if len({w.shape for w in ws}) != 1:
        raise ValueError(f"ws {[w.shape for w in ws]} must be of one shape: call grouped_matmul for each")
    groups = BACKENDS[backend].groups(sizes, x.shape[0])
    groups = jax.tree.map(lambda a: checkpoint_name(a, "rows"), groups)  # a name in remat.KEPT
    return _matmuls(x, ws, sizes, groups, backend)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _matmuls(x, ws, sizes, groups, backend):
    return _forward(x, ws, sizes, groups, backend)[0]


def _forward(x, ws, sizes, groups, backend):
    ys = BACKENDS[backend].forward(x, ws, groups)
    return tuple(varying_like(y, x, *ws, sizes) for y in ys), (x, ws, sizes, groups)


def _backward(backend, saved, dys):
    x, ws, sizes, groups = saved
    dx = varying_like(BACKENDS[backend].backward(dys, ws, groups), *dys, *ws, sizes)
    dws = (varying_like(dw, x, *dys, sizes) for dw in BACKENDS[backend].weights(x, dys, groups))
    return dx.astype(x.dtype), tuple(dw.astype(w.dtype) for dw, w in zip(dws, ws, strict=True)), None, None


_matmuls.defvjp(_forward, _backward)


class _Blocks(NamedTuple):
    """Blocks of BLOCK rows, each of one group. The last block of a group may reach into the next group."""

    count: Array  # blocks in use
    ends_E: Array  # number of the block after the last of each group
    row_E: Array  # first row of each group
    size_E: Array

    @classmethod
    def of(cls, sizes: Array) -> "_Blocks":
        ends_E = jnp.cumsum(-(-sizes // BLOCK))
        return cls(ends_E[-1], ends_E, jnp.cumsum(sizes) - sizes, sizes)

    def at(self, i: Array) -> tuple[Array, Array, Array]:
        """Returns the group of block i, its first row, and which of its rows belong to the group."""
        e = jnp.sum(self.ends_E <= i)
        first = self.ends_E[e] - -(-self.size_E[e] // BLOCK)
        offset = (i - first) * BLOCK
        return e, self.row_E[e] + offset, offset + jnp.arange(BLOCK) < self.size_E[e]


class _Simple:
    """The base of back ends that compute one product at a time, from group sizes alone."""

    def groups(self, sizes, rows):
        return sizes

    def forward(self, x, ws, sizes):
        return tuple(self._in_use(self._rows(x, w, sizes, False), sizes) for w in ws)

    def backward(self, dys, ws, sizes):
        return self._in_use(sum(self._rows(dy, w, sizes, True) for dy, w in zip(dys, ws, strict=True)), sizes)

    def weights(self, x, dys, sizes):
        return tuple(self._weights(x, dy, sizes) for dy in dys)

    @staticmethod
    def _in_use(y, sizes):
        return jnp.where((jnp.arange(y.shape[0]) < jnp.sum(sizes))[:, None], y, 0)


class _Reference(_Simple):
    """The obviously right back end: small matmuls for each block in use, in a loop, so that no weight is copied.

    Products of the same rows share one loop, which cuts each block out once.
    """

    def forward(self, x, ws, sizes):
        product = lambda e, x_b: tuple(x_b @ _matrix(w, e) for w in ws)
        return self._loop((x,), ws, sizes, product, [w.shape[2] for w in ws])

    def backward(self, dys, ws, sizes):
        product = lambda e, *dys_b: (sum(dy @ _matrix(w, e).T for dy, w in zip(dys_b, ws, strict=True)),)
        return self._loop(dys, ws, sizes, product, [ws[0].shape[1]])[0]

    def _loop(self, arrays, ws, sizes, product, widths):
        """Computes product(e, blocks of `arrays`) for each block of group e: the rows of results of these widths."""
        blocks, rows = _Blocks.of(sizes), arrays[0].shape[0]
        padded = [jnp.pad(a, ((0, BLOCK), (0, 0))) for a in arrays]

        def body(i, outs):
            e, row, _ = blocks.at(i)
            ys = product(e, *(jax.lax.dynamic_slice_in_dim(a, row, BLOCK) for a in padded))
            # Blocks come in row order: the block of the next group overwrites the rows that belong to it.
            return tuple(jax.lax.dynamic_update_slice_in_dim(out, y, row, 0) for out, y in zip(outs, ys, strict=True))

        zeros = lambda width: varying_like(jnp.zeros((rows + BLOCK, width), arrays[0].dtype), *arrays, *ws, sizes)
        outs = jax.lax.fori_loop(0, blocks.count, body, tuple(map(zeros, widths)))
        return tuple(self._in_use(out[:rows], sizes) for out in outs)

    def weights(self, x, dys, sizes):
        blocks = _Blocks.of(sizes)
        x_padded, *dys_padded = (jnp.pad(a, ((0, BLOCK), (0, 0))) for a in (x, *dys))

        def body(i, dws):
            e, row, in_group = blocks.at(i)
            cut = lambda a: jnp.where(in_group[:, None], jax.lax.dynamic_slice_in_dim(a, row, BLOCK), 0)
            # The barrier makes XLA transpose the block once; inside the product a CPU would read it column by column.
            x_T = jax.lax.optimization_barrier(cut(x_padded).T)
            dws_b = (jnp.matmul(x_T, cut(dy), preferred_element_type=jnp.float32) for dy in dys_padded)
            return tuple(
                jax.lax.dynamic_update_index_in_dim(dw, _matrix(dw, e) + dw_b, e, 0)
                for dw, dw_b in zip(dws, dws_b, strict=True)
            )

        zeros = lambda dy: jnp.zeros((sizes.shape[0], x.shape[1], dy.shape[1]), jnp.float32)
        start = tuple(varying_like(zeros(dy), x, *dys, sizes) for dy in dys)
        return jax.lax.fori_loop(0, blocks.count, body, start)


def _matrix(w: Float[Array, "E D F"], e: Int[Array, ""]) -> Float[Array, "D F"]:
    return jax.lax.dynamic_index_in_dim(w, e, keepdims=False)


class _RaggedDot(_Simple):
    """The back end that calls `jax.lax.ragged_dot`."""

    def _rows(self, x, w, sizes, transpose):
        return jax.lax.ragged_dot(x, jnp.swapaxes(w, 1, 2) if transpose else w, sizes)

    def _weights(self, x, dy, sizes):
        contract_rows = jax.lax.RaggedDotDimensionNumbers(
            dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
        )
        in_use = (jnp.arange(x.shape[0]) < jnp.sum(sizes))[:, None]
        x, dy = (jnp.where(in_use, a, 0) for a in (x, dy))
        return jax.lax.ragged_dot_general(x, dy, sizes, contract_rows, preferred_element_type=jnp.float32)


BACKENDS: dict[str, Backend] = {
    "reference": _Reference(),
    "ragged_dot": _RaggedDot(),
    "hopper": hopper.Hopper(),
    "batched": batched.Batched(),
}
