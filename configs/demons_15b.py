"""The 15B model of the global-batch load-balancing paper (arXiv:2501.11873), 400B tokens.

    python train.py --config=configs/demons_15b.py --workdir=runs/demons_15b

Hardware: sized for 128 accelerators of 80 GB: 8 sequences a device, 2 at a time
Time: not run here
Parameters: 15,068,454,400 total, 2,554,748,416 active (1,621,253,632 without embedding and head)
Expect: not run here

The paper says 15B total and 2.54B active. `active` here, embedding and head included, is what meets its figure, and
the total meets its own, each within 2 %. The paper gives the experts (160, top-4, 4 shared), the batch, the tokens
and the load-balancing coefficient; widths, depth, learning rate and z-loss coefficient are not in it. Those below are
ours, with Qwen's vocabulary size.

To compare with balancing over a micro-batch, set `loss.balance_batch=16`; nothing else changes.

Bring a tokenizer and text: `data.tokenizer.path` and `data.sources.text.path`.
"""

from moe_jax import config as config_lib


def get_config():
    config = config_lib.default_config()

    model = config.model
    model.vocab_size = 151_936
    model.d_model = 3072
    model.num_layers = 34
    model.num_heads = 32
    model.num_kv_heads = 4
    model.head_dim = 128
    model.qk_norm = True
    model.remat = "full"
    model.moe.num_experts = 160
    model.moe.top_k = 4
    model.moe.num_shared_experts = 4
    model.moe.d_expert = 256

    config.loss.load_balance_coef = 0.008
    config.loss.router_loss_layers = "sum"  # as Megatron adds them; the paper does not say
    config.loss.balance_batch = "global"
    config.loss.router_z_coef = 0.001

    config.optim.name = "adamw"
    config.optim.lr = 3e-4
    config.optim.warmup_steps = 2000
    config.optim.schedule = "cosine"

    config.data.batch_size = 1024
    config.data.seq_len = 4096
    config.data.tokenizer.kind = "huggingface"
    config.data.tokenizer.path = "data/tokenizer.json"
    config.data.sources = {"text": config_lib.source(kind="files", path="data/text/*.jsonl.gz")}
    config.data.num_workers = 8

    config.mesh.data = -1
    config.mesh.fsdp = 8
    config.mesh.expert = 8

    config.train.steps = 100_000  # 419.4B tokens
    config.train.micro_batches = 4  # 2 a device at a time
    config.train.eval_every = 2000
    config.train.eval_batches = 50
    config.train.checkpoint_every = 2000
    return config
