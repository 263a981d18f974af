"""The transforms beside virtual groups: noise, Drop-Upcycling, EMoE's clusters, depth, width, averages."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import upcycle
from moe_jax.errors import ConfigError
from moe_jax.upcycle import Cluster, Depth, Drop, Mask, Noise, VirtualGroups, Width, cluster
from tests.upcycle_source import (
    BANK,
    SOURCE,
    STD,
    TOKENS,
    apply,
    arrays,
    bank,
    dense,
    dense_logits,
    distance,
    error,
    made,
    mesh_of,
)

EXPERTS = ("w_gate", "w_up", "w_down")


@functools.cache
def experts(*more, g=2) -> dict[str, np.ndarray]:
    """`[L, E, …]` of an upcycled model."""
    made = apply([VirtualGroups(4, g, g), *more])[1]["layers"]["moe"]
    return {name: np.asarray(made[name], np.float64) for name in EXPERTS}


def units(name, w):
    """The hidden units first: `[L, E, f, D]`."""
    return w if name == "w_down" else np.swapaxes(w, 2, 3)


def test_noise():
    """Of the size asked for, another for every expert, on nothing but experts."""
    before, after = experts(), experts(Noise(0.1))
    for name in EXPERTS:
        noise = after[name] - before[name]
        size = noise.std((2, 3)) / before[name].std((2, 3))
        np.testing.assert_allclose(size, 0.1, rtol=0.2)
        flat = noise.reshape(2, 8, -1)
        like = np.corrcoef(flat.reshape(16, -1)) - np.eye(16)
        assert np.abs(like).max() < 0.35
    assert not Noise(0.0).changes(SOURCE) and Noise(0.1).changes(SOURCE)


@pytest.mark.parametrize("shared", [True, False])
def test_drop(shared):
    """Exactly r·f units of every expert are new, in all three matrices the same ones if shared."""
    before, after = experts(), experts(Drop(0.375, shared))
    changed = {}
    for name in EXPERTS:
        a, b = units(name, before[name]), units(name, after[name])
        changed[name] = (a != b).any(-1)
        assert (changed[name] == (a != b).all(-1)).all()
        assert (changed[name].sum(-1) == 6).all()  # of 16
    assert (len({changed[n].tobytes() for n in EXPERTS}) == 1) == shared
    assert len({row.tobytes() for row in changed["w_up"].reshape(8, -1)}) == 8  # experts differ


def test_statistics_of_what_is_dropped():
    """Mean and deviation of the new units are those of the ones that they replace, in each expert."""
    cfg, params = dense(d_ff=1024)
    shifted = {**params["dense_layers"]["mlp"]}
    shifted["w_up"] = shifted["w_up"] * jnp.arange(1, 3)[:, None, None] + 0.5
    params = {**params, "dense_layers": {**params["dense_layers"], "mlp": shifted}}
    with jax.set_mesh(mesh_of(1, 1, 1)):
        made = upcycle.apply([VirtualGroups(2, 1, 1), Drop(0.5)], cfg, params)[1]["layers"]["moe"]
    for name in EXPERTS:
        old, new = np.asarray(shifted[name], np.float64)[:, None], np.asarray(made[name], np.float64)
        picked = units(name, old != new).all(-1)
        for layer, e in np.ndindex(2, 2):
            was, now = (units(name, w)[layer, e % w.shape[1]][picked[layer, e]] for w in (old, new))
            assert was.shape == (512, 16)
            assert now.std() == pytest.approx(was.std(), rel=0.03)
            assert now.mean() == pytest.approx(was.mean(), abs=0.04 * was.std())


def test_nothing_dropped_is_exact_and_everything_dropped_is_not():
    jax.tree.map(np.testing.assert_array_equal, experts(Drop(0.0)), experts())
    assert error([VirtualGroups(4, 2, 2, router_std=STD), Drop(1.0)]) > 0.1
    moe = VirtualGroups(4, 2, 2).config(SOURCE)
    assert not Drop(0.0).changes(moe) and "50%" in Drop(0.5).changes(moe)


# --- EMoE ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["swiglu", pytest.param("gelu", marks=pytest.mark.slow)])
def test_clusters_are_the_dense_layer(activation):
    """All chosen: the dense function, for gated and plain layers. Fewer: not."""
    cfg, params = apply([Cluster(8, 8, dense_layers=1)], activation)
    few = dataclasses.replace(cfg, moe=dataclasses.replace(cfg.moe, top_k=4))
    errors = [distance(upcycle.logits(c, params, TOKENS, mesh_of(1, 1, 1)), activation) for c in (cfg, few)]
    assert errors[0] < 1e-5 < 0.05 < errors[1]
    assert not Cluster(8, 8).changes(SOURCE) and "4 of the 8" in Cluster(8, 4).changes(SOURCE)


def test_every_unit_is_in_one_cluster():
    """No parameter is new: experts are the dense units dealt out, router rows the mean of an expert's keys."""
    source = {n: np.asarray(w) for n, w in dense()[1]["dense_layers"]["mlp"].items()}
    made = jax.tree.map(np.asarray, apply([Cluster(4, 2)])[1]["layers"]["moe"])
    for layer in range(2):
        rows = {n: units(n, made[n])[layer].reshape(32, 16) for n in EXPERTS}
        old = {n: source[n][layer] if n == "w_down" else source[n][layer].T for n in EXPERTS}
        order = [int(np.flatnonzero((old["w_gate"] == row).all(1))[0]) for row in rows["w_gate"]]
        assert sorted(order) == list(range(32))
        for n in EXPERTS:
            np.testing.assert_array_equal(rows[n], old[n][order])
        np.testing.assert_allclose(made["w_router"][layer].T, rows["w_gate"].reshape(4, 8, 16).mean(1), atol=1e-6)


def test_assignment_takes_the_shortest_distances_first():
    rng = np.random.default_rng(3)
    for f, e in ((12, 3), (20, 5), (8, 8), (6, 1)):
        distance = rng.normal(size=(f, e)).astype(np.float32)
        want, left = np.full(f, -1), np.full(e, f // e)
        for i in np.argsort(distance, axis=None):
            unit, c = divmod(int(i), e)
            if want[unit] < 0 and left[c]:
                want[unit], left[c] = c, left[c] - 1
        np.testing.assert_array_equal(jax.jit(cluster.assign)(distance), want)


def test_clusters_are_found():
    """Four planted directions, eight units each, shuffled."""
    rng = np.random.default_rng(4)
    truth = rng.permutation(np.repeat(np.arange(4), 8))
    keys = (np.eye(16)[:, truth] + 0.05 * rng.normal(size=(16, 32))) * rng.uniform(0.5, 3.0, 32)
    found = jax.jit(cluster.cluster, static_argnums=(1, 2))(jnp.asarray(keys, jnp.float32), 4, 10, jax.random.key(3))
    assert all(len(set(truth[np.asarray(found)[i : i + 8]])) == 1 for i in range(0, 32, 8))


# --- growth ----------------------------------------------------------------------------------------------------------


def test_depth():
    assert Depth(5, "stack").origins(2) == [0, 1, 0, 1, 0] and Depth(5).origins(2) == [0, 0, 0, 1, 1]
    cfg, params = apply([Depth(5, "stack")])
    assert cfg.num_layers == cfg.num_dense_layers == 5
    old = dense()[1]["dense_layers"]["mlp"]["w_up"]
    np.testing.assert_array_equal(params["dense_layers"]["mlp"]["w_up"], old[np.asarray([0, 1, 0, 1, 0])])
    assert error([Depth(5)]) > 0.1 and Depth(5).changes(SOURCE)
    for order in ("stack", "interpolate"):
        chain = [Depth(5, order, "identity"), VirtualGroups(4, 2, 2, router_std=STD)]
        assert error(chain) < 1e-5 and not chain[0].changes(SOURCE)


@pytest.mark.parametrize("activation", ["swiglu", pytest.param("relu2", marks=pytest.mark.slow)])
def test_width(activation):
    """Channels, hidden units and heads are copied, the function stays; then experts are made of the wide model."""
    chain = [Width(48, 72, 6)]
    cfg, params = apply(chain, activation)
    assert (cfg.d_model, cfg.d_ff, cfg.num_heads, cfg.num_kv_heads) == (48, 72, 6, 3)
    assert params["dense_layers"]["attention"]["w_o"].shape == (2, 48, 48)
    # An RMSNorm's eps counts as much as before, so nothing is lost but rounding.
    assert error(chain, activation) < 1e-5
    if activation == "swiglu":
        assert error([*chain, VirtualGroups(4, 8, 8, router_std=STD)]) < 1e-5


def test_width_with_one_table_and_a_norm_over_all_heads():
    cfg, params = dense(tie_embeddings=True, qk_norm_over="projection")
    tokens, mesh = np.arange(32, dtype=np.int32).reshape(2, 16), mesh_of(1, 1, 1)
    with jax.set_mesh(mesh):
        wide = upcycle.apply([Width(32, 0, 4)], cfg, params)
    a, b = (np.asarray(upcycle.logits(*x, tokens, mesh)) for x in ((cfg, params), wide))
    np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(a).max())


def test_average():
    params = [dense()[1], jax.tree.map(lambda w: 3 * w, dense()[1])]
    with jax.set_mesh(mesh_of(1, 1, 1)):
        mean = upcycle.average(iter(params), 2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 2 * b, rtol=1e-6), mean, params[0])
    with pytest.raises(ValueError, match="moe/table has no mean: it is of int32"):
        upcycle.average(iter([{"moe": {"table": np.ones(3, np.int32)}}] * 2), 2)
    half = dense(param_dtype="bfloat16")[1]
    with jax.set_mesh(mesh_of(1, 1, 1)):
        same = upcycle.average(iter([half] * 3), 3)
    jax.tree.map(np.testing.assert_array_equal, same, half)


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
    short = dataclasses.replace(BANK, num_layers=4, layers="dense moe dense moe")
    assert Depth(2).config(short).num_dense_layers == 1 and Depth(6).config(short).num_layers == 6
    windows = dataclasses.replace(BANK, num_layers=6, layers="", window=4, attention_layers="window full")
    for depth in (Depth(2), Depth(8), Depth(12, "stack")):
        assert depth.config(windows).attends == windows.attends[:2] * (depth.num_layers // 2)
    everywhere = dataclasses.replace(windows, attention_layers="")  # all layers alike, but not as by default
    assert Depth(7).config(everywhere) == dataclasses.replace(everywhere, num_layers=7)
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


def test_what_is_written_down():
    """Plain JSON values, from which the chain can be made again."""
    chain = [Depth(4, new="identity"), VirtualGroups(4, 2, 4, moe={"selection_bias": True}), Drop(0.25)]
    written = upcycle.describe(chain)
    assert [w["transform"] for w in written] == ["Depth", "VirtualGroups", "Drop"]
    assert written[2] == {"transform": "Drop", "ratio": 0.25, "shared_indices": True}
    again = [getattr(upcycle, w["transform"])(**{k: v for k, v in w.items() if k != "transform"}) for w in written]
    assert again == chain


def test_the_seed_draws_router_and_noise():
    chain = [VirtualGroups(4, 2, 2), Drop(0.5)]
    one, same, other = (apply(chain, seed=seed)[1]["layers"]["moe"] for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, one, same)
    assert all((np.asarray(one[n]) != np.asarray(other[n])).any() for n in ("w_router", "w_up"))
    assert dataclasses.replace(chain[0], router_std=0.0) != chain[0] and dense_logits().shape == (8, 16, 32)
