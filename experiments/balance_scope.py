"""One model, one corpus, several scopes of the load-balancing loss: trains them all and compares them.

    python -m experiments.multi_domain_text data/domains --local=FOLDER
    python -m experiments.balance_scope --data=data/domains --out=runs/balance_scope

Every arm is `configs/balance_scope.py` with the fields of `ARMS` changed; runs that share a seed share initial weights
and every batch. The text is tokenised once, then each GPU trains `--per_gpu` runs at a time (without a GPU: one after
the other). Run again to go on: finished runs are kept, the others start from their last checkpoint. The comparison is
OUT/table.md, OUT/results.json, OUT/scope.png and OUT/specialisation.png; `--report_only` writes just these.
"""

import argparse
import functools
import importlib.util
import os
import queue
import shutil
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import jax
from tqdm import tqdm

from experiments import balance_report
from moe_jax import config as config_lib
from moe_jax import data

REPO = Path(__file__).resolve().parents[1]
CONFIG = "configs/balance_scope.py"
MEMORY = 0.92  # of a GPU, for all its runs together


class Arm(NamedTuple):
    label: str
    overrides: dict[str, Any]
    seeds: tuple[int, ...] = (0,)


def _scope(sequences: int | str, label: str, seeds: tuple[int, ...] = (0,)) -> Arm:
    return Arm(label, {"loss.balance_batch": str(sequences)}, seeds)


ARMS = {
    "scope_1": _scope(1, "each sequence", (0, 1, 2)),
    "scope_2": _scope(2, "2 sequences"),
    "scope_8": _scope(8, "8 sequences"),
    "scope_32": _scope(32, "32 sequences"),
    "scope_128": _scope(128, "128 sequences"),
    "global": _scope("global", "the global batch", (0, 1, 2)),
    "scope_1_weak": Arm("each sequence, coefficient ÷ 8", {"loss.balance_batch": "1", "loss.load_balance_coef": 0.001}),
    # As few tokens a group as in scope_2, but of as many domains as in global: is it the size or the diversity?
    "shuffled": Arm("2 sequences, tokens shuffled", {"loss.balance_batch": "2", "loss.shuffle_tokens": "true"}),
    "loss_free": Arm(
        "selection bias, no loss",
        {"loss.load_balance_coef": 0.0, "model.moe.selection_bias": "true", "loss.bias_update_rate": 0.001},
    ),
    "loss_free_sigmoid": Arm(
        "selection bias, sigmoid scores",
        {
            "loss.load_balance_coef": 0.0,
            "model.moe.selection_bias": "true",
            "model.moe.score": "sigmoid",
            "model.moe.renormalize": "true",
        },
    ),
    "none": Arm("no balancing", {"loss.load_balance_coef": 0.0}),
}


class Run(NamedTuple):
    arm: str
    seed: int
    folder: Path
    overrides: dict[str, Any]

    @property
    def done(self) -> bool:
        return (self.folder / "eval.json").is_file()


def planned(out: Path, names: list[str], extra: dict[str, str]) -> list[Run]:
    """Every arm with its first seed, then the other seeds: whatever is finished can be compared."""
    pairs = sorted(((seed, name) for name in names for seed in ARMS[name].seeds), key=lambda pair: pair[0])
    return [
        Run(name, seed, out / name / f"seed{seed}", extra | ARMS[name].overrides | {"seed": seed})
        for seed, name in pairs
    ]


# --- configuration and data, once for all ----------------------------------------------------------------------------


def config_module() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("balance_scope_config", REPO / CONFIG)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_config(folder: str, overrides: dict[str, Any]) -> config_lib.RunConfig:
    """What train.py makes of `--config=…:folder --config.name=value …`. Raises ValueError."""
    config = config_module().get_config(folder)
    for name, value in overrides.items():
        *groups, field = name.split(".")
        holder = functools.reduce(lambda held, group: held.get(group, {}), groups, config)
        if field not in holder:
            raise config_lib.ConfigError(name, value, "is not a field")
        kind = type(holder[field])
        holder[field] = str(value).lower() == "true" if kind is bool else kind(value)
    return config_lib.build(config)


def prepare(cfg: config_lib.RunConfig, out: Path, runs: list[Run]) -> None:
    """The tokenizer and the token stores; each run directory gets the tokenizer, by which it finds the stores."""
    first = out / "prepare"
    corpus = data.prepare(cfg.data, workdir=first, seed=0, progress=sys.stderr.isatty())
    print(corpus.table(), flush=True)
    for run in runs:
        run.folder.mkdir(parents=True, exist_ok=True)
        for file in first.glob("tokenizer*"):
            shutil.copy(file, run.folder)


# --- the pool --------------------------------------------------------------------------------------------------------


def count_gpus() -> int:
    """GPUs of this machine, without touching one: JAX would take their memory."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return len([d for d in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if d])
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return 0
    return sum(line.startswith("GPU ") for line in listed.splitlines())


def devices(gpus: int) -> list[str]:
    """What CUDA_VISIBLE_DEVICES is for each GPU used."""
    seen = [d for d in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if d]
    return seen[:gpus] or [str(i) for i in range(gpus)]


def train(run: Run, folder: str, device: str | None, share: float) -> int:
    """One run of train.py on one device, its output in the run directory; the exit status."""
    command = [sys.executable, "train.py", f"--config={CONFIG}:{folder}", f"--workdir={run.folder}"]
    command += [f"--config.{name}={value}" for name, value in run.overrides.items()]
    env = dict(os.environ)
    if device is not None:
        env |= {"CUDA_VISIBLE_DEVICES": device, "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{share:.3f}"}
    with open(run.folder / "output.txt", "a") as output:
        return subprocess.run(command, cwd=REPO, env=env, stdout=output, stderr=subprocess.STDOUT).returncode


def train_all(runs: list[Run], folder: str, gpus: int, per_gpu: int) -> list[Run]:
    """Trains what is not done yet; gives the runs that failed."""
    slots: queue.Queue[str | None] = queue.Queue()
    for device in devices(gpus) * per_gpu if gpus else [None]:
        slots.put(device)
    count, failed = slots.qsize(), []

    def one(run: Run) -> int:
        device = slots.get()
        try:
            return train(run, folder, device, MEMORY / per_gpu)
        finally:
            slots.put(device)

    todo = [run for run in runs if not run.done]
    with ThreadPoolExecutor(count) as pool, tqdm(total=len(runs), initial=len(runs) - len(todo), unit="run") as bar:
        futures = {pool.submit(one, run): run for run in todo}
        for future in as_completed(futures):
            run = futures[future]
            if future.result() or not run.done:
                failed.append(run)
                bar.write(f"failed: {run.arm}, seed {run.seed}; see {run.folder / 'output.txt'}", file=sys.stderr)
            bar.set_postfix_str(f"last: {run.arm} seed {run.seed}")
            bar.update()
    return failed


# --- command line ----------------------------------------------------------------------------------------------------


def parse() -> tuple[argparse.Namespace, list[str], dict[str, str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/domains", help="folder of domains")
    parser.add_argument("--out", type=Path, default=Path("runs/balance_scope"), help="folder of the runs")
    parser.add_argument("--only", default=",".join(ARMS), help="arms to run, separated by commas")
    parser.add_argument("--gpus", type=int, default=None, help="GPUs to use; default: all; 0: the CPU")
    parser.add_argument("--per_gpu", type=int, default=1, help="runs at a time on each GPU")
    parser.add_argument("--report_only", action="store_true", help="train nothing, compare what is finished")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a config field, for all arms")
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    if unknown := [name for name in names if name not in ARMS]:
        parser.error(f"--only: no arm {unknown[0]!r}; there are {', '.join(ARMS)}")
    if bad := [pair for pair in arguments.set if "=" not in pair]:
        parser.error(f"--set {bad[0]}: must be NAME=VALUE")
    return arguments, names, dict(pair.split("=", 1) for pair in arguments.set)


def main() -> int:
    arguments, names, extra = parse()
    out, failed = arguments.out.resolve(), []
    if not arguments.report_only:
        folder = str(Path(arguments.data).resolve())
        runs = planned(out, names, extra)
        try:
            configs = {run.arm: load_config(folder, run.overrides) for run in runs}  # mistakes show before any run
        except ValueError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
        jax.config.update("jax_platforms", "cpu")  # of this process only
        prepare(configs[names[0]], out, runs)
        gpus = count_gpus() if arguments.gpus is None else arguments.gpus
        print(f"{len(runs)} runs on " + (f"{gpus} GPUs, {arguments.per_gpu} at a time each" if gpus else "the CPU"))
        failed = train_all(runs, folder, gpus, arguments.per_gpu)
    finished = balance_report.load(out, {name: (arm.label, arm.seeds) for name, arm in ARMS.items()})
    if not finished:
        print(f"error: {out} holds no finished run", file=sys.stderr)
        return 1
    balance_report.write(out, finished)
    print((out / "table.md").read_text())
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
