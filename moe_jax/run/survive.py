"""Protects a run from outside events: a second run in its directory, and signals that ask it to stop."""

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
    """A lock that allows one training run at a time in a directory: the file `<workdir>/lock`.

    The kernel releases it when the process ends, in whatever way. Process 0 holds it for all processes of a run. If
    another run holds it, every process raises Busy.
    """

    def __init__(self, workdir: str | os.PathLike):
        self._file, owner = None, ""
        if jax.process_index() == 0:
            self._file = open(Path(workdir) / "lock", "a+", encoding="utf-8")
            # A reader process that outlives its parent must not hold the lock.
            os.register_at_fork(after_in_child=self.close)
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
            whose = owner or "process 0 prints which"
            raise Busy(
                f"--workdir={workdir}: another run is training in it ({whose}); wait until it ends, or use another"
            )

    def close(self) -> None:
        """Releases the lock."""
        if self._file is not None:
            self._file.close()
        self._file = None

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_) -> None:
        self.close()


# --- signals that ask a run to stop ----------------------------------------------------------------------------------


class Preemption:
    """Ends a run after a step on SIGTERM, Ctrl-C, a closed terminal, or a notice to JAX's preemption service.

    Before the first step a signal ends the program at once, with exit status 0. During training it is noted, and
    `reached(n)` reports it after the step, the same step on every process. After Ctrl-C the program ends as killed by
    SIGINT, so that a shell's loop around it ends too; a second Ctrl-C ends it at once. With several processes only
    SIGTERM is handled.

    A signal may arrive inside a library. Some libraries (Orbax, while it restores) turn the exception into an error of
    their own, or continue with an incomplete result. So errors and results after the signal are ignored.
    """

    def __init__(self, several: bool):
        self._asked, self._at_once, self._several = False, True, several
        self._interrupted, self._before = False, {}  # by Ctrl-C; handlers to restore
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
            # The signal may have interrupted a print, so print cannot be used.
            os.write(2, b"\nthe current step will be finished and saved; press Ctrl-C again to end at once\n")

    def __enter__(self) -> "Preemption":
        for number in () if self._several else (signal.SIGINT, signal.SIGHUP):
            before = signal.getsignal(number)
            if before is not signal.SIG_IGN:  # ignored under nohup, or in the background of a script
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
        """Marks the beginning of training. From now on a signal ends the run after a step only."""
        self._at_once = False
        if self._asked:
            raise Stopped

    def end(self) -> None:
        """Marks the end of training. From now on a signal ends the program at once; the next start repeats the rest."""
        self._at_once = True
        if self._asked and not self._several:
            raise Stopped

    def reached(self, step: int) -> bool:
        """Whether the run has to end after `step`. Every process calls it for every step."""
        return multihost_utils.reached_preemption_sync_point(step) if self._several else self._asked

    def interruptibly(self, work: Callable[[], Result]) -> Result | None:
        """The result of `work()`; None if a signal asks the program to stop before or during it.

        With several processes the work is collective, so it is always finished.
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
    print(f"stopped after step {step}, which is saved; run the same command to resume", file=sys.stderr, flush=True)
    raise Stopped
