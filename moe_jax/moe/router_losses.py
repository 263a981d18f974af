"""Losses of routers: a table of functions of what the routers did on one whole optimizer batch.

A loss is a function of the summed statistics of the layers of a bank, one value a layer. It may be any differentiable
function: train/gradients.py makes its gradient that of the whole batch, in one micro-batch or many. Two lines add one,
and a third switches it on:

    def variation(stats: RouterStats) -> Float[Array, " L"]: ...
    LOSSES["variation"] = RouterLoss(variation)
    config.loss.more = {"even": router_loss(kind="variation", coef=0.01)}

Letters: L layers, G balance groups, C router columns: the experts, then columns without one; J groups of columns.
"""

import difflib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from moe_jax.config import RunConfig, nearest_divisor
from moe_jax.config.fields import require
from moe_jax.moe.stats import RouterStats


class RouterLoss(NamedTuple):
    """A row of the table: the function, and what it says of itself."""

    # (statistics `[L, G, C]`, G groups of the loss' own scope) → `[L]`.
    of: Callable[..., Float[Array, " L"]]
    # The function is a sum over tokens, linear in the statistics, and the loss the mean over tokens. Micro-batches add
    # up to it, so it needs no first pass. It has no scope: it gets the finest groups.
    linear: bool = False
    targets: bool = False  # it takes `targets` and `identity`, as `load_balancing_loss` does: `over` has a meaning
    compares_groups: bool = False  # it is 0 for a single balance group
    by_label: bool = False  # it reads `RouterStats.by_label`, and has no scope: it is taken over the whole batch
    # The function sees one balance group at a time, and the loss is its mean over the groups (`mean_over_groups`). No
    # micro-batch splits a sequence, so with groups of one sequence it needs no first pass.
    each_group: bool = False


# --- the losses ------------------------------------------------------------------------------------------------------


def load_balancing_loss(stats: RouterStats, targets: tuple[float, ...] = (), identity: int = 0) -> Float[Array, "*L"]:
    """Load-balancing loss of each layer: the mean over balance groups of C · Σ_e f_e · P_e.

    f_e = share of the expert in the assignments made, which carries no gradient; P_e = mean router probability, which
    does. Groups without a counted token are left out of the mean.

    targets: those of `column_targets`, for columns that are balanced in J groups: Σ_j f_j / target_j · P_j, where f_j
        and P_j are sums over the columns of the group. (): each column by itself, with the target 1/C.
    identity: the number of columns without an expert, the last ones; they are the last group.

    Value: 1.0 at uniform routing for every C and K, and where each group has its target share of f or P; C/K when all
        tokens pick the same K experts with probability 1/K each. docs/balancing.md converts the coefficients of other
        frameworks.
    Scope: balance groups, see `LossConfig.balance_batch`; a single group is the whole optimizer batch.
    Source: arXiv:2501.11873, eqs. 2–6, with f divided by K; groups of columns: arXiv:2509.01322, eqs. 3–5, where f
        counts assignments.

    Raises TypeError for anything but `RouterStats`: those of an MoE layer's output, or of `stats_of`.
    """
    _check(stats, "load_balancing_loss")
    load, prob = stats.tokens_per_expert, stats.prob_per_expert
    if targets:
        groups = len(targets) - (identity > 0)
        load, prob = (_sum_columns(x, x.shape[-1] - identity, groups) for x in (load, prob))
    f = jax.lax.stop_gradient(expert_frequency(load))
    p = prob / jnp.maximum(stats.tokens, 1.0)[..., None]
    if targets:
        target = jnp.asarray(targets, jnp.float32).reshape((1,) * (f.ndim - 1) + (-1,))
        per_group = jnp.sum(f / target * p, axis=-1)
    else:
        per_group = prob.shape[-1] * jnp.sum(f * p, axis=-1)
    filled = (stats.tokens > 0).astype(jnp.float32)
    return jnp.sum(per_group * filled, axis=-1) / jnp.maximum(jnp.sum(filled, axis=-1), 1.0)


def expert_frequency(load: Float[Array, "*L G C"]) -> Float[Array, "*L G C"]:
    """f, the share of each expert in the assignments made: from 0 to 1/K, summing to 1; 0 where none was made."""
    return load / jnp.maximum(jnp.sum(load, axis=-1, keepdims=True), 1.0)


def column_targets(columns: int, identity: int = 0, over: int = 0, budget: float = 0.0) -> tuple[float, ...]:
    """The share of all assignments that each group of columns should get; () for columns that are alone and equal.

    identity: columns without an expert, the last ones: together one more group.
    over: number of equal groups of the experts; 0: each expert is a group.
    budget: share of the assignments that experts should get, K_e/K; 0: as many as they have of the columns.
    """
    if not (over or identity):
        return ()
    experts = columns - identity
    share, groups = budget or experts / columns, over or experts
    return (share / groups,) * groups + ((1.0 - share,) if identity else ())


def _sum_columns(x: Float[Array, "*L G C"], experts: int, groups: int) -> Float[Array, "*L G J"]:
    """Sums over groups of columns: `groups` equal ones of the first columns, `experts`, and one of the rest."""
    routed = jnp.sum(x[..., :experts].reshape(*x.shape[:-1], groups, experts // groups), axis=-1)
    if experts == x.shape[-1]:
        return routed
    return jnp.concatenate([routed, jnp.sum(x[..., experts:], axis=-1, keepdims=True)], axis=-1)


def _check(stats: object, loss: str) -> None:
    if not isinstance(stats, RouterStats):
        hint = "those of MoELayer's output, or stats_of(logits, experts)"
        raise TypeError(f"{loss} takes RouterStats, {hint}; not {type(stats).__name__}")


def router_z(stats: RouterStats) -> Float[Array, "*L"]:
    """The router z-loss, summed over tokens: logsumexp(router logits)²; (log C)² a token for logits of zero.

    Source: arXiv:2202.08906, eq. 5. Raises TypeError as `load_balancing_loss` does.
    """
    _check(stats, "router_z")
    return jnp.sum(stats.z_sq, axis=-1)


def mutual_information(stats: RouterStats) -> Float[Array, "*L"]:
    """Minus the mutual information of a token's balance group and its router column, in nats, of each layer.

    −Σ P log(P / (P_G P_C)), where P[g, c] is the share of the summed router probabilities that lies in group g and
    column c, and P_G and P_C are its marginals. 0 where all groups use the columns alike; −log G for G equal groups
    that share no column. Groups weigh as much as they have tokens. A group without any adds nothing.

    Source: Mod-Squad, arXiv:2212.08066, whose groups are tasks, without the 1e-4 that its code adds.
    """
    return _minus_information(stats.prob_per_expert)


def label_information(stats: RouterStats) -> Float[Array, "*L"]:
    """Minus the mutual information of a token's label and its router column: `mutual_information` with labels in place
    of balance groups. Minus the entropy of the labels if they share no column: −log Y for Y of equally many tokens."""
    return _minus_information(stats.by_label)


def _minus_information(sums: Float[Array, "*L G C"]) -> Float[Array, "*L"]:
    total = jnp.sum(sums, axis=(-2, -1), keepdims=True)
    joint = sums / jnp.where(total > 0, total, 1.0)
    apart = jnp.sum(joint, axis=-1, keepdims=True) * jnp.sum(joint, axis=-2, keepdims=True)
    there = (joint > 0) & (apart > 0)  # 0 · log 0 = 0, with a gradient of 0
    ratio = jnp.where(there, joint, 1.0) / jnp.where(there, apart, 1.0)
    return -jnp.sum(joint * jnp.log(ratio), axis=(-2, -1))


LOSSES = {
    "load_balance": RouterLoss(load_balancing_loss, targets=True, each_group=True),
    "router_z": RouterLoss(router_z, linear=True),
    "mutual_information": RouterLoss(mutual_information, compares_groups=True),
    "label_information": RouterLoss(label_information, by_label=True),
}


# --- how they are used -----------------------------------------------------------------------------------------------


def mean_over_groups(of: Callable[[RouterStats], Float[Array, " L"]], stats: RouterStats) -> Float[Array, " L"]:
    """The mean of a loss of one balance group, over the groups with a counted token; 0 if no group has any.

    of: sees one group at a time, `[L, 1, C]`, without `by_label` and `histogram`, which have no groups. In place of a
        group without a token it sees one made token, so that a function which divides by sums of 0 has a gradient.
    """
    filled = stats.tokens > 0

    def or_made(x: Float[Array, "L G *C"]) -> Float[Array, "L G *C"]:
        shares = np.arange(1, x.shape[-1] + 1, dtype=np.float32)  # unlike: a standard deviation of 0 has no slope
        made = shares / shares.sum() if x.ndim > filled.ndim else 1.0
        return jnp.where(jnp.expand_dims(filled, tuple(range(filled.ndim, x.ndim))), x, made)

    of_one = lambda group: of(jax.tree.map(lambda x: x[:, None], group))
    own = jax.tree.map(or_made, stats._replace(by_label=None, histogram=None))
    counts = filled.astype(jnp.float32)
    total = jnp.sum(jax.vmap(of_one, in_axes=1, out_axes=1)(own) * counts, axis=-1)
    return total / jnp.maximum(jnp.sum(counts, axis=-1), 1.0)


def merge_groups(stats: RouterStats, groups: int) -> RouterStats:
    """The statistics of fewer balance groups, each a sum over neighbours. Integers and sums by label have no groups and
    stay."""

    def merge(x):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        return jnp.sum(x.reshape(x.shape[0], groups, x.shape[1] // groups, *x.shape[2:]), axis=2)

    return jax.tree.map(merge, stats._replace(by_label=None))._replace(by_label=stats.by_label)


def counted_labels(cfg: RunConfig) -> int:
    """The number of labels whose sums a loss of the run reads; 0: none does."""
    kinds = [LOSSES[term.kind] for term in cfg.loss.more.values() if term.kind in LOSSES]
    return cfg.data.num_labels if any(row.by_label for row in kinds) else 0


def check(cfg: RunConfig) -> None:
    """Raises ConfigError for an entry of loss.more whose kind is not in the table, or does not use what is set."""
    b, labels = cfg.data.batch_size, cfg.data.labels
    used = cfg.model.labels or counted_labels(cfg) or cfg.distill.teacher  # of which run/teacher.py knows the labels
    rule = "has no effect: neither the model nor a loss reads labels (docs/labels.md)"
    require(used or not labels, "data.labels", labels, rule, "nearest valid: {}")
    for name, term in cfg.loss.more.items():
        at, kind, scope = f"loss.more.{name}.", term.kind, term.balance_batch
        close = difflib.get_close_matches(kind, LOSSES, 1, 0.0)[0]
        require(kind in LOSSES, f"{at}kind", kind, f"must be one of {', '.join(LOSSES)}", f"nearest valid: {close!r}")
        row, unused = LOSSES[kind], f"has no effect on kind={kind!r}"
        _check_row(row, f"{at}kind", kind)
        require(row.targets or not term.over, f"{at}over", term.over, unused, "nearest valid: 0")
        rule = f"{unused}, a mean over tokens"
        require(not row.linear or scope == "global", f"{at}balance_batch", scope, rule, "nearest valid: 'global'")
        rule = f"must be < data.batch_size={b} with kind={kind!r}, which compares groups of sequences"
        require(not row.compares_groups or scope not in ("global", b), f"{at}balance_batch", scope, rule,
                f"nearest valid: {b // nearest_divisor(b, 2)}")  # fmt: skip
        _check_by_label(cfg, f"{at}kind", kind)
        require(not row.by_label or labels, "data.labels", {}, f"must name labels for {at}kind={kind!r}",
                "for example {'code': 1}")  # fmt: skip
        rule = f"has no effect on kind={kind!r}, which compares labels in the whole batch"
        require(not row.by_label or scope == "global", f"{at}balance_batch", scope, rule, "nearest valid: 'global'")
        rule = f"with kind={kind!r} would compare the groups of a micro-batch only"
        compares = row.compares_groups or row.by_label
        require(not compares or cfg.loss.accumulation == "exact", "loss.accumulation",
                cfg.loss.accumulation, rule, "nearest valid: 'exact'")  # fmt: skip


def _check_row(row: RouterLoss, name: str, kind: str) -> None:
    """Raises ConfigError for a row of which one word leaves another without effect."""
    said = lambda *words: [f"{word}=True" for word in words if getattr(row, word)]
    whole, scoped = said("linear", "by_label"), said("compares_groups", "each_group", "targets")
    rule = f"is a row of LOSSES with {', '.join(whole + scoped)}"
    hint = "a loss that is linear or by_label has no groups and no targets; leave out one of the two sorts"
    require(not (whole and scoped), name, kind, rule, hint)
    hint = "a loss sees each group alone or compares them; leave out one of the two"
    require(not (row.compares_groups and row.each_group), name, kind, rule, hint)


def _check_by_label(cfg: RunConfig, name: str, kind: str) -> None:
    """Raises ConfigError for a loss by label that is a constant, whatever the routers do."""
    if not LOSSES[kind].by_label:
        return
    moe, hint = cfg.model.moe, "leave the entry out"
    require(cfg.model.routed_counts, name, kind, "has no effect: no layer has a router that chooses experts", hint)
    rule = "is a constant with model.moe.label_groups > 1, where the group of an expert tells the label"
    require(moe.label_groups == 1 or moe.identity_experts, name, kind, rule, hint)
