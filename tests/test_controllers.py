"""How selection biases follow the loads: each controller beside float64, budgets of experts, and the state of one.

Quantile balancing, which is not a controller, has its own oracle in test_quantile.py.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax import config
from moe_jax.errors import ConfigError
from moe_jax.moe import balance
from moe_jax.run import checkpoint
from moe_jax.train import step
from moe_jax.train.state import abstract_state, join_parts, parts_of, put_batch
from tests import test_guard
from tests.test_guard import leaves, poisoned, rows_of

# --- the oracle ------------------------------------------------------------------------------------------------------


class Reference:
    """One bias in float64, moved by the formulas of the papers."""

    def __init__(self, form, rate, columns):
        self.form, self.rate, self.bias = form, rate, np.zeros(columns)
        self.m, self.v, self.t = np.zeros(columns), np.zeros(columns), 0

    def move(self, load, target):
        """target: the share of each column, None for one that keeps its bias."""
        aimed = np.array([share is not None for share in target])
        gap = np.where(aimed, np.array([share or 0.0 for share in target]) - load / load.sum(), 0.0)
        if self.form in ("sign", "centred"):
            gap = np.sign(np.round(gap, 12))
        if self.form == "centred":
            gap = gap - gap.mean()
        if self.form == "adamw":  # of the gradient −gap: θ − lr · m̂ / (√v̂ + ε)
            self.t += 1
            self.m, self.v = 0.9 * self.m - 0.1 * gap, 0.999 * self.v + 0.001 * gap**2
            gap = -self.m / (1 - 0.9**self.t) / (np.sqrt(self.v / (1 - 0.999**self.t)) + 1e-8)
        self.bias = self.bias + self.rate * gap


FORMS = tuple(balance.CONTROLLERS)


@pytest.mark.parametrize("form", FORMS)
def test_five_updates_are_those_of_float64(form):
    """Two layers at once, of their own loads; with all columns and with a budget for the first four of six."""
    loads = np.random.default_rng(0).integers(1, 90, (5, 2, 6)).astype(np.float32)
    for budget in (0.0, 1.5):
        target = balance.budget_target(6, 4, 2, budget) if budget else ()
        want = [Reference(form, 0.125, 6) for _ in range(2)]
        aim = [budget / (2 * 4)] * 4 + [None] * 2 if budget else [1 / 6] * 6
        bias, state = jnp.zeros((2, 6)), balance.CONTROLLERS[form].init(jnp.zeros((2, 6)))
        for load in loads:
            bias, state = balance.update_bias(bias, load, 0.125, form, target, 4 if budget else 0, state)
            for layer, one in zip(load, want, strict=True):
                one.move(np.float64(layer), aim)
        np.testing.assert_allclose(bias, [one.bias for one in want], rtol=2e-5, atol=1e-7)
        assert not budget or form == "centred" or not np.any(np.asarray(bias)[:, 4:])


def test_only_the_named_have_a_state():
    with_leaves = [f for f, c in balance.CONTROLLERS.items() if jax.tree.leaves(c.init(jnp.zeros(3)))]
    assert with_leaves == list(balance.WITH_STATE)
    optimizer = (optax.EmptyState(),)
    assert join_parts(optimizer, {}) is optimizer and parts_of(optimizer) == (optimizer, {}, {})
    assert parts_of(join_parts(optimizer, {"a": 1})) == (optimizer, {"a": 1}, {})


# --- a budget of experts ---------------------------------------------------------------------------------------------

T, E, Z, K, BUDGET = 4096, 64, 32, 12, 8
RATES = {"sign": 6e-4, "proportional": 0.5, "adamw": 6e-4}  # a score is 1/96 on average


def skewed_scores() -> np.ndarray:
    """A softmax over experts and identity experts that are not alike: at first a token uses 5.5 experts."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(T, E + Z)) + 0.7 * rng.normal(size=E + Z) + 0.5 * (np.arange(E + Z) >= E)
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


@pytest.mark.parametrize("form", RATES)
def test_a_budget_is_reached(form):
    """Within 1 % of K_e = 8 of 12, by float64 and by the real function; identity columns keep their bias of 0."""
    scores, target = skewed_scores(), balance.budget_target(E + Z, E, K, BUDGET)
    reference, bias = Reference(form, RATES[form], E + Z), jnp.zeros(E + Z)
    state = balance.CONTROLLERS[form].init(bias)
    move = jax.jit(lambda b, load, state: balance.update_bias(b, load, RATES[form], form, target, E, state))
    load_of = lambda b: np.bincount(np.argpartition(-(scores + b), K, axis=-1)[:, :K].ravel(), minlength=E + Z)
    used = []
    for _ in range(60):
        loads = load_of(reference.bias), load_of(np.asarray(bias))
        used.append([load[:E].sum() / T for load in loads])
        reference.move(loads[0].astype(float), [BUDGET / (K * E)] * E + [None] * Z)
        bias, state = move(bias, loads[1].astype(np.float32), state)
    assert max(used[0]) < 5.6 and np.abs(np.array(used[-6:]) / BUDGET - 1).max() < 0.01
    assert not np.any(bias[E:]) and not np.any(reference.bias[E:])


def test_a_budget_is_refused():
    cfg = test_guard.CHECKED
    with pytest.raises(ConfigError, match=r"expert_budget=1.0: needs identity_experts > 0.*valid: 0.0"):
        dataclasses.replace(cfg.model.moe, expert_budget=1.0)
    with pytest.raises(ConfigError, match=r"expert_budget=2.0: must be between 1 and 2, and neit"):
        dataclasses.replace(cfg.model.moe, identity_experts=1, expert_budget=2.0)
    moe = dataclasses.replace(cfg.model.moe, identity_experts=2, expert_budget=1.0)
    loss = dataclasses.replace(cfg.loss, bias_update="centred")
    with pytest.raises(ConfigError, match=r"model.moe.expert_budget=1.0: is not available with loss.bias_update='c"):
        dataclasses.replace(cfg, loss=loss, model=dataclasses.replace(cfg.model, moe=moe))
    moe = dataclasses.replace(cfg.model.moe, selection_bias=False)
    loss = dataclasses.replace(cfg.loss, bias_update="adamw")
    with pytest.raises(ConfigError, match=r"loss.bias_update='adamw': needs model.moe.selection_bias=True"):
        dataclasses.replace(cfg, loss=loss, model=dataclasses.replace(cfg.model, moe=moe))


# --- in a run --------------------------------------------------------------------------------------------------------


def run_config(form: str) -> config.RunConfig:
    cfg = test_guard.CHECKED
    moe = dataclasses.replace(cfg.model.moe, score="sigmoid")
    loss = dataclasses.replace(cfg.loss, bias_update=form, load_balance_coef=0.0)
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, moe=moe), loss=loss)


@pytest.mark.slow  # the fast part has a controller's state in test_average.py
@pytest.mark.parametrize("form", ["adamw", "quantile"])
def test_skipped_steps_and_resumed_runs(form, tmp_path):
    """A skipped step leaves biases and states bit for bit; a resumed run is the run; the state lies where it is said
    to; what is logged has no histogram."""
    run = test_guard.Run(run_config(form))
    report = run.take(1, rows_of(1))
    assert report.skipped == 0 and report.router["layers"].histogram is None
    before = leaves(run.state[1:])
    assert run.take(2, poisoned(rows_of(2))).skipped == 1
    assert leaves(run.state[1:]) == before and any(np.any(b) for b in jax.tree.leaves(run.state.router_bias))

    controllers = parts_of(run.state.opt_state).controllers
    names = [name for name in leaves(run.state.opt_state) if "controllers" in name]
    if form == "adamw":
        mu = optax.tree.get(controllers["layers"]["moe"]["router_bias"], "mu")
        assert len(names) == 3 and mu.shape == run.state.router_bias["layers"]["moe"]["router_bias"].shape
        assert int(optax.tree.get(controllers["layers"]["moe"]["router_bias"], "count")) == 1
    else:
        assert controllers == {} and not names and isinstance(run.state.opt_state, tuple)

    with checkpoint.Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(2, run.state, {}, wait=True)
        lr = [run.take(n, rows_of(n)).lr for n in (3, 4)]
        straight = leaves(run.state)
        run.state, _ = checkpoints.restore(abstract_state(run.cfg, run.mesh), 2)
        assert [run.take(n, rows_of(n)).lr for n in (3, 4)] == lr
    assert leaves(run.state) == straight
    np.testing.assert_allclose(lr, [1e-2, 1e-2], rtol=1e-2)  # the second and third update, of a warm-up of two


@pytest.mark.slow
def test_evaluation_counts_no_histogram():
    run = test_guard.Run(run_config("quantile"))
    rows = rows_of(1) | {"domain_ids": np.zeros((test_guard.BATCH, test_guard.SEQ), np.int32)}
    batch = put_batch(rows, run.mesh, run.cfg, by_domain=True)
    sums = step.make_eval_step(run.cfg, run.mesh, 1)(run.state.params, run.state.router_bias, batch)
    assert sums.router["layers"].histogram is None and sums.router["layers"].tokens.shape == (1, 1)
