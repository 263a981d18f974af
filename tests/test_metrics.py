"""Metrics: closed forms of the router's numbers, rows, rates and peaks; what is read one step behind."""

import ast
import math
import time
import types
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moe_jax import chips
from moe_jax.chips import peak_flops
from moe_jax.config import build, default_config
from moe_jax.run import log, recorder
from moe_jax.train import guard, metrics
from moe_jax.train.metrics import OneBehind, StepMetrics, Throughput, router_metrics

ROW = ["step", "loss", "xent", "load_balance", "router_z", "grad_norm", "lr", "tokens", "tokens_per_second", "mfu"]
ROW += ["step_seconds", "max_load", "load_cv", "dead_experts", "dropped", "experts_per_token"]


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


def layers(stats: Stats) -> list[Stats]:
    return [Stats(*(x[i] for x in stats)) for i in range(len(stats.tokens))]


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_balanced_router():
    got = router_metrics(layers(make_stats(np.full((3, 2, 8), 5.0), top_k=2)))
    assert (got["max_load"], got["load_cv"], got["dead_experts"], got["dropped"]) == (1.0, 0.0, 0.0, 0.0)


def test_all_tokens_on_the_same_experts():
    """K = 2 of E = 8 experts take everything: E/K, the worst there is."""
    load = np.zeros((1, 1, 8))
    load[..., :2] = 30
    got = router_metrics(layers(make_stats(load, top_k=2)))
    assert got["max_load"] == 4.0
    assert got["dead_experts"] == 6.0
    assert got["load_cv"] == pytest.approx(math.sqrt(3))  # mean 7.5, deviation √(0.75 · 7.5² + 0.25 · 22.5²)


def test_router_by_hand():
    """Groups are summed before anything is divided: two opposite groups are balanced together."""
    load = [[[4, 0], [0, 4]], [[6, 2], [0, 0]]]
    got = router_metrics(layers(make_stats(load, top_k=1, dropped_LG=[[1, 0], [2, 1]])))
    assert got == {
        "max_load": 1.5,
        "load_cv": 0.25,
        "dead_experts": 0.0,
        "dropped": 0.25,
        "experts_per_token": 1.0,
        "router/layer_00/max_load": 1.0,
        "router/layer_00/load_cv": 0.0,
        "router/layer_00/dead_experts": 0.0,
        "router/layer_00/dropped": 0.125,
        "router/layer_00/experts_per_token": 1.0,
        "router/layer_01/max_load": 1.5,
        "router/layer_01/load_cv": 0.5,
        "router/layer_01/dead_experts": 0.0,
        "router/layer_01/dropped": 0.375,
        "router/layer_01/experts_per_token": 1.0,
    }


def test_layers_of_multi_token_prediction_are_apart():
    alone, ahead = (layers(make_stats([[load]], top_k=1)) for load in ([1, 2, 3, 2], [0, 0, 8, 0]))
    both = router_metrics(alone, ahead=[ahead[0]._replace(dropped=ahead[0].dropped + 4)])
    assert {name: value for name, value in both.items() if "mtp_1" not in name} == router_metrics(alone)
    assert both["router/mtp_1/max_load"] == 4 and both["router/mtp_1/dropped"] == 0.5


def test_router_without_tokens_is_finite():
    got = router_metrics(layers(make_stats(np.zeros((2, 1, 4)), top_k=2)))
    assert got["max_load"] == got["load_cv"] == got["dropped"] == 0.0
    assert got["dead_experts"] == 8.0


def make_report(more: dict) -> StepMetrics:
    number = lambda i: jnp.float32(i + 0.5)
    terms = {"xent": number(1), "load_balance": number(2), "router_z": number(3)} | more
    return StepMetrics(number(0), number(4), terms, number(5), tokens=jnp.float32(64))


def make_row(step=7, more=()):
    """more: further terms of the loss."""
    rates = {"tokens": 448, "tokens_per_second": 1000.0, "step_seconds": 0.064, "flops_per_token": 6e6, "peak": 1e12}
    return metrics.train_metrics(
        step, make_report(dict(more)), router=router_metrics(layers(make_stats(np.ones((2, 1, 4)), 2))), **rates
    )


def test_train_metrics_row():
    row = make_row()
    assert list(row)[: len(ROW)] == ROW
    assert list(row)[len(ROW)] == "router/layer_00/max_load" and len(row) == len(ROW) + 2 * 5
    assert type(row["step"]) is int and all(type(v) is float for k, v in row.items() if k != "step")
    assert row["loss"] == 0.5 and row["lr"] == 5.5 and row["tokens"] == 448.0
    assert row["mfu"] == pytest.approx(1000 * 6e6 / 1e12)
    assert list(make_row(8)) == list(row)
    raw = {"load_balance/a": 0.1, "load_balance_raw": 1.5, "load_balance_raw/a": 0.2, "router_z_raw": 2.5}
    more = make_row(more=raw)
    names = ["load_balance", "load_balance/a", "router_z", "load_balance_raw", "load_balance_raw/a", "router_z_raw"]
    assert [name for name in more if "load" in name or "router_z" in name][: len(names)] == names
    assert (more["load_balance"], more["load_balance_raw/a"], more["router_z_raw"]) == (2.5, 0.2, 2.5)


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
    now[0] += 2
    clock.add(5, seen=40)  # the model reads prompts, and learns answers
    assert clock.read() == {"tokens": 1085.0, "tokens_per_second": 20.0, "step_seconds": 2.0}

    only_one = Throughput()
    now[0] += 50
    only_one.add(10)
    assert only_one.read() == {"tokens": 10.0, "tokens_per_second": 0.2, "step_seconds": 50.0}


def test_a_cpu_records_a_step_before_it_computes_the_next(monkeypatch):
    """Every second of a step is in its own line, also where a checkpoint or the end makes the recorder read."""
    now, rows = [0.0], []
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    cfg = default_config()
    cfg.train.log_every = 1
    cfg = build(cfg)
    writer = types.SimpleNamespace(write=lambda step, row, **_: rows.append((step, row["step_seconds"])))
    progress, watch = types.SimpleNamespace(update=lambda *_, **__: None), guard.Watch(cfg.train)
    kept = recorder.Recorder(cfg, writer, progress, watch, Throughput(), flops_per_token=1.0, peak=1.0)
    for step, seconds in enumerate((50, 2, 3, 4, 5), 1):
        now[0] += seconds  # the call computes the step
        kept.push(step, StepMetrics(jnp.zeros(()).block_until_ready(), 1.0, {"xent": 1.0}, tokens=8.0))
        if step == 3:
            kept.flush()
    kept.flush()
    assert rows == [(1, 50), (2, 2), (3, 3), (4, 4), (5, 5)]


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
    monkeypatch.setattr(chips, "_measured_flops", lambda device: 1.0)
    assert peak_flops(types.SimpleNamespace(device_kind=kind)) == (1.0, "measured")


def test_measured_peak_under_a_mesh():
    mesh = jax.make_mesh((8, 1, 1), ("data", "fsdp", "expert"), axis_types=(AxisType.Explicit,) * 3)
    with jax.set_mesh(mesh):
        start = time.process_time()  # other work on the machine does not count
        peak, source = peak_flops(jax.devices()[0])
        seconds = time.process_time() - start
    assert source == "measured" and 1e8 < peak < 1e14
    assert seconds < 6  # 0.5 on a machine of its own
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


# --- the package -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module, of", [(metrics, set()), (log, {"moe_jax.errors"})], ids=["metrics", "log"])
def test_it_imports_nothing_of_the_package_but_errors(module, of):
    """`metrics` takes RouterStats by its fields, so that analysis can read a run without building a model."""
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    names = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    names |= {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    assert {name for name in names if name.startswith("moe_jax")} == of
