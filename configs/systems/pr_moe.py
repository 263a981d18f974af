"""Trains a pyramid: late layers have more experts, and every token also uses a shared one (PR-MoE).

    python train.py --config=configs/systems/pr_moe.py --workdir=runs/pr_moe

Paper: DeepSpeed-MoE: Advancing Mixture-of-Experts Inference and Training to Power Next-Generation AI Scale,
    arXiv:2201.05596
Parameters: 7,087,232 total, 2,761,856 active
Exact: the places and sizes of both banks, counted by hand (tests/test_systems.py)
Not reproduced: its sizes and data; its softmax gate between the shared and the routed expert, which are added up here;
    its smaller student (MoS); its limit on the tokens of an expert.
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

    config.loss.load_balance_coef = 0.01
    return config
