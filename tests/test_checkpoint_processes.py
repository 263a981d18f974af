"""Checkpoints when a process is killed inside a save, and of two processes."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax import config
from moe_jax.errors import CheckpointError
from moe_jax.run.checkpoint import Checkpoints
from moe_jax.run.config_file import load_config
from tests.test_checkpoint import AXES, mesh_of


def run_child(code, *argv, **kwargs):
    root = str(Path(__file__).parents[1])
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": root}
    env.pop("XLA_FLAGS", None)
    command = [sys.executable, "-c", code, *map(str, argv)]
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs, encoding="utf-8"
    )


KILLED = """
import os, signal, sys
import jax, numpy as np
from moe_jax.run.checkpoint import Checkpoints
state = lambda seed: {"w": jax.device_put(np.random.default_rng(seed).normal(size=(4 << 20,)).astype(np.float32))}
with Checkpoints(sys.argv[1], keep=1) as checkpoints:
    checkpoints.save(1, state(1), {"step": 1})
    checkpoints.save(2, state(2), {"step": 2}, wait=True)
    checkpoints.save(3, state(3), {"step": 3})
    while not any(checkpoints.directory.glob("3.*/state*")):  # the name it has until it is complete
        pass
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_while_saving_leaves_the_checkpoint_before_usable(tmp_path):
    child = run_child(KILLED, tmp_path)
    _, errors = child.communicate(timeout=300)
    assert child.returncode == -signal.SIGKILL, errors
    left = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert "2" in left and "3" not in left and len(left) > 1, f"not killed in the middle of a save: {left}"

    value = lambda seed: np.random.default_rng(seed).normal(size=(4 << 20,)).astype(np.float32)
    sharding = NamedSharding(mesh_of(8, 1, 1), PartitionSpec(AXES))
    target = {"w": jax.ShapeDtypeStruct((4 << 20,), jnp.float32, sharding=sharding)}
    with Checkpoints(tmp_path) as reader:
        assert reader.latest() == 2
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == left  # reading cleans nothing
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        state, data = checkpoints.restore(target)
        assert data == {"step": 2}
        np.testing.assert_array_equal(np.asarray(state["w"]), value(2))
        checkpoints.save(3, {"w": jax.device_put(value(3), sharding)}, {"step": 3}, wait=True)
        state, data = checkpoints.restore(target)
    assert data == {"step": 3}
    np.testing.assert_array_equal(np.asarray(state["w"]), value(3))
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["3"]


TWO_PROCESSES = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"localhost:{sys.argv[2]}", 2, int(sys.argv[3]))
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from moe_jax import config
from moe_jax.run.checkpoint import Checkpoints
from moe_jax.run.config_file import save_config
from moe_jax.run.log import Writer
from moe_jax.train.metrics import OneBehind
me = jax.process_index()
mesh = jax.make_mesh((2, 2, 1), ("data", "fsdp", "expert"), axis_types=(AxisType.Explicit,) * 3)
sharding = NamedSharding(mesh, P(("data", "fsdp")))
full = np.arange(64, dtype=np.float32)
state = {"w": jax.make_array_from_callback((64,), sharding, lambda index: full[index])}
with jax.set_mesh(mesh), Checkpoints(sys.argv[1], keep=1) as checkpoints, Writer(sys.argv[1]) as writer:
    save_config(sys.argv[1], config.RunConfig())
    checkpoints.save(1, state, {"process": me, "pad": "x" * 10 * me})
    target = {"w": jax.ShapeDtypeStruct((64,), np.float32, sharding=NamedSharding(mesh, P("fsdp")))}
    got, data = checkpoints.restore(target)
    assert data == {"process": me, "pad": "x" * 10 * me}, data
    for shard in got["w"].addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), full[shard.index])
    behind = OneBehind()
    total = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, P()))(state["w"])
    assert behind.push(1, {"loss": total}) is None
    step, aux = behind.flush()
    writer.write(step, {"loss": aux["loss"]})
    assert behind.push(2, state) is None
    try:
        behind.flush()
    except ValueError as e:
        assert "['w'] is spread over processes" in str(e), e
    else:
        raise AssertionError("a metric spread over processes was read")
print("done", me)
"""


@pytest.mark.slow
def test_two_processes(tmp_path):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    children = [run_child(TWO_PROCESSES, tmp_path, port, i) for i in range(2)]
    try:
        results = [child.communicate(timeout=300) for child in children]
    finally:
        for child in children:
            child.kill()
    for i, (out, errors) in enumerate(results):
        assert children[i].returncode == 0 and out.endswith(f"done {i}\n"), errors[-4000:]
    assert load_config(tmp_path) == config.RunConfig()
    assert (tmp_path / "metrics.jsonl").read_text(encoding="utf-8") == '{"kind": "train", "step": 1, "loss": 2016.0}\n'
    target = {"w": jax.ShapeDtypeStruct((64,), jnp.float32, sharding=NamedSharding(mesh_of(8, 1, 1), PartitionSpec()))}
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError, match=r"of 2 processes .* resume with 2"):
        checkpoints.restore(target)
