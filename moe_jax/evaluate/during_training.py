"""Evaluates a model on held-out text while it is trained."""

from collections.abc import MutableMapping

from jax.sharding import Mesh

from moe_jax.config import RunConfig
from moe_jax.data import Corpus
from moe_jax.evaluate import held_out
from moe_jax.moe.program import Program
from moe_jax.run.log import Writer
from moe_jax.run.survive import Preemption
from moe_jax.train.metrics import Throughput, eval_metrics
from moe_jax.train.state import TrainState


class HeldOut:
    """Evaluates at the steps that `train.eval_every` divides, and at the end.

    scores: held-out loss by step, earlier starts of the run included. Each evaluation adds its own.
    """

    def __init__(
        self,
        cfg: RunConfig,
        mesh: Mesh,
        corpus: Corpus,
        program: Program,
        writer: Writer,
        clock: Throughput,
        preemption: Preemption,
        scores: MutableMapping[int, float],
    ):
        self._cfg, self._mesh, self._corpus, self._program = cfg, mesh, corpus, program
        self._writer, self._clock, self._preemption, self._scores = writer, clock, preemption, scores

    def is_due(self, step: int) -> bool:
        """Whether there is an evaluation after this step, other than the one at the end."""
        train = self._cfg.train
        due = bool(train.eval_every) and step % train.eval_every == 0 and 0 < step < train.steps
        return due and step not in self._scores

    def evaluate(self, step: int, state: TrainState) -> held_out.EvalResult | None:
        """The result of an evaluation of the state after a step, which is logged. None if a signal stops it."""
        limit = self._cfg.train.eval_batches
        with self._clock.paused():
            result = self._preemption.interruptibly(
                lambda: held_out.evaluate(
                    self._cfg,
                    self._mesh,
                    state.params,
                    state.router_bias,
                    self._corpus,
                    limit=limit,
                    program=self._program,
                )
            )
        if result is not None and step not in self._scores:
            row = eval_metrics(result.rows())
            self._writer.write(step, row, kind="eval")
            self._scores[step] = row["xent"]
        return result
