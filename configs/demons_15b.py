"""The 15B model of the global-batch load-balancing paper (arXiv:2501.11873), 400B tokens.

    python train.py --config=configs/demons_15b.py --workdir=runs/demons_15b

Hardware: sized for 128 accelerators of 80 GB: 8 sequences a device, 2 at a time
Time: not run here
Parameters: 15,068,454,400 total, 2,554,748,416 active (1,621,253,632 without embedding and head)
Expect: not run here

The paper says 15B total and 2.54B active. Both counts here are within 2 % of these, where `active` includes the
tables of embedding and head. The paper gives the experts (160, top-4, 4 shared), the batch, the tokens and the
load-balancing coefficient. It does not give widths, depth, learning rate and z-loss coefficient: those below are
ours, with Qwen's vocabulary size.

To compare with balancing over a micro-batch, set `loss.balance_batch=16`; nothing else changes.

configs/demons_3b.py sets what this file does not.

Bring a tokenizer and text: `data.tokenizer.path` and `data.sources.text.path`.
"""

from configs import demons_3b


def get_config():
    config = demons_3b.get_config()

    model = config.model
    model.d_model = 3072
    model.num_layers = 34
    model.num_heads = 32
    model.num_kv_heads = 4
    model.tie_embeddings = False
    model.moe.num_experts = 160
    model.moe.d_expert = 256

    config.data.batch_size = 1024

    config.mesh.expert = 8

    config.train.steps = 100_000  # 419.4B tokens
    config.train.micro_batches = 4  # 2 a device at a time
    return config
