"""Prepared data is what the files hold and what was written: content, checksums, and the end of a run."""

import gzip
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from moe_jax import data
from moe_jax.config import DataConfig, SourceConfig
from moe_jax.data import corpus as corpus_lib
from moe_jax.data import digests, files, tokenizers
from moe_jax.errors import ConfigError
from moe_jax.evaluate import held_out


def write(path: Path, word: str, documents: int = 40) -> None:
    rows = [{"text": f"{n:03} " + f"{word} " * (n % 5 + 3), "kind": "ab"[n % 2]} for n in range(documents)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def prepare(tmp_path, pattern="*.jsonl", **fields) -> data.Corpus:
    source = SourceConfig(kind="files", path=str(tmp_path / pattern), validation_fraction=0.4, **fields)
    cfg = DataConfig(batch_size=2, seq_len=8, cache_dir=str(tmp_path / "cache"), sources={"src": source})
    return data.prepare(cfg, workdir=tmp_path / "run", seed=0, progress=False)


def text(corpus: data.Corpus) -> str:
    return corpus.tokenizer.decode(corpus.stores["src", "train"].tokens)


# --- which data it is ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settled", [digests._SETTLED, -1.0])
def test_other_text_of_the_same_size_and_time_is_read(tmp_path, monkeypatch, settled):
    """In place, or by another file moved there. settled < 0: files count as old at once, so hashes are remembered."""
    monkeypatch.setattr(digests, "_SETTLED", settled)
    path = tmp_path / "a.jsonl"
    write(path, "first")
    os.utime(path, ns=(10**18, 10**18))
    assert "first" in text(prepare(tmp_path))
    for word, way in (("third", "in place"), ("fifth", "moved")):
        new = path if way == "in place" else tmp_path / "new"
        write(new, word)
        os.utime(new, ns=(10**18, 10**18))
        os.replace(new, path)
        made = text(prepare(tmp_path))
        assert word in made and "first" not in made


def test_an_unchanged_file_is_hashed_once_and_a_name_is_no_content(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "_SETTLED", -1.0)
    read = []
    original = files.content_hash
    monkeypatch.setattr(files, "content_hash", lambda path: read.append(path.name) or original(path))
    write(tmp_path / "a.jsonl", "words")
    stores = prepare(tmp_path).stores
    assert prepare(tmp_path).stores["src", "train"].folder == stores["src", "train"].folder and read == ["a.jsonl"]
    os.rename(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert prepare(tmp_path).stores["src", "train"].folder == stores["src", "train"].folder and read[1:] == ["b.jsonl"]
    (tmp_path / "cache" / "content_hashes.json").write_text("[1, 2", encoding="utf-8")  # damaged: hashed again
    assert prepare(tmp_path).stores["src", "train"].folder == stores["src", "train"].folder and len(read) == 3


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    write(tmp_path / "a.jsonl", "words")
    original = files.readers.open_rows

    def slow(path, wanted):
        write(path, "other")
        return original(path, wanted)

    monkeypatch.setattr(files.readers, "open_rows", slow)
    with pytest.raises(ConfigError, match=r"data\.sources\.src\.path=.*a\.jsonl changed while it was read"):
        prepare(tmp_path)


# --- damage ----------------------------------------------------------------------------------------------------------


def spoil(folder: Path, what: str) -> None:
    if what == "meta":
        meta = folder / "meta.json"
        meta.write_text(
            meta.read_text(encoding="utf-8").replace('"end_of_text": 256', '"end_of_text": 255'), encoding="utf-8"
        )
        return
    name, value = what.split("=")
    array = np.load(folder / f"{name}.npy", mmap_mode="r+")
    array[3:9] = int(value)
    array.flush()


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("what", ["tokens=0", "tokens=60000", "domains=0", "bytes=7", "text=65", "meta"])
def test_a_damaged_store_is_named_and_prepared_again(tmp_path, monkeypatch, capsys, what, large):
    """A large store is read whole only if its files have changed, which they have."""
    monkeypatch.setattr(digests, "_SETTLED", -1.0)
    if large:
        monkeypatch.setattr(corpus_lib, "_LARGE", 0)
    write(tmp_path / "a.jsonl", "words")
    corpus = prepare(tmp_path, domain_field="kind")
    store = corpus.stores["src", "validation"]
    whole = {name: (store.folder / f"{name}.npy").read_bytes() for name in store.checksums}
    assert capsys.readouterr().err == ""
    spoil(store.folder, what)
    again = prepare(tmp_path, domain_field="kind").stores["src", "validation"]
    said = capsys.readouterr().err
    assert said.startswith(f"src/validation: {store.folder} is damaged (") and said.endswith(
        "), so it is prepared again\n"
    )
    assert said.count("\n") == 1 and again.content == store.content and again.end_of_text == 256
    assert {name: (again.folder / f"{name}.npy").read_bytes() for name in again.checksums} == whole
    prepare(tmp_path, domain_field="kind")
    assert capsys.readouterr().err == ""


def test_a_large_store_is_read_whole_once(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "_SETTLED", -1.0)
    monkeypatch.setattr(corpus_lib, "_LARGE", 0)
    write(tmp_path / "a.jsonl", "words")
    prepare(tmp_path)
    monkeypatch.setattr(corpus_lib, "checksum", lambda path: pytest.fail("read again"))
    prepare(tmp_path)


def test_ids_beyond_the_vocabulary_are_never_written(tmp_path):
    class Odd(tokenizers.BytesTokenizer):
        vocab_size = 100

    documents = lambda: data.documents.Documents([{"text": "zzz", "domain": "d"}])
    with pytest.raises(RuntimeError, match="x: the tokenizer made ids beyond its vocabulary"):
        corpus_lib.prepare_store(tmp_path / "s", documents, Odd(), "x")


# --- the end of a run ------------------------------------------------------------------------------------------------


def test_compressors_read_what_was_prepared(tmp_path):
    """What becomes of the files, or of the whole cache, while a run trains changes no number at its end."""
    write(tmp_path / "a.jsonl", "words")
    corpus = prepare(tmp_path, domain_field="kind")
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()]
    held = [(row["kind"], row["text"]) for row in rows if data.documents.held_out(row["text"], 0.4)]
    write(tmp_path / "a.jsonl", "quite other text")
    assert list(corpus.validation_texts()) == held
    (tmp_path / "a.jsonl").unlink()
    assert list(corpus.validation_texts()) == held
    shutil.rmtree(tmp_path / "cache")
    assert list(corpus.validation_texts()) == held
    made = held_out.compression_bits_per_byte(corpus.validation_texts())
    assert set(made["xz -9"]) == {"a", "b", held_out.TOTAL}
    joined = "".join(text for kind in "ab" for of, text in held if of == kind).encode()
    assert made["gzip -9"][held_out.TOTAL] == 8 * len(gzip.compress(joined, 9)) / len(joined)
