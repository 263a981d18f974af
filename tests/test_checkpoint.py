"""Checkpoints: round trip, other meshes, donation, a killed process, two processes, clear refusals."""

import json
import os
import re
import shutil
import tempfile
import threading
import time
import types
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from orbax.checkpoint._src.serialization import ocdbt_utils

from moe_jax.errors import CheckpointError
from moe_jax.run import checksums
from moe_jax.run.checkpoint import Checkpoints

AXES = ("data", "fsdp", "expert")
DATA = {"reader": {"position": 7, "files": ["a", "ü"], "order": None}, "fraction": 0.1}


class State(NamedTuple):
    step: Any
    params: Any
    router_bias: Any
    opt_state: Any


def mesh_of(*shape):
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Explicit,) * 3)


def spec_of(leaf):
    return PartitionSpec(None, "expert", "fsdp") if leaf.ndim == 3 else PartitionSpec()


def make_state(mesh, seed=0):
    rng = np.random.default_rng(seed)
    params = {
        "embed": jnp.asarray(rng.normal(size=(16, 8)), jnp.bfloat16),
        "layers": {"w_up": jnp.asarray(rng.normal(size=(3, 8, 16)), jnp.float32), "norm": jnp.ones((3, 8))},
    }
    chain = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    opt_state = chain.init(params)
    opt_state = jax.tree.map(lambda x: x + jnp.asarray(rng.integers(1, 9, x.shape), x.dtype), opt_state)
    state = State(jnp.int32(seed), params, None, opt_state)
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, spec_of(x))), state)


def abstract(state, mesh):
    leaf = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec_of(x)))
    return jax.tree.map(leaf, state)


def assert_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype, path
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=str(path))


def with_leaf(state, name, leaf):
    return state._replace(params=state.params | {name: leaf})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run directory with steps 2 and 3 (keep=2 of three saves), saved on a (8, 1, 1) mesh."""
    workdir = tmp_path_factory.mktemp("run")
    with Checkpoints(workdir, keep=2) as checkpoints:
        assert checkpoints.latest() is None
        for step in (1, 2, 3):
            checkpoints.save(step, make_state(mesh_of(8, 1, 1), step), DATA | {"step": step})
        assert checkpoints.latest() == 3
    return workdir


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 2, 4)])
def test_restores_on_any_mesh(saved, shape):
    mesh, want = mesh_of(*shape), make_state(mesh_of(8, 1, 1), 3)
    with Checkpoints(saved) as checkpoints:
        state, data = checkpoints.restore(abstract(want, mesh))
    assert_equal(state, want)
    assert data == DATA | {"step": 3}
    for leaf in jax.tree.leaves(state):
        assert leaf.sharding == NamedSharding(mesh, spec_of(leaf))


def test_keeps_the_newest_and_restores_an_older_one(saved):
    assert sorted(p.name for p in (saved / "checkpoints").iterdir()) == ["2", "3"]
    with Checkpoints(saved) as checkpoints:
        want = make_state(mesh_of(8, 1, 1), 2)
        state, data = checkpoints.restore(abstract(want, mesh_of(8, 1, 1)), step=2)
        assert_equal(state, want)
        assert data["step"] == 2
        with pytest.raises(CheckpointError, match=r"has no step 1; it has 2, 3"):
            checkpoints.restore(abstract(want, mesh_of(8, 1, 1)), step=1)


def test_holds_two_items_and_no_pickle(saved):
    step = saved / "checkpoints" / "3"
    assert sorted(p.name for p in step.iterdir() if p.is_dir()) == ["data", "state"]
    [data] = [p for p in (step / "data").iterdir() if p.suffix == ".json"]
    assert json.loads(data.read_text(encoding="utf-8")) == {"processes": [DATA | {"step": 3}]}
    for path in step.rglob("*"):
        assert path.is_dir() or not path.read_bytes().startswith(b"\x80"), f"{path} looks like a pickle"


def test_placeholder_leaves_are_not_read(saved):
    want = make_state(mesh_of(8, 1, 1), 3)
    target = abstract(want, mesh_of(2, 2, 2))
    target = target._replace(opt_state=jax.tree.map(lambda _: ..., target.opt_state))
    with Checkpoints(saved) as checkpoints:
        state, _ = checkpoints.restore(target)
    assert_equal(state.params, want.params)
    assert all(leaf is ... for leaf in jax.tree.leaves(state.opt_state))


def test_mismatches_name_the_parameter(saved):
    mesh = mesh_of(8, 1, 1)
    good = abstract(make_state(mesh), mesh)
    embed = good.params["embed"]
    leaf = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=embed.sharding)
    fewer = good._replace(params={"embed": embed})
    cases = {
        r"3: params/embed has shape \(16, 8\), this model needs \(16, 4\)": with_leaf(
            good, "embed", leaf((16, 4), jnp.bfloat16)
        ),
        r"params/embed has dtype bfloat16, this model needs float32": with_leaf(
            good, "embed", leaf((16, 8), jnp.float32)
        ),
        r"has no params/head, which this model has": with_leaf(good, "head", embed),
        r"has params/layers/norm, which this model does not have \(2 such\)": fewer,
        r"params/embed has no sharding": with_leaf(good, "embed", jax.ShapeDtypeStruct((16, 8), jnp.bfloat16)),
    }
    with Checkpoints(saved) as checkpoints:
        for message, target in cases.items():
            with pytest.raises(CheckpointError, match=message) as e:
                checkpoints.restore(target)
            assert "\n" not in str(e.value)


@pytest.mark.filterwarnings("ignore:coroutine 'PyTreeHandler:RuntimeWarning")  # Orbax, when one of two items fails
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("sums", [True, False])
def test_a_half_deleted_checkpoint_is_refused_or_whole(saved, tmp_path, sums):
    """Whichever file is missing, `restore` returns what was saved or says that it cannot; without checksums, too."""
    want = make_state(mesh_of(8, 1, 1), 3)
    target = abstract(want, mesh_of(8, 1, 1))
    source, copy = saved / "checkpoints" / "3", tmp_path / "checkpoints" / "3"
    refused = 0
    for file in sorted(p.relative_to(source) for p in source.rglob("*") if p.is_file()):
        shutil.copytree(source, copy)
        (copy / file).unlink()
        if not sums:
            (copy / "checksums.json").unlink(missing_ok=True)
        with Checkpoints(tmp_path) as checkpoints:
            try:
                state, data = checkpoints.restore(target)
            except CheckpointError as e:
                assert re.search(r"3 (is damaged|cannot be read): .+", str(e)) and "\n" not in str(e)
                refused += 1
            else:
                assert_equal(state, want)
                assert data == DATA | {"step": 3}
        shutil.rmtree(copy)
    assert refused >= 4  # the arrays, their names and the data state


def test_reading_only_changes_nothing(tmp_path):
    state = make_state(mesh_of(8, 1, 1), 1)
    target = abstract(state, mesh_of(8, 1, 1))
    with Checkpoints(tmp_path) as reader:
        assert reader.latest() is None
        assert not (tmp_path / "checkpoints").exists()
        with pytest.raises(CheckpointError, match="has no complete checkpoint"):
            reader.restore(target)
        with Checkpoints(tmp_path, keep=1) as writer:
            writer.save(1, state, {})
            writer.save(4, state, {}, wait=True)
            assert reader.latest() == 4  # written by somebody else after the reader was opened
        with pytest.raises(CheckpointError, match="reading only"):
            reader.save(5, state, {})


def test_the_past_is_not_rewritten(tmp_path):
    state, other = make_state(mesh_of(8, 1, 1), 1), make_state(mesh_of(8, 1, 1), 2)
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        checkpoints.save(5, state, {"n": 1})
        checkpoints.save(5, state, {"n": 1}, wait=True)  # the last step of a run that also was a periodic one
        with pytest.raises(CheckpointError, match="already has step 5; an earlier step 4"):
            checkpoints.save(4, other, {"n": 2})
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        with pytest.raises(CheckpointError, match="already has step 5; an earlier step 5"):
            checkpoints.save(5, other, {"n": 2})
        assert checkpoints.restore(abstract(state, mesh_of(8, 1, 1)))[1] == {"n": 1}


def test_a_step_whose_save_failed_is_saved_again(tmp_path, monkeypatch):
    state = make_state(mesh_of(8, 1, 1), 1)
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        checkpoints.save(1, state, {"n": 1})
        with monkeypatch.context() as broken:
            nothing = types.SimpleNamespace(result=lambda: True)
            broken.setattr(type(checkpoints._orbax), "save_checkpointables_async", lambda *_, **__: nothing)
            with pytest.raises(CheckpointError, match=r"2 could not be saved: .+; earlier checkpoints are intact"):
                checkpoints.save(2, state, {"n": 2}, wait=True)
        assert checkpoints.latest() == 1
        checkpoints.save(2, state, {"n": 2})
        assert checkpoints.latest() == 2


# What libraries take for a pattern, an escape or a scheme, and what else a name of a folder may hold.
NAMES = ["[v2] {a,b} 100%20 #1 ü $HOME '", "a*b?", "**", "a\\b", "gs:"]


@pytest.mark.parametrize("name", NAMES)
def test_a_run_directory_of_any_name(tmp_path, name):
    """Orbax lists folders by a glob of their path: in `[v2]` it found nothing and saved that; `a*b` is `axb`, too."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = {"w": jax.ShapeDtypeStruct((3,), jnp.float32, sharding=sharding)}
    workdir, other = tmp_path / name / "run", tmp_path / name.replace("*", "x").replace("?", "x") / "run"
    other.mkdir(parents=True)
    with Checkpoints(workdir, keep=1) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {"w": jnp.arange(3.0) + step}, {"n": step})
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["2"]
    with Checkpoints(workdir) as checkpoints:
        state, data = checkpoints.restore(target)
        assert checkpoints.name(2) == f"{workdir}/checkpoints/2"
    np.testing.assert_array_equal(np.asarray(state["w"]), [2, 3, 4])
    assert data == {"n": 2} and checksums.damage(workdir / "checkpoints" / "2") == ""
    assert other == workdir or not any(other.iterdir())
    assert not list(Path(tempfile.gettempdir()).glob("moe_jax-*/run"))  # the link, if it took one


@pytest.mark.parametrize("wait", [True, False])
def test_a_save_counts_when_what_was_written_is_found(tmp_path, monkeypatch, wait):
    """Orbax goes on when nothing comes of its files' merging; here that is an error, and nothing resumes from it."""
    state = {"w": jnp.ones(3)}

    async def nothing(*_, **__):
        return None

    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, state, {}, wait=True)
        with monkeypatch.context() as broken:
            broken.setattr(ocdbt_utils, "merge_ocdbt_per_process_files", nothing)
            with pytest.raises(CheckpointError, match="2 could not be saved: w is not in it; earlier checkpoints are"):
                checkpoints.save(2, state, {}, wait=wait)
                checkpoints.latest()
        assert checkpoints.latest() == 1
        assert [p.name for p in (tmp_path / "checkpoints.dropped").iterdir()] == ["2"]
        checkpoints.save(2, state, {}, wait=True)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [1, 2]


def test_what_was_set_aside_before_stays(tmp_path):
    for _ in range(3):
        with Checkpoints(tmp_path, keep=3) as checkpoints:
            for step in (1, 2):
                if step not in checkpoints.steps():
                    checkpoints.save(step, {"w": jnp.ones(3)}, {}, wait=True)
        with Checkpoints(tmp_path, keep=3) as checkpoints:
            assert checkpoints.rewind(1) == [2]
    assert sorted(p.name for p in (tmp_path / "checkpoints.dropped").iterdir()) == ["2", "2.2", "2.3"]


def test_saving_again_and_again_opens_no_more_files(tmp_path):
    """Every save of Orbax has a thread with an event loop, which ends only when its result is asked for."""
    state, opened, threads = {"w": jnp.ones(8)}, [], []
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in range(1, 7):
            checkpoints.save(step, state, {}, wait=True)
            opened.append(len(os.listdir("/dev/fd")))
            threads.append(threading.active_count())
        deadline = time.monotonic() + 10
        while threading.active_count() > min(threads) + 1 and time.monotonic() < deadline:
            time.sleep(0.01)  # what looked at a finished save takes a moment to end
        threads.append(threading.active_count())
    assert opened[-1] <= opened[1] and threads[-1] <= min(threads) + 1, (opened, threads)


def test_data_state_must_be_json(tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        with pytest.raises(CheckpointError, match="data state cannot be saved as JSON"):
            checkpoints.save(1, make_state(mesh_of(8, 1, 1)), {"rng": b"bytes"})
        assert checkpoints.latest() is None


@pytest.mark.parametrize("spec", [PartitionSpec("data"), PartitionSpec()])
def test_donation_right_after_save_does_not_reach_the_checkpoint(tmp_path, spec):
    """Orbax holds or has copied the buffers when `save` returns, so that the next step cannot write there."""
    sharding = NamedSharding(mesh_of(8, 1, 1), spec)
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    state = {f"w{i}": jax.device_put(jnp.zeros((512, 512)), sharding) for i in range(8)}
    before = state["w0"]
    state = step(state)
    assert before.is_deleted(), "this platform ignores donation, so the test would prove nothing"
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        for n in (1, 2, 3):
            expected = {k: np.array(v) for k, v in state.items()}
            checkpoints.save(n, state, {})
            for _ in range(5):
                state = step(state)
            jax.block_until_ready(state)
            got, _ = checkpoints.restore(target, n)
            for name in expected:
                np.testing.assert_array_equal(np.asarray(got[name]), expected[name])
                assert not np.array_equal(np.asarray(state[name]), expected[name])
