"""Measures of what the experts do on held-out text, computed in numpy from sums of the router's choices.

Layers that have different numbers of experts are analysed apart, in banks of one number each.

Letters: L layers with experts (of a bank), G domains, E router columns (experts, then identity experts, which compute
nothing), K the largest number of experts per token. The value of a domain without tokens is NaN.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from moe_jax.config.layers import Place
from moe_jax.errors import FileError
from moe_jax.moe.stats import ChoiceSums, RouterStats, by_depth

INK, QUIET = "#1f2430", "#8a90a0"  # colours of text in every figure, here and in experiments/
HIGH = 1.5  # a high-frequency expert is chosen at least this many times as often as under uniform routing


class Analysis(NamedTuple):
    """All measures of this file. `analysis.npz` holds them under the names of the fields."""

    domains: tuple[str, ...]
    top_k: int
    tokens: Float[np.ndarray, " G"]
    selection_frequency: Float[np.ndarray, "L G E"]
    specialisation: Float[np.ndarray, " L"]
    overlap: Float[np.ndarray, "L G G"]
    dead_experts: Int[np.ndarray, " L"]
    dead_experts_by_domain: Float[np.ndarray, "L G"]
    max_load: Float[np.ndarray, " L"]
    dropped: Float[np.ndarray, " L"]
    topk_score: Float[np.ndarray, "L G"]
    coactivation: Float[np.ndarray, "L E E"]
    saturation: Float[np.ndarray, "L G"] | None  # None without an earlier checkpoint
    earlier_step: int | None
    experts_per_token: Float[np.ndarray, "L G"] | None = None  # None in files of earlier versions
    layers: Int[np.ndarray, " L"] | None = None  # numbers of a bank's layers; None: 0 to L − 1, as it is the only bank

    def save(self, path: Path | str) -> None:
        """Writes the measures to an .npz file; fields that are None are left out."""
        np.savez_compressed(path, **{name: value for name, value in self._asdict().items() if value is not None})


def analyse(
    places: Sequence[Place],
    stats: dict[str, RouterStats],
    choices: dict[str, ChoiceSums],
    domains: tuple[str, ...],
    top_k: int,
    earlier_step: int | None = None,
    identity_experts: int = 0,
) -> dict[str, Analysis]:
    """All measures of a model from its sums by block, those of `held_out.evaluate(…, record=True)`.

    The key is the suffix of a bank in the names of files: "" if all layers have the same number of experts, else "_32"
    for those with 32. Without layers with experts the result is empty.
    """
    layers = list(zip(by_depth(places, stats), by_depth(places, choices), strict=True))
    counts = [s.tokens_per_expert.shape[-1] for s, _ in layers]
    found = {}
    for experts in sorted(set(counts)):
        own = [i for i, count in enumerate(counts) if count == experts]
        bank = jax.tree.map(lambda *x: np.stack(x).astype(np.float64), *(layers[i] for i in own))
        one = analyse_bank(*bank, domains, top_k, earlier_step, identity_experts)
        only = len(own) == len(layers)
        found["" if only else f"_{experts - identity_experts}"] = one if only else one._replace(layers=np.array(own))
    return found


def analyse_bank(
    stats: RouterStats,
    choices: ChoiceSums,
    domains: tuple[str, ...],
    top_k: int,
    earlier_step: int | None = None,
    identity_experts: int = 0,
) -> Analysis:
    """All measures of layers with the same number of experts.

    What is about load, and the number of experts per token, is of those that compute something.
    """
    load = stats.tokens_per_expert[..., : stats.tokens_per_expert.shape[-1] - identity_experts]
    real = stats._replace(tokens_per_expert=load)
    return Analysis(
        domains=tuple(domains),
        top_k=top_k,
        tokens=stats.tokens[:1].sum(0),
        selection_frequency=selection_frequency(stats),
        specialisation=specialisation(stats),
        overlap=overlap(high_frequency(selection_frequency(stats))),
        dead_experts=dead_experts(load.sum(1)),
        dead_experts_by_domain=np.where(stats.tokens > 0, dead_experts(load), np.nan),
        max_load=max_load(real),
        dropped=stats.dropped.sum(1) / np.maximum(load.sum((1, 2)), 1.0),
        topk_score=topk_score(choices, stats),
        coactivation=coactivation(choices),
        saturation=None if choices.kept is None else saturation(choices, stats),
        earlier_step=earlier_step,
        experts_per_token=_ratio(load.sum(-1), stats.tokens),
    )


def load(path: Path | str) -> Analysis:
    """The analysis in a file that `Analysis.save` wrote. Raises FileError."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            found = {name: arrays[name] if name in arrays else None for name in Analysis._fields}
            if "max_violation" in arrays:  # files of earlier versions have the maximum load − 1
                found["max_load"] = arrays["max_violation"] + 1.0
        number = lambda name: found[name] if found[name] is None else int(found[name])
        names = tuple(found["domains"].tolist())
        return Analysis(**found | {"domains": names, "top_k": number("top_k"), "earlier_step": number("earlier_step")})
    except Exception as e:  # a damaged zip file, header or array can raise anything
        raise FileError(f"{path}: is not a valid analysis file: {type(e).__name__}: {e}") from None


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, NaN where b is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(b > 0, a / b, np.nan)


def dead_experts(tokens_per_expert: Float[np.ndarray, "*L E"]) -> Int[np.ndarray, "*L"]:
    """Number of experts that no token chose, 0 to E."""
    return (np.asarray(tokens_per_expert) == 0).sum(-1)


def max_load(stats: RouterStats) -> Float[np.ndarray, " L"]:
    """Maximum load: largest load of an expert ÷ mean load, from 1, perfect balance, to E/K, the worst.

    It is the metric `max_load` of training, here over all text at once. MaxVio of arXiv:2408.15664 is smaller by 1.
    """
    load = np.asarray(stats.tokens_per_expert, np.float64).sum(1)
    return _ratio(load.max(-1), load.mean(-1))


def selection_frequency(stats: RouterStats) -> Float[np.ndarray, "L G E"]:
    """Share of a domain's tokens that choose each expert, 0 to 1. A row sums to the mean number of experts per token.

    Source: arXiv:2501.11873, §5.
    """
    return _ratio(np.asarray(stats.tokens_per_expert, np.float64), np.asarray(stats.tokens)[..., None])


def topk_score(choices: ChoiceSums, stats: RouterStats) -> Float[np.ndarray, "L G"]:
    """Sum of the router probabilities of a token's experts, as a mean over a domain's tokens, 0 to 1.

    It is K/E if all experts have the same score. The language-modelling loss raises it; the router losses lower it.
    Source: arXiv:2501.11873, §5.
    """
    return _ratio(np.asarray(choices.score, np.float64), np.asarray(stats.tokens))


def specialisation(stats: RouterStats) -> Float[np.ndarray, " L"]:
    """Mutual information of expert and domain, in bits per assignment, 0 to log₂ G.

    It is 0 if all domains choose experts with the same frequencies. Domains have equal weights, so a large domain does
    not hide the others.
    """
    load = np.asarray(stats.tokens_per_expert, np.float64)
    p = np.nan_to_num(_ratio(load, load.sum(-1, keepdims=True)))
    p = p[:, np.asarray(stats.tokens).sum(0) > 0]
    if not p.size:  # no layer, or no token
        return np.zeros(len(p))
    mean = p.mean(axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.nansum(np.where(p > 0, p * np.log2(p / mean), 0.0), axis=(1, 2)) / p.shape[1]


def high_frequency(frequency: Float[np.ndarray, "*L G E"]) -> Bool[np.ndarray, "*L G E"]:
    """Whether a domain's tokens choose an expert at least `HIGH` times as often as its experts on average."""
    return (frequency >= HIGH * frequency.mean(-1, keepdims=True) * (1 - 1e-9)) & (frequency > 0)


def overlap(high: Bool[np.ndarray, "L G E"]) -> Float[np.ndarray, "L G G"]:
    """Number of high-frequency experts of both domains / of either domain (Jaccard index), 0 to 1.

    NaN where neither has any. arXiv:2501.11873, §5, shows the overlap; the threshold and the ratio are moe_jax's own.
    """
    h = np.asarray(high, np.float64)
    both = np.einsum("lge,lhe->lgh", h, h)
    each = h.sum(-1)
    return _ratio(both, each[:, :, None] + each[:, None, :] - both)


def coactivation(choices: ChoiceSums) -> Float[np.ndarray, "L E E"]:
    """Share of the tokens of expert i that also chose expert j, at [i, j], 0 to 1. It is 1 on the diagonal.

    With K experts for every token a row sums to K − 1 off the diagonal, and uniform routing gives (K − 1)/(E − 1). The
    row of a dead expert is NaN.
    Source: arXiv:2409.02060 (OLMoE), expert co-activation.
    """
    pairs = np.asarray(choices.pairs, np.float64)
    return _ratio(pairs, np.diagonal(pairs, axis1=1, axis2=2)[:, :, None])


def saturation(choices: ChoiceSums, stats: RouterStats) -> Float[np.ndarray, "L G"]:
    """Share of a domain's choices of experts that the earlier checkpoint made too, 0 to 1; K/E by chance.

    Source: arXiv:2409.02060 (OLMoE), router saturation, which compares with the end of training.
    """
    return _ratio(np.asarray(choices.kept, np.float64), np.asarray(stats.tokens_per_expert, np.float64).sum(-1))


def uniform_frequency(found: Analysis) -> float:
    """Share of the tokens that would choose an expert under uniform routing: mean number of experts per token / E."""
    return max(float(np.nanmean(found.selection_frequency)), 1e-9)


def number_of(found: Analysis, layer: int) -> int:
    """The number, among all layers with experts, of a layer of a bank."""
    return layer if found.layers is None else int(found.layers[layer])


def layer_table(found: Analysis) -> str:
    """A table of the balance and specialisation of each layer. Domains have equal weights in its means."""
    score = np.nanmean(found.topk_score, axis=1) / uniform_frequency(found)
    columns = {
        "layer": [f"{number_of(found, i)}" for i in range(len(score))],
        "maximum load": [f"{x:.2f}" for x in found.max_load],
        "dead experts": [f"{x}" for x in found.dead_experts],
        "dropped": [f"{x:.2%}" for x in found.dropped],
        "top-k score ÷ (K/E)": [f"{x:.2f}" for x in score],
        "I(expert; domain)": [f"{x:.3f} bits" for x in found.specialisation],
    }
    used = found.experts_per_token
    if used is not None and not np.allclose(used[~np.isnan(used)], found.top_k):
        columns["experts a token"] = [f"{x:.2f}" for x in np.nanmean(used, axis=1)]
    if found.saturation is not None:
        columns[f"as at step {found.earlier_step}"] = [f"{x:.1%}" for x in np.nanmean(found.saturation, axis=1)]
    rows = zip(*columns.values(), strict=True)
    widths = [max(map(len, (name, *cells))) for name, cells in columns.items()]
    line = lambda cells: "  ".join(cell.rjust(n) for cell, n in zip(cells, widths, strict=True))
    return "\n".join([line(columns), *map(line, rows)])
