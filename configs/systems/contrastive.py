"""Trains a model whose domains have an expert each, which the label of a token names.

    python train.py --config=configs/systems/contrastive.py --workdir=runs/contrastive

There is no router: the one expert of a token in each layer is that of its label, prose or everything else. Attention
and norms are shared.

Paper: Contrastive learning and Mixture of Experts, arXiv:2401.15713
Parameters: 2,098,816 total, 1,705,600 active
Exact: a token uses the expert of its label with weight 1, and no other expert has a gradient of it; the same on every
    mesh (tests/test_labels.py)
Not reproduced: its ranking loss over pairs of abstracts, and its copies of a trained model's feed-forward layers, in
    one layer or all of them: experts are fresh here; its extended tokens
"""

from configs.systems import mixture_of_transformers


def get_config():
    config = mixture_of_transformers.get_config()
    config.model.untie = 1
    return config
