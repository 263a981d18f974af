"""Rounds the weights of a Mixture of Experts to few bits, chosen for each expert, and counts the bits.

    python -m moe_jax.quant --from=RUN --workdir=RUN2 --method=gptq --bits=3

docs/quantisation.md explains the command and what its files mean.
"""

from moe_jax.quant.convert import Settings, measured, quantise, rounded
from moe_jax.quant.grid import fake_quant, packed_bits
from moe_jax.quant.round import LayerStats, Matrix, Method, measure_block, round_block, rounded_experts
from moe_jax.quant.taps import BlockTaps, Tap
from moe_jax.quant.walk import walk

__all__ = [
    "BlockTaps",
    "LayerStats",
    "Matrix",
    "Method",
    "Settings",
    "Tap",
    "fake_quant",
    "measure_block",
    "measured",
    "packed_bits",
    "quantise",
    "round_block",
    "rounded",
    "rounded_experts",
    "walk",
]
