"""Trains a model whose experts have room for a fixed number of tokens, which they take in a random order (Z-code M3).

    python train.py --config=configs/systems/z_code.py --workdir=runs/z_code

An expert that is chosen by more tokens than it has room for drops the rest. In token order it would drop those at the
end of the batch in every step; at random every place is dropped as often as any other. With a second run of another
seed, `python -m moe_jax.upcycle --method=merge --from=runs/a,runs/b` joins their experts in one bank (aggregation), and
`--prune=4` keeps those that are used most in the run's eval.json.

Paper: Scalable and Efficient MoE Training for Multitask Multilingual Models, arXiv:2109.10465
Parameters: 3,083,904 total, 1,707,648 active
Exact: the number of dropped tokens, and that they do not depend on the place in the batch (tests/test_systems.py);
    banks that are joined, and pruned by use, have the bits of the experts that they keep (tests/test_upcycle_bank.py)
Not reproduced: its sizes, languages and tasks, its encoder and decoder. Capacity is that of a device's tokens, so
    another mesh drops other ones.
"""

from configs.systems import base


def get_config():
    config = base.get_config()

    model = config.model
    model.num_dense_layers = 0
    model.layers = "2*(dense moe)"
    model.moe.num_experts = 8
    model.moe.top_k = 1
    model.moe.d_expert = model.d_ff
    model.moe.compute = "capacity"
    model.moe.capacity_factor = 1.0
    model.moe.overflow = "random"

    config.loss.load_balance_coef = 0.01
    return config
