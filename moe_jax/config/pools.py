"""Rules of document pools, between their fields and the others of a layer, a model and a run."""

from typing import Any

from moe_jax.config.fields import require

# Other fields of a layer, with the values that leave pools a meaning.
ALONE = {
    "choice": "token", "identity_experts": 0, "num_groups": 1, "shard_groups": 1, "selection_bias": False,
}  # fmt: skip


def check_pools(moe: Any) -> None:
    """Raises ConfigError for pools that a layer cannot have, or if nothing says where evaluation takes them from.

    moe: the `MoEConfig` of a layer.
    """
    e, k, low, high, of = moe.num_experts, moe.top_k, moe.pool_min, moe.pool_max, moe.pool_from
    if not low:
        for name, plain in {"pool_max": 0, "pool_from": "", "pool_size": 0, "pool_prefix": 0}.items():
            value = getattr(moe, name)
            require(value == plain, name, value, "needs pool_min > 0", f"nearest valid: {plain!r}")
        return
    for name, plain in ALONE.items():
        value = getattr(moe, name)
        require(value == plain, name, value, "is not available with pool_min > 0", f"nearest valid: {plain!r}")
    require(k <= low <= e, "pool_min", low, f"must be from top_k={k} to num_experts={e}",
            f"nearest valid: {min(max(low, k), e)}")  # fmt: skip
    require(high == 0 or low <= high <= e, "pool_max", high, f"must be from pool_min={low} to num_experts={e}, or 0",
            f"nearest valid: {min(max(high, low), e)}")  # fmt: skip
    rule = ("must say where evaluation and samples take pools from: 'prefix' (the first pool_prefix tokens of a "
            "document, which are not scored, or the prompt), or 'all' (no pools)")  # fmt: skip
    require(of != "", "pool_from", of, rule, "nearest valid: 'all'")
    takes, size = of != "all", moe.pool_size
    require(takes or not size, "pool_size", size, "has no effect with pool_from='all'", "nearest valid: 0")
    require(not takes or k <= size <= e, "pool_size", size,
            f"must be from top_k={k} to num_experts={e} with pool_from={of!r}",
            f"nearest valid: {min(max(size, k), e)}")  # fmt: skip
    require(of != "prefix" or moe.pool_prefix, "pool_prefix", 0, "must be > 0 with pool_from='prefix'",
            "nearest valid: 1")  # fmt: skip


def check_pools_of_run(cfg: Any) -> None:
    """Raises ConfigError for pools in a model whose routers do not choose, or beside settings that they rule out.

    cfg: the `RunConfig` of a run.
    """
    moe = cfg.model.moe
    if not moe.pool_min:
        return
    name, value = "model.moe.pool_min", moe.pool_min
    require(cfg.model.routed_counts, name, value, "needs layers whose router chooses experts", "nearest valid: 0")
    rule = "is not available with table blocks, whose tables choose"
    require(not cfg.model.table_paths, name, value, rule, "nearest valid: 0")
    ramp = cfg.explore.random
    rule = "is not available with explore.random, noise by the mean and deviation of all logits"
    require(max(ramp.start, ramp.end) == 0, name, value, rule, "nearest valid: 0")
    steers, of = cfg.mixture.controller, moe.pool_from
    rule = f"is not available with mixture.controller={steers!r}: gradients would be of pools drawn at random"
    require(not moe.takes_pools or steers not in ("dga", "tikmix"), "model.moe.pool_from", of, rule,
            "nearest valid: 'all', with pool_size=0")  # fmt: skip
    rule = f"must be < data.seq_len={cfg.data.seq_len}: nothing would be left to score"
    require(moe.pool_prefix < cfg.data.seq_len, "model.moe.pool_prefix", moe.pool_prefix, rule,
            f"nearest valid: {cfg.data.seq_len - 1}")  # fmt: skip
