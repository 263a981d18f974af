"""Trains a model whose experts run beside a whole block: the shortcut wiring of LongCat-Flash.

    python train.py --config=configs/systems/longcat.py --workdir=runs/longcat

The experts read what the first feed-forward layer of a pair of blocks reads. Their result is added after the second
block, so that tokens may travel between devices while dense layers compute.

Paper: LongCat-Flash Technical Report, arXiv:2509.01322
Parameters: 2,496,128 total, 1,906,304 active
Exact: hidden states equal to a loop over the equations of a pair of blocks (tests/test_systems.py)
Not reproduced: its sizes, data and attention; identity experts, the budget of experts a token, balance over devices,
    its other losses. Whether the exchange really overlaps with dense layers was not measured.
"""

from configs.systems import base


def get_config():
    config = base.get_config()

    model = config.model
    model.num_dense_layers = 0
    model.layers = "2*(late dense)"  # two of the report's layers
    model.moe.num_experts = 16
    model.moe.top_k = 4
    model.moe.d_expert = 64
    model.moe.selection_bias = True

    config.loss.load_balance_coef = 0.01
    return config
