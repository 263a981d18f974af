"""Upcycling of models that have experts: prune, grow, merge, depth; experts beside dense layers, or of their units."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import config, upcycle
from moe_jax.moe.routing import Facts, route
from moe_jax.tree import flatten, nest
from moe_jax.upcycle import (
    Beside,
    Depth,
    Grow,
    Importance,
    Mask,
    Merge,
    Noise,
    Prune,
    Width,
)  # fmt: skip
from tests import two_processes
from tests.upcycle_source import (
    BANK,
    PLAIN,
    SOURCE,
    STD,
    TOKENS,
    apply,
    arrays,
    bank,
    dense,
    distance,
    error,
    made,
    mesh_of,
    off,
    same_bits,
    scores_of,
)

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


@pytest.mark.slow
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
    assert max(sizes) <= 4 * largest  # a whole grown bank would be 16 times as large


@pytest.mark.slow
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_closed_columns_keep_the_function_until_they_open(score):
    cfg = dataclasses.replace(BANK, moe=dataclasses.replace(BANK.moe, score=score))
    source = bank(cfg=cfg)
    if score == "softmax":  # whose scores more columns change, and so their order with biases
        assert Grow(6).changes(cfg)
        source = (cfg, nest({p: 0 * w if p.endswith("bias") else w for p, w in flatten(source[1]).items()}))
    grown, params = made([Grow(6)], source)
    assert off(source, (grown, params)) < 1e-5
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
    """With late blocks, tables, memories, latent experts, learned scales of the residual stream, and windows."""
    moe = dataclasses.replace(BANK.moe, latent=12, latent_norm=True)
    late = dataclasses.replace(BANK, num_layers=5, layers="2*(late dense) table", moe=moe)
    memory = dataclasses.replace(BANK, num_layers=4, layers="2*(memory moe)", norm="post", residual_scale=True,
                                 memory=config.MemoryConfig(8, 2, 3, 6))  # fmt: skip
    windows = dataclasses.replace(BANK, num_layers=4, layers="2*(dense moe)", window=4, attention_layers="window full")
    for cfg, layers in ((late, 10), (memory, 6), (windows, 6)):
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
    cfg, params = upcycle.apply([Prune(2)], *bank(), scores=scores)  # on the mesh of the parameters: none is in use
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


@pytest.mark.parametrize("layers", ["dense moe dense moe:8", "2*moe dense 2*moe:8"])
def test_layers_keep_their_places(layers):
    """Also where another order of the units, or the attention of each layer, would be said more shortly."""
    size = {"num_layers": 4 if layers[0] == "d" else 5}
    for text in (layers, layers.replace(":8", "")):
        for attention in ({}, {"window": 4, "attention_layers": "full window"}):
            cfg = dataclasses.replace(BANK, layers=text, **size, **attention)
            for change, experts in ((Prune(2), 2), (Grow(8), 8), (Merge(2), 8)):
                new = change.config(cfg)
                resized = [place.kind._replace(experts=place.kind.experts * experts // 4) for place in cfg.places]
                want = [place._replace(kind=kind) for place, kind in zip(cfg.places, resized, strict=True)]
                assert list(new.places) == want and new.attends == cfg.attends


def test_what_depends_on_experts_that_no_token_chooses():
    """A softmax over all experts, if it weighs them or if biases are added to it; and the rows of an expert."""
    softmax = {"score": "softmax", "renormalize": True}
    changed = {
        "the softmax is over": ({"selection_bias": True}, {"selection_bias": False, "renormalize": False}),
        "compute='capacity'": ({"selection_bias": False, "compute": "capacity"},),
        "": ({"selection_bias": False}, {"score": "sigmoid"}, {"score_order": "topk_score", "renormalize": False}),
    }
    for why, several in changed.items():
        for fields in several:
            cfg = dataclasses.replace(PLAIN, moe=dataclasses.replace(PLAIN.moe, **(softmax | fields)))
            assert Grow(8).changes(cfg).startswith(why) and bool(Grow(8).changes(cfg)) == bool(why)
            assert ", and " + (why or "no reason") in Prune(2).changes(cfg) or not why
            assert not Grow(4).changes(cfg) and not Prune(4).changes(cfg)


def test_biases_of_a_softmax_of_equal_models():
    """Two equal banks in one have the weights of either, although each score is halved."""
    old = arrays(bank())
    for fields in ({"score": "softmax"}, {"score": "softmax", "renormalize": False}):
        cfg = dataclasses.replace(BANK, moe=dataclasses.replace(BANK.moe, **fields))
        final, new = Merge(2).config(cfg), Merge(2).params(cfg, (old, old), jax.random.key(0))
        path = next(path for path in new if path.endswith("/router_bias"))
        logits, given = np.random.default_rng(0).normal(0, 2, (500, 4)).astype(np.float32), []
        for moe, z, bias in ((cfg.moe, logits, 3 * old[path]), (final.moe, np.tile(logits, 2), 3 * new[path])):
            run = jax.jit(lambda z, bias, moe=moe: route(z, bias, Facts(jnp.ones(500, bool)), moe)[0])
            plan = run(z, bias[0])
            weights = np.zeros((500, 4))
            np.add.at(weights, (np.arange(500)[:, None], np.asarray(plan.experts) % 4), np.asarray(plan.weights))
            given.append(weights)
        np.testing.assert_allclose(*given, rtol=1e-5)


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
