"""Trains a model with weights of its own for each kind of text, under one attention over all tokens.

    python train.py --config=configs/systems/mixture_of_transformers.py --workdir=runs/mot

Attention matrices, norms and feed-forward layers of a block belong to a label: prose, or everything else. A token uses
those of its label: as many FLOPs as in the dense model of base.py.

Paper: Mixture-of-Transformers, arXiv:2411.04996
Parameters: 2,362,496 total, 1,705,600 active
Exact: equal weights of all labels are the plain model, in loss and gradients; weights of a label that no token has get
    no gradient; the same on every mesh, in micro-batches and with recomputation (tests/test_labels.py)
Not reproduced: its sizes and data: labels are kinds of text here, not text, images and speech; its diffusion of images;
    the last norm is shared
"""

from configs.systems import base


def get_config():
    config = base.get_config()

    model = config.model
    model.num_dense_layers = 0
    model.layers = "4*table"
    model.untie = 2
    model.moe.table = "label"
    model.moe.num_experts = 2
    model.moe.top_k = 1
    model.moe.combine = "one"
    model.moe.d_expert = 256

    config.loss.load_balance_coef = 0.0
    config.loss.router_z_coef = 0.0
    config.data.labels = {"prose": 1}
    config.sample.label = 1
    return config
