"""Rounding one matrix to few bits: grids and GPTQ against slow twins in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.quant import (
    grid,
)
from moe_jax.quant.gptq import DAMPING, column_errors, gptq

GROUP = 8
fake_quant = jax.jit(grid.fake_quant, static_argnums=(2, 3))
RNG = np.random.default_rng(0)
W = RNG.normal(size=(4, 24, 6))  # four experts
X = RNG.normal(size=(4, 60, 24)) @ RNG.normal(size=(24, 24))  # inputs that depend on each other
GRAM = np.einsum("eti,etj->eij", X, X)
BITS = np.array([1, 2, 3, 5])


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


# --- twins -----------------------------------------------------------------------------------------------------------


def values(w, bits, symmetric=False):
    """All values that the weights of a group `[rows]` of one column may take, from the definition."""
    if bits == 1:
        scale = float(np.float16(np.abs(w).mean()))
        return np.array([-scale, scale])
    low, high = min(w.min(), 0), max(w.max(), 0)
    if symmetric:
        high = max(-low, high)
        low = -high
    scale = float(np.float16((high - low) / (2**bits - 1)))
    zero = 2 ** (bits - 1) if symmetric else np.round(-low / scale)
    return scale * (np.arange(2**bits) - zero)


def closest(w, table):
    return table[np.abs(w[..., None] - table).argmin(-1)]


def slow_nearest(w, bits, group=GROUP, symmetric=False):
    q = np.empty_like(w)
    for first in range(0, len(w), group):
        for column in range(w.shape[1]):
            part = w[first : first + group, column]
            q[first : first + group, column] = closest(part, values(part, bits, symmetric))
    return q


def slow_gptq(w, gram, bits, group=GROUP):
    """Optimal brain quantisation in a fixed order: H⁻¹ of the rows left, each eliminated once it is rounded."""
    w, q = w.copy(), np.empty_like(w)
    inverse = np.linalg.inv(gram / np.diag(gram).mean() + DAMPING * np.eye(len(w)))
    for i in range(len(w)):
        if i % group == 0:
            tables = [values(w[i : i + group, column], bits) for column in range(w.shape[1])]
        q[i] = [closest(x, table) for x, table in zip(w[i], tables, strict=True)]
        w -= np.outer(inverse[:, i], (w[i] - q[i]) / inverse[i, i])
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
        inverse[i, i] = 1.0  # no longer used: its other entries are 0
    return q


# --- grids -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [False, True])
def test_round_to_nearest(x64, symmetric):
    """Every group has its own grid, every expert its own bits; a grid of eight bits is fine."""
    q = np.asarray(fake_quant(W, BITS, GROUP, symmetric))
    for e, bits in enumerate(BITS):
        np.testing.assert_allclose(q[e], slow_nearest(W[e], bits, symmetric=symmetric), atol=1e-12)
        np.testing.assert_array_equal(fake_quant(W[e], bits, GROUP, symmetric), q[e])
        most = 2 if bits == 1 else 2**bits
        assert max(len(np.unique(q[e, :GROUP, column])) for column in range(6)) <= most
    assert np.abs(fake_quant(W, np.full(4, 8), GROUP, symmetric) - W).max() < 0.02
    assert not np.asarray(fake_quant(0 * W[0], np.int64(3), GROUP, symmetric)).any()


def test_bits_of_a_packed_matrix():
    """Groups of 128 with packed zeros: b + (16 + b)/128 bits a weight; no zero with one bit or a symmetric grid."""
    a_weight = lambda *how: grid.packed_bits(256, 10, *how) / 2560
    assert [a_weight(b, 128) for b in (2, 3, 4)] == [2.140625, 3.1484375, 4.15625]
    assert (a_weight(1, 128), a_weight(4, 128, True), a_weight(4, 64)) == (1.125, 4.125, 4.3125)
    assert [grid.nearest_group(n, (576, 1536)) for n in (128, 1, 1000, 80)] == [96, 1, 192, 96]


# --- GPTQ ------------------------------------------------------------------------------------------------------------


run = jax.jit(lambda w, gram, bits: gptq(w, gram, bits, GROUP))


def test_gptq_is_elimination_in_float64(x64):
    """Blocks, groups, and experts side by side change nothing; each expert has its own bits."""
    found = run(W, GRAM, BITS)
    for e, bits in enumerate(BITS):
        np.testing.assert_allclose(found.w[e], slow_gptq(W[e], GRAM[e], bits), atol=1e-8)
        near = slow_nearest(W[e], bits)
        error, of_nearest = (float(column_errors(W[e], q, GRAM[e]).sum()) for q in (found.w[e], near))
        assert error < 0.8 * of_nearest
        assert error == pytest.approx(np.square(X[e] @ (found.w[e] - W[e])).sum(), rel=1e-6)
    np.testing.assert_array_equal(found.damping, DAMPING)


@pytest.mark.slow
def test_gptq_in_float32():
    """Without dependent inputs it rounds to nearest. The scale of the inputs changes nothing, nor do other experts."""
    w, gram = W.astype(np.float32), GRAM.astype(np.float32)
    near = fake_quant(w, BITS, GROUP, False)
    eye = np.broadcast_to(np.eye(24, dtype=np.float32), gram.shape)
    np.testing.assert_array_equal(run(w, 3 * eye, BITS).w, near)
    found = run(w, gram, BITS).w
    np.testing.assert_array_equal(run(w, 64 * gram, BITS).w, found)
    np.testing.assert_allclose(run(w, 100 * gram, BITS).w, found, atol=1e-5)
    for e, bits in enumerate(BITS):  # one at a time, four times
        alone = run(w[[e] * 4], gram[[e] * 4], np.full(4, bits)).w
        np.testing.assert_array_equal(alone, np.stack([found[e]] * 4))
    # An input that is always 0, and a Gram matrix that is not positive: damped until it is.
    dead, odd = gram.copy(), gram.copy()
    dead[:, 5] = dead[:, :, 5] = 0
    odd[0] = -0.9 * gram[0] + 2 * np.diag(np.diag(gram[0]))
    without = run(w, dead, np.full(4, 4))
    assert (np.asarray(without.dead) == 1).all()
    np.testing.assert_array_equal(without.w[:, 5], fake_quant(w, np.full(4, 4), GROUP, False)[:, 5])
    more = run(w, odd, np.full(4, 4))
    assert more.damping[0] > 2 * DAMPING and (np.asarray(more.damping[1:]) == np.float32(DAMPING)).all()
    assert np.isfinite(more.w).all()


@pytest.mark.slow
def test_gptq_against_qwix(monkeypatch):
    """Google's implementation, for symmetric grids of four bits, whose scales are float32."""
    from qwix._src.core import qarray
    from qwix.contrib import gptq_core

    monkeypatch.setattr(grid, "SCALE", jnp.float32)
    rng = np.random.default_rng(1)
    w, x = rng.normal(size=(16, 5)).astype(np.float32), rng.normal(size=(90, 16)) @ rng.normal(size=(16, 16))
    gram = (x.T @ x).astype(np.float32)
    how = qarray.HowToQuantize(qtype=jnp.int4, channelwise_axes=(0,), tiled_axes={1: 8}, calibration_method="absmax")
    with jax.numpy_rank_promotion("allow"):
        theirs, _ = gptq_core.quantize_weight(jnp.asarray(w.T), jnp.asarray(gram), how, blocksize=8)
        near = qarray.dequantize(qarray.quantize(jnp.asarray(w.T), how)).T
        theirs = qarray.dequantize(theirs).T
    np.testing.assert_allclose(grid.fake_quant(jnp.asarray(w), 4, 8, True), near, atol=1e-6)
    np.testing.assert_allclose(gptq(jnp.asarray(w), jnp.asarray(gram), 4, 8, True).w, theirs, atol=1e-5)
