"""Continues the training of a dense model whose layers became 8 copies each, of which a token uses 2.

    python -m moe_jax.upcycle --from=runs/dense --workdir=runs/copies --expansion=8 --top_k=2
    python train.py --config=configs/systems/llama3_meets_moe.py --config.init_from=runs/copies --workdir=runs/llama3

configs/systems/base.py trains runs/dense. Each device makes its own experts from the sharded dense weights.

Paper: Llama 3 Meets MoE: Efficient Upcycling, arXiv:2412.09952
Parameters: 4,462,208 total, 2,102,912 active
Exact: before the first step the dense model's logits, to rounding (tests/test_systems_files.py)
Not reproduced: Llama 3, its size, data and benchmarks
"""

from configs.systems import base


def get_config():
    config = base.continued()

    model = config.model
    model.num_dense_layers = 0
    model.moe.num_experts = 8
    model.moe.top_k = 2
    model.moe.score_order = "topk_score"
    model.moe.d_expert = model.d_ff

    config.loss.load_balance_coef = 0.01
    return config
