"""Weights without a run around them: written whole or not at all, read on any mesh, started from by train.py."""

import dataclasses
import os

import jax
import numpy as np
import pytest

from moe_jax.config import DataConfig, LoRAConfig, ModelConfig, MoEConfig, OptimConfig, RunConfig, classes, is_machine
from moe_jax.errors import CheckpointError, ConfigError
from moe_jax.hf import architectures
from moe_jax.parallel import sharding
from moe_jax.run import weights
from moe_jax.run.checkpoint import Checkpoints
from moe_jax.run.config_file import load_config
from moe_jax.train.state import abstract_state, abstract_weights, init_state

MODEL = ModelConfig(
    vocab_size=264, d_model=16, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8,
    moe=MoEConfig(num_experts=4, top_k=2, d_expert=8, selection_bias=True, score="sigmoid"),
)  # fmt: skip
CFG = RunConfig(model=MODEL, data=DataConfig(batch_size=8, seq_len=8), optim=OptimConfig(name="adamw"))
ORIGIN = [{"event": "import", "from": "somewhere"}, {"event": "upcycle", "experts": 4}]


def mesh_of(*shape):
    return sharding.make_mesh(shape, jax.devices()[: int(np.prod(shape))])


@pytest.fixture(scope="module")
def state():
    return init_state(CFG, mesh_of(2, 2, 2))


@pytest.fixture(scope="module")
def saved(state, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("weights") / "run"
    bias = jax.tree.map(lambda b: b + 1, state.router_bias)
    weights.save_weights(workdir, CFG, state.params, bias, ORIGIN, {"tokenizer.json": b"{}"})
    return workdir


def equal(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), got, want)


@pytest.mark.parametrize("shape", [(1, 1, 1), (8, 1, 1), (2, 2, 2)])
def test_loads_on_any_mesh(saved, state, shape):
    mesh = mesh_of(*shape)
    abstract = abstract_weights(MODEL, mesh)
    params, bias, origin = weights.load_weights(saved, *abstract)
    equal(params, state.params)
    assert all((np.asarray(b) == 1).all() for b in jax.tree.leaves(bias)) and jax.tree.leaves(bias)
    assert origin == ORIGIN
    jax.tree.map(lambda x, a: None if x.sharding == a.sharding else pytest.fail(str(a)), params, abstract[0])
    assert load_config(saved) == CFG
    assert (saved / "tokenizer.json").read_bytes() == b"{}"
    names = os.listdir(saved / "checkpoints")
    assert names == ["0"] and not list(saved.parent.glob(".*"))


def test_loads_from_a_training_run(state, tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(7, state, {"batches": [], "tokens": 56.0, "origin": ORIGIN})
    params, _, origin = weights.load_weights(tmp_path, *abstract_weights(MODEL, mesh_of(8, 1, 1)))
    equal(params, state.params)
    assert origin[:2] == ORIGIN
    assert origin[2:] == [{"event": "train", "workdir": str(tmp_path), "steps": 7, "tokens": 56.0}]


def test_casts_only_when_told_to(saved, state):
    abstract = abstract_weights(dataclasses.replace(MODEL, param_dtype="bfloat16"), mesh_of(2, 2, 2))
    with pytest.raises(CheckpointError, match="params/embed has dtype float32, this model needs bfloat16"):
        weights.load_weights(saved, *abstract)
    params, _, _ = weights.load_weights(saved, *abstract, cast=True)
    assert params["embed"].dtype == "bfloat16" and params["layers"]["moe"]["w_router"].dtype == "float32"
    assert params["embed"].sharding == abstract[0]["embed"].sharding
    equal(params, jax.tree.map(lambda x, a: x.astype(a.dtype), state.params, abstract[0]))


def test_another_model_is_refused(saved):
    mesh = mesh_of(1, 1, 1)
    for change, message in (
        ({"qk_norm": True}, "has no params/layers/attention/k_norm"),
        ({"d_model": 8}, r"has shape \(264, 16\), this model needs \(264, 8\)"),
        ({"tie_embeddings": True}, "has params/head, which this model does not have"),
    ):
        with pytest.raises(CheckpointError, match=message):
            weights.load_weights(saved, *abstract_weights(dataclasses.replace(MODEL, **change), mesh), cast=True)


def test_a_training_run_does_not_go_on_from_weights(saved):
    with Checkpoints(saved) as checkpoints, pytest.raises(CheckpointError, match=r"weights only: .*config\.init_from"):
        checkpoints.restore(abstract_state(CFG, mesh_of(1, 1, 1)))


def test_nothing_is_overwritten(saved, state, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in saved.rglob("*")}
    with pytest.raises(CheckpointError, match="is not empty"):
        weights.save_weights(saved, CFG, state.params, state.router_bias, ORIGIN)
    assert before == {p: p.stat().st_mtime_ns for p in saved.rglob("*")}
    empty = tmp_path / "empty"
    empty.mkdir()
    weights.save_weights(empty, CFG, state.params, state.router_bias, ORIGIN)
    assert (empty / "config.json").exists()


@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_leaves_nothing(state, tmp_path, existing):
    workdir = tmp_path / "run"
    if existing:
        workdir.mkdir()
    with pytest.raises(TypeError):
        weights.save_weights(workdir, CFG, state.params, state.router_bias, ORIGIN, {"tokenizer.json": 3})
    assert [p.name for p in tmp_path.rglob("*")] == (["run"] if existing else [])


def test_init_from_compares_the_models_before_compilation(saved):
    cfg = dataclasses.replace(CFG, init_from=str(saved))
    assert weights.check_same_model(cfg) == []
    lower = dataclasses.replace(MODEL, param_dtype="bfloat16", remat="full")
    lines = weights.check_same_model(dataclasses.replace(cfg, model=lower))
    assert [line.split(":")[0] for line in lines] == ["config.model.param_dtype", "config.model.remat"]
    other = dataclasses.replace(MODEL, rope_theta=5e5, moe=dataclasses.replace(MODEL.moe, top_k=1))
    with pytest.raises(CheckpointError) as error:
        weights.check_same_model(dataclasses.replace(cfg, model=other))
    for part in ("config.model.rope_theta: 10000.0 in", "500000.0 now", "config.model.moe.top_k: 2 in"):
        assert part in str(error.value)
    with pytest.raises(ConfigError, match=rf"is not a run directory; nearest valid: '{saved}'"):
        weights.check_same_model(dataclasses.replace(cfg, init_from=f"{saved}2"))


def test_init_from_takes_the_same_function_in_other_words(saved):
    """As export does: all groups are one group, and the width of dense layers that are not there says nothing."""
    moe = dataclasses.replace(MODEL.moe, num_groups=2, top_groups=2)
    other = dataclasses.replace(MODEL, moe=moe, d_ff=MODEL.d_ff + 8)
    lines = weights.check_same_model(dataclasses.replace(CFG, init_from=str(saved), model=other))
    assert {line.split(":")[0].removeprefix("config.model.") for line in lines} == {
        "d_ff", "moe.num_groups", "moe.top_groups",
    }  # fmt: skip


def test_state_from_weights_is_fresh_but_for_them(saved):
    mesh = mesh_of(2, 2, 2)
    params, bias, _ = weights.load_weights(saved, *abstract_weights(MODEL, mesh))
    made = init_state(CFG, mesh, (params, bias))
    equal(made.params, params)
    equal(made.router_bias, bias)
    like = abstract_state(CFG, mesh)
    assert jax.tree.structure(made) == jax.tree.structure(like) and int(made.step) == 0


def test_how_a_model_is_computed_makes_no_other_model(saved):
    """Every field of the class "machine" may differ, and no other: starting from weights and export say the same."""
    other = dataclasses.replace(
        MODEL, unroll=2, remat="full", attention="xla", compute_dtype="float32", param_dtype="bfloat16",
        init_std=0.5, max_seq_len=64, segment_mask=False,
        lora=LoRAConfig(rank=2, alpha=3.0, rslora=True, match="/moe/"),
        moe=dataclasses.replace(MODEL.moe, compute="dense", capacity_factor=2.0, exchange="ring", room=2.0,
                                exchange_chunks=2, grouped_matmul="reference"),
    )  # fmt: skip
    moe = dataclasses.replace(MODEL.moe, compute="capacity", overflow="random", min_ratio=0.5)
    drops = dataclasses.replace(MODEL, moe=moe, mtp_layers=1)
    # For identity experts, which this model does not have, and for routers without a selection bias, which it has.
    changed = {
        f"model.moe.{x}" for x in ("expert_budget", *(f"pool_{y}" for y in ("min", "max", "from", "size", "prefix")))
    }
    for model in (other, drops):
        cfg = dataclasses.replace(CFG, init_from=str(saved), model=model)
        changed |= {line.split(":")[0].removeprefix("config.") for line in weights.check_same_model(cfg)}
        assert architectures.differences(model, MODEL) == []
    assert changed == {name for name, _, _ in classes.fields() if is_machine(name)}
