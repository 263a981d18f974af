"""Whole runs of train.py that meet a fault: told to stop, killed, poisoned batches, a process of several that dies."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from moe_jax.run.log import read_metrics
from tests import programs
from tests.test_resume import REPO, TIMES, write_text

pytestmark = pytest.mark.slow
STEPS = 12
CONFIG = """
import runpy

from moe_jax import config as config_lib


def get_config():
    config = runpy.run_path("configs/debug.py")["get_config"]()
    config.data.sources = {"text": config_lib.source(kind="files", path="@/text/*.txt", validation_fraction=0.2)}
    config.train.update(steps=12, checkpoint_every=5, eval_every=4, max_skipped=3)
    return config
"""
# train.py with NaN in the weights of the batches that $POISON names, from 0.
POISONED = """
import os, runpy, sys
import numpy as np
from moe_jax.data import pipeline
deliver, bad = pipeline.TrainIterator.__next__, {int(n) for n in os.environ["POISON"].split(",")}
def poisoned(self):
    number, rows = self._count, dict(deliver(self))
    if number in bad:
        rows["weights"] = np.full_like(rows["weights"], np.nan)
    return rows
pipeline.TrainIterator.__next__ = poisoned
runpy.run_path("train.py", run_name="__main__")
"""
# train.py that is told to stop as soon as it evaluates.
TOLD = """
import os, runpy, signal
from moe_jax.evaluate import held_out
whole = held_out.evaluate
def told(*args, **how):
    os.kill(os.getpid(), signal.SIGTERM)
    return whole(*args, **how)
held_out.evaluate = told
runpy.run_path("train.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    made = tmp_path_factory.mktemp("survival")
    write_text(made)
    (made / "config.py").write_text(CONFIG.replace("@", str(made)), encoding="utf-8")
    return made


def start(root: Path, name: str, *flags: str, devices: int = 1, program=("train.py",), **env: str) -> subprocess.Popen:
    """One process; its output goes to `name`.log."""
    xla = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    own = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla, "MOE_JAX_CACHE": str(root / "cache"), "PYTHONPATH": str(REPO)}
    own |= programs.environment(root / "compiled")
    command = [sys.executable, *program, f"--config={root}/config.py", f"--workdir={root}/{name}", *flags]
    with open(root / f"{name}.log", "ab") as log:
        return subprocess.Popen(command, cwd=REPO, env=os.environ | own | env, stdout=log, stderr=log)


def start_several(root: Path, name: str, count: int, *flags: str) -> list[subprocess.Popen]:
    """`count` processes of 8 / count devices, one JAX program of eight."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    if count == 1:
        return [start(root, name, *flags, devices=8)]
    ids = lambda i: {"JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(i), "JAX_COORDINATOR_ADDRESS": address}
    return [start(root, name, *flags, "--distributed", devices=8 // count, **ids(i)) for i in range(count)]


def log(root: Path, name: str) -> str:
    return (root / f"{name}.log").read_text(encoding="utf-8")


def finish(root: Path, name: str, *processes: subprocess.Popen, status: int = 0, seconds: float = 500) -> str:
    try:
        for process in processes:
            assert process.wait(seconds) == status, log(root, name)[-4000:]
    finally:
        for process in processes:
            process.kill()
    return log(root, name)


def rows(root: Path, name: str, kind: str = "train") -> list[dict]:
    found = read_metrics(root / name, kind) if (root / name / "metrics.jsonl").exists() else []
    return [{k: v for k, v in row.items() if k not in TIMES} for row in found]


def until_rows(root: Path, name: str, count: int, processes: list[subprocess.Popen]) -> None:
    while len(rows(root, name)) < count:
        assert all(p.poll() is None for p in processes), log(root, name)[-4000:]
        time.sleep(0.05)


def test_a_poisoned_batch_is_skipped_and_three_stop_the_run_with_a_dump(root):
    poisoned = ("-c", POISONED)
    said = finish(root, "poisoned", start(root, "poisoned", program=poisoned, POISON="2,7,8"))
    assert "step 3 skipped, not finite: loss nan, gradient norm nan; batch 2 of seed 0" in said
    assert [(row["step"], row["batch"]) for row in rows(root, "poisoned", "skipped")] == [(3, 2), (8, 7), (9, 8)]
    assert [row["skipped"] for row in rows(root, "poisoned")] == [0, 0, 1, 1, 1, 1, 1, 2, 3, 3, 3, 3]
    assert [row["tokens"] // 512 for row in rows(root, "poisoned")] == [1, 2, 2, 3, 4, 5, 6, 6, 6, 7, 8, 9]
    for row in rows(root, "poisoned"):
        assert ("nonfinite" in row) == (row["step"] in (3, 8, 9))

    said = finish(root, "stops", start(root, "stops", program=poisoned, POISON="6,7,8,9"), status=2)
    last = said.splitlines()[-1]
    assert last.startswith("error: step 9: 3 steps in a row were skipped") and f"--replay={root}/stops/dumps/9" in last
    assert sorted(p.name for p in (root / "stops" / "checkpoints").iterdir()) == ["5"]
    said = finish(root, "again", start(root, "again", f"--replay={root}/stops/dumps/9"))
    assert "step 9 repeated; it was skipped: not finite: loss nan" in said and "\n  reproduced\n" in said
    assert "in sequences [0, 1, 2, 3, 4, 5, 6, 7]" in said and not (root / "again").exists()


def test_told_to_stop_again_and_again_no_step_is_lost(root):
    finish(root, "straight", start(root, "straight"))
    moment, signals = np.random.default_rng(0), 0
    while signals < 4:
        process, before = start(root, "told"), len(rows(root, "told"))
        while process.poll() is None and len(rows(root, "told")) == before:
            time.sleep(0.001)
        time.sleep(moment.uniform(0, 0.05))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGTERM)
        finish(root, "told", process)
        signals += 1
        saved = max(int(p.name) for p in (root / "told" / "checkpoints").iterdir())
        assert saved == rows(root, "told")[-1]["step"]
    assert signals >= 1
    finish(root, "told", start(root, "told"))
    for kind in ("train", "eval"):
        assert json.dumps(rows(root, "told", kind)) == json.dumps(rows(root, "straight", kind))
    for file in ("eval.json", "sample.txt"):
        assert (root / "told" / file).read_text(encoding="utf-8") == (root / "straight" / file).read_text(
            encoding="utf-8"
        )


def test_told_to_stop_while_an_evaluation_is_made_up_for(root):
    """No step is taken before it is: after that it would never be."""
    for _ in range(3):  # the evaluation after step 4, then twice the one of the start
        finish(root, "unheard", start(root, "unheard", program=("-c", TOLD)))
        assert [row["step"] for row in rows(root, "unheard")][-1] == 4 and not rows(root, "unheard", "eval")
    for name in ("unheard", "straight"):
        finish(root, name, start(root, name))
    assert json.dumps(rows(root, "unheard", "eval")) == json.dumps(rows(root, "straight", "eval"))


def test_another_start_is_refused_and_a_damaged_checkpoint_named(root):
    first = start(root, "owned")
    until_rows(root, "owned", 1, [first])
    said = finish(root, "owned", start(root, "owned"), status=2)
    assert "error: --workdir=" in said and f"another run is training in it (process {first.pid} on" in said
    finish(root, "owned", first)
    [array] = (root / "owned" / "checkpoints" / "12" / "state" / "ocdbt.process_0" / "d").iterdir()
    data = bytearray(array.read_bytes())
    data[len(data) // 2] ^= 1
    array.write_bytes(data)
    assert "12 is damaged: state/ocdbt.process_0/d/" in finish(root, "owned", start(root, "owned"), status=2)
    before = rows(root, "owned")
    said = finish(root, "owned", start(root, "owned", "--resume_step=10"))
    assert "checkpoint 12 is set aside" in said and "resumed after step 10" in said
    assert rows(root, "owned") == before


def test_any_number_of_processes_goes_on_where_another_stopped(root):
    """One process, two, four, one again: the losses of one that does it all, to float32's sums."""
    flags = ("--config.train.eval_every=0", "--config.train.checkpoint_every=3", "--config.optim.schedule=constant")
    finish(root, "alone", *start_several(root, "alone", 1, *flags))
    for step, count in ((3, 1), (6, 2), (9, 4), (12, 1)):
        said = finish(root, "many", *start_several(root, "many", count, *flags, f"--config.train.steps={step}"))
        assert step == 3 or f"resumed after step {step - 3}" in said
    want, got = rows(root, "alone"), rows(root, "many")
    assert [row["step"] for row in got] == list(range(1, STEPS + 1))
    np.testing.assert_allclose([row["loss"] for row in got], [row["loss"] for row in want], rtol=2e-5)


@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_of_two_processes_dies_the_other_ends(root, victim):
    name = f"one_dies_{victim}"
    processes = start_several(root, name, 2, "--config.train.steps=100000")
    until_rows(root, name, 3, processes)
    processes[victim].kill()
    try:
        assert processes[1 - victim].wait(60) != 0
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert any(text in log(root, name) for text in ("another task died", "another process has died"))


def test_when_one_of_two_processes_is_told_to_stop_both_save_the_same_step(root):
    processes = start_several(root, "told_one", 2, "--config.train.steps=100000")
    until_rows(root, "told_one", 3, processes)
    processes[1].send_signal(signal.SIGTERM)
    said = finish(root, "told_one", *processes, seconds=60)
    saved = max(int(p.name) for p in (root / "told_one" / "checkpoints").iterdir())
    assert saved == rows(root, "told_one")[-1]["step"] >= 3
    assert said.count(f"stopped after step {saved}, which is saved") == 2
