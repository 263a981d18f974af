"""Decides which checkpoints are kept: the newest, those of multiples of `keep_every`, and the best."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Keep:
    """Orbax's preservation policy of `train.keep_checkpoints`, `keep_every` and `keep_best`.

    scores: held-out loss by step. The lowest is the best; of equal ones the later. A checkpoint without a finite score
        is never one of the best.
    """

    newest: int
    every: int
    best: int
    scores: Mapping[int, float]

    def steps(self, steps: Sequence[int]) -> set[int]:
        """The steps that are kept, of `steps` in rising order."""
        scored = [s for s in steps if math.isfinite(self.scores.get(s, math.nan))]
        scored.sort(key=lambda s: (self.scores[s], -s))  # with a NaN among them the order would be undefined
        multiples = [s for s in steps if self.every and s % self.every == 0]
        return {*steps[-self.newest :], *multiples, *scored[: self.best]}

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Whether each checkpoint is kept, as Orbax asks for it."""
        kept = self.steps([c.step for c in checkpoints])
        return [c.step in kept for c in checkpoints]
