"""The products of a Newton–Schulz step: the einsums against float64, the Hopper kernel in Pallas' interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.kernels import stacked
from moe_jax.optim import newton_schulz

needs_new_jax = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernel is for jax 0.11 and later")
A, B, C = (np.array(v, np.float32) for v in ([0.5, 2.0], [-1.0, 3.0], [0.25, -1.5]))


def stack(m: int, n: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, m, n)).astype(np.float32) / n**0.5


def column(v: np.ndarray) -> np.ndarray:
    return v[:, None, None].astype(np.float64)


def cases(x: jax.Array):
    """(name, result, float64) of the three products that a step takes."""
    f64 = lambda a: np.asarray(a.astype(jnp.float32), np.float64)
    square = jnp.asarray(f64(x) @ f64(x).transpose(0, 2, 1)).astype(x.dtype)
    eye, a, b, c = np.eye(x.shape[1]), jnp.asarray(A), jnp.asarray(B), jnp.asarray(C)
    want = column(A) * (f64(x) @ f64(x).transpose(0, 2, 1)) + column(C) * eye
    yield "gram", stacked.symmetric_product(x, a, None, c), want
    want = column(A) * (f64(square) @ f64(square)) + column(B) * f64(square) + column(C) * eye
    yield "square", stacked.symmetric_product(square, a, b, c), want
    yield "residual", stacked.residual_product(square, x, b), f64(square) @ f64(x) + column(B) * f64(x)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 3e-3)])
def test_einsums_are_the_formulas(dtype, tolerance):
    """bf16: what rounding the result once costs."""
    for name, got, want in cases(jnp.asarray(stack(48, 80), dtype)):
        error = np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)
        assert got.dtype == dtype and error < tolerance, (name, error)


@needs_new_jax
def test_kernel_equals_the_einsums(monkeypatch):
    """Three blocks for 2 × 6 tiles (2 × 20 of the residual), so that a block goes from tile to tile and matrix to
    matrix. The results are sums in float32, rounded once: they differ where two orders of summation round apart."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    x = jnp.asarray(stack(512, 640), jnp.bfloat16)
    einsums = list(cases(x))
    monkeypatch.setattr(stacked, "SMS", 3)
    monkeypatch.setattr(stacked, "uses_kernel", lambda *_: True)
    with plgpu.force_gpu_interpret_mode():
        kernels = list(cases(x))
    for (name, got, _), (_, want, _) in zip(kernels, einsums, strict=True):
        got, want = (np.asarray(y, np.float32) for y in (got, want))
        assert np.mean(got != want) < 0.01, name
        np.testing.assert_allclose(got, want, rtol=1e-2, atol=1e-2, err_msg=name)


@needs_new_jax
@pytest.mark.slow
def test_kernel_at_every_size_of_matrix(monkeypatch):
    """A first step by the kernel, of gradients from 1e-20 to 1e20, against float64; zeros stay zeros."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    x = np.random.default_rng(1).normal(size=(1, 512, 512)).astype(np.float32)
    x, once = x * np.float32([1e-20, 0.0, 1e20])[:, None, None], newton_schulz.coefficients("jordan", 1)
    monkeypatch.setattr(stacked, "uses_kernel", lambda *_: True)
    with plgpu.force_gpu_interpret_mode():
        got = np.asarray(newton_schulz.orthogonalize(jnp.asarray(x), once), np.float64)
    want = newton_schulz.orthogonalize_reference(x[0], once)
    for y in got[::2]:
        assert np.linalg.norm(y - want) < 0.01 * np.linalg.norm(want)
    assert not got[1].any()


@needs_new_jax
def test_hopper_takes_the_kernel(monkeypatch):
    """Lowered for a GPU from here: of one step of a stack that fits, every product is the kernel."""
    monkeypatch.setattr(stacked, "_device_kind", lambda: "NVIDIA H200")
    v = jax.ShapeDtypeStruct((4,), jnp.float32)

    def step(x, v):
        z = stacked.symmetric_product(x, v, None, v)
        return stacked.residual_product(stacked.symmetric_product(z, v, v, v), x, v)

    x = jax.ShapeDtypeStruct((4, 512, 1024), jnp.bfloat16)
    text = jax.jit(step).trace(x, v).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 3 and "dot_general" not in text
    for shape, dtype in [((4, 512, 1024), jnp.float32), ((4, 256, 512), jnp.bfloat16), ((4, 640, 1024), jnp.bfloat16),
                         ((4, 512, 1000), jnp.bfloat16)]:  # fmt: skip
        assert not stacked.uses_kernel(shape, dtype)
    monkeypatch.setattr(stacked, "_device_kind", lambda: "NVIDIA A100-SXM4-80GB")
    assert not stacked.uses_kernel(x.shape, x.dtype)


def test_symmetric_tiles_cover_the_lower_triangle():
    """Each tile on or under the diagonal once; 5/8 of all at 1024 rows, 9/16 at 2048."""
    for m, share in ((512, 3 / 4), (1024, 5 / 8), (2048, 9 / 16)):
        tiles = stacked._tiles(m, m, symmetric=True)
        covered = np.zeros((m // 256, m // 128), int)
        for i, j in tiles:
            covered[i, j] += 1
        rows, columns = np.indices(covered.shape)
        np.testing.assert_array_equal(covered, 128 * columns < 256 * (rows + 1))
        assert len(tiles) == share * covered.size
