"""Measures how the cost of a training step grows with experts, their granularity, and the length of a sequence.

    python -m benchmarks.growth --rows=runs/growth.jsonl --figure=runs/growth.png        # one GPU of 141 GB
    python -m benchmarks.growth --config=configs/quickstart.py --parts=experts --experts=8,16,32 --pieces

    part     varies                            constant
    experts  E                                 K and F, so active parameters
    top_k    K, with constant E/K and K·F      active and total parameters
    length   S, with constant B·S              tokens of a step

It times complete steps on random tokens. The learning rate is 0, so that every step has the router's initial weights.
The values of a part are timed in turns. The default config is a shape for one GPU (D=1024, 8 layers, E=64, K=4, F=512,
bfloat16, 32,768 tokens, AdamW), on a CPU a toy.

It prints one row a value: median and range, tokens/s, model TFLOP of the step by formula, and two analytical times,
which equal the measured time in the first row by definition. `FLOPs` assumes the first row's rate. `and bytes` gives
the traffic of parameters, gradients and optimizer states its time at the copy bandwidth measured here, and the FLOPs,
Newton–Schulz included, the rest. --pieces adds forward and backward alone. A part takes an estimated 4 minutes on one
H200, most of it compilation.

Rows are appended to --rows, and --figure draws all rows of that file. With --parts= nothing is timed.
"""

import gc
import json
import statistics
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator

from benchmarks.rows import milliseconds, random_rows, seconds, training_step, where
from moe_jax import cli, config, model, optim
from moe_jax.errors import UserError
from moe_jax.evaluate.analysis import INK, QUIET
from moe_jax.evaluate.drawing import GRID
from moe_jax.moe.stats import by_depth
from moe_jax.parallel import sharding
from moe_jax.train import metrics
from moe_jax.train.gradients import make_gradients
from moe_jax.train.state import put_batch

CONFIG = cli.define_config()
PARTS = flags.DEFINE_list("parts", ["experts", "top_k", "length"], "what grows")
VALUES = {
    "experts": flags.DEFINE_list("experts", [], "E; default: 8 to 256, on a CPU 4 to 16"),
    "top_k": flags.DEFINE_list("top_k", [], "K; default: 1 to 16, on a CPU 1 to 4"),
    "length": flags.DEFINE_list("lengths", [], "S; default: 1k to 32k, on a CPU 64 to 256"),
}
ROUNDS = flags.DEFINE_integer("rounds", 3, "times that every value has its turn", 1)
STEPS = flags.DEFINE_integer("steps", 5, "steps of a turn", 1)
PIECES = flags.DEFINE_bool("pieces", False, "time forward and backward without the optimizer, too")
ROWS = cli.define_path("rows", None, "file that rows are appended to, one JSON object each")
FIGURE = cli.define_path("figure", None, "figure of all rows of --rows")

DEFAULTS = {
    "cpu": {"experts": (4, 8, 16), "top_k": (1, 2, 4), "length": (64, 128, 256)},
    "gpu": {
        "experts": (8, 16, 32, 64, 128, 256),
        "top_k": (1, 2, 4, 8, 16),
        "length": (1024, 2048, 4096, 8192, 16384, 32768),
    },
}
LABELS = {"experts": "experts E", "top_k": "experts per token K", "length": "sequence length S"}


# --- configs ---------------------------------------------------------------------------------------------------------


def base(small: bool) -> Any:
    if CONFIG.value is not None:
        c = CONFIG.value.copy_and_resolve_references()
        c.unlock()
        return c
    c = config.default_config()
    c.optim.update(name="adamw", lr=1e-4)
    c.data.tokenizer.kind = "bytes"
    c.model.segment_mask = False
    if small:
        c.model.update(d_model=64, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=32, compute_dtype="float32")
        c.model.moe.update(num_experts=8, top_k=2, d_expert=64)
        c.data.update(batch_size=8, seq_len=128)
    else:
        c.model.update(vocab_size=32_768, d_model=1024, num_layers=8, num_heads=8, num_kv_heads=8, head_dim=128)
        c.model.moe.update(num_experts=64, top_k=4, d_expert=512)
        c.data.update(batch_size=8, seq_len=4096)
    return c


def build(part: str, value: int, small: bool) -> config.RunConfig:
    c = base(small)
    moe, data, c.optim.lr = c.model.moe, c.data, 0.0
    if part == "experts":
        moe.num_experts = value
    elif part == "top_k":
        moe.num_experts, moe.d_expert = moe.num_experts * value // moe.top_k, moe.d_expert * moe.top_k // value
        moe.top_k = value
    else:
        data.batch_size, data.seq_len = data.batch_size * data.seq_len // value, value
    return config.build(c)


# --- the analytical line ---------------------------------------------------------------------------------------------


def step_flops(cfg: config.RunConfig) -> float:
    return model.flops_per_token(cfg.model, cfg.data.seq_len) * cfg.data.batch_size * cfg.data.seq_len


def optimizer_flops(cfg: config.RunConfig) -> float:
    """Newton–Schulz's; an elementwise update is bytes."""
    if cfg.optim.name != "muon":
        return 0.0
    sizes = dict.fromkeys(sharding.AXES, 1)
    return optim.muon_plan(cfg.optim, model.abstract(cfg.model), sizes, cfg.model.head_dim).flops


def parameter_bytes(cfg: config.RunConfig) -> float:
    """Traffic of a step that follows the parameters, each array once wherever it is read or written.

    Weights are float32: read and, in a narrower compute dtype, written in it; read forward and backward; gradients
    written, read for their norm; by the optimizer gradients read, weights and moments read and written (AdamW has two
    moments, Muon one). What the iteration of Newton–Schulz reads is not counted, nor are activations.
    """
    total, itemsize = model.count_parameters(cfg.model).total, jnp.dtype(cfg.model.compute_dtype).itemsize
    cast = 0 if itemsize == 4 else 4 + itemsize
    moments = 2 if cfg.optim.name == "adamw" else 1
    return total * (cast + 2 * itemsize + 4 + 4 + 4 + 8 * (1 + moments))


def bandwidth(small: bool) -> float:
    """Bytes a second, read and written, of a scaled copy."""
    x = jnp.ones(2**26 if small else 2**28, jnp.float32)
    scale = jax.jit(lambda x: x * 1.5)
    return 2 * x.nbytes / min(seconds(scale, (x,), 5, carry=False)[0] for _ in range(3))


# --- rows ------------------------------------------------------------------------------------------------------------


class Row:
    """One value of one part: its arrays live only during its turn, so that each has the device's memory for itself."""

    def __init__(self, part: str, value: int, small: bool):
        self.part, self.value, self.cfg = part, value, build(part, value, small)
        config.check_devices(self.cfg, 1, jax.devices()[0].platform, jax.devices()[0].device_kind)
        self.mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
        self.turns, self.gradient_turns, self.max_load = [], [], 0.0
        with jax.set_mesh(self.mesh):
            self.timed = training_step(self.cfg, self.mesh)
        self._gradients = jax.jit(make_gradients(self.cfg, self.mesh))

    def turn(self) -> None:
        gc.collect()
        with jax.set_mesh(self.mesh):
            start = self.timed.start()
            if PIECES.value:
                batch = put_batch(random_rows(self.cfg, range(self.cfg.data.batch_size)), self.mesh, self.cfg)
                arguments = (start[0].params, start[0].router_bias, batch, 0)
                self.gradient_turns.append(seconds(self._gradients, arguments, STEPS.value, carry=False)[0])
            took, out = seconds(self.timed.call, start, STEPS.value)
        self.turns.append(took)
        router = metrics.router_metrics(by_depth(self.cfg.model.places, metrics.to_host(out[-1]["router"])))
        self.max_load = router["max_load"]

    def numbers(self, first: "Row", rate: float) -> dict[str, Any]:
        """The numbers that --rows keeps. rate: bytes a second."""
        seconds, reference, c = statistics.median(self.turns), statistics.median(first.turns), self.cfg
        of_bytes = lambda row: parameter_bytes(row.cfg) / rate
        of_flops = lambda row: step_flops(row.cfg) + optimizer_flops(row.cfg)
        scaled = max(reference - of_bytes(first), 0.0) * of_flops(self) / of_flops(first)
        moe = c.model.moe
        return {
            "part": self.part,
            "value": self.value,
            "ms": 1e3 * seconds,
            "low": 1e3 * min(self.turns),
            "high": 1e3 * max(self.turns),
            "flops_ms": 1e3 * reference * step_flops(c) / step_flops(first.cfg),
            "bytes_ms": 1e3 * (of_bytes(self) + scaled),
            "shape": f"E={moe.num_experts} K={moe.top_k} F={moe.d_expert} B={c.data.batch_size} S={c.data.seq_len}",
            "where": where(),
        }

    def line(self, row: dict[str, Any]) -> str:
        count, tokens = model.count_parameters(self.cfg.model), self.cfg.data.batch_size * self.cfg.data.seq_len
        gradients = f", forward and backward alone {milliseconds(self.gradient_turns)}" if PIECES.value else ""
        return (f"{self.part:<8} {row['shape']:<32} {count.total / 1e6:8.1f} M, {count.active / 1e6:.1f} active: "
                f"{milliseconds(self.turns)}{gradients}, {1e3 * tokens / row['ms']:.0f} tokens/s, "
                f"{step_flops(self.cfg) / 1e12:.4g} TFLOP, analytical: FLOPs {row['flops_ms']:.2f}, "
                f"and bytes {row['bytes_ms']:.2f} ms, temporaries {self.timed.temporaries / 2**30:.2f} GiB, "
                f"max load {self.max_load:.2f}")  # fmt: skip


def measure(part: str, values: list[int], small: bool, rate: float) -> list[dict[str, Any]]:
    rows = []
    for value in values:
        try:
            rows.append(Row(part, value, small))
            rows[-1].turn()
        except Exception as error:  # the others can be compared all the same
            rows = [row for row in rows if row.turns]
            print(f"{part} {value}: cannot run here: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
    for _ in range(ROUNDS.value - 1):
        for row in rows:
            row.turn()
    found = [row.numbers(rows[0], rate) for row in rows]
    for row, numbers in zip(rows, found, strict=True):
        print(row.line(numbers), flush=True)
    return found


# --- figure ----------------------------------------------------------------------------------------------------------


def draw(rows: list[dict[str, Any]]) -> Figure:
    """One panel a part: measured points with their range, and the two analytical lines."""
    parts = [part for part in LABELS if any(row["part"] == part for row in rows)]
    figure = Figure((3.6 * len(parts) + 0.4, 3.6), layout="constrained")
    every = [row[name] for row in rows for name in ("low", "high", "flops_ms", "bytes_ms")]
    low, high = min(every) / 1.3, max(every) * 1.5
    ticks = [n * 10**p for p in range(-3, 6) for n in (1, 1.5, 2, 3, 5, 7) if low <= n * 10**p <= high]
    for axis, part in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        mine = sorted((row for row in rows if row["part"] == part), key=lambda row: row["value"])
        x, y = ([row[name] for row in mine] for name in ("value", "ms"))
        reach = [[row["ms"] - row["low"] for row in mine], [row["high"] - row["ms"] for row in mine]]
        axis.plot(x, [row["flops_ms"] for row in mine], color=QUIET, lw=1.2, ls="--", label="if time grew like FLOPs")
        axis.plot(x, [row["bytes_ms"] for row in mine], color="#c4572e", lw=1.2, ls=":",
                  label="… like FLOPs and parameter bytes")  # fmt: skip
        axis.errorbar(x, y, reach, color="#2f6fb0", marker="o", ms=5, lw=1.6, capsize=3, label="measured")
        for row in mine:
            above = row["ms"] >= row["bytes_ms"]  # out of the way of the analytical lines
            at, offset = (row["value"], row["high" if above else "low"]), (0, 4 if above else -11)
            axis.annotate(f"{row['ms']:.3g}", at, xytext=offset, textcoords="offset points", ha="center", fontsize=7,
                          color=INK)  # fmt: skip
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_xticks(x, [f"{v // 1024}k" if v >= 1024 and v % 1024 == 0 else str(v) for v in x], fontsize=8)
        axis.set_ylim(low, high)
        axis.set_yticks(ticks, [f"{t:g}" for t in ticks], fontsize=8)
        for side in (axis.xaxis, axis.yaxis):
            side.set_minor_locator(NullLocator())
            side.set_minor_formatter(NullFormatter())
        axis.set_xlabel(LABELS[part], fontsize=9)
        axis.set_title(", ".join(dict.fromkeys(row["where"] for row in mine)), fontsize=8, color=INK)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color=GRID, lw=0.7)
    first = figure.axes[0]
    first.set_ylabel("ms a step (log scale)", fontsize=9)
    first.legend(fontsize=8, frameon=False, loc="upper left")
    figure.suptitle("Cost of a training step", fontsize=10, color=INK)
    return figure


def main(_):
    small = jax.devices()[0].platform == "cpu"
    if PARTS.value:
        rate = bandwidth(small)
        c = base(small)
        print(f"D={c.model.d_model}, {c.model.num_layers} layers, V={c.model.vocab_size}, {c.model.compute_dtype}, "
              f"{c.optim.name}, remat {c.model.remat}; copies at {rate / 1e9:.0f} GB/s; one device of {where()}",
              flush=True)  # fmt: skip
    found = []
    for part in PARTS.value:
        if part not in VALUES:
            raise UserError(f"--parts={part}: must be among {', '.join(VALUES)}")
        values = [int(v) for v in VALUES[part].value] or DEFAULTS["cpu" if small else "gpu"][part]
        made = measure(part, values, small, rate)
        found += made
        if ROWS.value:
            Path(ROWS.value).parent.mkdir(parents=True, exist_ok=True)
            with open(ROWS.value, "a", encoding="utf-8") as f:
                f.writelines(json.dumps(row) + "\n" for row in made)
    if FIGURE.value:
        rows = found
        if ROWS.value:
            rows = [json.loads(line) for line in Path(ROWS.value).read_text(encoding="utf-8").splitlines()]
        draw(rows).savefig(FIGURE.value, dpi=160)


if __name__ == "__main__":
    cli.run(main)
