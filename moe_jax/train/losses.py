"""Cross-entropy, load-balancing loss, router z-loss, and the one place where coefficients meet losses."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.config import LoadBalanceConfig, LossConfig
from moe_jax.moe.balance import expert_frequency, load_balancing_loss
from moe_jax.moe.stats import RouterStats
from moe_jax.nn.qk_clip import Maxima


class BatchSums(NamedTuple):
    """Everything the loss needs of a batch, as sums: micro-batches, devices and hosts add up."""

    nll: Float[Array, ""]  # Σ weight · negative log-likelihood, nats
    tokens: Float[Array, ""]  # Σ weight
    router: RouterStats
    maxima: Maxima | None = None  # not for the loss: for QK-clip


class LossParts(NamedTuple):
    """Terms with their coefficients, which add up to the loss that was differentiated, and without."""

    xent: Float[Array, ""]  # nats per token
    router_z: Float[Array, ""]
    load_balance: dict[str, Float[Array, ""]]  # by the names of `LossConfig.load_balance`
    raw: dict[str, Float[Array, ""]]  # router losses without coefficients, by the names they are logged under

    def total(self) -> Float[Array, ""]:
        return self.xent + self.router_z + sum(self.load_balance.values())

    def scalars(self) -> dict[str, Float[Array, ""]]:
        """Every term of the loss by the name it is logged under."""
        return {"xent": self.xent, **self.load_balance, "router_z": self.router_z}


class BatchStatistics(NamedTuple):
    """What the loss of a micro-batch needs to know of the whole optimizer batch.

    Given these, the loss is linear in the micro-batch's sums: the parts of all micro-batches add up to those of the
    optimizer batch.
    """

    weights: Float[Array, ""]  # Σ weight of the optimizer batch
    counted: Float[Array, ""]  # counted tokens of the optimizer batch
    load: Float[Array, "L G E"]  # assignments that f is taken from …
    load_tokens: Float[Array, "L G"]  # … and the tokens they belong to
    prob_tokens: Float[Array, "L G"]  # tokens that P is a mean over
    share: float  # of this micro-batch in the mean over micro-batches: 1 if P is a mean over the optimizer batch


def exact_statistics(weights: Float[Array, ""], stats: RouterStats) -> BatchStatistics:
    """The definition: both means over the optimizer batch, whose statistics these are."""
    counted = jnp.sum(stats.tokens[:1])  # every layer sees the same tokens
    return BatchStatistics(
        weights=weights,
        counted=counted,
        load=stats.tokens_per_expert,
        load_tokens=stats.tokens,
        prob_tokens=stats.tokens,
        share=1.0,
    )


def total_loss(
    sums: BatchSums,
    cfg: LossConfig,
    top_k: int,
    step: Int[Array, ""] | int = 0,
    batch: BatchStatistics | None = None,
) -> tuple[Float[Array, ""], LossParts]:
    """The training loss at `step`: nats per token, and the router losses averaged (or summed) over layers.

    sums: those of a whole optimizer batch; or, with `batch`, those of one micro-batch, whose part in the loss it is.
    """
    batch = exact_statistics(sums.tokens, sums.router) if batch is None else batch
    over_layers = jnp.mean if cfg.router_loss_layers == "mean" and len(sums.router.tokens) else jnp.sum
    z = over_layers(jnp.sum(sums.router.z_sq, axis=-1)) / jnp.maximum(batch.counted, 1.0)
    terms = cfg.load_balance
    raw = {name: over_layers(_load_balance(sums.router, batch, cfg, term, top_k)) for name, term in terms.items()}
    parts = LossParts(
        xent=sums.nll / jnp.maximum(batch.weights, 1.0),
        router_z=cfg.router_z_coef * z,
        load_balance={name: _coef(term, step) * raw[name] for name, term in terms.items()},
        raw={name.replace("load_balance", "load_balance_raw", 1): x for name, x in raw.items()} | {"router_z_raw": z},
    )
    return parts.total(), parts


def _coef(term: LoadBalanceConfig, step: Int[Array, ""] | int) -> Float[Array, ""] | float:
    """The term's coefficient at a step, counted from 0."""
    if term.start_step == term.stop_step == 0:
        return term.coef
    on = (step >= term.start_step) & ((term.stop_step == 0) | (step < term.stop_step))
    return jnp.where(on, term.coef, 0.0)


def _load_balance(
    stats: RouterStats, batch: BatchStatistics, cfg: LossConfig, term: LoadBalanceConfig, top_k: int
) -> Float[Array, " L"]:
    fine = stats.tokens.shape[-1]
    groups = 1 if term.balance_batch == "global" else fine * cfg.balance_unit // term.balance_batch
    merge = lambda x: jnp.sum(x.reshape(x.shape[0], groups, fine // groups, *x.shape[2:]), axis=2)
    stats = jax.tree.map(merge, stats._replace(tokens=batch.prob_tokens))
    frequency = expert_frequency(merge(batch.load), merge(batch.load_tokens), top_k)
    return batch.share * load_balancing_loss(stats, top_k, frequency)


def describe(cfg: LossConfig, micro_batches: int) -> str:
    """One line: which load-balancing losses are on, and whether they are exact."""
    over = lambda b: "the optimizer batch" if b == "global" else "each sequence" if b == 1 else f"{b} sequences"
    dealt = " at random, token by token" if cfg.shuffle_tokens else ""
    when = lambda t: (
        (f" after step {t.start_step}" if t.start_step else "") + (f" until step {t.stop_step}" if t.stop_step else "")
    )
    terms = [f"{t.coef:g} over {over(t.balance_batch)}{dealt}{when(t)}" for t in cfg.load_balance.values() if t.coef]
    if not terms:
        return "load-balancing loss: none"
    running = cfg.accumulation == "running" and micro_batches > 1
    how = "running counts, an approximation (arXiv:2501.11873, algorithm 1)" if running else "exact"
    return f"load-balancing loss, {cfg.router_loss_layers} over layers, {how}: {' + '.join(terms)}"
