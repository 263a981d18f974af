"""Optimizers: Muon on one device and on many, AdamW, and which of them updates which parameter."""

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
    "describe",
    "describe_stretch",
    "label_params",
    "make_optimizer",
    "matrices_of",
    "muon_plan",
    "owners",
    "schedule",
]
