"""Reads what runs on mixtures of sources have measured, and keeps it with the choice of a surrogate.

Letters: n runs, M sources.
"""

import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from moe_jax.errors import FileError, UserError, nearest, shown
from moe_jax.mixtures.design import as_number, normal, read_json
from moe_jax.mixtures.surrogates import LEAST, SURROGATES


class Measured(NamedTuple):
    """A finished run. weights: shares by source. losses: held-out nats a token by domain. cost: of training, FLOPs."""

    name: str
    weights: dict[str, float]
    losses: dict[str, float]
    cost: float


class Fit(NamedTuple):
    """Runs and how a loss is predicted from them. target: the domains whose mean loss it is."""

    surrogate: str
    target: tuple[str, ...]
    seed: int
    runs: list[Measured]

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(self.runs[0].weights)

    @property
    def weights(self) -> Float[np.ndarray, "n M"]:
        return np.array([[run.weights[name] for name in self.sources] for run in self.runs])

    @property
    def losses(self) -> Float[np.ndarray, " n"]:
        return np.array([np.mean([run.losses[name] for name in self.target]) for run in self.runs])

    @property
    def levels(self) -> list[float]:
        """The different costs, the least first."""
        return sorted({run.cost for run in self.runs})


# --- reading ---------------------------------------------------------------------------------------------------------


def read_runs(paths: Sequence[Path]) -> list[Measured]:
    """The finished runs of folders of run directories, and of results.json files of `experiments/mixtures.py`.

    Raises UserError where there are none, or where runs have other sources or domains than the first; FileError for a
    file that is not what a run writes.
    """
    found: list[Measured] = []
    for path in paths:
        if path.is_file():
            rows = read_json(path)
            if not isinstance(rows, list):
                raise FileError(f"{path}: is not a list of runs, as experiments.mixtures writes it in results.json")
            found += [parse(row, f"{path}: run {i}") for i, row in enumerate(rows)]
            continue
        if not path.is_dir():
            raise UserError(f"--runs={path}: no such folder or file")
        folders = sorted(_finished(path))
        if not folders:
            rule = "holds no finished run, which is a folder with config.json and eval.json"
            raise UserError(f"--runs={path}: {rule}; python -m experiments.mixtures trains them")
        found += [read_run(folder, folder.relative_to(path).as_posix()) for folder in folders]
    check_alike(found)
    return found


def _finished(path: Path):
    for root, folders, files in os.walk(path):
        if {"config.json", "eval.json"} <= set(files):
            folders.clear()
            yield Path(root)


def read_run(folder: Path, name: str) -> Measured:
    """The results of one run directory that train.py has finished. Raises FileError."""
    from moe_jax.run import config_file, log  # these import JAX, which the other functions need not

    cfg = config_file.load_config(folder)
    if cfg.mixture.controller != "none":
        rule = "its weights change during the run, and its loss is of no one mixture"
        raise FileError(f"{folder}: mixture.controller={cfg.mixture.controller!r}: {rule}")
    try:
        found = log.read_eval(folder)
        step, rows = found["step"], found["domains"]
        losses = {row["domain"]: float(row["xent"]) for row in rows if row["domain"]}
    except (KeyError, TypeError, ValueError) as e:
        if isinstance(e, FileError):
            raise
        raise FileError(f"{folder / 'eval.json'}: is not a valid evaluation file: {type(e).__name__}: {e}") from None
    if step != cfg.train.steps:
        rule = f"is of step {shown(step)}, the training has {cfg.train.steps}: not finished, or evaluated elsewhere"
        raise FileError(f"{folder / 'eval.json'}: {rule}")
    weights = {source: held.weight for source, held in cfg.data.sources.items()}
    return parse({"name": name, "weights": weights, "losses": losses, "cost": cost_of(cfg)}, str(folder))


def cost_of(cfg) -> float:
    """The FLOPs of the training of a RunConfig."""
    from moe_jax import model

    return model.flops_per_token(cfg.model, cfg.data.seq_len) * cfg.train.steps * cfg.data.batch_size * cfg.data.seq_len


def parse(row: object, where: str) -> Measured:
    """A run from a JSON object. Raises FileError."""
    if not (isinstance(row, dict) and {"name", "weights", "losses", "cost"} <= row.keys()):
        raise FileError(f"{where}: is not an object with name, weights, losses and cost")
    if not (isinstance(row["name"], str) and isinstance(row["weights"], dict) and isinstance(row["losses"], dict)):
        raise FileError(f"{where}: name must be a text, weights and losses objects")
    number = lambda value: None if isinstance(value, str) else as_number(value)
    for name, value in row["losses"].items():
        if number(value) is None:
            raise FileError(f"{where}: loss of {shown(name)} is {shown(value)}, not a finite number")
    if not (number(row["cost"]) or 0) > 0:
        raise FileError(f"{where}: cost is {shown(row['cost'])}, not a finite number > 0")
    if not row["losses"] or len(row["weights"]) < 2:
        raise FileError(f"{where}: has no losses, or fewer than two sources")
    losses = {name: float(value) for name, value in row["losses"].items()}
    return Measured(row["name"], normal(row["weights"], where), losses, float(row["cost"]))


def check_alike(runs: list[Measured]) -> None:
    """Raises UserError unless there are runs, all of the same sources and domains, and each is there once."""
    if not runs:
        raise UserError("--runs: there is no run in them")
    for run in runs[1:]:
        for what, ours, first in (("source", run.weights, runs[0].weights), ("domain", run.losses, runs[0].losses)):
            if other := sorted(set(ours) ^ set(first)):
                hint = nearest(other[0], set(ours) & set(first))
                raise UserError(f"--runs: {what} {other[0]!r} is not in both {runs[0].name} and {run.name}; {hint}")
    there: dict[tuple, Measured] = {}
    for run in runs:
        numbers = [run.weights[name] for name in runs[0].weights] + [run.losses[name] for name in runs[0].losses]
        key = (run.cost, *(round(x, 9) for x in numbers))
        if key in there:
            rule = "have the same mixture, cost and losses: one run that is named twice"
            raise UserError(f"--runs: {there[key].name} and {run.name} {rule}")
        there[key] = run


def first_free(runs: Sequence[Measured], word: str) -> int:
    """The number from which on mixtures can be named word000, word001, … without the name of a run."""
    found = [re.fullmatch(rf"{word}(\d+)", part) for run in runs for part in run.name.split("/")]
    return max((int(match[1]) for match in found if match), default=-1) + 1


# --- fits ------------------------------------------------------------------------------------------------------------


def make_fit(runs: list[Measured], surrogate: str, target: Sequence[str] | None, seed: int) -> Fit:
    """A fit of runs. target: domains; by default all. Raises UserError for what cannot be fitted."""
    domains = list(runs[0].losses)
    for name in target or ():
        if name not in domains:
            raise UserError(f"--target={name}: is not a domain of the runs; {nearest(name, domains)}")
    if surrogate not in SURROGATES:
        raise UserError(f"--surrogate={surrogate}: is not one; {nearest(surrogate, SURROGATES)}")
    if len(runs) < LEAST:
        raise UserError(f"--runs: a fit needs {LEAST} runs or more, these are {len(runs)}")
    made = Fit(surrogate, tuple(target or domains), seed, runs)
    if len(made.levels) > 1 and surrogate != "gp":
        costs = ", ".join(f"{cost:.3g}" for cost in made.levels)
        raise UserError(f"--surrogate={surrogate}: runs of several costs ({costs} FLOPs) need --surrogate=gp")
    if np.ptp(made.weights, axis=0).max() < 1e-9:  # but for rounding
        raise UserError("--runs: all runs have the same mixture")
    return made


def to_json(fit: Fit, report: dict) -> str:
    """The text of a fit.json. report: further entries."""
    head = {"surrogate": fit.surrogate, "target": list(fit.target), "seed": fit.seed}
    return json.dumps(head | report | {"runs": [run._asdict() for run in fit.runs]}, indent=1, allow_nan=False) + "\n"


def read_fit(path: Path) -> Fit:
    """The fit of a fit.json. Raises UserError, FileError."""
    found = read_json(path)
    if not (isinstance(found, dict) and isinstance(found.get("runs"), list) and found["runs"]):
        raise FileError(f"{path}: is not a fit, which python -m moe_jax.mixtures fit writes")
    seed, target, surrogate = found.get("seed"), found.get("target"), found.get("surrogate")
    names = isinstance(target, list) and target and all(isinstance(name, str) for name in target)
    if not (names and isinstance(surrogate, str) and isinstance(seed, int) and 0 <= seed < 2**32):
        raise FileError(f"{path}: surrogate, target and seed must be a text, a list of texts and a number ≥ 0")
    runs = [parse(row, f"{path}: run {i}") for i, row in enumerate(found["runs"])]
    try:
        check_alike(runs)
        return make_fit(runs, surrogate, target, seed)
    except UserError as e:
        raise FileError(f"{path}: {e}") from None


def check_earlier(path: Path, target: Sequence[str]) -> None:
    """Raises UserError where the file is a fit for another target, or none."""
    if path.exists() and (held := read_fit(path).target) != tuple(target):
        rule = f"is a fit for {', '.join(held)}, and this one is for {', '.join(target)}"
        raise UserError(f"--out={path.parent}: fit.json {rule}; name another folder")


def finite_or_none(value: float) -> float | None:
    """A number, or None where JSON has none."""
    return value if math.isfinite(value) else None
