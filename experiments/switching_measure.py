"""Switches off the experts most specific to each of some domains, and measures every domain's held-out loss.

    python -m experiments.switching_measure RUN_DIRECTORY --out=FOLDER --domains=python,cpp --batches=32

FOLDER/switching.json has the experts, and held-out losses by domain: of the whole model, without the experts most
specific to a domain, and without as many of the same layers that are drawn at random, three times. Experts are chosen
on training text.
"""

import argparse
import json
import sys
from pathlib import Path

import jax
import numpy as np

from experiments import records
from experiments.pruning_measure import count
from moe_jax import cli, config, data, terminal
from moe_jax.config import ModelConfig
from moe_jax.errors import UserError
from moe_jax.evaluate import contrast, held_out, switches
from moe_jax.parallel import sharding
from moe_jax.run import checkpoint, config_file, weights
from moe_jax.run.log import write_text
from moe_jax.train.state import abstract_weights

MOST, DRAWS = 10, 3


def against_the_rest(counts: list[np.ndarray], top_k: int, domains: tuple[str, ...], name: str) -> contrast.Contrast:
    """The contrast of one domain and all others together. counts: `[G, E]` of each layer."""
    own = domains.index(name)
    sides = [np.stack([layer[own], layer.sum(0) - layer[own]]) for layer in counts]
    tokens = sides[0].sum(1) / top_k
    frequency = [side / np.maximum(tokens, 1)[:, None] for side in sides]
    return contrast.Contrast((name, "the rest"), tuple(int(t) for t in tokens), frequency)


def at_random(off: list[switches.Expert], model: ModelConfig, seed: int) -> list[switches.Expert]:
    """As many experts of each layer as in `off`, but none of those."""
    rng, drawn = np.random.default_rng(seed), []
    for layer in sorted({layer for layer, _ in off}):
        its = {expert for at, expert in off if at == layer}
        others = [expert for expert in range(model.moe.num_experts) if expert not in its]
        drawn += [(layer, int(expert)) for expert in rng.choice(others, min(len(its), len(others)), replace=False)]
    return switches.first_valid(model, drawn, len(off))


def measure(folder: Path, names: list[str], batches: int) -> dict:
    cfg, shape = config.for_evaluation(config_file.load_config(folder), jax.device_count())
    mesh, model = sharding.make_mesh(shape), cfg.model
    corpus = data.prepare(cfg.data, workdir=folder, seed=cfg.seed, progress=False)
    with checkpoint.Checkpoints(folder) as checkpoints:
        number = checkpoints.latest()
    params, bias, _ = weights.load_weights(folder, *abstract_weights(model, mesh), step=number)
    counts = count(cfg, mesh, params, bias, corpus, batches)

    def losses(off: list[switches.Expert]) -> dict[str, float]:
        """Held-out losses by domain, in nats a token."""
        tables = switches.tables(model, off=off)
        result = held_out.evaluate(cfg, mesh, params, bias, corpus, progress=False, switches=tables)
        return {row["domain"]: row["xent"] for row in result.rows()}

    found = {
        "settings": records.settings_in(folder),
        "options": {"domains": names, "batches": batches},
        "steps": number,
        "whole": losses([]),
        "experts": {},
        "use": {},
        "off": {},
        "random": {},
    }
    for name in names:
        compared = against_the_rest(counts, model.moe.top_k, corpus.domains, name)
        rows = [row for row in contrast.ranked(compared) if row.difference > 0]
        off = switches.first_valid(model, [(row.layer, row.expert) for row in rows], MOST)
        found["experts"][name] = off
        found["use"][name] = [[row.first, row.second] for row in rows if (row.layer, row.expert) in off]
        found["off"][name] = losses(off)
        found["random"][name] = [losses(at_random(off, model, seed)) for seed in range(DRAWS)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--domains", required=True)
    parser.add_argument("--batches", type=int, default=32)
    arguments = parser.parse_args()
    cli.keep_compiled(data.cache_folder() / "compiled")  # each evaluation traces the same program again
    try:
        found = measure(arguments.folder, arguments.domains.split(","), arguments.batches)
    except UserError as error:
        sys.exit(f"error: {error}")
    write_text(arguments.out / "switching.json", json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    terminal.replace_unprintable()
    main()
