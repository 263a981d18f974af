"""The table of docs/balancing.md: other frameworks' load-balancing losses, in numpy float64, against the one here.

Each formula is written from the definition in its source, with its own normalisation, and not from a common helper.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import MoEConfig
from moe_jax.moe import routing
from moe_jax.moe.router_losses import load_balancing_loss
from moe_jax.moe.routing import Facts
from moe_jax.moe.stats import router_stats

LAYERS, BATCH, SEQ = 3, 8, 5
FORWARD = 2  # sequences in one forward pass: a micro-batch of one data-parallel rank


def skewed_logits(seed, experts, layers=LAYERS):
    """`[L, B, S, E]` with favourites of each layer and of each sequence."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape)
    tokens, sequences = draw(layers, BATCH, SEQ, experts), draw(1, BATCH, 1, experts)
    return (tokens + sequences + draw(layers, 1, 1, experts)).astype(np.float32)


def probabilities(logits, score="softmax"):
    x = np.asarray(logits, np.float64)
    p = np.exp(x - x.max(-1, keepdims=True)) if score == "softmax" else 1 / (1 + np.exp(-x))
    return p / p.sum(-1, keepdims=True)


def assignments(scores, k):
    """One-hot rows of the K best experts, summed over K."""
    hot = np.zeros_like(scores)
    np.put_along_axis(hot, np.argsort(-scores, -1)[..., :k], 1.0, -1)
    return hot


def statistics(logits, cfg, balance_batch="global", bias=None, mask=None):
    """RouterStats of every layer, with our code; logits `[L, B, S, E]`, mask `[B, S]`."""
    layers, batch, length, experts = logits.shape
    size = batch if balance_batch == "global" else balance_batch
    group = jnp.repeat(jnp.arange(batch) // size, length)
    live = jnp.ones(batch * length, bool) if mask is None else mask.reshape(-1)

    def layer(x):
        plan, probs = routing.route(x, bias, Facts(live), cfg)
        return router_stats(x, probs, plan, plan.valid, live, group, batch // size)

    return jax.vmap(layer)(logits.reshape(layers, -1, experts))


@functools.partial(jax.jit, static_argnames=("cfg", "balance_batch"))
def ours(logits, cfg, balance_batch="global", bias=None, mask=None):
    """The load-balancing loss here, `[L]`."""
    return load_balancing_loss(statistics(logits, cfg, balance_batch, bias, mask))


# --- the table -------------------------------------------------------------------------------------------------------
# Every formula takes router probabilities and assignments [L, B, S, E] and K, and has coefficient 1.


def forwards(x):
    """`[L, B, S, E]` → `[L, forward passes, tokens of one, E]`."""
    return x.reshape(x.shape[0], -1, FORWARD * x.shape[2], x.shape[3])


def megatron(prob_sums, counts, tokens, k):
    """E / (K · T²) · Σ_e counts_e · Σ_t p_te: what its three losses have in common. E is the last axis."""
    return prob_sums.shape[-1] / (k * tokens**2) * (prob_sums * counts).sum(-1)


def megatron_aux(p, r, k):
    p, r = forwards(p), forwards(r)
    return megatron(p.sum(2), r.sum(2), p.shape[2], k).mean(1).sum(0)  # ranks and micro-batches: mean; layers: sum


def megatron_seq_aux(p, r, k):
    """Sequences of a forward pass become further experts; the sum over them is divided by their number."""
    total = 0.0
    for layer_p, layer_r in zip(p, r, strict=True):
        for i in range(0, BATCH, FORWARD):
            wide = [np.concatenate(x[i : i + FORWARD], axis=-1) for x in (layer_p, layer_r)]  # [S, FORWARD · E]
            total += p.shape[-1] / (k * SEQ**2) * (wide[0].sum(0) * wide[1].sum(0)).sum() / FORWARD
    return total / (BATCH // FORWARD)


def maxtext_before_0_2_5(p, r, k):
    """E² times the mean over sequences and experts of density (summing to K) times mean probability."""
    return (p.shape[-1] ** 2 * (r.mean(2) * p.mean(2)).mean((1, 2))).mean()


def maxtext_0_2_5(p, r, k):
    return maxtext_before_0_2_5(p, r / k, k)


def maxtext_megatron_seq_aux(p, r, k):
    return LAYERS * maxtext_0_2_5(p, r, k)


def deepseek_v2(p, r, k):
    """Σ_e P_e · E · (mean one-hot row of all T · K choices), added by every layer with gradient 1."""
    p, r = forwards(p), forwards(r)
    return (p.mean(2) * p.shape[-1] * r.sum(2) / (k * p.shape[2])).sum((0, 2)).mean()


def deepseek_v2_accumulated(p, r, k):
    """That 1 is not divided by the number of accumulation steps: let all forward passes be such steps."""
    return deepseek_v2(p, r, k) * (BATCH // FORWARD)


def deepseek_v2_seq_aux(p, r, k):
    usage = r.sum(2) / (SEQ * k / p.shape[-1])
    return (usage * p.mean(2)).sum(-1).mean(-1).sum()


def deepseek_v3(p, r, k):
    """arXiv:2412.19437, equations 17–20, for each sequence."""
    return (p.shape[-1] / (k * SEQ) * r.sum(2) * p.sum(2) / SEQ).sum((0, 2)).mean()


def switch(p, r, k):
    """arXiv:2101.03961, equations 4–6, K = 1: E · Σ f P, added by every layer."""
    p, r = forwards(p), forwards(r)
    return p.shape[-1] * (r.mean(2) * p.mean(2)).sum((0, 2)).mean()


class Row(NamedTuple):
    theirs: Callable
    coef: Callable  # (K) → coefficient here, for coefficient 1 there
    balance_batch: int
    layers: str  # loss.router_loss_layers
    score: str = "softmax"
    size: tuple = (8, 3)  # (E, K)


TABLE = [
    Row(megatron_aux, lambda k: 1, FORWARD, "sum"),
    Row(megatron_aux, lambda k: 1, FORWARD, "sum", "sigmoid"),
    Row(megatron_seq_aux, lambda k: 1, 1, "sum"),
    Row(maxtext_before_0_2_5, lambda k: k, 1, "mean"),
    Row(maxtext_0_2_5, lambda k: 1, 1, "mean"),
    Row(maxtext_megatron_seq_aux, lambda k: 1, 1, "sum", "sigmoid"),
    Row(deepseek_v2, lambda k: 1, FORWARD, "sum"),
    Row(deepseek_v2_accumulated, lambda k: BATCH // FORWARD, FORWARD, "sum"),
    Row(deepseek_v2_seq_aux, lambda k: 1, 1, "sum"),
    Row(deepseek_v3, lambda k: 1, 1, "sum", "sigmoid"),
    Row(switch, lambda k: 1, FORWARD, "sum", "softmax", (6, 1)),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row.theirs.__name__}-{row.score}")
def test_coefficients_of_the_table(row):
    experts, k = row.size
    cfg = MoEConfig(num_experts=experts, top_k=k, score=row.score)
    over_layers = np.mean if row.layers == "mean" else np.sum
    for seed in range(3):
        logits = skewed_logits(seed, experts)
        p = probabilities(logits, row.score)
        theirs = row.theirs(p, assignments(p, k), k)
        here = np.asarray(ours(logits, cfg, row.balance_batch), np.float64)
        np.testing.assert_allclose(row.coef(k) * over_layers(here), theirs, rtol=1e-6)
        # The other scope is another loss.
        other = np.asarray(ours(logits, cfg, {1: FORWARD, FORWARD: 1}[row.balance_batch]))
        assert abs(row.coef(k) * over_layers(other) / theirs - 1) > 1e-2
    # Ours is 1 at uniform routing: theirs has the value of the coefficient there, times the layers it sums.
    even = np.full(p.shape, 1 / experts)
    want = row.coef(k) * (LAYERS if row.layers == "sum" else 1)
    assert row.theirs(even, k * even, k) == pytest.approx(want, rel=1e-12)


# --- Megatron's global_aux_loss --------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2])
def test_megatron_global_aux_prints_one_but_pulls_with_coef_over_dp(steps):
    """Each rank divides its own Σ p by the tokens of all ranks squared, and data parallelism divides by dp again. With
    accumulation, counts are the running mean of the micro-batches so far: `accumulation="running"`."""
    cfg, dp, coef = MoEConfig(num_experts=6, top_k=2), BATCH // FORWARD // steps, 0.3
    logits = skewed_logits(3, 6)
    p = probabilities(logits)
    r = assignments(p, 2)
    # [L, micro-batch, rank, tokens, E]: a micro-batch is what all ranks compute at once.
    p, r = (x.reshape(LAYERS, steps, dp, FORWARD * SEQ, 6) for x in (p, r))
    tokens = dp * FORWARD * SEQ
    so_far = r.sum((2, 3)).cumsum(1) / np.arange(1, steps + 1)[:, None]  # [L, micro-batch, E]
    loss = megatron(p.sum(3), so_far[:, :, None], tokens, 2)  # of each rank, without its coefficient
    printed = loss.sum(2).mean()  # summed over ranks; averaged over micro-batches and, for printing only, layers
    f = so_far[:, :, None, None]
    gradient = coef * 6 / (2 * tokens**2) * p * (f - (f * p).sum(-1, keepdims=True)) / (dp * steps)

    def here(logits, running=True):
        """Σ over layers of the mean over micro-batches, f from the counts so far."""
        parts = [statistics(x, cfg) for x in jnp.split(logits, steps if running else 1, axis=1)]
        counts, value = 0.0, 0.0
        for i, s in enumerate(parts):
            counts += s.tokens_per_expert  # of equal micro-batches
            value += load_balancing_loss(s._replace(tokens_per_expert=counts / (i + 1))) / len(parts)
        return jnp.sum(value)

    value, grad = jax.jit(jax.value_and_grad(here))(jnp.asarray(logits))
    np.testing.assert_allclose(value / LAYERS, printed, rtol=1e-6)
    np.testing.assert_allclose(coef / dp * grad, gradient.reshape(logits.shape), rtol=1e-4, atol=1e-8)
    assert np.abs(gradient).max() > 1e-4
    if steps > 1:  # the exact loss is another one
        exact = np.asarray(jax.jit(jax.grad(functools.partial(here, running=False)))(jnp.asarray(logits)))
        assert np.linalg.norm(exact - grad) / np.linalg.norm(exact) > 0.05


# --- Hugging Face ----------------------------------------------------------------------------------------------------


def hugging_face(p, r, mask=None):
    """E · Σ_e f_e · P_e with f summing to K, and both means over the tokens of all layers together."""
    weight = np.ones(p.shape[:3]) if mask is None else np.broadcast_to(mask, p.shape[:3]).astype(float)
    mean = lambda x: (x * weight[..., None]).sum((0, 1, 2)) / weight.sum()
    return p.shape[-1] * (mean(r) * mean(p)).sum()


def test_hugging_face_is_k_times_ours_for_one_layer_or_equal_layers():
    cfg, one = MoEConfig(num_experts=8, top_k=3), skewed_logits(8, 8, layers=1)
    for logits in (one, np.repeat(one, LAYERS, axis=0)):
        p = probabilities(logits)
        np.testing.assert_allclose(3 * np.mean(ours(logits, cfg)), hugging_face(p, assignments(p, 3)), rtol=1e-6)


def test_hugging_face_lacks_the_covariance_of_f_and_p_over_layers():
    """Unequal layers: mean over layers of ours = theirs / K + E · Σ_e cov over layers of (f_e, P_e)."""
    cfg = MoEConfig(num_experts=8, top_k=3)
    for seed in range(3):
        logits = skewed_logits(seed, 8)
        p = probabilities(logits)
        r = assignments(p, 3)
        f_LE, p_LE = r.mean((1, 2)) / 3, p.mean((1, 2))
        covariance = 8 * ((f_LE - f_LE.mean(0)) * (p_LE - p_LE.mean(0))).mean(0).sum()
        np.testing.assert_allclose(np.mean(ours(logits, cfg)), hugging_face(p, r) / 3 + covariance, rtol=1e-6)
        assert covariance > 0.02  # it hides imbalance


def test_hugging_face_does_not_see_layers_that_use_different_halves():
    """Two layers, each with half of its experts unused: theirs has its least value and no gradient, ours has both."""
    logits = np.zeros((2, BATCH, SEQ, 4), np.float32)
    logits[0, ..., :2] = logits[1, ..., 2:] = 1.0
    p, cfg = probabilities(logits), MoEConfig(num_experts=4, top_k=2)
    r = assignments(p, 2)
    assert hugging_face(p, r) == pytest.approx(2.0)  # K: the value at uniform
    pooled = r.mean((0, 1, 2))
    their_gradient = p * (pooled - (pooled * p).sum(-1, keepdims=True))  # up to a factor
    np.testing.assert_allclose(their_gradient, 0.0, atol=1e-12)
    value, grad = jax.jit(jax.value_and_grad(lambda x: jnp.mean(ours(x, cfg))))(jnp.asarray(logits))
    assert float(value) == pytest.approx(2 * np.e / (np.e + 1), rel=1e-6)
    assert np.all(np.asarray(grad)[0, ..., :2] > 1e-4) and np.all(np.asarray(grad)[0, ..., 2:] < -1e-4)


# --- what has no equivalent ------------------------------------------------------------------------------------------


def test_padding():
    """Never counted here, nor by Hugging Face with a mask. Sequences count alike here; Megatron's seq_aux_loss weights
    one of T_s tokens by (T_s / mean T_s)², the mean over its micro-batch."""
    cfg, logits = MoEConfig(num_experts=6, top_k=2), skewed_logits(4, 6, layers=1)
    lengths = np.array([5, 3, 4, 1, 2, 5, 5, 1])
    mask = np.arange(SEQ) < lengths[:, None]
    p = probabilities(logits)
    r = assignments(p, 2)
    np.testing.assert_allclose(2 * ours(logits, cfg, mask=mask)[0], hugging_face(p, r, mask), rtol=1e-6)
    sums = [(x[0] * mask[..., None]).sum(1) for x in (p, r)]  # [B, E]
    per_sequence = 6 / (2 * lengths**2) * (sums[0] * sums[1]).sum(-1)
    np.testing.assert_allclose(ours(logits, cfg, 1, mask=mask)[0], per_sequence.mean(), rtol=1e-6)
    theirs = megatron(*sums, lengths.mean(), 2).mean()
    np.testing.assert_allclose(theirs, ((lengths / lengths.mean()) ** 2 * per_sequence).mean(), rtol=1e-12)
    assert abs(theirs / per_sequence.mean() - 1) > 0.02


def test_selection_bias_counts_here_and_not_in_deepseek_v3_and_megatron():
    """Here f counts the assignments that were made; theirs is of the top K without bias and without expert groups."""
    logits, bias = skewed_logits(5, 8), np.linspace(0.3, -0.3, 8).astype(np.float32)
    p = probabilities(logits, "sigmoid")
    theirs = deepseek_v3(p, assignments(p, 2), 2)
    cfg = MoEConfig(num_experts=8, top_k=2, score="sigmoid", selection_bias=True)
    np.testing.assert_allclose(np.sum(ours(logits, cfg, 1, np.zeros_like(bias))), theirs, rtol=1e-6)
    made = assignments(1 / (1 + np.exp(-logits.astype(np.float64))) + bias, 2)
    here = np.sum(ours(logits, cfg, 1, bias))
    np.testing.assert_allclose(here, deepseek_v3(p, made, 2), rtol=1e-6)
    assert abs(here / theirs - 1) > 1e-2
    grouped = MoEConfig(num_experts=8, top_k=2, score="sigmoid", num_groups=4, top_groups=1)
    assert abs(np.sum(ours(logits, grouped, 1)) / theirs - 1) > 1e-2
