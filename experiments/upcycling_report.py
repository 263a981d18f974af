"""The comparison of `experiments/upcycling.py`: measured runs → table, numbers and figures.

A measured run is a run directory of train.py with eval.json and measures.json, OUT/<arm>/seed0.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.balance_report import BLUE, ORANGE, OTHERS, markdown
from moe_jax.analysis import INK
from moe_jax.figures import GRID
from moe_jax.metrics import read_metrics

SHARES = (0.25, 0.5)  # of the tokens, at which the table gives the loss, beside the start and the end
NOTES = """\
Held-out cross-entropy, nats per token, before the first step and after shares of the {tokens:.3g} training tokens.
*perplexity*: at the end. *against dense*: of the perplexity. *FLOPs*: of a training token, of the dense model's.
*experts alike*: mean cosine of two experts' matrices made of the same shard of a dense layer, at the end, mean over
layers and matrices. One seed.
"""


class Measured(NamedTuple):
    arm: str
    label: str
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


def load_run(folder: Path, label: str) -> Measured:
    found = json.loads((folder / "measures.json").read_text())
    domains = json.loads((folder / "eval.json").read_text())["domains"]
    rows, evals = read_metrics(folder), read_metrics(folder, "eval")
    steps, tokens = ([row[name] for row in rows] for name in ("step", "tokens"))
    seen = np.interp([row["step"] for row in evals], steps, tokens)
    losses = [math.nan if row["xent"] is None else row["xent"] for row in evals]
    return Measured(
        folder.parent.name, label, np.array([0.0, *seen]), np.array([found["start"]["all"], *losses]),
        found["flops_per_token"], tuple(found["parameters"]),
        {int(n): kinds for n, kinds in found["similarity"].items()},
        {row["domain"]: row["perplexity"] for row in domains},
    )  # fmt: skip


def load(out: Path, labels: dict[str, str]) -> dict[str, Measured]:
    """The measured runs in the order of `labels`, {arm: label}."""
    folders = {arm: out / arm / "seed0" for arm in labels}
    return {
        arm: load_run(folder, labels[arm])
        for arm, folder in folders.items()
        if (folder / "measures.json").is_file() and (folder / "eval.json").is_file()
    }


# --- text ------------------------------------------------------------------------------------------------------------


def table(runs: dict[str, Measured]) -> str:
    dense, rows = runs.get("dense"), []
    head = ["", "parameters", "active", "FLOPs", "before", *(f"{share:.0%}" for share in SHARES), "end", "perplexity",
            "against dense", "experts alike"]  # fmt: skip
    for run in runs.values():
        alike = list(run.alike().values())
        rows.append([
            run.label, *(f"{n / 1e6:,.1f}M" for n in run.parameters),
            f"{run.flops_per_token / dense.flops_per_token:.2f}" if dense else "",
            f"{run.loss[0]:.3f}", *(f"{run.at(share):.3f}" for share in SHARES), f"{run.loss[-1]:.3f}",
            f"{run.perplexity:.2f}", f"{run.perplexity / dense.perplexity - 1:+.2%}" if dense else "",
            f"{alike[-1]:.3f}" if alike else "",
        ])  # fmt: skip
    domains = list(next(iter(runs.values())).domains)
    by_domain = [[d, *(f"{run.domains.get(d, math.nan):.2f}" for run in runs.values())] for d in domains]
    notes = NOTES.format(tokens=max(run.tokens[-1] for run in runs.values()))
    per_arm = markdown(["perplexity", *(run.arm for run in runs.values())], by_domain)
    return f"{markdown(head, rows)}\n\n{notes}\n{per_arm}\n"


def numbers(runs: dict[str, Measured]) -> dict[str, dict]:
    return {
        arm: {
            "label": run.label, "tokens": run.tokens.tolist(), "loss": run.loss.tolist(),
            "flops_per_token": run.flops_per_token, "parameters": run.parameters, "similarity": run.similarity,
            "domains": run.domains,
        }
        for arm, run in runs.items()
    }  # fmt: skip


def write(out: Path, runs: dict[str, Measured]) -> None:
    (out / "table.md").write_text(table(runs))
    (out / "results.json").write_text(json.dumps(numbers(runs), indent=1) + "\n")
    loss(runs).savefig(out / "loss.png", dpi=160)
    similarity(runs).savefig(out / "similarity.png", dpi=160)


# --- figures ---------------------------------------------------------------------------------------------------------


def colours(runs: dict[str, Measured]) -> dict[str, str]:
    own = {"dense": INK, "exact": ORANGE, "copy": BLUE}
    rest = iter(OTHERS * len(runs))
    return {arm: own.get(arm) or next(rest) for arm in runs}


def _style(axis: Axes, x: str, y: str) -> None:
    axis.set_xlabel(x, fontsize=9, color=INK)
    axis.set_ylabel(y, fontsize=9, color=INK)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color=GRID, lw=0.7)


def loss(runs: dict[str, Measured]) -> Figure:
    """Held-out loss against tokens and against FLOPs, dense models dashed."""
    figure = Figure((12, 4.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for arm, colour in colours(runs).items():
        run = runs[arm]
        style = "--" if not run.alike() else "-"
        for axis, x in zip(axes, (run.tokens / 1e6, run.tokens * run.flops_per_token / 1e15), strict=True):
            axis.plot(x, run.loss, style, marker="o", ms=2.5, color=colour, label=run.label, lw=1.3)
    _style(axes[0], "million tokens", "held-out loss, nats per token")
    _style(axes[1], "PFLOP of the model", "")
    axes[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def similarity(runs: dict[str, Measured]) -> Figure:
    """How alike two experts made of the same shard are, over the training."""
    figure = Figure((7.5, 3.8), layout="constrained")
    axis = figure.subplots()
    for arm, colour in colours(runs).items():
        if alike := runs[arm].alike():
            share = np.array(list(alike)) / max(max(alike), 1)
            axis.plot(share * runs[arm].tokens[-1] / 1e6, list(alike.values()), marker="o", ms=3, color=colour,
                      label=runs[arm].label, lw=1.3)  # fmt: skip
    _style(axis, "million tokens", "mean cosine of two experts")
    if axis.lines:
        axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
