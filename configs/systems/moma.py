"""Trains a model whose experts are in groups, one for each kind of text, and choose their tokens (MoMa).

    python train.py --config=configs/systems/moma.py --workdir=runs/moma

A token may use the experts of its label alone, four for prose and four for everything else, and each of these takes a
fourth of its label's tokens of a sequence. So loads are equal in a group without a loss. The choice depends on later
tokens: the model writes no text, and its losses are not those of a causal model.

Paper: MoMa, arXiv:2407.21770
Parameters: 4,462,208 total, 1,709,696 active
Exact: no token in a foreign group; each expert takes the best ⌈n/4⌉ of n tokens of its label; weights and probabilities
    of a router of the group alone; the leak of later tokens is shown, and sampling refused; the same on every mesh, in
    micro-batches and with recomputation (tests/test_labels.py, tests/test_labels_texts.py)
Not reproduced: its sizes and data, images among them: labels are kinds of text here; experts choose in a sequence, not
    in the batch; its auxiliary routers for causal inference, mixture of depths, and upcycling with Gumbel noise
"""

from configs.systems import base


def get_config():
    config = base.get_config()

    model = config.model
    model.num_dense_layers = 0
    model.norm = "post"
    model.moe.num_experts = 8
    model.moe.top_k = 1
    model.moe.d_expert = 256
    model.moe.label_groups = 2
    model.moe.choice = "expert"
    model.moe.score = "sigmoid"

    config.loss.load_balance_coef = 0.0
    config.loss.router_z_coef = 0.0
    config.data.labels = {"prose": 1}
    config.sample.tokens = 0
    return config
