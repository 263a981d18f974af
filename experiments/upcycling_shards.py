"""Trains an upcycled model and counts, in every step, how often each token chooses each shard of the dense layer.

    python -m experiments.upcycling_shards --run=OUT/weights/…/run --data=data/domains --out=shards.json --steps=1000

--run is a run directory of weights that `python -m moe_jax.upcycle` has made. They are trained as by
`configs/continued.py`, in this program and without checkpoints. Before each update the choices of the step's batch are
counted. FILE gets, for each step, the variance of how often a token has a shard (`upcycling_measure.unevenness`): the
mean and the largest over layers, and the number of layers in which every token has every shard K/G times.
"""

import argparse
import json
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from experiments import pool
from experiments.upcycling_measure import granularity, unevenness
from moe_jax import config, data, terminal
from moe_jax.cli import expanded, keep_compiled
from moe_jax.errors import UserError
from moe_jax.parallel import sharding
from moe_jax.run import weights
from moe_jax.run.log import write_text
from moe_jax.train import step
from moe_jax.train.state import abstract_weights, init_state, process_rows, put_batch

CONFIG = "configs/continued.py"
FIELDS = {"data.batch_size": 8, "optim.lr": 3e-4, "optim.warmup_steps": 20, "sample.tokens": 0}


def count(cfg: config.RunConfig, mesh: Mesh) -> dict[str, list[float]]:
    """The numbers of each step of a run, by name."""
    keep_compiled(data.cache_folder(cfg.data) / "compiled")
    corpus = data.prepare(cfg.data, workdir=cfg.init_from, seed=cfg.seed, progress=False, init_from=cfg.init_from)
    params, bias, origin = weights.load_weights(cfg.init_from, *abstract_weights(cfg.model, mesh), cast=True)
    g, k, places = granularity(origin), cfg.model.moe.top_k, cfg.model.places
    if g == 1:
        raise UserError(f"--run={cfg.init_from}: its experts are not shards; make them with --granularity > 1")
    state = init_state(cfg, mesh, (params, bias))
    seen, train = step.make_eval_step(cfg, mesh, cfg.balance_groups, record=True), step.make_train_step(cfg, mesh)
    found: dict[str, list[float]] = {"mean": [], "largest": [], "complete": [], "loss": [], "tokens": []}
    batches = corpus.train_iterator(process_rows(mesh, cfg.data.batch_size))
    for _ in tqdm(range(cfg.train.steps), unit="step", disable=None):
        batch = put_batch(next(batches), mesh, cfg)
        sums = jax.device_get(seen(state.params, state.router_bias, batch))
        layers = unevenness(sums.router, sums.choices, places, k, g)
        state, report = train(state, batch)
        tokens = max(float(np.sum(stats.tokens[0])) for stats in sums.router.values())
        numbers = (np.mean(layers), max(layers), sum(x == 0 for x in layers), report.loss, tokens)
        for name, value in zip(found, numbers, strict=True):
            found[name].append(float(value))
    batches.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=expanded, required=True, help="run directory of upcycled weights")
    parser.add_argument("--data", type=expanded, default=Path("data/domains"), help="folder of text")
    parser.add_argument("--out", type=expanded, required=True, metavar="FILE", help="JSON file to write")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a config field")
    arguments = parser.parse_args()
    run, folder = arguments.run.resolve(), arguments.data.resolve()
    fields = FIELDS | {"train.steps": arguments.steps} | pool.extra_fields(parser, arguments)
    cfg, device = pool.load_config(CONFIG, f"{run},{folder}", fields), jax.devices()[0]
    mesh = sharding.make_mesh(config.check_devices(cfg, jax.device_count(), device.platform, device.device_kind))
    found = count(cfg, mesh)
    write_text(arguments.out, json.dumps(found) + "\n")
    low, high = min(found["complete"]), max(found["complete"])
    print(f"{len(found['mean'])} steps of {found['tokens'][0]:,.0f} tokens: in {low:.0f} to {high:.0f} layers all had "
          f"complete sets of shards; variance at the end {found['mean'][-1]:.3g}, "
          f"at most {max(found['largest']):.3g} in a step and layer")  # fmt: skip


if __name__ == "__main__":
    terminal.replace_unprintable()
    try:
        main()
    except (UserError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
