"""Local files: every row is read, or named; what is left out is counted; a text file becomes documents."""

import csv
import dataclasses
import gzip
import io
import json
import re

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from moe_jax import config, data
from moe_jax.config import DataConfig, SourceConfig
from moe_jax.errors import ConfigError

SHAKESPEARE = "\n\n".join(f"SPEAKER {i}:\n" + "Words, words, words. " * (3 + i % 7) for i in range(2500))


def prepare(tmp_path, contents: dict[str, str | bytes], glob="*", workdir="run", **fields) -> data.Corpus:
    """The corpus of one source `src` of files with these contents."""
    folder = tmp_path / "data"
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        raw = content if isinstance(content, bytes) else content.encode("utf-8")
        (folder / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    source = SourceConfig(kind="files", path=str(folder / glob), **{"validation_fraction": 0.5} | fields)
    cfg = DataConfig(batch_size=2, seq_len=8, cache_dir=str(tmp_path / "cache"), sources={"src": source})
    return data.prepare(cfg, workdir=tmp_path / workdir, seed=0, progress=False)


def counts(corpus: data.Corpus) -> dict[str, int]:
    """Documents by domain, over both splits."""
    found: dict[str, int] = {}
    for row in corpus.stats():
        found[row["domain"]] = found.get(row["domain"], 0) + row["documents"]
    return found


def lines(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def parquet(**columns) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue()


def table(rows: int, **odd: str) -> str:
    """A CSV whose rows are `n,words of n`, but for those in `odd`: r3 is the third after the header, on line 4."""
    return "n,text\n" + "".join(odd.get(f"r{n}", f"{n},words of {n}") + "\n" for n in range(1, rows + 1))


# --- what cannot be read is named ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("a.csv", table(300, r3='3,"never closed'), r"a\.csv:4: the row that begins here opens a quote that"),
        ("a.csv", table(9, r3='3,"open', r6='6,"closed"'), r"a\.csv:4: the row that begins here has text after a clos"),
        ("a.csv.gz", table(9, r7="7,one, two, three"), r"a\.csv\.gz:8: has 4 fields, the header 2; .* needs quotes"),
        ("a.csv", table(9, r2='2,"two\nlines"', r5="5,a,b"), r"a\.csv:7: has 3 fields"),
        ("a.csv", "text,text\na,b\n", r"a\.csv: has the column 'text' more than once"),
        ("a.csv", table(9, r4="4,caf\xe9").encode("latin-1"), r"a\.csv:5: has the byte 0xe9, which is not UTF-8"),
        ("a.jsonl", lines({"text": "a\u2028b"}) + '\n{"text": "\u2028"}\r\n{"text": oops}\n', r"jsonl:4: is not JSON"),
        ("a.jsonl", lines({"text": "a"}) + '{"text": "a", "text": "b"}\n', r"a\.jsonl:2: has the field 'text' more"),
        ("a.jsonl.gz", lines({"text": "a"}) * 3 + "[1]\n", r"a\.jsonl\.gz:4: is list, not an object"),
        ("a.jsonl", lines({"text": "a"}).encode() * 5 + b'{"text": "\xff"}\n', r"a\.jsonl:6: has the byte 0xff"),
        ("a.jsonl", lines({"text": "a"}, {"text": 3}), r"holds int, not text: .*a\.jsonl:2"),
        ("a.jsonl", lines({"txt": "a"}, {"txt": "b"}), r"is not a field of a\.jsonl: txt; nearest valid: 'txt'"),
        ("a.parquet", parquet(n=[1, 2], text=[b"x", b"y"], txt=["", ""])[:-9], r"a\.parquet"),
        ("a.txt", b"fine\nfine\n" + b"caf\xe9", r"a\.txt:3: has the byte 0xe9"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named_by_file_and_line(tmp_path, file, content, says):
    with pytest.raises(ConfigError, match=says) as error:
        prepare(tmp_path, {file: content})
    assert "\n" not in str(error.value) and error.value.name.startswith("data.sources.src.")


def test_all_of_a_good_csv_is_read_as_csv_reads_it(tmp_path):
    """Quotes, line ends inside them, NUL, blank lines, short rows, empty fields too many, another row after each."""
    odd = {"r2": '2,"a ""quoted"", text\r\nof two lines"', "r3": "3,nul\0inside", "r4": "4", "r5": "", "r6": '6,it"s,,'}
    text = table(9, **odd)
    want = [row[1] for row in csv.reader(io.StringIO(text, newline="")) if len(row) > 1][1:]
    corpus = prepare(tmp_path, {"a.csv": text}, validation_fraction=0.9)
    made = [corpus.tokenizer.decode(s.tokens[i + 1 : j]) for s in corpus.stores.values() for i, j in spans(s)]
    assert sorted(made) == sorted(want) and len(want) == 7
    (note,) = corpus.notes()
    assert note.startswith("data.sources.src: rows without text, left out: 1, the first at ")
    assert note.endswith("a.csv:6")  # row 2 takes two lines


def spans(store):
    return zip(store.offsets[:-1], store.offsets[1:], strict=True)


# --- what is left out or changed is counted --------------------------------------------------------------------------


NONE = [None, "web", "", "  ", "web", "é"]


@pytest.mark.parametrize("file", ["a.jsonl", "a.csv", "a.parquet"])
def test_rows_without_text_or_domain(tmp_path, file):
    """A row without text is left out and counted; one without a domain has the source's name. "None" is no domain."""
    texts = [None if n % 6 == 5 else f"text number {n}" for n in range(60)]
    rows = [{"text": text, "kind": NONE[n % 6]} for n, text in enumerate(texts)]
    if file == "a.jsonl":
        rows = [{k: v for k, v in row.items() if v is not None or n % 4} for n, row in enumerate(rows)]
        content, first = lines(*rows), ("a.jsonl:6", "a.jsonl:1")
    elif file == "a.csv":
        body = [f"{row['text'] or ''},{row['kind']}" if row["kind"] is not None else row["text"] or "" for row in rows]
        content, first = "\n".join(["text,kind", *body]), ("a.csv:7", "a.csv:2")
    else:
        content, first = parquet(text=texts, kind=[row["kind"] for row in rows]), ("row 6", "row 1")
    corpus = prepare(tmp_path, {file: content}, domain_field="kind")
    assert counts(corpus) == {"src": 30, "web": 20}
    notes = corpus.notes()
    assert [note.split(", the first")[0] for note in notes] == [
        "data.sources.src: documents without 'kind', assigned to the domain 'src': 30",
        "data.sources.src: rows without text, left out: 10",
    ]
    assert notes[1].endswith(first[0]) and notes[0].endswith(first[1])
    again = prepare(tmp_path, {}, domain_field="kind")  # from the prepared stores
    assert again.notes() == notes


def test_characters_that_are_no_text_are_counted(tmp_path):
    rows = "".join(json.dumps({"text": f"{n} text"}) + "\n" for n in range(30)) + '{"text": "lone \\ud800 half"}\n'
    corpus = prepare(tmp_path, {"a.jsonl": rows})
    (note,) = corpus.notes()
    assert "not Unicode text, replaced by � or ?: 1, the first at " in note and note.endswith("a.jsonl:31")


def test_tfds_documents_without_domain(tmp_path):
    from moe_jax.data.sources import TfdsDocuments

    cfg = SourceConfig(kind="tfds", name="x", domain_field="kind")
    records = [{"text": b"a \xff b", "kind": kind} for kind in (b"", b"web", b" ", None)]
    found = [dict(d) for d in TfdsDocuments(records, cfg, "src", None)]
    assert [d["domain"] for d in found] == ["src", "web", "src", "src"] and all("replaced" in d for d in found)
    labelled = [{"text": b"a", "kind": np.int64(n)} for n in (-1, 1)]
    names = ["zero", "one"].__getitem__
    assert [d["domain"] for d in TfdsDocuments(labelled, cfg, "src", names)] == ["src", "one"]


# --- text files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("documents", "separator", "pieces"),
    [
        ("auto", "", (80, 130)),
        ("file", "", (1, 1)),
        ("blank_lines", "", (2500, 2500)),
        (1000, "", (200, 400)),
        ("separator", "SPEAKER", (2500, 2500)),
    ],
)
def test_a_text_file_becomes_documents(tmp_path, documents, separator, pieces):
    """Nothing is lost but the separators."""
    assert 300_000 < len(SHAKESPEARE) < 400_000
    corpus = prepare(
        tmp_path, {"a.txt": SHAKESPEARE}, documents=documents, separator=separator, validation_fraction=0.9
    )
    (count,) = counts(corpus).values()
    assert pieces[0] <= count <= pieces[1]
    size = sum(row["bytes"] for row in corpus.stats())
    lost = {"separator": 7 * 2500, "blank_lines": 2 * 2499}.get(documents, 0)
    assert size == len(SHAKESPEARE) - lost
    note = corpus.notes()[0]
    assert f": {count:,} documents (documents={documents!r})" in note and note.startswith(
        "data.sources.src: 1 text file"
    )


def test_many_text_files_are_documents(tmp_path):
    corpus = prepare(tmp_path, {f"{n}.txt": f"{n} words\n\n" * 600 for n in range(20)})
    assert counts(corpus) == {"src": 20} and "20 text files, each one document" in corpus.notes()[0]


@pytest.mark.parametrize(
    ("fields", "name", "says"),
    [
        ({"documents": "seperator"}, "documents", "nearest valid|one of auto"),
        ({"documents": 0}, "documents", "must be ≥ 1 or a word"),
        ({"documents": "separator"}, "separator", "is needed for documents='separator'"),
        ({"separator": "x"}, "separator", "has no effect without documents='separator'"),
        ({"documents": "blank_lines", "kind": "tfds", "name": "x"}, "documents", "is for .txt files only"),
        ({"documents": "blank_lines", "glob": "*.jsonl"}, "documents", "has an effect on .txt files only; in a.jsonl"),
    ],
)
def test_settings_of_documents_that_cannot_be(tmp_path, fields, name, says):
    glob = fields.pop("glob", "*.txt")
    with pytest.raises(ConfigError, match=says) as error:
        c = config.default_config()
        c.data.sources = {"src": {"kind": "files", "path": str(tmp_path / "data" / glob), **fields}}
        config.build(c)
        prepare(tmp_path, {"a.jsonl": lines({"text": "a"}), "a.txt": "a"}, glob, **fields)
    assert error.value.name == f"data.sources.src.{name}"


def test_documents_is_a_number_or_a_word_on_the_command_line():
    for given, built in (("500", 500), ("blank_lines", "blank_lines"), ("auto", "auto")):
        c = config.default_config()
        c.data.sources = {"src": config.source(kind="files", path="x")}
        c.data.sources.src.documents = given
        cfg = config.build(c)
        assert cfg.data.sources["src"].documents == built and config.build(config.to_dict(cfg)) == cfg


def test_a_run_from_before_keeps_its_documents():
    """The field's metadata gives what a config.json without it meant."""
    (field,) = [f for f in dataclasses.fields(SourceConfig) if f.name == "documents"]
    assert field.metadata["was"] == "file" and field.default == "auto"


# --- held-out text ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("contents", "fields"),
    [
        ({"a.txt": "a short text\n" * 90}, {"validation_fraction": 0.05}),
        ({"a.txt": "a short text\n" * 90}, {"validation_fraction": 0.0}),
        ({"a.jsonl": lines(*({"text": f"{n} words"} for n in range(12)))}, {"validation_fraction": 0.02}),
        ({"a.jsonl": lines(*({"text": f"{n} words"} for n in range(12)))}, {"validation_fraction": 0.0}),
    ],
)
def test_a_domain_without_held_out_text_is_named_and_the_advice_helps(tmp_path, contents, fields):
    corpus = prepare(tmp_path, contents, **fields)
    line = corpus.notes()[-1]
    many = "one document" if "a.txt" in contents else "12 documents"
    assert line.startswith(f"domain 'src' of data.sources.src ({many}) has no held-out text: ")
    for _ in range(2):  # the second advice may be about the documents that the first made
        told = dict(re.findall(r"data\.sources\.src\.(\w+)=([\d.]+)", line))
        fields |= {name: json.loads(value) for name, value in told.items()}
        corpus = prepare(tmp_path, {}, **fields)
        if not corpus.not_held_out():
            break
        line = corpus.notes()[-1]
    assert told and not corpus.not_held_out() and corpus.num_validation_batches() > 0
