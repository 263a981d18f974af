"""Routers, and what the router does besides choosing the best K: each against NumPy, and on meshes.

Token choice itself is in test_routing.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from scipy import special, stats
from test_invariance import assert_same, batch_rows, run_config
from test_model import forward, inputs_of, under_mesh

from moe_jax import config
from moe_jax.config import ExploreConfig, ModelConfig, MoEConfig, RampConfig
from moe_jax.config.layers import Kind
from moe_jax.errors import ConfigError
from moe_jax.evaluate.generate import generate
from moe_jax.moe import exchange, routers, routing
from moe_jax.moe.experts import ExpertCompute, ExpertWeights, capacity, capacity_rows
from moe_jax.moe.layer import MoE, TokenInfo
from moe_jax.moe.program import Program
from moe_jax.moe.routing import Facts, Knobs, Routing
from moe_jax.moe.stats import RouterStats
from moe_jax.nn.layers import Init
from moe_jax.parallel import sharding
from moe_jax.train import knobs, losses, metrics, step
from moe_jax.train.gradients import make_gradients
from moe_jax.train.knobs import ramp_at
from moe_jax.train.losses import BatchSums
from moe_jax.train.state import abstract_batch, abstract_state, init_state, put_batch
from moe_jax.tree import flatten

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


def test_losses_that_balance_leave_tables_out():
    """A table's loads are fixed: only the z-loss sees its router, and nothing sees one that is not there."""
    cfg = routers_config("cosine")
    draw = lambda *shape: jnp.asarray(np.random.default_rng(shape).random(shape), jnp.float32)
    bank = lambda n: RouterStats(draw(n, 1) + 9, draw(n, 1, 8), draw(n, 1, 8), draw(n, 1), jnp.zeros((n, 1)))
    sums = BatchSums(0.0, 1.0, {"layers": bank(2), "layers_2": bank(1)})  # the second is the table's
    chosen = sums._replace(router={"layers": sums.router["layers"]})
    loss = dataclasses.replace(cfg.loss, load_balance_coef=1.0, router_loss_layers="sum", balance_batch="global")
    raw = lambda *args, **kwargs: losses.total_loss(*args, **kwargs)[1].raw
    for combine, weighed in (("score", sums), ("one", chosen)):
        moe = dataclasses.replace(cfg.model.moe, combine=combine, renormalize=combine == "score")
        found = raw(sums, loss, model=dataclasses.replace(cfg.model, moe=moe), tokens=10.0)
        want = {"load_balance_raw": raw(chosen, loss), "router_z_raw": raw(weighed, loss, tokens=10.0)}
        for name, other in want.items():
            np.testing.assert_allclose(found[name], other[name], rtol=1e-6)


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


# --- the whole batch, on meshes ---------------------------------------------------------------------------------------

MLP = (
    {"num_experts": 4, "top_k": 2, "router": "mlp", "router_width": 8, "identity_experts": 2},
    ExploreConfig(RampConfig(1.0, 0.2, 4), 1.0, 0.1, RampConfig(2.0, 0.5, 4, "exponential"), 3),
)
MODELS = {
    "latent": (
        {"layers": "", "num_layers": 3, "num_dense_layers": 1, "qkv_bias": True},
        {"num_experts": 4, "top_k": 3, "identity_experts": 2, "latent": 12, "latent_norm": True,
         "shared_gate": "softmax", "min_ratio": 0.8},
        ExploreConfig(),
    ),
    # A state carried over layers, identity experts, and all that `explore` moves.
    "mlp": ({"layers": "", "num_layers": 2}, *MLP),
    "mlp in any order": ({"layers": "dense 2*(late dense) moe:8", "num_layers": 6}, *MLP),
    "cosine": (
        {"layers": "dense 2*moe table", "num_layers": 4},
        {"num_experts": 8, "top_k": 2, "router": "cosine", "router_width": 8, "score": "sqrt_softplus",
         "renormalize": True, "routed_scaling": 1.5},
        ExploreConfig(noise=0.5),
    ),
    "expert choice": (
        {"layers": "", "num_layers": 1},
        {"num_experts": 4, "top_k": 2, "choice": "expert", "selection_bias": False},
        ExploreConfig(RampConfig(0.5, 0.0, 4)),
    ),
    "identity": (
        {"layers": "", "num_layers": 3, "num_dense_layers": 1},
        {"num_experts": 4, "top_k": 4, "identity_experts": 4, "identity_output": "nothing", "score": "sigmoid"},
        ExploreConfig(),
    ),
    "shards": (
        {"layers": "", "num_layers": 1},
        {"num_experts": 8, "top_k": 4, "shard_groups": 2, "combine": "share", "num_shared_experts": 0},
        ExploreConfig(noise=0.5),
    ),
}  # fmt: skip


def routers_config(name: str, *args, **kwargs) -> config.RunConfig:
    model, moe, explore = MODELS[name]
    cfg = run_config(*args, **kwargs)
    routed = dataclasses.replace(cfg.model.moe, **moe)
    loss, sample = cfg.loss, cfg.sample
    if routed.choice == "expert":
        loss = dataclasses.replace(loss, load_balance_coef=0.0)
        sample = dataclasses.replace(sample, tokens=0)
    placed = {"num_dense_layers": 0} | model
    changed = dataclasses.replace(cfg.model, **placed, moe=routed)
    return dataclasses.replace(cfg, model=changed, explore=explore, loss=loss, sample=sample)


@functools.cache
def state_on(name: str, shape):
    """The mesh and a fresh state on it, with selection biases; the values are those of one device."""
    mesh = sharding.make_mesh(shape, jax.devices()[: int(np.prod(shape))])
    if mesh.size == 1:
        state = init_state(routers_config(name), mesh)
        slope = lambda b: b if b.dtype == jnp.int32 else b + jnp.linspace(-0.05, 0.05, b.shape[-1])[None]
        return mesh, state._replace(router_bias=jax.tree.map(slope, state.router_bias))
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(routers_config(name), mesh))
    return mesh, jax.device_put(jax.device_get(state_on(name, (1, 1, 1))[1]), shardings)


def everything(name: str, shape, *args, **kwargs) -> dict:
    """Loss, parts, sums, gradients and the next selection biases of step 1, of a batch with padding."""
    mesh, state = state_on(name, shape)
    cfg = routers_config(name, *args, **kwargs)
    gradients = make_gradients(cfg, mesh)

    @jax.jit
    def one(state, batch):
        found = gradients(state.params, state.router_bias, batch, 1)
        return found._asdict() | {"bias": step.update_biases(cfg, state.router_bias, found.sums.router, {})}

    with jax.set_mesh(mesh):
        return jax.device_get(one(state, put_batch(batch_rows(0.25), mesh, cfg)))


@functools.cache
def oracle(name: str) -> dict:
    return everything(name, (1, 1, 1))


CASES = [
    ((2, 2, 2), 2, "full", "grouped", "ring"),
    ((1, 2, 4), 4, "selective", "grouped", "all_to_all"),
    ((8, 1, 1), 1, "none", "grouped", "ring"),
]
FAST = [("shards", 0)]
# Every model on the first mesh and, by turns, on one of the others.
TURNS = [(name, i) for n, name in enumerate(MODELS) for i in (0, 1 + n % 2)]


@pytest.mark.parametrize(
    ("name", "case"),
    [pytest.param(name, CASES[i], marks=[] if (name, i) in FAST else pytest.mark.slow) for name, i in TURNS],
)
def test_invariance(name, case):
    shape, micro, remat, compute, exchange = case
    got, want = everything(name, shape, micro, remat, compute, exchange=exchange), oracle(name)
    assert_same(got, want)
    grads = flatten(got["grads"])
    names = {path.rsplit("/", 1)[1] for path in grads if "/router/" in path}
    assert names == {"mlp": set(SHAPES["mlp"]), "cosine": set(SHAPES["cosine"])}.get(name.split()[0], {"w_router"}) - {
        "w_router"
    }
    for path, grad in grads.items():
        if "/router/" in path:
            assert np.abs(grad).max() > 1e-6, path
    for stats_of in got["sums"].router.values():
        made = stats_of.tokens_per_expert.sum(-1)
        if name.startswith("mlp") or name == "latent":  # some slots are under the threshold, or light
            assert (made < 2.95 * stats_of.tokens).all() and (made >= stats_of.tokens).all()
        if name == "shards":
            for g in (0, 1):
                np.testing.assert_array_equal(stats_of.tokens_per_expert[..., g::2].sum(-1), 2 * stats_of.tokens)
        if name == "expert choice":
            loads = stats_of.tokens_per_expert.sum(1)
            assert (loads.max(-1) - loads.min(-1) <= 16).all()  # padding, in half of the sequences


def test_evaluation_has_no_noise():
    """The model's own K, no noise: the program of a model without `explore`."""
    cfg = routers_config("mlp")
    assert knobs.of_step(dataclasses.replace(cfg, explore=ExploreConfig()), 0) is None
    assert cfg.trained.moe.top_k == 3 and cfg.model.moe.top_k == 2
    mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        evaluation = step.make_eval_step(cfg, mesh, 1).__wrapped__
        program = str(evaluation.trace(*abstract_state(cfg, mesh)[1:3], abstract_batch(cfg, mesh)).jaxpr)
    assert "random_bits" not in program and "k=2" in program and "k=3" not in program


def test_ramps():
    """Values by hand, and none past the end."""
    line, factor = RampConfig(1.0, 0.2, 4), RampConfig(2.0, 0.5, 4, "exponential")
    np.testing.assert_allclose([ramp_at(line, n) for n in (0, 1, 4, 9)], [1.0, 0.8, 0.2, 0.2], rtol=1e-6)
    np.testing.assert_allclose([ramp_at(factor, n) for n in (0, 2, 4, 9)], [2.0, 1.0, 0.5, 0.5], rtol=1e-6)
    assert ramp_at(RampConfig(0.3, 0.3), 7) == np.float32(0.3)


@pytest.mark.parametrize("fields", [{"steps": 5}, {"start": 1.0}, {"start": 1.0, "end": 1.0, "form": "exponential"}])
def test_a_ramp_without_effect_is_refused(fields):
    with pytest.raises(ConfigError, match="has no effect"):
        RampConfig(**fields)


def test_expert_choice_writes_no_text():
    cfg = routers_config("expert choice")
    mesh, state = state_on("expert choice", (1, 1, 1))
    with pytest.raises(ConfigError, match=r"model\.moe\.choice='expert': depends on later tokens"):
        generate(cfg.model, mesh, state.params, state.router_bias, [[1]], 2)


@pytest.mark.slow
def test_a_choice_from_every_shard_writes_text():
    """Token by token from the cache as in one pass over all of it."""
    cfg, (mesh, state) = routers_config("shards").model, state_on("shards", (1, 1, 1))
    prompts = [[5, 7, 2], [3]]
    out = generate(cfg, mesh, state.params, state.router_bias, prompts, 5)
    table = np.zeros((2, 8), np.int32)
    for row, ids in enumerate(out):
        table[row, : len(ids)] = ids
    run = under_mesh(functools.partial(forward, cfg))
    hidden = np.asarray(run(state.params, state.router_bias, inputs_of(table))[0], np.float64)
    logits = hidden @ np.asarray(state.params["head"]).T
    for row, prompt in enumerate(prompts):
        best = np.sort(logits[row, len(prompt) - 1 : len(prompt) + 4], -1)
        assert (best[:, -1] - best[:, -2]).min() > 1e-4
        assert out[row][len(prompt) :] == logits[row, len(prompt) - 1 : len(prompt) + 4].argmax(-1).tolist()


# --- identity experts -------------------------------------------------------------------------------------------------


def test_identity_experts_return_the_token():
    """The layer is the sum over real experts plus the weights of identity slots times the token, whatever it computes;
    `experts_per_token` counts real ones alone."""
    found = oracle("identity")
    for stats_of in found["sums"].router.values():
        assert stats_of.tokens_per_expert.shape[-1] == 8 and not stats_of.dropped.any()
        row = metrics.router_metrics([jax.tree.map(lambda a: a[0], stats_of)], identity_experts=4)
        load = stats_of.tokens_per_expert[0].sum(0)
        np.testing.assert_allclose(row["experts_per_token"], load[:4].sum() / stats_of.tokens[0].sum(), rtol=1e-6)
        np.testing.assert_allclose(row["identity_share"], load[4:].sum() / load.sum(), rtol=1e-6)
        np.testing.assert_allclose(row["max_load"], 4 * load[:4].max() / load[:4].sum(), rtol=1e-6)


def identity_layer(identity: int, exchange="ring", width=64):
    model = ModelConfig(d_model=64, moe=MoEConfig(num_experts=8, top_k=8, d_expert=width, identity_experts=identity,
                                                  selection_bias=True, exchange=exchange))  # fmt: skip
    return MoE(model, Kind("moe", 8), Init(nnx.Rngs(0), 1.0), 1.0, Program(exchange=exchange))


@pytest.mark.slow
def test_identity_slots_cost_no_memory():
    """The buffers of a layer's gradient fall as the expected share of real experts: half of the choices are real.

    Experts are wide, so that buffers of their rows are most of the memory.
    """

    def temporaries(identity: int) -> int:
        with jax.set_mesh(sharding.make_mesh((1, 1, 1), jax.devices()[:1])):
            graph, params, rest = nnx.split(identity_layer(identity, width=256), nnx.Param, ...)
            put = functools.partial(jax.device_put, device=NamedSharding(jax.sharding.get_mesh(), sharding.BATCH))
            x, info = put((normal(4, 512, 64), TokenInfo(np.ones((4, 512), bool), np.zeros((4, 512), np.int32))))
            loss = lambda params, x: jnp.sum(jnp.sin(nnx.merge(graph, params, rest)(x, info).y))
            compiled = jax.jit(jax.grad(loss, (0, 1))).lower(params, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(8) < 0.7 * temporaries(0)


@pytest.mark.slow
def test_identity_slots_are_not_sent(monkeypatch):
    """What the compiled all-to-all is told to send: nothing where all choices are identity experts, and rows to the
    devices of the real ones otherwise."""
    sent = []
    swap = exchange.swap

    def recorded(x, send_P, receive_P):
        jax.debug.callback(lambda n: sent.append(int(n)), jnp.sum(send_P))
        return swap(x, send_P, receive_P)

    monkeypatch.setattr(exchange, "swap", recorded)
    with jax.set_mesh(sharding.make_mesh((1, 1, 8))):
        layer = identity_layer(8, "all_to_all")
        put = functools.partial(jax.device_put, device=NamedSharding(jax.sharding.get_mesh(), sharding.BATCH))
        x = put(normal(8, 16, 64))
        info = put(TokenInfo(np.ones((8, 16), bool), np.zeros((8, 16), np.int32)))
        for real in (True, False):
            bias = jnp.where(jnp.arange(16) < 8, 1.0 if real else -1.0, 0.0)
            layer.router_bias[...] = bias
            graph, state = nnx.split(layer)
            y = jax.jit(lambda state, graph=graph: nnx.merge(graph, state)(x, info).y)(state)
            jax.effects_barrier()
            if not real:
                probs = jax.nn.softmax(jax.device_get(x) @ jax.device_get(layer.w_router[...]), axis=-1)
                np.testing.assert_allclose(y, probs[..., 8:].sum(-1, keepdims=True) * jax.device_get(x), rtol=1e-4)
            assert (sum(sent) == 0) != real
            sent.clear()


REFUSED = {
    "identity experts in a table": (
        "cosine",
        "moe",
        {"identity_experts": 2},
        r"identity_experts=2: is not available with",
    ),
    "K of training in a table": ("cosine", "explore", {"top_k": 3}, r"explore\.top_k=3: is not available with table"),
    "one choice under a threshold": ("identity", "explore", {"top_k": 1, "threshold": 0.1}, r"explore\.threshold=0\.1"),
    "a target beside identity experts": ("identity", "loss", {"bias_target": (1.0,) * 4}, r"loss\.bias_target"),
    "a threshold for experts' choices": ("expert choice", "explore", {"threshold": 0.1}, r"explore\.threshold"),
    "more experts than there are": ("mlp", "explore", {"top_k": 7}, r"explore\.top_k=7: must be ≤ 6"),
    "a balancing loss": ("expert choice", "loss", {"load_balance_coef": 0.1}, r"loss\.load_balance_coef"),
    "a threshold for shards": ("shards", "explore", {"threshold": 0.1}, r"explore\.threshold=0\.1: is not available"),
    "half of the shards in training": ("shards", "explore", {"top_k": 3}, r"as shard_groups must divide"),
    "shares in a table": (
        "cosine",
        "moe",
        {"combine": "share", "shard_groups": 2, "renormalize": False},
        r"moe\.combine='share': is not available with table",
    ),
    "text": ("expert choice", "sample", {"tokens": 4}, r"sample\.tokens=4: must be 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    name, group, changes, message = REFUSED[case]
    cfg = routers_config(name)
    with pytest.raises(ConfigError, match=message):
        if group == "moe":
            group, changes = "model", {"moe": dataclasses.replace(cfg.model.moe, **changes)}
        dataclasses.replace(cfg, **{group: dataclasses.replace(getattr(cfg, group), **changes)})


def test_refused_together():
    """The K of training is checked as a model's, and losses must reach a router."""
    cfg = routers_config("identity")
    moe = dataclasses.replace(cfg.model.moe, expert_budget=0.5)
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, moe=moe))
    with pytest.raises(ConfigError, match=r"explore\.top_k=6: as expert_budget must be between 2 and 4"):
        dataclasses.replace(cfg, explore=ExploreConfig(top_k=6))
    plain = run_config()
    moe = dataclasses.replace(plain.model.moe, selection_bias=False, combine="one")
    tables = dataclasses.replace(plain.model, layers="2*table", num_layers=2, num_dense_layers=0, moe=moe)
    for changes, name in (({}, "load_balance_coef"), ({"load_balance_coef": 0.0}, "router_z_coef")):
        with pytest.raises(ConfigError, match=rf"loss\.{name}=.* reaches no router"):
            dataclasses.replace(plain, model=tables, loss=dataclasses.replace(plain.loss, **changes))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"choice": "expert", "selection_bias": True}, "selection_bias"),
        ({"choice": "expert", "identity_experts": 2}, "identity_experts"),
        ({"identity_output": "nothing"}, "identity_output"),
        ({"compute": "capacity", "overflow": "score", "combine": "one"}, "overflow"),
        ({"choice": "expert", "compute": "capacity"}, "compute"),
        ({"router_width": 8}, "router_width"),
        ({"top_k": 4, "shard_groups": 3}, r"shard_groups=3: must divide num_experts=8 and top_k=4; nearest valid: 2"),
        ({"shard_groups": 2, "num_groups": 2, "top_groups": 2}, "num_groups=2: is not available with shard_groups"),
        ({"shard_groups": 2, "num_experts": 6, "identity_experts": 2}, "identity_experts"),
        ({"shard_groups": 2, "choice": "expert"}, "shard_groups"),
        ({"combine": "share"}, "combine='share': needs shard_groups > 1"),
        ({"combine": "share", "shard_groups": 2, "renormalize": True}, "renormalize"),
        ({"overflow": "random"}, "overflow"),
        ({"choice": "expert", "min_ratio": 0.5}, "min_ratio=0.5: is for the choices of tokens"),
        ({"combine": "one", "min_ratio": 0.5}, "min_ratio"),
        ({"shard_groups": 2, "min_ratio": 0.5}, "min_ratio"),
        ({"top_k": 1, "min_ratio": 0.5}, "min_ratio=0.5: has no effect with top_k=1"),
        ({"min_ratio": 1.5}, r"min_ratio=1.5: must be in \[0.0, 1.0\]"),
        ({"identity_experts": 2, "num_groups": 2, "top_groups": 1}, "identity_experts"),
        ({"top_k": 11, "identity_experts": 2}, r"must be ≤ num_experts=8 \+ identity_experts=2"),
    ],
)
def test_refused_in_a_layer(fields, message):
    with pytest.raises(ConfigError, match=message):
        MoEConfig(**fields)


def test_the_step_draws_only_where_something_moves():
    """A model without noise numbers no tokens."""
    assert not knobs.draws_noise(run_config())
    assert knobs.draws_noise(routers_config("cosine"))
