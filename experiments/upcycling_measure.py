"""Measures a finished run of `experiments/upcycling.py`: held-out loss before its first step, and of its checkpoints
how similar experts are and whether tokens choose complete sets of shards.

    python -m experiments.upcycling_measure RUN_DIRECTORY [--keep]

It writes measures.json into the run directory, and then deletes the run's checkpoints unless `--keep` is set.
"""

import dataclasses
import functools
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from experiments.upcycling_report import costs
from moe_jax import config, data, terminal
from moe_jax.config import RunConfig
from moe_jax.config.layers import Place
from moe_jax.evaluate import held_out, spectra
from moe_jax.moe.stats import ChoiceSums, RouterStats, by_depth
from moe_jax.parallel import sharding
from moe_jax.run import checkpoint, config_file, weights
from moe_jax.run.log import write_text
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


def unevenness(
    router: dict[str, RouterStats], choices: dict[str, ChoiceSums], places: Sequence[Place], top_k: int, g: int
) -> list[float]:
    """The variance of how often a token has a shard, by layer: 0 if every token has every shard K/G times.

    Expert e is shard e mod g. The variance is about K/G, the mean over tokens and shards of (n − K/G)². Σ n² over
    tokens is the sum of the pairs of choices in the shard, so that it is exact.
    """
    found = []
    for stats, sums in zip(by_depth(places, router), by_depth(places, choices), strict=True):
        tokens, pairs = np.sum(stats.tokens, dtype=np.float64), np.asarray(sums.pairs, np.float64)
        shard = np.arange(len(pairs)) % g
        chosen = np.bincount(shard, np.diagonal(pairs), g)
        squares = sum(pairs[np.ix_(shard == i, shard == i)].sum() for i in range(g))
        found.append(float((squares - 2 * top_k / g * chosen.sum()) / (g * tokens) + (top_k / g) ** 2))
    return found


def measure(folder: Path) -> dict:
    run: RunConfig = config_file.load_config(folder)
    cfg = dataclasses.replace(run, model=run.model.base)  # adapters are merged
    device = jax.devices()[0]
    mesh = sharding.make_mesh(config.check_devices(cfg, jax.device_count(), device.platform, device.device_kind))
    abstract = abstract_weights(cfg.model, mesh)
    corpus = data.prepare(cfg.data, workdir=folder, seed=cfg.seed, progress=False)
    params, bias, origin = weights.load_weights(cfg.init_from, *abstract, cast=True)
    g, places = granularity(origin), cfg.model.places
    evaluate = functools.partial(held_out.evaluate, cfg, mesh, corpus=corpus, progress=False, record=g > 1)
    uneven = lambda found: unevenness(found.router, found.choices, places, cfg.model.moe.top_k, g) if g > 1 else []
    result = evaluate(params, bias, limit=cfg.train.eval_batches)
    alike, shards = {0: similarity(params, places, origin)}, {0: uneven(result)}
    del params
    with checkpoint.Checkpoints(folder) as checkpoints:
        steps = checkpoints.steps()
    for n in steps:
        params, bias, _ = weights.load_weights(folder, *abstract, step=n)
        alike[n] = similarity(params, places, origin)
        if g > 1:
            shards[n] = uneven(evaluate(params, bias, limit=cfg.train.eval_batches))
        del params
    return {
        "start": {row["domain"]: row["xent"] for row in result.rows()},
        "similarity": alike,
        "unevenness": shards if g > 1 else {},
        "origin": origin,
    } | costs(run)


def main() -> None:
    folder = Path(sys.argv[1])
    write_text(folder / "measures.json", json.dumps(measure(folder), indent=1) + "\n")
    if "--keep" not in sys.argv[2:]:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)


if __name__ == "__main__":
    terminal.replace_unprintable()
    main()
