"""A run directory stands alone: it can be moved, opened from elsewhere, and a start that failed leaves it free."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from test_train import CONFIG, REPO, write_text

from moe_jax import data
from moe_jax.config import DataConfig, RunConfig, TokenizerConfig
from moe_jax.data import tokenizers
from moe_jax.errors import ConfigError
from moe_jax.run import config_file, replay
from moe_jax.train import guard
from tests import programs


@pytest.fixture
def external(tmp_path):
    """A tokenizer's file that is not in a run directory."""
    made = tokenizers.train_bpe(["the old river bends and the light is low 90 91 92"] * 9, 270)
    made.save(tmp_path / "elsewhere")
    return TokenizerConfig(kind="huggingface", path=str(tmp_path / "elsewhere" / "tokenizer.json"))


def test_a_run_that_has_not_begun_keeps_nothing(tmp_path, external):
    (tmp_path / "run").mkdir()
    made = tokenizers.load_or_make(external, None, None)
    assert not list((tmp_path / "run").iterdir()) and made.vocab_size <= 270


@pytest.mark.parametrize("settings", [True, False])  # False: an import, which has the file alone
def test_a_run_needs_no_file_but_its_own(tmp_path, external, settings):
    run, moved = tmp_path / "run", tmp_path / "moved"
    first = tokenizers.load_or_make(external, run, None)
    if not settings:
        (run / "tokenizer_settings.json").unlink()
    os.rename(run, moved)
    Path(external.path).unlink()
    cfg = DataConfig(tokenizer=external)
    with pytest.raises(ConfigError, match=r"tokenizer\.path=.* is not a file"):
        data.check_sources(cfg)
    data.check_sources(cfg, moved)
    assert tokenizers.load_or_make(external, moved, None).fingerprint == first.fingerprint
    by_another_name = dataclasses.replace(external, path="runs/a/tokenizer.json")
    assert tokenizers.load_or_make(by_another_name, moved, None).fingerprint == first.fingerprint


def test_another_tokenizer_is_refused(tmp_path, external):
    tokenizers.load_or_make(external, tmp_path / "run", None)
    same, other = tmp_path / "same.json", tmp_path / "other.json"
    same.write_bytes(Path(external.path).read_bytes())
    other.write_bytes(tokenizers.train_bpe(["other text"], 260).files["tokenizer.json"])
    tokenizers.load_or_make(dataclasses.replace(external, path=str(same)), tmp_path / "run", None)
    with pytest.raises(ConfigError, match=r"other\.json'?: differs from "):
        tokenizers.load_or_make(dataclasses.replace(external, path=str(other)), tmp_path / "run", None)


class State(NamedTuple):
    step: Any
    w: Any


def test_the_dump_of_a_corrected_start_is_its_own(tmp_path):
    """Both starts stopped at step 3: each dump has the configuration and the state of its own start."""
    skip = guard.Skip(3, math.nan, 1.0, "loss nan")
    first, second = RunConfig(), RunConfig(seed=1)
    rows = {"tokens": np.zeros((1, 2), np.int32)}
    folders = [
        replay.dump(tmp_path, cfg, State(jnp.int32(3), jnp.ones(2)), rows, skip, None) for cfg in (first, second, first)
    ]
    assert [folder.name for folder in folders] == ["3", "3.2", "3"]
    assert [config_file.load_config(folder) for folder in folders] == [first, second, first]


@pytest.mark.slow
def test_failed_corrected_moved_and_opened_from_elsewhere(tmp_path, external):
    """The whole story, in a folder whose name libraries take for a pattern."""
    write_text(tmp_path)
    text = (
        CONFIG.replace("@", str(tmp_path)).replace("steps=6", "steps=2").replace("checkpoint_every=4", "max_skipped=1")
    )
    tokenizer = f'    config.data.tokenizer.update(kind="huggingface", path={external.path!r})\n    return config\n'
    text = text.replace("    return config\n", tokenizer).replace("vocab_size=257", "vocab_size=270")
    (tmp_path / "config.py").write_text(text, encoding="utf-8")
    (tmp_path / "a [v2] {b}").mkdir()
    (tmp_path / "cwd").mkdir()
    env = os.environ | {"JAX_PLATFORMS": "cpu", "MOE_JAX_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(REPO)}
    env |= programs.environment()
    env["XLA_FLAGS"] = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"

    def start(program, *flags, cwd=REPO, status=0):
        command = [sys.executable, str(REPO / program), *flags]
        done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, timeout=300, encoding="utf-8")
        assert done.returncode == status, done.stderr
        return done

    run, moved = tmp_path / "a [v2] {b}" / "run", tmp_path / "cwd" / "moved *"
    train = ["train.py", f"--config={tmp_path / 'config.py'}"]
    start(*train, f"--workdir={run}", "--config.optim.lr=1e30", "--config.optim.warmup_steps=0", status=2)
    assert not {"config.json", "tokenizer_settings.json", "tokenizer.json"} & {p.name for p in run.iterdir()}
    start(*train, f"--workdir={run}", "--config.optim.warmup_steps=0")
    assert not (run / "config_history.jsonl").exists()

    os.rename(run, moved)
    Path(external.path).unlink()
    more = ["--config.optim.warmup_steps=0", "--config.train.steps=3"]
    done = start(*train, "--workdir=moved *", *more, cwd=tmp_path / "cwd")
    assert "resumed after step 2" in done.stdout
    assert "changed since the run began: config.train.steps: 2 in the run, 3 now" in done.stdout
    assert config_file.load_config(moved).train.steps == 3
    [line] = [json.loads(text) for text in (moved / "config_history.jsonl").read_text(encoding="utf-8").splitlines()]
    assert line == {"from_step": 3, "changed": {"train.steps": [2, 3]}}
    done = start("eval.py", "--workdir=moved *", "--batches=1", cwd=tmp_path / "cwd")
    assert "checkpoint of step 3" in done.stdout
