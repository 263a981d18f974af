"""Counts of documents with roles: the bytes and tokens that rows have, and what the user is told of them."""

import dataclasses

import numpy as np
import pytest

from moe_jax import data
from moe_jax.config import DataConfig, SourceConfig
from moe_jax.errors import ConfigError
from moe_jax.evaluate import held_out
from tests.conversations import (
    CHAT,
    CONVERSATIONS,
    PAIR,
    PLAIN,
    TAGGED,
    documents,
    lines,
    prepare,
    tokenizer_folder,
    turns,
)

assert tokenizer_folder  # a fixture
WORDS = "naïve café 数学 🙂 and so on "


def in_rows(rows):
    """(domain id, ids of learned targets) of each document in rows, by the definition."""
    for r in range(len(rows)):
        row = rows[r]
        for k in range(1, row["segment_ids"].max() + 1):
            at = row["segment_ids"] == k
            yield int(row["domain_ids"][at][0]), row["targets"][at & (row["weights"] > 0)].astype(int).tolist()


@pytest.mark.parametrize("kind", ["pairs", "chats"])
def test_bytes_and_text_are_those_of_the_tokens_in_rows(tmp_path, tokenizer_folder, kind):
    """A cut counts to its last complete character, a document that is left out not at all."""
    rows = [
        {"question": "q" * (n % 23) + f"{n}?", "answer": WORDS * (1 + n % 3) + "it is" * (n % 2), "of": f"of {n % 4}"}
        for n in range(40)
    ]
    rows += [{"question": "q" * 300 + f"{n}", "answer": "far away", "of": "long"} for n in range(9)]
    for row in rows:
        row["messages"] = turns(row["question"], row["answer"])
    fields = PAIR if kind == "pairs" else CHAT | {"template": TAGGED, "folder": tokenizer_folder}
    for seq_len in (33, 64, 97, 500):
        check_counts(prepare(tmp_path, rows, seq_len, validation_fraction=0.5, domain_field="of", **fields), seq_len)


def check_counts(corpus, seq_len):
    special = {256, *corpus.tokenizer.special.values()}
    for split, parts in (("train", corpus._train), ("validation", corpus._validation)):
        texts, tokens = [], dict.fromkeys(corpus.domains, 0)
        for domain, ids in (found := list(in_rows(next(iter(parts.values()))))):
            text = corpus.tokenizer.decode([i for i in ids if i not in special]).rstrip("�")
            texts += [(corpus.domains[domain], text)] * bool(text)
            tokens[corpus.domains[domain]] += len(ids)
        size = {name: sum(len(text.encode()) for domain, text in texts if domain == name) for name in corpus.domains}
        stats = {row["domain"]: row for row in corpus.stats() if row["split"] == split}
        assert {name: row["tokens"] for name, row in stats.items()} == {name: tokens[name] for name in stats}
        assert {name: row["bytes"] for name, row in stats.items()} == {name: size[name] for name in stats}
        assert sum(row["documents"] for row in stats.values()) == len(found)
    assert sorted(corpus.validation_texts()) == sorted(texts) and (tokens["of 0"] > 0 or seq_len == 33)
    assert (tokens["long"] > 0) == (seq_len == 500)
    for name, found in zip(corpus.domains, corpus.bytes_per_token, strict=True):
        np.testing.assert_allclose(found, size[name] / tokens[name] if tokens[name] else np.nan)


@pytest.mark.parametrize("template", [TAGGED, PLAIN], ids=["tags", "differences"])
def test_every_byte_of_answers_ends_with_one_token(tmp_path, tokenizer_folder, template):
    rows = [{"messages": messages} for messages in CONVERSATIONS]
    store = prepare(tmp_path, rows, template=template, folder=tokenizer_folder, **CHAT).stores["qa", "train"]
    assert np.add.reduceat(store.sizes, store.offsets[:-1]).tolist() == store.document_bytes.tolist()
    said = ["".join(m["content"] for m in c if m["role"] == "assistant") for c in CONVERSATIONS]
    assert store.document_bytes.tolist() == [len(text.encode()) for text in said]
    assert not store.sizes[store.learned == 0].any()


def test_what_nothing_predicts_is_not_counted(tmp_path):
    template = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    rows = [{"messages": [{"role": "assistant", "content": "abc"}]}]
    store = prepare(tmp_path, rows, template=template, **CHAT).stores["qa", "train"]
    ((ids, learned),) = documents(store)
    assert bytes(ids[:-1].tolist()) == b"abc" and learned.tolist() == [False, True, True, True]
    assert store.document_bytes.tolist() == [2] and store.sizes.tolist() == [0, 1, 1, 0, 0]


def test_the_user_is_told_what_rows_have(tmp_path, tokenizer_folder):
    """Tokens of rows, not of the store; a domain without a row; how documents begin."""
    rows = [{"question": "q" * 9 + f"{n}", "answer": "yes", "of": "short"} for n in range(10, 50)]
    rows += [{"question": "q" * 90 + f"{n}", "answer": "far", "of": "long"} for n in range(20)]
    rows += [{"question": "q" * (90 * (n % 2)), "answer": f"a{n % 2}", "of": "odd"} for n in range(2)]
    fields = {"prompt": "{question}", "completion": "{answer}", "domain_field": "of", "validation_fraction": 0.4}
    corpus = prepare(tmp_path, rows, 16, **fields)
    stats = {(row["split"], row["domain"]): row for row in corpus.stats()}
    train, held = stats["train", "short"], stats["validation", "short"]
    assert stats["train", "long"]["documents"] == stats["train", "long"]["tokens"] == 0 < train["tokens"]
    assert train["tokens"] == 4 * train["documents"] and held["bytes"] == 3 * held["documents"] > 0
    notes = "\n".join(corpus.notes())
    learned, seen = (sum(row[key] for (s, _), row in stats.items() if s == "train") for key in ("tokens", "documents"))
    odd = seen - train["documents"]
    assert f"qa: answers alone, {learned} of {15 * train['documents'] + 3 * odd} tokens are learned, " in notes
    assert f", {4 * held['documents']} of {15 * held['documents']} held-out tokens are evaluated; compressors" in notes
    assert "documents begin with an end-of-text token" in notes and "domain 'long'" not in notes
    chats = [{"messages": turns(f"{n}", "yes")} for n in range(9)]
    told = "\n".join(prepare(tmp_path / "b", chats, template=TAGGED, folder=tokenizer_folder, **CHAT).notes())
    assert "tokens are learned; documents begin as the chat template says" in told
    assert "of the document before" not in told


def test_a_domain_whose_held_out_answers_are_too_far_is_named(tmp_path):
    """Its advice helps, and it is an error where nothing else is evaluated."""
    (tmp_path / "long.jsonl").write_text(
        lines({"question": f"{n}" + "q" * 60, "answer": "far"} for n in range(9)), encoding="utf-8"
    )
    (tmp_path / "short.jsonl").write_text(
        lines({"question": f"{n}", "answer": "near"} for n in range(40)), encoding="utf-8"
    )
    source = lambda name, **more: SourceConfig(kind="files", path=str(tmp_path / f"{name}.jsonl"), **PAIR, **more)
    sources = {
        "long": source("long", weight=0.0, validation_fraction=0.5, domain="all"),
        "short": source("short", validation_fraction=0.0, domain="all"),
    }
    cfg = DataConfig(batch_size=2, seq_len=40, cache_dir=str(tmp_path / "cache"), sources=sources)
    corpus = data.prepare(cfg, workdir=None, seed=1, progress=False)
    rule = r"data\.seq_len=40: must be larger: no held-out document of data\.sources\.long has an answer in its first "
    with pytest.raises(ConfigError, match=rule) as error:
        held_out.check_held_out(corpus)
    count = corpus.stores["long", "validation"].num_documents
    assert corpus.notes()[-1] == (
        "domain 'all' of data.sources.short (40 documents) has no held-out text: its "
        f"{count} held-out documents have no answer in a row; raise data.seq_len"
    )
    enough = int(str(error.value).rsplit("nearest valid: ", 1)[1])
    for seq_len, rows in ((enough, True), (enough - 1, False)):
        made = data.prepare(dataclasses.replace(cfg, seq_len=seq_len), workdir=None, seed=1, progress=False)
        assert bool(made.num_validation_batches()) is rows and bool(made.not_held_out()) is not rows
    held = held_out.EvalResult(("a", "b"), np.ones(2), np.array([1.0, 0.0]), np.array([1.0, np.nan]), (), {}, None)
    assert held_out.table(held, {}).endswith("not evaluated here: b") and "nan" not in held_out.table(held, {})
    part = held_out.table(held._replace(sequences=(2, 5)), {"gzip -9": {}})
    assert part.endswith("2 of 5 sequences are scored here; compressors have all text")
