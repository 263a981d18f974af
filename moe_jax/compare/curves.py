"""Draws runs beside one another: losses and loads over training, benchmarks, layers and domains."""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from moe_jax.compare.runs import Run
from moe_jax.compare.tables import ACCURACIES, UNITS, metric, scores
from moe_jax.evaluate import figures
from moe_jax.evaluate.analysis import INK, QUIET
from moe_jax.evaluate.drawing import GRID, plain, smooth

BEGINNING = 0.2  # share of the shortest run whose losses may lie above the figure
FEW = 4  # runs whose experts fit beside one another
MANY = 6  # with more runs their training losses would hide one another


def all_figures(runs: Sequence[Run]) -> Iterator[tuple[str, Figure]]:
    """Yields (name, figure) of all figures for which the runs have numbers."""
    if any(len(run.training.step) or len(run.held_out.step) for run in runs):
        yield "loss", loss(runs)
    if any("max_load" in run.training.values for run in runs):
        yield "max_load", load(runs)
    if any(run.layers for run in runs):
        yield "layers", layers(runs)
    if len(dict.fromkeys(domain for run in runs for domain in run.domains)) > 1:
        yield "domains", domains(runs)
    if any(scores(run, ACCURACIES) for run in runs):
        yield "benchmarks", benchmarks(runs)
    if (experts := _experts(runs)) is not None:
        yield "experts", experts


# --- parts -----------------------------------------------------------------------------------------------------------


def _colours(count: int) -> list:
    """Colours of runs: distinct ones, or for more than 20 runs a scale."""
    if count > 20:
        return list(matplotlib.colormaps["viridis"](np.linspace(0, 0.95, count)))
    return list(matplotlib.colormaps["tab10" if count <= 10 else "tab20"].colors[:count])


def _panels(count: int, width: float = 4.4, height: float = 3.3) -> tuple[Figure, list[Axes]]:
    figure = Figure((0.3 + width * count, height), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def _style(axis: Axes, label: str, grid: str = "y") -> None:
    axis.set_xlabel(label, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis=grid, color=GRID, lw=0.7)


def _those(runs: Sequence[Run], drawn: Callable[[Run], bool] = lambda run: True) -> list[tuple[Run, Any]]:
    """(run, its colour) of the runs that a figure shows. A run has the same colour in all figures."""
    return [(run, colour) for run, colour in zip(runs, _colours(len(runs)), strict=True) if drawn(run)]


def _legend(figure: Figure, shown: list[tuple[Run, Any]], **style) -> None:
    """Names the runs below the panels, in as many columns as fit."""
    handles = [matplotlib.lines.Line2D([], [], color=colour, label=plain(run.name), **style) for run, colour in shown]
    runs = [run for run, _ in shown]
    longest = 0.075 * max(len(run.name) for run in runs) + 0.6  # inches of an entry
    columns = max(1, min(len(runs), int(figure.get_figwidth() / longest)))
    rows = -(-len(runs) // columns)
    figure.set_figheight(figure.get_figheight() + 0.19 * rows)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=8,
                  labelcolor=INK)  # fmt: skip


def _short(value: float, _=None) -> str:
    """A number of an axis, such as 200k or 1.5M."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _time_axis(runs: Sequence[Run]) -> tuple[str, float]:
    """The label of a time axis, and the seconds of its unit."""
    longest = max((float(run.training.seconds[-1]) for run in runs if len(run.training.step)), default=0.0)
    for unit, size in (("hours", 3600.0), ("minutes", 60.0)):
        if longest >= 2 * size:
            return f"{unit} of training", size
    return "seconds of training", 1.0


# --- training --------------------------------------------------------------------------------------------------------


def _smoothed(run: Run, name: str) -> np.ndarray:
    values = run.training.values[name]
    return smooth(values, 1 - 1 / max(1.0, len(values) / 50))


def _highest(runs: Sequence[Run], name: str, training: bool) -> float | None:
    """The largest loss after the beginning of training, which is where the interesting part of the figure ends."""
    trained = [run for run in runs if "xent" in run.training.values]
    begin = BEGINNING * min((run.training.step[-1] for run in trained), default=0.0)
    found = [run.held_out.values[name][run.held_out.step >= begin] for run in runs]
    found += [_smoothed(run, "xent")[run.training.step >= begin] for run in trained if training]
    known = np.concatenate(found)
    known = known[np.isfinite(known)]
    return float(known.max()) if len(known) else None


def loss(runs: Sequence[Run]) -> Figure:
    """A figure of the losses against tokens and time, and against steps if a step does not have equally many tokens.

    Held-out losses are points on a line. Those of training are pale, smoothed, and only there for few runs, if both are
    in nats per token.
    """
    name = metric(runs)
    pale = name == "xent" and len(runs) <= MANY
    rates = [run.training.tokens[-1] / run.training.step[-1] for run in runs if len(run.training.step)]
    same = not rates or np.ptp(rates) <= 0.01 * max(rates)
    label, unit = _time_axis(runs)
    axes = [("tokens", "tokens", 1.0), ("seconds", label, unit)]
    axes = axes if same else [("step", "step", 1.0), *axes]
    figure, panels = _panels(len(axes))
    colours = _colours(len(runs))
    for axis, (x, label, unit) in zip(panels, axes, strict=True):
        for run, colour in zip(runs, colours, strict=True):
            if pale and "xent" in run.training.values:
                axis.plot(getattr(run.training, x) / unit, _smoothed(run, "xent"), color=colour, lw=1.1, alpha=0.45)
            points = {"color": colour, "lw": 1.6, "ms": 4, "mec": "white", "mew": 0.6}
            axis.plot(getattr(run.held_out, x) / unit, run.held_out.values[name], "o-", **points)
        if (top := _highest(runs, name, pale)) is not None:
            least = min(line.get_ydata()[np.isfinite(line.get_ydata())].min(initial=np.inf) for line in axis.lines)
            axis.set_ylim(least - 0.06 * (top - least), top + 0.06 * (top - least) + 1e-6)
        axis.set_xlim(left=0)
        axis.xaxis.set_major_locator(MaxNLocator(6))
        axis.xaxis.set_major_formatter(FuncFormatter(_short))
        _style(axis, label)
    panels[0].set_ylabel(UNITS[name], fontsize=9)
    figure.suptitle(f"Held-out loss{'; pale: training, smoothed' if pale else ''}", fontsize=11, color=INK)
    _legend(figure, _those(runs), lw=1.8, marker="o", ms=4, mec="white")
    return figure


def load(runs: Sequence[Run]) -> Figure:
    """A figure of the maximum load of the worst layer during training, smoothed, against tokens."""
    figure, (axis,) = _panels(1, 6.0)
    shown = _those(runs, lambda run: "max_load" in run.training.values)
    for run, colour in shown:
        axis.plot(run.training.tokens, run.training.values["max_load"], color=colour, lw=0.7, alpha=0.25)
        axis.plot(run.training.tokens, _smoothed(run, "max_load"), color=colour, lw=1.8)
    axis.axhline(1.0, color=QUIET, lw=0.9, ls="--")
    axis.annotate("balanced", (1.0, 1.0), xycoords=("axes fraction", "data"), xytext=(0, 3), ha="right",
                  textcoords="offset points", fontsize=8, color=QUIET)  # fmt: skip
    axis.set_xlim(left=0)
    axis.xaxis.set_major_formatter(FuncFormatter(_short))
    axis.set_ylabel("maximum load (largest expert ÷ mean)", fontsize=9)
    _style(axis, "tokens")
    figure.suptitle("Maximum load in training, of the layer where it is largest", fontsize=11, color=INK)
    _legend(figure, shown, lw=1.8)
    return figure


# --- held-out text ---------------------------------------------------------------------------------------------------


def layers(runs: Sequence[Run]) -> Figure:
    """A figure of the specialisation and the maximum load of each layer with experts, on held-out text."""
    figure, panels = _panels(2, 4.0)
    drawn = _those(runs, lambda run: bool(run.layers))
    shown = (("specialisation", "I(expert; domain), bits"), ("max_load", "maximum load (largest expert ÷ mean)"))
    for axis, (name, label) in zip(panels, shown, strict=True):
        for run, colour in drawn:
            values = [getattr(layer, name) for layer in run.layers]
            axis.plot(range(len(values)), values, "o-", color=colour, lw=1.6, ms=4, mec="white", mew=0.6)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_ylim(bottom=0 if name == "specialisation" else None)
        axis.set_ylabel(label, fontsize=9)
        _style(axis, "layer with experts")
    panels[1].axhline(1.0, color=QUIET, lw=0.9, ls="--")
    figure.suptitle("Specialisation and balance on held-out text", fontsize=11, color=INK)
    _legend(figure, drawn, lw=1.8, marker="o", ms=4, mec="white")
    return figure


def _dots(
    runs: Sequence[Run], names: list[str], values: Sequence[dict[str, tuple[float, float]]], label: str
) -> Figure:
    """A figure with a row for each name and in it a dot for each run, with an error bar where there is an error."""
    each = max(0.28, 0.11 * len(runs))
    figure, (axis,) = _panels(1, 6.0, 0.9 + each * len(names))
    colours = _colours(len(runs))
    for i, (one, colour) in enumerate(zip(values, colours, strict=True)):
        shift = 0.62 * ((i + 0.5) / len(runs) - 0.5)
        rows = [(k + shift, *one[name]) for k, name in enumerate(names) if name in one]
        if rows:
            y, x, error = np.array(rows, float).T
            bars = {"xerr": error, "elinewidth": 1.0} if error.any() else {}
            axis.errorbar(x, y, fmt="o", color=colour, ms=4.5, mec="white", mew=0.6, **bars)  # fmt: skip
    for k in range(1, len(names)):
        axis.axhline(k - 0.5, color=GRID, lw=0.7)
    axis.set_yticks(range(len(names)), [plain(name) for name in names])
    axis.set_ylim(len(names) - 0.5, -0.5)
    _style(axis, label, grid="x")
    axis.tick_params(axis="y", length=0)
    shown = [of_run for of_run, one in zip(_those(runs), values, strict=True) if one]
    _legend(figure, shown, lw=0, marker="o", ms=5, mec="white")
    return figure


def domains(runs: Sequence[Run]) -> Figure:
    """A figure of the held-out loss of each domain, less the mean over the runs, so that domains are comparable."""
    name = metric(runs)
    names = list(dict.fromkeys(domain for run in runs for domain in run.domains))
    mean = {d: np.mean([run.domains[d][name] for run in runs if d in run.domains]) for d in names}
    values = [{d: (row[name] - mean[d], 0.0) for d, row in run.domains.items()} for run in runs]
    figure = _dots(runs, names, values, f"{UNITS[name]}, above the mean of the runs; lower is better")
    figure.axes[0].axvline(0.0, color=QUIET, lw=0.9, ls="--")
    figure.suptitle("Held-out loss by domain", fontsize=11, color=INK)
    return figure


def _task_names(names: Sequence[str]) -> dict[str, str]:
    """Names of scores without the variant of a task, as "piqa, accuracy", where that names one of them alone."""
    short = {name: re.sub(r"/\w+shot(?=,)", "", name) for name in names}
    return {name: one if list(short.values()).count(one) == 1 else name for name, one in short.items()}


def benchmarks(runs: Sequence[Run]) -> Figure:
    """A figure of the accuracy in each task, with its standard error."""
    found = [scores(run, ACCURACIES) for run in runs]
    short = _task_names(list(dict.fromkeys(name for one in found for name in one)))
    found = [{short[name]: score for name, score in one.items()} for one in found]
    figure = _dots(runs, list(short.values()), found, "accuracy ± standard error; higher is better")
    figure.axes[0].xaxis.set_major_formatter(PercentFormatter(1.0))
    figure.suptitle("Benchmarks", fontsize=11, color=INK)
    return figure


def _experts(runs: Sequence[Run]) -> Figure | None:
    """The experts × domains map of a middle layer, for a few runs of which eval.py has analysed the same layers."""
    if len(runs) > FEW:
        return None
    found = [run.experts() for run in runs]
    banks = [bank for bank in found[0] if all(bank in one for one in found)]
    if not banks:
        return None
    chosen = {run.name: one[banks[0]] for run, one in zip(runs, found, strict=True)}
    one = next(iter(chosen.values()))
    alike = {(of.domains, len(of.selection_frequency)) for of in chosen.values()}
    if len(alike) > 1 or not np.isfinite(one.selection_frequency).any():
        return None
    return figures.compare(chosen, len(one.selection_frequency) // 2)
