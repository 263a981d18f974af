"""Inputs and targets of layers of multi-token prediction in a batch, and the sums of their loss.

Layer k predicts, at the place of token t, the token t + k + 1 of the same document: the target of token t + k. A token
whose document has no token t + k is padding for the layer: it uses no expert, is in no statistic and predicts nothing.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe_jax.config import LossConfig
from moe_jax.model import Ahead
from moe_jax.train import cross_entropy
from moe_jax.train.state import Batch


class PredictionSums(NamedTuple):
    """SUMS of a batch for each of the K layers of multi-token prediction."""

    nll: Float[Array, " K"]  # Σ weight · negative log-likelihood, nats
    weights: Float[Array, " K"]  # Σ weight of a token's target
    tokens: Float[Array, " K"]  # counted tokens


def _later(x: Array, k: int) -> Array:
    """Moves entries k places to the front of the last axis, and fills it with zeros at the end."""
    return jnp.pad(x[..., k:], [(0, 0)] * (x.ndim - 1) + [(0, k)])


def _counted(batch: Batch, k: int) -> Bool[Array, "*N B S"]:
    """Whether a token and the k-th after it are of one document."""
    return (batch.segment_ids > 0) & (batch.segment_ids == _later(batch.segment_ids, k))


def ahead(batch: Batch, layers: int) -> Ahead:
    """The tokens that each layer reads."""
    depths = range(1, layers + 1)
    tokens, counted = zip(*((_later(batch.tokens, k), _counted(batch, k)) for k in depths), strict=True)
    return Ahead(jnp.stack(tokens), jnp.stack(counted))


def _weights(batch: Batch, k: int) -> Float[Array, "*N B S"]:
    return jnp.where(_counted(batch, k), _later(batch.weights, k), 0.0)


def without_nll(batch: Batch, layers: int) -> PredictionSums | None:
    """The sums that do not depend on the model, with zeros for the others; None without layers.

    batch: one, or several with a leading axis.
    """
    if not layers:
        return None
    depths = range(1, layers + 1)
    tokens = [jnp.sum(_counted(batch, k), dtype=jnp.float32) for k in depths]
    weights = [jnp.sum(_weights(batch, k)) for k in depths]
    return PredictionSums(jnp.zeros(layers), jnp.stack(weights), jnp.stack(tokens))


def sequences(batch: Batch, layers: int) -> Float[Array, " heads"]:
    """The number of sequences with a token that is counted: by the decoder, and by each layer.

    batch: one, or several with a leading axis.
    """
    return jnp.stack([jnp.sum(jnp.any(_counted(batch, k), axis=-1), dtype=jnp.float32) for k in range(layers + 1)])


def sums(hidden: Float[Array, "K B S D"], output: Float[Array, "V D"], batch: Batch) -> PredictionSums:
    """All sums. hidden: `Output.ahead`. output: maps it to logits, of which only those of a chunk exist at a time."""
    layers = hidden.shape[0]
    nll = [
        cross_entropy.summed_nll(hidden[k - 1], output, _later(batch.targets, k), _weights(batch, k))
        for k in range(1, layers + 1)
    ]
    return without_nll(batch, layers)._replace(nll=jnp.stack(nll))


def coef(cfg: LossConfig, step: Array | int) -> Float[Array, ""] | float:
    """The weight, at a step counted from 0, of the layers' cross-entropies and of the losses of their routers."""
    return cfg.mtp_coef if not cfg.mtp_stop else jnp.where(step < cfg.mtp_stop, cfg.mtp_coef, cfg.mtp_late_coef)


def describe(cfg: LossConfig, layers: int, steps: int) -> str:
    """Describes the loss in one line. steps: of the whole run."""
    say = lambda coef: f"{coef:g}" if coef else "0 (off)"
    late = f", {say(cfg.mtp_late_coef)} after step {cfg.mtp_stop}" if cfg.mtp_stop else ""
    late += f", which a run of {steps} steps does not reach" if cfg.mtp_stop >= steps else ""
    word = "layer" if layers == 1 else "layers"
    return f"multi-token prediction: {layers} {word}, weight {say(cfg.mtp_coef)}{late}"
