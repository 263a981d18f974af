"""The metadata of a field, found by the field's name in a config, such as "data.sources.stdlib.path"."""

import dataclasses
import math
import typing
from collections.abc import Iterator
from typing import Any

from moe_jax.config.fields import MACHINE, MAY_CHANGE
from moe_jax.config.schema import RunConfig

ROUNDING = 1e-12  # relative: more than rounding makes of a number, and less than anyone means by another value


def _find(name: str, root: type) -> tuple[type, str] | None:
    """The component that holds the field of a dotted name, and the field's own name in it.

    An entry of a dict is found as the field that holds the dict. None for a name that is not a field.
    """
    component, found, parts = root, None, name.split(".")
    while parts:
        hint = typing.get_type_hints(component).get(parts[0])
        if hint is None:
            return None
        found = component, parts.pop(0)
        if typing.get_origin(hint) is dict:
            parts, hint = parts[1:], typing.get_args(hint)[1]
        if not dataclasses.is_dataclass(hint):
            return None if parts else found
        component = hint
    return found


def may_change(name: str, root: type = RunConfig) -> bool:
    """Whether a run may be resumed with another value of the field. False for a name that is not a field."""
    found = _find(name, root)
    return found is not None and found[0].class_of(found[1], "resume") == MAY_CHANGE


def is_machine(name: str, root: type = RunConfig) -> bool:
    """Whether the weights compute the same function when the field has another value."""
    found = _find(name, root)
    return found is not None and found[0].class_of(found[1], "weights") == MACHINE


def fields(root: type = RunConfig, prefix: str = "") -> Iterator[tuple[str, type, dataclasses.Field]]:
    """Yields (name, component, field) of every field that is not a group; "*" stands for the entries of a dict."""
    hints = typing.get_type_hints(root)
    for f in dataclasses.fields(root):
        hint, name = hints[f.name], f"{prefix}{f.name}"
        if typing.get_origin(hint) is dict:
            entry = typing.get_args(hint)[1]
            hint, name = entry, f"{name}.*" if dataclasses.is_dataclass(entry) else name
        if dataclasses.is_dataclass(hint):
            yield from fields(hint, f"{name}.")
        else:
            yield name, root, f


def complete(values: Any, root: type = RunConfig) -> Any:
    """The values of a run of an earlier version, under the names of today and with values for the fields it lacks.

    A field that the run knows by an earlier name (`renamed`) takes that value. A missing field takes the value `was` of
    its metadata, where it has one. Other values stay unchanged.
    """
    if not isinstance(values, dict):
        return values
    hints, made = typing.get_type_hints(root), dict(values)
    for f in dataclasses.fields(root):
        hint = hints[f.name]
        if f.metadata.get("renamed") in made and f.name not in made:
            made[f.name] = made.pop(f.metadata["renamed"])
        if dataclasses.is_dataclass(hint):
            inner = complete(made.get(f.name, {}), hint)
            if inner or f.name in made:  # else the group takes its default, which need not be that of its fields
                made[f.name] = inner
        elif typing.get_origin(hint) is dict and isinstance(made.get(f.name), dict):
            entry = typing.get_args(hint)[1]
            made[f.name] = {key: complete(value, entry) for key, value in made[f.name].items()}
        elif "was" in f.metadata:
            made.setdefault(f.name, f.metadata["was"])
    return made


def is_new_default(name: str, old: Any, new: Any) -> bool:
    """Whether `old` is what earlier versions did without the field, its `was`, and `new` is the default now."""
    found = _find(name, RunConfig)
    f = found and found[0].__dataclass_fields__[found[1]]
    return bool(f) and "was" in f.metadata and (old, new) == (f.metadata["was"], f.default)


def same_value(a: Any, b: Any) -> bool:
    """Whether two values of a field are equal. Floats are if only rounding tells them apart, in lists and dicts too.

    The last digit of a computed value, such as the weight of a source, may differ between versions of Python.
    """
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same_value(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same_value, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=ROUNDING)
    return a == b and isinstance(a, bool) == isinstance(b, bool)
