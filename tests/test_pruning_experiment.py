"""experiments/pruning.py: what is done in which order, the comparison, and all of it at toy size."""

import json
import math
import sys

import pytest

from experiments import pruning, pruning_report, records
from experiments.pruning_report import Finished
from tests import programs

TINY = {
    "train.steps": 4, "data.batch_size": 8, "data.seq_len": 32, "data.num_workers": 0, "data.tokenizer.kind": "bytes",
    "model.vocab_size": 257, "model.d_model": 16, "model.num_layers": 2, "model.num_heads": 2, "model.num_kv_heads": 2,
    "model.head_dim": 8, "model.moe.num_experts": 8, "model.moe.d_expert": 8, "optim.warmup_steps": 1,
}  # fmt: skip


def finished(**fields) -> Finished:
    losses = lambda shift: {str(n): {"law": 2.0 + shift * (32 - n), "": 2.5 + shift * (32 - n)} for n in (32, 24, 16)}
    usual = {"settings": {"train.steps": 900}, "options": {"experts": [24, 16], "batches": 32, "after_steps": 50}}
    usual |= {"whole": 32, "kept": {"32": 1.0, "24": 0.9, "16": 0.7}}
    usual |= {"used": losses(0.01), "random": losses(0.05), "after": losses(0.005)}
    return Finished(**usual | fields)


def test_order(tmp_path, monkeypatch):
    """Training, then counts and pruned weights, then what goes on with each model, from its own weights.

    A run of another folder is not trained, and nothing is written into it.
    """
    run = pruning.trained(tmp_path, "sequence", 0, {"train.steps": "900"})
    assert run.overrides["loss.balance_batch"] == "1"
    monkeypatch.setattr(records, "settings_in", lambda folder: {"train.steps": 900})
    jobs = lambda source=run.folder: pruning.jobs([(run, source)], [24, 16], 32, 50, 8, "domains")
    names = lambda *source: [job.name for job in jobs(*source) if not job.done]
    assert names() == ["sequence, seed 0"]
    other = tmp_path / "other" / "scope_1" / "seed0"
    for folder in (other, run.folder):
        folder.mkdir(parents=True)
        (folder / "eval.json").write_text("{}", encoding="utf-8")
    assert names() == names(other) == ["pruning of sequence, seed 0"]
    assert jobs(other)[0].command[2:4] == [str(other), f"--out={run.folder}"]
    made = {"options": {"experts": [24, 16], "batches": 8}, "settings": {"train.steps": 900}}
    for wrong in (
        {"options": {"experts": [24, 16], "batches": 9}},
        {"options": {"experts": [24], "batches": 8}},
        {"settings": {"train.steps": 450}},
    ):  # of another call, or of another training
        (run.folder / "pruned.json").write_text(json.dumps(made | wrong), encoding="utf-8")
        assert names() == ["pruning of sequence, seed 0"]
    (run.folder / "pruned.json").write_text(json.dumps(made), encoding="utf-8")
    assert names() == names(other) == [f"sequence, {n} experts, seed 0" for n in (32, 24, 16)]
    whole, pruned = (pruning.continued(run, other, n, 32, 50, 8) for n in (32, 16))
    assert whole.overrides["init_from"] == other and pruned.overrides["init_from"] == run.folder / "pruned" / "16"
    assert whole.folder.is_relative_to(run.folder)
    assert pruned.overrides["model.moe.num_experts"] == 16 and pruned.overrides["train.steps"] == 50
    assert pruned.overrides["loss.balance_batch"] == "1" and pruned.overrides["seed"] != run.seed


def test_comparison(tmp_path):
    """Growth over the model that was trained as long; saved numbers are read again; what is missing is left empty."""
    run = finished()
    assert run.experts == [32, 24, 16] and run.growth(run.used, 16) == pytest.approx(math.exp(0.16) - 1)
    assert run.growth(run.after, 24, "law") == pytest.approx(math.exp(0.04) - 1)
    runs = {
        ("global", 0): run,
        ("sequence", 0): finished(after={}, options={"experts": [24, 16], "batches": 32, "after_steps": 0}),
    }
    pruning_report.write(tmp_path, runs, pruning.ARMS)
    assert pruning_report.read(tmp_path / "results.json") == runs
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "| balanced over the global batch | 16 | 70% | 14.30 | +17.4% | 27.11 | +122.6% | 13.20 | +8.3% |" in table
    assert "| balanced in each sequence | 32 | 100% | 12.18 |  | 12.18 |  |  |  |" in table
    assert (tmp_path / "pruning.png").stat().st_size > 10_000
    assert run.complete and not runs["sequence", 0].complete


def test_mistakes(tmp_path, monkeypatch, capsys):
    for options, said in ((["--only=all"], "no arm 'all'"), (["--experts=a"], "--experts=a: must be numbers"),
                          (["--after_steps=0"], "--after_steps=0: must be ≥ 1")):  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["pruning", *options])
        with pytest.raises(SystemExit):
            pruning.main()
        assert said in capsys.readouterr().err
    (tmp_path / "law.txt").write_text("whereas\n" * 400, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["pruning", f"--data={tmp_path}", f"--out={tmp_path}/out", "--experts=32"])
    assert pruning.main() == 2 and "--experts=32: must be in [4, 31]" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_toy_experiment(tmp_path, monkeypatch, capsys):
    """The experiment runs up to its figure; experts without tokens cost nothing; a second call runs nothing."""
    programs.fork_jobs(monkeypatch)
    for name, word in (("law", "whereas"), ("prose", "a fine day")):
        (tmp_path / "domains" / name).mkdir(parents=True)
        for i in range(20):
            (tmp_path / "domains" / name / f"{i}.txt").write_text(f"{word} {i}\n" * 40, encoding="utf-8")
    fields = TINY | {"data.cache_dir": tmp_path / "cache"}
    command = ["pruning", f"--data={tmp_path}/domains", f"--out={tmp_path}/out", "--gpus=0", "--only=global",
               "--experts=6", "--after_steps=2", "--count_batches=2"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", command + [x for n, v in fields.items() for x in ("--set", f"{n}={v}")])
    status = pruning.main()
    logs = [file.read_text(encoding="utf-8")[-1500:] for file in (tmp_path / "out").rglob("output.txt")]
    assert status == 0, "\n".join(logs)
    run = pruning_report.load(tmp_path / "out")["global", 0]
    counts = json.loads((tmp_path / "out" / "global" / "seed0" / "counts.json").read_text(encoding="utf-8"))
    kept = [sorted(map(sum, zip(*layer, strict=True)))[-6:] for layer in counts["tokens_per_expert"]]
    totals = [sum(map(sum, layer)) for layer in counts["tokens_per_expert"]]
    assert totals == [2 * 8 * 32 * 4] * 2 or min(totals) > 0
    assert run.kept["6"] == pytest.approx(sum(sum(k) / t for k, t in zip(kept, totals, strict=True)) / 2)
    assert (
        run.complete
        and run.options == {"experts": [6], "batches": 2, "after_steps": 2}
        and set(run.used["6"]) == {"law", "prose", ""}
    )
    assert run.used["6"] != run.random["6"] and run.used["8"] != run.after["8"]
    assert "| balanced over the global batch | 6 |" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*sys.argv, f"--known={tmp_path}/out/results.json"])
    assert pruning.main() == 0 and "jobs on" not in capsys.readouterr().out
