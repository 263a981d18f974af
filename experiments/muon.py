"""Compares AdamW and Muon on one model and corpus: learning rates, tokens needed, update scale, weight decay, spectra.

    python -m experiments.multi_domain_text data/domains --local=FOLDER
    python -m experiments.muon --data=data/domains --out=runs/muon --part=a,b,c,d

Every run is `configs/balance_scope.py` with the optimizer's fields changed. Runs with the same seed have the same
initial weights and batches. First the learning rates of both optimizers are swept; a sweep is extended while its best
rate is at an end. At the best rates the parts are:

    a   three seeds of both; Muon on 50 %, 35 % and 25 % of the tokens, each with a complete schedule
    b   Muon's update RMS from 0.05 to 0.8
    c   both without weight decay; update and weight RMS of every kind of matrix
    d   SVD entropy of every matrix, which needs no further run

Each GPU trains `--per_gpu` runs at a time. Run the same command to resume: finished runs are kept, and the others start
from their last checkpoint. `--rates=ADAMW,MUON` gives the learning rates, and then none are swept. `--known=FILE` names
a results.json (docs/muon_runs.json has the published runs), whose runs are compared with the others and not run again,
if they were trained as this call trains; what is left out is printed.
`--plan` prints the number of runs and their time. `--only` selects runs by name, such as `muon_lr0.002*,*/seed0`. The
comparison is OUT/table.md, OUT/results.json and OUT/*.png. `--report_only` writes only these.
"""

import argparse
import fnmatch
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from experiments import muon_figures, muon_report, pool, records
from experiments.muon_report import Finished
from experiments.pool import Job, Run
from moe_jax import terminal
from moe_jax.cli import expanded
from moe_jax.errors import UserError
from moe_jax.run.log import read_eval

CONFIG = "configs/balance_scope.py"
MINUTES = 3.5  # of a run with all tokens on one H200
LRS = (5e-4, 1e-3, 2e-3, 4e-3)
EXTENSIONS = 3  # times that a sweep may go on past an end
SEEDS = (0, 1, 2)
UPDATE_RMS = (0.05, 0.1, 0.4, 0.8)  # and the default
TOKENS = (0.5, 0.35, 0.25)  # shares of the tokens
PARTS = {"a": "learning rates and tokens", "b": "update RMS", "c": "weight decay and RMS", "d": "SVD entropy"}

DEFAULTS = {"train.log_every": 5, "train.keep_checkpoints": 1, "sample.tokens": 0}


class Arm(NamedTuple):
    optimizer: str
    lr: float
    update_rms: float = 0.2
    weight_decay: float = 0.1
    tokens: float = 1.0  # share of them

    @property
    def name(self) -> str:
        parts = [self.optimizer, f"lr{self.lr:g}"]
        parts += [f"rms{self.update_rms:g}"] if self.update_rms != 0.2 else []
        parts += [f"decay{self.weight_decay:g}"] if self.weight_decay != 0.1 else []
        parts += [f"tokens{self.tokens:g}"] if self.tokens != 1.0 else []
        return "_".join(parts)


Best = Callable[[str, list[float]], float | None]  # (optimizer, its rates) → the best of them, None if not known yet


def sweep(optimizer: str, best: Best) -> tuple[list[float], float | None]:
    """The learning rates to try, and the best of them after all have been tried."""
    rates = sorted(LRS)
    for _ in range(EXTENSIONS):
        found = best(optimizer, rates)
        if found == rates[-1]:
            rates.append(2 * rates[-1])
        elif found == rates[0]:
            rates.insert(0, rates[0] / 2)
        else:
            return rates, found
    return rates, best(optimizer, rates)


def planned(
    parts: list[str], best: Best, rates: dict[str, float] | None = None
) -> tuple[list[tuple[str, Arm, int]], set[Arm]]:
    """(part, arm, seed) of the runs known so far, in order, and the arms whose matrices must be measured.

    The sweeps come first, since everything else depends on them, and the short runs last, to use idle GPUs.
    rates: of both optimizers, where they are not swept.
    """
    swept = {name: ([rates[name]], rates[name]) if rates else sweep(name, best) for name in ("adamw", "muon")}
    longest = max(len(rates) for rates, _ in swept.values())
    runs = [
        ("sweep", Arm(name, rates[i]), 0)
        for i in range(longest)
        for name, (rates, _) in swept.items()
        if i < len(rates)
    ]
    adamw, muon = (swept[name][1] and Arm(name, swept[name][1]) for name in ("adamw", "muon"))
    measured = {arm for arm in (adamw, muon) if arm} if {"c", "d"} & set(parts) else set()
    if "a" in parts:
        runs += [("a", arm, seed) for seed in SEEDS[1:] for arm in (adamw, muon) if arm]
    if "b" in parts and muon:
        arms = [muon._replace(update_rms=x) for x in UPDATE_RMS]
        runs += [("b", arm, 0) for arm in arms]
        measured |= {muon, *arms}
    if "c" in parts:
        arms = [arm._replace(weight_decay=0.0) for arm in (adamw, muon) if arm]
        runs += [("c", arm, 0) for arm in arms]
        measured |= set(arms)
    if "a" in parts and muon:
        runs += [("a", muon._replace(tokens=x), 0) for x in TOKENS]
    return runs, measured


# --- runs ------------------------------------------------------------------------------------------------------------


def make_run(out: Path, arm: Arm, seed: int, steps: int, extra: dict[str, Any]) -> Run:
    """steps: of a run with all tokens."""
    own = max(1, round(arm.tokens * steps))
    fields = {
        "optim.name": arm.optimizer,
        "optim.lr": arm.lr,
        "optim.update_rms": arm.update_rms,
        "optim.weight_decay": arm.weight_decay,
        "train.steps": own,
        "seed": seed,
    }
    times = {"train.eval_every": max(1, own // 10), "train.checkpoint_every": max(1, own // 3)}
    return Run(arm.name, seed, out / arm.name / f"seed{seed}", DEFAULTS | times | extra | fields)


OWN = ("optim.name", "optim.lr", "optim.update_rms", "optim.weight_decay", "train.steps")  # in the name of an arm


def differing(folder: str, extra: dict[str, Any]) -> Callable[[str, Finished], list[str]]:
    """Lines about settings of a run that are not as in this call, but for those in its name. folder: of text."""
    shared = lambda settings: {name: value for name, value in settings.items() if name not in OWN}
    both = [shared(records.settings_of(pool.load_config(CONFIG, folder, fields))) for fields in (extra, {})]
    return lambda name, run: records.unlike(shared(run.settings), *both)


def select(runs: list[Finished], differs: Callable[[str, Finished], list[str]], source: str | Path) -> list[Finished]:
    """The runs that were trained as in this call. The others are printed."""
    name = lambda r: f"{Arm(r.optimizer, r.lr, r.update_rms, r.weight_decay).name}, {r.steps} steps, seed {r.seed},"
    return list(records.select({name(run): run for run in runs}, differs, source).values())


def check_steps(out: Path, steps: int) -> None:
    """Raises UserError if a run of OUT is of another length. steps: of a run with all tokens."""
    for file in sorted(out.glob("*/seed*/config.json")):
        _, short, share = file.parent.parent.name.rpartition("_tokens")
        own = max(1, round((float(share) if short else 1.0) * steps))
        had = records.settings_in(file.parent)["train.steps"]
        if had != own:
            raise UserError(f"--out: {file.parent} is a run with {had} steps, {own} now; name another folder")


class Done:
    """Tells which runs are done: those in OUT, and those known from a results.json."""

    def __init__(self, out: Path, known: list[Finished], steps: int):
        self.out, self.known, self.steps = out, {run.key: run for run in known}, steps

    def get(self, arm: Arm, seed: int) -> Finished | None:
        own = max(1, round(arm.tokens * self.steps))
        return self.known.get((arm.optimizer, arm.lr, arm.update_rms, arm.weight_decay, own, seed))

    def __call__(self, arm: Arm, seed: int, measured: set[Arm]) -> bool:
        """Whether a run is done. A known run whose matrices must be measured is not."""
        if (self.out / arm.name / f"seed{seed}" / "eval.json").is_file():
            return True
        run = self.get(arm, seed)
        return run is not None and (seed != 0 or arm not in measured or run.matrices is not None)

    def best(self, optimizer: str, rates: list[float]) -> float | None:
        """The rate with the lowest held-out loss of seed 0; None if a run is missing."""

        def loss(rate: float) -> float | None:
            arm = Arm(optimizer, rate)
            file = self.out / arm.name / "seed0" / "eval.json"
            if file.is_file():
                return read_eval(file.parent)["domains"][-1]["xent"]
            run = self.get(arm, 0)
            return run and run.losses[1]

        losses = [loss(rate) for rate in rates]
        if None in losses:
            return None
        return min(zip(losses, rates, strict=True), key=lambda pair: (pair[0] != pair[0], *pair))[1]


def estimate(parts: list[str], done: Done, only: list[str], gpus: int, given: dict[str, float] | None = None) -> str:
    """Number of runs and GPU minutes by part, on the assumption that unknown best rates are inside the sweep."""
    runs, measured = planned(parts, lambda name, rates: done.best(name, rates) or rates[1], given)
    lines, total = [], 0.0
    for part in ("sweep", *parts):
        mine = [(arm, seed) for p, arm, seed in runs if p == part and wanted(arm, seed, only)]
        left = [arm for arm, seed in mine if not done(arm, seed, measured)]
        minutes = MINUTES * sum(arm.tokens for arm in left)
        total += minutes
        title = {"sweep": "learning rates"}.get(part) or PARTS[part]
        lines.append(f"{part:<6} {title:<26} {len(mine):>2} runs, {len(left):>2} to do, {minutes:5.1f} GPU minutes")
    each = f"{total / max(gpus, 1):.0f} on {max(gpus, 1)} GPUs"
    lines.append(f"in all {total:.0f} GPU minutes at {MINUTES} a run: {each}")
    return "\n".join(lines)


def wanted(arm: Arm, seed: int, only: list[str]) -> bool:
    return any(fnmatch.fnmatch(f"{arm.name}/seed{seed}", pattern) for pattern in only)


def measurement(run: Run) -> Job:
    command = ["-m", "experiments.muon_matrices", str(run.folder)]
    return Job(f"matrices of {run.arm}", run.folder, command, "matrices.json")


# --- command line ----------------------------------------------------------------------------------------------------


def parse() -> tuple[argparse.Namespace, list[str], list[str], dict[str, str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default=",".join(PARTS), help="parts of the evidence, separated by commas")
    parser.add_argument("--rates", default="", metavar="ADAMW,MUON", help="learning rates, which are then not swept")
    parser.add_argument("--only", default="*", help="patterns of runs, separated by commas: ARM/seedN")
    parser.add_argument("--known", type=expanded, default=None, metavar="FILE", help="a results.json of finished runs")
    parser.add_argument("--plan", action="store_true", help="print what there is to run and its time, run nothing")
    pool.add_flags(parser, "runs/muon")
    arguments = parser.parse_args()
    parts = arguments.part.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"--part: no part {unknown[0]!r}; there are {', '.join(f'{k} ({v})' for k, v in PARTS.items())}")
    try:
        rates = [float(text) for text in arguments.rates.split(",")] if arguments.rates else [1.0, 1.0]
    except ValueError:
        rates = []
    if len(rates) != 2 or min(rates) <= 0:
        parser.error(f"--rates={arguments.rates}: must be two numbers > 0, of AdamW and of Muon, such as 0.004,0.016")
    arguments.rates = dict(zip(("adamw", "muon"), rates, strict=True)) if arguments.rates else None
    return arguments, parts, arguments.only.split(","), pool.extra_fields(parser, arguments)


def main() -> int:
    arguments, parts, only, extra = parse()
    out, failed = arguments.out.resolve(), []
    gpus = pool.count_gpus() if arguments.gpus is None else arguments.gpus
    known = muon_report.read(arguments.known) if arguments.known else []
    if arguments.plan or not arguments.report_only:
        folder = str(Path(arguments.data).resolve())
        base = pool.checked_configs(CONFIG, folder, [Run("base", 0, out, extra)])
        if base is None:
            return 2
        steps, differs = base["base"].train.steps, differing(folder, extra)
        known = select(known, differs, "--known")
        try:
            check_steps(out, steps)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        there = muon_report.load(out)
        if len(select(there, differs, out)) < len(there):
            print(f"error: --out={arguments.out}: holds runs of other settings; name another folder", file=sys.stderr)
            return 2
        done = Done(out, known, steps)
    if arguments.plan:
        print(estimate(parts, done, only, gpus, arguments.rates))
        return 0
    if not arguments.report_only:
        make = lambda arm, seed: make_run(out, arm, seed, steps, extra)
        likely = {arm for _, arm, _ in planned(parts, lambda _, rates: rates[1], arguments.rates)[0]}
        if pool.checked_configs(CONFIG, folder, [make(arm, 0) for arm in likely]) is None:
            return 2
        print(estimate(parts, done, only, gpus, arguments.rates), flush=True)
        jax.config.update("jax_platforms", "cpu")  # of this process only
        pool.prepare(base["base"], out)

        def jobs() -> list[Job]:
            """The next jobs. Measurements come before further runs, since their checkpoints are large."""
            triples, measured = planned(parts, done.best, arguments.rates)
            chosen = [(arm, make(arm, seed)) for _, arm, seed in triples if wanted(arm, seed, only)]
            runs = [(arm, run) for arm, run in chosen if run.done or not done(arm, run.seed, measured)]
            pool.give_tokenizer(out, [run for _, run in runs])
            kept = lambda run: (run.folder / "checkpoints").is_dir() or (run.folder / "matrices.json").is_file()
            first = [run for arm, run in runs if arm in measured and run.seed == 0 and run.done and kept(run)]
            return [measurement(run) for run in first] + [pool.training(run, CONFIG, folder) for _, run in runs]

        failed = pool.run_all(jobs, gpus, arguments.per_gpu)
    finished = muon_report.merge(known, muon_report.load(out))
    if not finished:
        print(f"error: {out} holds no finished run", file=sys.stderr)
        return 1
    comparison = muon_report.Comparison(finished)
    if records.unequal(muon_report.measured(comparison), muon_report.kinds_of, "matrices"):
        return 2
    out.mkdir(parents=True, exist_ok=True)
    muon_report.write(out, comparison)
    muon_figures.write(out, comparison, arguments.figures)
    print((out / "table.md").read_text(encoding="utf-8"))
    return 1 if failed else 0


if __name__ == "__main__":
    terminal.replace_unprintable()
    sys.exit(main())
