"""The training loss: `total_loss` is the one place that joins coefficients to losses."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.config import LoadBalanceConfig, LossConfig
from moe_jax.moe.balance import expert_frequency, load_balancing_loss
from moe_jax.moe.stats import RouterStats
from moe_jax.nn.qk_clip import Maxima


class BatchSums(NamedTuple):
    """Everything that the loss needs from a batch, as sums, which add up over micro-batches, devices and hosts."""

    nll: Float[Array, ""]  # Σ weight · negative log-likelihood, nats
    weights: Float[Array, ""]  # Σ weight of a token's target
    router: dict[str, RouterStats]  # by block
    maxima: Maxima | None = None  # QK-clip needs them, the loss does not


class LossParts(NamedTuple):
    """The terms of the loss with their coefficients, which add up to the differentiated loss, and without (`raw`)."""

    xent: Float[Array, ""]  # nats per token
    router_z: Float[Array, ""]
    load_balance: dict[str, Float[Array, ""]]  # by the names of `LossConfig.load_balance`
    raw: dict[str, Float[Array, ""]]  # router losses without coefficients, by the names they are logged under

    def total(self) -> Float[Array, ""]:
        """The loss: the sum of its terms."""
        return self.xent + self.router_z + sum(self.load_balance.values())

    def scalars(self) -> dict[str, Float[Array, ""]]:
        """The terms of the loss by the names they are logged under."""
        return {"xent": self.xent, **self.load_balance, "router_z": self.router_z}


class BatchStatistics(NamedTuple):
    """The statistics of the whole optimizer batch that the loss of each micro-batch depends on.

    Given these, the loss is linear in the micro-batch's sums: the parts of all micro-batches add up to those of the
    optimizer batch.
    """

    weights: Float[Array, ""]  # Σ weight, as in `BatchSums`
    tokens: Float[Array, ""] | float  # counted tokens, as in `RouterStats`, of one layer
    load: dict[str, Float[Array, "L G C"]]  # the assignments that f is computed from, by block
    prob_tokens: dict[str, Float[Array, "L G"]]  # the number of tokens that P is a mean over, by block
    share: float  # weight of a micro-batch in a mean over them; 1 where P is a mean over the optimizer batch


def exact_statistics(weights: Float[Array, ""], stats: dict[str, RouterStats]) -> BatchStatistics:
    """The exact statistics: `stats` are those of the optimizer batch, and f and P are means over it."""
    return BatchStatistics(
        weights=weights,
        tokens=next((jnp.sum(s.tokens[:1]) for s in stats.values()), 0.0),  # every layer sees the same
        load={path: s.tokens_per_expert for path, s in stats.items()},
        prob_tokens={path: s.tokens for path, s in stats.items()},
        share=1.0,
    )


def total_loss(
    sums: BatchSums,
    cfg: LossConfig,
    step: Int[Array, ""] | int = 0,
    batch: BatchStatistics | None = None,
) -> tuple[Float[Array, ""], LossParts]:
    """The training loss at `step`: nats per token, and the router losses averaged (or summed) over layers.

    sums: of the whole optimizer batch. With `batch`, they are of one micro-batch, and so is the result.
    """
    batch = exact_statistics(sums.weights, sums.router) if batch is None else batch
    of_layers = jnp.mean if cfg.router_loss_layers == "mean" and sums.router else jnp.sum
    join = lambda by_block: of_layers(jnp.concatenate(by_block or [jnp.zeros(0)]))
    # The router z-loss, arXiv:2202.08906, eq. 5: mean of logsumexp(router logits)² over tokens; (log E)² for zeros.
    z = join([jnp.sum(s.z_sq, axis=-1) for s in sums.router.values()]) / jnp.maximum(batch.tokens, 1.0)
    terms = cfg.load_balance
    raw = {
        name: join([_load_balance(path, s, batch, cfg, term) for path, s in sums.router.items()])
        for name, term in terms.items()
    }
    parts = LossParts(
        xent=sums.nll / jnp.maximum(batch.weights, 1.0),
        router_z=cfg.router_z_coef * z,
        load_balance={name: _coef(term, step) * raw[name] for name, term in terms.items()},
        raw={name.replace("load_balance", "load_balance_raw", 1): x for name, x in raw.items()} | {"router_z_raw": z},
    )
    return parts.total(), parts


def _coef(term: LoadBalanceConfig, step: Int[Array, ""] | int) -> Float[Array, ""] | float:
    """The coefficient of a term at a step, counted from 0."""
    if term.start_step == term.stop_step == 0:
        return term.coef
    on = (step >= term.start_step) & ((term.stop_step == 0) | (step < term.stop_step))
    return jnp.where(on, term.coef, 0.0)


def _load_balance(
    path: str, stats: RouterStats, batch: BatchStatistics, cfg: LossConfig, term: LoadBalanceConfig
) -> Float[Array, " L"]:
    """One term of the load-balancing loss in each layer, after merging balance groups to the term's own size."""
    fine = stats.tokens.shape[-1]
    groups = 1 if term.balance_batch == "global" else fine * cfg.balance_unit // term.balance_batch
    merge = lambda x: jnp.sum(x.reshape(x.shape[0], groups, fine // groups, *x.shape[2:]), axis=2)
    stats = jax.tree.map(merge, stats._replace(tokens=batch.prob_tokens[path], histogram=None))
    return batch.share * load_balancing_loss(stats, expert_frequency(merge(batch.load[path])))


def describe(cfg: LossConfig, micro_batches: int) -> str:
    """Describes in one line which load-balancing losses are on, and whether they are exact."""
    over = lambda b: "the optimizer batch" if b == "global" else "each sequence" if b == 1 else f"{b} sequences"
    shuffled = " at random, token by token" if cfg.shuffle_tokens else ""
    when = lambda t: (
        (f" after step {t.start_step}" if t.start_step else "") + (f" until step {t.stop_step}" if t.stop_step else "")
    )
    terms = [f"{t.coef:g} over {over(t.balance_batch)}{shuffled}{when(t)}" for t in cfg.load_balance.values() if t.coef]
    if not terms:
        return "load-balancing loss: none"
    running = cfg.accumulation == "running" and micro_batches > 1
    how = "running counts, an approximation (arXiv:2501.11873, algorithm 1)" if running else "exact"
    return f"load-balancing loss, {cfg.router_loss_layers} over layers, {how}: {' + '.join(terms)}"
