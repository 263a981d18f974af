"""Trains for a given time with stops and resumes, and looks for leaks of memory and file descriptors.

    python -m benchmarks.soak --minutes=30 --lives=10 --root=/tmp/soak

For every process between a start and a stop it prints the least and the largest resident memory and number of open
descriptors, in the middle and in the last third of its time. Both rise and fall with saves and evaluations, so a leak
shows as a least value that is larger in the last third. For the run it checks that the logged steps are 1, 2, 3, …
without a gap.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

TRAIN = ("log_every=1", "eval_every=40", "checkpoint_every=20", "keep_checkpoints=2", "steps=1000000")


def start(args) -> subprocess.Popen:
    train = [f"--config.train.{text}" for text in TRAIN]
    command = [sys.executable, "train.py", f"--config={args.config}", f"--workdir={args.root}/run", *train]
    with open(args.root / "log", "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"JAX_PLATFORMS": "cpu"})


def logged(run: Path) -> list[int]:
    text = (run / "metrics.jsonl").read_text(encoding="utf-8") if (run / "metrics.jsonl").exists() else ""
    return [row["step"] for row in map(json.loads, text.split("\n")[:-1]) if row["kind"] == "train"]


def sample(pid: int) -> tuple[float, int]:
    """MB resident, descriptors."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024, len(os.listdir(f"/proc/{pid}/fd"))


def live(args, seconds: float) -> list[tuple[int, float, int]]:
    """One life, ended by SIGTERM so long after its first step: (step, MB, descriptors) every second from there on."""
    process, run, samples = start(args), args.root / "run", []
    before, end = len(logged(run)), float("inf")
    while time.monotonic() < end and process.poll() is None:
        time.sleep(1)
        if len(steps := logged(run)) > before:
            end = min(end, time.monotonic() + seconds)
            samples.append((steps[-1], *sample(process.pid)))
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 0, f"see {args.root}/log"
    return samples


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--lives", type=int, default=3)
    parser.add_argument("--root", type=lambda p: Path(p).expanduser(), required=True, help="an empty folder")
    parser.add_argument("--config", default="configs/debug.py")
    args = parser.parse_args()
    args.root.mkdir(parents=True, exist_ok=True)
    for i in range(args.lives):
        samples = live(args, 60 * args.minutes / args.lives)
        third = len(samples) // 3
        print(f"life {i}, steps {samples[0][0]}–{samples[-1][0]}", flush=True)
        for name, part in (("middle", samples[third : 2 * third]), ("last", samples[2 * third :])):
            _, megabytes, descriptors = (f"{min(v):.0f}–{max(v):.0f}" for v in zip(*part, strict=True))
            print(f"  {name} third of the time: {megabytes} MB, {descriptors} descriptors", flush=True)
    steps = logged(args.root / "run")
    whole = steps == list(range(1, len(steps) + 1))
    print(f"steps logged: 1 to {steps[-1]}, {'every one once, rising' if whole else 'WITH GAPS'}")
    sys.exit(not whole)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")
    main()
