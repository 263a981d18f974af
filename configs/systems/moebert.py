"""Trains a model in which a fixed random table names the expert of each token id, with a dense teacher (MoEBERT).

    python train.py --config=configs/systems/moebert.py --workdir=runs/moebert

configs/systems/base.py trains the teacher, runs/dense. The expert's result is added as it is, with the weight 1. The
loss has the symmetric divergence of predictions, and the distance of the residual streams after each block. Experts
are fresh here. The paper makes them of the hidden units of the teacher that matter most: the options --from=runs/dense
--method=importance --num_experts=4 --shared=40 --d_expert=64 --layers="4*table" of `python -m moe_jax.upcycle` do so,
and --config.init_from then names the result.

Paper: MoEBERT: from BERT to Mixture-of-Experts via Importance-Guided Adaptation, arXiv:2204.07675
Parameters: 1,705,600 total, 1,410,688 active
Exact: loads are those that the counts of token ids give, the same id has the same expert at every place, and the ids
    of any two experts differ by at most one in number (tests/test_systems.py); both terms of the teacher in float64
    (tests/test_distillation.py)
Not reproduced: BERT and its tasks; its distance of embeddings; its table that is balanced by how frequent ids are
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

    distill = config.distill
    distill.teacher, distill.divergence = "runs/dense", "symmetric"
    distill.coef = distill.hidden_coef = 1.0  # the paper: 5 for MNLI

    config.loss.load_balance_coef = 0.0  # no loss reaches a table
    config.loss.router_z_coef = 0.0
    return config
