"""Fields of a run's configuration that an evaluation may set: what it reads, and nothing that describes the weights."""

import ast
from collections.abc import Sequence
from typing import Any

import ml_collections
from ml_collections.config_flags import config_path

from moe_jax import cli, config
from moe_jax.config.classes import fields
from moe_jax.errors import ConfigError, UserError, nearest
from moe_jax.tree import flatten_config

# Of the model: how the function of its weights is computed.
MODEL = (
    "max_seq_len", "compute_dtype", "unroll", "attention", "segment_mask", "moe.compute", "moe.capacity_factor",
    "moe.overflow", "moe.min_ratio", "moe.exchange", "moe.room", "moe.exchange_chunks", "moe.grouped_matmul",
    "moe.pool_from", "moe.pool_size", "moe.pool_prefix",
)  # fmt: skip
GROUPS = ("data.", "sample.")


class Overrides(list):
    """The arguments --config.FIELD=VALUE of a command line, as (field, text of the value)."""

    def take(self, argv: list[str]) -> list[str]:
        """Keeps these arguments, and returns the others. Raises UserError for one without a value."""
        rest = []
        for text in argv:
            name, equals, value = text.lstrip("-").partition("=")
            if not (text.startswith("-") and name.removeprefix("no").startswith("config.")):
                rest.append(text)
            elif not equals or name.startswith("no"):
                raise UserError(f"{text}: needs a value: --{name.removeprefix('no')}=…")
            else:
                self.append((name.removeprefix("config."), value))
        return rest


def is_read(name: str) -> bool:
    """Whether an evaluation may set the field. The tokenizer is that of the weights."""
    in_groups = name.startswith(GROUPS) and name.split(".")[1] != "tokenizer"
    return in_groups or name == "seed" or name.removeprefix("model.") in MODEL


def apply(cfg: config.RunConfig, pairs: Overrides) -> tuple[config.RunConfig, dict[str, Any]]:
    """The configuration with other values for some fields, and these values by name; of a group, those of its fields.

    Raises UserError for a name that is not a field, ConfigError for a field that evaluation does not read, and for a
    value that is not valid.
    """
    made = ml_collections.ConfigDict(config.to_dict(cfg))
    for name, text in pairs:
        cli.check_override(made, name, text)
        if not is_read(name):
            rule = "describes the weights or their training; evaluation reads data.*, sample.*, and of the model"
            choices = [n for n, _, _ in fields() if is_read(n)]
            raise ConfigError(name, text, f"{rule} {', '.join(MODEL)}", nearest(name, choices))
        *path, last = name.split(".")
        holder = made
        for key in path:
            holder = holder[key]
        kind = holder.get_type(last)
        value = cli.PARSERS[kind].parse(text) if kind in cli.PARSERS else text if kind is str else _literal(name, text)
        config_path.set_value(name, made, value)
    flat = flatten_config(made.to_dict())
    under = lambda name: {n: value for n, value in flat.items() if n == name or n.startswith(f"{name}.")}
    return config.build(made), {n: value for name, _ in pairs for n, value in under(name).items()}


def _literal(name: str, text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        raise ConfigError(name, text, "must be a Python literal") from None


def changes_results(names: Sequence[str], texts: bool = False) -> bool:
    """Whether another value of one of these fields changes more of a result than its rounding.

    texts: the result is of texts, whose label is `sample.label`; held-out text has the labels of its domains.
    """
    free = lambda name: config.may_change(name) or name == "data.batch_size"
    return not all(free(name) and not (texts and name == "sample.label") for name in names)
