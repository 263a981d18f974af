"""Trains a model whose experts run beside a whole block, and whose tokens take as many experts as they need (LongCat).

    python train.py --config=configs/systems/longcat.py --workdir=runs/longcat

The experts read what the first feed-forward layer of a pair of blocks reads. Their result is added after the second
block, so that tokens may travel between devices while dense layers compute. Of the 24 choices of a router 8 return the
token as it is. A token takes 6 choices. Selection biases move until 4 of them are experts, on average.

Paper: LongCat-Flash Technical Report, arXiv:2509.01322
Parameters: 2,498,176 total, 1,908,352 active
Exact: hidden states equal to a loop over the equations of a pair of blocks (tests/test_systems.py); the budget and the
    balance of groups of experts (tests/test_controllers.py, tests/test_router_losses.py)
Not reproduced: its sizes and data, its attention with its scale factors, its loss on hidden states, its growth by
    stacking. Whether the exchange really overlaps with dense layers was not measured.
"""

from configs.systems import base
from moe_jax import config as config_lib


def get_config():
    config = base.get_config()

    model = config.model
    model.num_dense_layers = 0
    model.layers = "2*(late dense)"  # two of the report's layers
    model.moe.num_experts = 16
    model.moe.identity_experts = 8
    model.moe.top_k = 6
    model.moe.d_expert = 64
    model.moe.routed_scaling = 4.0  # the weights of a token add up to 1 while choices are equally probable; LongCat: 6
    model.moe.selection_bias = True
    model.moe.expert_budget = 4.0

    config.loss.bias_update = "proportional"
    config.loss.bias_update_rate = 0.1
    config.loss.load_balance_coef = 0.0
    config.loss.more = {"devices": config_lib.router_loss(kind="load_balance", coef=0.01, over=4)}
    return config
