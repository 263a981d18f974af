"""Resuming: a run that was killed, again and again, ends as if nothing had happened, bit for bit."""

import dataclasses
import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from moe_jax import config, data
from moe_jax.parallel import sharding
from moe_jax.run import checkpoint, config_file, log
from moe_jax.train import step
from moe_jax.train.state import abstract_state, init_state, process_rows, put_batch
from tests import programs

REPO = Path(__file__).parents[1]
TIMES = ("tokens_per_second", "mfu", "step_seconds")  # all else of a training row is decided by the configuration
BATCH, SEQ = 8, 32


def write_text(root: Path) -> None:
    rng = np.random.default_rng(0)
    (root / "text").mkdir()
    for i in range(60):
        (root / "text" / f"{i}.txt").write_text(
            f"{i} " + " ".join(rng.choice(["red", "green", "blue", "7"], 80)), encoding="utf-8"
        )


# --- in this process -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    made = tmp_path_factory.mktemp("resume")
    write_text(made)
    return made


def run_config(root: Path) -> config.RunConfig:
    c = config.default_config()
    c.model.update(vocab_size=257, d_model=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8)
    c.model.update(compute_dtype="float32")
    c.model.moe.update(num_experts=4, top_k=2, d_expert=16, selection_bias=True)
    c.optim.update(lr=1e-2, warmup_steps=2, newton_schulz_dtype="float32")
    c.train.update(steps=8)
    c.data.sources = {"text": config.source(kind="files", path=f"{root}/text/*.txt", validation_fraction=0.2)}
    c.data.update(batch_size=BATCH, seq_len=SEQ, cache_dir=str(root / "cache"))
    return config.build(c)


@functools.cache
def _train_step(text: str, shape: tuple[int, int, int]):
    """The step of a configuration, from its text: runs that go on have the program of the run before."""
    cfg = config.build(json.loads(text))
    return step.make_train_step(cfg, sharding.make_mesh(shape))


class Run:
    """What train.py's loop does, with every batch and every result kept."""

    def __init__(self, root: Path, cfg: config.RunConfig, shape: tuple[int, int, int]):
        self.cfg, self.mesh = cfg, sharding.make_mesh(shape)
        corpus = data.prepare(cfg.data, workdir=root / "run", seed=cfg.seed, progress=False)
        self.batches = corpus.train_iterator(process_rows(self.mesh, BATCH))
        self.train_step = _train_step(json.dumps(config.to_dict(cfg)), shape)
        self.state, self.tokens, self.losses, self.seen = None, 0.0, [], []

    def start(self) -> "Run":
        self.state = init_state(self.cfg, self.mesh)
        return self

    def restore(self, checkpoints: checkpoint.Checkpoints, number: int) -> "Run":
        self.state, saved = checkpoints.restore(abstract_state(self.cfg, self.mesh), number)
        self.batches.set_state(saved["batches"])
        self.tokens = saved["tokens"]
        assert int(self.state.step) == number
        return self

    def save(self, checkpoints: checkpoint.Checkpoints) -> None:
        saved = {"batches": self.batches.get_state(), "tokens": self.tokens}
        checkpoints.save(int(self.state.step), self.state, saved)

    def go(self, steps: int) -> "Run":
        for _ in range(steps):
            rows = next(self.batches)
            self.seen.append({k: np.array(v) for k, v in rows.items()})
            self.state, aux = self.train_step(self.state, put_batch(rows, self.mesh, self.cfg))
            self.losses.append(float(aux.loss))
            self.tokens += float(aux.tokens)
        return self


@pytest.fixture(scope="module")
def straight(root):
    """Six steps on (8, 1, 1), saved after the third while the run goes on and donates the saved arrays."""
    run = Run(root, run_config(root), (8, 1, 1)).start().go(3)
    with checkpoint.Checkpoints(root / "run", keep=2) as checkpoints:
        run.save(checkpoints)
        run.go(3)
    return run


def assert_same_batches(got: list[dict], want: list[dict]) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def leaves(state) -> dict[str, np.ndarray]:
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in flat}


def assert_same_bits(got: dict, want: dict) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype, name
        assert got[name].tobytes() == want[name].tobytes(), name


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_three_and_three_are_six(root, straight, num_workers):
    cfg = run_config(root)
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, num_workers=num_workers))
    with checkpoint.Checkpoints(root / "run") as checkpoints:
        resumed = Run(root, cfg, (8, 1, 1)).restore(checkpoints, 3).go(3)
    assert_same_batches(resumed.seen, straight.seen[3:])
    assert resumed.losses == straight.losses[3:] and resumed.tokens == straight.tokens == 6 * BATCH * SEQ
    assert_same_bits(leaves(resumed.state), leaves(straight.state))
    resumed.batches.close()


@pytest.mark.slow
def test_on_another_mesh(root, straight):
    with checkpoint.Checkpoints(root / "run") as checkpoints:
        resumed = Run(root, run_config(root), (2, 2, 2)).restore(checkpoints, 3)
        # The state itself is the same; what is computed from it agrees as far as float32 sums do.
        kept, _ = checkpoints.restore(abstract_state(straight.cfg, straight.mesh), 3)
        assert_same_bits(leaves(resumed.state), leaves(kept))
        resumed.go(3)
    assert_same_batches(resumed.seen, straight.seen[3:])
    np.testing.assert_allclose(resumed.losses, straight.losses[3:], rtol=2e-6)
    got, want = leaves(resumed.state.params), leaves(straight.state.params)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-3, atol=2e-5, err_msg=name)
    assert len({loss for loss in straight.losses}) == 6


# --- killed processes ------------------------------------------------------------------------------------------------

STEPS, EVERY = 14, 3
DEBUG = """
import runpy

from moe_jax import config as config_lib


def get_config():
    config = runpy.run_path("configs/debug.py")["get_config"]()
    config.data.sources = {"text": config_lib.source(kind="files", path="@/text/*.txt", validation_fraction=0.2)}
    config.train.update(steps=@STEPS, checkpoint_every=@EVERY, eval_every=4)
    config.model.moe.selection_bias = True
    config.loss.bias_update = "adamw"  # whose state is one more part of the optimizer's
    return config
""".replace("@STEPS", str(STEPS)).replace("@EVERY", str(EVERY))


def launch(root: Path, name: str, *flags: str) -> subprocess.Popen:
    (root / "debug.py").write_text(DEBUG.replace("@", str(root)), encoding="utf-8")
    env = os.environ | {"JAX_PLATFORMS": "cpu", "MOE_JAX_CACHE": str(root / "cache")}
    env |= programs.environment(root / "compiled")
    command = [sys.executable, "train.py", f"--config={root}/debug.py", f"--workdir={root}/{name}", *flags]
    with open(root / f"{name}.log", "ab") as log:
        return subprocess.Popen(command, cwd=REPO, env=env, stdout=log, stderr=log, start_new_session=True)


def finish(root: Path, name: str, *flags: str) -> None:
    assert launch(root, name, *flags).wait(300) == 0, (root / f"{name}.log").read_text(encoding="utf-8")


def kill_when(process: subprocess.Popen, ready, delay: float) -> bool:
    """SIGKILL, to reader processes too, `delay` after `ready()`. False if the run ended before."""
    while process.poll() is None and not ready():
        time.sleep(0.0005)
    time.sleep(delay)
    done = process.poll() is not None
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    return not done and process.wait() == -signal.SIGKILL


def lines(root: Path, name: str) -> int:
    path = root / name / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def saving_or_saved(root: Path, name: str) -> set[str]:
    """Checkpoints, those still being written included (they have another name until they are complete)."""
    folder = root / name / "checkpoints"
    return {p.name for p in folder.iterdir()} if folder.is_dir() else set()


def training_rows(root: Path, name: str) -> list[dict]:
    rows = log.read_metrics(root / name)
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def final_state(root: Path, name: str) -> dict[str, np.ndarray]:
    cfg = config_file.load_config(root / name)
    mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
    with checkpoint.Checkpoints(root / name) as checkpoints:
        assert checkpoints.latest() == STEPS
        return leaves(checkpoints.restore(abstract_state(cfg, mesh))[0])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    root = tmp_path_factory.mktemp("killed")
    write_text(root)
    finish(root, "straight")
    return root


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_killed_three_times(uninterrupted, num_workers):
    root, name, moment = uninterrupted, f"killed_{num_workers}", random.Random(num_workers)
    workers = f"--config.data.num_workers={num_workers}"
    kills = 0

    # 1. While stepping, before or after the first save.
    process = launch(root, name)
    kills += kill_when(process, lambda: lines(root, name) >= 1, moment.uniform(0.0, 0.1))

    # 2. Around a save: the moment that a checkpoint's folder, complete or not, appears.
    process, before = launch(root, name, workers), saving_or_saved(root, name)
    kills += kill_when(process, lambda: saving_or_saved(root, name) - before, moment.uniform(0.0, 0.02))

    # 3. Between: some steps later.
    process, count = launch(root, name, workers), lines(root, name)
    kills += kill_when(process, lambda: lines(root, name) >= count + 2, moment.uniform(0.0, 0.05))
    assert kills >= 2, "the runs ended before they could be killed"

    finish(root, name, workers)
    want, got = training_rows(root, "straight"), training_rows(root, name)
    assert [row["step"] for row in want] == list(range(1, STEPS + 1))
    for a, b in zip(got, want, strict=True):
        assert json.dumps(a) == json.dumps(b), f"step {b['step']}"  # the order of keys and every bit of every number
    assert_same_bits(final_state(root, name), final_state(root, "straight"))
    for file in ("eval.json", "sample.txt"):
        assert (root / name / file).read_text(encoding="utf-8") == (root / "straight" / file).read_text(
            encoding="utf-8"
        )
