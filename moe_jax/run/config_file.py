"""`<workdir>/config.json`: what a run is, and `config_history.jsonl`: what it was before.

config.json is written with the first checkpoint of a run, and again, atomically, when a run goes on with permitted
changes. Each of these adds a line to config_history.jsonl first, so that no value is lost:

    {"from_step": 41, "changed": {"train.steps": [40, 62]}}        before and since; null: there was no such field

A line holds from its step on, and replaces what lines above it say of that step and later ones (`--resume_step`).
"""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import jax

from moe_jax import config
from moe_jax.errors import CheckpointError, ConfigError
from moe_jax.tree import flatten_config

NAME, HISTORY = "config.json", "config_history.jsonl"


def _plain(cfg: config.RunConfig) -> dict:
    return json.loads(json.dumps(config.to_dict(cfg), allow_nan=False))


def _write(path: Path, text: str) -> None:
    """Writes a file at once: another process sees the old one or the new one."""
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
        rule = "is not a run directory, or one whose first checkpoint is yet to come"
        raise CheckpointError(f"{path} does not exist: {path.parent} {rule}") from None
    except (ValueError, RecursionError, OSError) as e:
        raise CheckpointError(f"{path} is not valid JSON: {e}") from None


def load_config(workdir: str | os.PathLike) -> config.RunConfig:
    """The configuration of a run. Raises CheckpointError without a readable file, ConfigError for a bad value.

    A field that is newer than the run has the value that the run had without it.
    """
    return config.build(config.complete(_read(Path(workdir) / NAME)))


def save_config(workdir: str | os.PathLike, cfg: config.RunConfig) -> None:
    """Writes `config.json`, atomically, unless there is one. Every process calls this; only process 0 writes."""
    path = Path(workdir) / NAME
    if jax.process_index() == 0 and not path.exists():
        _write_config(path, cfg)


def differences(workdir: str | os.PathLike, cfg: config.RunConfig) -> dict[str, tuple[Any, Any]]:
    """Fields of `cfg` that differ from the run's, as (in the run, now); None for a field that one of them lacks."""
    old = config.complete(_read(Path(workdir) / NAME))
    with contextlib.suppress(ConfigError):  # one that cannot be built is compared as it stands
        old = _plain(config.build(old))
    old, new = flatten_config(old), flatten_config(_plain(cfg))
    names = [*old, *(name for name in new if name not in old)]
    return {n: (old.get(n), new.get(n)) for n in names if _shown(old, n) != _shown(new, n)}


def _shown(values: dict[str, Any], name: str) -> str:
    return json.dumps(values[name], ensure_ascii=False) if name in values else "absent"


def describe(changes: dict[str, tuple[Any, Any]]) -> list[str]:
    """A line for each, such as "config.optim.lr: 0.001 in the run, 0.002 now"."""
    say = lambda value: "absent" if value is None else json.dumps(value, ensure_ascii=False)
    return [f"config.{name}: {say(old)} in the run, {say(new)} now" for name, (old, new) in changes.items()]


def resume(workdir: str | os.PathLike, cfg: config.RunConfig) -> tuple[config.RunConfig, list[str]]:
    """The configuration that the run in a directory, if there is one, goes on with; and what changed, in lines.

    That is `cfg`, whose fields may differ from the run's as far as their class allows it (`config.may_change`). But
    where a field is newer than the run, or its default has changed, and `cfg` has the default, the run's value stays.
    Raises CheckpointError with the first fields that make it another run. Nothing is written.
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
    why = "as the run began; it is newer than the run, or its default has changed"
    lines = [f"config.{name} stays {json.dumps(value, ensure_ascii=False)}, {why}" for name, value in stays.items()]
    lines += [f"changed since the run began: {line}" for line in describe(changes)]
    return _with(cfg, stays), lines


def _check_no_checkpoint(workdir: Path) -> None:
    """A checkpoint comes after config.json: somebody has removed that, and nobody knows what the checkpoint is of."""
    folder = workdir / "checkpoints"
    steps = sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []
    if steps:
        rule = f"does not exist, and checkpoint {steps[-1]} is of a run that had one"
        raise CheckpointError(f"{workdir / NAME} {rule}; put it back, or use another --workdir")


def _with(cfg: config.RunConfig, values: dict[str, Any]) -> config.RunConfig:
    """The configuration with some fields, by their dotted names, replaced."""
    made = config.to_dict(cfg)
    for name, value in values.items():
        *groups, last = name.split(".")
        group = made
        for key in groups:
            group = group[key]
        group[last] = value
    return config.build(made) if values else cfg


def begin(workdir: str | os.PathLike, cfg: config.RunConfig, step: int) -> None:
    """Makes config.json say what the run is from `step`, the first to be taken now, and keeps what it was before.

    Every process calls this; only process 0 writes.
    """
    path = Path(workdir) / NAME
    save_config(workdir, cfg)
    if jax.process_index() != 0 or not (changed := differences(workdir, cfg)):
        return
    line = json.dumps({"from_step": step, "changed": changed}, ensure_ascii=False)
    history = path.with_name(HISTORY)
    text = history.read_text(encoding="utf-8") if history.exists() else ""
    if line not in text.splitlines()[-1:]:  # it is there if a start was killed between the two files
        _write(history, f"{text}{line}\n")
    _write_config(path, cfg)
