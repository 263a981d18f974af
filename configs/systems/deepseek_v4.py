"""Trains a model whose first layers choose experts by token id, and whose later ones learn to (DeepSeek-V4's routing).

    python train.py --config=configs/systems/deepseek_v4.py --workdir=runs/deepseek_v4

A fixed random table names four experts of each token id in the first of four layers (in the first three of the paper's
models; tables are those of Hash Layers, arXiv:2106.04426). A learned router weighs them there too.

Paper: DeepSeek-V4: Towards Highly Efficient Million-Token Context Intelligence, arXiv:2606.19348
Parameters: 2,991,744 total, 1,812,096 active
Exact: weights are 1.5 times the normalised √softplus of the logits of the experts that the table names; the choice is
    the same at every place (tests/test_systems.py)
Not reproduced: its sizes and data, its attention and residual streams, its limit on the values inside an expert, how
    its table is drawn, multi-token prediction, training in low precision
"""

from configs.systems import base


def get_config():
    config = base.get_config()

    model = config.model
    model.num_dense_layers = 0
    model.layers = "table 3*moe"
    model.moe.num_experts = 16
    model.moe.top_k = 4
    model.moe.d_expert = 64
    model.moe.num_shared_experts = 1
    model.moe.score = "sqrt_softplus"
    model.moe.renormalize = True
    model.moe.routed_scaling = 1.5
    model.moe.selection_bias = True

    config.optim.name = "muon"
    config.optim.coefficients, config.optim.newton_schulz_steps = "deepseek_v4", 10

    config.loss.load_balance_coef = 1e-4
    config.loss.balance_batch = "1"
    return config
