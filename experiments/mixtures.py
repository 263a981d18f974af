"""Trains one small model on each of several mixtures of domains, and keeps their losses for moe_jax.mixtures.

    python -m experiments.multi_domain_text data/domains --local=FOLDER
    python -m moe_jax.mixtures sample --prior=law:2e7,code:4e7,prose:3e7 --count=32 --out=mix.jsonl
    python -m experiments.mixtures --mixtures=mix.jsonl --data=data/domains --out=runs/mix --per_gpu=4
    python -m moe_jax.mixtures fit --runs=runs/mix/results.json --out=runs/mix/fit

Every run is `--config` (by default configs/balance_scope.py) with the weights of its sources changed to those of a
line of `--mixtures`. A mixture names sources of the config; sources that it leaves out have weight 0. `--set` makes the
models smaller, such as `--set=model.d_model=128`. The text is tokenised once. Run the same command to resume. The runs
are OUT/<mixture>/seed<n>, the results OUT/results.json, OUT/table.md and OUT/mixtures.png. `--known=FILE` names a
results.json, whose runs are kept, and not trained again where mixture, cost and seed are the same; other fields are not
in that file. `--report_only` writes only the results.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import matplotlib
import numpy as np
from matplotlib.figure import Figure

from experiments import pool, records
from experiments.balance_report import markdown
from experiments.pool import Run
from experiments.upcycling_report import style
from moe_jax import config as config_lib
from moe_jax import terminal
from moe_jax.cli import expanded
from moe_jax.errors import ONE_LINE, UserError, nearest
from moe_jax.evaluate.drawing import save
from moe_jax.mixtures import design, measured
from moe_jax.mixtures.design import Mixture
from moe_jax.mixtures.measured import Measured
from moe_jax.run.log import write_text

CONFIG = "configs/balance_scope.py"
DEFAULTS = {"train.log_every": 5, "train.keep_checkpoints": 1, "train.tensorboard": "false", "sample.tokens": 0}
CLOSE = 1e-6  # difference of shares, and of costs relative to them, of the same run


def check_sources(mixtures: list[Mixture], sources: Sequence[str]) -> None:
    """Raises UserError for a mixture of a source that the config has not got."""
    for mixture in mixtures:
        for name in mixture.weights:
            if name not in sources:
                rule = f"{mixture.name}: source {name!r} is not in the config"
                raise UserError(f"--mixtures: {rule}; {nearest(name, sources)}")


def planned(mixtures: list[Mixture], sources: Sequence[str], out: Path, seed: int, extra: dict[str, str]) -> list[Run]:
    """The run of each mixture."""
    weights = lambda mixture: {f"data.sources.{name}.weight": mixture.weights.get(name, 0.0) for name in sources}
    return [
        Run(mixture.name, seed, out / mixture.name / f"seed{seed}",
            DEFAULTS | extra | weights(mixture) | {"seed": seed})
        for mixture in mixtures
    ]  # fmt: skip


def same(a: Measured, b: Measured) -> bool:
    """Whether two runs have the same mixture and cost."""
    return (
        a.weights.keys() == b.weights.keys()
        and all(abs(a.weights[name] - b.weights[name]) < CLOSE for name in a.weights)
        and abs(a.cost - b.cost) < CLOSE * b.cost
    )


def wanted(run: Run, cfg: config_lib.RunConfig) -> Measured:
    """Returns the entry of a planned run in results.json, without losses."""
    shares = config_lib.shares({name: source.weight for name, source in cfg.data.sources.items()})
    return Measured(f"{run.arm}/seed{run.seed}", shares, {}, measured.cost_of(cfg))


def seed_of(name: str) -> str | None:
    """The seed at the end of the name of a run, if it has one."""
    _, mark, seed = name.rpartition("/seed")
    return seed if mark else None


def find_known(run: Measured, known: list[Measured]) -> Measured | None:
    """The known run with this mixture, cost and seed. A name without a seed is one of any.

    Raises UserError if a known run has the same name and another mixture.
    """
    check_names([run], known)
    seeds = (None, seed_of(run.name))
    return next((one for one in known if same(one, run) and seed_of(one.name) in seeds), None)


def check_names(runs: list[Measured], known: list[Measured]) -> None:
    """Raises UserError if a run and a known one have the same name, the same cost and different mixtures."""
    for run in runs:
        for one in known:
            if one.name == run.name and not same(one._replace(cost=run.cost), run):
                raise UserError(f"--known: its {one.name} is another mixture than that of --mixtures or --out; "
                                "rename it in --mixtures")  # fmt: skip


def check_finished(run: Run, cfg: config_lib.RunConfig) -> None:
    """Raises UserError if a finished run directory holds another mixture, cost or setting than it should."""
    if not run.done:
        return
    rule = f"{run.folder} is a finished run"
    held, plan = measured.read_run(run.folder, run.arm), wanted(run, cfg)
    if not same(held._replace(cost=plan.cost), plan):
        raise UserError(f"--out: {rule} of another mixture; name another folder")
    if not same(held, plan):
        cost = f"of another cost, {held.cost:.4g} FLOPs instead of {plan.cost:.4g}"
        raise UserError(f"--out: {rule} {cost}; name another folder")
    rest = lambda settings: {name: x for name, x in settings.items() if not name.endswith(".weight")}
    if others := records.unlike(rest(records.settings_in(run.folder)), rest(records.settings_of(cfg)), {}):
        raise UserError(f"--out: {rule} with {others[0]}; name another folder")


# --- results ---------------------------------------------------------------------------------------------------------


def load(out: Path) -> list[Measured]:
    """The finished runs of OUT/<mixture>/seed<n>."""
    folders = sorted(file.parent for file in out.glob("*/seed*/eval.json") if (file.parent / "config.json").is_file())
    return [measured.read_run(folder, folder.relative_to(out).as_posix()) for folder in folders]


def mean_loss(run: Measured) -> float:
    """The mean of the losses of all domains."""
    return float(np.mean(list(run.losses.values())))


def table(runs: list[Measured]) -> str:
    """Shares and held-out losses of every run, the lowest mean loss first."""
    sources, domains = list(runs[0].weights), list(runs[0].losses)
    head = ["mixture", *(f"share of {name}" for name in sources), "mean loss", *domains]
    rows = [[run.name, *(f"{run.weights[name]:.3f}" for name in sources), f"{mean_loss(run):.4f}",
             *(f"{run.losses[name]:.4f}" for name in domains)] for run in sorted(runs, key=mean_loss)]  # fmt: skip
    return f"{markdown(head, rows)}\n\nHeld-out loss in nats per token; the mean is that of the domains.\n"


def figure(runs: list[Measured]) -> Figure:
    """A figure with a panel for each domain: its loss against its share. Domains that are not sources have none."""
    names = [name for name in runs[0].weights if name in runs[0].losses] or list(runs[0].losses)[:1]
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    made = Figure((0.4 + 2.6 * columns, 0.5 + 2.3 * rows), layout="constrained")
    panels = made.subplots(rows, columns, squeeze=False).ravel()
    means = np.array([mean_loss(run) for run in runs])
    colours = matplotlib.colormaps["viridis"](0.9 * (means - means.min()) / max(float(np.ptp(means)), 1e-12))
    for axis, name in zip(panels, names, strict=False):
        shares = [run.weights.get(name, 0.0) for run in runs]
        axis.scatter(shares, [run.losses[name] for run in runs], c=colours, s=18, edgecolors="white", linewidths=0.4)
        axis.set_title(name, fontsize=9)
        style(axis, "share of training", "held-out loss")
    for axis in panels[len(names) :]:
        axis.set_visible(False)
    made.suptitle("Loss of each domain by its share; dark: low mean loss", fontsize=10)
    return made


def write(out: Path, runs: list[Measured], formats: Sequence[str]) -> None:
    """Writes results.json, table.md and the figure."""
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps([run._asdict() for run in runs], indent=1, allow_nan=False)
    write_text(out / "results.json", text + "\n")
    write_text(out / "table.md", table(runs))
    save(figure(runs), out / "mixtures", formats)


# --- command line ----------------------------------------------------------------------------------------------------


def parse() -> tuple[argparse.Namespace, dict[str, str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixtures", type=expanded, default=Path("mix.jsonl"), help="file of moe_jax.mixtures sample")
    parser.add_argument("--config", default=CONFIG, help=f"config file, by default {CONFIG}; --data is its argument")
    parser.add_argument("--seed", type=int, default=0, help="seed of all runs")
    parser.add_argument("--known", type=expanded, default=None, metavar="FILE", help="a results.json of finished runs")
    pool.add_flags(parser, "runs/mixtures")
    arguments = parser.parse_args()
    if arguments.seed < 0:
        parser.error(f"--seed={arguments.seed}: must be ≥ 0")
    if not (pool.REPO / arguments.config).is_file():
        parser.error(f"--config={arguments.config}: no such file")
    return arguments, pool.extra_fields(parser, arguments)


def run_missing(arguments: argparse.Namespace, extra: dict[str, str], known: list[Measured], out: Path) -> list:
    """Trains the runs that are neither finished nor known. Returns the jobs that failed."""
    folder = str(Path(arguments.data).resolve())
    mixtures = design.read(arguments.mixtures)
    sources = list(pool.load_config(arguments.config, folder, extra).data.sources)
    check_sources(mixtures, sources)
    runs = planned(mixtures, sources, out, arguments.seed, extra)
    configs = {run.arm: pool.load_config(arguments.config, folder, run.overrides) for run in runs}
    for run in runs:
        check_finished(run, configs[run.arm])
    there = {run.arm: find_known(wanted(run, configs[run.arm]), known) for run in runs}
    for name, one in there.items():
        if one:
            print(f"{name}: not trained, known as {one.name}")
    runs = [run for run in runs if not there[run.arm]]
    if not runs:
        return []
    jax.config.update("jax_platforms", "cpu")  # of this process only
    pool.prepare(configs[runs[0].arm], out)
    pool.give_tokenizer(out, runs)
    jobs = [pool.training(run, arguments.config, folder) for run in runs]
    return pool.run_all(lambda: jobs, arguments.gpus, arguments.per_gpu)


def main() -> int:
    arguments, extra = parse()
    out, failed = arguments.out.resolve(), []
    try:
        known = measured.read_runs([arguments.known]) if arguments.known else []
        if not arguments.report_only:
            failed = run_missing(arguments, extra, known, out)
        finished = load(out)
        check_names(finished, known)
        again = lambda run: any(one.name == run.name and same(one, run) for one in finished)
        found = [run for run in known if not again(run)] + finished
        if found:
            measured.check_alike(found)
    except (*ONE_LINE, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if not found:
        print(f"error: {out} holds no finished run", file=sys.stderr)
        return 1
    write(out, found, arguments.figures)
    print((out / "table.md").read_text(encoding="utf-8"))
    return 1 if failed else 0


if __name__ == "__main__":
    terminal.replace_unprintable()
    sys.exit(main())
