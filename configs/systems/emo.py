"""Trains a model whose documents choose experts from pools of their own (EMO).

    python train.py --config=configs/systems/emo.py --workdir=runs/emo

In each layer the tokens of a document choose from the experts that the document as a whole prefers: 3 to 16, a random
number for each document. Loads are balanced over the whole batch, which has many documents. Evaluation and samples
choose from all experts. `python eval.py --workdir=runs/emo --keep_experts=100,50,25` evaluates each kind of text with a
part of the experts alone.

Paper: EMO, arXiv:2605.06663
Parameters: 2,991,232 total, 1,713,280 active
Exact: weights, losses and gradients of a loop over documents; no token leaves its document's pool; a packed document
    has the pool that it has alone, if both are of the same size; the same on every mesh, in micro-batches and with
    recomputation (tests/test_pools_layer.py, tests/test_pools.py); sizes of pools by hand (tests/test_systems.py)
Not reproduced: its sizes and data; its form of the load-balancing loss, which sees one micro-batch; OLMo-core's form of
    pools, whose scores and losses are those of all experts; its fine-tuning of parts; the layer by layer choice of
    parts; its percentages of parts, which count the shared expert
"""

from configs.systems import base


def get_config():
    config = base.get_config()

    model = config.model
    model.num_dense_layers = 0
    model.qk_norm = False
    model.moe.num_experts = 16
    model.moe.top_k = 3
    model.moe.d_expert = 64
    model.moe.num_shared_experts = 1
    model.moe.pool_min = 3
    model.moe.pool_from = "all"

    config.loss.load_balance_coef = 0.1
    config.loss.router_z_coef = 1e-3
    return config
