"""Documents with roles: which tokens are learned, and how documents lie in rows."""

import dataclasses
import json
import pickle

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from test_begin_of_text import sentencepiece_model

from moe_jax import data
from moe_jax.config import DataConfig, SourceConfig, TokenizerConfig
from moe_jax.data import chat, packing, sources, tokenizers
from moe_jax.errors import ConfigError
from tests.conversations import (
    CHAT,
    CONVERSATIONS,
    PAIR,
    PLAIN,
    ROW,
    TAGGED,
    documents,
    lines,
    prepare,
    refused,
    tokenizer_folder,
    turns,
)

assert tokenizer_folder  # a fixture


assert sentencepiece_model  # a fixture

# --- which tokens are learned ----------------------------------------------------------------------------------------


def test_a_completion_and_its_end_are_learned(tmp_path):
    rows = [{"question": f"what is {n}?", "answer": f"it is é {n}"} for n in range(9)]
    store = prepare(tmp_path, rows, **PAIR).stores["qa", "train"]
    for row, (ids, learned) in zip(rows, documents(store), strict=True):
        decode = tokenizers.BytesTokenizer().decode
        assert ids[0] == ids[-1] == 256 and learned[-1] and not learned[0]
        assert decode(ids[~learned]) == f"Q: {row['question']}\nA:" and decode(ids[learned]) == f" {row['answer']}"
    assert store.document_bytes.tolist() == [len(f" {row['answer']}".encode()) for row in rows]
    assert store.targets_per_document().tolist() == [n + 1 for n in store.document_bytes]


def test_a_sample_begins_with_a_prompt_that_fits_into_a_row(tmp_path):
    """Memory for a longer one may be lacking at the end of a run."""
    rows = [{"question": f"{n}{'x' * 500 * (n < 10)}?", "answer": "no"} for n in range(20)]
    made = {s: prepare(tmp_path, rows, s, validation_fraction=0.5, **PAIR).beginning() for s in (600, 64)}
    decode = tokenizers.BytesTokenizer().decode
    assert len(made[600]) > 500 and decode(made[64]).endswith("?\nA:")
    assert made[64][0] == 256 and len(made[64]) < 20


def test_a_pair_is_encoded_as_one_text(tmp_path, tokenizer_folder):
    """begin_of_text is in front, once; a token of both is learned, and counted; text makes no special token."""
    cfg = TokenizerConfig(kind="huggingface", path=str(tokenizer_folder / "tokenizer.json"), begin_of_text="<s>")
    rows = [{"question": "hello <s> ", "answer": "answer<|im_end|>"}, {"question": "so", "answer": " an answer"}]
    fields = {"prompt": "{question}", "completion": "{answer}"}
    corpus = prepare(tmp_path, rows, tokenizer=cfg, **fields)
    (one, two), tokenizer = documents(corpus.stores["qa", "train"]), corpus.tokenizer
    special = set(tokenizer.special.values())
    for (ids, _), row in zip((one, two), rows, strict=True):
        assert ids[0] == tokenizer.begin_of_text and ids[-1] == tokenizer.end_of_text
        assert not special & set(ids[1:-1].tolist())
        assert tokenizer.decode(ids) == row["question"] + row["answer"]
        assert ids[1:-1].tolist() == tokenizer.encode([row["question"] + row["answer"]])[0].tolist()
    assert tokenizer.decode(one[0][one[1]]) == " answer<|im_end|>"  # the space before it belongs to one token
    assert tokenizer.decode(two[0][two[1]]) == " an answer"
    assert "qa/train: documents in which one token is the end of the prompt and the beginning of the answer; it is " \
        "learned: 1" in corpus.notes()  # fmt: skip


@pytest.mark.parametrize("template", [TAGGED, PLAIN], ids=["tags", "differences"])
def test_masks_are_those_of_transformers(tmp_path, tokenizer_folder, template):
    """Ten conversations. Without tags: what is rendered after the prompt of an answer, up to the token that ends it."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    rows = [{"messages": messages} for messages in CONVERSATIONS]
    corpus = prepare(tmp_path, rows, template=template, folder=tokenizer_folder, **CHAT)
    found = list(documents(corpus.stores["qa", "train"]))
    assert len(found) == len(CONVERSATIONS) == 10
    for messages, (ids, learned) in zip(CONVERSATIONS, found, strict=True):
        answers = [m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant"]
        joined = "".join(answers)  # one token has the line ends before and in the last of them
        assert theirs.decode(ids[learned]) in (joined, "\n" * joined.startswith("\n") + joined)
        options = {"chat_template": template, "return_dict": True}
        if template is TAGGED:
            want = theirs.apply_chat_template(messages, return_assistant_tokens_mask=True, **options)
            mask = want["assistant_masks"]
        else:
            want = theirs.apply_chat_template(messages, return_offsets_mapping=True,
                                              tokenizer_kwargs={"return_offsets_mapping": True}, **options)  # fmt: skip
            mask = np.zeros(len(want["input_ids"]), int)
            text = lambda part, **more: theirs.apply_chat_template(part, chat_template=template, tokenize=False, **more)
            for i, message in enumerate(messages):
                if message["role"] == "assistant":
                    begin = len(text(messages[:i], add_generation_prompt=True))
                    end = len(text(messages[: i + 1])) - 1  # without the line end
                    mask |= [a < end and b > begin for a, b in want["offset_mapping"]]
        assert ids.tolist() == want["input_ids"] and learned.tolist() == [bool(m) for m in mask]
    assert ids[0] == corpus.tokenizer.special["<s>" if template is TAGGED else "<|im_start|>"]


def test_an_answer_without_an_end_gets_one(tmp_path):
    """Plain text has no special token that says so; the bytes of answers are those of their text."""
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}" \
               "{% if add_generation_prompt %}assistant: {% endif %}"  # fmt: skip
    corpus = prepare(tmp_path, [{"messages": turns("hi", "é")}], template=template, **CHAT)
    ((ids, learned),) = documents(corpus.stores["qa", "train"])
    assert ids[-1] == 256 and learned[-1] and corpus.tokenizer.decode(ids[learned]) == "é\n"
    assert corpus.stores["qa", "train"].document_bytes.tolist() == [3]


def test_messages_of_every_file_format_are_the_same(tmp_path, tokenizer_folder):
    """Parquet has a null for every key that another message has; CSV has JSON in a cell; ShareGPT's names are not."""
    rows = [{"messages": m} for m in CONVERSATIONS[:3]]
    rows[0]["messages"][0] = {**rows[0]["messages"][0], "name": "Ada"}
    made = []
    for file in ("a.jsonl", "a.parquet", "a.csv"):
        folder = tmp_path / file
        folder.mkdir()
        if file == "a.parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / file)
        elif file == "a.csv":
            cells = [json.dumps(row["messages"]).replace('"', '""') for row in rows]
            (folder / file).write_text("messages\n" + "".join(f'"{cell}"\n' for cell in cells), encoding="utf-8")
        given = rows if file == "a.jsonl" else None
        store = prepare(folder, given, file=file, template=TAGGED, folder=tokenizer_folder, **CHAT).stores[
            "qa", "train"
        ]
        made.append([(ids.tolist(), learned.tolist()) for ids, learned in documents(store)])
    assert made[0] == made[1] == made[2]


def test_tfds_rows(tmp_path):
    """Bytes, numbers of NumPy, a conversation as a dict of columns; characters that are replaced are marked."""
    record = {"question": b"a \xff b", "answer": np.int64(42)}
    (made,) = sources.TfdsDocuments([record], SourceConfig(name="x", **PAIR), "qa", None)
    assert (made["text"], made["answers"]) == ("Q: a \ufffd b\nA: 42", [(11, 14)]) and "replaced" in made
    columns = {"role": np.array([b"user", b"assistant"], object), "content": np.array([b"hi", b"yes"], object)}
    (made,) = sources.TfdsDocuments([{"messages": columns}], SourceConfig(name="x", **CHAT), "qa", None)
    assert made["messages"] == turns("hi", "yes") and "replaced" not in made


def test_a_sentencepiece_tokenizer(tmp_path, sentencepiece_model):
    """Text is encoded in one piece, so the completion gets no space in front of it."""
    cfg = TokenizerConfig(kind="sentencepiece", path=str(sentencepiece_model), end_of_text="</s>", begin_of_text="<s>")
    rows = [{"q": "the quick fox", "a": "jumps 12%"}]
    corpus = prepare(tmp_path, rows, tokenizer=cfg, prompt="{q} ", completion="{a}")
    ((ids, learned),) = documents(corpus.stores["qa", "train"])
    tokenizer = corpus.tokenizer
    assert ids.tolist() == [1, *tokenizer.encode(["the quick fox jumps 12%"])[0], 2]
    assert tokenizer.decode(ids[learned][:-1]).startswith("jumps 12") and learned[-1]
    assert corpus.stores["qa", "train"].lost_bytes == {"qa": 1}
    refused("a SentencePiece model reads the special tokens of a template as letters", tmp_path / "chat",
            [{"messages": turns("a", "b")}], tokenizer=cfg, template=PLAIN, name="messages_field", **CHAT)  # fmt: skip


def test_what_is_odd_is_said_once(tmp_path, tokenizer_folder):
    rows = [{"messages": turns("say <|im_end|>", "no")}, {"messages": turns("a", "b")}]
    template = TAGGED.replace("{{ bos_token }}", "{{ strftime_now('%d %b %Y') }}")
    corpus = prepare(tmp_path, rows, template=template, folder=tokenizer_folder, **CHAT)
    notes = "\n".join(corpus.notes())
    assert "whose messages spell special tokens, which become these tokens, as in transformers: 1" in notes
    assert (
        "last answer does not end with '<|endoftext|>', at which samples end (data.tokenizer.end_of_text): 2" in notes
    )
    assert "asks for the date, which is 26 July 2024 for every document" in notes
    assert "data.sources.qa: answers alone, " in notes
    ids, _ = next(documents(corpus.stores["qa", "train"]))
    assert corpus.tokenizer.decode(ids).startswith("26 Jul 2024<|im_start|>")


# --- rows ------------------------------------------------------------------------------------------------------------


def test_best_fit():
    placed, count = packing.best_fit([6, 5, 4, 5, 10, 1, 3], 10)
    assert placed.tolist() == [0, 1, 0, 1, 2, 3, 3] and count == 4
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 65, 3000)
    placed, count = packing.best_fit(sizes.tolist(), 64)
    filled = np.bincount(placed, sizes, count)
    assert filled.max() <= 64 and len(filled) == count and filled.mean() > 0.97 * 64
    assert packing.best_fit([], 8)[1] == 0


def brute(store, seq_len):
    """By document: rows of (token, target, weight, position), one token at a time."""
    for ids, learned in documents(store):
        yield [(ids[i], ids[i + 1], float(learned[i + 1]), i) for i in range(min(len(ids) - 1, seq_len))]


@pytest.mark.parametrize("seq_len", [20, 33, 64, 500])
@pytest.mark.parametrize("seed", [None, 3])
def test_rows_hold_complete_documents(tmp_path, seq_len, seed):
    rows = [{"question": "q" * (n % 11), "answer": "answer " * (1 + n % 7)} for n in range(60)]
    store = prepare(tmp_path, rows, **PAIR, seq_len=500).stores["qa", "train"]
    packed = data.WholeRows(store, seq_len, seed, name="qa")
    want = [tuple(part) for part in brute(store, seq_len)]
    found = []
    for r in range(len(packed)):
        row = packed[r]
        segments = row["segment_ids"]
        used = int((segments > 0).sum())
        assert (segments[:used] > 0).all() and not row["weights"][used:].any()
        assert all(len(values) == seq_len for values in row.values())
        for k in range(1, segments.max() + 1):
            at = segments == k
            names = ("tokens", "targets", "weights", "positions")
            found.append(tuple(zip(*(row[name][at].tolist() for name in names), strict=True)))
    long = [w for w in want if not any(weight for _, _, weight, _ in w)]
    assert sorted(found) == sorted(w for w in want if w not in long)
    assert packed.left_out == len(long) and packed.cut == sum(len(i) > seq_len + 1 for i, _ in documents(store))
    again = pickle.loads(pickle.dumps(packed))
    assert all((again[0][name] == packed[0][name]).all() for name in packed[0])
    others = [data.WholeRows(store, seq_len, other, name="qa") for other in (3, 4)]
    assert any((others[0][r]["tokens"] != others[1][r]["tokens"]).any() for r in range(len(packed)))
    with pytest.raises(IndexError):
        packed[len(packed)]


def test_a_document_that_fits_is_not_cut_and_a_longer_one_is_counted(tmp_path):
    rows = [{"question": "q", "answer": "a" * n} for n in (3, 20, 23, 24, 60)] + [{"question": "q" * 90, "answer": "a"}]
    fields = {"prompt": "{question}", "completion": "{answer}"}
    corpus = prepare(tmp_path, rows, seq_len=25, **fields)  # [end] q a…a [end]: 26 tokens with 23 a
    (line,) = [note for note in corpus.notes() if "cut" in note]
    assert line == (
        "qa/train: 5 documents in 5 rows of 25 tokens, 81.6 % full; 3 of 6 documents have more than 26 tokens "
        "(data.seq_len + 1) and are cut: 40 tokens of answers are not learned; without an answer left and so "
        "left out: 1"
    )
    notes = prepare(tmp_path / "b", rows, seq_len=100, **fields).notes()
    assert "qa/train: 6 documents in 3 rows of 100 tokens" in "\n".join(notes) and "cut" not in "\n".join(notes)
    refused("no document of data.sources.qa has an answer in its first 3 tokens", tmp_path / "c", rows[-1:], seq_len=2,
            **fields)  # fmt: skip


def test_batches_are_mixed_with_plain_text_and_the_same_for_processes_and_workers(tmp_path):
    (tmp_path / "plain.txt").write_text("some words to read\n\n" * 90, encoding="utf-8")
    (tmp_path / "a.jsonl").write_text(
        lines({"question": f"{n}?", "answer": f"{n * n}" * (n % 5 + 1)} for n in range(80)), encoding="utf-8"
    )
    kinds = {
        "qa": SourceConfig(kind="files", path=str(tmp_path / "a.jsonl"), validation_fraction=0.3, **PAIR),
        "plain": SourceConfig(kind="files", path=str(tmp_path / "plain.txt"), documents=100, validation_fraction=0.3),
    }
    cfg = DataConfig(batch_size=4, seq_len=48, cache_dir=str(tmp_path / "cache"), sources=kinds)
    corpus = data.prepare(cfg, workdir=tmp_path / "run", seed=1, progress=False)
    iterator = corpus.train_iterator(range(4))
    batches = [next(iterator) for _ in range(5)]
    workers = data.prepare(dataclasses.replace(cfg, num_workers=1), workdir=tmp_path / "run", seed=1, progress=False)
    part = workers.train_iterator((1, 3))
    for batch in batches:
        other = next(part)
        assert all((batch[name][[1, 3]] == other[name]).all() for name in batch)
        qa = batch["domain_ids"][:, 0] == corpus.domains.index("qa")
        assert qa.sum() == 2 and batch["weights"][~qa].all() and 0.1 < batch["weights"][qa].mean() < 0.8
    part.close(), iterator.close()
    resumed = corpus.train_iterator(range(4))
    resumed.set_state(iterator.get_state() | {"batches": 3})
    again = next(resumed)
    assert all((batches[3][name] == again[name]).all() for name in again)
    resumed.close()
    learned = sum(b["weights"].sum() for b in corpus.validation_batches(range(4)))
    stats = [row for row in corpus.stats() if row["split"] == "validation"]
    assert learned == sum(row["tokens"] for row in stats)


def test_documents_with_the_same_prompt_are_on_one_side(tmp_path):
    rows = [{"question": f"q{n % 40}", "answer": f"a{n}", "messages": turns(f"q{n % 40}", f"a{n}")} for n in range(200)]
    for fields in (PAIR, CHAT | {"template": PLAIN}):
        folder = tmp_path / str(len(fields))
        sides = prepare(folder, rows, validation_fraction=0.3, **fields)._sources["qa"]
        train, held = ({d["text"].split("a")[0] for d in sides.documents(split)} for split in sources.SPLITS)
        assert not train & held and len(train) > 20 and len(held) > 4


def test_two_sources_of_a_file_make_the_same_documents(tmp_path):
    """Else the prompt that one holds out is trained on by the other."""
    (tmp_path / "a.jsonl").write_text(lines([ROW]), encoding="utf-8")
    one, other = (SourceConfig(kind="files", path=str(tmp_path / "a.jsonl"), **f) for f in (PAIR, {"text_field": "q"}))
    for pair in ((one, other), (other, one)):
        cfg = DataConfig(sources=dict(zip("ab", pair, strict=True)), cache_dir=str(tmp_path / "cache"))
        with pytest.raises(
            ConfigError, match=r"sources\.b\.\w+=.*: makes other documents of .*a\.jsonl than data\.sou"
        ):
            sources.check_sources(cfg)
    same = dataclasses.replace(one, weight=2.0)
    sources.check_sources(DataConfig(sources={"a": one, "b": same}, cache_dir=str(tmp_path / "cache")))


def test_the_store_follows_the_templates(tmp_path, tokenizer_folder):
    rows = [{"messages": turns("a", "b"), "question": "q", "answer": "a"}] * 2
    where = lambda **fields: prepare(tmp_path, rows, folder=tokenizer_folder, **fields).stores["qa", "train"].folder
    found = [where(**CHAT, template=PLAIN), where(**CHAT, template=TAGGED), where(**PAIR)]
    found += [where(prompt="{question}", completion="{answer}")]
    assert len(set(found)) == 4 and where(**CHAT, template=PLAIN) == found[0]


def test_which_of_several_templates(tmp_path, tokenizer_folder):
    """A .jinja file is before tokenizer_config.json; "default" is taken; a name asks for another; a run keeps them."""
    raw = lambda text: {"tokenizer_config.json": json.dumps({"chat_template": text}).encode()}
    own = lambda text, **files: chat.of_tokenizer(raw(text) | {name: value.encode() for name, value in files.items()})
    assert own("x") == {"default": "x"} and own(None) == {}
    assert own([{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}])["tool_use"] == "b"
    assert own("x", **{"chat_template.jinja": "y", "additional_chat_templates/rag.jinja": "z"}) == {
        "default": "y", "rag": "z",
    }  # fmt: skip
    with pytest.raises(Exception, match="neither text nor a list"):
        own([{"name": 3}])
    folder = tmp_path / "tokenizer"
    (folder / "additional_chat_templates").mkdir(parents=True)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((tokenizer_folder / file).read_bytes())
    (folder / "additional_chat_templates" / "rag.jinja").write_text(TAGGED, encoding="utf-8")
    rows = [{"messages": turns("a", "b")}]
    refused("must name one of the tokenizer's templates: rag; nearest valid: 'rag'", tmp_path / "a", rows,
            folder=folder, **CHAT, name="chat_template")  # fmt: skip
    assert prepare(tmp_path / "a", rows, folder=folder, **CHAT, chat_template="rag").stores
    assert (tmp_path / "a" / "run" / "additional_chat_templates" / "rag.jinja").read_text("utf-8") == TAGGED


def test_a_run_keeps_the_only_template(tmp_path, tokenizer_folder):
    """An export has the template of training; the tokenizer stays what it was."""
    corpus = prepare(tmp_path, [{"messages": turns("a", "b")}], template=PLAIN, folder=tokenizer_folder, **CHAT)
    corpus.keep_tokenizer(tmp_path / "new")
    assert (tmp_path / "new" / "chat_template.jinja").read_text("utf-8") == PLAIN
    assert data.load_tokenizer(tmp_path / "new").fingerprint == corpus.tokenizer.fingerprint
