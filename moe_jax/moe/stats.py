"""Statistics of a router's choices: sums, so that any two can be added, over tokens, devices and batches.

A slot that is not valid is in none of them. Letters: T tokens, C router columns (the experts E), K experts per token, G
balance groups, L layers, Y labels.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from moe_jax.config.layers import Place
from moe_jax.moe.routing import Routing, pick_chosen

T = TypeVar("T")


class RouterStats(NamedTuple):
    """SUMS over counted tokens, for each balance group but in `histogram`. The scan over layers adds a leading L."""

    tokens: Float[Array, "*L G"]
    tokens_per_expert: Float[Array, "*L G C"]  # assignments; sums to K · tokens where all slots are valid
    prob_per_expert: Float[Array, "*L G C"]  # Σ_t router probability; carries gradient
    z_sq: Float[Array, "*L G"]  # Σ_t logsumexp(logits)²; carries gradient
    dropped: Float[Array, "*L G"]  # assignments lost to capacity; 0 if dropless
    # Of all groups together; None unless the program asks for it (moe/quantile.py).
    histogram: Int[Array, "*L C bins"] | None = None
    # Σ_t router probability by label, of all groups together; carries gradient. None unless the program asks for it.
    by_label: Float[Array, "*L Y C"] | None = None


class Choices(NamedTuple):
    """The experts that every token chose. Only evaluation records them, for one batch at a time."""

    experts: Int[Array, "*L B S K"]  # −1 in a slot that is not valid
    score: Float[Array, "*L B S"]  # Σ over the chosen of the router probability
    weights: Float[Array, "*L B S K"]  # combine weights; 0 in a slot that is not valid


class ChoiceSums(NamedTuple):
    """Further SUMS over counted tokens, which need each token's `Choices`."""

    score: Float[Array, "L G"]
    pairs: Float[Array, "L C C"]  # tokens that chose both; on the diagonal, tokens that chose the expert
    kept: Float[Array, "L G"] | None  # choices that an earlier checkpoint made too; None without one


def router_stats(
    logits: Float[Array, "T C"],
    probs: Float[Array, "T C"],
    routing: Routing,
    computed: Bool[Array, "T K"],
    counted: Bool[Array, " T"],
    group: Int[Array, " T"],
    balance_groups: int,
    in_order: bool = False,
    label: Int[Array, " T"] | None = None,
    labels: int = 0,
) -> RouterStats:
    """Sums over these tokens, by balance group. `computed` is False where a valid slot was dropped.

    label, labels: of each token, and the number of them, for `RouterStats.by_label`; 0: none.

    in_order: slot k of each token is column k (expert choice), so that no array of K · C numbers a token is made.
    """
    valid = routing.valid.astype(jnp.float32)
    if in_order:
        counts_TC = valid
    else:
        one_hot_TKC = jax.nn.one_hot(routing.experts, logits.shape[-1], dtype=jnp.float32)
        counts_TC = jnp.einsum("tkc,tk->tc", one_hot_TKC, valid)
    z = jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1)
    member_TG = jax.nn.one_hot(group, balance_groups, dtype=jnp.float32) * counted.astype(jnp.float32)[:, None]
    dropped = jnp.sum(valid * (1.0 - computed.astype(jnp.float32)), axis=-1)
    # HIGHEST: on accelerators the default would round these sums to bf16 or tf32.
    total = lambda x: jnp.einsum("tg,t...->g...", member_TG, x, precision=jax.lax.Precision.HIGHEST)
    by_label = None
    if labels:
        member_TY = jax.nn.one_hot(label, labels, dtype=jnp.float32) * counted.astype(jnp.float32)[:, None]
        by_label = jnp.einsum("ty,tc->yc", member_TY, probs, precision=jax.lax.Precision.HIGHEST)
    return RouterStats(
        tokens=jnp.sum(member_TG, axis=0),
        tokens_per_expert=total(counts_TC),
        prob_per_expert=total(probs),
        z_sq=total(jnp.square(z)),
        dropped=total(dropped),
        by_label=by_label,
    )


def stats_of(
    logits: Float[Array, "*T C"], experts: Int[Array, "*T K"], counted: Bool[Array, "*T"] | None = None
) -> RouterStats:
    """The statistics of a softmax router of one's own, as one balance group: what the losses of routers take.

    logits: of all experts. experts: those that each token uses. counted: False for padding.
    """
    if experts.shape[:-1] != logits.shape[:-1]:
        raise ValueError(f"stats_of: experts {experts.shape} and logits {logits.shape} must have the same tokens")
    if counted is not None and counted.shape != logits.shape[:-1]:
        raise ValueError(f"stats_of: counted {counted.shape} and logits {logits.shape} must have the same tokens")
    logits = logits.astype(jnp.float32)
    live = jnp.ones(logits.shape[:-1], jnp.float32) if counted is None else counted.astype(jnp.float32)
    counts = jnp.sum(jax.nn.one_hot(experts, logits.shape[-1], dtype=jnp.float32), axis=-2)
    tokens = tuple(range(live.ndim))
    by_column = lambda x: jnp.sum(x * live[..., None], axis=tokens)[None]
    z_sq = jnp.sum(live * jnp.square(jax.nn.logsumexp(logits, axis=-1)))[None]
    load, prob = by_column(counts), by_column(jax.nn.softmax(logits, axis=-1))
    return RouterStats(jnp.sum(live)[None], load, prob, z_sq, jnp.zeros_like(z_sq))


def by_depth(places: Sequence[Place], by_block: dict[str, T]) -> list[T]:
    """The entry of each block with experts, from the first block to the last, without the leading axis L.

    by_block: arrays or pytrees of them with that axis, by the block's path in the parameters.
    """
    entry = lambda place: jax.tree.map(lambda x: x[place.index], by_block[place.path])
    return [entry(place) for place in places if place.path in by_block]


def choices_of(routing: Routing, probs: Float[Array, "T C"], shape: tuple[int, int]) -> Choices:
    """The choices of these tokens, in the `shape` (B, S)."""
    score = jnp.sum(jnp.where(routing.valid, pick_chosen(probs, routing.experts), 0.0), axis=-1)
    experts = jnp.where(routing.valid, routing.experts, -1)
    weights = jnp.where(routing.valid, routing.weights, 0.0)
    return Choices(experts.reshape(*shape, -1), score.reshape(shape), weights.reshape(*shape, -1))


def choice_sums(
    now: Choices,
    earlier: Choices | None,
    counted: Bool[Array, "B S"],
    group: Int[Array, "B S"],
    balance_groups: int,
    num_experts: int,
    in_order: bool = False,
) -> ChoiceSums:
    """Sums over the batch, one layer at a time, so that only one layer's token × expert matrix exists.

    earlier: the choices of another checkpoint for the same tokens. in_order: as in `router_stats`.
    """
    counted_BS1 = counted.astype(jnp.float32)[:, :, None]
    member_BSG = jax.nn.one_hot(group, balance_groups, dtype=jnp.float32) * counted_BS1
    by_group = lambda x: jnp.sum(member_BSG * x[:, :, None], axis=(0, 1))

    def sums_of_layer(pair: tuple[Choices, Choices | None]) -> ChoiceSums:
        now, earlier = pair
        chosen_BSC = _chosen(now, num_experts, in_order) * counted_BS1
        # Zeros and ones: the product is exact in any precision.
        pairs = jnp.einsum("bse,bsf->ef", chosen_BSC, chosen_BSC, out_sharding=PartitionSpec())
        kept = None
        if earlier is not None:
            kept = by_group(jnp.sum(chosen_BSC * _chosen(earlier, num_experts, in_order), axis=-1))
        return ChoiceSums(by_group(now.score), pairs, kept)

    return jax.lax.map(sums_of_layer, (now, earlier))


def _chosen(choices: Choices, num_experts: int, in_order: bool) -> Float[Array, "B S C"]:
    """1 for each expert that a token chose. A slot of −1 is a row of zeros."""
    if in_order:
        return (choices.experts >= 0).astype(jnp.float32)
    return jnp.sum(jax.nn.one_hot(choices.experts, num_experts, dtype=jnp.float32), axis=-2)
