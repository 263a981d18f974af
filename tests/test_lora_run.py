"""A run of adapters with train.py, eval.py and export: resumed bit for bit, found again after its base has moved."""

import json
import shutil
import socket

import jax
import numpy as np
import pytest
from test_train import finish, rows, start, write_text

from experiments import muon_matrices, upcycling_measure
from moe_jax.errors import UserError
from moe_jax.nn.lora import is_adapter
from moe_jax.parallel import sharding
from moe_jax.run import base, config_file
from moe_jax.run.checkpoint import Checkpoints
from moe_jax.train.state import abstract_state
from moe_jax.tree import flatten
from tests.programs import run

STEPS = 4


def state_of(workdir, step):
    cfg = config_file.load_config(workdir)
    with Checkpoints(workdir) as checkpoints:
        kept = base.kept(cfg, abstract_state(cfg, sharding.make_mesh((1, 1, 1), jax.devices()[:1])))
        return {path: np.asarray(x) for path, x in flatten(checkpoints.restore(kept, step)[0]).items()}


def bytes_of(folder) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


@pytest.mark.slow
def test_a_run_of_adapters(tmp_path):
    write_text(tmp_path)
    config = f"--config={tmp_path}/config.py"
    short = (
        config,
        "--config.train.steps=2",
        "--config.optim.warmup_steps=0",
        "--config.train.checkpoint_every=2",
        "--config.train.log_every=1",
    )
    run(tmp_path, "train.py", *short, workdir="base")
    flags = [
        config,
        f"--config.init_from={tmp_path / 'base'}",
        "--config.model.lora.rank=2",
        f"--config.train.steps={STEPS}",
        "--config.train.checkpoint_every=2",
        "--config.train.keep_checkpoints=5",
    ]
    done = run(tmp_path, "train.py", *flags, workdir="lora")
    assert "adapters of rank 2" in done.stdout and "starting from the weights of" in done.stdout
    straight = state_of(tmp_path / "lora", STEPS)
    assert any(map(is_adapter, straight)) and not any(path.endswith(("/w_q", "embed")) for path in straight)
    sizes = [bytes_of(tmp_path / name / "checkpoints" / step) for name, step in (("lora", "4"), ("base", "2"))]
    assert sizes[0] < sizes[1] / 2

    shutil.copytree(tmp_path / "lora", tmp_path / "again")
    done = run(tmp_path, "train.py", *flags, "--resume_step=2", workdir="again")
    assert "resumed after step 2" in done.stdout
    for path, x in state_of(tmp_path / "again", STEPS).items():
        np.testing.assert_array_equal(x, straight[path], err_msg=path)

    (tmp_path / "base").rename(tmp_path / "moved")
    process = start(tmp_path, "eval.py", workdir="lora")
    _, err = process.communicate(timeout=300)
    assert process.returncode and "which is not there; nearest valid: a link" in err.splitlines()[-1]
    assert "Traceback" not in err
    (tmp_path / "lora" / "base").symlink_to(tmp_path / "moved")
    done = run(tmp_path, "eval.py", workdir="lora")
    assert f"checkpoint of step {STEPS}" in done.stdout
    assert json.loads((tmp_path / "lora" / "eval.json").read_text(encoding="utf-8"))["step"] == STEPS

    # Another run starts from the merged weights.
    more = [
        config,
        f"--config.init_from={tmp_path / 'lora'}",
        "--config.train.steps=1",
        "--config.optim.warmup_steps=0",
    ]
    run(tmp_path, "train.py", *more, workdir="merged")
    cfg = config_file.load_config(tmp_path / "merged")
    assert not cfg.model.lora.rank

    # A third goes on from A and B, with the base that the link names, and is resumed.
    same = ["--config.model.lora.rank=2", "--config.train.steps=4", "--config.train.checkpoint_every=2"]
    done = run(tmp_path, "train.py", *more[:2], *same, workdir="more")
    assert f"starting from the adapters of {tmp_path / 'lora'} and their base" in done.stdout
    with Checkpoints(tmp_path / "more") as checkpoints:
        assert checkpoints.data_state()["base"]["from"] == str((tmp_path / "moved").resolve())
    straight = state_of(tmp_path / "more", 4)
    done = run(tmp_path, "train.py", *more[:2], *same, "--resume_step=2", workdir="more")
    assert "resumed after step 2" in done.stdout
    for path, x in state_of(tmp_path / "more", 4).items():
        np.testing.assert_array_equal(x, straight[path], err_msg=path)
    measured = upcycling_measure.measure(tmp_path / "more")  # similarity of merged experts
    assert set(measured["similarity"]) == {0, 2, 4}
    with pytest.raises(UserError, match="has frozen matrices"):
        muon_matrices.measure(tmp_path / "lora")


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    """2 processes × 4 devices give the numbers of 1 × 8, on a base with adapters of its own, and resume each other."""
    write_text(tmp_path)
    names = ["model.compute_dtype=float32", "train.tensorboard=false", "mesh.data=2", "mesh.fsdp=2", "mesh.expert=2"]
    names += ["train.steps=4", "train.checkpoint_every=2", "train.keep_checkpoints=5", "optim.warmup_steps=0"]
    flags = [f"--config={tmp_path / 'config.py'}", *(f"--config.{name}" for name in names)]
    run(tmp_path, "train.py", *flags, devices=8, workdir="base")
    inner = [f"--config.init_from={tmp_path / 'base'}", "--config.model.lora.rank=3", "--config.optim.lr=0.02"]
    run(tmp_path, "train.py", *flags, *inner, devices=8, workdir="inner")
    flags += [f"--config.init_from={tmp_path / 'inner'}", "--config.model.lora.rank=2", "--config.optim.lr=0.02"]
    done = run(tmp_path, "train.py", *flags, devices=8, workdir="one")
    assert "its adapters merged, with fresh adapters" in done.stdout

    def two(*more, workdir):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        both = [
            start(tmp_path, "train.py", "--distributed", *flags, *more, devices=4, workdir=workdir,
                  JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES="2", JAX_PROCESS_ID=str(i))
            for i in range(2)
        ]  # fmt: skip
        return [finish(process) for process in both]

    two(workdir="two")
    shutil.copytree(tmp_path / "one", tmp_path / "resumed")
    outputs = two("--resume_step=2", workdir="resumed")
    assert "resumed after step 2" in outputs[0].stdout
    for workdir in ("two", "resumed"):
        for kind in ("train", "eval"):
            one, other = rows(tmp_path, kind, "one"), rows(tmp_path, kind, workdir)
            assert [row["step"] for row in one] == [row["step"] for row in other]
            for a, b in zip(one, other, strict=True):
                for name in set(a) - {"kind", "tokens_per_second", "mfu", "step_seconds"}:
                    np.testing.assert_allclose(b[name], a[name], rtol=1e-4, err_msg=f"{kind} {a['step']} {name}")
        straight = state_of(tmp_path / "one", STEPS)
        for path, x in state_of(tmp_path / workdir, STEPS).items():
            np.testing.assert_allclose(x, straight[path], rtol=1e-3, atol=1e-5, err_msg=path)
    shutil.copytree(tmp_path / "one", tmp_path / "alone")
    run(tmp_path, "eval.py", devices=1, workdir="alone")  # another mesh: the merged base has other last bits
