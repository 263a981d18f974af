"""Trains one model with several routers and ways of balancing its experts, and compares them.

    python -m experiments.multi_domain_text data/domains --local=FOLDER
    python -m experiments.routing --data=data/domains --out=runs/routing --known=docs/routing_runs.json

Every arm is `configs/balance_scope.py` with the fields of `ARMS` changed. All arms use about the same FLOPs a token.
Runs with the same seed have the same batches. The text is tokenised once, and then each GPU trains `--per_gpu` runs at
a time; without a GPU they run one after the other. Run the same command to resume: finished runs are kept, and the
others start from their last checkpoint. `--known=FILE` names a results.json (docs/routing_runs.json has the published
runs), whose runs are compared with the others, and not run again, if they were trained as this call trains the arm;
what is left out is printed. The comparison is OUT/table.md, OUT/results.json, OUT/loads.png and
OUT/experts_by_domain.png. `--report_only` writes only these.
"""

import argparse
import functools
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax

from experiments import pool, records, routing_report
from experiments.pool import Run
from moe_jax import terminal

CONFIG = "configs/balance_scope.py"
load_config = functools.partial(pool.load_config, CONFIG)


class Arm(NamedTuple):
    label: str
    overrides: dict[str, Any]
    seeds: tuple[int, ...] = (0,)
    argument: str = ""  # see `pool.Run`


# Balance by a selection bias alone, in the form of DeepSeek-V3.
BIAS = {
    "loss.load_balance_coef": 0.0,
    "model.moe.selection_bias": "true",
    "model.moe.score": "sigmoid",
    "model.moe.renormalize": "true",
}
ARMS = {
    "global": Arm("global loss", {}),
    "sign": Arm("bias, sign", BIAS | {"loss.bias_update": "sign"}),
    "quantile": Arm("bias, quantile", BIAS | {"loss.bias_update": "quantile"}),
    # A width of D/8, as in ZAYA1. With 256 the router would cost a sixth of the experts' FLOPs.
    "mlp": Arm("global loss, MLP router", {"model.moe.router": "mlp", "model.moe.router_width": 64}),
    # At equal use of its 48 columns a token has 6 · 32/48 = 4 experts, which is the budget too.
    "identity": Arm(
        "bias, identity experts",
        BIAS
        | {
            "model.moe.identity_experts": 16,
            "model.moe.top_k": 6,
            "model.moe.expert_budget": 4.0,
            "loss.bias_update": "proportional",
            "loss.bias_update_rate": 0.5,  # a load 10 % off its target moves the bias by 0.001 a step, as "sign" does
        },
    ),
    # Mutual information of a token's domain and its expert in place of the global loss, with the same coefficient.
    "information": Arm("information of domains", {"loss.load_balance_coef": 0.0}, argument=",labels"),
    "routers": Arm(
        "the same, a router a domain, told the domain", {"loss.load_balance_coef": 0.0}, argument=",routers"
    ),
}
DEFAULTS = {"train.log_every": 1, "train.keep_checkpoints": 1, "sample.tokens": 0}


def planned(out: Path, names: list[str], extra: dict[str, str]) -> list[Run]:
    """Every arm with its first seed, then the other seeds, so that the finished runs can be compared at any time."""
    pairs = sorted(((seed, name) for name in names for seed in ARMS[name].seeds), key=lambda pair: pair[0])
    return [
        Run(
            name,
            seed,
            out / name / f"seed{seed}",
            DEFAULTS | extra | ARMS[name].overrides | {"seed": seed},
            ARMS[name].argument,
        )
        for seed, name in pairs
    ]


def call(folder: str, extra: dict[str, str]) -> pool.Call:
    """The settings that results must have to be compared in a call on this folder of text."""
    return pool.Call(CONFIG, folder, lambda fields: planned(Path(), list(ARMS), fields), extra)


# --- command line ----------------------------------------------------------------------------------------------------


def parse() -> tuple[argparse.Namespace, list[str], dict[str, str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    pool.add_arms(parser, ARMS)
    pool.add_flags(parser, "runs/routing")
    arguments = parser.parse_args()
    names = pool.chosen_arms(parser, arguments, ARMS)
    return arguments, names, pool.extra_fields(parser, arguments)


def main() -> int:
    arguments, names, extra = parse()
    out, failed = arguments.out.resolve(), []
    known = routing_report.read(arguments.known) if arguments.known else {}
    if not arguments.report_only:
        folder = str(Path(arguments.data).resolve())
        runs = planned(out, names, extra)
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
    there = routing_report.load(out, {name: arm.seeds for name, arm in ARMS.items()})
    finished = known | (there if arguments.report_only else asked.select(there, out))
    if not finished:
        print(f"error: {out} holds no finished run", file=sys.stderr)
        return 1
    if records.unequal(finished, lambda run: run.domains):
        return 2
    routing_report.write(out, finished, {name: arm.label for name, arm in ARMS.items()}, arguments.figures)
    print((out / "table.md").read_text(encoding="utf-8"))
    return 1 if failed else 0


if __name__ == "__main__":
    terminal.replace_unprintable()
    sys.exit(main())
