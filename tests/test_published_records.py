"""Records of docs/specialists.md: the command on the page compares them and runs nothing."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from experiments import pool

NAMES = ("pools", "pruning", "quantisation", "switching")
DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("name", NAMES)
def test_published_records_are_known_to_their_command(name, tmp_path, monkeypatch, capsys):
    """Also on text in another place, and not if the training or the measurement is another."""
    experiment, file = importlib.import_module(f"experiments.{name}"), DOCS / f"{name}_runs.json"
    (texts := tmp_path / "texts").mkdir()
    for domain in ("python", "cpp", "lisp"):
        (texts / f"{domain}.txt").write_text("whereas\n" * 400, encoding="utf-8")
    arms = list(dict.fromkeys(record.get("arm", record.get("name")) for record in json.loads(file.read_text("utf-8"))))
    monkeypatch.setattr(pool, "run_all", lambda *_: pytest.fail("nothing is to be run"))
    command = [name, f"--data={texts}", f"--out={tmp_path / 'out'}", f"--known={file}", f"--only={','.join(arms)}"]
    monkeypatch.setattr(sys, "argv", command)
    assert experiment.main() == 0 and "left out" not in capsys.readouterr().out
    table = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert all(label in table for label in ("balanced over the global batch", "balanced in each sequence"))
    monkeypatch.setattr(pool, "prepare", lambda *_: None)
    monkeypatch.setattr(pool, "run_all", lambda *_: False)
    monkeypatch.setattr(sys, "argv", [*command, f"--out={tmp_path / 'other'}", "--set", "train.steps=800"])
    experiment.main()
    assert capsys.readouterr().out.count("left out: config.train.steps: 900 in the run, 800 now") == len(arms)
