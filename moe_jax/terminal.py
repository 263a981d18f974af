"""What a program prints to: its reader may end first, and its encoding may lack a character."""

import errno
import io
import os
import sys


class _Outliving(io.FileIO):
    """A file descriptor that turns into /dev/null when the pipe or terminal behind it is gone."""

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
    """What reads stdout and stderr may end before the run (`| head`, a closed terminal): the rest goes nowhere."""
    for name in ("stdout", "stderr"):
        old = getattr(sys, name)
        if old is getattr(sys, f"__{name}__") and old is not None:  # else somebody's own, such as a notebook's
            raw = io.BufferedWriter(_Outliving(old.fileno(), "w", closefd=False))
            how = {"line_buffering": old.line_buffering, "write_through": old.write_through}
            setattr(sys, name, io.TextIOWrapper(raw, old.encoding, old.errors, **how))


def replace_unprintable() -> None:
    """From now on stdout writes ? for a character that its encoding does not have, instead of ending the program."""
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has none, and needs none
        sys.stdout.reconfigure(errors="replace")
