"""The end of a program while another thread still works, such as XLA, which cannot be interrupted while it compiles.

Python waits for threads before it ends. A mistake of the user, or a signal, would end the program only after the
compilation, minutes later on a large machine, and a second signal in that time would abort it with a core dump.
"""

import os
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from typing import NoReturn

_WORK: list[Future] = []


def leave_without(work: Future) -> Future:
    """Marks work of another thread that the end of the program does not wait for, and returns it."""
    _WORK.append(work)
    return work


def without_waiting(main: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
    """Makes `main` end the program at once, with the exit status of its error, if it raises one beside such work."""

    def ended(argv: list[str]) -> None:
        try:
            main(argv)
        except BaseException as e:
            if any(not work.done() for work in _WORK):
                _end(e)
            raise

    return ended


def _end(error: BaseException) -> NoReturn:
    status: object = error.code if isinstance(error, SystemExit) else 1
    if not isinstance(error, SystemExit):
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else int(status is not None))
