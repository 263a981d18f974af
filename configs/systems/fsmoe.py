"""Trains a model with a cosine router, whose tokens travel between devices in two parts (FSMoE).

    python train.py --config=configs/systems/fsmoe.py --workdir=runs/fsmoe

The router is X-MoE's, arXiv:2204.09179. With several devices on the `expert` axis of the mesh one part may travel while
another is computed.

Paper: FSMoE: A Flexible and Scalable Training System for Sparse Mixture-of-Experts Models, arXiv:2501.10714
Parameters: 4,467,332 total, 1,714,820 active
Exact: logits depend on the direction of a token alone and stay within their scale; loss, gradient and loads are the
    same in one part and in two (tests/test_systems.py)
Not reproduced: its sizes; its measured choice of the number of parts, and its schedule over several kinds of links.
    Whether a part really travels while another is computed was not measured.
"""

from configs.systems import base


def get_config():
    config = base.get_config()

    model = config.model
    model.num_dense_layers = 0
    model.moe.num_experts = 16
    model.moe.top_k = 2
    model.moe.d_expert = 128
    model.moe.renormalize = True
    model.moe.router = "cosine"
    model.moe.router_width = 16
    model.moe.exchange = "all_to_all"
    model.moe.exchange_chunks = 2

    config.loss.load_balance_coef = 0.01
    return config
