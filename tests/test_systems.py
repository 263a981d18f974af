"""Exact oracles of the systems in configs/systems: routes by hand, and hidden states as loops over the blocks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats
from test_model import forward, init, inputs_of, plain_attention, plain_glu, plain_norm, under_mesh
from test_residual import block_of, plain_blocks

from moe_jax import model
from moe_jax.config.layers import Place
from moe_jax.data import phases
from moe_jax.data.phases import Phase
from moe_jax.mixtures.online import Stages
from moe_jax.moe import pools
from moe_jax.moe.experts import ExpertCompute, ExpertWeights, capacity
from moe_jax.moe.routers import ROUTERS
from moe_jax.moe.routing import Facts, Routing, route
from moe_jax.moe.stats import by_depth
from moe_jax.train import knobs, metrics, step
from moe_jax.train.gradients import make_gradients
from moe_jax.train.state import abstract_batch, abstract_state, init_state, put_batch
from moe_jax.tree import flatten, nest
from tests.systems import MESH, batch_rows, load, mesh_of, toy


def routed(name: str, logits, step_number: int | None = None, table=None) -> Routing:
    """What a system's router makes of these logits in a step of training, or in evaluation."""
    cfg = load(name)[1]
    model = cfg.model if step_number is None else cfg.trained
    knobs_of_step = None if step_number is None else knobs.of_step(cfg, step_number)
    facts = Facts(jnp.ones(len(logits), bool), jnp.arange(len(logits)), None if table is None else jnp.asarray(table))
    plan = _route(jnp.asarray(logits, jnp.float32), facts, knobs_of_step, model.moe)
    return Routing(*(None if a is None else np.asarray(a) for a in plan))


@functools.partial(jax.jit, static_argnums=3)
def _route(logits, facts, knobs_of_step, moe):
    return route(logits, None, facts, moe, knobs_of_step)[0]


def experts_by_depth(name: str) -> list[int]:
    return [place.kind.experts for place in load(name)[1].model.places]


def test_olmo2_has_a_second_stage():
    """150 steps of 8 rows of the first source, then 50 with half of each."""
    stages = Stages(load("olmo2")[1])
    first, length, _ = stages.next(0, {}, {})
    second, rest, _ = stages.next(length, {}, {})
    assert list(first) == ["first", "second"] and (length, rest) == (150, None)
    before = phases.cursors(Phase(0, (0, 0), tuple(first.values())), length, 8)
    assert before == (1200, 0) and phases.cursors(Phase(length, before, tuple(second.values())), 200, 8) == (1400, 200)


def test_efficient_lm_has_experts_in_every_second_layer():
    assert experts_by_depth("efficient_lm") == [0, 8, 0, 8]
    shapes = flatten(model.abstract(load("efficient_lm")[1].model).shapes)
    assert shapes["layers/block_0/mlp/w_up"].shape == (2, 128, 256)
    assert shapes["layers/block_1/moe/w_up"].shape == (2, 8, 128, 256)
    assert not [path for path in shapes if path.startswith(("layers/block_0/moe", "layers/block_1/mlp/"))]


def test_pr_moe_is_a_pyramid():
    """Both banks by hand: experts, a router column each, the shared expert, and the gate, which begins as ½ and ½."""
    cfg = load("pr_moe")[1].model
    assert experts_by_depth("pr_moe") == [0, 8, 0, 8, 0, 16, 0, 16]
    assert [place for place in cfg.places if place.kind.experts == 16] == [
        Place("layers_2/block_1", i, cfg.places[-1].kind) for i in (0, 1)
    ]
    shapes = flatten(model.abstract(cfg).shapes)
    glu = 3 * 128 * 256
    for stack, experts in (("layers", 8), ("layers_2", 16)):
        bank = sum(x.size for path, x in shapes.items() if path.startswith(f"{stack}/block_1/moe/"))
        assert bank == 2 * (experts * (glu + 128) + glu + 2 * 128 + 2)
    counts, idle = model.count_parameters(cfg), 2 * (7 + 15) * glu
    assert counts.total - counts.active == idle


def test_mos_is_a_smaller_pyramid():
    """One block less than its teacher, of the same kinds, and the larger bank in as many layers."""
    assert experts_by_depth("mos") == [0, 8, 0, 16, 0, 16, 0]
    student, teacher = (load(name)[1] for name in ("mos", "pr_moe"))
    assert 0 < student.distill.stop_step < student.train.steps
    assert model.count_parameters(student.model).total < model.count_parameters(teacher.model).total


def test_ling_begins_at_random():
    """In the first step two batches of different logits have the same routes; after the warm-up they are the best K."""
    cfg = load("ling")[1]
    batches = [np.random.default_rng(i).normal(3 * i, 1 + i, (256, 16)) for i in (0, 1)]
    first, second = (routed("ling", logits, 0).experts for logits in batches)
    np.testing.assert_array_equal(first, second)
    chosen = np.bincount(first.ravel(), minlength=16)  # 256 · 4 / 16 = 64 each, if every expert is as probable
    assert stats.chisquare(chosen).pvalue > 1e-3
    for step_number, equal in ((25, False), (50, True), (199, True)):
        best = np.argsort(-batches[0])[:, : cfg.model.moe.top_k]
        assert (routed("ling", batches[0], step_number).experts == best).all() == equal


def test_emo_draws_pools():
    """Sizes by hand from seed, step, layer, row and document; evaluation chooses from all experts."""
    cfg = load("emo")[1]
    number = np.repeat(np.int32([[1, 2, 3, 3], [1, 1, 2, 0], [1, 1, 1, 1]]), 4, axis=1)
    logits, index = jnp.asarray(np.random.default_rng(0).normal(size=(48, 16)), jnp.float32), jnp.arange(48)
    moving = knobs.of_step(cfg, 7)
    of_layer = moving._replace(key=jax.random.fold_in(moving.key, 2))
    facts = Facts(jnp.asarray(number.ravel() > 0), index, sequences=3)
    documents, moe = pools.Documents(jnp.asarray(number.ravel())), cfg.model.moe
    found = jax.jit(lambda logits: pools.document_pools(logits, documents, facts, moe, of_layer))(logits)
    key = jax.random.key(cfg.seed)
    for part in (knobs.STREAM, 7, 2, 3):  # the last: the fourth of the independent draws
        key = jax.random.fold_in(key, part)
    for row, document in sorted({*zip(np.repeat([0, 1, 2], 16), number.ravel(), strict=True)}):
        own = jax.random.fold_in(jax.random.fold_in(key, int(row)), int(document))
        size, its = int(jax.random.randint(own, (), 3, 17)), np.asarray(found)[number.ravel() == document]
        rows = np.repeat([0, 1, 2], 16)[number.ravel() == document] == row
        assert 3 <= size <= 16 and (its[rows].sum(1) == size).all() and (its[rows] == its[rows][0]).all()
    assert pools.documents_of(cfg.model.moe, number, number, training=False) is None


def test_evomoe_gets_sparser():
    """Along the ramp, on the same logits; evaluation takes the best expert with its softmax as weight."""
    logits = np.random.default_rng(0).normal(0, 0.5, (500, 8))
    slots = [routed("evomoe", logits, number).valid.sum(1).mean() for number in (0, 25, 50, 74)]
    assert slots == sorted(slots, reverse=True) and slots[0] > 7.9 and slots[-1] < 1.5
    plan = routed("evomoe", logits)
    np.testing.assert_array_equal(plan.experts, logits.argmax(1)[:, None])
    np.testing.assert_allclose(plan.weights[:, 0], special.softmax(logits, 1).max(1), rtol=1e-5)
    assert plan.valid.all()


def test_z_code_drops_anywhere():
    """What is over an expert's room is dropped, and every place of the batch is dropped equally often."""
    moe, tokens = load("z_code")[1].model.moe, 64
    logits = np.random.default_rng(0).normal(np.eye(8)[0] * 2 + np.eye(8)[1], size=(tokens, 8))
    w = ExpertWeights(*(jnp.ones(shape) for shape in ((8, 3, 4), (8, 3, 4), (8, 4, 3))))
    over = np.maximum(np.bincount(logits.argmax(1), minlength=8) - tokens // 8, 0)
    drops, steps = np.zeros(tokens), 100
    run = jax.jit(lambda plan: capacity(jnp.ones((tokens, 3)), plan, w, ExpertCompute(moe))[1])
    for number in range(steps):
        dropped = ~np.asarray(run(routed("z_code", logits, number)))[:, 0]
        np.testing.assert_array_equal(np.bincount(logits.argmax(1)[dropped], minlength=8), over)
        drops += dropped
    for expert in np.flatnonzero(over):
        assert stats.chisquare(drops[logits.argmax(1) == expert]).pvalue > 1e-3


def test_deepseek_v4_weighs_what_the_table_names():
    """√log(1 + e^z) of the four, divided by their sum, times 1.5."""
    logits, table = np.random.default_rng(0).normal(0, 3, (64, 16)), np.arange(256).reshape(64, 4) % 16
    plan = routed("deepseek_v4", logits, table=table)
    np.testing.assert_array_equal(plan.experts, table)
    scores = np.sqrt(np.log1p(np.exp(np.take_along_axis(logits, table, 1))))
    np.testing.assert_allclose(plan.weights, 1.5 * scores / scores.sum(1, keepdims=True), rtol=1e-5)


def test_cpm2_keeps_its_projection():
    """The router has neither gradient nor moment, all else has both; the expert is the best column, with the weight 1;
    random inputs use every expert."""
    cfg, mesh = toy("cpm2"), mesh_of(*MESH)
    router, state = "layers/moe/w_router", abstract_state(cfg, mesh)
    with jax.set_mesh(mesh):
        grads = jax.eval_shape(make_gradients(cfg, mesh), state.params, {}, abstract_batch(cfg, mesh), 0).grads
    assert set(flatten(state.params)) - set(flatten(grads)) == {router}
    moments = [path for path in flatten(state.opt_state) if path.endswith(tuple(flatten(state.params)))]
    assert len(moments) == 2 * len(flatten(grads)) and not any(path.endswith(router) for path in moments)
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(8192, 128)) @ rng.normal(size=(128, 8))
    plan = routed("cpm2", logits)
    np.testing.assert_array_equal(plan.experts, logits.argmax(1)[:, None])
    assert (plan.weights == 1).all() and plan.valid.all()
    assert np.abs(np.bincount(plan.experts[:, 0]) / 1024 - 1).max() < 0.4


def opened(path, w):
    """The gate of shared experts, which begins as zeros, with weights that matter."""
    gate = "shared_gate" in jax.tree_util.keystr(path)
    return jnp.sin(jnp.arange(w.size, dtype=w.dtype)).reshape(w.shape) if gate else w


@functools.cache
def ready(name: str):
    """The toy model in float32 with large random weights and biases, its compiled forward pass, and tokens for it."""
    name, _, norm = name.partition(", ")
    cfg = dataclasses.replace(toy(name).model, init_std=0.3)
    if norm:  # the option of latent_moe.py
        cfg = dataclasses.replace(cfg, moe=dataclasses.replace(cfg.moe, latent_norm=True))
    if cfg.moe.compute == "capacity":  # a loop over experts drops nothing: each has room for all tokens
        most = max(place.kind.experts for place in cfg.places if place.kind.experts)
        cfg = dataclasses.replace(cfg, moe=dataclasses.replace(cfg.moe, capacity_factor=float(most)))
    params, bias = init(cfg)
    params = jax.tree_util.tree_map_with_path(opened, params)
    rng = np.random.default_rng(1)
    begins = ("_bias", "_scale", "b_query", "b_q", "b_k", "b_v")  # as zeros and ones
    moved = lambda path, w: w + 0.1 * rng.normal(size=w.shape).astype(np.float32) if path.endswith(begins) else w
    params = nest({path: moved(path, w) for path, w in flatten(params).items()})
    slope = lambda b: b if b.dtype == jnp.int32 else jnp.linspace(-0.1, 0.1, b.size, dtype=b.dtype).reshape(b.shape)
    tokens = np.random.default_rng(0).integers(0, 40, (2, 8))
    inputs = inputs_of(tokens, segments=np.ones((2, 8), np.int32))
    return cfg, params, jax.tree.map(slope, bias), inputs, under_mesh(functools.partial(forward, cfg))


def plain_experts(moe, w, fixed, u, tokens, state=0.0, glu=plain_glu):
    """The experts of a layer, one after the other on every token: y, the state of the router, and the loads."""
    if moe.router == "mlp":
        r = w["router"]
        vector = lambda name: r[name][None, None]
        state = u @ r["w_in"] + vector("b_in") + vector("carry") * state
        h = plain_norm(state, r["norm"])
        for i in "12":
            h = jax.nn.gelu(h @ r[f"w_{i}"] + vector(f"b_{i}"), approximate=False)
    else:
        h = u
    logits = h @ w["w_router"] if "w_router" in w else jnp.zeros((*u.shape[:2], moe.router_columns))
    root = lambda z: jnp.sqrt(jnp.log1p(jnp.exp(z)))
    scores = {"softmax": jax.nn.softmax, "sigmoid": lambda z: 1 / (1 + jnp.exp(-z)), "sqrt_softplus": root}[moe.score](
        logits
    )
    ranked = scores + jnp.broadcast_to(fixed.get("router_bias", 0.0), scores.shape)
    ids = jnp.argsort(-ranked)[..., : moe.top_k]
    ids = fixed["table"][tokens] if "table" in fixed else ids
    weights = jnp.take_along_axis(scores, ids, -1) if moe.combine == "score" else jnp.ones(ids.shape)
    weights = weights / weights.sum(-1, keepdims=True) if moe.renormalize else weights
    weights = moe.routed_scaling * jnp.sum(jax.nn.one_hot(ids, moe.router_columns) * weights[..., None], 2)
    inside, y = u @ w["w_in"] if moe.latent else u, 0.0
    for e in range(moe.num_experts):
        own = {name: w[name][e] for name in ("w_gate", "w_up", "w_down") if name in w}
        y = y + weights[..., e, None] * glu(own, inside)
    y = plain_norm(y, w["latent_norm"]) if moe.latent_norm else y
    y = y @ w["w_out"] if moe.latent else y
    if moe.identity_output == "input":
        y = y + weights[..., moe.num_experts :].sum(-1, keepdims=True) * u
    if moe.num_shared_experts:
        c = (1.0, 1.0)
        if moe.shared_gate == "sigmoid":
            c = 1.0, 1 / (1 + jnp.exp(-u @ w["w_shared_gate"]))
        elif moe.shared_gate == "softmax":
            c = jnp.split(jax.nn.softmax(u @ w["w_shared_gate"] + w["b_shared_gate"][None, None]), 2, -1)
        y = c[0] * y + c[1] * glu(w["shared"], u)
    return y, state, jnp.bincount(ids.ravel(), length=moe.router_columns)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["bigmac", "latent_moe", "latent_moe, norm", "pr_moe", "deepseek_v4", "moebert", "zaya1", "olmo2", "product_key"],
)
def test_a_loop_over_the_blocks(name):
    """Hidden states, and loads of blocks with experts."""
    cfg, params, fixed, inputs, run = ready(name)
    hidden, stats = run(params, fixed, inputs)
    glu = functools.partial(plain_glu, ungated=jax.nn.gelu) if cfg.activation == "gelu" else plain_glu

    @jax.jit
    def loop(params, fixed, inputs):
        def experts(place, w, b, u, state):
            moe = dataclasses.replace(cfg.moe, num_experts=place.kind.experts)
            return plain_experts(moe, w, b, u, inputs.tokens, state, glu)

        return plain_blocks(cfg, params, fixed, inputs, experts, glu)

    want, loads = loop(*jax.tree.map(jnp.asarray, jax.device_get((params, fixed, inputs))))  # which knows of no mesh
    np.testing.assert_allclose(hidden, want, rtol=2e-4, atol=2e-4)
    found = [stats[p.path].tokens_per_expert[p.index, 0] for p in cfg.places if p.path in stats]
    assert len(found) == len(loads) == cfg.num_moe_layers
    jax.tree.map(np.testing.assert_array_equal, found, loads)


@pytest.mark.slow
def test_moebert_s_loads_are_counts_of_ids():
    """… wherever they stand, and every expert has as many ids as any other."""
    _, params, fixed, inputs, run = ready("moebert")
    tables = np.asarray(fixed["layers"]["moe"]["table"])[..., 0]
    assert tables.shape == (4, 512) and len({table.tobytes() for table in tables}) == 4
    assert all(np.ptp(np.bincount(table, minlength=4)) <= 1 for table in tables)
    for seed in (0, 1):
        moved = np.random.default_rng(seed).permutation(np.asarray(inputs.tokens).ravel()).reshape(2, 8)
        loads = run(params, fixed, inputs_of(moved, segments=np.ones((2, 8), np.int32)))[1]["layers"].tokens_per_expert
        want = [np.bincount(table[np.asarray(inputs.tokens).ravel()], minlength=4) for table in tables]
        np.testing.assert_array_equal(loads[:, 0], want)


@pytest.mark.slow
def test_zaya1_skips():
    """A layer whose skip is chosen by a bias of 10 adds exactly nothing: its experts might as well be zeros."""
    _, params, fixed, inputs, run = ready("zaya1")
    nothing = jax.tree.map(lambda w: w, params)
    nothing["layers"]["moe"]["w_down"] = jnp.zeros_like(params["layers"]["moe"]["w_down"])
    skip = jax.tree.map(lambda b: b.at[:, -1].set(10.0), fixed)
    hidden, stats = run(params, skip, inputs)
    np.testing.assert_array_equal(stats["layers"].tokens_per_expert[:, 0, -1], np.full(4, 16))
    assert not np.any(stats["layers"].dropped)
    np.testing.assert_array_equal(hidden, run(nothing, fixed, inputs)[0])
    assert np.abs(hidden - run(params, fixed, inputs)[0]).max() > 0.1


@pytest.mark.slow
def test_ling_s_head_has_rows_of_length_one():
    """Rows of any length give the loss of the same rows with the length 1, and gradients across them."""
    cfg, mesh = toy("ling"), mesh_of(1, 1, 1)
    state, batch = init_state(cfg, mesh), put_batch(batch_rows(cfg), mesh, cfg)
    run, found = jax.jit(make_gradients(cfg, mesh)), []
    for power in (0, 3):
        head = state.params["head"] * np.float32(2.0**power)
        with jax.set_mesh(mesh):
            found.append(run(state.params | {"head": head}, state.router_bias, batch, 60))
        gradient = np.asarray(found[-1].grads["head"])
        across = np.sum(gradient * np.asarray(head), 1)
        assert np.abs(across).max() < 1e-5 * np.linalg.norm(gradient, axis=1).max() * np.linalg.norm(head, axis=1).max()
    np.testing.assert_allclose(found[0].loss, found[1].loss, rtol=1e-6)
    np.testing.assert_allclose(found[1].grads["head"] * 8, found[0].grads["head"], rtol=1e-4, atol=1e-8)


@pytest.mark.slow
def test_fsmoe_sends_in_parts():
    """Loss, gradient norm and loads with two chunks are those with one; logits know the direction of a token alone."""
    numbers = []
    for chunks in (1, 2):
        cfg, mesh = toy("fsmoe"), mesh_of(*MESH)
        moe = dataclasses.replace(cfg.model.moe, exchange_chunks=chunks)
        cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, moe=moe))
        _, report = step.make_train_step(cfg, mesh)(init_state(cfg, mesh), put_batch(batch_rows(cfg), mesh, cfg))
        loads = report.router["layers"].tokens_per_expert
        numbers.append(np.concatenate([[report.loss, report.grad_norm], np.ravel(loads)]))
    np.testing.assert_allclose(numbers[1], numbers[0], rtol=1e-5)
    cfg, params, _, _, _ = ready("fsmoe")
    w = jax.device_get(block_of(params, cfg.places[1])["moe"])
    x = np.random.default_rng(0).normal(size=(64, cfg.d_model)).astype(np.float32)
    logits = [
        np.asarray(ROUTERS["cosine"].logits(w["router"] | {"w_router": w["w_router"]}, a * x, None)[0]) for a in (1, 9)
    ]
    np.testing.assert_allclose(logits[0], logits[1], rtol=1e-3, atol=1e-3)
    assert np.abs(logits[0]).max() <= 2 * (1 + 1e-5)  # the scale that training begins with


@pytest.mark.slow
def test_longcat_is_the_report_s_loop():
    """The equations of a pair of blocks, in float32: two attentions, two dense layers, and the experts between them."""
    cfg, params, fixed, inputs, run = ready("longcat")
    hidden, stats = run(params, fixed, inputs)

    @jax.jit
    def loop(params, fixed, inputs):
        x, loads = params["embed"][inputs.tokens], []
        for i in range(2):
            a, b = (block_of(params, Place(f"layers/block_{n}", i, None)) for n in (0, 1))
            h = x + plain_attention(cfg, a["attention"], plain_norm(x, a["attention_norm"]), inputs)
            u = plain_norm(h, a["mlp_norm"])
            bias = block_of(fixed, Place("layers/block_0", i, None))["moe"]
            m, _, load = plain_experts(cfg.moe, a["moe"], bias, u, inputs.tokens)
            h = h + plain_glu(a["mlp"], u)
            h = h + plain_attention(cfg, b["attention"], plain_norm(h, b["attention_norm"]), inputs)
            v = plain_norm(h, b["mlp_norm"])
            x, loads = h + plain_glu(b["mlp"], v) + m, [*loads, load]
        return plain_norm(x, params["final_norm"]), jnp.stack(loads)

    want, loads = loop(*jax.tree.map(jnp.asarray, jax.device_get((params, fixed, inputs))))  # which knows of no mesh
    np.testing.assert_allclose(hidden, want, rtol=1e-4, atol=1e-4)
    (found,) = stats.values()
    np.testing.assert_array_equal(found.tokens_per_expert[:, 0], loads)


@pytest.mark.slow
def test_quantile_makes_loads_equal():
    """On one batch again and again, of weights that do not move: the worst layer's largest load falls to the mean's."""
    cfg, mesh = toy("quantile"), mesh_of(1, 1, 1)
    assert not any(cfg.loss.load_balance_coefs.values()) and cfg.loss.bias_update == "quantile"
    cfg = dataclasses.replace(cfg, optim=dataclasses.replace(cfg.optim, lr=0.0))
    train_step, state, worst = step.make_train_step(cfg, mesh), init_state(cfg, mesh), []
    for _ in range(5):
        state, report = train_step(state, put_batch(batch_rows(cfg), mesh, cfg))
        worst.append(metrics.router_metrics(by_depth(cfg.model.places, report.router))["max_load"])
    assert worst[0] > 1.5 > 1.2 > worst[1] >= worst[-1], worst
    for bias in jax.tree.leaves(state.router_bias):
        np.testing.assert_allclose(np.mean(bias, -1), 0, atol=1e-6)
