"""Which checkpoints stay: the newest, those of round steps, the best."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Keep:
    """Orbax's preservation policy of `train.keep_checkpoints`, `keep_every` and `keep_best`.

    scores: held-out loss by step; the lowest is the best, of equal ones the later. A checkpoint without one, or with
        one that is not finite, can only stay for another reason.
    """

    newest: int
    every: int
    best: int
    scores: Mapping[int, float]

    def steps(self, steps: Sequence[int]) -> set[int]:
        """Those of the rising `steps` that stay."""
        scored = [s for s in steps if math.isfinite(self.scores.get(s, math.nan))]
        scored.sort(key=lambda s: (self.scores[s], -s))  # a NaN among them would leave them in no order
        round_ones = [s for s in steps if self.every and s % self.every == 0]
        return {*steps[-self.newest :], *round_ones, *scored[: self.best]}

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        stay = self.steps([c.step for c in checkpoints])
        return [c.step in stay for c in checkpoints]
