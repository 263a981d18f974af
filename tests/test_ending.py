"""A program ends at once though another thread still works. Each runs as a process of its own."""

import subprocess
import sys
import time

import pytest

PROGRAM = """
import os, signal, threading, time
from concurrent.futures import ThreadPoolExecutor
from moe_jax import cli, ending, errors
from moe_jax.run.survive import Preemption

def main(argv):
    ending.leave_without(ThreadPoolExecutor(1).submit(time.sleep, 60))
    with Preemption(several=False):
        {what}

cli.run(main)
"""
KILL = "os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)"


@pytest.mark.parametrize(
    ("what", "status", "says"),
    [
        ("raise errors.UserError('this is wrong')", 2, "error: this is wrong\n"),
        (KILL, 0, ""),
        ("raise ValueError('a fault')", 1, "ValueError: a fault\n"),
    ],
    ids=["mistake", "signal", "fault"],
)
def test_the_end_waits_for_no_thread(what, status, says):
    begun = time.monotonic()
    command = [sys.executable, "-c", PROGRAM.format(what=what)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=55)
    assert done.returncode == status, done.stderr
    assert done.stderr == says if status == 2 else done.stderr.endswith(says)
    assert time.monotonic() - begun < 50
