"""Trains a pyramid: late layers have more experts, and a gate weighs each token's expert and a shared one (PR-MoE).

    python train.py --config=configs/systems/pr_moe.py --workdir=runs/pr_moe

Paper: DeepSpeed-MoE: Advancing Mixture-of-Experts Inference and Training to Power Next-Generation AI Scale,
    arXiv:2201.05596
Parameters: 7,088,264 total, 2,762,888 active
Exact: the places and sizes of both banks, counted by hand; hidden states and loads equal to a loop over the experts,
    where none has too many tokens (tests/test_systems.py)
Not reproduced: its sizes and data, its smaller student (MoS), its least capacity of 4 tokens an expert, and the random
    start of its gate, which is ½ and ½ here. Capacity is that of a device's tokens, so another mesh drops other ones.
"""

from configs.systems import base


def get_config():
    config = base.get_config()

    model = config.model
    model.num_layers = 8
    model.num_dense_layers = 0
    model.layers = "2*(dense moe:8) 2*(dense moe:16)"  # the published 350M model: 10*(dense moe:32) 2*(dense moe:64)
    model.moe.num_experts = 8
    model.moe.top_k = 1
    model.moe.d_expert = model.d_ff
    model.moe.num_shared_experts = 1
    model.moe.shared_gate = "softmax"
    model.moe.compute = "capacity"
    model.moe.capacity_factor = 1.0
    model.moe.overflow = "random"

    config.loss.load_balance_coef = 0.01
    return config
