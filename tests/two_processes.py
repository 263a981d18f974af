"""Runs a piece of a test in two processes of four CPU devices each, as one JAX program of eight."""

import os
import socket
import subprocess
import sys
from pathlib import Path

START = """
import faulthandler
import sys
import jax
faulthandler.dump_traceback_later(240)  # before JAX ends a process whose other one hangs, and says nothing of where
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
assert jax.device_count() == 8 and jax.process_count() == 2
"""


def run(code: str) -> None:
    """`code` in both processes; an exception in one fails the test with the output of both."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    repo = Path(__file__).parents[1]
    command = [sys.executable, "-c", START + code, address]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8"}
    start = lambda i: subprocess.Popen([*command, str(i)], env=os.environ | {"PYTHONPATH": str(repo)}, cwd=repo, **pipe)
    processes = [start(0), start(1)]
    outputs = [process.communicate(timeout=600)[0][-6000:] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n--- process 1\n".join(outputs)
