"""experiments/switching.py: what is chosen and drawn, the comparison, and all of it on a run trained before."""

import json
import math
import sys

import numpy as np
import pytest
from test_pruning_experiment import TINY

from experiments import balance_scope, pool, switching, switching_measure, switching_report
from experiments.switching_report import Finished
from moe_jax.config import ModelConfig, MoEConfig
from moe_jax.evaluate import contrast
from tests import programs

MODEL = ModelConfig(num_layers=2, moe=MoEConfig(num_experts=8, top_k=2))


def finished(shift: float = 0.1) -> Finished:
    whole = {"law": 2.0, "prose": 3.0, "": 2.5}
    more = lambda law, rest: {"law": 2.0 + law, "prose": 3.0 + rest, "": 2.5}
    made = {"train.steps": 900}, {"domains": ["law"], "batches": 32}, 900
    return Finished(*made, whole, {"law": [[0, 1]]}, {"law": [[0.5, 0.1]]}, {"law": more(shift, 0.01)},
                    {"law": [more(0.02, 0.02), more(0.04, 0.0)]})  # fmt: skip


def test_a_domain_against_the_rest_and_a_random_draw():
    counts = [np.array([[9, 1, 0], [2, 4, 4], [0, 2, 8]]), np.array([[5, 5, 0], [5, 5, 0], [5, 0, 5]])]
    found = switching_measure.against_the_rest(counts, 2, ("a", "b", "c"), "a")
    assert found.tokens == (5, 10)
    np.testing.assert_allclose(found.frequency[0], [[1.8, 0.2, 0], [0.2, 0.6, 1.2]])
    assert contrast.ranked(found)[0][:2] == (0, 0)
    off = [(0, 3), (1, 5), (0, 1)]
    drawn = switching_measure.at_random(off, MODEL, 0)
    assert sorted(layer for layer, _ in drawn) == [0, 0, 1] and not set(drawn) & set(off) and len(set(drawn)) == 3
    assert drawn != switching_measure.at_random(off, MODEL, 1)


def test_comparison(tmp_path):
    run = finished()
    assert run.growth("law", "law") == pytest.approx(math.expm1(0.1))
    assert run.of_others("law", run.off["law"]) == pytest.approx(math.expm1(0.01))
    assert run.at_random("law")[0] == pytest.approx((math.expm1(0.02) + math.expm1(0.04)) / 2)
    runs = {("global", 0): run, ("sequence", 0): finished(0.02)}
    switching_report.write(tmp_path, runs, switching.ARMS)
    assert switching_report.read(tmp_path / "results.json") == runs
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "| balanced over the global batch | law | 50% / 10% | +10.5% | +1.0% | +3.1% | +1.0% |" in table
    assert (tmp_path / "switching.png").stat().st_size > 10_000


@pytest.mark.slow
def test_toy_experiment(tmp_path, monkeypatch, capsys):
    """A run that another experiment has trained is measured; its experts are chosen on training text."""
    programs.fork_jobs(monkeypatch)
    for name, word in (("law", "whereas"), ("prose", "a fine day")):
        (tmp_path / "domains" / name).mkdir(parents=True)
        for i in range(20):
            (tmp_path / "domains" / name / f"{i}.txt").write_text(f"{word} {i}\n" * 40, encoding="utf-8")
    fields = [x for n, v in (TINY | {"data.cache_dir": tmp_path / "cache"}).items() for x in ("--set", f"{n}={v}")]
    shared = [f"--data={tmp_path}/domains", "--gpus=0", *fields]
    monkeypatch.setattr(sys, "argv", ["scope", f"--out={tmp_path}/other", "--only=global", *shared])
    assert balance_scope.main() == 0
    own = ["switching", f"--out={tmp_path}/out", "--only=global", "--count_batches=2", *shared]
    monkeypatch.setattr(sys, "argv", [*own, f"--runs={tmp_path}/other", "--domains=law"])
    status = switching.main()
    logs = [file.read_text(encoding="utf-8")[-1500:] for file in (tmp_path / "out").rglob("output.txt")]
    assert status == 0, "\n".join(logs)
    assert not (tmp_path / "out" / "prepare").exists() and "trained already" in capsys.readouterr().out
    run = switching_report.load(tmp_path / "out")["global", 0]
    assert run.options == {"domains": ["law"], "batches": 2} and set(run.whole) == {"law", "prose", ""}
    assert 0 < len(run.experts["law"]) == len(run.use["law"]) <= 10 and len(run.random["law"]) == 3
    there = json.loads((tmp_path / "other" / "global" / "seed0" / "eval.json").read_text(encoding="utf-8"))
    for row in there["domains"]:  # as without switches
        assert run.whole[row["domain"]] == pytest.approx(row["xent"], rel=1e-5)
    assert run.off["law"] != run.whole != run.random["law"][0]
    extra = dict(pair.split("=", 1) for pair in fields[1::2])
    cfg = pool.load_config(switching.CONFIG, str(tmp_path / "domains"), extra | {"loss.balance_batch": "1"})
    assert pool.find_trained(tmp_path / "other", cfg) is None
    monkeypatch.setattr(sys, "argv", [*own, f"--known={tmp_path}/out/results.json", "--domains=law"])
    assert switching.main() == 0 and "jobs on" not in capsys.readouterr().out
    counted = [flag.replace("--count_batches=2", "--count_batches=1") for flag in own]
    monkeypatch.setattr(sys, "argv", [*counted, f"--known={tmp_path}/out/results.json", f"--runs={tmp_path}/other",
                                      "--domains=law"])  # fmt: skip
    assert switching.main() == 0  # of other options: neither known nor done
    said = capsys.readouterr().out
    assert "--known: global, seed 0, is left out: --batches: 2 then, 1 now" in said
    assert "switching.json is made again: --batches: 2 then, 1 now" in said
    assert switching_report.load(tmp_path / "out")["global", 0].options == {"domains": ["law"], "batches": 1}
    monkeypatch.setattr(sys, "argv", [*own, "--domains=verse"])
    assert switching.main() == 2 and "--domains=verse: is not among the domains law, prose" in capsys.readouterr().err
