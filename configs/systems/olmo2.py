"""Trains a dense model that norms what its layers add, and not what they read (OLMo 2).

    python train.py --config=configs/systems/olmo2.py --workdir=runs/olmo2

Queries and keys are normed over all heads together. The embedding does not decay. A step with a spike of the loss or of
the gradient is skipped. Hugging Face's Olmo2ForCausalLM and FlexOlmoForCausalLM have these blocks; both are read and
written.

Paper: 2 OLMo 2 Furious, arXiv:2501.00656
Parameters: 1,706,112 total, 1,706,112 active
Exact: hidden states equal to a loop over the blocks (tests/test_systems.py), and logits to those of transformers
    (tests/test_hf.py)
Not reproduced: its sizes and data, its z-loss on logits, the standard deviation of its fresh weights, which is the same
    in all layers, its second stage of training on other text, and the average of several runs of that
"""

from configs.systems import base
from moe_jax import config as config_lib


def get_config():
    config = base.get_config()

    model = config.model
    model.norm = "post"
    model.qk_norm_over = "projection"
    model.rope_theta = 500_000.0

    config.optim.groups = {"embedding": config_lib.parameter_group(match="^embed$", weight_decay=0.0)}
    config.train.spike = 10.0
    return config
