"""Allocation of bits to experts: the least cost against enumeration, equal totals, and what each method prefers."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.errors import UserError
from moe_jax.quant import allocate as al
from moe_jax.quant.allocate import METHODS, allocate, least_cost
from moe_jax.quant.round import LayerStats


def prop(**strategies):
    """Repeatable: the same examples in every run."""
    return lambda test: settings(derandomize=True, deadline=None, max_examples=40)(given(**strategies)(test))


def stats_of(rng, sizes, choices):
    """Loads and weights that differ, and losses that fall with the bits."""
    falls = 16.0 ** -np.asarray(choices, float)
    loss = lambda n: rng.random((n, 1)) * falls * (1 + 0.5 * rng.random((n, len(choices))))
    return [
        LayerStats(i, 100.0, rng.integers(1, 100, n).astype(float), rng.random(n) + 0.01, loss(n), rng.random(),
                   1 + rng.random((n, 3)))
        for i, n in enumerate(sizes)
    ]  # fmt: skip


def enumerated(cost, choices, budget):
    """The least cost of all allocations within the budget that have the required choices, and its bits."""
    every = [np.array(bits) for bits in itertools.product(choices, repeat=len(cost)) if sum(bits) <= budget]
    if {2, 3} <= set(choices) and budget <= 5 + (len(cost) - 2) * max(choices):
        every = [bits for bits in every if {2, 3} <= set(bits)] or every
    price = lambda bits: sum(cost[e, list(choices).index(b)] for e, b in enumerate(bits))
    best = min(map(price, every))
    return best, max((bits for bits in every if price(bits) <= best * (1 + 1e-12)), key=sum)


@prop(
    seed=st.integers(0, 10**6),
    n=st.integers(2, 7),
    choices=st.sampled_from([(1, 2, 3), (2, 3, 4), (2, 4), (1, 2, 3, 8)]),
    part=st.floats(0.0, 1.0),
)
def test_least_cost_is_that_of_enumeration(seed, n, choices, part):
    """Of any costs, also such that do not fall with the bits."""
    rng = np.random.default_rng(seed)
    cost = rng.random((n, len(choices)))
    mean = choices[0] + part * (choices[-1] - choices[0])
    got = least_cost([cost], choices, mean)
    best, bits = enumerated(cost, choices, got.budget)
    assert got.used <= got.budget
    np.testing.assert_array_equal(got.bits[0], bits)
    np.testing.assert_allclose(sum(cost[e, choices.index(b)] for e, b in enumerate(got.bits[0])), best, rtol=1e-12)


@prop(seed=st.integers(0, 10**6), sizes=st.sampled_from([(3, 3), (2, 4), (1, 2, 2)]), part=st.floats(0.0, 1.0))
def test_least_cost_over_the_model_is_that_of_enumeration(seed, sizes, part):
    """Without the required choices, which are of layers."""
    rng, choices = np.random.default_rng(seed), (2, 4, 5)
    costs = [rng.random((n, 3)) for n in sizes]
    mean = 2 + 3 * part
    got = least_cost(costs, choices, mean, "model")
    _, bits = enumerated(np.concatenate(costs), choices, got.budget)
    np.testing.assert_array_equal(np.concatenate(got.bits), bits)
    alone = least_cost(costs, choices, mean)
    price = lambda made: sum(c[e, choices.index(b)] for c, row in zip(costs, made.bits, strict=True)
                             for e, b in enumerate(row))  # fmt: skip
    assert price(got) <= price(alone) + 1e-12


def test_cost_falls_with_the_budget():
    """And a layer of 256 experts is solved too: every expert that gets more than another is worth it."""
    rng, choices = np.random.default_rng(0), (1, 2, 3)
    cost = np.sort(rng.random((256, 3)))[:, ::-1]
    solved = [least_cost([cost], choices, mean) for mean in (1.25, 1.5, 2.0, 2.5, 3.0)]
    prices = [cost[np.arange(256), made.bits[0] - 1].sum() for made in solved]
    assert all(a > b for a, b in itertools.pairwise(prices)) and all(made.used == made.budget for made in solved[:-1])
    bits = solved[2].bits[0]
    gain = lambda e, b: cost[e, b - 1] - cost[e, b]  # of one bit more
    up = max(gain(e, b) for e, b in enumerate(bits) if b < 3)
    down = min(gain(e, b - 1) for e, b in enumerate(bits) if b > 1)
    assert up <= down + 1e-12


@pytest.mark.parametrize("scope", ["layer", "model"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("mean", "choices"), [(2.5, (1, 2, 3)), (3.0, (2, 3, 4)), (2.3, (2, 4)), (4.0, (2, 3, 4))])
def test_totals_are_equal(method, scope, mean, choices):
    """The budget to the bit; with choices that leave gaps the nearest total below it."""
    sizes = (6, 6, 4, 6)
    stats = stats_of(np.random.default_rng(1), sizes, choices)
    got = allocate(method, stats, choices, mean, scope)
    assert [len(row) for row in got.bits] == list(sizes) and {int(b) for row in got.bits for b in row} <= set(choices)
    assert got.used == sum(int(row.sum()) for row in got.bits)
    by_layer = method == "turns" or (scope == "layer" and method not in ("blocks", "importance"))
    assert got.budget == int(mean * 22 + 1e-9)  # the same for every method
    step = max(b - a for a, b in itertools.pairwise(sorted(choices)))
    assert 0 <= got.budget - got.used < step * (len(sizes) if by_layer else 1)
    if step == 1:
        assert got.used == got.budget
    if by_layer:
        assert all(int(row.sum()) < mean * len(row) + 1 for row in got.bits)


def test_what_each_method_prefers():
    rng = np.random.default_rng(2)
    choices, sizes = (1, 2, 3), (4, 4, 4)
    m = stats_of(rng, sizes, choices)
    for one, bits in zip(m, allocate("frequency", m, choices, 2.5).bits, strict=True):
        assert min(one.counts[bits == 3]) >= max(one.counts[bits == 2])
    # At a mean that is a choice, half of the experts have one more and half one less.
    assert [sorted(row) for row in allocate("frequency", m, choices, 2.0).bits] == [[1, 1, 3, 3]] * 3
    assert [row.tolist() for row in allocate("turns", m, choices, 2.5).bits] == [[2, 3, 2, 3]] * 3
    assert [row.tolist() for row in allocate("blocks", m, (2, 3), 2.5).bits][::2] == [[3] * 4, [2] * 4]
    by_weight = allocate("importance", m, choices, 2 + 1 / 3).bits
    assert np.argmax([one.importance for one in m]) == np.argmax([row.sum() for row in by_weight])
    plain, planted = np.ones((4, 3)), np.ones((4, 3))
    planted[2, 1] = 9.0
    marked = [one._replace(outliers=x) for one, x in zip(m, (plain, planted, plain), strict=True)]
    assert allocate("outliers", marked, choices, 2 + 1 / 12, "model").bits[1].tolist() == [2, 2, 3, 2]


def test_cost_is_that_of_the_formula():
    """Shares of the layer, and the loss to the power alpha unless gamma says another."""
    loss = np.array([[4.0, 1], [9, 4]])
    one = LayerStats(0, 4.0, np.array([1.0, 3]), np.array([2.0, 2]), loss**2, 0.0, np.ones((2, 3)))
    want = np.array([[0.25**2 * 0.5**1.5 * 16, 0.25**2 * 0.5**1.5], [0.75**2 * 0.5**1.5 * 81, 0.75**2 * 0.5**1.5 * 16]])
    np.testing.assert_allclose(al.expert_cost(one, 2.0, 1.5), want)
    np.testing.assert_allclose(al.expert_cost(one, 1.0, 0.0, 0.5), [[0.5, 0.25], [2.25, 1.5]])


def test_an_expert_that_nobody_uses_costs_nothing_and_takes_what_is_left():
    """Its cost is 0 with any bits, so that the whole budget is spent."""
    used = np.array([5.0, 0, 5])
    got = allocate(
        "mc", [LayerStats(0, 5.0, used, used, np.array([[4.0, 2, 1]] * 3), 0.0, np.ones((3, 3)))], (1, 2, 3), 2
    )
    assert got.used == got.budget == 6 and got.bits[0][1] == min(got.bits[0])


BAD = [
    ({"method": "frequent"}, "--allocate=frequent.*'frequency'"),
    ({"mean_bits": 3.5}, r"--bits=3.5: must be in \[1, 3\].*nearest valid: 3"),
    ({"choices": (2, 2)}, "--choices=2,2: must be numbers"),
    ({"choices": (3, 2)}, "--choices=3,2: must be numbers"),
    ({"scope": "block"}, "--scope=block: must be 'layer' or 'model'"),
    ({"counts": np.zeros(4)}, "counts of a layer's experts must be ≥ 0, and not all 0"),
    ({"method": "mc", "loss": np.full((4, 3), np.nan)}, "must be finite"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message[:24] for _, message in BAD])
def test_refused(change, message):
    (stats,) = stats_of(np.random.default_rng(0), (4,), (1, 2, 3))
    arguments = {"method": "frequency", "mean_bits": 2.0, "choices": (1, 2, 3)} | change
    stats = stats._replace(**{k: arguments.pop(k) for k in LayerStats._fields if k in arguments})
    with pytest.raises(UserError, match=message):
        allocate(stats=[stats], **arguments)
