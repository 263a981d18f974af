"""Rules of labels: numbers that tokens have by the domain of their document, and what of a model depends on them."""

from typing import Any

from moe_jax.config.fields import nearest_divisor, require

# Other fields of a layer, with the values that leave groups of experts by label a meaning.
ALONE = {"pool_min": 0, "num_groups": 1, "shard_groups": 1, "selection_bias": False}


def check_layer(moe: Any) -> None:
    """Raises ConfigError for groups of experts by label, or routers by label, that a layer cannot have.

    moe: the `MoEConfig` of a layer.
    """
    m, e, k = moe.label_groups, moe.num_experts, moe.top_k
    require(moe.routers == 1 or moe.router == "linear", "routers", moe.routers,
            f"is not available with router={moe.router!r}", "nearest valid: 1")  # fmt: skip
    if m == 1:
        return
    require(e % m == 0, "label_groups", m, f"must divide num_experts={e}", f"nearest valid: {nearest_divisor(e, m)}")
    for name, plain in ALONE.items():
        value = getattr(moe, name)
        require(value == plain, name, value, "is not available with label_groups > 1", f"nearest valid: {plain!r}")
    rule = "has equal room for all experts, and with label_groups > 1 their work is that of their label's tokens"
    require(moe.compute != "capacity", "compute", moe.compute, rule, "nearest valid: 'grouped'")
    most = e // m + moe.identity_experts
    named = "num_experts / label_groups" + " + identity_experts" * (moe.identity_experts > 0)
    require(k <= most, "top_k", k, f"must be ≤ {named} = {most}", f"nearest valid: {most}")


def needs(model: Any) -> dict[str, int]:
    """The fields of a model that depend on labels, with the number of labels that each is for.

    model: the `ModelConfig`.
    """
    moe, found = model.moe, {"untie": model.untie}
    if model.routed_counts:
        found |= {f"moe.{name}": getattr(moe, name) for name in ("label_groups", "routers")}
    if moe.table == "label" and model.table_paths:
        found["moe.table='label' of num_experts"] = moe.num_experts
    return {name: count for name, count in found.items() if count > 1}


def check_model(model: Any) -> None:
    """Raises ConfigError for a model whose parts are for different numbers of labels, or that cannot have any.

    model: the `ModelConfig`.
    """
    moe, tables = model.moe, model.table_paths
    for name in ("label_groups", "routers"):
        value = getattr(moe, name)
        require(value == 1 or model.routed_counts, f"moe.{name}", value, "needs layers whose router chooses experts",
                "nearest valid: 1")  # fmt: skip
    if moe.table == "label":
        require(tables, "moe.table", "label", "needs table blocks in layers", "nearest valid: 'token'")
        counts = {kind.experts for stack in model.stacks for kind in stack.unit if kind.name == "table"}
        rule = f"a table by label names one expert for each of the labels: layers={model.layers!r}"
        require(len(counts) == 1 and counts == {moe.num_experts}, "layers", model.layers, rule,
                f"nearest valid: {moe.num_experts} experts in each table block")  # fmt: skip
        require(moe.num_experts > 1, "moe.num_experts", 1, "is one label, with moe.table='label'", "nearest valid: 2")
        for name, value in {"top_k": 1, "combine": "one"}.items():
            mine = getattr(moe, name)
            rule = f"must be {value!r} with moe.table='label', which names one expert"
            require(mine == value, f"moe.{name}", mine, rule, f"nearest valid: {value!r}")
    found = needs(model)
    if not found:
        return
    first, count = next(iter(found.items()))
    for name, other in found.items():
        require(other == count, name.split("=")[0], other, f"is for another number of labels than {first}={count}",
                f"nearest valid: {count}")  # fmt: skip
    if model.untie > 1:
        for name, value, plain in (("mla.kv_rank", model.mla.kv_rank, 0), ("qkv_bias", model.qkv_bias, False)):
            require(value == plain, name, value, "is not available with untie > 1", f"nearest valid: {plain!r}")
    for name, value in {"mtp_layers": model.mtp_layers, "lora.rank": model.lora.rank}.items():
        require(not value, name, value, f"is not available with {first}={count}", "nearest valid: 0")


def check_run(cfg: Any) -> None:
    """Raises ConfigError if a run's text has not the labels that its model is for.

    cfg: the `RunConfig`.
    """
    model, labels, sample = cfg.model, cfg.data.labels, cfg.sample
    count, have = model.labels, cfg.data.num_labels
    if not count:
        check_label(model, sample.label)
        return
    first = next(iter(needs(model)))
    hint = f"for example {{'NAME': {count - 1}}}; domains without a name have the label 0"
    rule = f"must name domains of the labels 0 to {count - 1}, for model.{first}={count}"
    require(have == count, "data.labels", labels, rule, hint)
    if sample.tokens or sample.label != -1:
        check_label(model, sample.label, labels)
    clip = cfg.optim.qk_clip
    require(model.untie == 1 or not clip, "optim.qk_clip", clip, "is not available with model.untie > 1",
            "nearest valid: 0.0")  # fmt: skip
    ramp = cfg.explore.random
    rule = "is not available with model.moe.label_groups > 1: its noise has the deviation of all logits"
    ok = model.moe.label_groups == 1 or max(ramp.start, ramp.end) == 0
    require(ok, "explore.random", "a ramp", rule, "nearest valid: start=0.0, end=0.0")


def check_label(model: Any, label: int | None, names: dict[str, int] | None = None) -> int | None:
    """The label of texts for a model, or None if it needs none. Raises ConfigError for one that the model has not.

    label: −1 is none, as None is. names: labels by domain, for the message.
    """
    count, label = model.labels, -1 if label is None else label
    if not count:
        rule = "has no effect on a model that needs no labels"
        require(label == -1, "sample.label", label, rule, "nearest valid: -1")
        return None
    valid = ", ".join(f"{i}{_names_of(i, names or {})}" for i in range(count))
    rule = "must be the label of the text, on which the model depends"
    require(0 <= label < count, "sample.label", label, rule, f"valid: {valid}")
    return label


def same_labels(one: dict[str, int], other: dict[str, int]) -> bool:
    """Whether tokens have the same labels by two values of `data.labels`: a domain without a name has the label 0."""
    named = lambda labels: {name: label for name, label in labels.items() if label}
    return named(one) == named(other)


def without_zeros(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings by dotted name without the labels of 0 in `data.labels`, which name what is so without them."""
    is_zero = lambda name, value: name.startswith("data.labels.") and value == 0
    return {name: value for name, value in settings.items() if not is_zero(name, value)}


def _names_of(label: int, names: dict[str, int]) -> str:
    named = [name for name, its in names.items() if its == label]
    named += ["all other text"] * (label == 0)
    return f" ({', '.join(named)})" if names else ""
