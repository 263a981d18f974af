"""Profiles a training step: the time of all kernels, by part of the model and by kind of kernel.

    python -m benchmarks.profile_step --config=configs/olmoe_8l_bench.py
    python -m benchmarks.profile_step --config=configs/debug.py --config.model.num_layers=2 --steps=2       # on a CPU

It runs a few steps under JAX's profiler and adds up the time of each kernel on the device. A kernel has the name of an
instruction of the compiled program, which has the `jax.named_scope` in which it was traced; it is forward, recomputed,
or backward if differentiation made it. It prints two tables, in milliseconds a step, and the longest kernels. On
several GPUs it also says for how long collectives ran on the first one, and how much of that beside other kernels:

    python -m benchmarks.profile_step --config=configs/olmoe_8l_bench.py --config.mesh.data=1 --config.mesh.expert=2 \\
        '--config.model.layers=4*(late dense)' --config.model.unroll=4
"""

import collections
import os
import re
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import flags

from benchmarks.rows import random_rows
from moe_jax import cli, config
from moe_jax.parallel import sharding
from moe_jax.train import step
from moe_jax.train.state import choose_program, init_state, process_rows, put_batch

CONFIG = cli.define_config()
STEPS = flags.DEFINE_integer("steps", 3, "steps profiled", 1)
TOP = flags.DEFINE_integer("top", 25, "longest kernels to print", 0)

# Kernels that XLA launches together as one command buffer are not told apart by instruction.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer="

INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = .*metadata=\{[^}]*op_name=\"([^\"]*)\"", re.M)
KINDS = (  # of a kernel's name, the first that fits
    ("grouped matmul", "mosaic|_rows_block|_weights_block|ragged(?![-_]all)"),
    ("attention", "flash|fmha|cudnn|splash"),
    ("matmul", "gemm|cutlass|nvjet|xmma|cublas|dot|triton_gemm"),
    ("collective", "nccl|all[-_]reduce|all[-_]gather|reduce[-_]scatter|all[-_]to[-_]all|permute"),
    ("sort", "sort|radix|onesweep|histogram"),
    ("gather or scatter", "gather|scatter"),
    ("reduction", "reduce"),
    ("copy or transposition", "copy|memcpy|transpose|memset"),
)


# The named scopes of the model, inner ones first.
SCOPES = ("router", "sort", "dispatch", "experts", "combine", "statistics", "norm", "attention", "embedding", "output",
          "optimizer", "mlp", "moe")  # fmt: skip


class Kernel(NamedTuple):
    name: str
    part: str
    phase: str
    kind: str


def place(op_name: str) -> tuple[str, str]:
    """(part, phase) of an instruction, from the names it was traced under."""
    names = re.split(r"[/()]", op_name)
    part = next((scope for scope in SCOPES if scope in names), "other")
    if part == "optimizer":
        return part, "update"
    if "rematted_computation" in names:
        return part, "recomputed"
    return part, "backward" if "transpose" in names else "forward"


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS if re.search(pattern, name, re.I)), "elementwise")


def origins(program: str) -> dict[str, str]:
    """{instruction: op_name} of a compiled program's text."""
    return dict(INSTRUCTION.findall(program))


class Event(NamedTuple):
    """A kernel that ran, with the instruction that it belongs to."""

    name: str
    instruction: str
    start: float  # in milliseconds
    milliseconds: float


def kernels(folder: Path) -> list[Event]:
    """Everything that ran on device 0."""
    (file,) = folder.rglob("*.xplane.pb")
    found = []
    planes = list(jax.profiler.ProfileData.from_file(str(file)).planes)
    device = [p for p in planes if re.match(r"/device:(GPU|TPU):0$", p.name)]
    for plane in device or [p for p in planes if p.name == "/host:CPU"]:
        for line in plane.lines:
            if device and not re.match(r"Stream|XLA Ops", line.name):
                continue
            for event in line.events:
                stats = {k: v for k, v in event.stats if k in ("hlo_op", "hlo_module")}
                if "hlo_op" in stats and not str(stats["hlo_op"]).startswith(("while", "call", "conditional")):
                    found.append(Event(event.name, str(stats["hlo_op"]), event.start_ns / 1e6, event.duration_ns / 1e6))
    return found


def beside(events: list[tuple[bool, float, float]]) -> tuple[float, float]:
    """For how long collectives run, and for how much of that other kernels run too.

    events: (whether it is a collective, start, duration).
    """
    changes = []  # time, and by how much the numbers of collectives and of other kernels change
    for collective, start, took in events:
        for at, by in ((start, 1), (start + took, -1)):
            changes.append((at, by * collective, by * (not collective)))
    running, others, last, alone, both = 0, 0, 0.0, 0.0, 0.0
    for at, more, more_others in sorted(changes):
        if running:
            both, alone = (both + at - last, alone) if others else (both, alone + at - last)
        running, others, last = running + more, others + more_others, at
    return alone + both, both


def table(times: dict[tuple[str, str], float], columns: list[str], total: float) -> str:
    rows = sorted({row for row, _ in times}, key=lambda r: -sum(times.get((r, c), 0.0) for c in columns))
    lines = [f"{'':<24}" + "".join(f"{c:>14}" for c in (*columns, "all", "share"))]
    for row in rows:
        cells = [times.get((row, c), 0.0) for c in columns]
        lines.append(
            f"{row:<24}" + "".join(f"{c:>14.2f}" for c in (*cells, sum(cells))) + f"{sum(cells) / total:>14.1%}"
        )
    return "\n".join(lines)


def measure(cfg: config.RunConfig, mesh: Any) -> tuple[list[tuple[Kernel, float]], tuple[float, float]]:
    """Milliseconds a step of every kernel, and those of collectives and of other kernels beside them."""
    batch = put_batch(random_rows(cfg, process_rows(mesh, cfg.data.batch_size)), mesh, cfg)
    state = init_state(cfg, mesh)
    with jax.set_mesh(mesh):
        run = step.make_train_step(cfg, mesh).__wrapped__.lower(state, batch).compile()
    program = run.as_text()
    for _ in range(2):
        state, _ = run(state, batch)
    jax.block_until_ready(state)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(STEPS.value):
                state, _ = run(state, batch)
            jax.block_until_ready(state)
        raw = kernels(Path(folder))
    known = origins(program)
    found, timeline = [], []
    for name, instruction, start, milliseconds in raw:
        part, phase = place(known.get(instruction, ""))
        kind = kind_of(f"{name} {instruction} {known.get(instruction, '').rsplit('/', 1)[-1]}")
        found.append((Kernel(f"{instruction} [{name[:60]}]", part, phase, kind), milliseconds / STEPS.value))
        sends = re.search(dict(KINDS)["collective"], f"{name} {instruction}", re.I)  # whatever its result is for
        timeline.append((sends is not None, start, milliseconds))
    collectives, both = beside(timeline)
    return found, (collectives / STEPS.value, both / STEPS.value)


def main(_):
    cfg = config.build(CONFIG.value)
    device = jax.devices()[0]
    mesh = sharding.make_mesh(config.check_devices(cfg, jax.device_count(), device.platform, device.device_kind))
    print(choose_program(cfg, mesh).why, flush=True)
    found, (collectives, both) = measure(cfg, mesh)
    total = sum(milliseconds for _, milliseconds in found)
    print(f"{total:.2f} ms of kernels a step, {device.device_kind}, jax {jax.__version__}, mean of {STEPS.value} steps")
    if collectives and device.platform != "cpu":  # whose devices are threads of one line
        print(f"collectives run for {collectives:.2f} ms a step, {both:.2f} ms of it beside other kernels "
              f"({both / collectives:.0%})")  # fmt: skip
    phases = ["forward", "recomputed", "backward", "update"]
    by_part, by_kind, by_kernel = (collections.Counter() for _ in range(3))
    for kernel, milliseconds in found:
        by_part[kernel.part, kernel.phase] += milliseconds
        by_kind[kernel.kind, kernel.phase] += milliseconds
        by_kernel[kernel] += milliseconds
    for times in (by_part, by_kind):
        print(f"\n{table(times, phases, total)}", flush=True)
    print()
    for kernel, milliseconds in by_kernel.most_common(TOP.value):
        print(f"{milliseconds:9.3f} ms  {kernel.part:<12} {kernel.phase:<11} {kernel.kind:<22} {kernel.name}")


if __name__ == "__main__":
    cli.run(main)
