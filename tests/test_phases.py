"""Mixtures in phases: the law of their counts, every row of every source once and in order, and resuming."""

import dataclasses
import itertools
import json
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax import config, data
from moe_jax.data import phases
from moe_jax.data.phases import Phase
from moe_jax.errors import CheckpointError

WEIGHTS = st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1e6)), min_size=2, max_size=6).filter(any)
SIZE = 24


def shares(weights):
    return [Fraction(w) / sum(map(Fraction, weights)) for w in weights]


@given(WEIGHTS, st.integers(1, 300), st.integers(0, 10**12))
def test_each_source_has_its_share_of_every_batch_rounded_down_or_up(weights, size, batch):
    made = phases.counts(weights, batch, size)
    assert sum(made) == size
    for n, share in zip(made, shares(weights), strict=True):
        assert 0 <= n and size * share - 1 < n < size * share + 1


@given(WEIGHTS, st.integers(1, 50), st.integers(0, 10**9), st.integers(0, 40))
def test_cursors_are_the_sums_of_counts(weights, size, start, batches):
    start_at = tuple(range(len(weights)))
    phase = Phase(start, start_at, tuple(weights))
    steps = [phases.counts(weights, b, size) for b in range(start, start + batches)]
    assert phases.cursors(phase, start + batches, size) == tuple(map(sum, zip(start_at, *steps, strict=True)))


@pytest.mark.parametrize("weights", [(1, 2, 3, 0, 0.7), (1, 1000), (0.1,) * 10])
def test_over_many_batches_each_source_has_its_share(weights):
    found = phases.cursors(Phase(0, (0,) * len(weights), weights), 10_000, 4)
    np.testing.assert_allclose(found, [40_000 * float(s) for s in shares(weights)], atol=4)
    if len(set(weights)) == 1:  # a sum of floats would give one of them two rows, and another none
        assert {phases.counts(weights, b, 10) for b in range(100)} == {(1,) * 10}


@settings(max_examples=30)
@given(st.lists(st.tuples(WEIGHTS, st.integers(0, 7)), min_size=3, max_size=3), st.integers(1, 20))
def test_every_row_of_a_source_comes_once_and_in_order_of_batches(plan, size):
    sources = max(len(weights) for weights, _ in plan)
    batch, phase, seen = 0, Phase(0, (0,) * sources, (1.0,) * sources), [[] for _ in range(sources)]
    for weights, steps in plan:
        weights = (*weights, *[0.0] * (sources - len(weights)))
        phase = Phase(batch, phases.cursors(phase, batch, size), weights)
        for _ in range(steps):
            rows = [phases.row(phase, 5, batch, j, size) for j in range(size)]
            for source in range(sources):
                seen[source] += sorted(place for s, place in rows if s == source)
            batch += 1
    assert seen == [list(range(len(places))) for places in seen]


def test_the_seed_decides_the_order_in_a_batch():
    phase = Phase(0, (0, 0), (1.0, 1.0))
    made = [[phases.row(phase, seed, b, j, 16) for j in range(16)] for seed in (0, 1) for b in (0, 1)]
    assert all(a != b for a, b in itertools.combinations([[s for s, _ in rows] for rows in made], 2))
    assert sorted(made[0]) == sorted(made[2]) != made[0]


# --- batches ---------------------------------------------------------------------------------------------------------


def made_corpus(root, num_workers=0, sources=3, seed=1):
    rng = np.random.default_rng(0)
    if not (root / "a0.txt").exists():
        for s in range(3):
            for i in range(20 + 5 * s):
                words = " ".join(rng.choice(["red", "green", "7", "δ"], 40))
                (root / f"{'abc'[s]}{i}.txt").write_text(f"{i} {words}", encoding="utf-8")
    made = {n: config.SourceConfig(kind="files", path=f"{root}/{n}*.txt", validation_fraction=0.1, weight=w)
            for n, w in list(zip("cab", (1.0, 3.0, 2.0), strict=True))[:sources]}  # fmt: skip
    cfg = config.DataConfig(batch_size=8, seq_len=SIZE, sources=made, cache_dir=str(root / "cache"))
    cfg = dataclasses.replace(cfg, num_workers=num_workers)
    return data.prepare(cfg, workdir=root / "run", seed=seed, progress=False)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("phases")


PLAN = [((3.0, 2.0, 1.0), 3), ((0.0, 1.0, 0.2), 1), ((0.5, 0.5, 2.0), 4)]  # weights of a, b, c, and batches


def through(iterator, plan=PLAN):
    """The batches of three phases."""
    found = []
    for weights, steps in plan:
        iterator.begin(weights, steps)
        found += [{k: np.array(v) for k, v in rows.items()} for rows in iterator]
        assert iterator.at_border
    iterator.close()
    return found


def assert_same(got, want, rows=slice(None)):
    for a, b in zip(got, want, strict=True):
        for name in b:
            np.testing.assert_array_equal(a[name], b[name][rows], err_msg=name)


def test_batches_are_the_rows_of_each_source_in_its_order(root):
    """Of three phases, against streams of one source each."""
    corpus, streams = made_corpus(root), {}
    for name in "abc":
        rows = iter(data.pipeline.grain.MapDataset.source(corpus._train[name]).shuffle(
            seed=data.pipeline.random_key("rows", 1, name)).repeat())  # fmt: skip
        streams[corpus.domains.index(name)] = rows
    for batch in through(corpus.train_iterator(range(8))):
        for domain in range(3):
            mine = [
                t.tobytes() for t, ids in zip(batch["tokens"], batch["domain_ids"], strict=True) if ids[0] == domain
            ]
            assert sorted(mine) == sorted(next(streams[domain])["tokens"].tobytes() for _ in mine)


@pytest.mark.slow
def test_reader_processes_give_the_same_batches(root):
    """Also in a phase of fewer batches than there are processes."""
    made = through(made_corpus(root, num_workers=2).train_iterator((1, 2, 5)), PLAN[:2])
    assert_same(made, through(made_corpus(root).train_iterator((1, 2, 5)), PLAN[:2]))


def test_any_processes_and_any_moment_to_resume(root):
    corpus = made_corpus(root)
    whole = through(corpus.train_iterator(range(8)))
    assert len(whole) == 8
    for split in ([range(4), range(4, 8)], [(0, 7), (1, 4), (2, 3), (5, 6)]):
        for rows in split:
            assert_same(through(corpus.train_iterator(rows)), whole, list(rows))
    for at in (1, 3, 6):  # inside the first phase, at its border, inside the last
        iterator, left, done = corpus.train_iterator(range(8)), list(PLAN), 0
        while done < at:
            iterator.begin(*left.pop(0))
            for _ in range(min(iterator.stop, at) - done):
                next(iterator)
                done += 1
        state = json.loads(json.dumps(iterator.get_state()))
        iterator.close()
        resumed = corpus.train_iterator((2, 6))
        resumed.set_state(state)
        assert resumed.at_border == (at == 3) and resumed.cursors == iterator.cursors
        assert_same([*resumed, *through(resumed, left)], whole[at:], [2, 6])


def test_what_an_iterator_refuses(root):
    several, one = made_corpus(root).train_iterator(range(8)), made_corpus(root, sources=1).train_iterator(range(8))
    assert one.get_state() == {"batches": 0} and several.get_state()["order"] == 2
    with pytest.raises(CheckpointError, match=r"after batch 7 is of a version that mixed its 3 sources in another"):
        several.set_state({"batches": 7})
    for weights in ((1, 1), (1, -1, 1), (0, 0, 0), (float("nan"), 1, 1)):
        with pytest.raises(ValueError, match="weights must be 3 finite numbers"):
            several.begin(weights)
