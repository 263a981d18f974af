"""Multi-token prediction in whole runs: a weight of zero, a step with all that concerns its block, and what is made of
a run that has layers."""

import dataclasses

import jax
import numpy as np
import pytest
from test_invariance import assert_same
from test_prediction import assert_equal, gradients, mesh_of, rows, setting, weights

from moe_jax import config, model, upcycle
from moe_jax.errors import ConfigError
from moe_jax.optim import groups
from moe_jax.run import config_file, teacher
from moe_jax.run import weights as run_weights
from moe_jax.run.checkpoint import Checkpoints
from moe_jax.train import prediction, step
from moe_jax.train.state import abstract_weights, init_state, parts_of, put_batch
from moe_jax.tree import flatten


def plain(tree) -> dict:
    """The leaves of the decoder, by path."""
    return {path: x for path, x in flatten(tree).items() if not model.is_prediction(path)}


@pytest.mark.slow
def test_a_weight_of_zero_leaves_the_gradients():
    """With experts, router losses and two micro-batches they are bit for bit those without the layers, whose own are 0;
    so it is after `mtp_stop`."""
    want = gradients(setting(2, layers=0))
    for loss, at in (({"mtp_coef": 0.0}, 0), ({"mtp_stop": 1}, 1)):
        found = gradients(setting(2, **loss), at=at)
        assert_equal(plain(found["grads"]), want["grads"])
        assert not any(x.any() for path, x in flatten(found["grads"]).items() if model.is_prediction(path))
        assert found["loss"] == want["loss"] and found["parts"].raw["mtp_raw/load_balance"] > 0.5


@pytest.mark.slow
def test_a_weight_of_zero_trains_the_same_decoder(tmp_path):
    """A step makes the same decoder, bit for bit; so do evaluation, and runs that start with or without the layers."""
    mesh, without = mesh_of(1, 1, 1), setting(layers=0, dense=1)
    zero = dataclasses.replace(setting(dense=1, mtp_coef=0.0), init_from=str(tmp_path / "with"))
    plain = lambda tree: {path: x for path, x in flatten(tree).items() if not model.is_prediction(path)}
    states = [init_state(cfg, mesh) for cfg in (zero, without)]
    assert_equal(plain(states[0].params), states[1].params)
    weights_of = lambda state: (state.params, state.router_bias)
    run_weights.save_weights(tmp_path / "with", zero, *weights_of(states[0]), [])
    run_weights.save_weights(tmp_path / "without", without, *weights_of(states[1]), [])

    from_with = dataclasses.replace(without, init_from=str(tmp_path / "with"))
    assert "config.model.mtp_layers: 2 in" in " ".join(run_weights.check_same_model(from_with))
    assert "without its layers of multi-token prediction" in run_weights.describe_start(from_with, False)
    assert_equal(run_weights.load_start(tmp_path, from_with, mesh)[0], states[1].params)
    from_without = dataclasses.replace(zero, init_from=str(tmp_path / "without"))
    assert "with fresh layers of multi-token prediction" in run_weights.describe_start(from_without, False)
    loaded = run_weights.load_start(tmp_path, from_without, mesh)[:2]
    assert_equal(init_state(from_without, mesh, loaded).params, states[0].params)
    assert_equal(run_weights.load_start(tmp_path, zero, mesh)[0], states[0].params)
    other = dataclasses.replace(zero, model=dataclasses.replace(zero.model, mtp_layers=1))
    with pytest.raises(ConfigError, match=r"model\.mtp_layers=1: must be the number of .*with, 2, or 0"):
        run_weights.check_same_model(other)

    found = []
    with jax.set_mesh(mesh):
        for cfg, state in zip((zero, without), states, strict=True):
            batch = put_batch(rows(), mesh, cfg)
            scored = step.make_eval_step(cfg, mesh, 1)(state.params, state.router_bias, batch)
            new, report = step.make_train_step(cfg, mesh)(state, batch)
            found.append((scored, plain(new.params), {"norm": report.grad_norm, "loss": report.loss}))
    assert_equal(*found)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one step on one device: its folder, configuration, states before and after, and report."""
    cfg = setting(layers=1, load_balance_coef=0.0)
    moe = dataclasses.replace(cfg.model.moe, score="sigmoid")
    optim = dataclasses.replace(cfg.optim, name="muon", qk_clip=0.05, ema=0.9)
    loss = dataclasses.replace(cfg.loss, bias_update="quantile")
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, moe=moe), optim=optim, loss=loss)
    folder, done = tmp_path_factory.mktemp("prediction"), one_step(cfg, (1, 1, 1))
    config_file.save_config(folder, cfg)
    with Checkpoints(folder, keep=1) as saved:
        saved.save(1, done[1], {"batches": None, "tokens": 1.0}, wait=True)
    return folder, cfg, done


def one_step(cfg, shape):
    with jax.set_mesh(mesh_of(*shape)):
        state = init_state(cfg, mesh_of(*shape))
        before = jax.device_get(state)
        state, report = step.make_train_step(cfg, mesh_of(*shape))(state, put_batch(rows(), mesh_of(*shape), cfg))
        return before, jax.device_get(state) if np.prod(shape) > 1 else state, jax.device_get(report)


@pytest.mark.slow
def test_a_step_of_muon_with_clipped_logits_and_quantile_biases(run):
    """On (2, 2, 2) it is that of one device, and all three move the block of the layer."""
    _, cfg, (before, want, said) = run
    _, found, report = one_step(cfg, (2, 2, 2))
    want = jax.device_get(want)
    assert_same(found.params, want.params)
    assert_same(found.router_bias, want.router_bias)
    moved = lambda name: np.abs(flatten(want)[name] - flatten(before)[name]).max()
    assert moved("params/mtp/block/attention/w_q") > 1e-4 and moved("router_bias/mtp/block/moe/router_bias") > 1e-4
    assert said.clipping["clipped_heads"] == report.clipping["clipped_heads"] > 0


@pytest.mark.slow
def test_what_is_made_of_a_run_with_layers(run, tmp_path):
    """Its average, a teacher and an upcycled model are without them, and the average is that of the decoder."""
    folder, cfg, (_, after, _) = run
    mesh, after = mesh_of(1, 1, 1), jax.device_get(after)
    abstract = abstract_weights(cfg.model.without_mtp, mesh)
    average, bias, _ = run_weights.load_weights(folder, *abstract, average=True)
    assert_equal(average, plain(parts_of(after.opt_state).ema))
    assert_equal(bias, plain(after.router_bias))
    student = dataclasses.replace(cfg.without_mtp, distill=config.DistillConfig(str(folder)))
    found = teacher.find(student)
    assert found.model.mtp_layers == 0
    assert_equal(teacher.load(found, mesh)[0][0], plain(after.params))
    lines = []
    upcycle.convert([str(folder)], tmp_path / "up", [upcycle.Noise(0.0)], check=False, echo=lines.append)
    assert any("the layers of multi-token prediction" in line and "left out" in line for line in lines)
    assert config_file.load_config(tmp_path / "up").model.mtp_layers == 0


@pytest.mark.slow
def test_a_tied_head_gets_the_gradients_of_all_its_uses():
    params, bias = weights(2, 1)
    params = params | {"head": params["embed"]}
    cfg = setting(dense=1)
    want = gradients(cfg, state=(params, bias))
    params = {name: x for name, x in params.items() if name != "head"}
    tied = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, tie_embeddings=True))
    found = gradients(tied, state=(params, bias))
    assert_same(found["loss"], want["loss"])
    grads = dict(want["grads"])
    assert_same(found["grads"], grads | {"embed": grads.pop("embed") + grads.pop("head")})


def test_groups_of_the_layers_alone_are_left_out():
    """… of a model without them, with a line: upcycling and the import of adapters make such a model."""
    cfg = setting(layers=1, dense=1)
    ahead, norms = config.GroupConfig("^mtp/", lr=0.5), config.GroupConfig("norm$", lr=0.5)
    cfg = dataclasses.replace(cfg, optim=dataclasses.replace(cfg.optim, groups={"ahead": ahead, "norms": norms}))
    assert groups.without_lost(cfg) == (cfg, [])
    made, lines = groups.without_lost(cfg.without_mtp)
    assert made.optim.groups == {"norms": norms} and lines[0].startswith("optim.groups.ahead is left out")


def test_what_is_said():
    said = lambda steps, **loss: prediction.describe(setting(**loss).loss, 2, steps)
    assert said(9, mtp_stop=3).endswith("weight 0.7, 0 (off) after step 3")
    assert said(9, mtp_coef=0.0).endswith("weight 0 (off)")
    assert said(3, mtp_stop=3, mtp_late_coef=0.1).endswith("0.1 after step 3, which a run of 3 steps does not reach")
