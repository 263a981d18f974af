"""A Mixture of Experts of 120M parameters on eight TPU v5e chips, such as Kaggle's "TPU v5e-8".

    python train.py --config=configs/v5e_8.py --workdir=runs/v5e_8

Hardware: 8 accelerators, TPU v5e (not tried; compiled with --compile_only=v5e:2x4, where a step fits in 5.7 GB of 16)
Time: not measured
Parameters: 117,581,312 total, 29,500,928 active (21,112,320 without embedding and head)
Expect: not measured

Two groups of chips compute their own sequences (`mesh.data`); the four chips of a group share the experts
(`mesh.expert`). The text is the standard library of the Python that runs this: nothing is downloaded.
notebooks/tpu.ipynb runs it step by step.
"""

from moe_jax import config as config_lib


def get_config():
    config = config_lib.default_config()

    model = config.model
    model.vocab_size = 16_384
    model.d_model = 512
    model.num_layers = 8
    model.num_heads = 8
    model.num_kv_heads = 8
    model.head_dim = 64
    model.qk_norm = True
    model.tie_embeddings = True
    model.moe.num_experts = 32
    model.moe.top_k = 4
    model.moe.d_expert = 256

    config.mesh.data = 2
    config.mesh.expert = 4

    config.loss.load_balance_coef = 0.01
    config.loss.balance_batch = "global"

    config.data.batch_size = 128
    config.data.seq_len = 512
    config.data.tokenizer.kind = "bpe"
    config.data.tokenizer.vocab_size = 16_384

    config.optim.name = "muon"
    config.optim.lr = 6e-3
    config.optim.schedule = "wsd"
    config.optim.decay_fraction = 0.4
    config.optim.final_lr_fraction = 0.05
    config.optim.warmup_steps = 10  # stays below the 12 steps that the notebook test runs

    config.train.steps = 300
    config.train.eval_every = 50
    config.train.checkpoint_every = 100
    return config
