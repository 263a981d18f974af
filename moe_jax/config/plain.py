"""Which models are the same function of the same weights, though their fields differ."""

import dataclasses

from moe_jax.config.model import MLAConfig, ModelConfig, MoEConfig, RopeScalingConfig


def plain(model: ModelConfig) -> ModelConfig:
    """A model of the same parameters and the same function of them, in the plainest fields that say it.

    Two models are the same function if these are equal, apart from fields that say how it is computed.
    """
    changes: dict = {}
    if not model.num_dense_layers:
        changes["d_ff"] = ModelConfig.d_ff
    if not model.mla.kv_rank:
        changes["mla"] = MLAConfig()
    if model.rope_scaling.factor == 1:
        changes["rope_scaling"] = RopeScalingConfig()
    if not model.qk_norm or model.num_heads == 1:
        changes["qk_norm_over"] = "head"
    changes["moe"] = plain_routing(model.moe) if model.num_moe_layers else MoEConfig()
    return dataclasses.replace(model, **changes)


def plain_routing(moe: MoEConfig) -> MoEConfig:
    """The same of the routing. Softmax over the chosen is the softmax over all, renormalised over the chosen.

    Scores of both kinds order experts alike, but rounding makes large sigmoids equal: the kind counts.
    """
    changes: dict = {}
    every = moe.top_k == moe.num_experts
    any_group = moe.top_groups == moe.num_groups
    if any_group:
        changes |= {"num_groups": 1, "top_groups": 1}
    if moe.score_order == "topk_score":
        changes["renormalize"] = False  # the weights sum to 1 as they are
        # A bias, and sums of a group's scores, rank logits otherwise than their softmax.
        if every or (any_group and not moe.selection_bias):
            changes |= {"score_order": "score_topk", "renormalize": moe.combine == "score"}
    elif every and moe.score == "softmax" and moe.combine == "score":
        changes["renormalize"] = True
    if moe.combine == "one" and moe.top_k == 1:  # the one weight is 1 in either way
        changes |= {"combine": "score", "renormalize": changes.get("score_order", moe.score_order) == "score_topk"}
    if every and (moe.combine == "one" or (moe.top_k == 1 and moe.renormalize)):
        changes["score"] = "softmax"
    return dataclasses.replace(moe, **changes)
