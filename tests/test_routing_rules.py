"""Rules of routing by hand: ties, groups, updates of biases, logits in float32, and which routings are equal."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_routing import by_hand

from moe_jax.config import MoEConfig, plain_routing
from moe_jax.errors import ConfigError
from moe_jax.moe import balance, routers, routing
from moe_jax.moe.routing import Facts


def test_ties_go_to_the_lower_id():
    logits = jnp.asarray([[0, 0, 0, 0, 0, 0], [1, 0, 1, 0, 1, 0], [0, 0, 1, 2, 1, 1]], jnp.float32)

    def route(**kw):
        cfg = MoEConfig(num_experts=6, top_k=3, **kw)
        plan, _ = jax.jit(lambda logits: routing.route(logits, None, Facts(jnp.ones(3, bool)), cfg))(logits)
        return np.asarray(plan.experts).tolist()

    want = [[0, 1, 2], [0, 2, 4], [3, 2, 4]]
    assert route() == want
    assert route(score="sigmoid") == want
    assert route(score_order="topk_score") == want
    # Equal groups: the first; in row 3 group 1 = {3, 4, 5} is the stronger.
    assert route(num_groups=2, top_groups=1) == [[0, 1, 2], [0, 2, 1], [3, 4, 5]]


def test_a_group_wins_by_its_two_best_not_by_its_best():
    """Scores .50 + .01 lose against .30 + .25, and with K = 1 too: DeepSeek's rule does not look at K."""
    logits = jnp.log(jnp.asarray([[0.5, 0.01, 0.3, 0.25]], jnp.float32))
    for k, want in ((1, {2}), (2, {2, 3})):
        cfg = MoEConfig(num_experts=4, top_k=k, num_groups=2, top_groups=1)
        assert (
            set(np.asarray(routing.route(logits, None, Facts(jnp.ones(1, bool)), cfg)[0].experts)[0].tolist()) == want
        )


def test_bias_update_follows_the_sign_of_the_missing_load():
    counts = jnp.asarray([[4, 0, 2, 2], [1, 1, 1, 1], [9, 1, 1, 1]], jnp.float32)
    bias = jnp.asarray([[0.5, 0.5, 0.5, 0.5], [1, 2, 3, 4], [0, 0, 0, 0]], jnp.float32)
    want = np.asarray(bias) + 0.125 * np.float32([[-1, 1, 0, 0], [0, 0, 0, 0], [-1, 1, 1, 1]])
    np.testing.assert_array_equal(balance.update_bias(bias, counts, 0.125)[0], want)
    np.testing.assert_array_equal(balance.update_bias(bias[0], counts[0], 0.125)[0], want[0])


def test_bias_update_centred_and_with_target_loads():
    """Centred: the biases keep their mean (Moonlight). Targets: 2 : 1 : 1 of 8 assignments are 4, 2 and 2."""
    counts = jnp.asarray([[4, 0, 2, 2], [9, 1, 1, 1]], jnp.float32)
    bias = jnp.asarray([[0.5, 0.5, 0.5, 0.5], [0, 1, 0, 0]], jnp.float32)
    got, _ = balance.update_bias(bias, counts, 0.125, "centred")
    want = np.asarray(bias) + 0.125 * np.float32([[-1, 1, 0, 0], [-1.5, 0.5, 0.5, 0.5]])
    np.testing.assert_array_equal(got, want)
    np.testing.assert_allclose(got.mean(-1), bias.mean(-1), rtol=1e-6)
    counts = jnp.asarray([4, 1, 3], jnp.float32)
    got, _ = balance.update_bias(jnp.zeros(3), counts, 0.125, "sign", (2.0, 1.0, 1.0))
    np.testing.assert_array_equal(got, np.float32([0, 0.125, -0.125]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_router_logits_are_those_of_float32(dtype):
    """Value and both gradients against float64, where rounding w or dy to bfloat16 would be off by 1e-3."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(64, 512)), dtype)
    w, dy = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((512, 8), (64, 8)))
    logits, vjp = jax.vjp(routers.float32_product, x, w)
    dx, dw = vjp(dy)
    X, W, G = (np.asarray(a, np.float64) for a in (x, w, dy))
    off = lambda got, want: np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)
    assert (logits.dtype, dx.dtype, dw.dtype) == (jnp.float32, x.dtype, jnp.float32)
    assert off(logits, X @ W) < 1e-6 and off(dw, X.T @ G) < 1e-6
    rounded = np.asarray(jnp.asarray(G @ W.T, x.dtype), np.float64)
    assert off(dx, rounded) < (1e-6 if dtype == "float32" else 5e-4)  # beside the rounding to bfloat16, next to nothing


def test_equal_routings_are_plainly_equal():
    """Every way to say a routing has one plain routing, which is the same function."""
    logits = np.random.default_rng(0).normal(size=(30, 4))
    logits[0] = 40, 50, 45, 42  # of which a sigmoid makes ones: the score counts where only the order does
    none, group = np.zeros(30, bool), np.zeros(30, int)
    inputs = {"logits": logits, "counted": none, "kept": np.ones((30, 4), bool), "group": group}
    bias = np.random.default_rng(1).normal(size=4, scale=0.3).astype(np.float32)
    functions, said = {}, 0
    fields = {"top_k": (1, 2, 4), "score": ("softmax", "sigmoid"), "score_order": ("score_topk", "topk_score"),
              "renormalize": (False, True), "combine": ("score", "one", "share"), "selection_bias": (False, True),
              "num_groups": (1, 2), "top_groups": (1, 2), "shard_groups": (1, 2)}  # fmt: skip
    for values in itertools.product(*fields.values()):
        try:
            cfg = MoEConfig(num_experts=4, **dict(zip(fields, values, strict=True)))
        except ConfigError:
            continue
        weights = {}
        for which in (cfg, plain_routing(cfg)):
            out = by_hand(inputs | {"bias": bias * which.selection_bias}, which)
            weights[which] = np.zeros((30, 4))
            np.put_along_axis(weights[which], out["experts"], out["weights"], axis=1)
        np.testing.assert_allclose(weights[cfg], weights[plain_routing(cfg)], rtol=1e-9, err_msg=str(cfg))
        assert plain_routing(plain_routing(cfg)) == plain_routing(cfg)
        said += 1
        function = (cfg.top_k, cfg.selection_bias, weights[cfg].round(9).tobytes())
        functions.setdefault(function, set()).add(plain_routing(cfg))
    assert all(len(plainly) == 1 for plainly in functions.values())
    assert len(functions) < said / 2
