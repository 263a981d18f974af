"""A process that has imported everything and forks for each command, so that a test of a command takes no seconds."""

import json
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).parents[1]
SERVER = """
import gc, json, os, runpy, signal, sys, traceback
import jax, tensorflow_datasets, tokenizers
from moe_jax import cli, config, data, optim
from moe_jax.evaluate import analysis, figures, generate, held_out
from moe_jax.run import checkpoint, config_file
from moe_jax.train import step

def record(event, seconds, **_):
    if event.endswith("backend_compile_duration"):
        with open(job["compiled"], "a", encoding="utf-8") as file:
            file.write(event + "\\n")

jax.monitoring.register_event_duration_secs_listener(record)
gc.freeze()
print("ready", flush=True)
while line := sys.stdin.readline():
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        signal.alarm(300)
        os.environ.update(job["env"])
        if job["devices"]:
            jax.config.update("jax_num_cpu_devices", job["devices"])
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT, 0o644), number)
        try:
            if job["argv"][0] == "-m":
                sys.argv, sys.path[0] = job["argv"][1:], os.getcwd()
                runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
            else:
                sys.argv, sys.path[0] = job["argv"], os.path.dirname(os.path.abspath(job["argv"][0]))
                runpy.run_path(sys.argv[0], run_name="__main__")
            status = 0
        except SystemExit as e:
            status = e.code
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status or 0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Server:
    """Runs programs in forks of a process that holds the imports."""

    def __init__(self, folder: Path, env: dict):
        self.folder, self.count = folder, 0
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            cwd=REPO,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
        )
        assert self.process.stdout.readline() == "ready\n"

    def __call__(self, *argv: str, devices: int = 0, **env: str) -> tuple[int, str, str, str]:
        """Exit status, stdout, stderr, and a line for every compilation.

        devices: of the CPU; 0: as many as the environment of the process says.
        """
        self.count += 1
        paths = {name: self.folder / f"{self.count}.{name}" for name in ("stdout", "stderr", "compiled")}
        job = {"argv": list(argv), "devices": devices, "env": env} | {name: str(path) for name, path in paths.items()}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        status = int(self.process.stdout.readline())
        return status, *(path.read_text(encoding="utf-8") if path.exists() else "" for path in paths.values())
