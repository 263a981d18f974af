"""Muon in float64 NumPy, one matrix after the other on one device: the oracle of tests/test_muon*.py."""

import functools

import jax
import numpy as np
import optax

from moe_jax.newton_schulz import SETS, orthogonalize_reference
from moe_jax.spread import Matrices

SHAPES = [(24, 24), (16, 40), (40, 16)]


def gaussian(shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def each_matrix(x: np.ndarray, where: Matrices, fn) -> np.ndarray:
    """fn of every matrix of a leaf, heads apart, put back in its place."""
    moved = np.moveaxis(np.asarray(x, np.float64), where.axes, (-2, -1))
    out = np.zeros_like(moved)
    rows, cols = moved.shape[-2:]
    axis, size = where.heads or (0, rows)
    for batch in np.ndindex(moved.shape[:-2]):
        for start in range(0, (rows, cols)[axis], size):
            part = slice(start, start + size)
            place = (*batch, part, slice(None)) if axis == 0 else (*batch, slice(None), part)
            out[place] = fn(moved[place])
    return np.moveaxis(out, (-2, -1), where.axes)


def directions(grads, where: Matrices, momentum=0.95, nesterov=True, coefficients=SETS["jordan"]) -> list[np.ndarray]:
    """0.2·√max(m, n)·O of each step, from its gradients: arXiv:2502.16982, eqs. 1, 2 and 4; 0 without a gradient."""

    def update(x):
        return 0.2 * np.sqrt(max(x.shape)) * orthogonalize_reference(x, coefficients)

    m, out = 0.0, []
    for g in grads:
        g = np.asarray(g, np.float64)
        m = momentum * m + g
        has_gradient = each_matrix(g, where, lambda x: np.full_like(x, x.any()))
        out.append(has_gradient * each_matrix(g + momentum * m if nesterov else m, where, update))
    return out


def error(got, want) -> float:
    """‖got − want‖_F / ‖want‖_F, of a whole leaf."""
    return float(np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want))


def trajectory(tx, params, grads):
    """Parameters after each step."""

    @jax.jit
    def step(params, state, g):
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    state, out = tx.init(params), []
    for g in grads:
        params, state = step(params, state, g)
        out.append(params)
    return out


@functools.partial(jax.jit, static_argnums=0)
def updates(tx, params, grads):
    """The update of every step, all at the same parameters."""
    return jax.lax.scan(lambda state, g: tx.update(g, state, params)[::-1], tx.init(params), grads)[1]
