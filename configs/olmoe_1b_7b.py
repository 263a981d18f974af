"""OLMoE-1B-7B (arXiv:2409.02060): 64 fine-grained experts, top-8, dropless, balanced over the global batch.

    python train.py --config=configs/olmoe_1b_7b.py --workdir=runs/olmoe_1b_7b

Hardware: sized for 256 accelerators of 80 GB: 4 sequences a device
Time: not run here
Parameters: 6,919,161,856 total, 1,282,017,280 active (1,075,972,096 without embedding and head)
Expect: not trained here; docs/scaling.md has the time of a step on two H200s

The released model has the same number of parameters. It was balanced over the micro-batch of one device, not over the
global batch: set `loss.balance_batch` to the number of sequences in such a micro-batch to do the same.

Bring a tokenizer and text: `data.tokenizer.path` (the GPT-NeoX vocabulary of the release) and
`data.sources.text.path` (the public OLMoE-mix, or any documents as .jsonl.gz or Parquet).
"""

from moe_jax import config as config_lib


def get_config():
    config = config_lib.default_config()

    model = config.model
    model.vocab_size = 50_304
    model.d_model = 2048
    model.num_layers = 16
    model.num_heads = 16
    model.num_kv_heads = 16
    model.head_dim = 128
    model.qk_norm = True
    model.qk_norm_over = "projection"
    model.rope_theta = 10_000.0
    model.norm_eps = 1e-5
    model.moe.num_experts = 64
    model.moe.top_k = 8
    model.moe.d_expert = 1024
    model.moe.renormalize = False  # combine weights are the softmax over all experts
    model.remat = "full"

    # OLMoE was trained with a loss that is 1 at uniform routing, as ours is: its 0.01 carries over. The loss in Hugging
    # Face transformers is K at uniform routing, so `router_aux_loss_coef=a` there is `load_balance_coef=K·a` here: 8·a.
    config.loss.load_balance_coef = 0.01
    config.loss.router_z_coef = 0.001

    config.optim.name = "adamw"
    config.optim.lr = 4e-4
    config.optim.beta1 = 0.9
    config.optim.beta2 = 0.95
    config.optim.eps = 1e-8
    config.optim.weight_decay = 0.1
    config.optim.clip_norm = 1.0
    config.optim.warmup_steps = 2500
    config.optim.schedule = "cosine"
    config.optim.final_lr_fraction = 0.1

    config.data.batch_size = 1024
    config.data.seq_len = 4096
    config.data.tokenizer.kind = "huggingface"
    config.data.tokenizer.path = "data/tokenizer.json"
    config.data.sources = {"text": config_lib.source(kind="files", path="data/text/*.jsonl.gz")}
    config.data.num_workers = 8

    config.mesh.data = -1
    config.mesh.fsdp = 8

    config.train.steps = 1_200_000  # 5.03T tokens
    config.train.eval_every = 5000
    config.train.eval_batches = 50
    config.train.checkpoint_every = 5000
    return config
