"""Fewer cases than a whole product of settings, for tests that compile a program for each."""

import itertools
from collections.abc import Sequence


def covering(cases: Sequence[tuple], given: Sequence[tuple] = ()) -> list[tuple]:
    """The first few of `cases` that, with those `given`, have every pair of settings that any of the cases has.

    A fault that needs two settings to meet (a mesh and a number of micro-batches) is seen; a product of five settings
    has four times as many cases. Greedy: at each turn the first case that adds the most pairs.
    """
    of = lambda case: set(itertools.combinations(enumerate(case), 2))
    wanted, chosen = set().union(*map(of, cases)), []
    for case in given:
        wanted -= of(case)
    while wanted:
        chosen.append(max(cases, key=lambda case: len(wanted & of(case))))
        wanted -= of(chosen[-1])
    return chosen
