"""A canonical form of a model's fields: models that are the same function of the same weights have the same form."""

import dataclasses
import math

from moe_jax.config.classes import same_value
from moe_jax.config.layers import spell
from moe_jax.config.memory import MemoryConfig
from moe_jax.config.model import MLAConfig, ModelConfig, MoEConfig, RopeScalingConfig
from moe_jax.config.positions import write_layers


def plain(model: ModelConfig) -> ModelConfig:
    """The canonical form of a model: the same parameters and the same function, with unused fields at their defaults.

    Two models are the same function if their forms are equal, apart from fields of the class MACHINE.
    """
    changes: dict = {}
    kinds = {kind.name for _, unit in model.units for kind in unit}
    if kinds <= {"moe", "table"}:
        changes["d_ff"] = ModelConfig.d_ff
    if "memory" not in kinds:
        changes["memory"] = MemoryConfig()
    if not model.mla.kv_rank:
        changes["mla"] = MLAConfig()
    if same_value(model.attention_multiplier, model.head_dim**-0.5):
        changes["attention_multiplier"] = 0.0
    if model.rope_size == model.head_dim:
        changes["rope_dim"] = 0
    changes["rope_scaling"] = _plain_scaling(model)
    attends = model.attends
    changes["window"] = model.window if any(a.window for a in attends) else 0
    changes["attention_layers"] = write_layers(attends)
    if not model.qk_norm or model.num_heads == 1:
        changes["qk_norm_over"] = "head"
    changes["moe"] = MoEConfig()
    if model.num_moe_layers:
        smallest, largest = model.expert_counts[0], model.expert_counts[-1]
        # Where not all experts of the largest bank are chosen, nothing follows from a smaller one whose experts are.
        changes["moe"] = plain_routing(dataclasses.replace(model.moe, num_experts=largest))
        if model.layers:
            changes["layers"] = spell(model.units, smallest)
            changes["moe"] = dataclasses.replace(changes["moe"], num_experts=smallest)
    return dataclasses.replace(model, **changes)


def _plain_scaling(model: ModelConfig) -> RopeScalingConfig:
    """The canonical form of the scaling of RoPE: without an attention factor that is the usual one."""
    scaling, attends = model.rope_scaling, model.attends
    scaled = [a for a in attends if a.rope and not (scaling.layers == "full" and a.window)]
    if not scaling.on or not scaled:
        return RopeScalingConfig()
    layers = "all" if len(scaled) == sum(a.rope for a in attends) else "full"
    scaling = dataclasses.replace(scaling, layers=layers)
    if scaling.type in ("yarn", "longrope"):
        usual = dataclasses.replace(scaling, attention_factor=0.0)
        same = math.isclose(scaling.cos_sin_factor, usual.cos_sin_factor, rel_tol=1e-9)
        scaling = usual if same else dataclasses.replace(scaling, attention_factor=scaling.cos_sin_factor)
        if scaling.type == "longrope" and scaling.attention_factor:
            scaling = dataclasses.replace(scaling, factor=1.0)  # of which nothing else follows
        if scaling.type == "yarn" and scaling.factor == 1:
            scaling = RopeScalingConfig("yarn", attention_factor=scaling.attention_factor, layers=layers)
    return scaling


def plain_routing(moe: MoEConfig) -> MoEConfig:
    """The canonical form of the routing. A softmax over the chosen experts is the renormalised softmax over all.

    Softmax and sigmoid order experts alike, but rounding makes large sigmoids equal, so the two are kept apart.
    """
    changes: dict = {} if moe.router != "linear" else {"router_width": MoEConfig.router_width}
    if moe.combine == "share" and moe.top_k == moe.shard_groups:  # a choice that is alone in its group has all of it
        moe = dataclasses.replace(moe, combine="one")
    if moe.choice == "expert":
        return dataclasses.replace(moe, **changes)
    all_chosen = moe.top_k == moe.router_columns
    if all_chosen and moe.combine != "share":
        changes["shard_groups"] = 1
    # Groups limit nothing if all are kept, if each is one expert, or if those of the best K experts are kept.
    any_group = moe.top_groups == moe.num_groups or moe.num_groups == moe.num_experts
    any_group = any_group or (moe.group_score == "best" and moe.top_groups >= moe.top_k)
    if any_group:
        changes |= {"num_groups": 1, "top_groups": 1, "group_score": "best_two"}
    if moe.score_order == "topk_score":
        changes["renormalize"] = False  # the weights sum to 1 already
        # With a bias or with groups, ranking logits differs from ranking their softmax.
        if all_chosen or (any_group and not moe.selection_bias):
            changes |= {"score_order": "score_topk", "renormalize": moe.combine == "score"}
    elif all_chosen and moe.score == "softmax" and moe.combine == "score" and not moe.min_ratio:
        changes["renormalize"] = True
    if moe.combine == "one" and moe.top_k == 1 and moe.table != "label":  # the only weight is 1 in both cases
        changes |= {"combine": "score", "renormalize": changes.get("score_order", moe.score_order) == "score_topk"}
    if all_chosen and (moe.combine == "one" or (moe.top_k == 1 and moe.renormalize)):
        changes["score"] = "softmax"
    return dataclasses.replace(moe, **changes)
