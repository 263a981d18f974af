"""Any order of blocks: the spec string, a plain loop over the blocks, the invariance matrix, and runs made before it.

`mixed` has all at once: units of two blocks, late blocks, two numbers of experts, and a second stack.
"""

import dataclasses
import functools
import hashlib
import tarfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_invariance import PADDING, assert_same, batch_rows, run_config
from test_model import (
    EVERYTHING,
    biased,
    gradients,
    init,
    inputs_of,
    mesh_of,
    packed,
    plain_attention,
    plain_glu,
    plain_moe,
    plain_norm,
    score,
)

from moe_jax import config, model, optim
from moe_jax.config import ModelConfig
from moe_jax.config.layers import Kind, parse, places_of, spell, stacks_of, units_of
from moe_jax.errors import ConfigError
from moe_jax.evaluate.generate import generate
from moe_jax.hf import import_model
from moe_jax.parallel import sharding
from moe_jax.run import checkpoint, config_file, weights
from moe_jax.train import step
from moe_jax.train.gradients import make_gradients
from moe_jax.train.state import abstract_state, abstract_weights, init_state, put_batch
from moe_jax.tree import flatten

A, B = "layers/block_0", "layers/block_1"
# Spec, number of blocks, and by hand the units: of each block its path, its index and its kind.
MODELS = {
    "interleaved": ("2*(dense moe)", 4, [[(A, i, "dense"), (B, i, "moe")] for i in (0, 1)]),
    "pyramid": ("dense moe 2*moe:8", 4, [[("dense_layers", 0, "dense")], [("layers", 0, "moe")],
                                         [("layers_2", 0, "moe")], [("layers_2", 1, "moe")]]),
    "late": ("2*(late dense)", 4, [[(A, i, "late"), (B, i, "dense")] for i in (0, 1)]),
    "mixed": ("2*(late moe:8) dense", 5, [*([(A, i, "late"), (B, i, "moe")] for i in (0, 1)),
                                          [("dense_layers", 0, "dense")]]),
}  # fmt: skip
# Two stacks, and two numbers of experts, the fast part has in test_places.py and in the rows of test_systems_files.py.
EACH = [pytest.param(name, marks=[] if name == "late" else pytest.mark.slow) for name in MODELS]


def with_layers(cfg: ModelConfig, name: str) -> ModelConfig:
    spec, blocks, _ = MODELS[name]
    return dataclasses.replace(cfg, layers=spec, num_layers=blocks, num_dense_layers=0)


# --- the spec string -------------------------------------------------------------------------------------------------

GOOD = {
    "12*(dense moe)": [("layers", 12, "dense moe")],
    "10*(dense moe) 2*(dense moe:64)": [("layers", 10, "dense moe"), ("layers_2", 2, "dense moe:64")],
    "moe dense moe": [("layers", 1, "moe"), ("dense_layers", 1, "dense"), ("layers_2", 1, "moe")],
    " 2 * ( 2*dense moe )dense ": [("layers", 2, "dense dense moe"), ("dense_layers", 1, "dense")],
    "(late dense) 3*moe:4": [("layers", 1, "late dense"), ("layers_2", 3, "moe:4")],
}


def kind_of(word: str) -> Kind:
    name, _, experts = word.partition(":")
    return Kind(name, 0 if name == "dense" else int(experts or 8))


@pytest.mark.parametrize("spec", GOOD)
def test_what_is_read(spec):
    got = [(stack.name, stack.repeat, stack.unit) for stack in parse(spec, 8)]
    assert got == [(name, n, tuple(map(kind_of, unit.split()))) for name, n, unit in GOOD[spec]]


BAD = {
    "3*(dense mo)": ["at character 10, 'mo': must be one of dense, moe, late", "nearest valid: '3*(dense moe)'"],
    "2*(dense moe": ["at character 3, '(': opens a unit that is not closed"],
    "dense moe)": ["at character 10, ')'", "nearest valid: 'dense moe'"],
    "((dense moe) moe)": ["at character 2, '(': a unit inside a unit"],
    "2*() moe": ["at character 4, ')': a unit needs a block here"],
    "2*3*moe dense": ["at character 3, '3*': a second count"],
    "moe dense 2*": ["at character 11, '2*': a count without a block or a unit"],
    "0*moe dense": ["at character 1, '0*': a count must be in [1, 9999]", "nearest valid: '1*moe dense'"],
    f"{'9' * 5000}*moe": ["a count must be in [1, 9999]"],
    "moe, dense": ["at character 4, ','", "nearest valid: 'moe dense'"],
    "dense:4 moe": ["a dense block has no experts", "nearest valid: 'dense moe'"],
    "moe:x dense": ["':' is followed by a number of experts", "nearest valid: 'moe:8 dense'"],
    "moe:0 dense": ["':' is followed by a number of experts"],
    "moe@512 dense": ["'@' is not used", "nearest valid: 'moe dense'"],
    "late dense": ["at character 1, 'late': 'late' outside a unit"],
    "2*(dense late)": ["at character 14, ')': a unit that ends with 'late'"],
    "2*(moe moe)": ["has a shorter spelling", "nearest valid: num_dense_layers=0 without it"],
    "2*(dense moe) (dense moe)": ["has a shorter spelling", "nearest valid: '3*(dense moe)'"],
    "2(dense moe)": ["at character 1, '2': a count is followed by '*'", "nearest valid: '2*(dense moe)'"],
    "2x (dense moe)": ["at character 1, '2x': a count is followed by '*'", "nearest valid: '2* (dense moe)'"],
    "2*(dense mo": ["at character 10, 'mo'", "see docs/layers.md"],  # two mistakes: neither is mended
    "2*moe 3*moe dense": ["has a shorter spelling", "nearest valid: '5*moe dense'"],
    "(dense moe) moe": ["has a shorter spelling", "nearest valid: num_dense_layers=1 without it"],
    " ": ["names no block"],
}


@pytest.mark.parametrize("spec", BAD)
def test_mistakes_point_at_their_place(spec):
    with pytest.raises(ConfigError) as raised:
        config.build_model({"layers": spec, "num_layers": 4})
    line = str(raised.value)
    assert line.startswith("config.model.layers='") and "\n" not in line
    assert all(part in line for part in BAD[spec]), line


FIELDS = {
    "num_layers=5: layers='moe dense' has 2 blocks; nearest valid: 2": {"layers": "moe dense", "num_layers": 5},
    "say without it; nearest valid: num_dense_layers=1 without it": {"layers": "dense 2*moe", "num_layers": 3},
    "num_dense_layers=1: has no effect with layers": {"layers": "moe dense", "num_layers": 2, "num_dense_layers": 1},
    "moe.num_experts=8: no block of layers='dense moe:4 dense' has this number; nearest valid: 4": {
        "layers": "dense moe:4 dense", "num_layers": 3},
    "its blocks with 2 experts: moe.top_k=3 must be ≤ num_experts=2": {
        "layers": "moe:2 moe", "num_layers": 2, "moe": {"top_k": 3}},
}  # fmt: skip


@pytest.mark.parametrize("rule", FIELDS)
def test_rules_between_fields(rule):
    with pytest.raises(ConfigError) as raised:
        config.build_model(FIELDS[rule])
    assert rule in str(raised.value)


KINDS = [Kind("dense"), Kind("moe", 4), Kind("moe", 8), Kind("memory")]


@given(st.lists(st.sampled_from(KINDS), min_size=1, max_size=12))
def test_every_order_has_one_spelling(kinds):
    """Reads the line that `units_of` gives for blocks in any order: it is these blocks again."""
    units = units_of(tuple(kinds))
    stacks = parse(spell(units, 8), 8)
    assert stacks == stacks_of(units)
    assert [place.kind for place in places_of(stacks)] == kinds
    assert len({(place.path, place.index) for place in places_of(stacks)}) == len(kinds)


@given(st.text(alphabet="demolat()*:@ 0123456789,x", max_size=24))
def test_any_text_is_read_or_refused(text):
    try:
        parse(text, 8)
    except ConfigError:
        pass


# --- against a plain loop --------------------------------------------------------------------------------------------


def plain_forward(units, cfg, params, bias, inputs):
    """The model as a loop over blocks, each with its slice of the parameters. Loads by path and index."""
    x, loads = params["embed"][inputs.tokens], {}
    params, bias = flatten(params), flatten(bias)
    for unit in units:
        late = []
        for path, index, kind in unit:
            own = {name.removeprefix(f"{path}/"): a[index] for name, a in params.items() if name.startswith(f"{path}/")}
            part = lambda name, own=own: {n.removeprefix(name): a for n, a in own.items() if n.startswith(name)}
            x = x + plain_attention(cfg, part("attention/"), plain_norm(x, own["attention_norm"]), inputs)
            h = plain_norm(x, own["mlp_norm"])
            if kind != "moe":
                x = x + plain_glu(part("mlp/"), h)
            if kind != "dense":
                w = part("moe/") | {"shared": part("moe/shared/")}
                moe = dataclasses.replace(cfg.moe, num_experts=w["w_up"].shape[0])
                y, loads[path, index] = plain_moe(
                    moe, w, bias[f"{path}/moe/router_bias"][index], h, inputs.info.counted
                )
                x, late = (x + y, late) if kind == "moe" else (x, [*late, y])
        x = sum(late, x)
    return plain_norm(x, params["final_norm"]), loads


@pytest.mark.parametrize("name", EACH)
def test_stacks_equal_a_plain_loop(name):
    """Hidden states, expert loads, and the gradient of a function of the logits in every parameter."""
    cfg, units = with_layers(EVERYTHING, name), MODELS[name][2]
    assert [(p.path, p.index, p.kind.name) for p in cfg.places] == [block for unit in units for block in unit]
    ((_, (hidden, stats)), grads), _ = gradients(cfg)
    params, bias = init(cfg)
    local = jax.tree.map(jnp.asarray, jax.device_get((params, biased(bias), packed()[0])))
    plain = functools.partial(plain_forward, units)
    (_, (want, loads)), want_grads = jax.jit(jax.value_and_grad(functools.partial(score, plain, cfg), has_aux=True))(
        *local
    )
    np.testing.assert_allclose(hidden, want, rtol=1e-5, atol=2e-5)
    for (path, index), load in loads.items():
        np.testing.assert_array_equal(stats[path].tokens_per_expert[index, 0], load)
    assert sum(len(s.tokens) for s in stats.values()) == len(loads) == cfg.num_moe_layers
    for (path, g), w in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(want_grads), strict=True):
        scale = np.abs(w).max()
        assert scale > 1e-4, path
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=2e-5 * scale, err_msg=jax.tree_util.keystr(path))


@pytest.mark.slow
@pytest.mark.parametrize("name", EACH)
def test_generation_with_a_cache(name):
    """Greedy samples are the argmax of the full forward pass over them."""
    cfg = with_layers(EVERYTHING, name)
    params, bias = init(cfg)
    out = generate(cfg, mesh_of(1, 1, 1), params, bias, [[5], [3, 9, 14]], 4)
    for tokens, prompt in zip(out, (1, 3), strict=True):
        with jax.set_mesh(mesh_of(1, 1, 1)):
            hidden = model.abstract(cfg).bind(params, bias)(inputs_of([tokens])).hidden
        logits = np.asarray(hidden[0] @ params["embed"].T)
        assert tokens[prompt:] == logits.argmax(-1)[prompt - 1 : -1].tolist()


# --- the invariance matrix -------------------------------------------------------------------------------------------


def stacks_config(name: str, *args, qk_clip: float = 0.0, **kwargs) -> config.RunConfig:
    cfg = run_config(*args, **kwargs)
    ordered = dataclasses.replace(with_layers(cfg.model, name), qk_norm=False)
    return dataclasses.replace(cfg, model=ordered, optim=dataclasses.replace(cfg.optim, qk_clip=qk_clip))


@functools.cache
def state_on(name: str, shape):
    """The mesh and a fresh state on it, with selection biases; the values are those of one device."""
    mesh = sharding.make_mesh(shape, jax.devices()[: int(np.prod(shape))])
    if mesh.size == 1:
        state = init_state(stacks_config(name), mesh)
        slope = lambda b: b + jnp.linspace(-0.05, 0.05, b.shape[-1])[None]
        return mesh, state._replace(router_bias=jax.tree.map(slope, state.router_bias))
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(stacks_config(name), mesh))
    return mesh, jax.device_put(jax.device_get(state_on(name, (1, 1, 1))[1]), shardings)


def everything(name: str, shape, *args, paddings=PADDING, **kwargs) -> list[dict]:
    """Loss, parts, sums, gradients, and parameters and selection biases after a step of Muon, for each padding."""
    mesh, state = state_on(name, shape)
    cfg = stacks_config(name, *args, qk_clip=0.5, **kwargs)
    gradients = make_gradients(cfg, mesh)
    optimizer = optim.make_optimizer(cfg.optim, cfg.train.steps)

    @jax.jit
    def one(state, batch):
        loss, parts, sums, grads = gradients(state.params, state.router_bias, batch, 0)
        updates, _ = optimizer.update(grads, state.opt_state, state.params)
        params = jax.tree.map(jnp.add, state.params, updates)
        params, clipping = step.qk_clip.clip(params, sums.maxima, cfg.optim.qk_clip)
        bias, _ = step.update_biases(cfg, state.router_bias, sums.router, {})
        return {"loss": loss, "parts": parts, "sums": sums, "grads": grads, "params": params, "bias": bias} | clipping

    with jax.set_mesh(mesh):
        return [jax.device_get(one(state, put_batch(batch_rows(p), mesh, cfg))) for p in paddings]


@functools.cache
def oracle(name: str) -> list[dict]:
    return everything(name, (1, 1, 1))


CASES = [
    ((2, 2, 2), 2, "full", "grouped", "ring"),
    ((1, 2, 4), 4, "selective", "grouped", "all_to_all"),
    ((8, 1, 1), 1, "none", "grouped", "ring"),
]


@pytest.mark.parametrize(
    ("name", "case"),
    [
        pytest.param(name, case, marks=pytest.mark.slow)  # test_routers_models.py has a fast order of blocks
        for n, name in enumerate(MODELS)
        for case in (CASES[0], CASES[1 + n % 2])  # by turns on one of the other meshes
    ],
)
def test_invariance(name, case):
    shape, micro, remat, compute, exchange = case
    got = everything(name, shape, micro, remat, compute, exchange=exchange)
    for a, b in zip(got, oracle(name), strict=True):
        assert_same(a, b)
    assert got[0]["clipped_heads"] > 0
    paths = {place.path for place in stacks_config(name).model.places if place.kind.experts}
    assert set(got[0]["sums"].router) == paths
    for path in paths:  # every router is balanced: its gradient is not the cross-entropy's alone
        assert np.abs(flatten(got[0]["grads"])[f"{path}/moe/w_router"]).max() > 1e-4


# --- runs made before -------------------------------------------------------------------------------------------------

OLD = Path(__file__).with_name(
    "old_runs.tar.xz"
)  # made at the commit before `layers`: a run, an upcycled one, its export


def digest(tree) -> str:
    leaves = ((jax.tree_util.keystr(path), np.asarray(x)) for path, x in jax.tree_util.tree_leaves_with_path(tree))
    made = hashlib.sha256()
    for path, leaf in sorted(leaves, key=lambda item: item[0]):
        made.update(path.encode() + str(leaf.dtype).encode() + leaf.tobytes())
    return made.hexdigest()[:16]


@pytest.mark.slow
def test_runs_made_before_load_bit_for_bit(tmp_path):
    with tarfile.open(OLD) as file:
        file.extractall(tmp_path, filter="data")
    mesh = mesh_of(1, 1, 1)
    cfg = config_file.load_config(tmp_path / "run")
    with checkpoint.Checkpoints(tmp_path / "run") as checkpoints:
        state, _ = checkpoints.restore(abstract_state(cfg, mesh))
    assert digest(state) == "f844aaadfea9c526"
    cfg = config_file.load_config(tmp_path / "moe")
    params, *_ = weights.load_weights(tmp_path / "moe", *abstract_weights(cfg.model, mesh))
    import_model(tmp_path / "hf", tmp_path / "imported")
    imported = config_file.load_config(tmp_path / "imported")
    assert not config.plain(imported.model).layers and imported.model.num_dense_layers == 1
    again, *_ = weights.load_weights(tmp_path / "imported", *abstract_weights(imported.model, mesh))
    assert digest(again) == digest(params)
