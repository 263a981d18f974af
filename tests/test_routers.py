"""Routers, and what the router does besides choosing the best K: each against NumPy.

Token choice itself is in test_routing.py, whole models on meshes in test_routers_models.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from moe_jax.config import MoEConfig, RampConfig
from moe_jax.moe import routers, routing
from moe_jax.moe.experts import ExpertCompute, ExpertWeights, capacity, capacity_rows
from moe_jax.moe.routing import Facts, Knobs, Routing
from moe_jax.train.knobs import ramp_at

T, D, R, C = 12, 6, 5, 4


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


# --- where logits come from -------------------------------------------------------------------------------------------


def unit(a, axis):
    return a / np.sqrt((a**2).sum(axis, keepdims=True) + 1e-12)


def cosine_by_hand(w, x, state):
    scale = min(np.exp(w["log_scale"][0]), 100.0)
    return scale * unit(x @ w["w_in"], 1) @ unit(w["w_router"], 0), state


def mlp_by_hand(w, x, state):
    state = x @ w["w_in"] + w["b_in"] + w["carry"] * state
    h = state / np.sqrt((state**2).mean(1, keepdims=True) + 1e-6) * w["norm"]
    for i in "12":
        z = h @ w[f"w_{i}"] + w[f"b_{i}"]
        h = z * 0.5 * (1 + special.erf(z / np.sqrt(2)))
    return h @ w["w_router"], state


SHAPES = {
    "cosine": {"w_in": (D, R), "log_scale": (1,), "w_router": (R, C)},
    "mlp": {"w_in": (D, R), "b_in": (R,), "carry": (R,), "norm": (R,), "w_1": (R, R), "b_1": (R,), "w_2": (R, R),
            "b_2": (R,), "w_router": (R, C)},
}  # fmt: skip


@pytest.mark.parametrize(("name", "by_hand"), [("cosine", cosine_by_hand), ("mlp", mlp_by_hand)])
def test_logits_and_gradients_are_those_of_numpy(name, by_hand):
    """Gradients by central differences of the float64 loop, of every weight, the tokens and the state before."""
    w = {key: normal(*shape, seed=i) for i, (key, shape) in enumerate(SHAPES[name].items())}
    x, state, cotangent = normal(T, D), normal(T, R, seed=1), normal(T, C, seed=2)
    logits, after = jax.jit(routers.ROUTERS[name].logits)(w, x, state)
    exact = jax.tree.map(np.float64, (w, x, state))
    want, want_after = by_hand(*exact)
    np.testing.assert_allclose(logits, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(after, want_after, rtol=1e-5, atol=1e-5)

    value = lambda fn, *args: sum((c * out).sum() for c, out in zip((cotangent, state), fn(*args), strict=True))
    grads = jax.jit(jax.grad(functools.partial(value, routers.ROUTERS[name].logits), (0, 1, 2)))(w, x, state)
    grads = jax.device_get(grads)
    leaves, tree = jax.tree.flatten(exact)
    for i, grad in enumerate(jax.tree.leaves(grads)):
        for at in list(np.ndindex(leaves[i].shape))[:6]:
            ends = []
            for sign in (1, -1):
                moved = [leaf.copy() for leaf in leaves]
                moved[i][at] += sign * 1e-5
                ends.append(value(by_hand, *jax.tree.unflatten(tree, moved)))
            np.testing.assert_allclose(grad[at], (ends[0] - ends[1]) / 2e-5, rtol=2e-4, atol=2e-4)


def test_a_cosine_router_sees_directions_alone():
    w = {key: normal(*shape, seed=i) for i, (key, shape) in enumerate(SHAPES["cosine"].items())}
    w["log_scale"] = np.float32([9.0])
    x = normal(T, D)
    logits, _ = routers.cosine(w, x, None)
    assert np.abs(logits).max() <= 100 * (1 + 1e-6)
    np.testing.assert_allclose(routers.cosine(w, 50 * x, None)[0], logits, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("vocab", "experts", "top_k"), [(4096, 16, 2), (257, 8, 8), (100, 7, 3), (50, 3, 1), (9, 1, 1)]
)
def test_a_table_names_distinct_experts_equally_often(vocab, experts, top_k):
    tables = [np.asarray(routers.draw_table(jax.random.key(i), vocab, experts, top_k)) for i in (0, 1)]
    assert tables[0].shape == (vocab, top_k) and tables[0].min() >= 0 and tables[0].max() < experts
    assert (np.diff(np.sort(tables[0], axis=1), axis=1) > 0).all()
    loads = np.bincount(tables[0].ravel(), minlength=experts)
    assert loads.max() - loads.min() <= top_k
    np.testing.assert_array_equal(np.ptp(np.bincount(tables[0][:, 0], minlength=experts)) <= 1, True)
    assert experts == 1 or (tables[0] != tables[1]).mean() > 0.3


# --- what is done with them -------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("sequences", "cfg"))
def route(logits, bias, facts, knobs, sequences, cfg):
    return routing.route(logits, bias, facts._replace(sequences=sequences), cfg, knobs)


def routed(logits, cfg, facts=None, knobs=None, bias=None):
    facts = facts or Facts(np.ones(len(logits), bool), np.arange(len(logits)))
    plan, probs = route(np.float32(logits), bias, facts._replace(sequences=None), knobs, facts.sequences, cfg)
    return Routing(*(None if a is None else np.asarray(a) for a in plan)), np.asarray(probs)


def knobs_of(**values):
    return Knobs(jax.random.key(3), **{name: jnp.float32(value) for name, value in values.items()})


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus"])
def test_expert_choice_is_a_loop_over_sequences(score):
    """With padding, of which an expert takes tokens only where a sequence has no others, and which then do nothing."""
    cfg = MoEConfig(num_experts=4, top_k=2, choice="expert", score=score, renormalize=score == "sigmoid")
    logits = np.random.default_rng(0).permutation(3 * 10 * 4).reshape(30, 4) / 16 - 3
    counted = np.ones((3, 10), bool)
    counted[1, 7:], counted[2, 2:] = False, False
    plan, _ = routed(logits, cfg, Facts(jnp.asarray(counted.ravel()), None, None, 3))
    z = logits.reshape(3, 10, 4)
    scores = {"softmax": special.softmax(z, -1), "sigmoid": special.expit(z)}.get(score, np.sqrt(np.log1p(np.exp(z))))
    want = np.zeros((3, 10, 4), bool)
    for b, e in np.ndindex(3, 4):
        best = sorted(np.flatnonzero(counted[b]), key=lambda s: -scores[b, s, e])[:5]  # ⌈2·10/4⌉
        want[b, best, e] = True
    np.testing.assert_array_equal(plan.valid.reshape(want.shape), want)
    np.testing.assert_array_equal(plan.experts, np.tile(np.arange(4), (30, 1)))
    weights = np.where(want, scores, 0)
    if cfg.renormalize:
        weights = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-20)
    np.testing.assert_allclose(np.where(plan.valid, plan.weights, 0).reshape(want.shape), weights, rtol=1e-5)


def test_the_gradient_of_sqrt_softplus_is_finite_everywhere():
    z = jnp.asarray([-80.0, -40.0, -21.0, -19.0, -1.0, 0.0, 30.0])
    exact = np.float64(z)
    slope = np.where(exact < -30, 0.5 * np.exp(exact / 2), special.expit(exact) / (2 * np.sqrt(np.logaddexp(0, exact))))
    np.testing.assert_allclose(jax.vmap(jax.grad(routing._sqrt_softplus))(z), slope, rtol=1e-5)


def test_noise_is_of_the_token_not_of_its_place():
    """The same numbers for a part of the batch, in another order; other ones in another layer and another stream."""
    logits, numbers = normal(64, 8), jnp.arange(64)
    draw = lambda index, key=3, stream="gumbel": np.asarray(
        routing._draw(jax.random.gumbel, Knobs(jax.random.key(key)), stream, Facts(None, index), logits[: len(index)])
    )
    whole, order = draw(numbers), np.random.default_rng(0).permutation(64)[:20]
    np.testing.assert_array_equal(draw(numbers[order]), whole[order])
    assert abs(np.corrcoef(whole.ravel(), draw(numbers, 4).ravel())[0, 1]) < 0.2
    assert abs(np.corrcoef(whole.ravel(), draw(numbers, stream="random").ravel())[0, 1]) < 0.2
    many = np.asarray(
        routing._draw(jax.random.gumbel, Knobs(jax.random.key(0)), "gumbel", Facts(None), normal(4000, 4))
    )
    assert stats.kstest(many.ravel(), "gumbel_r").pvalue > 1e-3


def test_random_share_keeps_mean_and_deviation():
    logits = normal(3000, 8) * 3 + 5
    facts = Facts(None, jnp.arange(3000))
    mixed = lambda share: np.asarray(routing.mix_noise(jnp.asarray(logits), facts, knobs_of(random=share)))
    np.testing.assert_array_equal(mixed(0.0), logits)
    noise, half = mixed(1.0), mixed(0.5)
    np.testing.assert_allclose(half, 0.5 * logits + 0.5 * noise, rtol=1e-5, atol=1e-5)
    standard = (noise - logits.mean(1, keepdims=True)) / logits.std(1, keepdims=True)
    assert stats.kstest(standard.ravel(), "norm").pvalue > 1e-3
    assert abs(np.corrcoef(standard.ravel(), logits.ravel())[0, 1]) < 0.02  # the choice does not depend on the token


def test_gumbel_noise_draws_by_the_softmax():
    """The first of the chosen is a draw by the softmax. Weights stay those without noise; noise 0 changes nothing."""
    row, cfg = np.float32([2.0, 1.0, 0.0, -1.0]), MoEConfig(num_experts=4, top_k=2)
    logits = np.tile(row, (20_000, 1))
    plan, probs = routed(logits, cfg, knobs=knobs_of(noise=1.0))
    share = np.bincount(plan.experts[:, 0], minlength=4) / len(logits)
    np.testing.assert_allclose(share, special.softmax(row), atol=0.01)
    np.testing.assert_allclose(plan.weights, special.softmax(row)[plan.experts], rtol=1e-5)
    np.testing.assert_allclose(probs, special.softmax(logits, 1), rtol=1e-5)
    np.testing.assert_array_equal(
        routed(logits, cfg, knobs=knobs_of(noise=0.0))[0].experts, routed(logits, cfg)[0].experts
    )


def test_the_threshold_keeps_the_first_and_what_exceeds_it():
    """… and the mean number of experts falls with the temperature, on the same logits and noise, down to one."""
    cfg, logits = MoEConfig(num_experts=8, top_k=8), normal(500, 8)
    plan, _ = routed(logits, cfg, knobs=knobs_of(threshold=0.1, temperature=0.5))
    gates = special.softmax(logits.astype(np.float64) / 0.5, 1)
    want = np.take_along_axis(gates, plan.experts, 1) > 0.1
    want[:, 0] = True
    np.testing.assert_array_equal(plan.valid, want)
    slots = [
        routed(logits, cfg, knobs=knobs_of(threshold=0.001, temperature=t, noise=1.0))[0].valid.sum(1).mean()
        for t in (100.0, 1.0, 0.5, 0.2, 0.001)
    ]
    assert slots == sorted(slots, reverse=True) and slots[0] == 8 and slots[-1] < 1.01


@pytest.mark.parametrize("order", ["score_topk", "topk_score"])
def test_what_is_left_under_a_threshold_shares_the_whole_weight(order):
    cfg = MoEConfig(num_experts=4, top_k=4, renormalize=order == "score_topk", score_order=order)
    plan, _ = routed(np.float32([[3, 2.9, 0, 0], [3, 0, 0, 0]]), cfg, knobs=knobs_of(threshold=0.3, temperature=1.0))
    assert plan.valid.tolist() == [[True, True, False, False], [True, False, False, False]]
    pair = special.softmax([3, 2.9])
    np.testing.assert_allclose(plan.weights, [[*pair, 0, 0], [1, 0, 0, 0]], rtol=1e-5)


def test_noise_and_threshold_leave_tables_alone():
    cfg, logits = MoEConfig(num_experts=6, top_k=2), normal(T, 6)
    facts = Facts(jnp.ones(T, bool), jnp.arange(T), routers.draw_table(jax.random.key(0), T, 6, 2))
    plain, _ = routed(logits, cfg, facts)
    moved, _ = routed(logits, cfg, facts, knobs_of(random=0.9, noise=1.0, threshold=0.5, temperature=1.0))
    jax.tree.map(np.testing.assert_array_equal, moved, plain)


def test_a_table_chooses_and_scores_weigh():
    cfg, logits = MoEConfig(num_experts=6, top_k=2, score="sigmoid", renormalize=True), normal(T, 6)
    table = routers.draw_table(jax.random.key(0), T, 6, 2)
    plan, _ = routed(logits, cfg, Facts(jnp.ones(T, bool), None, table))
    np.testing.assert_array_equal(plan.experts, table)
    chosen = np.take_along_axis(special.expit(logits), np.asarray(table), 1)
    np.testing.assert_allclose(plan.weights, chosen / chosen.sum(1, keepdims=True), rtol=1e-5)


# --- overflow under capacity ------------------------------------------------------------------------------------------


computed_of = jax.jit(lambda x, plan, w, cfg: capacity(x, plan, w, ExpertCompute(cfg))[1], static_argnums=3)


def dropped(overflow, weights=None, key=None):
    """Which slots of 256 tokens, all of one choice, are not computed."""
    cfg = MoEConfig(num_experts=2, top_k=1, compute="capacity", capacity_factor=1.0, overflow=overflow)
    t = 256
    facts = Facts(jnp.ones(t, bool), jnp.arange(t))
    weights = np.ones((t, 1), np.float32) if weights is None else weights
    knobs = None if key is None else Knobs(jax.random.key(key))
    order = routing.prioritise(jnp.asarray(weights), facts, cfg, knobs)
    plan = Routing(jnp.zeros((t, 1), jnp.int32), jnp.asarray(weights), jnp.ones((t, 1), bool), order)
    w = ExpertWeights(*(np.ones(s, np.float32) for s in ((2, 3, 4), (2, 3, 4), (2, 4, 3))))
    computed = computed_of(np.ones((t, 3), np.float32), plan, w, cfg)
    assert computed.sum() == capacity_rows(ExpertCompute(cfg), t) == t // 2
    return ~np.asarray(computed)[:, 0]


def test_what_an_expert_takes_first():
    """Early tokens, the largest weights, or a random order, in which every position is dropped equally often."""
    np.testing.assert_array_equal(dropped("first"), np.arange(256) >= 128)
    weights = np.random.default_rng(0).permutation(256).astype(np.float32)[:, None]
    np.testing.assert_array_equal(dropped("score", weights), weights[:, 0] < 128)
    np.testing.assert_array_equal(dropped("random"), dropped("random"))  # evaluation
    times = sum(dropped("random", key=i).reshape(8, 32).sum(1) for i in range(60))
    assert stats.chisquare(times).pvalue > 1e-3


# --- what moves with the step -----------------------------------------------------------------------------------------


def test_ramps():
    """Values by hand, and none past the end."""
    line, factor = RampConfig(1.0, 0.2, 4), RampConfig(2.0, 0.5, 4, "exponential")
    np.testing.assert_allclose([ramp_at(line, n) for n in (0, 1, 4, 9)], [1.0, 0.8, 0.2, 0.2], rtol=1e-6)
    np.testing.assert_allclose([ramp_at(factor, n) for n in (0, 2, 4, 9)], [2.0, 1.0, 0.5, 0.5], rtol=1e-6)
    assert ramp_at(RampConfig(0.3, 0.3), 7) == np.float32(0.3)
