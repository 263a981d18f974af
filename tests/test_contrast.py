"""The experts whose use differs most between two sides: a planted one is found, and `eval.py` switches it off."""

import dataclasses
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from test_opened import config_of, write_run

import moe_jax
from moe_jax import model
from moe_jax.config import ModelConfig, MoEConfig
from moe_jax.errors import FileError, UserError
from moe_jax.evaluate import analysis, contrast
from moe_jax.evaluate.contrast import Contrast
from moe_jax.moe.stats import ChoiceSums, RouterStats
from moe_jax.parallel import sharding
from moe_jax.run import weights
from tests import programs

REPO = Path(__file__).parents[1]


def analyses(identity: int = 0) -> tuple[dict, np.ndarray]:
    """Counts of 3 domains in layers of 4, 6 and 4 experts, in banks; expert 5 of layer 1 is that of domain 2 alone."""
    rng, found = np.random.default_rng(0), {}
    model = ModelConfig(num_layers=3, layers="moe:4 moe:6 moe:4", moe=MoEConfig(num_experts=4, top_k=2))
    stats, choices, loads = {}, {}, []
    for path in dict.fromkeys(place.path for place in model.places):
        experts = next(place.kind.experts for place in model.places if place.path == path)
        load = rng.integers(20, 30, (1, 3, experts + identity)).astype(float)
        if experts == 6:
            load[0, :, 5] = 0, 0, 60
        zeros, tokens = np.zeros((1, 3)), np.full((1, 3), 100.0)
        stats[path] = RouterStats(tokens, load, load, zeros, zeros)
        choices[path] = ChoiceSums(zeros, np.ones((1, *[experts + identity] * 2)), None)
        loads.append(load[0] / 100)
    found = analysis.analyse(model.places, stats, choices, ("a", "b", "c"), 2, None, identity)
    return found, loads


def test_a_planted_expert_is_found():
    """In layers of different numbers of experts; identity experts are not compared."""
    for identity in (0, 1):
        banks, loads = analyses(identity)
        found = contrast.of_domains(banks, "c", "a", identity)
        rows = contrast.ranked(found)
        assert rows[0][:2] == (1, 5) and rows[0].first == 0.6 and rows[0].second == 0
        assert len(rows) == 14 and [len(one.T) for one in found.frequency] == [4, 6, 4]
        for row in rows:
            np.testing.assert_allclose((row.first, row.second), loads[row.layer][[2, 0], row.expert])
        assert [row.difference for row in rows] == sorted((row.difference for row in rows), reverse=True)
    model = ModelConfig(num_layers=3, layers="moe:4 moe:6 moe:4", moe=MoEConfig(num_experts=4, top_k=2))
    line = contrast.off_line(found, model)
    off = line.split()
    assert off[0] == "off:1/5" and sum(item.startswith("off:0/") for item in off) <= 2
    used = {(row.layer, row.expert): row.difference for row in rows}
    assert all(used[tuple(map(int, item[4:].split("/")))] > 0 for item in off)
    said = contrast.table(found, line)
    assert re.search(r"1/5 +60.0% +0.0% +\+60.0%", said) and f'--experts="{line}"' in said
    body = json.loads(contrast.to_json(found, 30, line, overrides={"seed": 1}))
    assert body["overrides"] == {"seed": 1} and "overrides" not in json.loads(contrast.to_json(found, 30, line))
    assert body["ranked"][0] == {"layer": 1, "expert": 5, "first": 0.6, "second": 0.0, "difference": 0.6}


@pytest.mark.filterwarnings("error")
def test_its_figure():
    for frequency in ([np.eye(2, 4), np.ones((2, 6))], [np.zeros((2, 64))] * 3):
        found = Contrast(("$x^$", "b_long_name"), (9, 9), frequency)
        contrast.figure(found, "off:0/0").savefig(io.BytesIO(), dpi=40)


def test_sides(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n two \n", encoding="utf-8")
    rows = [{"prompt": "x\ny"}, {"text": "z", "id": 3}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "bad.jsonl").write_text('{"prompt": 3}', encoding="utf-8")
    (tmp_path / "empty.txt").write_text("\n", encoding="utf-8")
    names = [str(tmp_path / name) for name in ("a.txt", "b.jsonl")]
    assert contrast.are_files(names) and not contrast.are_files(["code", "prose"], ("code", "prose"))
    assert [contrast.read_prompts(name) for name in names] == [["one", " two "], ["x\ny", "z"]]
    assert contrast.titles(names) == ("a", "b") and contrast.titles(["x/a.txt", "y/a.txt"]) == ("x/a.txt", "y/a.txt")
    for given, words in (
        (["code"], "takes two domains"),
        (["code", "code"], "takes two domains"),
        (["code", names[0]], "a.txt is a file of prompts, the other one is not"),
        ([names[0], "none.txt"], "none.txt: no such file"),
        (["code", "pros"], "'pros' is no domain of the held-out text, which are code, prose; nearest valid: 'prose'"),
    ):
        with pytest.raises(UserError) as error:
            contrast.are_files(given, ("code", "prose"))
        assert str(error.value).startswith(f"--contrast={','.join(given)}: ") and words in str(error.value)
    for name, words in (("bad.jsonl", "bad.jsonl:1: needs a field prompt"), ("empty.txt", "has no prompt")):
        with pytest.raises(FileError, match=words):
            contrast.read_prompts(str(tmp_path / name))


# --- eval.py ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A run in which expert 2 of layer 1 is chosen by digits and by nothing else."""
    root = write_run(tmp_path_factory.mktemp("planted"))
    cfg = config_of(root)
    with jax.set_mesh(sharding.make_mesh((1, 1, 1), jax.devices()[:1])):
        params, bias = jax.tree.map(np.array, model.init(cfg.model, jax.random.key(0)))
    params["embed"][:, 0] = -5.0
    params["embed"][ord("0") : ord("9") + 1, 0] = 5.0
    params["layers"]["moe"]["w_router"][:] = 0  # other tokens choose experts 0 and 1
    params["layers"]["moe"]["w_router"][1, 0, 2] = 8
    weights.save_weights(root / "planted", cfg, params, bias, [{"event": "test"}])
    return root


def evaluate(root: Path, *arguments: str, devices: int = 2) -> str:
    env = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "MOE_JAX_CACHE": str(root / "cache")}
    env |= {"PATH": "/usr/bin:/bin", "HOME": str(root), "MPLBACKEND": "agg", "XLA_FLAGS": os.environ["XLA_FLAGS"]}
    env |= programs.environment()
    command = [sys.executable, REPO / "eval.py", f"--workdir={root}/planted", *arguments]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=env | {"PYTHONPATH": str(REPO)})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_eval_finds_the_planted_expert_and_switches_it_off(planted):
    """Of two domains, and of two files of prompts in Python; the evaluation as it is stays in its files."""
    run = planted / "planted"
    said = evaluate(planted, "--contrast=numbers,prose")
    plain = json.loads((run / "eval.json").read_text(encoding="utf-8"))
    body = json.loads((run / "contrast.json").read_text(encoding="utf-8"))
    assert body["off"] == "off:1/2" and f'--experts="{body["off"]}"' in said
    best, numbers = (
        body["ranked"][0],
        plain["domains"].index(next(r for r in plain["domains"] if r["domain"] == "numbers")),
    )
    assert (best["layer"], best["expert"], best["second"]) == (1, 2, 0) and best["first"] > 0.4
    assert best["first"] == pytest.approx(plain["tokens_per_expert"][1][numbers][2] / body["tokens"][0])
    assert (run / "figures" / "contrast.png").stat().st_size > 5000 and "experts" not in plain

    evaluate(planted, "--experts=off:1/2", "--prompt=the 9", devices=4)
    off = json.loads((run / "eval.0.switched.json").read_text(encoding="utf-8"))
    counts, before = np.array(off["tokens_per_expert"]), np.array(plain["tokens_per_expert"])
    assert off["experts"] == "off:1/2" and not counts[1, :, 2].any() and before[1, numbers, 2] > 0
    np.testing.assert_array_equal(counts[0], before[0])  # the layer before is as it was
    np.testing.assert_array_equal(counts.sum(2), before.sum(2))
    assert json.loads((run / "eval.json").read_text(encoding="utf-8")) == plain

    (planted / "digits.txt").write_text("17 4\n2026\n", encoding="utf-8")
    (planted / "words.jsonl").write_text('{"prompt": "the river"}\n{"text": "low light"}\n', encoding="utf-8")
    (run / "contrast.json").unlink()
    evaluate(planted, f"--contrast={planted}/digits.txt,{planted}/words.jsonl")
    files = json.loads((run / "contrast.json").read_text(encoding="utf-8"))
    assert (files["first"], files["second"], files["tokens"]) == ("digits", "words", [8, 18])
    assert files["ranked"][0] == {"layer": 1, "expert": 2, "first": 0.875, "second": 0.0, "difference": 0.875}

    opened = moe_jax.load(run, mesh=sharding.make_mesh((2, 2, 2)))
    assert (opened.routing("17 4").experts[1, 1:] == 2).any(1).tolist() == [True, True, False, True]
    tuned = opened.switched("off:1/2 on:0/1")
    experts = tuned.routing("17 4").experts
    assert not (experts[1] == 2).any() and (experts[0] == 1).any(1).all()
    assert np.abs(tuned.logits("17 4") - opened.logits("17 4")).max() > 1e-3
    score = lambda run: run.score("17", " 4").logprob
    np.testing.assert_array_equal(tuned.switched("").logits("17 4"), opened.logits("17 4"))
    assert score(tuned) != score(opened) and tuned.generate("17", 3).startswith("17")
    opened.model = dataclasses.replace(opened.model, max_seq_len=8)
    with pytest.raises(UserError, match=r"^--contrast: digits.txt, prompt 2: a text has 10 tokens, .*max_seq_len=8"):
        contrast.check_prompts(opened, "digits.txt", ["17 4", "9" * 9])
