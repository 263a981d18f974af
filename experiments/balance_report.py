"""Makes tables, numbers and figures from the finished runs of `experiments/balance_scope.py`.

A finished run is a run directory of train.py with eval.json, or an entry of a results.json, of which some numbers may
be missing. Letters: L MoE layers, G domains, E experts.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib import colors
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import records
from moe_jax.evaluate.analysis import INK, QUIET, selection_frequency, specialisation
from moe_jax.evaluate.drawing import save
from moe_jax.moe.stats import RouterStats
from moe_jax.run.log import read_eval, read_metrics, write_text

BLUE, ORANGE = "#2f6fb0", "#c4572e"
OTHERS = ("#2e8b6f", "#8a5fb0", "#9a8a3a", "#b0507f", "#6b7080", "#3aa0b0", "#d08a5a", "#4f5fa8")
LAST = 0.05  # of the steps, over which training numbers are averaged

# Column of table.md: the number's name, its heading, its format.
COLUMNS = {
    "perplexity": ("perplexity", "{:.2f}"),
    "macro_perplexity": ("mean over domains", "{:.2f}"),
    "train_xent": ("train xent", "{:.3f}"),
    "specialisation": ("I(expert; domain), bits", "{:.3f}"),
    "top_frequency": ("top expert's share", "{:.3f}"),
    "preferred": ("pairs > 2× uniform", "{:.0%}"),
    "max_load": ("max load, held-out", "{:.2f}"),
    "train_max_load": ("max load, training", "{:.2f}"),
    "dead_experts": ("dead experts", "{:.0f}"),
    "tokens_per_second": ("tokens/s", "{:,.0f}"),
}
NOTES = """\
Held-out text, at the last step; `±` is the sample standard deviation over seeds. *perplexity*: over all held-out
tokens. *against global*: its difference between runs of the same seed. *mean over domains*: of the domains'
perplexities, each counting once. *train xent*: nats per token, mean over the last 5 % of the steps, as *max load,
training*. *I(expert; domain)*: mutual information, mean over layers; 0 if all domains use the experts alike. *top
expert's share*: of a domain's tokens, how many use its most used expert, mean over layers and domains; uniform is
{uniform:.3f}. *pairs > 2× uniform*: (layer, domain) pairs with an expert used twice as often as uniform. *max load*: of
the busiest expert over the mean, in the worst layer. *dead experts*: (layer, expert) pairs that no held-out token used,
of {pairs}. *tokens/s*: median over the run, of one process on its device.
"""


class Finished(NamedTuple):
    """The results of one run. What a results.json does not have of a run is empty, or None."""

    seed: int
    settings: dict[str, Any]  # see `records.settings_of`; of a record perhaps few
    numbers: dict[str, float]  # by the names of `COLUMNS`
    domains: dict[str, float]  # perplexity
    frequency: Float[np.ndarray, "L G E"] | None
    bits: Float[np.ndarray, " L"]


class Arm(NamedTuple):
    label: str
    scope: int | None  # sequences that are balanced together; None: not one of the compared scopes
    runs: list[Finished]

    def values(self, name: str, seeds: set[int] | None = None) -> np.ndarray:
        """A number of each run, of those seeds if given; NaN where a run does not have it."""
        return np.array([run.numbers.get(name, math.nan) for run in self.runs if seeds is None or run.seed in seeds])

    @property
    def whole(self) -> "Arm":
        """The arm without runs of which nothing is known about single experts."""
        return self._replace(runs=[run for run in self.runs if run.frequency is not None])

    @property
    def seeds(self) -> set[int]:
        return {run.seed for run in self.runs}


# --- one run ---------------------------------------------------------------------------------------------------------


def load_run(folder: Path) -> Finished:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    result = read_eval(folder)
    rows = read_metrics(folder)
    last = [row for row in rows if row["step"] > (1 - LAST) * result["step"]] or rows[-1:]
    mean = lambda name: float(np.mean([math.nan if row[name] is None else row[name] for row in last]))

    *by_domain, total = result["domains"]
    domains = {row["domain"]: row["perplexity"] for row in by_domain}
    moe = config["model"]["moe"]
    tokens = np.array(result["tokens_per_layer_and_domain"], float)
    counts = np.array(result["tokens_per_expert"], float)
    seen = tokens.sum(0) > 0
    counts_and_tokens = {"tokens": tokens[:, seen], "tokens_per_expert": counts[:, seen]}
    stats = RouterStats(**(dict.fromkeys(RouterStats._fields) | counts_and_tokens))
    frequency, bits = selection_frequency(stats), specialisation(stats)
    load = counts.sum(1)  # [L, E]
    numbers = {
        "perplexity": total["perplexity"],
        "macro_perplexity": float(np.mean(list(domains.values()))),
        "train_xent": mean("xent"),
        "specialisation": float(bits.mean()),
        "top_frequency": float(frequency.max(-1).mean()),
        "preferred": float((frequency.max(-1) > 2 * moe["top_k"] / moe["num_experts"]).mean()),
        "max_load": float((load.max(-1) / load.mean(-1)).max()),
        "train_max_load": mean("max_load"),
        "dead_experts": float((load == 0).sum()),
        "tokens_per_second": float(np.median([row["tokens_per_second"] for row in rows])),
    }
    return Finished(config["seed"], records.settings_in(folder), numbers, domains, frequency, bits)


def _scope(name: str, settings: dict[str, Any]) -> int | None:
    if name != "global" and not name.removeprefix("scope_").isdigit():
        return None
    scope = settings["loss.balance_batch"]
    return settings["data.batch_size"] if scope == "global" else int(scope)


Runs = dict[tuple[str, int], Finished]  # by arm and seed


def load(out: Path, arms: dict[str, tuple[int, ...]]) -> Runs:
    """The finished runs of OUT/<arm>/seed<n>, of these arms: seeds by name."""
    folders = {(name, seed): out / name / f"seed{seed}" for name, seeds in arms.items() for seed in seeds}
    return {key: load_run(folder) for key, folder in folders.items() if (folder / "eval.json").is_file()}


def arms_of(runs: Runs, arms: dict[str, tuple[str, tuple[int, ...]]]) -> dict[str, Arm]:
    """The runs by arm, in the order of `arms` ({name: (label, seeds)}), without empty arms."""
    found = {}
    for name, (label, seeds) in arms.items():
        if its := [runs[name, seed] for seed in seeds if (name, seed) in runs]:
            found[name] = Arm(label, _scope(name, its[0].settings), its)
    return found


def read(file: Path) -> Runs:
    """The runs of a results.json that `write` wrote."""
    saved = json.loads(file.read_text(encoding="utf-8"))

    def one(run: dict[str, Any]) -> Finished:
        numbers = {name: run[name] for name in COLUMNS if run.get(name) is not None}
        frequency, bits = run.get("frequency"), np.array(run.get("bits_per_layer", []))
        frequency = None if frequency is None else np.array(frequency)
        return Finished(
            run["seed"], records.full_names(run["settings"]), numbers, run.get("domains", {}), frequency, bits
        )

    return {(name, run["seed"]): one(run) for name, arm in saved.items() for run in arm["runs"]}


# --- tables ----------------------------------------------------------------------------------------------------------


def cell(values: np.ndarray, form: str) -> str:
    """Mean and sample standard deviation as text; "" without a value. NaNs are left out."""
    values = values[~np.isnan(values)]
    if not len(values):
        return ""
    spread = f" ± {form.replace('+', '').format(values.std(ddof=1))}" if len(values) > 1 else ""
    return form.format(values.mean()) + spread


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _difference(arm: Arm, base: Arm | None) -> str:
    """The difference of the perplexity to `base`, seed by seed, so that differences between seeds cancel."""
    seeds = arm.seeds & base.seeds if base and base is not arm else set()
    if not seeds:
        return ""
    return cell(arm.values("perplexity", seeds) / base.values("perplexity", seeds) - 1, "{:+.2%}")


def table(arms: dict[str, Arm]) -> str:
    """A Markdown table with one row an arm, and a table of perplexity by domain with one column an arm."""
    rows = []
    for arm in arms.values():
        first, *rest = (cell(arm.values(name), form) for name, (_, form) in COLUMNS.items())
        rows.append([f"{arm.label} ({len(arm.runs)})", first, _difference(arm, arms.get("global")), *rest])
    whole = [run for arm in arms.values() for run in arm.runs if run.frequency is not None]
    of = lambda arm, domain: np.array([run.domains.get(domain, math.nan) for run in arm.runs])
    names = dict.fromkeys(domain for arm in arms.values() for run in arm.runs for domain in run.domains)
    by_domain = [[domain, *(cell(of(arm, domain), "{:.2f}") for arm in arms.values())] for domain in names]
    notes = ""
    if whole:
        layers, _, experts = whole[0].frequency.shape
        notes = NOTES.format(uniform=whole[0].settings["model.moe.top_k"] / experts, pairs=layers * experts)
    first_heading, *headings = (heading for heading, _ in COLUMNS.values())
    return "\n".join(
        [
            markdown(["arm (seeds)", first_heading, "against global", *headings], rows),
            "",
            notes,
            "Held-out perplexity by domain:\n",
            markdown(["domain", *(arm.label for arm in arms.values())], by_domain),
            "",
        ]
    )


def as_json(arms: dict[str, Arm]) -> dict[str, Any]:
    def one(run: Finished) -> dict[str, Any]:
        numbers = {name: value for name, value in run.numbers.items() if not math.isnan(value)}
        frequency = None if run.frequency is None else np.round(run.frequency, 4).tolist()
        return {"seed": run.seed, **numbers, "domains": run.domains, "bits_per_layer": run.bits.tolist(),
                "settings": run.settings, "frequency": frequency}  # fmt: skip

    return {k: {"label": a.label, "scope": a.scope, "runs": [one(run) for run in a.runs]} for k, a in arms.items()}


# --- figures ---------------------------------------------------------------------------------------------------------


def _labelled_lines(axis: Axes, lines: list[tuple[str, float, str]]) -> None:
    """Draws horizontal dashed lines with names at the right edge, moved apart where they would overlap.

    A thin line leads from each to its name. Of a line outside the axis' limits only the name and the value are drawn.
    """
    low, high = axis.get_ylim()
    gap = 0.1 * (high - low)
    lines = sorted(lines, key=lambda line: line[1])
    places = np.clip([value for _, value, _ in lines], low, high)
    free = np.maximum.accumulate(places - gap * np.arange(len(lines))) + gap * np.arange(len(lines))
    free -= np.mean(free - places) if len(lines) else 0.0
    for (label, value, colour), place in zip(lines, free, strict=True):
        text = label.replace(", ", ",\n")
        if low <= value <= high:
            axis.axhline(value, color=colour, lw=1.2, ls=(0, (5, 3)), zorder=1)
        else:
            text += f"\n{'↑' if value > high else '↓'} {value:.4g}"
        axis.annotate(
            text, (1.0, np.clip(value, low, high)), xytext=(1.035, (place - low) / (high - low)),
            xycoords=("axes fraction", "data"), textcoords="axes fraction", va="center", fontsize=8, color=colour,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.6, "relpos": (0, 0.5), "shrinkA": 2, "shrinkB": 0},
        )  # fmt: skip


def _seeds(seeds: set[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {' and '.join(map(str, sorted(seeds)))}"


def plot_scope(arms: dict[str, Arm]) -> Figure:
    """A figure of perplexity and specialisation against the balance scope, with a point for each run.

    Lines go through means over the seeds that all arms have. Other seeds would add differences between seeds.
    """
    scoped = sorted((arm for arm in arms.values() if arm.scope), key=lambda arm: arm.scope)
    others = [arm for arm in arms.values() if not arm.scope]
    seeds = set.intersection(*(arm.seeds for arm in arms.values()))

    def mean(arm: Arm, name: str) -> float:
        values = arm.values(name, seeds or None)
        return float(values[~np.isnan(values)].mean()) if not np.isnan(values).all() else math.nan

    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    panels = (("perplexity", "held-out perplexity", BLUE), ("specialisation", "I(expert; domain), bits", ORANGE))
    for axis, (name, title, colour) in zip(axes, panels, strict=True):
        axis.plot([a.scope for a in scoped], [mean(a, name) for a in scoped], color=colour, lw=1.8, zorder=2)
        for arm in scoped:
            at = [arm.scope] * len(arm.runs)
            axis.scatter(at, arm.values(name), s=30, color=colour, ec="white", lw=0.8, zorder=3)
        points = np.concatenate([arm.values(name) for arm in scoped])
        points = points[~np.isnan(points)]
        room = 1.5 * np.ptp(points) or math.inf  # an arm far from all others would flatten the curve
        near = [x for x in (mean(arm, name) for arm in others) if points.min() - room <= x <= points.max() + room]
        axis.update_datalim([(1, x) for x in near])
        axis.margins(0.06, 0.12)
        axis.autoscale_view()
        axis.set_xscale("log", base=2)
        names = {a.scope: f"{a.scope}\nglobal" if a is arms.get("global") else str(a.scope) for a in scoped}
        axis.set_xticks(list(names), list(names.values()), fontsize=8)
        axis.minorticks_off()
        lines = [(arm.label, mean(arm, name), OTHERS[i % len(OTHERS)]) for i, arm in enumerate(others)]
        _labelled_lines(axis, lines)
        axis.set_title(title, fontsize=10, color=INK, loc="left")
        axis.set_xlabel("sequences balanced together", fontsize=9, color=INK)
        if seeds:
            which = f"lines: {_seeds(seeds)}"
            if more := set().union(*(arm.seeds for arm in scoped)) - seeds:
                which += f"; other dots: {_seeds(more)}"
            axis.set_title(which, fontsize=8, color=QUIET, loc="right")
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#e8e9ee", lw=0.7)
    return figure


def _heat(axis: Axes, frequency: np.ndarray, norm: colors.Normalize):
    """Draws a map of domains × experts, with the experts in the order of the domain that prefers them most."""
    preference = frequency / np.maximum(frequency.mean(0), 1e-9)
    order = np.lexsort((-preference.max(0), preference.argmax(0)))
    domains, experts = frequency.shape
    image = axis.imshow(frequency[:, order], aspect="auto", cmap="RdBu_r", norm=norm, interpolation="nearest")
    axis.set_xticks(np.arange(experts + 1) - 0.5, minor=True)
    axis.set_yticks(np.arange(domains + 1) - 0.5, minor=True)
    axis.set_xticks([])
    axis.grid(which="minor", color="white", lw=1.2)
    axis.tick_params(which="both", length=0)
    axis.spines[:].set_visible(False)
    axis.set_xlabel(f"{experts} experts", fontsize=8, color=QUIET)
    return image


def plot_specialisation(left: Arm, right: Arm) -> Figure:
    """A figure of two heat maps on one colour scale: the layer in which the first seed of `right` specialises most."""
    runs = [left.runs[0], right.runs[0]]
    layer = int(runs[1].bits.argmax())
    frequencies = [run.frequency[layer] for run in runs]
    uniform = runs[0].settings["model.moe.top_k"] / runs[0].settings["model.moe.num_experts"]
    top = max(2 * uniform, float(np.quantile(np.concatenate(frequencies), 0.99)))
    norm = colors.TwoSlopeNorm(uniform, 0.0, top)
    domains = list(runs[0].domains)
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.27 * len(domains) + 1.3), layout="constrained", sharey=True)
    for axis, arm, run, frequency in zip(axes, (left, right), runs, frequencies, strict=True):
        image = _heat(axis, frequency, norm)
        axis.set_title(f"balanced over {arm.label}", fontsize=10, color=INK, loc="left")
        axis.set_title(f"{run.bits[layer]:.2f} bits", fontsize=9, color=QUIET, loc="right")
    axes[0].set_yticks(range(len(domains)), domains, fontsize=8)
    bar = figure.colorbar(image, ax=axes, shrink=0.9, pad=0.015)
    bar.set_ticks([0.0, uniform, top], labels=["0", f"{uniform:.2f} uniform", f"≥{top:.2f}"], fontsize=8)
    bar.outline.set_visible(False)
    title = (
        f"Share of a domain's tokens sent to each expert, layer {layer} of 0–{len(runs[0].bits) - 1} (held-out text)"
    )
    figure.suptitle(title, fontsize=11, color=INK)
    return figure


def write(out: Path, arms: dict[str, Arm], formats: Sequence[str] = ("png",)) -> None:
    """Writes table.md, results.json, a figure of scopes, and one of specialisation if both ends exist."""
    write_text(out / "table.md", table(arms))
    write_text(out / "results.json", json.dumps(as_json(arms)) + "\n")
    if any(arm.scope for arm in arms.values()):
        save(plot_scope(arms), out / "scope", formats)
    ends = [arms[name].whole for name in ("scope_1", "global") if name in arms and arms[name].whole.runs]
    if len(ends) == 2:
        save(plot_specialisation(*ends), out / "specialisation", formats)
