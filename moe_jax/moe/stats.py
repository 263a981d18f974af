"""Statistics of a router's choices: sums, so that any two can be added, over tokens, devices and batches.

Letters: T tokens, E experts, K experts per token, G balance groups, L layers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from moe_jax.moe.routing import Routing, pick_chosen


class RouterStats(NamedTuple):
    """SUMS over counted tokens, for each balance group. The scan over layers adds a leading L."""

    tokens: Float[Array, "*L G"]
    tokens_per_expert: Float[Array, "*L G E"]  # assignments; sums to K · tokens
    prob_per_expert: Float[Array, "*L G E"]  # Σ_t router probability; carries gradient
    z_sq: Float[Array, "*L G"]  # Σ_t logsumexp(logits)²; carries gradient
    dropped: Float[Array, "*L G"]  # assignments lost to capacity; 0 if dropless


class Choices(NamedTuple):
    """The experts that every token chose. Only evaluation records them, for one batch at a time."""

    experts: Int[Array, "*L B S K"]
    score: Float[Array, "*L B S"]  # Σ over the chosen K of the router probability


class ChoiceSums(NamedTuple):
    """Further SUMS over counted tokens, which need each token's `Choices`."""

    score: Float[Array, "L G"]
    pairs: Float[Array, "L E E"]  # tokens that chose both; on the diagonal, tokens that chose the expert
    kept: Float[Array, "L G"] | None  # choices that an earlier checkpoint made too; None without one


def router_stats(
    logits: Float[Array, "T E"],
    probs: Float[Array, "T E"],
    routing: Routing,
    computed: Bool[Array, "T K"],
    counted: Bool[Array, " T"],
    group: Int[Array, " T"],
    balance_groups: int,
) -> RouterStats:
    """Sums over these tokens, by balance group. `computed` is False where a valid slot was dropped."""
    one_hot_EK = jax.nn.one_hot(routing.experts, logits.shape[-1], dtype=jnp.float32)
    valid = routing.valid.astype(jnp.float32)
    counts_TE = jnp.einsum("tke,tk->te", one_hot_EK, valid)
    z = jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1)
    member_TG = jax.nn.one_hot(group, balance_groups, dtype=jnp.float32) * counted.astype(jnp.float32)[:, None]
    dropped = jnp.sum(valid * (1.0 - computed.astype(jnp.float32)), axis=-1)
    # HIGHEST: on accelerators the default would round these sums to bf16 or tf32.
    total = lambda x: jnp.einsum("tg,t...->g...", member_TG, x, precision=jax.lax.Precision.HIGHEST)
    return RouterStats(
        tokens=jnp.sum(member_TG, axis=0),
        tokens_per_expert=total(counts_TE),
        prob_per_expert=total(probs),
        z_sq=total(jnp.square(z)),
        dropped=total(dropped),
    )


def choices_of(routing: Routing, probs: Float[Array, "T E"], shape: tuple[int, int]) -> Choices:
    """The choices of these tokens, in the `shape` (B, S)."""
    score = jnp.sum(pick_chosen(probs, routing.experts), axis=-1)
    return Choices(routing.experts.reshape(*shape, -1), score.reshape(shape))


def choice_sums(
    now: Choices,
    earlier: Choices | None,
    counted: Bool[Array, "B S"],
    group: Int[Array, "B S"],
    balance_groups: int,
    num_experts: int,
) -> ChoiceSums:
    """Sums over the batch, one layer at a time, so that only one layer's token × expert matrix exists.

    earlier: the choices of another checkpoint for the same tokens.
    """
    counted_BS1 = counted.astype(jnp.float32)[:, :, None]
    member_BSG = jax.nn.one_hot(group, balance_groups, dtype=jnp.float32) * counted_BS1
    by_group = lambda x: jnp.sum(member_BSG * x[:, :, None], axis=(0, 1))

    def sums_of_layer(pair: tuple[Choices, Choices | None]) -> ChoiceSums:
        now, earlier = pair
        chosen_BSE = _chosen(now, num_experts) * counted_BS1
        # Zeros and ones: the product is exact in any precision.
        pairs = jnp.einsum("bse,bsf->ef", chosen_BSE, chosen_BSE, out_sharding=PartitionSpec())
        kept = None
        if earlier is not None:
            kept = by_group(jnp.sum(chosen_BSE * _chosen(earlier, num_experts), axis=-1))
        return ChoiceSums(by_group(now.score), pairs, kept)

    return jax.lax.map(sums_of_layer, (now, earlier))


def _chosen(choices: Choices, num_experts: int) -> Float[Array, "B S E"]:
    return jnp.sum(jax.nn.one_hot(choices.experts, num_experts, dtype=jnp.float32), axis=-2)
