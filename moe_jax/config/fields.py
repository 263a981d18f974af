"""What every component of the configuration is made of: its errors, and fields with their ranges."""

import dataclasses
import math
from dataclasses import field
from typing import Any


class ConfigError(ValueError):
    """A mistake in a configuration, in one line."""

    def __init__(self, name: str, value: Any, rule: str, hint: str = ""):
        self.name, self.value, self.rule, self.hint = name, value, rule, hint
        super().__init__(f"config.{name}={shown(value)}: {rule}" + (f"; {hint}" if hint else ""))

    def inside(self, prefix: str) -> "ConfigError":
        return ConfigError(f"{prefix}.{self.name}", self.value, self.rule, self.hint)


class FileError(ValueError):
    """A file that is not what it should be, in one line."""


def shown(value: Any, most: int = 200) -> str:
    """repr of a value, cut short."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}… ({len(text):,} characters)"


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


class Checked:
    def __post_init__(self):
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
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
