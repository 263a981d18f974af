"""Trains a model with document pools and two without, and compares what is left with a part of their experts.

    python -m experiments.multi_domain_text data/domains --local=FOLDER
    python -m experiments.pools --data=data/domains --out=runs/pools

Every arm of `ARMS` is `configs/balance_scope.py` with the fields there changed. After training, the use of each expert
is measured on training text of each domain, and each domain is evaluated on held-out text with 50, 25 and 12.5 % of the
experts of each layer (`eval.py --keep_experts`). Then documents choose from pools: those of their first tokens, which
are not scored, and those of all their tokens, which leaks, on the same tokens. Each GPU runs `--per_gpu` jobs at a
time. Run the same command to resume. `--runs=FOLDER`, which may be repeated, names a folder of finished runs, such as
another experiment's; one that was trained as an arm is, and has its checkpoint, is measured in place of a new one.
`--known=FILE` names a results.json, whose arms are compared with the others and not run again, if they were trained and
measured as in this call; what is left out is printed. The comparison is OUT/table.md, OUT/results.json and
OUT/pools.png. `--report_only` writes only these, of all that is there.
"""

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax

from experiments import pool, pools_report, records
from experiments.pool import Job, Run
from moe_jax import terminal
from moe_jax.cli import expanded

CONFIG = "configs/balance_scope.py"
DEFAULTS = {"train.log_every": 5, "train.keep_checkpoints": 1, "sample.tokens": 0}
SEEDS = (0,)


class Arm(NamedTuple):
    label: str
    overrides: dict[str, Any]


ARMS = {
    # From the K of a token to all experts, as in the paper. Evaluated without pools during training, as the others.
    "pools": Arm("document pools, global batch", {"model.moe.pool_min": 4, "model.moe.pool_from": "all"}),
    "global": Arm("balanced over the global batch", {"loss.balance_batch": "global"}),
    "sequence": Arm("balanced in each sequence", {"loss.balance_batch": "1"}),
}


def trained(out: Path, arm: str, seed: int, extra: dict[str, str]) -> Run:
    """The run whose model is measured."""
    return Run(arm, seed, out / arm / f"seed{seed}", DEFAULTS | extra | ARMS[arm].overrides | {"seed": seed})


def jobs(runs: list[tuple[Run, Path]], options: dict[str, Any], folder: str) -> list[Job]:
    """The jobs that can be run now: trainings, then measurements. runs: each with the folder of its weights."""
    found = [pool.training(run, CONFIG, folder) for run, source in runs if source == run.folder]
    for run, source in runs:
        if (source / "eval.json").is_file():
            command = ["-m", "experiments.pools_measure", str(source), f"--out={run.folder / 'pools.json'}"]
            command += records.as_flags(options)
            name, settings = f"subsets of {run.arm}, seed {run.seed}", records.settings_in(source)
            found.append(Job(name, run.folder, command, "pools.json", options, settings))
    return found


# --- command line ----------------------------------------------------------------------------------------------------


def _numbers(parser: argparse.ArgumentParser, name: str, text: str, low: float, high: float) -> None:
    for part in text.split(","):
        try:
            fits = low <= float(part) <= high
        except ValueError:
            fits = False
        if not fits:
            parser.error(f"--{name}={text}: must be numbers from {low:g} to {high:g}, separated by commas")


def parse() -> tuple[argparse.Namespace, list[str], dict[str, str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    pool.add_arms(parser, ARMS)
    parser.add_argument("--keep", default="50,25,12.5", help="percentages of the experts of a layer that are kept")
    parser.add_argument("--sizes", default="8,16", help="numbers of experts of a pool in evaluation")
    parser.add_argument("--prefix", type=int, default=64, help="tokens of a document that give its pool")
    parser.add_argument("--use_batches", type=int, default=32, help="batches of training text that use is measured on")
    parser.add_argument("--runs", type=expanded, action="append", default=[], metavar="FOLDER", help="finished runs")
    pool.add_flags(parser, "runs/pools")
    arguments = parser.parse_args()
    names = pool.chosen_arms(parser, arguments, ARMS)
    _numbers(parser, "keep", arguments.keep, 1e-6, 100)
    _numbers(parser, "sizes", arguments.sizes, 1, 1e6)
    for name in ("prefix", "use_batches"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name}={getattr(arguments, name)}: must be ≥ 1")
    return arguments, names, pool.extra_fields(parser, arguments)


def main() -> int:
    arguments, names, extra = parse()
    out, failed = arguments.out.resolve(), []
    known = pools_report.read(arguments.known) if arguments.known else {}
    if not arguments.report_only:
        folder = str(Path(arguments.data).resolve())
        runs = [trained(out, arm, seed, extra) for seed in SEEDS for arm in names]
        configs = pool.checked_configs(CONFIG, folder, runs)
        if configs is None:
            return 2
        numbers = lambda text, kind: [kind(part) for part in text.split(",")]
        options = {"keep": numbers(arguments.keep, float), "sizes": numbers(arguments.sizes, int),
                   "prefix": arguments.prefix, "use_batches": arguments.use_batches}  # fmt: skip
        plan = lambda fields: [trained(out, arm, seed, fields) for seed in SEEDS for arm in ARMS]
        asked = pool.Call(CONFIG, folder, plan, extra, options)
        known = asked.select(known, "--known")
        runs = [run for run in runs if (run.arm, run.seed) not in known]
        if asked.refuses(runs):
            return 2
        found = lambda run: (pool.find_trained(one.resolve(), configs[run.arm]) for one in arguments.runs)
        runs = [(run, next(filter(None, found(run)), run.folder)) for run in runs]
        for run, source in runs if arguments.runs else []:
            said = f"trained already, {source}" if source != run.folder else "no finished run in the folders of --runs"
            print(f"{run.arm}: {said}")
        if runs:  # else all of it is known
            jax.config.update("jax_platforms", "cpu")  # of this process only
            pool.prepare(configs[runs[0][0].arm], out)
            pool.give_tokenizer(out, [run for run, _ in runs])
            failed = pool.run_all(lambda: jobs(runs, options, folder), arguments.gpus, arguments.per_gpu)
    there = pools_report.load(out)
    finished = known | (there if arguments.report_only else asked.select(there, out))
    if not finished:
        print(f"error: {out} holds no finished run", file=sys.stderr)
        return 1
    if records.unequal(finished, lambda run: run.kept[run.percentages[0]]):
        return 2
    labels = {name: arm.label for name, arm in ARMS.items()}
    pools_report.write(out, finished, labels, arguments.figures)
    print((out / "table.md").read_text(encoding="utf-8"))
    return 1 if failed else 0


if __name__ == "__main__":
    terminal.replace_unprintable()
    sys.exit(main())
