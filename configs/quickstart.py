"""Trains a small Mixture-of-Experts model of Python source and its documentation on a laptop CPU.

    python train.py --config=configs/quickstart.py --workdir=runs/quickstart

Hardware: a CPU; 2 cores are enough
Time: 3:02 and 3:13 minutes in two runs on 2 cores (Xeon)
Parameters: 1,969,024 total, 1,379,200 active (330,624 without embedding and head)
Expect: 1.57 bits per byte on held-out files (gzip -9: 1.74, xz -9: 1.41), cross-entropy 3.77 nats per token, maximum
    load 1.2 on held-out text (Python 3.11.7, jax 0.10.2)

This is one seed. Size, learning rates and balance coefficient were chosen in some forty runs by this same held-out
number, so it flatters the model a little.

The text is the standard library of the Python that runs this: nothing is downloaded.
"""

from moe_jax import config as config_lib
from moe_jax.config import parameter_group


def get_config():
    config = config_lib.default_config()

    model = config.model
    model.vocab_size = 4096
    model.d_model = 128
    model.num_layers = 2
    model.num_heads = 2
    model.num_kv_heads = 2
    model.head_dim = 64
    model.qk_norm = True
    model.compute_dtype = "float32"
    model.unroll = 2  # a loop over layers would copy what they keep for the backward pass
    model.moe.num_experts = 8
    model.moe.top_k = 2
    model.moe.d_expert = 128

    config.loss.load_balance_coef = 0.05
    config.loss.balance_batch = "global"

    config.data.batch_size = 8
    config.data.seq_len = 256
    config.data.tokenizer.kind = "bpe"
    config.data.tokenizer.vocab_size = 4096

    config.optim.name = "muon"
    config.optim.newton_schulz_steps = 3  # the usual five take longer, and learned no more here
    config.optim.lr = 6e-3
    config.optim.schedule = "wsd"
    config.optim.decay_fraction = 0.4
    config.optim.final_lr_fraction = 0.05
    config.optim.warmup_steps = 10  # stays below the 20 steps that the notebook test runs
    # Most tokens are rare, and a row of the embedding moves only when its token occurs: larger steps, longer memory.
    config.optim.groups = {"embedding": parameter_group(match="^embed$", lr=10.0)}
    config.optim.beta2 = 0.99

    config.train.steps = 650
    return config
