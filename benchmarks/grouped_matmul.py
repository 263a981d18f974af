"""Checks back ends of grouped matmul against float64, and then times them on the shapes of MoE layers.

    python -m benchmarks.grouped_matmul                        # what 'auto' chooses here
    python -m benchmarks.grouped_matmul --backends=reference --small

A Dirichlet(4) draw splits rows over experts, and is the same for all back ends. It prints one row for each shape and
back end: TFLOP/s forward, and forward with backward; those of XLA's batched product of the same number of rows in
groups of equal size, an upper bound for uneven groups; and how many further calls of the back end gave other values,
out of how many, with rows split by that draw, all sent to one expert, or some of them sent to few.
"""

import functools
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from moe_jax import cli
from moe_jax.kernels import choose_backend, grouped_matmul, grouped_matmuls
from moe_jax.kernels.grouped_matmul import BACKENDS as KNOWN

BACKENDS = flags.DEFINE_list("backends", [], "back ends; default: what 'auto' chooses here")
flags.register_validator("backends", lambda names: set(names) <= set(KNOWN), f"must be among {', '.join(KNOWN)}")
SMALL = flags.DEFINE_bool("small", False, "shapes for a CPU")
CALLS = flags.DEFINE_integer("calls", 20, "calls in a turn; the peer has as many", 1)

SHAPES = [  # experts, d_model, d_expert, routed rows
    (64, 2048, 1024, 131072),
    (64, 2048, 1408, 65536),
    (128, 2048, 768, 131072),
    (8, 4096, 14336, 16384),
    (64, 1024, 512, 65536),
]
SMALL_SHAPES = [(8, 192, 192, 8192), (64, 256, 128, 8192)]
CHECKED = [(256, 384), (576, 192)]  # d_model, d_expert; the second pair fills no whole tile


def uneven_sizes(experts: int, rows: int) -> np.ndarray:
    """All rows in one group; and ends off every tile, a tile of three groups, empty groups, rows of no group."""
    one_hot, few = sizes = np.zeros((2, experts), np.int32)
    one_hot[5], few[[1, 3, 4, 6]] = rows, (1, rows // 2 - 12, 3, 129)
    return sizes


def check(backend: str, dtype) -> float:
    """Largest relative error of a product and of two with the same rows, and of their gradients, against float64.

    Over uneven, empty and one-hot groups.
    """
    rng = np.random.default_rng(0)
    experts, rows = 8, 1024
    worst = 0.0
    groups = (rng.multinomial(rows - 77, np.ones(experts) / experts), *uneven_sizes(experts, rows))
    for (d, f), sizes, many in itertools.product(CHECKED, groups, (1, 2)):
        x, ws, dys = (rng.standard_normal(s) for s in ((rows, d), (many, experts, d, f), (many, rows, f)))
        x, ws, dys = (jnp.asarray(a, dtype) for a in (x, ws / d**0.5, dys))
        s = jnp.asarray(sizes, jnp.int32)
        ys, vjp = jax.vjp(lambda x, ws, s=s: grouped_matmuls(x, tuple(ws), s, backend), x, ws)
        dx, dws = vjp(tuple(dys))
        X, W, G = (np.asarray(a, np.float64) for a in (x, ws, dys))
        Y, DX, DW = np.zeros((many, rows, f)), np.zeros((rows, d)), np.zeros((many, experts, d, f))
        start = 0
        for e, n in enumerate(sizes):
            part = slice(start, start + n)
            Y[:, part], DW[:, e] = X[part] @ W[:, e], X[part].T @ G[:, part]
            DX[part] = sum(g[part] @ w[e].T for g, w in zip(G, W, strict=True))
            start += n
        for got, want in ((jnp.stack(ys), Y), (dx, DX), (dws, DW)):
            error = np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)
            worst = max(worst, error if np.isfinite(error) else np.inf)
    return worst


def draw_sizes(rng: np.random.Generator, experts: int, rows: int) -> jax.Array:
    """Rows of every expert, by a Dirichlet(4) draw."""
    sizes = np.floor(rng.dirichlet(np.full(experts, 4.0)) * rows).astype(np.int32)
    sizes[0] += rows - sizes.sum()
    return jnp.asarray(sizes)


def batched_product(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    """[R, D] · [E, D, F] → [R, F] with R/E rows for every expert, whatever the sizes."""
    del sizes
    y = jnp.einsum("erd,edf->erf", x.reshape(len(w), -1, x.shape[1]), w)
    return y.reshape(len(x), -1)


def compiled(product):
    """The product, and the product with its gradients: (x, w, sizes) and (x, w, sizes, dy)."""

    def both(x, w, sizes, dy):
        y, vjp = jax.vjp(lambda x, w: product(x, w, sizes), x, w)
        return y, vjp(dy)

    return jax.jit(product), jax.jit(both)


def differing(fn, *args) -> int:
    """Of CALLS calls, those with a value other than the first call's; a NaN counts as one."""
    first = jax.tree.leaves(fn(*args))
    again = (zip(first, jax.tree.leaves(fn(*args)), strict=True) for _ in range(CALLS.value))
    return sum(not all(jnp.array_equal(a, b) for a, b in pairs) for pairs in again)


def seconds(fn, *args) -> float:
    """Median of three means over CALLS back-to-back calls, after a warm-up."""
    for _ in range(3):
        jax.block_until_ready(fn(*args))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(CALLS.value):
            out = fn(*args)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / CALLS.value)
    return sorted(times)[1]


def main(_):
    device = jax.devices()[0]
    backends = BACKENDS.value or [choose_backend("auto", device.platform, device.device_kind, "bfloat16")[0]]
    dtype = jnp.float32 if device.platform == "cpu" else jnp.bfloat16
    rng = np.random.default_rng(0)
    products = {}
    for backend in backends:
        error = check(backend, dtype)
        print(f"{backend}: relative error against float64 {error:.1e} ({jnp.dtype(dtype).name})", flush=True)
        products[backend] = compiled(functools.partial(grouped_matmul, backend=backend))
    equal, equal_both = compiled(batched_product)
    for experts, d, f, rows in SMALL_SHAPES if SMALL.value else SHAPES:
        x = jax.random.normal(jax.random.key(0), (rows, d), dtype)
        w = jax.random.normal(jax.random.key(1), (experts, d, f), dtype) / d**0.5
        dy = jax.random.normal(jax.random.key(2), (rows, f), dtype)
        s = draw_sizes(rng, experts, rows)
        splits = (s, *map(jnp.asarray, uneven_sizes(experts, rows)))
        flops = 2 * rows * d * f
        even, even_two = seconds(equal, x, w, s), seconds(equal_both, x, w, s, dy)
        for backend, (forward, both) in products.items():
            one, two = seconds(forward, x, w, s), seconds(both, x, w, s, dy)
            differ = sum(differing(both, x, w, split, dy) for split in splits)
            print(
                f"{backend} E={experts} D={d} F={f} rows={rows}: forward {flops / one / 1e12:.3g} TFLOP/s, "
                f"forward+backward {3 * flops / two / 1e12:.3g} TFLOP/s, "
                f"equal groups, batched: {flops / even / 1e12:.3g}, {3 * flops / even_two / 1e12:.3g} TFLOP/s, "
                f"other values in {differ} of {len(splits) * CALLS.value} calls "
                f"({device.device_kind}, jax {jax.__version__})",
                flush=True,
            )


if __name__ == "__main__":
    cli.run(main)
