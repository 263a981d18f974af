"""Rounds the experts of trained models to few bits, and compares two scopes of the balancing loss.

    python -m experiments.multi_domain_text data/domains --local=FOLDER
    python -m experiments.quantisation --data=data/domains --out=runs/quantisation

Every arm of `ARMS` is `configs/balance_scope.py` with the scope of its load-balancing loss changed. After training, the
weights of its experts are rounded to 2, 2.5, 3 and 4 bits on average, by GPTQ and to nearest: with the same number for
all experts, with its two neighbours by turns, with more for those that are used most, and by MC-MoE's least cost
(`python -m moe_jax.quant`); 2.5 and 3 bits with three seeds of calibration. Held-out perplexity is measured by domain.

`--runs=FOLDER` takes finished runs FOLDER/<name>/seed0, such as another experiment's, that were trained as the arms, in
place of training. `--run=RUN` takes one finished run of any model, without arms. Each GPU runs `--per_gpu` jobs at a
time. Run the same command to resume. `--known=FILE` names a results.json, whose models are compared with the others and
not measured again, if they were trained and rounded as in this call; what is left out is printed. The comparison is
OUT/table.md, OUT/results.json and OUT/quantisation.png. `--report_only` writes only these, of all that is there.
"""

import argparse
import json
import sys
from pathlib import Path

import jax

from experiments import pool, quantisation_report, records
from experiments.pool import Job, Run
from experiments.quantisation_measure import MEASURED, PART, PRODUCT, ways
from moe_jax import config as config_lib
from moe_jax import terminal
from moe_jax.cli import expanded

CONFIG = "configs/balance_scope.py"
ARMS = {"global": "balanced over the global batch", "sequence": "balanced in each sequence"}
SCOPES = {"global": "global", "sequence": "1"}
SEED = 0
DEFAULTS = {"train.log_every": 5, "train.keep_checkpoints": 1, "sample.tokens": 0}


def trained(out: Path, arm: str, extra: dict[str, str]) -> Run:
    """The run whose model is rounded."""
    return Run(
        arm, SEED, out / arm / f"seed{SEED}", DEFAULTS | extra | {"loss.balance_batch": SCOPES[arm], "seed": SEED}
    )


def last_step(run: Path) -> int:
    """The step of the last checkpoint of a run directory."""
    return max((int(p.name) for p in run.glob("checkpoints/*") if p.name.isdigit()), default=0)


def go_on(folder: Path, options: dict[str, int]) -> None:
    """Makes a measurement's file of results the part that it goes on from, which may be missing or have fewer ways."""
    product, part = folder / PRODUCT, folder / PART.format(**options)
    ways_in = lambda file: len(json.loads(file.read_text(encoding="utf-8"))["ways"]) if file.is_file() else -1
    if ways_in(product) > ways_in(part):
        product.replace(part)
    else:
        product.unlink()


def measuring(name: str, run: Path, to: Path, flags: list[str], options: dict[str, int]) -> Job:
    """The job that rounds the model of a run directory, with its results in `to`."""
    command = ["-m", "experiments.quantisation_measure", str(run), f"--to={to}", *flags, *records.as_flags(options)]
    return Job(
        f"rounding of {name}", to, command, PRODUCT, options | {"step": last_step(run)}, records.settings_in(run)
    )


def jobs(
    runs: list[Run], found: dict[str, Path], out: Path, flags: list[str], options: dict[str, int], folder: str
) -> list[Job]:
    """The jobs that can be run now: trainings, and the rounding of finished runs. found: of other folders, by name."""
    made = [pool.training(run, CONFIG, folder) for run in runs]
    done = found | {run.arm: run.folder for run in runs if run.done}
    return made + [measuring(name, run, out / name / "rounded", flags, options) for name, run in done.items()]


# --- command line ----------------------------------------------------------------------------------------------------


def parse() -> tuple[argparse.Namespace, list[str], list[float], dict[str, str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    pool.add_arms(parser, ARMS)
    parser.add_argument("--bits", default="2,2.5,3,4", help="mean bits of the weights of experts")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of calibration at 2.5 and 3 bits")
    parser.add_argument("--rows", type=int, default=64, help="rows of calibration text")
    parser.add_argument("--group", type=int, default=128, help="inputs of a matrix that share a scale")
    parser.add_argument("--runs", type=expanded, default=None, metavar="FOLDER", help="finished runs of the arms")
    parser.add_argument("--run", type=expanded, default=None, metavar="RUN", help="one finished run of any model")
    pool.add_flags(parser, "runs/quantisation")
    arguments = parser.parse_args()
    names = pool.chosen_arms(parser, arguments, ARMS)
    try:
        bits = [float(part) for part in arguments.bits.split(",")]
    except ValueError:
        bits = [0.0]
    if not all(2 <= b <= MEASURED[-1] - 1 for b in bits):
        parser.error(f"--bits={arguments.bits}: must be numbers from 2 to {MEASURED[-1] - 1}, separated by commas")
    for name in ("seeds", "rows", "group"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name}={getattr(arguments, name)}: must be ≥ 1")
    if arguments.run and arguments.runs:
        parser.error("--run and --runs: give one of them")
    return arguments, names, bits, pool.extra_fields(parser, arguments)


def finished_runs(
    arguments: argparse.Namespace, names: list[str], configs: dict[str, config_lib.RunConfig]
) -> dict[str, Path]:
    """The finished runs that are named, by arm, or by the name of their directory. Raises ValueError for others."""
    if arguments.run:
        run = arguments.run.resolve()
        if not (run / "config.json").is_file():
            raise ValueError(f"{run}: is not a run directory")
        if not (run / "eval.json").is_file():
            raise ValueError(f"{run}: is not finished: train.py writes eval.json at the end")
        return {run.parent.name if run.name.startswith("seed") else run.name: run}
    found = {arm: pool.find_trained(arguments.runs.resolve(), configs[arm]) for arm in names if arguments.runs}
    if missing := [arm for arm, run in found.items() if run is None]:
        raise ValueError(f"--runs={arguments.runs}: holds no finished run that was trained as {missing[0]!r}")
    return found


def main() -> int:
    arguments, names, bits, extra = parse()
    out, failed = arguments.out.resolve(), []
    known = quantisation_report.read(arguments.known) if arguments.known else {}
    if not arguments.report_only:
        folder = str(Path(arguments.data).resolve())
        wanted, options = ways(bits, arguments.seeds), {"rows": arguments.rows, "group": arguments.group}
        needed = [] if arguments.run else [trained(out, arm, extra) for arm in names]
        configs = pool.checked_configs(CONFIG, folder, needed)
        if configs is None:
            return 2
        try:
            found = finished_runs(arguments, names, configs)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        plan_all = lambda fields: [trained(out, arm, fields) for arm in ARMS]
        asked = pool.Call(CONFIG, folder, plan_all, extra, options)
        given = arguments.run or arguments.runs

        def differs(name: str, one: quantisation_report.Finished) -> list[str]:
            """Reasons not to compare a model. The training of one that this call does not name is not looked at."""
            why = records.unlike_options(one.options, options)
            if name in found:
                step = records.unlike_options(one.options, {"step": last_step(found[name])})
                return [*records.unlike(one.settings, records.settings_in(found[name]), {}), *step, *why]
            if name in ARMS and not given:
                why += records.unlike(one.settings, *(asked.settings(name, fields) for fields in (extra, {})))
            return why

        runs = [] if given else needed
        known = records.select(known, differs, "--known")
        is_known = lambda name: name in known and known[name].has(wanted)
        runs = [run for run in runs if not is_known(run.arm)]
        found = {name: run for name, run in found.items() if not is_known(name)}
        if asked.refuses(runs):
            return 2
        if runs:
            jax.config.update("jax_platforms", "cpu")  # of this process only
            pool.prepare(configs[runs[0].arm], out)
            pool.give_tokenizer(out, runs)
        for name, one in quantisation_report.load(out).items():
            if name in {*found, *(run.arm for run in runs)} and not differs(name, one) and not one.has(wanted):
                go_on(out / name / "rounded", options)
        if runs or found:  # else all of it is known
            flags = [f"--bits={arguments.bits}", f"--seeds={arguments.seeds}"]
            plan = lambda: jobs(runs, found, out, flags, options, folder)
            failed = pool.run_all(plan, arguments.gpus, arguments.per_gpu)
    there = quantisation_report.load(out)
    finished = known | (there if arguments.report_only else records.select(there, differs, out))
    if not finished:
        print(f"error: {out} holds no finished run", file=sys.stderr)
        return 1
    quantisation_report.write(out, finished, ARMS, arguments.figures)
    print((out / "table.md").read_text(encoding="utf-8"))
    return 1 if failed else 0


if __name__ == "__main__":
    terminal.replace_unprintable()
    sys.exit(main())
