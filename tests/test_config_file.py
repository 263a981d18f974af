"""config.json: what a run is, what of it may change, and what it was before."""

import dataclasses
import json

import pytest

from moe_jax import config
from moe_jax.config import RunConfig, classes, fields
from moe_jax.errors import CheckpointError, ConfigError
from moe_jax.run import config_file
from moe_jax.run.config_file import begin, describe, differences, load_config, resume, save_config


def having(**values) -> RunConfig:
    """The default configuration but for these, such as optim__lr=0.5."""
    made = config.to_dict(RunConfig())
    for name, value in values.items():
        *groups, last = name.split("__")
        group = made
        for key in groups:
            group = group[key]
        group[last] = value
    return config.build(made)


def edit(folder, **values) -> None:
    """Writes values into config.json, as someone might; `...` takes a field out."""
    made = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for name, value in values.items():
        *groups, last = name.split("__")
        group = made
        for key in groups:
            group = group[key]
        group[last] = value
        if value is ...:
            del group[last]
    (folder / "config.json").write_text(json.dumps(made), encoding="utf-8")


def test_config_is_written_once_and_compared(tmp_path):
    cfg, run = RunConfig(), tmp_path / "run"
    save_config(run, cfg)
    assert load_config(run) == cfg and differences(run, cfg) == {} and resume(run, cfg) == (cfg, [])

    changed = having(seed=1, optim__lr=0.5, optim__name="adamw")
    assert describe(differences(run, changed)) == [
        "config.seed: 0 in the run, 1 now",
        'config.optim.name: "muon" in the run, "adamw" now',
        "config.optim.lr: 0.001 in the run, 0.5 now",
    ]
    edit(run, data__sources={}, model__gone=1)
    before = (run / "config.json").read_bytes()
    with pytest.raises(CheckpointError, match=r"config\.model\.gone: 1 in the run, absent now") as e:
        resume(run, cfg)
    assert 'config.data.sources.stdlib.kind: absent in the run, "tfds" now' in str(e.value)
    save_config(run, cfg)
    assert (run / "config.json").read_bytes() == before  # never overwritten
    assert [p.name for p in run.iterdir()] == ["config.json"]
    with pytest.raises(ConfigError, match="gone"):
        load_config(run)


def test_config_that_cannot_be_read(tmp_path):
    with pytest.raises(CheckpointError, match="is not a run directory"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text('{"seed": ', encoding="utf-8")
    with pytest.raises(CheckpointError, match="is not valid JSON"):
        load_config(tmp_path)


# --- classes of fields -----------------------------------------------------------------------------------------------

CHANGEABLE = {  # beside all of train, mesh and sample
    "distill.teacher", "data.num_workers", "data.cache_dir", "model.remat", "model.unroll", "model.attention",
    "model.moe.exchange", "model.moe.exchange_chunks", "model.moe.room", "model.moe.grouped_matmul",
}  # fmt: skip
OTHER_NUMBERS = {  # of the same function: they make another run, and weights of one may start the other
    "model.compute_dtype", "model.param_dtype", "model.init_std", "model.max_seq_len", "model.segment_mask",
    "model.moe.compute", "model.moe.capacity_factor", "model.moe.overflow", "model.moe.expert_budget",
    "model.moe.min_ratio",
    # The base of adapters is a model without any, and fresh ones add 0. Adapters in the run it starts from are merged.
    "model.lora.rank", "model.lora.alpha", "model.lora.rslora", "model.lora.match",
    "model.mtp_layers",  # no logits depend on them
    # Pools are a way to choose among the experts that there are.
    *(f"model.moe.pool_{name}" for name in ("min", "max", "from", "size", "prefix")),
}  # fmt: skip


def test_every_field_has_its_classes():
    """A new field of a component with one class has that class; a component or a field without any is named."""
    for name, component, f in classes.fields():
        changes = name.split(".")[0] in ("train", "mesh", "sample") or name in CHANGEABLE
        resumes, weighs = (component.class_of(f.name, which) for which in ("resume", "weights"))
        assert resumes == (fields.MAY_CHANGE if changes else fields.FIXED), name
        machine = fields.MACHINE if name in CHANGEABLE | OTHER_NUMBERS else fields.FUNCTION
        assert weighs == (machine if name.startswith("model.") else None), name
        assert (config.may_change(name), config.is_machine(name)) == (changes, weighs == fields.MACHINE), name
    assert CHANGEABLE | OTHER_NUMBERS <= {name for name, _, _ in classes.fields()}
    with pytest.raises(TypeError, match="resume"):
        type("NewConfig", (fields.Checked,), {})


@pytest.mark.parametrize("name", ["gone", "model.gone", "data.sources", "data.sources.a.b.path", "seed.x", ""])
def test_what_is_no_field_may_not_change(name):
    assert not config.may_change(name) and not config.is_machine(name)


OTHER_VALUES = {"model__moe__exchange": "ring", "model__moe__exchange_chunks": 2, "model__moe__room": 2.0,
                "model__unroll": 2, "model__remat": "full", "train__wandb_project": "p",
                "mesh__fsdp": 2, "sample__prompt": "x", "data__num_workers": 1}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_what_changes_nothing_may_change(tmp_path, name):
    save_config(tmp_path, RunConfig())
    changed = having(**{name: OTHER_VALUES[name]})
    cfg, lines = resume(tmp_path, changed)
    assert cfg == changed and len(lines) == 1
    assert name != "data__num_workers" or lines == [
        "changed since the run began: config.data.num_workers: 0 in the run, 1 now"
    ]


ANOTHER = {"model__compute_dtype": "float32", "model__segment_mask": False, "model__moe__compute": "dense",
           "optim__lr": 0.5, "loss__accumulation": "running", "init_from": "runs/a", "model__max_seq_len": 512,
           "data__tokenizer__train_bytes": 7}  # fmt: skip


@pytest.mark.parametrize("name", ANOTHER)
def test_what_makes_another_run_is_refused(tmp_path, name):
    save_config(tmp_path, RunConfig())
    with pytest.raises(CheckpointError, match=rf"another configuration \(config\.{name.replace('__', '.')}: "):
        resume(tmp_path, having(**{name: ANOTHER[name]}))


# --- a field that is newer than the run ------------------------------------------------------------------------------


def test_a_field_newer_than_the_run_has_its_default(tmp_path):
    save_config(tmp_path, RunConfig())
    edit(tmp_path, init_from=..., model__moe=...)
    assert resume(tmp_path, RunConfig()) == (RunConfig(), [])
    with pytest.raises(CheckpointError, match=r'config\.init_from: "" in the run, "runs/a" now'):
        resume(tmp_path, RunConfig(init_from="runs/a"))


def test_a_run_that_knows_a_field_by_its_earlier_name_goes_on(tmp_path):
    more = {"micro": {"coef": 0.1, "balance_batch": 2, "start_step": 3, "stop_step": 0}}
    save_config(tmp_path, RunConfig())
    edit(tmp_path, loss__more=..., loss__more_load_balance=more)
    cfg = load_config(tmp_path)
    assert cfg.loss.more == {"micro": config.RouterLossConfig("load_balance", 0.1, 2, 3)}
    assert resume(tmp_path, cfg) == (cfg, []) and differences(tmp_path, cfg) == {}
    other = having(loss__more={"micro": {**more["micro"], "kind": "mutual_information"}})
    with pytest.raises(
        CheckpointError, match=r'more\.micro\.kind: "load_balance" in the run, "mutual_information" now'
    ):
        resume(tmp_path, other)
    begin(tmp_path, dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, steps=2000)), 41)
    assert "more_load_balance" not in (tmp_path / "config.json").read_text(encoding="utf-8")
    assert history(tmp_path) == [{"from_step": 41, "changed": {"train.steps": [1000, 2000]}}]
    edit(tmp_path, loss__more_load_balance=more)  # both names: the earlier one is no field
    with pytest.raises(ConfigError, match="more_load_balance"):
        load_config(tmp_path)


@pytest.fixture
def newer(monkeypatch):
    """`optim.nesterov` and a source's `weight` as if they were new, and runs had been without it, with weights of 3."""
    for component, name, was in ((config.OptimConfig, "nesterov", False), (config.SourceConfig, "weight", 3.0)):
        f = component.__dataclass_fields__[name]
        marked = fields.newer(dataclasses.field(default=f.default, metadata=f.metadata), was)
        assert marked.metadata == {**f.metadata, "was": was} and marked.default == f.default
        monkeypatch.setattr(f, "metadata", marked.metadata)


@pytest.mark.parametrize("recorded", [False, True])
def test_what_a_run_did_before_a_field_existed_stays(tmp_path, newer, recorded):
    """The command has the default of today: the run's own value wins over it, at this start and at every later one."""
    save_config(tmp_path, RunConfig())
    edit(tmp_path, optim__nesterov=..., data__sources__stdlib__weight=...)
    old = having(optim__nesterov=False, data__sources={"stdlib": {
        **config.to_dict(RunConfig())["data"]["sources"]["stdlib"], "weight": 3.0}})  # fmt: skip
    assert load_config(tmp_path) == old
    if recorded:
        begin(tmp_path, dataclasses.replace(old, train=dataclasses.replace(old.train, steps=2000)), 41)
        assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["optim"]["nesterov"] is False
    command = having(train__steps=2000)
    cfg, lines = resume(tmp_path, command)
    assert cfg == dataclasses.replace(old, train=command.train)
    why = "the value of the run; the field is newer than the run, or its default has changed"
    assert lines[:2] == [f"config.optim.nesterov stays false, {why}",
                         f"config.data.sources.stdlib.weight stays 3.0, {why}"]  # fmt: skip
    assert len(lines) == 2 + (not recorded)


@pytest.mark.parametrize("recorded", ["bfloat16", ...])
def test_a_run_keeps_the_dtype_of_newton_schulz(tmp_path, recorded):
    """Its default was bfloat16 before it was "auto"."""
    save_config(tmp_path, RunConfig())
    edit(tmp_path, optim__newton_schulz_dtype=recorded)
    cfg, lines = resume(tmp_path, RunConfig())
    assert cfg.optim.newton_schulz_dtype == "bfloat16" and len(lines) == 1
    assert lines[0].startswith('config.optim.newton_schulz_dtype stays "bfloat16", the value of the run')
    with pytest.raises(CheckpointError, match='newton_schulz_dtype: "bfloat16" in the run, "float16" now'):
        resume(tmp_path, having(optim__newton_schulz_dtype="float16"))


def test_what_was_explicitly_chosen_is_refused(tmp_path, newer):
    save_config(tmp_path, RunConfig())
    edit(tmp_path, data__sources__stdlib__weight=...)
    source = config.to_dict(RunConfig())["data"]["sources"]["stdlib"]
    with pytest.raises(CheckpointError, match=r"stdlib\.weight: 3\.0 in the run, 2\.0 now"):
        resume(tmp_path, having(data__sources={"stdlib": {**source, "weight": 2.0}}))
    edit(tmp_path, data__sources__stdlib__weight=2.0)  # the run's own choice, and not what was
    with pytest.raises(CheckpointError, match=r"stdlib\.weight: 2\.0 in the run, 1\.0 now"):
        resume(tmp_path, RunConfig())


# --- config.json says what the run is --------------------------------------------------------------------------------


def history(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "config_history.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_change_is_in_the_file_and_what_was_is_kept(tmp_path):
    first, second, third = (having(train__steps=n, sample__prompt=p) for n, p in ((40, "ü"), (62, "ü"), (62, "b")))
    begin(tmp_path, first, 1)
    assert load_config(tmp_path) == first and not (tmp_path / "config_history.jsonl").exists()
    begin(tmp_path, first, 21)  # the same again: nothing to say
    assert not (tmp_path / "config_history.jsonl").exists()
    for cfg, at in ((second, 41), (third, 63), (third, 63)):
        assert resume(tmp_path, cfg)[0] == cfg
        begin(tmp_path, cfg, at)
        assert load_config(tmp_path) == cfg
    assert history(tmp_path) == [
        {"from_step": 41, "changed": {"train.steps": [40, 62]}},
        {"from_step": 63, "changed": {"sample.prompt": ["ü", "b"]}},
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "config_history.jsonl"]


def test_a_run_keeps_its_rounding_of_a_number(tmp_path):
    """A computed weight may have another last digit in another version of Python: no change, and no line about it."""
    of = lambda weight, steps=40: having(data__sources__stdlib__weight=weight, train__steps=steps)
    run, now = 0.12031188618991842, 0.12031188618991841
    begin(tmp_path, of(run), 1)
    assert of(run) != of(now) and resume(tmp_path, of(now)) == (of(run), [])
    cfg, lines = resume(tmp_path, of(now, steps=62))
    assert cfg == of(run, steps=62) and lines == [
        "changed since the run began: config.train.steps: 40 in the run, 62 now"
    ]
    begin(tmp_path, cfg, 41)
    assert load_config(tmp_path) == cfg and history(tmp_path) == [
        {"from_step": 41, "changed": {"train.steps": [40, 62]}}
    ]
    with pytest.raises(
        CheckpointError, match=r"config\.data\.sources\.stdlib\.weight: 0\.1203\d+ in the run, 0\.12031 now"
    ):
        resume(tmp_path, of(0.12031))


def test_values_that_are_the_same():
    third = 0.1 + 0.2
    for a, b in ((third, 0.3), ([1, (third,)], (1, [0.3])), ({"a": third}, {"a": 0.3}), (1, 1.0), (None, None)):
        assert config.same_value(a, b) and config.same_value(b, a), (a, b)
    for a, b in ((1.0, 1 + 1e-9), (2**60, 2**60 + 1), (True, 1), (False, 0.0), (0.0, 1e-300), ([0.3], [0.3, 0.3]),
                 ({"a": 1}, {"b": 1}), (None, 0), ("0.3", 0.3)):  # fmt: skip
        assert not config.same_value(a, b) and not config.same_value(b, a), (a, b)


def test_killed_between_the_two_files(tmp_path, monkeypatch):
    """The history is written first, so no value is lost, and the same start again does not write it twice."""
    begin(tmp_path, having(train__steps=40), 1)
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(config_file, "_write_config", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        begin(tmp_path, having(train__steps=62), 41)
    assert load_config(tmp_path).train.steps == 40 and len(history(tmp_path)) == 1
    begin(tmp_path, having(train__steps=62), 41)
    assert load_config(tmp_path).train.steps == 62 and len(history(tmp_path)) == 1


def test_checkpoints_without_their_configuration_are_refused(tmp_path):
    """They would go on under whatever configuration the command has, another seed's data included."""
    (tmp_path / "checkpoints" / "6.orbax-checkpoint-tmp").mkdir(parents=True)  # a save that was killed
    assert config_file.resume(tmp_path, RunConfig())[1] == []
    (tmp_path / "checkpoints" / "6").mkdir()
    with pytest.raises(
        CheckpointError, match=r"config\.json does not exist, but checkpoint 6 is of a run that had one"
    ):
        config_file.resume(tmp_path, RunConfig())


def test_a_group_that_a_run_does_not_have_takes_its_default():
    """… which need not be that of its fields: a temperature is 1, another ramp 0."""
    made = config.build(config.default_config())
    values = dataclasses.asdict(made)
    for group in [f.name for f in dataclasses.fields(made) if dataclasses.is_dataclass(getattr(made, f.name))]:
        assert group not in classes.complete({k: v for k, v in values.items() if k != group}) or group in (
            "data",
            "optim",
            "sample",
        ), group
    del values["explore"]["temperature"]
    assert "temperature" not in classes.complete(values)["explore"]
