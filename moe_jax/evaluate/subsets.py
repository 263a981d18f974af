"""Evaluates a model with a part of its experts: those that the text of a domain uses most.

Use is the mean router probability of an expert over training text of the domain, so that no scored token takes part. In
each layer the experts with the largest are kept, and the others are switched off: scores are those of the kept experts
alone. Document pools do not limit the choice further. Source: EMO, arXiv:2605.06663, §4.2. Its default goes from layer
to layer, and measures each with those before it pruned already; here all layers are measured once, in the whole model.

Letters: L layers with experts, G domains, C router columns, K experts per token.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from tqdm import tqdm

from moe_jax.config import ModelConfig, RunConfig
from moe_jax.config.layers import Place
from moe_jax.data import Corpus
from moe_jax.errors import UserError
from moe_jax.evaluate import switches
from moe_jax.evaluate.analysis import INK, QUIET
from moe_jax.evaluate.drawing import GRID, plain
from moe_jax.evaluate.held_out import LN2, TOTAL
from moe_jax.evaluate.switches import Expert, Switches
from moe_jax.moe.stats import by_depth
from moe_jax.train import step
from moe_jax.train.state import process_rows, put_batch

Use = list[Float[np.ndarray, "G C"]]  # of each layer with experts; a domain without tokens has zeros


class Subsets(NamedTuple):
    """The losses of a model with parts of its experts, by domain."""

    by: str  # the domain whose text chose the experts; "": each domain those of its own
    domains: tuple[str, ...]  # those with text, of training and held out
    shares: tuple[float, ...]  # of the experts of a layer that are kept, the largest first
    kept: list[list[int]]  # number of experts of each layer, by share
    off: dict[str, list[str]]  # the line of `switches` for each share, by the domain that chose
    tokens: Float[np.ndarray, " G"]
    bytes_per_token: Float[np.ndarray, " G"]
    nll: Float[np.ndarray, "shares G"]  # nats
    missing: tuple[str, ...] = ()  # domains without text of one of both, which no number here is of

    def perplexity(self, domain: str) -> list[float]:
        """The perplexity of a domain, or of all together (TOTAL), for each share."""
        ids = list(range(len(self.domains))) if domain == TOTAL else [self.domains.index(domain)]
        xent = self.nll[:, ids].sum(1) / max(self.tokens[ids].sum(), 1.0)
        return [math.exp(min(x, 700.0)) for x in xent]

    @property
    def mean(self) -> list[float]:
        """The mean of the domains' perplexities for each share, each domain counting once."""
        return np.mean([self.perplexity(name) for name in self.domains], axis=0).tolist()


def without_pools(cfg: RunConfig) -> RunConfig:
    """The run with routers that choose from all experts, every token scored."""
    if not cfg.model.moe.pool_min:
        return cfg
    moe = dataclasses.replace(cfg.model.moe, pool_from="all", pool_size=0, pool_prefix=0)
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, moe=moe))


# --- which experts ---------------------------------------------------------------------------------------------------


def measure_use(
    cfg: RunConfig, mesh: Mesh, params: dict, router_bias: dict, corpus: Corpus, batches: int, progress: bool = True
) -> Use:
    """The mean router probability of each expert on the first batches of training text, by domain.

    Of a layer whose experts a table names it is the share of its assignments.
    """
    cfg = without_pools(cfg)
    run = step.make_eval_step(cfg, mesh, len(corpus.domains))
    rows, total = corpus.train_iterator(process_rows(mesh, cfg.data.batch_size)), None
    for _ in tqdm(range(batches), desc="use of experts", unit="batch", disable=None if progress else True, leave=False):
        one = run(params, router_bias, put_batch(next(rows), mesh, cfg, by_domain=True)).router
        total = one if total is None else jax.tree.map(jnp.add, total, one)
    rows.close()
    layers = by_depth(cfg.model.places, jax.tree.map(np.asarray, jax.device_get(total)))
    of = lambda place, stats: stats.tokens_per_expert if place.kind.name == "table" else stats.prob_per_expert
    sums = [np.asarray(of(*pair), np.float64) for pair in zip(_places(cfg.model), layers, strict=True)]
    return [one / np.maximum(one.sum(-1, keepdims=True), 1e-300) for one in sums]


def number_kept(model: ModelConfig, place: Place, share: float) -> int:
    """The number of experts of a layer that are kept: the nearest to the share, and of each group the same."""
    groups = len(_groups(model, place))
    return round(share * place.kind.experts / groups) * groups


def check_shares(model: ModelConfig, shares: Sequence[float]) -> None:
    """Raises UserError for a share of the experts of a layer that is too few for a token's choices."""
    for share in shares:
        for layer, place in enumerate(_places(model)):
            kept, least = number_kept(model, place, share), _least(model, place)
            if kept < least:
                near = 100 * max(_least(model, place) / place.kind.experts for place in _places(model))
                experts, each = f"{place.kind.experts} experts of layer {layer}", len(_groups(model, place))
                of = f" of {experts}, but a token chooses {model.moe.top_k}"
                own = f" of the {place.kind.experts // each} of its label" if _by_label(model, place) else ""
                raise UserError(f"--keep_experts={100 * share:.4g}: keeps {kept}{of}{own}; nearest valid: {near:.4g}")


def _least(model: ModelConfig, place: Place) -> int:
    """The number of experts of a layer without which a token cannot choose as many as it does."""
    if _by_label(model, place):  # a token has the identity experts besides its group
        return max(model.moe.top_k - model.moe.identity_experts, 0) * model.moe.label_groups
    return model.moe.top_k


def _by_label(model: ModelConfig, place: Place) -> bool:
    return model.moe.label_groups > 1 and place.kind.name != "table"


def _groups(model: ModelConfig, place: Place) -> list[Int[np.ndarray, " n"]]:
    """The experts of a layer, in the groups of which a token chooses."""
    experts = np.arange(place.kind.experts)
    if _by_label(model, place):
        return np.split(experts, model.moe.label_groups)
    return [experts[group :: model.moe.shard_groups] for group in range(model.moe.shard_groups)]


def switched_off(model: ModelConfig, use: Sequence[Float[np.ndarray, " C"]], share: float) -> list[Expert]:
    """The experts that are not kept, as (layer, expert). use: of each layer. Ties: the lower id is kept.

    Identity experts compute nothing, and are always kept.
    """
    off = []
    for layer, (place, one) in enumerate(zip(_places(model), use, strict=True)):
        groups = _groups(model, place)
        most = number_kept(model, place, share) // len(groups)
        for members in groups:
            order = members[np.argsort(-one[members], kind="stable")]
            off += [(layer, int(expert)) for expert in order[most:]]
    return sorted(off)


def _places(model: ModelConfig) -> list[Place]:
    return [place for place in model.places if place.kind.experts]


# --- what they are worth ---------------------------------------------------------------------------------------------


def evaluate(
    cfg: RunConfig, mesh: Mesh, params: dict, router_bias: dict, corpus: Corpus, use: Use, shares: Sequence[float],
    by: str = "", *, limit: int = 0, progress: bool = True,
) -> Subsets:  # fmt: skip
    """The losses on held-out text with a share of the experts, for each share.

    use: of `measure_use`. by: the domain whose use chooses the experts; "": each domain's own. limit: batches; 0: all.
    Raises UserError for a domain without training text, for a share that leaves too few experts of a group, and
    for `by` where experts have groups by label.
    """
    cfg, shares = without_pools(cfg), tuple(sorted(shares, reverse=True))
    check_shares(cfg.model, shares)
    model, groups = cfg.model, len(corpus.domains)
    trained = [g for g in range(groups) if use[0][g].any()]
    if by and corpus.domains.index(by) not in trained:
        raise UserError(f"--keep_by={by}: none of its text was in the batches of training text that were read")
    if by and any(_by_label(model, place) for place in _places(model)):
        raise UserError(f"--keep_by={by}: its text uses no expert of other labels (model.moe.label_groups)")
    choosers = [corpus.domains.index(by)] if by else trained
    tables: dict[int, list[Switches | None]] = {}
    lines: dict[str, list[str]] = {}
    for g in choosers:
        off = [switched_off(model, [one[g] for one in use], share) for share in shares]
        lines[corpus.domains[g]] = [switches.spell(one) for one in off]
        tables[g] = []
        for share, one in zip(shares, off, strict=True):
            try:
                tables[g].append(switches.tables(model, off=one))
            except ValueError as error:
                raise UserError(f"--keep_experts={100 * share:.4g}: {error}") from None
    run = step.make_eval_step(cfg, mesh, groups)
    nll, tokens = np.zeros((len(shares), groups)), np.zeros(groups)
    batches = corpus.validation_batches(process_rows(mesh, cfg.data.batch_size), limit)
    bar = {"total": corpus.num_validation_batches(limit), "desc": "evaluate", "unit": "batch", "leave": False}
    for rows in tqdm(batches, **bar, disable=None if progress else True):
        batch = put_batch(rows, mesh, cfg, by_domain=True)
        # Of several processes each has other rows, but all must run the same programs.
        here = set(np.unique(rows["domain_ids"])) if jax.process_count() == 1 else set(range(groups))
        for g in choosers:
            if not by and g not in here:
                continue
            own = np.ones(groups, bool) if by else np.arange(groups) == g
            for i, table in enumerate(tables[g]):
                sums = jax.device_get(run(params, router_bias, batch, None, table)[:2])
                nll[i] += np.where(own, sums[0], 0.0)
                tokens += np.where(own, sums[1], 0.0) if i == 0 else 0.0
    seen = [g for g in range(groups) if tokens[g] > 0]
    kept = [[number_kept(model, place, share) for place in _places(model)] for share in shares]
    size = np.asarray(corpus.bytes_per_token)[seen]
    names, missing = ([corpus.domains[g] for g in range(groups) if (g in seen) == there] for there in (True, False))
    return Subsets(by, tuple(names), shares, kept, lines, tokens[seen], size, nll[:, seen], tuple(missing))


# --- what is shown ---------------------------------------------------------------------------------------------------


def table(found: Subsets) -> str:
    """A table of the perplexity of each domain, with a column for each share of the experts."""
    names = [f"{share:.4g} %" for share in (100 * s for s in found.shares)]
    width = max(12, *map(len, found.domains))
    head = f"{'perplexity':<{width}} {'tokens':>10}" + "".join(f" {name:>9}" for name in names)
    rows = [(name, found.tokens[g], found.perplexity(name)) for g, name in enumerate(found.domains)]
    rows += [("all domains", found.tokens.sum(), found.perplexity(TOTAL)), ("mean", None, found.mean)]
    lines = [head]
    for name, tokens, values in rows:
        shown = "" if tokens is None else f"{int(tokens):,}"
        lines.append(f"{name:<{width}} {shown:>10}" + "".join(f" {value:>9.2f}" for value in values))
    numbers = [",".join(map(str, dict.fromkeys(each))) for each in found.kept]
    lines.append(
        f"experts of a layer: {'; '.join(numbers)}, those that training text of {found.by or 'the same domain'}"
    )
    lines[-1] += " uses most"
    if found.missing:
        why = "nothing is held out" if found.by else "nothing is held out, or was in the training text that was read"
        lines.append(f"not evaluated here, nor in the rows of all domains: {', '.join(found.missing)} ({why})")
    return "\n".join(lines)


def to_json(found: Subsets, number: int, batches: int, overrides: dict[str, Any]) -> str:
    """The text of subsets.json. `experts`: by the domain that chose, the `--experts=` line of each share."""
    size = found.tokens * found.bytes_per_token
    rows = [
        {"domain": name, "tokens": int(found.tokens[g]), "perplexity": found.perplexity(name),
         "bits_per_byte": (found.nll[:, g] / LN2 / max(size[g], 1.0)).tolist()}
        for g, name in enumerate(found.domains)
    ]  # fmt: skip
    body = {
        "step": number, "by": found.by, "shares": found.shares, "kept": found.kept, "training_batches": batches,
        "overrides": overrides, "domains": rows, "domains_without_text": found.missing,
        "perplexity": found.perplexity(TOTAL), "mean": found.mean, "experts": found.off,
    }  # fmt: skip
    return json.dumps(body, indent=1) + "\n"


def figure(found: Subsets) -> Figure:
    """A figure of how much the perplexity of each domain, and of their mean, grows as experts are left out."""
    made = Figure((6.4, 4.0), layout="constrained")
    axis = made.subplots()
    x = [100 * share for share in found.shares]
    growth = lambda values: [100 * (value / values[0] - 1) for value in values]
    for name in found.domains:
        y = growth(found.perplexity(name))
        axis.plot(x, y, color=QUIET, lw=0.9, marker="o", markersize=2.5)
        end = {"textcoords": "offset points", "fontsize": 7, "color": QUIET, "va": "center"}
        axis.annotate(plain(name), (x[-1], y[-1]), (4, 0), **end)
    bold = {"color": "#c4572e", "lw": 2, "marker": "o", "markersize": 4, "zorder": 3}
    axis.plot(x, growth(found.mean), label="mean over domains", **bold)
    axis.set_xscale("log", base=2)
    axis.set_xticks(x, [f"{share:.4g} %" for share in x], fontsize=8)
    axis.minorticks_off()
    axis.invert_xaxis()
    axis.set_xlabel("experts of a layer that are kept", fontsize=9, color=INK)
    axis.set_ylabel("growth of held-out perplexity, %", fontsize=9, color=INK)
    axis.grid(color=GRID, zorder=0)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
    axis.legend(fontsize=8, frameon=False, loc="upper left")
    return made
