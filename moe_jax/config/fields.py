"""What every component of the configuration is made of: its errors, and fields with their ranges and classes.

Two classes say what a change of a field means, here and nowhere else. Resuming, `init_from` and export ask for them
through `config.may_change` and `config.is_machine`.

- `resume`: a FIXED field makes another run, and a run directory refuses to go on with another value. A field that
  MAY_CHANGE says where and how the same thing is computed, for how long, and how it is watched.
- `weights`, of the model's fields: a FUNCTION field decides which function the weights have. A MACHINE field says how
  that is computed, in which numbers, or how the weights began.

A component names the classes of its fields, and a field that differs from the others says so: `machine(…)`,
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
    if not ok:
        raise ConfigError(name, value, rule, hint)


def nearest_divisor(of: int, near: int) -> int:
    """The divisor of `of` nearest to `near`, the smaller of two; a near one where both are beyond all use."""
    near = min(max(near, 1), of)
    for off in range(100_000):
        for d in (near - off, near + off):
            if 0 < d <= of and of % d == 0:
                return d
    return math.gcd(of, near)


def _bounds(low: float, high: float = float("inf")) -> dict:
    return {"low": low, "high": high}


def number(default, low, high=float("inf")):
    """A numeric field with its closed range; the range is checked for every dataclass in `Checked`."""
    return field(default=default, metadata=_bounds(low, high))


def _marked(default: Any, **marks: Any) -> Any:
    f = default if isinstance(default, dataclasses.Field) else field(default=default)
    return field(default=f.default, default_factory=f.default_factory, metadata={**f.metadata, **marks})


def machine(default, resume: str = MAY_CHANGE):
    """A field of how the function of the weights is computed. FIXED where that changes more than its rounding."""
    return _marked(default, weights=MACHINE, resume=resume)


def changeable(default):
    """A field that may have another value when a run goes on."""
    return _marked(default, resume=MAY_CHANGE)


def newer(default, was):
    """A field that earlier versions did not have. They did what the value `was` does, so their runs go on with it."""
    return _marked(default, was=was)


class Checked:
    """A component: `class XConfig(Checked, resume=…, weights=…)`, with the classes of the fields that say no other.

    weights: for components of the model only.
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
            if isinstance(value, str):  # an argument of bytes that are not UTF-8, which no config.json can hold
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
        """Rules between fields of this dataclass."""
