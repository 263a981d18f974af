"""Errors that a user can mend. Each says in one line what is wrong; `cli.run` prints it without a traceback."""

import difflib
from collections.abc import Iterable
from typing import Any


class UserError(Exception):
    """A mistake on the command line."""


class ConfigError(ValueError):
    """A mistake in a configuration: the field, its value, the rule that it breaks, and the nearest valid choice."""

    def __init__(self, name: str, value: Any, rule: str, hint: str = ""):
        self.name, self.value, self.rule, self.hint = name, value, rule, hint
        super().__init__(f"config.{name}={shown(value)}: {rule}" + (f"; {hint}" if hint else ""))

    def inside(self, prefix: str) -> "ConfigError":
        """The same error with the name of the group that holds the field in front of the field's name."""
        return ConfigError(f"{prefix}.{self.name}", self.value, self.rule, self.hint)


class FileError(ValueError):
    """A file whose content is not valid."""


class CheckpointError(RuntimeError):
    """A checkpoint or run directory that cannot be written or read in the way that was asked for."""


class FormatError(CheckpointError):
    """Files of an imported model whose content is not valid, or is not supported here."""


class BadNumbers(RuntimeError):
    """A run that cannot continue, because its losses or gradients are not finite."""


class Busy(RuntimeError):
    """A run directory in which another process is training."""


class Stopped(SystemExit):
    """Ends the program with exit status 0 after a signal asked it to stop. No work is lost."""

    def __init__(self):
        super().__init__(0)


ONE_LINE = (UserError, ConfigError, FileError, CheckpointError, BadNumbers, Busy)


def shown(value: Any, most: int = 200) -> str:
    """The repr of a value, cut after `most` characters."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}… ({len(text):,} characters)"


def nearest(value: str, choices: Iterable[str]) -> str:
    """The hint of an error message that names the choice most similar to `value`."""
    close = difflib.get_close_matches(str(value), list(choices), 1, 0.0)
    return f"nearest valid: {close[0]!r}" if close else "there is no valid choice"
