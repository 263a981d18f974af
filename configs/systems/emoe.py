"""Continues the training of a dense model whose hidden units were clustered into experts (EMoE).

    python -m moe_jax.upcycle --from=runs/dense --workdir=runs/emoe_0 --method=cluster --num_experts=16 --dense_layers=2
    python train.py --config=configs/systems/emoe.py --config.init_from=runs/emoe_0 --workdir=runs/emoe

configs/systems/base.py trains runs/dense. Of the last two layers a token uses a quarter of the clusters. Every chosen
one weighs 1, so that no gradient reaches the router.

Paper: Unlocking Emergent Modularity in Large Language Models, arXiv:2310.10908
Parameters: 1,709,696 total, 1,562,240 active
Exact: with all clusters chosen the dense model's logits, to rounding (tests/test_upcycle_transforms.py)
Not reproduced: its pretrained models, fine-tuning tasks and results
"""

from configs.systems import base


def get_config():
    config = base.continued()

    model = config.model
    model.num_dense_layers = 2
    model.moe.num_experts = 16
    model.moe.top_k = 4
    model.moe.combine = "one"
    model.moe.d_expert = model.d_ff // 16

    config.loss.load_balance_coef = 0.0
    config.loss.router_z_coef = 0.0
    return config
