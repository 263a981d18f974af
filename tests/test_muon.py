"""Muon on one device: against its formula in float64, and its table of parameters."""

import ast
import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax import config, model, optim
from moe_jax.optim import newton_schulz, optimizer
from moe_jax.optim.muon import muon, scale_by_muon
from moe_jax.optim.newton_schulz import SETS, orthogonalize, orthogonalize_reference
from moe_jax.optim.spread import Matrices
from tests.muon_reference import directions, error, gaussian, trajectory, updates

last_two = lambda path, leaf: Matrices()
ortho = jax.jit(orthogonalize, static_argnames=("coefficients", "dtype"))
exact = functools.partial(ortho, dtype=jnp.float32)


# --- the iteration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("jordan", 0.68, 1.21),
        ("you", 0.98, 1.15),
        ("polar_express", 0.87, 1.12),
        ("cans", 0.83, 1.17),
        ("deepseek_v4", 1.0, 1.0),
    ],
)
def test_singular_values_follow_the_polynomial(name, low, high):
    """O = U φ(σ) Vᵀ with the same U and V; every σ ≥ 0.003·‖X‖ lands in the published range."""
    chosen = SETS[name]
    grid = np.geomspace(3e-3, 1.0, 2000) / chosen.prescale

    def phi(s):
        for a, b, c in chosen.steps:
            s = a * s + b * s**3 + c * s**5
        return s

    # Published with two decimals.
    assert low - 0.005 <= phi(grid).min() and phi(grid).max() <= high + 0.005, (phi(grid).min(), phi(grid).max())
    u, _, vt = np.linalg.svd(gaussian((16, 40)).astype(np.float64), full_matrices=False)
    sigma = np.geomspace(1.0, 4e-3, 16)
    sigma *= 1.0 / np.linalg.norm(sigma)
    assert sigma.min() >= 3e-3 / 1.2
    want = (u * phi(sigma / chosen.prescale)) @ vt
    for x, w in (((u * sigma) @ vt * 7.0, want), (((u * sigma) @ vt * 7.0).T, want.T)):
        np.testing.assert_allclose(orthogonalize_reference(x, chosen), w, atol=1e-12)
        np.testing.assert_allclose(exact(jnp.asarray(x, jnp.float32), chosen), w, atol=5e-5)


def test_an_orthogonal_matrix_has_equal_singular_values():
    """All 1/√n at first, so the result is a multiple of the matrix."""
    q = np.linalg.qr(gaussian((24, 24)))[0]
    got, s = exact(jnp.asarray(q)), 24**-0.5
    for a, b, c in SETS["jordan"].steps:
        s = a * s + b * s**3 + c * s**5
    np.testing.assert_allclose(got, s * q, atol=1e-5)


BFLOAT16 = [("jordan", s) for s in [(128, 64), (48, 432), (128, 128)]] + [(name, (64, 128)) for name in SETS]


@pytest.mark.parametrize(("name", "shape"), BFLOAT16)
def test_bfloat16_is_within_one_percent(name, shape):
    """Of float64, relative to ‖O‖_F, with the input rounded too. Without centring the products: 1.4 to 3.6 %."""
    x = gaussian((4, *shape), 3)
    got = ortho(jnp.asarray(x), SETS[name], dtype=jnp.bfloat16)
    assert got.dtype == jnp.bfloat16
    # Polar Express is at 1.0 %. CANS lets singular values rise to 2, where its polynomials are steep.
    tolerance = {"cans": 0.05, "polar_express": 0.012}.get(name, 0.01)
    assert error(got, orthogonalize_reference(x, SETS[name])) < tolerance


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_batch_is_a_loop_over_matrices_and_zero_stays_zero(dtype):
    x = gaussian((2, 3, 24, 10)) * np.float32([1e-8, 1.0, 1e4])[None, :, None, None]
    x[1, 1] = 0.0
    got = np.asarray(ortho(jnp.asarray(x), dtype=dtype), np.float32)
    assert not got[1, 1].any()
    for i, j in np.ndindex(2, 3):
        one = np.asarray(ortho(jnp.asarray(x[i, j]), dtype=dtype), np.float32)
        np.testing.assert_allclose(got[i, j], one, atol={jnp.float32: 1e-5, jnp.bfloat16: 2e-2}[dtype])
    # The norm is that of one matrix, not of the batch: a large neighbour changes nothing.
    assert np.abs(got[0, 1]).max() > 0.1


SIZES = [1e-20, 1e-12, 1e-6, 1.0, 1e6, 1e19, 1e20]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 1e-2), ("float16", 2e-3)])
def test_the_size_of_the_gradient_does_not_matter(dtype, tolerance):
    """Two steps of float64 at every size; a power of two changes no bit. Gradients in either type."""
    tx = scale_by_muon(dtype=jnp.dtype(dtype), matrices=last_two)
    draw = np.asarray(jnp.asarray(gaussian((2, 64, 16)), dtype), np.float32)
    both = [np.stack([g * np.float32(size) for size in [*SIZES, 2.0**-60, 2.0**60]]) for g in draw]
    got = updates(tx, jnp.zeros_like(both[0]), jnp.asarray(both))
    for update, want in zip(got, directions(both, Matrices()), strict=True):
        for size, u, w in zip(SIZES, update, want, strict=False):
            assert error(u, w) < tolerance, (size, error(u, w))
        np.testing.assert_array_equal(update[-2], update[-1])
        np.testing.assert_array_equal(update[-2], update[SIZES.index(1.0)])
    low = jnp.asarray(both[:1], jnp.bfloat16)  # the momentum's sum would be rounded
    want = directions([np.asarray(low[0], np.float32)], Matrices())[0]
    low = updates(tx, low[0], low)[0].astype(jnp.float32)
    assert all(error(u, w) < 1e-2 for u, w in zip(low, want, strict=True))


def test_a_matrix_without_a_gradient_stays():
    """In that step only, and its momentum decays: the fourth step is that of the formula. Weight decay goes on."""
    tx = muon(0.1, weight_decay=0.3, dtype=jnp.float32, matrices=last_two)
    params, grads = gaussian((3, 12, 20), 1), [gaussian((3, 12, 20), 3 + i) for i in range(4)]
    for g in grads[1:3]:
        g[1] = 0.0
    grads[2][0, 1:] = 0.0  # one row that has a gradient is enough
    w = params.astype(np.float64)
    for step, (got, u) in enumerate(zip(trajectory(tx, params, grads), directions(grads, Matrices()), strict=True)):
        assert u[1].any() == (step in (0, 3)) and u[0].any()
        w = w - 0.1 * (u + 0.3 * w)
        assert error(got, w) < 1e-6, step


def test_coefficients_by_name():
    assert newton_schulz.coefficients("jordan") == SETS["jordan"] == newton_schulz.coefficients("jordan", 5)
    assert len(newton_schulz.coefficients("jordan", 7).steps) == 7
    assert newton_schulz.coefficients("deepseek_v4").steps[-3:] == ((3.4445, -4.7750, 2.0315), *[(2.0, -1.5, 0.5)] * 2)
    with pytest.raises(ValueError, match="coefficients='quintic': must be one of jordan, you"):
        newton_schulz.coefficients("quintic")
    with pytest.raises(ValueError, match="'cans' are 5 steps, not 6"):
        newton_schulz.coefficients("cans", 6)


def test_flops_by_hand():
    assert newton_schulz.flops(3, 7, 1) == newton_schulz.flops(7, 3, 1) == 2 * (3 * 7 * 3) + 2 * 27 + 2 * (3 * 3 * 7)


@pytest.mark.parametrize(
    ("shape", "rms"), [((256, 256), 0.180), ((256, 1024), 0.191), ((64, 2048), 0.147), ((512, 1408), 0.190)]
)
def test_update_rms(shape, rms):
    """0.2·√max(m, n)·O of a Gaussian matrix; measured in float64, an exact polar factor would give 0.2."""
    tx = scale_by_muon(dtype=jnp.float32)
    for s in (shape, shape[::-1]):
        g = jnp.asarray(gaussian(s))
        update, _ = jax.jit(tx.update)(g, tx.init(g))
        np.testing.assert_allclose(np.sqrt(np.mean(np.square(update))), rms, rtol=0.01)


# --- the step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nesterov", [True, False])
def test_three_steps_equal_the_formula(nesterov):
    """W ← W − η·(0.2·√max·O + λ·W), O from G + μ·M, M ← μ·M + G, with a schedule, for a matrix and a stack."""
    lr = lambda step: 0.1 / (1 + step)
    tx = muon(lr, momentum=0.9, nesterov=nesterov, weight_decay=0.3, dtype=jnp.float32, matrices=last_two)
    params = {"a": gaussian((12, 20), 1), "b": gaussian((2, 3, 20, 8), 2)}
    grads = [{"a": gaussian((12, 20), 3 + i), "b": gaussian((2, 3, 20, 8), 9 + i)} for i in range(3)]
    got = trajectory(tx, params, grads)
    for name, w in params.items():
        w = w.astype(np.float64)
        for t, u in enumerate(directions([g[name] for g in grads], Matrices(), 0.9, nesterov)):
            w = w - lr(t) * (u + 0.3 * w)
            assert error(got[t][name], w) < 1e-6, (name, t)


def test_scales_of_inputs_and_outputs():
    """√max(1, out/in) of x @ W; with heads, of one head."""
    g = jnp.asarray(gaussian((12, 36)))
    of = lambda heads, **more: scale_by_muon(dtype=jnp.float32, matrices=lambda path, x: Matrices(heads=heads), **more)
    update = lambda tx, g: np.asarray(jax.jit(lambda g: tx.update(g, tx.init(g))[0])(g))
    o = np.asarray(exact(g))
    np.testing.assert_allclose(update(of(None, scale="spectral"), g), 3**0.5 * o, atol=1e-5)
    np.testing.assert_allclose(update(of(None, scale="spectral"), g.T), o.T, atol=1e-5)
    np.testing.assert_allclose(update(of(None, update_rms=0.5), g), 0.5 * 6 * o, atol=1e-5)
    first = np.asarray(exact(g[:, :4]))
    np.testing.assert_allclose(update(of((1, 4)), g)[:, :4], 0.2 * 12**0.5 * first, atol=1e-5)
    with pytest.raises(ValueError, match="scale='rms': must be one of match_rms, spectral"):
        scale_by_muon(scale="rms")


def test_matrix_axes_may_lie_anywhere():
    """Axes 0 and 2 of [m, L, n]: the update is that of [L, m, n], moved back."""
    g = jnp.asarray(gaussian((8, 3, 12)))
    make = lambda axes: muon(1.0, weight_decay=0.0, dtype=jnp.float32, matrices=lambda path, leaf: Matrices(axes))
    update = lambda tx, g: jax.jit(lambda g: tx.update(g, tx.init(g), g)[0])(g)
    moved = update(make((-2, -1)), jnp.moveaxis(g, 0, 1))
    np.testing.assert_allclose(update(make((0, 2)), g), jnp.moveaxis(moved, 1, 0), atol=1e-6)


def test_cautious_decay():
    """Only entries that the update shrinks decay as well."""
    w, g = gaussian((12, 20), 1), gaussian((12, 20), 2)
    plain, cautious = (
        trajectory(muon(0.1, weight_decay=0.3, dtype=jnp.float32, cautious_decay=on), w, [g])[0] for on in (False, True)
    )
    (u,) = directions([g], Matrices())
    np.testing.assert_allclose(cautious, w - 0.1 * (u + 0.3 * w * (u * w > 0)), atol=1e-6)
    assert 0.2 < np.mean(np.asarray(plain) == np.asarray(cautious)) < 0.8


def test_a_leaf_without_a_rule_is_refused_by_name():
    params = {"ok": jnp.zeros((4, 4)), "block": {"experts": jnp.zeros((2, 4, 4))}}
    with pytest.raises(ValueError, match=r"block/experts \(2, 4, 4\)"):
        muon(1e-3).init(params)
    with pytest.raises(ValueError, match=r"axes of scale \(4,\) form a matrix"):
        muon(1e-3).init({"scale": jnp.zeros(4)})
    with pytest.raises(ValueError, match=r"heads of 3 do not divide axis 1 of w \(4, 4\)"):
        muon(1e-3, matrices=lambda path, leaf: Matrices(heads=(1, 3))).init({"w": jnp.zeros((4, 4))})
    with pytest.raises(ValueError, match=r"axes \(-3, -2\) of w \(4, 4\) are not two axes"):
        muon(1e-3, matrices=lambda path, leaf: Matrices(axes=(-3, -2))).init({"w": jnp.zeros((4, 4))})


def test_chains_with_clipping_and_does_not_feel_it():
    """Orthogonalisation removes the gradient's scale: the first step is the same, clipped or not."""
    params, g = gaussian((8, 12), 1), gaussian((8, 12), 2) * 100
    chain = optax.chain(optax.clip_by_global_norm(1.0), muon(0.1, dtype=jnp.float32))
    (clipped,), (free,) = trajectory(chain, params, [g]), trajectory(muon(0.1, dtype=jnp.float32), params, [g])
    assert np.abs(clipped - params).max() > 1e-2
    np.testing.assert_allclose(clipped, free, atol=2e-6)


def test_the_files_stand_alone():
    """Muon's files, the kernel and what these import: twelve files and four packages, usable without the rest."""
    folder = Path(__file__).parents[1] / "moe_jax"
    own = {"optim.muon", "optim.plan", "optim.spread", "optim.leaves", "optim.shares", "optim.newton_schulz",
           "kernels.stacked", "kernels.symmetric", "kernels.tiles", "parallel.axes", "tree", "chips"}  # fmt: skip
    allowed = {"jax", "numpy", "optax", "jaxtyping", "functools", "math", "collections", "typing", "re", "time",
               "heapq"}  # fmt: skip
    for name in own:
        for node in ast.walk(ast.parse((folder / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed
            elif isinstance(node, ast.ImportFrom):
                inside = node.module.removeprefix("moe_jax.")
                found = {inside} if inside in own else {f"{inside}.{alias.name}" for alias in node.names}
                assert found <= own or node.module.split(".")[0] in allowed, (name, node.module)


# --- the table of this model's parameters ----------------------------------------------------------------------------


def small_config(**optimizer) -> config.RunConfig:
    c = config.default_config()
    c.model.update(vocab_size=512, d_model=24, num_layers=3, num_dense_layers=1, d_ff=40, num_heads=4, num_kv_heads=2,
                   head_dim=8)  # fmt: skip
    c.model.moe.update(num_experts=6, top_k=2, d_expert=16, num_shared_experts=2)
    c.optim.update(**optimizer)
    return config.build(c)


def plan_of(cfg, sizes=(1, 1, 1)):
    named = dict(zip(("data", "fsdp", "expert"), sizes, strict=True))
    return optim.muon_plan(cfg.optim, model.abstract(cfg.model), named, cfg.model.head_dim)


def test_matrices_of_the_model():
    count = lambda cfg: {(row.shape, row.matrices) for row in plan_of(cfg).rows}
    kinds = {
        ((24, 40), 3),  # dense layer
        ((16, 24), 36 + 6),  # experts of two layers, 3 each; k and v of 3 layers, 16 wide
        ((24, 32), 6 + 6),  # q and o; shared experts, 2·16 wide
        ((6, 24), 2),  # router
    }
    assert count(small_config()) == kinds
    heads = {((24, 40), 3), ((16, 24), 36), ((24, 32), 6), ((6, 24), 2), ((8, 24), 3 * (4 + 2 + 2 + 4))}
    assert count(small_config(per_head=True)) == heads
    assert count(small_config(router="adamw")) == kinds - {((6, 24), 2)}
    assert not plan_of(small_config(name="adamw")).rows


def test_heads_of_the_model():
    """Each head of q, k, v (columns) and o (rows) is orthogonalised alone, at its own scale."""
    cfg = small_config(per_head=True, newton_schulz_dtype="float32", clip_norm=0.0, lr=1.0, schedule="constant")
    tx = optim.make_optimizer(cfg.optim, 2000, cfg.model.head_dim)
    shapes = model.abstract(cfg.model).shapes
    grads = jax.tree.map(lambda x: jnp.asarray(gaussian(x.shape, x.size)), shapes)
    zeros = jax.tree.map(jnp.zeros_like, grads)
    got = jax.jit(tx.update)(grads, tx.init(zeros), zeros)[0]["layers"]["attention"]
    grads = grads["layers"]["attention"]
    for name, axis in (("w_q", 1), ("w_k", 1), ("w_v", 1), ("w_o", 0)):
        (want,) = directions([grads[name]], Matrices(heads=(axis, 8)))
        assert error(-got[name], want) < 1e-5, name
    with pytest.raises(ValueError, match="head_dim"):
        optim.make_optimizer(cfg.optim, 10)


def test_unknown_geometry_is_refused_by_name():
    rule = optim.matrices_of(small_config().optim)
    leaf = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    assert rule("layers/moe/w_up", leaf(2, 6, 24, 16)) == Matrices()
    for path, x in (("layers/moe/w_up", leaf(2, 24, 16)), ("layers/attention/w_q", leaf(2, 3, 24, 4, 8))):
        with pytest.raises(ValueError, match=path):
            rule(path, x)
    with pytest.raises(ValueError, match="layers/moe/w_new"):
        rule("layers/moe/w_new", leaf(2, 6, 24, 16))


def test_options_reach_the_update():
    """Every field of OptimConfig that Muon has changes the parameters after two steps."""
    changes = [{"coefficients": "you"}, {"coefficients": "deepseek_v4", "newton_schulz_steps": 10}, {"momentum": 0.5},
               {"newton_schulz_steps": 3}, {"scale": "spectral"}, {"update_rms": 0.3}, {"per_head": True},
               {"cautious_decay": True}, {"nesterov": False}, {"newton_schulz_dtype": "bfloat16"},
               {"newton_schulz_dtype": "float16"}]  # fmt: skip
    layer = {"attention": {"w_q": gaussian((2, 24, 32), 1)}}
    shared = {"layers": layer}
    grads = [{"layers": {"attention": {"w_q": gaussian((2, 24, 32), 5 + i)}}} for i in range(2)]
    labels = optimizer.label_params
    try:
        optimizer.label_params = lambda params: jax.tree.map(lambda _: "matrix", params)
        final = lambda **fields: trajectory(
            optim.make_optimizer(small_config(lr=0.1, **fields).optim, 2000, 8), shared, grads
        )[-1]["layers"]["attention"]["w_q"]
        base = final()
        for fields in changes:
            assert error(final(**fields), base) > 1e-5, fields
    finally:
        optimizer.label_params = labels


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"coefficients": "quintic"}, "coefficients='quintic'"),
        (
            {"coefficients": "cans", "newton_schulz_steps": 6},
            "newton_schulz_steps=6: must be 5 with coefficients='cans'",
        ),
        ({"coefficients": "deepseek_v4"}, "newton_schulz_steps=5: must be 10 .* nearest valid: 10"),
        ({"scale": "rms"}, "scale='rms'"),
    ],
)
def test_config_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        small_config(**fields)


def test_describe_prints_the_plan_once_and_short():
    cfg = small_config()
    text = optim.describe(cfg.optim, model.abstract(cfg.model), {"data": 2, "fsdp": 2, "expert": 2}, 8)
    assert text.startswith("adamw: adamw, ") and "\nmuon: 5 steps in float32" in text
    assert "layers/moe/w_down, w_gate, w_up" in text and len(text.splitlines()) < 14
    assert max(map(len, text.splitlines())) <= 200
    adamw = dataclasses.replace(cfg.optim, name="adamw")
    assert len(optim.describe(adamw, model.abstract(cfg.model), {"data": 1, "fsdp": 1, "expert": 1}).splitlines()) == 1
