"""Continues the training of experts to which as many were added, each a mixture of those before (MixtureGrowth).

    python -m moe_jax.upcycle --from=runs/dense --workdir=runs/mixtures --method=virtual_groups --expansion=8 \
        --score_order=score_topk --renormalize --drop=0.5 --grow=16
    python train.py --config=configs/systems/mixture_growth.py --config.init_from=runs/mixtures --workdir=runs/growth

configs/systems/base.py trains runs/dense. Half of the units of its 8 copies are drawn anew, so that they differ. No
token chooses a new expert at first. The selection bias of an expert with few tokens rises in each step: after at most
50 steps new ones are open. With `--grow=16` alone `--from` is a run whose experts are trained already.

Paper: MixtureGrowth: Growing Neural Networks by Recombining Learned Parameters, arXiv:2311.04251
Parameters: 7,612,032 total, 2,107,008 active
Exact: the new experts and router columns are mixtures of the old ones, and change no logits while they are closed
    (tests/test_upcycle_bank.py)
Not reproduced: its vision models, its growth of the width of layers, its training of templates and coefficients: here
    the coefficients are drawn once
"""

from configs.systems import base


def get_config():
    config = base.continued()

    model = config.model
    model.num_dense_layers = 0
    model.moe.num_experts = 16
    model.moe.top_k = 2
    model.moe.renormalize = True
    model.moe.d_expert = model.d_ff
    model.moe.selection_bias = True

    config.loss.load_balance_coef = 0.0
    config.loss.bias_update_rate = 0.02
    return config
