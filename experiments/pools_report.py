"""Makes tables, numbers and a figure from the finished runs of `experiments/pools.py`.

A finished run is OUT/<arm>/seed<n>/pools.json, or an entry of a results.json.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from experiments import records
from experiments.balance_report import BLUE, ORANGE, OTHERS, markdown
from moe_jax.evaluate.analysis import INK
from moe_jax.evaluate.drawing import GRID, save
from moe_jax.evaluate.held_out import TOTAL
from moe_jax.run.log import write_text

COLOURS = (OTHERS[0], BLUE, ORANGE)  # by the place among the labels
NOTES = """\
Held-out perplexity, geometric mean over the domains with equal weights, each with the experts of each layer that
training text of the same domain uses most, by mean router probability; and how much larger it is than with all experts.
"""
POOL_NOTES = """\
Held-out perplexity of all domains together, of the tokens after the first {prefix} of each document. *prefix*: a
document's pool is from its first {prefix} tokens; *document*: from all of its tokens, those that are scored too. The
difference of the two has two parts that are not told apart here: a pool of the whole document tells of the tokens that
come, a leak, and it is an estimate from more tokens.
"""


class Finished(NamedTuple):
    """The results of one trained model: nats a token by domain."""

    settings: dict[str, Any]  # see `records.settings_of`
    options: dict[str, Any]  # of the measurement
    step: int
    experts: dict[str, int]  # of a layer, by the percentage that is kept
    kept: dict[str, dict[str, float]]  # by the percentage
    pools: dict[str, dict[str, float]]  # by "all", "prefix 8", …

    @property
    def percentages(self) -> list[str]:
        return sorted(self.kept, key=float, reverse=True)

    def mean(self, kept: str) -> float:
        """The geometric mean of the domains' perplexities: one domain of a high perplexity does not decide it."""
        return math.exp(np.mean([x for name, x in self.kept[kept].items() if name != TOTAL]))

    def growth(self, kept: str, domain: str = "") -> float:
        """The growth of the mean perplexity, or of that of a domain, from all experts to a part of them."""
        value = lambda key: math.exp(self.kept[key][domain]) if domain else self.mean(key)
        return value(kept) / value(self.percentages[0]) - 1


Runs = dict[tuple[str, int], Finished]  # by arm and seed


def load(out: Path) -> Runs:
    """The finished runs of OUT/<arm>/seed<n>."""
    files = sorted(out.glob("*/seed*/pools.json"))
    key = lambda file: (file.parent.parent.name, int(file.parent.name.removeprefix("seed")))
    return {key(file): records.as_record(Finished, json.loads(file.read_text(encoding="utf-8"))) for file in files}


def read(file: Path) -> Runs:
    """The runs of a results.json that `write` wrote."""
    saved = json.loads(file.read_text(encoding="utf-8"))
    return {(run.pop("arm"), run.pop("seed")): records.as_record(Finished, run) for run in saved}


def table(runs: Runs, labels: dict[str, str]) -> str:
    first = next(iter(runs.values()))
    name = lambda arm, seed: labels.get(arm, arm) + (f", seed {seed}" if seed else "")
    percentages = sorted({key for run in runs.values() for key in run.kept}, key=float, reverse=True)
    numbers = {key: number for run in runs.values() for key, number in run.experts.items()}
    head = ["model"]
    for key in percentages:
        head += [f"{key} % ({numbers[key]})"] + ([""] if key != percentages[0] else [])
    rows = []
    for key, run in runs.items():
        cells = [name(*key)]
        for kept in percentages:
            cells.append(f"{run.mean(kept):.2f}" if kept in run.kept else "")
            if kept != percentages[0]:
                cells.append(f"{run.growth(kept):+.1%}" if kept in run.kept else "")
        rows.append(cells)
    parts = [markdown(head, rows), NOTES]
    ways = list(dict.fromkeys(way for run in runs.values() for way in run.pools))
    pairs = [way for way in ways if way.startswith("prefix") and way.replace("prefix", "document") in ways]
    head = ["model", *ways, *(f"document against prefix, {way.split()[1]} experts" for way in pairs)]
    rows = []
    for key, run in runs.items():
        value = lambda way, run=run: math.exp(run.pools[way][TOTAL]) if way in run.pools else math.nan
        against = [value(way.replace("prefix", "document")) / value(way) - 1 for way in pairs]
        shown = lambda x, form: "" if math.isnan(x) else form.format(x)
        rows.append([name(*key), *(shown(value(way), "{:.2f}") for way in ways),
                     *(shown(x, "{:+.2%}") for x in against)])  # fmt: skip
    prefixes = dict.fromkeys(str(run.options.get("prefix", "?")) for run in runs.values())
    parts += [markdown(head, rows), POOL_NOTES.format(prefix=" or ".join(prefixes))]
    fewest, domains = percentages[-1], [d for d in first.kept[percentages[0]] if d != TOTAL]
    columns = list(runs)
    rows = []
    for domain in domains:
        cells = [domain]
        for key in columns:
            run = runs[key]
            cells += [f"{math.exp(run.kept[k][domain]):.2f}" if domain in run.kept.get(k, {}) else ""
                      for k in (percentages[0], fewest)]  # fmt: skip
        rows.append(cells)
    head = ["perplexity", *(f"{name(*key)}, {k} %" for key in columns for k in (percentages[0], fewest))]
    parts.append(markdown(head, rows))
    return "\n\n".join(parts) + "\n"


def figure(runs: Runs, labels: dict[str, str]) -> Figure:
    """Left: the mean perplexity as experts are left out, over that with all. Right: by domain, with the fewest."""
    drawn = Figure(figsize=(10.5, 3.8), layout="constrained")
    left, right = drawn.subplots(1, 2, width_ratios=(1, 1.4))
    width = 0.8 / max(len(runs), 1)
    first = next(iter(runs.values()))
    fewest, domains = first.percentages[-1], [d for d in first.kept[first.percentages[0]] if d != TOTAL]
    for i, ((arm, seed), run) in enumerate(runs.items()):
        label = labels.get(arm, arm) + (f", seed {seed}" if seed else "")
        place = list(labels).index(arm) if arm in labels else i
        style = {"color": COLOURS[place % len(COLOURS)], "label": label}
        left.plot([float(k) for k in run.percentages], [1 + run.growth(k) for k in run.percentages], "-o",
                  markersize=4, **style)  # fmt: skip
        values = [run.growth(fewest, domain) if domain in run.kept.get(fewest, {}) else math.nan for domain in domains]
        right.bar(np.arange(len(domains)) + i * width, values, width, bottom=1.0, **style)
    left.set_xscale("log", base=2)
    ticks = [float(key) for key in first.percentages]
    left.set_xticks(ticks, [f"{x:g} %" for x in ticks])
    left.invert_xaxis()
    left.set_xlabel("experts of a layer that are kept", color=INK)
    left.set_ylabel("times the perplexity with all experts (log)", color=INK)
    right.set_xticks(np.arange(len(domains)) + width * (len(runs) - 1) / 2, domains, rotation=30, ha="right")
    right.set_ylabel(f"times, with {fewest} % of the experts (log)", color=INK)
    left.legend(fontsize=8, frameon=False)
    for axis in (left, right):
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
        axis.grid(axis="y", color=GRID, linewidth=0.6)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    return drawn


def write(out: Path, runs: Runs, labels: dict[str, str], formats: Sequence[str] = ("png",)) -> None:
    """Writes table.md, results.json and the figure into OUT."""
    out.mkdir(parents=True, exist_ok=True)
    order = {name: i for i, name in enumerate(labels)}
    runs = dict(sorted(runs.items(), key=lambda pair: (order.get(pair[0][0], len(order)), pair[0][1])))
    write_text(out / "table.md", table(runs, labels))
    saved = [{"arm": arm, "seed": seed} | run._asdict() for (arm, seed), run in runs.items()]
    write_text(out / "results.json", json.dumps(saved) + "\n")
    save(figure(runs, labels), out / "pools", formats)
