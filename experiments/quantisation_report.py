"""Makes a table, numbers and a figure from the models that `experiments/quantisation.py` has rounded.

A finished model is OUT/<name>/rounded/quantised.json.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from experiments import records
from experiments.balance_report import OTHERS, markdown
from experiments.quantisation_measure import ALLOCATIONS, PRODUCT, Way, renamed
from moe_jax.evaluate.analysis import INK
from moe_jax.evaluate.drawing import GRID, save
from moe_jax.evaluate.held_out import TOTAL
from moe_jax.run.log import write_text

COLOURS = dict(zip(ALLOCATIONS, (INK, *OTHERS[:3]), strict=True))
LABELS = {"uniform": "all alike", "turns": "by turns", "frequency": "by use", "mc": "MC-MoE"}
METHODS = {"gptq": "GPTQ", "rtn": "to nearest"}
DETAIL = 2.5  # mean bits at which domains are compared, where they were measured
NOTES = """\
Held-out perplexity of all domains together, and how much larger it is than that of the model as it is; of several seeds
of calibration the mean, and in brackets the least and the most. *bits*: mean bits of the weights of experts;
*with scales*: what a group's scale and zero add. Attention and dense layers have 4 bits throughout; embeddings, routers
and norms are as they are. *all alike* has the same bits for every expert, which a mean of 2.5 cannot have. *by turns*
has half of the experts with one bit less than a whole mean and half with one more, at 2.5 half with 2 and half with 3,
whatever they do. *by use* has as many of each, and chooses them: against *by turns* it shows what the choice is worth.
{sizes}.
"""
SIZES = "groups of {group} weights and {rows} rows of calibration text"


class Finished(NamedTuple):
    """The results of one model."""

    settings: dict[str, Any]  # of its training; see `records.settings_of`
    options: dict[str, int]  # of rounding: rows of calibration text, inputs of a group; and the step of the training
    whole: dict[str, float]  # nats a token by domain, of the model as it is
    ways: list[dict[str, Any]]  # the fields of a `Way`, and what was measured

    def has(self, wanted: Sequence[Way]) -> bool:
        return set(wanted) <= {Way(**{name: row[name] for name in Way._fields}) for row in self.ways}

    @property
    def bits(self) -> list[float]:
        return sorted({row["bits"] for row in self.ways})

    def rows_of(self, method: str, bits: float, allocate: str) -> list[dict[str, Any]]:
        """The rows of all seeds."""
        return [row for row in self.ways if (row["method"], row["bits"], row["allocate"]) == (method, bits, allocate)]

    def perplexities(self, method: str, bits: float, allocate: str, domain: str = TOTAL) -> list[float]:
        """One for each seed; empty where it was not measured."""
        return [math.exp(min(row["losses"][domain], 700.0)) for row in self.rows_of(method, bits, allocate)]

    def growth(self, method: str, bits: float, allocate: str, domain: str = TOTAL) -> float:
        """The mean perplexity over that of the model as it is; NaN where it was not measured."""
        found = self.perplexities(method, bits, allocate, domain)
        return float(np.mean(found)) / math.exp(self.whole[domain]) - 1 if found else math.nan


Models = dict[str, Finished]


def _finished(saved: dict[str, Any]) -> Finished:
    return records.as_record(Finished, saved | {"ways": [renamed(row) for row in saved["ways"]]})


def load(out: Path) -> Models:
    """The finished models of OUT."""
    files = sorted(out.glob(f"*/rounded/{PRODUCT}"))
    return {file.parents[1].name: _finished(json.loads(file.read_text(encoding="utf-8"))) for file in files}


def read(file: Path) -> Models:
    """The models of a results.json that `write` wrote."""
    saved = json.loads(file.read_text(encoding="utf-8"))
    return {one.pop("name"): _finished(one) for one in saved}


def table(models: Models, labels: dict[str, str]) -> str:
    head = ["model", "bits", "with scales", "", *(LABELS[a] for a in ALLOCATIONS)]
    rows = []
    for name, one in models.items():
        rows.append(
            [
                labels.get(name, name),
                "",
                "",
                "as it is",
                f"{math.exp(one.whole[TOTAL]):.2f}",
                *[""] * (len(ALLOCATIONS) - 1),
            ]
        )
        for bits in one.bits:
            for method, shown in METHODS.items():
                made = [row for a in ALLOCATIONS for row in one.rows_of(method, bits, a)]
                if made:
                    packed = sorted({f"{row['packed_bits']:.3g}" for row in made})
                    cells = [_cell(one, method, bits, a) for a in ALLOCATIONS]
                    rows.append(["", f"{bits:g}", " to ".join(packed[:: max(len(packed) - 1, 1)]), shown, *cells])
    sizes = {name: SIZES.format(**{"group": "?", "rows": "?"} | one.options) for name, one in models.items()}
    same = len(set(sizes.values())) == 1
    said = sizes[next(iter(sizes))] if same else "; ".join(f"{labels.get(n, n)}: {x}" for n, x in sizes.items())
    parts = [markdown(head, rows), NOTES.format(sizes=said[0].upper() + said[1:])]
    for bits in sorted({b for one in models.values() for b in one.bits}):
        columns = [(name, one, a) for name, one in models.items() for a in ALLOCATIONS if one.rows_of("gptq", bits, a)]
        domains = sorted({domain for _, one, _ in columns for domain in one.whole}, key=lambda d: (d == TOTAL, d))
        body = [[domain or "all", *(f"{one.growth('gptq', bits, a, domain):+.1%}" if domain in one.whole else ""
                                    for _, one, a in columns)] for domain in domains]  # fmt: skip
        heads = (f"{name}, {LABELS[a]}" for name, _, a in columns)
        parts.append(markdown([f"growth at {bits:g} bits, GPTQ", *heads], body))
    return "\n\n".join(parts) + "\n"


def _cell(one: Finished, method: str, bits: float, allocate: str) -> str:
    found = one.perplexities(method, bits, allocate)
    if not found:
        return ""
    spread = f" [{min(found):.2f}, {max(found):.2f}]" if len(found) > 1 else ""
    return f"{np.mean(found):.2f}{spread} ({one.growth(method, bits, allocate):+.1%})"


def figure(models: Models, labels: dict[str, str]) -> Figure:
    """Above: perplexity against bits, a panel for each model. Below: growth by domain, of every model."""
    drawn = Figure(figsize=(4.6 * max(len(models), 2), 6.4), layout="constrained")
    above, below = drawn.subfigures(2, 1)
    panels = above.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for panel, (name, one) in zip(panels, models.items(), strict=True):
        panel.axhline(math.exp(one.whole[TOTAL]), color=INK, linewidth=0.8, linestyle=":", label="as it is")
        for allocate in ALLOCATIONS:
            for method, line in (("gptq", "-"), ("rtn", "--")):
                at = [b for b in one.bits if one.rows_of(method, b, allocate)]
                means = [np.mean(one.perplexities(method, b, allocate)) for b in at]
                panel.plot(at, means, line, color=COLOURS[allocate], marker="o", markersize=3,
                           label=f"{METHODS[method]}, {LABELS[allocate]}")  # fmt: skip
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter("{x:g}")
        panel.set_xticks(one.bits)
        panel.set_title(labels.get(name, name), fontsize=9)
        panel.set_xlabel("mean bits of the weights of experts")
    panels[0].set_ylabel("held-out perplexity (log)")
    axis = below.subplots()
    all_bits = sorted({b for one in models.values() for b in one.bits})
    bits = DETAIL if DETAIL in all_bits else all_bits[0]
    bars = [(name, one, a) for name, one in models.items() for a in ALLOCATIONS if one.rows_of("gptq", bits, a)]
    domains = sorted({d for one in models.values() for d in one.whole}, key=lambda d: (d == TOTAL, d))
    for i, (name, one, allocate) in enumerate(bars):
        values = [100 * one.growth("gptq", bits, allocate, d) if d in one.whole else math.nan for d in domains]
        second = {"hatch": "//", "edgecolor": "white", "linewidth": 0} if list(models).index(name) % 2 else {}
        axis.bar(np.arange(len(domains)) + i * 0.8 / len(bars), values, 0.8 / len(bars), color=COLOURS[allocate],
                 label=f"{name}, {LABELS[allocate]}", **second)  # fmt: skip
    axis.set_xticks(
        np.arange(len(domains)) + 0.4 - 0.4 / len(bars), [d or "all" for d in domains], fontsize=8, rotation=20
    )
    axis.set_ylabel(f"growth of perplexity\nat {bits:g} bits, GPTQ, %")
    for one in (*panels, axis):
        one.grid(color=GRID, linewidth=0.6)
        one.set_axisbelow(True)
        one.spines[["top", "right"]].set_visible(False)
    for one in panels:
        one.legend(fontsize=7, frameon=False, handlelength=3)
    axis.legend(fontsize=7, frameon=False, ncols=len(bars), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return drawn


def write(out: Path, models: Models, labels: dict[str, str], formats: Sequence[str] = ("png",)) -> None:
    """Writes table.md, results.json and the figure into OUT."""
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "table.md", table(models, labels))
    numbers = [{"name": name} | one._asdict() for name, one in models.items()]
    write_text(out / "results.json", json.dumps(numbers, indent=1) + "\n")
    save(figure(models, labels), out / "quantisation", formats)
