"""Trains a model in which each kind of text has a router of its own, and routers are told to differ (Mod-Squad).

    python train.py --config=configs/systems/modular_vision.py --workdir=runs/modular

Two routers of a layer choose from the same 16 experts: one for prose, one for everything else. A loss rewards the
mutual information of labels and experts over the whole batch: each expert for few labels, all experts in use.

Paper: Mod-Squad, arXiv:2212.08066, and a general-purpose modular vision model, arXiv:2306.17165
Parameters: 2,901,632 total, 1,713,792 active
Exact: the router of a token's label, in values and gradients; the mutual information is log 4 where four labels share
    no expert and 0 where they are routed alike; value and gradient against float64 on every mesh, in micro-batches and
    with recomputation (tests/test_labels.py, tests/test_balance_exact.py)
Not reproduced: its vision transformer and tasks: labels are kinds of text here; experts among attention heads; noise
    in the routers; gates that begin as zero, in its code; its removal of experts after training
"""

from configs.systems import base
from moe_jax.config import router_loss


def get_config():
    config = base.get_config()

    model = config.model
    model.num_dense_layers = 0
    model.moe.num_experts = 16
    model.moe.top_k = 4
    model.moe.d_expert = 64
    model.moe.routers = 2

    config.loss.load_balance_coef = 0.0
    config.loss.more = {"labels": router_loss(kind="label_information", coef=5e-3)}
    config.data.labels = {"prose": 1}
    config.sample.label = 1
    return config
