"""The table of router losses: each row against NumPy in float64, and losses that a user adds.

`test_balance_exact.py` has the rows of the table in a model, on meshes and in micro-batches.
"""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float

from moe_jax import config
from moe_jax.config import LossConfig, ModelConfig, MoEConfig, RouterLossConfig
from moe_jax.errors import ConfigError
from moe_jax.moe import router_losses
from moe_jax.moe.router_losses import (
    RouterLoss,
    column_targets,
    load_balancing_loss,
    mean_over_groups,
    mutual_information,
)
from moe_jax.moe.stats import RouterStats
from moe_jax.parallel import sharding
from moe_jax.train import gradients, losses
from moe_jax.train.gradients import make_gradients
from moe_jax.train.losses import BatchSums, total_loss
from moe_jax.train.state import abstract_state, put_batch
from tests import balance_reference as reference
from tests import test_balance_exact as model
from tests.test_unused import equations

K = 2


def stats_of(load_LGC, prob_LGC) -> RouterStats:
    load, prob = np.float32(load_LGC), np.float32(prob_LGC)
    tokens = load.sum(-1) / np.float32(K)
    return RouterStats(tokens, load, prob, np.zeros_like(tokens), np.zeros_like(tokens))


def value_of(loss, stats: RouterStats) -> np.ndarray:
    return np.asarray(jax.jit(loss)(stats))


def by_prob(loss, stats: RouterStats) -> np.ndarray:
    """The gradient of the sum over layers by the summed probabilities."""
    of = lambda p: jnp.sum(loss(stats._replace(prob_per_expert=p)))
    return np.asarray(jax.jit(jax.grad(of))(stats.prob_per_expert))


# --- groups of columns -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("experts", "identity", "over", "budget"),
    [(8, 0, 2, 0.0), (8, 0, 8, 0.0), (6, 3, 3, 0.0), (6, 2, 0, 0.0), (8, 4, 2, 0.625), (8, 4, 0, 0.625)],
)
def test_load_balancing_over_groups_of_columns(experts, identity, over, budget):
    """LongCat-Flash (arXiv:2509.01322, eqs. 3–5) in loops: slots are counted, and 1/target is its factor."""
    rng, columns = np.random.default_rng(0), experts + identity
    load, prob = rng.integers(1, 9, (3, 2, columns)) * 2.0, rng.random((3, 2, columns))
    devices = over or experts
    members = [list(range(j * experts // devices, (j + 1) * experts // devices)) for j in range(devices)]
    shares = [(budget or experts / columns) / devices] * devices
    if identity:
        members.append(list(range(experts, columns)))
        shares.append(1 - (budget or experts / columns))
    value, slope = np.zeros(3), np.zeros(prob.shape)
    for layer, group in np.ndindex(3, 2):
        tokens = load[layer, group].sum() / K
        for mine, share in zip(members, shares, strict=True):
            f = load[layer, group, mine].sum() / (K * tokens * share)
            value[layer] += f * prob[layer, group, mine].sum() / tokens / 2  # a mean over two groups of sequences
            slope[layer, group, mine] = f / tokens / 2
    targets = column_targets(columns, identity, over, budget)
    loss = lambda stats: load_balancing_loss(stats, targets, identity)
    np.testing.assert_allclose(value_of(loss, stats_of(load, prob)), value, rtol=1e-6)
    np.testing.assert_allclose(by_prob(loss, stats_of(load, prob)), slope, rtol=1e-6)
    # At balance the value is 1, however the probabilities lie; a group that has all assignments pays 1/target.
    even = np.concatenate([np.full(len(m), s / len(m)) for m, s in zip(members, shares, strict=True)]) * 48 * K
    drawn = stats_of(even[None, None], rng.dirichlet(even, (1, 1)) * 48)
    np.testing.assert_allclose(value_of(loss, drawn), 1.0, rtol=1e-6)
    one = np.where(np.arange(columns) < experts // devices, 48.0 / (experts // devices), 0.0)[None, None]
    np.testing.assert_allclose(value_of(loss, stats_of(K * one, one)), 1 / shares[0], rtol=1e-6)


def test_columns_that_are_alone_are_the_plain_loss():
    rng = np.random.default_rng(1)
    stats = stats_of(rng.integers(1, 9, (2, 3, 6)) * 2.0, rng.random((2, 3, 6)))
    assert column_targets(6) == ()
    np.testing.assert_allclose(load_balancing_loss(stats, column_targets(6, over=6)), load_balancing_loss(stats), 1e-6)


@pytest.mark.parametrize(("budget", "share"), [(0.0, 2 / 3), (1.5, 1.5 / 2)])
def test_identity_columns_of_the_model_are_a_group(budget, share):
    """… with the share of the assignments that they have of the columns, or that the budget leaves them."""
    rng = np.random.default_rng(1)
    stats = stats_of(rng.integers(1, 9, (2, 3, 6)) * 2.0, rng.random((2, 3, 6)))
    loss = LossConfig(more={"devices": RouterLossConfig("load_balance", 0.3, 1, over=2)}, balance_batch=1)
    moe = MoEConfig(num_experts=4, top_k=2, identity_experts=2, expert_budget=budget, selection_bias=True)
    sums, model_of = BatchSums(0.0, 0.0, {"layers": stats}), ModelConfig(moe=moe)
    raw = jax.jit(lambda sums: total_loss(sums, loss, model=model_of)[1].raw)(sums)
    for name, over in (("load_balance_raw", 4), ("load_balance_raw/devices", 2)):
        targets = (share / over,) * over + (1 - share,)
        want = value_of(lambda stats, targets=targets: load_balancing_loss(stats, targets, identity=2), stats)
        np.testing.assert_allclose(raw[name], np.mean(want), rtol=1e-6)


# --- mutual information ----------------------------------------------------------------------------------------------


def test_mutual_information():
    rng, e = np.random.default_rng(2), 5
    same = np.broadcast_to(rng.random(e), (2, 3, e))
    of = functools.partial(value_of, mutual_information)
    np.testing.assert_allclose(of(stats_of(same, same)), 0.0, atol=1e-6)
    apart = np.eye(e)[None] * 7
    np.testing.assert_allclose(of(stats_of(apart, apart)), -np.log(e), rtol=1e-6)
    assert np.isfinite(by_prob(mutual_information, stats_of(apart, apart))).all()
    # An empty group adds nothing, groups weigh as they have tokens, and the gradient is that of the sums.
    prob = rng.random((1, 4, e)) * np.array([1.0, 5.0, 0.0, 2.0])[None, :, None]

    def by_hand(p):
        p = p / p.sum()
        rows, columns = p.sum(1), p.sum(0)
        return -sum(p[g, c] * np.log(p[g, c] / (rows[g] * columns[c])) for g in range(3) for c in range(e))

    there = prob[0][[0, 1, 3]]
    stats = stats_of(prob, prob)
    np.testing.assert_allclose(of(stats), by_hand(there), rtol=1e-5)
    slope = by_prob(mutual_information, stats)[0]
    want = reference.gradients(lambda p: by_hand(p["p"]), {"p": there})["p"]
    np.testing.assert_allclose(slope[[0, 1, 3]], want, rtol=1e-4, atol=1e-6)
    assert np.isfinite(slope).all()
    nothing = stats_of(np.zeros((1, 2, e)), np.zeros((1, 2, e)))
    assert float(of(nothing)[0]) == 0.0 and not by_prob(mutual_information, nothing).any()


# --- losses that a user adds -----------------------------------------------------------------------------------------


def variation(stats: RouterStats) -> Float[Array, " L"]:
    """Squared coefficient of variation of the summed probabilities (arXiv:1701.06538, eq. 7)."""
    p = jnp.sum(stats.prob_per_expert, axis=1)
    return jnp.var(p, axis=-1) / jnp.mean(p, axis=-1) ** 2


def entropy(stats: RouterStats) -> Float[Array, " L"]:
    """Minus the entropy of the mean router probability of each balance group, averaged."""
    p = stats.prob_per_expert / jnp.sum(stats.prob_per_expert, axis=-1, keepdims=True)
    return jnp.mean(jnp.sum(p * jnp.log(p), axis=-1), axis=-1)


def spread(stats: RouterStats) -> Float[Array, " L"]:
    """Standard deviation of the mean router probabilities, which has no gradient where they are alike."""
    return jnp.mean(jnp.std(stats.prob_per_expert / stats.tokens[..., None], axis=-1), axis=-1)


MORE = {"even": ("variation", 0.6, "global"), "flat": ("entropy", 0.4, "16")}


@pytest.fixture
def added(monkeypatch):
    monkeypatch.setitem(router_losses.LOSSES, "variation", RouterLoss(variation))
    monkeypatch.setitem(router_losses.LOSSES, "entropy", RouterLoss(entropy))
    monkeypatch.setitem(router_losses.LOSSES, "alone", RouterLoss(entropy, each_group=True))


def run_config(micro: int, remat: str = "none", coef: float = 0.0, z: float = 0.0, **more) -> config.RunConfig:
    """The model of `test_balance_exact.py`. more: (kind, coefficient, scope) by name."""
    made = config.to_dict(model.run_config(micro, remat, rows=(model.ALONE,)))
    entry = lambda kind, coef, scope: {"kind": kind, "coef": coef, "balance_batch": scope}
    made["loss"] |= {"load_balance_coef": coef, "router_z_coef": z}
    made["loss"]["more"] = {name: entry(*values) for name, values in more.items()}
    return config.build(made)


def by_hand(z: float, added: bool) -> tuple[dict, dict]:
    """Values and gradients of the two added losses, and of the z-loss, in float64."""
    rows = model.batch_rows(True)
    counted = rows["segment_ids"] > 0
    inputs = (rows["tokens"], rows["positions"], rows["segment_ids"], model.HEAD)

    def values(p):
        out = {"router_z": z * reference.router_z(reference.router_logits(p, *inputs), counted)} if z else {}
        if not added:
            return out
        prob = reference.router_probabilities(p, *inputs)
        whole = prob[counted].sum(0)
        out["variation/even"] = 0.6 * np.mean((whole / whole.mean() - 1) ** 2)
        means = [prob[s : s + 16][counted[s : s + 16]].mean(0) for s in range(0, model.B, 16)]
        out["entropy/flat"] = 0.4 * np.mean([(m * np.log(m)).sum() for m in means])
        return out

    params = {n: x.astype(np.float64) for n, x in model.flatten(model.initial_params()).items() if n in model.LEAVES}
    return values(params), reference.gradients(lambda p: sum(values(p).values()), params)


# In the fast part test_balance_exact.py has losses that are not linear in two passes, and the one below in one pass.
ADDED = [((1, 1, 1), 4, "none"), ((1, 1, 1), 1, "none"), ((2, 2, 2), 2, "full"), ((8, 1, 1), 8, "full"),
         ((1, 2, 4), 4, "none")]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "micro", "remat"), ADDED)
def test_a_loss_in_three_lines_is_exact(added, mesh, micro, remat):
    """Neither is linear in the sums: equal to the whole batch's in one micro-batch or more, and on a mesh."""
    run = model.programs(mesh, run_config(micro, remat, z=0.05, **MORE))
    model.compare(mesh, run, True, by_hand(0.05, True))


@pytest.mark.slow
def test_a_linear_loss_is_exact_without_a_first_pass():
    run = model.programs((1, 1, 1), run_config(4, z=0.05))
    model.compare((1, 1, 1), run, True, by_hand(0.05, False))


def test_the_mean_over_groups_is_that_of_filled_ones_alone():
    """Value and gradient of a loss that divides by sums of 0; another layer has other groups, and one none."""
    rng, filled = np.random.default_rng(4), np.array([[1, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]])
    load, prob = (made * filled[..., None] for made in (rng.integers(1, 9, (3, 4, 6)) * 2.0, rng.random((3, 4, 6))))
    stats = stats_of(load, prob)._replace(histogram=np.zeros((3, 6, 7), np.int32), by_label=np.ones((3, 2, 6)))
    for loss in (entropy, spread, load_balancing_loss):
        value, slope = np.zeros(3), np.zeros(prob.shape)
        for layer, group in np.argwhere(filled):
            one, at = stats_of(*(x[layer, group][None, None] for x in (load, prob))), (layer, group)
            value[layer] += value_of(loss, one)[0] / filled[layer].sum()
            slope[at] = by_prob(loss, one)[0, 0] / filled[layer].sum()
        of = lambda stats, loss=loss: mean_over_groups(loss, stats)
        np.testing.assert_allclose(value_of(of, stats), value, rtol=1e-5)
        np.testing.assert_allclose(by_prob(of, stats), slope, rtol=1e-4, atol=1e-6)


def test_a_micro_batch_of_one_empty_sequence_has_no_gradient(added):
    cfg = run_config(4, own=("alone", 0.4, "1")).loss
    stats = stats_of(np.zeros((2, 1, 6)), np.zeros((2, 1, 6)))

    def of(prob):
        sums = BatchSums(0.0, 0.0, {"layers": stats._replace(prob_per_expert=prob)})
        return total_loss(sums, cfg, tokens=1.0, sequences=np.ones(1, np.float32))[0]

    value, slope = jax.jit(jax.value_and_grad(of))(stats.prob_per_expert)
    assert value == 0 and np.all(np.asarray(slope) == 0)


def test_losses_of_each_sequence_are_exact_in_one_pass(added):
    """On a mesh, in micro-batches with unlike numbers of sequences that have a token."""
    name = "load_balance/each"
    cfg = run_config(4, z=0.05, each=("load_balance", model.COEFS[name], "1"), own=("alone", 0.4, "1"))
    assert losses.balances_sequences(cfg.loss)
    rows = model.batch_rows(True)
    counted = rows["segment_ids"] > 0
    assert set(counted.any(1).reshape(-1, 4).sum(0)) == {12, 16}
    values, grads = (dict(x) for x in by_hand(0.05, False))
    params = {n: x.astype(np.float64) for n, x in model.flatten(model.initial_params()).items() if n in model.LEAVES}

    def own(p):
        prob = reference.router_probabilities(p, rows["tokens"], rows["positions"], rows["segment_ids"], model.HEAD)
        means = [mine[there].mean(0) for mine, there in zip(prob, counted, strict=True) if there.any()]
        return 0.4 * np.mean([(m * np.log(m)).sum() for m in means])

    each, of_each = model.expected(True, (name,))
    values |= each | {"alone/own": own(params)}
    more = (of_each, reference.gradients(own, params))
    want = {n: g + sum(other[n] for other in more) for n, g in grads.items()}
    mesh = (2, 2, 2)
    model.compare(mesh, model.programs(mesh, cfg), True, (values, want))


def passes(cfg: config.RunConfig) -> int:
    """How many times a step goes over its four micro-batches: loops of four turns."""
    mesh = sharding.make_mesh((1, 1, 1), jax.local_devices()[:1])
    with jax.set_mesh(mesh):
        batch, state = put_batch(model.batch_rows(True), mesh, cfg), abstract_state(cfg, mesh)
        made = jax.make_jaxpr(make_gradients(cfg, mesh))(state.params, state.router_bias, batch, 0)
        found = equations(made, collections.Counter())
    return sum(n for line, n in found.items() if line.startswith("scan ") and "length=4 " in f"{line} ")


@pytest.mark.slow
def test_a_first_pass_only_for_what_needs_it(added):
    assert passes(run_config(4, coef=0.1)) == 2
    assert passes(run_config(4, z=0.1)) == 1
    assert passes(run_config(4, z=0.1, even=("variation", 0.1, "global"))) == 2
    dense = run_config(4, coef=0.1)
    running = dataclasses.replace(dense.loss, accumulation="running")
    assert passes(dataclasses.replace(dense, loss=running)) == 1
    # Balanced by biases alone, and over each sequence, which no micro-batch splits.
    biased = dataclasses.replace(dense.model.moe, selection_bias=True)
    alone = run_config(4)
    assert passes(dataclasses.replace(alone, model=dataclasses.replace(alone.model, moe=biased))) == 1
    each = run_config(4, z=0.1, each=("load_balance", 0.1, "1"))
    assert passes(each) == 1
    assert passes(dataclasses.replace(each, loss=dataclasses.replace(each.loss, accumulation="running"))) == 1
    shuffled = dataclasses.replace(each.loss, shuffle_tokens=True)
    assert passes(dataclasses.replace(each, loss=shuffled)) == 2
    assert passes(run_config(4, each=("load_balance", 0.1, "1"), all=("load_balance", 0.1, "global"))) == 2
    assert passes(run_config(4, each=("variation", 0.1, "1"))) == 2  # which says nothing of itself
    assert passes(run_config(4, each=("alone", 0.1, "1"))) == 1


def test_a_coefficient_of_zero_is_no_gradient_of_any_loss(monkeypatch):
    """Not even of one whose gradient is not a number."""
    monkeypatch.setitem(router_losses.LOSSES, "broken", RouterLoss(lambda stats: jnp.log(-stats.tokens[:, 0])))
    stats = stats_of(np.ones((1, 1, 2)), np.ones((1, 1, 2)))
    cfg = LossConfig(more={"x": RouterLossConfig("broken")})
    value, parts = total_loss(BatchSums(0.0, 0.0, {"layers": stats}), cfg)
    assert np.isfinite(value) and parts.router["broken/x"] == 0 and np.isnan(parts.raw["broken_raw/x"])


# --- statistics that are not numbers of the loss ---------------------------------------------------------------------


def test_integers_among_the_statistics_have_no_slope():
    rng = np.random.default_rng(3)
    plain = jax.tree.map(jnp.asarray, stats_of(rng.integers(1, 9, (2, 4, 6)) * 2.0, rng.random((2, 4, 6))))
    more = plain._replace(histogram=jnp.full((2, 6, 7), 2**30 + 1, jnp.int32))
    cfg = LossConfig(balance_batch=2, more={"each": RouterLossConfig("load_balance", 0.2, 1, over=3)})
    found = []
    for stats in (plain, more):
        sums = BatchSums(jnp.float32(3), jnp.float32(2), {"layers": stats})

        @jax.jit
        def run(prob, sums=sums, stats=stats):
            """The loss, and the gradient of Σ slope · sum by the probabilities, as in a micro-batch."""
            slopes = jax.grad(lambda s: total_loss(s, cfg)[0], allow_int=True)(sums)
            own = lambda prob: sums._replace(router={"layers": stats._replace(prob_per_expert=prob)})
            return total_loss(sums, cfg)[0], *jax.value_and_grad(lambda p: losses.dot(slopes, own(p)))(prob)

        found.append(run(stats.prob_per_expert))
    for a, b in zip(*found, strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.abs(found[0][2]).min() > 0
    with jax.set_mesh(sharding.make_mesh((1, 1, 1), jax.local_devices()[:1])):
        four = jax.tree.map(lambda x: jnp.stack([x] * 4), more._replace(histogram=more.histogram // 4))
        total = jax.jit(lambda x: gradients._sum_over(lambda _, part: part, x))(four)
    assert total.histogram.dtype == jnp.int32 and (total.histogram == 2**30).all()


# --- mistakes --------------------------------------------------------------------------------------------------------

WRONG = {
    "kind": (dict(kind="load_balence"), "kind='load_balence': must be one of load_balance, router_z, mutual_inf"),
    "over": (dict(kind="router_z", over=2), "over=2: has no effect on kind='router_z'; nearest valid: 0"),
    "scope": (dict(kind="router_z", balance_batch=8), "balance_batch=8: has no effect on kind='router_z', a mean"),
    "one group": (dict(kind="mutual_information"), "balance_batch='global': must be < data.batch_size=64"),
    "all": (
        dict(kind="mutual_information", balance_batch=64),
        "balance_batch=64: must be < data.batch_size=64 with kind='mutual_information', which",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_loss_that_cannot_be_is_refused_before_anything_is_compiled(name):
    values, says = WRONG[name]
    made = config.to_dict(run_config(1))
    made["loss"]["more"] = {"x": values}
    cfg = config.build(made)
    with pytest.raises(ConfigError) as e:
        make_gradients(cfg, None)
    assert f"config.loss.more.x.{says}" in str(e.value)
    assert name != "kind" or "nearest valid: 'load_balance'" in str(e.value)


@pytest.mark.parametrize("words", [
    ("linear", "each_group"), ("linear", "compares_groups"), ("linear", "targets"), ("by_label", "each_group"),
    ("by_label", "compares_groups"), ("by_label", "targets"), ("compares_groups", "each_group"),
])  # fmt: skip
def test_a_row_that_contradicts_itself_is_refused(monkeypatch, words):
    monkeypatch.setitem(router_losses.LOSSES, "odd", RouterLoss(variation, **dict.fromkeys(words, True)))
    rule = rf"config\.loss\.more\.x\.kind='odd': is a row of LOSSES with {words[0]}=True, {words[1]}=True; a loss"
    with pytest.raises(ConfigError, match=rule):
        router_losses.check(run_config(1, x=("odd", 0.1, "global")))


def test_over_divides_the_experts_of_every_layer():
    made = config.to_dict(run_config(1))
    made["model"] |= {"layers": "moe:4 moe:6", "num_layers": 2}
    made["loss"]["more"] = {"x": {"over": 4}}
    rule = r"config\.loss\.more\.x\.over=4: must divide the layers' numbers of experts, \(4, 6\); nearest valid: 2"
    with pytest.raises(ConfigError, match=rule):
        config.build(made)
