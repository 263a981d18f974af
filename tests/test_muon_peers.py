"""Muon beside other implementations, optax' and PyTorch's, and as a part of optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax.muon import muon
from moe_jax.newton_schulz import orthogonalize_reference
from moe_jax.spread import Matrices
from tests.muon_reference import SHAPES, directions, error, gaussian, trajectory, updates

last_two = lambda path, leaf: Matrices()


# --- other implementations -------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(("step", "ours", "theirs"), [(2, 0.684, 0.728), (20, 0.1479, 0.1497)])
def test_first_steps_differ_from_optax_by_its_bias_correction(step, ours, theirs):
    """Weight of the newest gradient in the direction: earlier gradients fill one entry, the newest another."""
    grads = np.zeros((step, 2, 2), np.float32)
    grads[:-1, 0, 0] = 1.0
    grads[-1, 1, 1] = 1.0
    params = jnp.zeros((2, 2))
    for make, weight in ((muon, ours), (optax.contrib.muon, theirs)):
        more = {"dtype": jnp.float32} if make is muon else {"consistent_rms": 0.2}
        got = updates(make(1.0, weight_decay=0.0, **more), params, jnp.asarray(grads))[-1]
        ratio = lambda w: (lambda o: o[1, 1] / o[0, 0])(orthogonalize_reference(np.diag([1 - w, w])))
        seen = float(got[1, 1] / got[0, 0])
        low, high = sorted((ratio(weight - 6e-4), ratio(weight + 6e-4)))
        assert low <= seen <= high, (low, seen, high)


# --- as a part of optax ----------------------------------------------------------------------------------------------


def test_inject_hyperparams():
    """Numbers and schedules in the state, traced: the formula with the numbers of each step, in float64."""
    numbers = {"learning_rate": lambda t: 0.1 / (1 + t), "weight_decay": lambda t: 0.3 * (t < 2), "momentum": 0.9,
               "update_rms": lambda t: 0.2 + 0.1 * t}  # fmt: skip
    made = optax.inject_hyperparams(muon, static_args=("dtype", "matrices"))
    tx = made(**numbers, dtype=jnp.float32, matrices=last_two)
    params, grads = gaussian((3, 12, 20), 1), [gaussian((3, 12, 20), 3 + i) for i in range(3)]
    w = params.astype(np.float64)
    for t, (got, u) in enumerate(zip(trajectory(tx, params, grads), directions(grads, Matrices(), 0.9), strict=True)):
        w = w - 0.1 / (1 + t) * ((1 + t / 2) * u + 0.3 * (t < 2) * w)
        assert error(got, w) < 1e-6, t
    state = made(learning_rate=0.1, matrices=last_two).init(params)
    state.hyperparams["learning_rate"] = jnp.float32(0.0)
    update, state = made(learning_rate=0.1, matrices=last_two).update(grads[0], state, params)
    assert set(state.hyperparams) == set(numbers) and not update.any()
    with pytest.raises(ValueError, match="dtype is not a schedule; name it in static_args"):
        optax.inject_hyperparams(muon)(0.1, dtype=jnp.float32).init(params[0])


def test_injected_as_muon_itself():
    """Nothing static to name: schedules of `muon` are the same schedules in the state."""
    fields = {"learning_rate": lambda t: 0.1 / (1 + t), "weight_decay": optax.linear_schedule(0.3, 0.0, 2)}
    params, grads = gaussian((12, 20), 1), [gaussian((12, 20), 3 + i) for i in range(3)]
    made = (muon, optax.inject_hyperparams(muon))
    plain, injected = (trajectory(make(**fields, cautious_decay=True), params, grads) for make in made)
    np.testing.assert_allclose(plain, injected, atol=1e-6)


def test_injected_as_optax_own_muon():
    """The two are one function here: the average without Nesterov, η and λ by schedule, embeddings by AdamW."""
    rates = {"learning_rate": optax.linear_schedule(0.1, 0.01, 4), "weight_decay": optax.linear_schedule(0.3, 0.0, 4)}
    theirs = optax.inject_hyperparams(optax.contrib.muon, static_args=("ns_steps",))(
        **rates, nesterov=False, consistent_rms=0.2
    )
    mine = optax.inject_hyperparams(muon, static_args="dtype")(**rates, nesterov=False, dtype=jnp.float32)
    adam = optax.adamw(rates["learning_rate"], weight_decay=0.0)
    labels = lambda params: jax.tree.map(lambda x: "muon" if x.ndim == 2 else "adam", params)
    ours = optax.chain(
        optax.masked(mine, lambda params: jax.tree.map(lambda x: x.ndim == 2, params)),
        optax.multi_transform({"muon": optax.identity(), "adam": adam}, labels),
    )
    params = {"w": gaussian((12, 20), 1), "b": gaussian((20,), 2)}
    grads = [{"w": gaussian((12, 20), 3 + i), "b": gaussian((20,), 9 + i)} for i in range(4)]
    for a, b in zip(trajectory(ours, params, grads), trajectory(theirs, params, grads), strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), a, b)


def test_parts_of_a_tree():
    """Leaves of another optimizer are MaskedNodes here; without weight decay no parameters are needed."""
    params = {"w": gaussian((12, 20), 1), "norm": gaussian((20,), 2), "none": None}
    ours = muon(0.1, weight_decay=0.0, dtype=jnp.float32)
    tx = optax.multi_transform({"a": ours, "b": optax.sgd(1.0)}, {"w": "a", "norm": "b", "none": "a"})
    update, _ = tx.update(params, tx.init(params))
    np.testing.assert_array_equal(update["norm"], -params["norm"])
    np.testing.assert_allclose(update["w"], -0.1 * directions([params["w"]], Matrices())[0], atol=1e-6)
    with pytest.raises(ValueError, match="params"):
        muon(0.1).update(params["w"], muon(0.1).init(params["w"]))


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
