"""Finds run directories and reads what runs have written in them. Nothing is computed on a device.

Letters: n rows of a curve, L layers with experts, G domains, E experts.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from moe_jax.errors import FileError, UserError, nearest
from moe_jax.evaluate import analysis
from moe_jax.moe.stats import RouterStats
from moe_jax.run import config_file
from moe_jax.run.log import read_eval, read_metrics

AXES = ("step", "tokens", "seconds")  # by which losses of runs are compared
SLOW = 5  # times the median, above which a step has compiled
# Of a task in eval.json, and how they are called. The choice that is most probable, or so for each character.
MEASURES = {"acc": "accuracy", "acc_per_char": "accuracy per character", "bits_per_byte": "bits per byte"}


class Curve(NamedTuple):
    """Columns of a run's `metrics.jsonl`, each [n]. A value that was not finite, or is missing, is NaN.

    step, tokens: since the start of training. seconds: of training only, without compilation, evaluation and saving.
    """

    step: Float[np.ndarray, " n"]
    tokens: Float[np.ndarray, " n"]
    seconds: Float[np.ndarray, " n"]
    values: dict[str, Float[np.ndarray, " n"]]


class Layer(NamedTuple):
    """A layer's router on held-out text. max_load: largest load of an expert ÷ mean, from 1. specialisation: mutual
    information of expert and domain, in bits. dead: number of experts without a token."""

    max_load: float
    specialisation: float
    dead: int


class Run(NamedTuple):
    """A run as it lies on the disk.

    name: its folder, relative to the folder that all compared runs are in. config: value by dotted name of the field.
    changed: steps from which it went on with other settings. tokenizer: fingerprint; "" if the run has none.
    training, held_out: curves with the value xent, and max_load, load_cv and dropped, or bits_per_byte, if logged.
    evaluation: content of eval.json; None without one. layers: from it, in order of depth.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    changed: tuple[int, ...]
    tokenizer: str
    training: Curve
    held_out: Curve
    evaluation: dict[str, Any] | None
    layers: list[Layer]

    @property
    def domains(self) -> dict[str, dict[str, Any]]:
        """The rows of eval.json by domain, without that of all domains together."""
        rows = (self.evaluation or {}).get("domains", [])
        return {row["domain"]: row for row in rows if row["domain"]}

    def experts(self) -> dict[str, analysis.Analysis]:
        """The analyses that eval.py wrote, by bank of layers; empty if it has not run. Raises FileError."""
        files = sorted(self.folder.glob("analysis*.npz"))
        named = {found[1]: path for path in files if (found := re.fullmatch(r"analysis(_\d+)?\.npz", path.name))}
        return {bank or "": analysis.load(path) for bank, path in named.items()}


# --- finding ---------------------------------------------------------------------------------------------------------


def is_run(folder: Path) -> bool:
    """Whether a folder is the directory of a run that has logged or evaluated something."""
    return (folder / "config.json").is_file() and any((folder / n).is_file() for n in ("metrics.jsonl", "eval.json"))


def find(paths: Sequence[str]) -> list[Path]:
    """The run directories that are named, and those anywhere inside folders that are named, each once.

    Runs inside a folder are in the order of their names, numbers in them by value. Raises UserError.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            there = [p.as_posix() for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
            hint = f"; {nearest(path.as_posix(), there)}" if there else ""
            raise UserError(f"{path}: {'is a file, not a run directory' if path.exists() else 'no such folder'}{hint}")
        inside = [path] if is_run(path) else sorted(_inside(path), key=_natural)
        if not inside:
            rule = "is neither a run directory with metrics.jsonl or eval.json nor a folder of such"
            hint = (
                f"eval.py --workdir={path} writes eval.json"
                if (path / "config.json").is_file()
                else ("name directories that train.py wrote")
            )
            raise UserError(f"{path}: {rule}; {hint}")
        found += inside
    unique = list({os.path.realpath(folder): folder for folder in found}.values())
    if len(unique) < 2:
        what = f"{len(unique)} run is" if unique else "no runs are"
        raise UserError(f"{what} named; a comparison needs two or more, or a folder of them: runs/a runs/b")
    return unique


def left_out(paths: Sequence[str]) -> list[Path]:
    """The directories with checkpoints, anywhere inside these folders, that have nothing to compare."""
    found = [Path(root) for path in paths if not is_run(Path(path)) for root, folders, _ in os.walk(path)
             if "checkpoints" in folders]  # fmt: skip
    return sorted((folder for folder in found if not is_run(folder)), key=_natural)


def _inside(folder: Path) -> Iterable[Path]:
    for root, folders, _ in os.walk(folder):
        if is_run(Path(root)):
            folders.clear()  # checkpoints and exports inside a run are not runs
            yield Path(root)


def _natural(path: Path) -> list:
    """A key for sorting by which lr0.0003 comes before lr0.001, and a2 before a10."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e-?\d+)?)", path.as_posix())
    return [(float(part), part) if i % 2 else (math.inf, part) for i, part in enumerate(parts)]


# --- reading ---------------------------------------------------------------------------------------------------------


def read(folders: Sequence[Path]) -> list[Run]:
    """The runs in these folders. Raises FileError or CheckpointError for a file that is not what a run writes."""
    parents = {os.path.realpath(folder): os.path.dirname(os.path.realpath(folder)) for folder in folders}
    above = os.path.commonpath(list(parents.values()))
    return [_read(folder, Path(os.path.relpath(os.path.realpath(folder), above)).as_posix()) for folder in folders]


def _read(folder: Path, name: str) -> Run:
    values = config_file.values(folder)
    logged = (folder / "metrics.jsonl").is_file()
    try:
        training = _training(read_metrics(folder) if logged else [])
        held_out = _held_out(read_metrics(folder, "eval") if logged else [], training)
    except (KeyError, TypeError, ValueError) as e:
        if isinstance(e, FileError):
            raise
        raise FileError(f"{folder / 'metrics.jsonl'}: is not a valid metrics file: {type(e).__name__}: {e}") from None
    evaluation = read_eval(folder) if (folder / "eval.json").is_file() else None
    try:
        counted = evaluation is not None and "tokens_per_expert" in evaluation  # not if it has benchmarks alone
        layers = _layers(evaluation, values.get("model.moe.identity_experts", 0)) if counted else []
        for row in (evaluation or {}).get("domains", []):
            _ = float(row["xent"]), float(row["bits_per_byte"]), row["domain"]
        _ = int((evaluation or {}).get("step", 0))
        for row in (evaluation or {}).get("tasks", {}).values():
            _ = row.get("digest"), [(float(row[n]), float(row[f"{n}_se"])) for n in MEASURES if n in row]
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as e:
        raise FileError(f"{folder / 'eval.json'}: is not a valid evaluation file: {type(e).__name__}: {e}") from None
    return Run(name, folder, values, _changes(folder), _fingerprint(folder), training, held_out, evaluation, layers)


def _column(rows: list[dict], name: str) -> Float[np.ndarray, " n"]:
    return np.array([math.nan if row.get(name) is None else row[name] for row in rows], float)


def _steps(rows: list[dict]) -> Float[np.ndarray, " n"]:
    return np.array([row["step"] for row in rows], float)


def training_seconds(step: Float[np.ndarray, " n"], step_seconds: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Seconds of training until each row of the log, without compilation.

    The first step of a process compiles, and where rows are of one step each it has a row of its own. The first step of
    a run counts as the median of the other rows, and so does a row of one step of more than `SLOW` times that: a
    process that goes on with a run leaves no other mark.
    """
    if len(step) < 2:
        return np.cumsum(step_seconds * np.diff(step, prepend=0))
    width, seconds = np.diff(step, prepend=0), np.array(step_seconds, float)
    typical = np.nanmedian(seconds[1:]) if step[0] == 1 else np.nanmedian(seconds)
    compiles = (width == 1) & ((step == 1) | (seconds > SLOW * typical))
    return np.cumsum(np.where(compiles, typical, seconds) * width)


def _training(rows: list[dict]) -> Curve:
    step, seconds = _steps(rows), _column(rows, "step_seconds")
    names = ("xent", "max_load", "load_cv", "dropped")
    values = {name: _column(rows, name) for name in names if any(name in row for row in rows)}
    return Curve(step, _column(rows, "tokens"), training_seconds(step, seconds), values)


def _held_out(rows: list[dict], training: Curve) -> Curve:
    rows = list({row["step"]: row for row in rows}.values())
    step = _steps(rows)

    def between(values: np.ndarray) -> np.ndarray:
        """The values at the steps of the evaluations: rows of training may be of other steps."""
        known = ~np.isnan(values)
        return np.interp(step, [0, *training.step[known]], [0, *values[known]], right=math.nan)

    values = {name: _column(rows, name) for name in ("xent", "bits_per_byte")}
    return Curve(step, between(training.tokens), between(training.seconds), values)


def _layers(evaluation: dict[str, Any], identity_experts: int) -> list[Layer]:
    found = []
    for counts, tokens in zip(evaluation["tokens_per_expert"], evaluation["tokens_per_layer_and_domain"], strict=True):
        load, tokens = np.array(counts, float)[None], np.array(tokens, float)[None]  # [1, G, E], [1, G]
        real = load[..., : load.shape[-1] - identity_experts]
        stats = RouterStats(tokens, real, None, None, None)
        spread = analysis.specialisation(stats._replace(tokens_per_expert=load))
        dead = analysis.dead_experts(real.sum(1))
        found.append(Layer(float(analysis.max_load(stats)[0]), float(spread[0]), int(dead[0])))
    return found


def _changes(folder: Path) -> tuple[int, ...]:
    """The steps from which the run had other settings, one a line of its history that can be read."""
    path = folder / config_file.HISTORY
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        return tuple(int(json.loads(line)["from_step"]) for line in lines)
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise FileError(f"{path}: is not a valid history: {type(e).__name__}: {e}") from None


def _fingerprint(folder: Path) -> str:
    try:
        kept = json.loads((folder / "tokenizer_settings.json").read_text(encoding="utf-8"))
        return str(kept.get("fingerprint", ""))
    except (OSError, ValueError, AttributeError):  # runs of weights may have none
        return ""
