"""Fields of the configuration, with their ranges and classes, and the base class of its components.

Every field has two classes. Resuming, `init_from` and export read them through `config.may_change` and
`config.is_machine`.

- `resume`: another value of a FIXED field is another run, so a run directory refuses it. A field that MAY_CHANGE sets
  where and how the same thing is computed, for how long, and what is logged.
- `weights`, for fields of the model only: a FUNCTION field decides which function the weights compute. A MACHINE field
  sets how that function is computed, in which dtype, or how the weights are initialised.

A component names the classes of its fields. A field of another class is declared with `machine(…)` or
`changeable(…)`.
"""

import dataclasses
import math
from dataclasses import field
from typing import Any

from moe_jax.errors import ConfigError

FIXED, MAY_CHANGE = "fixed", "may change"
FUNCTION, MACHINE = "function", "machine"


def require(ok: bool, name: str, value: Any, rule: str, hint: str = "") -> None:
    """Raises ConfigError unless `ok`."""
    if not ok:
        raise ConfigError(name, value, rule, hint)


def nearest_divisor(number: int, target: int) -> int:
    """The divisor of `number` nearest to `target`, the smaller of two.

    The search ends after 100,000 steps in each direction; beyond them the greatest common divisor is returned.
    """
    target = min(max(target, 1), number)
    for distance in range(100_000):
        for d in (target - distance, target + distance):
            if 0 < d <= number and number % d == 0:
                return d
    return math.gcd(number, target)


def _bounds(low: float, high: float = float("inf")) -> dict:
    return {"low": low, "high": high}


def number(default, low, high=float("inf")):
    """A numeric field with its closed range, which `Checked` enforces."""
    return field(default=default, metadata=_bounds(low, high))


def _marked(default: Any, **marks: Any) -> Any:
    f = default if isinstance(default, dataclasses.Field) else field(default=default)
    return field(default=f.default, default_factory=f.default_factory, metadata={**f.metadata, **marks})


def machine(default, resume: str = MAY_CHANGE):
    """A field that sets how the function of the weights is computed. resume: FIXED if it changes more than rounding."""
    return _marked(default, weights=MACHINE, resume=resume)


def changeable(default):
    """A field that may have another value when a run is resumed."""
    return _marked(default, resume=MAY_CHANGE)


def newer(default, was):
    """A field that earlier versions did not have, or had with the default `was`. Their runs resume with `was`."""
    return _marked(default, was=was)


def renamed(old: str) -> dict[str, str]:
    """Metadata of a field that earlier versions named `old`: runs that have `old` resume with its value."""
    return {"renamed": old}


class Checked:
    """The base class of a component, `class XConfig(Checked, resume=…, weights=…)`.

    resume, weights: the classes of its fields that declare no other. weights is for components of the model only.
    """

    def __init_subclass__(cls, *, resume: str, weights: str | None = None):
        cls._classes = {"resume": resume, "weights": weights}

    @classmethod
    def class_of(cls, name: str, which: str) -> str | None:
        """The class of a field; which: "resume" or "weights"."""
        return cls.__dataclass_fields__[name].metadata.get(which, cls._classes[which])

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, str):  # a command line may hold bytes that are not UTF-8, but config.json cannot
                plain = value.encode("utf-8", "replace").decode()
                require(plain == value, f.name, value, "holds bytes that are not UTF-8", f"nearest valid: {plain!r}")
            if "low" in f.metadata and isinstance(value, int | float):
                low, high = f.metadata["low"], f.metadata["high"]
                rule = f"must be ≥ {low}" if high == float("inf") else f"must be in [{low}, {high}]"
                finite = isinstance(value, int) or math.isfinite(value)
                require(finite, f.name, value, f"must be finite and {rule[8:]}", f"nearest valid: {low}")
                nearest = type(value)(min(max(value, low), high))
                require(low <= value <= high, f.name, value, rule, f"nearest valid: {nearest}")
        self.check()

    def check(self) -> None:
        """Raises ConfigError if the fields of this dataclass break a rule between them."""
