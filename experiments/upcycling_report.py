"""Makes a table, numbers and figures from the finished runs of `experiments/upcycling.py`.

A finished run is a run directory OUT/<arm>/seed<n> of train.py with eval.json. Without measures.json it has no loss
before training and no similarity.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import records
from experiments.balance_report import BLUE, ORANGE, cell, markdown
from moe_jax import config, model
from moe_jax.evaluate.analysis import INK
from moe_jax.evaluate.drawing import GRID, save
from moe_jax.evaluate.held_out import TOTAL
from moe_jax.run import config_file
from moe_jax.run.log import read_eval, read_metrics, write_text

SHARES = (0.25, 0.5)  # of the tokens, at which the table gives the loss, beside the start and the end
NOTES = """\
Held-out cross-entropy, nats per token, before the first step and after shares of the {tokens:.3g} training tokens.
*perplexity*: at the end. *against dense*: of the perplexity, seed by seed. *FLOPs*: of a training token, of the dense
model's. *experts apart*: 1 − cosine of two experts' matrices made of the same shard of a dense layer, at the end, mean
over layers and matrices. *shards uneven*: at the end, the variance of how often a held-out token has a shard, mean and
largest over layers; 0 if every token has complete copies. *minutes*: of training steps. `±` is the sample standard
deviation over seeds, whose number stands behind the arm.
"""


class Finished(NamedTuple):
    seed: int
    tokens: Float[np.ndarray, " n"]  # of the points of the curve, the first before any training
    loss: Float[np.ndarray, " n"]  # NaN where it was not measured
    flops_per_token: float
    parameters: tuple[int, int]  # total, active
    similarity: dict[int, dict[str, list[float]]]  # by step, by kind of matrix, by layer; {} unknown
    domains: dict[str, float]  # perplexity at the end
    unevenness: dict[int, list[float]]  # of shards, by step, by layer; {} unknown
    seconds: float  # of training steps; NaN unknown
    settings: dict[str, Any]  # see `records.settings_of`; of a record perhaps few

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss[-1], 700.0))

    def at(self, share: float) -> float:
        return float(np.interp(share * self.tokens[-1], self.tokens, self.loss))

    def apart(self) -> dict[int, float]:
        """1 − cosine of experts by step, mean over layers and kinds; {} for a dense model."""
        return {
            n: 1 - float(np.mean(np.concatenate(list(kinds.values())))) for n, kinds in self.similarity.items() if kinds
        }

    @property
    def dense(self) -> bool:
        return self.parameters[0] == self.parameters[1]


class Arm(NamedTuple):
    """The finished runs of an arm, one a seed."""

    label: str
    runs: list[Finished]

    def cell(self, value: Callable[[Finished], float], form: str) -> str:
        """Over the runs that have a value."""
        values = np.array([value(run) for run in self.runs])
        return cell(values[np.isfinite(values)], form) if np.isfinite(values).any() else ""

    def against(self, base: "Arm") -> str:
        """The difference of the perplexity to `base`, seed by seed, so that differences between seeds cancel."""
        theirs = {run.seed: run.perplexity for run in base.runs}
        shares = [run.perplexity / theirs[run.seed] - 1 for run in self.runs if run.seed in theirs]
        return cell(np.array(shares), "{:+.2%}") if shares else ""

    def uneven(self) -> str:
        """At the end, mean and largest over layers, mean over seeds."""
        last = [layers for run in self.runs for layers in [*run.unevenness.values()][-1:] if layers]
        return f"{np.mean(last):.2g}; {np.max(last, axis=1).mean():.2g}" if last else ""

    def losses(self) -> Float[np.ndarray, "seeds n"]:
        return np.stack([run.loss for run in self.runs])

    def apart(self) -> list[dict[int, float]]:
        """The distances of experts by step, of every run that has them."""
        return [found for run in self.runs if (found := run.apart())]


def costs(cfg: config.RunConfig) -> dict:
    """The costs of a model: FLOPs of a training token, total and active parameters."""
    counts = model.count_parameters(cfg.model)
    return {"flops_per_token": model.flops_per_token(cfg.model, cfg.data.seq_len),
            "parameters": [counts.total, counts.active]}  # fmt: skip


def total(by_domain: dict[str, float]) -> dict[str, float]:
    """The numbers by domain with the entry TOTAL, which earlier versions named "all"."""
    if TOTAL in by_domain:
        return by_domain
    return {name: x for name, x in by_domain.items() if name != "all"} | {TOTAL: by_domain.get("all", math.nan)}


def load_run(folder: Path) -> Finished:
    domains = read_eval(folder)["domains"]
    rows, evals = read_metrics(folder), read_metrics(folder, "eval")
    if (folder / "measures.json").is_file():
        found = json.loads((folder / "measures.json").read_text(encoding="utf-8"))
    else:
        found = {"start": {TOTAL: math.nan}, "similarity": {}} | costs(config_file.load_config(folder))
    steps, tokens = ([row[name] for row in rows] for name in ("step", "tokens"))
    seen = np.interp([row["step"] for row in evals], steps, tokens)
    losses = [math.nan if row["xent"] is None else row["xent"] for row in evals]
    losses.insert(0, total(found["start"])[TOTAL])
    return Finished(
        int(folder.name.removeprefix("seed")), np.array([0.0, *seen]), np.array(losses),
        found["flops_per_token"], tuple(found["parameters"]),
        {int(n): kinds for n, kinds in found["similarity"].items()},
        total({row["domain"]: row["perplexity"] for row in domains}),
        {int(n): layers for n, layers in found.get("unevenness", {}).items()},
        float(np.sum(np.diff(steps, prepend=0) * np.array([row.get("step_seconds", math.nan) for row in rows]))),
        records.settings_in(folder),
    )  # fmt: skip


Runs = dict[tuple[str, int], Finished]  # by arm and seed


def load(out: Path) -> Runs:
    """The finished runs of OUT/<arm>/seed<n>."""
    folders = sorted(file.parent for file in out.glob("*/seed*/eval.json"))
    return {(folder.parent.name, int(folder.name.removeprefix("seed"))): load_run(folder) for folder in folders}


def read(file: Path) -> Runs:
    """The runs of a results.json that `write` wrote."""
    found = {}
    for arm, saved in json.loads(file.read_text(encoding="utf-8")).items():
        for run in saved["runs"]:
            loss = np.array([math.nan if x is None else x for x in run["loss"]])
            similarity = {int(n): kinds for n, kinds in run["similarity"].items()}
            fields = {"tokens": np.array(run["tokens"]), "loss": loss, "similarity": similarity}
            fields["domains"] = total(run["domains"])
            fields["unevenness"] = {int(n): layers for n, layers in run.get("unevenness", {}).items()}
            fields["seconds"] = run.get("seconds") or math.nan
            found[arm, run["seed"]] = records.as_record(
                Finished, run | fields | {"parameters": tuple(run["parameters"])}
            )
    return found


def arms_of(runs: Runs, labels: dict[str, str]) -> dict[str, Arm]:
    """The arms with finished runs, in the order of `labels`, {arm: label}."""
    of = lambda name: [runs[key] for key in sorted(runs) if key[0] == name]
    return {name: Arm(label, of(name)) for name, label in labels.items() if of(name)}


def unequal(runs: Runs) -> bool:
    """Whether runs are of other domains, or those of an arm at other points, which is then printed."""
    by_name = {name: {key: run for key, run in runs.items() if key[0] == name} for name, _ in runs}
    points = (
        (lambda run: (f"{n / 1e6:.4g}M" for n in run.tokens), "numbers of tokens"),
        (lambda run: run.apart(), "steps of its experts"),
    )
    return records.unequal(runs, lambda run: run.domains) or any(
        records.unequal(its, on, what) for its in by_name.values() for on, what in points
    )


# --- text ------------------------------------------------------------------------------------------------------------


def table(arms: dict[str, Arm]) -> str:
    dense, rows = arms.get("dense"), []
    head = ["arm (seeds)", "parameters", "active", "FLOPs", "before", *(f"{share:.0%}" for share in SHARES), "end",
            "perplexity", "against dense", "experts apart", "shards uneven", "minutes"]  # fmt: skip
    for arm in arms.values():
        first = arm.runs[0]
        flops = dense and first.flops_per_token / dense.runs[0].flops_per_token
        rows.append([
            f"{arm.label} ({len(arm.runs)})", *(f"{n / 1e6:,.1f}M" for n in first.parameters),
            f"{flops:.2f}" if dense else "", arm.cell(lambda run: run.loss[0], "{:.3f}"),
            *(arm.cell(lambda run, share=share: run.at(share), "{:.3f}") for share in SHARES),
            arm.cell(lambda run: run.loss[-1], "{:.3f}"), arm.cell(lambda run: run.perplexity, "{:.2f}"),
            arm.against(dense) if dense and arm is not dense else "",
            arm.cell(lambda run: [math.nan, *run.apart().values()][-1], "{:.1e}"), arm.uneven(),
            arm.cell(lambda run: run.seconds / 60, "{:.1f}"),
        ])  # fmt: skip
    domains = list(next(iter(arms.values())).runs[0].domains)
    of_domain = lambda arm, d: arm.cell(lambda run: run.domains.get(d, math.nan), "{:.2f}")
    by_domain = [[d or "all", *(of_domain(arm, d) for arm in arms.values())] for d in domains]
    notes = NOTES.format(tokens=max(run.tokens[-1] for arm in arms.values() for run in arm.runs))
    return f"{markdown(head, rows)}\n\n{notes}\n{markdown(['perplexity', *arms], by_domain)}\n"


def numbers(arms: dict[str, Arm]) -> dict[str, dict]:
    one = lambda run: {
        "seed": run.seed, "tokens": run.tokens.tolist(), "loss": [x if math.isfinite(x) else None for x in run.loss],
        "flops_per_token": run.flops_per_token, "parameters": run.parameters, "similarity": run.similarity,
        "domains": run.domains, "unevenness": run.unevenness,
        "seconds": run.seconds if math.isfinite(run.seconds) else None, "settings": run.settings,
    }  # fmt: skip
    return {name: {"label": arm.label, "runs": [one(run) for run in arm.runs]} for name, arm in arms.items()}


def write(out: Path, arms: dict[str, Arm], formats: Sequence[str] = ("png",)) -> None:
    write_text(out / "table.md", table(arms))
    write_text(out / "results.json", json.dumps(numbers(arms), indent=1) + "\n")
    save(loss(arms), out / "loss", formats)
    save(similarity(arms), out / "similarity", formats)


# --- figures ---------------------------------------------------------------------------------------------------------


def colours(arms: dict[str, Arm]) -> dict[str, str]:
    """A colour for each arm."""
    rest = ["#2e8b6f", "#8a5fb5", "#c9a227", "#d1498b", "#6b7280", "#17a2b8", "#7a3e2b", "#86b049", "#e08b8b",
            "#9ecae1"]  # fmt: skip
    own = {"dense": INK, "exact": ORANGE, "copy": BLUE}
    return {name: own.get(name) or rest[i % len(rest)] for i, name in enumerate(arms)}


def style(axis: Axes, x: str, y: str) -> None:
    axis.set_xlabel(x, fontsize=9, color=INK)
    axis.set_ylabel(y, fontsize=9, color=INK)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color=GRID, lw=0.7)


def _line(axis: Axes, x: np.ndarray, y: Float[np.ndarray, "seeds n"], **fields) -> None:
    """Draws the mean over seeds and their range, where all seeds have values."""
    axis.plot(x, y.mean(0), marker="o", ms=2.5, lw=1.3, **fields)
    if len(y) > 1:
        axis.fill_between(x, y.min(0), y.max(0), color=fields["color"], alpha=0.2, lw=0)


def loss(arms: dict[str, Arm]) -> Figure:
    """A figure of held-out loss against tokens and against FLOPs, with dashed lines for dense models."""
    figure = Figure((12, 4.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for name, colour in colours(arms).items():
        arm, first = arms[name], arms[name].runs[0]
        line = "--" if first.dense else "-"
        for axis, x in zip(axes, (first.tokens / 1e6, first.tokens * first.flops_per_token / 1e15), strict=True):
            _line(axis, x, np.stack([run.loss for run in arm.runs]), color=colour, label=arm.label, ls=line)
    # Models that do not compute the dense function begin far above: the axis shows the others' curves.
    ends = [run.loss[-1] for arm in arms.values() for run in arm.runs]
    top = float(np.nanmedian([run.loss[0] for arm in arms.values() for run in arm.runs]))
    axes[0].set_ylim(min(ends) - 0.05 * (top - min(ends)), top + 0.15 * (top - min(ends)))
    style(axes[0], "million tokens", "held-out loss, nats per token")
    style(axes[1], "PFLOP of the model", "")
    axes[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def similarity(arms: dict[str, Arm]) -> Figure:
    """A figure of the distance of two experts that were made of the same shard, over the training."""
    figure = Figure((7.5, 3.8), layout="constrained")
    axis = figure.subplots()
    for name, colour in colours(arms).items():
        if found := arms[name].apart():
            steps = [n for n in found[0] if n > 0]  # copies are not apart before training
            values = np.array([[run[n] for n in steps] for run in found])
            x = np.array(steps) / max(steps) * arms[name].runs[0].tokens[-1] / 1e6
            _line(axis, x, values, color=colour, label=arms[name].label)
    style(axis, "million tokens", "1 − cosine of two experts")
    if axis.lines:
        axis.set_yscale("log")
        axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
