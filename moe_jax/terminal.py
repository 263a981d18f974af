"""Keeps a program alive when its output cannot be written: the reader has ended, or the encoding lacks a character."""

import errno
import io
import os
import sys


class _Outliving(io.FileIO):
    """A file that writes to /dev/null from the moment that its pipe or terminal is closed at the other end."""

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as e:
            if e.errno not in (errno.EPIPE, errno.EIO):
                raise
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.fileno())
        os.close(null)
        return len(data)


def outlive_readers() -> None:
    """Lets the run continue when the reader of stdout or stderr ends before it (`| head`, a closed terminal).

    Later output is discarded.
    """
    for name in ("stdout", "stderr"):
        old = getattr(sys, name)
        if old is getattr(sys, f"__{name}__") and old is not None:  # a notebook's stdout is left alone
            raw = io.BufferedWriter(_Outliving(old.fileno(), "w", closefd=False))
            options = {"line_buffering": old.line_buffering, "write_through": old.write_through}
            setattr(sys, name, io.TextIOWrapper(raw, old.encoding, old.errors, **options))


def replace_unprintable() -> None:
    """Makes stdout write ? for a character that is not in its encoding, instead of raising an exception."""
    if hasattr(sys.stdout, "reconfigure"):  # the stdout of a notebook has no such method, and does not need it
        sys.stdout.reconfigure(errors="replace")
