"""experiments/: the config that finds its domains, the arms, and the comparison of finished runs."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from experiments import (
    balance_report,
    balance_scope,
    pool,
    records,
    routing,
    routing_report,
    upcycling,
    upcycling_report,
)
from moe_jax import config
from moe_jax.errors import ConfigError
from moe_jax.run import config_file

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


def test_a_mixture_is_the_same_in_every_python(monkeypatch):
    """`sum` adds floats one after another up to Python 3.11, and makes up for their rounding since 3.12."""
    module, made = balance_scope.config_module(), []
    for total in (lambda numbers: float(np.cumsum([0.0, *numbers])[-1]), math.fsum):
        monkeypatch.setattr(module, "sum", total, raising=False)
        sizes = {f"domain{i}": 100_000 * i**2 + 7 for i in range(1, 13)}
        made.append(module.mixture(sizes, 5e7))  # with three domains at their limit
    assert made[0] == made[1] and math.fsum(made[0].values()) == pytest.approx(1.0)
    assert set(config.shares(dict.fromkeys("abcdefghij", 0.1)).values()) == {0.1}  # 0.1 added up ten times is below 1
    assert config.shares({"a": 1e308, "b": 1e308}) == {"a": 0.5, "b": 0.5}


def test_a_folder_may_have_a_comma(domains):
    folder = domains.rename(domains.parent / "law,prose")
    load = lambda argument: balance_scope.load_config(argument, {})
    assert list(load(str(folder)).data.sources) == ["law", "prose"] and not load(str(folder)).data.labels
    assert load(f"{folder},labels").data.labels == {"law": 0, "prose": 1}
    with pytest.raises(ConfigError, match=r"law,prose,label': is no folder, and ends neither in ,labels nor in ,route"):
        load(f"{folder},label")


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
    config = {"seed": seed, "model": {"moe": {"top_k": 2, "num_experts": 4}}, "optim": {"name": "adamw"}}
    config |= {"data": {"batch_size": 256, "seq_len": 512}, "train": {"steps": 100}}
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


def compared(out: Path, known: balance_report.Runs | None = None) -> dict[str, balance_report.Arm]:
    found = balance_report.load(out, {name: seeds for name, (_, seeds) in LABELS.items()})
    return balance_report.arms_of((known or {}) | found, LABELS)


def test_numbers(finished):
    arms = compared(finished)
    assert {name: (arm.scope, [run.seed for run in arm.runs]) for name, arm in arms.items()} == {
        "scope_1": (1, [0, 2]), "global": (256, [0]), "none": (None, [0])
    }  # fmt: skip
    same, apart = arms["scope_1"].runs[0].numbers, arms["global"].runs[0].numbers
    assert same["specialisation"] == pytest.approx(0.0) and apart["specialisation"] == pytest.approx(1.0)
    assert same["top_frequency"] == 0.5 and apart["top_frequency"] == 1.0
    assert same["max_load"] == 1.0 and apart["max_load"] == pytest.approx(4 / 3)
    assert (apart["dead_experts"], apart["train_xent"], apart["macro_perplexity"]) == (0, 2.0, 8.0)


def test_files(finished):
    balance_report.write(finished, arms := compared(finished))
    more = {f"none_{i}": arms["none"]._replace(label=f"none {i}") for i in range(8)}
    texts = [text.get_text() for text in balance_report.plot_scope(arms | more).axes[0].texts]
    assert len(texts) == 9 and all(
        any(name in text for text in texts) for name in ("none 0", "none 7")
    )  # none is left out
    text = (finished / "table.md").read_text(encoding="utf-8")
    assert "| each sequence (2) | 11.00 ± 1.41 | +25.00% |" in text and "| the global batch (1) | 8.00 |  |" in text
    assert "| code | 9.00 ± 1.41 | 6.00 | 7.00 |" in text
    results = json.loads((finished / "results.json").read_text(encoding="utf-8"))
    assert results["global"]["runs"][0]["domains"] == {"code": 6.0, "prose": 10.0}
    for name in ("scope.png", "specialisation.png"):
        assert (finished / name).read_bytes().startswith(b"\x89PNG")


def test_saved_runs_join_others(finished, tmp_path_factory):
    """Runs of a results.json stand beside those of the folder; what a record does not have is left empty."""
    arms = compared(finished)
    balance_report.write(finished, arms)
    known, other = balance_report.read(finished / "results.json"), tmp_path_factory.mktemp("other")
    fake_run(other / "scope_1" / "seed0", 0, 14.0, False, 0.01, "1")
    part = known["global", 0]._replace(numbers={"perplexity": 8.0}, domains={}, frequency=None, bits=np.zeros(0))
    joined = compared(other, known | {("global", 0): part})
    assert [run.numbers["perplexity"] for run in joined["scope_1"].runs] == [14.0, 12.0]
    balance_report.write(other, joined)
    text = (other / "table.md").read_text(encoding="utf-8")
    assert "| the global batch (1) | 8.00 |  |  |" in text and "| each sequence (2) | 13.00 ± 1.41 | +75.00% |" in text
    again = compared(tmp_path_factory.mktemp("none"), known)
    assert balance_report.table(again) == balance_report.table(arms)


def test_published_scopes_are_not_run_again(domains, tmp_path, capsys):
    """docs/balance_scope_runs.json stands for the first seed of the arms that it has, and for no other run or field.

    A record of few settings had those of its arm for the others: `--set` of one of these makes it another run.
    """
    known = balance_report.read(Path("docs/balance_scope_runs.json"))
    assert len(known) == 9 and ("global", 0) not in known
    select = lambda known, **fields: balance_scope.call(str(domains), fields).select(known, "--known")
    assert select(known) == known and capsys.readouterr().out == ""
    assert select(known, **{"train.steps": "900", "train.log_every": "7", "loss.router_z_coef": "0.0001"}) == known
    one = {("none", 0): known["none", 0]}
    for name, value in (("train.steps", "400"), ("model.num_layers", "2"), ("optim.weight_decay", "0.5"),
                        ("model.moe.d_expert", "32"), ("data.tokenizer.vocab_size", "8192")):  # fmt: skip
        assert not select(one, **{name: value}), name
        assert f"--known: none, seed 0, is left out: config.{name}: " in capsys.readouterr().out
    assert list(select(one | {("other", 0): known["none", 0]})) == [("none", 0)]
    assert "--known: other, seed 0, is left out: is not an arm of this experiment" in capsys.readouterr().out
    every = balance_scope.planned(tmp_path, list(balance_scope.ARMS), {})
    numbered = [run for run in every if balance_scope.wanted(run, ["scope_*", "global/seed1"])]
    assert {run.arm for run in numbered} >= {"scope_1", "scope_1_muon", "global"} and len(numbered) == 18


def test_a_folder_of_another_configuration_is_refused(domains, tmp_path, monkeypatch, capsys):
    """A finished run of other settings is not taken for the one asked for; what only steers the log is not compared."""
    run = balance_scope.planned(tmp_path / "out", ["none"], {"train.steps": "500"})[0]
    config_file.save_config(run.folder, balance_scope.load_config(str(domains), run.overrides))
    asked = lambda **fields: balance_scope.call(str(domains), {"train.steps": "500"} | fields)
    assert not asked().refuses([run]) and not asked(**{"train.log_every": "7"}).refuses([run])
    assert asked(**{"model.d_model": "64"}).refuses([run])
    assert "config.model.d_model: 512 in the run, 64 now; name another folder" in capsys.readouterr().err
    job = pool.Job("measures", tmp_path, [], "found.json", {"prefix": 64})
    for found, done in (({}, False), ({"options": {"prefix": 16}}, False), ({"options": {"prefix": 64}}, True)):
        (tmp_path / "found.json").write_text(json.dumps(found), encoding="utf-8")
        assert job.done == done
    assert job._replace(options={"prefix": 16}).stale == ["--prefix: 64 then, 16 now"]
    (tmp_path / "found.json").write_text(json.dumps(found | {"settings": {"train.steps": 500}}), encoding="utf-8")
    assert job._replace(settings={"train.steps": 500}).done  # of another training it is made again
    assert job._replace(settings={"train.steps": 600}).stale == ["config.train.steps: 500 in the run, 600 now"]


def test_a_run_of_another_rounding_is_known(domains, tmp_path, capsys):
    """Weights that another version of Python computed, or other floats of options, differ in their last digit."""
    next_to = lambda x: math.nextafter(x, 2)
    name, asked = "data.sources.law.weight", balance_scope.call(str(domains), {})
    settings = asked.settings("none", {})
    known = {("none", 0): SimpleNamespace(settings=settings | {name: next_to(settings[name])})}
    assert asked.select(known, "--known") == known and capsys.readouterr().out == ""
    assert not asked.select({("none", 0): SimpleNamespace(settings=settings | {name: 0.25})}, "--known")
    cfg = balance_scope.load_config(str(domains), {})
    folder = tmp_path / "none" / "seed0"
    config_file.save_config(folder, balance_scope.load_config(str(domains), {name: next_to(settings[name])}))
    (folder / "checkpoints").mkdir()
    (folder / "eval.json").touch()
    assert pool.find_trained(tmp_path, cfg) == folder
    assert not records.unlike_options({"keep": [0.1 + 0.2]}, {"keep": [0.3]})


# --- routers and balance ---------------------------------------------------------------------------------------------


def routing_run(folder: Path, loads: list[float], columns: list[list[int]], **settings) -> None:
    """One layer, two domains of 100 tokens, three experts and an identity expert, top-2."""
    folder.mkdir(parents=True)
    moe = {"top_k": 2, "num_experts": 3, "identity_experts": 1}
    config = {"seed": 0, "model": {"moe": moe}, "loss": settings, "optim": {"lr": 0.1}, "train": {"steps": len(loads)}}
    config["data"] = {"batch_size": 4, "seq_len": 8}
    rows = [{"kind": "train", "step": i + 1, "xent": 2.0, "max_load": load, "load_cv": load / 2,
             "experts_per_token": 1.5, "step_seconds": 0.1} for i, load in enumerate(loads)]  # fmt: skip
    result = {"domains": [{"domain": d, "perplexity": p} for d, p in (("code", 6.0), ("poetry", 10.0), ("all", 8.0))]}
    result |= {"dropped": 3, "tokens_per_layer_and_domain": [[100, 100]], "tokens_per_expert": [columns]}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "eval.json").write_text(json.dumps(result), encoding="utf-8")


def test_steps_until():
    """The running mean over 20 steps is under 1.5 once its window has fewer than five loads of 3."""
    loads = np.array([3.0] * 30 + [1.0] * 30)
    steps = np.arange(1, 61)
    assert routing_report.steps_until(steps, loads, 1.5) == 46
    assert routing_report.steps_until(steps, np.ones(60), 1.5) == 1
    again = np.where(steps == 50, 20.0, loads)  # the mean rises above the limit once more, and stays there to the end
    assert routing_report.steps_until(steps, again, 1.5) == np.inf
    lost = np.where(steps == 3, np.nan, 1.0)  # an unknown load is not under the limit
    assert routing_report.steps_until(steps, lost, 1.5) == 23


def test_routing_report(tmp_path):
    routing_run(tmp_path / "sign" / "seed0", [3.0] * 30 + [1.3] * 30, [[100, 100, 0, 0], [100, 0, 100, 0]])
    # Code: 1.9 experts a token, poetry 1.1. The identity expert has the largest load, which does not count.
    columns = [[70, 60, 60, 10], [50, 30, 30, 90]]
    routing_run(tmp_path / "identity" / "seed0", [1.1] * 60, columns, expert_budget=1.5)
    (tmp_path / "mlp" / "seed0").mkdir(parents=True)  # still running
    found = routing_report.load(tmp_path, {name: arm.seeds for name, arm in routing.ARMS.items()})
    labels = {name: arm.label for name, arm in routing.ARMS.items()}
    routing_report.write(tmp_path, found, labels)

    sign, identity = found["sign", 0], found["identity", 0]
    assert (sign.numbers["until_1.5"], sign.numbers["until_1.2"]) == (48, np.inf)
    assert (identity.numbers["until_1.5"], identity.numbers["until_1.2"]) == (1, 1)
    assert identity.experts_by_domain == {"code": [1.9], "poetry": [1.1]}
    assert identity.numbers["held_out_max_load"] == pytest.approx(120 / 100)
    assert identity.numbers["dropped"] == pytest.approx(3 / 300)
    assert sign.numbers["max_load"] == pytest.approx((3.0 + 1.3) / 2) and sign.numbers["max_load_end"] == 1.3
    assert sign.bits == [pytest.approx(0.5)]

    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "| bias, sign (1) | 8.00 |  | 2.15 | 1.30 | 1.075 | 0.650 | 48 | never | 1.50 | 0.500 |" in text
    assert "| code | 1.90 | 1.90 |" in text and "Experts a held-out token, bias, sign" not in text
    assert routing_report.read(tmp_path / "results.json") == found
    for name in ("loads.png", "experts_by_domain.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_known_runs_are_not_run_again(domains, tmp_path, monkeypatch):
    """A known run stands for an arm with the same settings, and for no other."""
    configs = {run.arm: (run, pool.load_config(routing.CONFIG, f"{domains}{run.argument}", run.overrides))
               for run in routing.planned(tmp_path, list(routing.ARMS), {})}  # fmt: skip
    assert configs["identity"][1].model.moe.mean_slots == 4 == configs["global"][1].model.moe.top_k
    assert configs["information"][1].data.labels == {"law": 0, "prose": 1} and not configs["global"][1].data.labels
    assert configs["routers"][1].model.moe.routers == 2 and configs["information"][1].model.moe.routers == 1
    numbers = dict.fromkeys(routing_report.COLUMNS, 1.0)
    series = {name: [1.0, 1.0] for name in routing_report.SERIES}
    settings = {name: records.settings_of(cfg) for name, (_, cfg) in configs.items()}
    known = {(name, 0): routing_report.Finished(name, 0, settings[name], numbers, [1, 2], series, {"law": 2.0},
                                                {"law": [4.0]}, [0.1]) for name in configs}  # fmt: skip
    asked = routing.call(str(domains), {})
    assert asked.select(known, "--known") == known
    assert not asked.select({("sign", 0): known["quantile", 0]._replace(arm="sign")}, "--known")
    renamed = {("information", 0): known["global", 0]._replace(arm="information")}
    assert not asked.select(renamed, "--known")
    # Only its further loss tells this record from one of the arm, and no such loss in the other way.
    more = {name: x for name, x in settings["information"].items() if name.startswith("loss.more.")}
    assert len(more) > 1 and len(records.unlike(settings["global"] | more, settings["global"], {})) == len(more)
    arm = settings["global"] | more
    assert settings["global"]["loss.more"] == {} and len(records.unlike(settings["global"], arm, arm)) == len(more)
    with_more = known["global", 0]._replace(settings=settings["global"])
    assert not asked.select({("information", 0): with_more._replace(arm="information")}, "--known")
    # A domain with the label 0 has what a domain without a name has.
    named, fewer = settings["information"], dict(settings["information"])
    assert "data.labels.law" not in named
    assert records.unlike(named | {"data.labels.law": 0}, fewer, {}) == []
    assert len(records.unlike(named | {"data.labels.law": 1}, fewer, {})) == 1
    # Labels that are all 0 are known to be so: the arm's are not taken for them, but for those of a record without any.
    without = {name: x for name, x in named.items() if not f"{name}.".startswith("data.labels.")}
    for zeros in ({"data.labels.law": 0}, {"data.labels": {}}):
        assert len(records.unlike(without | zeros, named, named)) == 1
        assert records.unlike(without | zeros, without | {"data.labels": {}}, named) == []
    assert records.unlike(without, named, named) == []
    # Published records have the names of an earlier version, and each of their fields is compared.
    published = routing_report.read(Path(__file__).parents[1] / "docs/routing_runs.json")
    assert asked.select(published, "--known") == published
    one = published["sign", 0]
    for name, value in (("model.moe.score", "softmax"), ("model.moe.top_k", 1), ("train.steps", 10)):
        changed = {("sign", 0): one._replace(settings=one.settings | {name: value})}
        assert name in one.settings and not asked.select(changed, "--known"), name

    file = tmp_path / "known.json"
    file.write_text(routing_report.as_text(list(known.values())), encoding="utf-8")
    flags = [f"--data={domains}", f"--out={tmp_path}/out", f"--known={file}"]
    monkeypatch.setattr(sys, "argv", ["routing", *flags])
    monkeypatch.setattr(pool, "run_all", lambda *_: pytest.fail("nothing is to be run"))
    assert routing.main() == 0
    assert "| bias, quantile (1) | 1.00 |" in (tmp_path / "out" / "table.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("experiment", [routing, upcycling, balance_scope])
def test_runs_of_other_text_have_no_table(experiment, tmp_path, monkeypatch, capsys):
    """One line that names the run and the domains, and no file."""
    docs, name = Path(__file__).parents[1] / "docs", experiment.__name__.rpartition(".")[2]
    report = {routing: routing_report, upcycling: upcycling_report, balance_scope: balance_report}[experiment]
    file, (arm, first, other) = docs / f"{name}_runs.json", {
        routing: ("sign", "sign, seed 0", {"law": 2.0, "python": 3.0}),
        upcycling: ("exact", "dense, seed 0", {"law": 2.0, "python": 3.0, "": 2.5}),
        balance_scope: ("scope_2", "global, seed 0", {"law": 2.0, "python": 3.0}),
    }[experiment]  # fmt: skip
    known = report.read(file)
    mine = known[arm, 0]._replace(domains=other)
    if experiment is balance_scope:  # the published records have no domains
        known = {("global", 0): known[arm, 0]._replace(domains=dict.fromkeys("abcdef", 1.0) | {"python": 3.0})}
        monkeypatch.setattr(report, "read", lambda file: known)
    monkeypatch.setattr(report, "load", lambda *_: {(arm, 1): mine._replace(seed=1)})
    monkeypatch.setattr(sys, "argv", [name, f"--out={tmp_path / 'out'}", f"--known={file}", "--report_only"])
    assert experiment.main() == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {arm}, seed 1: was measured on other domains than {first}: without ")
    assert " more, with law; compare them apart" in said and said.count("\n") == 1
    assert not list(tmp_path.rglob("*.md"))
    if experiment is upcycling:  # of the same domains, with other points of the curve
        more = mine._replace(domains=known[arm, 0].domains, tokens=mine.tokens[:-1], loss=mine.loss[:-1])
        monkeypatch.setattr(report, "load", lambda *_: {(arm, 1): more})
        assert experiment.main() == 2
        assert "exact, seed 1: was measured on other numbers of tokens than exact, seed 0: without 9.83M;" in (
            capsys.readouterr().err
        )
