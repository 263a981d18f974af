"""Continues the training of one expert that became 8, of which tokens use all at first and fewer later (EvoMoE).

    python -m moe_jax.upcycle --from=runs/dense --workdir=runs/spawned --expansion=8 --top_k=1 \
        --dense_layers=2 --score_order=score_topk --scale=none --mask=0.2
    python train.py --config=configs/systems/evomoe.py --config.init_from=runs/spawned --workdir=runs/evomoe

configs/systems/base.py trains runs/dense. A fifth of the weights of each copy is set to 0, so that copies differ.
Gumbel noise is added to the logits, and their softmax is taken at a temperature that falls. Experts with a share of
less than 0.001 do nothing. In evaluation a token uses one expert.

Paper: EvoMoE: An Evolutional Mixture-of-Experts Training Framework via Dense-To-Sparse Gate, arXiv:2112.14397
Parameters: 3,083,904 total, 1,707,648 active
Exact: the mean number of experts that a token uses falls along the ramp, on fixed logits, from 8 to less than 1.5, and
    evaluation is the plain choice of the best (tests/test_systems.py); masked weights are 0, all others have the bits
    of the dense layer (tests/test_upcycle_transforms.py)
Not reproduced: its share of masked weights, which is not in its code; its temperatures (its code: 1 to 0.5) and how
    long it cools; its balancing loss, which grows with the number of experts that a token uses. Active parameters are
    those of evaluation.
"""

from configs.systems import base


def get_config():
    config = base.continued()

    model = config.model
    model.num_dense_layers = 2
    model.moe.num_experts = 8
    model.moe.top_k = 1
    model.moe.d_expert = model.d_ff

    explore = config.explore
    explore.top_k = 8
    explore.noise = 1.0
    explore.threshold = 0.001
    explore.temperature.start, explore.temperature.end = 2.0, 0.05
    explore.temperature.steps, explore.temperature.form = 75, "exponential"

    config.loss.load_balance_coef = 0.01
    return config
