"""Trains the small dense model that the other files of this folder change, and from which some of them are made.

    python train.py --config=configs/systems/base.py --workdir=runs/dense

Parameters: 1,705,600 total, 1,705,600 active

The text is the standard library of the Python that runs this: nothing is downloaded.
"""

from moe_jax import config as config_lib


def get_config():
    config = config_lib.default_config()

    model = config.model
    model.vocab_size = 4096
    model.d_model = 128
    model.num_layers = 4
    model.num_dense_layers = 4
    model.d_ff = 256
    model.num_heads = 2
    model.num_kv_heads = 2
    model.head_dim = 64
    model.qk_norm = True
    model.compute_dtype = "float32"

    config.optim.name = "adamw"
    config.optim.lr = 3e-3
    config.optim.warmup_steps = 10

    config.data.batch_size = 8
    config.data.seq_len = 256
    config.data.tokenizer.kind = "bpe"
    config.data.tokenizer.vocab_size = 4096

    config.train.steps = 200
    config.train.eval_batches = 64
    return config


def continued():
    """Training that goes on from weights that are trained already, with a lower learning rate."""
    config = get_config()
    config.optim.lr = 1e-3
    config.train.steps = 100
    return config
