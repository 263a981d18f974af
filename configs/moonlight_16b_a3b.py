"""Moonlight-16B-A3B (arXiv:2502.16982): DeepSeek-V3's layers with latent attention, trained with Muon on 5.7T tokens.

    python train.py --config=configs/moonlight_16b_a3b.py --workdir=runs/moonlight_16b_a3b

Hardware: sized for 256 accelerators of 80 GB: 16 sequences a device, in two micro-batches
Time: not run here
Parameters: 15,960,108,544 total, 2,914,774,528 active (2,243,685,888 without embedding and head)
Expect: not run here

The release gives 15.29B and 2.24B, which are the counts here without the two tables of 163,840 · 2048. This config
trains its first two stages, up to 5.2T tokens, in one (the release halved the batch up to 200B tokens). To start from
its weights:

    python -m moe_jax.hf import --from=Moonlight-16B-A3B --workdir=runs/moonlight_release
    python train.py --config=configs/moonlight_16b_a3b.py --workdir=runs/mine --config.init_from=runs/moonlight_release

Its tokenizer is code and not a tokenizer.json: bring a tokenizer of its vocabulary, and text.
"""

from moe_jax import config as config_lib


def get_config():
    config = config_lib.default_config()

    model = config.model
    model.vocab_size = 163_840
    model.d_model = 2048
    model.num_layers = 27
    model.num_dense_layers = 1
    model.d_ff = 11_264
    model.num_heads = 16
    model.num_kv_heads = 16
    model.head_dim = 192  # 128, and 64 that are rotated
    model.mla.kv_rank = 512
    model.mla.rope_dim = 64
    model.mla.v_dim = 128
    model.rope_theta = 50_000.0
    model.max_seq_len = 8192
    model.norm_eps = 1e-5
    model.moe.num_experts = 64
    model.moe.top_k = 6
    model.moe.d_expert = 1408
    model.moe.num_shared_experts = 2
    model.moe.score = "sigmoid"
    model.moe.renormalize = True
    model.moe.routed_scaling = 2.446
    model.moe.selection_bias = True
    model.remat = "full"

    config.loss.load_balance_coef = 0.001  # over each sequence, as seq_aux in its config.json says
    config.loss.balance_batch = "1"
    config.loss.router_loss_layers = "sum"
    config.loss.router_z_coef = 0.0
    config.loss.bias_update = "centred"
    config.loss.bias_update_rate = 0.001

    config.optim.name = "muon"
    config.optim.lr = 4.2e-4
    config.optim.weight_decay = 0.1
    config.optim.warmup_steps = 2000
    config.optim.schedule = "cosine"
    config.optim.final_lr_fraction = 0.1

    config.data.batch_size = 4096
    config.data.seq_len = 8192
    config.data.tokenizer.kind = "huggingface"
    config.data.tokenizer.path = "data/tokenizer.json"
    config.data.sources = {"text": config_lib.source(kind="files", path="data/text/*.jsonl.gz")}
    config.data.num_workers = 8

    config.mesh.data = -1
    config.mesh.fsdp = 8
    config.mesh.expert = 8

    config.train.micro_batches = 2
    config.train.steps = 155_000  # 5.2T tokens
    config.train.eval_every = 5000
    config.train.eval_batches = 50
    config.train.checkpoint_every = 5000
    return config
