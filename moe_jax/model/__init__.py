"""The decoder: blocks, the stack of them, parameter and FLOP counts."""

from moe_jax.model.blocks import Ahead, Inputs
from moe_jax.model.counts import Counts, count_parameters, flops_per_token, stored_bytes
from moe_jax.model.prediction import is_prediction
from moe_jax.model.transformer import Graph, Output, Transformer, abstract, init, init_adapters, init_prediction

__all__ = [
    "Ahead",
    "Counts",
    "Graph",
    "Inputs",
    "Output",
    "Transformer",
    "abstract",
    "count_parameters",
    "flops_per_token",
    "init",
    "init_adapters",
    "init_prediction",
    "is_prediction",
    "stored_bytes",
]
