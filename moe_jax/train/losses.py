"""The training loss: `total_loss` is the one place that joins coefficients to losses."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.config import DistillConfig, LossConfig, ModelConfig, MoEConfig, RouterLossConfig
from moe_jax.config.layers import MTP_BLOCK
from moe_jax.moe.router_losses import LOSSES, column_targets, mean_over_groups, merge_groups
from moe_jax.moe.stats import RouterStats
from moe_jax.nn.qk_clip import Maxima
from moe_jax.train import prediction
from moe_jax.train.prediction import PredictionSums


class BatchSums(NamedTuple):
    """Everything that the loss needs from a batch, as sums, which add up over micro-batches, devices and hosts."""

    nll: Float[Array, ""]  # Σ weight · negative log-likelihood, nats
    weights: Float[Array, ""]  # Σ weight of a token's target
    router: dict[str, RouterStats]  # by block
    maxima: Maxima | None = None  # QK-clip needs them, the loss does not
    teacher: dict[str, Float[Array, ""]] | None = None  # Σ weight · distance from a teacher, by `DistillConfig.factors`
    mtp: PredictionSums | None = None  # of layers of multi-token prediction


class LossParts(NamedTuple):
    """The terms of the loss with their coefficients, which add up to the differentiated loss, and without (`raw`)."""

    xent: Float[Array, ""]  # nats per token
    router: dict[str, Float[Array, ""]]  # by the names of `LossConfig.router_losses`
    teacher: dict[str, Float[Array, ""]]  # by the names of `DistillConfig.factors`; {} without a teacher
    raw: dict[str, Float[Array, ""]]  # losses without coefficients, by the names they are logged under
    mtp: dict[str, Float[Array, ""]]  # of multi-token prediction; {} without its layers

    def total(self) -> Float[Array, ""]:
        """The loss: the sum of its terms."""
        return self.xent + sum([*self.router.values(), *self.teacher.values(), *self.mtp.values()])

    def scalars(self) -> dict[str, Float[Array, ""]]:
        """The terms of the loss by the names they are logged under."""
        return {"xent": self.xent, **self.router, **self.teacher, **self.mtp}


def total_loss(
    sums: BatchSums,
    cfg: LossConfig,
    step: Int[Array, ""] | int = 0,
    model: ModelConfig | None = None,
    *,
    tokens: Float[Array, ""] | None = None,
    sequences: Float[Array, " heads"] | None = None,
    share: float = 1.0,
    distill: DistillConfig | None = None,
) -> tuple[Float[Array, ""], LossParts]:
    """The training loss at `step`: nats per token, and the router losses averaged (or summed) over layers.

    Of layers of multi-token prediction it takes the mean over the layers, each a mean over its own targets in the
    batch (arXiv:2412.19437, eqs. 24–25). Their routers have losses of their own, joined over these layers alone. The
    weight of a step multiplies all that, so that with a weight of 0 the decoder trains as without the layers.

    sums: of the whole optimizer batch.
    model: decides which blocks have a router, and which of its columns are experts; None: all of them. Blocks whose
        experts a table names have no balance to gain, so that only losses that are linear see their routers.
    tokens: counted tokens that a linear router loss is a mean over; None: those of `sums`.
    sequences: those of the whole batch with a counted token, for the decoder and each layer of multi-token prediction,
        if `sums` are of a micro-batch and the other router losses balance each sequence (`balances_sequences`). Then
        these are the micro-batch's share of the mean over sequences. None: `sums` are of all that a loss is taken over.
    share: weight of the other router losses.
    distill: the factors of the terms of a teacher, if `sums` has any.
    """
    decoder = {path: stats for path, stats in sums.router.items() if path != MTP_BLOCK}
    if tokens is None:
        tokens = next((jnp.sum(s.tokens[:1]) for s in decoder.values()), 0.0)  # every layer sees the same
    tables = model.table_paths if model else set()
    chosen = [s for path, s in decoder.items() if path not in tables]
    weighed = chosen if model is None or model.moe.combine == "one" else list(decoder.values())

    def join(of_bank: Callable[[RouterStats], Array], banks: list[RouterStats]) -> Array:
        of_layers = jnp.mean if cfg.router_loss_layers == "mean" and banks else jnp.sum
        return of_layers(jnp.concatenate([of_bank(stats) for stats in banks] or [jnp.zeros(0)]))

    router, raw, mtp, weight = {}, {}, {}, prediction.coef(cfg, step)
    of_each = None if sums.mtp is None else jnp.maximum(sums.mtp.tokens, 1.0)
    for name, term in cfg.router_losses.items():

        def nonlinear(stats, term=term, heads=slice(1)):
            value = share * _of_bank(stats, cfg, term, model and model.moe)
            return value if sequences is None else value * _share_of_sequences(stats, sequences[heads])

        linear = LOSSES[term.kind].linear
        if linear:
            value = join(LOSSES[term.kind].of, weighed) / jnp.maximum(tokens, 1.0)
        else:
            value = join(nonlinear, chosen)
        weighted = lambda value, term=term: _coef(term, step) * value if term.coef else jnp.zeros_like(value)
        router[name] = weighted(value)
        raw[name.replace(term.kind, f"{term.kind}_raw", 1)] = value
        if MTP_BLOCK in sums.router:
            ahead = functools.partial(nonlinear, heads=slice(1, None))
            of_head = (lambda stats, term=term: LOSSES[term.kind].of(stats) / of_each) if linear else ahead
            value = join(of_head, [sums.router[MTP_BLOCK]])
            mtp[f"mtp/{name}"], raw[f"mtp_raw/{name}"] = weight * weighted(value), value
    weights, teacher = jnp.maximum(sums.weights, 1.0), {}
    for name, total in (sums.teacher or {}).items():
        raw[f"{name}_raw"] = total / weights
        teacher[name] = jnp.where(distill.is_on(step + 1), distill.factors[name], 0.0) * raw[f"{name}_raw"]
    if sums.mtp is not None:
        means = sums.mtp.nll / jnp.maximum(sums.mtp.weights, 1.0)
        raw |= {f"mtp_raw/{k}": means[k - 1] for k in range(1, len(means) + 1)}
        mtp["mtp"] = weight * jnp.mean(means)
    parts = LossParts(sums.nll / weights, router, teacher, raw, mtp)
    return parts.total(), parts


def _of_bank(stats: RouterStats, cfg: LossConfig, term: RouterLossConfig, moe: MoEConfig | None) -> Float[Array, " L"]:
    """A router loss in each layer of a bank, after merging balance groups to the loss' own scope."""
    row, fine = LOSSES[term.kind], stats.tokens.shape[-1]
    if row.by_label:
        return row.of(stats)
    groups = 1 if term.balance_batch == "global" else fine * cfg.balance_unit // term.balance_batch
    stats, of = merge_groups(stats, groups), row.of
    if row.targets:
        of = functools.partial(of, **_targets(stats, term, moe))
    of_groups = row.each_group and term.balance_batch != "global"  # perhaps of one, which may be empty in a micro-batch
    return mean_over_groups(of, stats) if of_groups else of(stats)


def _targets(stats: RouterStats, term: RouterLossConfig, moe: MoEConfig | None) -> dict:
    """The shares of columns that a loss with targets takes."""
    identity, budget = (moe.identity_experts, moe.expert_budget / moe.top_k) if moe else (0, 0.0)
    columns = stats.prob_per_expert.shape[-1]
    if identity and moe.label_groups > 1:  # a token chooses from a group of the experts, and from all of these
        own = (columns - identity) / moe.label_groups
        budget = own / (own + identity)
    return {"targets": column_targets(columns, identity, term.over, budget), "identity": identity}


def _share_of_sequences(stats: RouterStats, whole: Float[Array, " heads"]) -> Float[Array, " L"]:
    """The share of the sequences with a counted token that are in these statistics, whose groups are sequences."""
    return jnp.sum((stats.tokens > 0).astype(jnp.float32), axis=-1) / jnp.maximum(whole, 1.0)


def _coef(term: RouterLossConfig, step: Int[Array, ""] | int) -> Float[Array, ""] | float:
    """The coefficient of a term at a step, counted from 0."""
    if term.start_step == term.stop_step == 0:
        return term.coef
    on = (step >= term.start_step) & ((term.stop_step == 0) | (step < term.stop_step))
    return jnp.where(on, term.coef, 0.0)


def _nonlinear(cfg: LossConfig) -> list[RouterLossConfig]:
    """The router losses that are on and not linear in the sums of the batch."""
    return [term for term in cfg.router_losses.values() if term.coef and not LOSSES[term.kind].linear]


def needs_whole_batch(cfg: LossConfig) -> bool:
    """Whether the gradient of a micro-batch depends on the statistics of the others."""
    by_sequence = lambda term: LOSSES[term.kind].each_group and term.balance_batch == 1 and not cfg.shuffle_tokens
    return not all(map(by_sequence, _nonlinear(cfg)))


def balances_sequences(cfg: LossConfig) -> bool:
    """Whether the router losses that are not linear are means over sequences, each of which one micro-batch has."""
    return bool(_nonlinear(cfg)) and not needs_whole_batch(cfg)


def dot(slopes: BatchSums, sums: BatchSums) -> Float[Array, ""]:
    """Σ slope · sum. `slopes` are the gradient of a function of `BatchSums`, from which integers are left out."""
    numbers = lambda tree: [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    pairs = zip(numbers(slopes.router), numbers(sums.router), strict=True)
    of_teacher = [slope * sums.teacher[name] for name, slope in (slopes.teacher or {}).items()]
    ahead = [] if slopes.mtp is None else [jnp.sum(slopes.mtp.nll * sums.mtp.nll)]
    return slopes.nll * sums.nll + sum([*ahead, *(jnp.sum(slope * x) for slope, x in pairs), *of_teacher])


def describe(cfg: LossConfig, micro_batches: int) -> str:
    """Describes in one line which losses of the routers are on, and whether they are exact."""
    over = lambda b: "the optimizer batch" if b == "global" else "each sequence" if b == 1 else f"{b} sequences"
    shuffled = " at random, token by token" if cfg.shuffle_tokens else ""
    of = lambda t: f" of {t.over} groups of experts" if t.over else ""
    whole = lambda t: LOSSES[t.kind].linear or LOSSES[t.kind].by_label
    scope = lambda t: "" if whole(t) else f" over {over(t.balance_batch)}{shuffled}"
    when = lambda t: (
        (f" after step {t.start_step}" if t.start_step else "") + (f" until step {t.stop_step}" if t.stop_step else "")
    )
    on = [t for t in cfg.router_losses.values() if t.coef]
    if not on:
        return "router losses: none"
    running = cfg.accumulation == "running" and micro_batches > 1 and needs_whole_batch(cfg)
    how = "running counts, an approximation (arXiv:2501.11873, algorithm 1)" if running else "exact"
    terms = " + ".join(f"{t.coef:g} {t.kind}{of(t)}{scope(t)}{when(t)}" for t in on)
    return f"router losses, {cfg.router_loss_layers} over layers, {how}: {terms}"
