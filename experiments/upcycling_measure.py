"""Measures a finished run of `experiments/upcycling.py`: held-out loss before its first step, similarity of experts.

    python -m experiments.upcycling_measure RUN_DIRECTORY [--keep]

It writes measures.json into the run directory, and then deletes the run's checkpoints unless `--keep` is set.
"""

import dataclasses
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from experiments.upcycling_report import costs
from moe_jax import config, data, terminal
from moe_jax.config import RunConfig
from moe_jax.config.layers import Place
from moe_jax.evaluate import held_out, spectra
from moe_jax.parallel import sharding
from moe_jax.run import checkpoint, config_file, weights
from moe_jax.train.state import abstract_weights


def granularity(origin: list[dict]) -> int:
    """The granularity G of the virtual groups with which the weights were made; 1 without any."""
    chains = [event["chain"] for event in origin if event.get("event") == "upcycle"]
    return next((t["granularity"] for chain in chains for t in chain if t["transform"] == "VirtualGroups"), 1)


def similarity(params: dict, places: Sequence[Place], origin: list[dict]) -> dict[str, list[float]]:
    """The similarity of experts, `{"expert gate": by layer, …}`; {} for a dense model."""
    g = granularity(origin)
    found = {kind: x for kind, x in spectra.matrices(params, places).items() if kind.startswith("expert ")}
    return {kind: spectra.expert_similarity(x, g).tolist() for kind, x in found.items()}


def measure(folder: Path) -> dict:
    run: RunConfig = config_file.load_config(folder)
    cfg = dataclasses.replace(run, model=run.model.base)  # adapters are merged
    device = jax.devices()[0]
    mesh = sharding.make_mesh(config.check_devices(cfg, jax.device_count(), device.platform, device.device_kind))
    abstract = abstract_weights(cfg.model, mesh)
    params, bias, origin = weights.load_weights(cfg.init_from, *abstract, cast=True)
    corpus = data.prepare(cfg.data, workdir=folder, seed=cfg.seed, progress=False)
    result = held_out.evaluate(cfg, mesh, params, bias, corpus, limit=cfg.train.eval_batches, progress=False)
    alike = {0: similarity(params, cfg.model.places, origin)}
    del params
    with checkpoint.Checkpoints(folder) as checkpoints:
        steps = checkpoints.steps()
    for n in steps:
        alike[n] = similarity(weights.load_weights(folder, *abstract, step=n)[0], cfg.model.places, origin)
    return {
        "start": {row["domain"]: row["xent"] for row in result.rows()},
        "similarity": alike,
        "origin": origin,
    } | costs(run)


def main() -> None:
    folder = Path(sys.argv[1])
    (folder / "measures.json").write_text(json.dumps(measure(folder), indent=1) + "\n", encoding="utf-8")
    if "--keep" not in sys.argv[2:]:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)


if __name__ == "__main__":
    terminal.replace_unprintable()
    main()
