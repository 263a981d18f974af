"""The average of the weights: closed forms, the steps of a run beside float64, skipped steps, checkpoints, export."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import config
from moe_jax.config import GroupConfig
from moe_jax.errors import CheckpointError
from moe_jax.hf import export_run
from moe_jax.hf import safetensors as files
from moe_jax.run import checkpoint, config_file, weights
from moe_jax.train import average
from moe_jax.train.state import abstract_state, abstract_weights, join_parts, parts_of
from moe_jax.tree import flatten
from tests import test_guard
from tests.programs import run
from tests.test_guard import leaves, poisoned, rows_of
from tests.test_train import rows, write_text

DECAY = 0.75


def decays(updates: int, decay: float) -> np.ndarray:
    """Of each update, from the promise: min(decay, (1 + n) / (10 + n)) after n updates."""
    n = np.arange(updates)
    return np.minimum(decay, (1 + n) / (10 + n))


# --- closed forms ----------------------------------------------------------------------------------------------------


def test_the_weight_of_new_weights():
    got = [float(average.weight_of_new(0.9999, jnp.int32(n))) for n in (0, 8, 80, 10**6)]
    np.testing.assert_allclose(got, [0.9, 0.5, 0.1, 1e-4], rtol=1e-6)  # 1 − 0.9999 in float32 would be 1.0002e-4


def test_constant_weights_are_their_average_bit_for_bit():
    w = {"a": jax.random.normal(jax.random.key(0), (3, 5)), "b": jnp.full(4, 1 / 3, jnp.bfloat16)}
    start = jax.jit(average.start)(w)
    moved = start
    for n in range(5):
        moved = jax.jit(average.update, static_argnums=2)(moved, w, 0.999, jnp.int32(n))
    for path, x in flatten(moved).items():
        assert x.dtype == jnp.float32
        np.testing.assert_array_equal(x, np.asarray(flatten(w)[path], np.float32))
    assert start["a"].unsafe_buffer_pointer() != w["a"].unsafe_buffer_pointer()  # both are donated to a step


def test_a_linear_ramp_lags_by_a_closed_form():
    """w_t = slope · t: in the end w̄_t = w_t − slope · d / (1 − d)."""
    slope, steps, d = 0.5, 400, 0.9

    def move(a, n):
        return average.update(a, {"w": slope * (n + 1.0)}, d, n), None

    last, _ = jax.lax.scan(move, {"w": jnp.float32(0)}, jnp.arange(steps))
    np.testing.assert_allclose(last["w"], slope * steps - slope * d / (1 - d), rtol=1e-6)


def test_the_example_of_tensorflow():
    """Of the documentation of `tf.train.ExponentialMovingAverage(0.99, num_updates)`: 0, then 5, then 10 at 10,000."""
    one = average.update({"v": jnp.float32(0)}, {"v": jnp.float32(5)}, 0.99, jnp.int32(0))
    two = average.update(one, {"v": jnp.float32(10)}, 0.99, jnp.int32(10_000))
    np.testing.assert_allclose([one["v"], two["v"]], [4.5, 4.555], rtol=1e-6)


# --- in a run --------------------------------------------------------------------------------------------------------


def run_config() -> config.RunConfig:
    """Frozen matrices have no average, and a controller of biases has its state beside it."""
    cfg = test_guard.CHECKED
    frozen = {"output": GroupConfig("/attention/w_o$", freeze=True)}
    optim, loss = (
        dataclasses.replace(cfg.optim, name="adamw", ema=DECAY, groups=frozen),
        dataclasses.replace(cfg.loss, bias_update="adamw"),
    )
    return dataclasses.replace(cfg, optim=optim, loss=loss)


def average_of(state) -> dict:
    return flatten(jax.device_get(parts_of(state.opt_state).ema))


def test_the_parts_of_the_state():
    optimizer = (1, 2)
    assert join_parts(optimizer) is optimizer and parts_of(optimizer) == (optimizer, {}, {})
    for controllers in ({}, {"a": 1}):
        for ema in ({}, {"b": 2}):
            assert parts_of(join_parts(optimizer, controllers, ema)) == (optimizer, controllers, ema)
    assert set(join_parts(optimizer, {}, {"b": 2})) == {"optimizer", "ema"}


def test_a_run(tmp_path):
    """The average of its weights in float64; a skipped step leaves it; a resumed run is the run; weights that are
    loaded are the average, in the layout of the parameters and sharded as they are; without one that is said."""
    run = test_guard.Run(run_config())
    assert parts_of(run.state.opt_state).controllers
    want = {path: np.float64(w) for path, w in flatten(jax.device_get(run.state.params)).items()}
    frozen = want.pop("layers/attention/w_o")
    assert set(average_of(run.state)) == set(want)
    numbers = iter(decays(9, DECAY))
    for n in (1, 2, 3):
        if n == 2:
            before = leaves(run.state[1:])
            assert run.take(n, poisoned(rows_of(n))).skipped == 1 and leaves(run.state[1:]) == before
            continue
        assert run.take(n, rows_of(n)).skipped == 0
        d = next(numbers)
        params = flatten(jax.device_get(run.state.params))
        want = {path: d * a + (1 - d) * params[path] for path, a in want.items()}
        for path, a in average_of(run.state).items():
            np.testing.assert_allclose(a, want[path], rtol=2e-6, atol=1e-7, err_msg=path)
    for path, a in flatten(parts_of(run.state.opt_state).ema).items():
        assert a.dtype == jnp.float32 and a.sharding == flatten(run.state.params)[path].sharding

    cfg, mesh = run.cfg, run.mesh
    config_file.save_config(tmp_path, cfg)
    with checkpoint.Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(3, run.state, {}, wait=True)
        saved = jax.device_get(run.state)
        run.take(4, rows_of(4))
        straight = leaves(run.state)
        run.state, _ = checkpoints.restore(abstract_state(cfg, mesh), 3)
        run.take(4, rows_of(4))
        assert leaves(run.state) == straight

    abstract = abstract_weights(cfg.model, mesh)
    params, bias, origin = weights.load_weights(tmp_path, *abstract, average=True)
    found = flatten(params)
    for path, a in flatten(parts_of(saved.opt_state).ema).items():
        np.testing.assert_array_equal(found[path], a)
        assert found[path].sharding == flatten(abstract[0])[path].sharding
    np.testing.assert_array_equal(found["layers/attention/w_o"], np.float32(frozen))
    assert leaves(bias) == leaves(saved.router_bias) and origin[-1]["weights"] == "ema"
    trained, _, origin = weights.load_weights(tmp_path, *abstract)
    assert leaves(trained) == leaves(saved.params) and "weights" not in origin[-1]
    with checkpoint.Checkpoints(tmp_path / "without", keep=1) as checkpoints:
        parts = parts_of(saved.opt_state)
        checkpoints.save(3, saved._replace(opt_state=join_parts(parts.optimizer, parts.controllers)), {}, wait=True)
    with pytest.raises(CheckpointError, match=r"has no average of the weights \(optim.ema=0\); nearest valid: the tr"):
        weights.load_weights(tmp_path / "without", *abstract, average=True)
    low = dataclasses.replace(cfg.model, param_dtype="bfloat16")
    cast, *_ = weights.load_weights(tmp_path, *abstract_weights(low, mesh), cast=True, average=True)
    np.testing.assert_array_equal(cast["embed"], found["embed"].astype(jnp.bfloat16))


def test_the_averaged_model_has_the_frozen_parameters():
    params = {"a": jnp.ones(2, jnp.bfloat16), "b": {"c": jnp.full(3, 2.0)}}
    made = average.as_params({"a": jnp.full(2, 0.5)}, params)
    assert made["a"].dtype == jnp.bfloat16 and (made["a"] == 0.5).all() and made["b"]["c"] is params["b"]["c"]


@pytest.mark.slow
def test_the_programs(tmp_path):
    """train.py evaluates both; eval.py, the export and another run take the average when they are told to."""
    write_text(tmp_path)
    flags = ["--config.optim.ema=0.5", "--config.model.qk_norm=true"]
    done = run(tmp_path, "train.py", f"--config={tmp_path / 'config.py'}", *flags)
    assert (
        "average of the weights: decay 0.5" in done.stdout
        and "the average of the weights (optim.ema) on" in done.stdout
    )
    trained, averaged = (rows(tmp_path, kind) for kind in ("eval", "eval_ema"))
    assert [row["step"] for row in averaged] == [row["step"] for row in trained] == [3, 6]
    assert set(averaged[0]) == set(trained[0]) and averaged[0]["xent"] != trained[0]["xent"]

    run(tmp_path, "eval.py", "--weights=ema", "--batches=2")
    (found,) = (tmp_path / "run").glob("eval.ema*.json")
    body = json.loads(found.read_text(encoding="utf-8"))
    np.testing.assert_allclose(body["domains"][-1]["xent"], averaged[-1]["xent"], rtol=1e-4)

    cfg = config_file.load_config(tmp_path / "run")
    mesh = test_guard.sharding.make_mesh((1, 1, 1), jax.devices()[:1])
    params, *_ = weights.load_weights(tmp_path / "run", *abstract_weights(cfg.model, mesh), average=True)
    export_run(tmp_path / "run", tmp_path / "hf", average=True, dtype="float32", mesh=mesh, echo=lambda line: None)
    entries = files.open_model(tmp_path / "hf", lambda name: True, lambda line: None)
    np.testing.assert_array_equal(entries["model.embed_tokens.weight"].read(), np.float32(params["embed"]))

    start = [
        f"--config.init_from={tmp_path / 'run'}",
        "--weights=ema",
        "--config.train.steps=1",
        "--config.optim.lr=0.0",
    ]
    start += [flags[1], "--config.optim.warmup_steps=0"]
    done = run(tmp_path, "train.py", f"--config={tmp_path / 'config.py'}", *start, workdir="next")
    assert f"starting from the average of the weights of {tmp_path / 'run'}, with a fresh" in done.stdout
    again, *_ = weights.load_weights(tmp_path / "next", *abstract_weights(cfg.model, mesh))
    assert leaves(again) == leaves(params)
