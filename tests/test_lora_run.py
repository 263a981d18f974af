"""A run of adapters with train.py, eval.py and export: resumed bit for bit, found again after its base has moved."""

import json
import shutil

import jax
import numpy as np
import pytest
from test_train import run, start, write_text

from moe_jax.nn.lora import is_adapter
from moe_jax.parallel import sharding
from moe_jax.run import base, config_file
from moe_jax.run.checkpoint import Checkpoints
from moe_jax.train.state import abstract_state
from moe_jax.tree import flatten

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
