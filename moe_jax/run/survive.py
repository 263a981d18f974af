"""What keeps a run whole from outside: one owner of its directory, an end at a step when it is told to stop, and no end
when nobody reads what it prints."""

import fcntl
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from moe_jax.errors import Busy, Stopped

Result = TypeVar("Result")


# --- the owner -------------------------------------------------------------------------------------------------------


class RunLock:
    """One training run at a time in a directory: `<workdir>/lock`, held by the kernel until the process ends, however.

    Process 0 holds it for all processes of a run. Raises Busy, in every one of them, if another run does.
    """

    def __init__(self, workdir: str | os.PathLike):
        self._file, owner = None, ""
        if jax.process_index() == 0:
            self._file = open(Path(workdir) / "lock", "a+", encoding="utf-8")
            os.register_at_fork(after_in_child=self.close)  # a reader process that outlives its parent holds nothing
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._file.seek(0)
                owner = self._file.read().strip() or "another process"
            else:
                self._file.truncate(0)
                self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
                self._file.flush()
        taken = bool(owner)
        if jax.process_count() > 1:
            taken = bool(multihost_utils.broadcast_one_to_all(np.int32(taken)))
        if taken:
            self.close()
            whose = owner or "see the message of process 0"
            raise Busy(f"--workdir={workdir}: another run is training in it ({whose}); wait for it, or use another")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_) -> None:
        self.close()


# --- told to stop ----------------------------------------------------------------------------------------------------


class Preemption:
    """SIGTERM, Ctrl-C, a terminal that is closed, or a maintenance notice that JAX's preemption service has heard of.

    Until the first step the signal ends the program at once, with exit status 0. While steps are taken it is noted, and
    `reached(n)` says so after the step: the same step on every process. After Ctrl-C the program ends as Ctrl-C ends
    others, so that a shell's loop around it ends too; a second Ctrl-C ends it at once. Of several processes only
    SIGTERM is heard.

    It comes in the midst of anything, a library too. Some (Orbax, while it restores) make an error of their own of what
    ended them, or go on without what they were at. So what they raise, or return, after the signal does not count.
    """

    def __init__(self, several: bool):
        self._asked, self._at_once, self._several = False, True, several
        self._interrupted, self._before = False, {}  # by Ctrl-C; handlers to put back
        if not several:  # else JAX's service installs its own handler
            signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, number: int, *_) -> None:
        again, self._asked = self._interrupted, True
        if number == signal.SIGINT:
            self._interrupted = True
        if self._at_once:
            raise Stopped
        if number == signal.SIGINT:
            if again:
                raise KeyboardInterrupt
            # Not print, in the midst of which this may be.
            os.write(2, b"\nthe step under way is finished and saved; Ctrl-C again ends at once\n")

    def __enter__(self) -> "Preemption":
        for number in () if self._several else (signal.SIGINT, signal.SIGHUP):
            before = signal.getsignal(number)
            if before is not signal.SIG_IGN:  # nohup, or in the background of a script
                self._before[number] = before
                signal.signal(number, self._handle)
        return self

    def __exit__(self, kind, error, trace) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        if self._interrupted and isinstance(error, Stopped | KeyboardInterrupt):
            sys.stdout.flush()
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        if error is not None and self._asked and self._at_once:
            raise Stopped from error

    def begin(self) -> None:
        """From here on there are steps that would be lost."""
        self._at_once = False
        if self._asked:
            raise Stopped

    def end(self) -> None:
        """No more steps: whatever is left is done again by the next start."""
        self._at_once = True
        if self._asked and not self._several:
            raise Stopped

    def reached(self, step: int) -> bool:
        """The run is to end after `step`. Every process calls it for every step."""
        return multihost_utils.reached_preemption_sync_point(step) if self._several else self._asked

    def interruptibly(self, work: Callable[[], Result]) -> Result | None:
        """What `work()` returns; None if the program is told to stop before or meanwhile.

        Work of several processes is collective, so it is finished first.
        """
        if self._several:
            return work()
        try:
            self._at_once = True
            result = None if self._asked else work()
            return None if self._asked else result
        except BaseException:
            if not self._asked:
                raise
            return None
        finally:
            self._at_once = False


def stop(step: int) -> NoReturn:
    """Ends the program after a step that is saved."""
    print(f"stopped after step {step}, which is saved; the same command goes on", file=sys.stderr, flush=True)
    raise Stopped
