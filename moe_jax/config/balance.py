"""Rules between selection biases, their update and the fields that it depends on, in the loss and in the model."""

from typing import Any

from moe_jax.config.fields import require


def check_bias_update(loss: Any, model: Any) -> None:
    """Raises ConfigError for an update of selection biases that this model or the other losses do not allow.

    loss, model: the `LossConfig` and `ModelConfig` of a run.
    """
    form = loss.bias_update
    known = form in ("sign", "centred") or model.moe.selection_bias
    require(known, "loss.bias_update", form, "needs model.moe.selection_bias=True", "nearest valid: 'sign'")
    if model.moe.expert_budget:
        _check_budget(loss, model.moe)
    if form == "quantile":
        _check_quantile(loss, model)


def check_trained(cfg: Any) -> None:
    """Raises ConfigError for a model of a `RunConfig` that may be evaluated, but not trained."""
    moe = cfg.model.moe
    rule = (
        "is for evaluation with model.moe.selection_bias=True: in training an expert that is chosen for its bias, and "
        "left out for its weight, would get a larger bias at every step"
    )
    require(
        not (moe.min_ratio and moe.selection_bias), "model.moe.min_ratio", moe.min_ratio, rule, "nearest valid: 0.0"
    )


def _check_budget(loss: Any, moe: Any) -> None:
    def rule(ok: bool, text: str) -> None:
        require(ok, "model.moe.expert_budget", moe.expert_budget, text, "nearest valid: 0.0")

    form = loss.bias_update
    rule(not loss.bias_target, "is not available with loss.bias_target, another target")
    rule(form != "centred", "is not available with loss.bias_update='centred', which keeps the mean of the biases")
    rule(form != "quantile", "is not available with loss.bias_update='quantile', which makes all loads equal")


def _check_quantile(loss: Any, model: Any) -> None:
    moe, why = model.moe, "with loss.bias_update='quantile', which"

    def rule(ok: bool, name: str, value: Any, text: str, nearest: Any) -> None:
        require(ok, name, value, text, f"nearest valid: {nearest}")

    target, score, k = loss.bias_target, moe.score, moe.top_k
    rate, usual = loss.bias_update_rate, type(loss).bias_update_rate
    rule(rate == usual, "loss.bias_update_rate", rate, f"has no effect {why} has no rate", usual)
    rule(not target, "loss.bias_target", target, f"must be () {why} makes all loads equal", "()")
    for field, coef in loss.load_balance_coefs.items():
        rule(not coef, field, coef, f"must be 0 {why} balances without a loss", 0.0)
    # Scores of a softmax are in (0, 1) too, but shrink like 1/E: most of the bins would be empty, and one too wide.
    rule(
        score == "sigmoid", "model.moe.score", score, f"must be 'sigmoid' {why} counts scores from 0 to 1", "'sigmoid'"
    )
    for name, groups in (("num_groups", moe.num_groups), ("shard_groups", moe.shard_groups)):
        rule(groups == 1, f"model.moe.{name}", groups, f"must be 1 {why} compares all experts", 1)
    columns = min(model.routed_counts, default=moe.num_experts) + moe.identity_experts
    rule(columns > 1, "loss.bias_update", loss.bias_update, "needs layers with more than one expert", "'sign'")
    rule(
        k < columns, "model.moe.top_k", k, f"must be < {columns} {why} needs an expert that is not chosen", columns - 1
    )
