"""Runs compared: losses at equal places by hand, what differs, runs that lack a part, files that stay the same."""

import json
import math
import re

import numpy as np
import pytest
from matplotlib.figure import Figure

from moe_jax import config
from moe_jax.compare import curves, runs, tables
from moe_jax.compare.__main__ import main
from moe_jax.config import default_config
from moe_jax.errors import CheckpointError, FileError, UserError
from moe_jax.evaluate import analysis, drawing


def made(folder, losses, *, batch=100, seconds=1.0, load=None, fields=(), loads=None, steps=None, fingerprint="f"):
    """A run with a held-out loss every 10 steps and a row of training every 5; `batch` tokens a step."""
    cfg = default_config()
    cfg.train.steps = steps or 10 * len(losses)
    for name, value in dict(fields).items():
        *groups, last = name.split(".")
        group = cfg
        for key in groups:
            group = group[key]
        group[last] = value
    folder.mkdir(parents=True)
    text = json.dumps(config.to_dict(config.build(cfg)))
    (folder / "config.json").write_text(text, encoding="utf-8")
    (folder / "tokenizer_settings.json").write_text(json.dumps({"fingerprint": fingerprint}), encoding="utf-8")
    rows = []
    for i, loss in enumerate(losses, 1):
        for step in (10 * i - 5, 10 * i):
            row = {"kind": "train", "step": step, "xent": loss + 0.1, "tokens": batch * step, "step_seconds": seconds}
            rows.append(row | ({} if load is None else {"max_load": load, "load_cv": 0.5, "dropped": 0.0}))
        rows.append({"kind": "eval", "step": 10 * i, "xent": loss, "bits_per_byte": loss / 2})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if loads is not None:
        counts = np.array(loads)  # [L, G, E]
        names = [f"domain {g}" for g in range(counts.shape[1])]
        domains = [{"domain": d, "tokens": 10, "xent": losses[-1] + g, "bits_per_byte": 1.0}
                   for g, d in enumerate([*names, ""])]  # fmt: skip
        body = {"step": 10 * len(losses), "limit": None, "domains": domains, "tokens_per_expert": counts.tolist(),
                "tokens_per_layer_and_domain": (counts.sum(-1) // 2).tolist()}  # fmt: skip
        (folder / "eval.json").write_text(json.dumps(body), encoding="utf-8")
    return folder


def cells(table: tables.Table) -> dict[str, dict[str, str]]:
    return {row[0]: dict(zip(table.head[1:], row[1:], strict=True)) for row in table.rows}


def test_losses_at_equal_places(tmp_path):
    """b has steps of twice as many tokens, and of half the time: a's 40 steps are b's 20 in tokens."""
    made(tmp_path / "a", [4.0, 3.0, 2.5, 2.25])
    made(tmp_path / "b", [3.9, 2.8, 2.6], batch=200, seconds=0.25)
    a, b = found = runs.read(runs.find([str(tmp_path)]))
    assert [tables.common(found, axis) for axis in runs.AXES] == [30, 4000, 7.5]
    at = lambda run, axis, place: tables.loss_at(run.held_out, "xent", axis, place)
    assert at(a, "step", 30) == (2.5, False) and at(b, "tokens", 4000) == (2.8, False)
    assert at(a, "tokens", 1500) == (3.5, True)  # half-way between 4 and 3
    assert at(a, "seconds", 7.5) is None and at(b, "tokens", 6001) is None  # before the first, after the last
    table = cells(tables.of_losses(found))
    assert table["b"]["Δ"] == "+0.5500" and table["a"]["after 7.5 s"] == tables.NONE
    assert table["b"]["at 4,000 tokens"] == "2.8000" and table["a"]["time"] == "40 s"


def test_runs_without_evaluations_and_runs_still_training(tmp_path):
    """a has no held-out loss; c has one after its last row of training, so that only its step is known."""
    for name in "abc":
        made(tmp_path / name, [4.0, 3.0], loads=[[[20, 0], [0, 20]]])
    for name, gone in (("a", '"eval"'), ("c", '"step": 20, "xent": 3.1')):
        path = tmp_path / name / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines()
        path.write_text("".join(f"{line}\n" for line in lines if gone not in line), encoding="utf-8")
    (tmp_path / "a" / "eval.json").unlink()
    limited = json.loads((tmp_path / "b" / "eval.json").read_text(encoding="utf-8")) | {"limit": 2, "step": 15}
    for name in "bc":
        (tmp_path / name / "eval.json").write_text(json.dumps(limited), encoding="utf-8")
    found = runs.read(runs.find([str(tmp_path)]))
    assert [tables.common(found, axis) for axis in runs.AXES] == [20, 1000, 10]
    assert tables.common(found[:2], "step") is None  # one of them has no evaluation
    table = cells(tables.of_losses(found))
    assert [table[name]["at step 20"] for name in "abc"] == [tables.NONE, "3.0000", "3.0000"]
    assert [table[name]["Δ"] for name in "abc"] == [tables.NONE, "+0.0000", "+0.0000"]  # against b
    lines = list(tables.notes(found))
    assert not any("different parts" in line for line in lines)  # b and c have the same limit
    assert [line for line in lines if "eval.json is of" in line] == [
        "b: eval.json is of step 15, and the run is at step 20"
    ]


def test_time_leaves_out_compilation(tmp_path):
    """A row of the first step of a process has its compilation in it. It counts as the median of the others."""
    folder = made(tmp_path / "a", [3.0])
    rows = [
        {"kind": "train", "step": s, "xent": 3.0, "tokens": s, "step_seconds": x} for s, x in ((1, 90), (2, 2), (4, 3))
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    made(tmp_path / "b", [3.0])
    one, _ = runs.read(runs.find([str(folder), str(tmp_path / "b")]))
    np.testing.assert_allclose(one.training.seconds, [2.5, 4.5, 10.5])
    took = np.full(600, 0.35)
    took[[0, 300]] = 45.0  # went on after step 300
    assert runs.training_seconds(np.arange(1, 601), took)[-1] == pytest.approx(210)
    slow = np.array([2.0, 2.0, 30.0])  # rows of ten steps have no compilation: these were slow
    np.testing.assert_allclose(runs.training_seconds(np.array([10, 20, 30]), slow), [20, 40, 340])


def test_settings_and_notes(tmp_path):
    made(tmp_path / "lr" / "0.003", [3.0], fields={"optim.lr": 0.003})
    made(tmp_path / "lr" / "0.0004", [3.0, 2.0], fields={"optim.lr": 0.0004, "data.seq_len": 64}, steps=30)
    found = runs.read(runs.find([str(tmp_path)]))
    assert [run.name for run in found] == ["0.0004", "0.003"]  # by value, relative to the folder of both
    assert tables.differing(found) == {"data.seq_len": [64, 256], "optim.lr": [0.0004, 0.003],
                                       "train.steps": [30, 10]}  # fmt: skip
    lines = list(tables.notes(found))
    assert any("data.seq_len" in line for line in lines) and "0.0004: at step 20 of 30" in lines
    assert "without eval.json: 0.0004, 0.003" in lines


def test_parts_that_not_all_runs_have_are_named(tmp_path):
    """Other sources of text are one row of names, not a row for each of their fields; the same ones are compared."""
    source = {"kind": "files", "path": "texts"}
    made(tmp_path / "a", [3.0], fields={"data.sources": {"maths": source}})
    made(tmp_path / "b", [3.0], fields={"data.sources": {"maths": source | {"path": "proofs"}}})
    both = runs.read(runs.find([str(tmp_path)]))
    assert tables.differing(both) == {"data.sources.maths.path": ["texts", "proofs"]}
    made(tmp_path / "c", [3.0], fields={"data.sources": {"maths": source, "poems": source}})
    found = runs.read(runs.find([str(tmp_path)]))
    assert tables.differing(found) == {
        "data.sources": [["maths"], ["maths"], ["maths", "poems"]],
        "data.sources.maths.path": ["texts", "proofs", "texts"],
    }
    assert tables.as_json(found)["runs"][2]["settings"]["data.sources"] == ["maths", "poems"]
    assert any("data.sources" in line for line in tables.notes(found))


def test_other_tokenizers_are_compared_by_bytes(tmp_path):
    made(tmp_path / "a", [4.0, 3.0])
    made(tmp_path / "b", [5.0, 4.0], fingerprint="g")
    found = runs.read(runs.find([str(tmp_path)]))
    assert tables.metric(found) == "bits_per_byte" and cells(tables.of_losses(found))["b"]["Δ"] == "+0.5000"
    assert any("tokenizers differ" in line for line in tables.notes(found))


def test_routers(tmp_path):
    """Two domains with experts of their own: one bit. Loads of 30 and 10: maximum load 1.5."""
    made(tmp_path / "a", [3.0], load=1.25, loads=[[[20, 0], [0, 20]], [[15, 5], [15, 5]]])
    made(tmp_path / "b", [3.0])  # dense
    found = runs.read(runs.find([str(tmp_path)]))
    assert [(layer.max_load, layer.dead) for layer in found[0].layers] == [(1.0, 0), (1.5, 0)]
    np.testing.assert_allclose([layer.specialisation for layer in found[0].layers], [1, 0], atol=1e-12)
    table = cells(tables.of_routers(found))
    assert list(table) == ["a"] and table["a"]["maximum load"] == "1.25"
    assert table["a"]["held out: maximum load"] == "1.50" and table["a"]["largest"] == "1.000 (layer 0)"
    assert cells(tables.of_domains(found))["domain 1"] == {"a": "4.000", "b": tables.NONE}


def test_benchmarks(tmp_path):
    """An eval.json may have them alone. Accuracies are in the figure, bits per byte in the table only."""
    row = {"acc": 0.5, "acc_se": 0.02, "acc_per_char": 0.25, "acc_per_char_se": 0.01, "digest": "x"}
    bits = {"bits_per_byte": 1.25, "bits_per_byte_se": 0.125, "digest": "y"}
    for name, tasks in (("a", {"arc": row}), ("b", {"arc": row | {"digest": "z"}, "mbpp": bits})):
        made(tmp_path / name, [3.0])
        (tmp_path / name / "eval.json").write_text(json.dumps({"step": 10, "tasks": tasks}), encoding="utf-8")
    found = runs.read(runs.find([str(tmp_path)]))
    table = cells(tables.of_benchmarks(found))
    assert table["arc, accuracy"] == {"a": "50.0 ± 2.0 %", "b": "50.0 ± 2.0 %"}
    assert table["mbpp, bits per byte"] == {"a": tables.NONE, "b": "1.250 ± 0.125"}
    assert "benchmarks of other documents or requests, not comparable: arc" in list(tables.notes(found))
    labels = [text.get_text() for text in curves.benchmarks(found).axes[0].get_yticklabels()]
    assert labels == ["arc, accuracy", "arc, accuracy per character"]
    names = ["piqa/rc_0shot, accuracy", "arc/rc_0shot, accuracy", "arc/rc_5shot, accuracy"]
    assert list(curves._task_names(names).values()) == ["piqa, accuracy", *names[1:]]


def test_a_wide_table_goes_on_below():
    table = tables.Table("t", ("run", *("x" * 40 for _ in range(5))), [("a", *"12345"), ("b", *"67890")])
    blocks = table.text().split("\n\n")
    assert len(blocks) == 2 and all(len(line) <= tables.WIDEST for line in table.text().splitlines())
    assert re.sub(r"\s", "", "".join(block.splitlines()[-1][3:] for block in blocks)) == "67890"


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["a"], "1 run is named"),
        (["a", "bb"], "no such folder; nearest valid: 'b'"),
        (["a", "empty"], "is neither a run directory"),
        (["a", "a"], "1 run is named"),
    ],
    ids=str,
)
def test_bad_paths(tmp_path, monkeypatch, paths, message):
    made(tmp_path / "a", [3.0]), made(tmp_path / "b", [3.0]), (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        runs.find(paths)


def test_a_run_with_nothing_to_compare_is_told(tmp_path):
    made(tmp_path / "a", [3.0]), (tmp_path / "x" / "new" / "checkpoints").mkdir(parents=True)
    assert runs.left_out([str(tmp_path)]) == [tmp_path / "x" / "new"] and runs.left_out([str(tmp_path / "a")]) == []


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("metrics.jsonl", '{"kind": "train"}'),
        ("eval.json", '{"domains": [{}]}'),
        ("eval.json", "[1]"),
        ("eval.json", ""),
        ("eval.json", '{"tasks": [1]}'),
        ("eval.json", '{"tasks": {"arc": {"acc": 0.5}}}'),
        ("eval.json", '{"step": "x"}'),
    ],
)
def test_a_corrupt_run_is_named(tmp_path, file, text):
    made(tmp_path / "a", [3.0]), made(tmp_path / "b", [3.0])
    (tmp_path / "b" / file).write_text(f"{text}\n", encoding="utf-8")
    with pytest.raises(FileError, match=f"b/{file}: is not a valid"):
        runs.read(runs.find([str(tmp_path)]))


def test_a_config_that_is_none_is_named(tmp_path):
    made(tmp_path / "a", [3.0]), made(tmp_path / "b", [3.0])
    (tmp_path / "b" / "config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(CheckpointError, match="is not a configuration"):
        runs.read(runs.find([str(tmp_path)]))


def test_figures_of_runs_that_lack_a_part(tmp_path):
    (tmp_path / "a").mkdir()
    made(tmp_path / "r" / "a", [math.nan, 3.0], load=1.5, loads=[[[20, 0], [0, 20]], [[0, 0], [0, 0]]])
    made(tmp_path / "r" / "b", [3.0])
    bare = made(tmp_path / "r" / "c", [3.0])
    (bare / "metrics.jsonl").write_text("", encoding="utf-8")
    found = runs.read(runs.find([str(tmp_path / "r")]))
    names = [name for name, _ in curves.all_figures(found)]
    assert names == ["loss", "max_load", "layers", "domains"]
    written = tables.as_json(found)
    assert written["runs"][2]["held_out"] == []
    assert json.loads(json.dumps(written, allow_nan=False))["runs"][0]["layers"][1]["max_load"] is None


def test_the_command(tmp_path, monkeypatch, capsys):
    stats = [[[20, 0], [0, 20]]]
    made(tmp_path / "a", [4.0, 3.0], load=1.5, loads=stats), made(tmp_path / "b", [4.0, 3.1], load=1.2, loads=stats)
    monkeypatch.setattr("moe_jax.compare.__main__.OUT", type("F", (), {"value": None}))
    monkeypatch.setattr("moe_jax.compare.__main__.FIGURES", type("F", (), {"value": ["svg"]}))
    monkeypatch.chdir(tmp_path)
    main(["compare", "a", "b"])
    there = {path.name for path in (tmp_path / "comparison").iterdir()}
    assert there == {
        "comparison.md",
        "comparison.json",
        *(f"{n}.svg" for n in ("loss", "max_load", "layers", "domains")),
    }
    assert "+0.1000" in capsys.readouterr().out
    text = (tmp_path / "comparison" / "comparison.md").read_text(encoding="utf-8")
    assert "+0.1000" in text and "![loss](loss.svg)" in text
    assert len(runs.find([str(tmp_path)])) == 2  # the comparison beside the runs is not a run


def test_the_same_figure_is_the_same_file(tmp_path):
    figure = Figure((2, 2))
    figure.subplots().plot([1, 2])
    for name in ("a", "b"):
        drawing.save(figure, tmp_path / name, drawing.FORMATS)
    for kind in drawing.FORMATS:
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()


def test_formats():
    assert drawing.check_formats(["pdf", "png", "pdf"]) == ("pdf", "png")
    for bad in ([], ["jpg"]):
        with pytest.raises(UserError, match="--figures="):
            drawing.check_formats(bad)


def test_an_analysis_of_an_earlier_version(tmp_path):
    """It has the maximum violation, which is smaller by 1."""
    one = analysis.Analysis(("a",), 1, *(np.ones((1, 1, 2)) for _ in range(11)), None)
    values = one._asdict() | {"max_violation": np.array([0.5])}
    np.savez(tmp_path / "analysis.npz", **{k: v for k, v in values.items() if v is not None and k != "max_load"})
    np.testing.assert_array_equal(analysis.load(tmp_path / "analysis.npz").max_load, [1.5])
