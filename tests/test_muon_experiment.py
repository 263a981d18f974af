"""experiments/muon.py: which runs follow from which results, the pool that works them off, and the comparison."""

import json
import math
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import muon, muon_figures, muon_matrices, muon_report, pool
from experiments.muon import Arm
from moe_jax import config, data
from moe_jax.errors import UserError
from moe_jax.parallel import sharding
from moe_jax.run import checkpoint, config_file
from moe_jax.train.state import init_state, process_rows

PARTS = list(muon.PARTS)


def best_at(**losses):
    """`Best` from {optimizer: {rate: loss}}."""

    def best(optimizer, rates):
        known = losses[optimizer]
        return min(rates, key=known.get) if all(rate in known for rate in rates) else None

    return best


# --- plan ------------------------------------------------------------------------------------------------------------


def test_everything_else_waits_for_the_sweep():
    runs, measured = muon.planned(PARTS, lambda optimizer, rates: None)
    assert [run[1].name for run in runs[:3]] == ["adamw_lr0.0005", "muon_lr0.0005", "adamw_lr0.001"]
    assert len(runs) == 8 and not measured and {seed for _, _, seed in runs} == {0}


def test_the_runs_at_the_best_rates():
    runs, measured = muon.planned(PARTS, lambda optimizer, rates: {"adamw": 1e-3, "muon": 2e-3}[optimizer])
    names = [f"{arm.name}/seed{seed}" for _, arm, seed in runs]
    assert len(names) == len(set(names)) == 8 + 4 + 4 + 2 + 3
    assert names[8:12] == ["adamw_lr0.001/seed1", "muon_lr0.002/seed1", "adamw_lr0.001/seed2", "muon_lr0.002/seed2"]
    assert names[12:16] == [f"muon_lr0.002_rms{x}/seed0" for x in (0.05, 0.1, 0.4, 0.8)]
    assert names[16:18] == ["adamw_lr0.001_decay0/seed0", "muon_lr0.002_decay0/seed0"]
    assert names[18:] == [f"muon_lr0.002_tokens{x}/seed0" for x in (0.5, 0.35, 0.25)]
    assert {arm.name for arm in measured} == {
        "adamw_lr0.001",
        *(name.split("/")[0] for name in names[12:18]),
        "muon_lr0.002",
    }
    given, _ = muon.planned(["a"], lambda optimizer, rates: pytest.fail("swept"), {"adamw": 4e-3, "muon": 16e-3})
    assert [(arm.name, seed) for _, arm, seed in given[:6]] == [
        (f"{name}_lr{rate}", seed) for seed in (0, 1, 2) for name, rate in (("adamw", 0.004), ("muon", 0.016))
    ]
    only_b, _ = muon.planned(["b"], lambda optimizer, rates: 1e-3)
    assert [part for part, _, _ in only_b].count("b") == 4 and len(only_b) == 12


def test_a_sweep_goes_on_past_its_ends():
    falling, rising = {x: -x for x in (5e-4, 1e-3, 2e-3, 4e-3)}, {x: x for x in (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)}
    best = best_at(adamw=falling, muon=rising)
    assert muon.sweep("adamw", best) == ([5e-4, 1e-3, 2e-3, 4e-3, 8e-3], None)  # 8e-3 is to be tried
    assert muon.sweep("muon", best) == ([1.25e-4, *rising], None)
    falling[8e-3] = 0.0
    assert muon.sweep("adamw", best) == ([5e-4, 1e-3, 2e-3, 4e-3, 8e-3], 4e-3)
    endless = lambda optimizer, rates: rates[-1]
    assert muon.sweep("adamw", endless) == ([5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 16e-3, 32e-3], 32e-3)


def test_run(tmp_path):
    run = muon.make_run(tmp_path, Arm("muon", 2e-3, tokens=0.65), 1, 900, {"train.log_every": "2"})
    assert run.folder == tmp_path / "muon_lr0.002_tokens0.65" / "seed1"
    fields = {"optim.name": "muon", "optim.lr": 2e-3, "train.steps": 585, "seed": 1, "train.log_every": "2"}
    assert run.overrides | fields == run.overrides
    assert (run.overrides["train.eval_every"], run.overrides["train.checkpoint_every"]) == (58, 195)


# --- pool ------------------------------------------------------------------------------------------------------------


def job(folder: Path, name: str, code: str = "") -> pool.Job:
    """Writes `product`, unless its code fails."""
    target = folder / name / "product"
    return pool.Job(name, folder / name, ["-c", f"{code}\nopen({str(target)!r}, 'w').close()"], "product")


def test_pool_asks_again_after_every_job(tmp_path, capsys):
    first, bad, then = job(tmp_path, "first"), job(tmp_path, "bad", "raise SystemExit(3)"), job(tmp_path, "then")
    old = job(tmp_path, "old", "raise SystemExit(3)")
    old.folder.mkdir()
    (old.folder / "product").touch()  # done: not run again
    plan = lambda: [old, first, bad] + ([then] if first.done else [])
    assert pool.run_all(plan, 0, 1) == [bad]
    assert first.done and then.done and not bad.done
    assert "3 jobs on the CPU, 1 done already" in capsys.readouterr().out
    assert (bad.folder / "output.txt").exists()


def test_pool_gives_each_job_a_device(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".9")  # JAX refuses both names of the share at a time
    names = "'CUDA_VISIBLE_DEVICES', 'XLA_CLIENT_MEM_FRACTION', 'XLA_PYTHON_CLIENT_MEM_FRACTION'"
    code = f"import os; print(*map(os.environ.get, ({names})))"
    jobs = [job(tmp_path, f"{i}", code) for i in range(4)]
    assert pool.run_all(lambda: jobs, None, 2) == []
    seen = [(one.folder / "output.txt").read_text(encoding="utf-8").split() for one in jobs]
    assert sorted(device for device, *_ in seen) == ["4", "4", "7", "7"]
    assert {tuple(shares) for _, *shares in seen} == {("0.450", "None")}


@pytest.mark.parametrize(
    ("flags", "says"),
    [(["--part=a,e"], "no part 'e'"), (["--set", "lr"], "must be NAME=VALUE"), (["--report_only"], "no finished run")],
)
def test_command_line(tmp_path, flags, says, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["muon", f"--out={tmp_path}", *flags])
    try:
        status = muon.main()
    except SystemExit as stop:
        status = stop.code
    assert status in (1, 2) and says in capsys.readouterr().err


def test_plan_counts_what_is_left(tmp_path):
    (tmp_path / "adamw_lr0.001" / "seed0").mkdir(parents=True)
    (tmp_path / "adamw_lr0.001" / "seed0" / "eval.json").write_text('{"domains": [{"xent": 2.0}]}', encoding="utf-8")
    nothing = muon.Done(tmp_path, [], 900)
    text = muon.estimate(["a", "b"], nothing, ["*"], 4)
    assert " 8 runs,  7 to do,  24.5 GPU minutes" in text and " 7 runs,  7 to do,  17.8 GPU minutes" in text
    assert "in all 56 GPU minutes at 3.5 a run: 14 on 4 GPUs" in text
    assert "in all 7 GPU minutes" in muon.estimate(["a"], nothing, ["muon_*/seed[12]"], 4)


# --- the comparison --------------------------------------------------------------------------------------------------

KINDS = {"attention q": (2,), "attention o": (2,), "expert gate": (2, 4), "router": (2,)}


def fake_run(out: Path, arm: Arm, seed: int, end: float, spread: float = 0.0, measured: bool = True) -> None:
    """100 steps at most, of 1000 tokens and 0.5 s; the loss falls like 1/√step to `end`."""
    folder, steps = out / arm.name / f"seed{seed}", round(100 * arm.tokens)
    folder.mkdir(parents=True)
    optim = {"name": arm.optimizer, "lr": arm.lr, "update_rms": arm.update_rms, "weight_decay": arm.weight_decay}
    config = {"seed": seed, "optim": optim, "train": {"steps": steps}}
    loss = lambda step: end + 2 * (step**-0.5 - steps**-0.5)
    row = lambda step: {"kind": "train", "step": step, "xent": loss(step), "tokens": 1e3 * step, "step_seconds": 0.5}
    rows = [row(step) for step in range(1, steps + 1)]
    rows += [{"kind": "eval", "step": step, "xent": loss(step) + 0.5} for step in range(10, steps + 1, 10)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    total = {"domain": "all", "xent": end + 0.5, "perplexity": math.exp(end + 0.5)}
    (folder / "eval.json").write_text(json.dumps({"step": steps, "domains": [total]}), encoding="utf-8")
    if measured:
        entropy = 0.95 if arm.optimizer == "muon" else 0.9
        numbers = {"weight_rms": {kind: [0.03, 0.04] for kind in [*KINDS, "embedding"]},
                   "update_rms": {kind: [arm.update_rms] * 2 for kind in [*KINDS, "embedding"]},
                   "svd_entropy": {k: np.full(shape, entropy).tolist() for k, shape in KINDS.items()}}  # fmt: skip
        (folder / "matrices.json").write_text(json.dumps(numbers), encoding="utf-8")


@pytest.fixture
def finished(tmp_path):
    for i, rate in enumerate((1e-3, 2e-3, 4e-3)):
        fake_run(tmp_path, Arm("adamw", rate), 0, 2.0 + 0.1 * abs(i - 1))
        fake_run(tmp_path, Arm("muon", rate), 0, 1.9 + 0.1 * i)
    fake_run(tmp_path, Arm("adamw", 2e-3), 1, 2.02, measured=False)
    fake_run(tmp_path, Arm("muon", 1e-3), 1, 1.90, measured=False)
    for share, end in ((0.5, 2.04), (0.8, 1.96)):
        fake_run(tmp_path, Arm("muon", 1e-3, tokens=share), 0, end, measured=False)
    for rms, end in ((0.05, 2.3), (0.4, 1.95)):
        fake_run(tmp_path, Arm("muon", 1e-3, update_rms=rms), 0, end)
    fake_run(tmp_path, Arm("muon", 1e-3, weight_decay=0.0), 0, 1.97)
    return tmp_path


def test_tokens_needed(finished):
    c = muon_report.Comparison(muon_report.load(finished))
    assert {name: run.lr for name, run in c.best.items()} == {"adamw": 2e-3, "muon": 1e-3}
    needed = muon_report.tokens_needed(c)
    # The goal 2.5 lies between 2.54 at 50 % and 2.46 at 80 %: half way in log tokens. Seed 1's, 2.52, a quarter.
    np.testing.assert_allclose(needed["runs of their own, held-out loss"], [0.5 * 1.6**0.5, 0.5 * 1.6**0.25], rtol=1e-6)
    along = needed["along one run, held-out loss"][0]  # 1.9 + 2·(s^−½ − 0.1) = 2 at s = 44.4
    assert along == pytest.approx(0.444, rel=0.01) and "runs of their own, training loss" in needed
    crossing = lambda goal: muon_report.crossing(np.array([1.0, 4.0]), np.array([3.0, 2.0]), goal)
    assert crossing(2.5) == pytest.approx(2.0) and crossing(1.9) == math.inf and crossing(3.0) == -math.inf


def test_files(finished):
    c = muon_report.Comparison(muon_report.load(finished))
    muon_report.write(finished, c)
    muon_figures.write(finished, c)
    text = (finished / "table.md").read_text(encoding="utf-8")
    assert "| 0.001 | 2.102 | 2.600 | **1.902** | **2.400** |" in text
    assert "| AdamW (2) | 0.002 | 2.012 ± 0.014 | 2.510 ± 0.014 |" in text
    assert "Muon against AdamW, seed by seed: training -0.110 ± 0.014, held-out -0.110 ± 0.014" in text
    assert "The best rate is at an end of the sweep: Muon." in text
    assert "| Muon 0.05 | 2.302 | 2.800 | 0.0354 |" in text and "| Muon, λ 0 | 1.972 | 2.470 |" in text
    assert "| expert gate | 0.9000 | 0.9500 | +0.0500 | 2 of 2 |" in text
    results = json.loads((finished / "results.json").read_text(encoding="utf-8"))
    assert results["best_lr"] == {"adamw": 2e-3, "muon": 1e-3} and len(results["runs"]) == 13
    assert sum(x is None for x in results["runs"][0]["train"]["loss"]) == 0
    for name in ("loss", "learning_rate", "update_rms", "svd_entropy"):
        assert (finished / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_known_runs_are_not_run_again(finished):
    """But those are whose matrices are wanted and missing; and a results.json holds all that is compared."""
    c = muon_report.Comparison(runs := muon_report.load(finished))
    muon_report.write(finished, c)
    known = muon_report.read(finished / "results.json")
    assert muon_report.table(muon_report.Comparison(known)) == muon_report.table(c)
    newer = runs[0]._replace(step_ms=1.0)
    merged = muon_report.merge(known, [newer])
    assert len(merged) == len(known) and sum(run.step_ms == 1.0 for run in merged) == 1
    elsewhere, arm = finished / "elsewhere", Arm("muon", 1e-3)
    done = muon.Done(elsewhere, known, 100)
    assert done(arm, 0, {arm}) and done(arm, 1, {arm}) and done(arm._replace(tokens=0.5), 0, set())
    assert not done(arm, 2, set()) and not done(arm._replace(tokens=0.4), 0, set())
    assert done.best("muon", [1e-3, 2e-3]) == 1e-3 and done.best("muon", [1e-3, 3e-3]) is None
    done = muon.Done(elsewhere, [run._replace(matrices=None) for run in known], 100)
    assert done(arm, 0, set()) and not done(arm, 0, {arm})


def test_published_runs_are_of_their_command(tmp_path, capsys):
    """docs/muon_runs.json is known to the command on its page, and to no other; a run of another length is refused."""
    (tmp_path / "law.txt").write_text("whereas\n" * 400, encoding="utf-8")
    known = muon_report.read(Path("docs/muon_runs.json"))
    page = {"train.steps": "600", "data.batch_size": "64", "optim.warmup_steps": "60"}
    chosen = lambda fields: muon.select(known, muon.differing(str(tmp_path), fields), "--known")
    assert chosen(page) == known and capsys.readouterr().out == ""
    assert not chosen(page | {"model.num_layers": "2"}) and not chosen({})
    assert (
        "--known: adamw_lr0.0005, 600 steps, seed 0, is left out: config.model.num_layers: " in capsys.readouterr().out
    )
    fake_run(tmp_path, Arm("muon", 1e-3, tokens=0.5), 0, 2.0)
    muon.check_steps(tmp_path, 100)
    with pytest.raises(UserError, match="is a run with 50 steps, 300 now"):
        muon.check_steps(tmp_path, 600)


def test_half_an_experiment_can_be_compared(tmp_path):
    """One optimizer, not measured; a run that diverged is never the best."""
    fake_run(tmp_path, Arm("adamw", 1e-3), 0, 2.0, measured=False)
    fake_run(tmp_path, Arm("adamw", 2e-3), 0, math.nan, measured=False)
    c = muon_report.Comparison(muon_report.load(tmp_path))
    muon_report.write(tmp_path, c)
    muon_figures.write(tmp_path, c)
    assert c.best["adamw"].lr == 1e-3 and muon_report.tokens_needed(c) == {}
    best = muon.Done(tmp_path, [], 100).best
    assert best("adamw", [1e-3, 2e-3]) == 1e-3 and best("muon", [1e-3]) is None


# --- matrices --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_update_of_one_more_step(tmp_path):
    """AdamW's first update is the gradient's sign, RMS 1, whatever the weight decay; weights are as they were drawn."""
    text = tmp_path / "text.txt"
    text.write_text(
        "\n\n".join(f"{i} divided by {i % 7 + 1} is {i / (i % 7 + 1):.5f}" for i in range(4000)), encoding="utf-8"
    )
    c = config.default_config()
    c.model.update(vocab_size=257, d_model=16, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8, init_std=0.5,
                   compute_dtype="float32")  # fmt: skip
    c.model.moe.update(num_experts=4, d_expert=24)
    c.optim.update(name="adamw", lr=1e-3, weight_decay=3.0, schedule="constant", eps=1e-20)
    c.data.update(batch_size=8, seq_len=64, num_workers=0, cache_dir=str(tmp_path / "cache"))
    c.data.sources = {"numbers": config.source(kind="files", path=str(text), validation_fraction=0.2)}
    cfg, folder = config.build(c), tmp_path / "run"
    config_file.save_config(folder, cfg)
    mesh = sharding.make_mesh(config.check_devices(cfg, jax.device_count(), "cpu"))
    corpus = data.prepare(cfg.data, workdir=folder, seed=0, progress=False)
    batches = corpus.train_iterator(process_rows(mesh, 8))
    with checkpoint.Checkpoints(folder, keep=1) as checkpoints:
        checkpoints.save(0, init_state(cfg, mesh), {"batches": batches.get_state(), "tokens": 0.0}, wait=True)
    batches.close()
    found = muon_matrices.measure(folder)
    assert found["step"] == 0 and found["lr"] == pytest.approx(1e-3)
    for kind in ("attention q", "attention o", "expert gate", "expert down", "router"):
        np.testing.assert_allclose(found["update_rms"][kind], [1.0, 1.0], rtol=2e-2)
    np.testing.assert_allclose(found["weight_rms"]["expert gate"], [0.5, 0.5], rtol=0.1)
    assert np.shape(found["svd_entropy"]["expert up"]) == (2, 4) and "embedding" not in found["svd_entropy"]
    assert 0.7 < np.min(found["svd_entropy"]["attention v"]) < 1.0  # Gaussian, 16 × 16
