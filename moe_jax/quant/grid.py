"""Grids of few values, to which the weights of a matrix are rounded, and the bits that such a matrix takes when packed.

A matrix `[in, out]` is divided along its input into groups; each group of each output column has a grid of its own:
a scale, and with two bits or more the integer that stands for zero. The number of bits is an array, so that one
program rounds every expert to a number of its own. Nothing is packed here: rounded weights keep their dtype.

Sources: round to nearest as in GPTQ, arXiv:2210.17323; one bit as in MC-MoE, arXiv:2410.06270.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

LARGEST_BITS = 8
SCALE_BITS = 16
SCALE = jnp.float16  # of the scales that are stored
LEAST_SCALE = 2.0**-24  # its smallest number


class Grid(NamedTuple):
    """The grids of one group of rows of each matrix. The values are scale · (q − zero) for q from 0 to 2^bits − 1.

    With one bit they are −scale and scale.
    """

    scale: Float[Array, "*E 1 out"]
    zero: Float[Array, "*E 1 out"]
    bits: Int[Array, "*E 1 1"]


def grid_of(w: Float[Array, "*E rows out"], bits: Int[Array, "*E"], symmetric: bool) -> Grid:
    """The grids of these rows: from the least weight to the largest, 0 among them.

    symmetric: around 0 for m, the largest absolute value: scale · (−2^(bits−1) … 2^(bits−1) − 1) with the scale
    2m / (2^bits − 1), so that −m and m lie half a step within and beyond the last values. One bit: the mean absolute
    value.
    """
    over = {"axis": -2, "keepdims": True}
    bits = jnp.asarray(bits)[..., None, None]
    low, high = jnp.minimum(jnp.min(w, **over), 0), jnp.maximum(jnp.max(w, **over), 0)
    if symmetric:
        high = jnp.maximum(-low, high)
        low = -high
    steps = (2.0 ** bits.astype(w.dtype)) - 1
    scale = jnp.where(bits == 1, jnp.mean(jnp.abs(w), **over), (high - low) / steps)
    # A scale is stored in 16 bits, so the values are those of the number that is stored.
    scale = jnp.maximum(scale.astype(SCALE).astype(w.dtype), LEAST_SCALE)
    zero = (steps + 1) / 2 if symmetric else jnp.clip(jnp.round(-low / scale), 0, steps)
    return Grid(scale, jnp.broadcast_to(zero, scale.shape), bits)


def nearest(w: Float[Array, "*E rows out"], grid: Grid) -> Float[Array, "*E rows out"]:
    """The value of the grid that is nearest to each weight."""
    steps = (2.0 ** grid.bits.astype(w.dtype)) - 1
    q = jnp.clip(jnp.round(w / grid.scale) + grid.zero, 0, steps)
    return jnp.where(grid.bits == 1, jnp.where(w < 0, -grid.scale, grid.scale), grid.scale * (q - grid.zero))


def fake_quant(
    w: Float[Array, "*E in out"], bits: int | Int[Array, "*E"], group: int, symmetric: bool = False
) -> Float[Array, "*E in out"]:
    """Rounds each weight to the nearest value of its group's grid, in float32. The result has the dtype of w.

    bits: from 1 to 8; a number for all matrices, or one for each. group: rows of a group; it divides `in`.
    """
    *lead, rows, out = w.shape
    w32 = w if w.dtype == jnp.float64 else w.astype(jnp.float32)
    grouped = w32.reshape(*lead, rows // group, group, out)
    bits = jnp.broadcast_to(jnp.asarray(bits), tuple(lead))[..., None]
    return nearest(grouped, grid_of(grouped, bits, symmetric)).reshape(w.shape).astype(w.dtype)


# --- sizes -----------------------------------------------------------------------------------------------------------


def packed_bits(rows: int, columns: int, bits: int, group: int, symmetric: bool = False) -> int:
    """Bits of a matrix `[rows, columns]` when it is packed: its weights, and a scale and a zero of each group.

    A zero is an integer of as many bits as a weight. With one bit, and with symmetric grids, there is none.
    """
    zero = 0 if symmetric or bits == 1 else bits
    return rows * columns * bits + rows // group * columns * (SCALE_BITS + zero)


def nearest_group(group: int, widths: Iterable[int]) -> int:
    """The number nearest to `group` that divides all widths of inputs; of two the larger."""
    common = math.gcd(*widths)
    return min((n for n in range(1, common + 1) if common % n == 0), key=lambda n: (abs(n - group), -n))
