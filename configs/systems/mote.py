"""Continues the training of a dense model with ternary experts beside each of its frozen layers (MoTE).

    python -m moe_jax.upcycle --from=runs/dense --workdir=runs/mote_1 --method=beside --num_experts=4 --top_k=1 --init=copy --score_order=score_topk --expert_weights=ternary --expert_inputs=int8
    python train.py --config=configs/systems/mote.py --config.init_from=runs/mote_1 --workdir=runs/mote

configs/systems/base.py trains runs/dense. Its feed-forward layers become shared experts and keep every bit. Routed
experts begin as copies of them, of which each matrix has three values; they and the routers are trained.

Paper: MoTE: Mixture of Ternary Experts for Memory-efficient Large Multimodal Models, arXiv:2506.14435
Parameters: 3,280,512 total, 2,100,864 active
Exact: three values a matrix; loss and gradients those of float experts that were rounded before, on a mesh
    (tests/test_ternary.py); bits of the frozen layers after training (tests/test_systems_files.py)
Not reproduced: its images and their encoder, sizes and data; packed weights and integer products, since rounded numbers
    are kept and multiplied as floats. One of 4 experts a token and int8 inputs are our reading of the paper.
"""  # noqa: E501

from configs.systems import base
from moe_jax import config as config_lib


def get_config():
    config = base.continued()

    model = config.model
    model.num_dense_layers = 0
    model.moe.num_experts = 4
    model.moe.top_k = 1
    model.moe.d_expert = model.d_ff
    model.moe.num_shared_experts = 1
    model.moe.expert_weights = "ternary"
    model.moe.expert_inputs = "int8"

    frozen = r"^(?!.*/moe/w_(gate|up|down|router)$)"  # all but routed experts and routers
    config.optim.groups = {"dense": config_lib.parameter_group(match=frozen, freeze=True)}
    return config
