"""Switches off the ten experts most specific to one domain, and compares two scopes of the balancing loss.

    python -m experiments.multi_domain_text data/domains --local=FOLDER
    python -m experiments.switching --data=data/domains --out=runs/switching

Every arm of `ARMS` is `configs/balance_scope.py` with the scope of its load-balancing loss changed. After training,
tokens of each expert are counted on training text. The experts with the largest difference of selection frequencies
between a domain and all others are switched off (`eval.py --experts=off:…`), and the perplexity of every domain is
measured on held-out text, which took no part in the choice: also with as many experts of the same layers switched off
at random. `--runs=FOLDER` names a folder of finished runs, such as another experiment's; one that was trained as an
arm is measured and not trained again. Run the same command to resume. `--known=FILE` names a results.json, whose arms
are compared with the others and not run again, if they were trained and measured as in this call; what is left out is
printed. The comparison is OUT/table.md, OUT/results.json and OUT/switching.png. `--report_only` writes only these, of
all that is there.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import jax

from experiments import pool, records, switching_report
from experiments.pool import Job, Run
from moe_jax import terminal
from moe_jax.cli import expanded

CONFIG = "configs/balance_scope.py"
ARMS = {"global": "balanced over the global batch", "sequence": "balanced in each sequence"}
SCOPES = {"global": "global", "sequence": "1"}
SEEDS = (0,)
DEFAULTS = {"train.log_every": 5, "train.keep_checkpoints": 1, "sample.tokens": 0}
DOMAINS = "python,cpp,lisp"


def trained(out: Path, arm: str, seed: int, extra: dict[str, str]) -> Run:
    """The run whose experts are switched."""
    fields = DEFAULTS | extra | {"loss.balance_batch": SCOPES[arm], "seed": seed}
    return Run(arm, seed, out / arm / f"seed{seed}", fields)


def measuring(run: Run, source: Path, options: dict[str, Any]) -> Job:
    """The job that measures `run`, whose weights lie in the run directory `source`."""
    command = ["-m", "experiments.switching_measure", str(source), f"--out={run.folder}", *records.as_flags(options)]
    return Job(f"switching of {run.arm}, seed {run.seed}", run.folder, command, "switching.json", options,
               records.settings_in(source))  # fmt: skip


# --- command line ----------------------------------------------------------------------------------------------------


def parse() -> tuple[argparse.Namespace, list[str], list[str], dict[str, str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    pool.add_arms(parser, ARMS)
    parser.add_argument("--domains", default=DOMAINS, help="domains whose experts are switched off, one after another")
    parser.add_argument("--count_batches", type=int, default=32, help="batches of training text that are counted")
    parser.add_argument("--runs", type=expanded, default=None, metavar="FOLDER", help="finished runs to look in first")
    pool.add_flags(parser, "runs/switching")
    arguments = parser.parse_args()
    names = pool.chosen_arms(parser, arguments, ARMS)
    if arguments.count_batches < 1:
        parser.error(f"--count_batches={arguments.count_batches}: must be ≥ 1")
    return arguments, names, arguments.domains.split(","), pool.extra_fields(parser, arguments)


def main() -> int:
    arguments, names, domains, extra = parse()
    out, failed = arguments.out.resolve(), []
    known = switching_report.read(arguments.known) if arguments.known else {}
    if not arguments.report_only:
        folder = str(Path(arguments.data).resolve())
        runs = [trained(out, arm, seed, extra) for seed in SEEDS for arm in names]
        configs = pool.checked_configs(CONFIG, folder, runs)
        if configs is None:
            return 2
        there = sorted(configs[names[0]].data.sources)
        if unknown := [name for name in domains if name not in there]:
            print(f"error: --domains={unknown[0]}: is not among the domains {', '.join(there)}", file=sys.stderr)
            return 2
        options = {"domains": domains, "batches": arguments.count_batches}
        plan_all = lambda fields: [trained(out, arm, seed, fields) for seed in SEEDS for arm in ARMS]
        asked = pool.Call(CONFIG, folder, plan_all, extra, options)
        known = asked.select(known, "--known")
        runs = [run for run in runs if (run.arm, run.seed) not in known]
        if asked.refuses(runs):
            return 2
        find = lambda arm: pool.find_trained(arguments.runs.resolve(), configs[arm])
        found = {run.arm: find(run.arm) for run in runs if arguments.runs}
        for arm, source in found.items():
            print(f"{arm}: {f'trained already, {source}' if source else f'no finished run in {arguments.runs}'}")
        missing = [run for run in runs if not found.get(run.arm)]
        if missing:
            jax.config.update("jax_platforms", "cpu")  # of this process only
            pool.prepare(configs[missing[0].arm], out)
            pool.give_tokenizer(out, missing)

        def plan() -> list[Job]:
            """Trainings, then the measurements of runs that are finished."""
            ready = [(run, found.get(run.arm) or run.folder) for run in runs if found.get(run.arm) or run.done]
            measured = [measuring(run, source, options) for run, source in ready]
            return [*(pool.training(run, CONFIG, folder) for run in missing), *measured]

        failed = pool.run_all(plan, arguments.gpus, arguments.per_gpu) if runs else []
    there = switching_report.load(out)
    finished = known | (there if arguments.report_only else asked.select(there, out))
    if not finished:
        print(f"error: {out} holds no finished run", file=sys.stderr)
        return 1
    if records.unequal(finished, lambda run: run.whole):
        return 2
    switching_report.write(out, finished, ARMS, arguments.figures)
    print((out / "table.md").read_text(encoding="utf-8"))
    return 1 if failed else 0


if __name__ == "__main__":
    terminal.replace_unprintable()
    sys.exit(main())
