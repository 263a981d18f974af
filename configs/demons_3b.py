"""The 3.4B model of the global-batch load-balancing paper (arXiv:2501.11873), 120B tokens.

    python train.py --config=configs/demons_3b.py --workdir=runs/demons_3b

Hardware: sized for 128 accelerators of 80 GB: 4 sequences a device, as in the paper
Time: not run here
Parameters: 3,428,768,768 total, 597,613,568 active (442,031,104 without embedding and head)
Expect: not run here

The paper says 3.4B total and 0.6B active. Both counts here are within 2 % of these, where `active` includes the tied
table of embedding and head. The paper gives the experts (64, top-4, 4 shared), the batch, the tokens and the
load-balancing coefficient. It does not give widths, depth, learning rate and z-loss coefficient: those below are
ours, with Qwen's vocabulary size.

To compare with balancing over a micro-batch, set `loss.balance_batch=4`; nothing else changes.

Bring a tokenizer and text: `data.tokenizer.path` and `data.sources.text.path`.
"""

from moe_jax import config as config_lib


def get_config():
    config = config_lib.default_config()

    model = config.model
    model.vocab_size = 151_936
    model.d_model = 1024
    model.num_layers = 24
    model.num_heads = 8
    model.num_kv_heads = 2
    model.head_dim = 128
    model.qk_norm = True
    model.tie_embeddings = True
    model.remat = "full"
    model.moe.num_experts = 64
    model.moe.top_k = 4
    model.moe.num_shared_experts = 4
    model.moe.d_expert = 640

    config.loss.load_balance_coef = 0.008
    config.loss.router_loss_layers = "sum"  # as Megatron adds them; the paper does not say
    config.loss.balance_batch = "global"
    config.loss.router_z_coef = 0.001

    config.optim.name = "adamw"
    config.optim.lr = 3e-4
    config.optim.warmup_steps = 2000
    config.optim.schedule = "cosine"

    config.data.batch_size = 512
    config.data.seq_len = 4096
    config.data.tokenizer.kind = "huggingface"
    config.data.tokenizer.path = "data/tokenizer.json"
    config.data.sources = {"text": config_lib.source(kind="files", path="data/text/*.jsonl.gz")}
    config.data.num_workers = 8

    config.mesh.data = -1
    config.mesh.fsdp = 8

    config.train.steps = 60_000  # 125.8B tokens
    config.train.eval_every = 2000
    config.train.eval_batches = 50
    config.train.checkpoint_every = 2000
    return config
