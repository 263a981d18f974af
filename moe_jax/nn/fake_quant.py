"""Weights and activations rounded to few values, with a straight-through gradient: that of the numbers unrounded.

Values stay in their dtype: nothing is packed and no integer product is computed. Source: BitNet b1.58,
arXiv:2402.17764, §2; int8 activations by token as in its released layers.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

SMALLEST = 1e-5  # least scale of a matrix, and least largest entry of a token
BITS = 2.0  # of a packed ternary number: four in a byte


@jax.custom_vjp
def ternary(w: Float[Array, "*E in out"]) -> Float[Array, "*E in out"]:
    """Rounds each matrix to the three values −s, 0 and s, where s is the mean of its absolute values.

    s is computed in float32. The gradient is passed on as it is, also for entries that are cut off.
    """
    w32 = w.astype(jnp.float32)
    s = jnp.maximum(jnp.mean(jnp.abs(w32), axis=(-2, -1), keepdims=True), SMALLEST)
    return (jnp.clip(jnp.round(w32 / s), -1, 1) * s).astype(w.dtype)


@jax.custom_vjp
def int8(x: Float[Array, "*T D"]) -> Float[Array, "*T D"]:
    """Rounds each row to 255 values: multiples of its largest absolute value / 127. The gradient is passed on."""
    x32 = x.astype(jnp.float32)
    s = jnp.maximum(jnp.max(jnp.abs(x32), axis=-1, keepdims=True), SMALLEST) / 127
    return (jnp.round(x32 / s) * s).astype(x.dtype)


ternary.defvjp(lambda w: (ternary(w), None), lambda _, dw: (dw,))
int8.defvjp(lambda x: (int8(x), None), lambda _, dx: (dx,))


def packed_bytes(shape: tuple[int, ...]) -> int:
    """Bytes of ternary matrices `[…, in, out]` when they are packed: two bits a number, four bytes a scale."""
    matrices, size = math.prod(shape[:-2]), shape[-2] * shape[-1]
    return matrices * (math.ceil(size * BITS / 8) + 4)
