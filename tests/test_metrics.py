"""Metrics: closed forms of the router's numbers, the files a run leaves, and what a person sees."""

import ast
import io
import json
import math
import re
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moe_jax import metrics
from moe_jax.metrics import OneBehind, Progress, Throughput, Writer, peak_flops, read_metrics, router_metrics

ROW = ["step", "loss", "xent", "load_balance", "router_z", "grad_norm", "lr", "tokens", "tokens_per_second", "mfu"]
ROW += ["step_seconds", "max_load", "load_cv", "dead_experts", "dropped"]


class Stats(NamedTuple):
    tokens: Any
    tokens_per_expert: Any
    prob_per_expert: Any
    z_sq: Any
    dropped: Any


def make_stats(load_LGE, top_k, dropped_LG=None):
    load_LGE = np.asarray(load_LGE, np.float32)
    tokens_LG = load_LGE.sum(-1) / top_k
    dropped_LG = np.zeros_like(tokens_LG) if dropped_LG is None else np.asarray(dropped_LG, np.float32)
    return Stats(tokens_LG, load_LGE, load_LGE, tokens_LG, dropped_LG)


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_balanced_router():
    got = router_metrics(make_stats(np.full((3, 2, 8), 5.0), top_k=2), top_k=2)
    assert (got["max_load"], got["load_cv"], got["dead_experts"], got["dropped"]) == (1.0, 0.0, 0.0, 0.0)


def test_all_tokens_on_the_same_experts():
    """K = 2 of E = 8 experts take everything: E/K, the worst there is."""
    load = np.zeros((1, 1, 8))
    load[..., :2] = 30
    got = router_metrics(make_stats(load, top_k=2), top_k=2)
    assert got["max_load"] == 4.0
    assert got["dead_experts"] == 6.0
    assert got["load_cv"] == pytest.approx(math.sqrt(3))  # mean 7.5, deviation √(0.75 · 7.5² + 0.25 · 22.5²)


def test_router_by_hand():
    """Groups are summed before anything is divided: two opposite groups are balanced together."""
    load = [[[4, 0], [0, 4]], [[6, 2], [0, 0]]]
    got = router_metrics(make_stats(load, top_k=1, dropped_LG=[[1, 0], [2, 1]]), top_k=1)
    assert got == {
        "max_load": 1.5,
        "load_cv": 0.25,
        "dead_experts": 0.0,
        "dropped": 0.25,
        "router/layer_00/max_load": 1.0,
        "router/layer_00/load_cv": 0.0,
        "router/layer_00/dead_experts": 0.0,
        "router/layer_00/dropped": 0.125,
        "router/layer_01/max_load": 1.5,
        "router/layer_01/load_cv": 0.5,
        "router/layer_01/dead_experts": 0.0,
        "router/layer_01/dropped": 0.375,
    }


def test_router_without_tokens_is_finite():
    got = router_metrics(make_stats(np.zeros((2, 1, 4)), top_k=2), top_k=2)
    assert got["max_load"] == got["load_cv"] == got["dropped"] == 0.0
    assert got["dead_experts"] == 8.0


def make_aux(**changes):
    names = ("loss", "xent", "load_balance", "router_z", "grad_norm", "lr")
    aux = {name: jnp.float32(i + 0.5) for i, name in enumerate(names)}
    return aux | {"tokens": jnp.float32(64), "router": make_stats(np.ones((2, 1, 4)), 2)} | changes


def make_row(step=7, **changes):
    rates = {"tokens": 448, "tokens_per_second": 1000.0, "step_seconds": 0.064, "flops_per_token": 6e6, "peak": 1e12}
    return metrics.train_metrics(step, make_aux(**changes), top_k=2, **rates)


def test_train_metrics_row():
    row = make_row()
    assert list(row)[: len(ROW)] == ROW
    assert list(row)[len(ROW)] == "router/layer_00/max_load" and len(row) == len(ROW) + 2 * 4
    assert type(row["step"]) is int and all(type(v) is float for k, v in row.items() if k != "step")
    assert row["loss"] == 0.5 and row["lr"] == 5.5 and row["tokens"] == 448.0
    assert row["mfu"] == pytest.approx(1000 * 6e6 / 1e12)
    assert list(make_row(8)) == list(row)


def test_throughput_leaves_compilation_and_pauses_out(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    clock = Throughput(tokens=1000)
    now[0] += 60  # compiles
    clock.add(10)
    for _ in range(4):
        now[0] += 2
        clock.add(10)
    assert clock.read() == {"tokens": 1050.0, "tokens_per_second": 5.0, "step_seconds": 2.0}
    now[0] += 1
    with clock.paused():
        now[0] += 500
    now[0] += 1
    clock.add(30)
    assert clock.read() == {"tokens": 1080.0, "tokens_per_second": 15.0, "step_seconds": 2.0}

    only_one = Throughput()
    now[0] += 50
    only_one.add(10)
    assert only_one.read() == {"tokens": 10.0, "tokens_per_second": 0.2, "step_seconds": 50.0}


@pytest.mark.parametrize(
    "kind, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("Tesla T4", 65e12),
        ("NVIDIA B200", 2250e12),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU7x", 1153.5e12),
    ],
)
def test_datasheet_peaks(kind, peak):
    assert peak_flops(types.SimpleNamespace(device_kind=kind)) == (peak, "datasheet")


@pytest.mark.parametrize(
    "kind", ["NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA L40", "NVIDIA A10G", "TPU v4 lite", "TPU v3"]
)
def test_devices_not_listed_are_measured(kind, monkeypatch):
    monkeypatch.setattr(metrics, "_measured_flops", lambda device: 1.0)
    assert peak_flops(types.SimpleNamespace(device_kind=kind)) == (1.0, "measured")


def test_measured_peak_under_a_mesh():
    mesh = jax.make_mesh((8, 1, 1), ("data", "fsdp", "expert"), axis_types=(AxisType.Explicit,) * 3)
    with jax.set_mesh(mesh):
        start = time.perf_counter()
        peak, source = peak_flops(jax.devices()[0])
        seconds = time.perf_counter() - start
    assert source == "measured" and 1e8 < peak < 1e14
    assert seconds < 3  # 0.5 s on a machine of its own
    assert peak_flops(jax.devices()[0])[0] == peak  # measured once


# --- from the device -------------------------------------------------------------------------------------------------


def test_one_behind_returns_the_step_before():
    behind = OneBehind()
    assert behind.flush() is None
    mesh = jax.make_mesh((8, 1, 1), ("data", "fsdp", "expert"), axis_types=(AxisType.Explicit,) * 3)
    spread = jax.device_put(jnp.arange(8.0), NamedSharding(mesh, PartitionSpec("data")))
    assert behind.push(1, {"loss": jnp.float32(1), "load": spread}) is None
    step, aux = behind.push(2, {"loss": jnp.float32(2)})
    assert step == 1 and aux["loss"] == 1
    assert type(aux["load"]) is np.ndarray and aux["load"].tolist() == list(range(8))
    assert behind.flush() == (2, {"loss": 2.0})
    assert behind.flush() is None


def test_one_behind_does_not_wait_for_the_step_it_is_handed():
    """The newest step is still running when the previous one is returned."""
    fetched = []

    class Aux:
        def __init__(self, step):
            self.step = step

        def __array__(self, dtype=None, copy=None):
            fetched.append(self.step)
            return np.float32(self.step)

    behind = OneBehind()
    for step in (1, 2, 3):
        behind.push(step, {"loss": Aux(step)})
        assert fetched == list(range(1, step))


# --- files -----------------------------------------------------------------------------------------------------------


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


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
        writer.write(1, make_row(1, loss=jnp.float32(jnp.nan), grad_norm=jnp.float32(jnp.inf)))
        writer.write(2, {"loss": np.array([1.0, np.nan])})
    text = (tmp_path / "metrics.jsonl").read_text()
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
    with open(path, "a") as f:
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
    assert path.read_text() == ""
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
    path.write_text(path.read_text().rstrip("\n"))
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    with Writer(tmp_path, tensorboard=False) as writer:
        writer.write(3, {"loss": 3.0})
    assert [row["step"] for row in lines(path)] == [1, 2, 2, 3]
    with open(path, "a") as f:
        f.write('{"kind": "train", "st')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]


def test_only_process_0_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with Writer(tmp_path / "run", wandb_project="x") as writer, Progress(10) as progress:
        writer.write(1, {"loss": 1.0})
        progress.update(1, {"loss": 1.0}, log=True)
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
    with pytest.raises(ImportError, match=r"config.train.wandb_project='moe' needs .*: pip install wandb") as e:
        Writer(tmp_path / "run", wandb_project="moe")
    assert "\n" not in str(e.value) and not (tmp_path / "run").exists()


def test_wandb_gets_the_scalars_and_continues_its_record(tmp_path, monkeypatch):
    calls = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("finish")
    )
    init = lambda **kwargs: calls.append(kwargs) or run
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for step in (1, 2):
        with Writer(tmp_path, wandb_project="moe", config={"seed": 0}, tensorboard=False) as writer:
            writer.write(step, {"loss": 1.5, "bad": math.inf})
    first, logged, finished, second = calls[:4]
    assert (
        first == second and first["project"] == "moe" and first["resume"] == "allow" and first["config"] == {"seed": 0}
    )
    assert logged == (1, {"train/loss": 1.5}) and finished == "finish"


# --- progress --------------------------------------------------------------------------------------------------------


def test_progress_without_a_terminal(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    with Progress(110, initial=10, seconds=10) as progress:
        for step in range(11, 41):
            now[0] += 1
            progress.update(step, make_row(step) if step == 25 else make_aux(), log=step == 25)
        progress.write("a sample")
    out, errors = capsys.readouterr()
    assert out == "a sample\n"
    assert errors.splitlines() == [
        "step 20/110  loss 0.5000  01:30 left",
        "step 25/110  loss 0.5000  1.00k tokens/s  01:25 left",
        "step 35/110  loss 0.5000  1.00k tokens/s  01:15 left",
    ]


def test_progress_on_a_terminal(monkeypatch, capsys):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(20, initial=5) as progress:
        for step in range(6, 21):
            progress.update(step, make_row(step), log=step % 5 == 0)
            if step == 10:
                progress.write("evaluated")
    shown = terminal.getvalue()
    assert capsys.readouterr().out.endswith("evaluated\n")
    assert shown.count("\n") == 1 and shown.endswith("\n")  # one bar, one line
    last = shown.rstrip().split("\r")[-1]
    assert "20/20" in last and "loss 0.5000, 1.00k tokens/s" in last and "100%" in last
    assert re.search(r"10/20 \[\d\d:\d\d<\d\d:\d\d", shown)  # the time left


# --- the package -----------------------------------------------------------------------------------------------------


def test_importing_it_pulls_in_neither_tensorflow_nor_wandb(tmp_path):
    code = (
        "import sys; from moe_jax import metrics\n"
        "with metrics.Writer(sys.argv[1]) as w: w.write(1, {'loss': 1.0})\n"
        "bad = {'tensorflow', 'wandb'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=Path(__file__).parents[1])


def test_metrics_imports_nothing_of_the_package_but_errors():
    """`metrics` takes RouterStats by its fields, so that analysis can read a run without building a model."""
    tree = ast.parse(Path(metrics.__file__).read_text(encoding="utf-8"))
    names = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    names |= {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    assert {name for name in names if name.startswith("moe_jax")} == {"moe_jax.config"}
