"""`ml_collections.ConfigDict` ⇄ the dataclasses of the schema, strict in both directions."""

import dataclasses
import difflib
import types
import typing
from typing import Any, Literal

import ml_collections

from moe_jax.config.data import SourceConfig
from moe_jax.config.fields import require
from moe_jax.config.model import ModelConfig
from moe_jax.config.schema import GroupConfig, RouterLossConfig, RunConfig
from moe_jax.errors import ConfigError


def _build(cls: type, values: Any):
    """A dataclass made from a mapping. Raises ConfigError for unknown names, wrong types and broken rules."""
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}
    for name in values:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1, 0.0)
            raise ConfigError(name, values[name], "is not a field", f"nearest valid name: {close[0]}")
    made = {}
    for name, value in values.items():
        made[name] = _convert(hints[name], value, name)
    return cls(**made)


def _build_inside(cls: type, values: Any, name: str):
    try:
        return _build(cls, dict(values.items()))
    except ConfigError as e:
        raise e.inside(name) from None


def _convert(hint: Any, value: Any, name: str):
    if dataclasses.is_dataclass(hint):
        require(hasattr(value, "items"), name, value, f"must be a group of {hint.__name__} fields")
        return _build_inside(hint, value, name)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is dict:
        require(hasattr(value, "items"), name, value, "must be a group of named entries", "nearest valid: {}")
        try:
            return {key: _convert(args[1], item, key) for key, item in value.items()}
        except ConfigError as e:
            raise e.inside(name) from None
    if origin is tuple:
        ok = isinstance(value, tuple | list)
        require(ok, name, value, f"must be a tuple of {args[0].__name__} values", "nearest valid: ()")
        return tuple(_convert(args[0], item, name) for item in value)
    if origin is Literal:
        close = difflib.get_close_matches(str(value), args, 1, 0.0)
        require(
            value in args,
            name,
            value,
            f"must be one of {', '.join(args)}",
            f"nearest valid: {close[0] if close else args[0]!r}",
        )
        return value
    if origin in (types.UnionType, typing.Union):  # int | Literal["global"], kept as text in a ConfigDict
        if isinstance(value, str) and value.lstrip("-").isdigit():
            value = int(value)
        literals = [a for h in args for a in typing.get_args(h)]
        ok = value in literals or (isinstance(value, int) and not isinstance(value, bool))
        require(
            ok, name, value, f"must be an integer or one of {', '.join(literals)}", f"nearest valid: {literals[0]!r}"
        )
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        require(abs(value) < 2**1023, name, value, "must fit into a float")
        return float(value)
    ok = isinstance(value, hint) and not (hint is int and isinstance(value, bool))
    require(ok, name, value, f"must be of type {hint.__name__}, not {type(value).__name__}")
    return value


def build(config: ml_collections.ConfigDict | dict) -> RunConfig:
    """The validated configuration of a ConfigDict. Raises ConfigError."""
    if not hasattr(config, "items"):
        raise ConfigError("*", config, "must be a group of RunConfig fields")
    return _build(RunConfig, dict(config.items()))


def build_model(values: dict) -> ModelConfig:
    """The validated configuration of a model alone, for weights without a run. Raises ConfigError."""
    return _build_inside(ModelConfig, values, "model")


def to_dict(cfg: Any) -> dict:
    """Nested dicts of values that JSON can hold; `build(to_dict(cfg)) == cfg`."""
    return _plain(dataclasses.asdict(cfg))


def _plain(values: dict) -> dict:
    """The values, with text for a field that takes a number or a word, so that the command line may set either."""
    made = {k: _plain(v) if isinstance(v, dict) else v for k, v in values.items()}
    both = ("balance_batch", "documents")
    return {k: str(v) if k in both and isinstance(v, int) else v for k, v in made.items()}


def default_config() -> ml_collections.ConfigDict:
    """A locked ConfigDict of every field with its default. Assigning to a misspelt name raises an exception."""
    config = ml_collections.ConfigDict(to_dict(RunConfig()))
    config.lock()
    return config


def source(**fields) -> ml_collections.ConfigDict:
    """A source for `config.data.sources`. It has every field, so that the command line can override each."""
    return _locked(SourceConfig, fields)


def router_loss(**fields) -> ml_collections.ConfigDict:
    """A loss for `config.loss.more`. It has every field, so that the command line can override each."""
    return _locked(RouterLossConfig, fields)


def parameter_group(**fields) -> ml_collections.ConfigDict:
    """A group for `config.optim.groups`. It has every field, so that the command line can override each."""
    return _locked(GroupConfig, fields)


def _locked(cls: type, fields: dict) -> ml_collections.ConfigDict:
    made = ml_collections.ConfigDict(to_dict(_build(cls, fields)))
    made.lock()
    return made
