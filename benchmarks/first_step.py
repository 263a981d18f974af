"""Times train.py from its start to the end of its first step, compilation included.

    python -m benchmarks.first_step --config=configs/quickstart.py
    python -m benchmarks.first_step --config=configs/olmoe_8l_bench.py --rounds=2

Each run is a process of its own with a new run directory. `nothing prepared`: the cache folder ($MOE_JAX_CACHE) is
empty too. `data prepared`: it has data sets and tokens, but no compiled programs. `all prepared`: it has all of them,
as when a user starts the command for the second time; only the tokenizer, which belongs to the run directory, is
trained again. It prints one row a run: the seconds of each phase, whose sum is the time from the start of the process
to the end of the first step; and the time in which jax traced and compiled programs or read them from its cache, with
the cache's hits and requests.
"""

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

from moe_jax.train import step

# "plans": what train.py prints, and the checkpoint manager; "writers, compiling": metrics and TensorBoard, and what is
# left of the compilation of the step, which begins before the data is prepared.
PARTS = ("import", "config, devices", "data", "plans", "initialise", "writers, compiling", "first step")
CLOCK = "MOE_JAX_FIRST_STEP"  # in the environment of the child: when it was started


# --- in the process that is timed ------------------------------------------------------------------------------------


def run_train() -> None:
    """train.py's main; prints one line of JSON and ends the process when the first step is done."""
    marks = [float(os.environ[CLOCK])]
    import train

    marks.append(time.time())
    import jax

    from moe_jax import cli, data

    counts: dict[str, float] = {}

    def count(name: str, seconds: float = 1.0, **_) -> None:
        counts[name] = counts.get(name, 0.0) + seconds

    jax.monitoring.register_event_duration_secs_listener(count)
    jax.monitoring.register_event_listener(count)

    def around(fn, then=lambda result: result):
        """A mark before fn and one after it."""

        def timed(*args, **kwargs):
            marks.append(time.time())
            result = jax.block_until_ready(fn(*args, **kwargs))
            marks.append(time.time())
            return then(result)

        timed.__dict__.update(vars(fn))  # the jitted function, which train.py compiles ahead
        return timed

    def report(_) -> None:
        parts = [after - before for before, after in itertools.pairwise(marks)]
        where = f"{jax.device_count()} × {jax.devices()[0].device_kind}, jax {jax.__version__}"
        print("\n" + json.dumps({"parts": parts, "counts": counts, "where": where}), flush=True)
        os._exit(0)  # neither checkpoint nor evaluation

    make = step.make_train_step
    replace = {
        (data, "prepare"): around(data.prepare),
        (train, "init_state"): around(train.init_state),
        (step, "make_train_step"): lambda *args: around(make(*args), report),
    }
    for (module, name), value in replace.items():
        mock.patch.object(module, name, value).start()
    cli.run(train.main)


# --- rows ------------------------------------------------------------------------------------------------------------


def one_run(arguments: list[str], cache: Path, workdir: Path) -> dict[str, Any]:
    env = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    path = os.pathsep.join(filter(None, (os.getcwd(), os.environ.get("PYTHONPATH"))))
    env |= {"MOE_JAX_CACHE": str(cache), "PYTHONPATH": path, CLOCK: repr(time.time())}
    command = [sys.executable, "-m", "benchmarks.first_step", f"--workdir={workdir}", *arguments]
    done = subprocess.run(command, env=env, capture_output=True, encoding="utf-8")
    shutil.rmtree(workdir, ignore_errors=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", required=True, help="config file; other options of train.py may follow")
    parser.add_argument("--rounds", type=int, default=1, help="times that each of the three runs has its turn")
    args, others = parser.parse_known_args()
    if args.rounds < 1:
        parser.error(f"--rounds={args.rounds}: must be ≥ 1; nearest valid: 1")
    arguments = [f"--config={args.config}", *others]
    print("  ".join([f"{'':<16}", *(f"{name:>18}" for name in PARTS), f"{'total':>7}"]), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        for _ in range(args.rounds):
            shutil.rmtree(cache, ignore_errors=True)
            for name in ("nothing prepared", "data prepared", "all prepared"):
                if name == "data prepared":
                    shutil.rmtree(cache / "compiled", ignore_errors=True)
                row = one_run(arguments, cache, Path(folder) / "run")
                cells = "  ".join(f"{seconds:18.2f}" for seconds in row["parts"])
                of = lambda *events, c=row["counts"]: sum(c.get(f"/jax/{event}", 0.0) for event in events)
                compiling, cache_of = "core/compile/", "compilation_cache/"
                traced = of(compiling + "jaxpr_trace_duration", compiling + "jaxpr_to_mlir_module_duration")
                print(
                    f"{name:<16}  {cells}  {sum(row['parts']):7.2f} s; traced and lowered {traced:.2f}, "
                    f"compiled or read {of(compiling + 'backend_compile_duration'):.2f} s, "
                    f"{of(cache_of + 'cache_hits'):.0f} hits of {of(cache_of + 'compile_requests_use_cache'):.0f} "
                    f"({row['where']})",
                    flush=True,
                )


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")
    run_train() if CLOCK in os.environ else main()
