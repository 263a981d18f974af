"""Documents that are held out: no text is on both sides, whatever files and sources it stands in."""

import contextlib
import csv
import dataclasses
import json

import pytest

from moe_jax.config import ConfigError, DataConfig, SourceConfig
from moe_jax.data import files, sources


def test_the_split_is_disjoint_stable_and_of_the_right_size(tmp_path):
    texts = [f"document {i % 1500}" for i in range(2000)]  # some twice

    def split(path, part):
        source = files.FilesSource("s", SourceConfig(kind="files", path=str(path), validation_fraction=0.1))
        return {d["text"] for d in source.documents(part)}

    with open(tmp_path / "a.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    train, validation = (split(tmp_path / "a.jsonl", s) for s in sources.SPLITS)
    assert not train & validation and train | validation == set(texts)
    assert 0.07 < len(validation) / 1500 < 0.13
    with open(tmp_path / "b.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["text"], *([f"new {i}"] for i in range(300)), *([text] for text in texts[::-1])])
    assert split(tmp_path / "b.csv", "validation") >= validation
    assert not split(tmp_path / "b.csv", "train") & validation


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, None),
        ({"validation_fraction": 0.0}, r"b.validation_fraction=0.0: is not that of data.sources.a, .*: 0.05"),
        ({"validation_fraction": 0.0, "weight": 0.0}, None),
        ({"documents": "blank_lines"}, "b.documents='blank_lines': cuts .*one.txt in other places than data.sources.a"),
        ({"path": "{}/*.txt"}, "b.documents='auto': cuts .*one.txt in other places than .*nearest valid: 'file'"),
        ({"path": "{}/*.txt", "documents": "file"}, "b.documents='file': cuts"),
    ],
)
def test_what_one_source_holds_out_no_other_trains_on(tmp_path, fields, says):
    (tmp_path / "one.txt").write_text("some text\n", encoding="utf-8")
    (tmp_path / "link.txt").symlink_to("one.txt")
    (tmp_path / "two.txt").write_text("other text\n", encoding="utf-8")
    a = SourceConfig(kind="files", path=str(tmp_path / "one.txt"))
    b = dataclasses.replace(a, path=str(tmp_path / "link.txt"))
    b = dataclasses.replace(b, **{k: v.format(tmp_path) if isinstance(v, str) else v for k, v in fields.items()})
    cfg = DataConfig(sources={"a": a, "b": b}, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match=says) if says else contextlib.nullcontext():
        sources.check_sources(cfg)
