"""Continues the training of a dense model that was made wider and deeper, and then copied into experts (AquilaMoE).

    python -m moe_jax.upcycle --from=runs/dense --workdir=runs/grown --depth=6 --width=256 --heads=4 --d_ff=512 --aki
    python train.py --config=configs/systems/aquila.py --config.init_from=runs/grown --workdir=runs/aquila

configs/systems/base.py trains runs/dense. New heads, units and channels come from the next layer (AKI), then layers
are copied. Eight experts, of which a token uses two, are the first command's defaults.

Paper: AquilaMoE: Efficient Training for MoE Models with Scale-Up and Scale-Out Strategies, arXiv:2408.06567
Parameters: 22,560,768 total, 8,404,992 active
Exact: every matrix by the formula of AKI (tests/test_upcycle_transforms.py); copying keeps the logits, to rounding
    (tests/test_upcycle_transforms.py), more layers and AKI change them
Not reproduced: its sizes and data, the training of the grown model before it is copied, and its loss on the largest
    router logit
"""

from configs.systems import base


def get_config():
    config = base.continued()

    model = config.model
    model.d_model = 256
    model.num_layers = 6
    model.num_dense_layers = 0
    model.d_ff = 512
    model.num_heads = model.num_kv_heads = 4
    model.moe.num_experts = 8
    model.moe.top_k = 2
    model.moe.score_order = "topk_score"
    model.moe.d_expert = model.d_ff

    config.loss.load_balance_coef = 0.001
    return config
