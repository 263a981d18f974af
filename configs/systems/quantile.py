"""Trains a model whose loads are kept equal by selection biases that are solved for after every step.

    python train.py --config=configs/systems/quantile.py --workdir=runs/quantile

Each expert's bias is a quantile, over the tokens of the step's batch, of the biases with which they would choose it.
There is no loss that balances and no rate.

Paper: Kimi K3 Technical Report, arXiv:2607.24653
Parameters: 2,893,440 total, 1,713,792 active
Exact: counts equal to a NumPy reference on every mesh, biases to float64 (tests/test_quantile.py)
Not reproduced: its sizes and data, its attention and its activation; and its latent experts,
    which configs/systems/latent_moe.py has. The formulas are those of published code that follows the report.
"""

from configs.systems import base


def get_config():
    config = base.get_config()

    model = config.model
    model.num_dense_layers = 0
    model.moe.num_experts = 16
    model.moe.top_k = 4
    model.moe.d_expert = 64
    model.moe.score = "sigmoid"
    model.moe.renormalize = True
    model.moe.selection_bias = True

    config.loss.load_balance_coef = 0.0
    config.loss.bias_update = "quantile"
    return config
