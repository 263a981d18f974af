"""Routing against a loop in float64 (values and gradients), and the properties that every router must have.

Letters: T tokens, E experts, K experts per token, G balance groups. Rules of ties, groups and biases by hand are in
test_routing_rules.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.config import MoEConfig
from moe_jax.moe import routing
from moe_jax.moe.routing import Facts
from moe_jax.moe.stats import choices_of, router_stats

GROUPS = 3
# Each variant with its number of tokens: a few fixed shapes, so that every function here compiles once per variant.
VARIANTS = {
    "softmax": (7, MoEConfig(num_experts=6, top_k=2)),
    "softmax_renormalized": (5, MoEConfig(num_experts=8, top_k=3, renormalize=True, routed_scaling=2.5)),
    "softmax_of_chosen": (6, MoEConfig(num_experts=8, top_k=3, score_order="topk_score", routed_scaling=0.5)),
    "sigmoid": (4, MoEConfig(num_experts=5, top_k=2, score="sigmoid")),
    "sigmoid_renormalized": (
        5,
        MoEConfig(num_experts=6, top_k=4, score="sigmoid", renormalize=True, routed_scaling=2.446),
    ),
    "sqrt_softplus_renormalized": (
        5,
        MoEConfig(num_experts=6, top_k=2, score="sqrt_softplus", renormalize=True, routed_scaling=1.5),
    ),
    "top_1": (5, MoEConfig(num_experts=4, top_k=1, renormalize=True)),
    "weights_of_one": (5, MoEConfig(num_experts=6, top_k=3, combine="one", routed_scaling=0.5)),
    "all_experts": (4, MoEConfig(num_experts=5, top_k=5)),
    "groups": (6, MoEConfig(num_experts=12, top_k=3, num_groups=4, top_groups=2)),
    "groups_best": (6, MoEConfig(num_experts=12, top_k=3, num_groups=4, top_groups=2, group_score="best")),
    "groups_top_1": (6, MoEConfig(num_experts=6, top_k=1, num_groups=2, top_groups=1)),
    "groups_of_one": (6, MoEConfig(num_experts=6, top_k=2, num_groups=6, top_groups=3)),
    "groups_sigmoid": (
        5,
        MoEConfig(num_experts=8, top_k=4, num_groups=4, top_groups=2, score="sigmoid", renormalize=True),
    ),
    "groups_of_chosen": (
        6,
        MoEConfig(num_experts=8, top_k=2, num_groups=2, top_groups=1, score_order="topk_score"),
    ),
    "light": (6, MoEConfig(num_experts=8, top_k=4, renormalize=True, routed_scaling=1.5, min_ratio=0.2)),
    "light_of_chosen": (6, MoEConfig(num_experts=6, top_k=3, score_order="topk_score", min_ratio=0.1)),
    "shards": (6, MoEConfig(num_experts=12, top_k=3, shard_groups=3, score_order="topk_score", routed_scaling=2.0)),
    "shards_share": (6, MoEConfig(num_experts=12, top_k=6, shard_groups=3, combine="share", routed_scaling=0.5)),
    "shards_sigmoid": (5, MoEConfig(num_experts=8, top_k=4, shard_groups=2, combine="share", score="sigmoid")),
}
FIELDS = ("tokens", "tokens_per_expert", "prob_per_expert", "z_sq", "dropped")


def prop(test):
    names = st.sampled_from(sorted(VARIANTS))
    # Repeatable: the same examples in every run.
    return settings(derandomize=True, deadline=None, max_examples=33)(
        given(name=names, seed=st.integers(0, 10**6))(test)
    )


def draw(name, seed):
    """Random inputs of a variant. Logits of a token are distinct multiples of 1/16, and biases, also distinct, are less
    than that: no ties, and no near ties."""
    t, cfg = VARIANTS[name]
    rng = np.random.default_rng([seed, len(name)])
    e, k = cfg.num_experts, cfg.top_k
    logits = np.stack([rng.choice(np.arange(-64, 65), e, replace=False) / 16 for _ in range(t)]).astype(np.float32)
    counted = rng.random(t) < 0.75
    inputs = {
        "logits": logits,
        "bias": (rng.permutation(e) / 256).astype(np.float32),
        "counted": counted,
        "kept": rng.random((t, k)) < 0.8,
        "group": rng.integers(0, GROUPS, t).astype(np.int32),
    }
    return cfg, inputs, rng


@functools.partial(jax.jit, static_argnames="cfg")
def _run(logits, bias, counted, kept, group, cfg):
    plan, probs = routing.route(logits, bias, Facts(counted), cfg)
    return plan, probs, router_stats(logits, probs, plan, kept, counted, group, GROUPS)


@functools.partial(jax.jit, static_argnames="cfg")
def _gradients(logits, bias, counted, kept, group, cotangents, cfg):
    """Of Σ cotangent · output for weights, probabilities and each statistic by itself: (d logits, d bias) by name."""

    def outputs(logits, bias):
        plan, probs, stats = _run(logits, bias, counted, kept, group, cfg)
        return {"weights": plan.weights, "probs": probs, **dict(zip(FIELDS, jax.tree.leaves(stats), strict=True))}

    values, vjp = jax.vjp(outputs, logits, bias)
    zeros = jax.tree.map(jnp.zeros_like, values)
    return {name: vjp({**zeros, name: cotangent}) for name, cotangent in cotangents.items()}


# In NumPy, so that comparing them compiles nothing.
run = lambda **given: jax.device_get(_run(**given))
gradients = lambda **given: jax.device_get(_gradients(**given))

# --- the loop --------------------------------------------------------------------------------------------------------


def softmax(x):
    return np.exp(x - x.max()) / np.exp(x - x.max()).sum()


def scores_of(row, cfg):
    if cfg.score == "sqrt_softplus":
        return np.sqrt(np.log1p(np.exp(row)))
    return softmax(row) if cfg.score == "softmax" else 1 / (1 + np.exp(-row))


def select(row, bias, cfg):
    """Expert ids of one token, best first, ties to the lower id."""
    ranked = (row if cfg.score_order == "topk_score" else scores_of(row, cfg)) + bias
    if cfg.shard_groups > 1:
        groups = [range(g, cfg.num_experts, cfg.shard_groups) for g in range(cfg.shard_groups)]
        best = [sorted(m, key=lambda e: (-ranked[e], e))[: cfg.top_k // cfg.shard_groups] for m in groups]
        return [e for of_rank in zip(*best, strict=True) for e in of_rank]
    size = cfg.num_experts // cfg.num_groups
    members = [range(g * size, (g + 1) * size) for g in range(cfg.num_groups)]
    strength = [sum(sorted(ranked[list(m)])[-1 if cfg.group_score == "best" else -2 :]) for m in members]
    best = sorted(range(cfg.num_groups), key=lambda g: (-strength[g], g))[: cfg.top_groups]
    allowed = [e for g in best for e in members[g]]
    return sorted(allowed, key=lambda e: (-ranked[e], e))[: cfg.top_k]


def weights_of(row, scores, ids, kept, cfg):
    """Combine weights of the choices that are kept; of the others 0."""
    weights = np.where(kept, np.exp(row[ids]) if cfg.score_order == "topk_score" else scores[ids], 0.0)
    shared = cfg.renormalize or cfg.score_order == "topk_score"
    weights = weights / weights.sum() if shared else weights
    return np.ones(len(ids)) if cfg.combine == "one" else weights


def by_hand(inputs, cfg, logits=None, experts=None):
    """Everything `run` returns, token by token in float64. `experts` holds a selection fixed, for differences."""
    logits = inputs["logits"].astype(np.float64) if logits is None else logits
    t, e = logits.shape
    out = {"experts": [], "weights": [], "probs": [], "valid": []}
    stats = {n: np.zeros((GROUPS, e) if "per_expert" in n else GROUPS) for n in FIELDS}
    for i in range(t):
        row = logits[i]
        ids = select(row, inputs["bias"].astype(np.float64), cfg) if experts is None else list(experts[i])
        scores = scores_of(row, cfg)
        kept = np.ones(len(ids), bool)
        if cfg.min_ratio:
            all_of_them = weights_of(row, scores, ids, kept, cfg)
            kept = all_of_them >= cfg.min_ratio * all_of_them.max()
        weights = weights_of(row, scores, ids, kept, cfg)
        if cfg.combine == "share":
            weights = np.array([w / sum(v for j, v in zip(ids, weights, strict=True)
                                        if (j - e) % cfg.shard_groups == 0)
                                for e, w in zip(ids, weights, strict=True)])  # fmt: skip
        out["experts"].append(ids)
        out["weights"].append(weights * cfg.routed_scaling)
        out["probs"].append(scores / scores.sum())
        out["valid"].append(kept & inputs["counted"][i])
        if inputs["counted"][i]:
            g = inputs["group"][i]
            stats["tokens"][g] += 1
            stats["tokens_per_expert"][g, np.array(ids)[kept]] += 1
            stats["prob_per_expert"][g] += out["probs"][-1]
            stats["z_sq"][g] += np.log(np.exp(row).sum()) ** 2
            stats["dropped"][g] += (~inputs["kept"][i] & kept).sum()
    return {**{n: np.stack(v) for n, v in out.items()}, **stats}


@prop
def test_equals_a_loop_over_tokens(name, seed):
    """Experts, weights, probabilities and every statistic, and the gradient of each by finite differences, which are
    taken at every third logit: another third in other examples."""
    cfg, inputs, rng = draw(name, seed)
    plan, probs, stats = run(**inputs, cfg=cfg)
    want = by_hand(inputs, cfg)
    np.testing.assert_array_equal(plan.experts, want["experts"])
    np.testing.assert_array_equal(plan.valid, want["valid"])
    assert plan.weights.dtype == probs.dtype == jnp.float32
    got = {"weights": plan.weights, "probs": probs, **dict(zip(FIELDS, jax.tree.leaves(stats), strict=True))}
    for key, value in got.items():
        np.testing.assert_allclose(value, want[key], rtol=2e-6, atol=1e-7, err_msg=key)
    made, most = np.asarray(stats.tokens_per_expert).sum(-1), cfg.top_k * np.asarray(stats.tokens)
    assert (made <= most).all() if cfg.min_ratio else (made == most).all()

    cotangents = {key: rng.normal(size=np.shape(value)).astype(np.float32) for key, value in got.items()}
    grads = gradients(**inputs, cotangents=cotangents, cfg=cfg)
    trained = ("weights", "probs", "prob_per_expert", "z_sq")
    numeric = {key: np.zeros(inputs["logits"].shape) for key in trained}
    some = list(np.ndindex(inputs["logits"].shape))[seed % 3 :: 3]
    for at in some:
        step = np.zeros(inputs["logits"].shape)
        step[at] = 1e-5
        above, below = (by_hand(inputs, cfg, inputs["logits"] + d, want["experts"]) for d in (step, -step))
        for key in trained:
            numeric[key][at] = np.sum((above[key] - below[key]) * cotangents[key]) / 2e-5
    at = tuple(np.transpose(some))
    for key in trained:
        np.testing.assert_allclose(grads[key][0][at], numeric[key][at], rtol=1e-4, atol=3e-6, err_msg=key)
    for key in ("tokens", "tokens_per_expert", "dropped"):  # counts
        assert not np.any(grads[key][0]), key
    for key in grads:  # the selection bias is never trained
        assert not np.any(grads[key][1]), key


@pytest.mark.slow
def test_choices_hold_the_probability_of_the_chosen():
    """… by the loop's numbers. A slot that is not valid is −1, and its expert's probability is not in the sum."""
    for name in VARIANTS:
        cfg, inputs, _ = draw(name, 0)
        plan, probs, _ = run(**inputs, cfg=cfg)
        want, tokens = by_hand(inputs, cfg), len(inputs["counted"])
        got = choices_of(plan, probs, (1, tokens))
        valid = want["valid"]
        np.testing.assert_array_equal(got.experts, [np.where(valid, want["experts"], -1)])
        picked = (np.take_along_axis(want["probs"], want["experts"], 1) * valid).sum(1)
        np.testing.assert_allclose(got.score, [picked], rtol=2e-6)


# --- properties ------------------------------------------------------------------------------------------------------


@prop
def test_renaming_experts_renames_choices_and_statistics(name, seed):
    cfg, inputs, rng = draw(name, seed)
    # With groups, whole groups change places and experts change places inside their group.
    size = cfg.num_experts // cfg.num_groups
    order = np.concatenate([g * size + rng.permutation(size) for g in rng.permutation(cfg.num_groups)])
    if cfg.shard_groups > 1:  # the members of a shard group change places
        groups = [rng.permutation(np.arange(g, cfg.num_experts, cfg.shard_groups)) for g in range(cfg.shard_groups)]
        order = np.stack(groups, axis=1).ravel()
    plan, probs, stats = run(**inputs, cfg=cfg)
    renamed = {**inputs, "logits": inputs["logits"][:, order], "bias": inputs["bias"][order]}
    plan2, probs2, stats2 = run(**renamed, cfg=cfg)
    np.testing.assert_array_equal(order[plan2.experts], plan.experts)
    np.testing.assert_allclose(plan2.weights, plan.weights, rtol=1e-6)
    np.testing.assert_allclose(probs2, probs[:, order], rtol=1e-6)
    np.testing.assert_array_equal(stats2.tokens_per_expert, stats.tokens_per_expert[:, order])
    np.testing.assert_allclose(stats2.prob_per_expert, stats.prob_per_expert[:, order], rtol=1e-6)


@prop
def test_order_of_tokens_does_not_matter(name, seed):
    cfg, inputs, rng = draw(name, seed)
    order = rng.permutation(len(inputs["counted"]))
    plan, probs, stats = run(**inputs, cfg=cfg)
    moved = {n: a if n == "bias" else a[order] for n, a in inputs.items()}
    plan2, probs2, stats2 = run(**moved, cfg=cfg)
    for a, b in zip((*plan2[:3], probs2), (*plan[:3], probs), strict=True):
        np.testing.assert_array_equal(a, b[order])
    for a, b in zip(*map(jax.tree.leaves, (stats2, stats)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@prop
def test_padding_enters_no_statistic(name, seed):
    """Whatever stands in padded tokens, the sums and their gradients are those of the counted tokens alone."""
    cfg, inputs, rng = draw(name, seed)
    counted = inputs["counted"]
    padded = inputs["logits"].copy()
    padded[~counted] = rng.normal(size=padded[~counted].shape) * 30
    plan, _, stats = run(**{**inputs, "logits": padded}, cfg=cfg)
    _, _, want = run(**inputs, cfg=cfg)
    for a, b in zip(*map(jax.tree.leaves, (stats, want)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.asarray(plan.valid)[~counted].any()
    assert stats.tokens.sum() == counted.sum()
    cotangents = {n: np.ones_like(stats._asdict()[n]) for n in FIELDS}
    cotangents["prob_per_expert"] = rng.normal(size=stats.prob_per_expert.shape).astype(np.float32)
    for grad, _ in gradients(**{**inputs, "logits": padded}, cotangents=cotangents, cfg=cfg).values():
        assert not np.asarray(grad)[~counted].any()


@prop
def test_statistics_of_groups_add_up(name, seed):
    """Over groups, and over any split of the tokens into two batches."""
    cfg, inputs, rng = draw(name, seed)
    _, _, stats = run(**inputs, cfg=cfg)
    _, _, whole = run(**{**inputs, "group": np.zeros_like(inputs["group"])}, cfg=cfg)
    first = rng.random(len(inputs["counted"])) < 0.5
    parts = [run(**{**inputs, "counted": inputs["counted"] & side}, cfg=cfg)[2] for side in (first, ~first)]
    for total, by_group, a, b in zip(*map(jax.tree.leaves, (whole, stats, *parts)), strict=True):
        np.testing.assert_allclose(by_group.sum(0), total[0], rtol=1e-6)
        np.testing.assert_allclose(a + b, by_group, rtol=1e-6)
        assert not np.any(total[1:])


@prop
def test_bias_moves_the_selection_only(name, seed):
    cfg, inputs, rng = draw(name, seed)
    chosen = rng.permutation(cfg.num_experts)[: cfg.top_k]
    if cfg.num_groups > 1:  # a selection that the group limit allows: the first experts of `top_groups` groups
        size = cfg.num_experts // cfg.num_groups
        groups = rng.permutation(cfg.num_groups)[: cfg.top_groups]
        chosen = np.concatenate([g * size + np.arange(size) for g in groups])[: cfg.top_k]
    if cfg.shard_groups > 1:
        groups = [rng.permutation(np.arange(g, cfg.num_experts, cfg.shard_groups)) for g in range(cfg.shard_groups)]
        chosen = np.concatenate([members[: cfg.top_k // cfg.shard_groups] for members in groups])
    bias = np.zeros(cfg.num_experts, np.float32)
    bias[chosen] = 100.0
    plan, probs, _ = run(**{**inputs, "bias": bias}, cfg=cfg)
    _, free_probs, _ = run(**{**inputs, "bias": 0 * bias}, cfg=cfg)
    np.testing.assert_array_equal(np.sort(plan.experts, -1), np.tile(np.sort(chosen), (len(probs), 1)))
    np.testing.assert_array_equal(probs, free_probs)
    want = by_hand(inputs, cfg, experts=np.asarray(plan.experts))["weights"]
    np.testing.assert_allclose(plan.weights, want, rtol=2e-6)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(name=st.sampled_from(["shards", "shards_share", "shards_sigmoid"]), seed=st.integers(0, 10**6))
def test_every_shard_group_gives_the_same_number_and_weight(name, seed):
    """Whatever logits, ties and bias are: K/G distinct experts of each group, and with shares one weight a group."""
    cfg, inputs, rng = draw(name, seed)
    t, g = len(inputs["logits"]), cfg.shard_groups
    inputs["logits"] = rng.choice([-30.0, 0.0, 0.5, 30.0], inputs["logits"].shape).astype(np.float32)
    plan = run(**inputs, cfg=cfg)[0]
    experts = np.asarray(plan.experts)
    assert all(len(set(row)) == cfg.top_k for row in experts.tolist())
    member = experts[:, :, None] % g == np.arange(g)
    np.testing.assert_array_equal(member.sum(1), np.full((t, g), cfg.top_k // g))
    if cfg.combine == "share":
        sums = (np.asarray(plan.weights)[:, :, None] * member).sum(1)
        np.testing.assert_allclose(sums, np.full((t, g), cfg.routed_scaling), rtol=1e-5)


@settings(derandomize=True, deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6))
def test_two_orders_of_softmax_and_selection_agree(seed):
    """Softmax over all, choose, renormalise = choose, softmax over the chosen. In values and gradients."""
    _, inputs, rng = draw("softmax_renormalized", seed)
    inputs["bias"] *= 0  # a bias adds to scores in one order and to logits in the other
    first = MoEConfig(num_experts=8, top_k=3, renormalize=True)
    second = MoEConfig(num_experts=8, top_k=3, score_order="topk_score")
    plan, plan2 = run(**inputs, cfg=first)[0], run(**inputs, cfg=second)[0]
    np.testing.assert_array_equal(plan.experts, plan2.experts)
    np.testing.assert_allclose(plan.weights, plan2.weights, rtol=2e-6)
    np.testing.assert_allclose(plan.weights.sum(-1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(plan2.weights.sum(-1), 1.0, rtol=1e-6)
    c = {"weights": rng.normal(size=plan.weights.shape).astype(np.float32)}
    grad, grad2 = (gradients(**inputs, cotangents=c, cfg=cfg)["weights"][0] for cfg in (first, second))
    assert np.abs(grad).max() > 1e-3
    np.testing.assert_allclose(grad, grad2, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["softmax_renormalized", "sigmoid_renormalized", "groups_sigmoid", "top_1"])
def test_renormalized_weights_sum_to_the_scale(name):
    cfg, inputs, _ = draw(name, 0)
    inputs["logits"] = inputs["logits"] * 8 - 40  # scores far below 1, sums far from 1
    np.testing.assert_allclose(run(**inputs, cfg=cfg)[0].weights.sum(-1), cfg.routed_scaling, rtol=1e-5)
