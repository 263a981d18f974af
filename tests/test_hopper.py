"""The grouped matmul for Hopper GPUs, in Pallas' interpreter: the same kernels, on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.kernels import grouped_matmuls, hopper, tiles
from moe_jax.kernels.tiles import FLAT, TALL, WIDE
from moe_jax.moe import experts

pytestmark = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernels are for jax 0.11 and later")

ROWS, EXPERTS, D = 400, 4, 256
SIZES = [[136, 0, 200, 24], [1, 129, 0, 257], [0, 0, 400, 0], [0, 7, 0, 0]]


def arrays(columns: int):
    rng = np.random.default_rng(0)
    return (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((ROWS, D), (EXPERTS, D, columns), (ROWS, columns)))


@pytest.fixture
def interpreter(monkeypatch):
    """Three blocks, so that each goes from tile to tile and group to group."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    monkeypatch.setattr(tiles, "SMS", 3)
    with plgpu.force_gpu_interpret_mode():
        yield


def error(got, want):
    return np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max()


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(("tiling", "columns"), [(WIDE, 256), (FLAT, 256), (TALL, 128)])
@pytest.mark.usefixtures("interpreter")
def test_every_group_by_its_own_matrix(sizes, tiling, columns):
    """Against float64: both directions of the rows, and the weight gradient, with nothing of other groups' rows."""
    x, w, dy = arrays(columns)
    s, n = hopper.find_groups(jnp.asarray(sizes, jnp.int32), ROWS), sum(sizes)
    X, W, G = (np.asarray(a, np.float64) for a in (x, w, dy))
    part = np.split(np.arange(n), np.cumsum(sizes)[:-1])
    y, z = hopper.rows_times_weights((x,), (w, 2 * w[::-1]), s, tiling=tiling)
    assert error(y[:n], np.concatenate([X[p] @ W[e] for e, p in enumerate(part)])) < 4e-3
    assert error(z[:n], np.concatenate([2 * X[p] @ W[-1 - e] for e, p in enumerate(part)])) < 4e-3
    (dx,) = hopper.rows_times_weights((dy, 2 * dy), (w, w[::-1]), s, transpose=True)
    want = np.concatenate([G[p] @ (W[e] + 2 * W[-1 - e]).T for e, p in enumerate(part)])
    assert error(dx[:n], want) < 4e-3
    assert (
        not np.any(np.asarray(y[n:], np.float32))
        and not np.any(np.asarray(z[n:], np.float32))
        and not np.any(np.asarray(dx[n:], np.float32))
    )
    # What follows the last group must not reach the gradient, whatever it is.
    x, dy = (jnp.where(jnp.arange(ROWS)[:, None] < n, a, jnp.nan) for a in (x, dy))
    want = np.stack([X[p].T @ G[p] for p in part])
    for dw, times in zip(hopper.weight_gradients(x, (dy, 2 * dy), s, tiling=tiling), (1, 2), strict=True):
        assert error(dw, times * want) < 4e-3


@pytest.mark.parametrize("columns", [128, 72])
@pytest.mark.usefixtures("interpreter")
def test_back_end_and_its_gradients(columns):
    """Against the reference back end: ys, dx and dws; rows past the last group, and widths of no whole tile, too."""
    x, w, dy = arrays(columns)
    x, w = (x, w) if columns == 128 else (x[:, :200], w[:, :200])
    sizes = jnp.asarray([1, 129, 0, 200], jnp.int32)
    results = []
    for backend in ("hopper", "reference"):
        y, vjp = jax.vjp(lambda x, *ws, b=backend: grouped_matmuls(x, ws, sizes, b), x, w, w[::-1])
        results.append([np.asarray(a, np.float32) for a in (*y, *vjp((dy, -2 * dy)))])
    for got, want in zip(*results, strict=True):
        assert got.shape == want.shape and error(got, want) < 1e-2


@pytest.mark.parametrize("rank", [4, 72])
@pytest.mark.usefixtures("interpreter")
def test_adapters_of_a_narrow_rank(rank):
    """LoRA's products and gradients in the rows of a plan, against float64: ranks that fill no tile."""
    sizes, rng = SIZES[0], np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape) * shape[-2] ** -0.5, jnp.bfloat16)
    x, gate, up, dy = draw(ROWS, D), draw(EXPERTS, D, 128), draw(EXPERTS, D, 128), draw(ROWS, 128)
    adapters = {name: (draw(EXPERTS, D, rank), draw(EXPERTS, rank, 128)) for name in ("gate", "up")}
    w = experts.ExpertWeights(gate, up, jnp.zeros((EXPERTS, 128, D), jnp.bfloat16), adapters)

    def products(x, adapters, matmuls, w=w):
        y, z = experts._products(x, ("gate", "up"), matmuls, w._replace(adapters=adapters))
        return jnp.sum((y + 2 * z) * dy)

    def by_group(x, ms):  # in float32, one expert after the other
        cut = np.split(np.arange(ROWS), np.cumsum(sizes))[:EXPERTS]
        rows = lambda m: [x[p] @ m[e] for e, p in enumerate(cut)]
        return [jnp.concatenate([*rows(m), jnp.zeros((ROWS - sum(sizes), m.shape[-1]))]) for m in ms]

    hopper_rows = lambda x, ms: grouped_matmuls(x, ms, jnp.asarray(sizes, jnp.int32), "hopper")
    got = jax.grad(products, (0, 1))(x, adapters, hopper_rows)
    exact = lambda tree: jax.tree.map(lambda a: a.astype(jnp.float32), tree)
    with jax.default_matmul_precision("highest"):
        want = jax.grad(lambda x, a: products(x, a, by_group, exact(w)), (0, 1))(exact(x), exact(adapters))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert error(a, np.asarray(b, np.float64)) < 2e-2


def test_lowers_for_a_gpu_with_and_without_clusters():
    x, w, dy = arrays(512)
    s = hopper.find_groups(jnp.full(EXPERTS, 100, jnp.int32), ROWS)
    for cluster in (1, 2):
        how = dict(tiling=FLAT._replace(cluster=cluster))
        both = lambda x, w, dy, how=how: (
            hopper.rows_times_weights((x,), (w, w), s, **how),
            hopper.weight_gradients(x, (dy, dy), s, **how),
        )
        text = jax.jit(both).trace(x, w, dy).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("custom_call @mosaic_gpu") == 2


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("height", [128, 256])
def test_tiles_hold_every_row_once(sizes, height):
    """And read no row past the last, from multiples of 8."""
    groups = hopper.find_groups(jnp.asarray(sizes, jnp.int32), ROWS)
    table, before = groups.short if height == 128 else groups.tall
    seen = np.full(ROWS, -1)
    for group, base, first, last in np.asarray(table)[: before[-1]]:
        assert base % hopper.ALIGN == 0 and 0 <= base <= ROWS - height and 0 <= first < last <= height
        assert (seen[base + first : base + last] == -1).all()
        seen[base + first : base + last] = group
    rest = ROWS - sum(sizes)  # a group of its own
    np.testing.assert_array_equal(seen, np.repeat(np.arange(EXPERTS + 1), [*sizes, rest]))
    assert len(table) >= before[-1]


@pytest.mark.parametrize(("rows", "columns"), [(20, 3), (8, 5), (3, 4)])
def test_bands_hold_every_tile_once(rows, columns):
    i, j = jax.vmap(lambda index: tiles.in_bands(index, jnp.int32(rows), columns))(jnp.arange(rows * columns))
    assert sorted(zip(i.tolist(), j.tolist(), strict=True)) == [(r, c) for r in range(rows) for c in range(columns)]
