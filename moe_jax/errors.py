"""Errors that a user can mend. Each says in one line what is wrong; `cli.run` prints it without a traceback."""

from typing import Any


class UserError(Exception):
    """A mistake on the command line."""


class ConfigError(ValueError):
    """A mistake in a configuration: the field, its value, the rule that it breaks, and the nearest valid choice."""

    def __init__(self, name: str, value: Any, rule: str, hint: str = ""):
        self.name, self.value, self.rule, self.hint = name, value, rule, hint
        super().__init__(f"config.{name}={shown(value)}: {rule}" + (f"; {hint}" if hint else ""))

    def inside(self, prefix: str) -> "ConfigError":
        return ConfigError(f"{prefix}.{self.name}", self.value, self.rule, self.hint)


class FileError(ValueError):
    """A file that is not what it should be."""


class CheckpointError(RuntimeError):
    """A checkpoint, or a run directory, that cannot be written or read as asked."""


class FormatError(CheckpointError):
    """A model's files from elsewhere that are not what they should be."""


class BadNumbers(RuntimeError):
    """A run that cannot go on, since its losses or gradients are not finite."""


class Busy(RuntimeError):
    """A run directory that another process is training in."""


class Stopped(SystemExit):
    """Ends the program with exit status 0: it was told to stop, and nothing is lost."""

    def __init__(self):
        super().__init__(0)


ONE_LINE = (UserError, ConfigError, FileError, CheckpointError, BadNumbers, Busy)


def shown(value: Any, most: int = 200) -> str:
    """repr of a value, cut short."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}… ({len(text):,} characters)"
