"""Logs and shows the metrics of training steps, and watches them for bad numbers."""

import jax

from moe_jax.config import RunConfig
from moe_jax.moe.stats import by_depth
from moe_jax.run.log import Progress, Writer
from moe_jax.train import guard
from moe_jax.train.metrics import OneBehind, StepMetrics, Throughput, router_metrics, train_metrics


def is_over(report: StepMetrics) -> bool:
    """Returns whether a step has ended as its call returned, as all do on a CPU whose memory `startup` keeps.

    Elsewhere a step that happens to be over is read one behind as any other, so that the times of lines stay even.
    """
    return jax.default_backend() == "cpu" and report.loss.is_ready()


class Recorder:
    """Records steps one behind, so that reading a step's metrics never leaves the device idle.

    A step that is over when its call returns is recorded at once: one behind, the clock would count the time of the
    next step as its own.

    flops_per_token: forward and backward, by formula. peak: FLOP/s of all devices together.
    """

    def __init__(
        self,
        cfg: RunConfig,
        writer: Writer,
        progress: Progress,
        watch: guard.Watch,
        clock: Throughput,
        *,
        flops_per_token: float,
        peak: float,
    ):
        self._cfg, self._writer, self._progress, self._watch, self._clock = cfg, writer, progress, watch, clock
        self._rates = {"flops_per_token": flops_per_token, "peak": peak}
        self._pending = OneBehind()

    def push(self, step: int, report: StepMetrics) -> None:
        """Records the step before the one just dispatched, and this one too if it is over or may stop the run."""
        self._record(self._pending.push(step, report))
        if self._watch.next_skip_stops or is_over(report):
            self.flush()

    def flush(self) -> None:
        """Records the step that is still waiting."""
        self._record(self._pending.flush())

    def _record(self, done: tuple[int, StepMetrics] | None) -> None:
        if done is None:
            return
        step, report = done
        train, rate = self._cfg.train, None
        self._clock.add(report.tokens, report.seen)
        if skip := self._watch.record(step, report):
            self._writer.write(step, guard.row(skip, batch=step - 1), kind="skipped")
            self._progress.write(f"step {step} skipped, {skip.reason}; batch {step - 1} of seed {self._cfg.seed}")
        if report.skipped is not None:
            report = report._replace(skipped=self._watch.skipped)
        logged = step % train.log_every == 0 or step == train.steps
        if logged:
            model = self._cfg.model
            layers, ahead = (by_depth(places, report.router or {}) for places in (model.places, model.mtp_places))
            router = router_metrics(layers, model.moe.identity_experts, ahead)
            row = train_metrics(step, report, router=router, **self._clock.read(), **self._rates)
            self._writer.write(step, row)
            rate = row["tokens_per_second"]
        self._progress.update(step, float(report.loss), rate, log=logged)
