"""Smoothing before rounding: the same bits after it, factors by the formula in NumPy, and what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_model import PLAIN, forward, init, inputs_of, mesh_of

from moe_jax.errors import ConfigError
from moe_jax.quant import smooth as sm
from moe_jax.quant.taps import BlockTaps, Tap
from moe_jax.quant.walk import walk
from moe_jax.tree import flatten, update_at

ROWS, SEQ = 8, 16
MODELS = {
    # Shared experts with a gate, and hidden units of one expert that stand out.
    "shared": {"moe": {"num_shared_experts": 1, "shared_gate": "sigmoid"}},
    # A late block, latent experts, a router that projects, and a gate that weighs both branches.
    "late": {
        "layers": "(late dense)", "num_layers": 2, "d_ff": 20,
        "moe": {"latent": 8, "latent_norm": True, "router": "cosine", "router_width": 8, "num_shared_experts": 1,
                "shared_gate": "softmax"},
    },
    # A router with a state, identity experts that add nothing, and experts without a gate.
    "mlp": {"activation": "gelu", "moe": {"router": "mlp", "router_width": 8, "identity_experts": 2,
                                          "identity_output": "nothing"}},
}  # fmt: skip


def config_of(name: str):
    fields = dict(MODELS[name])
    return dataclasses.replace(PLAIN, **fields | {"moe": dataclasses.replace(PLAIN.moe, **fields.pop("moe"))})


def rows_of(cfg):
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (ROWS, SEQ)).astype(np.int32)
    segments = np.ones_like(tokens)
    segments[::2, -4:] = 0
    positions = np.broadcast_to(np.arange(SEQ, dtype=np.int32), tokens.shape)
    return {"tokens": tokens, "positions": positions, "segment_ids": segments}


def model_of(cfg, shape=(1, 1, 1)):
    """Weights with norms that are not 1, and one hidden unit that is far larger than the others of its expert."""
    params, bias = jax.device_get(init(cfg))
    rng = np.random.default_rng(1)
    for path, w in flatten(params).items():
        if path.endswith("mlp_norm"):
            params = update_at(params, path, lambda w: (w * rng.uniform(0.05, 3.0, w.shape)).astype(np.float32))
        if path.endswith("moe/w_up"):
            w = w.copy()
            w[:, 1, :, 3] *= 200.0
            params = update_at(params, path, lambda _, w=w: w)
    shapes = init(cfg, shape)
    lie = lambda tree, like: jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), tree, like)
    return lie(params, shapes[0]), lie(bias, shapes[1])


def smoothed(cfg, shape=(1, 1, 1), **options):
    """The parameters before and after, and (parameters, taps, `Smoothed`) of each block with experts."""
    params, bias = model_of(cfg, shape)
    seen = []

    def visit(number, place, own, taps):
        if not place.kind.experts:
            return None
        found = sm.smooth(cfg, own, taps, **options)
        seen.append(jax.device_get((own, taps, found)))
        return found.params

    after = walk(cfg, mesh_of(*shape), jax.tree.map(jnp.copy, params), bias, rows_of(cfg), visit)
    return params, after, bias, seen


@functools.cache
def shared():
    return smoothed(config_of("shared"))


def check_the_same(cfg, params, after, bias):
    """Every hidden state, load and probability to the bit, though norms, routers and experts have changed."""
    changed = {path for path, w in flatten(params).items() if np.any(np.asarray(w) != np.asarray(flatten(after)[path]))}
    names = {path.rsplit("/", 1)[1] for path in changed}
    assert {"mlp_norm"} < names and not any("attention" in path for path in changed), names
    rows = rows_of(cfg)
    inputs = inputs_of(rows["tokens"], rows["positions"], None, rows["segment_ids"] > 0)
    with jax.set_mesh(mesh_of(1, 1, 1)):
        run = jax.jit(functools.partial(forward, cfg))
        before, now = (jax.device_get(run(p, bias, inputs)) for p in (params, after))
    for a, b in zip(*map(jax.tree.leaves, (before, now)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_the_model_is_the_same():
    params, after, bias, _ = shared()
    check_the_same(config_of("shared"), params, after, bias)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MODELS if name != "shared"])
def test_every_model_is_the_same(name):
    """All routers, latent experts, late blocks, shared experts with a gate, an activation without one."""
    cfg = config_of(name)
    params, after, bias, seen = smoothed(cfg, router=True)
    check_the_same(cfg, params, after, bias)
    assert len(seen) == cfg.num_moe_layers
    moved = [np.any(found.moved != 1) for *_, found in seen]
    assert all(moved) if cfg.activation == "swiglu" else not any(moved)


def by_hand(own, taps, alpha, router):
    """The vector s in float64, before it is rounded to powers of two."""
    flat, floor = flatten(own), 1e-5
    term = lambda x, *ws: np.maximum(x, floor) ** alpha / np.maximum(
        np.max([np.abs(w).max(1) for w in ws], axis=0), floor) ** (1 - alpha)  # fmt: skip
    terms = [term(taps.expert_in.largest[e], flat["moe/w_gate"][e], flat["moe/w_up"][e]) for e in range(4)]
    paths = ["moe/shared/w_gate", "moe/shared/w_up", "moe/w_shared_gate", *(["moe/w_router"] if router else [])]
    return np.max(terms + [term(taps.fed, flat[path]) for path in paths], axis=0)


@pytest.mark.slow
def test_factors_are_those_of_the_formula():
    """To the nearest power of two; statistics are those of a walk through the smoothed model."""
    _, after, bias, seen = shared()
    for own, taps, found in seen:
        want = by_hand(own, taps, 0.6, router=False)
        np.testing.assert_array_less(np.abs(np.log2(found.factors / want)), 0.5 + 1e-4)
        np.testing.assert_array_equal(np.log2(found.factors) % 1, 0)
        expected = {(1, 3): 200}  # the planted unit, and no other far from it
        assert {tuple(at) for at in np.argwhere(found.moved != 1)} >= set(expected)
        assert (found.moved == 1).mean() > 0.8
    again = []
    walk(config_of("shared"), mesh_of(1, 1, 1), jax.tree.map(jnp.copy, after), bias, rows_of(PLAIN),
         lambda number, place, own, taps: again.append(jax.device_get(taps)))  # fmt: skip
    for (_, _, found), taps in zip(seen, again, strict=True):
        for a, b in zip(*map(jax.tree.leaves, (found.taps, taps)), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6 * np.abs(b).max())


@pytest.mark.slow
def test_the_router_counts_if_asked():
    """And the power moves the weight between inputs and weights."""
    _, _, _, seen = smoothed(config_of("shared"), alpha=0.25, router=True, down=False)
    for own, taps, found in seen:
        want = by_hand(own, taps, 0.25, router=True)
        np.testing.assert_array_less(np.abs(np.log2(found.factors / want)), 0.5 + 1e-4)
        assert (found.moved == 1).all()


def test_outliers():
    """A unit beyond the fence by a gap is one; units that differ little are none; nor is one without others."""
    rng = np.random.default_rng(0)
    plain = rng.uniform(1.0, 1.2, (2, 64))
    planted = plain.copy()
    planted[1, 9] = 80.0
    assert (sm.outlier_factors(plain) == 1).all()
    made = sm.outlier_factors(planted)
    assert np.argwhere(made != 1).tolist() == [[1, 9]]
    np.testing.assert_array_less(np.abs(np.log2(made[1, 9]) - 0.7 * np.log2(80 / np.delete(planted[1], 9).max())), 0.51)
    assert sm.cut_of(np.array([9.0, 8.8, 2.0, 1.9])) == 2.0  # the widest gap
    assert (sm.outlier_factors(np.zeros((1, 8))) == 1).all()


def layer_of(seed=0):
    """The parameters of a block without a gate of shared experts, and statistics of some inputs."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(
        rng.normal(size=shape) * rng.uniform(0.01, 2.0, shape[-2:][:1])[:, None], jnp.float32
    )
    h = rng.normal(size=(50, 16)).astype(np.float32) * np.geomspace(0.1, 30, 16).astype(np.float32)
    hidden = np.abs(rng.normal(size=(4, 12))).astype(np.float32) + 1
    hidden[2, 7] = 900.0
    by_expert = np.stack([np.abs(h[e::4]).max(0) for e in range(4)])
    tap = lambda largest: Tap(jnp.ones((*largest.shape, largest.shape[-1])), jnp.asarray(largest))
    taps = BlockTaps(jnp.float32(50), jnp.float32(0), jnp.asarray(np.abs(h).max(0)), {}, tap(by_expert), tap(hidden),
                     jnp.ones(4), jnp.ones(4))  # fmt: skip
    moe = {"w_router": draw(16, 4), "w_gate": draw(4, 16, 12), "w_up": draw(4, 16, 12), "w_down": draw(4, 12, 16)}
    return {"mlp_norm": jnp.ones(16), "attention_norm": jnp.ones(16), "moe": moe}, taps, h


def test_one_layer():
    """Products of what a norm gives and what an expert makes keep their bits; factors are those of the formula."""
    own, taps, h = layer_of()
    found = sm.smooth(PLAIN, own, taps)
    terms = [np.max(np.abs(np.concatenate([own["moe"][n][e] for n in ("w_gate", "w_up")], 1)), 1) for e in range(4)]
    want = np.max([taps.expert_in.largest[e] ** 0.6 / terms[e] ** 0.4 for e in range(4)], axis=0)
    np.testing.assert_array_less(np.abs(np.log2(found.factors / want)), 0.5 + 1e-4)
    assert np.argwhere(found.moved != 1).tolist() == [[2, 7]]
    x, t = h * found.params["mlp_norm"][None], found.moved
    for name, matrix in own["moe"].items():
        new = found.params["moe"][name]
        assert (np.asarray(new) != np.asarray(matrix)).any(), name
        before = matrix if name != "w_down" else matrix * t[:, :, None]
        after = new * (t[:, None, :] if name == "w_up" else 1)
        if name == "w_down":
            np.testing.assert_array_equal(after, before)
        else:
            products = lambda x, w: x.reshape(50, *[1] * (w.ndim - 2), 16, 1) * w[None]
            np.testing.assert_array_equal(products(x, after), products(h, before))


def test_refused():
    cases = {"norm": "post", "identity_experts": 2, "expert_inputs": "int8"}
    for name, fields in ((name, {name: value}) for name, value in cases.items()):
        moe = dataclasses.replace(PLAIN.moe, **{k: v for k, v in fields.items() if k != "norm"})
        cfg = dataclasses.replace(PLAIN, moe=moe, norm=fields.get("norm", "pre"))
        with pytest.raises(ConfigError, match=f"{name}=.*nearest valid: without --smooth"):
            sm.check(cfg)
    own, taps, _ = layer_of()
    with pytest.raises(KeyError, match="moe/w_new"):
        sm.smooth(PLAIN, own | {"moe": own["moe"] | {"w_new": np.ones(3)}}, taps)
