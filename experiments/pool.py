"""Runs the processes of an experiment on all GPUs: configs with fields changed, on text that is tokenised once.

An experiment is a list of `Run`s of train.py, which becomes a list of `Job`s. `run_all` runs the jobs.
"""

import argparse
import functools
import importlib.util
import json
import os
import queue
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from experiments import records
from moe_jax import config as config_lib
from moe_jax import data
from moe_jax.cli import GPU_SHARE, expanded
from moe_jax.errors import ConfigError, UserError
from moe_jax.evaluate import drawing
from moe_jax.run import config_file

REPO = Path(__file__).resolve().parents[1]


class Run(NamedTuple):
    """A run of train.py: its run directory, and the fields of the config that it changes.

    argument: what follows the folder of text in the argument after the config's colon, such as ",labels".
    """

    arm: str
    seed: int
    folder: Path
    overrides: dict[str, Any]
    argument: str = ""

    @property
    def done(self) -> bool:
        return (self.folder / "eval.json").is_file()


class Job(NamedTuple):
    """A Python command, which is done when `folder` holds `product`. Its output goes to output.txt there.

    options, settings: what the product must have under these names, so that one of another call or of another training
        is made again.
    """

    name: str
    folder: Path
    command: list[str]
    product: str = "eval.json"
    options: dict[str, Any] | None = None
    settings: dict[str, Any] | None = None

    @property
    def done(self) -> bool:
        return (self.folder / self.product).is_file() and not self.stale

    @property
    def stale(self) -> list[str]:
        """Lines about the options and settings of a product that are not those wanted."""
        file, settings = self.folder / self.product, self.settings or {}
        if not (self.options or settings) or not file.is_file():
            return []
        made = json.loads(file.read_text(encoding="utf-8"))
        of_training = records.unlike(made.get("settings", {}), settings, settings)
        return records.unlike_options(made.get("options", {}), self.options or {}) + of_training


def training(run: Run, config: str, folder: str) -> Job:
    """The job of a run. config: a file in the repository; folder: the argument after its colon."""
    command = ["train.py", f"--config={config}:{folder}{run.argument}", f"--workdir={run.folder}"]
    command += [f"--config.{name}={value}" for name, value in run.overrides.items()]
    return Job(f"{run.arm}, seed {run.seed}", run.folder, command)


# --- configuration and data, once for all ----------------------------------------------------------------------------


def config_module(config: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(f"{Path(config).stem}_config", REPO / config)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_config(config: str, folder: str, overrides: dict[str, Any]) -> config_lib.RunConfig:
    """The configuration that train.py makes of `--config=config:folder --config.name=value …`. Raises ValueError."""
    made = config_module(config).get_config(folder)
    for name, value in overrides.items():
        *groups, field = name.split(".")
        holder = functools.reduce(lambda held, group: held.get(group, {}), groups, made)
        if field not in holder:
            raise ConfigError(name, value, "is not a field")
        kind = type(holder[field])
        holder[field] = str(value).lower() == "true" if kind is bool else kind(value)
    return config_lib.build(made)


def prepare(cfg: config_lib.RunConfig, out: Path) -> None:
    """Prepares the tokenizer, in OUT/prepare, and the token stores."""
    corpus = data.prepare(cfg.data, workdir=out / "prepare", seed=0, progress=sys.stderr.isatty())
    print(corpus.table(), flush=True)


def give_tokenizer(out: Path, runs: Iterable[Run]) -> None:
    """Copies the tokenizer into each run directory, which then finds the token stores."""
    for run in runs:
        run.folder.mkdir(parents=True, exist_ok=True)
        for file in (out / "prepare").glob("tokenizer*"):
            if not (run.folder / file.name).exists():
                shutil.copy(file, run.folder)


# --- what made a result -----------------------------------------------------------------------------------------------

Key = tuple[str, int]  # an arm and a seed


class Call(NamedTuple):
    """The settings and options that this call of an experiment asks for. Results of other calls are compared with them.

    config, folder: as for `load_config`.
    plan: the runs of all arms and seeds, from the fields that --set changes.
    extra: these fields.
    options: of the measurement after training.
    compared: whether a setting is compared; for arms whose weights decide some.
    """

    config: str
    folder: str
    plan: Callable[[dict[str, Any]], list[Run]]
    extra: dict[str, Any]
    options: dict[str, Any] = types.MappingProxyType({})
    compared: Callable[[str], bool] = lambda name: True

    def settings(self, arm: str, extra: dict[str, Any]) -> dict[str, Any]:
        """The settings of an arm. Raises ValueError for an arm that this experiment has not got."""
        run = next((run for run in self.plan(extra) if run.arm == arm), None)
        if run is None:
            raise UserError("is not an arm of this experiment")
        found = records.settings_of(load_config(self.config, f"{self.folder}{run.argument}", run.overrides))
        return {name: value for name, value in found.items() if self.compared(name)}

    def select(self, results: dict[Key, Any], source: str | Path) -> dict[Key, Any]:
        """The results, with `settings` and `options`, that this call would make again. Prints what is left out."""
        settings = functools.cache(lambda arm: [self.settings(arm, fields) for fields in (self.extra, {})])

        def why(key: Key, one: Any) -> list[str]:
            had = {name: value for name, value in one.settings.items() if self.compared(name)}
            return records.unlike(had, *settings(key[0])) + records.unlike_options(
                getattr(one, "options", {}), self.options
            )

        return records.select(results, why, source)

    def refuses(self, runs: Iterable[Run]) -> bool:
        """Whether the folder of a run holds one of other settings, which is then printed."""
        settings = functools.cache(lambda arm: self.settings(arm, self.extra))
        for run in runs:
            if not (run.folder / "config.json").is_file():
                continue
            had = {name: value for name, value in records.settings_in(run.folder).items() if self.compared(name)}
            if why := records.unlike(had, settings(run.arm), {}):
                print(f"error: --out: {run.folder} is a run with {why[0]}; name another folder", file=sys.stderr)
                return True
        return False


def find_trained(folder: Path, cfg: config_lib.RunConfig) -> Path | None:
    """A finished run of the folder, FOLDER/<name>/seed<n>, that was trained as `cfg` says; None without one.

    All settings that decide what is trained are compared, and of the text the names and shares of its sources.
    """
    for file in sorted(folder.glob(f"*/seed{cfg.seed}/config.json")):
        run = file.parent
        done = (run / "eval.json").is_file() and (run / "checkpoints").is_dir()
        if (
            done
            and config_file.values(run).get("seed") == cfg.seed
            and config_lib.same_value(records.settings_in(run), records.settings_of(cfg))
        ):
            return run
    return None


# --- the pool --------------------------------------------------------------------------------------------------------


def count_gpus() -> int:
    """Number of this machine's GPUs. It does not ask JAX, which would take their memory."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return len([d for d in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if d])
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=True, encoding="utf-8").stdout
    except (OSError, subprocess.CalledProcessError):
        return 0
    return sum(line.startswith("GPU ") for line in listed.splitlines())


def devices(gpus: int) -> list[str]:
    """The value of CUDA_VISIBLE_DEVICES for each GPU used."""
    seen = [d for d in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if d]
    return seen[:gpus] or [str(i) for i in range(gpus)]


def execute(job: Job, device: str | None, share: float) -> int:
    """Runs one job on one device and returns its exit status."""
    env = dict(os.environ)
    if device is not None:
        env.pop("XLA_PYTHON_CLIENT_MEM_FRACTION", None)  # the same by its old name: JAX refuses both
        env |= {"CUDA_VISIBLE_DEVICES": device, "XLA_CLIENT_MEM_FRACTION": f"{share:.3f}"}
    job.folder.mkdir(parents=True, exist_ok=True)
    with open(job.folder / "output.txt", "a", encoding="utf-8") as output:
        command = [sys.executable, *job.command]
        return subprocess.run(command, cwd=REPO, env=env, stdout=output, stderr=subprocess.STDOUT).returncode


def run_all(plan: Callable[[], list[Job]], gpus: int | None, per_gpu: int) -> list[Job]:
    """Runs the jobs that are not done, in the order of the plan. Returns those that failed.

    plan: returns the jobs. It is called whenever a device is free, so that finished jobs can decide what follows.
    """
    gpus = count_gpus() if gpus is None else gpus
    slots: queue.Queue[str | None] = queue.Queue()
    for device in devices(gpus) * per_gpu if gpus else [None]:
        slots.put(device)
    jobs = plan()
    what = f"{gpus} GPUs, {per_gpu} at a time each" if gpus else "the CPU"
    print(f"{len(jobs)} jobs on {what}, {sum(job.done for job in jobs)} done already", flush=True)
    for job in jobs:
        if why := job.stale:
            print(f"{job.name}: {job.product} is made again: {'; '.join(why)}", flush=True)

    def one(job: Job, device: str | None) -> int:
        try:
            return execute(job, device, GPU_SHARE / per_gpu)
        finally:
            slots.put(device)

    started, running, failed = set(), {}, []
    bar = tqdm(total=len(jobs), initial=sum(job.done for job in jobs), unit="job")
    with ThreadPoolExecutor(slots.qsize()) as pool, bar:
        while True:
            jobs = plan()
            todo = [job for job in jobs if not job.done and (job.folder, job.product) not in started]
            while todo and not slots.empty():
                job = todo.pop(0)
                started.add((job.folder, job.product))
                running[pool.submit(one, job, slots.get())] = job
            bar.total = max(bar.total, len(jobs))
            if not running:
                return failed
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                status = future.result()
                if status or not job.done:
                    failed.append(job)
                    what = f"{job.name} (exit status {status}{'' if status else f', without {job.product}'})"
                    bar.write(f"failed: {what}; see {job.folder / 'output.txt'}", file=sys.stderr)
                bar.set_postfix_str(f"last: {job.name}")
                bar.update()


# --- command line ----------------------------------------------------------------------------------------------------


def _formats(text: str) -> tuple[str, ...]:
    try:
        return drawing.check_formats(text.split(","))
    except UserError as e:
        raise argparse.ArgumentTypeError(str(e)) from None


def add_flags(parser: argparse.ArgumentParser, out: str, data: str = "data/domains") -> None:
    """Adds the flags that every experiment has. data: the default of --data."""
    parser.add_argument("--data", type=os.path.expanduser, default=data, help=f"text, by default {data}")
    parser.add_argument("--out", type=expanded, default=Path(out), help="folder of the runs")
    parser.add_argument("--gpus", type=int, default=None, help="GPUs to use; default: all; 0: the CPU")
    parser.add_argument("--per_gpu", type=int, default=1, help="runs at a time on each GPU")
    parser.add_argument("--report_only", action="store_true", help="train nothing, compare what is finished")
    parser.add_argument("--figures", type=_formats, default=("png",), help=drawing.HELP)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a config field, for all arms")


def add_arms(parser: argparse.ArgumentParser, arms: Iterable[str]) -> None:
    """Adds the flags of an experiment that compares arms."""
    parser.add_argument("--only", default=",".join(arms), help="arms to run, separated by commas")
    parser.add_argument("--known", type=expanded, default=None, metavar="FILE", help="a results.json of finished runs")


def chosen_arms(parser: argparse.ArgumentParser, arguments: argparse.Namespace, arms: Iterable[str]) -> list[str]:
    """The arms of `--only`."""
    names = arguments.only.split(",")
    if unknown := [name for name in names if name not in arms]:
        parser.error(f"--only: no arm {unknown[0]!r}; there are {', '.join(arms)}")
    return names


def extra_fields(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> dict[str, str]:
    """The fields that --set changes."""
    if bad := [pair for pair in arguments.set if "=" not in pair]:
        parser.error(f"--set {bad[0]}: must be NAME=VALUE")
    return dict(pair.split("=", 1) for pair in arguments.set)


def checked_configs(config: str, folder: str, runs: list[Run]) -> dict[str, config_lib.RunConfig] | None:
    """The config of every arm, made before any run to find mistakes. None after printing a mistake."""
    try:
        return {run.arm: load_config(config, folder + run.argument, run.overrides) for run in runs}
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return None
