"""The matrix products of a Newton–Schulz step, for stacks of matrices with m rows and n columns.

On Hopper one Pallas Mosaic-GPU kernel computes them in bfloat16 and float16 (`symmetric.py`). It adds terms to a
product at almost no cost, rounds once, and of a symmetric product computes little more than half. Elsewhere, for
float32, and where a product is not symmetric and nothing is added, the products are einsums.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.chips import is_hopper
from moe_jax.kernels.symmetric import product, supports
from moe_jax.parallel import axes

SMALLEST = 512  # with fewer rows the kernel saves almost nothing


def symmetric_product(
    x: Float[Array, "stack m n"],
    y: Float[Array, "stack m n"],
    z: Float[Array, "stack m m"] | None,
    a: Float[Array, " stack"],
    b: Float[Array, " stack"] | None,
    c: Float[Array, " stack"] | None,
) -> Float[Array, "stack m m"]:
    """Computes a·X·Yᵀ + b·Z + c·I for every matrix, in float32, and rounds to the dtype of x.

    X·Yᵀ must be symmetric up to rounding: Y is X, or both are symmetric and commute. Z is symmetric. Without Z, b is
    not read; c = None stands for 0.
    """
    if uses_kernel(x.shape, x.dtype):
        return product(x, y, z, a, b, c, symmetric=True)
    total = _column(a) * _einsum("lmk,lnk->lmn", x, y)
    if c is not None:
        total = total + _column(c) * jnp.eye(x.shape[1], dtype=jnp.float32)[None]
    return (total if z is None else total + _column(b) * z).astype(x.dtype)


def residual_product(
    p: Float[Array, "stack m m"],
    x: Float[Array, "stack m n"],
    b: Float[Array, " stack"],
    a: Float[Array, " stack"] | None = None,
) -> Float[Array, "stack m n"]:
    """Computes a·P·X + b·X for every matrix, in float32, and rounds to the dtype of x. a = None stands for 1."""
    if uses_kernel(x.shape, x.dtype):
        return product(p, x, x, jnp.ones_like(b) if a is None else a, b, None, symmetric=False)
    total = _einsum("lmk,lkn->lmn", p, x)
    return ((total if a is None else _column(a) * total) + _column(b) * x).astype(x.dtype)


def plain_product(p: Float[Array, "stack m m"], x: Float[Array, "stack m n"]) -> Float[Array, "stack m n"]:
    """Computes P·X for every matrix, in float32, and rounds to the dtype of x.

    This is XLA's product on every device: on an H200 it is a fifth faster than the kernel, which saves nothing here.
    """
    return _einsum("lmk,lkn->lmn", p, x).astype(x.dtype)


def uses_kernel(shape: tuple[int, ...], dtype) -> bool:
    """Whether the devices of the current mesh (or, without one, of the process) use the kernel for this shape."""
    m, n = shape[-2:]
    fits = supports(shape, dtype) and SMALLEST <= m <= n
    # Older versions of jax find no layout for the transposed store.
    return fits and jax.__version_info__ >= (0, 11) and is_hopper(axes.current_kind())


def _column(v: Array) -> Array:
    return v[:, None, None]


def _einsum(letters: str, x: Array, y: Array) -> Array:
    # Without HIGHEST accelerators would multiply float32 in tf32 or bf16.
    return jnp.einsum(letters, x, y, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
