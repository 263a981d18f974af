"""experiments/pools.py: which runs are reused, and all of it at toy size."""

import json
import math
import sys

import pytest
from test_pruning_experiment import TINY

from experiments import pool, pools, pools_report
from tests import programs


def test_mistakes(monkeypatch, capsys):
    for options, said in ((["--only=all"], "no arm 'all'"), (["--keep=a"], "--keep=a: must be numbers from"),
                          (["--sizes=0"], "--sizes=0: must be numbers from 1"),
                          (["--prefix=0"], "--prefix=0: must be ≥ 1")):  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["pools", *options])
        with pytest.raises(SystemExit):
            pools.main()
        assert said in capsys.readouterr().err


def test_rows_of_other_options(tmp_path):
    """A table of models that were measured otherwise leaves cells empty, and says of which prefix each is."""

    def made(prefix, share, size):
        losses = {"law": 2.0, "prose": 3.0, "": 2.5}
        pairs = {"all": losses, f"prefix {size}": losses, f"document {size}": losses}
        return pools_report.Finished(
            {}, {"prefix": prefix}, 4, {"100": 8, share: 4}, {"100": losses, share: losses}, pairs
        )

    runs = {("pools", 0): made(64, "50", 8), ("global", 0): made(16, "25", 16)}
    pools_report.write(tmp_path, runs, {name: arm.label for name, arm in pools.ARMS.items()})
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "first 64 or 16 of each" in text and "| model | 100 % (8) | 50 % (4) |  | 25 % (4) |  |" in text
    assert "| document pools, global batch | 12.18 | 12.18 | +0.0% |  |  |" in text


@pytest.mark.slow
def test_toy_experiment(tmp_path, monkeypatch, capsys):
    """One arm up to the figure; its run serves another call, and its record a third, which runs nothing."""
    programs.fork_jobs(monkeypatch)
    for name, word in (("law", "whereas"), ("prose", "a fine day")):
        (tmp_path / "domains" / name).mkdir(parents=True)
        for i in range(20):
            (tmp_path / "domains" / name / f"{i}.txt").write_text(f"{word} {i}\n" * 40, encoding="utf-8")
    fields = TINY | {"data.cache_dir": tmp_path / "cache"}
    sets = [x for n, v in fields.items() for x in ("--set", f"{n}={v}")]
    command = ["pools", f"--data={tmp_path}/domains", "--gpus=0", "--keep=50", "--sizes=4", "--prefix=8",
               "--use_batches=2", *sets]  # fmt: skip
    monkeypatch.setattr(sys, "argv", [*command, f"--out={tmp_path}/first", "--only=pools"])
    status = pools.main()
    logs = [file.read_text(encoding="utf-8")[-1500:] for file in (tmp_path / "first").rglob("output.txt")]
    assert status == 0, "\n".join(logs)
    run = pools_report.load(tmp_path / "first")["pools", 0]
    assert run.experts == {"100": 8, "50": 4} and set(run.kept["50"]) == {"law", "prose", ""}
    assert set(run.pools) == {"all", "prefix 4", "document 4"} and run.kept["50"] != run.kept["100"]
    assert run.settings["model.moe.pool_min"] == 4 and run.mean("100") == pytest.approx(
        math.exp((run.kept["100"]["law"] + run.kept["100"]["prose"]) / 2))  # fmt: skip
    said = capsys.readouterr().out
    assert "| document pools, global batch |" in said and "document against prefix, 4 experts" in said
    assert (tmp_path / "first" / "pools.png").stat().st_size > 10_000

    again = pools.trained(tmp_path / "second", "pools", 0, fields)
    cfg = pool.load_config(pools.CONFIG, str(tmp_path / "domains"), again.overrides)
    source = pool.find_trained(tmp_path / "first", cfg)
    assert source == tmp_path / "first" / "pools" / "seed0" and not pool.find_trained(tmp_path / "nowhere", cfg)
    assert pools.jobs([(again, source)], {}, "domains")[0].product == "pools.json"  # nothing is trained
    for other in (
        {"train.steps": "5"},
        {"optim.name": "muon"},
        {"explore.noise": "0.5"},
        {"data.tokenizer.end_of_text": "x"},
    ):
        changed = pool.load_config(pools.CONFIG, str(tmp_path / "domains"), again.overrides | other)
        assert not pool.find_trained(tmp_path / "first", changed)

    saved = pools_report.read(tmp_path / "first" / "results.json")
    assert json.dumps(saved["pools", 0]) == json.dumps(run)
    monkeypatch.setattr(pool, "run_all", lambda *_: pytest.fail("nothing is to be run"))
    monkeypatch.setattr(sys, "argv", [*command, f"--out={tmp_path}/third", "--only=pools",
                                      f"--known={tmp_path}/first/results.json"])  # fmt: skip
    assert pools.main() == 0
    # Neither a record nor a result of other options counts; both are named. Rows of other options share a table.
    monkeypatch.setattr(pool, "run_all", lambda plan, *_: [job for job in plan() if not job.done])
    command[command.index("--prefix=8")] = "--prefix=4"
    monkeypatch.setattr(sys, "argv", [*command, f"--out={tmp_path}/first", "--only=pools",
                                      f"--known={tmp_path}/first/results.json"])  # fmt: skip
    capsys.readouterr()
    assert pools.main() == 1 and capsys.readouterr().out.count("left out: --prefix: 8 then, 4 now") == 2
