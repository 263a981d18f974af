"""Continues the training of a dense model with small experts beside its layers, which stay as they are (MixDA).

    python -m moe_jax.upcycle --from=runs/dense --workdir=runs/adapters --method=beside --num_experts=16 --d_expert=64
    python train.py --config=configs/systems/mixda.py --config.init_from=runs/adapters --workdir=runs/mixda

configs/systems/base.py trains runs/dense. Each dense layer becomes the shared expert of its layer, and is frozen like
attention, norms and embeddings: a group of parameters says so. The new experts add 0 at first. Routers choose them.

Paper: Mixture-of-Domain-Adapters: Decoupling and Injecting Domain Knowledge, arXiv:2306.05406
Parameters: 3,286,656 total, 1,910,400 active
Exact: before the first step the dense model's logits, bit for bit; the frozen bits after training
    (tests/test_upcycle_bank.py, tests/test_systems_files.py)
Not reproduced: its knowledge and tasks, its stages, and its attention over the layer and its adapters, in whose place a
    router is; its adapters have no gate
"""

from configs.systems import base
from moe_jax import config as config_lib


def get_config():
    config = base.continued()

    model = config.model
    model.num_dense_layers = 0
    model.moe.num_experts = 16
    model.moe.top_k = 2
    model.moe.score_order = "topk_score"
    model.moe.d_expert = 64
    model.moe.num_shared_experts = model.d_ff // 64

    config.loss.load_balance_coef = 0.01
    config.optim.groups = {"dense": config_lib.parameter_group(match="^(?!.*/moe/w_)", freeze=True)}
    return config
