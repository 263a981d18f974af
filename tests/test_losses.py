"""Losses against closed forms in float64: values and gradients."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.config import LossConfig, MoEConfig, RouterLossConfig
from moe_jax.moe import routing
from moe_jax.moe.router_losses import load_balancing_loss
from moe_jax.moe.routing import Facts
from moe_jax.moe.stats import RouterStats, router_stats
from moe_jax.parallel import axes, sharding
from moe_jax.train import cross_entropy, losses
from moe_jax.train.cross_entropy import summed_nll, token_nll
from moe_jax.train.losses import BatchSums, total_loss


def stats_of(load_GE, prob_GE, top_k):
    """Statistics of one layer from sums by group and expert."""
    load_GE, prob_GE = np.float32(load_GE), np.float32(prob_GE)
    tokens_G = load_GE.sum(-1) / np.float32(top_k)
    return RouterStats(tokens_G, load_GE, prob_GE, np.zeros_like(tokens_G), np.zeros_like(tokens_G))


balancing = jax.jit(load_balancing_loss)


@functools.partial(jax.jit, static_argnames=("num_groups", "cfg"))
def route(logits, groups, num_groups, cfg):
    counted = jnp.ones(len(logits), bool)
    chosen, probs = routing.route(logits, None, Facts(counted), cfg)
    return router_stats(logits, probs, chosen, chosen.valid, counted, jnp.asarray(groups), num_groups)


def softmax(x):
    x = np.asarray(x, np.float64)
    p = np.exp(x - x.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


# --- load balancing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("experts", "k"), [(2, 1), (4, 1), (8, 2), (6, 6), (64, 8)])
def test_one_at_uniform_and_e_over_k_at_collapse(experts, k):
    uniform = stats_of(np.full((1, experts), 3.0 * k), np.full((1, experts), 3.0), k)
    assert float(balancing(uniform)) == pytest.approx(1.0, rel=1e-6)
    few = np.zeros((1, experts))
    few[:, :k] = 12.0
    assert float(balancing(stats_of(few, few / k, k))) == pytest.approx(experts / k, rel=1e-6)


def test_domain_pure_groups_pay_where_the_whole_batch_does_not():
    """Two domains use disjoint halves of the experts evenly: 2 per domain, 1 over both (arXiv:2501.11873)."""
    half = np.float32([[6, 6, 0, 0], [0, 0, 6, 6]])
    apart = stats_of(half, half / 2, top_k=2)
    together = stats_of(half.sum(0, keepdims=True), half.sum(0, keepdims=True) / 2, top_k=2)
    assert float(balancing(apart)) == pytest.approx(2.0, rel=1e-6)
    assert float(balancing(together)) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("num_groups", [1, 3])
def test_load_balancing_of_added_batches_is_that_of_the_whole(num_groups):
    """Value and gradient from unequal parts added up = the closed form over all tokens; f carries no gradient."""
    cfg, rng = MoEConfig(num_experts=5, top_k=2), np.random.default_rng(0)
    logits, groups = rng.normal(size=(11, 5)).astype(np.float32), rng.integers(0, num_groups, 11)
    if num_groups == 3:
        groups[:] = np.where(groups == 1, 2, groups)  # group 1 stays empty: it is left out of the mean

    def loss(logits):
        parts = [route(logits[a:b], groups[a:b], num_groups, cfg) for a, b in ((0, 2), (2, 3), (3, 11))]
        return load_balancing_loss(jax.tree.map(lambda *x: sum(x), *parts))

    value, grad = jax.jit(jax.value_and_grad(loss))(jnp.asarray(logits))
    p = softmax(logits)
    chosen = np.zeros_like(p)
    np.put_along_axis(chosen, np.argsort(-p, -1)[:, :2], 1.0, -1)
    want, want_grad = [], np.zeros_like(p)
    for g in np.unique(groups):
        mine = groups == g
        f = chosen[mine].mean(0) / 2
        want.append(5 * f @ p[mine].mean(0))
        want_grad[mine] = 5 / mine.sum() * p[mine] * (f[None] - (p[mine] @ f)[:, None])
    assert len(want) == (1 if num_groups == 1 else 2)
    np.testing.assert_allclose(value, np.mean(want), rtol=1e-6)
    np.testing.assert_allclose(grad, want_grad / len(want), rtol=1e-5, atol=1e-7)
    assert np.abs(want_grad).max() > 1e-2


def test_gradient_goes_through_probabilities_only():
    rng = np.random.default_rng(1)
    stats = stats_of(rng.integers(1, 9, (2, 4)) * 2.0, rng.random((2, 4)), top_k=2)
    grad = jax.device_get(jax.jit(jax.grad(load_balancing_loss))(stats))
    assert not np.any(grad.tokens_per_expert)
    tokens, f = stats.tokens[:, None], stats.tokens_per_expert / (2 * stats.tokens[:, None])
    np.testing.assert_allclose(grad.prob_per_expert, 4 * f / tokens / 2, rtol=1e-6)


def test_layers_do_not_mix():
    rng = np.random.default_rng(2)
    layers = [stats_of(rng.integers(1, 9, (2, 4)) * 2.0, rng.random((2, 4)), top_k=2) for _ in range(3)]
    stacked = jax.tree.map(lambda *x: np.stack(x), *layers)
    np.testing.assert_allclose(balancing(stacked), [balancing(s) for s in layers], rtol=1e-6)


# --- router z-loss ---------------------------------------------------------------------------------------------------


def router_z(stats):
    """The mean over layers and tokens, by hand."""
    return np.mean(np.sum(stats.z_sq, axis=-1) / np.sum(stats.tokens, axis=-1))


def test_router_z_loss():
    """Constant logits c: (c + log E)². In general the mean of logsumexp², with gradient 2 · z · p / T."""
    cfg = MoEConfig(num_experts=6, top_k=2)
    groups = np.int32([0, 1, 0, 1, 1])

    def loss(logits):
        one_layer = jax.tree.map(lambda x: x[None], route(logits, groups, 2, cfg))
        return total_loss(BatchSums(0.0, 0.0, {"layers": one_layer}), LossConfig())[1].raw["router_z_raw"]

    for c in (0.0, -3.0, 2.5):
        np.testing.assert_allclose(jax.jit(loss)(np.full((5, 6), c, np.float32)), (c + np.log(6)) ** 2, rtol=1e-6)
    logits = np.random.default_rng(3).normal(size=(5, 6)).astype(np.float32)
    z = np.log(np.exp(logits.astype(np.float64)).sum(-1))
    value, grad = jax.jit(jax.value_and_grad(loss))(jnp.asarray(logits))
    np.testing.assert_allclose(value, np.mean(z**2), rtol=1e-6)
    np.testing.assert_allclose(grad, 2 * z[:, None] * softmax(logits) / 5, rtol=1e-5)


# --- cross-entropy ---------------------------------------------------------------------------------------------------


FACTOR = -0.3  # between the sum and the loss


def nll_by_hand(hidden, output, targets, cotangent):
    """Negative log-likelihoods and the gradients of Σ cotangent · nll, in float64."""
    h, w = np.asarray(hidden, np.float64), np.asarray(output, np.float64)
    logits = h @ w.T
    top = logits.max(-1, keepdims=True)
    nll = (
        np.log(np.exp(logits - top).sum(-1)) + top[..., 0] - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    )
    d = (softmax(logits) - np.eye(len(w))[targets]) * cotangent[..., None]
    return nll, d @ w, np.einsum("bsv,bsd->vd", d, h)


@pytest.mark.parametrize(
    ("length", "dtype", "scale", "kind"),
    [
        (7, "float32", 1.0, "cpu"),
        (7, "float32", 1.0, "TPU v5p"),
        (10, "float32", 1.0, "cpu"),
        (4, "float32", 3e3, "cpu"),
        (4, "float32", 3e3, "TPU v5p"),
        (12, "bfloat16", 1.0, "cpu"),
    ],
)
def test_nll(monkeypatch, length, dtype, scale, kind):
    """Two rows of lengths that CHUNK = 4 does not divide, logits of thousands, and bf16 with float32 logits, as on a
    CPU and as on other devices."""
    monkeypatch.setattr(cross_entropy, "CHUNK", 4)
    monkeypatch.setattr(axes, "current_kind", lambda: kind)
    rng = np.random.default_rng(length)
    hidden, output = rng.normal(size=(2, length, 3)) * scale, rng.normal(size=(13, 3))
    hidden, output = jnp.asarray(hidden, dtype), jnp.asarray(output, dtype)
    targets, c = rng.integers(0, 13, (2, length)), rng.random((2, length)).astype(np.float32)

    def f(hidden, output):
        return FACTOR * summed_nll(hidden, output, jnp.asarray(targets), jnp.asarray(c))

    def both(hidden, output):
        return (
            f(hidden, output),
            *jax.value_and_grad(f, argnums=(0, 1))(hidden, output),
            token_nll(hidden, output, jnp.asarray(targets)),
        )

    jaxpr = str(jax.make_jaxpr(both)(hidden, output))
    rows = [np.prod([int(n) for n in shape.split(",")]) for shape in re.findall(r"\[([\d,]+),13\]", jaxpr)]
    assert max(rows) == 4  # never the logits of all tokens, neither forward nor backward, and no chunk of a few
    alone, total, (dh, dw), nll = jax.jit(both)(hidden, output)
    want, want_dh, want_dw = nll_by_hand(hidden, output, targets, FACTOR * c)
    np.testing.assert_allclose([alone, total], FACTOR * np.sum(c * want), rtol=1e-5)
    assert nll.dtype == jnp.float32
    # Sums of terms as large as the largest logit: float32 rounds relative to that.
    largest = np.abs(np.asarray(hidden, np.float64) @ np.asarray(output, np.float64).T).max()
    np.testing.assert_allclose(nll, want, rtol=1e-6, atol=4e-7 * largest)
    tolerance = {"float32": 2e-6, "bfloat16": 1e-2}[dtype] * max(1.0, largest * 0.1)
    assert dh.dtype == dw.dtype == dtype
    for got, exact in ((dh, want_dh), (dw, want_dw)):
        np.testing.assert_allclose(np.asarray(got, np.float64), exact, rtol=0, atol=tolerance * np.abs(exact).max())


def test_summed_nll_on_a_mesh(monkeypatch):
    """Rows spread over 8 devices: the gradient of the shared output matrix is the sum over all of them."""
    monkeypatch.setattr(cross_entropy, "CHUNK", 3)
    rng, mesh = np.random.default_rng(6), sharding.make_mesh((2, 2, 2))
    hidden, output = rng.normal(size=(8, 6, 5)).astype(np.float32), rng.normal(size=(13, 5)).astype(np.float32)
    targets, c = rng.integers(0, 13, (8, 6)), rng.random((8, 6)).astype(np.float32)
    with jax.set_mesh(mesh):
        rows = [jax.device_put(a, sharding.batch_sharding(mesh)) for a in (hidden, targets, c)]

        def f(hidden, output, targets, c):
            return FACTOR * summed_nll(hidden, output, targets, c)

        run = jax.jit(jax.value_and_grad(f, argnums=(0, 1)))
        total, grads = run(rows[0], jax.device_put(output, NamedSharding(mesh, PartitionSpec())), *rows[1:])
    nll, *want = nll_by_hand(hidden, output, targets, FACTOR * c)
    for got, exact in zip((total, *grads), (FACTOR * np.sum(c * nll), *want), strict=True):
        np.testing.assert_allclose(got, exact, rtol=1e-5, atol=2e-6 * np.abs(exact).max())


# --- the total -------------------------------------------------------------------------------------------------------


def sums_of(logits, cfg):
    """A batch of 6 tokens, two layers of the same router on scaled logits, weights that sum to 4."""
    stats = [route(logits * s, np.int32([0, 0, 0, 1, 1, 1]), 2, cfg) for s in (1.0, 2.0)]
    stack = np.stack if isinstance(logits, np.ndarray) else jnp.stack
    return BatchSums(np.float32(10.0), np.float32(4.0), {"layers": jax.tree.map(lambda *x: stack(x), *stats)})


def total(sums, cfg, *args):
    """`total_loss`, with its results on the host."""
    return jax.device_get(jax.jit(lambda sums: total_loss(sums, cfg, *args))(sums))


def test_logged_parts_add_up_to_the_loss():
    moe, cfg = MoEConfig(num_experts=4, top_k=2), LossConfig(load_balance_coef=0.3, router_z_coef=0.07, balance_batch=1)
    sums = sums_of(np.float32(np.random.default_rng(4).normal(size=(6, 4))), moe)
    loss, parts = total(sums, cfg)
    named = parts.scalars()
    np.testing.assert_allclose(loss, sum(named.values()), rtol=1e-7)
    np.testing.assert_allclose(named["xent"], 2.5, rtol=1e-7)
    balance = np.mean(balancing(sums.router["layers"]))
    np.testing.assert_allclose(named["load_balance"], 0.3 * balance, rtol=1e-6)
    np.testing.assert_allclose(named["router_z"], 0.07 * router_z(sums.router["layers"]), rtol=1e-6)
    assert all(float(p) > 0.05 for p in named.values())
    summed, _ = total(sums, dataclasses.replace(cfg, router_loss_layers="sum"), moe.top_k)
    np.testing.assert_allclose(summed - named["xent"], 2 * (loss - named["xent"]), rtol=1e-6)  # two layers


def test_raw_values_do_not_depend_on_the_coefficients():
    """What two runs with other coefficients, steps or none at all can be compared by: each term before its factor."""
    moe = MoEConfig(num_experts=4, top_k=2)
    sums = sums_of(np.float32(np.random.default_rng(4).normal(size=(6, 4))), moe)
    merged = jax.tree.map(lambda x: x.sum(1, keepdims=True), sums.router["layers"])
    want = {
        "load_balance_raw": np.mean(balancing(sums.router["layers"])),
        "load_balance_raw/then": np.mean(balancing(merged)),
        "router_z_raw": router_z(sums.router["layers"]),
    }
    for coef, z, more, stop in ((0.3, 0.07, 0.2, 0), (0.0, 0.0, 0.0, 0), (0.1, 0.001, 0.0, 3)):
        later = {"then": RouterLossConfig("load_balance", more, "global", start_step=5)}
        cfg = LossConfig(coef, 1, stop, router_z_coef=z, more=later)
        loss, parts = total(sums, cfg, 4)
        assert parts.raw.keys() == want.keys()
        for name, value in want.items():
            np.testing.assert_allclose(parts.raw[name], value, rtol=1e-6, err_msg=name)
        np.testing.assert_allclose(loss, sum(parts.scalars().values()), rtol=1e-7)


def test_losses_of_several_scopes_come_and_go_with_their_steps():
    """Per sequence until step 3, global from step 3 on, and 1 % of per-sequence beside it from step 5 on."""
    more = {
        "then": RouterLossConfig("load_balance", 0.3, "global", 3),
        "micro": RouterLossConfig("load_balance", 0.003, 1, 5),
    }
    cfg = LossConfig(load_balance_coef=0.3, balance_batch=1, load_balance_stop=3, more=more)
    moe = MoEConfig(num_experts=4, top_k=2)
    sums = sums_of(np.float32(np.random.default_rng(4).normal(size=(6, 4))), moe)
    each = 0.3 * np.mean(balancing(sums.router["layers"]))
    merged = jax.tree.map(lambda x: x.sum(1, keepdims=True), sums.router["layers"])
    whole = 0.3 * np.mean(balancing(merged))
    assert abs(each / whole - 1) > 1e-3
    want = {0: (each, 0, 0), 2: (each, 0, 0), 3: (0, whole, 0), 4: (0, whole, 0), 5: (0, whole, each / 100)}
    parts_at = jax.jit(lambda step: total_loss(sums, cfg, step)[1].router)
    for step, values in want.items():
        parts = parts_at(step)
        names = ("load_balance", "load_balance/then", "load_balance/micro")
        np.testing.assert_allclose([parts[n] for n in names], values, rtol=1e-6, err_msg=str(step))


def test_a_coefficient_of_zero_is_exactly_no_gradient():
    moe = MoEConfig(num_experts=4, top_k=2)
    logits = jnp.asarray(np.random.default_rng(5).normal(size=(6, 4)), jnp.float32)

    def grad(lb, z):
        cfg = LossConfig(load_balance_coef=lb, router_z_coef=z)
        return np.asarray(jax.jit(jax.grad(lambda x: total_loss(sums_of(x, moe), cfg)[0]))(logits))

    assert not grad(0.0, 0.0).any()
    assert np.abs(grad(0.1, 0.0)).max() > 1e-3
    assert np.abs(grad(0.0, 0.1)).max() > 1e-3
    np.testing.assert_allclose(grad(0.1, 0.1), grad(0.1, 0.0) + grad(0.0, 0.1), rtol=1e-4, atol=1e-7)


def test_an_empty_batch_has_a_finite_loss_and_gradient():
    """Nothing but padding: every mean is 0 and so is every gradient."""
    stats = stats_of(np.zeros((1, 2)), np.zeros((1, 2)), top_k=1)
    zeros = BatchSums(jnp.float32(0), jnp.float32(0), {"layers": jax.tree.map(lambda x: x[None], stats)})
    value, grad = jax.jit(jax.value_and_grad(lambda s: total_loss(s, LossConfig())[0]))(zeros)
    assert float(value) == 0.0
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grad))


def test_describe_names_every_loss_and_the_approximation():
    more = {
        "then": RouterLossConfig("load_balance", 0.3, "global", 3, over=4),
        "off": RouterLossConfig("load_balance", 0.0, 2),
        "apart": RouterLossConfig("mutual_information", 0.01, 2),
    }
    cfg = LossConfig(load_balance_coef=0.1, balance_batch=1, load_balance_stop=3, more=more)
    text = (
        "0.1 load_balance over each sequence until step 3 + 0.001 router_z + 0.3 load_balance of 4 groups of experts "
        "over the optimizer batch after step 3 + 0.01 mutual_information over 2 sequences"
    )
    assert losses.describe(cfg, 1) == f"router losses, mean over layers, exact: {text}"
    running = losses.describe(dataclasses.replace(cfg, accumulation="running", shuffle_tokens=True), 2)
    assert "an approximation" in running and "0.1 load_balance over each sequence at random, token by token" in running
    each = LossConfig(balance_batch=1, accumulation="running")  # no count of another micro-batch is used
    assert "each sequence" in losses.describe(each, 2) and "an approximation" not in losses.describe(each, 2)
    only_z = LossConfig(load_balance_coef=0.0, accumulation="running")
    assert losses.describe(only_z, 2) == "router losses, mean over layers, exact: 0.001 router_z"
    assert losses.describe(dataclasses.replace(only_z, router_z_coef=0.0), 1) == "router losses: none"
