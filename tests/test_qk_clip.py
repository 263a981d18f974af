"""QK-clip: the largest attention logit of every head against numpy, and what the step does to heads above τ."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_invariance import batch_rows, run_config

from moe_jax import config, model
from moe_jax.errors import ConfigError
from moe_jax.moe.program import Program
from moe_jax.nn import qk_clip
from moe_jax.nn.qk_clip import Maxima, max_logits
from moe_jax.parallel import sharding
from moe_jax.train import metrics, step
from moe_jax.train.gradients import _sum_over, forward
from moe_jax.train.state import Batch, abstract_batch, abstract_state, init_state, put_batch
from tests.pairs import covering

N, M, H, PADDING = 4, 2, 4, 0.25
ONE, MANY = (1, 1, 1), (2, 2, 2)


# --- the maxima ------------------------------------------------------------------------------------------------------


def plain_max(q, k, segments, counted):
    """One pair at a time, in float64."""
    b, s, n, h = q.shape
    out = np.full((b, n), -np.inf)
    for row, head, i in np.ndindex(b, n, s):
        for j in range(i + 1):
            if counted[row, i] and (segments is None or segments[row, i] == segments[row, j]):
                logit = q[row, i, head].astype(float) @ k[row, j, head // (n // k.shape[2])].astype(float) / h**0.5
                out[row, head] = max(out[row, head], logit)
    return out


@pytest.mark.parametrize("block", [512, 4, 3])  # one block; blocks that divide the sequence, that do not
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("segmented", [True, False])
def test_max_logits_against_numpy(block, kv_heads, segmented, monkeypatch):
    monkeypatch.setattr(qk_clip, "BLOCK", block)
    rng = np.random.default_rng(0)
    b, s = 8, 8
    q = rng.normal(size=(b, s, 4, 6)).astype(np.float32)
    k = rng.normal(size=(b, s, kv_heads, 6)).astype(np.float32)
    segments = np.int32([[1, 1, 1, 2, 2, 2, 0, 0]] * b)
    segments[1], segments[2] = 0, 1  # nothing but padding; one document
    counted = segments > 0
    # Whatever may not be seen is larger: padded queries, and the keys of what is later or of another document.
    q[:, 6:], k[:, 0] = 10 * q[:, 6:], 10 * k[:, 0]
    k[:, 5] *= 10
    want = plain_max(q, k, segments if segmented else None, counted)
    assert (want[1] == -np.inf).all() and (want[[0, 2]] > 0).all()
    for shape in (ONE, MANY):
        mesh = mesh_of(shape)
        put = functools.partial(jax.device_put, device=sharding.batch_sharding(mesh))
        with jax.set_mesh(mesh):
            args = (put(q), put(k), put(segments) if segmented else None, put(counted))
            got = jax.jit(lambda *a: max_logits(*a))(*args)
        np.testing.assert_allclose(got, want, rtol=1e-5)


def run_with(micro=1, accumulation="exact", remat="none", **optim) -> config.RunConfig:
    base = run_config(micro, remat)
    change = dataclasses.replace
    return change(
        base,
        model=change(base.model, qk_norm=False),
        loss=change(base.loss, accumulation=accumulation),
        optim=change(base.optim, name="adamw", **optim),
    )


def mesh_of(shape):
    return sharding.make_mesh(shape, jax.devices()[: int(np.prod(shape))])


@functools.cache
def state_of(shape):
    """A fresh state without QK-norm, with heads of unlike sizes; the same values on every mesh."""
    mesh = mesh_of(shape)
    if shape != ONE:
        shardings = jax.tree.map(lambda x: x.sharding, abstract_state(run_with(), mesh))
        return mesh, jax.device_put(jax.device_get(state_of(ONE)[1]), shardings)
    state = init_state(run_with(), mesh)
    sizes = np.repeat(np.float32([0.5, 1.0, 1.5, 3.0]), H)
    for stack in ("dense_layers", "layers"):
        state.params[stack]["attention"]["w_q"] *= sizes[None, None]
    return mesh, state


def maxima(params) -> dict[str, np.ndarray]:
    """[L, N] by stack, of the batch of these tests with any parameters, on one device."""
    mesh, state = state_of(ONE)
    with jax.set_mesh(mesh):
        batch = put_batch(batch_rows(PADDING), mesh, run_with())
        return jax.device_get(_maxima(params, state.router_bias, batch))


@jax.jit
def _maxima(params, bias, batch):
    graph = model.abstract(run_with().model, Program(max_logit=True))
    return forward(graph, params, bias, batch)[0].max_logit


@functools.cache
def threshold() -> float:
    """Between the groups' maxima: about half of the heads exceed it, and in one group only one head does."""
    return float(
        np.median(np.concatenate([largest(top)[:, ::2].ravel() for top in maxima(state_of(ONE)[1].params).values()]))
    )


def largest(top):
    """[L, N] → [L, N]: the maximum over the heads that share keys."""
    return np.repeat(top.reshape(-1, M, N // M).max(-1), N // M, axis=1)


@functools.cache
def after(shape=ONE, **how):
    """(state, aux) after one step, on the host."""
    mesh, state = state_of(shape)
    cfg = run_with(**how)
    train_step = step.make_train_step(cfg, mesh)
    return jax.device_get(train_step(jax.tree.map(jnp.copy, state), put_batch(batch_rows(PADDING), mesh, cfg)))


FULL = covering([(shape, a, how) for shape in (ONE, MANY) for a in (1, 2, 4) for how in ("exact", "running")[:a]])


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "micro", "accumulation"), FULL)
def test_the_same_on_every_mesh_and_for_any_micro_batches(shape, micro, accumulation):
    """The maxima of the optimizer batch, and with exact accumulation the parameters after the step."""
    state, aux = after(shape, micro=micro, accumulation=accumulation, qk_clip=threshold())
    want = np.concatenate(list(maxima(state_of(ONE)[1].params).values()))
    np.testing.assert_allclose(aux.clipping["max_logit"], want.max(), rtol=1e-5)
    assert aux.clipping["clipped_heads"] == (want > threshold()).sum() and 3 <= aux.clipping["clipped_heads"] <= 9
    if accumulation == "exact":
        for a, b in zip(*(jax.tree.leaves(s.params) for s in (state, after(qk_clip=threshold())[0])), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max())


def test_maxima_below_zero_survive_micro_batches():
    """Two micro-batches: the larger of two negative numbers, beside a sum."""
    micro = Batch(*[jnp.float32([-3, -2])] * 6)
    total, top = _sum_over(lambda _, part: (part.tokens, Maxima({"layers": part.tokens[None, None]})), micro)
    assert total == -5 and top.logit["layers"].tolist() == [[-2]]


# --- the step --------------------------------------------------------------------------------------------------------


def attention_of(params):
    return [(stack, i, params[stack]["attention"]) for stack in ("dense_layers", "layers")
            for i in range(len(params[stack]["attention"]["w_q"]))]  # fmt: skip


@pytest.mark.slow
def test_after_the_step_no_logit_of_the_batch_is_above_the_threshold():
    """Learning rate 0: only the clipping acts. Each layer with the inputs it had: the other layers stay unclipped."""
    before = state_of(ONE)[1].params
    top, tau = maxima(before), threshold()
    new = after(lr=0.0, qk_clip=tau)[0].params
    np.testing.assert_array_equal(jax.tree.leaves(after(lr=0.0)[0].params)[0], jax.tree.leaves(before)[0])
    clipped = 0
    for stack, i, w in attention_of(new):
        one = lambda old, new, i=i: jnp.asarray(old).at[i].set(new[i])
        changed = {**before[stack], "attention": jax.tree.map(one, before[stack]["attention"], w)}
        got, was = maxima({**before, stack: changed})[stack][i], top[stack][i]
        group = largest(was)[0]
        assert (got <= tau * (1 + 1e-5)).all()
        np.testing.assert_allclose(got, was * np.minimum(1, tau / group), rtol=1e-4)
        for name in ("w_q", "w_k"):
            kept = np.repeat(group <= tau, w[name].shape[-1] // N) if name == "w_q" else np.repeat(
                (group <= tau)[:: N // M], w[name].shape[-1] // M)  # fmt: skip
            old = np.asarray(before[stack]["attention"][name][i])
            np.testing.assert_array_equal(w[name][i][:, kept], old[:, kept])
            assert (w[name][i][:, ~kept] != old[:, ~kept]).all()
            clipped += (~kept).sum()
    assert 0 < clipped < sum(w["w_q"][0].shape[-1] + w["w_k"][0].shape[-1] for _, _, w in attention_of(new))
    for path, a in jax.tree_util.tree_leaves_with_path(new):
        if "w_q" not in str(path) and "w_k" not in str(path):
            b = functools.reduce(lambda tree, key: tree[key.key], path, before)
            np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


@pytest.mark.slow
def test_clipping_comes_after_the_update_and_leaves_the_momentum():
    """What the step without it gives, times √γ with γ from the step's own forward pass."""
    (plain, off), (clipped, on) = after(), after(qk_clip=threshold())
    assert off.clipping is None
    np.testing.assert_allclose(on.loss, off.loss, rtol=1e-6)
    top = maxima(state_of(ONE)[1].params)
    for (stack, i, a), (_, _, b) in zip(attention_of(clipped.params), attention_of(plain.params), strict=True):
        root = np.sqrt(np.minimum(1, threshold() / largest(top[stack][i])[0]))
        np.testing.assert_allclose(a["w_q"][i], b["w_q"][i] * np.repeat(root, H), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(a["w_k"][i], b["w_k"][i] * np.repeat(root[:: N // M], H), rtol=1e-4, atol=1e-6)
        scale = np.abs(b["w_o"][i]).max()  # rounding of two programs does not shrink with a single entry
        np.testing.assert_allclose(a["w_o"][i], b["w_o"][i], rtol=0, atol=2e-6 * scale)
    for a, b in zip(jax.tree.leaves(clipped.opt_state), jax.tree.leaves(plain.opt_state), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(("micro", "remat"), [pytest.param(1, "full", marks=pytest.mark.slow), (2, "none")])
def test_work(micro, remat):
    """Switched off, it adds nothing; switched on, one product in each of the two loops over layers."""

    def products(**how):
        cfg = run_with(micro, remat=remat, **how)
        mesh = mesh_of(ONE)
        with jax.set_mesh(mesh):
            shapes = abstract_state(cfg, mesh), abstract_batch(cfg, mesh)
            traced = step.make_train_step(cfg, mesh).__wrapped__.trace(*shapes)
        return str(traced.jaxpr).count("dot_general["), str(traced.jaxpr).count("reduce_max")

    off, on = products(), products(qk_clip=1.0)
    assert on[0] == off[0] + 2 and on[1] > off[1]


# --- what users see --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_logged():
    rates = dict(tokens=1, tokens_per_second=1, step_seconds=1, flops_per_token=1, peak=1)
    row = metrics.train_metrics(1, after(qk_clip=threshold())[1], router={}, **rates)
    at = list(row).index("lr")
    assert list(row)[at + 1 : at + 3] == ["max_logit", "clipped_heads"]
    assert all(type(row[name]) is float for name in ("max_logit", "clipped_heads"))
    assert "max_logit" not in metrics.train_metrics(1, after()[1], router={}, **rates)


def test_refused_with_qk_norm():
    c = config.default_config()
    c.optim.qk_clip = 100.0
    config.build(c)
    c.model.qk_norm = True
    with pytest.raises(ConfigError, match=r"config.optim.qk_clip=100.0: has no effect with model.qk_norm=True"):
        config.build(c)
