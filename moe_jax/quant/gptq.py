"""GPTQ: rounds a matrix row by row of its input, and lets the rows that are left make up for each error.

It lowers ‖X·W − X·Q‖² over the inputs X of calibration, of which it needs only the Gram matrix H = XᵀX. Source:
arXiv:2210.17323. Rows are taken in their order (no `act_order`). Errors go to all later rows, those of the same block
too: the released code of MC-MoE leaves these out below four bits.

Letters: I rows of a matrix (its input), O columns, E experts, B bits that are tried.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_jax.parallel.axes import varying_like
from moe_jax.quant.grid import Grid, grid_of, nearest

BLOCK = 128  # rows whose errors reach later blocks in one product, at most
DAMPING = 0.01  # of the mean of the diagonal of H, which is added to it
MOST_DAMPING = 1e4

_highest = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


class Rounded(NamedTuple):
    """A rounded matrix, and how it was rounded."""

    w: Float[Array, "*E I O"]
    damping: Float[Array, "*E"]  # share of the mean of the diagonal; more than `DAMPING` where Cholesky failed
    dead: Int[Array, "*E"]  # inputs that were always 0, whose weights are rounded to nearest


def block_of(group: int) -> int:
    """The rows of a block: the most, up to `BLOCK`, that divide a group."""
    return next(n for n in range(min(BLOCK, group), 0, -1) if group % n == 0)


def gptq(
    w: Float[Array, "*E I O"],
    gram: Float[Array, "*E I I"],
    bits: Int[Array, "*E"],
    group: int,
    symmetric: bool = False,
) -> Rounded:
    """Rounds matrices by their Gram matrices, in float32, or in float64 where w has that. group: divides I.

    A grid is made of the weights of its group as they are when its first row is reached. The scale of a Gram matrix
    does not matter. Matrices of one input may be put side by side: columns do not depend on each other.
    """
    one = functools.partial(_gptq, group=group, symmetric=symmetric)
    for _ in w.shape[:-2]:
        one = jax.vmap(one)
    dtype = jnp.promote_types(w.dtype, jnp.float32)
    found = one(w.astype(dtype), gram.astype(dtype), jnp.broadcast_to(bits, w.shape[:-2]))
    return found._replace(w=found.w.astype(w.dtype))


def _gptq(w: Float[Array, "I O"], gram: Float[Array, "I I"], bits: Int[Array, ""], group: int, symmetric: bool):
    dead = jnp.diagonal(gram) <= 0
    upper, damping = factor(gram, dead)
    size = block_of(group)
    grid = jax.tree.map(lambda x: varying_like(x, w, gram), grid_of(w[:group], bits, symmetric))

    def block(carry, k):
        w, grid = carry
        start = k * size
        cut = lambda x, rows: jax.lax.dynamic_slice_in_dim(x, start, rows)
        ends = start % group == 0  # a group ends before this block, so the next one begins
        new = grid_of(cut(jnp.pad(w, ((0, group), (0, 0))), group), bits, symmetric)
        grid = jax.tree.map(lambda new, old: jnp.where(ends, new, old), new, grid)
        u = cut(upper, size)
        q, errors = _round_block(cut(w, size), jax.lax.dynamic_slice_in_dim(u, start, size, axis=1), grid)
        return (w - _highest(u.T, errors), grid), q  # rows before the block have a factor of 0

    _, q = jax.lax.scan(block, (varying_like(w, gram), grid), jnp.arange(w.shape[0] // size))
    return Rounded(q.reshape(w.shape), damping, jnp.sum(dead))


def _round_block(w: Float[Array, "n O"], u: Float[Array, "n n"], grid: Grid):
    """The rounded rows of a block, and their errors divided by the diagonal of u."""

    def row(i, carry):
        w, q, errors = carry
        own = jax.lax.dynamic_slice_in_dim(w, i, 1)
        rounded = nearest(own, grid)
        error = (own - rounded) / u[i, i]
        put = lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, i, 0)
        return w - u[i][:, None] * error, put(q, rounded), put(errors, error)

    start = (w, jnp.zeros_like(w), jnp.zeros_like(w))
    _, q, errors = jax.lax.fori_loop(0, w.shape[0], row, jax.tree.map(lambda x: varying_like(x, w, u), start))
    return q, errors


def factor(gram: Float[Array, "I I"], dead: Bool[Array, " I"]) -> tuple[Float[Array, "I I"], Float[Array, ""]]:
    """The upper triangular U of the damped H⁻¹ = Uᵀ·U, and the damping, doubled until Cholesky succeeds.

    The damped H is R·Rᵀ for an upper triangular R, whose inverse is U: one factorisation, and H is never inverted.
    """
    live = jnp.maximum(jnp.sum(~dead), 1)
    mean = jnp.sum(jnp.diagonal(gram)) / live
    eye = jnp.eye(gram.shape[0], dtype=gram.dtype)
    h = gram / jnp.where(mean > 0, mean, 1.0) + jnp.where(dead, 1.0, 0.0)[:, None] * eye

    def attempt(damping):
        backwards = (h + damping * eye)[::-1, ::-1]
        return jnp.linalg.cholesky(backwards)[::-1, ::-1]

    def fails(carry):
        damping, r = carry
        return ~jnp.all(jnp.isfinite(r)) & (damping < MOST_DAMPING)

    again = lambda carry: (2 * carry[0], attempt(2 * carry[0]))
    first = varying_like(jnp.asarray(DAMPING, gram.dtype), gram)
    damping, r = jax.lax.while_loop(fails, again, (first, attempt(first)))
    u = jax.lax.linalg.triangular_solve(r, varying_like(eye, gram), left_side=True, lower=False)
    return u, damping


def column_errors(
    before: Float[Array, "*E I O"], after: Float[Array, "*E I O"], gram: Float[Array, "*E I I"]
) -> Float[Array, "*E O"]:
    """‖X·(after − before)‖² of each column over the inputs of a Gram matrix, in float32.

    Its sum is the trace of ΔWᵀ·H·ΔW.
    """
    delta = after.astype(jnp.float32) - before.astype(jnp.float32)
    return jnp.sum(delta * _highest(gram.astype(jnp.float32), delta), axis=-2)
