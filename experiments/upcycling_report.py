"""The comparison of `experiments/upcycling.py`: measured runs → table, numbers and figures.

A measured run is a run directory of train.py with eval.json and measures.json, OUT/<arm>/seed<n>.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.balance_report import BLUE, ORANGE, OTHERS, cell, markdown
from moe_jax.analysis import INK
from moe_jax.figures import GRID
from moe_jax.metrics import read_metrics

SHARES = (0.25, 0.5)  # of the tokens, at which the table gives the loss, beside the start and the end
NOTES = """\
Held-out cross-entropy, nats per token, before the first step and after shares of the {tokens:.3g} training tokens.
*perplexity*: at the end. *against dense*: of the perplexity, seed by seed. *FLOPs*: of a training token, of the dense
model's. *experts alike*: mean cosine of two experts' matrices made of the same shard of a dense layer, at the end, mean
over layers and matrices. `±` is the sample standard deviation over seeds, whose number stands behind the arm.
"""


class Measured(NamedTuple):
    seed: int
    tokens: Float[np.ndarray, " n"]  # of the points of the curve, the first before any training
    loss: Float[np.ndarray, " n"]
    flops_per_token: float
    parameters: tuple[int, int]  # total, active
    similarity: dict[int, dict[str, list[float]]]  # by step, by kind of matrix, by layer; {} for dense models
    domains: dict[str, float]  # perplexity at the end

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss[-1], 700.0))

    def at(self, share: float) -> float:
        return float(np.interp(share * self.tokens[-1], self.tokens, self.loss))

    def alike(self) -> dict[int, float]:
        """Similarity by step, mean over layers and kinds."""
        return {n: float(np.mean(list(kinds.values()))) for n, kinds in self.similarity.items() if kinds}


class Arm(NamedTuple):
    """The measured runs of an arm, one a seed."""

    label: str
    runs: list[Measured]

    def cell(self, value: Callable[[Measured], float], form: str) -> str:
        return cell(np.array([value(run) for run in self.runs]), form)

    def against(self, base: "Arm") -> str:
        """Perplexity against `base`, seed by seed: what differs between seeds alike in both does not count."""
        theirs = {run.seed: run.perplexity for run in base.runs}
        shares = [run.perplexity / theirs[run.seed] - 1 for run in self.runs if run.seed in theirs]
        return cell(np.array(shares), "{:+.2%}") if shares else ""

    def losses(self) -> Float[np.ndarray, "seeds n"]:
        return np.stack([run.loss for run in self.runs])

    def alike(self) -> Float[np.ndarray, "seeds n"]:
        """Experts' similarity at the checkpoints of every run, [seeds, 0] for dense models."""
        return np.array([list(run.alike().values()) for run in self.runs])


def load_run(folder: Path) -> Measured:
    found = json.loads((folder / "measures.json").read_text())
    domains = json.loads((folder / "eval.json").read_text())["domains"]
    rows, evals = read_metrics(folder), read_metrics(folder, "eval")
    steps, tokens = ([row[name] for row in rows] for name in ("step", "tokens"))
    seen = np.interp([row["step"] for row in evals], steps, tokens)
    losses = [math.nan if row["xent"] is None else row["xent"] for row in evals]
    return Measured(
        int(folder.name.removeprefix("seed")), np.array([0.0, *seen]), np.array([found["start"]["all"], *losses]),
        found["flops_per_token"], tuple(found["parameters"]),
        {int(n): kinds for n, kinds in found["similarity"].items()},
        {row["domain"]: row["perplexity"] for row in domains},
    )  # fmt: skip


def load(out: Path, arms: dict[str, tuple[str, tuple[int, ...]]]) -> dict[str, Arm]:
    """The measured runs in the order of `arms`, {name: (label, seeds)}; arms with none are left out."""
    found = {}
    for name, (label, seeds) in arms.items():
        folders = [out / name / f"seed{seed}" for seed in seeds]
        products = ("measures.json", "eval.json")
        runs = [load_run(folder) for folder in folders if all((folder / file).is_file() for file in products)]
        if runs:
            found[name] = Arm(label, runs)
    return found


# --- text ------------------------------------------------------------------------------------------------------------


def table(arms: dict[str, Arm]) -> str:
    dense, rows = arms.get("dense"), []
    head = ["arm (seeds)", "parameters", "active", "FLOPs", "before", *(f"{share:.0%}" for share in SHARES), "end",
            "perplexity", "against dense", "experts alike"]  # fmt: skip
    for arm in arms.values():
        first = arm.runs[0]
        flops = dense and first.flops_per_token / dense.runs[0].flops_per_token
        rows.append([
            f"{arm.label} ({len(arm.runs)})", *(f"{n / 1e6:,.1f}M" for n in first.parameters),
            f"{flops:.2f}" if dense else "", arm.cell(lambda run: run.loss[0], "{:.3f}"),
            *(arm.cell(lambda run, share=share: run.at(share), "{:.3f}") for share in SHARES),
            arm.cell(lambda run: run.loss[-1], "{:.3f}"), arm.cell(lambda run: run.perplexity, "{:.2f}"),
            arm.against(dense) if dense and arm is not dense else "",
            arm.cell(lambda run: list(run.alike().values())[-1], "{:.3f}") if arm.alike().size else "",
        ])  # fmt: skip
    domains = list(next(iter(arms.values())).runs[0].domains)
    of_domain = lambda arm, d: arm.cell(lambda run: run.domains.get(d, math.nan), "{:.2f}")
    by_domain = [[d, *(of_domain(arm, d) for arm in arms.values())] for d in domains]
    notes = NOTES.format(tokens=max(run.tokens[-1] for arm in arms.values() for run in arm.runs))
    return f"{markdown(head, rows)}\n\n{notes}\n{markdown(['perplexity', *arms], by_domain)}\n"


def numbers(arms: dict[str, Arm]) -> dict[str, dict]:
    one = lambda run: {
        "seed": run.seed, "tokens": run.tokens.tolist(), "loss": run.loss.tolist(),
        "flops_per_token": run.flops_per_token, "parameters": run.parameters, "similarity": run.similarity,
        "domains": run.domains,
    }  # fmt: skip
    return {name: {"label": arm.label, "runs": [one(run) for run in arm.runs]} for name, arm in arms.items()}


def write(out: Path, arms: dict[str, Arm]) -> None:
    (out / "table.md").write_text(table(arms))
    (out / "results.json").write_text(json.dumps(numbers(arms), indent=1) + "\n")
    loss(arms).savefig(out / "loss.png", dpi=160)
    similarity(arms).savefig(out / "similarity.png", dpi=160)


# --- figures ---------------------------------------------------------------------------------------------------------


def colours(arms: dict[str, Arm]) -> dict[str, str]:
    own = {"dense": INK, "exact": ORANGE, "copy": BLUE}
    rest = iter(OTHERS * len(arms))
    return {name: own.get(name) or next(rest) for name in arms}


def _style(axis: Axes, x: str, y: str) -> None:
    axis.set_xlabel(x, fontsize=9, color=INK)
    axis.set_ylabel(y, fontsize=9, color=INK)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color=GRID, lw=0.7)


def _line(axis: Axes, x: np.ndarray, y: Float[np.ndarray, "seeds n"], **style) -> None:
    """Mean over seeds, and their range."""
    axis.plot(x, y.mean(0), marker="o", ms=2.5, lw=1.3, **style)
    if len(y) > 1:
        axis.fill_between(x, y.min(0), y.max(0), color=style["color"], alpha=0.2, lw=0)


def loss(arms: dict[str, Arm]) -> Figure:
    """Held-out loss against tokens and against FLOPs, dense models dashed."""
    figure = Figure((12, 4.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for name, colour in colours(arms).items():
        arm, first = arms[name], arms[name].runs[0]
        style = "-" if arm.alike().size else "--"
        for axis, x in zip(axes, (first.tokens / 1e6, first.tokens * first.flops_per_token / 1e15), strict=True):
            _line(axis, x, arm.losses(), color=colour, label=arm.label, ls=style)
    # Models that do not compute the dense function begin far above: the axis shows the others' curves.
    ends = [run.loss[-1] for arm in arms.values() for run in arm.runs]
    starts = [float(np.median([run.loss[0] for arm in arms.values() for run in arm.runs])), max(ends)]
    axes[0].set_ylim(min(ends) - 0.05 * (max(starts) - min(ends)), max(starts) + 0.15 * (max(starts) - min(ends)))
    _style(axes[0], "million tokens", "held-out loss, nats per token")
    _style(axes[1], "PFLOP of the model", "")
    axes[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def similarity(arms: dict[str, Arm]) -> Figure:
    """How alike two experts made of the same shard are, over the training."""
    figure = Figure((7.5, 3.8), layout="constrained")
    axis = figure.subplots()
    for name, colour in colours(arms).items():
        arm = arms[name]
        if (alike := arm.alike()).size:
            steps = np.array(list(arm.runs[0].alike()))
            _line(axis, steps / max(steps.max(), 1) * arm.runs[0].tokens[-1] / 1e6, alike, color=colour,
                  label=arm.label)  # fmt: skip
    _style(axis, "million tokens", "mean cosine of two experts")
    if axis.lines:
        axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
