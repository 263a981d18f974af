"""Programs that tests start as users do share what they compile, as those of one user would."""

import functools
import os
import subprocess
from pathlib import Path

import pytest

from experiments import pool
from tests.command_server import Server


def folder() -> str:
    """Workers have a folder each: JAX does not write a file at once, and another worker could read half of it."""
    return f"{os.environ['MOE_JAX_TESTS_COMPILED']}/programs_{os.environ.get('PYTEST_XDIST_WORKER', '')}"


def environment(kept: str | Path = "") -> dict[str, str]:
    """The variables that make JAX keep compiled programs where the next program of this worker finds them.

    kept: a folder of the test's own, for programs that are killed, perhaps while they write there.
    """
    return {"JAX_COMPILATION_CACHE_DIR": str(kept or folder()), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


@functools.cache
def _server() -> Server:
    made = Path(folder()) / "output"
    made.mkdir(parents=True, exist_ok=True)
    return Server(made, os.environ | {"MPLBACKEND": "agg"} | environment())


def run(
    root: Path, program: str, *flags: str, devices: int = 1, workdir: str = "run"
) -> subprocess.CompletedProcess[str]:
    """Runs a program as `run` of test_train.py does, but in a fork of a process with all imports."""
    argv = [program, f"--workdir={root / workdir}", *flags]
    done = subprocess.CompletedProcess(argv, *_server()(*argv, devices=devices, MOE_JAX_CACHE=str(root / "cache"))[:3])
    assert done.returncode == 0, done.stderr
    return done


def fork_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the jobs of an experiment forks of one process with all imports. The tests of `pool` start real ones."""

    def execute(job: pool.Job, device: None, share: float) -> int:
        assert device is None
        job.folder.mkdir(parents=True, exist_ok=True)
        status, *said, _ = _server()(*job.command)
        with open(job.folder / "output.txt", "a", encoding="utf-8") as output:
            output.writelines(said)
        return status

    monkeypatch.setattr(pool, "execute", execute)
