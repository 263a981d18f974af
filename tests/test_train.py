"""train.py and eval.py as a user runs them, on two small domains of text: what they print, what they leave behind."""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moe_jax.run import changes
from tests import programs

REPO = Path(__file__).parents[1]
STEPS = 6
KEYS = {"step", "loss", "xent", "load_balance", "router_z", "tokens", "tokens_per_second", "mfu", "max_load"}

CONFIG = """
from moe_jax import config as config_lib


def get_config():
    config = config_lib.default_config()
    files = lambda name: config_lib.source(kind="files", path=f"@/{name}/*.txt", validation_fraction=0.2)
    config.data.sources = {name: files(name) for name in ("prose", "numbers")}
    config.data.update(batch_size=16, seq_len=32)
    config.model.update(vocab_size=257, d_model=32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16)
    config.model.moe.update(num_experts=4, d_expert=32)
    config.optim.update(lr=1e-2, warmup_steps=2)
    config.train.update(steps=6, log_every=1, checkpoint_every=4, eval_every=3, eval_batches=2)
    config.sample.update(tokens=8, prompt="the ")
    return config
"""


def write_text(root: Path) -> None:
    rng = np.random.default_rng(0)
    words = {"prose": "the old river bends and the light is low".split(), "numbers": [str(n) for n in range(90, 110)]}
    for name, choices in words.items():
        (root / name).mkdir()
        for i in range(40):
            (root / name / f"{i}.txt").write_text(" ".join(rng.choice(choices, 60)) + "\n", encoding="utf-8")
    (root / "config.py").write_text(CONFIG.replace("@", str(root)), encoding="utf-8")


def start(
    root: Path, program: str, *flags: str, devices: int = 1, workdir: str = "run", fresh: bool = False, **extra
) -> subprocess.Popen:
    """The program in a process of its own; its output is no terminal. XLA optimises nothing: that takes longer.

    fresh: nothing is compiled yet, and what is goes to the program's own cache, not to that of other tests.
    """
    xla = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla, "MOE_JAX_CACHE": str(root / "cache")}
    env |= {"MPLBACKEND": "agg"} | ({} if fresh else programs.environment()) | extra
    command, pipe = [sys.executable, program, f"--workdir={root / workdir}", *flags], subprocess.PIPE
    return subprocess.Popen(command, cwd=REPO, env=env, stdout=pipe, stderr=pipe, encoding="utf-8")


def finish(process: subprocess.Popen) -> subprocess.CompletedProcess:
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    done = subprocess.CompletedProcess(process.args, process.returncode, out, err)
    assert done.returncode == 0, done.stderr
    return done


def run(root: Path, program: str, *flags: str, **how) -> subprocess.CompletedProcess:
    return finish(start(root, program, *flags, **how))


def rows(root: Path, kind: str, workdir: str = "run") -> list[dict]:
    lines = [json.loads(line) for line in (root / workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {line["kind"] for line in lines} <= {"train", "eval", "eval_ema"}
    return [line for line in lines if line["kind"] == kind]


def check_output(done: subprocess.CompletedProcess) -> None:
    """Plain lines: no progress bar, no log line of a library on stdout, no library at INFO, no warning of Python."""
    for text in (done.stdout, done.stderr):
        assert not any(bad in text for bad in ("\r", "\x1b", "it/s]", "batch/s]", "doc/s]", "INFO", "Traceback"))
        assert not any(line.startswith(("I0", "I1")) for line in text.splitlines())
    assert not any(bad in done.stdout for bad in ("WARNING", "Warning", "absl", "orbax", "tensorflow"))
    assert "Warning" not in done.stderr


def check_run(root: Path, tensorboard: bool) -> None:
    train, evals = rows(root, "train"), rows(root, "eval")
    assert [row["step"] for row in train] == list(range(1, STEPS + 1))
    for row in train:
        assert KEYS <= set(row)
        assert math.isclose(row["loss"], row["xent"] + row["load_balance"] + row["router_z"], rel_tol=1e-5)
        assert row["tokens"] == row["step"] * 16 * 32 and 0 < row["mfu"] < 1 and 1 <= row["max_load"] <= 2
    assert train[-1]["loss"] < train[0]["loss"] and abs(train[0]["xent"] - math.log(257)) < 1
    assert [row["step"] for row in evals] == [3, STEPS]
    assert {"xent", "perplexity", "bits_per_byte", "prose/bits_per_byte", "numbers/bits_per_byte"} <= set(evals[-1])
    for row in train + evals:
        assert "nonfinite" not in row
        assert all(isinstance(v, str) or math.isfinite(v) for v in row.values())
    made = root / "run"
    config = json.loads((made / "config.json").read_text(encoding="utf-8"))
    assert config["data"]["seq_len"] == 32 and set(config["data"]["sources"]) == {"prose", "numbers"}
    assert sorted(p.name for p in (made / "checkpoints").iterdir()) == ["4", "6"]
    assert (made / "sample.txt").read_text(encoding="utf-8").startswith("the ")
    events = list((made / "tensorboard").glob("events.*")) if (made / "tensorboard").exists() else []
    assert (sum(p.stat().st_size for p in events) > 1000) == tensorboard
    body = json.loads((made / "eval.json").read_text(encoding="utf-8"))
    assert body["step"] == STEPS and [d["domain"] for d in body["domains"]] == ["numbers", "prose", ""]
    assert 0 < body["bits_per_byte_of"]["xz -9"][""] < 8


def check_evaluation(root: Path, devices: int) -> None:
    """eval.py over all the text: the table adds up, and the numbers and figures are written."""
    done = run(root, "eval.py", "--earlier=4", devices=devices)
    check_output(done)
    body = json.loads((root / "run" / "eval.json").read_text(encoding="utf-8"))
    assert body["domains"][-1]["tokens"] == sum(d["tokens"] for d in body["domains"][:-1]) > 2 * 16 * 32
    counts = np.asarray(body["tokens_per_expert"])  # [L, domain, E]
    assert counts.shape == (2, 2, 4) and body["dropped"] == 0
    np.testing.assert_array_equal(counts.sum(-1), 2 * np.asarray(body["tokens_per_layer_and_domain"]))
    with np.load(root / "run" / "analysis.npz") as arrays:
        np.testing.assert_allclose(arrays["selection_frequency"].sum(-1), 2)
        assert arrays["saturation"].shape == (2, 2) and (0.5 < arrays["saturation"]).all()
    for name in ("expert_domain", "topk_score", "overlap", "coactivation", "saturation", "loss"):
        data = (root / "run" / "figures" / f"{name}.png").read_bytes()
        assert data.startswith(b"\x89PNG") and len(data) > 10_000
    assert all(text in done.stdout for text in ("bits/byte", "as at step 4", "sample"))

    before = {name: (root / "run" / name).read_bytes() for name in ("eval.json", "analysis.npz", "sample.txt")}
    done = run(root, "eval.py", "--step=4", "--batches=1", devices=devices)
    assert "eval.json is reserved for all held-out text at the newest checkpoint, 6" in done.stdout
    assert before == {name: (root / "run" / name).read_bytes() for name in before}
    part = json.loads((root / "run" / "eval.4.1batches.json").read_text(encoding="utf-8"))
    assert (part["step"], part["limit"], part["rows"], part["of_rows"]) == (4, 1, 16, body["rows"])
    assert part["bits_per_byte_of"].keys() == body["bits_per_byte_of"].keys() and body["limit"] is None
    for name in ("sample.4.1batches.txt", "analysis.4.1batches.npz", "figures/overlap.4.1batches.png"):
        assert (root / "run" / name).stat().st_size


def train_twice(root: Path, *flags: str, devices: int, fresh: bool = False) -> None:
    first = run(root, "train.py", f"--config={root / 'config.py'}", *flags, devices=devices, fresh=fresh)
    check_output(first)
    assert f"devices: {devices} × cpu" in first.stdout and "bits/byte" in first.stdout
    assert f"step {STEPS}/{STEPS}" in first.stderr
    check_run(root, tensorboard="--config.train.tensorboard=false" not in flags)
    before, params = rows(root, "train"), sorted((root / "run" / "checkpoints").rglob("*"))
    # Nothing is left to do; ascii has no × and no →.
    how = {"devices": devices, "fresh": fresh, "PYTHONIOENCODING": "ascii", "JAX_ENABLE_X64": "1"}
    again = run(root, "train.py", f"--config={root / 'config.py'}", *flags, **how)
    check_output(again)
    assert f"devices: {devices} ? cpu" in again.stdout
    assert f"resumed after step {STEPS}" in again.stdout and "schedule" not in again.stdout
    assert "changed since the run began" not in again.stdout
    assert rows(root, "train") == before and sorted((root / "run" / "checkpoints").rglob("*")) == params
    assert not (root / "run" / "metrics.dropped.jsonl").exists()


def check_longer(root: Path) -> None:
    """A run of older code goes on for more steps: it is told what that changes."""
    newest = root / "run" / "checkpoints" / str(STEPS)
    (saved,) = (p for p in newest.rglob("*") if p.is_file() and b'"revision"' in p.read_bytes())
    body = json.loads(saved.read_text(encoding="utf-8"))
    for process in body["processes"]:
        assert process["steps"] == STEPS and process.pop("revision") == changes.REVISION
    saved.write_text(json.dumps(body), encoding="utf-8")
    (newest / "checksums.json").unlink()
    done = run(root, "train.py", f"--config={root / 'config.py'}", "--config.train.steps=8", devices=1)
    for text in (
        "began: Muon's update does not depend",
        "began: the learning rate falls",
        "is that of 8 steps, no longer",
    ):
        assert text in done.stdout


@pytest.mark.slow
def test_one_device(tmp_path):
    write_text(tmp_path)
    train_twice(tmp_path, devices=1, fresh=True)
    assert any((tmp_path / "cache" / "compiled").iterdir())  # the next run starts faster
    check_evaluation(tmp_path, devices=1)
    check_longer(tmp_path)


@pytest.mark.slow
def test_eight_devices(tmp_path):
    """A mesh with all three axes, micro-batches and reader processes; evaluation on another number of devices."""
    write_text(tmp_path)
    flags = ["data.num_workers=2", "mesh.data=2", "mesh.fsdp=2", "mesh.expert=2", "train.micro_batches=2"]
    train_twice(tmp_path, *(f"--config.{f}" for f in [*flags, "train.tensorboard=false"]), devices=8)
    check_evaluation(tmp_path, devices=4)


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    """2 processes × 4 devices give the numbers of 1 × 8: training, evaluation and the sample."""
    write_text(tmp_path)
    names = ["model.compute_dtype=float32", "optim.newton_schulz_dtype=float32", "train.tensorboard=false",
             "mesh.data=2", "mesh.fsdp=2", "mesh.expert=2"]  # fmt: skip
    flags = [f"--config={tmp_path / 'config.py'}", *(f"--config.{name}" for name in names)]
    run(tmp_path, "train.py", *flags, devices=8)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    two = [
        start(tmp_path, "train.py", "--distributed", *flags, devices=4, workdir="two",
              JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES="2", JAX_PROCESS_ID=str(i))
        for i in range(2)
    ]  # fmt: skip
    outputs = [finish(process) for process in two]
    assert "bits/byte" in outputs[0].stdout and "bits/byte" not in outputs[1].stdout  # written once
    for kind in ("train", "eval"):
        one, other = rows(tmp_path, kind), rows(tmp_path, kind, "two")
        assert [row["step"] for row in one] == [row["step"] for row in other]
        for a, b in zip(one, other, strict=True):
            for name in set(a) - {"kind", "tokens_per_second", "mfu", "step_seconds"}:
                np.testing.assert_allclose(b[name], a[name], rtol=1e-4, err_msg=f"{kind} {a['step']} {name}")
    assert (tmp_path / "two" / "sample.txt").read_text(encoding="utf-8") == (tmp_path / "run" / "sample.txt").read_text(
        encoding="utf-8"
    )
