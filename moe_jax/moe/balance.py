"""Balancing the load of experts: the load-balancing loss and the update of selection biases.

Letters: L layers, G balance groups, C router columns: the experts that a token may choose.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.moe.stats import RouterStats


def update_bias(
    bias: Float[Array, "*L C"],
    tokens_per_expert: Float[Array, "*L C"],
    rate: float,
    form: str = "sign",
    target: tuple[float, ...] = (),
) -> Float[Array, "*L C"]:
    """Updates selection biases (loss-free balancing): b_e + rate · sign(target load_e − load_e).

    tokens_per_expert: counts over the whole optimizer batch.

    form: "sign" (arXiv:2408.15664, algorithm 1) or "centred", which subtracts the mean of the signs, so that the biases
        keep their mean (Moonlight, arXiv:2502.16982, appendix C); the selection is the same.
    target: relative target load of each expert; () gives all the same. It is scaled to the sum of the loads.
    """
    share = jnp.asarray(target or (1.0,) * bias.shape[-1], jnp.float32)
    share = (share / jnp.sum(share)).reshape((1,) * (bias.ndim - 1) + share.shape)
    direction = jnp.sign(jnp.sum(tokens_per_expert, axis=-1, keepdims=True) * share - tokens_per_expert)
    if form == "centred":
        direction -= jnp.mean(direction, axis=-1, keepdims=True)
    return bias + rate * direction


def load_balancing_loss(stats: RouterStats, frequency: Float[Array, "*L G C"] | None = None) -> Float[Array, "*L"]:
    """Load-balancing loss of each layer: the mean over balance groups of C · Σ_e f_e · P_e.

    f_e = share of the expert in the assignments made, which carries no gradient; P_e = mean router probability, which
    does. Groups without a counted token are left out of the mean. `frequency`, if given, is used as f instead of that
    of `stats`.

    Value: 1.0 at uniform routing for every C and K; C/K when all tokens pick the same K experts with probability 1/K
        each. docs/balancing.md converts the coefficients of other frameworks.
    Scope: balance groups, see `LossConfig.balance_batch`; a single group is the whole optimizer batch.
    Source: arXiv:2501.11873, eqs. 2–6, with f divided by K.
    """
    columns = stats.prob_per_expert.shape[-1]
    f = expert_frequency(stats.tokens_per_expert) if frequency is None else frequency
    p = stats.prob_per_expert / jnp.maximum(stats.tokens, 1.0)[..., None]
    per_group = columns * jnp.sum(jax.lax.stop_gradient(f) * p, axis=-1)
    filled = (stats.tokens > 0).astype(jnp.float32)
    return jnp.sum(per_group * filled, axis=-1) / jnp.maximum(jnp.sum(filled, axis=-1), 1.0)


def expert_frequency(load: Float[Array, "*L G C"]) -> Float[Array, "*L G C"]:
    """f, the share of each expert in the assignments made: from 0 to 1/K, summing to 1; 0 where none was made."""
    return load / jnp.maximum(jnp.sum(load, axis=-1, keepdims=True), 1.0)
