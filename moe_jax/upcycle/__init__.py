"""Turns a dense model into a Mixture of Experts, or one Mixture of Experts into another, by a chain of transforms.

A transform is a function of (config, parameters), sharded under `jit`.

    chain = [Depth(24), VirtualGroups(expansion=8, granularity=8, top_k=8, choice="shards"), Drop(0.5)]
    cfg, params = apply(chain, cfg, params, seed=0)

docs/upcycling.md explains each transform, and which of them keep the model's function. The command is
`python -m moe_jax.upcycle --from=RUN --workdir=RUN`.
"""

from moe_jax.upcycle.bank import Grow, Merge, Prune
from moe_jax.upcycle.chain import (
    Scores,
    Transform,
    apply,
    average,
    by_table,
    describe,
    final_config,
    logits,
    logits_error,
    specs_of,
    traced,
)
from moe_jax.upcycle.cluster import Cluster
from moe_jax.upcycle.convert import Report, convert
from moe_jax.upcycle.dense import Beside, Importance
from moe_jax.upcycle.diversify import Drop, Mask, Noise
from moe_jax.upcycle.experts import VirtualGroups, copy, kappa
from moe_jax.upcycle.growth import Depth, Width
from moe_jax.upcycle.quantize import Quantize
from moe_jax.upcycle.scores import read_counts, scores_by_block, unit_scores

__all__ = [
    "Beside",
    "Cluster",
    "Depth",
    "Drop",
    "Grow",
    "Importance",
    "Mask",
    "Merge",
    "Noise",
    "Prune",
    "Quantize",
    "Report",
    "Scores",
    "Transform",
    "VirtualGroups",
    "Width",
    "apply",
    "average",
    "by_table",
    "convert",
    "copy",
    "describe",
    "final_config",
    "kappa",
    "logits",
    "logits_error",
    "read_counts",
    "scores_by_block",
    "specs_of",
    "traced",
    "unit_scores",
]
