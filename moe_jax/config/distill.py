"""Fields of distillation: a trained model, the teacher, whose predictions a run learns beside its text."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from moe_jax.config.fields import FIXED, Checked, changeable, number, require


@dataclass(frozen=True)
class DistillConfig(Checked, resume=FIXED):
    """A teacher, and how much its predictions count (docs/distillation.md). The loss is a mean over target tokens.

    The losses of the text and of the routers stay as they are; the teacher's terms are added.
    """

    # Run directory of the teacher, RUN or RUN@STEP; without a step its newest checkpoint when the run begins. "": none.
    teacher: str = changeable("")
    # Weight of coef · temperature² · KL(teacher ‖ student) over the vocabulary, in nats a token; 0: not computed.
    coef: float = number(1.0, 0.0)
    temperature: float = number(1.0, 0.01)  # divisor of both models' logits in that divergence
    # "forward" is KL(teacher ‖ student), "symmetric" the mean of it and KL(student ‖ teacher).
    divergence: Literal["forward", "symmetric"] = "forward"
    # Weight of the squared distance between the residual streams of both models after each block, a mean over the
    # width and a sum over blocks; needs a teacher of the same width and number of blocks. 0: not computed.
    hidden_coef: float = number(0.0, 0.0)
    stop_step: int = number(0, 0)  # the last step with a teacher; 0: the run's last step

    def check(self):
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            require(self.teacher or value == f.default, f.name, value, "has no effect without a teacher",
                    f"nearest valid: {f.default!r}")  # fmt: skip
        if self.coef == 0:
            rule = "has no effect with coef=0"
            require(not self.teacher or self.hidden_coef > 0, "coef", 0.0,
                    "must be > 0 with hidden_coef=0: a teacher would have no effect", "nearest valid: 1.0")  # fmt: skip
            require(self.temperature == 1, "temperature", self.temperature, rule, "nearest valid: 1.0")
            require(self.divergence == "forward", "divergence", self.divergence, rule, "nearest valid: 'forward'")

    @property
    def factors(self) -> dict[str, float]:
        """The factor of each term of the loss that is on, by the name under which it is logged."""
        factors = {"distill": self.coef * self.temperature**2, "distill_hidden": self.hidden_coef}
        return {name: factor for name, factor in factors.items() if self.teacher and factor}

    def is_on(self, step: Any) -> Any:
        """Whether there is a teacher in a step, counted from 1; of a traced number a traced answer."""
        return bool(self.teacher) if self.stop_step == 0 else (step <= self.stop_step)
