"""Trains a dense model that norms what its layers add, and not what they read (OLMo 2).

    python train.py --config=configs/systems/olmo2.py --workdir=runs/olmo2

Queries and keys are normed over all heads together. The embedding does not decay. A step with a spike of the loss or of
the gradient is skipped. The last 50 steps are a second stage: half of its text is of a part of the library that the
first stage has not seen. Hugging Face's Olmo2ForCausalLM and FlexOlmoForCausalLM have these blocks; both are read and
written.

Paper: 2 OLMo 2 Furious, arXiv:2501.00656
Parameters: 1,706,112 total, 1,706,112 active
Exact: hidden states equal to a loop over the blocks (tests/test_systems.py), and logits to those of transformers
    (tests/test_hf.py); the rows of each source in both stages (tests/test_systems.py)
Not reproduced: its sizes and data, its z-loss on logits, the standard deviation of its fresh weights, which is the same
    in all layers, the line to 0 of the learning rate in its second stage, and the average of several runs of that
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

    stdlib = dict(kind="tfds", name="stdlib_text", domain_field="domain")
    config.data.sources = {
        "first": config_lib.source(**stdlib, split="train[:90%]", stage_weights=(0.5,)),
        "second": config_lib.source(
            **stdlib, split="train[90%:]", validation_split="", weight=0.0, stage_weights=(0.5,)
        ),
    }
    config.mixture.controller = "stages"
    config.mixture.stages = (150,)
    return config
