"""The decoder: blocks, the stack of them, parameter and FLOP counts."""

from moe_jax.model.blocks import Inputs
from moe_jax.model.counts import Counts, count_parameters, flops_per_token, stored_bytes
from moe_jax.model.transformer import Graph, Output, Transformer, abstract, init, init_adapters

__all__ = [
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
    "stored_bytes",
]
