"""Trains a model with experts in every second layer.

    python train.py --config=configs/systems/efficient_lm.py --workdir=runs/efficient_lm

Paper: Efficient Large Scale Language Modeling with Mixtures of Experts, arXiv:2112.10684
Parameters: 3,083,904 total, 1,904,256 active
Exact: blocks 1 and 3 have experts, blocks 0 and 2 have none (tests/test_systems.py)
Not reproduced: its sizes (up to 1.1T parameters) and data, and its limit on the tokens of an expert (here: none)
"""

from configs.systems import base


def get_config():
    config = base.get_config()

    model = config.model
    model.num_dense_layers = 0
    model.layers = "2*(dense moe)"
    model.moe.num_experts = 8
    model.moe.top_k = 2
    model.moe.renormalize = True
    model.moe.d_expert = model.d_ff  # an expert is as wide as the dense layer

    config.loss.load_balance_coef = 0.01
    return config
