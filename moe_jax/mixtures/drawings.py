"""Draws fits: a law with its points and residuals, and predicted against measured losses of mixtures."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from moe_jax.evaluate.drawing import GRID, plain
from moe_jax.mixtures.forms import CRITICAL
from moe_jax.mixtures.laws import Fitted

INK, QUIET = "#1f2430", "#8a90a0"
MANY = 12  # curves that a panel can tell apart
PANELS = 8  # laws that a figure shows


def _style(axis: Axes, x: str, y: str) -> None:
    axis.set_xlabel(x, fontsize=9)
    axis.set_ylabel(y, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color=GRID, lw=0.7)


def _short(value: str | float) -> str:
    """A value of a column, such as 40M or 1.5B."""
    if isinstance(value, str):
        return value
    number = float(value)
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if size <= abs(number) < 1e15:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def _log_scale(axis: Axes) -> None:
    """Makes the x axis logarithmic, with numbers such as 40M at its ticks, which are 1, 2 and 5 times powers of 10."""
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axis.xaxis.set_minor_formatter(NullFormatter())


def law(fitted: Sequence[Fitted], main: str, title: str) -> Figure:
    """A figure with two panels for each law: its curves through the points, against column `main`, and its residuals.

    A curve is one combination of the other columns; of more than MANY some are left out. So are laws after PANELS.
    """
    shown = fitted[:PANELS]
    figure = Figure((8.4, 0.4 + 3.4 * len(shown)), layout="constrained")
    grid = figure.subplots(len(shown), 2, squeeze=False, width_ratios=(1.6, 1))
    for (left, right), one in zip(grid, shown, strict=True):
        with np.errstate(over="ignore"):  # what is infinite is not drawn
            _curves(left, one, main, len(shown) == 1)
        _residuals(right, one)
        left.set_title(plain(one.title), fontsize=8.5, color=INK, loc="left")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    if len(shown) == 1 and len(labels) > 4:  # too many for the panel
        figure.set_figheight(figure.get_figheight() + 0.2 * (2 + len(labels) // 3))
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=7)
    left_out = f"  ({len(shown)} of {len(fitted)} laws)" if len(shown) < len(fitted) else ""
    figure.suptitle(plain(f"{title}{left_out}"), fontsize=11, color=INK)
    return figure


def critical(fitted: Sequence[Fitted], tolerance: float) -> Figure:
    """A figure of critical mixture ratios: rises of the general loss by tokens, and the ratios with their law."""
    rises, laws = [one for one in fitted if one.problem.names != CRITICAL], [*fitted][-1:]
    figure = Figure((8.4, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.3, 1))
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.88, len(rises)))
    for one, colour in zip(rises, colours, strict=True):
        ratio, tokens = one.problem.columns["ratio"], float(one.problem.columns["tokens"][0])
        dense = np.linspace(ratio.min(), ratio.max(), 80)
        left.plot(dense, one.problem.predict(one.solution.parameters, {"ratio": dense}), color=colour, lw=1.4)
        left.plot(ratio, one.problem.target, "o", color=colour, ms=4, mec="white", mew=0.5,
                  label=f"{_short(tokens)} tokens")  # fmt: skip
        value, low, high = one.derived["critical ratio"]
        known = np.isfinite([low, high]).all()
        error = [[max(value - low, 0)], [max(high - value, 0)]] if known else None
        right.errorbar(tokens, value, error, fmt="o", color=colour, ms=5, mec="white", mew=0.5, elinewidth=1)
    left.axhline(tolerance, color=QUIET, lw=0.9, ls="--")
    left.annotate("tolerance", (1, tolerance), xycoords=("axes fraction", "data"), xytext=(0, 3), ha="right",
                  textcoords="offset points", fontsize=8, color=QUIET)  # fmt: skip
    left.legend(frameon=False, fontsize=7.5)
    for one in laws if laws[0].problem.names == CRITICAL else []:
        tokens = one.problem.columns["tokens"]
        dense = np.geomspace(tokens.min(), tokens.max(), 80)
        right.plot(dense, one.problem.predict(one.solution.parameters, {"tokens": dense}), color=INK, lw=1.4)
    _log_scale(right)
    _style(left, "share of the new domain", "rise of the general loss, nats")
    _style(right, "tokens of continued training", "critical ratio")
    figure.suptitle("Critical mixture ratio", fontsize=11, color=INK)
    return figure


def _curves(axis: Axes, one: Fitted, main: str, alone: bool) -> None:
    """Draws a law and its points. alone: whether the figure has a place for a long legend."""
    columns, measured = one.problem.columns, one.problem.target
    others = [name for name, column in columns.items()
              if name not in (main, "loss") and len(set(column.tolist())) > 1]  # fmt: skip
    keys = list(zip(*(columns[name].tolist() for name in others), strict=True)) if others else [()] * len(measured)
    groups = sorted(set(keys))
    shown = [groups[i] for i in np.unique(np.linspace(0, len(groups) - 1, min(MANY, len(groups))).round().astype(int))]
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.88, len(shown)))
    for key, colour in zip(shown, colours, strict=True):
        rows = np.array([k == key for k in keys])
        x = columns[main][rows]
        dense = np.geomspace(x.min(), x.max(), 80)
        at = {name: np.full(80, column[rows][0]) for name, column in columns.items()} | {main: dense}
        axis.plot(dense, one.problem.predict(one.solution.parameters, at), color=colour, lw=1.4)
        label = ", ".join(f"{name} {_short(v)}" for name, v in zip(others, key, strict=True))
        axis.plot(x, measured[rows], "o", color=colour, ms=4, mec="white", mew=0.5, label=plain(label) or None)
    _log_scale(axis)
    left_out = f"  ({len(shown)} of {len(groups)} curves)" if len(shown) < len(groups) else ""
    _style(axis, f"{main}{left_out}", "loss, nats per token")
    if others and (len(shown) <= 4 or not alone):
        axis.legend(frameon=False, fontsize=7, ncols=1 if len(shown) <= 4 else 2)


def _residuals(axis: Axes, one: Fitted) -> None:
    measured, value = one.problem.target, one.solution.values
    rest = 100 * (np.log(measured) - np.log(value))
    axis.axhline(0, color=QUIET, lw=0.9, ls="--")
    axis.plot(value, rest, "o", color="#2f6fdd", ms=4, mec="white", mew=0.5)
    most = 1.25 * max(float(np.abs(rest).max()), 1e-9)
    axis.set_ylim(-most, most)
    _style(axis, "value of the law", "residual, %")


def predictions(measured: np.ndarray, predicted: np.ndarray, names: Sequence[str], title: str) -> Figure:
    """A figure of predicted against measured losses of runs that were left out of the fit. names: of the runs."""
    figure = Figure((4.6, 4.2), layout="constrained")
    axis = figure.subplots()
    low, high = min(measured.min(), predicted.min()), max(measured.max(), predicted.max())
    pad = 0.05 * (high - low) or 0.05
    axis.plot([low - pad, high + pad], [low - pad, high + pad], color=QUIET, lw=0.9, ls="--")
    axis.plot(measured, predicted, "o", color="#2f6fdd", ms=4.5, mec="white", mew=0.5)
    best = int(np.argmin(measured))
    axis.annotate(plain(names[best]), (measured[best], predicted[best]), xytext=(6, -3), textcoords="offset points",
                  fontsize=8, color=INK)  # fmt: skip
    axis.set_xlim(low - pad, high + pad)
    axis.set_ylim(low - pad, high + pad)
    axis.set_aspect("equal")
    _style(axis, "measured loss, nats per token", "predicted from the other runs")
    figure.suptitle(plain(title), fontsize=10, color=INK)
    return figure
