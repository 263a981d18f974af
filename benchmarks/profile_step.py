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
from typing import Any

import jax
from absl import flags

from benchmarks.kernels import Event, Kernel, beside, collectives, kind_of, origins, place, table
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
    known, sending = origins(program), collectives(program)
    found, timeline = [], []
    for name, instruction, start, milliseconds in raw:
        part, phase = place(known.get(instruction, ""))
        sends = instruction in sending or "nccl" in name.lower()
        traced = known.get(instruction, "").rsplit("/", 1)[-1]
        kind = "collective" if sends else kind_of(f"{name} {instruction} {traced}")
        found.append((Kernel(f"{instruction} [{name[:60]}]", part, phase, kind), milliseconds / STEPS.value))
        timeline.append((sends, start, milliseconds))
    alone_or_not, both = beside(timeline)
    return found, (alone_or_not / STEPS.value, both / STEPS.value)


def main(_):
    cfg = config.build(CONFIG.value)
    device = jax.devices()[0]
    mesh = sharding.make_mesh(config.check_devices(cfg, jax.device_count(), device.platform, device.device_kind))
    print(choose_program(cfg, mesh).why, flush=True)
    found, (sending, both) = measure(cfg, mesh)
    total = sum(milliseconds for _, milliseconds in found)
    print(f"{total:.2f} ms of kernels a step, {device.device_kind}, jax {jax.__version__}, mean of {STEPS.value} steps")
    if sending and device.platform != "cpu":  # whose devices are threads of one line
        print(f"collectives run for {sending:.2f} ms a step, {both:.2f} ms of it beside other kernels "
              f"({both / sending:.0%})")  # fmt: skip
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
