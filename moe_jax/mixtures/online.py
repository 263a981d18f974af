"""Weights of sources that change during training: controllers, and what moves a run from phase to phase."""

import json
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from moe_jax import config
from moe_jax.config import MixtureConfig, RunConfig
from moe_jax.data import Corpus
from moe_jax.data.phases import MixedIterator
from moe_jax.data.rows import permutation
from moe_jax.errors import BadNumbers
from moe_jax.mixtures.probe import Probe
from moe_jax.moe.program import Program
from moe_jax.run.checkpoint import gather_json
from moe_jax.run.log import Writer
from moe_jax.train.state import TrainState

_LEAST = 1e-30  # share of a source that has none, whose logarithm must exist
_MOST_UNSEEN = 3  # observations in a row that are not finite, which end a run
Observes = Literal["nothing", "alignment", "held_out"]
Decision = tuple[Mapping[str, float], int | None, dict]


class Controller(Protocol):
    """A rule that sets the weights of sources, phase after phase.

    observes: what it is told when a phase begins: "nothing"; "alignment", a product of gradients for each source
        (`Probe.make_alignment`); or "held_out", a loss for each target (`Probe.make_losses`).
    """

    observes: Observes

    def next(self, step: int, observation: Mapping[str, float], state: dict) -> Decision:
        """The weights of all sources by name, for how many steps they hold (None: to the end), and the new state.

        step: the number of steps so far, those that were skipped included.
        state: JSON values, {} at first. The result depends on the arguments alone, so that a resumed run decides alike.
        An observation that is not finite is not passed on: the phase is held again, so that the next call is later.
        """


class Stages:
    """The weights of the configuration, `data.sources.NAME.stage_weights`, from one step to the next."""

    observes: Observes = "nothing"

    def __init__(self, cfg: RunConfig):
        self._sources, self._borders = cfg.data.sources, (0, *cfg.mixture.stages)

    def next(self, step: int, observation: Mapping[str, float], state: dict) -> Decision:
        stage = self._borders.index(step)
        last = stage == len(self._borders) - 1
        weights = {name: source.weight_in(stage) for name, source in self._sources.items() if source.is_trained}
        return weights, None if last else self._borders[stage + 1] - step, {}


def _start(cfg: RunConfig) -> dict[str, float]:
    """The shares of the configuration."""
    weights = {name: source.weight for name, source in cfg.data.sources.items() if source.is_trained}
    return config.shares(dict(sorted(weights.items())))


def _reweighed(shares: Mapping[str, float], scores: Mapping[str, float], cfg: MixtureConfig) -> dict[str, float]:
    """p · exp(rate · score), normalised, with at least `floor` / number of sources for each."""
    logs = {name: math.log(max(p, _LEAST)) + cfg.rate * scores[name] for name, p in shares.items()}
    raised = {name: math.exp(log - max(logs.values())) for name, log in logs.items()}
    return {name: (1 - cfg.floor) * p + cfg.floor / len(raised) for name, p in config.shares(raised).items()}


class Alignment:
    """DGA (arXiv:2410.02498), and with another observation TiKMiX: p_i ← p_i · exp(rate · a_i) / Z, every some steps.

    The first phase has the weights of the configuration: gradients of fresh weights say little of the sources.
    a_i is the product of source i's gradient with that of the targets. Products shrink with the gradients during
    training, so here they are divided by their Euclidean norm over sources: `rate` means the same in all steps. With
    `ema` β the sources have p̄ ← β·p̄ + (1 − β)·p.
    """

    observes: Observes = "alignment"

    def __init__(self, cfg: RunConfig):
        self._cfg, self._start = cfg.mixture, _start(cfg)

    def next(self, step: int, observation: Mapping[str, float], state: dict) -> Decision:
        if step == 0:
            return self._start, self._cfg.every, {}
        shares, average = state.get("shares", self._start), state.get("average", self._start)
        norm = math.hypot(*observation.values()) or 1.0
        shares = _reweighed(shares, {name: observation[name] / norm for name in shares}, self._cfg)
        beta = self._cfg.ema
        average = {name: beta * average[name] + (1 - beta) * p for name, p in shares.items()}
        return average, self._cfg.every, {"shares": shares, "average": average}


class Aioli:
    """Aioli (arXiv:2411.05735): measures how much each source lowers each target's loss, and then weighs by that.

    Each period of `every` steps begins with a sweep: `sweep_rounds` times, in a random order, every source j has
    `sweep_steps` steps with the share h (`sweep_share`), and the others share the rest. G[i, j] is by how much the loss
    of target i fell in those of j, a mean over rounds. With W[j, j] = h and W[j, m] = (1 − h) / (k − 1), A solves
    G[i, j] = Σ_m W[j, m] A[i, m]. Its least entry is subtracted where that is negative, and its sum is made 1. For the
    rest of the period p_j ← p_j · exp(rate · Σ_i A[i, j]) / Z. With `ema` e, Ā ← e·Ā + (1 − e)·A takes the place of A,
    and equal shares that of p. A turn without a finite loss at its end does not count, and is held again.
    """

    observes: Observes = "held_out"

    def __init__(self, cfg: RunConfig):
        self._cfg, self._start, self._seed = cfg.mixture, _start(cfg), cfg.seed
        k, h = len(self._start), cfg.mixture.sweep_share
        self._sweep = np.full((k, k), (1 - h) / (k - 1)) + np.eye(k) * (h - (1 - h) / (k - 1))  # W
        self._turns = k * cfg.mixture.sweep_rounds

    def next(self, step: int, observation: Mapping[str, float], state: dict) -> Decision:
        names, losses = list(self._start), [observation[name] for name in sorted(observation)]
        shares, turn = state.get("shares", self._start), state.get("turn")
        if turn is None:  # a period begins
            state = {"begin": step, "falls": [[0.0] * len(names) for _ in losses], "average": state.get("average")}
            turn = 0
        elif step == state["at"] + self._cfg.sweep_steps:  # later, if the loss at its end was not finite
            j = self._order(state["begin"], turn)
            falls = [[*row] for row in state["falls"]]
            for row, before, after in zip(falls, state["losses"], losses, strict=True):
                row[j] += (before - after) / self._cfg.sweep_rounds
            state, turn = state | {"falls": falls}, turn + 1
        if turn < self._turns:
            weights = dict(zip(names, self._sweep[self._order(state["begin"], turn)].tolist(), strict=True))
            state = state | {"turn": turn, "at": step, "losses": losses, "shares": shares}
            return weights, self._cfg.sweep_steps, state
        effects, average = solve(np.array(state["falls"]), self._sweep), state["average"]
        if self._cfg.ema:
            effects = effects if average is None else self._cfg.ema * np.array(average) + (1 - self._cfg.ema) * effects
            shares = dict.fromkeys(names, 1 / len(names))
        shares = _reweighed(shares, dict(zip(names, effects.sum(0).tolist(), strict=True)), self._cfg)
        left = self._cfg.every - self._turns * self._cfg.sweep_steps
        return shares, left, {"shares": shares, "average": effects.tolist()}

    def _order(self, begin: int, turn: int) -> int:
        """The source whose turn it is in the period that began after `begin` steps."""
        k = len(self._start)
        return int(permutation(k, "sweep", self._seed, begin, turn // k)[turn % k])


def solve(falls: np.ndarray, sweep: np.ndarray) -> np.ndarray:
    """A of falls[i] = sweep · A[i] for each target i, [targets, sources], without negative entries and with sum 1."""
    effects = np.linalg.solve(sweep, falls.T).T
    effects = effects - min(effects.min(), 0.0)
    return effects / (effects.sum() or 1.0)


CONTROLLERS: dict[str, Callable[[RunConfig], Controller]] = {
    "stages": Stages, "dga": Alignment, "tikmix": Alignment, "aioli": Aioli,
}  # fmt: skip


class Mixer:
    """Begins the phases of a run: observes, lets the controller decide, and logs the weights.

    Process 0 decides for all. A decision is made when the first batch of its phase is needed, never sooner. So a
    checkpoint at a border is of the time before the decision, which a resumed run makes again from the same weights and
    state.

    If an observation is not finite, the weights stay for as many steps as before. A few in a row end the run.

    sources: names, in the order of the iterator's weights (`Corpus.trained`).
    observe: the function (number of steps so far, state of the run) → the observation.
    saved: the `state()` of the run that is resumed. every: steps of a first phase whose observation is not finite.
    Raises ValueError for batches of one source, which have no phases.
    """

    def __init__(
        self,
        controller: Controller,
        batches: MixedIterator,
        sources: Sequence[str],
        writer: Writer,
        observe: Callable[[int, TrainState], Mapping[str, float]] = lambda step, state: {},
        saved: dict[str, Any] | None = None,
        every: int = 100,
    ):
        if not isinstance(batches, MixedIterator):
            raise ValueError(f"a mixture needs batches of two or more sources, not of {', '.join(sources)} alone")
        self._controller, self._batches, self._sources = controller, batches, tuple(sources)
        self._writer, self._observe, self._state, self._every = writer, observe, saved, every

    def state(self) -> dict[str, Any] | None:
        """The controller's state, and the number of observations in a row that were not finite, as JSON values.

        None before the first decision.
        """
        return self._state

    @property
    def is_due(self) -> bool:
        """Whether a phase begins with the next batch."""
        return self._state is None or self._batches.at_border

    def begin(self, steps: int, state: TrainState) -> str:
        """Begins a phase after a number of steps. Returns a line for the user. Every process calls it.

        Raises BadNumbers if what is observed is not finite for the third time in a row, and on all processes alike what
        the controller raises, and ValueError for an answer that is none.
        """
        seen, answer, failed = self._observe(steps, state), None, None
        if jax.process_index() == 0:  # alone, so its error must not keep it from the others
            try:
                answer = self._decide(steps, seen)
                json.dumps(answer, allow_nan=False)
            except Exception as error:
                answer, failed = {"error": f"{type(error).__name__}: {error}"}, error
        answer = gather_json(answer)[0]
        if failed:
            raise failed
        if "error" in answer:
            raise RuntimeError(f"step {steps}: the mixture's controller failed on process 0: {answer['error']}")
        weights, length, self._state = answer["weights"], answer["steps"], answer["state"]
        if self._state["unseen"] == _MOST_UNSEEN:
            what = f"what the mixture's controller observes is not finite, {_MOST_UNSEEN} times in a row"
            raise BadNumbers(f"step {steps}: {what}: {dict(seen)}")
        self._batches.begin([weights[name] for name in self._sources], length)
        shares = config.shares({name: weights[name] for name in self._sources})
        row = {f"weight/{name}": share for name, share in shares.items()}
        row |= {f"rows/{name}": n for name, n in zip(self._sources, self._batches.cursors, strict=True)}
        row |= {f"observed/{name}": float(value) for name, value in seen.items()}
        self._writer.write(steps + 1, row, kind="mixture")
        shown = ", ".join(f"{name} {share:.1%}" for name, share in shares.items()).replace("%", " %")
        held = ", as before: what is observed is not finite" if self._state["unseen"] else ""
        return f"from step {steps + 1:,}{f' to {steps + length:,}' if length else ''}: {shown}{held}"

    def _decide(self, steps: int, seen: Mapping[str, float]) -> dict[str, Any]:
        """The weights of a phase, its number of steps and the state after it."""
        before = self._state or {"controller": {}, "unseen": 0}
        if not all(map(math.isfinite, seen.values())):
            phase, stop, unseen = self._batches.phase, self._batches.stop, before["unseen"] + 1
            weights = dict(zip(self._sources, phase.weights, strict=True))
            length = self._every if stop is None else stop - phase.start
            return {"weights": weights, "steps": length, "state": before | {"unseen": unseen}}
        weights, length, state = self._controller.next(steps, seen, before["controller"])
        if set(weights) != set(self._sources):
            raise ValueError(f"a controller must give weights to {sorted(self._sources)}, not to {sorted(weights)}")
        length = int(length) if isinstance(length, numbers.Integral) else length
        weights = {name: float(weight) for name, weight in weights.items()}
        return {"weights": weights, "steps": length, "state": {"controller": state, "unseen": 0}}


def make_mixer(
    cfg: RunConfig,
    mesh: Mesh,
    corpus: Corpus,
    batches: MixedIterator,
    writer: Writer,
    saved: dict[str, Any] | None = None,
    program: Program | None = None,
) -> Mixer | None:
    """The mixer of `cfg.mixture`; None without a controller. saved: see `Mixer`. program: of evaluation.

    Raises ConfigError if there is no held-out text to observe.
    """
    if cfg.mixture.controller == "none":
        return None
    controller = CONTROLLERS[cfg.mixture.controller](cfg)
    if controller.observes == "nothing":
        return Mixer(controller, batches, corpus.trained, writer, saved=saved)
    probe = Probe(cfg, mesh, corpus, program)
    if controller.observes == "held_out":
        observe = probe.make_losses()
    else:
        aligned = probe.make_alignment(by_second_moment=cfg.mixture.controller == "tikmix")
        observe = lambda step, state: aligned(step, state) if step else {}  # the first phase needs none
    return Mixer(controller, batches, corpus.trained, writer, observe, saved, cfg.mixture.every)
