"""Runs a piece of a test in two processes of four CPU devices each, as one JAX program of eight."""

import os
import socket
import subprocess
import sys
from pathlib import Path

START = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
assert jax.device_count() == 8 and jax.process_count() == 2
"""


def run(code: str) -> None:
    """`code` in both processes; an exception in one fails the test with its output."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    repo = Path(__file__).parents[1]
    command = [sys.executable, "-c", START + code, address]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8"}
    start = lambda i: subprocess.Popen([*command, str(i)], env=os.environ | {"PYTHONPATH": str(repo)}, cwd=repo, **pipe)
    for process in [start(0), start(1)]:
        out, _ = process.communicate(timeout=600)
        assert process.returncode == 0, out[-4000:]
