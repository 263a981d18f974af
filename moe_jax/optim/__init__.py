"""Optimizers: Muon on one device and on many, AdamW, and which of them updates which parameter."""

from moe_jax.optim.groups import check as check_groups
from moe_jax.optim.groups import frozen_paths, split_biases
from moe_jax.optim.optimizer import (
    describe,
    describe_stretch,
    label_params,
    make_optimizer,
    matrices_of,
    muon_plan,
    owners,
    schedule,
)

__all__ = [
    "check_groups",
    "describe",
    "describe_stretch",
    "frozen_paths",
    "label_params",
    "make_optimizer",
    "matrices_of",
    "muon_plan",
    "owners",
    "schedule",
    "split_biases",
]
