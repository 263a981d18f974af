"""Upcycling of parameters: which chains keep the dense model's function, what every matrix becomes, and on meshes."""

import dataclasses
import functools
import itertools
import re

import jax
import numpy as np
import pytest

from moe_jax import model, upcycle
from moe_jax.upcycle import Cluster, Depth, Drop, Noise, VirtualGroups, Width
from tests.pairs import covering
from tests.upcycle_source import (
    ACTIVATIONS,
    FIXED,
    SOFTMAX_TOPK,
    SOURCE,
    STD,
    TOKENS,
    apply,
    dense,
    dense_logits,
    distance,
    error,
    mesh_of,
)  # fmt: skip


def case(routing, activation, g, copies):
    return pytest.param(routing, activation, g, copies, id=f"{routing}-{activation}-G{g}-T{copies * g}")


# Every routing, activation and G, with T = G, 2·G and E·G in turn. The fast part has every value of each, the slow one
# every pair of any two.
EVERYTHING = [
    (r, a, g, (1, 2, 4)[(i + j + k) % 3])
    for (i, r), (j, a), (k, g) in itertools.product(enumerate(FIXED), enumerate(ACTIVATIONS), enumerate((1, 2, 4, 8)))
]
FAST = [EVERYTHING[i] for i in (0, 21, 30, 11)]


def check_exact(routing, activation, g, copies):
    chain = [VirtualGroups(4, g, copies * g, router_std=STD, **FIXED[routing])]
    assert chain[0].changes(dense(activation)[0]) == ""
    assert error(chain, activation) < 1e-5


@pytest.mark.parametrize(("routing", "activation", "g", "copies"), [case(*x) for x in FAST])
def test_the_dense_function(routing, activation, g, copies):
    check_exact(routing, activation, g, copies)


@pytest.mark.slow
@pytest.mark.parametrize(("routing", "activation", "g", "copies"), [case(*x) for x in covering(EVERYTHING, FAST)])
def test_the_dense_function_everywhere(routing, activation, g, copies):
    check_exact(routing, activation, g, copies)


def test_the_fast_part_has_everything():
    assert set(FAST) < set(EVERYTHING)
    assert [len({x[i] for x in FAST}) for i in range(4)] == [3, 3, 4, 3]


def test_with_shared_experts_dense_layers_groups_of_experts_and_a_selection_bias():
    """Two shared copies beside one of four routed ones, in the second layer only."""
    more = {"selection_bias": True, "num_groups": 2, "top_groups": 1}
    chain = [VirtualGroups(4, 4, 4, router_std=STD, dense_layers=1, num_shared_experts=8, moe=more)]
    assert error(chain, "swiglu") < 1e-5
    cfg, params = apply(chain)
    assert params["layers"]["moe"]["shared"]["w_down"].shape == (1, 64, 16)
    assert (cfg.num_dense_layers, cfg.moe.num_experts, cfg.moe.d_expert) == (1, 16, 8)


SHARDS = {
    "scores": {"combine": "score", **FIXED["topk_softmax"]},
    "shares": {"combine": "share", "routed_scaling": 1.5, "num_shared_experts": 4, "dense_layers": 1},
    "shares of sigmoids": {"combine": "share", "score": "sigmoid", "score_order": "score_topk"},
}


OTHERS = [pair for pair in itertools.product(SHARDS, (1, 2, 4)) if pair != ("shares", 2)]


@pytest.mark.parametrize(
    ("name", "copies"), [("shares", 2), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in OTHERS)]
)
def test_a_choice_from_every_shard(name, copies):
    """Exact at the start, and with shares or one copy a token of weight one for any router that training may make.

    There every token has different copies of its shards, whose weights add up to one copy. Without shares, or with the
    choice of copies, such a router makes another function.
    """
    chain = [VirtualGroups(4, 4, 4 * copies, choice="shards", router_std=STD, **SHARDS[name])]
    assert chain[0].changes(dense()[0]) == ""
    assert error(chain) < 1e-5
    cfg, params = apply(chain)
    free = STD * np.random.default_rng(0).normal(size=params["layers"]["moe"]["w_router"].shape)
    params["layers"]["moe"]["w_router"] = jax.numpy.float32(free)
    changed = distance(upcycle.logits(cfg, params, TOKENS, mesh_of(1, 1, 1)))
    assert (changed > 0.05) if name == "scores" else (changed < 1e-5)


@pytest.mark.slow
def test_a_choice_of_copies_loses_shards_once_rows_differ():
    cfg, params = apply([VirtualGroups(4, 4, 4, router_std=STD)])
    w = params["layers"]["moe"]["w_router"]
    params["layers"]["moe"]["w_router"] = w + 0.1 * np.random.default_rng(0).normal(size=w.shape).astype(np.float32)
    assert distance(upcycle.logits(cfg, params, TOKENS, mesh_of(1, 1, 1))) > 0.05


# --- where it cannot be exact, and the paper's scale -----------------------------------------------------------------


def test_softmax_over_all_experts_is_exact_at_a_router_of_zeros_only():
    """Its weights sum to more the more the router decides; that sum is what the scale cannot know."""
    chain = lambda std: [VirtualGroups(4, 4, 8, router_std=std, **SOFTMAX_TOPK)]
    assert chain(0.0)[0].changes(SOURCE) == "" and error(chain(0.0)) < 1e-5
    assert "a different sum" in chain(0.01)[0].changes(SOURCE)
    errors = [error(chain(std)) for std in (0.001, 0.01, 0.1)]
    assert 1e-3 < errors[0] < errors[1] / 5 and errors[1] < errors[2] / 4


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_scale_of_the_paper(activation):
    """κ and its roots as in arXiv:2410.07524 and Megatron-Core. Exact for squared ReLU, not for the others."""
    e, g, t = 4, 8, 8
    chain = [VirtualGroups(e, g, t, "paper", router_std=0.0, **SOFTMAX_TOPK)]
    cfg, params = apply(chain, activation)
    assert upcycle.kappa(cfg.moe, g) == pytest.approx(e * g**2 / t)
    root = {"swiglu": 1 / 3, "relu2": 1 / 3, "gelu": 1 / 2}[activation]
    mlp, moe = dense(activation)[1]["dense_layers"]["mlp"], params["layers"]["moe"]
    for name, w in mlp.items():
        cut = slice(4, 8) if name == "w_down" else (slice(None), slice(4, 8))
        want = np.asarray(w[0])[cut] * (e * g**2 / t) ** root  # expert 9 is shard 1 of copy 1
        np.testing.assert_allclose(moe[name][0, 9], want, rtol=1e-6)
    wrong = error(chain, activation)
    assert (wrong < 1e-5) if activation == "relu2" else (wrong > 0.03)
    assert error([dataclasses.replace(chain[0], scale="exact")], activation) < 1e-5


def test_scales_of_the_paper_by_name():
    """What its ablations used: E8G8T8 4, E8G1T1 2, E8G1T2 4^(1/3) before, E8G8T8 2 after the choice."""
    moe = lambda g, t, **fields: VirtualGroups(8, g, t, **fields).config(dataclasses.replace(SOURCE, d_ff=64)).moe
    root = lambda g, t, **fields: upcycle.kappa(moe(g, t, **fields), g) ** (1 / 3)
    assert root(8, 8, **SOFTMAX_TOPK) == pytest.approx(4)
    assert root(1, 1, **SOFTMAX_TOPK) == pytest.approx(2)
    assert root(1, 2, **SOFTMAX_TOPK) == pytest.approx(4 ** (1 / 3))
    assert root(8, 8) == pytest.approx(2) and root(1, 2) == pytest.approx(1)
    assert root(8, 8, routed_scaling=2.0) == pytest.approx(4 ** (1 / 3))


def test_without_a_scale():
    """Harmless only where κ is 1: whole copies, weights that sum to 1."""
    assert error([VirtualGroups(4, 4, 8, "none", router_std=STD)]) > 0.1
    assert error([upcycle.copy(4, 2, scale="none", router_std=STD)]) < 1e-5
    assert VirtualGroups(4, 4, 8, "none").changes(SOURCE) and not upcycle.copy(4, 2, scale="none").changes(SOURCE)


def test_half_a_copy_is_refused_for_a_reason():
    """Guards the guard: with half of a copy's shards chosen the function is another one."""
    cfg, params = apply([VirtualGroups(4, 4, 8, router_std=STD)])
    half = dataclasses.replace(cfg, moe=dataclasses.replace(cfg.moe, top_k=2))
    got = upcycle.logits(half, params, TOKENS, mesh_of(1, 1, 1))
    assert np.abs(got - dense_logits()).max() > 0.1 * np.abs(dense_logits()).max()


# --- every parameter -------------------------------------------------------------------------------------------------


def test_every_parameter():
    """All but the feed-forward layers bit for bit; expert e·G + g is shard g, its router column that of its copy."""
    cfg, params = apply([VirtualGroups(3, 4, 4, dense_layers=1, router_std=STD)])
    source = dense()[1]
    for name in ("embed", "head", "final_norm"):
        np.testing.assert_array_equal(params[name], source[name])
    old = {n: jax.tree.map(np.asarray, w) for n, w in source["dense_layers"].items()}
    jax.tree.map(np.testing.assert_array_equal, params["dense_layers"], jax.tree.map(lambda w: w[:1], old))
    for name in ("attention", "attention_norm", "mlp_norm"):
        jax.tree.map(np.testing.assert_array_equal, params["layers"][name], jax.tree.map(lambda w: w[1:], old[name]))
    moe = jax.tree.map(np.asarray, params["layers"]["moe"])
    for e in range(12):
        units = slice(8 * (e % 4), 8 * (e % 4) + 8)
        np.testing.assert_array_equal(moe["w_gate"][0, e], old["mlp"]["w_gate"][1][:, units])
        np.testing.assert_array_equal(moe["w_up"][0, e], 2 * old["mlp"]["w_up"][1][:, units])  # κ = 4
        np.testing.assert_array_equal(moe["w_down"][0, e], 2 * old["mlp"]["w_down"][1][units])
        np.testing.assert_array_equal(moe["w_router"][0, :, e], moe["w_router"][0, :, e // 4 * 4])
    assert len(np.unique(moe["w_router"][0], axis=1).T) == 3 and moe["w_router"].std() == pytest.approx(STD, rel=0.2)
    assert cfg == dataclasses.replace(SOURCE, num_dense_layers=1, moe=cfg.moe)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_tables_are_total(activation):
    """Every parameter of the source goes somewhere, every one of the model made comes from somewhere."""
    chains = [[VirtualGroups(2, 2, 2, num_shared_experts=2)], [Cluster(4, 2, dense_layers=1)],
              [Depth(3), Width(32, 40, 4), VirtualGroups(2, 2, 2, dense_layers=1)]]  # fmt: skip
    for chain in chains:
        cfg = upcycle.final_config(chain, dense(activation)[0])
        with jax.set_mesh(mesh_of(1, 1, 1)):
            made = jax.eval_shape(upcycle.traced(chain, dense(activation)[0]), dense(activation)[1], jax.random.key(0))
        assert jax.tree.map(lambda x: x.shape, made) == jax.tree.map(lambda x: x.shape, model.abstract(cfg).shapes)
    params = dense(activation)[1]
    layers = {**params["dense_layers"], "w_new": params["embed"]}
    with (
        jax.set_mesh(mesh_of(1, 1, 1)),
        pytest.raises(ValueError, match="no rule uses the parameter dense_layers/w_new"),
    ):
        upcycle.apply(chains[0], dense(activation)[0], {**params, "dense_layers": layers})
    with pytest.raises(ValueError, match="no upcycling rule for the parameter layers/w_new"):
        upcycle.by_table((), {"layers/w_new": None}, {})


def test_bfloat16_weights_stay_bfloat16_and_the_router_float32():
    cfg, params = dense("swiglu", (1, 1, 1), param_dtype="bfloat16")
    with jax.set_mesh(mesh_of(1, 1, 1)):
        made = upcycle.apply([VirtualGroups(2, 4, 4), Noise(0.01), Drop(0.5)], cfg, params)[1]
    assert {str(w.dtype) for w in jax.tree.leaves(made)} == {"bfloat16", "float32"}
    assert made["layers"]["moe"]["w_up"].dtype == "bfloat16"
    assert made["layers"]["moe"]["w_router"].dtype == "float32"


# --- meshes ----------------------------------------------------------------------------------------------------------

CHAIN = [VirtualGroups(4, 2, 4, router_std=STD)]
LONG = [Depth(3), Width(64, 160, 4), VirtualGroups(4, 4, 8), Noise(0.1), Drop(0.5)]


def local_bytes(params) -> int:
    """The largest part of a parameter that a device holds."""
    return max(w.addressable_shards[0].data.nbytes for w in jax.tree.leaves(params))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 2, 2), (8, 1, 1), (1, 2, 4)])
def test_mesh(shape):
    """Born as the spec table says, no array on any device larger than its part of an expert matrix, equal values."""
    mesh = mesh_of(*shape)
    assert error(CHAIN, "swiglu", shape) < 1e-5
    wide = dense("swiglu", shape, d_ff=128, d_model=32, head_dim=4, vocab_size=16)  # experts are what is large
    for chain, tolerance in ((LONG, 1e-6), (CHAIN, 0.0))[: 1 if shape == (2, 2, 2) else 2]:
        with jax.set_mesh(mesh):
            compiled = upcycle.traced(chain, wide[0]).lower(wide[1], jax.random.key(0)).compile()
            made = compiled(wide[1], jax.random.key(0))
            specs = upcycle.specs_of(upcycle.final_config(chain, wide[0]))
        assert jax.tree.map(lambda w: w.sharding.spec, made) == specs
        alone = dense("swiglu", (1, 1, 1), d_ff=128, d_model=32, head_dim=4, vocab_size=16)
        want = upcycle.apply(chain, *alone)[1]
        same = functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance)
        jax.tree.map(same, jax.device_get(made), jax.device_get(want))
        arrays = re.findall(r"(?:f32|u32|s32)\[([\d,]+)\]", compiled.as_text())
        largest = max(4 * int(np.prod([int(n) for n in array.split(",")])) for array in arrays)
        assert largest <= local_bytes(made), f"{largest} bytes on a device, its largest part has {local_bytes(made)}"
