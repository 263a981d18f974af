"""experiments/finetuning.py: what is done in which order, the comparison, and mistakes on its command line."""

import json
import shutil
import sys
from dataclasses import replace

import pytest

from experiments import finetuning, pool
from moe_jax import config
from moe_jax.evaluate.held_out import TOTAL
from moe_jax.run import config_file

TINY = config.ModelConfig(vocab_size=257, d_model=16, num_layers=2, num_dense_layers=2, d_ff=32, num_heads=2,
                          num_kv_heads=2, head_dim=8)  # fmt: skip
RUN = config.RunConfig(model=TINY, data=config.DataConfig(seq_len=32))
UPCYCLED = "weights/run"


@pytest.fixture
def root(tmp_path):
    config_file.save_config(tmp_path / "dense", RUN)
    (tmp_path / "answers.jsonl").write_text('{"question": "a", "answer": "b"}\n', encoding="utf-8")
    return tmp_path


def planned(root, names):
    out = root / "out"
    runs = {(name, rate): finetuning.make_run(name, rate, out, {}) for name in names
            for rate in finetuning.ARMS[name].rates[:2]}  # fmt: skip
    return [job for job in finetuning.jobs(runs, root / "dense", "answers.jsonl", out) if not job.done]


def finish(root, run, product="eval.json"):
    (root / "out" / run / "checkpoints").mkdir(parents=True, exist_ok=True)
    (root / "out" / run / product).write_text("{}", encoding="utf-8")


def test_order(root):
    """Upcycling once and before its arms; the loss before training of one run with those weights, as the last jobs."""
    names = ["dense", "copies", "copies_router"]
    jobs = planned(root, names)
    assert [job.name for job in jobs] == ["dense at 3e-05, seed 0", "dense at 0.0001, seed 0", "copies"]
    assert jobs[-1].command[:4] == ["-m", "moe_jax.upcycle", f"--from={root}/dense", f"--workdir={root}/out/{UPCYCLED}"]
    assert f"--config=configs/finetune.py:{root}/dense,answers.jsonl" in jobs[0].command
    finish(root, UPCYCLED, "config.json")
    jobs = planned(root, names)[2:]
    assert [job.name.split()[0] for job in jobs] == ["copies", "copies", "copies_router", "copies_router"]
    assert all(f"--config=configs/finetune.py:{root}/out/{UPCYCLED},answers.jsonl" in job.command for job in jobs)
    assert "--config.optim.groups.router.freeze=true" in jobs[2].command
    for run in ("dense/3e-05", "dense/0.0001", "copies_router/3e-05"):
        finish(root, run)
    assert [job.name for job in planned(root, names)][-1] == "loss before dense at 3e-05"
    kept = {run: (root / "out" / run / "checkpoints").exists() for run in ("dense/3e-05", "dense/0.0001")}
    assert kept == {"dense/3e-05": True, "dense/0.0001": False}


def test_adapters_are_not_measured(root):
    """Their arms alone have no loss before training. With others it is measured where all weights are trained."""
    finish(root, "dense_lora/0.0003")
    assert [job.name for job in planned(root, ["dense_lora"])] == ["dense_lora at 0.001, seed 0"]
    assert not (root / "out" / "dense_lora/0.0003" / "checkpoints").exists()
    finish(root, "dense/3e-05")
    assert [job.name for job in planned(root, ["dense_lora", "dense"])][-1] == "loss before dense at 3e-05"


def fake_run(folder, end, adapters=0, before=None, middle=None):
    model = replace(TINY, lora=config.LoRAConfig(rank=adapters))
    config_file.save_config(folder, replace(RUN, model=model, init_from="runs/dense"))
    middle = end + 0.05 if middle is None else middle
    rows = [{"kind": "eval", "step": step, "xent": loss} for step, loss in ((10, middle), (20, end))]
    rows.append({"kind": "train", "step": 20, "tokens": 2.5e6})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    domains = [{"domain": "answers", "xent": 9.0}, {"domain": TOTAL, "xent": end}]
    (folder / "eval.json").write_text(json.dumps({"domains": domains}), encoding="utf-8")
    if before is not None:
        (folder / "measures.json").write_text(json.dumps({"start": {TOTAL: before}}), encoding="utf-8")


def report(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["finetuning", "--report_only", *flags])
    return finetuning.main()


def test_comparison(root, monkeypatch):
    """The table of all arms, also after the runs are gone, from results.json."""
    out = root / "out"
    fake_run(out / "dense" / "3e-05", 0.7, before=1.5)
    fake_run(out / "dense" / "0.0001", 0.6, middle=0.55)
    fake_run(out / "dense_lora" / "0.001", 0.65, adapters=16)
    fake_run(out / "copies" / "0.0001", 0.55)
    (out / "copies_lora" / "0.001").mkdir(parents=True)  # still running
    assert report(monkeypatch, f"--out={out}") == 0
    text, results = ((out / name).read_text(encoding="utf-8") for name in ("table.md", "results.json"))
    assert "|  | parameters | active | trained | before | lr 3e-05 | lr 0.0001 | lr 0.001 |" in text
    assert "| 1.500 | 0.700 → 0.700 | **0.550** → 0.600 |  |\n" in text  # the lowest is bold
    assert "| 1.500 |  |  | **0.650** → 0.650 |\n" in text  # adapters begin with the same weights
    assert "|  |  | **0.550** → 0.550 |  |\n" in text  # nothing is known of the copies before
    assert "after 2.50M answer tokens" in text
    found = json.loads(results)
    assert list(found) == ["dense", "dense_lora", "copies"] and found["dense"]["3e-05"]["curve"][1] == [20, 0.7]
    dense, lora = found["dense"]["0.0001"], found["dense_lora"]["0.001"]
    assert dense["trained"] == dense["parameters"] and lora["trained"] == lora["parameters"] - dense["parameters"] > 0
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    points = finetuning.figure(found).axes[0].lines[0].get_xydata().tolist()
    assert points == [[10, 0.55], [20, 0.6]]

    known = shutil.move(out / "results.json", root / "known.json")
    shutil.rmtree(out)
    fake_run(out / "copies" / "0.0003", 0.5, before=1.6)
    assert report(monkeypatch, f"--out={out}", f"--known={known}") == 0
    again = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert [again[name] for name in ("dense", "dense_lora")] == [found[name] for name in ("dense", "dense_lora")]
    assert {rate: run["before"] for rate, run in again["copies"].items()} == {"0.0001": 1.6, "0.0003": 1.6}


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--only=dense,copied"], "--only: no arm 'copied'; there are dense, dense_lora"),
        (["--run=nowhere"], "--run=nowhere: is not a run directory"),
        (["--only=copies_router", "--set", "train.stepz=5"], "stepz"),
        (["--set", "train.steps"], "--set train.steps: must be NAME=VALUE"),
        (["--data=nothing.jsonl"], "matches no file"),
        (["--known=nothing.json"], "--known=nothing.json: cannot be read"),
        (["--report_only"], "holds no finished run"),
    ],
)
def test_command_line(root, flags, says, monkeypatch, capsys):
    command = ["finetuning", f"--run={root}/dense", f"--data={root}/answers.jsonl", f"--out={root}/out"]
    monkeypatch.setattr(sys, "argv", command + flags)
    try:
        status = finetuning.main()
    except SystemExit as stop:
        status = stop.code
    assert status in (1, 2) and says in capsys.readouterr().err


def test_finished_arms_are_not_run_again(root, monkeypatch, capsys):
    """Runs of --known are not among the jobs, and the others are."""
    known = {"dense": {"3e-05": {"loss": 0.7, "before": None, "curve": [[1, 0.7]], "parameters": 1, "active": 1,
                                 "trained": 1, "answer_tokens": 1.0}}}  # fmt: skip
    (root / "known.json").write_text(json.dumps(known), encoding="utf-8")
    plans = []
    monkeypatch.setattr(pool, "run_all", lambda plan, *_: plans.append(plan()) or [])
    monkeypatch.setattr(sys, "argv", ["finetuning", f"--run={root}/dense", f"--data={root}/answers.jsonl",
                                      f"--out={root}/out", f"--known={root}/known.json", "--only=dense"])  # fmt: skip
    assert finetuning.main() == 0
    assert [job.name for job in plans[0]] == ["dense at 0.0001, seed 0", "dense at 0.0003, seed 0"]
    assert "| dense | 0.0M | 0.0M | 0.0M |  | **0.700** → 0.700 |" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--set=optim.weight_decay=0.5"])  # another training than the record's
    assert finetuning.main() == 1 and len(plans[1]) == 3
    assert "--known: dense at 3e-05, seed 0, is left out: config.optim.weight_decay: " in capsys.readouterr().out


@pytest.mark.parametrize(("code", "says"), [("import os; os.kill(os.getpid(), 9)", "(exit status -9); see "),
                                            ("", "(exit status 0, without eval.json); see ")])  # fmt: skip
def test_a_failed_job_shows_its_status(tmp_path, code, says, capfd):
    """A process that is killed leaves no message of its own."""
    job = pool.Job("a job", tmp_path, ["-c", code])
    assert pool.run_all(lambda: [job], 0, 1) == [job]
    assert f"failed: a job {says}{tmp_path}" in capfd.readouterr().err
