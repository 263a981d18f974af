"""RoPE: every scaling against its formula in float64, frequency by frequency; a part of a head; no rotation.

And models with it: factors on the logits of MLA, and texts whose RoPE depends on their length.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import config
from moe_jax import model as model_lib
from moe_jax.config import MLAConfig, ModelConfig, RopeScalingConfig
from moe_jax.config.positions import Attends
from moe_jax.errors import ConfigError
from moe_jax.evaluate import loglikelihood, passes
from moe_jax.evaluate.generate import generate
from moe_jax.nn import mla
from moe_jax.nn.layers import Init, Keys
from moe_jax.nn.rope import rope, rope_frequencies, rotation
from moe_jax.parallel import sharding
from moe_jax.tree import flatten
from moe_jax.upcycle.chain import logits

SIZE, THETA = 16, 1e4
SHORT, LONG = tuple(1 + 0.1 * i for i in range(8)), tuple(2.0 + i for i in range(8))
BASE = [THETA ** (-2 * i / SIZE) for i in range(SIZE // 2)]


def model(**scaling) -> ModelConfig:
    return ModelConfig(rope_theta=THETA, head_dim=SIZE, rope_scaling=RopeScalingConfig(**scaling))


def yarn(i, factor, length, fast, slow, truncate):
    """A pair's frequency: by how many pairs it lies between the one that turns `fast` times and that of `slow` ones."""
    at = lambda turns: SIZE * math.log(length / (2 * math.pi * turns)) / (2 * math.log(THETA))
    low, high = at(fast), at(slow)
    low, high = (max(math.floor(low), 0), min(math.ceil(high), SIZE - 1)) if truncate else (max(low, 0), high)
    share = min(max((i - low) / (high - low), 0), 1)
    return BASE[i] / factor * share + BASE[i] * (1 - share)


def llama3(i, factor, length, low, high):
    turns = length * BASE[i] / (2 * math.pi)
    share = min(max((turns - low) / (high - low), 0), 1)
    return BASE[i] * share + BASE[i] / factor * (1 - share)


# Settings, tokens of the sequence, frequency of pair i, factor of cosine and sine.
CASES = {
    "linear": (dict(type="linear", factor=4.0), 9, lambda i: BASE[i] / 4, 1.0),
    "dynamic, short": (dict(type="dynamic", factor=2.0, original_length=64), 64, lambda i: BASE[i], 1.0),
    "dynamic, long": (
        dict(type="dynamic", factor=2.0, original_length=64), 96,
        lambda i: (THETA * 2.0 ** (SIZE / (SIZE - 2))) ** (-2 * i / SIZE), 1.0,
    ),
    "yarn": (
        dict(type="yarn", factor=4.0, original_length=1000), 9,
        lambda i: yarn(i, 4.0, 1000, 32, 1, True), 0.1 * math.log(4) + 1,
    ),
    "yarn, its own line": (
        dict(type="yarn", factor=4.0, original_length=1000, beta_fast=20.0, beta_slow=2.0, truncate=False,
             attention_factor=1.25), 9,
        lambda i: yarn(i, 4.0, 1000, 20, 2, False), 1.25,
    ),
    "yarn, factor 1": (dict(type="yarn", attention_factor=2.0), 9, lambda i: BASE[i], 2.0),
    "llama3": (
        dict(factor=8.0, original_length=1000), 9, lambda i: llama3(i, 8.0, 1000, 1, 4), 1.0,
    ),
    "longrope, short": (
        dict(type="longrope", factor=4.0, original_length=64, short_factor=SHORT, long_factor=LONG), 64,
        lambda i: BASE[i] / SHORT[i], math.sqrt(1 + math.log(4) / math.log(64)),
    ),
    "longrope, long": (
        dict(type="longrope", factor=4.0, original_length=64, short_factor=SHORT, long_factor=LONG), 65,
        lambda i: BASE[i] / LONG[i], math.sqrt(1 + math.log(4) / math.log(64)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_scalings_by_hand(name):
    """As constants of the program, and for a number of tokens that is known when it runs."""
    settings, tokens, want, factor = CASES[name]
    cfg = model(**settings)
    wanted = [want(i) for i in range(SIZE // 2)]
    turn = rotation(cfg, Attends(), tokens)
    np.testing.assert_allclose(turn.freq, wanted, rtol=1e-6)
    assert turn.factor == pytest.approx(factor) and isinstance(turn.freq, np.ndarray)
    then = jax.jit(lambda tokens: jnp.asarray(rope_frequencies(cfg, SIZE, tokens)))(jnp.int32(tokens))
    np.testing.assert_allclose(then, wanted, rtol=1e-6)
    assert np.allclose(wanted, BASE, rtol=1e-3) == (name in ("dynamic, short", "yarn, factor 1"))


def test_a_factor_of_1_scales_nothing():
    for kind in ("linear", "yarn", "llama3"):
        unscaled = (pytest.approx(rope_frequencies(ModelConfig(), SIZE)), 1.0, 1.0)
        assert rotation(model(type=kind), Attends(), 9) == unscaled


def test_a_part_of_a_head_and_a_factor():
    """The first components are rotated and multiplied, the others stay bit for bit."""
    cfg = ModelConfig(head_dim=16, rope_dim=6, rope_theta=THETA)
    turn = rotation(cfg, Attends(), 9)
    x = np.random.default_rng(0).normal(size=(1, 3, 2, 16)).astype(np.float32)
    at = np.int32([[0, 5, 70]])
    got = np.asarray(rope(jnp.asarray(x), jnp.asarray(at), turn.freq, 1.5))
    np.testing.assert_array_equal(got[..., 6:], x[..., 6:])
    z = (x[..., :3] + 1j * x[..., 3:6]) * np.exp(1j * at[..., None, None] * THETA ** (-np.arange(3) / 3))
    np.testing.assert_allclose(got[..., :6], 1.5 * np.concatenate([z.real, z.imag], -1), atol=1e-5)
    assert rotation(cfg, Attends(rope=False), 9) is None


def test_which_layers_are_scaled():
    cfg = ModelConfig(
        head_dim=SIZE, num_layers=8, window=4, attention_layers="3*window full",
        rope_scaling=RopeScalingConfig(type="yarn", factor=4.0, layers="full"),
    )  # fmt: skip
    scaled = [rotation(cfg, attends, 9).factor > 1 for attends in cfg.attends]
    assert scaled == [False, False, False, True] * 2


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"type": "linear", "beta_fast": 3.0}, "rope_scaling.beta_fast=3.0: has no effect with type='linear'"),
        ({"type": "yarn", "factor": 2.0, "beta_slow": 40.0}, "beta_fast=32.0: must be ≥ beta_slow=40.0"),
        ({"type": "longrope", "short_factor": (1.0,) * 16}, "long_factor=(): must have a number > 0 for each pair"),
        ({"type": "longrope", "short_factor": (1.0,) * 16, "long_factor": (1.0,) * 15}, "each of the 16 pairs"),
        ({"type": "yarn", "factor": 2.0, "mscale_all_dim": 1.0}, "mscale_all_dim=1.0: needs mla.kv_rank > 0"),
        ({"type": "yarn", "factor": 2.0, "layers": "full"}, "layers='full': needs layers with a window"),
        ({"type": "yarn", "factor": 2.0, "beta_slow": 0.0}, "beta_slow=0.0: must be"),
    ],
)
def test_refusals(fields, says):
    with pytest.raises(ConfigError) as raised:
        config.build_model({"head_dim": 32, "rope_scaling": fields})
    assert says in str(raised.value)


def test_ends_of_yarn():
    """Bases of 1 have no logarithm to divide by; a line that begins where it ends is one of transformers' too."""
    with pytest.raises(ConfigError, match=r"rope_theta=1.0: must be > 1 with rope_scaling.type='yarn'"):
        config.build_model({"rope_theta": 1.0, "rope_scaling": {"type": "yarn", "factor": 2.0}})
    at_once = rope_frequencies(model(type="yarn", factor=2.0, beta_fast=2.0, beta_slow=2.0, truncate=False), SIZE)
    assert set(np.round(at_once / BASE, 5)) == {0.5, 1.0}


def test_equal_functions_have_one_form():
    """A factor that is the usual one, a list that says what every layer does anyway, all of a head."""
    usual = model(type="yarn", factor=4.0)
    same = model(type="yarn", factor=4.0, attention_factor=0.1 * math.log(4.0) + 1.0)
    assert config.plain(usual) == config.plain(same) != config.plain(model(type="yarn", factor=4.0, truncate=False))
    alone = config.plain(model(type="yarn", attention_factor=2.0))
    assert config.plain(model(type="yarn", attention_factor=2.0, truncate=False)) == alone != config.plain(model())
    assert config.plain(model(type="linear")) == config.plain(model()) != config.plain(usual)
    form = lambda **fields: config.plain(ModelConfig(num_layers=4, head_dim=SIZE, **fields))
    assert form(rope_dim=SIZE) == form() == form(attention_layers="full")
    assert form(window=8, attention_layers="4*window full") == form(window=8)
    assert form(window=8, attention_layers="window full") != form(window=8)


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("window", "times"), [(False, (0.1 * math.log(8.0) + 1.0) ** 2), (True, 1.0)])
def test_the_factor_on_logits_of_mla(monkeypatch, window, times):
    """In layers whose RoPE is scaled: of queries, rounded once, and of the scale that a cache is read with."""
    seen = []

    def attend(q, k, v, *rest):
        seen.append(np.asarray(q, np.float32))
        return v

    def cached(q, k, v, cache, start, scale, window):
        seen.append(scale)
        return q, cache

    monkeypatch.setattr(mla, "attend", attend)
    monkeypatch.setattr(mla, "attend_and_write", cached)
    x = jax.random.normal(jax.random.key(1), (2, 3, 32), jnp.bfloat16)
    at = jnp.broadcast_to(jnp.arange(3), (2, 3))
    for all_dim in (0.0, 1.0):
        scaling = RopeScalingConfig("yarn", 8.0, original_length=16, mscale_all_dim=all_dim, layers="full")
        cfg = ModelConfig(d_model=32, num_heads=4, head_dim=16, mla=MLAConfig(8, 0, 8, 16), window=2,
                          attention_layers="window full", rope_scaling=scaling)  # fmt: skip
        layer = mla.MLA(cfg, Init(Keys(jax.random.key(0)), 0.3), 0.3, "xla", Attends(window=window))
        layer(x, at, None)
        layer(x, at, None, cache=(), start=jnp.int32(0))
    plain, plain_scale, scaled, scale = seen
    np.testing.assert_array_equal(scaled, (plain * np.float32(times)).astype(jnp.bfloat16).astype(np.float32))
    assert plain_scale == 16**-0.5 and scale == pytest.approx(plain_scale * times)


BY_LENGTH = {
    "longrope": dict(original_length=24, short_factor=(1.0,) * 8, long_factor=(4.0,) * 8),
    "dynamic": dict(original_length=16, factor=4.0),
}


@pytest.mark.parametrize("kind", [pytest.param("dynamic", marks=pytest.mark.slow), "longrope"])
def test_a_text_is_as_long_as_it_is(kind):
    """Logits, hidden states, log-likelihoods and samples of a text do not depend on padding, or on other texts."""
    cfg = ModelConfig(
        vocab_size=257, d_model=32, num_layers=1, num_dense_layers=1, d_ff=32, num_heads=2, num_kv_heads=2, head_dim=16,
        init_std=0.3, compute_dtype="float32", embedding_multiplier=12.0, residual_scale=True,
        rope_scaling=RopeScalingConfig(kind, **BY_LENGTH[kind]),
    )  # fmt: skip
    mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        params, bias = model_lib.init(cfg, jax.random.key(1))
        params |= {"embed_bias": params["embed_bias"] + 0.3, "embed_scale": params["embed_scale"] * 1.5}
    ids = np.random.default_rng(0).integers(1, 64, 33).tolist()
    short = ids[:20]  # which padding to a power of two makes longer than `original_length`
    want = logits(cfg, flatten(params), np.asarray([short]), mesh)[0]
    got = passes.run(cfg, mesh, params, bias, [short, ids], "logits")[0]
    np.testing.assert_allclose(got, want, atol=2e-4)
    embedded = (np.asarray(params["embed"])[short] * 12 + 0.3) * 1.5
    np.testing.assert_allclose(passes.run(cfg, mesh, params, bias, [short], "hidden", 0)[0], embedded, rtol=1e-5)
    run = config.RunConfig(model=cfg, data=config.DataConfig(batch_size=1, seq_len=32))
    asked = loglikelihood.Request(np.asarray(short[:16]), np.asarray(short[16:]))
    (score,) = loglikelihood.score(run, mesh, params, bias, [asked])
    alone = logits(cfg, flatten(params), np.asarray([short[:-1]]), mesh)[0]
    log_p = np.asarray(jax.nn.log_softmax(alone))[np.arange(15, 19), short[16:]]
    np.testing.assert_allclose(score.token_logprobs, log_p, atol=2e-4)
    together = generate(cfg, mesh, params, bias, [ids[:3], ids], [0, 3])
    assert together == [ids[:3], *generate(cfg, mesh, params, bias, [ids], 3)]
    splash = dataclasses.replace(run, model=dataclasses.replace(cfg, attention="splash"))
    with pytest.raises(ConfigError, match=f"attention='splash': needs padding.*type='{kind}'.*auto"):
        loglikelihood.check(splash)
