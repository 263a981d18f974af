"""Stores of tokens: written once and whole, also by two writers, and of more text than memory holds."""

import dataclasses
import json
import threading

import numpy as np
import pytest

from moe_jax import data
from moe_jax.config import DataConfig, SourceConfig, TokenizerConfig
from moe_jax.data import corpus as corpus_lib
from moe_jax.data import documents, tokenizers
from moe_jax.data.documents import Documents

DOCS = [{"text": t, "domain": d} for t, d in (("ab", "x"), ("", "x"), ("cde", "y"), ("f", "x"))]


MAKE = lambda: Documents(DOCS)


def check_store(store):
    assert store.tokens.tolist() == [256, 97, 98, 256, 99, 100, 101, 256, 102, 256]
    assert store.tokens.dtype == np.uint16 and isinstance(store.tokens, np.memmap)
    assert store.offsets.tolist() == [0, 3, 7, 9] and store.document_bytes.tolist() == [2, 3, 1]
    assert [store.domains[i] for i in store.document_domains] == ["x", "y", "x"]


def test_a_store_is_written_once(tmp_path):
    check_store(corpus_lib.prepare_store(tmp_path / "t" / "s", MAKE, tokenizers.BytesTokenizer()))
    fail = lambda: pytest.fail("written again")
    check_store(corpus_lib.prepare_store(tmp_path / "t" / "s", fail, tokenizers.BytesTokenizer()))
    assert [p.name for p in (tmp_path / "t").iterdir()] == ["s"]
    plain = tmp_path / "plain"
    plain.mkdir()
    assert (tmp_path / "t" / "s").stat().st_mode == plain.stat().st_mode  # a cache may be shared
    empty = corpus_lib.prepare_store(tmp_path / "e", lambda: Documents([]), tokenizers.BytesTokenizer())
    assert empty.tokens.tolist() == [256] and len(data.PackedRows(empty, 8, None, partial=True)) == 0


@pytest.mark.parametrize("damage", ["meta.json", "tokens.npy", "cut", "version"])
def test_a_half_written_store_is_never_used(tmp_path, damage):
    path = tmp_path / "s"
    corpus_lib.prepare_store(path, MAKE, tokenizers.BytesTokenizer())
    if damage == "cut":
        (path / "tokens.npy").write_bytes((path / "tokens.npy").read_bytes()[:-3])
    elif damage == "version":
        (path / "meta.json").write_text(
            (path / "meta.json").read_text(encoding="utf-8").replace('"version": 2', '"version": 0'), encoding="utf-8"
        )
    else:
        (path / damage).unlink()
    with pytest.raises(ValueError, match="not a complete token store"):
        data.TokenStore(path)
    check_store(corpus_lib.prepare_store(path, MAKE, tokenizers.BytesTokenizer()))
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_a_killed_run_leaves_no_store(tmp_path):
    class Dies(Documents):
        def __getitem__(self, index):
            if index == 3:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    with pytest.raises(KeyboardInterrupt):
        corpus_lib.prepare_store(tmp_path / "s", lambda: Dies(DOCS), tokenizers.BytesTokenizer())
    assert not (tmp_path / "s").exists()
    check_store(corpus_lib.prepare_store(tmp_path / "s", MAKE, tokenizers.BytesTokenizer()))


def test_two_writers_at_once_both_end_well(tmp_path):
    barrier, found = threading.Barrier(2), []

    def documents():
        barrier.wait(timeout=120)  # both have seen that there is no store
        return Documents(DOCS)

    write = lambda: found.append(corpus_lib.prepare_store(tmp_path / "s", documents, tokenizers.BytesTokenizer()))
    threads = [threading.Thread(target=write) for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(found) == 2 and [p.name for p in tmp_path.iterdir()] == ["s"]
    for store in found:
        check_store(store)


def test_a_corpus_larger_than_memory(tmp_path, monkeypatch):
    """Beyond a limit documents lie in a file: the same stores and the same tokenizer, and the file leaves no trace."""
    rng = np.random.default_rng(0)
    text = lambda: "".join(rng.choice(list("abcdefgh é\n"), 200))
    rows = [{"text": text(), "label": f"d{i % 3}"} for i in range(300)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    source = SourceConfig(kind="files", path=str(tmp_path / "a.jsonl"), domain_field="label", validation_fraction=0.2)
    cfg = DataConfig(batch_size=2, seq_len=16, sources={"a": source},
                     tokenizer=TokenizerConfig(kind="bpe", vocab_size=270, train_bytes=20_000))  # fmt: skip
    made = []
    for name, limit in (("memory", 2**28), ("file", 3000)):
        monkeypatch.setattr(documents, "IN_MEMORY", limit)
        of = dataclasses.replace(cfg, cache_dir=str(tmp_path / name))
        made.append(data.prepare(of, workdir=None, seed=0, progress=False))
    one, other = made
    assert one.tokenizer.fingerprint == other.tokenizer.fingerprint and len(one.stores) == 2
    for key, store in one.stores.items():
        assert store.checksums == other.stores[key].checksums and store.notes == other.stores[key].notes
    assert sorted(p.name for p in (tmp_path / "file").iterdir()) == sorted(
        p.name for p in (tmp_path / "memory").iterdir()
    )


def test_documents_beyond_memory_are_read_by_number(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "IN_MEMORY", 10)
    written = [{"text": "é" * i, "domain": "d", "answers": [[0, i]], "share": 0.1 * i} for i in range(9)]
    made = documents.Documents(written, tmp_path)
    made.finish()
    assert len(made) == 9 and [made[i] for i in (8, 3, 0)] == [written[i] for i in (8, 3, 0)] and list(made) == written
    with pytest.raises(IndexError):
        made[9]
    made.free()
    assert not list(tmp_path.iterdir())
