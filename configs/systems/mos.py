"""Trains the smaller student of PR-MoE with the model of pr_moe.py as its teacher, until a last step (MoS).

    python train.py --config=configs/systems/mos.py --workdir=runs/mos

configs/systems/pr_moe.py trains the teacher, runs/pr_moe. The student has one block less of eight, and the second half
of the pyramid in a layer earlier. Its loss has the divergence of its predictions from the teacher's until step 150.

Paper: DeepSpeed-MoE: Advancing Mixture-of-Experts Inference and Training to Power Next-Generation AI Scale,
    arXiv:2201.05596
Parameters: 6,136,326 total, 2,499,078 active
Exact: places and sizes of both banks; a teacher that is the student adds nothing, and neither does any after the last
    step; loss and gradients in float64, on meshes and in micro-batches (tests/test_distillation.py)
Not reproduced: its sizes and data; the number of steps after which it stops, 400,000 of its schedule; what pr_moe.py
    does not reproduce
"""

from configs.systems import pr_moe


def get_config():
    config = pr_moe.get_config()

    model = config.model
    model.num_layers = 7  # the published 350M student: 21 of 24, "8*(dense moe:32) 2*(dense moe:64) dense"
    model.layers = "dense moe 2*(dense moe:16) dense"

    config.distill.teacher = "runs/pr_moe"
    config.distill.coef = 1.0
    config.distill.temperature = 1.0
    config.distill.stop_step = 150
    return config
