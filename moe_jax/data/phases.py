"""Mixtures of sources in phases: which source, and which row of it, each row of each batch is.

A phase is a stretch of batches with fixed weights. Batches are numbered from 0 over the whole run. In batch b, source i
of M has ⌈B·C_i − θ_b⌉ − ⌈B·C_{i−1} − θ_b⌉ of the B rows, where C_i is the sum of the shares of sources 1 … i and
θ_b = frac(b / golden ratio). That is systematic sampling: the numbers add up to B, each is the source's share of B
rounded down or up, and over many batches each source has its share. A source's rows are read in order, from where the
phase before left off. So (config, seed, phases) decides every batch, and any row of it is found without those before.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import grain
import numpy as np

from moe_jax.data.batches import TrainIterator
from moe_jax.data.rows import permutation
from moe_jax.errors import CheckpointError

ORDER = 2  # version of the order of batches of several sources, which an iterator's state names
_ONE = 2**64  # θ is a number of 64 bits
_GOLDEN = 0x9E3779B97F4A7C15  # the odd number nearest to 2⁶⁴ / golden ratio


class Phase(NamedTuple):
    """A stretch of batches with fixed weights."""

    start: int  # its first batch
    cursors: tuple[int, ...]  # rows of each source before it
    weights: tuple[float, ...]  # of each source, relative to one another


def _floor_sum(n: int, modulus: int, factor: int, offset: int) -> int:
    """Σ ⌊(factor·i + offset) / modulus⌋ over i < n, as Euclid's algorithm finds it."""
    total = 0
    while n > 0:
        (slope, factor), (level, offset) = divmod(factor, modulus), divmod(offset, modulus)
        total += slope * (n * (n - 1) // 2) + level * n
        last = factor * n + offset
        n, offset, modulus, factor = last // modulus, last % modulus, factor, modulus
    return total


def _below(batches: int, threshold: int) -> int:
    """How many of the first θ are below threshold / 2⁶⁴."""
    return _floor_sum(batches, _ONE, _GOLDEN, 0) - _floor_sum(batches, _ONE, _GOLDEN, -threshold)


@functools.lru_cache(64)
def _ends(weights: tuple[float, ...], size: int) -> tuple[tuple[int, int], ...]:
    """B·C_i of each source: its integer part, and its fraction as the least 64-bit number that is not below it.

    The sums are exact, so that ten sources of weight 0.1 have one row each in every batch of ten.
    """
    sums = [*itertools.accumulate(map(Fraction, weights))]
    exact = [size * s / sums[-1] for s in sums]
    return tuple((math.floor(x), math.ceil((x - math.floor(x)) * _ONE)) for x in exact)


def _edges(weights: tuple[float, ...], batch: int, size: int) -> tuple[int, ...]:
    """⌈B·C_i − θ_b⌉ for i = 0 … M."""
    theta = batch * _GOLDEN % _ONE
    return (0, *(whole + (theta < part) for whole, part in _ends(weights, size)))


def counts(weights: Sequence[float], batch: int, size: int) -> tuple[int, ...]:
    """The number of rows of each source in a batch of `size` rows. They add up to `size`."""
    return tuple(b - a for a, b in itertools.pairwise(_edges(tuple(weights), batch, size)))


def cursors(phase: Phase, batch: int, size: int) -> tuple[int, ...]:
    """The number of rows of each source before a batch of the phase."""
    before, found = 0, []
    for cursor, (whole, part) in zip(phase.cursors, _ends(phase.weights, size), strict=True):
        edge = (batch - phase.start) * whole + _below(batch, part) - _below(phase.start, part)
        found.append(cursor + edge - before)
        before = edge
    return tuple(found)


@functools.lru_cache(32)
def _batch(phase: Phase, seed: int, batch: int, size: int) -> tuple[tuple[int, ...], tuple[int, ...], np.ndarray]:
    order = permutation(size, "batch", seed, batch)
    return cursors(phase, batch, size), _edges(phase.weights, batch, size), order


def row(phase: Phase, seed: int, batch: int, j: int, size: int) -> tuple[int, int]:
    """Returns the source of row j of a batch of `size` rows, and the row of that source's endless sequence.

    The rows of a batch are in random order, which (seed, batch) decides.
    """
    before, edges, order = _batch(phase, seed, batch, size)
    place = int(order[j])
    source = int(np.searchsorted(edges, place, "right")) - 1
    return source, before[source] + place - edges[source]


class Mixture(grain.MapDataset):
    """The rows of all batches of a phase: element b·B + j is row j of batch b.

    sources: an endless data set of rows for each source. stop: the batch after the phase's last; None if there is none.
    """

    def __init__(
        self, sources: Sequence[grain.MapDataset], phase: Phase, seed: int, batch_size: int, stop: int | None = None
    ):
        super().__init__(tuple(sources))
        self._sources, self._phase, self._seed = tuple(sources), phase, seed
        self._batch_size, self._stop = batch_size, stop

    def __len__(self) -> int:
        return len(self._sources[0]) if self._stop is None else self._stop * self._batch_size

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        batch, j = divmod(index, self._batch_size)
        source, place = row(self._phase, self._seed, batch, j, self._batch_size)
        return self._sources[source][place]


class MixedIterator(TrainIterator):
    """An iterator over the training batches of several sources, in phases.

    It ends with its phase, so that nothing is read ahead over a border; `begin` starts the next. Its state is the
    number of batches delivered and the phase.
    weights: of each source in the first phase, which has no end unless `begin` is called.
    """

    def __init__(
        self,
        sources: Sequence[grain.MapDataset],
        weights: Sequence[float],
        seed: int,
        batch_size: int,
        rows: Sequence[int],
        num_workers: int,
        labels: np.ndarray | None = None,
    ):
        self._sources, self._seed = tuple(sources), seed
        phase = Phase(0, (0,) * len(self._sources), _valid(weights, len(self._sources)))
        super().__init__(Mixture(self._sources, phase, seed, batch_size), batch_size, rows, num_workers, labels)
        self.phase, self.stop = phase, None  # stop: the batch after the phase's last

    @property
    def at_border(self) -> bool:
        """Whether the phase has no batch left."""
        return self._count == self.stop

    @property
    def cursors(self) -> tuple[int, ...]:
        """The number of rows of each source in the batches delivered."""
        return cursors(self.phase, self._count, self._batch_size)

    def begin(self, weights: Sequence[float], steps: int | None = None) -> None:
        """Starts a phase at the next batch. steps: its number of batches; None: it has no end.

        Raises ValueError for weights that are not one for each source, finite, ≥ 0 and not all 0, and for other steps.
        """
        if steps is not None and (type(steps) is not int or steps < 1):
            raise ValueError(f"the steps of a phase must be a whole number ≥ 1, or None: {steps!r}")
        phase = Phase(self._count, self.cursors, _valid(weights, len(self._sources)))
        self._set(phase, None if steps is None else self._count + steps)

    def _set(self, phase: Phase, stop: int | None) -> None:
        self.close()
        self.phase, self.stop = phase, stop
        self._elements = Mixture(self._sources, phase, self._seed, self._batch_size, stop)

    def _read(self):
        if self.at_border:
            raise StopIteration
        return super()._read()

    def get_state(self) -> dict[str, Any]:
        phase = [self.phase.start, list(self.phase.cursors), list(self.phase.weights)]
        stop = {} if self.stop is None else {"stop": self.stop}
        return {"order": ORDER, "batches": self._count, "phase": phase} | stop

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues after `state["batches"]` batches, without reading those before.

        Raises CheckpointError for a state of a version that mixed sources in another order.
        """
        if state.get("order") != ORDER:
            raise CheckpointError(
                f"the checkpoint after batch {state['batches']:,} is of a version that mixed its {len(self._sources)} "
                "sources in another order; finish the run with that version, or start one in a new --workdir, with "
                "--config.init_from=RUN from its weights"
            )
        super().set_state(state)
        start, before, weights = state["phase"]
        self._set(Phase(start, tuple(before), tuple(weights)), state.get("stop"))


def _valid(weights: Sequence[float], count: int) -> tuple[float, ...]:
    found = tuple(float(w) for w in weights)
    if len(found) != count or not all(math.isfinite(w) and w >= 0 for w in found) or not sum(found) > 0:
        raise ValueError(f"weights must be {count} finite numbers ≥ 0, not all 0: {found}")
    return found
