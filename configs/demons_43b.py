"""The 43B model of the global-batch load-balancing paper (arXiv:2501.11873), 120B tokens.

    python train.py --config=configs/demons_43b.py --workdir=runs/demons_43b

Hardware: sized for 128 accelerators of 80 GB: 4 sequences a device, 1 at a time
Time: not run here
Parameters: 42,714,364,416 total, 6,645,447,168 active (5,400,787,456 without embedding and head)
Expect: not run here

The paper says 43B (42.8B) total and 6.6B active. Both counts here are within 2 % of these, where `active` includes
the tables of embedding and head. The paper gives the experts (160, top-4, 4 shared), the batch, the tokens and the
load-balancing coefficient. It does not give widths, depth, learning rate and z-loss coefficient: those below are
ours, with Qwen's vocabulary size.

To compare with balancing over a micro-batch, set `loss.balance_batch=8`; nothing else changes.

configs/demons_3b.py sets what this file does not.

Bring a tokenizer and text: `data.tokenizer.path` and `data.sources.text.path`.
"""

from configs import demons_3b


def get_config():
    config = demons_3b.get_config()

    model = config.model
    model.d_model = 4096
    model.num_layers = 42
    model.num_heads = 64
    model.num_kv_heads = 16
    model.tie_embeddings = False
    model.moe.num_experts = 160
    model.moe.d_expert = 448

    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.mesh.expert = 8

    config.train.micro_batches = 4  # 1 a device at a time
    return config
