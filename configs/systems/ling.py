"""Trains a model whose router starts at random and is mixed in over the first steps (Ling's routing warm-up).

    python train.py --config=configs/systems/ling.py --workdir=runs/ling

In the first step noise alone chooses the experts, so that all of them get tokens. After 50 steps logits alone do. The
rows of the output matrix are divided by their lengths before logits (NormHead).

Paper: Every FLOP Counts: Scaling a 300B Mixture-of-Experts LING LLM without Premium GPUs, arXiv:2503.05139
Parameters: 2,991,744 total, 1,812,096 active
Exact: in the first step the choice does not depend on the token, after the warm-up it is the plain router's; the loss
    does not depend on the lengths of the output matrix's rows (tests/test_systems.py)
Not reproduced: its sizes and data; the length of its warm-up, which the paper does not give; the running mean and
    deviation of its noise, which are the token's own here; its treatment of loss spikes, which puts skipped samples
    into later batches
"""

from configs.systems import base


def get_config():
    config = base.get_config()

    model = config.model
    model.num_dense_layers = 0
    model.norm_head = True
    model.moe.num_experts = 16
    model.moe.top_k = 4
    model.moe.d_expert = 64
    model.moe.renormalize = True
    model.moe.num_shared_experts = 1

    config.explore.random.start = 1.0
    config.explore.random.end = 0.0
    config.explore.random.steps = 50

    config.loss.load_balance_coef = 0.015
    config.loss.router_z_coef = 1e-4
    return config
