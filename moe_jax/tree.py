"""Trees of parameters and of settings by name: the one spelling of a path."""

import functools
from collections.abc import Callable
from typing import Any

import jax


def path_of(path: tuple) -> str:
    """The name of a parameter, such as `layers/moe/w_gate`, from a key path of jax.tree_util.

    Attributes, dictionary keys and indices have the same spelling, since Orbax stores records as dicts.
    """
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def flatten(tree: Any) -> dict[str, Any]:
    """A dict of the leaves of a tree by path, such as `layers/moe/w_gate`."""
    return {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def nest(flat: dict[str, Any]) -> dict[str, Any]:
    """The nested dicts of a dict of leaves by path: the inverse of `flatten`."""
    out: dict = {}
    for path, value in flat.items():
        *folders, name = path.split("/")
        functools.reduce(lambda node, folder: node.setdefault(folder, {}), folders, out)[name] = value
    return out


def at_path(tree: dict[str, Any], path: str) -> Any:
    """What lies in nested dicts at a path, such as `layers/attention`; None if nothing does."""
    for name in path.split("/"):
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


def update_at(tree: dict[str, Any], path: str, fn: Callable[[Any], Any]) -> dict[str, Any]:
    """The nested dicts with `fn` applied to what lies at a path, such as `layers/attention`."""
    name, _, rest = path.partition("/")
    return {**tree, name: update_at(tree[name], rest, fn) if rest else fn(tree[name])}


def flatten_config(values: Any, name: str = "") -> dict[str, Any]:
    """A dict of the values of nested dicts by dotted name, such as `model.moe.top_k`."""
    if not isinstance(values, dict):
        return {name: values}
    join = lambda key: f"{name}.{key}" if name else key
    return {k: v for key, item in values.items() for k, v in flatten_config(item, join(key)).items()}


def split(tree: dict[str, Any], takes: Callable[[str], bool]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The nested dicts of the leaves whose paths `takes` takes, and those of the others."""
    flat = flatten(tree)
    return tuple(nest({path: x for path, x in flat.items() if takes(path) == wanted}) for wanted in (True, False))


def join(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The nested dicts of the leaves of both: the inverse of `split`."""
    return nest(flatten(one) | flatten(other)) if one and other else one or other
