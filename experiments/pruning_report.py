"""Makes a table, numbers and a figure from the finished runs of `experiments/pruning.py`.

A finished run is OUT/<arm>/seed<n>/pruned.json. What of the runs after pruning beside it,
after/<steps>_steps_<batches>_batches/<experts>/eval.json, is missing is left empty.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from experiments import records
from experiments.balance_report import BLUE, ORANGE, markdown
from moe_jax.evaluate.analysis import INK
from moe_jax.evaluate.drawing import GRID, save
from moe_jax.evaluate.held_out import TOTAL
from moe_jax.run.log import read_eval, write_text

COLOURS = (BLUE, ORANGE, INK)
NOTES = """\
Held-out perplexity of all domains together, and how much larger it is than that of the whole model. *kept*: share of
the assignments of training text that went to the experts that are kept, mean over layers. *random*: as many experts,
kept at random. *+ {steps} steps*: after as many steps of training at a constant rate, the whole model's too.
"""

Losses = dict[str, dict[str, float]]  # by number of experts, by domain; nats a token


class Finished(NamedTuple):
    """The results of one trained model."""

    settings: dict[str, Any]  # of its training; see `records.settings_of`
    options: dict[str, Any]  # of the measurement, and `after_steps` of training after pruning; 0: none is finished
    whole: int  # its experts
    kept: dict[str, float]  # by number of experts
    used: Losses  # with the most used experts
    random: Losses
    after: Losses  # of the most used experts, after more training

    @property
    def complete(self) -> bool:
        """Whether all of its models were trained further."""
        return self.used.keys() <= self.after.keys()

    @property
    def after_steps(self) -> int:
        return self.options.get("after_steps", 0)

    @property
    def experts(self) -> list[int]:
        """The numbers of experts, the whole model's first."""
        return sorted(map(int, self.used), reverse=True)

    def perplexity(self, losses: Losses, experts: int, domain: str = TOTAL) -> float:
        """The perplexity; NaN where it was not measured."""
        return math.exp(min(losses.get(str(experts), {}).get(domain, math.nan), 700.0))

    def growth(self, losses: Losses, experts: int, domain: str = TOTAL) -> float:
        """The growth of the perplexity by pruning, of models that were trained as long."""
        return self.perplexity(losses, experts, domain) / self.perplexity(losses, self.whole, domain) - 1


Runs = dict[tuple[str, int], Finished]  # by arm and seed


def load_run(folder: Path, steps: int | None = None) -> Finished:
    """steps: of training after pruning; None: the most that there are."""
    found = json.loads((folder / "pruned.json").read_text(encoding="utf-8"))
    options = found.get("options", {})
    batches = options.get("batches", 0)
    if steps is None:
        ends = folder.glob(f"after/*_steps_{batches}_batches/*/eval.json")
        steps = max((int(file.parents[1].name.partition("_")[0]) for file in ends), default=0)
    done = sorted(folder.glob(f"after/{steps}_steps_{batches}_batches/*/eval.json"))
    after = {file.parent.name: {row["domain"]: row["xent"] for row in read_eval(file.parent)["domains"]}
             for file in done if file.parent.name in found["used"]}  # fmt: skip
    settings = found.get("settings") or records.settings_in(folder)  # of a file of an earlier version
    random = {str(found["whole"]): found["used"][str(found["whole"])]} | found["random"]
    return Finished(settings, options | {"after_steps": steps}, found["whole"], found["kept"],
                    found["used"], random, after)  # fmt: skip


def load(out: Path, steps: int | None = None) -> Runs:
    """The finished runs of OUT/<arm>/seed<n>. steps: as for `load_run`."""
    folders = sorted(file.parent for file in out.glob("*/seed*/pruned.json"))
    return {(folder.parent.name, int(folder.name.removeprefix("seed"))): load_run(folder, steps) for folder in folders}


def read(file: Path) -> Runs:
    """The runs of a results.json that `write` wrote."""
    saved = json.loads(file.read_text(encoding="utf-8"))
    return {(run.pop("arm"), run.pop("seed")): records.as_record(Finished, run) for run in saved}


def numbers(runs: Runs) -> list[dict[str, Any]]:
    return [{"arm": arm, "seed": seed} | run._asdict() for (arm, seed), run in runs.items()]


def table(runs: Runs, labels: dict[str, str]) -> str:
    steps = max(run.after_steps for run in runs.values())
    head = ["model", "experts", "kept", "perplexity", "", "random", "", f"+ {steps} steps", ""]
    rows = []
    for (arm, seed), run in sorted(runs.items()):
        label = labels.get(arm, arm) + (f", seed {seed}" if len({s for a, s in runs if a == arm}) > 1 else "")
        for n in run.experts:
            pairs = []
            for losses in (run.used, run.random, run.after):
                value, more = run.perplexity(losses, n), run.growth(losses, n)
                pairs += [f"{value:.2f}" if math.isfinite(value) else "", f"{more:+.1%}" if n < run.whole and
                          math.isfinite(more) else ""]  # fmt: skip
            rows.append([label, str(n), f"{run.kept[str(n)]:.0%}", *pairs])
    parts = [markdown(head, rows), NOTES.format(steps=steps)]
    for name, losses in (("before", "used"), (f"after {steps} more steps", "after")):
        columns = [(key, run, n) for key, run in sorted(runs.items()) for n in run.experts]
        domains = list(columns[0][1].used[str(columns[0][2])])
        body = [[domain or "all", *(f"{run.perplexity(getattr(run, losses), n, domain):.2f}" for _, run, n in columns)]
                for domain in domains]  # fmt: skip
        parts.append(markdown([f"perplexity, {name}", *(f"{key[0]}, {n}" for key, _, n in columns)], body))
    return "\n\n".join(parts) + "\n"


def figure(runs: Runs, labels: dict[str, str]) -> Figure:
    """Left: growth of the perplexity by the number of experts. Right: by domain, with the fewest experts."""
    drawn = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = drawn.subplots(1, 2)
    width = 0.8 / max(len(runs), 1)
    domains = list(next(iter(runs.values())).used[str(next(iter(runs.values())).whole)])
    for i, ((arm, _), run) in enumerate(sorted(runs.items())):
        colour, label = COLOURS[i % len(COLOURS)], labels.get(arm, arm)
        for losses, line, what in ((run.used, "-", "most used"), (run.after, "--", f"+ {run.after_steps} steps"),
                                   (run.random, ":", "random")):  # fmt: skip
            values = [100 * run.growth(losses, n) for n in run.experts]
            left.plot(run.experts, values, line, color=colour, marker="o", markersize=3, label=f"{label}, {what}")
        fewest = run.experts[-1]
        values = [100 * run.growth(run.used, fewest, domain) for domain in domains]
        right.bar(np.arange(len(domains)) + i * width, values, width, color=colour, label=f"{label}, {fewest} experts")
    left.set_xlabel("experts of a layer")
    left.set_ylabel("growth of held-out perplexity, %")
    left.set_xticks(sorted({n for run in runs.values() for n in run.experts}))
    left.invert_xaxis()
    names = [domain or "all" for domain in domains]
    right.set_xticks(np.arange(len(domains)) + width * (len(runs) - 1) / 2, names, rotation=30, ha="right", fontsize=8)
    right.set_ylabel("growth without more training, %")
    for axis in (left, right):
        axis.grid(color=GRID, linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    left.legend(fontsize=7, frameon=False, handlelength=3)
    right.legend(fontsize=7, frameon=False, ncols=len(runs), loc="lower right", bbox_to_anchor=(1.0, 1.0))
    return drawn


def write(out: Path, runs: Runs, labels: dict[str, str], formats: Sequence[str] = ("png",)) -> None:
    """Writes table.md, results.json and the figure into OUT."""
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "table.md", table(runs, labels))
    write_text(out / "results.json", json.dumps(numbers(runs), indent=1) + "\n")
    save(figure(runs, labels), out / "pruning", formats)
