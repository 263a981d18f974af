"""What an evaluation leaves behind: which file it goes to, what it records of itself, numbers that are not finite."""

import json
import math

import numpy as np
import pytest

from moe_jax.config import ModelConfig
from moe_jax.errors import UserError
from moe_jax.evaluate import held_out
from moe_jax.moe.stats import RouterStats
from moe_jax.run import log


def result_of(nll=(8.0, 16.0), tokens=(4.0, 8.0), limit=0, sequences=(9, 9)) -> held_out.EvalResult:
    """Two domains, one MoE layer, two experts."""
    nll, tokens = np.array(nll), np.array(tokens)
    load = np.stack([tokens, tokens], -1)[None]
    stats = RouterStats(tokens[None], load, load / 2, tokens[None], 0 * tokens[None])
    places = ModelConfig(num_layers=1).places
    return held_out.EvalResult(
        ("a", "b"),
        nll,
        tokens,
        np.full(2, 2.0),
        places,
        {"layers": stats},
        None,
        limit,
        sequences,
    )


def test_results_of_another_question_are_not_overwritten(tmp_path):
    """Of the same step: at the top of a file, or in a task's row; files without the field have other names."""
    path = tmp_path / "eval.4.switched.json"
    log.check_same(path, 4, {"experts": "off:0/1"})
    log.add_eval(path, 4, "tasks", {"a": {"acc": 0.5, "experts": "off:0/1"}})
    log.check_same(path, 4, {"experts": "off:0/1"})
    log.check_same(path, 5, {"experts": "off:0/2"})
    with pytest.raises(UserError, match=r"4.switched.json: has results of experts 'off:0/1', not of 'off:0/2'; rename "
                       "it first$"):  # fmt: skip
        log.check_same(path, 4, {"experts": "off:0/2"})
    # Files that would be lost with it are named, and no others.
    (tmp_path / "figures").mkdir()
    lost = ("analysis.4.switched.npz", "analysis.8.4.switched.npz", "figures/overlap.4.switched.png")
    others = ("subsets.4.switched.json", "analysis.14.switched.npz", "sample.ema.4.switched.txt", "sample.4.txt")
    for name in (*lost, *others, "figures/loss.png"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=f"; rename it first, and with it {', '.join(lost)}$"):
        log.check_same(path, 4, {"experts": "off:0/2"})
    (tmp_path / "contrast.4.switched.json").write_text(
        json.dumps({"step": 4, "overrides": {"seed": 1}}), encoding="utf-8"
    )
    (tmp_path / "figures" / "contrast.4.switched.svg").touch()
    with pytest.raises(UserError, match=r"rename it first, and with it figures/contrast.4.switched.svg$"):
        log.check_same(tmp_path / "contrast.4.switched.json", 4, {"overrides": {"seed": 2}})
    log.write_text(path, json.dumps({"step": 4, "shares": [1.0, 0.5], "by": ""}))
    log.check_same(path, 4, {"shares": [1.0, 0.5], "training_batches": 8, "by": ""})
    log.check_same(path, 4, {"by": "", "shares": (1.0, 0.5)})  # as it is written
    with pytest.raises(UserError, match=r"has results of shares \[1.0, 0.5\], not of \[1.0, 0.25\]"):
        log.check_same(path, 4, {"shares": [1.0, 0.25]})


def test_only_all_text_at_the_newest_step_is_the_main_evaluation():
    whole, part = result_of(), result_of(limit=2, sequences=(8, 9))
    assert held_out.suffix(whole, 30, newest=30) == held_out.suffix(result_of(limit=50), 30, newest=30) == ""
    assert held_out.suffix(whole, 20, newest=30) == ".20"
    assert held_out.suffix(part, 30, newest=30) == ".30.2batches"
    assert held_out.suffix(part, 20, newest=30) == ".20.2batches"


def test_it_records_what_it_is_of():
    for result, limit in ((result_of(), None), (result_of(limit=2, sequences=(8, 9)), 2)):
        body = json.loads(held_out.to_json(30, result, {}))
        told = {name: body[name] for name in ("step", "limit", "rows", "of_rows", "tokens")}
        assert told == {"step": 30, "limit": limit, "rows": result.sequences[0], "of_rows": 9, "tokens": 12}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_null_and_named(tmp_path, bad):
    text = held_out.to_json(30, result_of(nll=(8.0, bad)), {"gzip -9": {"a": 1.0, "b": bad}})
    body = json.loads(text, parse_constant=pytest.fail)
    good, row, _ = body["domains"]
    assert good["xent"] == 2.0 and "nonfinite" not in good
    names = ["xent", "perplexity", "bits_per_byte"] if math.isnan(bad) else ["xent", "bits_per_byte"]
    assert row["xent"] is row["bits_per_byte"] is None and row["nonfinite"] == names
    assert body["bits_per_byte_of"]["gzip -9"] == {"a": 1.0, "b": None, "nonfinite": ["b"]}
    (tmp_path / "eval.json").write_text(text, encoding="utf-8")
    good, row, _ = log.read_eval(tmp_path)["domains"]
    assert good["xent"] == 2.0 and math.isnan(row["xent"]) and math.isnan(row["bits_per_byte"])


def test_training_again_keeps_a_fuller_evaluation_of_the_same_step(tmp_path):
    """A finished run that is started again evaluates `train.eval_batches`; eval.py may have seen all of the text."""
    part = result_of(tokens=(4.0, 0.0), limit=2, sequences=(8, 9))
    assert held_out.suffix_at_the_end(tmp_path, part, 30) == ""
    for step, result, want in ((30, result_of(), ".30.2batches"), (20, result_of(), ""), (30, part, "")):
        (tmp_path / "eval.json").write_text(held_out.to_json(step, result, {}), encoding="utf-8")
        assert held_out.suffix_at_the_end(tmp_path, part, 30) == want
    (tmp_path / "eval.json").write_text('{"step": 30, "domains": [{"tokens": 12}]}', encoding="utf-8")  # an older one
    assert held_out.suffix_at_the_end(tmp_path, part, 30) == ".30.2batches"
    (tmp_path / "eval.json").write_text("{", encoding="utf-8")
    assert held_out.suffix_at_the_end(tmp_path, part, 30) == ""
