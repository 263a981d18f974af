"""Draws figures of an `Analysis` and of a training run.

Letters: L MoE layers, G domains, E experts, K experts per token.
"""

import math
import textwrap
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moe_jax.evaluate.analysis import HIGH, INK, QUIET, Analysis, high_frequency, number_of, uniform_frequency
from moe_jax.evaluate.drawing import GRID, plain, smooth
from moe_jax.run.log import read_metrics


def all_figures(found: Analysis) -> Iterator[tuple[str, Figure]]:
    """Yields (name, figure) of all figures for which `found` has the numbers."""
    yield "expert_domain", expert_domain(found)
    yield "topk_score", topk_score(found)
    if found.top_k > 1:  # one expert a token is never chosen together with another
        yield "coactivation", coactivation(found)
    if len(_seen(found)) > 1:
        yield "overlap", overlap(found)
    if found.saturation is not None:
        yield "saturation", saturation(found)


# --- parts -----------------------------------------------------------------------------------------------------------


def _names(found: Analysis, which: list[int]) -> list[str]:
    """The names of some domains, escaped for matplotlib."""
    return [plain(found.domains[g]) for g in which]


def _seen(found: Analysis) -> list[int]:
    """The indices of the domains that have tokens."""
    return [g for g in range(len(found.domains)) if found.tokens[g] > 0]


def _spread(layers: int, most: int) -> list[int]:
    """Indices of at most `most` layers, spread evenly from the first to the last."""
    return sorted({round(i) for i in np.linspace(0, layers - 1, min(layers, most))})


def _by_preference(frequency: Float[np.ndarray, "G E"]) -> Int[np.ndarray, " E"]:
    """The experts ordered by the domain that prefers them most, so that specialisation looks like a staircase."""
    preference = frequency / np.maximum(frequency.mean(0), 1e-9)
    return np.lexsort((-preference.max(0), preference.argmax(0)))


def _grid(panels: int, columns: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
    """A figure with panels of `width` × `height` inches, row by row. The rest of the last row stays empty."""
    rows = math.ceil(panels / columns)
    size = (columns * width + 1.6, rows * height + 0.8)
    figure = Figure(size, layout="constrained")  # pyplot's figures are global and must be closed
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[panels:]:
        axis.axis("off")
    return figure, axes


def _cells(axis: Axes, values: np.ndarray, norm: Normalize, cmap: str):
    """Draws values as coloured cells with white gaps between them."""
    axis.set_facecolor("#f3f3f6")  # colour of a cell without a value
    image = axis.imshow(values, aspect="auto", cmap=cmap, norm=norm, interpolation="nearest")
    rows, columns = values.shape
    # With many cells wide gaps would hide them.
    axis.set_xticks(np.arange(columns + 1) - 0.5, minor=True)
    axis.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
    axis.grid(which="minor", color="white", lw=1.5 if columns <= 32 else 0.6)
    axis.tick_params(which="both", length=0)
    axis.spines[:].set_visible(False)
    return image


def _annotate(axis: Axes, values: np.ndarray, norm: Normalize, *, diverging: bool, text: str = "{:.0%}") -> None:
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            dark = abs(norm(value) - 0.5) > 0.32 if diverging else norm(value) > 0.6
            axis.annotate(
                text.format(value), (column, row), ha="center", va="center", fontsize=7, color="white" if dark else INK
            )


def _heat(found: Analysis, axis: Axes, layer: int, norm: Normalize, names: bool):
    """Draws one layer of the expert × domain map."""
    seen = _seen(found)
    f = found.selection_frequency[layer, seen]
    order = _by_preference(f)
    image = _cells(axis, f[:, order], norm, "RdBu_r")
    axis.set_yticks(range(len(seen)), _names(found, seen) if names else [], fontsize=8)
    few = f.shape[1] <= 16
    axis.set_xticks(range(len(order)) if few else [], order if few else [], fontsize=7, color=QUIET)
    if f.shape[1] <= 10:
        _annotate(axis, f[:, order], norm, diverging=True)
    return image


def _around_uniform(frequencies: list[np.ndarray], uniform: float) -> TwoSlopeNorm:
    """A colour scale: white at uniform routing, red above, blue below. The largest 0.5 % of values share one red."""
    top = max(float(np.nanquantile(f, 0.995)) for f in frequencies)
    return TwoSlopeNorm(uniform, 0.0, max(2 * uniform, top))


def _bar(figure: Figure, image, axes: np.ndarray, ticks: dict[float, str]) -> None:
    """Draws the colour scale, at most 3 inches high."""
    low = figure.get_figheight() < 4
    bar = figure.colorbar(
        image, ax=axes, pad=0.02, shrink=0.9 if low else 3 / figure.get_figheight(), anchor=(0.0, 0.5 if low else 0.95)
    )
    bar.set_ticks(list(ticks), labels=list(ticks.values()), fontsize=8)
    bar.outline.set_visible(False)


def _frequency_bar(figure: Figure, image, axes: np.ndarray, norm: TwoSlopeNorm) -> None:
    ticks = {0.0: "0%", norm.vcenter: f"{100 * norm.vcenter:.3g}% uniform", norm.vmax: f"≥{100 * norm.vmax:.2g}%"}
    _bar(figure, image, axes, ticks)


def _sums(found: Analysis) -> str:
    """A second line of a title, on what a row of frequencies adds up to; "" if not all tokens have K experts."""
    sums = found.selection_frequency[:, _seen(found)].sum(-1)
    if not np.allclose(sums, found.top_k, rtol=1e-3):
        return ""
    return f"\n{found.top_k} per token, so that a row adds up to {100 * found.top_k}%"


def _panel(experts: int, domains: int) -> tuple[float, float]:
    """Width and height of an expert × domain map, in inches."""
    return min(max(3.0, 0.22 * experts), 7), (0.42 if domains <= 6 else 0.28) * domains + 0.9


# --- domains ---------------------------------------------------------------------------------------------------------


def expert_domain(found: Analysis, layers: list[int] | None = None) -> Figure:
    """A figure of the share of each domain's tokens that choose each expert, one panel a layer.

    layers: by default up to 16, or 8 if there are more than 32 experts. Rows are domains, columns are experts in the
    order of the domain that prefers them, and the colour scale is centred on uniform routing (K/E).
    """
    count, _, experts = found.selection_frequency.shape
    layers = _spread(count, 16 if experts <= 32 else 8) if layers is None else layers
    columns = min(len(layers), 4 if experts <= 32 else 2)
    figure, axes = _grid(len(layers), columns, *_panel(experts, len(_seen(found))))
    norm = _around_uniform([found.selection_frequency], uniform_frequency(found))
    for i, layer in enumerate(layers):
        axis = axes.flat[i]
        image = _heat(found, axis, layer, norm, names=i % columns == 0)
        axis.set_title(f"layer {number_of(found, layer)}", fontsize=9, color=INK, loc="left")
        if i + columns >= len(layers):
            axis.set_xlabel("expert", fontsize=8, color=QUIET)
    _frequency_bar(figure, image, axes, norm)
    title = "Share of a domain's tokens that choose each expert (held-out text)"
    title = textwrap.fill(title, int(11 * figure.get_figwidth()))  # 11 letters an inch: one panel alone is narrow
    figure.suptitle(title + _sums(found), fontsize=11, color=INK)
    if missing := [name for name, tokens in zip(found.domains, found.tokens, strict=True) if not tokens > 0]:
        figure.supxlabel(f"not evaluated here: {plain(', '.join(missing))}", fontsize=8, color=QUIET)
    return figure


def compare(runs: dict[str, Analysis], layer: int) -> Figure:
    """A figure of one layer of several runs, given by title: panels of `expert_domain` with a common colour scale."""
    experts = max(found.selection_frequency.shape[2] for found in runs.values())
    domains = max(len(_seen(found)) for found in runs.values())
    figure, axes = _grid(len(runs), len(runs), *_panel(experts, domains))
    figure.get_layout_engine().set(wspace=0.08)  # without space a panel's two titles would overlap the next panel's
    norm = _around_uniform(
        [found.selection_frequency[layer] for found in runs.values()],
        min(uniform_frequency(found) for found in runs.values()),
    )
    for (name, found), axis in zip(runs.items(), axes.flat, strict=True):
        image = _heat(found, axis, layer, norm, names=axis is axes.flat[0])
        axis.set_title(plain(name), fontsize=10, color=INK, loc="left")
        axis.set_title(
            f"I(expert; domain) {found.specialisation[layer]:.3f} bits", fontsize=8, color=QUIET, loc="right"
        )
        axis.set_xlabel("expert", fontsize=8, color=QUIET)
    _frequency_bar(figure, image, axes, norm)
    number = number_of(next(iter(runs.values())), layer)
    figure.suptitle(
        f"Share of a domain's tokens that choose each expert of layer {number} (held-out text)",
        fontsize=11,
        color=INK,
    )
    return figure


def overlap(found: Analysis, layers: list[int] | None = None) -> Figure:
    """A figure of the share of high-frequency experts that two domains have in common, one panel a layer.

    layers: by default up to 4. The diagonal shows the number of a domain's high-frequency experts.
    """
    layers, seen = _spread(len(found.overlap), 4) if layers is None else layers, _seen(found)
    names, side = _names(found, seen), max(2.0, 0.42 * len(seen) + 0.5)
    below = 0.055 * max(map(len, names))  # inches for the slanted names
    figure, axes = _grid(len(layers), len(layers), side, side + below)
    norm = Normalize(0.0, 1.0)
    for layer, axis in zip(layers, axes.flat, strict=True):
        shared = found.overlap[layer][np.ix_(seen, seen)]
        own = high_frequency(found.selection_frequency[layer, seen]).sum(-1)
        np.fill_diagonal(shared, np.nan)
        image = _cells(axis, shared, norm, "Blues")
        axis.set_box_aspect(1)
        _annotate(axis, shared, norm, diverging=False, text="{:.2f}" if len(seen) <= 6 else "{:.1f}")
        for g, count in enumerate(own):
            axis.annotate(f"{count}", (g, g), ha="center", va="center", fontsize=7, color=QUIET, style="italic")
        axis.set_xticks(range(len(seen)), names, fontsize=8, rotation=45, ha="right", rotation_mode="anchor")
        axis.set_yticks(range(len(seen)), names if axis is axes.flat[0] else [], fontsize=8)
        axis.set_title(f"layer {number_of(found, layer)}", fontsize=9, color=INK, loc="left")
    _bar(figure, image, axes, {0.0: "0 none shared", 1.0: "1 the same"})
    figure.suptitle("High-frequency experts that two domains share", fontsize=11, color=INK)
    figure.supxlabel(
        f"chosen {HIGH:g} × as often as uniform, or more; shared ÷ all of both; italic: how many",
        fontsize=8,
        color=QUIET,
    )
    return figure


def _by_layer(found: Analysis, values: Float[np.ndarray, "L G"], reference: float, label: str) -> tuple[Figure, Axes]:
    """A figure with a line for each domain over the layers, named at its right end, and a dashed reference line."""
    seen, layers = _seen(found), np.array([number_of(found, layer) for layer in range(len(values))])
    height = max(3.6, 0.22 * len(seen) + 1.4)
    figure = Figure((6.4, height), layout="constrained")
    axis = figure.subplots()
    colours = matplotlib.colormaps["tab10" if len(seen) <= 10 else "tab20"].colors
    ends = [(reference, label, QUIET)]
    axis.axhline(reference, color=QUIET, lw=0.9, ls="--")
    for i, g in enumerate(seen):
        ends.append((float(values[-1, g]), plain(found.domains[g]), colours[i % len(colours)]))
        axis.plot(layers, values[:, g], color=ends[-1][2], lw=1.8, marker="o", ms=4 if len(layers) <= 24 else 0)
    first, last = layers[0], layers[-1]
    span = last - first
    axis.set_xlim((first - 0.5, first + 0.5) if not span else (first - 0.05 * span, last + 0.03 * span))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.margins(y=0.08)
    low, high = axis.get_ylim()
    axis.set_ylim(low, high)
    # Names that would overlap are moved apart; the axis is about an inch lower than the figure.
    ends.sort(key=lambda end: end[0])
    places = _apart(np.array([(value - low) / (high - low) for value, _, _ in ends]), 0.17 / (height - 1))
    for place, (value, name, colour) in zip(places, ends, strict=True):
        axis.annotate(
            name, (1.0, value), xytext=(1.04, place), xycoords=("axes fraction", "data"), textcoords="axes fraction",
            va="center", fontsize=8, color=colour,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.6, "relpos": (0, 0.5), "shrinkA": 2, "shrinkB": 0},
        )  # fmt: skip
    axis.set_xlabel("layer", fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color=GRID, lw=0.7)
    return figure, axis


def _apart(values: np.ndarray, gap: float) -> np.ndarray:
    """The sorted values nearest to `values` (least squares) whose neighbours are at least `gap` apart."""
    shift = gap * np.arange(len(values))
    blocks: list[tuple[float, int]] = []  # (mean, size): pool adjacent violators of v − shift being sorted
    for value in values - shift:
        mean, size = float(value), 1
        while blocks and blocks[-1][0] > mean:
            before, n = blocks.pop()
            mean, size = (before * n + mean * size) / (n + size), n + size
        blocks.append((mean, size))
    return np.repeat([mean for mean, _ in blocks], [size for _, size in blocks]) + shift


def topk_score(found: Analysis) -> Figure:
    """A figure of the router probability of a token's K experts together, by layer and domain.

    The dashed line is where all experts have the same score.
    """
    uniform = uniform_frequency(found)
    figure, axis = _by_layer(found, found.topk_score, uniform, f"K/E = {uniform:.3g}")
    axis.set_ylabel("top-k score sum", fontsize=9)
    figure.suptitle("Router probability on the chosen experts (held-out text)", fontsize=11, color=INK)
    return figure


def saturation(found: Analysis) -> Figure:
    """A figure of the share of a token's experts that an earlier checkpoint chose too, by layer and domain.

    The dashed line is chance.
    """
    chance = uniform_frequency(found)
    figure, axis = _by_layer(found, found.saturation, chance, "chance")
    axis.set_ylabel("router saturation", fontsize=9)
    figure.suptitle(
        f"Share of a token's experts that step {found.earlier_step} chose too (held-out text)", fontsize=11, color=INK
    )
    return figure


# --- experts ---------------------------------------------------------------------------------------------------------


def coactivation(found: Analysis, layers: list[int] | None = None) -> Figure:
    """A figure of the experts that are chosen together, one panel a layer: row i, column j is P(j | i).

    layers: by default up to 3. Experts are in the order of `expert_domain`; the colour scale is centred on uniform
    routing.
    """
    layers = _spread(len(found.coactivation), 3) if layers is None else layers
    experts, seen = found.coactivation.shape[-1], _seen(found)
    off = np.where(np.eye(experts, dtype=bool)[None], np.nan, found.coactivation)
    uniform = max(float(np.nanmean(off)), 1e-9)  # (K − 1)/(E − 1), if every token has K experts
    norm = _around_uniform([off[layers]], uniform)
    side = min(max(2.6, 0.2 * experts), 4.5)
    figure, axes = _grid(len(layers), len(layers), side, side)
    for layer, axis in zip(layers, axes.flat, strict=True):
        order = _by_preference(found.selection_frequency[layer, seen])
        together = off[layer][np.ix_(order, order)]
        image = _cells(axis, together, norm, "RdBu_r")
        axis.set_box_aspect(1)
        few = experts <= 16
        axis.set_xticks(range(experts) if few else [], order if few else [], fontsize=7, color=QUIET)
        axis.set_yticks(range(experts) if few else [], order if few else [], fontsize=7, color=QUIET)
        if experts <= 10:
            _annotate(axis, together, norm, diverging=True)
        axis.set_title(f"layer {number_of(found, layer)}", fontsize=9, color=INK, loc="left")
        axis.set_xlabel("… also choose expert", fontsize=8, color=QUIET)
    axes.flat[0].set_ylabel("of the tokens of expert", fontsize=8, color=QUIET)
    _frequency_bar(figure, image, axes, norm)
    figure.suptitle("Experts chosen by the same token (held-out text)", fontsize=11, color=INK)
    return figure


# --- training --------------------------------------------------------------------------------------------------------


def training(workdir: Path | str) -> Figure:
    """A figure of a run's cross-entropy, in training and on held-out text, and beside it the maximum expert load.

    A run without experts has no panel of loads. A run that was stopped early may have no rows at all.
    """
    rows, evals = read_metrics(workdir), read_metrics(workdir, "eval")
    column = lambda rows, name: np.array([np.nan if r.get(name) is None else r[name] for r in rows], float)
    shown = [("xent", "#2f6fb0", "cross-entropy, nats per token")]
    if any("max_load" in row for row in rows):
        shown.append(("max_load", "#c4572e", "maximum load (largest expert ÷ mean)"))
    figure = Figure((0.3 + 4.5 * len(shown), 3.2), layout="constrained")
    # The mean reaches over 2 % of the figure's width to each side. That of a short run is its values.
    steps, reach = column(rows, "step"), max(1.0, len(rows) / 50)
    for (name, colour, label), axis in zip(shown, figure.subplots(1, len(shown), squeeze=False)[0], strict=True):
        values = column(rows, name)
        axis.plot(steps, values, color=colour, lw=0.8, alpha=0.35, label="training")
        mean = f"training, mean of about {2 * reach:.0f} rows" if reach > 1 else "training, mean"
        axis.plot(steps, smooth(values, 1 - 1 / reach), color=colour, lw=1.8, label=mean)
        if name == "xent" and evals:
            axis.plot(
                column(evals, "step"), column(evals, name), "o", color=INK, ms=4.5, mec="white", label="held-out text"
            )
        if name == "max_load":
            axis.axhline(1.0, color=QUIET, lw=0.8, ls="--", label="balanced")
        axis.legend(frameon=False, fontsize=8, labelcolor=INK)
        axis.set_ylabel(label)
        axis.set_xlabel("step")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color=GRID, lw=0.7)
    return figure
