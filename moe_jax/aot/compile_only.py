"""Compiles the train step for chips that are not present, and reports memory, communication and an estimate of time.

`train.py --compile_only=v5p:4x4x4` needs the package libtpu, `--compile_only=h100:8` needs JAX's plugin for CUDA.
Nothing is run, read or written. For TPUs the compiler decides whether the step fits; for GPUs its memory is compared
with that of the chip. Bytes sent come from the compiled program, those of a ragged exchange at uniform routing. FLOPs
come from a formula, and times from both and the data sheet.
"""

import dataclasses
import math
import re
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax import config, model, optim
from moe_jax.aot import hlo, machines
from moe_jax.chips import peak_flops
from moe_jax.cli import GPU_SHARE
from moe_jax.errors import UserError
from moe_jax.moe import exchange
from moe_jax.optim.plan import Plan
from moe_jax.parallel import sharding
from moe_jax.run import teacher
from moe_jax.train import step
from moe_jax.train.state import abstract_batch, abstract_state, abstract_weights, choose_program, parts_of
from moe_jax.tree import flatten

# Messages of JAX about the machine on which it traces, and what to do about them.
REFUSALS = {
    "cuDNN not found": "attention needs cuDNN: pip install nvidia-cudnn-cu13, or --config.model.attention=chunked",
}
AVERAGE = "average of the weights"  # a kind of memory, beside the parameters and the moments


class Report(NamedTuple):
    """The results for one chip, in bytes. Its memory holds arguments and temporaries."""

    topology: str
    mesh: dict[str, int]
    fits: bool
    memory: dict[str, float]  # by kind; the last is the rest of the total
    capacity: float  # memory that a program may use
    seconds: float  # time of compilation
    sent: list[hlo.Collective]
    text: str  # the program, "" if it does not fit


def mesh_of(cfg: config.RunConfig, chips: list[jax.Device]) -> jax.sharding.Mesh:
    """The mesh of a config on these chips. Raises ConfigError if the config does not fit them."""
    shape = config.check_devices(cfg, len(chips), chips[0].platform, chips[0].device_kind)
    return sharding.make_mesh(shape, chips)


# --- compiling -------------------------------------------------------------------------------------------------------


def compile_step(cfg: config.RunConfig, mesh: jax.sharding.Mesh) -> jax.stages.Compiled:
    """The compiled train step for a mesh of any devices, made from shapes alone."""
    # XLA's autotuning runs kernels to find the fastest, which needs a GPU.
    absent = mesh.devices.flat[0].platform == "gpu" and jax.default_backend() != "gpu"
    options = {"xla_gpu_autotune_level": 0} if absent else None
    taught = teacher.find(cfg, experts=mesh.shape["expert"])
    lesson = (None, abstract_weights(taught.model, mesh)) if taught else ()  # no limits
    with jax.set_mesh(mesh):
        step_of = step.make_train_step(cfg, mesh, None, taught.model if taught else None).__wrapped__
        return step_of.lower(abstract_state(cfg, mesh), abstract_batch(cfg, mesh), *lesson).compile(options)


def bytes_of_device(tree: Any) -> int:
    """Bytes of abstract arrays with shardings on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def memory_needed(m: Any) -> float:
    """Bytes of a chip's memory that a program needs, from XLA's analysis: its peak, arguments and results included.

    Without a peak it is an upper bound, since temporaries do not all exist at the same time.
    """
    ends = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    return (m.peak_memory_in_bytes or ends + m.temp_size_in_bytes) + m.generated_code_size_in_bytes


def memory_wanted(message: str, state: float) -> tuple[float, float] | None:
    """Bytes that a program needs and that a chip has, from the compiler's error message; None for another error.

    state: bytes of parameters and moments, which one form of the message leaves out.
    """
    number = r"([\d.]+)([KMG]?)"
    complete = re.search(rf"Used {number} of {number} hbm", message)
    rest = re.search(rf"HLO temporaries \({number}\) exceeds available HBM \({number}\)", message)
    if (found := complete or rest) is None:
        return None
    unit = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
    return float(found[1]) * unit[found[2]] + (0 if complete else state), float(found[3]) * unit[found[4]]


def compile_report(cfg: config.RunConfig, topology: str) -> Report:
    """The report for a config on a machine. Compilation takes minutes. Raises UserError and ConfigError."""
    mesh, began = mesh_of(cfg, machines.devices(topology)), time.perf_counter()
    state = abstract_state(cfg, mesh)
    parts = parts_of(state.opt_state)
    memory = {"parameters": bytes_of_device((state.params, state.router_bias)),
              "moments": bytes_of_device((parts.optimizer, parts.controllers))}  # fmt: skip
    memory |= {AVERAGE: bytes_of_device(parts.ema)} if parts.ema else {}
    if taught := teacher.find(cfg, experts=mesh.shape["expert"]):
        memory["teacher"] = bytes_of_device(abstract_weights(taught.model, mesh))
    capacity = machines.chip(topology).memory * (GPU_SHARE if machines.is_gpu(topology) else 1)
    sent, text = [], ""
    try:
        compiled = compile_step(cfg, mesh)
    except RuntimeError as e:  # raised by JAX or XLA
        for words, rule in REFUSALS.items():
            if words in str(e):
                raise UserError(f"--compile_only={topology}: {rule}") from None
        wanted = memory_wanted(str(e), sum(memory.values()))
        if wanted is None:
            raise UserError(f"--compile_only={topology}: XLA cannot compile it: {str(e)[:300]}") from None
        total, capacity = wanted
    else:
        total, text = memory_needed(compiled.memory_analysis()), compiled.as_text()
        sizes = dict(mesh.shape) | {"data": mesh.shape["data"] // sharding.count_slices(mesh.devices.flat)}
        sent = hlo.collectives(text, sizes)
    memory["gradients, activations and work space"] = total - sum(memory.values())
    # XLA compiles programs that are too large for a GPU without an error.
    fits = bool(text) and (total <= capacity or not machines.is_gpu(topology))
    return Report(topology, dict(mesh.shape), fits, memory, capacity, time.perf_counter() - began, sent, text)


# --- the report ------------------------------------------------------------------------------------------------------


def bytes_sent(cfg: config.RunConfig, report: Report) -> dict[tuple[str, str], tuple[int, float]]:
    """Number and bytes of a chip's messages in a step, by (kind, mesh axes), the largest first.

    The buffer of a ragged exchange has the size of the worst case. Its bytes are counted at uniform routing.
    """
    peers, out = report.mesh["expert"], {}
    moe_of = lambda experts: dataclasses.replace(cfg.trained.moe, num_experts=experts)
    places = (*cfg.model.places, *cfg.model.mtp_places)
    layers = [exchange.devices_per_token(moe_of(n), peers) for p in places if (n := p.kind.experts)]
    used = sum(layers) / len(layers) / peers if layers else 1  # a mean over layers
    for c in report.sent:
        key = c.kind, "·".join(c.axes) or "none"
        times, size = out.get(key, (0, 0.0))
        out[key] = times + c.times, size + c.sent * (used if c.kind.startswith("ragged") else 1)
    return dict(sorted(out.items(), key=lambda item: -item[1][1]))


def flops_of_step(cfg: config.RunConfig) -> float:
    """FLOPs of the model in a step on all chips, by formula. Frozen weights have no gradient of their own."""
    frozen = optim.frozen_paths(cfg.optim, flatten(model.abstract(cfg.model).shapes))
    return model.flops_per_token(cfg.model, cfg.data.seq_len, frozen) * cfg.data.batch_size * cfg.data.seq_len


def bytes_of_state(cfg: config.RunConfig, report: Report) -> tuple[float, float]:
    """Bytes on a chip of what a step reads and writes once, and of the gradients. These are as large as the parameters,
    but for the share of their bytes that is frozen."""
    shapes = flatten(model.abstract(cfg.model).shapes)
    frozen = optim.frozen_paths(cfg.optim, shapes)
    sizes = {path: x.size * x.dtype.itemsize for path, x in shapes.items()}  # adapters may have a larger dtype
    share = sum(size for path, size in sizes.items() if path not in frozen) / sum(sizes.values())
    state = sum(report.memory.get(name, 0.0) for name in ("parameters", "moments", AVERAGE))
    return state, share * report.memory["parameters"]


def estimate(cfg: config.RunConfig, report: Report) -> dict[str, float]:
    """Seconds a step that arithmetic, memory, links and network of a chip need at the rates of its data sheet.

    FLOPs are those of the model, of the forward passes that `remat="full"` and exact accumulation repeat, and of Muon.
    Memory traffic is state read and written, gradients written and read in each micro-batch, and gathered weights in
    the compute dtype written and read in each pass. It leaves out activations, so it is a lower bound.
    """
    _, memory_rate, link_rate, network_rate = machines.chip(report.topology)
    m, a, chips = cfg.model, cfg.train.micro_batches, math.prod(report.mesh.values())
    flops = flops_of_step(cfg) / chips
    twice = a > 1 and cfg.loss.accumulation == "exact"
    passes = 3 + (m.remat == "full") + twice
    forward = model.flops_per_token(m, cfg.data.seq_len) * cfg.data.batch_size * cfg.data.seq_len / chips / 3
    flops += (passes - 3) * forward
    if optim.owners(cfg.optim)["matrix"] == "muon":
        flops += plan_of(cfg, mesh_of(cfg, machines.devices(report.topology))).flops
    state, gradients = bytes_of_state(cfg, report)
    weights = model.count_parameters(m).total * jnp.dtype(m.compute_dtype).itemsize / report.mesh["expert"]
    moved = 2 * state + 2 * a * gradients + 2 * weights * passes * a
    sent = bytes_sent(cfg, report).items()
    over = lambda network: sum(size for (kind, _), (_, size) in sent if (kind == hlo.NETWORK) == network)
    peak, _ = peak_flops(machines.devices(report.topology)[0])
    times = {"arithmetic": flops / peak, "memory": moved / memory_rate, "links": over(False) / link_rate}
    return times | ({"network": over(True) / network_rate} if over(True) else {})


def plan_of(cfg: config.RunConfig, mesh: jax.sharding.Mesh) -> Plan:
    """The plan of Muon for the chips of a mesh, whose kind decides dtype and kernels."""
    with jax.set_mesh(mesh):
        return optim.muon_plan(cfg.optim, model.abstract(cfg.model), dict(mesh.shape), cfg.model.head_dim)


def suggestions(cfg: config.RunConfig, report: Report) -> str:
    """The smallest change that should make the step fit, estimated in proportion and not compiled."""
    state, total = sum(bytes_of_state(cfg, report)), sum(report.memory.values())
    chips, a = math.prod(report.mesh.values()), cfg.train.micro_batches
    rows, free = cfg.data.batch_size // chips, report.capacity - state
    if free > 0.1 * report.capacity:  # the state fits
        if cfg.model.remat == "none":
            return "--config.model.remat=selective"
        need = (total - state) / free * a
        choices = [n for n in range(a + 1, rows + 1) if rows % n == 0]
        if choices:
            n = next((n for n in choices if n >= need), choices[-1])
            return f"--config.train.micro_batches={n}, {rows // n} sequences of a chip at a time"
        if cfg.model.remat != "full":
            return "--config.model.remat=full"
    if report.mesh["data"] > 1:
        fsdp = report.mesh["fsdp"] * 2
        return f"--config.mesh.data=-1 --config.mesh.fsdp={fsdp}, the state in twice as many parts"
    if cfg.model.param_dtype == "float32" and total - state / 2 < report.capacity:
        return "--config.model.param_dtype=bfloat16, which halves the state"
    return "more chips, or ones with more memory"


def lines(cfg: config.RunConfig, report: Report) -> Iterator[str]:
    """Yields the lines of the report."""
    gb = lambda n: f"{n / 1e9:,.2f} GB" if n >= 1e7 else f"{n / 1e6:,.3f} MB"
    m, tokens, total = cfg.model, cfg.data.batch_size * cfg.data.seq_len, sum(report.memory.values())
    chips = math.prod(report.mesh.values())
    per_pass = cfg.data.batch_size // (chips * cfg.train.micro_batches)
    yield (f"{report.topology}: {chips} chips, mesh {report.mesh}; {cfg.data.batch_size} x {cfg.data.seq_len} tokens, "
           f"{cfg.train.micro_batches} micro-batches of {per_pass} sequences a chip, remat {m.remat}")  # fmt: skip
    source = "by XLA's buffer assignment" if machines.is_gpu(report.topology) else "by the TPU compiler"
    verdict = "fits" if report.fits else "DOES NOT FIT"
    yield f"{verdict}: {gb(total)} of {gb(report.capacity)} a chip, {source}; compiled in {report.seconds:.0f} s"
    yield "memory: " + ", ".join(f"{name} {gb(n)}" for name, n in report.memory.items())
    flops = flops_of_step(cfg)
    yield f"FLOPs by formula: {flops / 1e12:,.2f} TFLOP a step, {flops / chips / 1e12:,.2f} TFLOP a chip"
    if not report.fits:
        yield f"the smallest change that should make it fit (estimated, not compiled): {suggestions(cfg, report)}"
        return
    yield "sent by a chip in a step, every turn of a loop counted, ragged exchanges at uniform routing:"
    for (kind, axes), (times, size) in bytes_sent(cfg, report).items():
        yield f"  {kind:18} {axes:20} {times:6,} times {gb(size):>12}"
    times = estimate(cfg, report)
    low, high = max(times.values()), sum(times.values())
    parts = ", ".join(f"{name} {t:.3g} s" for name, t in times.items())
    yield f"estimate from the data sheet, not measured: {parts}"
    yield (f"estimate: {low:.3g} s a step if these overlap completely, {high:.3g} s if not at all: "
           f"{tokens / high:,.0f} to {tokens / low:,.0f} tokens/s")  # fmt: skip


def main(cfg: config.RunConfig, topology: str) -> None:
    """Prints the report. Raises UserError and ConfigError."""
    jax.config.update("jax_platforms", "cpu")  # the devices present are not used
    chips = machines.devices(topology)
    print(choose_program(cfg, mesh_of(cfg, chips)).why, flush=True)
    if optim.owners(cfg.optim)["matrix"] == "muon":
        print(plan_of(cfg, mesh_of(cfg, chips)), flush=True)
    print("compiling, which takes minutes for large models", flush=True)
    for line in lines(cfg, compile_report(cfg, topology)):
        print(line, flush=True)
