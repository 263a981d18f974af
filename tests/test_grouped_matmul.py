"""Grouped matmul off the GPU: values, gradients, refusals, what `auto` takes. On the GPU: test_hopper.py."""

import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.kernels import choose_backend, grouped_matmul, grouped_matmuls

ROWS, SIZES = (
    40,
    {  # of 5 groups
        "random": (7, 3, 12, 1, 17),
        "empty_groups": (0, 23, 0, 17, 0),
        "one_group": (0, 0, 40, 0, 0),
        "tail": (4, 9, 0, 8, 3),  # 16 rows belong to nobody
        "nothing": (0, 0, 0, 0, 0),
        "whole_blocks": (8, 16, 8, 0, 8),
    },
)


def product(x, w, sizes):
    """y, and the gradients dx and dw for a cotangent dy, row by row in float64."""
    y, dx, dw = np.zeros((len(x), w.shape[2])), np.zeros(x.shape), np.zeros(w.shape)
    group = np.repeat(np.arange(len(sizes)), sizes)
    dy = np.cos(np.arange(y.size)).reshape(y.shape)
    dy = np.asarray(jnp.asarray(dy, jnp.bfloat16), np.float64)  # exact in every dtype
    for r, e in enumerate(group):
        y[r] = x[r] @ w[e]
        dx[r] = w[e] @ dy[r]
        dw[e] += np.outer(x[r], dy[r])
    return dy, (y, dx, dw)


@pytest.mark.parametrize(
    ("backend", "block", "dtype"),
    [
        *itertools.product(("reference",), (8, 128), ("float32", "bfloat16")),
        *itertools.product(("ragged_dot", "batched"), (None,), ("float32", "bfloat16")),
        ("batched", None, "float16"),
    ],
)
def test_grouped_matmul(monkeypatch, backend, block, dtype):
    """Groups of many blocks of 8 and of less than one block of 128. A narrow dtype rounds only the result, no sum."""
    if block:
        # The package exports a function of the module's name, so the module is looked up.
        monkeypatch.setattr(sys.modules["moe_jax.kernels.grouped_matmul"], "BLOCK", block)
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=s), dtype) for s in ((ROWS, 24), (5, 24, 6)))

    @jax.jit
    def run(x, w, sizes, dy):
        y, vjp = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, backend), x, w)
        return y, *vjp(dy)

    for name, sizes in SIZES.items():
        dy, want = product(np.asarray(x, np.float64), np.asarray(w, np.float64), sizes)
        got = run(x, w, jnp.asarray(sizes, jnp.int32), jnp.asarray(dy, dtype))
        for part, a, b in zip(("y", "dx", "dw"), got, want, strict=True):
            assert a.dtype == dtype
            a = np.asarray(a, np.float64)
            unit = {"float32": 2**-23, "bfloat16": 2**-8, "float16": 2**-11}[dtype]
            np.testing.assert_allclose(a, b, rtol=unit, atol=4e-6, err_msg=f"{name} {part}")
            assert not a[b == 0].any(), f"{name} {part}: rows of nobody and weights of idle groups are exactly zero"


def test_matrices_of_two_shapes_are_refused():
    x, sizes = jnp.ones((8, 4)), jnp.asarray([3, 5])
    with pytest.raises(ValueError, match=r"\(2, 4, 6\), \(2, 4, 7\).*of one shape"):
        grouped_matmuls(x, (jnp.ones((2, 4, 6)), jnp.ones((2, 4, 7))), sizes, "reference")


@pytest.mark.parametrize("backend", ["reference", "batched"])
def test_it_touches_only_rows_and_weights_in_use(backend):
    """NaN in an idle expert's weights and in rows of nobody reaches nothing: neither values nor gradients."""
    sizes = jnp.asarray([5, 0, 9], jnp.int32)
    rng = np.random.default_rng(1)
    x, w = (np.asarray(rng.normal(size=s), np.float32) for s in ((20, 4), (3, 4, 6)))
    run = jax.jit(jax.vjp, static_argnums=0)
    f = lambda x, w: grouped_matmul(x, w, sizes, backend)
    y, vjp = run(f, x, w)
    clean = y, *vjp(jnp.cos(y))
    x[14:], w[1] = np.nan, np.nan
    y, vjp = run(f, x, w)
    for a, b in zip((y, *vjp(jnp.cos(y))), clean, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("kind", "dtype", "chosen", "reason"),
    [
        ("NVIDIA H200", "bfloat16", "hopper", "NVIDIA H200"),
        ("NVIDIA H200", "float16", "batched", "the Hopper kernel is bfloat16"),
        (
            "NVIDIA A100-SXM4-80GB",
            "bfloat16",
            "batched",
            "no kernel for NVIDIA A100-SXM4-80GB; measured on an H200 only",
        ),
        ("NVIDIA B200", "bfloat16", "batched", "no kernel for NVIDIA B200; measured on an H200 only"),
    ],
)
def test_auto_takes_the_hopper_kernel_only_where_it_runs(kind, dtype, chosen, reason):
    assert choose_backend("auto", "gpu", kind, dtype) == (chosen, reason)
