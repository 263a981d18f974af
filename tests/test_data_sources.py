"""Data: tokenizers, local files, TFDS, users' mistakes."""

import ast
import csv
import dataclasses
import gzip
import io
import json
import math
import os
import subprocess
import sys
import tokenize
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece
import tokenizers as hf_tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax import data
from moe_jax.config import DataConfig, SourceConfig, TokenizerConfig
from moe_jax.data import corpus as corpus_lib
from moe_jax.data import documents, files, sources, stdlib_text, tokenizers
from moe_jax.errors import ConfigError

SAMPLE = "def add(a, b):\n    return a + b\n\n# naïve café, 数学, 🙂\n" * 20


# --- tokenizers ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bpe():
    return tokenizers.train_bpe([SAMPLE, "hello hello world <|endoftext|>\n\t  x" * 30], 300)


def json_tokenizer(*special, ordinary=()):
    made = hf_tokenizers.Tokenizer(hf_tokenizers.models.BPE())
    made.pre_tokenizer = hf_tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = hf_tokenizers.decoders.ByteLevel()
    alphabet = sorted(hf_tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = hf_tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([SAMPLE], trainer)
    made.add_special_tokens(list(special))
    made.add_tokens(list(ordinary))
    return made.to_str().encode()


TEXTS = st.one_of(
    st.text(max_size=80),
    st.lists(st.sampled_from(["<|endoftext|>", "<|end", "oftext|>", " ", "\n", "\r", "\x00", "hello", "🙂"])).map(
        "".join
    ),
)


@settings(max_examples=150, deadline=None)
@given(TEXTS)
def test_encoding_is_exact_and_never_makes_end_of_text(bpe, text):
    hf = tokenizers.JsonTokenizer(json_tokenizer(ordinary=["<|endoftext|>"]), "", "")
    for tokenizer in (tokenizers.BytesTokenizer(), bpe, hf):
        (ids,) = tokenizer.encode([text])
        assert ids.dtype == np.int32 and tokenizer.end_of_text not in ids
        assert len(ids) == 0 or (0 <= ids.min() and ids.max() < tokenizer.vocab_size)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([tokenizer.end_of_text, *ids]) == text


def test_trained_bpe_is_the_same_in_another_process(bpe):
    code = (
        "import sys; from moe_jax.data.tokenizers import train_bpe;"
        "a, b = sys.stdin.buffer.read().decode().split('\\0'); print(train_bpe([a, b], 300).fingerprint)"
    )
    texts = "\0".join([SAMPLE, "hello hello world <|endoftext|>\n\t  x" * 30])
    env = {"PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "1", "PYTHONPATH": ":".join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", code], input=texts.encode(), env=env, capture_output=True, check=True)
    assert done.stdout.decode().strip() == bpe.fingerprint
    assert bpe.vocab_size == 300 and len(bpe.encode([SAMPLE])[0]) < 0.8 * len(SAMPLE.encode())


@pytest.mark.parametrize("name", tokenizers._USUAL_NAMES)
def test_huggingface_finds_end_of_text(name):
    made = tokenizers.JsonTokenizer(json_tokenizer("<pad>", name), "", "")
    assert made.end_of_text == made.vocab_size - 1
    text = f"a {name} b{name} <pad>"
    (ids,) = made.encode([text])
    assert max(ids) < made.vocab_size - 2  # letters, no special token
    assert made.decode(ids) == text


def test_huggingface_without_end_of_text_lists_the_candidates():
    with pytest.raises(ConfigError, match=r"data\.tokenizer\.end_of_text.*<pad>, <stop>"):
        tokenizers.JsonTokenizer(json_tokenizer("<stop>", "<pad>"), "", "")
    assert tokenizers.JsonTokenizer(json_tokenizer("<stop>"), "<stop>", "").decode([0]) != ""
    with pytest.raises(ConfigError, match="is not a tokenizer"):
        tokenizers.JsonTokenizer(b"{}", "", "x.json")


def test_sentencepiece_and_the_run_directory(tmp_path):
    (tmp_path / "text.txt").write_text(SAMPLE * 5, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "m"), vocab_size=60, character_coverage=1.0,
        user_defined_symbols=["<|endoftext|>"], minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    for name in ("", "</s>"):
        cfg = TokenizerConfig(kind="sentencepiece", path=str(tmp_path / "m.model"), end_of_text=name)
        workdir = tmp_path / f"run{bool(name)}"
        made = tokenizers.load_or_make(cfg, workdir, None)
        (ids,) = made.encode(["return a + b <|endoftext|> </s> a"])
        assert made.end_of_text not in ids and len(ids) > 5
        assert made.decode(made.encode(["return a + b"])[0]) == "return a + b"
        kept = data.load_tokenizer(workdir)
        assert (kept.fingerprint, kept.end_of_text) == (made.fingerprint, made.end_of_text)
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(ConfigError, match="not a SentencePiece model"):
        tokenizers.load_or_make(dataclasses.replace(cfg, path=str(tmp_path / "bad.model")), tmp_path / "other", None)


# --- local files -----------------------------------------------------------------------------------------------------


def write(path, texts):
    rows = [{"text": t, "kind": f"k{i % 2}"} for i, t in enumerate(texts)]
    opener = gzip.open if path.suffix == ".gz" else open
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return
    with opener(path, "wt", encoding="utf-8", newline="") as file:
        if name.endswith(".jsonl"):
            file.write("\n".join(json.dumps(r) for r in rows) + "\n\n")
        else:
            writer = csv.DictWriter(file, ["text", "kind"])
            writer.writeheader()
            writer.writerows(rows)


def read_all(**fields):
    source = files.FilesSource("src", SourceConfig(kind="files", **fields))
    return [source.documents(split)[i] for split in sources.SPLITS for i in range(len(source.documents(split)))]


@pytest.mark.parametrize("extension", [".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".parquet"])
def test_records_of_every_format(tmp_path, extension):
    texts = ["plain", 'quoted "x", and a comma', "two\nlines", "数学 🙂", "x" * 200_000]
    write(tmp_path / f"d{extension}", [*texts, "  \n"])  # the blank document is left out
    found = read_all(path=str(tmp_path / f"d{extension}"), domain_field="kind")
    assert {(d["text"], d["domain"]) for d in found} == {(t, f"k{i % 2}") for i, t in enumerate(texts)}
    assert {d["domain"] for d in read_all(path=str(tmp_path / f"d{extension}"))} == {"src"}
    assert {d["domain"] for d in read_all(path=str(tmp_path / f"d{extension}"), domain="z", domain_field="no")} == {"z"}


def test_text_files_globs_and_large_files(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "one.txt").write_text("first\n\nparagraph", encoding="utf-8")
    with gzip.open(tmp_path / "sub" / "two.txt.gz", "wt", encoding="utf-8") as file:
        file.write("second")
    found = read_all(path=str(tmp_path / "**" / "*.txt*"), validation_fraction=0.0)
    assert [d["text"] for d in found] == ["first\n\nparagraph", "second"]

    rng = np.random.default_rng(0)
    large = "\n\n".join(" ".join(rng.choice(["alpha", "δelta", "x=1\n"], 40)) for _ in range(6000))
    (tmp_path / "large.txt").write_text(large, encoding="utf-8")
    source = files.FilesSource("s", SourceConfig(kind="files", path=str(tmp_path / "large.txt")))
    sizes = [len(d["text"]) for split in sources.SPLITS for d in source.documents(split)]
    assert sum(sizes) == len(large) and max(sizes) < 50_000 and np.median(sizes) > 10_000
    assert 0 < len(source.documents("validation")) < 0.3 * len(sizes)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab\n"), st.integers(0, 60_000)), max_size=12))
def test_cutting_a_text_loses_nothing(parts):
    text = "".join(c * n if c != "\n" else "\n" * (n % 4) for c, n in parts)
    pieces = documents.split_text(text)
    assert "".join(pieces) == text and all(0 < len(p) <= 60_000 for p in pieces)


def test_text_that_is_not_unicode_can_be_encoded(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "lone \\ud800 surrogate"}\n', encoding="utf-8")
    (document,) = read_all(path=str(tmp_path / "a.jsonl"))
    assert document["text"] == "lone ? surrogate" and documents.as_text(b"a\xffb") == "a\ufffdb"


def test_the_store_follows_data_and_tokenizer(tmp_path, bpe):
    path = tmp_path / "a.txt"
    path.write_text("one", encoding="utf-8")
    opened = lambda **k: files.FilesSource("s", SourceConfig(kind="files", path=str(path), **k))
    where = lambda source, split, tok: corpus_lib.store_folder(tmp_path, source.identity(split), tok)
    plain = tokenizers.BytesTokenizer()
    first = where(opened(), "train", plain)
    assert first == where(opened(weight=5.0), "train", plain)
    path2 = [
        where(opened(), "validation", plain),
        where(opened(), "train", bpe),
        where(opened(domain="d"), "train", plain),
    ]
    for text, time in (("two!", 1), ("four", 2)):
        path.write_text(text, encoding="utf-8")
        os.utime(path, (time, time))
        path2.append(where(opened(), "train", plain))
    assert len({first, *path2}) == 6


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "name", "says"),
    [
        ({"path": "{}/a.jsnl"}, "path", "a.jsonl"),
        ({"path": "{}/none/**/*.txt"}, "path", "matches no file"),
        ({"path": "{}"}, "path", r"\*\*/\*.txt"),
        ({"path": "{}/odd.json"}, "path", "'.jsonl'"),
        ({"path": "{}/ok.txt", "domain_field": "lang"}, "domain_field", "ok.txt has no fields"),
        ({"kind": "tfds", "name": "stdlib_txt"}, "name", "'stdlib_text'"),
        ({"kind": "tfds", "name": "c4x/en:9.9.9"}, "name", "neither known to TFDS nor prepared"),
    ],
)
def test_check_sources_names_the_mistake(tmp_path, fields, name, says):
    for file in ("a.jsonl", "odd.json", "ok.txt"):
        (tmp_path / file).write_text("{}", encoding="utf-8")
    fields = {"kind": "files"} | {k: v.format(tmp_path) for k, v in fields.items()}
    cfg = DataConfig(cache_dir=str(tmp_path), sources={"mine": SourceConfig(**fields)})
    with pytest.raises(ConfigError, match=says) as error:
        data.check_sources(cfg)
    assert error.value.name == f"data.sources.mine.{name}" and "\n" not in str(error.value)


def test_check_sources_reads_no_document(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("x", encoding="utf-8")
    monkeypatch.setattr(files.FilesSource, "documents", lambda *_: pytest.fail("read"))
    local = SourceConfig(kind="files", path=str(tmp_path / "a.txt"))
    cfg = DataConfig(cache_dir=str(tmp_path), sources={"a": local, "std": SourceConfig(name="stdlib_text")})
    data.check_sources(cfg)
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]  # nothing prepared
    with pytest.raises(ConfigError, match=r"data\.tokenizer\.path"):
        tokenizer = TokenizerConfig(kind="huggingface", path=str(tmp_path / "no.json"))
        data.check_sources(dataclasses.replace(cfg, tokenizer=tokenizer))


@pytest.mark.parametrize(
    ("file", "text", "fields", "name", "says"),
    [
        ("m.jsonl", '{"txt": "a", "n": 1}', {}, "text_field", "txt, n; nearest valid: 'txt'"),
        ("m.jsonl", '{"text": "a", "lang": "x"}', {"domain_field": "lng"}, "domain_field", "nearest valid: 'lang'"),
        ("m.jsonl", '{"text": 3}', {}, "text_field", "holds int"),
        ("m.jsonl", "{nonsense", {}, "path", "cannot be read"),
        ("m.jsonl", "[1]", {}, "path", "not an object"),
        ("m.csv", "a,b\n1,2\n", {}, "text_field", "a, b"),
        ("m.parquet", "no parquet", {}, "path", "cannot be read"),
        ("m.txt.gz", "no gzip", {}, "path", "cannot be read"),
    ],
)
def test_unreadable_files_and_missing_fields(tmp_path, file, text, fields, name, says):
    (tmp_path / file).write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=says) as error:
        read_all(path=str(tmp_path / file), **fields)
    assert error.value.name == f"data.sources.src.{name}" and "\n" not in str(error.value)


def test_missing_parquet_field_names_the_columns(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"], "lang": ["x"]}), tmp_path / "m.parquet")
    with pytest.raises(ConfigError, match=r"text_field='text': is not a field of m\.parquet: body, lang"):
        read_all(path=str(tmp_path / "m.parquet"))


# --- stdlib_text -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "module", ["argparse", "textwrap", "dataclasses", "email.message", "decimal", "typing", "heapq"]
)
def test_docstrings_are_cut_out_and_nothing_else(module):
    path = stdlib_text.roots()[0] / (("_pydecimal" if module == "decimal" else module.replace(".", "/")) + ".py")
    source = path.read_text(encoding="utf-8")
    code, docstrings = stdlib_text.split_docstrings(source)
    assert docstrings and all(len(d) >= stdlib_text.MIN_DOCSTRING for d in docstrings)

    def tree(text, cut):
        made = ast.parse(text)
        for node in ast.walk(made):
            if cut and isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                if len(ast.get_docstring(node) or "") >= stdlib_text.MIN_DOCSTRING:
                    node.body = node.body[1:] or ([] if isinstance(node, ast.Module) else [ast.Pass()])
        return ast.dump(made)

    assert tree(code, False) == tree(source, True)
    read = lambda text: tokenize.generate_tokens(io.StringIO(text).readline)
    comments = [[t.string for t in read(text) if t.type == tokenize.COMMENT] for text in (source, code)]
    assert comments[0] == comments[1] != []


def test_a_form_feed_ends_no_line():
    doc = "word " * 50
    source = f'a = 1\n\x0c\nb = "\x0c \u2028"\ndef f():\n    """{doc}"""\nc = 2\n'
    code, docstrings = stdlib_text.split_docstrings(source)
    assert docstrings == [doc.strip()]
    assert code == source.replace(f'"""{doc}"""', "pass")


def test_two_pythons_do_not_share_a_dataset(tmp_path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "os.py").write_text("x = 1\n" * (100 if name == "one" else 101), encoding="utf-8")
    names = set()
    for name, version in (("one", (3, 11, 7)), ("two", (3, 11, 7)), ("one", (3, 13, 0))):
        monkeypatch.setattr(stdlib_text, "roots", lambda name=name: (tmp_path / name, tmp_path / "no headers"))
        fake = SimpleNamespace(version_info=(*version, "final", 0), implementation=SimpleNamespace(name="cpython"))
        monkeypatch.setattr(stdlib_text, "sys", fake)
        names.add(stdlib_text.identity())
    monkeypatch.undo()
    assert len(names) == 3 and all(n.startswith(("cpython-3.11.7-", "cpython-3.13.0-")) for n in names)
    built = stdlib_text.StdlibText(data_dir=str(tmp_path))
    assert stdlib_text.identity() in built.info.full_name and stdlib_text.identity() in str(built.data_dir)


def test_a_small_library(tmp_path):
    """A distribution without tests and headers; odd files are skipped; a module and its docstrings fall on one side."""
    library = tmp_path / "lib"
    (library / "pydoc_data").mkdir(parents=True)
    long = "A sentence about something worth keeping in the prose. " * 6
    (library / "a.py").write_text(
        f'"""{long}"""\nimport os\n' + "value = os.path.join('here', 'there')\n" * 20, encoding="utf-8"
    )
    (library / "copy.py").write_text((library / "a.py").read_text(encoding="utf-8"), encoding="utf-8")
    (library / "latin.py").write_bytes(b"# \xe9\n" * 100)
    (library / "broken.py").write_text("def f(:\n" * 50, encoding="utf-8")
    (library / "table.py").write_text("t = [" + "0x41, " * 500 + "]", encoding="utf-8")
    (library / "pydoc_data" / "topics.py").write_text(
        f"topics = {{'if': {long!r}, 'for': 'short'}}\n", encoding="utf-8"
    )
    (library / "README.txt").write_text(long + "more\n", encoding="utf-8")
    found = {name: (key, domain, text) for name, key, domain, text in stdlib_text.documents(library, tmp_path / "no")}
    assert {n: d for n, (_, d, _) in found.items()} == {
        "a.py": "code", "a.py#docstrings": "prose", "README.txt": "prose",
    }  # fmt: skip
    assert found["a.py"][0] == found["a.py#docstrings"][0] == "a.py"
    assert long.strip() in found["a.py#docstrings"][2] and long[:40] not in found["a.py"][2]


@pytest.mark.slow
def test_stdlib_text_end_to_end(tmp_path):
    """Prepares the data set of this Python, without TensorFlow, and reads batches of all its domains. A second source
    of the same data set finds it prepared."""
    part = SourceConfig(name="stdlib_text", split="train[90%:]", validation_split="", domain_field="domain")
    cfg = DataConfig(cache_dir=str(tmp_path), sources=DataConfig().sources | {"part": part})
    made = data.prepare(cfg, workdir=tmp_path / "run", seed=0, progress=False)
    assert {"code", "prose"} <= set(made.domains) <= {"c_headers", "code", "prose", "tests"}
    rows = made.stats()
    size = {s: sum(r["bytes"] for r in rows if r["split"] == s) for s in sources.SPLITS}
    assert 5e6 < size["train"] < 60e6 and 0.02 < size["validation"] / size["train"] < 0.12
    held = {r["domain"] for r in rows if r["split"] == "validation"}
    assert {"code", "prose"} <= held
    source = sources.open_source("stdlib", DataConfig().sources["stdlib"], tmp_path)
    texts = {
        s: {d["text"] for d in (source.documents(s)[i] for i in range(len(source.documents(s))))}
        for s in sources.SPLITS
    }
    assert not texts["train"] & texts["validation"]
    some = list(made.validation_batches(range(16), limit=4))
    assert {made.domains[i] for b in some for i in b["domain_ids"][b["weights"] == 1]} == held
    assert next(made.train_iterator(range(16)))["tokens"].shape == (16, 256)
    assert math.isclose(made.bytes_per_token.mean(), 1.0, abs_tol=0.01)
    assert "tensorflow" not in sys.modules
    for field, value in (
        ("split", "trian"),
        ("validation_split", "test"),
        ("text_field", "txt"),
        ("domain_field", "dom"),
    ):
        broken = dataclasses.replace(DataConfig().sources["stdlib"], **{field: value})
        with pytest.raises(ConfigError, match=r"train, validation|text.*name") as error:
            sources.open_source("stdlib", broken, tmp_path).documents("validation" if "valid" in field else "train")
        assert error.value.name == f"data.sources.stdlib.{field}"


def test_folders_that_exist_are_taken_as_they_are_written(tmp_path):
    """A glob is what is left of a path behind the folders that exist by that very name."""
    for folder in ("[v2] {a,b}/x", "a*b", "axb", "[12]", "1", "100%20 #1?"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "text[1].txt").write_text(folder, encoding="utf-8")
    for path, found in {
        "[v2] {a,b}/*/*.txt": ["[v2] {a,b}/x"], "[[]v2*/x/*.txt": ["[v2] {a,b}/x"], "a*b/*.txt": ["a*b"],
        "a?b/*.txt": ["a*b", "axb"], "[12]/*": ["[12]"], "[1]/*": ["1"], "100%20 #1?/text[1].txt": ["100%20 #1?"],
        "**/text[[]1].txt": ["1", "100%20 #1?", "[12]", "[v2] {a,b}/x", "a*b", "axb"],
    }.items():  # fmt: skip
        source = sources.open_source(
            "s", SourceConfig(kind="files", path=f"{tmp_path}/{path}", validation_fraction=0.0), tmp_path
        )
        texts = [source.documents("train")[i]["text"] for i in range(len(found))]
        assert texts == found and len(source.documents("train")) == len(found), path
