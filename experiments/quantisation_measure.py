"""Rounds the weights of a finished run in many ways, and measures the held-out loss of each by domain.

    python -m experiments.quantisation_measure RUN_DIRECTORY --to=FOLDER --bits=2,2.5,3,4 --seeds=3

FOLDER/quantised.json has a row for every way of `ways`, and the loss of the model as it is. Ways that are done are kept
in FOLDER/quantised.rowsN.groupN.part.json, from which the same command goes on.
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments import records
from moe_jax import cli, config, data, terminal
from moe_jax.errors import UserError
from moe_jax.evaluate import held_out
from moe_jax.parallel import sharding
from moe_jax.quant import LayerStats, Settings, measured, rounded
from moe_jax.quant.calibrate import calibration_rows
from moe_jax.run import checkpoint, config_file, weights
from moe_jax.run.log import write_text
from moe_jax.train import step
from moe_jax.train.state import abstract_weights

PRODUCT = "quantised.json"
PART = "quantised.rows{rows}.group{group}.part.json"
ALLOCATIONS = ("uniform", "turns", "frequency", "mc")
MEASURED = (1, 2, 3, 4, 5)  # bits that experts are measured at, for all means at once


class Way(NamedTuple):
    """One way to round."""

    method: str
    bits: float
    allocate: str  # one of ALLOCATIONS; "turns" takes both neighbours of the mean, whatever the experts do
    seed: int  # of calibration

    @property
    def choices(self) -> tuple[int, ...]:
        """Three numbers of bits around the mean: 1, 2, 3 for 2 and 2.5, as MC-MoE has them; of "turns" the neighbours,
        which are those of "frequency": half of the experts have one bit less than a whole mean, half have one more."""
        middle = max(int(self.bits), 2)
        if self.allocate == "turns":
            return (middle - 1, middle + 1) if self.bits == middle else (middle, middle + 1)
        return (middle - 1, middle, middle + 1)

    def settings(self, group: int, rows: int) -> Settings:
        choices = () if self.allocate == "uniform" else self.choices
        return Settings(self.method, self.bits, choices, self.allocate, group=group, rows=rows, seed=self.seed)


def ways(bits: list[float], seeds: int) -> list[Way]:
    """All that is measured: GPTQ with several seeds of calibration near three bits, else one; rounding to nearest once.

    A mean that is no whole number has no "uniform". Ways with one seed and method follow each other, since they share
    what is measured.
    """
    pairs = [(b, allocate) for b in bits for allocate in ALLOCATIONS if allocate != "uniform" or b == int(b)]
    found = [Way("gptq", b, a, seed) for seed in range(seeds) for b, a in pairs if seed == 0 or 2 < b <= 3]
    return found + [Way("rtn", b, a, 0) for b, a in pairs]


def renamed(row: dict[str, Any]) -> dict[str, Any]:
    """A row of results, with the name of today: earlier ones call "uniform" what is by turns at means like 2.5."""
    earlier = row["allocate"] == "uniform" and row["bits"] != int(row["bits"])
    return row | {"allocate": "turns"} if earlier else row


def of_choices(stats: list[LayerStats], choices: tuple[int, ...]) -> list[LayerStats]:
    """The statistics with the losses at these bits alone."""
    columns = [MEASURED.index(b) for b in choices]
    return [one._replace(loss=one.loss[:, columns]) for one in stats]


def measure(folder: Path, to: Path, bits: list[float], seeds: int, rows: int, group: int) -> dict[str, Any]:
    cfg, shape = config.for_evaluation(config_file.load_config(folder), jax.device_count())
    mesh = sharding.make_mesh(shape)
    corpus = data.prepare(cfg.data, workdir=folder, seed=cfg.seed, progress=False)
    with checkpoint.Checkpoints(folder) as checkpoints:
        number = checkpoints.latest()
    params, bias, _ = weights.load_weights(folder, *abstract_weights(cfg.model, mesh), step=number)
    run = step.make_eval_step(cfg, mesh, len(corpus.domains))
    fresh = lambda: jax.tree.map(jnp.copy, params)  # rounding uses them up

    def losses(params) -> dict[str, float]:
        found = held_out.evaluate(cfg, mesh, params, bias, corpus, progress=False, run=run)
        return {row["domain"]: row["xent"] for row in found.rows()}

    file = to / PART.format(rows=rows, group=group)
    facts = {"settings": records.settings_in(folder), "options": {"rows": rows, "group": group, "step": number}}
    body = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if {name: body.get(name) for name in facts} != facts:  # of another training, or the first time
        body = facts | {"whole": losses(params), "ways": []}
    body["ways"] = [renamed(row) for row in body["ways"]]
    done = {Way(**{name: row[name] for name in Way._fields}) for row in body["ways"]}
    text: dict[int, dict] = {}
    known: tuple[tuple[str, int] | None, list[LayerStats]] = (None, [])
    for way in ways(bits, seeds):
        if way in done:
            continue
        began = time.monotonic()
        if way.seed not in text:
            text[way.seed] = calibration_rows(cfg, folder, rows, way.seed)[0]
        settings, key = way.settings(group, rows), (way.method, way.seed)
        stats = None
        if settings.allocate not in ("uniform", "turns"):
            if known[0] != key:
                every = dataclasses.replace(settings, choices=MEASURED)
                known = key, measured(cfg.model, mesh, fresh(), bias, text[way.seed], every)[1]
            stats = of_choices(known[1], way.choices)
        made, report = rounded(cfg.model, mesh, fresh(), bias, text[way.seed], settings, stats=stats)
        sizes = report.sizes()
        row = way._asdict() | {
            "losses": losses(made), "experts_bits": sizes["experts"]["bits"],
            "packed_bits": sizes["experts"]["packed_bits"], "file_bytes": sizes["file"]["packed_bytes"],
            "nearest": len(report.unused()), "seconds": round(time.monotonic() - began, 1),
        }  # fmt: skip
        body["ways"].append(row)
        write_text(file, json.dumps(body) + "\n")
        print(f"{way}: {row['losses'][held_out.TOTAL]:.4f} nats, {row['seconds']} s", flush=True)
    return body


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--bits", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--group", type=int, default=128)
    arguments = parser.parse_args()
    arguments.to.mkdir(parents=True, exist_ok=True)
    bits = [float(b) for b in arguments.bits.split(",")]
    cli.keep_compiled(data.cache_folder() / "compiled")  # the other model has the same programs
    try:
        found = measure(arguments.folder, arguments.to, bits, arguments.seeds, arguments.rows, arguments.group)
    except (UserError, ValueError) as error:
        sys.exit(f"error: {error}")
    write_text(arguments.to / PRODUCT, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    terminal.replace_unprintable()
    main()
