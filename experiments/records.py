"""Tells whether a finished result was made by the configuration and the options of this call.

Every experiment compares by these functions. `pool.Call` has what a call asks for.
"""

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from moe_jax import config as config_lib
from moe_jax.config.labels import without_zeros
from moe_jax.errors import UserError
from moe_jax.run import config_file
from moe_jax.tree import flatten_config

ENTRIES = ("data.sources.", "data.labels.", "optim.groups.", "loss.more.")  # their entries have names of their own
PLACES = ("path", "data_dir")  # of text, which lies elsewhere on another machine


def _settings(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a flat configuration that decide what is trained, without the seed and the places of files.

    A group of `ENTRIES` that has none is named too, so that a record without entries tells from one that lacks them.
    """

    def decides(name: str) -> bool:
        if name == "seed" or (name.startswith("data.") and name.rpartition(".")[2] in PLACES):
            return False
        return name == "train.steps" or not config_lib.may_change(name)

    found = {name: value for name, value in without_zeros(values).items() if decides(name)}
    for name, kind in (("init_from", bool), ("loss.balance_batch", str)):  # a number, or the same as text
        if name in found:
            found[name] = kind(found[name])
    found |= {group[:-1]: {} for group in ENTRIES if not any(name.startswith(group) for name in found)}
    return json.loads(json.dumps(found))  # tuples become lists, as in a file


def settings_of(cfg: config_lib.RunConfig) -> dict[str, Any]:
    """The settings that tell a run from others, by the names of the config."""
    return _settings(flatten_config(config_lib.to_dict(cfg)))


def settings_in(folder: Path) -> dict[str, Any]:
    """The settings of a run directory."""
    return _settings(config_file.values(folder))


def full_names(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a record of an earlier version, by the names of the config."""
    short = {"steps": "train.steps", "batch_size": "data.batch_size", "seq_len": "data.seq_len"}
    full = {f"model.{name}" if name.startswith("moe.") else short.get(name, name): x for name, x in settings.items()}
    if full.keys() != settings.keys() and full.get("optim.name") == "adamw":
        full.pop("optim.newton_schulz_dtype", None)  # had another default, and AdamW does not read it
    return full


def unlike(record: dict[str, Any], wanted: dict[str, Any], usual: dict[str, Any]) -> list[str]:
    """Lines about the settings of a record that are not those wanted.

    usual: the settings of the arm without --set. A record of few settings had these for the others, but not entries of
    a group that it names: of which it has others, labels of 0 included, or none (see `_settings`).
    """
    groups = {group for group in ENTRIES for name in record if f"{name}.".startswith(group)}
    record, wanted, usual = without_zeros(record), without_zeros(wanted), without_zeros(usual)

    def had(name: str) -> Any:
        group = next((group for group in groups if name.startswith(group)), None)
        if group:
            entry = group + name[len(group) :].split(".")[0]
            if not any(f"{n}.".startswith(f"{entry}.") for n in record):
                return None
        return record.get(name, usual.get(name))

    names = [name for name in wanted if f"{name}." not in ENTRIES]
    names += [name for name in record if name not in wanted and name.startswith(ENTRIES)]
    pairs = {name: (had(name), wanted.get(name)) for name in names}
    return config_file.describe({name: pair for name, pair in pairs.items() if not config_lib.same_value(*pair)})


def unlike_options(record: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Lines about the options of a measurement that are not those wanted."""
    differ = {name: x for name, x in wanted.items() if not config_lib.same_value(record.get(name), x)}
    return [f"--{name}: {record.get(name, 'not known')} then, {x} now" for name, x in differ.items()]


def as_flags(options: dict[str, Any]) -> list[str]:
    """Options as flags of a command; lists are separated by commas."""
    text = lambda x: (
        ",".join(f"{one:g}" if isinstance(one, float) else str(one) for one in x) if isinstance(x, list) else x
    )
    return [f"--{name}={text(x)}" for name, x in options.items()]


def as_record(kind: Callable, saved: dict[str, Any]) -> Any:
    """A record of the class `kind`, a NamedTuple, from JSON. What it lacks of settings and options is not known."""
    found = {"settings": {}, "options": {}} | saved
    found["settings"] = full_names(found["settings"])
    return kind(**{name: x for name, x in found.items() if name in kind._fields})


def select(results: dict[Any, Any], why: Callable[[Any, Any], list[str]], source: str | Path) -> dict[Any, Any]:
    """The results for which `why`, of key and result, gives no reason against. The others are printed."""
    kept = {}
    for key, one in results.items():
        try:
            reasons = why(key, one)
        except (UserError, ValueError) as error:
            reasons = [" ".join(str(error).split())]
        if reasons:
            name = key if isinstance(key, str) else f"{key[0]}, seed {key[1]},"
            more = f" and {len(reasons) - 3} more" if len(reasons) > 3 else ""
            print(f"{source}: {name} is left out: {'; '.join(reasons[:3])}{more}", flush=True)
        else:
            kept[key] = one
    return kept


def unequal(results: dict[Any, Any], on: Callable[[Any], Iterable[Any]], what: str = "domains") -> bool:
    """Whether results by key were not measured on the same, which is then printed: they have no common table.

    on: of a result, what it was measured on; nothing where that is not known. what: the plural of its name.
    """
    called = lambda key: key if isinstance(key, str) else f"{key[0]}, seed {key[1]}"

    def some(names: list[str]) -> str:
        return ", ".join(names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3)

    known = {key: [str(x) or "all" for x in on(one)] for key, one in results.items()}
    known = {key: names for key, names in known.items() if names}
    first, *others = known or [None]
    for key in others:
        lacks = [name for name in known[first] if name not in known[key]]
        more = [name for name in known[key] if name not in known[first]]
        if lacks or more:
            differs = [f"{word} {some(names)}" for word, names in (("without", lacks), ("with", more)) if names]
            print(f"error: {called(key)}: was measured on other {what} than {called(first)}: {', '.join(differs)}; "
                  "compare them apart, without --known or in another --out", file=sys.stderr)  # fmt: skip
            return True
    return False


def apart_from_weights(name: str) -> bool:
    """Whether a setting is another's than the weights that a run begins with, for experiments on upcycled weights.

    Upcycling leaves out layers of multi-token prediction; it keeps the other fields that say how weights are used.
    """
    if name.startswith("model.") and name != "model.mtp_layers":
        return config_lib.is_machine(name) or name.startswith("model.lora.")
    return not name.startswith(("model.", "optim.groups."))
