"""Prunes trained models by the use of their experts, 32 to 24 to 16, and compares two scopes of the balancing loss.

    python -m experiments.multi_domain_text data/domains --local=FOLDER
    python -m experiments.pruning --data=data/domains --out=runs/pruning

Every arm of `ARMS` is `configs/balance_scope.py` with the scope of its load-balancing loss changed. After training,
tokens of each expert are counted on training text, each layer keeps the experts with the most (`upcycle.Prune`), and
held-out perplexity is measured, also with experts that are kept at random. Then the model, whole and pruned, is trained
for a few more steps at a constant low rate. Each GPU runs `--per_gpu` jobs at a time. `--runs=FOLDER` names a folder of
finished runs, such as another experiment's; one that was trained as an arm is pruned in place of a new one. Run the
same command to resume.
`--known=FILE` names a results.json, whose arms are compared with the others and not run again, if they were trained and
pruned as in this call; what is left out is printed. The comparison is OUT/table.md, OUT/results.json and
OUT/pruning.png. `--report_only` writes only these, of all that is there.
"""

import argparse
import sys
from pathlib import Path

import jax

from experiments import pool, pruning_report, records
from experiments.pool import Job, Run
from moe_jax import terminal
from moe_jax.cli import expanded

CONFIG = "configs/balance_scope.py"
ARMS = {"global": "balanced over the global batch", "sequence": "balanced in each sequence"}
SCOPES = {"global": "global", "sequence": "1"}
SEEDS = (0,)
DEFAULTS = {"train.log_every": 5, "train.keep_checkpoints": 1, "sample.tokens": 0}
RATE = 1e-4  # of the steps after pruning: the rate with which the training ends


def trained(out: Path, arm: str, seed: int, extra: dict[str, str]) -> Run:
    """The run whose model is pruned."""
    fields = DEFAULTS | extra | {"loss.balance_batch": SCOPES[arm], "seed": seed}
    return Run(arm, seed, out / arm / f"seed{seed}", fields)


def continued(run: Run, source: Path, experts: int, whole: int, steps: int, batches: int) -> Run:
    """The run that goes on with the model of `run` with so many experts. whole: the number that it has.

    source: the run directory with its weights. batches: of text that experts were counted on, which decides those that
    are kept.
    """
    fields = {
        "init_from": source if experts == whole else run.folder / "pruned" / str(experts),
        "model.moe.num_experts": experts, "train.steps": steps, "optim.lr": RATE,
        "optim.schedule": "constant", "optim.warmup_steps": min(5, steps - 1), "train.checkpoint_every": steps,
        "seed": 1000 + run.seed,  # another order of the text than in the training before
    }  # fmt: skip
    folder = run.folder / "after" / f"{steps}_steps_{batches}_batches" / str(experts)
    return Run(f"{run.arm}, {experts} experts", run.seed, folder, run.overrides | fields)


def jobs(
    runs: list[tuple[Run, Path]], experts: list[int], whole: int, steps: int, batches: int, folder: str
) -> list[Job]:
    """The jobs that can be run now: trainings, then counts and pruning, then what follows these.

    runs: each with the folder of its weights.
    """
    found = [pool.training(run, CONFIG, folder) for run, source in runs if source == run.folder]
    for run, source in runs:
        if not (source / "eval.json").is_file():
            continue
        options = {"experts": experts, "batches": batches}
        command = ["-m", "experiments.pruning_measure", str(source), f"--out={run.folder}", *records.as_flags(options)]
        settings = records.settings_in(source)
        measured = Job(f"pruning of {run.arm}, seed {run.seed}", run.folder, command, "pruned.json", options, settings)
        found.append(measured)
        if measured.done:
            after = [continued(run, source, n, whole, steps, batches) for n in (whole, *experts)]
            pool.give_tokenizer(run.folder.parents[1], after)
            found += [pool.training(one, CONFIG, folder) for one in after]
    return found


# --- command line ----------------------------------------------------------------------------------------------------


def parse() -> tuple[argparse.Namespace, list[str], list[int], dict[str, str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    pool.add_arms(parser, ARMS)
    parser.add_argument("--experts", default="24,16", help="numbers of experts that a layer keeps")
    parser.add_argument("--after_steps", type=int, default=50, help="steps of training after pruning")
    parser.add_argument("--count_batches", type=int, default=32, help="batches of training text that are counted")
    parser.add_argument("--runs", type=expanded, default=None, metavar="FOLDER", help="finished runs to look in first")
    pool.add_flags(parser, "runs/pruning")
    arguments = parser.parse_args()
    names = pool.chosen_arms(parser, arguments, ARMS)
    if not all(part.isdigit() and int(part) for part in arguments.experts.split(",")):
        parser.error(f"--experts={arguments.experts}: must be numbers ≥ 1, separated by commas")
    for name in ("after_steps", "count_batches"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name}={getattr(arguments, name)}: must be ≥ 1")
    return arguments, names, [int(n) for n in arguments.experts.split(",")], pool.extra_fields(parser, arguments)


def main() -> int:
    arguments, names, experts, extra = parse()
    out, failed = arguments.out.resolve(), []
    known = pruning_report.read(arguments.known) if arguments.known else {}
    if not arguments.report_only:
        folder = str(Path(arguments.data).resolve())
        runs = [trained(out, arm, seed, extra) for seed in SEEDS for arm in names]
        configs = pool.checked_configs(CONFIG, folder, runs)
        if configs is None:
            return 2
        whole, least = configs[names[0]].model.moe.num_experts, configs[names[0]].model.moe.top_k
        if bad := [n for n in experts if not least <= n < whole]:
            print(f"error: --experts={bad[0]}: must be in [{least}, {whole - 1}]", file=sys.stderr)
            return 2
        options = {"experts": experts, "batches": arguments.count_batches, "after_steps": arguments.after_steps}
        plan_all = lambda fields: [trained(out, arm, seed, fields) for seed in SEEDS for arm in ARMS]
        asked = pool.Call(CONFIG, folder, plan_all, extra, options)
        known = asked.select(known, "--known")
        runs = [run for run in runs if (run.arm, run.seed) not in known or not known[run.arm, run.seed].complete]
        if asked.refuses(runs):
            return 2
        find = lambda arm: pool.find_trained(arguments.runs.resolve(), configs[arm])
        found = {run.arm: find(run.arm) for run in runs if arguments.runs}
        for arm, source in found.items():
            print(f"{arm}: {f'trained already, {source}' if source else f'no finished run in {arguments.runs}'}")
        sources = [(run, found.get(run.arm) or run.folder) for run in runs]
        if runs:  # else all of it is known
            jax.config.update("jax_platforms", "cpu")  # of this process only
            pool.prepare(configs[runs[0].arm], out)
            pool.give_tokenizer(out, runs)
            plan = lambda: jobs(sources, experts, whole, arguments.after_steps, arguments.count_batches, folder)
            failed = pool.run_all(plan, arguments.gpus, arguments.per_gpu)
    there = pruning_report.load(out, None if arguments.report_only else arguments.after_steps)
    finished = known | (there if arguments.report_only else asked.select(there, out))
    if not finished:
        print(f"error: {out} holds no finished run", file=sys.stderr)
        return 1
    if records.unequal(finished, lambda run: run.used[str(run.whole)]):
        return 2
    pruning_report.write(out, finished, ARMS, arguments.figures)
    print((out / "table.md").read_text(encoding="utf-8"))
    return 1 if failed else 0


if __name__ == "__main__":
    terminal.replace_unprintable()
    sys.exit(main())
