"""experiments/: the config that finds its domains, the arms, and the comparison of finished runs."""

import json
import sys
from pathlib import Path

import pytest

from experiments import balance_report, balance_scope
from moe_jax.errors import ConfigError

LABELS = {"scope_1": ("each sequence", (0, 1, 2)), "global": ("the global batch", (0, 1)), "none": ("none", (0,))}


@pytest.fixture
def domains(tmp_path):
    folder = tmp_path / "domains"
    (folder / "law").mkdir(parents=True)
    for i in range(3):
        (folder / "law" / f"{i}.txt").write_text("whereas and hereby\n" * 40, encoding="utf-8")
    (folder / "prose.jsonl").write_text('{"text": "a fine day"}\n' * 100, encoding="utf-8")
    (folder / "sources.json").write_text("{}", encoding="utf-8")
    return folder


def test_domains(domains):
    cfg = balance_scope.load_config(str(domains), {"model.moe.selection_bias": "true", "loss.balance_batch": "8"})
    sources = cfg.data.sources
    assert list(sources) == ["law", "prose"] and [s.domain for s in sources.values()] == ["law", "prose"]
    assert sources["law"].path == f"{domains}/law/*" and sources["prose"].path == f"{domains}/prose.jsonl"
    assert sources["law"].validation_fraction == 0.25
    assert cfg.model.moe.selection_bias is True and cfg.loss.balance_batch == 8


def test_mixture():
    """√bytes, a small domain at its limit, the rest shared by the others."""
    module = balance_scope.config_module()
    tokens = 10_000.0
    most = module.MAX_EPOCHS / module.BYTES_PER_TOKEN / tokens
    shares = module.mixture({"tiny": 100, "one": 10_000, "four": 40_000}, tokens)
    assert sum(shares.values()) == pytest.approx(1.0)
    assert shares["tiny"] == pytest.approx(100 * most)
    assert shares["four"] == pytest.approx(2 * shares["one"])
    little = module.mixture({"a": 100, "b": 300}, tokens)
    assert little["b"] == pytest.approx(3 * little["a"])


@pytest.mark.parametrize(
    ("folder", "says"), [("nowhere", "'{d}/nowhere': is not a folder"), ("", "'{d}': holds no file of .txt")]
)
def test_no_domains(tmp_path, folder, says):
    with pytest.raises(ConfigError, match="multi_domain_text") as error:
        balance_scope.load_config(str(tmp_path / folder), {})
    assert says.format(d=tmp_path) in str(error.value)


def test_domain_twice(domains):
    (domains / "prose.txt").write_text("again\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="has domain 'prose' twice"):
        balance_scope.load_config(str(domains), {})


def test_every_arm_is_a_valid_config(domains, tmp_path):
    runs = balance_scope.planned(tmp_path, list(balance_scope.ARMS), {"train.steps": "500"})
    for run in runs:
        cfg = balance_scope.load_config(str(domains), run.overrides)
        assert (cfg.seed, cfg.train.steps) == (run.seed, 500)
    assert len({run.folder for run in runs}) == len(runs)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--only=globel"], "no arm 'globel'"),
        (["--set", "train.steps"], "must be NAME=VALUE"),
        (["--set", "train.stepz=5"], "stepz"),
        (["--data={d}/nowhere"], "is not a folder"),
        (["--report_only"], "holds no finished run"),
    ],
)
def test_command_line(domains, flags, says, monkeypatch, capsys):
    command = ["balance_scope", f"--data={domains}", f"--out={domains.parent}/out"]
    monkeypatch.setattr(sys, "argv", command + [flag.replace("{d}", str(domains)) for flag in flags])
    try:
        status = balance_scope.main()
    except SystemExit as stop:
        status = stop.code
    assert status in (1, 2) and says in capsys.readouterr().err


# --- the comparison --------------------------------------------------------------------------------------------------


def fake_run(folder: Path, seed: int, perplexity: float, split: bool, coef: float, scope: str) -> None:
    """One layer, two domains, four experts, top-2. split: each domain has two experts of its own."""
    folder.mkdir(parents=True)
    config = {"seed": seed, "model": {"moe": {"top_k": 2, "num_experts": 4}}, "data": {"batch_size": 256}}
    config["loss"] = {"load_balance_coef": coef, "balance_batch": scope}
    rows = [{"kind": "train", "step": s, "xent": 2.0 if s > 95 else 9.0, "max_load": 1.5, "tokens_per_second": 1e5}
            for s in range(2, 101, 2)]  # fmt: skip
    names = {"code": perplexity - 2, "prose": perplexity + 2, "all": perplexity}
    result = {"step": 100, "domains": [{"domain": d, "perplexity": p} for d, p in names.items()]}
    result["tokens_per_layer_and_domain"] = [[100, 200]]
    result["tokens_per_expert"] = [[[100, 100, 0, 0], [0, 0, 200, 200]] if split else [[50] * 4, [100] * 4]]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "eval.json").write_text(json.dumps(result), encoding="utf-8")


@pytest.fixture
def finished(tmp_path):
    fake_run(tmp_path / "scope_1" / "seed0", 0, 10.0, False, 0.01, "1")
    fake_run(tmp_path / "scope_1" / "seed2", 2, 12.0, False, 0.01, "1")
    fake_run(tmp_path / "global" / "seed0", 0, 8.0, True, 0.01, "global")
    (tmp_path / "global" / "seed1").mkdir()  # still running
    fake_run(tmp_path / "none" / "seed0", 0, 9.0, True, 0.0, "global")
    return tmp_path


def test_numbers(finished):
    arms = balance_report.load(finished, LABELS)
    assert {name: (arm.scope, [run.seed for run in arm.runs]) for name, arm in arms.items()} == {
        "scope_1": (1, [0, 2]), "global": (256, [0]), "none": (None, [0])
    }  # fmt: skip
    same, apart = arms["scope_1"].runs[0].numbers, arms["global"].runs[0].numbers
    assert same["specialisation"] == pytest.approx(0.0) and apart["specialisation"] == pytest.approx(1.0)
    assert same["top_frequency"] == 0.5 and apart["top_frequency"] == 1.0
    assert same["max_load"] == 1.0 and apart["max_load"] == pytest.approx(4 / 3)
    assert (apart["dead_experts"], apart["train_xent"], apart["macro_perplexity"]) == (0, 2.0, 8.0)


def test_files(finished):
    balance_report.write(finished, balance_report.load(finished, LABELS))
    text = (finished / "table.md").read_text(encoding="utf-8")
    assert "| each sequence (2) | 11.00 ± 1.41 | +25.00% |" in text and "| the global batch (1) | 8.00 |  |" in text
    assert "| code | 9.00 ± 1.41 | 6.00 | 7.00 |" in text
    results = json.loads((finished / "results.json").read_text(encoding="utf-8"))
    assert results["global"]["runs"][0]["domains"] == {"code": 6.0, "prose": 10.0}
    for name in ("scope.png", "specialisation.png"):
        assert (finished / name).read_bytes().startswith(b"\x89PNG")
