"""Writes and shows a run's metrics: `metrics.jsonl`, TensorBoard, Weights & Biases, the progress on a terminal.

A row is what metrics.py makes of a step: a flat dict of Python numbers, on the host.
"""

import hashlib
import importlib
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tqdm

from moe_jax.errors import ConfigError, FileError, UserError, shown

BENCHMARKS = ("tasks", "texts")  # parts of an evaluation file that have results by name

# --- files -----------------------------------------------------------------------------------------------------------


def finite(row: dict[str, Any]) -> dict[str, Any]:
    """A row with None for every value that is not finite. Their names, if there are any, are under `nonfinite`."""
    bad = [name for name, v in row.items() if isinstance(v, float | list) and not np.isfinite(v).all()]
    return {name: None if name in bad else v for name, v in row.items()} | ({"nonfinite": bad} if bad else {})


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a file atomically, in UTF-8. Half a surrogate pair, which UTF-8 cannot encode, becomes ?."""
    temporary = Path(path).with_name(Path(path).name + ".tmp")
    temporary.write_bytes(text.encode("utf-8", "replace"))
    os.replace(temporary, path)


# --- writers ---------------------------------------------------------------------------------------------------------


def _drop_after(path: Path, step: int | None) -> None:
    """Moves lines later than `step`, and an incomplete line, from a JSONL file to `*.dropped.jsonl` beside it."""
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


def check_wandb(project: str) -> None:
    """Raises ConfigError if a project is named and the package is missing."""
    try:
        if project:
            importlib.import_module("wandb")  # not find_spec: it may be there and broken
    except ImportError:
        rule = "needs Weights & Biases, which is not installed: pip install wandb"
        raise ConfigError("train.wandb_project", project, rule, "nearest valid: ''") from None


def _open_wandb(workdir: Path, project: str, config: dict | None):
    check_wandb(project)
    import wandb

    ident = hashlib.sha1(str(workdir.resolve()).encode()).hexdigest()[:16]  # a resumed run continues under the same id
    run = wandb.init(project=project, dir=str(workdir), name=workdir.name, id=ident, resume="allow", config=config)
    # W&B's own step count cannot go back, and would drop the steps that are repeated after --resume_step.
    run.define_metric("*", step_metric="step")
    return run


class Writer:
    """Writes rows to `metrics.jsonl` and `tensorboard/` of a run directory, and to Weights & Biases if asked for.

    A line of `metrics.jsonl` is valid JSON with `kind` ("train", "eval", "eval_ema", "mixture", "skipped") and
    `step` first. A value that is not finite is written as null and named in `nonfinite`. Only process 0 writes;
    elsewhere every method does nothing.

    resume_step: training resumes after this step, so later lines (of a run that died after its last checkpoint) are
        moved to `metrics.dropped.jsonl`. None keeps every complete line.
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
            import tensorboardX

            purge = None if resume_step is None else resume_step + 1
            self._tensorboard = tensorboardX.SummaryWriter(
                str(workdir / "tensorboard"), purge_step=purge, flush_secs=30
            )

    def write(self, step: int, row: dict[str, Any], kind: str = "train") -> None:
        """Appends one row. kind: "train", "eval", "eval_ema", "mixture" or "skipped", which also prefixes the names in
        TensorBoard and W&B."""
        if self._file is None:
            return
        values = {n: v.tolist() if hasattr(v, "tolist") else v for n, v in row.items() if n not in ("kind", "step")}
        line = {"kind": kind, "step": int(step)} | finite(values)
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        scalars = {f"{kind}/{name}": line[name] for name in values if isinstance(line[name], int | float)}
        if self._tensorboard is not None:
            from tensorboardX.summary import scalar

            for name, value in scalars.items():
                summary = scalar("value", value)
                summary.value[0].tag = name  # add_scalar would give `c#` and `c+` the same tag
                self._tensorboard.file_writer.add_summary(summary, step)
        if self._wandb is not None:
            self._wandb.log({"step": step} | scalars)

    def close(self) -> None:
        """Closes the files, after all rows are on the disk. Closing twice does nothing."""
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
    """The rows of one kind in a run's `metrics.jsonl`, without a last line that is still being written."""
    path = Path(workdir) / "metrics.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        return [row for row in map(json.loads, lines) if row["kind"] == kind]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise FileError(f"{path}: is not a valid metrics file: {type(e).__name__}: {e}") from None


def read_eval(workdir: str | os.PathLike, name: str = "eval.json") -> dict[str, Any]:
    """The content of an evaluation file of a run. Numbers that were not finite, null in the file, are NaN."""
    path = Path(workdir) / name
    restored = lambda row: row | dict.fromkeys(row.get("nonfinite", ()), math.nan)
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_hook=restored)
    except (OSError, ValueError, TypeError, RecursionError) as e:
        raise FileError(f"{path}: is not a valid evaluation file: {type(e).__name__}: {e}") from None


def write_eval(path: str | os.PathLike, text: str) -> None:
    """Writes an evaluation file. Results of tasks and texts that it has already, of the same step, stay.

    If they are of another step, the file that has them is kept, as eval.STEP.json.
    """
    body, path = json.loads(text), Path(path)
    old = _read_object(path)
    if old.get("step") != body["step"] and any(old.get(kind) for kind in BENCHMARKS):
        kept = path.with_name(f"{path.stem}.{old.get('step')}.json")
        if not kept.exists():
            os.replace(path, kept)
    for kind in BENCHMARKS:
        kept = old.get(kind) if old.get("step") == body["step"] else None
        if isinstance(kept, dict) and kept:
            body[kind] = kept | body.get(kind, {})
    write_text(path, json.dumps(body, indent=1, allow_nan=False) + "\n")


def add_eval(path: str | os.PathLike, step: int, kind: str, rows: dict[str, dict[str, Any]]) -> None:
    """Adds results to an evaluation file. What it has already, of the same step, stays. kind: one of `BENCHMARKS`."""
    old = _read_object(Path(path))
    body = old if old.get("step") == step else {"step": step}
    write_eval(path, json.dumps(body | {kind: {name: finite(row) for name, row in rows.items()}}, allow_nan=False))


def check_same(path: str | os.PathLike, step: int, asked: dict[str, Any]) -> None:
    """Raises UserError if a file has results of the same step that were asked for otherwise, and would be lost.

    asked: fields of the file, or of its tasks and texts, with the values that they will have. The other files of the
    evaluation that wrote it are named too, since they would be lost with it.
    """
    body = _read_object(Path(path))
    parts = [body, *(row for kind in BENCHMARKS for row in (body.get(kind) or {}).values())]
    for name, value in json.loads(json.dumps(asked)).items():  # tuples become lists, as in a file
        for old in (part[name] for part in parts if name in part and body.get("step") == step):
            if old != value:
                what = f"has results of {name} {shown(old)}, not of {shown(value)}"
                also = "".join(f", {file}" for file in _written_with(Path(path)))
                raise UserError(f"{path}: {what}; rename it first{also and f', and with it{also[1:]}'}")


def _written_with(path: Path) -> list[str]:
    """The other files, as paths in its folder, of the evaluation that wrote a file: their names end alike.

    An evaluation of held-out text writes files of many names beside eval.json; others write one, and its figure.
    """
    kind, _, end = path.stem.partition(".")
    average = ".ema." in path.name

    def alike(file: Path) -> bool:
        if kind == "eval" and end and not file.name.startswith("subsets."):
            return file.stem.endswith(f".{end}") and (".ema." in file.name) == average
        return file.stem == path.stem

    found = [*path.parent.glob("*.*"), *path.parent.glob("figures/*.*")]
    return sorted(file.relative_to(path.parent).as_posix() for file in found if alike(file) and file != path)


def _read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} if there is none, or none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


# --- progress --------------------------------------------------------------------------------------------------------


class Progress:
    """Shows step, loss, tokens per second and the time left on stderr, on process 0 only.

    On a terminal it is a bar. Elsewhere lines are printed at every log step, and between them at most every `seconds`.
    The time left is that of the steps since the first, which compiles.
    """

    def __init__(self, total: int, *, initial: int = 0, seconds: float = 10.0):
        self._on = jax.process_index() == 0
        self._total, self._step, self._seconds = total, initial, seconds
        self._printed = time.perf_counter()
        self._first: tuple[int, float] | None = None  # the first step of this start, and when it was done
        self._rate = 0.0
        self._bar = None
        if self._on and sys.stderr.isatty():
            self._bar = tqdm.tqdm(total=total, initial=initial, unit="step", dynamic_ncols=True, file=sys.stderr)

    def update(self, step: int, loss: float | None = None, rate: float | None = None, *, log: bool = False) -> None:
        """Shows that `step` is done. rate: tokens per second, if there is a new value. log: whether to print now."""
        if not self._on:
            return
        loss = "" if loss is None else f"loss {loss:.4f}"
        self._rate = self._rate if rate is None else rate
        rate = f"{tqdm.tqdm.format_sizeof(self._rate)} tokens/s" if self._rate else ""
        done, self._step, now = step - self._step, step, time.perf_counter()
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(filter(None, (loss, rate))), refresh=log)
            if self._first is None:  # the bar's time and rate begin here
                self._bar.reset()
                self._bar.n = self._bar.initial = self._bar.last_print_n = step
                self._bar.refresh()
            else:
                self._bar.update(done)
        self._first = self._first or (step, now)
        if self._bar is not None or (not log and now - self._printed < self._seconds):
            return
        self._printed = now
        first, began = self._first
        left = (now - began) / (step - first) * (self._total - step) if step > first else None
        left = "" if left is None else f"{tqdm.tqdm.format_interval(left)} left"
        parts = filter(None, (f"step {step}/{self._total}", loss, rate, left))
        print("  ".join(parts), file=sys.stderr, flush=True)

    def write(self, text: str) -> None:
        """Prints a line on stdout without breaking the bar."""
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
