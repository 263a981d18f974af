"""Trains one model on one corpus with several scopes of the load-balancing loss, and compares them.

    python -m experiments.multi_domain_text data/domains --local=FOLDER
    python -m experiments.balance_scope --data=data/domains --out=runs/balance_scope

Every arm is `configs/balance_scope.py` with the fields of `ARMS` changed. Runs with the same seed have the same initial
weights and batches. The text is tokenised once, and then each GPU trains `--per_gpu` runs at a time; without a GPU they
run one after the other. Run the same command to resume: finished runs are kept, and the others start from their last
checkpoint. `--known=FILE` names a results.json (docs/balance_scope_runs.json has what was published of earlier runs),
whose runs are compared with the others, and not run again, if they were trained as this call trains the arm; what is
left out is printed. `--only` selects runs by name, such as `scope_*` or `global/seed1`. The comparison is OUT/table.md,
OUT/results.json, OUT/scope.png and OUT/specialisation.png. `--report_only` writes only these.
"""

import argparse
import fnmatch
import functools
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax

from experiments import balance_report, pool, records
from experiments.pool import Run
from moe_jax import terminal
from moe_jax.cli import expanded

CONFIG = "configs/balance_scope.py"

config_module = functools.partial(pool.config_module, CONFIG)
load_config = functools.partial(pool.load_config, CONFIG)


class Arm(NamedTuple):
    label: str
    overrides: dict[str, Any]
    seeds: tuple[int, ...] = (0,)


def _scope(sequences: int | str, label: str, seeds: tuple[int, ...] = (0,)) -> Arm:
    return Arm(label, {"loss.balance_batch": str(sequences)}, seeds)


SEEDS = (0, 1, 2)
WEAK = {"loss.load_balance_coef": 0.001}  # an eighth of the coefficient
MUON = {"optim.name": "muon", "optim.lr": 0.008}  # in the middle of the rates that are equally good (docs/results.md)
ARMS = {
    "scope_1": _scope(1, "each sequence", SEEDS),
    "scope_2": _scope(2, "2 sequences", SEEDS),
    "scope_8": _scope(8, "8 sequences", SEEDS),
    "scope_32": _scope(32, "32 sequences", SEEDS),
    "scope_128": _scope(128, "128 sequences"),
    "global": _scope("global", "the global batch", SEEDS),
    "scope_1_weak": Arm("each sequence, coefficient ÷ 8", {"loss.balance_batch": "1"} | WEAK, SEEDS),
    "global_weak": Arm("the global batch, coefficient ÷ 8", {"loss.balance_batch": "global"} | WEAK, SEEDS),
    "scope_1_muon": Arm("each sequence, Muon", {"loss.balance_batch": "1"} | MUON),
    "global_muon": Arm("the global batch, Muon", {"loss.balance_batch": "global"} | MUON),
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


def planned(out: Path, names: list[str], extra: dict[str, str]) -> list[Run]:
    """Every arm with its first seed, then the other seeds, so that the finished runs can be compared at any time."""
    pairs = sorted(((seed, name) for name in names for seed in ARMS[name].seeds), key=lambda pair: pair[0])
    return [
        Run(name, seed, out / name / f"seed{seed}", extra | ARMS[name].overrides | {"seed": seed})
        for seed, name in pairs
    ]


def call(folder: str, extra: dict[str, str]) -> pool.Call:
    """The settings that results must have to be compared in a call on this folder of text."""
    return pool.Call(CONFIG, folder, lambda fields: planned(Path(), list(ARMS), fields), extra)


# --- command line ----------------------------------------------------------------------------------------------------


def wanted(run: Run, only: list[str]) -> bool:
    """Whether a pattern names the run, or its arm."""
    return any(fnmatch.fnmatch(name, pattern) for name in (run.arm, f"{run.arm}/seed{run.seed}") for pattern in only)


def parse() -> tuple[argparse.Namespace, list[str], dict[str, str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="patterns of arms, or of ARM/seedN, separated by commas")
    parser.add_argument("--known", type=expanded, default=None, metavar="FILE", help="a results.json of finished runs")
    pool.add_flags(parser, "runs/balance_scope")
    arguments = parser.parse_args()
    only, runs = arguments.only.split(","), planned(Path(), list(ARMS), {})
    if unknown := [pattern for pattern in only if not any(wanted(run, [pattern]) for run in runs)]:
        parser.error(f"--only: no arm {unknown[0]!r}; there are {', '.join(ARMS)}, each as ARM or ARM/seedN")
    return arguments, only, pool.extra_fields(parser, arguments)


def main() -> int:
    arguments, only, extra = parse()
    out, failed = arguments.out.resolve(), []
    known = balance_report.read(arguments.known) if arguments.known else {}
    if not arguments.report_only:
        folder = str(Path(arguments.data).resolve())
        runs = [run for run in planned(out, list(ARMS), extra) if wanted(run, only)]
        configs = pool.checked_configs(CONFIG, folder, runs)
        if configs is None:
            return 2
        asked = call(folder, extra)
        known = asked.select(known, "--known")
        runs = [run for run in runs if (run.arm, run.seed) not in known]
        if asked.refuses(runs):
            return 2
        if runs:  # else all of it is known
            jax.config.update("jax_platforms", "cpu")  # of this process only
            pool.prepare(configs[runs[0].arm], out)
            pool.give_tokenizer(out, runs)
            jobs = [pool.training(run, CONFIG, folder) for run in runs]
            failed = pool.run_all(lambda: jobs, arguments.gpus, arguments.per_gpu)
    out.mkdir(parents=True, exist_ok=True)
    there = balance_report.load(out, {name: arm.seeds for name, arm in ARMS.items()})
    found = known | (there if arguments.report_only else asked.select(there, out))
    finished = balance_report.arms_of(found, {name: (arm.label, arm.seeds) for name, arm in ARMS.items()})
    if not finished:
        print(f"error: {out} holds no finished run", file=sys.stderr)
        return 1
    if records.unequal(found, lambda run: run.domains):
        return 2
    balance_report.write(out, finished, arguments.figures)
    print((out / "table.md").read_text(encoding="utf-8"))
    return 1 if failed else 0


if __name__ == "__main__":
    terminal.replace_unprintable()
    sys.exit(main())
