"""The log: the files a run leaves, and what a person sees while it trains."""

import io
import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_metrics import make_row

from moe_jax.errors import ConfigError
from moe_jax.run import log
from moe_jax.run.log import Progress, Writer, read_metrics

# --- files -----------------------------------------------------------------------------------------------------------


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_writer_appends_json_lines(tmp_path):
    with Writer(tmp_path / "run", tensorboard=False) as writer:
        writer.write(7, make_row())
        assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 1  # flushed before close
        writer.write(7, {"perplexity": np.float32(3.5), "domain": "code"}, kind="eval")
        writer.close()
        writer.write(8, {"loss": 1.0})  # closed: nothing
    train, evaluation = lines(tmp_path / "run" / "metrics.jsonl")
    assert list(train)[:3] == ["kind", "step", "loss"] and train == {"kind": "train"} | make_row()
    assert evaluation == {"kind": "eval", "step": 7, "perplexity": 3.5, "domain": "code"}
    assert read_metrics(tmp_path / "run") == [train] and read_metrics(tmp_path / "run", "eval") == [evaluation]


def test_values_that_are_not_finite(tmp_path):
    with Writer(tmp_path) as writer:
        writer.write(1, make_row(1) | {"loss": jnp.nan, "grad_norm": jnp.inf})
        writer.write(2, {"loss": np.array([1.0, np.nan])})
    text = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
    first, second = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    assert first["loss"] is None and first["grad_norm"] is None and first["xent"] == 1.5
    assert first["nonfinite"] == ["loss", "grad_norm"]
    assert second == {"kind": "train", "step": 2, "loss": None, "nonfinite": ["loss"]}


def write_history(path, steps=6):
    with Writer(path, tensorboard=False) as writer:
        for step in range(1, steps + 1):
            writer.write(step, {"loss": float(step)})
        writer.write(steps, {"loss": 0.0}, kind="eval")


def test_resume_moves_later_lines_aside(tmp_path):
    write_history(tmp_path)
    path = tmp_path / "metrics.jsonl"
    with open(path, "a", encoding="utf-8") as f:
        f.write('{"kind": "train", "step": 7, "lo')  # killed here
    with Writer(tmp_path, resume_step=4, tensorboard=False) as writer:
        writer.write(5, {"loss": 50.0})
    assert [row["step"] for row in lines(path)] == [1, 2, 3, 4, 5]
    assert lines(path)[-1]["loss"] == 50.0
    dropped = lines(tmp_path / "metrics.dropped.jsonl")
    assert [row.get("step") for row in dropped] == [5, 6, 6, None]
    assert dropped[-1] == {"torn": '{"kind": "train", "step": 7, "lo'}

    with Writer(tmp_path, resume_step=0, tensorboard=False):  # died before its first checkpoint
        pass
    assert path.read_text(encoding="utf-8") == ""
    assert len(lines(tmp_path / "metrics.dropped.jsonl")) == 4 + 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.dropped.jsonl", "metrics.jsonl"]


def test_a_whole_history_is_left_alone(tmp_path):
    write_history(tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    for step in (None, 6):
        Writer(tmp_path, resume_step=step, tensorboard=False).close()
        assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_line_without_its_end_is_whole_or_torn(tmp_path):
    write_history(tmp_path, 2)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text(encoding="utf-8").rstrip("\n"), encoding="utf-8")
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    with Writer(tmp_path, tensorboard=False) as writer:
        writer.write(3, {"loss": 3.0})
    assert [row["step"] for row in lines(path)] == [1, 2, 2, 3]
    with open(path, "a", encoding="utf-8") as f:
        f.write('{"kind": "train", "st')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]


def test_only_process_0_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with Writer(tmp_path / "run", wandb_project="x") as writer, Progress(10) as progress:
        writer.write(1, {"loss": 1.0})
        progress.update(1, 1.0, log=True)
        progress.write("text")
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr() == ("", "")


def read_events(folder):
    """(step, tag, value) of TensorBoard's record files, in the order they were written."""
    from tensorboardX.proto.event_pb2 import Event

    out = []
    for path in sorted(folder.iterdir()):
        data = io.BytesIO(path.read_bytes())
        while header := data.read(12):  # length, its checksum; then the event, its checksum
            event = Event.FromString(data.read(int.from_bytes(header[:8], "little")))
            data.read(4)
            out += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
    return out


def test_tensorboard_mirrors_the_scalars(tmp_path):
    with Writer(tmp_path) as writer:
        writer.write(3, {"loss": 1.5, "router/layer_00/max_load": 2.0, "bad": math.nan, "domain": "code"})
        writer.write(3, {"loss": 2.5}, kind="eval")
    want = [(3, "train/loss", 1.5), (3, "train/router/layer_00/max_load", 2.0), (3, "eval/loss", 2.5)]
    assert read_events(tmp_path / "tensorboard") == want


def test_wandb_missing_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"config.train.wandb_project='moe': needs .*: pip install wandb") as e:
        Writer(tmp_path / "run", wandb_project="moe")
    assert "\n" not in str(e.value) and not (tmp_path / "run").exists()


class Wandb:
    """A stand-in for the module of W&B: like it, a run drops rows of a step before its newest, without a word."""

    def __init__(self):
        self.calls, self.rows, self.metrics, self.newest = [], [], {}, 0

    def init(self, **kwargs):
        self.calls.append(kwargs)
        return self

    def define_metric(self, name, step_metric):
        self.metrics[name] = step_metric

    def log(self, values, step=None):
        step = self.newest + 1 if step is None else step
        if step >= self.newest:
            self.newest = step
            self.rows.append(values)

    def finish(self):
        self.calls.append("finish")


def test_wandb_gets_the_scalars_and_continues_its_record(tmp_path, monkeypatch):
    """… also with the steps that are taken again after --resume_step."""
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for steps in ((1, 2, 3), (2, 3)):
        with Writer(tmp_path, wandb_project="moe", config={"seed": 0}, tensorboard=False) as writer:
            for step in steps:
                writer.write(step, {"loss": step + len(steps) / 10, "bad": math.inf})
    first, finished, second, _ = wandb.calls
    assert first == second and finished == "finish"
    assert first["project"] == "moe" and first["resume"] == "allow" and first["config"] == {"seed": 0}
    assert [(row["step"], row["train/loss"]) for row in wandb.rows] == [
        (1, 1.3),
        (2, 2.3),
        (3, 3.3),
        (2, 2.2),
        (3, 3.2),
    ]
    assert wandb.metrics == {"*": "step"} and not any("bad" in name for row in wandb.rows for name in row)


def test_tensorboard_keeps_names_apart(tmp_path):
    """Languages as domains, which a tag of letters and digits would make one."""
    with Writer(tmp_path) as writer:
        writer.write(1, {"c#/xent": 1.0, "c+/xent": 2.0, "数/xent": 3.0}, kind="eval")
    want = [(1, "eval/c#/xent", 1.0), (1, "eval/c+/xent", 2.0), (1, "eval/数/xent", 3.0)]
    assert read_events(tmp_path / "tensorboard") == want


# --- progress --------------------------------------------------------------------------------------------------------


def test_progress_without_a_terminal(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(log.time, "perf_counter", lambda: now[0])
    with Progress(110, initial=10, seconds=10) as progress:
        for step in range(11, 41):
            now[0] += 1 if step > 11 else 60  # the first step compiles, which says nothing about the time left
            progress.update(step, 0.5, 1000.0 if step == 25 else None, log=step == 25)
        progress.write("a sample")
    out, errors = capsys.readouterr()
    assert out == "a sample\n"
    assert errors.splitlines() == [
        "step 11/110  loss 0.5000",
        "step 21/110  loss 0.5000  01:29 left",
        "step 25/110  loss 0.5000  1.00k tokens/s  01:25 left",
        "step 35/110  loss 0.5000  1.00k tokens/s  01:15 left",
    ]


def test_progress_on_a_terminal(monkeypatch, capsys):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(20, initial=5) as progress:
        for step in range(6, 21):
            if step == 6:
                time.sleep(1.1)  # compilation
            progress.update(step, 0.5, 1000.0, log=step % 5 == 0)
            if step == 10:
                progress.write("evaluated")
    shown = terminal.getvalue()
    assert capsys.readouterr().out.endswith("evaluated\n")
    assert shown.count("\n") == 1 and shown.endswith("\n")  # one bar, one line
    last = shown.rstrip().split("\r")[-1]
    assert "20/20" in last and "loss 0.5000, 1.00k tokens/s" in last and "100%" in last
    assert re.search(r"10/20 \[00:00<00:00", shown)  # the time left, without compilation


# --- the package -----------------------------------------------------------------------------------------------------


def test_importing_it_pulls_in_neither_tensorflow_nor_wandb(tmp_path):
    code = (
        "import sys; from moe_jax.run import log\n"
        "with log.Writer(sys.argv[1]) as w: w.write(1, {'loss': 1.0})\n"
        "bad = {'tensorflow', 'wandb'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=Path(__file__).parents[1])
