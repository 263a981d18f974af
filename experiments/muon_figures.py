"""Draws the figures of `experiments/muon_report.py`."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.balance_report import BLUE, ORANGE
from experiments.muon_report import DEFAULT_RMS, GROUPS, NAMES, Comparison, in_order, measured
from moe_jax.evaluate.analysis import INK
from moe_jax.evaluate.drawing import GRID, save

COLOURS = {"adamw": BLUE, "muon": ORANGE}
PALE = 0.45  # opacity of training loss beside held-out loss


def write(out: Path, c: Comparison, formats: Sequence[str] = ("png",)) -> None:
    for name, figure in all_figures(c):
        save(figure, out / name, formats)


def all_figures(c: Comparison) -> Iterator[tuple[str, Figure]]:
    """Yields (name, figure) of all figures for which there are runs."""
    yield "loss", loss(c)
    if any(len(runs) > 1 for runs in c.sweep.values()):
        yield "learning_rate", learning_rate(c)
    if len(c.by_rms) > 1:
        yield "update_rms", update_rms(c)
    if measured(c):
        yield "svd_entropy", svd_entropy(c)


def _style(axis: Axes, title: str, label: str) -> None:
    axis.set_title(title, fontsize=10, color=INK, loc="left")
    axis.set_xlabel(label, fontsize=9, color=INK)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color=GRID, lw=0.7)


def _log_ticks(axis: Axes, values: list[float]) -> None:
    axis.set_xscale("log")
    axis.set_xticks(values, [f"{x:g}" for x in values])
    axis.minorticks_off()


def _name(axis: Axes, x: float, y: float, text: str, colour: str, below: bool = False) -> None:
    """Writes the name of a line at one of its points."""
    place = {"xytext": (0, -6 if below else 6), "textcoords": "offset points", "va": "top" if below else "bottom"}
    axis.annotate(text, (x, y), ha="right", fontsize=8, color=colour, **place)


def loss(c: Comparison) -> Figure:
    """A figure of held-out (dots) and training loss of the best runs, against tokens and time, after a third of them.

    Diamonds are the ends of Muon's runs on fewer tokens.
    """
    figure = Figure((11, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    panels = (("tokens", 1e6, "million tokens"), ("seconds", 1.0, "seconds of training"))
    shown = []
    for axis, (field, unit, label) in zip(axes, panels, strict=True):
        for name, run in c.best.items():
            colour = COLOURS[name]
            for curve, style in ((run.held_out, {"marker": "o", "ms": 3.5}), (run.train, {"alpha": PALE})):
                x = getattr(curve, field) / unit
                late = curve.tokens >= curve.tokens[-1] / 3  # of time too, so that both panels have the same points
                shown.append(curve.loss[late])
                axis.plot(x[late], curve.loss[late], color=colour, lw=1.6, **style)
        _style(axis, f"loss against {'tokens' if field == 'tokens' else 'time'}", label)
    for run in c.shorter[:-1]:
        axes[0].plot(run.tokens / 1e6, run.losses[1], "D", ms=6, color=ORANGE, mec="white", zorder=3)
        axes[0].plot(run.tokens / 1e6, run.losses[0], "D", ms=6, color=ORANGE, mec="white", alpha=PALE, zorder=3)
    ends = {"color": BLUE, "lw": 0.9, "ls": (0, (5, 3))}
    if base := c.best.get("adamw"):
        for end, alpha in zip(base.losses, (PALE, 1.0), strict=True):
            for axis in axes:
                axis.axhline(end, **ends, alpha=alpha, zorder=1)
    handles = [axes[0].plot([], [], color=COLOURS[n], lw=1.6, marker="o", ms=3.5, label=f"{NAMES[n]}, held-out")[0]
               for n in c.best]  # fmt: skip
    handles += [axes[0].plot([], [], color=COLOURS[n], lw=1.6, alpha=PALE, label=f"{NAMES[n]}, training")[0]
                for n in c.best]  # fmt: skip
    if base:
        handles += axes[0].plot([], [], **ends, label="AdamW's loss at the end")
    if len(c.shorter) > 1:
        label = "Muon, a whole schedule on fewer tokens"
        handles += axes[0].plot([], [], "D", ms=6, color=ORANGE, mec="white", label=label)
    axes[1].legend(handles=handles, fontsize=8, frameon=False)
    axes[0].set_ylabel("nats per token", fontsize=9, color=INK)
    values = np.concatenate(shown)
    low, high = np.nanmin(values), np.nanmax(values)
    axes[0].set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    return figure


def _values_above(axis: Axes, x: list[float], losses: list[float], colour: str) -> None:
    top = axis.get_ylim()[1]
    for place, value in zip(x, losses, strict=True):
        if not value <= top:
            text = f"↑ {value:.2f}" if np.isfinite(value) else "diverged"
            axis.annotate(
                text, (place, 0.97), xycoords=("data", "axes fraction"), ha="center", fontsize=8, color=colour
            )


def _limits(axis: Axes, losses: list[float]) -> None:
    """Sets the limits of an axis so that a diverged run does not flatten the others; its value is at the top."""
    finite = np.array([x for x in losses if np.isfinite(x)])
    best, span = finite.min(), max(6 * (np.median(finite) - finite.min()), 1e-3)
    top = max(min(finite.max(), best + span), best + 1e-3)
    axis.set_ylim(best - 0.1 * (top - best), top + 0.14 * (top - best))


def learning_rate(c: Comparison) -> Figure:
    """A figure of final held-out loss against the learning rate: a line for seed 0, dots for seeds of the best rate."""
    figure = Figure((6.4, 3.8), layout="constrained")
    axis = figure.subplots()
    losses = []
    swept = {name: runs for name, runs in c.sweep.items() if runs}
    for name, runs in swept.items():
        colour, ends = COLOURS[name], [run.losses[1] for run in runs]
        axis.plot([run.lr for run in runs], ends, color=colour, lw=1.8, marker="o", ms=4, zorder=2, label=NAMES[name])
        more = [run.losses[1] for run in c.seeds[name]]
        axis.scatter([c.best[name].lr] * len(more), more, s=34, color=colour, ec="white", lw=0.8, zorder=3)
        losses += ends + more
    _limits(axis, losses)
    _log_ticks(axis, sorted({run.lr for runs in swept.values() for run in runs}))
    for name, runs in swept.items():
        _values_above(axis, [run.lr for run in runs], [run.losses[1] for run in runs], COLOURS[name])
    axis.legend(fontsize=8, frameon=False)
    _style(axis, "held-out loss, nats per token", "learning rate")
    return figure


def update_rms(c: Comparison) -> Figure:
    """A figure of final losses against Muon's update RMS, at the best learning rate. The dashed line is AdamW."""
    figure = Figure((10, 3.8), layout="constrained")
    base = c.best.get("adamw")
    for axis, i, title in zip(figure.subplots(1, 2), (1, 0), ("held-out loss", "training loss"), strict=True):
        ends = [run.losses[i] for run in c.by_rms]
        axis.plot([run.update_rms for run in c.by_rms], ends, color=ORANGE, lw=1.8, marker="o", ms=5)
        if base:
            axis.axhline(base.losses[i], color=BLUE, lw=1.2, ls=(0, (5, 3)))
        _limits(axis, ends)
        if base and np.isfinite(base.losses[i]):
            low, high = axis.get_ylim()
            room = 0.1 * (max(high, base.losses[i]) - min(low, base.losses[i]))
            axis.set_ylim(min(low, base.losses[i] - room), max(high, base.losses[i] + room))
        _values_above(axis, [run.update_rms for run in c.by_rms], ends, ORANGE)
        low, high = axis.get_ylim()
        if base and low <= base.losses[i] <= high:
            _name(axis, c.by_rms[-1].update_rms, base.losses[i], "AdamW", BLUE, below=base.losses[i] > (low + high) / 2)
        _log_ticks(axis, [run.update_rms for run in c.by_rms])
        _style(axis, f"{title}, nats per token", f"update RMS (default {DEFAULT_RMS:g})")
    return figure


def svd_entropy(c: Comparison) -> Figure:
    """A figure of SVD entropy by layer, one panel for each kind of matrix; of experts the mean and range in a layer."""
    runs = measured(c)
    found = {n: {k: np.array(v, float) for k, v in run.matrices["svd_entropy"].items()} for n, run in runs.items()}
    kinds = [k for group in GROUPS for k in in_order(next(iter(found.values()))) if k.startswith(group)]
    figure = Figure((11, 2.4 * -(-len(kinds) // 4)), layout="constrained")
    axes = figure.subplots(-(-len(kinds) // 4), 4, squeeze=False)
    for axis, kind in zip(axes.flat, kinds, strict=False):
        for name, by_kind in found.items():
            values = by_kind[kind].reshape(len(by_kind[kind]), -1)
            layers = np.arange(len(values))
            if values.shape[1] > 1:
                low, high = np.nanmin(values, axis=1), np.nanmax(values, axis=1)
                axis.fill_between(layers, low, high, color=COLOURS[name], alpha=0.18, lw=0)
            axis.plot(layers, np.nanmean(values, 1), color=COLOURS[name], lw=1.6, marker="o", ms=3.5, label=NAMES[name])
        _style(axis, kind, "layer" if axis in axes[-1] else "")
        axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    for axis in axes.flat[len(kinds) :]:
        axis.axis("off")
    axes.flat[0].legend(fontsize=8, frameon=False)
    figure.suptitle("SVD entropy of the weights (1: all singular values equal)", fontsize=11, color=INK)
    return figure
