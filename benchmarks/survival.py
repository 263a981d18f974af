"""Kills a run many times, and compares its results with those of a run without interruption.

    python -m benchmarks.survival --kills=50 --terms=0 --root=/tmp/kills
    python -m benchmarks.survival --kills=0 --terms=20 --root=/tmp/terms

A quarter of the SIGKILLs arrive during the start, a quarter inside a save (when the folder of an incomplete checkpoint
appears), and the rest at a random moment. SIGTERMs arrive in the same way, and after each the run must end with status
0 and have saved the last step that it logged. In the end every training and evaluation row (except times), every
parameter and optimizer moment, eval.json and sample.txt must be the same, bit for bit.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from moe_jax.parallel import sharding
from moe_jax.train.state import abstract_state

TIMES = ("tokens_per_second", "mfu", "step_seconds")
SETTINGS = ("log_every=1", "eval_every=10", "keep_checkpoints=3")


def start(args, name: str) -> subprocess.Popen:
    train = [f"--config.train.{text}" for text in (*SETTINGS, f"steps={args.steps}", f"checkpoint_every={args.every}")]
    command = [sys.executable, "train.py", f"--config={args.config}", f"--workdir={args.root}/{name}", *train]
    with open(args.root / f"{name}.log", "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"JAX_PLATFORMS": "cpu"})


def lines(run: Path) -> int:
    return (run / "metrics.jsonl").read_bytes().count(b"\n") if (run / "metrics.jsonl").exists() else 0


def saving(run: Path) -> bool:
    """A checkpoint has another name until it is complete."""
    folder = run / "checkpoints"
    return folder.is_dir() and any(not p.name.isdigit() for p in folder.iterdir())


def newest(run: Path) -> int:
    folder = run / "checkpoints"
    return max((int(p.name) for p in folder.iterdir() if p.name.isdigit()), default=0) if folder.is_dir() else 0


def last_logged(run: Path) -> int:
    rows = (
        (run / "metrics.jsonl").read_text(encoding="utf-8").split("\n")[:-1] if (run / "metrics.jsonl").exists() else []
    )
    return max((row["step"] for row in map(json.loads, rows) if row["kind"] == "train"), default=0)


def interrupt(process: subprocess.Popen, run: Path, how: signal.Signals, moment: str, rng: random.Random) -> bool:
    """False if the run ended by itself before."""
    before, wait = lines(run), rng.uniform(0, 0.6)
    if moment == "starting":
        wait = rng.uniform(0, 12)
    else:
        ready = (lambda: saving(run) and lines(run) > before) if moment == "saving" else (lambda: lines(run) > before)
        while process.poll() is None and not ready():
            time.sleep(0.0005)
        wait = rng.uniform(0, 0.03) if moment == "saving" else wait
    end = time.monotonic() + wait
    while process.poll() is None and time.monotonic() < end:
        time.sleep(min(0.005, wait))
    if process.poll() is not None:
        return False
    process.send_signal(how)
    return True


def harass(args, name: str, how: signal.Signals, count: int) -> dict:
    run, rng, seconds = args.root / name, random.Random(args.seed), []
    moments = ["saving" if i % 4 == 1 else "starting" if i % 4 == 3 else "stepping" for i in range(count)]
    done = dict.fromkeys(("starting", "saving", "stepping"), 0)
    inside = 0
    for moment in moments:
        process = start(args, name)
        hit = interrupt(process, run, how, moment, rng)
        began = time.monotonic()
        status = process.wait()
        if not hit:
            assert status == 0, f"a restart failed: see {args.root}/{name}.log"
            break
        done[moment] += 1
        if how == signal.SIGKILL:
            assert status == -signal.SIGKILL, f"a restart failed: see {args.root}/{name}.log"
            inside += saving(run)
        else:
            seconds.append(time.monotonic() - began)
            early = status == -signal.SIGTERM and moment == "starting"  # before Python had installed the handler
            assert status == 0 or early, f"status {status}"
            assert newest(run) == last_logged(run), f"{last_logged(run)} logged, {newest(run)} saved"
        print(f"{name}: {sum(done.values())}, {moment}; saved {newest(run)}, logged {last_logged(run)}", flush=True)
    assert start(args, name).wait() == 0, f"the last start failed: see {args.root}/{name}.log"
    out = {"signals": sum(done.values()), **done}
    return out | ({"left an incomplete checkpoint": inside} if how == signal.SIGKILL else {"longest": max(seconds)})


def arrays(run: Path) -> dict[str, bytes]:
    import jax
    import numpy as np

    from moe_jax.run import checkpoint, config_file

    cfg = config_file.load_config(run)
    with checkpoint.Checkpoints(run) as checkpoints:
        state, _ = checkpoints.restore(abstract_state(cfg, sharding.make_mesh((1, 1, 1), jax.devices()[:1])))
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in flat}


def compare(want: Path, got: Path) -> str:
    rows = lambda run: [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    kept = lambda run, kind: [
        json.dumps({k: v for k, v in row.items() if k not in TIMES}) for row in rows(run) if row["kind"] == kind
    ]
    for kind in ("train", "eval"):
        assert kept(got, kind) == kept(want, kind), f"{kind} rows differ"
    assert arrays(got) == arrays(want), "states differ"
    for file in ("eval.json", "sample.txt"):
        assert (got / file).read_text(encoding="utf-8") == (want / file).read_text(encoding="utf-8"), file
    return f"{len(kept(got, 'train'))} training rows, {len(kept(got, 'eval'))} evaluations, all of the state: same bits"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--terms", type=int, default=20)
    parser.add_argument("--root", type=lambda p: Path(p).expanduser(), required=True, help="an empty folder")
    parser.add_argument("--config", default="configs/debug.py")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--every", type=int, default=7, help="train.checkpoint_every")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.root.mkdir(parents=True, exist_ok=True)
    assert start(args, "straight").wait() == 0, (args.root / "straight.log").read_text(encoding="utf-8")
    for name, how, count in (("killed", signal.SIGKILL, args.kills), ("told", signal.SIGTERM, args.terms)):
        if count:
            print(name, harass(args, name, how, count), flush=True)
            print(name, compare(args.root / "straight", args.root / name), flush=True)
            resumed = re.findall(r"resumed after step (\d+)", (args.root / f"{name}.log").read_text(encoding="utf-8"))
            print(name, f"{len(resumed)} resumes", flush=True)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")
    main()
