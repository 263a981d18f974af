"""Fields of what moves in the router during training: noise, and the ramps of its sizes. Evaluation has none of it."""

from dataclasses import dataclass, field
from typing import Literal

from moe_jax.config.fields import FIXED, Checked, number, require


@dataclass(frozen=True)
class RampConfig(Checked, resume=FIXED):
    """A number that goes from `start` in the first step to `end`, in `steps` steps, and stays there."""

    start: float = number(0.0, 0.0)  # value in the first step
    end: float = number(0.0, 0.0)  # value from step number `steps` on, counted from 0
    steps: int = number(0, 0)  # length of the ramp; 0: `end` from the first step on
    form: Literal["linear", "exponential"] = "linear"  # along a line, or by one factor in every step

    @property
    def moves(self) -> bool:
        """Whether the number changes during a run."""
        return self.steps > 0 and self.start != self.end

    def check(self):
        low = min(self.start, self.end)
        require(self.form == "linear" or low > 0, "form", self.form, "needs start > 0 and end > 0",
                "nearest valid: 'linear'")  # fmt: skip
        rule = "has no effect with steps=0"
        require(self.steps > 0 or self.start == self.end, "start", self.start, rule, f"nearest valid: {self.end}")


@dataclass(frozen=True)
class ExploreConfig(Checked, resume=FIXED):
    """What the router does in training only (docs/routing.md): noise is drawn anew for each token, step and layer."""

    # Share of noise that is mixed into router logits, with their own mean and deviation: Ling's warm-up of routing from
    # 1 to 0.
    random: RampConfig = field(default_factory=lambda: RampConfig(0.0, 0.0))
    noise: float = number(0.0, 0.0)  # factor of Gumbel noise that is added to logits for the selection; EvoMoE: 1
    # Of a token's chosen experts the first, and those whose score exceeds this, do something. 0: all of them.
    threshold: float = number(0.0, 0.0, 1.0)
    # Divisor of the logits whose scores the threshold sees.
    temperature: RampConfig = field(default_factory=lambda: RampConfig(1.0, 1.0))
    top_k: int = number(0, 0)  # experts that a token chooses in training; 0: model.moe.top_k

    def check(self):
        for name, high in (("random", 1.0), ("temperature", float("inf"))):
            low, one = (0.0, getattr(self, name)) if name == "random" else (1e-3, getattr(self, name))
            for end in ("start", "end"):
                value = getattr(one, end)
                rule = f"must be in [{low:g}, {high:g}]" if high < 2 else f"must be ≥ {low:g}"
                hint = f"nearest valid: {min(max(value, low), high):g}"
                require(low <= value <= high, f"{name}.{end}", value, rule, hint)
        constant = self.temperature == RampConfig(1.0, 1.0)
        require(self.threshold > 0 or constant, "temperature", self.temperature, "needs threshold > 0",
                "nearest valid: start=1.0, end=1.0, steps=0")  # fmt: skip

    @property
    def moves(self) -> bool:
        """Whether routing in training differs from that of the model."""
        return bool(self.noise or self.threshold) or max(self.random.start, self.random.end) > 0
