"""Slots that do nothing: they are in no count and no choice, and cost neither rows nor memory.

No router here leaves slots unused, so these tests bring a trial one: top-p, which takes experts, at most K, until their
probabilities reach p.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_invariance import assert_same, batch_rows, run_config

from moe_jax.config import MoEConfig
from moe_jax.evaluate import analysis
from moe_jax.moe import layer, routing
from moe_jax.moe.experts import ExpertCompute, ExpertWeights
from moe_jax.moe.router_losses import expert_frequency
from moe_jax.moe.routing import Routing
from moe_jax.moe.stats import by_depth
from moe_jax.parallel import sharding
from moe_jax.train import metrics, step
from moe_jax.train.gradients import make_gradients
from moe_jax.train.state import init_state, put_batch

E, K, P = 8, 4, 0.4


def top_p(logits, bias, facts, cfg, knobs):
    """The trial router. The first expert is always taken."""
    chosen, probs = routing.route(logits, bias, facts, cfg, knobs)
    scores = routing.pick_chosen(probs, chosen.experts)
    valid = chosen.valid & (jnp.cumsum(scores, axis=-1) - scores < P)
    return Routing(chosen.experts, jnp.where(valid, scores, 0.0), valid), probs


@pytest.fixture
def trial(monkeypatch):
    """Brings the trial router, and says how many slots it uses on average."""

    def bring(slots: float):
        monkeypatch.setattr(layer, "route", top_p)
        monkeypatch.setattr(MoEConfig, "mean_slots", property(lambda self: slots))

    return bring


def trial_config(micro=1, remat="none", compute="dense", **moe):
    cfg = run_config(micro, remat, compute)
    routed = dataclasses.replace(cfg.model.moe, num_experts=E, top_k=K, selection_bias=False, **moe)
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, moe=routed))


@functools.cache
def started(shape):
    mesh = sharding.make_mesh(shape, jax.devices()[: int(np.prod(shape))])
    return mesh, init_state(trial_config(), mesh)


def found(shape, cfg):
    mesh, state = started(shape)
    with jax.set_mesh(mesh):
        batch = put_batch(batch_rows(0.25), mesh, cfg)
        return jax.device_get(jax.jit(make_gradients(cfg, mesh))(state.params, state.router_bias, batch, 0))


@pytest.mark.slow  # test_routers_models.py has a router that leaves slots unused in the fast part
def test_the_batch_is_the_same_on_a_mesh_and_f_is_a_share(trial):
    """… with half of the rows computed at first, and fewer than the router uses in the first pass."""
    trial(1.0)
    want = found((1, 1, 1), trial_config())
    assert_same(found((2, 2, 2), trial_config(2, "full", "grouped", room=0.5))._asdict(), want._asdict())
    (stats,) = want.sums.router.values()
    made = stats.tokens_per_expert.sum(-1)
    assert (made < 0.8 * K * stats.tokens).all() and (made >= stats.tokens).all()
    np.testing.assert_allclose(expert_frequency(stats.tokens_per_expert).sum(-1), 1, rtol=1e-6)
    f, p = stats.tokens_per_expert / made[..., None], stats.prob_per_expert / stats.tokens[..., None]
    balance = np.mean(E * (f.astype(np.float64) * p).sum(-1))
    np.testing.assert_allclose(want.parts.router["load_balance"], 0.5 * balance, rtol=1e-5)
    row = metrics.router_metrics(by_depth(trial_config().model.places, want.sums.router))
    np.testing.assert_allclose(row["experts_per_token"], np.mean(made.sum(1) / stats.tokens.sum(1)), rtol=1e-6)


def test_no_assignment_is_no_share():
    np.testing.assert_array_equal(expert_frequency(jnp.zeros((2, 3))), np.zeros((2, 3)))


def test_choices_and_pairs_are_those_that_were_made(trial):
    trial(2.0)
    cfg = trial_config(compute="grouped")
    mesh, state = started((1, 1, 1))
    rows = batch_rows(0.25) | {"domain_ids": np.arange(32, dtype=np.int32)[:, None] % 2 * np.ones((1, 8), np.int32)}
    batch = put_batch(rows, mesh, cfg, by_domain=True)
    earlier = (state.params, state.router_bias)
    sums = jax.device_get(step.make_eval_step(cfg, mesh, 2, record=True)(*earlier, batch, earlier))
    (stats,), (choices,) = sums.router.values(), sums.choices.values()
    np.testing.assert_array_equal(np.diagonal(choices.pairs, 0, 1, 2), stats.tokens_per_expert.sum(1))
    np.testing.assert_array_equal(choices.kept, stats.tokens_per_expert.sum(-1))
    assert stats.tokens_per_expert.sum() < 0.8 * K * stats.tokens.sum()
    one = analysis.analyse(cfg.model.places, sums.router, sums.choices, ("a", "b"), K)[""]
    np.testing.assert_array_equal(one.saturation, np.ones((2, 2)))
    np.testing.assert_allclose(one.selection_frequency.sum(-1), stats.tokens_per_expert.sum(-1) / stats.tokens)
    assert np.nanmax(one.coactivation) <= 1 and np.nanmin(one.topk_score) < 1


@pytest.mark.slow
def test_unused_slots_cost_no_memory():
    """The buffers of a layer's gradient: eight slots of which one is used need little more than one slot."""
    tokens, d, f = 2048, 64, 64
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(tokens, d)), jnp.float32)
    w = ExpertWeights(*(jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((E, d, f), (E, d, f), (E, f, d))))
    ids = jnp.asarray(np.argsort(rng.random((tokens, E)), -1), jnp.int32)

    def bytes_of(slots: int, fill: float) -> tuple[int, jax.Array]:
        used = jnp.arange(slots)[None] == 0
        chosen = Routing(ids[:, :slots], jnp.ones((tokens, slots)), jnp.broadcast_to(used, (tokens, slots)))
        compute = ExpertCompute(MoEConfig(num_experts=E, top_k=slots), fill=fill)
        gradient = jax.grad(lambda x, w: jnp.sum(jnp.sin(compute(x, chosen, w)[0])), (0, 1))
        compiled = jax.jit(gradient).lower(x, w).compile()
        return compiled.memory_analysis().temp_size_in_bytes, compiled(x, w)

    (one, want), (all_rows, same), (filled, got) = bytes_of(1, 1.0), bytes_of(8, 1.0), bytes_of(8, 1 / 8)
    for a, b, c in zip(*map(jax.tree.leaves, (want, same, got)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(a, c, rtol=1e-5, atol=1e-4)
    assert filled < 2 * one and all_rows > 3 * filled, (one, filled, all_rows)
