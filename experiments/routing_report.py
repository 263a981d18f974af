"""Makes tables, numbers and figures from the finished runs of `experiments/routing.py`.

A finished run is a run directory of train.py with eval.json, or an entry of a results.json, which has all numbers that
are compared. Loads are those of experts that compute something. Letters: L MoE layers, G domains, E experts.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import records
from experiments.balance_report import BLUE, ORANGE, OTHERS, cell, markdown
from moe_jax.evaluate.analysis import INK, QUIET, specialisation
from moe_jax.evaluate.drawing import GRID, plain, save
from moe_jax.moe.stats import RouterStats
from moe_jax.run.log import read_eval, read_metrics, write_text

COLOURS = (BLUE, ORANGE, *OTHERS)  # of the arms, in the order of their labels
LAST = 100  # steps at the end, over which loads are averaged
WINDOW = 20  # steps of the running mean, which has to stay under a limit
LIMITS = (1.5, 1.2)  # of the maximum load
SERIES = ("xent", "max_load", "load_cv", "experts_per_token")  # what is kept of every logged step

# Column of table.md: the number's name, its heading, its format.
COLUMNS = {
    "perplexity": ("perplexity", "{:.2f}"),
    "max_load": (f"max load, last {LAST} steps", "{:.2f}"),
    "max_load_end": ("last step", "{:.2f}"),
    "load_cv": (f"load CV, last {LAST} steps", "{:.3f}"),
    "load_cv_end": ("last step", "{:.3f}"),
    **{f"until_{limit}": (f"steps until < {limit:g}", "{:.0f}") for limit in LIMITS},
    "held_out_max_load": ("max load, held-out", "{:.2f}"),
    "specialisation": ("I(expert; domain), bits", "{:.3f}"),
    "dropped": ("dropped", "{:.1%}"),
    "experts_per_token": ("experts a token", "{:.2f}"),
    "step_ms": ("a step, ms", "{:.0f}"),
}
NOTES = f"""\
`±` is the sample standard deviation over seeds. *perplexity*: of all held-out tokens at the end of training. *max
load*: of the busiest expert over the mean of the layer's experts, in the worst layer; *load CV*: standard deviation
over mean of the experts' loads, mean over layers. Both are of training batches: a mean over steps, and the last step
alone. *steps until*: after so many steps the running mean of the maximum load over {WINDOW} steps stays
under the limit until the end; "never" if it is above at the end. *I(expert; domain)*: mutual information on held-out
text, mean over layers; 0 if all domains use the experts alike. *experts a token*: identity experts do not count; mean
over layers and the last {LAST} steps. *a step*: median over the run; runs that share a GPU slow each other down.
*routers told the domain*: a held-out document is routed by the router of its true domain, which other arms do not know.
"""


class Finished(NamedTuple):
    """The results of one run, with what tells whether another run would be the same."""

    arm: str
    seed: int
    settings: dict[str, Any]  # see `records.settings_of`
    numbers: dict[str, float]  # by the names of `COLUMNS`; infinite for a limit that is never reached
    steps: list[int]  # that were logged
    series: dict[str, list[float]]  # by the names of `SERIES`, an entry for each logged step
    domains: dict[str, float]  # held-out perplexity
    experts_by_domain: dict[str, list[float]]  # experts a held-out token, by layer
    bits: list[float]  # I(expert; domain) by layer


# --- one run ---------------------------------------------------------------------------------------------------------


def steps_until(steps: np.ndarray, loads: np.ndarray, limit: float) -> float:
    """The step after which the running mean of the loads stays under a limit, infinite if there is none.

    The mean is over the last `WINDOW` steps, or all steps so far if they are fewer.
    """
    means = np.array([loads[(steps > step - WINDOW) & (steps <= step)].mean() for step in steps])
    above = np.flatnonzero(~(means < limit))
    if not len(above):
        return float(steps[0])
    return float(steps[above[-1] + 1]) if above[-1] + 1 < len(steps) else np.inf


def load_run(arm: str, folder: Path) -> Finished:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    result, rows = read_eval(folder), read_metrics(folder)
    steps = np.array([row["step"] for row in rows])
    series = {name: np.array([np.nan if row[name] is None else row[name] for row in rows]) for name in SERIES}
    last = steps > steps[-1] - LAST
    *by_domain, total = result["domains"]
    names = [row["domain"] for row in by_domain]

    experts = config["model"]["moe"]["num_experts"]
    tokens = np.array(result["tokens_per_layer_and_domain"], float)  # [L, G]
    chosen = np.array(result["tokens_per_expert"], float)  # [L, G, C]
    seen = tokens.sum(0) > 0
    tokens, counts = tokens[:, seen], chosen[:, seen, :experts]
    of_layers = RouterStats(**(dict.fromkeys(RouterStats._fields) | {"tokens": tokens, "tokens_per_expert": counts}))
    bits, load = specialisation(of_layers), counts.sum(1)
    per_token = counts.sum(-1) / tokens  # [L, G]
    numbers = {
        "perplexity": total["perplexity"],
        "max_load": series["max_load"][last].mean(),
        "max_load_end": series["max_load"][-1],
        "load_cv": series["load_cv"][last].mean(),
        "load_cv_end": series["load_cv"][-1],
        **{f"until_{limit}": steps_until(steps, series["max_load"], limit) for limit in LIMITS},
        "held_out_max_load": (load.max(-1) / load.mean(-1)).max(),
        "specialisation": bits.mean(),
        "dropped": result["dropped"] / max(counts.sum(), 1.0),
        "experts_per_token": series["experts_per_token"][last].mean(),
        "step_ms": 1e3 * np.median([row["step_seconds"] for row in rows]),
    }
    return Finished(
        arm,
        config["seed"],
        records.settings_in(folder),
        {name: float(value) for name, value in numbers.items()},
        steps.tolist(),
        {name: [float(f"{x:.4g}") for x in values] for name, values in series.items()},
        {row["domain"]: row["perplexity"] for row in by_domain},
        dict(zip(names, per_token.T.round(4).tolist(), strict=True)),
        bits.round(5).tolist(),
    )


def load(out: Path, arms: dict[str, tuple[int, ...]]) -> dict[tuple[str, int], Finished]:
    """The finished runs of OUT/<arm>/seed<n>. arms: seeds by name."""
    folders = {(name, seed): out / name / f"seed{seed}" for name, seeds in arms.items() for seed in seeds}
    return {key: load_run(key[0], path) for key, path in folders.items() if (path / "eval.json").is_file()}


def read(file: Path) -> dict[tuple[str, int], Finished]:
    """The runs of a results.json that `write` wrote."""
    number = lambda name, value: value if value is not None else np.inf if name.startswith("until") else np.nan
    found = {}
    for saved in json.loads(file.read_text(encoding="utf-8"))["runs"]:
        numbers = {name: number(name, value) for name, value in saved["numbers"].items()}
        series = {name: [number(name, x) for x in values] for name, values in saved["series"].items()}
        found[saved["arm"], saved["seed"]] = records.as_record(Finished, saved | {"numbers": numbers, "series": series})
    return found


def as_text(runs: list[Finished]) -> str:
    """The text of results.json, a run a line. Numbers that are not finite are null."""
    lines = [json.dumps(finite_or_none(run._asdict()), allow_nan=False) for run in runs]
    return '{"runs": [\n' + ",\n".join(lines) + "\n]}\n"


def finite_or_none(value: Any) -> Any:
    """A tree of dicts and lists with None for every number that is not finite."""
    if isinstance(value, dict):
        return {name: finite_or_none(one) for name, one in value.items()}
    if isinstance(value, list):
        return [finite_or_none(one) for one in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


# --- tables ----------------------------------------------------------------------------------------------------------


def by_arm(finished: dict[tuple[str, int], Finished], labels: dict[str, str]) -> dict[str, list[Finished]]:
    """The runs of each arm, sorted by seed, in the order of `labels`. An arm without runs is left out."""
    found = {name: sorted((r for r in finished.values() if r.arm == name), key=lambda r: r.seed) for name in labels}
    return {name: runs for name, runs in found.items() if runs}


def _cell(runs: list[Finished], name: str, form: str) -> str:
    values = np.array([run.numbers[name] for run in runs])
    return "never" if np.isinf(values).all() else cell(values, form)


def _against(runs: list[Finished], base: list[Finished]) -> str:
    """The difference of the perplexity to the runs of `base` with the same seeds."""
    of_seed = {run.seed: run.numbers["perplexity"] for run in base}
    pairs = [(run.numbers["perplexity"], of_seed[run.seed]) for run in runs if run.seed in of_seed]
    return cell(np.array([a / b - 1 for a, b in pairs]), "{:+.2%}") if pairs and runs is not base else ""


def table(arms: dict[str, list[Finished]], labels: dict[str, str]) -> str:
    """Markdown: a row an arm, perplexity by domain, and experts a token by domain where they differ."""
    (_, first_heading), *others = ((name, heading) for name, (heading, _) in COLUMNS.items())
    rows = []
    for name, runs in arms.items():
        first, *rest = (_cell(runs, column, form) for column, (_, form) in COLUMNS.items())
        rows.append([f"{labels[name]} ({len(runs)})", first, _against(runs, arms.get("global", [])), *rest])
    parts = [markdown(["arm (seeds)", first_heading, "against global", *(h for _, h in others)], rows), "", NOTES]
    domains = next(iter(arms.values()))[0].domains
    values = lambda runs, domain: np.array([run.domains[domain] for run in runs])
    parts += ["Held-out perplexity by domain:\n", markdown(
        ["domain", *(labels[name] for name in arms)],
        [[domain, *(cell(values(runs, domain), "{:.2f}") for runs in arms.values())] for domain in domains],
    ), ""]  # fmt: skip
    for name, runs in with_choice(arms).items():
        ordered = sorted(runs[0].experts_by_domain.items(), key=lambda item: -np.mean(item[1]))
        layers = [f"layer {i}" for i in range(len(ordered[0][1]))]
        lines = [[domain, *(f"{x:.2f}" for x in [np.mean(own), *own])] for domain, own in ordered]
        parts += [f"Experts a held-out token, {labels[name]}, seed {runs[0].seed}:\n",
                  markdown(["domain", "mean", *layers], lines), ""]  # fmt: skip
    return "\n".join(parts)


def with_choice(arms: dict[str, list[Finished]]) -> dict[str, list[Finished]]:
    """The arms in which tokens have different numbers of experts: their means over domains differ."""
    differs = lambda run: np.ptp([np.mean(own) for own in run.experts_by_domain.values()]) > 1e-3
    return {name: runs for name, runs in arms.items() if differs(runs[0])}


# --- figures ---------------------------------------------------------------------------------------------------------


def _style(axis: Axes, title: str, label: str, grid: str) -> None:
    axis.set_title(title, fontsize=10, color=INK, loc="left")
    axis.set_xlabel(label, fontsize=9, color=INK)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis=grid, color=GRID, lw=0.7)


def _running(steps: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The mean over the steps so far, at most `WINDOW` and at most a tenth of them, so that the first fall is seen."""
    width = np.minimum(WINDOW, 1 + steps // 10)
    return np.array([values[(steps > s - w) & (steps <= s)].mean() for s, w in zip(steps, width, strict=True)])


def loads(arms: dict[str, list[Finished]], labels: dict[str, str]) -> Figure:
    """A figure of the maximum load above even use over the steps, a line an arm, of its first seed."""
    figure = Figure((8.4, 4.2), layout="constrained")
    axis = figure.subplots()
    ends = []
    for name, runs in arms.items():
        colour = COLOURS[list(labels).index(name)]
        steps, values = np.array(runs[0].steps), np.array(runs[0].series["max_load"])
        axis.plot(steps, values, color=colour, lw=0.6, alpha=0.25, zorder=2)
        mean = _running(steps, values)
        axis.plot(steps, mean, color=colour, lw=1.7, zorder=3)
        ends.append((mean[-1], plain(labels[name]), colour))
    axis.set_xscale("log")
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    axis.set_ylim(min(low, 1.0), high)
    low, high = np.log(axis.get_ylim())
    ticks = [t for t in (1, *LIMITS, 2, 3, 4, 6, 8, 12, 16, 24, 32) if t <= np.exp(high)]
    axis.yaxis.set_major_locator(ticker.FixedLocator(ticks))
    axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda y, _: f"{y:g}"))
    axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axis.xaxis.set_minor_formatter(ticker.NullFormatter())
    axis.yaxis.set_minor_locator(ticker.NullLocator())
    axis.set_xlim(min(run[0].steps[0] for run in arms.values()), max(run[0].steps[-1] for run in arms.values()))
    ends.sort()
    wanted = np.array([(np.log(value) - low) / (high - low) for value, _, _ in ends])
    gap = 0.055 * np.arange(len(ends))
    places = np.maximum.accumulate(wanted - gap) + gap  # names that would overlap are moved apart, upwards
    for place, (value, name, colour) in zip(places, ends, strict=True):
        axis.annotate(
            f"{name}  {value:.2f}", (1.0, value), xytext=(1.035, place), xycoords=("axes fraction", "data"),
            textcoords="axes fraction", va="center", fontsize=8, color=colour,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.6, "relpos": (0, 0.5), "shrinkA": 2, "shrinkB": 0},
        )  # fmt: skip
    _style(axis, "Load of the busiest expert ÷ mean load, worst layer", "step", "y")
    axis.set_title(f"pale: each step; lines: mean over up to {WINDOW}", fontsize=8, color=QUIET, loc="right")
    return figure


def experts_by_domain(run: Finished) -> Figure:
    """A figure of the experts that a held-out token uses, a row a domain: a pale dot for each layer, and their mean."""
    found: dict[str, Float[np.ndarray, " L"]] = {name: np.array(own) for name, own in run.experts_by_domain.items()}
    ordered = sorted(found, key=lambda name: found[name].mean())
    figure = Figure((7.2, 0.27 * len(ordered) + 1.3), layout="constrained")
    axis = figure.subplots()
    budget = run.settings.get("model.moe.expert_budget")
    if budget:
        axis.axvline(budget, color=QUIET, lw=0.9, ls="--", zorder=1)
        axis.annotate(f"budget {budget:g}", (budget, 0.0), xycoords=("data", "axes fraction"), xytext=(3, 3),
                      textcoords="offset points", fontsize=8, color=QUIET)  # fmt: skip
    for row, name in enumerate(ordered):
        own = found[name]
        axis.plot(own, [row] * len(own), "o", ms=4, color=BLUE, alpha=0.25, mew=0, zorder=2)
        axis.plot([own.mean()], [row], "o", ms=7, color=BLUE, mec="white", zorder=3)
        axis.annotate(f"{own.mean():.2f}", (own.mean(), row), xytext=(0, 6), textcoords="offset points", ha="center",
                      fontsize=7, color=INK)  # fmt: skip
    axis.set_yticks(range(len(ordered)), [plain(name) for name in ordered], fontsize=8)
    axis.set_ylim(-0.7, len(ordered) - 0.2)
    label = "experts per token (pale: each layer; full: mean over layers)"
    _style(axis, "Real experts per token, by domain of the held-out text", label, "x")
    return figure


def write(
    out: Path,
    finished: dict[tuple[str, int], Finished],
    labels: dict[str, str],
    formats: Sequence[str] = ("png",),
) -> None:
    """Writes table.md, results.json, a figure of loads, and one of experts by domain if tokens differ in experts."""
    arms = by_arm(finished, labels)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "table.md", table(arms, labels))
    write_text(out / "results.json", as_text([run for runs in arms.values() for run in runs]))
    save(loads(arms, labels), out / "loads", formats)
    for runs in list(with_choice(arms).values())[:1]:
        save(experts_by_domain(runs[0]), out / "experts_by_domain", formats)
