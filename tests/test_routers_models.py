"""Whole models with each kind of router: on meshes, in evaluation and samples; and what identity experts cost.

A layer's routing against NumPy is in test_routers.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from test_invariance import assert_same, run_config
from test_model import forward, inputs_of, under_mesh
from test_routers import SHAPES, normal

from moe_jax.config import ExploreConfig, ModelConfig, MoEConfig
from moe_jax.config.layers import Kind
from moe_jax.errors import ConfigError
from moe_jax.evaluate.generate import generate
from moe_jax.moe import exchange
from moe_jax.moe.layer import MoE, TokenInfo
from moe_jax.moe.program import Program
from moe_jax.moe.stats import RouterStats
from moe_jax.nn.layers import Init
from moe_jax.parallel import sharding
from moe_jax.train import knobs, losses, metrics, step
from moe_jax.train.losses import BatchSums
from moe_jax.train.state import abstract_batch, abstract_state
from moe_jax.tree import flatten
from tests.routed_models import MODELS, everything, oracle, routers_config, state_on


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


# --- the whole batch, on meshes ---------------------------------------------------------------------------------------


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
    """The compiled all-to-all sends nothing where all choices are identity experts, else rows to the devices of the
    real ones."""
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


def test_the_step_draws_only_where_something_moves():
    """A model without noise numbers no tokens."""
    assert not knobs.draws_noise(run_config())
    assert knobs.draws_noise(routers_config("cosine"))
