"""Trains four models of equal FLOPs a token on text and images as tokens, and compares their losses by modality.

    python -m experiments.multi_domain_text data/domains --local=FOLDER
    python -m experiments.image_tokens data/images --text=data/domains
    python -m experiments.modalities --data=data/domains,data/images --out=runs/modalities

Every arm is `configs/modalities.py` with the fields of `ARMS` changed: a dense model; a plain mixture of experts; one
with groups (MoMa, arXiv:2407.21770), in which a token chooses among experts of its modality; Mixture-of-Transformers
(arXiv:2411.04996), in which a modality has feed-forward layers, attention projections and norms of its own. A token
uses feed-forward layers of the same width in all of them. Runs with the same seed have the same batches. The text is
tokenised once, and then each GPU trains `--per_gpu` runs at a time. Run the same command to resume. `--known=FILE`
names a results.json, whose runs are compared with the others and not run again if they had the same configuration; what
is left out is printed. The comparison is OUT/table.md, OUT/results.json and OUT/modalities.png: held-out loss of text
and of images against steps and against seconds. `--report_only` writes only these.

A row of a batch is of one source, so no row has both text and images, and attention never sees both:
Mixture-of-Transformers is here two networks that share the embedding, the last norm and the head. An image has 401
tokens and a row 512: rows begin anywhere, so about 39 % of the image tokens, trained on and held out, are predicted
without the upper part of their image in view, in all arms alike. `--set` changes what all arms share; fields of `ARMS`
stay.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax

from experiments import modalities_report, pool, records
from experiments.pool import Run
from moe_jax import config as config_lib
from moe_jax import terminal
from moe_jax.model.counts import flops_per_token
from moe_jax.run.log import write_text

CONFIG = "configs/modalities.py"


class Arm(NamedTuple):
    label: str
    overrides: dict[str, Any]
    argument: str = ""  # see `pool.Run`


UNBALANCED = {"loss.load_balance_coef": 0.0, "loss.router_z_coef": 0.0}  # nothing chooses experts
LABELS = ",labels"
ARMS = {
    "dense": Arm("dense", UNBALANCED | {"model.num_dense_layers": 8, "model.d_ff": 1024}),
    "mixture": Arm("plain mixture", {}),
    # A token chooses its experts: with MoMa's expert choice the loss would not be that of a causal model.
    "groups": Arm("groups of experts", {"model.moe.label_groups": 2}, LABELS),
    "untied": Arm(
        "Mixture-of-Transformers",
        UNBALANCED
        | {
            "model.layers": "8*table",
            "model.moe.table": "label",
            "model.moe.num_experts": 2,
            "model.moe.top_k": 1,
            "model.moe.d_expert": 1024,
            "model.moe.combine": "one",
            "model.untie": 2,
        },
        LABELS,
    ),
}
SEEDS = (0,)
SAME_FLOPS = 0.01  # by which arms may differ
MAX_EPOCHS = 5  # of the images
DEFAULTS = {"train.log_every": 1, "train.keep_checkpoints": 1, "sample.tokens": 0}


def planned(out: Path, names: list[str], extra: dict[str, str]) -> list[Run]:
    """A run for each arm and seed."""
    made = []
    for seed in SEEDS:
        for name in names:
            fields = DEFAULTS | extra | ARMS[name].overrides | {"seed": seed}
            made.append(Run(name, seed, out / name / f"seed{seed}", fields, ARMS[name].argument))
    return made


def mistake(configs: dict[str, config_lib.RunConfig], tokens: int) -> str:
    """Why these configs by arm are no comparison, "" if they are. tokens: of images that are trained on."""
    flops = {name: flops_per_token(cfg.model, cfg.data.seq_len) for name, cfg in configs.items()}
    most, least = max(flops, key=flops.get), min(flops, key=flops.get)
    if flops[most] > (1 + SAME_FLOPS) * flops[least]:
        return (f"{ARMS[most].label} would take {flops[most] / flops[least]:.2f} times the FLOPs a token of "
                f"{ARMS[least].label}; --set changes what all arms share, not what makes them equal")  # fmt: skip
    for cfg in configs.values():
        share = config_lib.shares({name: source.weight for name, source in cfg.data.sources.items()})["images"]
        epochs = share * cfg.train.steps * cfg.data.batch_size * cfg.data.seq_len / tokens
        if epochs > MAX_EPOCHS:
            return f"images would be read {epochs:.1f} times; must be ≤ {MAX_EPOCHS}: fewer steps, or a smaller weight"
    return ""


def call(folders: str, extra: dict[str, str]) -> pool.Call:
    """The settings that results must have to be compared in a call on these folders, the digest of the images too."""
    options = {"data": images_of(folders).get("train_sha256")}
    return pool.Call(CONFIG, folders, lambda fields: planned(Path(), list(ARMS), fields), extra, options)


def images_of(folders: str) -> dict[str, Any]:
    """The record that `experiments.image_tokens` makes of its images."""
    return json.loads((Path(folders.split(",")[1]) / "sources.json").read_text(encoding="utf-8"))


def of_other_images(runs: list[Run], options: dict[str, Any]) -> str:
    """Why a run that was begun does not go on with these images; "" if each does. The others are marked with them."""
    for run in runs:
        begun, why = run.folder / "config.json", records.unlike_options(modalities_report.images(run.folder), options)
        if begun.is_file() and why:
            return f"--out: {run.folder} is a run on other images: {why[0]}; name another folder"
    for run in runs:
        run.folder.mkdir(parents=True, exist_ok=True)
        write_text(run.folder / modalities_report.MARK, json.dumps(options) + "\n")
    return ""


def parse() -> tuple[argparse.Namespace, list[str], dict[str, str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    pool.add_arms(parser, ARMS)
    pool.add_flags(parser, "runs/modalities", "data/domains,data/images")
    arguments = parser.parse_args()
    names = pool.chosen_arms(parser, arguments, ARMS)
    return arguments, names, pool.extra_fields(parser, arguments)


def main() -> int:
    arguments, names, extra = parse()
    out, failed = arguments.out.resolve(), []
    known = modalities_report.read(arguments.known) if arguments.known else {}
    if not arguments.report_only:
        folders = ",".join(str(Path(one).expanduser().resolve()) for one in arguments.data.split(","))
        runs = planned(out, names, extra)
        configs = pool.checked_configs(CONFIG, folders, runs)
        if configs is None:
            return 2
        if why := mistake(configs, images_of(folders)["tokens"]):
            print(f"error: {why}", file=sys.stderr)
            return 2
        asked = call(folders, extra)
        known = asked.select(known, "--known")
        runs = [run for run in runs if (run.arm, run.seed) not in known]
        if asked.refuses(runs):
            return 2
        if why := of_other_images(runs, asked.options):
            print(f"error: {why}", file=sys.stderr)
            return 2
        if runs:  # else all of it is known
            jax.config.update("jax_platforms", "cpu")  # of this process only
            pool.prepare(configs[runs[0].arm], out)
            pool.give_tokenizer(out, runs)
            jobs = [pool.training(run, CONFIG, folders) for run in runs]
            failed = pool.run_all(lambda: jobs, arguments.gpus, arguments.per_gpu)
    there = modalities_report.load(out, list(ARMS), SEEDS)
    finished = known | (there if arguments.report_only else asked.select(there, out))
    if not finished:
        print(f"error: {out} holds no finished run", file=sys.stderr)
        return 1
    if records.unequal(finished, lambda run: run.domains):
        return 2
    modalities_report.write(out, finished, {name: arm.label for name, arm in ARMS.items()}, arguments.figures)
    print((out / "table.md").read_text(encoding="utf-8"))
    return 1 if failed else 0


if __name__ == "__main__":
    terminal.replace_unprintable()
    sys.exit(main())
