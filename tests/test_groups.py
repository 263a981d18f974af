"""Groups of parameters: factors beside an optimizer for each leaf, frozen parameters beside gradients by hand.

The averages of the weights are in test_average.py.
"""

import collections
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.interpreters import partial_eval

from moe_jax import config, model, optim
from moe_jax.aot import compile_only
from moe_jax.config import GroupConfig
from moe_jax.nn import qk_clip
from moe_jax.optim import groups, muon
from moe_jax.parallel import sharding
from moe_jax.train import step
from moe_jax.train.gradients import make_gradients
from moe_jax.train.state import abstract_batch, abstract_state, init_state, put_batch
from moe_jax.tree import flatten, nest
from tests.test_unused import equations, inner

ONE, MESH = (1, 1, 1), (2, 2, 2)
E, D, F = 4, 16, 24
FACTORS = {
    "embedding": GroupConfig("^embed$", weight_decay=0.0),
    "attention": GroupConfig("attention/w_", lr=0.5),
    "queries": GroupConfig("/w_q$", lr=0.3, weight_decay=2.0),  # also in the one above
    "norms": GroupConfig("norm$", weight_decay=0.0),
    "router": GroupConfig("/moe/w_router$", lr=3.0, start=2),  # one of the three updates
    "late": GroupConfig("/moe/w_(router|up)$", start=1),
}
EXPERTS = {"experts": GroupConfig("/moe/w_(gate|up|down)$", freeze=True)}
FROZEN = {
    **EXPERTS,
    "router": GroupConfig("/moe/w_router$", freeze=True),
    "embedding": GroupConfig("^embed$", freeze=True),
    "queries": GroupConfig("/w_q$", lr=0.5),
}


def run_config(of: dict[str, GroupConfig] | None = None, micro=1, remat="none", **optimizer) -> config.RunConfig:
    c = config.default_config()
    c.model.update(vocab_size=64, d_model=D, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, remat=remat)
    c.model.update(compute_dtype="float32")
    c.model.moe.update(num_experts=E, top_k=2, d_expert=F, selection_bias=True)
    c.loss.update(bias_update_rate=1e-2)
    c.optim.update(lr=1e-2, warmup_steps=2, newton_schulz_dtype="float32", **optimizer)
    c.data.update(batch_size=16, seq_len=16)
    c.data.tokenizer.update(kind="huggingface", path="none")
    c.train.update(steps=40, micro_batches=micro)
    cfg = config.build(c)
    return dataclasses.replace(cfg, optim=dataclasses.replace(cfg.optim, groups=of or {}))


def mesh_of(shape):
    return sharding.make_mesh(shape, jax.devices()[: int(np.prod(shape))])


def rows_of(number: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(number)
    tokens, shape = rng.integers(0, 64, (16, 17)).astype(np.int32), (16, 16)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": rng.random(shape, np.float32),
            "segment_ids": np.ones(shape, np.int32), "positions": np.tile(np.arange(16, dtype=np.int32), (16, 1)),
            "sequence_ids": np.arange(16, dtype=np.int32)}  # fmt: skip


@functools.cache
def initial() -> dict:
    """A fresh state on the host, with a selection bias that is not zero."""
    state = jax.device_get(init_state(run_config(), mesh_of(ONE)))
    bias = jax.tree.map(lambda b: np.linspace(-0.1, 0.1, b.size, dtype=np.float32).reshape(b.shape), state.router_bias)
    return {"params": state.params, "router_bias": bias}


def state_of(cfg, mesh):
    """The state of `initial` for another config and mesh."""
    like = abstract_state(cfg, mesh)
    put = lambda tree, to: jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), tree, to)
    return init_state(
        cfg, mesh, (put(initial()["params"], like.params), put(initial()["router_bias"], like.router_bias))
    )


def assert_close(got, want, rtol=2e-5):
    got, want = flatten(jax.device_get(got)), flatten(jax.device_get(want))
    assert set(got) == set(want)
    for path, x in want.items():
        np.testing.assert_allclose(got[path], x, rtol=0, atol=rtol * np.abs(x).max() + 1e-9, err_msg=path)


# --- factors ---------------------------------------------------------------------------------------------------------


def gaussians(number: int, shapes: dict) -> dict:
    rng = np.random.default_rng(number)
    return nest({path: jnp.asarray(rng.normal(size=x.shape), jnp.float32) for path, x in flatten(shapes).items()})


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_factors_are_those_of_an_optimizer_for_each_leaf(name):
    """Three updates; optax' partition over the leaves, each with the optimizer that has its products of factors."""
    cfg = run_config(FACTORS, name=name, cautious_decay=name == "muon").optim
    shapes = model.abstract(run_config().model).shapes
    of_leaf, rate = {}, optim.schedule(cfg, 40)
    for path, label in flatten(optim.label_params(shapes)).items():
        lr = lambda count, path=path: rate(count) * groups.factor(cfg, "lr", path) * (count >= groups.start(cfg, path))
        decay = cfg.weight_decay * groups.factor(cfg, "weight_decay", path)
        if optim.owners(cfg)[label] == "muon":
            leaf = muon.muon(lr, weight_decay=decay, cautious_decay=True, dtype=jnp.dtype("float32"),
                             matrices=optim.matrices_of(cfg))  # fmt: skip
        else:
            leaf = optax.adamw(lr, cfg.beta1, cfg.beta2, cfg.eps, weight_decay=decay)
        of_leaf[path] = leaf
    paths = nest({path: path for path in flatten(shapes)})
    want = optax.chain(optax.clip_by_global_norm(cfg.clip_norm), optax.partition(of_leaf, paths))
    assert groups.factor(cfg, "lr", "layers/attention/w_q") == 0.15
    assert groups.factor(cfg, "weight_decay", "layers/attention/w_q") == 2
    assert [groups.start(cfg, f"layers/moe/w_{name}") for name in ("router", "up", "down")] == [2, 1, 0]

    found = []
    for tx in (optim.make_optimizer(cfg, 40), want):
        params = gaussians(0, shapes)
        state, update = tx.init(params), jax.jit(tx.update)
        for number in (1, 2, 3):
            updates, state = update(gaussians(number, shapes), state, params)
            params = optax.apply_updates(params, updates)
        found.append((params, updates))
    assert_close(found[0][0], found[1][0])
    assert_close(found[0][1], found[1][1])


def traced_update(cfg, mesh):
    state = abstract_state(cfg, mesh)
    tx = optim.make_optimizer(cfg.optim, 40)
    with jax.set_mesh(mesh):
        return equations(jax.make_jaxpr(tx.update)(state.params, state.opt_state, state.params), collections.Counter())


def test_factors_of_one_are_no_equation_and_others_no_exchange():
    """Muon's all-to-alls and all-gathers are those without groups: its groups of matrices stay whole."""
    mesh, neutral = mesh_of(MESH), {"all": GroupConfig("."), "some": GroupConfig("w_")}
    plain = traced_update(run_config(), mesh)
    assert traced_update(run_config(neutral), mesh) == plain
    scaled = traced_update(run_config(FACTORS), mesh)
    kinds = ("all_to_all", "all_gather", "psum", "pmax", "shard_map", "ragged")
    sent = [{line: n for line, n in found.items() if line.startswith(kinds)} for found in (plain, scaled)]
    assert sent[0] == sent[1] and scaled != plain
    assert sum(n for line, n in sent[0].items() if line.startswith("all_to_all")) >= 4
    like = lambda cfg: jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), abstract_state(cfg, mesh))
    assert like(run_config(FACTORS)) == like(run_config())


# --- frozen parameters -----------------------------------------------------------------------------------------------


def gradients_of(cfg, shape):
    mesh = mesh_of(shape)
    state = state_of(cfg, mesh)
    with jax.set_mesh(mesh):
        return jax.device_get(
            jax.jit(make_gradients(cfg, mesh))(state.params, state.router_bias, put_batch(rows_of(1), mesh, cfg), 0)
        )


@functools.cache
def whole():
    return gradients_of(run_config(), ONE)


FAST = (ONE, 1, "none")
SLOW = [(MESH, 2, "full"), ((8, 1, 1), 1, "selective"), ((1, 2, 4), 1, "none")]


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "micro", "remat"), [FAST, *SLOW])
def test_gradients_of_the_others_do_not_change(shape, micro, remat):
    cfg = run_config(FROZEN, micro, remat)
    got, want = gradients_of(cfg, shape), whole()
    frozen = optim.frozen_paths(cfg.optim, flatten(want.grads))
    assert sorted(frozen) == ["embed"] + [f"layers/moe/{name}" for name in ("w_down", "w_gate", "w_router", "w_up")]
    np.testing.assert_allclose(got.loss, want.loss, rtol=1e-6)
    assert_close(got.grads, groups.split(want.grads, frozen)[0])


def products(program, found: collections.Counter) -> collections.Counter:
    """The shapes of results of products and of sums over devices, in a program and in those inside it."""
    for equation in getattr(program, "jaxpr", program).eqns:
        if re.match("dot_general|ragged_dot|psum|reduce_scatter", equation.primitive.name):
            found.update((equation.primitive.name, x.aval.shape) for x in equation.outvars)
        for value in equation.params.values():
            for one in inner(value):
                products(one, found)
    return found


def traced_gradients(cfg, shape) -> collections.Counter:
    """Without what nothing uses, as JAX lowers it."""
    mesh = mesh_of(shape)
    state = abstract_state(cfg, mesh)
    with jax.set_mesh(mesh):
        made = jax.make_jaxpr(make_gradients(cfg, mesh))(state.params, state.router_bias, abstract_batch(cfg, mesh), 0)
    used, _ = partial_eval.dce_jaxpr(made.jaxpr, [True] * len(made.jaxpr.outvars))
    return products(used, collections.Counter())


@pytest.mark.slow
@pytest.mark.parametrize("shape", [ONE, MESH])
def test_gradients_of_frozen_experts_are_neither_computed_nor_reduced(shape):
    """Products of the trace are at most those of all parameters. Some that nothing uses are left where devices share
    experts, in the loop of further passes; XLA removes them, and newer versions of JAX before it."""
    every, rest = (traced_gradients(run_config(of, 2, "full"), shape) for of in ({}, EXPERTS))
    assert not rest - every
    of_experts = lambda found, dots: sum(
        n for (kind, s), n in found.items() if (kind == "dot_general") == dots and s[-2:] in ((D, F), (F, D))
    )
    loops = 0 if shape == ONE else 3
    assert of_experts(every, True) == 3 + loops and of_experts(rest, True) in (0, loops)
    assert of_experts(every, False) == 6 and of_experts(rest, False) == 0


@pytest.mark.slow
@pytest.mark.parametrize("shape", [ONE, MESH])
def test_the_compiled_step_has_no_gradient_of_frozen_experts(shape):
    """XLA's own count: of the step's products none has the shape of an expert's matrices."""
    mesh, found = mesh_of(shape), []
    for of in ({}, EXPERTS):
        cfg = run_config(of, remat="full")
        compiled = compile_only.compile_step(cfg, mesh)
        # The new state takes the place of the old one, frozen parameters included.
        held = compile_only.bytes_of_device(abstract_state(cfg, mesh))
        assert compiled.memory_analysis().alias_size_in_bytes == held
        text = compiled.as_text()
        found.append(len(re.findall(rf"= f32\[(?:\d+,)*(?:{D},{F}|{F},{D})\]\S* dot\(", text)))
    assert found[0] >= 3 and found[1] == 0


@functools.cache
def trained(shape, micro, remat):
    """The states before, after three steps and after 20, and the first three reports."""
    cfg, mesh = run_config(FROZEN, micro, remat), mesh_of(shape)
    state, reports = state_of(cfg, mesh), []
    before = jax.device_get(state)
    train_step = step.make_train_step(cfg, mesh)
    for number in range(1, 21):
        state, report = train_step(state, put_batch(rows_of(number), mesh, cfg))
        reports.append(jax.device_get(report))
        if number == 3:
            third = jax.device_get(state)
    return before, third, jax.device_get(state), reports[:3]


@pytest.mark.parametrize("case", [FAST, pytest.param(SLOW[0], marks=pytest.mark.slow)])
def test_frozen_bits_stay(case):
    before, _, after, _ = trained(*case)
    frozen = optim.frozen_paths(run_config(FROZEN).optim, flatten(before.params))
    for path, w in flatten(after.params).items():
        assert (w.tobytes() == flatten(before.params)[path].tobytes()) == (path in frozen), path
    # A frozen router keeps its selection bias too.
    assert_close(after.router_bias, before.router_bias, 0.0)


@pytest.mark.slow
def test_training_with_frozen_parameters_does_not_depend_on_the_mesh():
    (_, one, _, reports), (_, other, _, others) = trained(*FAST), trained(*SLOW[0])
    assert_close(other.params, one.params, 1e-4)
    for a, b in zip(reports, others, strict=True):
        np.testing.assert_allclose([b.loss, b.grad_norm], [a.loss, a.grad_norm], rtol=1e-4)


def test_moments_are_not_there():
    """Neither in the state nor in what a checkpoint keeps; the plan counts what is there."""
    *_, after, _ = trained(*FAST)
    names = [path for path in flatten(after.opt_state) if re.search(r"/(mu|nu|momentum)/", path)]
    cfg = run_config(FROZEN)
    frozen = optim.frozen_paths(cfg.optim, flatten(after.params))
    assert not [name for name in names if name.endswith(tuple(frozen))]
    assert len({re.split(r"/(?:mu|nu|momentum)/", name)[1] for name in names}) == len(flatten(after.params)) - len(
        frozen
    )
    for shape in (ONE, MESH):
        mesh = mesh_of(shape)
        held = [x for x in jax.tree.leaves(abstract_state(cfg, mesh).opt_state) if x.ndim]
        plan = optim.muon_plan(cfg.optim, model.abstract(cfg.model), dict(mesh.shape))
        assert plan.state_bytes == compile_only.bytes_of_device(held)
        assert not [leaf for row in plan.rows for leaf in row.leaves if leaf in frozen]


def test_the_bias_of_a_router_moves_unless_all_of_it_is_frozen():
    params, bias = initial()["params"], initial()["router_bias"]
    frozen = frozenset({"layers/moe/w_router"})
    assert groups.fixed_biases(frozen, params, bias) == {"layers/moe/router_bias"}
    assert groups.fixed_biases(frozenset({"embed"}), params, bias) == frozenset()
    mlp = {"layers": {"moe": {"router": {"w_in": 0, "w_1": 0}, "w_up": 0}}}
    assert not groups.fixed_biases(frozenset({"layers/moe/router/w_in"}), mlp, bias)
    assert groups.fixed_biases(frozenset({"layers/moe/router/w_in", "layers/moe/router/w_1"}), mlp, bias)


def test_a_frozen_query_is_not_clipped():
    """Nor are the keys of its layer; the others are, and are counted."""
    w = {"w_q": jnp.ones((2, 4, 8)), "w_k": jnp.ones((2, 4, 8))}
    params = {"a": {"attention": w}, "b": {"attention": w}}
    maxima = qk_clip.Maxima({"a": jnp.full((2, 2), 9.0), "b": jnp.full((2, 2), 9.0)})
    new, logged = qk_clip.clip(params, maxima, 1.0, frozenset({"a/attention/w_q"}))
    assert (new["a"]["attention"]["w_k"] == 1).all() and (new["b"]["attention"]["w_q"] < 1).all()
    assert logged["clipped_heads"] == 4 and logged["max_logit"] == 9
    assert qk_clip.clip(params, maxima, 1.0)[1]["clipped_heads"] == 8


# --- what is printed and counted -------------------------------------------------------------------------------------


def test_the_plan_names_the_groups():
    cfg = run_config(FROZEN | {"also": GroupConfig("^embed$|/w_v$", lr=0.5)}, ema=0.99)
    text = optim.describe(cfg.optim, model.abstract(cfg.model), {"data": 1, "fsdp": 1, "expert": 1}, 8)
    experts, router, table = 2 * 3 * E * D * F, 2 * D * E, 64 * D
    assert f"; frozen: {experts + router + table:,} parameters" in text
    assert f"group experts: {experts:,} parameters in 3 tensors, frozen" in text
    assert "group queries: 512 parameters in 1 tensor, learning rate × 0.5\n" in text
    values = 2 * D * 8
    assert (
        f"group also: {table + values:,} parameters in 2 tensors, learning rate × 0.5; {table:,} of them frozen\n"
        in text
    )
    total = model.count_parameters(cfg.model).total
    assert f"average of the weights: decay 0.99, {total - experts - router - table:,} parameters in float32" in text


def test_a_report_counts_what_is_there():
    """Moments and the average from the state itself; gradients by the share of parameters that is trained."""
    cfg = run_config(EXPERTS, ema=0.9)
    memory = {"parameters": 100.0, "moments": 50.0, compile_only.AVERAGE: 25.0, "rest": 7.0}
    report = compile_only.Report("v5e:2x2", {"data": 1, "fsdp": 4, "expert": 1}, True, memory, 16.0, 1.0, [], "")
    total, frozen = model.count_parameters(cfg.model).total, 2 * 3 * E * D * F
    assert compile_only.bytes_of_state(cfg, report) == (175, pytest.approx(100 * (1 - frozen / total)))
    assert compile_only.bytes_of_state(run_config(), report) == (175, 100)


def test_frozen_weights_have_no_gradient_in_the_flops():
    cfg, active = run_config(), 2 * 3 * 2 * D * F  # two layers, two experts a token
    frozen = optim.frozen_paths(run_config(EXPERTS).optim, flatten(model.abstract(cfg.model).shapes))
    flops = lambda *frozen: model.flops_per_token(cfg.model, 16, *frozen)
    assert flops() - flops(frozen) == 2 * active and flops() == flops(frozenset())


def test_below_the_first_trained_stack_there_is_only_the_forward_pass():
    """A dense stack and one with experts: the dense one is frozen, or all but the head, or the tied embedding."""
    cfg = dataclasses.replace(run_config().model, num_dense_layers=1, num_layers=3, d_ff=20)
    paths = flatten(model.abstract(cfg).shapes)
    without = lambda *kept: frozenset(path for path in paths if not path.startswith(kept))
    attention, heads = D * (2 * 8 + 2 * 8) + 2 * 8 * D, 3.0 * 16 * 2 * (8 + 8)
    one, experts, head = attention + 3 * D * 20, 2 * (attention + D * E + 2 * 3 * D * F), 64 * D
    flops = lambda frozen: model.flops_per_token(cfg, 16, frozen)
    assert flops(frozenset()) == 6 * (one + experts + head) + 3 * heads
    (lower, upper) = (stack.name for stack in cfg.stacks)
    assert flops(without(f"{upper}/", "final_norm", "head")) == 2 * one + 6 * (experts + head) + (1 / 3 + 2) * heads
    assert (
        flops(without(f"{upper}/moe/w_router")) == 2 * one + 4 * (experts + head) + 2 * 2 * D * E + (1 / 3 + 2) * heads
    )
    assert flops(without("head")) == 2 * (one + experts) + 6 * head + heads
    assert flops(without("embed")) == 4 * (one + experts + head) + 3 * heads
    assert lower != upper
