"""Trains a model with many experts that read and write a quarter of a token's width, beside a shared one (LatentMoE).

    python train.py --config=configs/systems/latent_moe.py --workdir=runs/latent_moe

A quarter of the width pays for four times as many experts, and four times as many of them a token. The router and the
shared expert read the whole token. With --config.model.moe.latent_norm=True the sum over experts is normed before it is
brought back to the whole width, as in Kimi K3 (arXiv:2607.24653).

Paper: LatentMoE: Toward Optimal Accuracy per FLOP and Parameter in Mixture of Experts, arXiv:2601.18089
Parameters: 2,492,032 total, 1,705,600 active
Exact: hidden states and loads equal to a loop over the experts, with the norm and without (tests/test_systems.py)
Not reproduced: its sizes and data, and its attention and state-space layers
"""

from configs.systems import base


def get_config():
    config = base.get_config()

    model = config.model
    model.num_dense_layers = 0
    model.activation = "relu2"
    model.moe.num_experts = 64
    model.moe.top_k = 16
    model.moe.latent = model.d_model // 4
    model.moe.d_expert = 64
    model.moe.num_shared_experts = 1
    model.moe.score = "sigmoid"
    model.moe.renormalize = True
    model.moe.selection_bias = True

    config.loss.load_balance_coef = 0.0
    return config
