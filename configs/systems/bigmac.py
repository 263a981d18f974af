"""Trains a model whose experts read a token at a quarter of its width, at which it is also sent (BigMac).

    python train.py --config=configs/systems/bigmac.py --workdir=runs/bigmac

One matrix of a layer brings tokens to that width before the exchange between devices, another brings the sum over
experts back. Each expert is narrow where a fine-grained one is wide and as wide as the model where that is narrow, so
that both have as many weights. The router reads the whole token.

Paper: BigMac: A Communication-Efficient Mixture-of-Experts Model Structure for Fast Training and Inference,
    arXiv:2502.16927
Parameters: 3,475,072 total, 1,640,064 active
Exact: hidden states and loads equal to a loop over the experts (tests/test_systems.py); the exchange sends a quarter of
    the bytes (tests/test_latent.py)
Not reproduced: its sizes and data, and its limit on the tokens of an expert
"""

from configs.systems import base


def get_config():
    config = base.get_config()

    model = config.model
    model.num_dense_layers = 0
    model.activation = "gelu"  # an expert has two matrices
    model.moe.num_experts = 64
    model.moe.top_k = 8
    model.moe.latent = model.d_model // 4
    model.moe.d_expert = model.d_model

    config.loss.load_balance_coef = 0.001
    return config
