"""Continues the training of one dense model in several ways, dense or upcycled, on the same text and tokens.

    python -m moe_jax.hf import --from=SmolLM2-135M.gguf --workdir=runs/dense
    python -m experiments.multi_domain_text data/domains --local=FOLDER
    python -m experiments.upcycling --run=runs/dense --data=data/domains --out=runs/upcycling

Every arm of `ARMS` is made by `python -m moe_jax.upcycle` with its options, and then trained by `configs/continued.py`
with its fields changed. Runs with the same seed have the same batches; the seed also decides the new routers. The
comparison shows held-out loss before the first step, against tokens and against FLOPs, and the similarity of a layer's
experts over time: OUT/table.md, OUT/results.json, OUT/loss.png and OUT/similarity.png. Run the same command to resume.
`--only` and `--seeds` choose runs. `--report_only` writes only the comparison, of the arms of `--only`. `--known=FILE`
names a results.json (docs/upcycling_runs.json has the published runs), whose runs are compared with the others if they
were trained as this call trains; what is left out is printed. Those whose experts were measured are not run again. A
run's checkpoints are deleted after its experts are measured, unless you set `--keep`: an arm of 64 experts has 8 GB a
checkpoint.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from experiments import pool, records, upcycling_report
from experiments.pool import Job, Run
from experiments.upcycling_report import Finished
from moe_jax import terminal
from moe_jax.cli import expanded

CONFIG = "configs/continued.py"
STEPS, BATCH = 600, 128
PEAK, LOWEST = 3e-4, 3e-5  # learning rate: risen again, and the least of its schedule
CHECKPOINTS = 4  # of a run, for the experts' similarity

E8G1T1 = ("--expansion=8", "--granularity=1", "--top_k=1")
E8G1T2 = ("--expansion=8", "--granularity=1", "--top_k=2")
E8G8T8 = ("--expansion=8", "--granularity=8", "--top_k=8")
TERNARY = ("--expert_weights=ternary", "--expert_inputs=int8")
E8G8T16 = ("--expansion=8", "--granularity=8", "--top_k=16")
SHARDS, SHARES = "--choice=shards", "--combine=share"
CONSTANT = {"optim.schedule": "constant", "optim.lr": LOWEST, "optim.warmup_steps": 0}
MUON = {"optim.name": "muon"}
ROUTER = "optim.groups.router."  # fields that a dense model does not have


class Arm(NamedTuple):
    label: str
    options: tuple[str, ...] | None  # of `python -m moe_jax.upcycle`; None: the dense model
    overrides: dict[str, Any]
    seeds: tuple[int, ...] = (0,)
    late_router: float = 0.0  # share of the steps in which the router stays as it is


SEEDS = (0, 1, 2)  # of the arms that the others are compared with
ARMS = {
    "dense": Arm("dense", None, {}, SEEDS),
    "copy": Arm("copies, E8G1T2", E8G1T2, {}, SEEDS),
    "exact": Arm("virtual groups, E8G8T8", E8G8T8, {}, SEEDS),
    "paper": Arm("… scale of the paper", (*E8G8T8, "--scale=paper"), {}, SEEDS),
    "large_router": Arm("… router ten times as large", (*E8G8T8, "--router_std=0.2"), {}),
    "unscaled": Arm("… no scale", (*E8G8T8, "--scale=none"), {}),
    "softmax_topk": Arm("… softmax, then top-k", (*E8G8T8, "--score_order=score_topk"), {}),
    "softmax_topk_small": Arm(
        "… softmax, then top-k, small router", (*E8G8T8, "--score_order=score_topk", "--router_std=0.0005"), {}
    ),
    "drop": Arm("copies, Drop-Upcycling 0.5", (*E8G1T2, "--drop=0.5"), {}),
    # Eight ternary matrices take as many bytes, packed, as one in bfloat16: as many as the dense model's. `single` is
    # the same model in bfloat16.
    "ternary": Arm("ternary copies, E8G1T1", (*E8G1T1, *TERNARY), {}),
    "ternary_two": Arm("ternary copies, E8G1T2", (*E8G1T2, *TERNARY), {}),
    "dense_muon": Arm("dense, Muon", None, MUON),
    "exact_muon": Arm("virtual groups, Muon", E8G8T8, MUON),
    "dense_constant": Arm("dense, constant lowest rate", None, CONSTANT),
    "exact_constant": Arm("virtual groups, constant lowest rate", E8G8T8, CONSTANT),
    # These keep shards complete, always or for longer. E8G1T1 uses as many weights a token as E8G8T8.
    "single": Arm("copies, E8G1T1", E8G1T1, {}),
    "shards": Arm("choice from every shard", (*E8G8T8, SHARDS), {}),
    "shards_shares": Arm("… equal weights", (*E8G8T8, SHARDS, SHARES), {}),
    "shards_large_router": Arm("… router ten times as large", (*E8G8T8, SHARDS, "--router_std=0.2"), {}),
    "shards_two": Arm("choice from every shard, shares, E8G8T16", (*E8G8T16, SHARDS, SHARES), {}),
    "slow_router": Arm("virtual groups, a tenth of the rate for the router", E8G8T8, {"optim.groups.router.lr": 0.1}),
    "late_router": Arm("virtual groups, router frozen for a third", E8G8T8, {}, late_router=1 / 3),
}

DEFAULTS = {
    "data.batch_size": BATCH,
    "optim.lr": PEAK,
    "optim.final_lr_fraction": LOWEST / PEAK,
    "optim.warmup_steps": 20,
    "sample.tokens": 0,
    "train.keep_checkpoints": CHECKPOINTS,
    "train.log_every": 5,
    "train.steps": STEPS,
    "train.tensorboard": "false",
}


def weights_of(name: str, seed: int, run: Path, out: Path) -> Path:
    """The run directory from which an arm starts, which may not exist yet."""
    made = "_".join((*(ARMS[name].options or ()), f"seed{seed}")).replace("--", "")
    return run if ARMS[name].options is None else out / "weights" / made


def make_run(name: str, seed: int, out: Path, extra: dict[str, str]) -> Run:
    steps = int(extra.get("train.steps", STEPS))
    times = {"train.eval_every": max(1, steps // 12), "train.checkpoint_every": max(1, steps // CHECKPOINTS)}
    late = {"optim.groups.router.start": round(ARMS[name].late_router * steps)} if ARMS[name].late_router else {}
    fields = DEFAULTS | times | extra | ARMS[name].overrides | late | {"seed": seed}
    return Run(name, seed, out / name / f"seed{seed}", fields)


def planned(names: list[str], out: Path, extra: dict[str, str], seeds: Sequence[int] = ()) -> list[Run]:
    """Every arm with its first seed, then the other seeds, so that the finished runs can be compared at any time.

    seeds: of every arm; (): those of `ARMS`.
    """
    pairs = sorted(((seed, name) for name in names for seed in seeds or ARMS[name].seeds), key=lambda pair: pair[0])
    return [make_run(name, seed, out, extra) for seed, name in pairs]


def call(dense: Path, data: str, on_dense: Callable[[list[Run]], list[Run]], extra: dict[str, str]) -> pool.Call:
    """The settings that results must have to be compared in a call.

    on_dense: leaves out what a dense model's config does not have.
    """
    plan = lambda fields: on_dense(planned(list(ARMS), Path(), fields))
    return pool.Call(CONFIG, f"{dense},{data}", plan, extra, compared=records.apart_from_weights)


def is_measured(run: Finished | None) -> bool:
    return run is not None and len(run.similarity) > 0


def jobs(runs: list[Run], dense: Path, data: str, out: Path, keep: bool) -> list[Job]:
    """The jobs that can be run now. Measurements come first, since their checkpoints are large."""
    measure, rest = [], []
    for run in runs:
        options, source = ARMS[run.arm].options, weights_of(run.arm, run.seed, dense, out)
        if options is not None:  # into a folder inside the job's, which is new or complete
            command = ["-m", "moe_jax.upcycle", f"--from={dense}", f"--workdir={source / 'run'}", *options]
            command += [f"--seed={run.seed}", "--nocheck"]  # the loss before training says as much
            job = Job(f"weights of {run.arm}, seed {run.seed}", source, command, "run/config.json")
            rest += [job] if job.folder not in {other.folder for other in rest} else []
            source /= "run"
        if (source / "config.json").is_file():
            rest.append(pool.training(run, CONFIG, f"{source},{data}"))
        if run.done:
            command = ["-m", "experiments.upcycling_measure", str(run.folder), *(["--keep"] if keep else [])]
            measure.append(Job(f"measures of {run.arm}, seed {run.seed}", run.folder, command, "measures.json"))
    return [*measure, *rest]


# --- command line ----------------------------------------------------------------------------------------------------


def _seeds(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def parse() -> tuple[argparse.Namespace, list[str], dict[str, str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=expanded, default=Path("runs/dense"), help="run directory of a dense model")
    pool.add_arms(parser, ARMS)
    parser.add_argument("--seeds", type=_seeds, default=(), help="seeds of every arm; default: one, or three of some")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints")
    pool.add_flags(parser, "runs/upcycling")
    arguments = parser.parse_args()
    names = pool.chosen_arms(parser, arguments, ARMS)
    return arguments, names, pool.extra_fields(parser, arguments)


def main() -> int:
    arguments, names, extra = parse()
    out, dense, failed = arguments.out.resolve(), arguments.run.resolve(), []
    known = upcycling_report.read(arguments.known) if arguments.known else {}
    if not arguments.report_only:
        data = str(Path(arguments.data).resolve())
        if not (dense / "config.json").is_file():
            print(f"error: --run={arguments.run}: is not a run directory", file=sys.stderr)
            return 2
        runs = planned(names, out, extra, arguments.seeds)
        # Fields do not depend on the arm's weights, but for the router's, so those of the dense model show mistakes.
        of_all = lambda fields: {n: x for n, x in fields.items() if not n.startswith(ROUTER)}
        on_dense = lambda runs: [run._replace(overrides=of_all(run.overrides)) for run in runs]
        configs = pool.checked_configs(CONFIG, f"{dense},{data}", on_dense(runs))
        if configs is None:
            return 2
        asked = call(dense, data, on_dense, extra)
        known = asked.select(known, "--known")
        runs = [run for run in runs if not is_measured(known.get((run.arm, run.seed)))]
        if asked.refuses(runs):
            return 2
        if runs:  # else all of it is known
            jax.config.update("jax_platforms", "cpu")  # of this process only
            pool.prepare(next(iter(configs.values())), out)
            plan = lambda: jobs(runs, dense, data, out, arguments.keep)
            failed = pool.run_all(plan, arguments.gpus, arguments.per_gpu)
    there = upcycling_report.load(out)
    if arguments.report_only:
        finished = {run: found for run, found in (known | there).items() if run[0] in names}
    else:
        finished = known | asked.select(there, out)
    arms = upcycling_report.arms_of(finished, {name: arm.label for name, arm in ARMS.items()})
    if not arms:
        print(f"error: {out} holds no finished run", file=sys.stderr)
        return 1
    if upcycling_report.unequal(finished):
        return 2
    out.mkdir(parents=True, exist_ok=True)
    upcycling_report.write(out, arms, arguments.figures)
    print((out / "table.md").read_text(encoding="utf-8"))
    return 1 if failed else 0


if __name__ == "__main__":
    terminal.replace_unprintable()
    sys.exit(main())
