"""Upcycling of models that have experts: prune, grow, merge, depth; experts beside dense layers, or of their units."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import config, model, upcycle
from moe_jax.config import ModelConfig
from moe_jax.errors import ConfigError, FileError
from moe_jax.moe.routing import Facts, route
from moe_jax.tree import flatten, join, nest
from moe_jax.upcycle import (
    Beside,
    Cluster,
    Depth,
    Grow,
    Importance,
    Mask,
    Merge,
    Noise,
    Prune,
    VirtualGroups,
    Width,
)  # fmt: skip
from tests import two_processes
from tests.upcycle_source import SOURCE, STD, TOKENS, apply, dense, distance, error, mesh_of

# Interleaved, with two numbers of experts, shared ones, selection biases, and a router whose weights are not experts'.
BANK = dataclasses.replace(
    SOURCE, num_layers=3, num_dense_layers=0, layers="moe dense moe:8",
    moe=config.MoEConfig(num_experts=4, top_k=2, d_expert=16, num_shared_experts=1, selection_bias=True,
                         renormalize=True, score="sigmoid"),
)  # fmt: skip

PLAIN = dataclasses.replace(BANK, num_layers=2, layers="")


@functools.cache
def bank(shape=(1, 1, 1), seed=1, cfg: ModelConfig = BANK):
    """A model with experts, its weights large enough that layers are far from linear, and random selection biases."""
    with jax.set_mesh(mesh_of(*shape)):
        params, bias = model.init(cfg, jax.random.key(seed))
        noise = lambda b: 0.2 * jax.random.normal(jax.random.key(seed), b.shape) if b.dtype == jnp.float32 else b
        return cfg, join(params, jax.tree.map(noise, bias))


def made(chain, source, shape=(1, 1, 1), **given):
    with jax.set_mesh(mesh_of(*shape)):
        return upcycle.apply(chain, *source, **given)


def off(source, result, shape=(1, 1, 1)) -> float:
    return upcycle.logits_error(source, result, mesh_of(*shape), TOKENS)


def arrays(result) -> dict[str, np.ndarray]:
    return {path: np.asarray(w) for path, w in flatten(result[1]).items()}


def same_bits(a, b):
    assert a[0] == b[0]
    jax.tree.map(np.testing.assert_array_equal, arrays(a), arrays(b))


def scores_of(cfg, first: int):
    """Scores by which the first experts of every layer stay: `first` of those with the smaller number."""
    count = lambda e: first * e // min(cfg.expert_counts)
    return {path: np.arange(shape[1])[None] < np.full((shape[0], 1), count(shape[1])) + 0.0
            for path, shape in Prune(first).score_shapes(cfg).items()}  # fmt: skip


# --- what keeps the function -----------------------------------------------------------------------------------------


def check_preserved(chain, source, shape=(1, 1, 1), copies=1):
    cfg, params = source
    result = made(chain, (cfg, (params,) * copies if copies > 1 else params), shape)
    assert not [t.changes(c) for t, c in steps(chain, cfg) if t.changes(c) and t.sources == 1]
    assert off(source, result, shape) < 1e-5
    return result


def steps(chain, cfg):
    for transform in chain:
        yield transform, cfg
        cfg = transform.config(cfg)


@pytest.mark.slow
def test_merged_deeper_and_grown_it_is_the_same_function():
    """On a mesh: two equal models in one bank, layers that are the identity at first, new experts that are closed."""
    chain = [Merge(2), Depth(3, new="identity"), Grow(12)]
    cfg, _ = check_preserved(chain, bank((2, 2, 2), cfg=PLAIN), (2, 2, 2), copies=2)
    assert (cfg.num_layers, cfg.moe.top_k, cfg.moe.num_experts) == (3, 4, 12)


@pytest.mark.slow
def test_anywhere_it_is_the_same_function():
    cfg, _ = check_preserved([Merge(2), Depth(6, "stack", "identity"), Grow(12)], bank(), copies=2)
    assert cfg.layers == "2*(moe dense moe:24)"


def test_what_is_grown_is_pruned_again():
    """Bit for bit, on a mesh; and no device ever has an array larger than its part of a bank."""
    wide = dataclasses.replace(PLAIN, moe=dataclasses.replace(BANK.moe, d_expert=256), vocab_size=16)
    source, shape, chain = bank((1, 2, 4), cfg=wide), (1, 2, 4), [Grow(8), Prune(4)]
    scores = {path: jnp.asarray(s) for path, s in scores_of(Grow(8).config(wide), 4).items()}
    with jax.set_mesh(mesh_of(*shape)):
        compiled = upcycle.traced(chain, wide).lower(source[1], jax.random.key(0), scores).compile()
        result = compiled(source[1], jax.random.key(0), scores)
        specs = upcycle.specs_of(wide)
    assert jax.tree.map(lambda w: w.sharding.spec, result) == specs
    same_bits((wide, result), source)
    largest = max(w.addressable_shards[0].data.nbytes for w in jax.tree.leaves(result))
    sizes = [4 * np.prod([int(n) for n in a.split(",")]) for a in re.findall(r"f32\[([\d,]+)\]", compiled.as_text())]
    assert max(sizes) <= 2 * largest  # of the grown bank: 8 experts where the model has 4


@pytest.mark.slow
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_closed_columns_keep_the_function_until_they_open(score):
    cfg = dataclasses.replace(BANK, moe=dataclasses.replace(BANK.moe, score=score))
    source = bank(cfg=cfg)
    grown, params = check_preserved([Grow(6)], source)
    biases = {path: b for path, b in arrays((grown, params)).items() if path.endswith("router_bias")}
    for b in biases.values():
        old = b.shape[1] * 2 // 3
        assert (b[:, :old].min(1, keepdims=True) - b[:, old:] >= 1).all()
    opened = {path: b + 2.0 * (b < b.min() + 0.5) for path, b in biases.items()}
    assert off(source, (grown, nest(flatten(params) | opened))) > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("name", ["topk_score", "softmax", "sigmoid", "one"])
def test_equal_models_merged_are_one(name):
    fields = {"topk_score": {"score_order": "topk_score", "score": "softmax", "renormalize": False},
              "softmax": {"score": "softmax", "renormalize": False}, "sigmoid": {"renormalize": False},
              "one": {"combine": "one", "renormalize": False}}[name]  # fmt: skip
    source = bank(cfg=dataclasses.replace(BANK, moe=dataclasses.replace(BANK.moe, **fields)))
    check_preserved([Merge(3)], source, copies=3)
    check_preserved([Merge(3)], dense(), copies=3)
    check_preserved([Merge(2, top_k=1, dense_layers=1, router_std=STD)], dense(), copies=2)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["interpolate", "stack"])
def test_identity_layers_anywhere(order):
    """With late blocks, tables, memories, latent experts, and learned scales of the residual stream."""
    moe = dataclasses.replace(BANK.moe, latent=12, latent_norm=True)
    late = dataclasses.replace(BANK, num_layers=5, layers="2*(late dense) table", moe=moe)
    memory = dataclasses.replace(BANK, num_layers=4, layers="2*(memory moe)", norm="post", residual_scale=True,
                                 memory=config.MemoryConfig(8, 2, 3, 6))  # fmt: skip
    for cfg, layers in ((late, 10), (memory, 6)):
        check_preserved([Depth(layers, order, "identity")], bank(cfg=cfg))


def test_beside_a_dense_layer():
    """Experts of zeros leave the dense function alone; a token's shared expert is the dense layer, bit for bit."""
    chain = [Beside(4, 8, router_std=STD, dense_layers=1)]
    cfg, params = apply(chain)
    assert not chain[0].changes(SOURCE) and distance(upcycle.logits(cfg, params, TOKENS, mesh_of(1, 1, 1))) < 1e-5
    moe, mlp = params["layers"]["moe"], dense()[1]["dense_layers"]["mlp"]
    assert cfg.moe.num_shared_experts == 4 and not np.any(moe["w_down"]) and np.std(moe["w_up"]) > 0.2
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b[1]), moe["shared"], mlp)


@pytest.mark.slow
def test_copies_beside_a_dense_layer():
    chain = [Beside(8, 8, top_k=4, init="copy", router_std=STD)]
    moe, mlp = apply(chain)[1]["layers"]["moe"], dense()[1]["dense_layers"]["mlp"]
    for e in range(8):
        units = slice(8 * (e % 4), 8 * (e % 4) + 8)
        np.testing.assert_array_equal(moe["w_up"][:, e], mlp["w_up"][:, :, units])
        np.testing.assert_array_equal(moe["w_down"][:, e], mlp["w_down"][:, units])
    assert chain[0].changes(SOURCE) and error(chain) > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("layers", ["", "2*table", "dense table"])
def test_all_units_in_every_expert_are_the_dense_layer(layers):
    scores = {"dense_layers": np.random.default_rng(0).normal(size=(2, 32))}
    for shared, exact in ((32, True), (8, False)):
        chain = [Importance(4, shared, layers=layers)]
        result = made(chain, dense(), scores=scores)
        assert (off(dense(), result) < 1e-5) == exact == (not chain[0].changes(SOURCE))
        assert result[0].layers == layers and result[0].moe.d_expert == (32 if exact else 14)


# --- which experts, which units --------------------------------------------------------------------------------------


def test_pruning_keeps_what_has_the_most_tokens():
    """In their order, with their columns and biases; other parameters are the same bits."""
    counts = [[5, 1, 7, 7], [0, 3, 9, 1, 2, 8, 8, 0]]
    scores = upcycle.scores_by_block(BANK, counts)
    cfg, params = made([Prune(2)], bank(), scores=scores)
    assert cfg.layers == "moe dense moe:4" and cfg.moe.num_experts == 2
    old, new = arrays(bank()), arrays((cfg, params))
    places = [place for place in BANK.places if place.kind.experts]
    for place, kept in zip(places, ([2, 3], [1, 2, 5, 6]), strict=True):
        block = f"{place.path}/moe/"
        for name in ("w_gate", "w_up", "w_down", "router_bias"):
            np.testing.assert_array_equal(new[block + name], old[block + name][:, kept])
        np.testing.assert_array_equal(new[f"{block}w_router"], old[f"{block}w_router"][:, :, kept])
    for path, w in flatten(params).items():
        if not re.search("/moe/(w_|router_bias)", path):
            np.testing.assert_array_equal(w, arrays(bank())[path])


def test_new_experts_are_mixtures_that_no_token_chooses():
    """Of the rank of the old ones; their router columns are the same mixtures. Routing is that of the old columns."""
    old, (cfg, params) = arrays(bank()), made([Grow(6)], bank())
    new = arrays((cfg, params))
    path = next(path for path in new if path.endswith("/moe/w_up"))
    flat = lambda w: w[0].reshape(w.shape[1], -1).astype(np.float64)
    mixture, *_ = np.linalg.lstsq(flat(old[path]).T, flat(new[path])[4:].T, rcond=None)
    np.testing.assert_allclose(np.linalg.norm(mixture, axis=0), 1, rtol=1e-4)
    block = path.removesuffix("w_up")
    for name in ("w_gate", "w_up", "w_down"):
        np.testing.assert_array_equal(new[block + name][:, :4], old[block + name])
        np.testing.assert_allclose(flat(new[block + name])[4:], mixture.T @ flat(old[block + name]), atol=1e-5)
    columns = new[f"{block}w_router"][0]
    np.testing.assert_allclose(columns[:, 4:], old[f"{block}w_router"][0] @ mixture, atol=1e-5)
    logits = np.random.default_rng(0).normal(0, 30, (500, 16)).astype(np.float32) @ columns
    facts = Facts(jnp.ones(500, bool))
    plans = [
        route(jnp.asarray(z), jnp.asarray(b), facts, dataclasses.replace(cfg.moe, num_experts=len(b)))[0]
        for z, b in ((logits[:, :4], old[f"{block}router_bias"][0]), (logits, new[f"{block}router_bias"][0]))
    ]
    np.testing.assert_array_equal(plans[0].experts, plans[1].experts)
    np.testing.assert_array_equal(plans[0].weights, plans[1].weights)


def test_dealing_of_hidden_units():
    """The shared ones to all, the others by rank: e gets s + e, s + e + E, …; each once, the last ranks to nobody."""
    ranks = np.random.default_rng(0).permutation(32)
    scores = jnp.asarray(-np.argsort(ranks)[None].astype(np.float32))  # unit ranks[0] is the best one
    units = np.asarray(Importance(4, shared=8).units(scores, 13))[0]
    for e in range(4):
        np.testing.assert_array_equal(units[e], ranks[[*range(8), *range(8 + e, 28, 4)]])
    dealt = units[:, 8:].ravel()
    assert len(set(dealt)) == 20 and not set(ranks[28:]) & set(units.ravel())


def test_experts_of_units_and_their_tables():
    scores = {"dense_layers": np.random.default_rng(0).normal(size=(2, 32)).astype(np.float32)}
    chain = [Importance(4, 8, layers="2*table")]
    _, params = made(chain, dense(), scores=scores)
    moe, mlp = (jax.tree.map(np.asarray, tree) for tree in (params["layers"]["moe"], dense()[1]["dense_layers"]["mlp"]))
    units = np.asarray(chain[0].units(scores["dense_layers"], 14))
    for layer, e in np.ndindex(2, 4):
        np.testing.assert_array_equal(moe["w_up"][layer, e], mlp["w_up"][layer][:, units[layer, e]])
        np.testing.assert_array_equal(moe["w_gate"][layer, e], mlp["w_gate"][layer][:, units[layer, e]])
        np.testing.assert_array_equal(moe["w_down"][layer, e], mlp["w_down"][layer][units[layer, e]])
    assert moe["table"].shape == (2, 32, 1) and (moe["table"][0] != moe["table"][1]).any() and "w_router" not in moe
    assert all(np.ptp(np.bincount(table.ravel(), minlength=4)) <= 1 for table in moe["table"])


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_importance_of_units(activation):
    """The sum of absolute values over sequences, of the change of the loss when a unit's weights grow: by differences
    in float64 of a factor on each unit. Not the absolute value of the batch's gradient."""
    cfg, params = dense(activation)
    rows = {"tokens": TOKENS[:3, :-1], "targets": TOKENS[:3, 1:]}
    found = np.asarray(upcycle.unit_scores(cfg, params, rows)["dense_layers"])

    def loss(params, row):
        z = np.asarray(upcycle.logits(cfg, params, rows["tokens"][row][None], mesh_of(1, 1, 1)))[0].astype(np.float64)
        right = np.take_along_axis(z, rows["targets"][row][:, None], 1)[:, 0]
        return np.mean(np.log(np.exp(z - z.max(1, keepdims=True)).sum(1)) + z.max(1) - right)

    def scaled(layer, unit, factor):
        mlp = {name: np.array(w) for name, w in params["dense_layers"]["mlp"].items()}
        for name, w in mlp.items():
            w[(layer, unit) if name == "w_down" else (layer, slice(None), unit)] *= factor
        placed = {name: jax.device_put(w, params["dense_layers"]["mlp"][name].sharding) for name, w in mlp.items()}
        return {**params, "dense_layers": {**params["dense_layers"], "mlp": placed}}

    step = 3e-3
    for layer, unit in ((0, 0), (0, 17), (1, 5), (1, 31)):
        sides = [scaled(layer, unit, 1 + sign * step) for sign in (1, -1)]
        changes = [(loss(sides[0], row) - loss(sides[1], row)) / (2 * step) for row in range(3)]
        assert found[layer, unit] == pytest.approx(np.abs(changes).sum(), rel=0.02, abs=2e-4)


# --- masks, AKI, depth, averages -------------------------------------------------------------------------------------


def test_masks():
    """A share of each expert's weights is 0, other ones in each; what is left has the same bits."""
    old, new = arrays(bank()), arrays(made([Mask(0.25)], bank()))
    for path, w in new.items():
        if not re.search("/moe/w_(gate|up|down)$", path):
            np.testing.assert_array_equal(w, old[path])
            continue
        gone = w != old[path]
        assert not w[gone].any() and gone.mean() == pytest.approx(0.25, abs=0.03)
        rows = gone.reshape(-1, gone[0, 0].size)
        assert (np.abs(np.corrcoef(rows) - np.eye(len(rows))) < 0.3).all()
    assert not Mask(0.0).changes(BANK) and Mask(0.25).changes(BANK)


def test_new_units_of_the_next_layer():
    """AKI by its formula: inputs as in FPI, then what is computed for old units from the layer itself, for new ones
    from the layer after, in the last layer from itself."""
    _, params = apply([Width(32, 48, 4, aki=True)])
    old = jax.tree.map(np.asarray, dense()[1]["dense_layers"])
    new = jax.tree.map(np.asarray, params["dense_layers"])
    for layer, after in ((0, 1), (1, 1)):
        doubled = lambda w: np.repeat(w, 2, axis=0) / 2  # each input channel has two copies, which share its weight
        for name in ("w_q", "w_k", "w_v"):
            want = [doubled(old["attention"][name][i]) for i in (layer, after)]
            np.testing.assert_allclose(new["attention"][name][layer], np.concatenate(want, 1), rtol=1e-6)
        for name in ("w_gate", "w_up"):
            own, its = (doubled(old["mlp"][name][i]) for i in (layer, after))
            np.testing.assert_allclose(new["mlp"][name][layer], np.concatenate([own, its[:, :16]], 1), rtol=1e-6)
        for kind, name, rows in (("attention", "w_o", np.r_[0:16, 0:16]), ("mlp", "w_down", np.r_[0:32, 0:16])):
            share = np.bincount(rows)[rows][:, None]
            own, its = (old[kind][name][i][rows] / share for i in (layer, after))
            np.testing.assert_allclose(new[kind][name][layer][:, 0::2], own, rtol=1e-6)
            np.testing.assert_allclose(new[kind][name][layer][:, 1::2], its, rtol=1e-6)
    np.testing.assert_array_equal(params["embed"], apply([Width(32, 48, 4)])[1]["embed"])
    assert Width(32, aki=True).changes(SOURCE) and not Width(aki=True).changes(SOURCE)


def test_layers_are_copied_as_units():
    assert Depth(3).origins(4) == [0, 2, 3] and Depth(2).origins(5) == [0, 4] and Depth(1).origins(3) == [0]
    assert Depth(3, "stack").origins(4) == [0, 1, 2] and Depth(6, "stack").origins(4) == [0, 1, 2, 3, 0, 1]
    late = dataclasses.replace(BANK, num_layers=6, layers="3*(late dense)")
    assert Depth(4).config(late).layers == "2*(late dense)"
    assert Depth(12, "stack").config(late).layers == "6*(late dense)"
    twos = dataclasses.replace(BANK, num_layers=8, layers="2*(dense moe) 2*(dense moe:8)")
    assert Depth(6).config(twos).layers == "dense moe 2*(dense moe:8)"
    assert Depth(12).config(twos).layers == "3*(dense moe) 3*(dense moe:8)"
    plain = dataclasses.replace(BANK, num_layers=4, num_dense_layers=1, layers="")
    assert Depth(3).config(plain).num_dense_layers == 1 and Depth(6).config(plain).num_dense_layers == 2
    pyramid = dataclasses.replace(BANK, num_layers=4, layers="2*moe 2*moe:8")
    assert Depth(2).config(pyramid).layers == "moe moe:8"
    only = dataclasses.replace(BANK, num_layers=4, layers="", num_dense_layers=2)
    assert Depth(2, "stack").config(only).num_moe_layers == 0


@pytest.mark.slow
def test_fewer_and_more_layers_have_the_parameters_of_their_own():
    for layers, order in ((2, "interpolate"), (6, "interpolate"), (6, "stack"), (2, "stack")):
        transform = Depth(layers, order)
        cfg, params = made([transform], bank())
        assert transform.changes(BANK)
        kept = transform._kept([(place,) for place in BANK.places])[0]
        for place, source in zip(cfg.places, kept, strict=True):
            old, at = arrays(bank()), BANK.places[source]
            for path, w in arrays((cfg, params)).items():
                if path.startswith(f"{place.path}/"):
                    was = old[path.replace(place.path, at.path, 1)][at.index]
                    np.testing.assert_array_equal(w[place.index], was)


def test_weighted_averages():
    """Shares sum to 1; of one model it is that model; weights that are no shares are refused."""
    models = [dense()[1], jax.tree.map(lambda w: 3 * w, dense()[1])]
    with jax.set_mesh(mesh_of(1, 1, 1)):
        mean = upcycle.average(iter(models), 2, weights=[3, 1])
        same = upcycle.average(iter(models), 2, weights=[1, 0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 1.5 * b, rtol=1e-6), mean, models[0])
    jax.tree.map(np.testing.assert_array_equal, same, models[0])
    for weights in ([1], [1, -1], [0, 0], [float("nan"), 1], [float("inf"), 1], [1e308, 1e308]):
        with pytest.raises(ConfigError, match=r"upcycle\.weights="):
            upcycle.average(iter(models), 2, weights=weights)


def test_merged_banks_and_averaged_rest():
    """Banks, columns and biases one after the other, in bits; all else the mean."""
    cfg, params = made([Merge(2)], (BANK, (bank()[1], bank(seed=2)[1])))
    new, one, two = arrays((cfg, params)), arrays(bank()), arrays(bank(seed=2))
    for path, w in new.items():
        if re.search("/moe/(w_(gate|up|down)|router_bias)$", path):
            np.testing.assert_array_equal(w, np.concatenate([one[path], two[path]], 1))
        elif path.endswith("/moe/w_router"):
            np.testing.assert_array_equal(w, np.concatenate([one[path], two[path]], 2))
        else:
            np.testing.assert_allclose(w, (one[path] + two[path]) / 2, rtol=1e-6, atol=1e-7)
    assert Merge(2).changes(BANK)
    same_bits(made([Merge(1)], bank()), bank())
    dense_pair = (dense()[1], jax.tree.map(lambda w: 3 * w, dense()[1]))
    mixed = made([Merge(2)], (dense()[0], dense_pair))[1]["layers"]
    for name, w in mixed["moe"].items():
        if name != "w_router":
            np.testing.assert_array_equal(w[:, 1], dense_pair[1]["dense_layers"]["mlp"][name])
    np.testing.assert_allclose(mixed["attention"]["w_q"], 2 * dense()[1]["dense_layers"]["attention"]["w_q"], rtol=1e-6)


# --- refusals --------------------------------------------------------------------------------------------------------


def moe_of(**fields) -> ModelConfig:
    layers = fields.pop("layers", BANK.layers)
    return dataclasses.replace(BANK, layers=layers, moe=dataclasses.replace(BANK.moe, **fields))


UNBIASED = dataclasses.replace(BANK.moe, selection_bias=False)
TABLES = dataclasses.replace(BANK, num_layers=4, layers="2*(dense table)", moe=UNBIASED)
MEMORY = dataclasses.replace(SOURCE, num_dense_layers=0, layers="dense memory")
LATE = dataclasses.replace(BANK, num_layers=6, layers="3*(late dense)")
SKIPS = moe_of(identity_experts=1)
TOPK = moe_of(score="softmax", score_order="topk_score", renormalize=False)
REFUSED = [
    (Prune(1), BANK, "upcycle.prune=1: must be in [2, 4]"),
    (Prune(5), BANK, "upcycle.prune=5: must be in [2, 4]"),
    (Prune(3), moe_of(layers="moe dense moe:6"), "upcycle.prune=3: must be a multiple of 2"),
    (Prune(2), SOURCE, "it has no experts"),
    (Prune(2), TABLES, "the model has layers='2*(dense table)': tables name experts"),
    (Prune(2), moe_of(num_groups=2), "the model has moe.num_groups=2: groups of experts"),
    (Grow(3), BANK, "upcycle.grow=3: must be ≥ the model's num_experts=4"),
    (Grow(8), TOPK, "the model has moe.score_order='topk_score': a bias closes only"),
    (Grow(8), moe_of(score="sqrt_softplus"), "moe.score='sqrt_softplus': a bias"),
    (Grow(8), moe_of(choice="expert", selection_bias=False), "moe.choice='expert': a bias"),
    (Grow(8), TABLES, "tables name experts"),
    (Merge(2), moe_of(identity_experts=2), "moe.identity_experts=2: those of several models"),
    (Merge(2), TABLES, "tables name experts"),
    (Merge(2, layers="2*(dense moe)"), BANK, "upcycle.layers='2*(dense moe)': the models have experts and routers"),
    (Merge(2, top_k=9), BANK, "upcycle.top_k=9: must be in [1, 8]; nearest valid: 8"),
    (Merge(2, top_k=3), SOURCE, "upcycle.top_k=3: must be in [1, 2]"),
    (Merge(2), MEMORY, "memory blocks"),
    (Merge(0), SOURCE, "upcycle.sources=0: must be ≥ 1"),
    (Beside(4, 5), SOURCE, "upcycle.d_expert=5: must divide the dense d_ff=32"),
    (Beside(4, 8, init="ones"), SOURCE, "upcycle.init='ones': must be zero or copy"),
    (Beside(4, 8, layers="(late dense)"), SOURCE, "a late block has its feed-forward layer beside"),
    (Beside(4, 8, layers="2*table"), SOURCE, "upcycle.layers='2*table': the table"),
    (Beside(4, 8, moe={"router": "mlp"}), SOURCE, "upcycle.moe.router='mlp': has weights"),
    (Beside(4, 8), BANK, "the model is a Mixture of Experts already"),
    (Importance(4, 33), SOURCE, "upcycle.shared=33: must be in [0, 32]"),
    (Importance(4, 8, 15), SOURCE, "upcycle.d_expert=15: must be in [8, 14]"),
    (Importance(40), SOURCE, "upcycle.num_experts=40: 32 hidden units"),
    (Importance(4, layers="dense moe:8"), SOURCE, "upcycle.layers='dense moe:8': has no block with 4 experts"),
    (Importance(4, layers="moe table:8"), SOURCE, "a layer's hidden units are dealt to num_experts=4"),
    (Importance(4), MEMORY, "memory blocks"),
    (Importance(4), BANK, "the model is a Mixture of Experts already"),
    (Depth(0), BANK, "upcycle.depth=0: must be in [1, 9999]"),
    (Depth(5), LATE, "upcycle.depth=5: is no number of blocks of whole units"),
    (Depth(8, new="identity"), SKIPS, "upcycle.depth_new='identity': a layer with identity_experts=1"),
    (Width(32), BANK, "the model is a Mixture of Experts already"),
    (Mask(1.5), BANK, "upcycle.mask=1.5: must be in [0, 1]; nearest valid: 1.0"),
    (Mask(0.1), SOURCE, "upcycle.mask=0.1: needs a model with experts"),
    (VirtualGroups(2), BANK, "the model is a Mixture of Experts already"),
    (Cluster(4), BANK, "the model is a Mixture of Experts already"),
]  # fmt: skip


@pytest.mark.parametrize(("transform", "cfg", "said"), REFUSED, ids=range(len(REFUSED)))
def test_refused(transform, cfg, said):
    with pytest.raises(ConfigError) as raised:
        upcycle.final_config([transform], cfg)
    assert said in str(raised.value) and re.search("nearest valid|name dense and moe|put it after", str(raised.value))


def test_scores_are_checked_before_anything_is_computed():
    good = scores_of(BANK, 2)
    path = sorted(good)[0]
    cases = {
        "upcycle.scores=None: Prune needs scores": ([Prune(2)], None),
        "upcycle.scores='given': no transform of the chain uses scores": ([Mask(0.1)], good),
        "is not a block that is scored": ([Prune(2)], good | {"embed": np.ones(3)}),
        "upcycle.scores=None: must have the shape": ([Prune(2)], {k: v for k, v in good.items() if k != path}),
        "upcycle.scores=(1, 3): must have the shape": ([Prune(2)], good | {path: np.ones((1, 3))}),
        "has a score that is not a finite number": ([Prune(2)], good | {path: np.full(good[path].shape, np.nan)}),
        "each needs scores of another model": ([Prune(3), Prune(2)], good),
        "upcycle.from=1: the chain makes one model of 2": ([Merge(2)], None),
        "put it at the start of the chain": ([Mask(0.1), Merge(2)], None),
    }
    for said, (chain, scores) in cases.items():
        if "Prune(3)" in str(chain):
            chain = [Prune(4), Prune(2)]
        with pytest.raises(ConfigError) as raised:
            upcycle.apply(chain, *bank(), scores=scores)
        assert said in str(raised.value), said


def test_counts_of_an_evaluation(tmp_path):
    """Summed over domains; what is no such file, and what is of another model, is said in one line."""
    counts = [[[1, 2, 3, 4], [1, 1, 1, 1]], [[0] * 8, list(range(8))]]
    (tmp_path / "eval.json").write_text(json.dumps({"step": 7, "tokens_per_expert": counts}), encoding="utf-8")
    found, step = upcycle.read_counts(tmp_path, BANK)
    assert step == 7
    np.testing.assert_array_equal(np.concatenate([w[0] for w in found.values()]), [2, 3, 4, 5, *range(8)])
    for body in ("[]", "{}", '{"tokens_per_expert": 3}', '{"tokens_per_expert": [["a"]]}', "{", '{"step": "x"}',
                 '{"tokens_per_expert": [[[1], [2, 3]]]}'):  # fmt: skip
        (tmp_path / "bad.json").write_text(body, encoding="utf-8")
        with pytest.raises((FileError, ConfigError)):
            upcycle.read_counts(tmp_path / "bad.json", BANK)
    with pytest.raises(ConfigError, match="has 4 router columns"):
        upcycle.scores_by_block(BANK, [counts[1][0], counts[1][0]])
    with pytest.raises(FileError, match=r"eval\.py --workdir=.* writes it"):
        upcycle.read_counts(tmp_path.parent, BANK)


# --- several processes -----------------------------------------------------------------------------------------------


def fingerprint(shape) -> list[float]:
    """Numbers of what chains make on a mesh: the sums of squares of all parameters."""
    source = bank(shape)
    scores = {path: jnp.asarray(s) for path, s in scores_of(Grow(8).config(BANK), 4).items()}
    results = [
        made([Grow(8), Prune(4)], source, shape, scores=scores),
        made([Merge(2), Depth(8), Grow(12), Noise(0.1), Mask(0.1)], (BANK, (source[1], bank(shape, 2)[1])), shape),
        made([Width(32, 48, 4, aki=True), Beside(4, 8)], dense("swiglu", shape), shape),
        made([Importance(4, 8, layers="2*table")], dense("swiglu", shape), shape,
             scores={"dense_layers": jnp.cos(jnp.arange(64.0)).reshape(2, 32)}),
    ]  # fmt: skip
    with jax.set_mesh(mesh_of(*shape)):
        size = jax.jit(lambda p: sum(jnp.sum(jnp.square(w.astype(jnp.float32))) for w in jax.tree.leaves(p)))
        return [float(size(params)) for _, params in results]


@pytest.mark.slow
def test_two_processes_and_every_mesh():
    want = fingerprint((1, 1, 1))
    np.testing.assert_allclose(fingerprint((2, 2, 2)), want, rtol=1e-5)
    two_processes.run(f"""
import sys
sys.path.insert(0, "tests")
import numpy as np
import test_upcycle_bank
np.testing.assert_allclose(test_upcycle_bank.fingerprint((1, 2, 4)), {want}, rtol=1e-5)
""")
