"""Trains a model in which a fixed random table names the expert of each token id: no router is learned (MoEBERT).

    python train.py --config=configs/systems/moebert.py --workdir=runs/moebert

The expert's result is added as it is, with the weight 1.

Paper: MoEBERT: from BERT to Mixture-of-Experts via Importance-Guided Adaptation, arXiv:2204.07675
Parameters: 1,705,600 total, 1,410,688 active
Exact: loads are those that the counts of token ids give, the same id has the same expert at every place, and the ids
    of any two experts differ by at most one in number (tests/test_systems.py)
Not reproduced: BERT and its tasks; experts made of the units of a trained layer that matter most, and distillation from
    the model they are made of; its table that is balanced by how frequent ids are
"""

from configs.systems import base


def get_config():
    config = base.get_config()

    model = config.model
    model.num_dense_layers = 0
    model.layers = "4*table"
    model.moe.num_experts = 4
    model.moe.top_k = 1
    model.moe.combine = "one"
    model.moe.d_expert = model.d_ff // 4

    config.loss.load_balance_coef = 0.0  # no loss reaches a table
    config.loss.router_z_coef = 0.0
    return config
