"""Evaluates a model on held-out text while it is trained."""

from collections.abc import MutableMapping

from jax.sharding import Mesh

from moe_jax.config import RunConfig
from moe_jax.data import Corpus
from moe_jax.evaluate import held_out
from moe_jax.moe.program import Program
from moe_jax.run.log import Writer
from moe_jax.run.survive import Preemption
from moe_jax.train import average
from moe_jax.train.metrics import Throughput, eval_metrics
from moe_jax.train.state import TrainState, parts_of


class HeldOut:
    """Evaluates at the steps that `train.eval_every` divides, and at the end: the weights and, if there is one, their
    average (`optim.ema`), which has rows of its own in the log.

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
        self.of_average: held_out.EvalResult | None = None  # the newest result of the average of the weights

    def is_due(self, step: int) -> bool:
        """Whether there is an evaluation after this step, other than the one at the end."""
        train = self._cfg.train
        due = bool(train.eval_every) and step % train.eval_every == 0 and 0 < step < train.steps
        return due and step not in self._scores

    def evaluate(self, step: int, state: TrainState) -> held_out.EvalResult | None:
        """The result of an evaluation of the state after a step, which is logged. None if a signal stops it."""
        result, ema = self._run(state.params, state), parts_of(state.opt_state).ema
        if result is not None and ema:
            self.of_average = self._run(average.as_params(ema, state.params), state)
            result = result if self.of_average is not None else None
        if result is not None and step not in self._scores:
            row = eval_metrics(result.rows())
            self._writer.write(step, row, kind="eval")
            if ema:
                self._writer.write(step, eval_metrics(self.of_average.rows()), kind="eval_ema")
            self._scores[step] = row["xent"]
        return result

    def _run(self, params: dict, state: TrainState) -> held_out.EvalResult | None:
        """The result for these parameters, with the selection biases of the state. None if a signal stops it."""
        limit = self._cfg.train.eval_batches
        with self._clock.paused():
            return self._preemption.interruptibly(
                lambda: held_out.evaluate(
                    self._cfg,
                    self._mesh,
                    params,
                    state.router_bias,
                    self._corpus,
                    limit=limit,
                    program=self._program,
                )
            )
