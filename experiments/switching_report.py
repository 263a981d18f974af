"""Makes a table, numbers and a figure from the finished measurements of `experiments/switching.py`.

A measurement is OUT/<arm>/seed<n>/switching.json.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from experiments import records
from experiments.balance_report import BLUE, ORANGE, markdown
from moe_jax.evaluate.analysis import INK, QUIET
from moe_jax.evaluate.drawing import GRID, save
from moe_jax.evaluate.held_out import TOTAL
from moe_jax.run.log import write_text

COLOURS = (BLUE, ORANGE, INK)
NOTES = """\
Growth of held-out perplexity. *own*: of the domain whose ten most specific experts are off. *others*: of the other
domains, as the geometric mean with equal weights. *random*: the same with as many experts of the same layers that are
drawn at random, mean of {draws} draws. *use*: mean share of the domain's and of the other domains' tokens of training
text that use the ten experts.
"""

Losses = dict[str, float]  # nats a token, by domain


class Finished(NamedTuple):
    """The results of one trained model. The keys of the dicts are the domains whose experts are off."""

    settings: dict[str, Any]  # of its training; see `records.settings_of`
    options: dict[str, Any]  # of the measurement
    steps: int  # of its training
    whole: Losses
    experts: dict[str, list[list[int]]]  # those that are off, as (layer, expert)
    use: dict[str, list[list[float]]]  # shares of the domain's tokens, and of the rest's, of each
    off: dict[str, Losses]
    random: dict[str, list[Losses]]

    def growth(self, name: str, domain: str) -> float:
        """The growth of a domain's perplexity without the experts of `name`."""
        return math.expm1(self.off[name][domain] - self.whole[domain])

    def of_others(self, name: str, losses: Losses) -> float:
        """The growth of the perplexity of all domains but `name`, as a geometric mean."""
        others = [d for d in self.whole if d not in (TOTAL, name)]
        return math.expm1(np.mean([losses[d] - self.whole[d] for d in others]))

    def at_random(self, name: str) -> tuple[float, float]:
        """The growth of a domain's perplexity, and of the others', without experts that are drawn at random."""
        own = [math.expm1(one[name] - self.whole[name]) for one in self.random[name]]
        return float(np.mean(own)), float(np.mean([self.of_others(name, one) for one in self.random[name]]))


Runs = dict[tuple[str, int], Finished]  # by arm and seed


def load(out: Path) -> Runs:
    """The measurements of OUT/<arm>/seed<n>."""
    files = sorted(out.glob("*/seed*/switching.json"))
    made = {(file.parent.parent.name, int(file.parent.name.removeprefix("seed"))): file for file in files}
    return {
        key: records.as_record(Finished, json.loads(file.read_text(encoding="utf-8"))) for key, file in made.items()
    }


def read(file: Path) -> Runs:
    """The runs of a results.json that `write` wrote."""
    saved = json.loads(file.read_text(encoding="utf-8"))
    return {(run.pop("arm"), run.pop("seed")): records.as_record(Finished, run) for run in saved}


def numbers(runs: Runs) -> list[dict[str, Any]]:
    return [{"arm": arm, "seed": seed} | run._asdict() for (arm, seed), run in runs.items()]


def table(runs: Runs, labels: dict[str, str]) -> str:
    head = ["model", "off", "use", "own", "others", "random, own", "random, others"]
    rows, parts = [], []
    for (arm, seed), run in sorted(runs.items()):
        label = labels.get(arm, arm) + (f", seed {seed}" if len({s for a, s in runs if a == arm}) > 1 else "")
        for name in run.off:
            use = np.mean(run.use[name], axis=0) if run.use[name] else (math.nan, math.nan)
            shares = (run.growth(name, name), run.of_others(name, run.off[name]), *run.at_random(name))
            rows.append([label, name, f"{use[0]:.0%} / {use[1]:.0%}", *(f"{share:+.1%}" for share in shares)])
    for (arm, _), run in sorted(runs.items()):
        head_of = [f"{labels.get(arm, arm)}: perplexity", "whole", *(f"without those of {name}" for name in run.off)]
        cell = lambda losses, domain: f"{math.exp(min(losses[domain], 700.0)):.2f}"
        body = [[domain or "all", cell(run.whole, domain), *(cell(one, domain) for one in run.off.values())]
                for domain in run.whole]  # fmt: skip
        parts.append(markdown(head_of, body))
    draws = max(len(draws) for run in runs.values() for draws in run.random.values())
    return "\n\n".join([markdown(head, rows), NOTES.format(draws=draws), *parts]) + "\n"


def figure(runs: Runs, labels: dict[str, str]) -> Figure:
    """One panel for each domain whose experts are off: the growth of every domain's perplexity, a colour for each arm.

    The domain itself is on top. A short line is the growth with experts drawn at random, of each draw.
    """
    names = list(dict.fromkeys(name for run in runs.values() for name in run.off))
    every = [domain for domain in next(iter(runs.values())).whole if domain]
    drawn = Figure((3.4 * len(names) + 1.4, 0.3 * len(every) + 1.5), layout="constrained")
    panels = np.atleast_1d(drawn.subplots(1, len(names), sharex=True))
    height = 0.8 / max(len(runs), 1)
    for axis, name in zip(panels, names, strict=True):
        domains = [name, *(domain for domain in every if domain != name)]
        for i, ((arm, _), run) in enumerate(sorted(runs.items())):
            if name not in run.off:
                continue
            at = np.arange(len(domains)) + (i - (len(runs) - 1) / 2) * height
            axis.barh(at, [run.growth(name, d) for d in domains], height, color=COLOURS[i % len(COLOURS)],
                      label=labels.get(arm, arm))  # fmt: skip
            for draw, one in enumerate(run.random[name]):
                chance = [math.expm1(one[d] - run.whole[d]) for d in domains]
                label = "as many at random, each draw" if i == len(runs) - 1 and not draw else None
                axis.scatter(chance, at, s=30, marker="|", color=INK, linewidth=0.8, zorder=3, label=label)
        axis.set_yticks(range(len(domains)), domains, fontsize=8)
        axis.get_yticklabels()[0].set_fontweight("bold")
        axis.invert_yaxis()
        axis.axvline(0, color=QUIET, lw=0.8)
        axis.xaxis.set_major_formatter(PercentFormatter(1.0, 0))
        axis.set_title(f"without the ten experts of {name}", fontsize=9, color=INK, loc="left")
        axis.grid(axis="x", color=GRID, linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    drawn.supxlabel("growth of held-out perplexity", fontsize=9)
    handles, texts = panels[0].get_legend_handles_labels()
    drawn.legend(handles, texts, loc="outside upper right", ncols=3, fontsize=8, frameon=False)
    return drawn


def write(out: Path, runs: Runs, labels: dict[str, str], formats: Sequence[str] = ("png",)) -> None:
    """Writes table.md, results.json and the figure into OUT."""
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "table.md", table(runs, labels))
    write_text(out / "results.json", json.dumps(numbers(runs), indent=1) + "\n")
    save(figure(runs, labels), out / "switching", formats)
