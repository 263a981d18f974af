"""Newton–Schulz in float16: error to float64 by spectrum and shape, range, and which iteration a shape takes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.optim import newton_schulz
from moe_jax.optim.newton_schulz import SETS, Coefficients, orthogonalize, orthogonalize_reference
from moe_jax.parallel import axes
from tests.muon_reference import error, gaussian

SPECTRA = ("gaussian", "power law", "exponential")
SHAPES = {"wide": (128, 320), "tall": (320, 128), "square": (96, 96)}


def matrix(spectrum: str, shape: tuple[int, int]) -> np.ndarray:
    """A random matrix whose singular values are those of a Gaussian one, 1/k, or exp(−8·k/m)."""
    x = gaussian(shape, 3).astype(np.float64)
    if spectrum != "gaussian":
        u, _, vt = np.linalg.svd(x, full_matrices=False)
        k = np.arange(1, min(shape) + 1)
        x = (u * (1 / k if spectrum == "power law" else np.exp(-8 * k / len(k)))) @ vt
    return x.astype(np.float32)


@functools.cache
def errors(name: str, shape: tuple[int, int], dtype: str) -> list[float]:
    """Measures the errors of each spectrum, for the iteration that the shape takes."""
    x = np.stack([matrix(spectrum, shape) for spectrum in SPECTRA])
    got = jax.jit(functools.partial(orthogonalize, coefficients=SETS[name], dtype=jnp.dtype(dtype)))(x)
    assert got.dtype == jnp.dtype(dtype)
    return [error(y, orthogonalize_reference(one, SETS[name])) for y, one in zip(got, x, strict=True)]


@pytest.mark.parametrize("name", ["jordan", *(pytest.param(n, marks=pytest.mark.slow) for n in SETS if n != "jordan")])
def test_float16_is_closer_than_bfloat16(name):
    """Its error is at most a fifth of bfloat16's where the iteration is the standard one, a third where it is Gram's.
    Without the shift by s·I, Gram's would be up to 0.37 of it."""
    for kind, shape in SHAPES.items():
        gram = newton_schulz.uses_gram(*shape, len(SETS[name].steps), jnp.float16)
        assert gram == (kind != "square")
        narrow, today = errors(name, shape, "float16"), errors(name, shape, "bfloat16")
        for spectrum, got, before in zip(SPECTRA, narrow, today, strict=True):
            assert got < (1 / 3 if gram else 0.2) * before, (kind, spectrum, got, before)


@pytest.mark.parametrize("name", SETS)
def test_gram_is_the_same_function(name, monkeypatch):
    """Compares in float32, where it is not taken, within its rounding: 2⁻¹³ of that in float16."""
    monkeypatch.setattr(newton_schulz, "uses_gram", lambda *_: True)
    x = matrix("gaussian", (48, 120))
    for steps in (1, 4, 7) if name == "jordan" else (0,):
        chosen = newton_schulz.coefficients(name, steps)
        got = jax.jit(lambda x, chosen=chosen: orthogonalize(x, chosen, jnp.float32))(x)
        assert error(got, orthogonalize_reference(x, chosen)) < 2e-5, steps


@pytest.mark.parametrize("shape", [(32, 96), (64, 64)])
def test_the_range_of_float16(shape):
    """A matrix without full rank, zeros, one entry far above the others, the ends of float32's range, and a small part
    of a far larger matrix, of which X·Xᵀ is subnormal: all but the first two as accurate as Gaussian ones."""
    x = gaussian((6, *shape))
    x[0, 3:] = x[0, 0]
    x[1] = 0.0
    x[2, 0, 0] = 3e5
    x[3] *= np.float32(1e38) / np.abs(x[3]).max()
    x[4] *= np.float32(1e-34)
    kept, _ = newton_schulz._unit(x[2:3], 1.0, jnp.float16)  # small entries beside the large one keep their digits
    np.testing.assert_allclose(np.asarray(kept, np.float64)[0, 1:] * (x[2, 0, 0] / kept[0, 0, 0]), x[2, 1:], rtol=2e-3,
                               atol=1e-5)  # fmt: skip
    ortho = jax.jit(orthogonalize, static_argnames=("coefficients", "dtype"))
    for prescale in (1.0, 3000.0):
        chosen = Coefficients(SETS["jordan"].steps, prescale)
        got = np.asarray(ortho(x, chosen, jnp.float16), np.float64)
        assert np.isfinite(got).all() and not got[1].any()
        for i in (0, 2, 3, 4, 5):
            limit = {0: 1.2e-2, 2: 4e-3}.get(i, 3e-3)
            assert error(got[i], orthogonalize_reference(x[i], chosen)) < limit, (prescale, i)


def test_which_iteration_a_shape_takes(monkeypatch):
    """Counts FLOPs: with kernels that compute half of a symmetric product, it is taken if one side is longer at all."""
    takes = lambda m, n, dtype=jnp.float16: newton_schulz.uses_gram(m, n, 5, dtype)
    assert not takes(1024, 1024) and not takes(1024, 1536) and takes(1024, 1664) and takes(1664, 1024)
    assert not takes(64, 1024, jnp.bfloat16) and not takes(64, 1024, jnp.float32)
    monkeypatch.setattr(axes, "current_kind", lambda: "NVIDIA H200")
    if jax.__version_info__ >= (0, 11):
        assert takes(1024, 1152) and takes(1152, 1024) and not takes(1024, 1024) and not takes(128, 160)
    assert newton_schulz.iteration_dtype() == jnp.float16 == newton_schulz.iteration_dtype("float16")
    monkeypatch.setattr(axes, "current_kind", lambda: "TPU v5 lite")
    assert newton_schulz.iteration_dtype() == jnp.bfloat16 and newton_schulz.iteration_dtype("float32") == jnp.float32


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 6, 10, 20])
def test_flops_are_those_of_the_products(steps):
    """Counted in the program of one matrix; the published 14 + 6α of five steps, where half is computed."""
    for m, n in ((16, 16), (16, 48)):
        gram = newton_schulz.uses_gram(m, n, steps, jnp.float16)
        chosen = newton_schulz.coefficients("jordan", steps)
        program = jax.make_jaxpr(lambda x: orthogonalize(x, chosen, jnp.float16))(jnp.zeros((m, n)))  # noqa: B023
        assert gram == (m < n and steps > 1)
        assert counted(program.jaxpr) == newton_schulz.flops(m, n, steps, jnp.float16)
    assert newton_schulz._phases(steps)[0] == min(steps, 2) and max(newton_schulz._phases(steps)) <= 3
    assert sum(newton_schulz._phases(steps)) == steps
    assert newton_schulz._flops(10, 30, 5, 2, 0.5) == (14 + 6 * 3) * 10**3


def counted(jaxpr) -> int:
    """FLOPs of the products in a program, of one matrix, a loop as often as it runs."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            inner = equation.invars[0].aval.shape[contracted[0]]
            total += 2 * inner * int(np.prod(equation.outvars[0].aval.shape))
        for value in equation.params.values():
            inside = getattr(value, "jaxpr", value)
            if hasattr(inside, "eqns"):
                total += equation.params.get("length", 1) * counted(inside)
    return total
