"""Runs every part in a few seconds: start this when something is broken.

    python train.py --config=configs/debug.py --workdir=runs/debug

Hardware: any CPU
Time: 13 s on 2 cores, once the corpus is prepared
Parameters: 65,952 total, 53,664 active (20,896 without embedding and head)
Expect: 5.49 nats per token on 1,024 held-out bytes after 10 steps (log 512 = 6.24), which shows that it learns
"""

from moe_jax import config as config_lib


def get_config():
    config = config_lib.default_config()

    model = config.model
    model.vocab_size = 512  # 256 bytes and the special tokens fit
    model.d_model = 32
    model.num_layers = 2
    model.num_heads = 2
    model.num_kv_heads = 2
    model.head_dim = 16
    model.compute_dtype = "float32"
    model.moe.num_experts = 4
    model.moe.top_k = 2
    model.moe.d_expert = 32

    config.data.batch_size = 8
    config.data.seq_len = 64
    config.data.tokenizer.kind = "bytes"

    config.optim.name = "muon"
    config.optim.lr = 3e-3
    config.optim.warmup_steps = 2

    config.train.steps = 10
    config.train.log_every = 1
    config.train.eval_batches = 2
    config.train.checkpoint_every = 5
    config.train.tensorboard = False
    config.sample.tokens = 16
    return config
