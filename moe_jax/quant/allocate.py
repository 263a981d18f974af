"""How many bits each expert gets, at the same total for every method. In NumPy, on what calibration measured.

All experts of a model have matrices of one size, so that bits are counted in bits of an expert: `mean_bits` times their
number, rounded down, is the budget. Where layers get equal means, those whose part is no whole number are rounded, some
up and some down, so that the parts add up to the budget. No method exceeds it, and a remainder that no choice of bits
fills is reported.

Letters: L layers with experts, E experts of a layer, B choices of bits.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from moe_jax.errors import UserError, nearest
from moe_jax.quant.round import LayerStats


class Allocation(NamedTuple):
    """Bits of every expert."""

    bits: list[Int[np.ndarray, " E"]]  # of each layer
    budget: int  # bits of all experts together, at most
    used: int  # bits of all experts together

    @property
    def mean(self) -> float:
        """Bits of an expert, on average."""
        return self.used / sum(map(len, self.bits))


# --- cost of an expert ----------------------------------------------------------------------------------------------


def expert_cost(
    stats: LayerStats, alpha: float = 1.0, beta: float = 1.5, gamma: float | None = None
) -> Float[np.ndarray, "E B"]:
    """f^alpha · w^beta · ℓ^gamma: what each choice of bits costs in an expert of one layer.

    f, w: the shares of the expert in the layer's tokens and in its sum of combine weights. ℓ: the root of
    `LayerStats.loss`, the norm of what rounding this expert alone changes in the layer's result. gamma: None is alpha.
    Source: MC-MoE, arXiv:2410.06270. The paper has an exponent of the loss of its own; its code raises the loss to
    alpha. Its ℓ is the sum of such norms over batches of calibration text, here it is one norm over all of it.
    """
    f, w = _shares("counts", stats.counts), _shares("weights", stats.weights)
    if stats.loss is None:
        raise UserError("--allocate=mc: the losses of experts were not measured")
    loss = np.asarray(stats.loss, np.float64)
    if not (np.isfinite(loss).all() and (loss >= 0).all()):
        raise UserError(f"--allocate=mc: the losses of experts in block {stats.number} must be finite and ≥ 0")
    return (f**alpha * w**beta)[:, None] * np.sqrt(loss) ** (alpha if gamma is None else gamma)


def _shares(name: str, values: Float[np.ndarray, " E"]) -> Float[np.ndarray, " E"]:
    values = np.asarray(values, np.float64)
    if not (np.isfinite(values).all() and (values >= 0).all() and values.sum() > 0):
        raise UserError(
            f"--allocate: the {name} of a layer's experts must be ≥ 0, and not all 0: calibrate on more text"
        )
    return values / values.sum()


# --- methods ---------------------------------------------------------------------------------------------------------

# "turns": the choices next to the mean by turns, whatever the experts do, to compare with. "frequency": more for the
# experts that are used most. "blocks": for the first layers. "importance": for the layers that change the residual
# stream most. "outliers": for the experts with the largest outlier score. "mc": least cost, by an exact search.
METHODS = ("turns", "frequency", "blocks", "importance", "outliers", "mc")
BY_LAYER = ("blocks", "importance")  # rank layers
SCOPES = ("layer", "model")


def allocate(
    method: str,
    stats: Sequence[LayerStats],
    choices: Sequence[int],
    mean_bits: float,
    scope: str = "layer",
    alpha: float = 1.0,
    beta: float = 1.5,
    gamma: float | None = None,
) -> Allocation:
    """Returns the bits of every expert by one of `METHODS`.

    stats: of each layer with experts, the first layer first; "turns" reads only their numbers of experts. choices:
    the numbers of bits that an expert may have, in increasing order, which are the columns of `LayerStats.loss`. scope:
    "layer" gives every layer the same mean, "model" lets layers have different ones; of "blocks" and "importance",
    which rank layers, it is always "model". Methods other than "turns" and "mc" use two choices, the nearest below
    and above the mean. alpha, beta, gamma: of `expert_cost`.

    Raises UserError for a method, scope, mean or choices that cannot be.
    """
    if method not in METHODS:
        raise UserError(f"--allocate={method}: must be one of {', '.join(METHODS)}; {nearest(method, METHODS)}")
    if scope not in SCOPES:
        raise UserError(f"--scope={scope}: must be 'layer' or 'model'; {nearest(scope, SCOPES)}")
    if not choices or list(choices) != sorted({*choices}) or choices[0] < 1:
        raise UserError(f"--choices={','.join(map(str, choices))}: must be numbers of bits ≥ 1 that increase")
    if not choices[0] <= mean_bits <= choices[-1]:
        rule = f"must be in [{choices[0]}, {choices[-1]}], the range of --choices={','.join(map(str, choices))}"
        hint = f"nearest valid: {min(max(mean_bits, choices[0]), choices[-1])}"
        raise UserError(f"--bits={mean_bits:g}: {rule}; {hint}")
    if method == "mc":
        return least_cost([expert_cost(one, alpha, beta, gamma) for one in stats], choices, mean_bits, scope)
    sizes = [len(one.counts) for one in stats]
    if method == "turns":
        return by_turns(sizes, choices, mean_bits)
    keys, scope = [_keys(method, one) for one in stats], "model" if method in BY_LAYER else scope
    if scope == "layer":
        each = zip(keys, budgets(mean_bits, sizes), strict=True)
        return _made([_ranked(row, choices, budget) for row, budget in each], mean_bits)
    joined = [np.concatenate(column) for column in zip(*keys, strict=True)]
    bits = _ranked(joined, choices, _budget(mean_bits, sum(sizes)))
    return _made(np.split(bits, np.cumsum(sizes)[:-1]), mean_bits)


def _keys(method: str, stats: LayerStats) -> tuple[Float[np.ndarray, " E"], ...]:
    """What ranks the experts of a layer, the most important first; larger is better."""
    use = _shares("counts", stats.counts)
    if method == "frequency":
        return (use,)
    if method == "outliers":
        return (np.max(np.asarray(stats.outliers, np.float64), axis=1),)
    # In the layer where the bits run out, the experts that are used most come first.
    return np.full(len(use), -stats.number if method == "blocks" else stats.importance, np.float64), use


def _budget(mean_bits: float, experts: int) -> int:
    """Bits of so many experts. 1e-9 makes up for the rounding of means such as 2.3."""
    return math.floor(mean_bits * experts + 1e-9)


def budgets(mean_bits: float, sizes: Sequence[int]) -> list[int]:
    """Bits of each layer, of these numbers of experts, at the same mean. They add up to the bits of all of them."""
    ends = [_budget(mean_bits, n) for n in itertools.accumulate(sizes, initial=0)]
    return [b - a for a, b in itertools.pairwise(ends)]


def _made(bits: Sequence[np.ndarray], mean_bits: float) -> Allocation:
    budget = _budget(mean_bits, sum(map(len, bits)))
    return Allocation([np.asarray(row, np.int64) for row in bits], budget, int(sum(row.sum() for row in bits)))


def by_turns(sizes: Sequence[int], order: Sequence[int], mean_bits: float) -> Allocation:
    """The mean for every expert, or the choices below and above it, spread evenly over a layer.

    sizes: the number of experts of each layer.
    """
    bits = []
    for n, budget in zip(sizes, budgets(mean_bits, sizes), strict=True):
        low = max(b for b in order if b * n <= budget)
        high = min((b for b in order if b > low), default=low)
        many = (budget - low * n) // (high - low) if high > low else 0
        turns = np.arange(1, n + 1) * many // n - np.arange(n) * many // n
        bits.append(low + (high - low) * turns)
    return _made(bits, mean_bits)


def _ranked(keys: Sequence[np.ndarray], order: Sequence[int], budget: int) -> Int[np.ndarray, " E"]:
    """Bits by rank: the larger of two choices for the first experts, as long as the budget lasts.

    What is then left, less than the difference of the choices, raises one more expert where a choice fits. Ties go to
    the lower id.
    """
    n = len(keys[0])
    below, above = [b for b in order if b * n < budget], [b for b in order if b * n > budget]
    if not below or not above:
        return np.full(n, max(b for b in order if b * n <= budget), np.int64)
    low, high = below[-1], above[0]
    rank = np.lexsort([-np.asarray(key) for key in reversed(keys)])
    many = (budget - low * n) // (high - low)
    bits = np.full(n, low, np.int64)
    bits[rank[:many]] = high
    left = budget - int(bits.sum())
    bits[rank[many]] = max(b for b in order if low <= b <= low + left)
    return bits


# --- least cost ------------------------------------------------------------------------------------------------------

# MC-MoE: a layer has at least one expert with each of these bits, where choices have both and the budget is spent so.
REQUIRED = (3, 2)


def least_cost(
    costs: Sequence[Float[np.ndarray, "E B"]], choices: Sequence[int], mean_bits: float, scope: str = "layer"
) -> Allocation:
    """The bits with the least sum of costs within the budget, by dynamic programming over the bits spent.

    Of allocations that cost the same the one with most bits is taken. Exact in one layer; over the whole model too,
    where the least costs of layers at every number of bits are joined.
    """
    each = budgets(mean_bits, [len(cost) for cost in costs])
    solved = [_Solved(cost, choices, budget) for cost, budget in zip(costs, each, strict=True)]
    if scope == "layer":
        return _made([one.bits(one.best(budget)) for one, budget in zip(solved, each, strict=True)], mean_bits)
    budget = _budget(mean_bits, sum(map(len, costs)))
    total, taken = np.zeros(1), []  # least cost of the layers so far, by their bits
    for one in solved:
        size = len(total) + len(one.curve) - 1
        joined, chosen = np.full(size, np.inf), np.zeros(size, np.int64)
        for spent in np.flatnonzero(np.isfinite(one.curve)):
            window = slice(spent, spent + len(total))
            better = total + one.curve[spent] < joined[window]
            joined[window][better], chosen[window][better] = (total + one.curve[spent])[better], spent
        total = joined[: budget + 1]
        taken.append(chosen)
    left, bits = _most_of_least(total), []
    for one, chosen in zip(reversed(solved), reversed(taken), strict=True):
        bits.append(one.bits(int(chosen[left])))
        left -= int(chosen[left])
    return _made(bits[::-1], mean_bits)


def _most_of_least(curve: np.ndarray) -> int:
    """The largest index of those whose value is the least, to rounding."""
    least = curve.min()
    return int(np.flatnonzero(curve <= least + 1e-12 * abs(least))[-1])


class _Solved:
    """The least cost of one layer for every number of bits spent, and how it is reached.

    A state is a bit for each of `REQUIRED` that some expert has.
    """

    def __init__(self, cost: Float[np.ndarray, "E B"], choices: Sequence[int], budget: int):
        self.cost, self.choices = cost, list(choices)
        n, rest = len(cost), len(cost) - len(REQUIRED)
        fits = lambda: sum(REQUIRED) + rest * min(choices) <= budget <= sum(REQUIRED) + rest * max(choices)
        self.required = REQUIRED if set(REQUIRED) <= set(choices) and rest >= 0 and fits() else ()
        states, most = 1 << len(self.required), n * max(choices)
        self.marks = [1 << self.required.index(b) if b in self.required else 0 for b in self.choices]
        now = np.full((states, most + 1), np.inf)
        now[0, 0] = 0.0
        self.how = np.zeros((n, states, most + 1, 2), np.int16)  # (choice, state before)
        for e in range(n):
            after = np.full_like(now, np.inf)
            for c, (bits, mark) in enumerate(zip(self.choices, self.marks, strict=True)):
                for state in range(states):
                    value, to = now[state, : most + 1 - bits] + cost[e, c], state | mark
                    better = value < after[to, bits:]
                    after[to, bits:][better] = value[better]
                    self.how[e, to, bits:][better] = (c, state)
            now = after
        self.curve = now[states - 1]

    def best(self, budget: int) -> int:
        """The number of bits of the least cost within the budget."""
        return _most_of_least(self.curve[: budget + 1])

    def bits(self, spent: int) -> Int[np.ndarray, " E"]:
        """The bits of each expert that reach the least cost with so many bits."""
        found, state = np.zeros(len(self.cost), np.int64), (1 << len(self.required)) - 1
        for e in reversed(range(len(self.cost))):
            choice, state = (int(i) for i in self.how[e, state, spent])
            found[e] = self.choices[choice]
            spent -= found[e]
        return found
