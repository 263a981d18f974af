"""experiments/modalities.py: arms of equal FLOPs, what is known, the comparison, and all of it at toy size."""

import json
import math
import sys

import pytest

from experiments import emoji, image_tokens, modalities, modalities_report, pool, records
from experiments.modalities_report import Finished
from moe_jax.model.counts import flops_per_token
from moe_jax.run import config_file
from tests import programs

LABELS = {name: arm.label for name, arm in modalities.ARMS.items()}


@pytest.fixture
def folders(tmp_path):
    """A folder of text and one of images, as the argument of the config."""
    (tmp_path / "text").mkdir()
    for name, word in (("law", "whereas and hereby"), ("prose", "a fine day, and then")):
        lines = "".join(json.dumps({"text": f"{word} {i}\n" * 20}) + "\n" for i in range(60))
        (tmp_path / "text" / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "sources.json").write_text('{"tokens": 1000000, "train_sha256": "f00"}', encoding="utf-8")
    return f"{tmp_path}/text,{tmp_path}/images"


def finished(arm="dense", seed=0, shift=0.0, **fields):
    loss = {"text": [5.0 + shift, 4.0 + shift, 3.0 + shift], "images": [4.0, 3.0 + 2 * shift, 3.0]}
    usual = {"settings": {}, "options": {"data": "f00"},
             "numbers": dict.fromkeys(modalities_report.COLUMNS, 8.0), "steps": [10, 20, 30],
             "seconds": [1.0, 2.0, 3.0], "domains": {"images": 3.0, "law": 3.0 + shift}, "loss": loss}  # fmt: skip
    return Finished(arm, seed, **usual | fields)


def test_arms(folders, tmp_path):
    """Arms are valid, of equal FLOPs, with labels where the model needs them, and known by their configuration."""
    runs = modalities.planned(tmp_path, list(modalities.ARMS), {"train.steps": "500"})
    configs = pool.checked_configs(modalities.CONFIG, folders, runs)
    assert {name: cfg.data.labels for name, cfg in configs.items()} == {
        "dense": {}, "mixture": {}, "groups": {"images": 1}, "untied": {"images": 1}
    }  # fmt: skip
    assert all(cfg.train.steps == 500 for cfg in configs.values())
    assert modalities.mistake(configs, 10**8) == ""
    assert "images would be read" in modalities.mistake(configs, 10**5)
    fixed = modalities.planned(tmp_path, ["untied"], {"model.moe.num_experts": "16"})[0]
    assert fixed.overrides["model.moe.num_experts"] == 2  # what makes an arm stays
    wide = modalities.planned(tmp_path, list(modalities.ARMS), {"model.moe.d_expert": "128"})
    wide = pool.checked_configs(modalities.CONFIG, folders, wide)
    assert "times the FLOPs a token of plain mixture" in modalities.mistake(wide, 10**8)
    flops = [flops_per_token(cfg.model, cfg.data.seq_len) for cfg in configs.values()]
    assert max(flops) / min(flops) < 1.01
    assert (
        f"--config=configs/modalities.py:{folders},labels" in pool.training(runs[2], modalities.CONFIG, folders).command
    )
    known = {(run.arm, 0): finished(run.arm, settings=records.settings_of(configs[run.arm])) for run in runs}
    asked = modalities.call(folders, {"train.steps": "500"})
    assert asked.select(known, "--known") == known
    assert not asked.select({(arm, 0): one._replace(options={}) for (arm, _), one in known.items()}, "--known")
    assert modalities.of_other_images(runs, asked.options) == ""
    (runs[1].folder / "config.json").touch()
    assert modalities.of_other_images(runs, asked.options) == ""
    assert "--data: f00 then, ba2 now" in modalities.of_other_images(runs, {"data": "ba2"})
    for run, other in zip(runs, [*runs[1:], runs[0]], strict=True):
        assert not asked.select({(run.arm, 0): known[other.arm, 0]}, "--known")


def test_comparison(tmp_path):
    """Loss of the first arm is reached between evaluations, or never."""
    better, worse = finished("mixture", shift=-0.5), finished("untied", shift=0.25)
    assert better.until("text", 3.0) == (25.0, 2.5) and better.until("images", 2.5) == (17.5, 1.75)
    assert finished().until("text", 6.0) == (10.0, 1.0)
    runs = {(run.arm, run.seed): run for run in (worse, better, finished())}
    modalities_report.write(tmp_path, runs, LABELS)
    assert modalities_report.read(tmp_path / "results.json") == runs
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "| dense (1) | 3.000 |  |  |  | 3.000 |  |  |  | 8.0 | 8.0 | 8.0 | 8 |" in table
    assert "| plain mixture (1) | 2.500 | -0.500 | 83% | 83% | 3.000 | +0.000 | 50% | 50% |" in table
    assert "| Mixture-of-Transformers (1) | 3.250 | +0.250 |  |  | 3.000 | +0.000 | 100% | 100% |" in table
    assert "| law | 3.000 | 2.500 | 3.250 |" in table
    assert (tmp_path / "modalities.png").stat().st_size > 10_000
    # A run that broke is compared as far as it got.
    lost = {"text": [5.0, math.nan, math.nan], "images": [4.0, 3.0, 3.0]}
    broken = finished("groups", loss=lost, domains={"images": 3.0, "law": math.nan})
    modalities_report.write(tmp_path, runs | {("groups", 0): broken}, LABELS)
    again = modalities_report.read(tmp_path / "results.json")
    assert again["mixture", 0] == better and math.isnan(again["groups", 0].loss["text"][2])
    assert math.isnan(again["groups", 0].domains["law"])
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "| groups of experts (1) |  |  |  |  | 3.000 |" in table


def test_a_run_is_read(folders, tmp_path):
    """The loss of text is a mean over tokens, not over domains, and time is without the compilation of two starts."""
    run = modalities.planned(tmp_path, ["dense"], {})[0]
    config_file.save_config(run.folder, pool.load_config(modalities.CONFIG, folders, run.overrides))
    domains = [
        {"domain": name, "tokens": tokens, "xent": xent}
        for name, tokens, xent in (("law", 1, 5.0), ("images", 90, 3.0), ("prose", 9, 1.0), ("total", 100, 2.8))
    ]
    (run.folder / "eval.json").write_text(json.dumps({"step": 9, "domains": domains}), encoding="utf-8")
    (run.folder / modalities_report.MARK).write_text('{"data": "f00"}', encoding="utf-8")
    rows = [{"kind": "train", "step": step, "step_seconds": 60.0 if step in (1, 6) else 0.5} for step in range(1, 10)]
    for step, text in ((3, 8.0), (9, 5.0)):
        losses = {"law/xent": text, "images/xent": 3.0, "prose/xent": 1.0 if step == 9 else None}
        rows.append({"kind": "eval", "step": step} | losses)
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    read = modalities_report.load(tmp_path, ["dense"], [0])["dense", 0]
    assert read.steps == [3, 9] and read.seconds == [1.5, 4.5] and read.numbers["step_ms"] == 500
    assert math.isnan(read.loss["text"][0]) and read.loss["text"][1] == 1.4 and read.loss["images"] == [3.0, 3.0]
    assert read.domains == {"law": 5.0, "images": 3.0, "prose": 1.0} and read.options == {"data": "f00"}


def test_mistakes(folders, tmp_path, monkeypatch, capsys):
    command = ["modalities", f"--data={folders}", f"--out={tmp_path}/out"]
    monkeypatch.setattr(sys, "argv", [*command, "--only=sparse"])
    with pytest.raises(SystemExit):
        modalities.main()
    assert "no arm 'sparse'" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*command[:1], f"--data={tmp_path}/text", *command[2:]])
    assert modalities.main() == 2 and "a folder of text and a folder of images" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*command, "--report_only"])
    assert modalities.main() == 1 and "holds no finished run" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*command, "--set", "train.steps=700"])
    assert modalities.main() == 2 and "images would be read 5.2 times; must be ≤ 5" in capsys.readouterr().err


@pytest.mark.slow
def test_toy_experiment(folders, tmp_path, monkeypatch, capsys):
    """Digits and text up to the figure: labels are those of the domains, both modalities learn, and a second call with
    the results runs nothing."""
    programs.fork_jobs(monkeypatch)
    text = folders.split(",")[0]
    monkeypatch.setenv("MOE_JAX_CACHE", str(tmp_path / "cache"))
    made = image_tokens.build(tmp_path / "images", text, emoji.digits(), 2, 32, 1e-6)
    (tmp_path / "images" / "sources.json").write_text(json.dumps(made), encoding="utf-8")
    fields = {"train.steps": 12, "train.eval_every": 6, "train.checkpoint_every": 12, "data.batch_size": 8,
              "data.seq_len": 64, **{f"data.sources.{name}.weight": 1.0 for name in ("images", "law", "prose")},
              "model.d_model": 32, "model.num_heads": 2,
              "model.num_kv_heads": 2, "model.head_dim": 16, "model.vocab_size": 1024, "model.num_layers": 2,
              "optim.warmup_steps": 2, "data.cache_dir": tmp_path / "cache"}  # fmt: skip
    arm = modalities.ARMS["untied"]
    fewer = arm.overrides | {"model.layers": "2*table", "model.num_layers": 2}
    monkeypatch.setitem(modalities.ARMS, "untied", arm._replace(overrides=fewer))
    command = ["modalities", f"--data={folders}", f"--out={tmp_path}/out", "--gpus=0", "--only=untied"]
    monkeypatch.setattr(sys, "argv", command + [x for n, v in fields.items() for x in ("--set", f"{n}={v}")])
    status = modalities.main()
    logs = [file.read_text(encoding="utf-8")[-1500:] for file in (tmp_path / "out").rglob("output.txt")]
    assert status == 0, "\n".join(logs)
    run = modalities_report.load(tmp_path / "out", ["untied"], [0])["untied", 0]
    assert run.steps == [6, 12] and run.settings["data.labels.images"] == 1 and len(run.domains) == 3
    assert all(run.loss[name][-1] < run.loss[name][0] for name in ("text", "images"))
    assert run.loss["images"][-1] == pytest.approx(run.domains["images"], abs=1e-4)
    assert 0 < run.seconds[0] < run.seconds[1] and run.numbers["parameters"] > run.numbers["active"]
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", [*sys.argv, f"--known={tmp_path}/out/results.json"])
    assert modalities.main() == 0
    printed = capsys.readouterr().out
    assert "jobs on" not in printed and "| Mixture-of-Transformers (1) |" in printed
