"""Data: packed rows, the order of batches, validation, and the tokenizer of a run."""

import csv
import dataclasses
import json
from collections import Counter

import numpy as np
import pytest

from moe_jax import data
from moe_jax.config import DataConfig, SourceConfig, TokenizerConfig
from moe_jax.data import pipeline, sources, tokenizers
from moe_jax.data import rows as rows_lib
from moe_jax.errors import ConfigError

SAMPLE = "def add(a, b):\n    return a + b\n\n# naïve café, 数学, 🙂\n" * 20


KEYS = {"tokens", "targets", "weights", "segment_ids", "positions", "domain_ids", "sequence_ids"}


def words(rng, n):
    return " ".join(rng.choice(["alpha", "beta", "gamma", "δelta", "数", "x=1\n"], n))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three domains in two files: a.jsonl (en, de) and b.csv (poetry)."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    with open(root / "a.jsonl", "w", encoding="utf-8") as file:
        for i in range(120):
            row = {"text": f"{i} {words(rng, rng.integers(1, 60))}", "lang": "en" if i % 3 else "de"}
            file.write(json.dumps(row) + "\n")
    with open(root / "b.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["题目", "内容"])
        writer.writerows([i, f'{i},"{words(rng, rng.integers(1, 30))}"'] for i in range(80))
    return root


def config(folder, **changes):
    made = DataConfig(
        batch_size=8,
        seq_len=32,
        cache_dir=str(folder / "cache"),
        sources={
            "a": SourceConfig(
                kind="files", path=str(folder / "a.jsonl"), domain_field="lang", weight=3.0, validation_fraction=0.2
            ),
            "b": SourceConfig(
                kind="files", path=str(folder / "b.csv"), text_field="内容", domain="poetry", validation_fraction=0.2
            ),
        },
    )
    return dataclasses.replace(made, **changes)


@pytest.fixture(scope="module")
def corpus(folder):
    return data.prepare(config(folder), workdir=folder / "run", seed=1, progress=False)


def take(iterator, n):
    return [next(iterator) for _ in range(n)]


def assert_same(left, right):
    assert set(left) == set(right) == KEYS
    for key in KEYS:
        np.testing.assert_array_equal(left[key], right[key], err_msg=key)


# --- rows ------------------------------------------------------------------------------------------------------------


def brute_rows(store, order, seq_len):
    """Rows one token at a time, from the definition."""
    stream, owner = [], []
    for d in order:
        part = store.tokens[store.offsets[d] : store.offsets[d + 1]].tolist()
        stream += part
        owner += [int(store.document_domains[d])] * len(part)
    stream.append(store.end_of_text)
    for begin in range(0, len(stream) - 1, seq_len):
        row, segment, position = [], 0, 0
        for p in range(begin, begin + seq_len):
            if p >= len(stream) - 1:
                row.append((store.end_of_text, store.end_of_text, 0.0, 0, 0, 0))
                continue
            if p == begin or stream[p] == store.end_of_text:
                segment, position = segment + 1, 0
            row.append((stream[p], stream[p + 1], 1.0, segment, position, owner[p]))
            position += 1
        yield [np.array(column) for column in zip(*row, strict=True)]


@pytest.mark.parametrize("seq_len", [2, 7, 32, 100_000])
@pytest.mark.parametrize("seed", [None, 0])
def test_rows_equal_a_brute_force_loop(corpus, seq_len, seed):
    store = corpus.stores["a", "train"]
    rows = data.PackedRows(store, seq_len, seed, partial=True)
    order = range(store.num_documents)
    if seed is not None:
        order = rows_lib.permutation(store.num_documents, "documents", seed, "")
        assert sorted(order) == list(range(store.num_documents)) != list(order)
    expected = list(brute_rows(store, order, seq_len))
    assert len(rows) == len(expected)
    names = ("tokens", "targets", "weights", "segment_ids", "positions", "domain_ids")
    for r, columns in enumerate(expected):
        made = rows[r]
        assert set(made) == set(names)
        for name, column in zip(names, columns, strict=True):
            assert made[name].dtype == (np.float32 if name == "weights" else np.int32)
            np.testing.assert_array_equal(made[name], column, err_msg=f"{name} of row {r}")
    for outside in (-1, len(rows)):
        with pytest.raises(IndexError):
            rows[outside]


def test_every_target_is_predicted_exactly_once(corpus):
    """Validation: all tokens and one end_of_text of every document. Training: the same but for a last partial row."""
    tokenizer, expected = corpus.tokenizer, Counter()
    for domain, text in corpus.validation_texts():
        ids = [*tokenizer.encode([text])[0].tolist(), tokenizer.end_of_text]
        expected.update((corpus.domains.index(domain), i) for i in ids)
    seen = Counter()
    for batch in corpus.validation_batches(range(8)):
        real = batch["weights"] == 1
        seen.update(zip(batch["domain_ids"][real].tolist(), batch["targets"][real].tolist(), strict=True))
    assert seen == expected and sum(seen.values()) > 1000

    store = corpus.stores["a", "train"]
    rows = data.PackedRows(store, 32, 1, name="a")
    kept = Counter(t for r in range(len(rows)) for t in rows[r]["targets"].tolist())
    whole = Counter(store.tokens.tolist()[1:])
    assert kept <= whole and (whole - kept).total() < 32
    assert all(rows[r]["weights"].all() for r in range(len(rows)))


def test_an_epoch_visits_every_row_once_and_the_next_in_another_order(folder):
    cfg = config(folder, batch_size=1)
    cfg = dataclasses.replace(cfg, sources={"a": cfg.sources["a"]})
    made = data.prepare(cfg, workdir=folder / "run", seed=3, progress=False)
    rows = data.PackedRows(made.stores["a", "train"], 32, 3, name="a")
    iterator, n = made.train_iterator([0]), len(rows)
    first, second = ([b["tokens"][0].tobytes() for b in take(iterator, n)] for _ in range(2))
    iterator.close()
    stored = [rows[r]["tokens"].tobytes() for r in range(n)]
    assert Counter(first) == Counter(second) == Counter(stored)
    assert len({tuple(first), tuple(second), tuple(stored)}) == 3


# --- the order of batches --------------------------------------------------------------------------------------------


def test_batches_do_not_depend_on_processes_or_workers(folder, corpus):
    whole = take(corpus.train_iterator(range(8)), 6)
    assert all(batch["tokens"].shape == (8, 32) for batch in whole)
    np.testing.assert_array_equal(whole[0]["sequence_ids"], range(8))
    for split in ([range(0, 4), range(4, 8)], [(0, 5), (1, 4), (2, 3), (6, 7)]):
        for rows in split:
            for batch, part in zip(whole, take(corpus.train_iterator(rows), 6), strict=True):
                assert_same({k: v[list(rows)] for k, v in batch.items()}, part)
    two = data.prepare(config(folder, num_workers=2), workdir=folder / "run", seed=1, progress=False)
    iterator = two.train_iterator((1, 4, 6))
    for batch, part in zip(whole, take(iterator, 6), strict=True):
        assert_same({k: v[[1, 4, 6]] for k, v in batch.items()}, part)
    iterator.close()


def test_the_seed_decides_the_order(folder, corpus):
    again, other = (data.prepare(config(folder), workdir=folder / "run", seed=s, progress=False) for s in (1, 2))
    first = next(corpus.train_iterator(range(8)))
    assert_same(first, next(again.train_iterator(range(8))))
    assert (first["tokens"] != next(other.train_iterator(range(8)))["tokens"]).any()


def test_resuming_continues_also_with_another_split_of_rows(corpus):
    iterator = corpus.train_iterator(range(8))
    take(iterator, 5)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 4)
    resumed, part = corpus.train_iterator(range(8)), corpus.train_iterator((2, 3))
    take(resumed, 2)  # a used iterator can be moved too
    for other, rows in ((resumed, range(8)), (part, (2, 3))):
        other.set_state(state)
        for batch, made in zip(expected, take(other, 4), strict=True):
            assert_same({k: v[list(rows)] for k, v in batch.items()}, made)
        assert other.get_state() == state | {"batches": state["batches"] + 4}


def test_resuming_replays_nothing(corpus, monkeypatch):
    reads = []
    original = data.PackedRows.__getitem__
    monkeypatch.setattr(data.PackedRows, "__getitem__", lambda self, r: reads.append(r) or original(self, r))
    iterator = corpus.train_iterator(range(8))
    state = iterator.get_state()
    iterator.set_state(state | {"batches": 10**9})
    next(iterator)
    iterator.close()
    assert iterator.get_state() == state | {"batches": 10**9 + 1}
    assert 8 <= len(reads) <= 8 * 16  # the batch and what is read ahead


def test_mixture_proportions(corpus):
    """Weights 3 : 1 hold in every stretch, also when the smaller source has been through several epochs."""
    poetry = corpus.domains.index("poetry")
    iterator = corpus.train_iterator(range(8))
    counts = [int((b["domain_ids"][:, 0] == poetry).sum()) for b in take(iterator, 200)]
    iterator.close()
    assert sum(counts) == 400 and set(counts) == {2}
    assert len(data.PackedRows(corpus.stores["b", "train"], 32, 1, name="b")) < 200


def test_a_source_of_weight_zero_is_only_validated(folder):
    cfg = config(folder)
    quiet = dataclasses.replace(cfg.sources["b"], weight=0.0)
    made = data.prepare(
        dataclasses.replace(cfg, sources={**cfg.sources, "b": quiet}), workdir=folder / "run", seed=1, progress=False
    )
    assert ("b", "train") not in made.stores and ("b", "validation") in made.stores
    assert made.domains == ("de", "en", "poetry")
    seen = {int(i) for b in take(made.train_iterator(range(8)), 30) for i in b["domain_ids"].ravel()}
    assert seen == {0, 1}


# --- validation ------------------------------------------------------------------------------------------------------


def test_validation_batches_are_full_and_split_among_processes(corpus):
    whole = list(corpus.validation_batches(range(8)))
    assert len(whole) == corpus.num_validation_batches() > 3
    assert all(b["tokens"].shape == (8, 32) for b in whole)
    real = np.concatenate([b["weights"].any(1) for b in whole])
    assert real[: real.sum()].all() and not real.all()  # padding rows, if any, are at the end
    padding = {k: v[-1] for k, v in whole[-1].items()}
    assert not padding["weights"].any() and not padding["segment_ids"].any()
    for rows in ((0, 1, 2, 3), (5,)):
        for batch, part in zip(whole, corpus.validation_batches(rows), strict=True):
            assert_same({k: v[list(rows)] for k, v in batch.items()}, part)


def test_a_limited_validation_sees_all_of_the_split(corpus):
    n = corpus.num_validation_batches()
    some = list(corpus.validation_batches(range(8), limit=3))
    assert len(some) == corpus.num_validation_batches(3) == 3
    found = {int(i) for b in some for i in b["domain_ids"][b["weights"] == 1]}
    assert found == set(range(len(corpus.domains)))
    rows = [r.tobytes() for b in some for r in b["tokens"]]
    assert len(set(rows)) == len(rows)  # no row twice
    for limit in (n, n + 5):
        for left, right in zip(
            corpus.validation_batches(range(8)), corpus.validation_batches(range(8), limit), strict=True
        ):
            assert_same(left, right)


def test_bytes_per_token_and_stats(folder, corpus):
    sizes, tokens = Counter(), Counter()
    for domain, text in corpus.validation_texts():
        sizes[domain] += len(text.encode())
        tokens[domain] += len(corpus.tokenizer.encode([text])[0]) + 1
    expected = [sizes[d] / tokens[d] for d in corpus.domains]
    np.testing.assert_allclose(corpus.bytes_per_token, expected)
    rows = {(r["source"], r["split"], r["domain"]): r for r in corpus.stats()}
    assert sum(r["documents"] for r in rows.values()) == 200
    assert rows["a", "validation", "en"]["bytes"] == sizes["en"]
    assert len(corpus.table().splitlines()) == len(rows) + 1

    cfg = config(folder)
    unseen = dataclasses.replace(cfg.sources["b"], validation_fraction=0.0)
    made = data.prepare(
        dataclasses.replace(cfg, sources={**cfg.sources, "b": unseen}), workdir=folder / "run", seed=1, progress=False
    )
    assert np.isfinite(made.bytes_per_token).all() and (made.bytes_per_token > 0.5).all()


def test_shares_and_epochs(folder, corpus):
    """Against the rows that are drawn: 40 steps of 8 rows."""
    drawn = Counter()
    for batch in take(corpus.train_iterator(range(8)), 40):
        drawn.update("b" if corpus.domains[int(ids[0])] == "poetry" else "a" for ids in batch["domain_ids"])
    found = corpus.epochs(40)
    for name, (share, epochs) in found.items():
        assert drawn[name] / 320 == pytest.approx(share, abs=0.02)
        length = len(corpus._train[name])
        assert epochs == pytest.approx(drawn[name] / length, rel=0.1)
    head, *rows = corpus.table(40).splitlines()
    assert head.split()[-3:] == ["weight", "share", "epochs"]
    shown = [row.split()[-2:] for row in rows if row.endswith(tuple("0123456789")) and "%" in row]
    assert shown == [[f"{share:.1%}", f"{epochs:.2f}"] for share, epochs in found.values()]  # once a source


def test_a_sample_begins_as_a_document_that_is_held_out(corpus):
    first = next(corpus.validation_texts())[1]
    ids = corpus.beginning()
    words = corpus.tokenizer.decode(ids)
    assert ids[0] == corpus.tokenizer.end_of_text and 10 < len(words) <= 32 and first.lstrip().startswith(words)


# --- the tokenizer of a run ------------------------------------------------------------------------------------------


def test_a_run_keeps_its_trained_tokenizer(folder, tmp_path):
    cfg = config(folder, tokenizer=TokenizerConfig(kind="bpe", vocab_size=280, train_bytes=2000))
    first = data.prepare(cfg, workdir=tmp_path, seed=1, progress=False)
    written = (tmp_path / "tokenizer.json").read_bytes()
    assert data.load_tokenizer(tmp_path).fingerprint == first.tokenizer.fingerprint
    again = tokenizers.load_or_make(cfg.tokenizer, tmp_path, lambda: pytest.fail("trained again"))
    assert again.fingerprint == first.tokenizer.fingerprint
    other = data.prepare(cfg, workdir=tmp_path / "b", seed=9, progress=False)
    assert (tmp_path / "b" / "tokenizer.json").read_bytes() == written and other.stores.keys() == first.stores.keys()
    with pytest.raises(ConfigError, match=r"data\.tokenizer\.vocab_size=290.*280"):
        tokenizers.load_or_make(dataclasses.replace(cfg.tokenizer, vocab_size=290), tmp_path, None)
    with pytest.raises(ConfigError, match=r"data\.tokenizer\.kind='bytes'.*'bpe'"):
        tokenizers.load_or_make(TokenizerConfig(), tmp_path, None)
    assert data.load_tokenizer(tmp_path / "nothing") is None


def test_the_tokenizer_is_trained_on_its_share_of_training_documents(folder):
    cfg = config(folder, tokenizer=TokenizerConfig(kind="bpe", train_bytes=4000))
    opened = {n: sources.open_source(n, s, folder / "cache") for n, s in cfg.sources.items()}
    texts = list(pipeline._training_text(cfg, opened))
    assert texts == list(pipeline._training_text(cfg, opened))
    assert 3900 < sum(len(t.encode()) for t in texts) <= 4000
    known = {n: {d["text"] for d in opened[n].documents("train")} for n in opened}
    share = sum(len(t.encode()) for t in texts if t in known["a"])
    assert 0.6 < share / 4000 < 0.76  # weights 3 : 1, the last document cut
    held = {d["text"] for n in opened for d in opened[n].documents("validation")}
    assert not held.intersection(texts)


# --- mistakes --------------------------------------------------------------------------------------------------------


def test_too_little_training_text_and_bad_rows(folder, corpus):
    with pytest.raises(ConfigError, match=r"data\.seq_len=50000: must be ≤ \d+.*nearest valid: \d+"):
        data.prepare(config(folder, seq_len=50_000), workdir=folder / "run", seed=0, progress=False)
    for rows in ((), (1, 0), (0, 0), (8,), (-1,)):
        with pytest.raises(ValueError, match="rows must be"):
            corpus.train_iterator(rows)
        with pytest.raises(ValueError, match="rows must be"):
            corpus.validation_batches(rows)
