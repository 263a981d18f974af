"""Fine-tunes a dense model and its upcycled copies on answers: all weights, adapters, and with the router frozen.

    python -m moe_jax.hf import --from=SmolLM2-135M.gguf --workdir=runs/dense
    python -m experiments.finetuning --run=runs/dense --data=gsm8k_train.jsonl --out=runs/finetuning

Every arm of `ARMS` is trained by configs/finetune.py with its fields changed, at each of its learning rates. The
comparison is the held-out loss of an answer token: OUT/table.md, OUT/results.json and OUT/loss.png. Run the same
command to resume. `--report_only` writes only the comparison. `--known=FILE` names a results.json
(docs/finetuning_runs.json has the published runs), whose runs are compared with the others and are not run again, if
they were trained as this call trains; what is left out is printed. A run's checkpoints are deleted when it has
finished.
"""

import argparse
import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
from matplotlib.figure import Figure

from experiments import pool, records
from experiments.balance_report import markdown
from experiments.pool import Job, Run
from experiments.upcycling_report import style
from moe_jax import model, optim, terminal
from moe_jax.cli import expanded
from moe_jax.evaluate.drawing import save
from moe_jax.evaluate.held_out import TOTAL
from moe_jax.run import config_file
from moe_jax.run.log import read_eval, read_metrics, write_text
from moe_jax.tree import flatten

CONFIG = "configs/finetune.py"
COPIES = ("--expansion=8", "--granularity=1", "--top_k=2")
ADAPTERS = {"model.lora.rank": 16, "model.lora.alpha": 32}
ROUTER = {"optim.groups.router.freeze": "true"}


class Arm(NamedTuple):
    label: str
    options: tuple[str, ...] | None  # of `python -m moe_jax.upcycle`; None: the dense model
    overrides: dict[str, Any]
    rates: tuple[float, ...]  # peak learning rates


ALL, NARROW = (3e-5, 1e-4, 3e-4), (3e-4, 1e-3, 3e-3)
ARMS = {
    "dense": Arm("dense", None, {}, ALL),
    "dense_lora": Arm("dense, adapters of rank 16", None, ADAPTERS, NARROW),
    "copies": Arm("8 copies, 2 a token", COPIES, {}, ALL),
    "copies_router": Arm("8 copies, router frozen", COPIES, ROUTER, ALL),
    "copies_lora": Arm("8 copies, adapters of rank 16", COPIES, ADAPTERS, NARROW),
}
DEFAULTS = {"sample.tokens": 0, "train.keep_checkpoints": 1, "train.log_every": 5, "train.tensorboard": "false"}


def make_run(name: str, rate: float, out: Path, extra: dict[str, str]) -> Run:
    fields = DEFAULTS | {"optim.lr": rate} | ARMS[name].overrides | extra
    return Run(f"{name} at {rate:g}", 0, out / name / f"{rate:g}", fields)


def jobs(runs: dict[tuple[str, float], Run], dense: Path, data: str, out: Path) -> list[Job]:
    """The jobs that can be run now: upcycling first, then training, and the loss before it."""
    found, first = [], {}
    for (name, _), run in runs.items():
        source, options = dense, ARMS[name].options
        if options is not None:
            source = out / "weights" / "run"
            command = ["-m", "moe_jax.upcycle", f"--from={dense}", f"--workdir={source}", *options, "--nocheck"]
            upcycling = Job("copies", source.parent, command, "run/config.json")
            found += [] if upcycling in found else [upcycling]
        if (source / "config.json").is_file():
            found.append(pool.training(run, CONFIG, f"{source},{data}"))
        if not int(run.overrides.get("model.lora.rank", 0)):  # its weights are those of a model without adapters
            first.setdefault(options, run)
        if run.done and run is not first.get(options):
            shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)
    for run in first.values():
        if run.done:  # it deletes the checkpoints
            command = ["-m", "experiments.upcycling_measure", str(run.folder)]
            found.append(Job(f"loss before {run.arm}", run.folder, command, "measures.json"))
    return sorted(found, key=lambda job: job.product == "measures.json")


# --- comparison -------------------------------------------------------------------------------------------------------


def load_run(folder: Path) -> dict[str, Any]:
    """The numbers of a finished run: its held-out losses, in nats per answer token, parameters and answer tokens."""
    cfg = config_file.load_config(folder)
    shapes = flatten(model.abstract(cfg.model).shapes)
    frozen = optim.frozen_paths(cfg.optim, shapes)
    counts = model.count_parameters(cfg.model)
    rows = {row["domain"]: row for row in read_eval(folder)["domains"]}
    measures = folder / "measures.json"
    return {
        "loss": rows[TOTAL]["xent"],
        "before": json.loads(measures.read_text(encoding="utf-8"))["start"][TOTAL] if measures.is_file() else None,
        "curve": [[row["step"], row["xent"]] for row in read_metrics(folder, "eval")],
        "parameters": counts.total,
        "active": counts.active,
        "trained": sum(math.prod(x.shape) for path, x in shapes.items() if path not in frozen),
        "answer_tokens": read_metrics(folder)[-1]["tokens"],
        "settings": records.settings_in(folder),
    }


Results = dict[str, dict[str, dict[str, Any]]]  # by arm and learning rate


def load(out: Path) -> Results:
    """The finished runs of OUT/<arm>/<rate>."""
    folders = {name: {f"{rate:g}": out / name / f"{rate:g}" for rate in arm.rates} for name, arm in ARMS.items()}
    return {name: {rate: load_run(one) for rate, one in its.items() if (one / "eval.json").is_file()}
            for name, its in folders.items()}  # fmt: skip


def call(dense: Path, data: str, extra: dict[str, str]) -> pool.Call:
    """The settings that results must have to be compared in a call: those of the dense model, which has no router."""

    def plan(fields: dict[str, str]) -> list[Run]:
        runs = [make_run(name, rate, Path(), fields) for name, arm in ARMS.items() for rate in arm.rates]
        return [run._replace(overrides={n: x for n, x in run.overrides.items() if n not in ROUTER}) for run in runs]

    return pool.Call(CONFIG, f"{dense},{data}", plan, extra, compared=records.apart_from_weights)


def select(runs: Results, asked: pool.Call, source: str | Path) -> Results:
    """The runs that were trained as in this call. The others are printed."""
    flat = {(f"{name} at {float(rate):g}", 0): (name, rate, run) for name, its in runs.items()
            for rate, run in its.items()}  # fmt: skip
    records = {key: SimpleNamespace(settings=run.get("settings", {})) for key, (_, _, run) in flat.items()}
    found: Results = {}
    for key in asked.select(records, source):
        name, rate, run = flat[key]
        found.setdefault(name, {})[rate] = run
    return found


def joined(known: Results, new: Results) -> Results:
    """All runs, in the order of `ARMS`. Those that begin with the same weights have one loss before."""
    found = {}
    for name in ARMS:
        if runs := known.get(name, {}) | new.get(name, {}):
            found[name] = dict(sorted(runs.items(), key=lambda pair: float(pair[0])))
    before = {ARMS[name].options: run["before"] for name, runs in found.items() for run in runs.values()
              if run["before"] is not None}  # fmt: skip
    return {name: {rate: run | {"before": before.get(ARMS[name].options)} for rate, run in runs.items()}
            for name, runs in found.items()}  # fmt: skip


def lowest(run: dict[str, Any]) -> float:
    """The lowest held-out loss of a run's evaluations."""
    return min(loss for _, loss in run["curve"])


def best(runs: dict[str, dict[str, Any]]) -> str:
    """The learning rate with the lowest held-out loss."""
    return min(runs, key=lambda rate: lowest(runs[rate]))


def table(found: Results) -> str:
    rates = sorted({rate for runs in found.values() for rate in runs}, key=float)
    rows = []
    for name, runs in found.items():
        one, chosen = next(iter(runs.values())), best(runs)
        before = "" if one["before"] is None else f"{one['before']:.3f}"
        found_at = {rate: f"{lowest(run):.3f}" for rate, run in runs.items()} | {
            chosen: f"**{lowest(runs[chosen]):.3f}**"
        }
        losses = [f"{found_at[rate]} → {runs[rate]['loss']:.3f}" if rate in runs else "" for rate in rates]
        sizes = [f"{one[size] / 1e6:,.1f}M" for size in ("parameters", "active", "trained")]
        rows.append([ARMS[name].label, *sizes, before, *losses])
    tokens = max(run["answer_tokens"] for runs in found.values() for run in runs.values())
    head = ["", "parameters", "active", "trained", "before", *(f"lr {rate}" for rate in rates)]
    note = (
        "Held-out loss, nats per answer token: the lowest of the evaluations → at the end, after "
        f"{tokens / 1e6:.2f}M answer tokens. One seed each."
    )
    return f"{markdown(head, rows)}\n\n{note}\n"


def figure(found: Results) -> Figure:
    """A figure of the held-out loss in training, at the best learning rate of each arm, without the loss before it."""
    made = Figure((7.5, 3.8), layout="constrained")
    axis = made.subplots()
    for i, (name, runs) in enumerate(found.items()):
        rate = best(runs)
        line = "--" if ARMS[name].options is None else "-"
        label = f"{ARMS[name].label}, lr {rate}"
        curve = zip(*runs[rate]["curve"], strict=True)
        axis.plot(*curve, marker="o", ms=2.5, lw=1.3, color=f"C{i}", label=label, ls=line)
    style(axis, "step", "held-out loss, nats per answer token")
    axis.legend(frameon=False, fontsize=8)
    return made


# --- command line ----------------------------------------------------------------------------------------------------


def parse() -> tuple[argparse.Namespace, list[str], dict[str, str], Results]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=expanded, default=Path("runs/dense"), help="run directory of a dense model")
    pool.add_arms(parser, ARMS)
    pool.add_flags(parser, "runs/finetuning", "answers.jsonl")
    arguments = parser.parse_args()
    names = pool.chosen_arms(parser, arguments, ARMS)
    try:
        known = json.loads(arguments.known.read_text(encoding="utf-8")) if arguments.known else {}
    except (OSError, ValueError) as error:
        parser.error(f"--known={arguments.known}: cannot be read: {error}")
    return arguments, names, pool.extra_fields(parser, arguments), known


def main() -> int:
    arguments, names, extra, known = parse()
    out, dense, failed = arguments.out.resolve(), arguments.run.resolve(), []
    if not arguments.report_only:
        data = str(Path(arguments.data).resolve())
        if not (dense / "config.json").is_file():
            print(f"error: --run={arguments.run}: is not a run directory", file=sys.stderr)
            return 2
        asked = call(dense, data, extra)
        known = select(known, asked, "--known")
        runs = {
            (name, rate): make_run(name, rate, out, extra)
            for name in names
            for rate in ARMS[name].rates
            if f"{rate:g}" not in known.get(name, {})
        }
        # Checked on the dense model, which has no router.
        checked = [run._replace(overrides={name: value for name, value in run.overrides.items() if name not in ROUTER})
                   for run in runs.values()]  # fmt: skip
        if pool.checked_configs(CONFIG, f"{dense},{data}", checked) is None:
            return 2
        if asked.refuses(runs.values()):
            return 2
        jax.config.update("jax_platforms", "cpu")  # of this process only
        failed = pool.run_all(lambda: jobs(runs, dense, data, out), arguments.gpus, arguments.per_gpu)
    there = load(out)
    found = joined(known, there if arguments.report_only else select(there, asked, out))
    if not found:
        print(f"error: {out} holds no finished run", file=sys.stderr)
        return 1
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "table.md", table(found))
    write_text(out / "results.json", json.dumps(found, indent=1) + "\n")
    save(figure(found), out / "loss", arguments.figures)
    print((out / "table.md").read_text(encoding="utf-8"))
    return 1 if failed else 0


if __name__ == "__main__":
    terminal.replace_unprintable()
    sys.exit(main())
