"""Trains a model whose tokens use all experts at first, and fewer and fewer of them later (EvoMoE).

    python train.py --config=configs/systems/evomoe.py --workdir=runs/evomoe

Gumbel noise is added to the logits, and their softmax is taken at a temperature that falls. Experts with a share of
less than 0.001 do nothing. In evaluation a token uses one expert.

Paper: EvoMoE: An Evolutional Mixture-of-Experts Training Framework via Dense-To-Sparse Gate, arXiv:2112.14397
Parameters: 3,083,904 total, 1,707,648 active
Exact: the mean number of experts that a token uses falls along the ramp, on fixed logits, from 8 to less than 1.5, and
    evaluation is the plain choice of the best (tests/test_systems.py)
Not reproduced: its first phase, in which one expert is trained and then copied under masks; its temperatures (its code:
    1 to 0.5) and how long it cools; its balancing loss, which grows with the number of experts that a token uses.
    Active parameters are those of evaluation.
"""

from configs.systems import base


def get_config():
    config = base.get_config()

    model = config.model
    model.num_dense_layers = 0
    model.layers = "2*(dense moe)"
    model.moe.num_experts = 8
    model.moe.top_k = 1
    model.moe.d_expert = model.d_ff

    explore = config.explore
    explore.top_k = 8
    explore.noise = 1.0
    explore.threshold = 0.001
    explore.temperature.start, explore.temperature.end = 2.0, 0.05
    explore.temperature.steps, explore.temperature.form = 150, "exponential"

    config.loss.load_balance_coef = 0.01
    return config
