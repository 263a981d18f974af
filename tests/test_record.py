"""What a run has read is kept in its checkpoints: a change is one line and a refusal, unless it is accepted."""

import copy
import json

import jax.numpy as jnp
import pytest

from moe_jax import data
from moe_jax.config import DataConfig, SourceConfig
from moe_jax.errors import FileError
from moe_jax.run import checkpoint

RECORD = {
    "tokenizer": "bytes-1",
    "sources": {
        "web": {
            "train": {"content": "1", "documents": 3000, "tokens": 90_000, "files": [["w/a", 5], ["w/b", 7]]},
            "validation": {"content": "2", "documents": 9, "tokens": 300, "files": [["w/a", 5], ["w/b", 7]]},
        },
        "tales": {"train": {"content": "3", "documents": 4, "tokens": 50, "files": [["t", 5]]}},
    },
}
STATE = {"batches": {"batches": 7}, "tokens": 9.0, "read": RECORD}


def changed(path: str = "", value=None) -> dict:
    """The record with one of its values changed, e.g. "web/train/content"."""
    made = copy.deepcopy(RECORD)
    if path:
        *groups, name = path.split("/")
        held = made if groups == [] else made["sources"]
        for group in groups:
            held = held[group]
        held[name] = value
    return made


@pytest.mark.parametrize(
    ("now", "says"),
    [
        (changed(), []),
        (changed("web/train/files", [["w/c", 5], ["w/b", 7]]), []),  # a rename that changes no text and no order
        (
            changed("web/train", {"content": "x", "documents": 3060, "tokens": 91_800, "files": [["w/b", 9]]}),
            ["data.sources.web: w/b had 7 bytes, has 9; w/a is gone; train: 3,000 documents, 90,000 tokens then, "
             "3,060 documents, 91,800 tokens now"],
        ),
        (changed("web/train/content", "x"), ["data.sources.web: the same files by name and size, with other text"]),
        (
            changed("tales/train", {"content": "x", "documents": 4, "tokens": 50, "files": [["s", 5]]}),
            ["data.sources.tales: t is now s; train: "],
        ),
        (
            changed("tales/train", {"content": "x", "documents": 9, "tokens": 99, "files": [["u", 4], ["v", 3]]}),
            ["data.sources.tales: t is gone; u is new; v is new; train: "],
        ),
        (changed("tales/train", {"content": "x", "documents": 9, "tokens": 99, "files": 2000}),
         ["data.sources.tales: 1 files then, 2,000 now; train: "]),
        (changed("tokenizer", "json"), ["the tokenizer of the run directory has changed"]),
    ],
)  # fmt: skip
def test_changes_are_one_line_a_source(now, says):
    lines = data.record.changes(RECORD, now)
    assert len(lines) == len(says)
    for line, start in zip(lines, says, strict=True):
        assert line.startswith(start) and "\n" not in line


def test_a_change_is_refused_unless_accepted_which_is_recorded():
    other = changed("web/train/content", "x")
    assert data.record.resume(STATE, [RECORD], False) == (RECORD, [])
    with pytest.raises(
        FileError, match=r"text has changed since the checkpoint: data\.sources\.web.*--accept_changed_"
    ):
        data.record.resume(STATE, [other], False)
    kept, (line,) = data.record.resume(STATE, [other], True)
    assert "data.sources.web" in line and kept["accepted"] == [{"batches": {"batches": 7}, "changes": [line]}]
    state = json.loads(json.dumps(STATE | {"read": kept}))
    again, lines = data.record.resume(state, [other], False)  # from the next checkpoint on there is no change
    assert again == kept and lines == []
    assert data.record.since(STATE, [other]) == [line] and data.record.since(STATE, [RECORD]) == []


def test_checkpoints_that_say_nothing_of_their_text():
    """One line for an old one of training; nothing for none, or one of weights."""
    old = {"batches": {"batches": 7}, "tokens": 9.0}
    assert data.record.since(None, [RECORD]) == data.record.since({"origin": []}, [RECORD]) == []
    record, (line,) = data.record.resume(old, [RECORD], False)
    assert record == RECORD and "whether the text has changed is unknown" in line


def test_processes_must_read_the_same_text_wherever_it_lies():
    elsewhere = changed("web/train/files", [["mnt/a", 5], ["mnt/b", 7]])
    assert data.record.resume(STATE, [RECORD, elsewhere], False) == (RECORD, [])
    with pytest.raises(FileError, match=r"process 1 \('now'\) reads other text than process 0 .*data\.sources\.tales"):
        data.record.resume(STATE, [RECORD, changed("tales/train/content", "x")], True)


def write(path, *numbers):
    path.write_text("".join(json.dumps({"text": f"number {n} " * 5}) + "\n" for n in numbers), encoding="utf-8")


def test_a_checkpoint_keeps_what_was_read(tmp_path):
    """Appended, renamed in order, renamed out of order: through files, stores and a checkpoint."""
    folder = tmp_path / "text"
    folder.mkdir()
    source = SourceConfig(kind="files", path=f"{folder}/*.jsonl", validation_fraction=0.3)
    cfg = DataConfig(batch_size=2, seq_len=8, cache_dir=str(tmp_path / "cache"), sources={"src": source})
    record = lambda: data.prepare(cfg, workdir=tmp_path, seed=0, progress=False).record()
    write(folder / "a.jsonl", *range(40))
    write(folder / "b.jsonl", *range(100, 120))
    with checkpoint.Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.data_state() is None
        checkpoints.save(1, {"x": jnp.zeros(2)}, {"batches": {"batches": 1}, "read": record()}, wait=True)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        before = checkpoints.data_state()
        assert checkpoints.data_state(1) == before and checkpoints.data_state(2) is None
    assert data.record.since(before, [record()]) == []
    (folder / "b.jsonl").rename(folder / "c.jsonl")
    assert data.record.since(before, [record()]) == []
    (folder / "a.jsonl").rename(folder / "z.jsonl")
    (line,) = data.record.since(before, [record()])
    assert f"{folder}/a.jsonl is now {folder}/z.jsonl" in line and f"{folder}/b.jsonl is now {folder}/c.jsonl" in line
    (folder / "z.jsonl").rename(folder / "a.jsonl")
    write(folder / "c.jsonl", *range(100, 160))
    (line,) = data.record.since(before, [record()])
    assert "c.jsonl" in line and "train: " in line and " documents, " in line
