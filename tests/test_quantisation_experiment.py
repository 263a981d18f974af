"""experiments/quantisation.py: what is measured, the comparison, and all of it at toy size."""

import json
import math
import sys

import numpy as np
import pytest
from test_pruning_experiment import TINY

from experiments import pool, quantisation, quantisation_report
from experiments.quantisation_measure import PART as PART_NAME
from experiments.quantisation_measure import Way, ways
from experiments.quantisation_report import Finished
from moe_jax.quant.allocate import allocate
from moe_jax.quant.round import LayerStats
from moe_jax.run import config_file
from tests import programs

PART = PART_NAME.format(rows=8, group=8)


def finished(shift=1.0) -> Finished:
    """Losses that grow as bits fall, least with MC-MoE; in two domains."""
    worse = {"uniform": 3.0, "turns": 4.0, "frequency": 2.0, "mc": 1.0}
    rows = []
    for way in ways([2.0, 2.5], 3):
        more = shift * (3 - way.bits) * worse[way.allocate] * (2 if way.method == "rtn" else 1) * (1 + way.seed / 10)
        rows.append(way._asdict() | {"losses": {"law": 2.0 + more, "": 2.5 + more}, "packed_bits": way.bits + 0.1})
    return Finished({"train.steps": 900}, {"rows": 64, "group": 128, "step": 900}, {"law": 2.0, "": 2.5}, rows)


def test_ways():
    """Three seeds of calibration near three bits; the same mean for all, or neighbours by turns; the choice alone tells
    experts by their use from experts by turns."""
    found = ways([2.0, 2.5, 3.0, 4.0], 3)
    assert len(found) == 15 + 2 * 7 + 15 and len(set(found)) == len(found)
    assert {w.bits for w in found if w.seed} == {2.5, 3.0} and {w.seed for w in found if w.method == "rtn"} == {0}
    made = {w: w.settings(64, 8) for w in found}
    assert Way("gptq", 2.5, "uniform", 1) not in made and made[Way("gptq", 2.0, "uniform", 0)].choices == ()
    stats = [LayerStats(**dict.fromkeys(LayerStats._fields) | {"counts": np.arange(8.0)})]
    for way, asked in made.items():
        if way.allocate == "turns":
            turns, by_use = (
                allocate(name, stats, choices, way.bits).bits[0]
                for name, choices in (
                    ("turns", asked.choices),
                    ("frequency", made[way._replace(allocate="frequency")].choices),
                )
            )
            assert sorted(turns) == sorted(by_use) and len({*turns}) == 2 and turns.mean() == way.bits, way
    assert made[Way("gptq", 2.0, "mc", 0)].choices == made[Way("gptq", 2.5, "mc", 2)].choices == (1, 2, 3)
    assert made[Way("rtn", 4.0, "frequency", 0)].choices == (3, 4, 5)
    assert {(s.group, s.rows) for s in made.values()} == {(64, 8)}


def test_order(tmp_path):
    """Training, then rounding; finished runs of other folders are rounded at once."""
    run = quantisation.trained(tmp_path, "sequence", {"train.steps": "900"})
    assert run.overrides["loss.balance_batch"] == "1"
    names = lambda found: [
        job.name for job in quantisation.jobs([run], found, tmp_path, [], {}, "text") if not job.done
    ]
    assert names({}) == ["sequence, seed 0"]
    run.folder.mkdir(parents=True)
    (tmp_path / "moe").mkdir()
    for folder in (tmp_path / "moe", run.folder):
        (folder / "config.json").write_text("{}", encoding="utf-8")
    assert names({"moe": tmp_path / "moe"}) == ["sequence, seed 0", "rounding of moe"]
    (run.folder / "eval.json").write_text("{}", encoding="utf-8")
    assert names({}) == ["rounding of sequence"]


def test_comparison(tmp_path):
    """Means over seeds with their range; saved numbers are read again; what is missing is left empty."""
    one = finished()
    losses = [2.5 + 0.5 * (1 + s / 10) for s in range(3)]
    assert one.perplexities("gptq", 2.5, "mc") == pytest.approx([math.exp(x) for x in losses])
    mean = sum(map(math.exp, losses)) / 3
    assert one.growth("gptq", 2.5, "mc") == pytest.approx(mean / math.exp(2.5) - 1)
    assert math.isnan(one.growth("gptq", 3.0, "mc")) and one.has(ways([2.0], 1)) and not one.has(ways([3.0], 1))
    fewer = finished(0.5)
    fewer = fewer._replace(ways=[row for row in fewer.ways if row["allocate"] != "frequency"])
    models = {"global": one, "sequence": fewer}
    quantisation_report.write(tmp_path, models, quantisation.ARMS)
    assert quantisation_report.read(tmp_path / "results.json") == models
    rows = [
        row | {"allocate": "uniform"} if row["allocate"] == "turns" and row["bits"] == 2.5 else row for row in one.ways
    ]
    earlier = [{"name": "global"} | one._replace(ways=rows)._asdict()]
    (tmp_path / "earlier.json").write_text(json.dumps(earlier), encoding="utf-8")
    assert quantisation_report.read(tmp_path / "earlier.json") == {"global": one}
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert (
        f"{mean:.2f} [{math.exp(losses[0]):.2f}, {math.exp(losses[2]):.2f}] ({mean / math.exp(2.5) - 1:+.1%})" in table
    )
    assert "| balanced in each sequence |  |  | as it is | 12.18 |" in table
    assert (
        "| growth at 2.5 bits, GPTQ | global, by turns | global, by use | global, MC-MoE | sequence, by turns |"
        in table
    )
    assert (tmp_path / "quantisation.png").stat().st_size > 10_000


def test_mistakes(tmp_path, monkeypatch, capsys):
    mistakes = {"--only=all": "no arm 'all'", "--bits=1,2": "--bits=1,2: must be numbers from 2 to 4",
                "--rows=0": "--rows=0: must be ≥ 1", "--run=a --runs=b": "give one of them"}  # fmt: skip
    for options, said in mistakes.items():
        monkeypatch.setattr(sys, "argv", ["quantisation", *options.split()])
        with pytest.raises(SystemExit):
            quantisation.main()
        assert said in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["quantisation", f"--run={tmp_path}/none", f"--out={tmp_path}/out"])
    assert quantisation.main() == 2 and "none: is not a run directory" in capsys.readouterr().err
    stopped = tmp_path / "runs" / "global" / "seed0"  # not finished, and then trained as no arm is
    (stopped / "checkpoints").mkdir(parents=True)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "law.txt").write_text("whereas\n" * 99, encoding="utf-8")
    trained = quantisation.trained(tmp_path, "global", {"train.steps": "120"})
    config_file.save_config(stopped, pool.load_config(quantisation.CONFIG, str(tmp_path / "text"), trained.overrides))
    monkeypatch.setattr(sys, "argv", ["quantisation", f"--run={stopped}", f"--out={tmp_path}/out"])
    assert quantisation.main() == 2 and "seed0: is not finished" in capsys.readouterr().err
    command = ["quantisation", f"--runs={tmp_path}/runs", f"--data={tmp_path}/text", "--only=global"]
    jobs = []
    for steps, there in ((120, False), (120, True), (130, True)):
        monkeypatch.setattr(sys, "argv", [*command, "--set", f"train.steps={steps}", f"--out={tmp_path}/out"])
        if there:
            (stopped / "eval.json").write_text("{}", encoding="utf-8")
        if there and steps == 120:
            monkeypatch.setattr(pool, "run_all", lambda plan, *_: jobs.extend(plan()) or [])
            assert quantisation.main() == 1 and [job.name for job in jobs] == ["rounding of global"]
            assert "holds no finished run" in capsys.readouterr().err
        else:
            assert quantisation.main() == 2
            assert "holds no finished run that was trained as 'global'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_finished_measurement_goes_on(tmp_path):
    """Results that lack ways become the part that is gone on from, unless that has more."""
    product, part = tmp_path / "quantised.json", tmp_path / PART
    for ways_there, kept in ((None, 3), (2, 3), (5, 5)):
        product.write_text(json.dumps({"ways": [0] * 3}), encoding="utf-8")
        part.unlink(missing_ok=True)
        if ways_there:
            part.write_text(json.dumps({"ways": [0] * ways_there}), encoding="utf-8")
        quantisation.go_on(tmp_path, {"rows": 8, "group": 8})
        assert len(json.loads(part.read_text(encoding="utf-8"))["ways"]) == kept and not product.exists()


@pytest.mark.slow
def test_toy_experiment(tmp_path, monkeypatch, capsys):
    """Trains an arm, rounds it in a few ways up to the figure; takes it by its folder; a second call runs nothing."""
    programs.fork_jobs(monkeypatch)
    for name, word in (("law", "whereas"), ("prose", "a fine day")):
        (tmp_path / "domains" / name).mkdir(parents=True)
        for i in range(20):
            (tmp_path / "domains" / name / f"{i}.txt").write_text(f"{word} {i}\n" * 40, encoding="utf-8")
    fields = TINY | {"data.cache_dir": tmp_path / "cache"}
    command = ["quantisation", f"--data={tmp_path}/domains", "--gpus=0", "--only=global", "--bits=2.5", "--seeds=1",
               "--rows=8", "--group=8"]  # fmt: skip
    sets = [x for n, v in fields.items() for x in ("--set", f"{n}={v}")]

    def run(*more):
        monkeypatch.setattr(sys, "argv", [*command, *sets, *more])
        status = quantisation.main()
        logs = [file.read_text(encoding="utf-8")[-1500:] for file in tmp_path.rglob("output.txt")]
        assert status == 0, "\n".join(logs)
        return capsys.readouterr().out

    assert "| balanced over the global batch |" in run(f"--out={tmp_path}/out")
    one = quantisation_report.load(tmp_path / "out")["global"]
    assert one.has(ways([2.5], 1)) and set(one.whole) == {"law", "prose", ""}
    assert {row["experts_bits"] for row in one.ways} == {2.5} and all(row["losses"][""] > 0 for row in one.ways)
    assert len({row["losses"][""] for row in one.ways}) == 6
    part = json.loads((tmp_path / "out" / "global" / "rounded" / PART).read_text(encoding="utf-8"))
    assert part["ways"] == one.ways
    assert "jobs on" not in run(f"--out={tmp_path}/out", f"--known={tmp_path}/out/results.json")
    rounded = tmp_path / "out2" / "global" / "rounded"
    rounded.mkdir(parents=True)  # a model of which one way is missing
    (rounded / "quantised.json").write_text(json.dumps(part | {"ways": one.ways[:-1]}), encoding="utf-8")
    assert "1 jobs on" in run(f"--out={tmp_path}/out2", f"--run={tmp_path}/out/global/seed0")
    again = quantisation_report.load(tmp_path / "out2")["global"]
    # Another model's result of fewer ways, not planned in this call, stays; one of other options is neither known nor
    # done, and its ways stay in their own file.
    beside = tmp_path / "out2" / "other" / "rounded" / "quantised.json"
    beside.parent.mkdir(parents=True)
    beside.write_text(json.dumps(part | {"ways": one.ways[:1]}), encoding="utf-8")
    command[command.index("--rows=8")] = "--rows=4"
    said = run(f"--out={tmp_path}/out2", f"--run={tmp_path}/out/global/seed0", f"--known={tmp_path}/out/results.json")
    assert "--known: global is left out: --rows: 8 then, 4 now" in said and "is made again: --rows: 8 then" in said
    assert "other is left out: --rows: 8 then, 4 now" in said and beside.is_file() and (rounded / PART).is_file()
    assert quantisation_report.load(tmp_path / "out2")["global"].options == {"rows": 4, "group": 8, "step": 4}
    assert again.ways[:-1] == one.ways[:-1] and again.ways[-1]["losses"] == one.ways[-1]["losses"]
