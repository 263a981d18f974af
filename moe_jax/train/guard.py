"""Bad numbers: which steps are skipped, counted, and when a run stops.

A step is bad if its loss or the norm of its gradient is not finite, or (`train.spike` = k > 0) either is more than k
median deviations above its median over the last `train.spike_window` good steps. A bad step leaves weights, moments and
router biases as they were, and the learning rate's schedule with them: for the optimizer it never was, and its
tokens are not counted. Its batch is spent all the same.

The decision is a select inside the jitted step. The limits of a spike come from steps that the host has read already,
n − 2 and earlier for step n, so nothing waits for them; the same ones after a resume.
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
    bad = ~(jnp.isfinite(loss) & jnp.isfinite(grad_norm))
    return bad if limits is None else bad | (loss > limits[0]) | (grad_norm > limits[1])


def unless(bad: Bool[Array, ""], new: Any, old: Any) -> Any:
    """`old` if bad, else `new`, bit for bit; pytrees of one structure."""
    return jax.tree.map(lambda n, o: jnp.where(bad, o, n), new, old)


# --- on the host -----------------------------------------------------------------------------------------------------


class Watch:
    """Counts what the step skipped and sets the limits of a spike. Every process has one, and all say the same.

    saved: `state()` of the run that is resumed.
    """

    def __init__(self, cfg: TrainConfig, saved: Mapping[str, Any] | None = None):
        saved = saved or {}
        self._cfg = cfg
        self.skipped: int = saved.get("skipped", 0)  # since the start of training
        self.in_a_row: int = saved.get("in_a_row", 0)
        self.last: Skip | None = None  # the last one skipped
        self._good: list[list[float]] = [list(row) for row in saved.get("good", [])]  # [step, loss, grad_norm]

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, as JSON."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "good": self._good}

    def limits(self, step: int) -> Float[np.ndarray, "2"] | None:
        """Above these, loss and gradient norm of `step` are spikes. None without `train.spike`; ∞ until there are
        `train.spike_window` good steps to compare with."""
        if not self._cfg.spike:
            return None
        seen = [row[1:] for row in self._good if row[0] <= step - 2][-self._cfg.spike_window :]
        if len(seen) < self._cfg.spike_window:
            return np.full(2, np.inf, np.float32)
        return np.float32([self._limit(values) for values in zip(*seen, strict=True)])

    def _limit(self, values: tuple[float, ...]) -> float:
        middle = statistics.median(values)
        return middle + self._cfg.spike * statistics.median(abs(v - middle) for v in values)

    def see(self, step: int, report: StepMetrics) -> Skip | None:
        """Takes in the metrics of a step, on the host, in the order of steps; returns it if it was skipped."""
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
    def near(self) -> bool:
        """One more bad step stops the run, so the next result is to be read before another step begins."""
        return self._cfg.skip_nonfinite and self.in_a_row >= self._cfg.max_skipped - 1

    @property
    def stopped(self) -> bool:
        return self.in_a_row >= self._cfg.max_skipped


def check_end(watch: Watch, steps: int) -> None:
    """Raises BadNumbers for a run of `steps` steps that ends in skipped ones: its last two or more, or all of them."""
    if watch.in_a_row > 1 or (steps and watch.skipped == steps):
        many = "all" if watch.skipped == steps else f"the last {watch.in_a_row:,} of"
        why = f", the last as {watch.last.reason}" if watch.last else ""
        raise BadNumbers(
            f"{many} {steps:,} steps were skipped{why}; what is written is of a model that these steps did not train"
        )


def row(skip: Skip, batch: int) -> dict[str, Any]:
    """What `metrics.jsonl` keeps of it, kind "skipped". batch: its number in the run's data order, from 0."""
    return {"reason": skip.reason, "batch": batch, "loss": skip.loss, "grad_norm": skip.grad_norm}
