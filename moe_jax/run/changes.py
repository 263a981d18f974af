"""Changes of behaviour between versions of this code, printed when a run of an older version is resumed.

The table has behaviour that no config field chooses. A changed default does not belong here, since the run's
`config.json` has the old value. A checkpoint keeps the REVISION of the code that wrote it; 0 if it has none.
"""

from collections.abc import Callable
from typing import NamedTuple

from moe_jax.config import RunConfig


class Change(NamedTuple):
    """A change of behaviour: its first revision, the runs that it concerns, and a line for the user."""

    revision: int
    concerns: Callable[[RunConfig], bool]
    line: str


CHANGES = (
    Change(
        1,
        lambda cfg: cfg.optim.name == "muon",
        "Muon's update does not depend on the gradient's scale any more (it did through an epsilon), and a matrix "
        "without a gradient (an expert without tokens) gets no update",
    ),
    Change(
        1,
        lambda cfg: cfg.optim.schedule != "constant",
        "the learning rate falls from the warm-up's last step on and reaches final_lr_fraction in the last step; "
        "before, both came one step later",
    ),
    Change(
        1,
        lambda cfg: (
            cfg.model.num_moe_layers > 0
            and cfg.model.moe.top_k == 1
            and cfg.model.moe.top_groups < cfg.model.moe.num_groups
        ),
        "a group of experts is ranked by its two best scores; before, by its best score",
    ),
)
REVISION = max(change.revision for change in CHANGES)


def since(revision: int, cfg: RunConfig) -> list[str]:
    """Lines about the changes after `revision` that concern a run of this config."""
    return [change.line for change in CHANGES if change.revision > revision and change.concerns(cfg)]
