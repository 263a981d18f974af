"""Fields of mixtures whose weights change during training, and their rules."""

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from moe_jax.config.fields import FIXED, Checked, number, require
from moe_jax.errors import nearest

_OBSERVING = ("every", "rate", "floor", "ema", "target", "probe_batches")
# The fields that each controller reads.
READS: dict[str, tuple[str, ...]] = {
    "none": (),
    "stages": ("stages",),
    "dga": _OBSERVING,
    "tikmix": _OBSERVING,
    "aioli": (*_OBSERVING, "sweep_share", "sweep_steps", "sweep_rounds"),
}


@dataclass(frozen=True)
class MixtureConfig(Checked, resume=FIXED):
    """Weights of sources that change during training (docs/mixtures.md). Each change begins a phase."""

    # What sets the weights of the sources: nothing, so that `data.sources.NAME.weight` holds for the whole run;
    # "stages", which are `data.sources.NAME.stage_weights`; or what is observed during the run, by DGA, TiKMiX (which
    # needs optim.name="adamw") or Aioli, from the weights of the sources on.
    controller: Literal["none", "stages", "dga", "tikmix", "aioli"] = "none"
    # With "stages": the last step of each stage but the last. A run may end sooner.
    stages: tuple[int, ...] = ()
    every: int = number(100, 1)  # steps from one decision to the next, a sweep included
    rate: float = number(1.0, 0.0)  # factor of the scores in the exponent of the weights
    floor: float = number(0.05, 0.0, 1.0)  # share of the batch that is given to all sources alike
    # Decay of an average over decisions: of the weights with "dga" and "tikmix", of what sources do with "aioli".
    ema: float = number(0.0, 0.0, 1.0)
    target: str = ""  # the source whose held-out text counts; "": all that are trained on, alike
    probe_batches: int = number(1, 1)  # batches of each source, or of its held-out text, that an observation reads
    sweep_share: float = number(0.625, 0.0, 1.0)  # with "aioli": share of the source whose turn it is in a sweep
    sweep_steps: int = number(4, 1)  # with "aioli": steps of a turn
    sweep_rounds: int = number(4, 1)  # with "aioli": turns of each source in a sweep

    @property
    def takes_gradients(self) -> bool:
        """Whether decisions take a gradient of each source, and one of the targets."""
        return self.controller in ("dga", "tikmix")

    @property
    def observes(self) -> bool:
        """Whether decisions depend on held-out text."""
        return "every" in READS[self.controller]

    def notes(self, steps: int) -> list[str]:
        """Lines about what a run of a number of steps does not reach."""
        stages, never = len(self.stages) + 1, sum(last >= steps for last in self.stages)
        return [f"mixture.stages: {never} of {stages} stages never begin in {steps:,} steps"] if never else []

    def check(self):
        reads = READS[self.controller]
        for f in dataclasses.fields(self)[1:]:
            value = getattr(self, f.name)
            rule = f"has no effect with controller={self.controller!r}"
            require(f.name in reads or value == f.default, f.name, value, rule, f"nearest valid: {f.default!r}")
        if self.controller == "stages":
            rising = all(a < b for a, b in itertools.pairwise((0, *self.stages)))
            require(bool(self.stages) and rising, "stages", self.stages,
                    "must be one or more rising steps, from 1", "nearest valid: (1,)")  # fmt: skip
        require(self.ema < 1, "ema", self.ema, "must be < 1: an average with it would never move",
                "nearest valid: 0.9")  # fmt: skip


def shares(weights: Mapping[str, float]) -> dict[str, float]:
    """The share of each source in the sum of all weights, which must not all be 0.

    Exact but for one rounding each, so the same everywhere: `sum` adds floats in another way since Python 3.12.
    """
    total = sum(map(Fraction, weights.values()))
    return {name: float(Fraction(weight) / total) for name, weight in weights.items()}


def check_mixture(cfg: Any) -> None:
    """Raises ConfigError for settings of `mixture` that the rest of a run's config rules out."""
    mixture, sources = cfg.mixture, cfg.data.sources
    on, trained = mixture.controller != "none", [s for s in sources.values() if s.is_trained]
    require(not on or len(trained) > 1, "mixture.controller", mixture.controller,
            "needs two or more data.sources to train on", "nearest valid: 'none'")  # fmt: skip
    if mixture.observes:
        _check_observing(cfg, len(trained))
    for name, source in sources.items():
        found, need = source.stage_weights, len(mixture.stages)
        rule = f"must have a weight for each of the {need} stages after the first, or none" if need else (
            "has no effect without mixture.stages")  # fmt: skip
        hint = f"nearest valid: {(*found, *[source.weight] * need)[:need]}"
        require(len(found) in (0, need), f"data.sources.{name}.stage_weights", found, rule, hint)
    for stage in range(len(mixture.stages) + 1):
        total = sum(source.weight_in(stage) for source in sources.values())
        require(total > 0, "mixture.stages", mixture.stages, f"weights must not all be 0 in stage {stage + 1}",
                "give a source a weight in it")  # fmt: skip


def _check_observing(cfg: Any, count: int) -> None:
    mixture, sources = cfg.mixture, cfg.data.sources
    require(not mixture.target or mixture.target in sources, "mixture.target", mixture.target,
            "is not one of data.sources", nearest(mixture.target, sources))  # fmt: skip
    held_out = [name for name, source in sources.items() if source.holds_out]
    wanted = [mixture.target] if mixture.target else [name for name in held_out if sources[name].is_trained]
    require(bool(set(wanted) & set(held_out)), "mixture.target", mixture.target, "has no held-out text to observe",
            f"nearest valid: {held_out[0]!r}" if held_out else "set a validation_fraction")  # fmt: skip
    require(mixture.controller != "tikmix" or cfg.optim.name == "adamw", "mixture.controller", mixture.controller,
            "needs AdamW's second moments of all parameters: optim.name='adamw'", "nearest valid: 'dga'")  # fmt: skip
    if mixture.controller == "aioli":
        sweep = count * mixture.sweep_rounds * mixture.sweep_steps
        rule = f"must be more than the {sweep} steps of a sweep of {count} sources"
        require(mixture.every > sweep, "mixture.every", mixture.every, rule, f"nearest valid: {sweep + 1}")
        require(mixture.sweep_share * count > 1, "mixture.sweep_share", mixture.sweep_share,
                f"must be more than an equal share of {count} sources", "nearest valid: 0.625")  # fmt: skip
