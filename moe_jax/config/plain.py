"""A canonical form of a model's fields: models that are the same function of the same weights have the same form."""

import dataclasses

from moe_jax.config.layers import spell
from moe_jax.config.memory import MemoryConfig
from moe_jax.config.model import MLAConfig, ModelConfig, MoEConfig, RopeScalingConfig


def plain(model: ModelConfig) -> ModelConfig:
    """The canonical form of a model: the same parameters and the same function, with unused fields at their defaults.

    Two models are the same function if their forms are equal, apart from fields of the class MACHINE.
    """
    changes: dict = {}
    kinds = {kind.name for stack in model.stacks for kind in stack.unit}
    if kinds <= {"moe", "table"}:
        changes["d_ff"] = ModelConfig.d_ff
    if "memory" not in kinds:
        changes["memory"] = MemoryConfig()
    if not model.mla.kv_rank:
        changes["mla"] = MLAConfig()
    if model.rope_scaling.factor == 1:
        changes["rope_scaling"] = RopeScalingConfig()
    if not model.qk_norm or model.num_heads == 1:
        changes["qk_norm_over"] = "head"
    changes["moe"] = MoEConfig()
    if model.num_moe_layers:
        smallest, largest = model.expert_counts[0], model.expert_counts[-1]
        # Where not all experts of the largest bank are chosen, nothing follows from a smaller one whose experts are.
        changes["moe"] = plain_routing(dataclasses.replace(model.moe, num_experts=largest))
        if model.layers:
            changes["layers"] = spell([(stack.repeat, stack.unit) for stack in model.stacks], smallest)
            changes["moe"] = dataclasses.replace(changes["moe"], num_experts=smallest)
    return dataclasses.replace(model, **changes)


def plain_routing(moe: MoEConfig) -> MoEConfig:
    """The canonical form of the routing. A softmax over the chosen experts is the renormalised softmax over all.

    Softmax and sigmoid order experts alike, but rounding makes large sigmoids equal, so the two are kept apart.
    """
    changes: dict = {} if moe.router != "linear" else {"router_width": MoEConfig.router_width}
    if moe.choice == "expert":
        return dataclasses.replace(moe, **changes)
    all_chosen = moe.top_k == moe.router_columns
    any_group = moe.top_groups == moe.num_groups
    if any_group:
        changes |= {"num_groups": 1, "top_groups": 1}
    if moe.score_order == "topk_score":
        changes["renormalize"] = False  # the weights sum to 1 already
        # With a bias or with groups, ranking logits differs from ranking their softmax.
        if all_chosen or (any_group and not moe.selection_bias):
            changes |= {"score_order": "score_topk", "renormalize": moe.combine == "score"}
    elif all_chosen and moe.score == "softmax" and moe.combine == "score":
        changes["renormalize"] = True
    if moe.combine == "one" and moe.top_k == 1:  # the only weight is 1 in both cases
        changes |= {"combine": "score", "renormalize": changes.get("score_order", moe.score_order) == "score_topk"}
    if all_chosen and (moe.combine == "one" or (moe.top_k == 1 and moe.renormalize)):
        changes["score"] = "softmax"
    return dataclasses.replace(moe, **changes)
