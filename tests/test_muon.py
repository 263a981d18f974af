"""Muon against its formula in float64, against optax and PyTorch, and on meshes against one device."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax import sharding
from moe_jax.muon import JORDAN, muon, orthogonalize, scale_by_muon

last_two = lambda path, leaf: (-2, -1)
SHAPES = [(24, 24), (16, 40), (40, 16)]
ortho = jax.jit(orthogonalize, static_argnames=("steps", "dtype"))


def gaussian(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def newton_schulz(x, steps=5):
    """Of one matrix in float64, as written in arXiv:2502.16982, eq. 2."""
    a, b, c = JORDAN
    x = np.asarray(x, np.float64)
    x = x / np.linalg.norm(x)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x


# --- the iteration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_follow_the_polynomial(shape):
    """O = U φ(σ) Vᵀ with the same U and V; every σ ≥ 0.003·‖X‖ lands in [0.68, 1.21]."""
    u, _, vt = np.linalg.svd(gaussian(shape), full_matrices=False)
    sigma = np.geomspace(1.0, 4e-3, min(shape))
    x = (u * sigma) @ vt * 7.0
    phi = sigma / np.linalg.norm(sigma)
    assert phi.min() > 2.9e-3 / 1.2
    a, b, c = JORDAN
    for _ in range(5):
        phi = a * phi + b * phi**3 + c * phi**5
    exact = ortho(jnp.asarray(x, jnp.float32), dtype=jnp.float32)
    np.testing.assert_allclose(exact, (u * phi) @ vt, atol=3e-5)
    np.testing.assert_allclose(exact, newton_schulz(x), atol=3e-5)
    random = ortho(jnp.asarray(gaussian(shape, 1)), dtype=jnp.float32)
    rounded = ortho(jnp.asarray(gaussian(shape, 1)), dtype=jnp.bfloat16)
    assert rounded.dtype == jnp.bfloat16
    rounded = np.asarray(rounded, np.float32)
    spectra = [(exact, 0.68, 1.21)]
    if shape[0] != shape[1]:  # a square Gaussian has a few singular values near zero
        spectra += [(random, 0.68, 1.21), (rounded, 0.67, 1.22)]
    for o, low, high in spectra:
        values = np.linalg.svd(np.asarray(o), compute_uv=False)
        assert low <= values.min() and values.max() <= high, (values.min(), values.max())
    # bf16 matrices but float32 coefficients: 2 to 3 %, PyTorch 1.2 to 1.6 %; 3.4445 rounded to bf16 makes it 4 to 6 %.
    want = newton_schulz(gaussian(shape, 1))
    assert np.linalg.norm(rounded - want) < 0.035 * np.linalg.norm(want)


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


@pytest.mark.parametrize(
    ("shape", "rms"), [((256, 256), 0.180), ((256, 1024), 0.191), ((64, 2048), 0.147), ((512, 1408), 0.190)]
)
def test_update_rms(shape, rms):
    """0.2·√max(m, n)·O of a Gaussian matrix; measured in float64, an exact polar factor would give 0.2."""
    tx = scale_by_muon(0.95, True, 0.2, 5, jnp.float32, last_two)
    for s in (shape, shape[::-1]):
        g = jnp.asarray(gaussian(s))
        update, _ = jax.jit(tx.update)(g, tx.init(g))
        np.testing.assert_allclose(np.sqrt(np.mean(np.square(update))), rms, rtol=0.01)


# --- the step --------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("nesterov", [True, False])
def test_three_steps_equal_the_formula(nesterov):
    """W ← W − η·(0.2·√max·O + λ·W), O from G + μ·M, M ← μ·M + G, with a schedule, for a matrix and a stack."""
    lr = lambda step: 0.1 / (1 + step)
    tx = muon(lr, momentum=0.9, nesterov=nesterov, weight_decay=0.3, dtype=jnp.float32, matrix_axes=last_two)
    params = {"a": gaussian((12, 20), 1), "b": gaussian((2, 3, 20, 8), 2)}
    grads = [{"a": gaussian((12, 20), 3 + i), "b": gaussian((2, 3, 20, 8), 9 + i)} for i in range(3)]
    got = trajectory(tx, params, grads)
    for name, w in params.items():
        w, shape = w.astype(np.float64).reshape(-1, *w.shape[-2:]), w.shape
        m = np.zeros_like(w)
        for t in range(3):
            for i in range(len(w)):
                g = grads[t][name].reshape(w.shape)[i].astype(np.float64)
                m[i] = 0.9 * m[i] + g
                o = newton_schulz(g + 0.9 * m[i] if nesterov else m[i])
                w[i] = w[i] - lr(t) * (0.2 * np.sqrt(max(shape[-2:])) * o + 0.3 * w[i])
            error = np.linalg.norm(got[t][name].reshape(w.shape) - w) / np.linalg.norm(w)
            assert error < 1e-6, (name, t, error)


def test_matrix_axes_may_lie_anywhere():
    """Axes 0 and 2 of [m, L, n]: the update is that of [L, m, n], moved back."""
    g = jnp.asarray(gaussian((8, 3, 12)))
    make = lambda axes: muon(1.0, weight_decay=0.0, dtype=jnp.float32, matrix_axes=lambda path, leaf: axes)
    update = lambda tx, g: tx.update(g, tx.init(g), g)[0]
    moved = update(make((-2, -1)), jnp.moveaxis(g, 0, 1))
    np.testing.assert_allclose(update(make((0, 2)), g), jnp.moveaxis(moved, 1, 0), atol=1e-6)


def test_a_leaf_without_a_rule_is_refused_by_name():
    params = {"ok": jnp.zeros((4, 4)), "block": {"experts": jnp.zeros((2, 4, 4))}}
    with pytest.raises(ValueError, match=r"\['block'\]\['experts'\] \(2, 4, 4\)"):
        muon(1e-3).init(params)
    with pytest.raises(ValueError, match=r"\['scale'\]"):
        muon(1e-3).init({"scale": jnp.zeros(4)})


def test_chains_with_clipping_and_does_not_feel_it():
    """Orthogonalisation removes the gradient's scale: the first step is the same, clipped or not."""
    params, g = gaussian((8, 12), 1), gaussian((8, 12), 2) * 100
    chain = optax.chain(optax.clip_by_global_norm(1.0), muon(0.1, dtype=jnp.float32))
    (clipped,), (free,) = trajectory(chain, params, [g]), trajectory(muon(0.1, dtype=jnp.float32), params, [g])
    assert np.abs(clipped - params).max() > 1e-2
    np.testing.assert_allclose(clipped, free, atol=2e-6)


# --- meshes ----------------------------------------------------------------------------------------------------------

LEAVES = {  # shape and logical axes, as the model declares them
    "experts": ((4, 8, 16, 24), "layers experts embed mlp"),
    "experts_down": ((4, 8, 24, 16), "layers experts mlp embed"),
    "attention": ((4, 16, 32), "layers embed heads"),
    "odd_layers": ((3, 32, 16), "layers heads embed"),
    "single": ((16, 40), "embed mlp"),
    "replicated": ((2, 16, 8), "layers router_embed router_experts"),
}
COLLECTIVE = re.compile(r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")


@functools.cache
def one_step(shape):
    """Updates of every leaf, their shardings kept, and the compiled program."""
    mesh = sharding.make_mesh(shape, jax.devices()[: int(np.prod(shape))])
    tx = muon(0.1, dtype=jnp.float32, matrix_axes=last_two)
    with jax.set_mesh(mesh):
        spec = lambda leaf, axes: sharding.weight_spec(tuple(axes.split()), leaf, dict(mesh.shape))
        put = lambda seed: {
            name: jax.device_put(gaussian(s, seed + len(name)), NamedSharding(mesh, spec(s, axes)))
            for name, (s, axes) in LEAVES.items()
        }
        params, grads = put(0), put(1)
        step = jax.jit(tx.update).lower(grads, tx.init(params), params).compile()
        updates, state = step(grads, tx.init(params), params)
    for name in LEAVES:
        assert updates[name].sharding.spec == params[name].sharding.spec == state[0].momentum[name].sharding.spec
    return jax.device_get(updates), step.as_text()


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 2, 4), (8, 1, 1)])
def test_update_does_not_depend_on_the_mesh(shape):
    one, _ = one_step((1, 1, 1))
    many, text = one_step(shape)
    moves = [line for line in text.splitlines() if COLLECTIVE.search(line)]
    assert moves or shape == (8, 1, 1)
    assert not [line for line in moves if "/while/" in line]  # none inside the iteration
    for name in LEAVES:
        np.testing.assert_allclose(many[name], one[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_experts_move_by_two_all_to_alls_and_nothing_else():
    """[4, 8, 64, 128] by (None, expert, fsdp, None): one reshard in, one out, none while iterating."""
    mesh = sharding.make_mesh((1, 2, 4))
    leaf = jax.ShapeDtypeStruct(
        (4, 8, 64, 128), jnp.float32, sharding=NamedSharding(mesh, P(None, "expert", "fsdp", None))
    )
    tx = scale_by_muon(0.95, True, 0.2, 5, jnp.bfloat16, last_two)
    with jax.set_mesh(mesh):
        text = jax.jit(tx.update).lower(leaf, jax.eval_shape(tx.init, leaf)).compile().as_text()
    assert COLLECTIVE.findall(text) == ["all-to-all", "all-to-all"]


# --- other implementations -------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def updates(tx, params, grads):
    """Of every step, at the same parameters."""
    return jax.lax.scan(lambda state, g: tx.update(g, state, params)[::-1], tx.init(params), grads)[1]


@pytest.mark.parametrize(("nesterov", "late"), [(False, 0), (True, 400)])
def test_parity_with_optax(nesterov, late):
    """optax corrects the bias of its average: without Nesterov that is a scale, with it a difference that dies out."""
    ours = muon(0.1, nesterov=nesterov, weight_decay=0.3, dtype=jnp.float32)
    theirs = optax.contrib.muon(0.1, nesterov=nesterov, weight_decay=0.3, consistent_rms=0.2)
    # 0.95^400 is 1e-9. The long run keeps its parameters: only the optimizers' states move.
    for shape in SHAPES:
        params = jnp.asarray(gaussian(shape, 1))
        grads = jnp.asarray(gaussian((late + 3, *shape), 2))
        last = [updates(tx, params, grads)[-3:] for tx in (ours, theirs)]
        np.testing.assert_allclose(last[0], last[1], atol=2e-5)


def test_parity_with_torch():
    """Ten steps of torch.optim.Muon, whose iteration is in bf16 as ours is by default."""
    torch = pytest.importorskip("torch")
    for shape in SHAPES:
        start, grads = gaussian(shape, 1), [gaussian(shape, 2 + i) for i in range(10)]
        got = trajectory(muon(0.05, weight_decay=0.3), start, grads)
        p = torch.nn.Parameter(torch.from_numpy(start.copy()))
        peer = torch.optim.Muon([p], lr=0.05, weight_decay=0.3, momentum=0.95, adjust_lr_fn="match_rms_adamw")
        for g, ours in zip(grads, got, strict=True):
            p.grad = torch.from_numpy(g.copy())
            peer.step()
            # Less than what bf16 does to one direction; a wrong momentum, scale or decay is far outside.
            assert np.linalg.norm(ours - p.detach().numpy()) < 0.02 * np.linalg.norm(ours - start)
