"""Makes tables, numbers and a figure from the finished runs of `experiments/modalities.py`.

A finished run is a run directory of train.py with eval.json, or an entry of a results.json. Losses are nats a token, of
held-out images and of all held-out text together.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from experiments import records
from experiments.balance_report import cell, markdown
from experiments.routing_report import COLOURS, finite_or_none
from experiments.upcycling_report import style
from moe_jax import model
from moe_jax.compare.runs import training_seconds
from moe_jax.evaluate.analysis import INK
from moe_jax.evaluate.drawing import plain, save
from moe_jax.model.counts import flops_per_token
from moe_jax.run import config_file
from moe_jax.run.log import read_eval, read_metrics, write_text

MARK = "images.json"  # of a run directory: the digest of the images
IMAGES = "images"  # the domain of image tokens
MODALITIES = ("text", IMAGES)

# Column of table.md: the number's name, its heading, its format.
COLUMNS = {
    "parameters": ("parameters, M", "{:.1f}"),
    "active": ("active, M", "{:.1f}"),
    "mflops": ("MFLOPs a token", "{:.1f}"),
    "step_ms": ("a step, ms", "{:.0f}"),
}
NOTES = """\
Held-out loss in nats a token at the last step; `±` is the sample standard deviation over seeds. *against {base}*:
difference between runs of the same seed. *steps*, *time*: when the loss is first that of {base} at its end, as a share
of the steps and of the training time that {base} took; linear between evaluations; empty if it never is. *active*:
parameters that a token uses, with embedding and head. *MFLOPs a token*: of training, by formula. *a step*: median over
the run; runs that share a GPU slow each other down.
"""


class Finished(NamedTuple):
    """The results of one run, with what tells whether another run would be the same."""

    arm: str
    seed: int
    settings: dict[str, Any]  # see `records.settings_of`
    options: dict[str, Any]  # what tells the images from others of the same number: "data", a digest
    numbers: dict[str, float]  # by the names of `COLUMNS`
    domains: dict[str, float]  # held-out loss at the end
    steps: list[int]  # of the evaluations
    seconds: list[float]  # of training until each, without compilation and evaluations
    loss: dict[str, list[float]]  # by modality, of each evaluation

    def until(self, modality: str, loss: float) -> tuple[float, float]:
        """The step and the seconds at which the loss of a modality is first so low; NaN if it never is."""
        values = np.array(self.loss[modality])
        below = np.flatnonzero(values <= loss)
        if not len(below):
            return np.nan, np.nan
        at = below[0]
        if at == 0:
            return float(self.steps[0]), self.seconds[0]
        part = (values[at - 1] - loss) / (values[at - 1] - values[at])
        between = lambda x: float(x[at - 1] + part * (x[at] - x[at - 1]))
        return between(self.steps), between(self.seconds)


Runs = dict[tuple[str, int], Finished]  # by arm and seed


# --- runs ------------------------------------------------------------------------------------------------------------


def images(folder: Path) -> dict[str, Any]:
    """The digest of the images that a run directory was begun with; {} if it is not known."""
    file = folder / MARK
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def load_run(arm: str, folder: Path) -> Finished:
    """The results of a run directory."""
    cfg = config_file.load_config(folder)
    *domains, _ = read_eval(folder)["domains"]
    tokens = {row["domain"]: row["tokens"] for row in domains}
    train, evaluations = read_metrics(folder), read_metrics(folder, kind="eval")

    took = np.array([row["step_seconds"] for row in train])
    ends = np.array([row["step"] for row in train])
    clock = training_seconds(ends, took)
    loss = {}
    for modality in MODALITIES:
        mine = {name: n for name, n in tokens.items() if (name == IMAGES) == (modality == IMAGES)}
        known = lambda x: np.nan if x is None else x  # a loss that was not finite
        sums = [math.fsum(n * known(row[f"{name}/xent"]) for name, n in mine.items()) for row in evaluations]
        loss[modality] = [float(f"{total / sum(mine.values()):.5f}") for total in sums]
    counts = model.count_parameters(cfg.model)
    numbers = {
        "parameters": counts.total / 1e6,
        "active": counts.active / 1e6,
        "mflops": flops_per_token(cfg.model, cfg.data.seq_len) / 1e6,
        "step_ms": 1e3 * float(np.median(took)),
    }
    steps = [row["step"] for row in evaluations]
    seconds = [round(float(np.interp(step, ends, clock)), 3) for step in steps]
    finals = {row["domain"]: np.nan if row["xent"] is None else row["xent"] for row in domains}
    return Finished(arm, cfg.seed, records.settings_in(folder), images(folder), numbers, finals, steps, seconds, loss)


def load(out: Path, arms: Sequence[str], seeds: Sequence[int]) -> Runs:
    """The finished runs of OUT/<arm>/seed<n>."""
    folders = {(name, seed): out / name / f"seed{seed}" for name in arms for seed in seeds}
    return {key: load_run(key[0], path) for key, path in folders.items() if (path / "eval.json").is_file()}


def read(file: Path) -> Runs:
    """The runs of a results.json that `write` wrote."""
    saved = json.loads(file.read_text(encoding="utf-8"))["runs"]
    number = lambda x: np.nan if x is None else x
    for run in saved:
        run["domains"] = {name: number(x) for name, x in run["domains"].items()}
        run["loss"] = {name: [number(x) for x in values] for name, values in run["loss"].items()}
    return {(run["arm"], run["seed"]): records.as_record(Finished, run) for run in saved}


def as_text(runs: list[Finished]) -> str:
    """The text of results.json, a run a line. Losses that are not finite are null."""
    lines = [json.dumps(finite_or_none(run._asdict()), allow_nan=False) for run in runs]
    return '{"runs": [\n' + ",\n".join(lines) + "\n]}\n"


# --- table and figure ------------------------------------------------------------------------------------------------


def by_arm(finished: Runs, labels: dict[str, str]) -> dict[str, list[Finished]]:
    """The runs of each arm, sorted by seed, in the order of `labels`. An arm without runs is left out."""
    found = {name: sorted((r for r in finished.values() if r.arm == name), key=lambda r: r.seed) for name in labels}
    return {name: runs for name, runs in found.items() if runs}


def _known(values: list[float], form: str) -> str:
    """The cell of those values that are numbers."""
    known = np.array([value for value in values if not np.isnan(value)])
    return cell(known, form) if len(known) else ""


def _against(runs: list[Finished], base: list[Finished], modality: str) -> list[str]:
    """Cells: loss, difference to the runs of `base` with the same seeds, share of their steps and of their time."""
    pairs = [(run, other) for run in runs for other in base if run.seed == other.seed and run is not other]
    last = lambda run: run.loss[modality][-1]
    shares = []
    for run, other in pairs:
        step, seconds = run.until(modality, last(other))
        shares.append((step / other.steps[-1], seconds / other.seconds[-1]))
    return [
        cell(np.array([last(run) for run in runs]), "{:.3f}"),
        _known([last(run) - last(other) for run, other in pairs], "{:+.3f}"),
        *(_known([share[i] for share in shares], "{:.0%}") for i in range(2)),
    ]


def table(arms: dict[str, list[Finished]], labels: dict[str, str]) -> str:
    """Markdown: a row an arm, then the loss of every domain."""
    base = next(iter(arms))
    head = ["model (seeds)"]
    for modality in MODALITIES:
        head += [modality, f"against {labels[base]}", "steps", "time"]
    rows = []
    for name, runs in arms.items():
        row = [f"{labels[name]} ({len(runs)})"]
        for modality in MODALITIES:
            row += _against(runs, arms[base], modality)
        rows.append(row + [_known([run.numbers[key] for run in runs], form) for key, (_, form) in COLUMNS.items()])
    values = lambda runs, domain: np.array([run.domains[domain] for run in runs])
    by_domain = [
        [domain, *(cell(values(runs, domain), "{:.3f}") for runs in arms.values())] for domain in arms[base][0].domains
    ]
    parts = [markdown(head + [heading for heading, _ in COLUMNS.values()], rows), "", NOTES.format(base=labels[base]),
             "Held-out loss by domain, nats a token:\n",
             markdown(["domain", *(labels[name] for name in arms)], by_domain), ""]  # fmt: skip
    return "\n".join(parts)


def figure(arms: dict[str, list[Finished]], labels: dict[str, str]) -> Figure:
    """Held-out loss of text and of images against steps and against seconds of training, a line an arm."""
    drawn = Figure((9.6, 6.4), layout="constrained")
    axes = drawn.subplots(2, 2, sharey="row")
    for modality, row in zip(MODALITIES, axes, strict=True):
        for axis, name in zip(row, ("steps", "seconds"), strict=True):
            for arm, runs in arms.items():
                colour = COLOURS[list(labels).index(arm)]
                for i, run in enumerate(runs):
                    label = plain(labels[arm]) if i == 0 else None
                    axis.plot(getattr(run, name), run.loss[modality], color=colour, lw=1.5, marker="o", ms=2.5,
                              label=label)  # fmt: skip
            style(axis, "step" if name == "steps" else "seconds of training", "")
            axis.set_xlim(left=0)
        ends = [run.loss[modality] for runs in arms.values() for run in runs]
        finite = [x for one in ends for x in one[1:] or one if np.isfinite(x)]  # the first ones are far above
        if finite:
            low, high = min(finite), max(finite)
            row[0].set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low) + 1e-3)
        row[0].set_title(f"{modality}: held-out loss, nats a token", fontsize=10, color=INK, loc="left")
    axes[0, 0].legend(fontsize=8, frameon=False)
    return drawn


def write(out: Path, finished: Runs, labels: dict[str, str], formats: Sequence[str] = ("png",)) -> None:
    """Writes table.md, results.json and the figure into OUT."""
    arms = by_arm(finished, labels)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "table.md", table(arms, labels))
    write_text(out / "results.json", as_text([run for runs in arms.values() for run in runs]))
    save(figure(arms, labels), out / "modalities", formats)
