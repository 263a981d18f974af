"""Trains a model whose routers are small networks that hand their state to the next layer's (ZAYA1).

    python train.py --config=configs/systems/zaya1.py --workdir=runs/zaya1

A token uses one expert, or skips the layer: one more choice of the router, which computes and adds nothing. What a
block adds, and what it adds that to, have a learned scale and bias.

Paper: Training Foundation Models on a Full-Stack AMD Platform: Compute, Networking, and System Design,
    arXiv:2511.17127
Parameters: 4,489,856 total, 1,529,171 active
Exact: hidden states equal to a loop over the layers; a layer that is skipped adds exactly 0 (tests/test_systems.py);
    at first its scales are the plain sum
Not reproduced: its sizes and data; its attention (CCA); its residual stream in float32 where layers compute in
    bfloat16; the start of the skip's selection bias at −1, and the numbers of the biases' AdamW, which were not
    published. The skip is balanced like an expert here.
"""

from configs.systems import base


def get_config():
    config = base.get_config()

    model = config.model
    model.num_dense_layers = 0
    model.residual_scale = True
    model.moe.num_experts = 16
    model.moe.top_k = 1
    model.moe.d_expert = 128
    model.moe.router = "mlp"
    model.moe.router_width = 32
    model.moe.identity_experts = 1
    model.moe.identity_output = "nothing"
    model.moe.selection_bias = True

    config.optim.name = "muon"

    config.loss.bias_update = "adamw"
    config.loss.load_balance_coef = 0.0
    config.loss.router_z_coef = 0.0
    return config
