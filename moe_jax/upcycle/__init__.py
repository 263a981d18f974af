"""Turns a dense model into a Mixture of Experts by a chain of transforms of (config, parameters), sharded under `jit`.

    chain = [Depth(24), VirtualGroups(expansion=8, granularity=8, top_k=8), Drop(0.5)]
    cfg, params = apply(chain, cfg, params, seed=0)

docs/upcycling.md explains each transform, and which of them keep the model's function. The command is
`python -m moe_jax.upcycle --from=RUN --workdir=RUN`.
"""

from moe_jax.upcycle.chain import (
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
from moe_jax.upcycle.experts import Drop, Noise, VirtualGroups, copy, kappa
from moe_jax.upcycle.growth import Depth, Width

__all__ = [
    "Cluster",
    "Depth",
    "Drop",
    "Noise",
    "Report",
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
    "specs_of",
    "traced",
]
