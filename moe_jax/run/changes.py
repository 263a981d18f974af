"""What a newer version of this code does otherwise for the same config, told to a run that an older one began.

A changed default is no matter of this file: the run's `config.json` has the value. This is for behaviour that no field
chooses. A checkpoint keeps the REVISION of the code that wrote it; one that has none is of revision 0.
"""

from collections.abc import Callable
from typing import NamedTuple

from moe_jax.config import RunConfig


class Change(NamedTuple):
    revision: int  # the first that has it
    concerns: Callable[[RunConfig], bool]
    line: str


CHANGES = (
    Change(
        1,
        lambda cfg: cfg.optim.name == "muon",
        "Muon's update does not depend on the gradient's scale, as it did through an epsilon, and a matrix without a "
        "gradient (an expert without tokens) gets none",
    ),
    Change(
        1,
        lambda cfg: cfg.optim.schedule != "constant",
        "the learning rate falls from the warm-up's last step on and reaches final_lr_fraction in the last step, where "
        "it was one step later for both",
    ),
    Change(
        1,
        lambda cfg: (
            cfg.model.num_moe_layers > 0
            and cfg.model.moe.top_k == 1
            and cfg.model.moe.top_groups < cfg.model.moe.num_groups
        ),
        "a group of experts is ranked by its best two scores, where it was the best alone",
    ),
)
REVISION = max(change.revision for change in CHANGES)


def since(revision: int, cfg: RunConfig) -> list[str]:
    """A line for each change after `revision` that concerns a run of this config."""
    return [change.line for change in CHANGES if change.revision > revision and change.concerns(cfg)]
