"""Router logits → which experts each token uses, and with what weights. Pure functions without parameters.

`route` is a list of stages: mix in noise → mask → score → perturb → rank → limit to groups → force → select → cut →
weigh → drop what is light → validate. Each is a function of a few lines.

Letters: T tokens, C router columns (E experts, then identity experts), K slots of a token: the experts that it chooses.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from moe_jax.config import MoEConfig
from moe_jax.parallel.axes import varying_like


class Routing(NamedTuple):
    """The experts of each token, and their weights: all that the experts need to know."""

    experts: Int[Array, "T K"]  # expert ids; identity experts from E on
    weights: Float[Array, "T K"]  # combine weights, float32
    valid: Bool[Array, "T K"]  # False: this slot does nothing and costs nothing
    priority: Float[Array, "T K"] | None = None  # what an expert of limited capacity takes first; None: token order


class Knobs(NamedTuple):
    """Numbers that move during training; train/knobs.py makes them. None is off and costs nothing."""

    key: Key[Array, ""]  # of the step, then of the layer
    random: Float[Array, ""] | None = None  # share of noise in the logits
    noise: Float[Array, ""] | None = None  # factor of the Gumbel noise that the selection sees
    temperature: Float[Array, ""] | None = None  # divisor of the logits that the threshold sees
    threshold: Float[Array, ""] | None = None  # least score of a choice after the first


class Facts(NamedTuple):
    """What the router uses besides logits: facts about tokens, and the switches of the layer."""

    counted: Bool[Array, " T"]  # False: padding
    index: Int[Array, " T"] | None = None  # number of the token in the optimizer batch, for noise
    table: Int[Array, "T K"] | None = None  # experts that a table names
    sequences: int = 1  # sequences of equal length that the tokens are, for expert choice
    switches: Int[Array, " C"] | None = None  # of the layer: −1 off, 1 on, 0 as the router says; None: all 0
    pool: Bool[Array, "T C"] | None = None  # experts that a token may choose, outside of which logits are −∞
    label: Int[Array, " T"] | None = None  # where experts have groups by label


def route(
    logits: Float[Array, "T C"],
    bias: Float[Array, " C"] | None,
    facts: Facts,
    cfg: MoEConfig,
    knobs: Knobs | None = None,
) -> tuple[Routing, Float[Array, "T C"]]:
    """Chooses experts for every token.

    `bias` moves the selection only, never the weights (DeepSeek-V3's loss-free balancing, arXiv:2408.15664).

    Returns the routing and the router probabilities over *all* columns, each row summing to 1: the softmax of the
    logits, or other scores divided by their sum. The load-balancing loss uses them.
    """
    moving = knobs if facts.table is None else None  # what a table names, no noise changes
    logits = mask(mix_noise(logits.astype(jnp.float32), facts, moving), facts)
    scores, probs = score(logits, cfg)
    seen = perturb(logits, facts, moving)
    ranked = rank(seen, scores if seen is logits else score(seen, cfg)[0], bias, cfg)
    ranked = exclude(ranked, facts)
    if cfg.top_groups < cfg.num_groups:
        ranked = limit_groups(ranked, cfg)
    experts, chosen = select(force(ranked, facts), facts, cfg)
    chosen = cut(seen, experts, chosen, cfg, moving)
    weights = weigh(logits, scores, experts, chosen, cfg)
    if cfg.min_ratio:
        chosen = drop_light(weights, chosen, cfg)
        weights = weigh(logits, scores, experts, chosen, cfg)
    valid = validate(experts, chosen, facts)
    return Routing(experts, weights, valid, prioritise(weights, facts, cfg, knobs)), probs


# --- the stages ------------------------------------------------------------------------------------------------------


def mix_noise(logits: Float[Array, "T C"], facts: Facts, knobs: Knobs | None) -> Float[Array, "T C"]:
    """Mixes logits with a share `knobs.random` of normal noise of their own mean and deviation over a token's columns.

    Routing begins at random and ends learned. Source: stochastic routing warm-up of Ling, arXiv:2503.05139, §3.2, which
    takes running moments of all logits where this takes those of the token.
    """
    if knobs is None or knobs.random is None:
        return logits
    like = jax.lax.stop_gradient(logits)
    mean, std = jnp.mean(like, axis=-1, keepdims=True), jnp.std(like, axis=-1, keepdims=True)
    noise = _draw(jax.random.normal, knobs, "random", facts, logits)
    return (1 - knobs.random) * logits + knobs.random * (mean + std * noise)


def mask(logits: Float[Array, "T C"], facts: Facts) -> Float[Array, "T C"]:
    """Sets the logits of experts that are switched off to −10⁹, so that their score is 0 and no other one counts them.

    Source: Mixture of Tunable Experts, arXiv:2502.11096.
    """
    return logits if facts.switches is None else jnp.where(_off(facts, logits), OFF, logits)


def score(logits: Float[Array, "T C"], cfg: MoEConfig) -> tuple[Float[Array, "T C"], Float[Array, "T C"]]:
    """Returns scores by `moe.score`, and them as probabilities, which sum to 1.

    softmax; sigmoid (DeepSeek-V3, arXiv:2412.19437); sqrt_softplus: √log(1 + e^z) (DeepSeek-V4), which has no upper
    bound.
    """
    if cfg.score == "softmax":
        probs = jax.nn.softmax(logits, axis=-1)
        return probs, probs
    scores = jax.nn.sigmoid(logits) if cfg.score == "sigmoid" else _sqrt_softplus(logits)
    return scores, scores / (jnp.sum(scores, axis=-1, keepdims=True) + 1e-20)


def perturb(logits: Float[Array, "T C"], facts: Facts, knobs: Knobs | None) -> Float[Array, "T C"]:
    """Adds Gumbel noise, with which the best K are a random draw of K by their softmax. Weights do not see it."""
    if knobs is None or knobs.noise is None:
        return logits
    return logits + knobs.noise * _draw(jax.random.gumbel, knobs, "gumbel", facts, logits)


def rank(
    logits: Float[Array, "T C"], scores: Float[Array, "T C"], bias: Float[Array, " C"] | None, cfg: MoEConfig
) -> Float[Array, "T C"]:
    """Returns what the selection compares: scores plus bias. It carries no gradient.

    Where the softmax is taken over the chosen K, logits are ranked.
    """
    ranked = jax.lax.stop_gradient(logits if cfg.score_order == "topk_score" else scores)
    return ranked if bias is None else ranked + jax.lax.stop_gradient(bias.astype(jnp.float32))[None, :]


def exclude(ranked: Float[Array, "T C"], facts: Facts) -> Float[Array, "T C"]:
    """Ranks experts outside a token's pool, and those that are switched off, below all others.

    A score in the pool may underflow to the 0 of one outside, and a selection bias may lift one that is off.
    """
    ranked = ranked if facts.pool is None else jnp.where(facts.pool, ranked, -jnp.inf)
    return ranked if facts.switches is None else jnp.where(_off(facts, ranked), -jnp.inf, ranked)


def limit_groups(ranked: Float[Array, "T E"], cfg: MoEConfig) -> Float[Array, "T E"]:
    """Sets the scores of experts outside a token's best groups to −∞ (group-limited selection).

    `top_groups` groups are kept. By `group_score` a group is ranked by the sum of its best two scores, however small K
    is (DeepSeek-V3's code), or by its best score (arXiv:2405.04434, §2.2.1).
    """
    tokens, experts = ranked.shape
    grouped = ranked.reshape(tokens, cfg.num_groups, experts // cfg.num_groups)
    best, _ = jax.lax.top_k(grouped, min({"best_two": 2, "best": 1}[cfg.group_score], grouped.shape[-1]))
    _, groups = jax.lax.top_k(jnp.sum(best, axis=-1), cfg.top_groups)
    kept = jnp.any(jax.nn.one_hot(groups, cfg.num_groups, dtype=bool), axis=1)
    return jnp.where(kept[:, :, None], grouped, -jnp.inf).reshape(tokens, experts)


def force(ranked: Float[Array, "T C"], facts: Facts) -> Float[Array, "T C"]:
    """Ranks experts that are switched on above all others, also those outside a token's best groups, but not those of
    another label."""
    if facts.switches is None:
        return ranked
    on = _on(facts, ranked) if facts.label is None else _on(facts, ranked) & facts.pool
    return jnp.where(on, jnp.inf, ranked)


def select(
    ranked: Float[Array, "T C"], facts: Facts, cfg: MoEConfig
) -> tuple[Int[Array, "T K"], Bool[Array, "T K"] | None]:
    """Returns the experts of each token, and which slots were chosen (None: all). Ties go to the lower id.

    A table's experts are those of the token's id, and one that is switched off leaves its slot empty. With expert
    choice a slot is an expert, all of them in order.
    """
    if facts.table is not None:
        return facts.table, None if facts.switches is None else ~_off(facts, facts.table)[0, facts.table]
    if cfg.shard_groups > 1:
        return choose_in_shards(ranked, cfg), None
    if cfg.choice == "token":
        return jax.lax.top_k(ranked, cfg.top_k)[1], None
    experts = varying_like(jnp.arange(ranked.shape[1])[None, :], ranked)
    return jnp.broadcast_to(experts, ranked.shape), choose_tokens(ranked, facts, cfg)


def choose_tokens(ranked: Float[Array, "T E"], facts: Facts, cfg: MoEConfig) -> Bool[Array, "T E"]:
    """Lets each expert choose the ⌈K·S/E⌉ best tokens of each sequence of S (expert choice, arXiv:2202.09368, §3.2).

    A sequence is never split over devices or micro-batches, so that the choice is the same on every mesh. Padding is
    chosen last, and does nothing then. Ties go to the earlier token. An expert that is switched off takes no token,
    one that is switched on takes all.

    With groups of experts by label an expert chooses the ⌈K·n/(E/Y)⌉ best of the sequence's n counted
    tokens of its group's label (arXiv:2407.21770, §2.2, whose K is 1).
    """
    if facts.label is not None:
        return _choose_in_groups(ranked, facts, cfg)
    each = jnp.where(facts.counted[:, None], ranked, -jnp.inf).reshape(facts.sequences, -1, ranked.shape[1])
    size = each.shape[1]
    take = min(-(-cfg.top_k * size // ranked.shape[1]), size)
    _, chosen = jax.lax.top_k(jnp.swapaxes(each, 1, 2), take)
    none = varying_like(jnp.zeros((facts.sequences, ranked.shape[1], size), bool), ranked)
    hit = jnp.put_along_axis(none, chosen, True, axis=2, inplace=False)
    hit = jnp.swapaxes(hit, 1, 2).reshape(ranked.shape)
    return hit if facts.switches is None else (hit | _on(facts, ranked)) & ~_off(facts, ranked)


def _choose_in_groups(ranked: Float[Array, "T E"], facts: Facts, cfg: MoEConfig) -> Bool[Array, "T E"]:
    experts = ranked.shape[1]
    by_sequence = lambda a: a.reshape(facts.sequences, -1, *a.shape[1:])
    own = allowed_by_label(facts.label, experts, cfg) & facts.counted[:, None]
    each, own = by_sequence(jnp.where(own, ranked, -jnp.inf)), by_sequence(own)
    take = -(-cfg.top_k * jnp.sum(own, axis=1, keepdims=True) // (experts // cfg.label_groups))
    place = jnp.argsort(jnp.argsort(-each, axis=1, stable=True), axis=1)  # of each token, from an expert's best
    hit = ((place < take) & own).reshape(ranked.shape)
    if facts.switches is None:
        return hit
    return (hit | (_on(facts, ranked) & own.reshape(ranked.shape))) & ~_off(facts, ranked)


def choose_in_shards(ranked: Float[Array, "T E"], cfg: MoEConfig) -> Int[Array, "T K"]:
    """Takes the K/G best experts of each of the G = `shard_groups` groups. Expert e is in group e mod G.

    The first G slots are the best of each group, the next G the second best, and so on.
    Source: MoGE, arXiv:2505.21411; with one expert of a group M6-T's prototypes, arXiv:2105.15082.
    """
    (tokens, columns), g = ranked.shape, cfg.shard_groups
    by_group = jnp.swapaxes(ranked.reshape(tokens, columns // g, g), 1, 2)
    _, members = jax.lax.top_k(by_group, cfg.top_k // g)
    experts = members * g + jnp.arange(g)[None, :, None]
    return jnp.swapaxes(experts, 1, 2).reshape(tokens, cfg.top_k)


def cut(
    logits: Float[Array, "T C"],
    experts: Int[Array, "T K"],
    chosen: Bool[Array, "T K"] | None,
    cfg: MoEConfig,
    knobs: Knobs | None,
) -> Bool[Array, "T K"] | None:
    """Leaves out chosen experts with a score under the threshold, but not a token's first.

    Source: EvoMoE, arXiv:2112.14397: the scores are those of (logits + noise) / temperature.
    """
    if knobs is None or knobs.threshold is None:
        return chosen
    gates, _ = score(logits / knobs.temperature, cfg)
    first = jnp.arange(experts.shape[1])[None, :] == 0
    return first | (pick_chosen(jax.lax.stop_gradient(gates), experts) > knobs.threshold)


def weigh(
    logits: Float[Array, "T C"],
    scores: Float[Array, "T C"],
    experts: Int[Array, "T K"],
    chosen: Bool[Array, "T K"] | None,
    cfg: MoEConfig,
) -> Float[Array, "T K"]:
    """Returns combine weights: the scores of the chosen experts, the softmax over the chosen logits, or ones.

    What is not chosen weighs 0, and enters no sum. With `combine="share"` the weights of each shard group sum to 1.
    """
    if cfg.combine == "one":
        weights = jnp.ones(experts.shape, jnp.float32)
    elif cfg.combine == "share":
        weights = share_in_shards(logits, scores, experts, cfg)
    elif cfg.score_order == "topk_score":
        picked = pick_chosen(logits, experts)
        weights = jax.nn.softmax(picked if chosen is None else jnp.where(chosen, picked, -jnp.inf), axis=-1)
    else:
        weights = scores if cfg.choice == "expert" else pick_chosen(scores, experts)
    weights = weights if chosen is None else jnp.where(chosen, weights, 0.0)
    if cfg.renormalize:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    return weights * cfg.routed_scaling


def drop_light(weights: Float[Array, "T K"], chosen: Bool[Array, "T K"] | None, cfg: MoEConfig) -> Bool[Array, "T K"]:
    """Leaves out choices whose weight is less than `min_ratio` of the token's largest.

    Source: online pruning of MC-MoE, arXiv:2410.06270: its second expert of two, here any after the largest. It keeps
    all experts of the 2 % of tokens that others attend to most, which is not done here.
    """
    weights = jax.lax.stop_gradient(weights)
    kept = weights >= cfg.min_ratio * jnp.max(weights, axis=-1, keepdims=True)
    return kept if chosen is None else kept & chosen


def share_in_shards(
    logits: Float[Array, "T E"], scores: Float[Array, "T E"], experts: Int[Array, "T K"], cfg: MoEConfig
) -> Float[Array, "T K"]:
    """Divides each score by the sum over the token's choices in the same shard group, in the slots' order.

    Of a softmax these shares are the softmax of the group's chosen logits, which also holds where scores underflow.
    """
    softmax = cfg.score == "softmax"
    by_group = pick_chosen(logits if softmax else scores, experts).reshape(experts.shape[0], -1, cfg.shard_groups)
    if softmax:
        return jax.nn.softmax(by_group, axis=1).reshape(experts.shape)
    return (by_group / (jnp.sum(by_group, axis=1, keepdims=True) + 1e-20)).reshape(experts.shape)


def validate(experts: Int[Array, "T K"], chosen: Bool[Array, "T K"] | None, facts: Facts) -> Bool[Array, "T K"]:
    """Returns the slots that do something: those that are chosen, of tokens that are not padding."""
    valid = jnp.broadcast_to(facts.counted[:, None], experts.shape)
    return valid if chosen is None else valid & chosen


def prioritise(
    weights: Float[Array, "T K"], facts: Facts, cfg: MoEConfig, knobs: Knobs | None
) -> Float[Array, "T K"] | None:
    """Returns the order in which an expert of limited capacity takes its rows, the largest first; None: token order.

    "random" is the random token selection of arXiv:2201.05596. Without knobs it draws the same numbers every time.
    """
    if cfg.compute != "capacity" or cfg.overflow == "first":
        return None
    if cfg.overflow == "score":
        return jax.lax.stop_gradient(weights)
    return _draw(jax.random.uniform, knobs or Knobs(jax.random.key(0)), "overflow", facts, weights)


# --- parts of them ---------------------------------------------------------------------------------------------------


def allowed_by_label(label: Int[Array, " T"], columns: int, cfg: MoEConfig) -> Bool[Array, "T C"]:
    """Whether each column is in the group of the token's label, or an identity expert. Source: arXiv:2407.21770."""
    column = jnp.arange(columns)[None, :]
    return (column // (cfg.num_experts // cfg.label_groups) == label[:, None]) | (column >= cfg.num_experts)


def pick_chosen(values: Float[Array, "T C"], experts: Int[Array, "T K"]) -> Float[Array, "T K"]:
    """The values of the chosen experts. A gather's gradient would be a scatter: slow on GPUs, in no fixed order."""
    chosen_TKC = experts[:, :, None] == jnp.arange(values.shape[1])[None, None, :]
    return jnp.sum(jnp.where(chosen_TKC, values[:, None, :], 0), axis=-1)


OFF = -1e9  # logit of an expert that is switched off


def _off(facts: Facts, like: Array) -> Bool[Array, "1 C"]:
    return varying_like(facts.switches, like)[None, :] < 0


def _on(facts: Facts, like: Array) -> Bool[Array, "1 C"]:
    return varying_like(facts.switches, like)[None, :] > 0


STREAMS = ("random", "gumbel", "overflow", "pool")  # independent draws


def _draw(sample, knobs: Knobs, stream: str, facts: Facts, like: Float[Array, "T n"]) -> Float[Array, "T n"]:
    """Draws a token's numbers from a key of the step, the layer, the stream and the token's number in the batch.

    So they do not depend on the mesh or on micro-batches, and are the same when they are computed again.
    """
    index = jnp.arange(like.shape[0]) if facts.index is None else facts.index
    key = jax.random.fold_in(knobs.key, STREAMS.index(stream))
    return jax.vmap(lambda i: sample(jax.random.fold_in(key, i), like.shape[1:]))(varying_like(index, like))


@jax.custom_jvp
def _sqrt_softplus(z: Float[Array, "T C"]) -> Float[Array, "T C"]:
    return jnp.sqrt(jax.nn.softplus(z))


@_sqrt_softplus.defjvp
def _sqrt_softplus_jvp(primals, tangents):
    """sigmoid(z) / (2 √softplus(z)), which goes to e^(z/2) / 2 where both are too small to divide."""
    (z,), (dz,) = primals, tangents
    y = _sqrt_softplus(z)
    small = 0.5 * jnp.exp(0.5 * jnp.minimum(z, 0.0))
    slope = jnp.where(z < -20.0, small, jax.nn.sigmoid(z) / (2 * jnp.where(z < -20.0, 1.0, y)))
    return y, slope * dz
