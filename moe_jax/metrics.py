"""Metrics: sums → named scalars, MFU, and everything that shows or keeps them.

A metric's name is written in this file and in no other. `train_metrics` makes one flat row of a step, `Writer` keeps it
(`metrics.jsonl`, TensorBoard, Weights & Biases), `Progress` shows it. All of it runs on the host, on values `OneBehind`
fetched while the device was already computing the next step.

Axes: `L` layers, `G` balance groups, `E` experts, `K` experts per token.
"""

import functools
import hashlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from moe_jax.config import FileError

# --- sums → scalars --------------------------------------------------------------------------------------------------


def router_metrics(stats: Any, top_k: int) -> dict[str, float]:
    """What the router did, from `RouterStats` (numpy or addressable arrays), summed over balance groups.

    Scalars, then the same per layer under `router/layer_03/…`:
        max_load: E · max_e f_e with f_e = tokens_per_expert / (K · tokens); 1 is perfect balance, E/K the worst.
            Scalar: the worst layer.
        load_cv: standard deviation over mean of the experts' loads; 0 is perfect balance. Scalar: mean over layers.
        dead_experts: how many experts got no token. Scalar: sum over layers.
        dropped: assignments lost to capacity over K · tokens, in [0, 1]. Scalar: over all layers.
    A layer that counted no token reads max_load = load_cv = dropped = 0. Without MoE layers there are none of these.
    """
    if not len(stats.tokens):
        return {}
    sums = (stats.tokens, stats.tokens_per_expert, stats.dropped)
    tokens_L, load_LE, dropped_L = (np.asarray(x, np.float64).sum(1) for x in sums)
    assignments_L = np.maximum(top_k * tokens_L, 1e-9)
    layers = {
        "max_load": load_LE.shape[-1] * load_LE.max(-1) / assignments_L,
        "load_cv": load_LE.std(-1) / np.maximum(load_LE.mean(-1), 1e-9),
        "dead_experts": (load_LE == 0).sum(-1),
        "dropped": dropped_L / assignments_L,
    }
    out = {
        "max_load": float(layers["max_load"].max()),
        "load_cv": float(layers["load_cv"].mean()),
        "dead_experts": float(layers["dead_experts"].sum()),
        "dropped": float(dropped_L.sum() / assignments_L.sum()),
    }
    for i in range(len(tokens_L)):
        out |= {f"router/layer_{i:02d}/{name}": float(value[i]) for name, value in layers.items()}
    return out


def train_metrics(
    step: int,
    aux: dict[str, Any],
    *,
    top_k: int,
    tokens: float,
    tokens_per_second: float,
    step_seconds: float,
    flops_per_token: float,
    peak: float,
) -> dict[str, float]:
    """One flat row of Python numbers, always in the same order; per-layer router values last.

    aux: the step's result on the host: scalars loss, xent, load_balance, router_z (as `losses.total_loss` names its
        parts), grad_norm, lr, with QK-clip max_logit and clipped_heads, skipped (steps so far), router: `RouterStats`.
    tokens: counted since the start of training. tokens_per_second, step_seconds: from `Throughput`.
    flops_per_token: forward and backward by formula. peak: FLOP/s of all devices together; mfu is their ratio.
    """
    parts = [name for name in aux if name.split("/")[0] == "load_balance"]  # load_balance/<name> of further losses
    names = ["loss", "xent", *parts, "router_z", "grad_norm", "lr"]
    names += [name for name in ("max_logit", "clipped_heads", "skipped") if name in aux]
    row = {"step": int(step)} | {name: float(aux[name]) for name in names}
    row |= {
        "tokens": float(tokens),
        "tokens_per_second": float(tokens_per_second),
        "mfu": float(tokens_per_second) * flops_per_token / peak,
        "step_seconds": float(step_seconds),
    }
    return row | router_metrics(aux["router"], top_k)


def eval_metrics(rows: list[dict[str, Any]]) -> dict[str, float]:
    """`evaluate.EvalResult.rows` as one flat row: `xent`, `perplexity`, `bits_per_byte` over all, then by domain.

    The last row is all domains together. What stands before the last slash of a name is the domain.
    """
    names = ("xent", "perplexity", "bits_per_byte")
    prefix = lambda row: f"{row['domain']}/" if row["domain"] else ""
    ordered = [rows[-1], *rows[:-1]]
    return {prefix(row) + name: float(row[name]) for row in ordered for name in names}


# --- time ------------------------------------------------------------------------------------------------------------


class Throughput:
    """Tokens and seconds of the steps since the last reading.

    The first step compiles, so the clock restarts when it ends; a reading before the second step is the first step's
    own, compilation included.
    """

    def __init__(self, tokens: float = 0.0):
        self.tokens = float(tokens)  # since the start of training, earlier runs of a resumed training included
        self._start, self._steps, self._tokens, self._compiled = time.perf_counter(), 0, 0.0, False
        self._first = (0.0, 0.0)

    def add(self, tokens: float) -> None:
        """One more step is done."""
        self.tokens += float(tokens)
        if not self._compiled:
            self._compiled, self._first = True, (float(tokens), time.perf_counter() - self._start)
            self._start = time.perf_counter()
        else:
            self._steps, self._tokens = self._steps + 1, self._tokens + float(tokens)

    def read(self) -> dict[str, float]:
        """`tokens`, `tokens_per_second` and `step_seconds` as `train_metrics` takes them; starts a new window."""
        now = time.perf_counter()
        window = (self._tokens, now - self._start, self._steps) if self._steps else (*self._first, 1)
        tokens, seconds, steps = window
        self._start, self._steps, self._tokens = now, 0, 0.0
        rate = tokens / max(seconds, 1e-9)
        return {"tokens": self.tokens, "tokens_per_second": rate, "step_seconds": seconds / steps}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Evaluation or saving inside this block is not counted as training time."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._start += time.perf_counter() - began


# Dense peak of one JAX device in bf16 (V100 and T4 have no bf16: fp16), from the vendors' data sheets.
_PEAKS = (
    (r"^TPU v4$", 275e12),
    (r"^TPU v5( lite|e)$", 197e12),
    (r"^TPU v5p?$", 459e12),
    (r"^TPU v6( lite|e)$", 918e12),
    (r"^TPU7x$", 2307e12 / 2),  # 2307e12 a chip, and a chip is two devices (no megacore)
    (r"\bH[12]00 NVL\b", 835e12),
    (r"\bH100 PCIe\b", 756e12),
    (r"\bG?H[12]00\b", 989.4e12),
    (r"\bA100\b", 312e12),
    (r"\bL4\b", 121e12),
    (r"\bL40S\b", 362e12),
    (r"\bV100\b", 125e12),
    (r"\bRTX 4090$", 165e12),
    (r"\bT4\b", 65e12),
    (r"\bB200\b", 2250e12),
)


def peak_flops(device: jax.Device) -> tuple[float, str]:
    """Peak FLOP/s of one device and where the number is from: "datasheet", or "measured" for a device not listed.

    A slice of a GPU (MIG) is measured, since the data sheet describes the whole.
    """
    kind = device.device_kind
    for pattern, peak in _PEAKS:
        if re.search(pattern, kind, re.IGNORECASE) and "MIG" not in kind:
            return peak, "datasheet"
    return _measured_flops(device), "measured"


@functools.cache
def _measured_flops(device: jax.Device, seconds: float = 0.2) -> float:
    """The best rate of a square matmul (float32 on a CPU, else bf16), in less than half a second."""
    n, dtype = (1024, jnp.float32) if device.platform == "cpu" else (4096, jnp.bfloat16)
    with jax.set_mesh(jax.sharding.Mesh(np.array([device]), ("x",))):  # whatever mesh the caller has set
        x = jax.device_put(np.ones((n, n), dtype), device)
        matmul = jax.jit(lambda a: a @ a)
        matmul(x).block_until_ready()
        best, began = math.inf, time.perf_counter()
        while time.perf_counter() - began < seconds:
            start = time.perf_counter()
            matmul(x).block_until_ready()
            best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


# --- from the device -------------------------------------------------------------------------------------------------


def _to_host(path: tuple, leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        return leaf
    if not leaf.is_fully_replicated:
        raise ValueError(f"metric {jax.tree_util.keystr(path)} is spread over processes; replicate it in the step")
    return leaf.addressable_data(0)


def to_host(aux: Any) -> Any:
    """A pytree of device arrays as numpy; arrays shared with other processes must be replicated."""
    return jax.device_get(jax.tree_util.tree_map_with_path(_to_host, aux))


class OneBehind:
    """Reads a step's metrics while the next step computes, so that reading never leaves the device idle."""

    def __init__(self):
        self._waiting: tuple[int, Any] | None = None

    def push(self, step: int, aux: Any) -> tuple[int, Any] | None:
        """Hands in the step just dispatched; returns the one before it, on the host (None at the first)."""
        before, self._waiting = self.flush(), (step, aux)
        return before

    def flush(self) -> tuple[int, Any] | None:
        """The step still waiting, on the host, or None."""
        waiting, self._waiting = self._waiting, None
        return waiting and (waiting[0], to_host(waiting[1]))


# --- writers ---------------------------------------------------------------------------------------------------------


def _drop_after(path: Path, step: int | None) -> None:
    """Takes a torn line, and lines later than `step`, out of a JSONL file; they go to `*.dropped.jsonl` beside it."""
    if not path.exists():
        return
    text = path.read_bytes().decode("utf-8", errors="replace")
    keep, drop = [], []
    for line in filter(None, text.split("\n")):
        try:
            later = step is not None and json.loads(line)["step"] > step
        except (ValueError, KeyError, TypeError):  # a line cut short by a killed process
            line, later = json.dumps({"torn": line}), True
        (drop if later else keep).append(line)
    if not drop and (not text or text.endswith("\n")):
        return
    if drop:
        with open(path.with_suffix(".dropped.jsonl"), "a", encoding="utf-8") as f:
            f.write("".join(line + "\n" for line in drop))
            f.flush()
            os.fsync(f.fileno())
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", encoding="utf-8") as f:
        f.write("".join(line + "\n" for line in keep))
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def _open_wandb(workdir: Path, project: str, config: dict | None):
    try:
        import wandb
    except ImportError:
        raise ImportError(f"config.train.wandb_project={project!r} needs Weights & Biases: pip install wandb") from None
    ident = hashlib.sha1(str(workdir.resolve()).encode()).hexdigest()[:16]  # a resumed run continues its own record
    return wandb.init(project=project, dir=str(workdir), name=workdir.name, id=ident, resume="allow", config=config)


class Writer:
    """Keeps rows in a run directory: `metrics.jsonl`, TensorBoard's `tensorboard/`, Weights & Biases if asked for.

    A line of `metrics.jsonl` is valid JSON with `kind` ("train", "eval", "skipped") and `step` first. A value that is
    not finite is written as null and named in `nonfinite`. Only process 0 writes; elsewhere every method does nothing.

    resume_step: training goes on after this step, so later lines (of a run that died after its last checkpoint) are
        moved to `metrics.dropped.jsonl`. None keeps every whole line.
    """

    def __init__(self, workdir: str | os.PathLike, *, resume_step: int | None = None, tensorboard: bool = True,
                 wandb_project: str = "", config: dict | None = None):  # fmt: skip
        self._file = self._tensorboard = self._wandb = None
        if jax.process_index() != 0:
            return
        workdir = Path(workdir)
        if wandb_project:
            self._wandb = _open_wandb(workdir, wandb_project, config)
        workdir.mkdir(parents=True, exist_ok=True)
        _drop_after(workdir / "metrics.jsonl", resume_step)
        self._file = open(workdir / "metrics.jsonl", "a", encoding="utf-8")
        if tensorboard:
            from tensorboardX import SummaryWriter

            purge = None if resume_step is None else resume_step + 1
            self._tensorboard = SummaryWriter(str(workdir / "tensorboard"), purge_step=purge, flush_secs=30)

    def write(self, step: int, row: dict[str, Any], kind: str = "train") -> None:
        """Appends one row. kind: as above; it also prefixes the names in TensorBoard and W&B."""
        if self._file is None:
            return
        values = {n: v.tolist() if hasattr(v, "tolist") else v for n, v in row.items() if n not in ("kind", "step")}
        bad = [n for n, v in values.items() if not isinstance(v, str) and not np.isfinite(v).all()]
        line = {"kind": kind, "step": int(step)} | {name: None if name in bad else v for name, v in values.items()}
        if bad:
            line["nonfinite"] = bad
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        scalars = {f"{kind}/{n}": v for n, v in values.items() if isinstance(v, int | float) and n not in bad}
        if self._tensorboard is not None:
            for name, value in scalars.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(scalars, step=step)

    def close(self) -> None:
        """Everything is on the disk afterwards. Closing twice does nothing."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()
        self._file = self._tensorboard = self._wandb = None

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def read_metrics(workdir: str | os.PathLike, kind: str = "train") -> list[dict[str, Any]]:
    """The rows of one kind in a run's `metrics.jsonl`; a last line still being written is left out."""
    path = Path(workdir) / "metrics.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        return [row for row in map(json.loads, lines) if row["kind"] == kind]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise FileError(f"{path}: is not a run's metrics: {type(e).__name__}: {e}") from None


# --- progress --------------------------------------------------------------------------------------------------------


class Progress:
    """One bar on a terminal; elsewhere plain lines, at every log step and otherwise at most every `seconds`.

    Shows step, loss, tokens per second and the time left, on stderr. Only process 0 shows anything.
    """

    def __init__(self, total: int, *, initial: int = 0, seconds: float = 10.0):
        self._on = jax.process_index() == 0
        self._total, self._initial, self._step, self._seconds = total, initial, initial, seconds
        self._start = self._printed = time.perf_counter()
        self._rate = 0.0
        self._bar = None
        if self._on and sys.stderr.isatty():
            self._bar = tqdm.tqdm(total=total, initial=initial, unit="step", dynamic_ncols=True, file=sys.stderr)

    def update(self, step: int, values: dict[str, Any] | None = None, *, log: bool = False) -> None:
        """`step` is done. values: the step's aux, or at a log step `train_metrics`' row, which also has the rate."""
        if not self._on:
            return
        values = values or {}
        loss = f"loss {float(values['loss']):.4f}" if "loss" in values else ""
        self._rate = float(values.get("tokens_per_second", self._rate))
        rate = f"{tqdm.tqdm.format_sizeof(self._rate)} tokens/s" if self._rate else ""
        done, self._step = step - self._step, step
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(filter(None, (loss, rate))), refresh=log)
            self._bar.update(done)
            return
        now = time.perf_counter()
        if not log and now - self._printed < self._seconds:
            return
        self._printed = now
        left = (now - self._start) / max(step - self._initial, 1) * (self._total - step)
        left = f"{tqdm.tqdm.format_interval(left)} left"
        parts = filter(None, (f"step {step}/{self._total}", loss, rate, left))
        print("  ".join(parts), file=sys.stderr, flush=True)

    def write(self, text: str) -> None:
        """Prints on stdout without breaking the bar."""
        if self._bar is not None:
            tqdm.tqdm.write(text, file=sys.stdout)
        elif self._on:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.close()
