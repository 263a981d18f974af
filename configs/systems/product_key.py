"""Trains a model with a product-key memory beside the feed-forward layer of its third block.

    python train.py --config=configs/systems/product_key.py --workdir=runs/product_key

A token reads 32 of the memory's 4,096 rows: the 16 of each of two heads whose keys are nearest to its queries. The
memory lies beside a feed-forward layer, and not instead of it, as in arXiv:2010.03881.

Paper: Large Memory Layers with Product Keys, arXiv:1907.05242
Parameters: 2,254,656 total, 1,734,464 active
Exact: the rows are the best of all 4,096, with the gradients of a search through all of them, on any mesh
    (tests/test_product_keys.py, tests/test_systems.py)
Not reproduced: its sizes and data; the norm of its queries over the batch, which shows a token what comes after it:
    here each query has an RMSNorm; Adam without a schedule for the rows that a step reads: here AdamW moves all rows,
    without weight decay; the start from a trained model without memory
"""

from configs.systems import base
from moe_jax import config as config_lib


def get_config():
    config = base.get_config()

    model = config.model
    model.num_dense_layers = 0
    model.layers = "2*dense memory dense"
    model.memory.keys = 64
    model.memory.heads = 2
    model.memory.top = 16
    model.memory.key_dim = 64

    config.optim.groups = {"rows": config_lib.parameter_group(match="/memory/values$", weight_decay=0.0)}
    return config
