"""experiments/upcycling.py: what is done in which order, the comparison, and all of it at toy size."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import pool, upcycling, upcycling_measure, upcycling_report, upcycling_shards
from moe_jax import config, model, upcycle
from moe_jax.config.layers import Kind, Place
from moe_jax.evaluate import spectra
from moe_jax.moe.stats import ChoiceSums, RouterStats
from moe_jax.parallel import sharding
from moe_jax.run import config_file, weights
from tests import programs

TINY = config.ModelConfig(vocab_size=257, d_model=16, num_layers=2, num_dense_layers=2, d_ff=32, num_heads=2,
                          num_kv_heads=2, head_dim=8, compute_dtype="float32")  # fmt: skip
RUN = config.RunConfig(model=TINY, data=config.DataConfig(seq_len=32))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    made = tmp_path_factory.mktemp("experiment")
    for name, word in (("law", "whereas"), ("prose", "a fine day")):
        (made / "domains" / name).mkdir(parents=True)
        for i in range(20):
            (made / "domains" / name / f"{i}.txt").write_text(f"{word} {i}\n" * 40, encoding="utf-8")
    with jax.set_mesh(sharding.make_mesh((1, 1, 1), jax.devices()[:1])):
        weights.save_weights(made / "dense", RUN, model.init(TINY, jax.random.key(0))[0], {}, [])
    config_file.save_config(made / "copies", dataclasses.replace(RUN, model=upcycle.copy(2, 1).config(TINY)))
    return made


def planned(root, names, out):
    runs = [upcycling.make_run(name, 0, out, {"train.steps": "40"}) for name in names]
    found = upcycling.jobs(runs, root / "dense", str(root / "domains"), out, False)
    return [job for job in found if not job.done]


def test_order(root, tmp_path):
    """Weights before their training, measures before more training, one conversion for arms that share it."""
    names = ["dense", "exact", "exact_muon"]
    assert [job.name for job in planned(root, names, tmp_path)] == ["dense, seed 0", "weights of exact, seed 0"]
    made = upcycling.weights_of("exact", 0, root / "dense", tmp_path)
    assert made == upcycling.weights_of("exact_muon", 0, root / "dense", tmp_path)
    assert made != upcycling.weights_of("exact", 1, root / "dense", tmp_path)
    (made / "run").mkdir(parents=True)
    (made / "run" / "config.json").write_text("{}", encoding="utf-8")
    trains = planned(root, names, tmp_path)
    assert [job.name for job in trains] == [f"{name}, seed 0" for name in names]
    assert f"--config=configs/continued.py:{made}/run,{root}/domains" in trains[1].command
    (tmp_path / "dense" / "seed0").mkdir(parents=True)
    (tmp_path / "dense" / "seed0" / "eval.json").write_text("{}", encoding="utf-8")
    assert planned(root, names, tmp_path)[0].name == "measures of dense, seed 0"
    seeds = lambda *chosen: [(run.arm, run.seed) for run in upcycling.planned(["exact", "drop"], tmp_path, {}, chosen)]
    assert seeds() == [("exact", 0), ("drop", 0), ("exact", 1), ("exact", 2)]
    assert seeds(1, 2) == [("exact", 1), ("drop", 1), ("exact", 2), ("drop", 2)]


def test_every_arm_is_a_valid_config(root, tmp_path):
    kinds = {(str(arm.overrides), arm.late_router, arm.options is None): name for name, arm in upcycling.ARMS.items()}
    assert len(kinds) == 8
    for name in kinds.values():
        arm = upcycling.ARMS[name]
        run = upcycling.make_run(name, 0, tmp_path, {"train.steps": "80"})
        weights_of = f"{root}/{'dense' if arm.options is None else 'copies'}"
        cfg = pool.load_config(upcycling.CONFIG, f"{weights_of},{root}/domains", run.overrides)
        assert (cfg.train.steps, cfg.train.checkpoint_every, cfg.init_from) == (80, 20, weights_of)
        router = cfg.optim.groups.get("router")
        rates = {"slow_router": (0.1, 0), "late_router": (1.0, 27)}
        assert (router and (router.lr, router.start)) == (None if arm.options is None else rates.get(name, (1.0, 0)))
        assert cfg.optim.name == ("muon" if "muon" in name else "adamw")
        constant = name.endswith("constant")
        assert (cfg.optim.schedule, cfg.optim.lr) == (("constant", 3e-5) if constant else ("cosine", 3e-4))
        assert list(cfg.data.sources) == ["law", "prose"] and arm.label


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--only=exakt"], "no arm 'exakt'"),
        (["--run=nowhere"], "--run=nowhere: is not a run directory"),
        (["--set", "train.stepz=5"], "stepz"),
        (["--report_only"], "holds no finished run"),
    ],
)
def test_command_line(root, tmp_path, flags, says, monkeypatch, capsys):
    command = ["upcycling", f"--run={root}/dense", f"--data={root}/domains", f"--out={tmp_path}"]
    monkeypatch.setattr(sys, "argv", command + flags)
    try:
        status = upcycling.main()
    except SystemExit as stop:
        status = stop.code
    assert status in (1, 2) and says in capsys.readouterr().err


def test_published_runs_are_of_their_command(root, capsys):
    """docs/upcycling_runs.json is known to the command on its page, and to no other."""
    known = upcycling_report.read(Path("docs/upcycling_runs.json"))
    some = {key: known[key] for key in (("dense", 0), ("exact", 0))}
    page = {"train.steps": "300", "data.batch_size": "64", "model.segment_mask": "false", "train.eval_every": "50"}
    ask = lambda fields: upcycling.call(root / "dense", str(root / "domains"), lambda runs: runs, fields)
    assert ask(page).select(some, "--known") == some and capsys.readouterr().out == ""
    used_otherwise = ({"model.segment_mask": "true"}, {"model.moe.min_ratio": "0.3"}, {"model.moe.compute": "capacity"})
    for other in (*(page | fields for fields in used_otherwise), {"model.segment_mask": "false"}):
        assert not ask(other).select(some, "--known")
    assert "exact, seed 0, is left out: config.data.batch_size: 64 in the run, 128 now" in capsys.readouterr().out


# --- the measure -----------------------------------------------------------------------------------------------------


def test_similarity_of_experts():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 6, 8))
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    cosine = float((a * b).sum())
    copies, shards = np.stack([a, 3 * a, a])[None], np.stack([a, b, a, 2 * b])[None]
    np.testing.assert_allclose(spectra.expert_similarity(copies), [1.0])
    np.testing.assert_allclose(spectra.expert_similarity(shards, 2), [1.0])
    np.testing.assert_allclose(spectra.expert_similarity(shards), [(2 + 4 * cosine) / 6])
    np.testing.assert_allclose(spectra.expert_similarity(np.stack([a, -a])[None]), [-1.0])
    assert np.isnan(spectra.expert_similarity(copies[:, :1])).all()


def test_unevenness_of_shards():
    """Pairs of choices give the variance over tokens of how often each has a shard; equal numbers give exactly 0."""
    rng = np.random.default_rng(0)
    g, k, places = 2, 4, tuple(Place("layers", i, Kind("moe", 8)) for i in (0, 1))
    free = np.stack([rng.permutation(8)[:k] for _ in range(50)])
    even = np.stack([np.concatenate([2 * rng.permutation(4)[:2] + i for i in range(g)]) for _ in range(50)])
    chosen = np.stack([(ids[:, :, None] == np.arange(8)).sum(1) for ids in (free, even)])
    sums = ChoiceSums(np.zeros((2, 1)), np.einsum("lte,ltf->lef", chosen, chosen).astype(np.float32), None)
    stats = RouterStats(np.full((2, 3), 50 / 3), None, None, None, None)
    found = upcycling_measure.unevenness({"layers": stats}, {"layers": sums}, places, k, g)
    want = np.mean([((free % g == i).sum(1) - k / g) ** 2 for i in range(g)])
    assert want > 0.1 and found == [pytest.approx(want, rel=1e-6), 0.0]


@pytest.mark.slow
def test_no_token_misses_a_shard_in_a_thousand_steps(root, tmp_path):
    """Counted in every step. Where copies are chosen, which at first are complete too, tokens soon miss some."""
    found, mesh = {}, sharding.make_mesh((1, 1, 1), jax.devices()[:1])
    for choice, steps in (("shards", 1000), ("copies", 100)):
        chain = [upcycle.VirtualGroups(4, 2, 2, choice=choice)]
        upcycle.convert([str(root / "dense")], tmp_path / choice, chain, check=False, echo=lambda _: None)
        fields = upcycling_shards.FIELDS | {"train.steps": steps, "optim.lr": 0.01, "data.num_workers": 0,
                                            "data.cache_dir": str(root / "cache")}  # fmt: skip
        cfg = pool.load_config(upcycling_shards.CONFIG, f"{tmp_path}/{choice},{root}/domains", fields)
        found[choice] = upcycling_shards.count(cfg, mesh)
    assert len(found["shards"]["loss"]) == 1000 and found["shards"]["loss"][-1] < 0.5 * found["shards"]["loss"][0]
    assert set(found["shards"]["largest"]) == {0.0} and set(found["shards"]["complete"]) == {2.0}
    assert found["copies"]["complete"][0] == 2 and found["copies"]["mean"][-1] > 0.01


def test_granularity_of_the_origin():
    chain = [{"transform": "Depth"}, {"transform": "VirtualGroups", "granularity": 4}]
    assert upcycling_measure.granularity([{"event": "import"}, {"event": "upcycle", "chain": chain}]) == 4
    assert upcycling_measure.granularity([{"event": "train"}]) == 1


# --- the comparison --------------------------------------------------------------------------------------------------


def fake_run(out: Path, arm: str, start: float, end: float, alike: list[float], flops: float, seed: int = 0) -> None:
    """100 steps of 1000 tokens, the loss on a line."""
    folder = out / arm / f"seed{seed}"
    folder.mkdir(parents=True)
    line = lambda step: start + (end - start) * step / 100
    train = lambda s: {"kind": "train", "step": s, "tokens": 1e3 * s, "xent": line(s), "step_seconds": 1.0}
    rows = [train(s) for s in range(1, 101)]
    rows += [{"kind": "eval", "step": s, "xent": line(s)} for s in range(25, 101, 25)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "eval.json").write_text(
        json.dumps({"domains": [{"domain": "all", "perplexity": float(np.exp(end))}]}), encoding="utf-8"
    )
    steps = dict(zip((0, 50, 100), alike, strict=False))
    similarity = {n: {"expert up": [x, x], "expert down": [x, x]} for n, x in steps.items()} or {0: {}}
    uneven = {0: [0, 0], 100: [0, 0.5]}
    measures = {"start": {"all": start}, "similarity": similarity, "unevenness": uneven}
    measures |= {"flops_per_token": flops, "parameters": [2e6, 1e6]}
    config_file.save_config(folder, RUN)
    (folder / "measures.json").write_text(json.dumps(measures), encoding="utf-8")


def test_comparison(tmp_path):
    labels = {name: arm.label for name, arm in upcycling.ARMS.items()}
    fake_run(tmp_path, "dense", 3.0, 2.0, [], 1e6)
    fake_run(tmp_path, "dense", 3.0, 2.2, [], 1e6, seed=1)
    fake_run(tmp_path, "exact", 3.0, 1.9, [1.0, 0.9, 0.8], 1.1e6)
    (tmp_path / "drop" / "seed0").mkdir(parents=True)  # still running
    found = upcycling_report.arms_of(upcycling_report.load(tmp_path), labels)
    assert list(found) == ["dense", "exact"] and found["exact"].runs[0].at(0.5) == pytest.approx(2.45)
    assert [run.seed for run in found["dense"].runs] == [0, 1]
    upcycling_report.write(tmp_path, found)
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    dense = "| dense (2) | 2.0M | 1.0M | 1.00 | 3.000 ± 0.000 | 2.775 ± 0.035 | 2.550 ± 0.071 | 2.100 ± 0.141 |"
    assert f"{dense} 8.21 ± 1.16 |  |  |" in text
    exact = "| virtual groups, E8G8T8 (1) | 2.0M | 1.0M | 1.10 | 3.000 | 2.725 | 2.450 | 1.900"
    assert f"{exact} | 6.69 | -9.52% | 2.0e-01 | 0.25; 0.5 | 1.7 |" in text
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert results["exact"]["runs"][0]["tokens"] == [0.0, 25e3, 50e3, 75e3, 100e3]
    again = upcycling_report.arms_of(upcycling_report.read(tmp_path / "results.json"), labels)
    assert upcycling_report.table(again) == text and upcycling_report.numbers(again) == upcycling_report.numbers(found)
    for name in ("loss.png", "similarity.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_toy_experiment(root, tmp_path, monkeypatch, capsys):
    """Dense and two upcycled models from conversion to figures: both exact ones begin at the dense model's loss."""
    programs.fork_jobs(monkeypatch)
    fields = {"train.steps": 8, "data.batch_size": 8, "optim.warmup_steps": 1, "data.num_workers": 0,
              "data.cache_dir": root / "cache"}  # fmt: skip
    command = ["upcycling", f"--run={root}/dense", f"--data={root}/domains", f"--out={tmp_path}", "--gpus=0",
               "--only=dense,exact,unscaled,shards", "--seeds=0"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", command + [x for n, v in fields.items() for x in ("--set", f"{n}={v}")])
    monkeypatch.setattr(upcycling, "CHECKPOINTS", 2)
    status = upcycling.main()
    logs = [file.read_text(encoding="utf-8")[-1500:] for file in tmp_path.glob("*/*/output.txt")]
    assert status == 0, "\n".join(logs)
    found = upcycling_report.arms_of(upcycling_report.load(tmp_path), dict.fromkeys(upcycling.ARMS, ""))
    runs = {name: arm.runs[0] for name, arm in found.items()}
    start = {name: run.loss[0] for name, run in runs.items()}
    assert start["exact"] == pytest.approx(start["dense"], rel=1e-5)
    assert abs(start["unscaled"] / start["dense"] - 1) > 1e-5
    assert list(runs["exact"].similarity) == [0, 4, 8] and runs["exact"].apart()[0] == pytest.approx(0.0, abs=1e-6)
    assert start["shards"] == pytest.approx(start["dense"], rel=1e-5)
    assert runs["exact"].unevenness[0] == runs["shards"].unevenness[8] == [0.0, 0.0] and not runs["dense"].unevenness
    assert all(run.loss[-1] < run.loss[0] for run in runs.values())
    assert not (tmp_path / "exact" / "seed0" / "checkpoints").exists()
    said = capsys.readouterr().out
    assert "| virtual groups, E8G8T8 (1) |" in said and "left out" not in said
    shutil.rmtree(tmp_path / "weights")
    assert config_file.load_config(tmp_path / "exact" / "seed0").model.moe.num_experts == 64
