"""Continues the training of a dense model whose layers became 8 copies each, chosen by a router that is not trained.

    python -m moe_jax.upcycle --from=runs/dense --workdir=runs/copies_1 --expansion=8 --top_k=1
    python train.py --config=configs/systems/cpm2.py --config.init_from=runs/copies_1 --workdir=runs/cpm2

configs/systems/base.py trains runs/dense. The router stays the random projection that upcycling gave it: a group of
parameters freezes it. A token's expert is the column with the largest logit, its weight is 1, and no loss balances.

Paper: CPM-2: Large-scale Cost-effective Pre-trained Language Models, arXiv:2106.10715
Parameters: 4,462,208 total, 1,709,696 active
Exact: before the first step the dense model's logits, to rounding; the router's bits after training; it has no
    gradient and no moment (tests/test_systems.py)
Not reproduced: its encoder and decoder, sizes and Chinese data, its prompt tuning and its inference. That the gate is a
    fixed random projection is our reading: the released code that we saw has no experts.
"""

from configs.systems import base
from moe_jax import config as config_lib


def get_config():
    config = base.continued()

    model = config.model
    model.num_dense_layers = 0
    model.moe.num_experts = 8
    model.moe.top_k = 1
    model.moe.score_order = "topk_score"
    model.moe.d_expert = model.d_ff

    config.loss.load_balance_coef = 0.0  # no loss reaches a frozen router
    config.loss.router_z_coef = 0.0
    config.optim.groups = {"router": config_lib.parameter_group(match="/moe/w_router$", freeze=True)}
    return config
