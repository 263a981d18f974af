"""Trains eight of the sixteen layers of OLMoE-1B-7B on one GPU: the throughput benchmark.

    python train.py --config=configs/olmoe_8l_bench.py --workdir=runs/olmoe_8l_bench

Hardware: one GPU of 80 GB; parameters, gradients and AdamW states are float32, and the peak is 62.7 GiB
Time: 2 minutes for the 20 steps, most of it start-up, compilation and the final checkpoint
Parameters: 3,562,573,824 total, 744,001,536 active (537,956,352 without embedding and head)
Expect: docs/performance.md has the newest numbers. On one H100, jax 0.11.2, `python -m benchmarks.train_step
    --config=configs/olmoe_8l_bench.py` gave 89,838 tokens/s with float32 weights; with
    --config.model.param_dtype=bfloat16, the precision of the peer's weights and states, 98,491, and at batch 8
    108,914 (46.8 % MFU). 0 dropped (the router's own choices on random tokens). transformers' OLMoE, torch 2.11,
    compiled, in the same run: 72,892 and at batch 8 77,655.

Layers, batch (4 × 4096 tokens) and optimizer are those of the PyTorch peer, transformers' OLMoE. The peer has 30,720
parameters more: its query and key norms have one weight for each of the projection's 2048 channels, ours have one for
each of a head's 128.
Its `router_aux_loss_coef=0.01` equals `load_balance_coef=0.08` here (`olmoe_1b_7b.py` says why).
The tokens are bytes of the standard library. Other tokens would change the cost only through the router's choices.
"""

from moe_jax import config as config_lib


def get_config():
    config = config_lib.default_config()

    model = config.model
    model.vocab_size = 50_304
    model.d_model = 2048
    model.num_layers = 8
    model.num_heads = 16
    model.num_kv_heads = 16
    model.head_dim = 128
    model.qk_norm = True
    model.rope_theta = 10_000.0
    model.norm_eps = 1e-5
    model.moe.num_experts = 64
    model.moe.top_k = 8
    model.moe.d_expert = 1024
    model.moe.renormalize = False  # combine weights are the softmax over all experts
    model.unroll = 8
    model.attention = "auto"
    model.segment_mask = False  # causal attention without segments, as in the peer

    config.loss.load_balance_coef = 0.08
    config.loss.router_z_coef = 0.001

    config.optim.name = "adamw"
    config.optim.lr = 1e-4
    config.optim.beta1 = 0.9
    config.optim.beta2 = 0.95
    config.optim.eps = 1e-8
    config.optim.weight_decay = 0.1
    config.optim.schedule = "constant"

    config.data.batch_size = 4
    config.data.seq_len = 4096
    config.data.tokenizer.kind = "bytes"

    config.train.steps = 20
    config.train.log_every = 5
    config.train.eval_batches = 1
    config.train.tensorboard = False
    config.sample.tokens = 0
    return config
