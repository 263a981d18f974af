"""Continues the training of copies in which half of the hidden units were drawn anew.

    python -m moe_jax.upcycle --from=runs/dense --workdir=runs/dropped --expansion=8 --top_k=2 --drop=0.5
    python train.py --config=configs/systems/drop_upcycling.py --config.init_from=runs/dropped --workdir=runs/drop

configs/systems/base.py trains runs/dense.

Paper: Drop-Upcycling: Training Sparse Mixture of Experts with Partial Re-initialization, arXiv:2502.19261
Parameters: 4,462,208 total, 2,102,912 active
Exact: half of each expert's units are new, the same ones in gate, up and down, with the mean and deviation of what they
    replace (tests/test_upcycle_transforms.py)
Not reproduced: its sizes, data and benchmarks
"""

from configs.systems import llama3_meets_moe


def get_config():
    return llama3_meets_moe.get_config()  # the same model of other weights
