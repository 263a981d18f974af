"""Reads and writes a run's configuration: `<workdir>/config.json`, and its past in `config_history.jsonl`.

config.json is written with the first checkpoint of a run, and again, atomically, when a run is resumed with permitted
changes. Each such change first adds a line to config_history.jsonl, so that no value is lost:

    {"from_step": 41, "changed": {"train.steps": [40, 62]}}        values before and after; null: no such field then

A line is valid from its step on. It overrides earlier lines for that step and later ones (`--resume_step`).
"""

import contextlib
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax

from moe_jax import config
from moe_jax.config.labels import without_zeros
from moe_jax.errors import CheckpointError, ConfigError
from moe_jax.tree import flatten_config

NAME, HISTORY = "config.json", "config_history.jsonl"


def _plain(cfg: config.RunConfig) -> dict:
    return json.loads(json.dumps(config.to_dict(cfg), allow_nan=False))


def _write(path: Path, text: str) -> None:
    """Writes a file atomically: another process sees the old content or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def _write_config(path: Path, cfg: config.RunConfig) -> None:
    _write(path, json.dumps(_plain(cfg), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        rule = "is not a run directory, or the run has no checkpoint yet"
        raise CheckpointError(f"{path} does not exist: {path.parent} {rule}") from None
    except (ValueError, RecursionError, OSError) as e:
        raise CheckpointError(f"{path} is not valid JSON: {e}") from None


def load_config(workdir: str | os.PathLike) -> config.RunConfig:
    """The configuration of a run. Raises CheckpointError without a readable file, ConfigError for a bad value.

    A field that is newer than the run takes the value that describes what the run did without it.
    """
    return config.build(config.complete(_read(Path(workdir) / NAME)))


def save_config(workdir: str | os.PathLike, cfg: config.RunConfig) -> None:
    """Writes `config.json`, atomically, unless there is one. Every process calls this; only process 0 writes."""
    path = Path(workdir) / NAME
    if jax.process_index() == 0 and not path.exists():
        _write_config(path, cfg)


def values(workdir: str | os.PathLike) -> dict[str, Any]:
    """The values of a run's fields by dotted name, those of fields that are newer than the run included.

    A configuration that is not valid any more is returned as it is written. Raises CheckpointError for a file that is
    not an object of JSON.
    """
    path = Path(workdir) / NAME
    written = _read(path)
    if not isinstance(written, dict):
        raise CheckpointError(f"{path} is not a configuration: it must be an object of fields")
    written = config.complete(written)
    with contextlib.suppress(ConfigError):
        written = _plain(config.build(written))
    return flatten_config(written)


def differences(workdir: str | os.PathLike, cfg: config.RunConfig) -> dict[str, tuple[Any, Any]]:
    """A dict of the fields of `cfg` that differ from the run's: (in the run, now), None for a field that one lacks.

    A group of parameters that only one of them has, and that does nothing to them, is left out: a config file may name
    it for the command line to change. So is a label of 0, which domains without a name have too, and a number that
    differs by its rounding alone.
    """
    old, new = without_zeros(values(workdir)), without_zeros(flatten_config(_plain(cfg)))
    old, new = _without_idle_groups(old, new), _without_idle_groups(new, old)
    pairs = {name: (old.get(name), new.get(name)) for name in (*old, *new)}
    differs = lambda name: (name in old) != (name in new) or not config.same_value(*pairs[name])
    return {name: pair for name, pair in pairs.items() if differs(name)}


def _without_idle_groups(values: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    neutral = {f.name: f.default for f in dataclasses.fields(config.GroupConfig) if f.name != "match"}
    prefixes = {".".join(name.split(".")[:3]) + "." for name in values if name.startswith("optim.groups.")}
    alone = {prefix for prefix in prefixes if f"{prefix}match" not in others}
    idle = tuple(prefix for prefix in alone if all(values.get(prefix + name) == x for name, x in neutral.items()))
    return {name: value for name, value in values.items() if not name.startswith(idle)}


def describe(changes: dict[str, tuple[Any, Any]]) -> list[str]:
    """Lines about changes, such as "config.optim.lr: 0.001 in the run, 0.002 now"."""
    text = lambda value: "absent" if value is None else json.dumps(value, ensure_ascii=False)
    return [f"config.{name}: {text(old)} in the run, {text(new)} now" for name, (old, new) in changes.items()]


def resume(workdir: str | os.PathLike, cfg: config.RunConfig) -> tuple[config.RunConfig, list[str]]:
    """The configuration with which the run in a directory resumes, if there is one, and lines about what changed.

    It is `cfg`, whose fields may differ from the run's if their class allows it (`config.may_change`). The run's value
    stays if `cfg` has the default and the field is newer than the run or its default has changed, and, without a line,
    if they differ by rounding alone.
    Raises CheckpointError that names the first fields that may not change. Nothing is written.
    """
    if not (Path(workdir) / NAME).exists():
        _check_no_checkpoint(Path(workdir))
        return cfg, []
    changes = differences(workdir, cfg)
    stays = {n: old for n, (old, new) in changes.items() if config.is_new_default(n, old, new)}
    changes = {n: pair for n, pair in changes.items() if n not in stays}
    refused = describe({n: pair for n, pair in changes.items() if not config.may_change(n)})
    if refused:
        raise CheckpointError(
            f"this run directory belongs to another configuration ({'; '.join(refused[:5])}); use another --workdir"
        )
    why = "the value of the run; the field is newer than the run, or its default has changed"
    lines = [f"config.{name} stays {json.dumps(value, ensure_ascii=False)}, {why}" for name, value in stays.items()]
    lines += [f"changed since the run began: {line}" for line in describe(changes)]
    return _with(cfg, _rounded_otherwise(Path(workdir), cfg) | stays), lines


def _rounded_otherwise(workdir: Path, cfg: config.RunConfig) -> dict[str, Any]:
    """The run's values of fields where `cfg` has another rounding of the same number."""
    new = flatten_config(_plain(cfg))
    same = lambda name, value: name in new and new[name] != value and config.same_value(new[name], value)
    return {name: value for name, value in values(workdir).items() if same(name, value)}


def _check_no_checkpoint(workdir: Path) -> None:
    """Raises CheckpointError for a checkpoint without config.json, since nobody knows what its arrays mean."""
    folder = workdir / "checkpoints"
    steps = sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []
    if steps:
        rule = f"does not exist, but checkpoint {steps[-1]} is of a run that had one"
        raise CheckpointError(f"{workdir / NAME} {rule}; restore it, or use another --workdir")


def _with(cfg: config.RunConfig, values: dict[str, Any]) -> config.RunConfig:
    """The configuration with other values for some fields, given by their dotted names."""
    made = config.to_dict(cfg)
    for name, value in values.items():
        *groups, last = name.split(".")
        group = made
        for key in groups:
            group = group[key]
        group[last] = value
    return config.build(made) if values else cfg


def begin(workdir: str | os.PathLike, cfg: config.RunConfig, step: int) -> None:
    """Writes the configuration from `step` on, the next step, to config.json, and the old values to the history.

    Every process calls this; only process 0 writes.
    """
    path = Path(workdir) / NAME
    save_config(workdir, cfg)
    if jax.process_index() != 0 or not (changed := differences(workdir, cfg)):
        return
    line = json.dumps({"from_step": step, "changed": changed}, ensure_ascii=False)
    history = path.with_name(HISTORY)
    text = history.read_text(encoding="utf-8") if history.exists() else ""
    # The line exists already if an earlier start was killed between the two files.
    if line not in text.splitlines()[-1:]:
        _write(history, f"{text}{line}\n")
    _write_config(path, cfg)
