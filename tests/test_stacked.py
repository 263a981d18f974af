"""The products of Newton–Schulz steps: the einsums against float64, the Hopper kernel in Pallas' interpreter."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.kernels import stacked, symmetric
from moe_jax.optim import newton_schulz
from moe_jax.parallel import axes

needs_new_jax = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernel is for jax 0.11 and later")
A, B, C = (np.array(v, np.float32) for v in ([0.5, 2.0], [-1.0, 3.0], [0.25, -1.5]))


def stack(m: int, n: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, m, n)).astype(np.float32) / n**0.5


def column(v: np.ndarray) -> np.ndarray:
    return v[:, None, None].astype(np.float64)


def cases(x: jax.Array):
    """(name, result, float64) of the products that a step takes, by the standard iteration and by Gram's."""
    f64 = lambda a: np.asarray(a.astype(jnp.float32), np.float64)
    square = jnp.asarray(f64(x) @ f64(x).transpose(0, 2, 1)).astype(x.dtype)
    # A polynomial of the same matrix: the two commute, up to the rounding of both.
    other = jnp.asarray(f64(square) @ f64(square) / 4 - 0.5 * f64(square)).astype(x.dtype)
    eye, a, b, c = np.eye(x.shape[1]), jnp.asarray(A), jnp.asarray(B), jnp.asarray(C)
    want = column(A) * (f64(x) @ f64(x).transpose(0, 2, 1)) + column(C) * eye
    yield "gram", stacked.symmetric_product(x, x, None, a, None, c), want
    want = column(A) * (f64(square) @ f64(square)) + column(B) * f64(square) + column(C) * eye
    yield "square", stacked.symmetric_product(square, square, square, a, b, c), want
    want = column(A) * (f64(square) @ f64(other)) + column(B) * f64(square)
    yield "commuting", stacked.symmetric_product(square, other, square, a, b, None), want
    yield "residual", stacked.residual_product(square, x, b), f64(square) @ f64(x) + column(B) * f64(x)
    want = column(A) * (f64(square) @ f64(x)) + column(B) * f64(x)
    yield "scaled", stacked.residual_product(square, x, b, a), want
    yield "plain", stacked.plain_product(square, x), f64(square) @ f64(x)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 3e-3), (jnp.float16, 4e-4)])
def test_einsums_are_the_formulas(dtype, tolerance):
    """Allows, with 16 bits, what rounding the result once costs."""
    for name, got, want in cases(jnp.asarray(stack(48, 80), dtype)):
        error = np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)
        assert got.dtype == dtype and error < tolerance, (name, error)


@pytest.fixture
def interpreter(monkeypatch):
    """Three blocks, so that each goes from tile to tile and matrix to matrix."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    monkeypatch.setattr(symmetric, "SMS", 3)
    monkeypatch.setattr(stacked, "uses_kernel", lambda *_: True)
    with plgpu.force_gpu_interpret_mode():
        yield


def rounded_alike(got, want, name):
    """Sums in float32, rounded once, differ only where two orders of summation round apart."""
    largest = 2 * float(jnp.finfo(got.dtype).eps)
    got, want = (np.asarray(y, np.float32) for y in (got, want))
    assert np.mean(got != want) < 0.01, name
    np.testing.assert_allclose(got, want, rtol=largest, atol=largest, err_msg=name)


@needs_new_jax
@pytest.mark.parametrize(
    ("shape", "dtype", "which"), [((256, 384), jnp.bfloat16, slice(None)), ((384, 384), jnp.float16, slice(1, 2))]
)
def test_kernel_equals_the_einsums(shape, dtype, which, request):
    """Odd numbers of blocks: three in a row; three in a column, of the square only."""
    some = lambda: itertools.islice(cases(jnp.asarray(stack(*shape), dtype)), which.start, which.stop)
    einsums = list(some())
    request.getfixturevalue("interpreter")
    for (name, got, _), (_, want, _) in zip(some(), einsums, strict=True):
        if name == "commuting":  # up to rounding: the kernel computes one side of the diagonal, whichever it is
            want = jnp.where(got == want, want, jnp.swapaxes(want, 1, 2))
        rounded_alike(got, want, name)


@needs_new_jax
@pytest.mark.slow
@pytest.mark.usefixtures("interpreter")
def test_every_combination_of_operands():
    """Takes a term that is an operand, one that is none, and two operands that differ."""
    rng = np.random.default_rng(2)
    x, w = (jnp.asarray(v, jnp.float16) for v in (stack(384, 512), rng.normal(size=(2, 384, 384)) / 20))
    a, b, c = (jnp.asarray(v) for v in (A, B, C))
    z = (w + w.transpose(0, 2, 1)).astype(x.dtype)
    square = jnp.einsum("lmk,lkn->lmn", z, z)
    exact = lambda y: np.asarray(y, np.float64)
    for term in (z, square):
        want = column(A) * exact(z) @ exact(square) + column(B) * exact(term) + column(C) * np.eye(384)
        got = symmetric.product(z, square, term, a, b, c, symmetric=True)
        assert np.linalg.norm(exact(got) - want) < 4e-4 * np.linalg.norm(want)
    for term in (x, x + 1, None):
        want = column(A) * exact(z) @ exact(x) + (0 if term is None else column(B) * exact(term))
        got = symmetric.product(z, x, term, a, b, None, symmetric=False)
        assert np.linalg.norm(exact(got) - want) < 4e-4 * np.linalg.norm(want)


@needs_new_jax
@pytest.mark.slow
@pytest.mark.usefixtures("interpreter")
def test_kernel_at_every_size_of_matrix():
    """A first step by the kernel, of gradients from 1e-20 to 1e20, against float64; zeros stay zeros."""
    x = np.random.default_rng(1).normal(size=(1, 512, 512)).astype(np.float32)
    x, once = x * np.float32([1e-20, 0.0, 1e20])[:, None, None], newton_schulz.coefficients("jordan", 1)
    got = np.asarray(newton_schulz.orthogonalize(jnp.asarray(x), once, jnp.bfloat16), np.float64)
    want = newton_schulz.orthogonalize_reference(x[0], once)
    for y in got[::2]:
        assert np.linalg.norm(y - want) < 0.01 * np.linalg.norm(want)
    assert not got[1].any()


@needs_new_jax
def test_hopper_takes_the_kernel(monkeypatch):
    """Lowered for a GPU from here: of one step of a stack that fits, every product is the kernel."""
    monkeypatch.setattr(axes, "current_kind", lambda: "NVIDIA H200")
    v = jax.ShapeDtypeStruct((4,), jnp.float32)

    def step(x, v):
        z = stacked.symmetric_product(x, x, None, v, None, v)
        return stacked.residual_product(stacked.symmetric_product(z, z, z, v, v, v), x, v)

    for m, dtype in ((512, jnp.bfloat16), (640, jnp.float16)):
        x = jax.ShapeDtypeStruct((4, m, 1024), dtype)
        text = jax.jit(step).trace(x, v).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("custom_call @mosaic_gpu") == 3 and "dot_general" not in text
    for shape, dtype in [((4, 512, 1024), jnp.float32), ((4, 256, 512), jnp.bfloat16), ((4, 576, 1024), jnp.float16),
                         ((4, 512, 1000), jnp.bfloat16)]:  # fmt: skip
        assert not stacked.uses_kernel(shape, dtype)
    monkeypatch.setattr(axes, "current_kind", lambda: "NVIDIA A100-SXM4-80GB")
    assert not stacked.uses_kernel(x.shape, x.dtype)


@pytest.mark.parametrize("blocks", range(2, 17))
def test_symmetric_tiles_hold_one_of_two_mirrored_blocks(blocks):
    """Each once, but for one that an odd number leaves alone; 36 of 64 blocks at 1024 rows."""
    tiles = symmetric._symmetric_tiles(blocks)
    held = [tuple(sorted((row, int(column)))) for column, *rows in tiles for row in map(int, rows)]
    pairs = {(i, j) for j in range(blocks) for i in range(j + 1)}
    assert set(held) == pairs and len(held) == len(pairs) + len(pairs) % 2
    assert blocks != 8 or len(held) == 36


@pytest.mark.parametrize(("rows", "columns"), [(2, 3), (5, 4), (8, 16)])
def test_tiles_hold_every_block(rows, columns):
    """Neighbours; one row twice where their number is odd."""
    tiles = symmetric._tiles(rows, columns)
    assert all(second == first + 1 for _, first, second in tiles)
    held = [(int(i), int(j)) for j, *two in tiles for i in two]
    assert set(held) == {(i, j) for i in range(rows) for j in range(columns)}
    assert len(held) == columns * (rows + rows % 2)


def test_what_the_kernel_does_not_take():
    x, a = jnp.zeros((1, 384, 640), jnp.bfloat16), jnp.ones(1)
    with pytest.raises(ValueError, match="c is for symmetric products"):
        symmetric.product(x[:, :, :384], x, None, a, None, a, symmetric=False)
