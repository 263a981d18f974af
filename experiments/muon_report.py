"""Makes tables, numbers and figures from the finished runs of `experiments/muon.py`.

A finished run is a run directory of train.py with eval.json, anywhere in OUT/*/seed*; its config tells which run it is.
Or it is an entry of a results.json, which holds all numbers that are compared.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from experiments import records
from experiments.balance_report import LAST, cell, markdown
from moe_jax.run.log import read_eval, read_metrics, write_text

NAMES = {"adamw": "AdamW", "muon": "Muon"}
DEFAULT_RMS, DEFAULT_DECAY = 0.2, 0.1
GROUPS = ("attention", "expert", "router")  # of kinds, for the SVD entropy
ORDER = ("embedding", "head", "q", "k", "v", "o", "gate", "up", "down", "router")  # of kinds, by their last word


class Curve(NamedTuple):
    """A loss over a run. Its seconds are of training only, without compilation, evaluation and saving."""

    tokens: Float[np.ndarray, " n"]
    seconds: Float[np.ndarray, " n"]
    loss: Float[np.ndarray, " n"]


class Finished(NamedTuple):
    optimizer: str
    lr: float
    update_rms: float
    weight_decay: float
    steps: int
    seed: int
    tokens: float
    train: Curve  # trailing mean over `LAST` of the run's steps
    held_out: Curve
    perplexity: float
    step_ms: float  # median
    matrices: dict[str, Any] | None  # of muon_matrices
    settings: dict[str, Any]  # see `records.settings_of`; of a record perhaps few

    @property
    def key(self) -> tuple:
        """The settings that distinguish the run from others."""
        return self.optimizer, self.lr, self.update_rms, self.weight_decay, self.steps, self.seed

    @property
    def losses(self) -> tuple[float, float]:
        """The final losses of training and of held-out text."""
        return float(self.train.loss[-1]), float(self.held_out.loss[-1])


# --- runs ------------------------------------------------------------------------------------------------------------


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def trailing(loss: np.ndarray, step: np.ndarray, window: float) -> np.ndarray:
    """The mean over the rows of the last `window` steps, at every row."""
    return np.array([loss[(step > s - window) & (step <= s)].mean() for s in step])


def load_run(folder: Path) -> Finished:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    total = read_eval(folder)["domains"][-1]
    rows, evals = read_metrics(folder), read_metrics(folder, "eval")
    column = lambda name: np.array([_number(row[name]) for row in rows])
    step, tokens, per_step = column("step"), column("tokens"), column("step_seconds")
    seconds = np.cumsum(per_step * np.diff(step, prepend=0))
    steps, optim = config["train"]["steps"], config["optim"]
    train = Curve(tokens, seconds, trailing(column("xent"), step, max(1.0, LAST * steps)))
    at = np.array([row["step"] for row in evals])
    losses = np.array([_number(row["xent"]) for row in evals])
    held_out = Curve(np.interp(at, step, tokens), np.interp(at, step, seconds), losses)
    file = folder / "matrices.json"
    return Finished(
        optim["name"], optim["lr"], optim["update_rms"], optim["weight_decay"], steps, config["seed"],
        float(tokens[-1]), train, held_out, total["perplexity"], 1e3 * float(np.median(per_step)),
        json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None, records.settings_in(folder),
    )  # fmt: skip


def load(out: Path) -> list[Finished]:
    return [load_run(file.parent) for file in sorted(out.glob("*/seed*/eval.json"))]


def read(file: Path) -> list[Finished]:
    """The runs of a results.json that `write` wrote."""

    def one(saved: dict) -> Finished:
        curve = lambda name: Curve(**{k: np.array([_number(x) for x in v]) for k, v in saved[name].items()})
        return records.as_record(Finished, saved | {"train": curve("train"), "held_out": curve("held_out")})

    return [one(saved) for saved in json.loads(file.read_text(encoding="utf-8"))["runs"]]


def merge(known: Iterable[Finished], new: Iterable[Finished]) -> list[Finished]:
    """The runs of both, each once. A run in `new` replaces the same run in the other."""
    return list(({run.key: run for run in known} | {run.key: run for run in new}).values())


class Comparison:
    """The runs by their purpose. `best`: the run of a sweep's learning rate with the lowest held-out loss of seed 0."""

    def __init__(self, runs: list[Finished]):
        self.runs, self.most = runs, max(run.steps for run in runs)
        whole = lambda r: r.steps == self.most and r.update_rms == DEFAULT_RMS and r.weight_decay == DEFAULT_DECAY
        self.sweep = {
            name: sorted((r for r in runs if r.optimizer == name and r.seed == 0 and whole(r)), key=lambda r: r.lr)
            for name in NAMES
        }
        by_loss = lambda r: (math.isnan(r.losses[1]), r.losses[1])
        self.best = {name: min(found, key=by_loss) for name, found in self.sweep.items() if found}
        self.seeds = {
            name: sorted(
                (r for r in runs if r.optimizer == name and whole(r) and r.lr == best.lr), key=lambda r: r.seed
            )
            for name, best in self.best.items()
        }
        self.shorter, self.by_rms = [], []
        if muon := self.best.get("muon"):
            like = lambda r: r.optimizer == "muon" and r.lr == muon.lr and r.seed == 0
            self.shorter = sorted((r for r in runs if like(r) and r.update_rms == DEFAULT_RMS
                                   and r.weight_decay == DEFAULT_DECAY), key=lambda r: r.tokens)  # fmt: skip
            self.by_rms = sorted((r for r in runs if like(r) and r.steps == self.most
                                  and r.weight_decay == DEFAULT_DECAY), key=lambda r: r.update_rms)  # fmt: skip
        self.no_decay = {
            r.optimizer: r
            for r in runs
            if r.weight_decay == 0 and r.optimizer in self.best and r.lr == self.best[r.optimizer].lr
        }


# --- tokens needed ---------------------------------------------------------------------------------------------------


def crossing(tokens: np.ndarray, loss: np.ndarray, target: float) -> float:
    """Number of tokens at which the loss first reaches the target, interpolated linearly in log tokens.

    −inf if the first point is already below it, inf if no point is.
    """
    below = np.flatnonzero(loss <= target)
    if not len(below):
        return math.inf
    i = int(below[0])
    if i == 0:
        return -math.inf
    x, y = np.log(tokens[i - 1 : i + 1]), loss[i - 1 : i + 1]
    return float(np.exp(x[0] + (x[1] - x[0]) * (y[0] - target) / (y[0] - y[1])))


def tokens_needed(c: Comparison) -> dict[str, list[float]]:
    """The ratio of Muon's tokens to AdamW's at AdamW's final loss, for each seed of AdamW; {} without these runs."""
    if len(c.best) < 2:
        return {}
    out, one = {}, c.best["muon"]
    tokens = np.array([run.tokens for run in c.shorter])
    for i, text in enumerate(("training", "held-out")):
        ends = np.array([run.losses[i] for run in c.shorter])
        curve = (one.train, one.held_out)[i]
        targets = [(run.losses[i], run.tokens) for run in c.seeds["adamw"]]
        if len(c.shorter) > 1:
            out[f"runs of their own, {text} loss"] = [crossing(tokens, ends, goal) / n for goal, n in targets]
        out[f"along one run, {text} loss"] = [crossing(curve.tokens, curve.loss, goal) / n for goal, n in targets]
    return out


def _share(values: list[float], least: float) -> str:
    """Mean and spread as text; only a bound if the value is outside the range of the runs."""
    if all(math.isfinite(v) for v in values):
        return cell(np.array(values), "{:.1%}")
    if any(v == math.inf for v in values):
        return "> 100%" if all(v == math.inf for v in values) else "around 100%"
    return f"< {least:.0%}"


# --- tables ----------------------------------------------------------------------------------------------------------


def _losses(run: Finished | None) -> list[str]:
    return [f"{loss:.3f}" for loss in run.losses] if run else ["", ""]


def _sweep_table(c: Comparison) -> str:
    rates = sorted({run.lr for runs in c.sweep.values() for run in runs})
    rows = []
    for rate in rates:
        row = [f"{rate:g}"]
        for name in c.best:
            run = next((r for r in c.sweep[name] if r.lr == rate), None)
            row += [f"**{x}**" if run is c.best[name] else x for x in _losses(run)]
        rows.append(row)
    return markdown(["learning rate", *(f"{NAMES[n]}, {t}" for n in c.best for t in ("training", "held-out"))], rows)


def _best_table(c: Comparison) -> str:
    rows = []
    for name, runs in c.seeds.items():
        column = lambda of, form, runs=runs: cell(np.array([of(run) for run in runs]), form)
        rows.append([
            f"{NAMES[name]} ({len(runs)})", f"{c.best[name].lr:g}", column(lambda r: r.losses[0], "{:.3f}"),
            column(lambda r: r.losses[1], "{:.3f}"), column(lambda r: r.perplexity, "{:.2f}"),
            column(lambda r: r.step_ms, "{:.1f}"), column(lambda r: r.train.seconds[-1], "{:.0f}"),
        ])  # fmt: skip
    text = markdown(["optimizer (seeds)", "learning rate", "training loss", "held-out loss", "perplexity", "ms a step",
                     "seconds"], rows)  # fmt: skip
    pairs = [(a, m) for a in c.seeds.get("adamw", []) for m in c.seeds.get("muon", []) if a.seed == m.seed]
    if pairs:
        gaps = [cell(np.array([m.losses[i] - a.losses[i] for a, m in pairs]), "{:+.3f}") for i in (0, 1)]
        text += f"\n\nMuon against AdamW, seed by seed: training {gaps[0]}, held-out {gaps[1]} nats per token."
    ends = [NAMES[n] for n, runs in c.sweep.items() if len(runs) > 1 and c.best[n] in (runs[0], runs[-1])]
    return text + (f"\n\nThe best rate is at an end of the sweep: {', '.join(ends)}." if ends else "")


def _tokens_table(c: Comparison) -> str:
    least = c.shorter[0].tokens / c.best["adamw"].tokens
    of_own = [[f"{run.tokens / 1e6:.0f}M", f"{run.tokens / c.best['adamw'].tokens:.0%}", *_losses(run)]
              for run in c.shorter]  # fmt: skip
    first = markdown(["Muon, tokens", "of AdamW's", "training loss", "held-out loss"], of_own)
    rows = [[how, _share(values, least if "own" in how else 0.0)] for how, values in tokens_needed(c).items()]
    return first + "\n\n" + markdown(["Muon's tokens to AdamW's final loss", "of AdamW's"], rows)


def in_order(kinds: Iterable[str]) -> list[str]:
    def place(kind: str) -> tuple:
        first, *rest = kind.partition(",")[0].split()  # after a comma stands a number of experts
        return first not in ORDER, first, ORDER.index(rest[-1] if rest else first), kind

    return sorted(kinds, key=place)


def _rms_of(run: Finished | None, which: str, kind: str) -> str:
    values = run and run.matrices and run.matrices[which].get(kind)
    return f"{np.sqrt(np.mean(np.square(values))):.4f}" if values else ""


def _rms_table(c: Comparison) -> str:
    kinds = ("attention q", "expert gate", "expert down", "router")
    runs = [("AdamW", c.best.get("adamw"))] + [(f"Muon {run.update_rms:g}", run) for run in c.by_rms]
    rows = [[label, *_losses(run), *(_rms_of(run, "weight_rms", kind) for kind in kinds)] for label, run in runs if run]
    return markdown(["update RMS", "training loss", "held-out loss", *(f"RMS of {kind}" for kind in kinds)], rows)


def _decay_table(c: Comparison) -> str:
    runs = {f"{NAMES[n]}, λ {DEFAULT_DECAY}": c.best[n] for n in c.best}
    runs |= {f"{NAMES[n]}, λ 0": run for n, run in c.no_decay.items()}
    text = markdown(["", "training loss", "held-out loss"], [[label, *_losses(run)] for label, run in runs.items()])
    measured = {label: run for label, run in runs.items() if run.matrices}
    if not measured:
        return text
    kinds = in_order(next(iter(measured.values())).matrices["weight_rms"])
    rows = [
        [kind, *(_rms_of(run, which, kind) for run in measured.values() for which in ("weight_rms", "update_rms"))]
        for kind in kinds
    ]
    return text + "\n\n" + markdown(["kind", *(f"{x}: {w}" for x in measured for w in ("weight", "update"))], rows)


def _entropies(run: Finished, start: str) -> dict[str, Float[np.ndarray, " L"]]:
    """SVD entropies of the kinds that begin with `start`, as means over a layer's matrices."""
    found = {k: np.array(v, float) for k, v in run.matrices["svd_entropy"].items() if k.startswith(start)}
    return {kind: np.nanmean(v.reshape(len(v), -1), axis=1) for kind, v in found.items()}


def measured(c: Comparison) -> dict[str, Finished]:
    """The best runs of both optimizers, if their matrices have been measured."""
    return {name: run for name, run in c.best.items() if run.matrices}


def kinds_of(run: Finished) -> list[str]:
    """The kinds of matrices that were measured, with their layers."""
    return [f"{kind} of {len(layers)} layers" for kind, layers in run.matrices["svd_entropy"].items()]


def _entropy_table(c: Comparison) -> str:
    runs = measured(c)
    rows = []
    for group in GROUPS:
        by_run = {name: _entropies(run, group) for name, run in runs.items()}
        for kind in in_order(next(iter(by_run.values()))):
            layers = {name: values[kind] for name, values in by_run.items()}
            row = [kind, *(f"{values.mean():.4f}" for values in layers.values())]
            if len(runs) == 2:
                gap = layers["muon"] - layers["adamw"]
                row += [f"{gap.mean():+.4f}", f"{(gap > 0).sum()} of {len(gap)}"]
            rows.append(row)
    extra = ["difference", "layers where Muon's is higher"] if len(runs) == 2 else []
    return markdown(["kind", *(NAMES[name] for name in runs), *extra], rows)


NOTES = """\
Losses in nats per token. *training*: mean over the last {last:.0%} of the steps; *held-out*: all of it, at the last
step. `±` is the sample standard deviation over seeds. *ms a step* (median) and *seconds* are of training alone, one
process a device. Bold: the best of a sweep, by the held-out loss of seed 0."""
TOKEN_NOTES = """\
*runs of their own*: Muon trained on fewer tokens, each with a whole schedule, between points linear in log tokens: the
fair comparison. *along one run*: where the curve of the whole run gets there, its learning rate still high."""
MATRIX_NOTES = """\
RMS over all matrices of a kind. *update*: of one further step, divided by the learning rate, without the decay."""


def table(c: Comparison) -> str:
    parts = ["## Learning rates\n", _sweep_table(c), "", NOTES.format(last=LAST), "\n## At the best rates\n",
             _best_table(c)]  # fmt: skip
    if len(c.best) == 2:
        parts += ["\n## Tokens\n", _tokens_table(c), "", TOKEN_NOTES]
    if len(c.by_rms) > 1:
        parts += ["\n## Update RMS\n", _rms_table(c)]
    if c.no_decay:
        parts += ["\n## Weight decay\n", _decay_table(c), "", MATRIX_NOTES]
    if measured(c):
        parts += ["\n## SVD entropy\n", _entropy_table(c)]
    return "\n".join(parts) + "\n"


def as_json(c: Comparison) -> dict[str, Any]:
    def one(run: Finished) -> dict[str, Any]:
        curves = {k: {n: np.round(x, 5).tolist() for n, x in getattr(run, k)._asdict().items()}
                  for k in ("train", "held_out")}  # fmt: skip
        return run._asdict() | {"final_train": run.losses[0], "final_held_out": run.losses[1]} | curves

    best = {name: run.lr for name, run in c.best.items()}
    return {"best_lr": best, "tokens_needed": tokens_needed(c), "runs": [one(run) for run in c.runs]}


def _finite(value: Any) -> Any:
    """The value with None for infinities and NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(out: Path, c: Comparison) -> None:
    """Writes table.md and results.json."""
    write_text(out / "table.md", table(c))
    write_text(out / "results.json", json.dumps(_finite(as_json(c)), allow_nan=False) + "\n")
