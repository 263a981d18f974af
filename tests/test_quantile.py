"""Quantile balancing: counts are NumPy's as integers however they are computed, biases float64's, and loads fall.

The oracle takes everything in float64. Where integers are compared no value lies so near to the edge of a bin that
float32 could put it into the next one, so they are equal on every machine. Letters: T tokens, E experts, K of a token.
"""

import collections
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import config
from moe_jax.errors import ConfigError
from moe_jax.moe import balance, quantile
from moe_jax.parallel import sharding
from moe_jax.train import step
from moe_jax.train.gradients import make_gradients
from moe_jax.train.state import init_state, put_batch
from moe_jax.tree import flatten, nest
from tests.test_unused import equations

BINS = quantile.BINS
NEAR = 5e-7  # more than what float32 adds to a score and a difference of two


# --- the oracle ------------------------------------------------------------------------------------------------------


def sigmoid(x):
    return 1 / (1 + np.exp(-np.float64(x)))


def choose(scores, bias, top_k):
    return np.argsort(-(scores + bias), axis=-1, kind="stable")[:, :top_k]


def required(scores, bias, top_k):
    """r[i, e], the bias that token i asks of expert e."""
    return np.sort(scores + bias, axis=-1)[:, -(top_k + 1), None] - scores


def grid(bias):
    low, high = np.min(bias) - 1, np.max(bias) + 1
    return low, (high - low) / BINS


def edges_near(scores, bias, top_k):
    """Which tokens ask for a bias that is nearly an edge."""
    low, width = grid(bias)
    position = (required(scores, bias, top_k) - low) / width
    return (np.abs(position - np.round(position)) * width < NEAR).any(-1)


def counts_of(scores, bias, top_k):
    """[E, BINS] of all tokens."""
    low, width = grid(bias)
    bins = np.clip(np.floor((required(scores, bias, top_k) - low) / width), 0, BINS - 1).astype(int)
    return np.stack([np.bincount(column, minlength=BINS) for column in bins.T])


def solve(counts, bias, top_k):
    """The new bias from counts, before its mean is subtracted."""
    low, width = grid(bias)
    q = counts[0].sum() * top_k / len(bias)
    new = []
    for row in counts:
        upto = np.cumsum(row)
        first = int(np.argmax(upto >= q))
        new.append(low + (first + (q - upto[first] + row[first]) / row[first]) * width)
    return np.array(new)


def centred(x):
    return x - x.mean()


# --- one layer -------------------------------------------------------------------------------------------------------


def skewed(tokens, experts, skew, seed=0):
    """Logits of experts that are not alike."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(tokens, experts)) + skew * rng.normal(size=experts)).astype(np.float32)


@functools.partial(jax.jit, static_argnames="top_k")
def update(logits, bias, counted, top_k):
    """One step of the real functions: counts, new bias, and the load of each expert before it."""
    _, chosen = jax.lax.top_k(jax.nn.sigmoid(logits) + bias[None], top_k)
    counts = quantile.histogram(logits, bias, chosen, counted, BINS)
    load = jnp.sum(jax.nn.one_hot(chosen, bias.size) * counted[:, None, None], (0, 1))
    return counts, quantile.update_bias(bias, counts, top_k), load


@pytest.mark.parametrize("zero", [False, True])
def test_counts_and_bias_of_one_layer(zero):
    """Integers equal, the bias to rounding; q is not a whole number. All biases 0: r = 0 lies on an edge, exactly."""
    logits, top_k = skewed(600, 12, 0.7), 5
    bias = np.zeros(12, np.float32) if zero else np.random.default_rng(1).normal(0, 0.2, 12).astype(np.float32)
    scores, bias64 = sigmoid(logits), np.float64(bias)
    near = edges_near(scores, bias64, top_k)
    if zero:
        position = (required(scores, bias64, top_k) + 1) * BINS / 2
        near = (np.abs(position - np.round(position)) * 2 / BINS < NEAR).sum(-1) > 1  # but for the 0 of each token
    logits, scores = logits[~near], scores[~near]
    counted = np.arange(len(logits)) % 4 != 1
    assert len(logits) > 500 and counted.sum() * top_k % 12
    counts, new, _ = update(logits, bias, counted, top_k)
    want = counts_of(scores[counted], bias64, top_k)
    assert counts.dtype == jnp.int32
    np.testing.assert_array_equal(counts, want)
    np.testing.assert_allclose(new, centred(solve(want, bias64, top_k)), rtol=0, atol=1e-6)
    # Stacked layers are solved alike; without a counted token the bias stays.
    both = quantile.update_bias(jnp.stack([bias, bias]), jnp.stack([counts, 0 * counts]), top_k)
    np.testing.assert_allclose(both[0], new, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(both[1], bias)


def test_bias_of_more_tokens_than_float32_counts():
    """q = 2²⁵ + 1.5, which float32 rounds to 2²⁵: it would stop 100 bins too early."""
    tokens, bias = 2**26 + 3, np.float32([0.1, -0.1])
    counts = np.zeros((2, BINS), np.int32)
    counts[:, 400], counts[:, 500] = 2**25, tokens - 2**25
    counts[1] = counts[1, ::-1]
    new = quantile.update_bias(jnp.asarray(bias), jnp.asarray(counts), 1)
    np.testing.assert_allclose(new, centred(solve(counts, np.float64(bias), 1)), rtol=0, atol=1e-6)


def test_loads_become_equal_over_a_few_updates():
    """T = 4096, E = 64, K = 8: the worst excess falls from 3.3 to less than 0.15, 0.1 and 0.07, as does float64's."""
    logits, top_k, experts = skewed(4096, 64, 0.65), 8, 64
    q = 4096 * top_k / experts
    scores, bias, reference = sigmoid(logits), jnp.zeros(experts), np.zeros(experts)
    excess, expected, counted = [], [], np.ones(4096, bool)
    for _ in range(6):
        loads = np.bincount(choose(scores, reference, top_k).ravel(), minlength=experts)
        r, (_, width) = required(scores, reference, top_k), grid(reference)
        new = solve(counts_of(scores, reference, top_k), reference, top_k)
        exact = np.sort(r, axis=0)[int(q)]
        assert np.abs(new - exact).max() <= width  # 0.002 at first
        # With α as it is: fewer than q tokens are above the edge before, at least q above the edge after.
        assert ((r < new - width).sum(0) <= q).all() and (q <= (r < new + width).sum(0)).all()
        assert ((r < exact).sum(0) <= q).all() and (q <= (r <= exact).sum(0)).all()
        expected, reference = [*expected, loads.max() / q - 1], centred(new)
        _, bias, load = update(logits, bias, counted, top_k)
        excess.append(float(load.max()) / q - 1)
        np.testing.assert_allclose(bias, reference, rtol=0, atol=width)
    np.testing.assert_allclose(excess, expected, rtol=0, atol=0.01)
    assert excess[0] > 3.2 and excess[1] < 0.15 and excess[2] < 0.1 and max(excess[3:]) < 0.07
    assert sorted(excess[:4], reverse=True) == excess[:4]


# --- the model -------------------------------------------------------------------------------------------------------

B, S, V, D, E, K = 16, 8, 64, 16, 8, 2
MESHES = [(1, 1, 1), (8, 1, 1), (2, 2, 2), (1, 2, 4)]
BIAS = np.random.default_rng(3).normal(0, 0.1, (2, E)).astype(np.float32)


def run_config(micro=1, bias_update="quantile", **train) -> config.RunConfig:
    c = config.default_config()
    c.model.update(vocab_size=V, d_model=D, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, norm_eps=0.0)
    c.model.update(compute_dtype="float32", remat="full" if micro > 1 else "none")
    c.model.moe.update(num_experts=E, top_k=K, d_expert=8, score="sigmoid", renormalize=True, selection_bias=True)
    c.loss.update(load_balance_coef=0.0, bias_update=bias_update)
    c.optim.update(lr=1e-2, newton_schulz_dtype="float32", newton_schulz_steps=2)
    c.data.update(batch_size=B, seq_len=S)
    c.data.tokenizer.update(kind="huggingface", path="none")
    c.train.update(micro_batches=micro, **train)
    return config.build(c)


def batch_rows(seed=0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, V, (B, S + 1)).astype(np.int32)
    segments = (np.arange(S) < rng.integers(S // 2, S + 1, (B, 1))).astype(np.int32)  # the rest is padding
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": segments.astype(np.float32),
            "segment_ids": segments, "positions": np.tile(np.arange(S, dtype=np.int32), (B, 1)),
            "sequence_ids": np.arange(B, dtype=np.int32)}  # fmt: skip


@functools.cache
def exact_weights() -> dict[str, np.ndarray]:
    """Weights whose router logits are exact in float32, in whatever order they are summed.

    A token is a vector of ±1, which a norm without eps leaves alone; attention and experts add nothing to it; and the
    router's weights are multiples of 2⁻¹⁰. None of the tokens asks for a bias near an edge.
    """
    rng, made = np.random.default_rng(0), {}
    made["embed"] = rng.choice([-1.0, 1.0], (V, D))
    made["layers/attention/w_o"] = made["layers/moe/w_down"] = 0.0
    columns = []
    for bias in np.float64(BIAS):
        while True:
            w = np.round(rng.normal(0, 0.2, (D, E)) * 2**10) / 2**10
            if not edges_near(sigmoid(made["embed"] @ w), bias, K).any():
                break
        columns.append(w)
    return {**made, "layers/moe/w_router": np.stack(columns)}


def exact_state(cfg, mesh):
    """A fresh state with these weights and biases, and the rest as drawn."""
    state = init_state(cfg, mesh)
    fill = lambda x, value: jax.device_put(jnp.broadcast_to(jnp.asarray(value, x.dtype), x.shape), x.sharding)
    params = flatten(state.params)
    params |= {name: fill(params[name], value) for name, value in exact_weights().items()}
    bias = jax.tree.map(lambda b: fill(b, BIAS), state.router_bias)
    return state._replace(params=nest(params), router_bias=bias)


@functools.cache
def reference() -> np.ndarray:
    """[L, E, BINS] from the tokens."""
    rows, w = batch_rows(), exact_weights()
    x = w["embed"][rows["tokens"][rows["segment_ids"] > 0]]
    return np.stack([counts_of(sigmoid(x @ w["layers/moe/w_router"][i]), np.float64(BIAS[i]), K) for i in range(2)])


def check(shape, micro):
    """Integers and the new bias; the pass that only counts experts has no histogram."""
    cfg, mesh = run_config(micro), sharding.make_mesh(shape, jax.devices()[: int(np.prod(shape))])

    @jax.jit
    def one(params, bias, batch):
        sums = make_gradients(cfg, mesh)(params, bias, batch, 0).sums
        return sums.router["layers"], step.update_biases(cfg, bias, sums.router, {})

    with jax.set_mesh(mesh):
        state, batch = exact_state(cfg, mesh), put_batch(batch_rows(), mesh, cfg)
        traced = one.trace(state.params, state.router_bias, batch)
        stats, (bias, controllers) = traced.lower().compile()(state.params, state.router_bias, batch)
    np.testing.assert_array_equal(stats.histogram, reference())
    np.testing.assert_array_equal(np.sum(stats.histogram, -1), np.full((2, E), np.sum(stats.tokens[0])))
    want = [centred(solve(counts, np.float64(b), K)) for counts, b in zip(reference(), BIAS, strict=True)]
    np.testing.assert_allclose(bias["layers"]["moe"]["router_bias"], want, rtol=0, atol=1e-6)
    assert controllers == {}
    found = equations(traced.jaxpr, collections.Counter())
    assert sum(n for line, n in found.items() if line.startswith("scatter-add") and f"i32[{E * BINS}" in line) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "micro"), [*itertools.product(MESHES, (1, 2)), ((1, 1, 1), 4)])
def test_the_same_integers_on_every_mesh(shape, micro):
    check(shape, micro)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_refused_by_name():
    cfg = run_config()

    def change(loss=None, moe=None):
        model = dataclasses.replace(cfg.model, moe=dataclasses.replace(cfg.model.moe, **(moe or {})))
        return dataclasses.replace(cfg, model=model, loss=dataclasses.replace(cfg.loss, **(loss or {})))

    more = {"micro": config.RouterLossConfig(coef=0.1)}
    for words, changes in {
        r"model.moe.score='softmax': must be 'sigmoid' with loss.bias_update='quantile'": {"moe": {"score": "softmax"}},
        r"model.moe.num_groups=2: must be 1 .*nearest valid: 1": {"moe": {"num_groups": 2, "top_groups": 2}},
        r"model.moe.shard_groups=2: must be 1 .*nearest valid: 1": {"moe": {"shard_groups": 2}},
        r"model.moe.top_k=8: must be < 8 .*nearest valid: 7": {"moe": {"top_k": 8}},
        r"loss.bias_update='quantile': needs model.moe.selection_bias": {"moe": {"selection_bias": False}},
        r"loss.load_balance_coef=0.1: must be 0 .*nearest valid: 0.0": {"loss": {"load_balance_coef": 0.1}},
        r"loss.more.micro.coef=0.1: must be 0": {"loss": {"more": more}},
        r"loss.bias_target=.*: must be \(\)": {"loss": {"bias_target": (1.0,) * E}},
    }.items():
        with pytest.raises(ConfigError, match=words):
            change(**changes)
    with pytest.raises(ConfigError, match=r"loss.bias_update='quantile': must be .* with explore"):
        dataclasses.replace(cfg, explore=config.ExploreConfig(noise=1.0))
    layers = dataclasses.replace(cfg.model, num_layers=2, layers="moe moe:2")
    with pytest.raises(ConfigError, match=r"model.moe.top_k=2: must be < 2"):
        dataclasses.replace(cfg, model=layers)


def test_described():
    line = "selection bias: quantile over the optimizer batch, 1,000 bins for each of 8 experts, 32,000 bytes a layer"
    assert balance.describe(run_config().loss, run_config().model) == line
    assert balance.describe(config.LossConfig(), run_config().model) == "selection bias: sign, rate 0.001"
