"""experiments/mixtures.py: a run for each mixture, what is known, mistakes, and all of it at toy size."""

import dataclasses
import json
import sys

import pytest

from experiments import mixtures, pool
from moe_jax.config import MixtureConfig
from moe_jax.errors import FileError, UserError
from moe_jax.mixtures import design, measured
from moe_jax.mixtures.design import Mixture
from moe_jax.mixtures.measured import Measured
from moe_jax.run import config_file
from tests import programs

TINY = {
    "train.steps": 3, "data.batch_size": 8, "data.seq_len": 32, "data.num_workers": 0, "data.tokenizer.kind": "bytes",
    "model.vocab_size": 257, "model.d_model": 16, "model.num_layers": 1, "model.num_heads": 2, "model.num_kv_heads": 2,
    "model.head_dim": 8, "model.moe.num_experts": 4, "model.moe.top_k": 2, "model.moe.d_expert": 8,
    "optim.warmup_steps": 1,
}  # fmt: skip
MIXTURES = [Mixture("a", {"law": 0.25, "prose": 0.75}), Mixture("b", {"law": 1.0, "prose": 0.0})]


@pytest.fixture
def root(tmp_path):
    for name, word in (("law", "whereas"), ("prose", "a fine day")):
        (tmp_path / "domains" / name).mkdir(parents=True)
        for i in range(20):
            (tmp_path / "domains" / name / f"{i}.txt").write_text(f"{word} {i}\n" * 40, encoding="utf-8")
    (tmp_path / "mix.jsonl").write_text(design.lines(MIXTURES), encoding="utf-8")
    return tmp_path


def test_runs(root):
    """The weights of a mixture become those of the config; a run of the same mixture and cost is known."""
    runs = mixtures.planned(MIXTURES[:1], ["law", "prose", "code"], root / "out", 3, {"train.steps": "7"})
    fields = runs[0].overrides
    assert [fields[f"data.sources.{name}.weight"] for name in ("law", "prose", "code")] == [0.25, 0.75, 0.0]
    assert runs[0].folder == root / "out" / "a" / "seed3" and fields["seed"] == 3 and fields["train.steps"] == "7"
    with pytest.raises(UserError, match="--mixtures: b: source 'prose' is not in the config; nearest valid: 'prosa'"):
        mixtures.check_sources(MIXTURES[1:], ["law", "prosa"])
    runs = mixtures.planned(MIXTURES, ["law", "prose"], root / "out", 0, TINY)
    configs = [pool.load_config(mixtures.CONFIG, str(root / "domains"), run.overrides) for run in runs]
    known = Measured("x", MIXTURES[0].weights, {"law": 2.0}, measured.cost_of(configs[0]))
    first, second = (mixtures.wanted(run, cfg) for run, cfg in zip(runs, configs, strict=True))
    assert mixtures.find_known(first, [known]) == known and not mixtures.find_known(second, [known])
    assert not mixtures.find_known(first, [known._replace(cost=2 * known.cost)])
    assert not mixtures.find_known(first, [known._replace(name="a/seed1")])
    assert mixtures.find_known(first, [known._replace(name="x/seed0")])
    with pytest.raises(UserError, match="its b/seed0 is another mixture"):
        mixtures.find_known(second, [known._replace(name="b/seed0")])


def test_finished_runs_of_another_plan(root):
    """A folder with eval.json is done only if it holds the mixture, the cost and the fields of --set of the plan."""

    def plan(weights, extra):
        return mixtures.planned([Mixture("a", weights)], ["law", "prose"], root / "out", 0, TINY | extra)

    config = lambda run: pool.load_config(mixtures.CONFIG, str(root / "domains"), run.overrides)
    (run,) = plan(MIXTURES[0].weights, {})
    mixtures.check_finished(run, config(run))  # there is none yet
    run.folder.mkdir(parents=True)
    config_file.save_config(run.folder, config(run))
    held = {"step": 3, "domains": [{"domain": "law", "xent": 2.0}]}
    (run.folder / "eval.json").write_text(json.dumps(held), encoding="utf-8")
    mixtures.check_finished(run, config(run))
    for weights, extra, said in (
        (MIXTURES[1].weights, {}, "of another mixture"),
        (MIXTURES[0].weights, {"train.steps": 4}, "of another cost"),
        (MIXTURES[0].weights, {"optim.lr": 0.5}, "config.optim.lr: .* in the run, 0.5 now"),
    ):
        (other,) = plan(weights, extra)
        with pytest.raises(UserError, match=said):
            mixtures.check_finished(other, config(other))
    (run.folder / "eval.json").write_text(json.dumps(held | {"step": 2}), encoding="utf-8")
    with pytest.raises(FileError, match="is of step 2, the training has 3"):
        measured.read_run(run.folder, "a")
    changing = dataclasses.replace(config(run), mixture=MixtureConfig(controller="dga"))
    config_file.save_config(root / "changing", changing)
    with pytest.raises(FileError, match=r"mixture\.controller='dga': its weights change"):
        measured.read_run(root / "changing", "a")


def test_results(tmp_path):
    """A table and a figure; results.json holds the runs."""
    runs = [Measured(f"m{i}", {"law": i / 4, "prose": 1 - i / 4}, {"law": 3 - i / 4, "prose": 2 + i}, 1e9)
            for i in range(4)]  # fmt: skip
    mixtures.write(tmp_path, runs, ("png",))
    assert measured.read_runs([tmp_path / "results.json"]) == runs
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert table.index("| m0 | 0.000 | 1.000 | 2.5000 | 3.0000 | 2.0000 |") < table.index("| m3 |")
    assert [axis.get_title() for axis in mixtures.figure(runs).axes] == ["law", "prose"]


def test_mistakes(root, monkeypatch, capsys):
    for options, said in (([f"--mixtures={root}/no.jsonl"], "/no.jsonl: cannot be read"),
                          ([f"--mixtures={root}/domains/law/1.txt"], "line 1: is not JSON"),
                          ([f"--mixtures={root}/other.jsonl"], "source 'lwa' is not in the config; nearest"),
                          ([f"--known={root}/mix.jsonl"], "is not JSON")):  # fmt: skip
        (root / "other.jsonl").write_text('{"name": "a", "weights": {"lwa": 1, "prose": 1}}\n', encoding="utf-8")
        monkeypatch.setattr(sys, "argv", ["mixtures", f"--data={root}/domains", f"--out={root}/out", *options])
        assert mixtures.main() == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
        assert not (root / "out").exists()


@pytest.mark.slow
def test_toy_experiment(root, monkeypatch, capsys):
    """Two runs, also of a mixture without one of the sources; a second call runs nothing; a fit reads the folder."""
    programs.fork_jobs(monkeypatch)
    fields = TINY | {"data.cache_dir": root / "cache"}
    command = ["mixtures", f"--mixtures={root}/mix.jsonl", f"--data={root}/domains", f"--out={root}/out", "--gpus=0"]
    monkeypatch.setattr(sys, "argv", command + [x for n, v in fields.items() for x in ("--set", f"{n}={v}")])
    status = mixtures.main()
    logs = [file.read_text(encoding="utf-8")[-1500:] for file in (root / "out").rglob("output.txt")]
    assert status == 0, "\n".join(logs)
    runs = json.loads((root / "out" / "results.json").read_text(encoding="utf-8"))
    assert [run["weights"] for run in runs] == [mixture.weights for mixture in MIXTURES]
    assert all(set(run["losses"]) == {"law", "prose"} for run in runs) and runs[0]["losses"] != runs[1]["losses"]
    assert [run.losses for run in measured.read_runs([root / "out"])] == [run["losses"] for run in runs]
    assert "| a/seed0 | 0.250 | 0.750 |" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*sys.argv, f"--known={root}/out/results.json"])
    assert mixtures.main() == 0 and "jobs on" not in capsys.readouterr().out
