"""Bad steps: how they are found, skipped and counted, and when they stop a run.

A step is bad if its loss or the norm of its gradient is not finite, or (`train.spike` = k > 0) either is more than k
median deviations above its median over the last `train.spike_window` good steps. A bad step does not change weights,
moments, router biases or the learning rate's schedule: the optimizer does not see it. Its tokens are not counted; its
batch is still consumed.

The decision is a select inside the jitted step. The limits for step n come from steps up to n − 2, which the host has
read already, so nothing waits for them. A resumed run uses the same ones.
"""

import statistics
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from moe_jax.config import TrainConfig
from moe_jax.errors import BadNumbers
from moe_jax.train.metrics import StepMetrics

WATCHED = ("loss", "grad_norm")


class Skip(NamedTuple):
    """A step that was skipped, and why."""

    step: int
    loss: float
    grad_norm: float
    reason: str


# --- in the step -----------------------------------------------------------------------------------------------------


def is_bad(loss: Float[Array, ""], grad_norm: Float[Array, ""], limits: Float[Array, "2"] | None) -> Bool[Array, ""]:
    """Whether a step is to be skipped: a number is not finite, or above its limit in `limits` (`Watch.limits`)."""
    bad = ~(jnp.isfinite(loss) & jnp.isfinite(grad_norm))
    return bad if limits is None else bad | (loss > limits[0]) | (grad_norm > limits[1])


def unless(bad: Bool[Array, ""], new: Any, old: Any) -> Any:
    """Selects `old` if bad, else `new`, bit for bit; both are pytrees of one structure."""
    return jax.tree.map(lambda n, o: jnp.where(bad, o, n), new, old)


# --- on the host -----------------------------------------------------------------------------------------------------


class Watch:
    """Counts skipped steps and sets the limits above which a step is a spike. All processes reach the same result.

    saved: the `state()` that the resumed run saved.
    taught: the last step with a teacher (`distill.stop_step`), after which losses and gradients are of another kind and
        are not compared with those before; 0 if there is none.
    """

    def __init__(self, cfg: TrainConfig, saved: Mapping[str, Any] | None = None, taught: int = 0):
        saved = saved or {}
        self._cfg, self._taught = cfg, taught
        self.skipped: int = saved.get("skipped", 0)  # since the start of training
        self.in_a_row: int = saved.get("in_a_row", 0)
        self.last: Skip | None = None  # the newest skipped step
        self._good: list[list[float]] = [list(row) for row in saved.get("good", [])]  # [step, loss, grad_norm]

    def state(self) -> dict[str, Any]:
        """The state that a checkpoint keeps, as JSON."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "good": self._good}

    def limits(self, step: int) -> Float[np.ndarray, "2"] | None:
        """The limits of loss and gradient norm, above which `step` is a spike. They are ∞ until there are
        `train.spike_window` good steps to compare with. Returns None without `train.spike`."""
        if not self._cfg.spike:
            return None
        first = self._taught if step > self._taught else 0
        window = [row[1:] for row in self._good if first < row[0] <= step - 2][-self._cfg.spike_window :]
        if len(window) < self._cfg.spike_window:
            return np.full(2, np.inf, np.float32)
        return np.float32([self._limit(values) for values in zip(*window, strict=True)])

    def _limit(self, values: tuple[float, ...]) -> float:
        middle = statistics.median(values)
        return middle + self._cfg.spike * statistics.median(abs(v - middle) for v in values)

    def record(self, step: int, report: StepMetrics) -> Skip | None:
        """Records the metrics of a step, on the host, in the order of steps. Returns the step if it was skipped."""
        loss, norm = float(report.loss), float(report.grad_norm)
        if report.skipped:
            self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
            self.last = Skip(step, loss, norm, self._reason(step, loss, norm))
            return self.last
        self.in_a_row = 0
        if self._cfg.spike:
            self._good = [*self._good, [step, loss, norm]][-self._cfg.spike_window - 2 :]
        return None

    def _reason(self, step: int, loss: float, norm: float) -> str:
        named = {"loss": loss, "gradient norm": norm}
        if broken := [f"{name} {value}" for name, value in named.items() if not np.isfinite(value)]:
            return f"not finite: {', '.join(broken)}"
        pairs = zip(named.items(), self.limits(step), strict=True)
        above = [f"{name} {value:.6g} above {limit:.6g}" for (name, value), limit in pairs if value > limit]
        return f"spike: {', '.join(above)} (median and {self._cfg.spike:g} median deviations)"

    @property
    def next_skip_stops(self) -> bool:
        """Whether one more skipped step would stop the run: its result must be read before another step begins."""
        return self._cfg.skip_nonfinite and self.in_a_row >= self._cfg.max_skipped - 1

    @property
    def limit_reached(self) -> bool:
        """Whether `train.max_skipped` steps in a row were skipped, so that the run has to stop."""
        return self.in_a_row >= self._cfg.max_skipped


def check_end(watch: Watch, steps: int) -> None:
    """Raises BadNumbers for a run of `steps` steps if its last two or more, or all of them, were skipped."""
    if watch.in_a_row > 1 or (steps and watch.skipped == steps):
        many = "all" if watch.skipped == steps else f"the last {watch.in_a_row:,} of"
        why = f", the last: {watch.last.reason}" if watch.last else ""
        raise BadNumbers(
            f"{many} {steps:,} steps were skipped{why}; what is written is of a model that these steps did not train"
        )


def row(skip: Skip, batch: int) -> dict[str, Any]:
    """The row of a skipped step in `metrics.jsonl`, kind "skipped". batch: its number in the data order, from 0."""
    return {"reason": skip.reason, "batch": batch, "loss": skip.loss, "grad_norm": skip.grad_norm}
