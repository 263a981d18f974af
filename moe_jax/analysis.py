"""What the experts do: expert load per domain and the training curve, as arrays and figures.

Letters: L MoE layers, G domains, E experts, K experts per token.
"""

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from moe_jax.metrics import read_metrics
from moe_jax.routing import RouterStats

INK, QUIET = "#1f2430", "#8a90a0"


def selection_frequency(stats: RouterStats) -> Float[np.ndarray, "L G E"]:
    """Share of a domain's tokens that use each expert; a row sums to K. NaN for a domain without tokens."""
    tokens = np.asarray(stats.tokens, np.float64)[..., None]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(tokens > 0, np.asarray(stats.tokens_per_expert) / tokens, np.nan)


def specialisation(stats: RouterStats, top_k: int) -> Float[np.ndarray, " L"]:
    """Mutual information of expert and domain, in bits per assignment: 0 if every domain uses the experts alike.

    Domains are weighted equally, so a large domain does not hide the others.
    """
    p = np.nan_to_num(selection_frequency(stats)) / top_k
    p = p[:, np.asarray(stats.tokens).sum(0) > 0]
    mean = p.mean(axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.nansum(np.where(p > 0, p * np.log2(p / mean), 0.0), axis=(1, 2)) / max(p.shape[1], 1)


def layer_table(stats: RouterStats, top_k: int) -> str:
    """Per layer: maximum load (1 is balanced), unused experts, dropped share, specialisation."""
    counts = np.asarray(stats.tokens_per_expert).sum(1)
    load = counts / np.maximum(counts.sum(-1, keepdims=True), 1) * counts.shape[-1]
    bits = specialisation(stats, top_k)
    dropped = np.asarray(stats.dropped).sum(1) / np.maximum(counts.sum(-1), 1)
    lines = [f"{'layer':>5} {'max load':>9} {'unused':>7} {'dropped':>8} {'I(expert; domain)':>18}"]
    for i in range(len(load)):
        lines.append(
            f"{i:>5} {load[i].max():>9.2f} {(counts[i] == 0).sum():>7} {dropped[i]:>8.2%} {bits[i]:>13.3f} bits"
        )
    return "\n".join(lines)


def plot_expert_domain(stats: RouterStats, domains: tuple[str, ...], top_k: int) -> Figure:
    """One panel a layer: rows are domains, columns experts, colour the selection frequency.

    Experts are ordered by the domain that prefers them most over the others, so specialisation shows as a staircase.
    The colour scale is centred on uniform routing (K/E).
    """
    frequency = selection_frequency(stats)
    layers, _, experts = frequency.shape
    seen = [g for g in range(len(domains)) if not np.isnan(frequency[0, g]).any()]
    frequency = frequency[:, seen]
    uniform = top_k / experts
    columns = min(layers, 4 if experts <= 32 else 2)
    rows = math.ceil(layers / columns)
    width = columns * min(max(3.0, 0.22 * experts), 7) + 1.6
    figure, axes = plt.subplots(
        rows, columns, figsize=(width, rows * (0.42 * len(seen) + 0.9) + 0.8), squeeze=False, layout="constrained"
    )
    top = max(2 * uniform, float(np.nanquantile(frequency, 0.995)))
    norm = matplotlib.colors.TwoSlopeNorm(uniform, 0.0, top)
    image = None
    for i, axis in enumerate(axes.flat):
        if i >= layers:
            axis.axis("off")
            continue
        f = frequency[i]
        preference = f / np.maximum(f.mean(0), 1e-9)
        order = np.lexsort((-preference.max(0), preference.argmax(0)))
        image = axis.imshow(f[:, order], aspect="auto", cmap="RdBu_r", norm=norm, interpolation="nearest")
        axis.set_title(f"layer {i}", fontsize=9, color=INK, loc="left")
        axis.set_yticks(range(len(seen)), [domains[g] for g in seen] if i % columns == 0 else [], fontsize=8)
        axis.set_xticks(
            range(experts) if experts <= 16 else [], order if experts <= 16 else [], fontsize=7, color=QUIET
        )
        axis.set_xticks(np.arange(experts + 1) - 0.5, minor=True)
        axis.set_yticks(np.arange(len(seen) + 1) - 0.5, minor=True)
        axis.grid(which="minor", color="white", lw=1.5)
        axis.tick_params(which="both", length=0)
        axis.spines[:].set_visible(False)
        if experts <= 10:
            for g, e in np.ndindex(len(seen), experts):
                value = f[g, order[e]]
                ink = "white" if abs(norm(value) - 0.5) > 0.32 else INK
                axis.annotate(f"{value:.0%}", (e, g), ha="center", va="center", fontsize=7, color=ink)
    for axis in axes[-1]:
        axis.set_xlabel("expert", fontsize=8, color=QUIET)
    bar = figure.colorbar(image, ax=axes, shrink=0.9, pad=0.02)
    bar.set_ticks([0.0, uniform, top], labels=["0", f"{uniform:.2f} uniform", f"≥{top:.2f}"], fontsize=8)
    bar.outline.set_visible(False)
    figure.suptitle("Share of a domain's tokens sent to each expert (held-out text)", fontsize=11, color=INK)
    return figure


def _smooth(y: np.ndarray, decay: float = 0.8) -> np.ndarray:
    """Exponential moving average without the bias of its start."""
    out, total, weight = np.empty_like(y), 0.0, 0.0
    for i, value in enumerate(y):
        total, weight = decay * total + value, decay * weight + 1.0
        out[i] = total / weight
    return out


def plot_training(workdir: Path | str) -> Figure:
    """Cross-entropy and maximum expert load over the run in `workdir`."""
    rows = read_metrics(workdir)
    m = {k: np.array([np.nan if r[k] is None else r[k] for r in rows], float) for k in ("step", "xent", "max_load")}
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for axis, name, colour in ((left, "xent", "#2f6fb0"), (right, "max_load", "#c4572e")):
        axis.plot(m["step"], m[name], color=colour, lw=0.8, alpha=0.35)
        axis.plot(m["step"], _smooth(m[name]), color=colour, lw=1.8)
    left.set_ylabel("cross-entropy, nats per token")
    right.axhline(1.0, color=QUIET, lw=0.8, ls="--")
    right.annotate(
        "balanced", (m["step"][-1], 1.0), xytext=(0, 3), textcoords="offset points", ha="right", fontsize=8, color=QUIET
    )
    right.set_ylabel("largest expert load ÷ mean")
    for axis in (left, right):
        axis.set_xlabel("step")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#e8e9ee", lw=0.7)
    return figure
