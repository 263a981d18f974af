"""Evaluates a finished run with a part of its experts, and with pools of its documents' first tokens or of all of them.

    python -m experiments.pools_measure RUN_DIRECTORY --out=pools.json --keep=50,25,12.5 --sizes=8,16 --prefix=64

Numbers are nats a held-out token by domain. Pools are measured on the tokens after the first `prefix` of each document,
also without pools, so that the three ways are of the same tokens. A model without pools is measured as one with them.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import jax

from experiments import records
from moe_jax import cli, config, data, terminal
from moe_jax.config import RunConfig
from moe_jax.errors import UserError
from moe_jax.evaluate import held_out, subsets
from moe_jax.parallel import sharding
from moe_jax.run import checkpoint, config_file, weights
from moe_jax.run.log import write_text
from moe_jax.train.state import abstract_weights

WAYS = ("all", "prefix", "document")


def with_pools(cfg: RunConfig, way: str, size: int, prefix: int) -> RunConfig:
    """The run with pools of this way in evaluation, whatever it was trained with."""
    moe = cfg.model.moe
    least = moe.pool_min or moe.top_k
    moe = dataclasses.replace(
        moe, pool_min=least, pool_from=way, pool_size=0 if way == "all" else size, pool_prefix=prefix
    )
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, moe=moe))


def measure(folder: Path, keep: list[float], sizes: list[int], prefix: int, use_batches: int) -> dict:
    saved = config_file.load_config(folder)
    cfg, shape = config.for_evaluation(saved, jax.device_count())
    mesh = sharding.make_mesh(shape)
    corpus = data.prepare(cfg.data, workdir=folder, seed=cfg.seed, progress=False)
    with checkpoint.Checkpoints(folder) as checkpoints:
        number = checkpoints.latest()
    params, bias, _ = weights.load_weights(folder, *abstract_weights(cfg.model, mesh), step=number)
    own = (mesh, params, bias, corpus)
    use = subsets.measure_use(cfg, *own, use_batches, progress=False)
    found = subsets.evaluate(cfg, *own, use, sorted({1.0, *(x / 100 for x in keep)}), progress=False)
    xent = lambda i: dict(zip(found.domains, (found.nll[i] / found.tokens).tolist(), strict=True))
    kept = {f"{100 * share:g}": xent(i) | {"": float(found.nll[i].sum() / found.tokens.sum())}
            for i, share in enumerate(found.shares)}  # fmt: skip
    pools = {}
    for way in WAYS:
        for size in sizes if way != "all" else sizes[:1]:
            rows = held_out.evaluate(with_pools(cfg, way, size, prefix), *own, progress=False).rows()
            pools[way if way == "all" else f"{way} {size}"] = {row["domain"]: row["xent"] for row in rows}
    experts = {f"{100 * share:g}": max(one) for share, one in zip(found.shares, found.kept, strict=True)}
    options = {"keep": keep, "sizes": sizes, "prefix": prefix, "use_batches": use_batches}
    return {"settings": records.settings_of(saved), "options": options, "step": number, "experts": experts,
            "kept": kept, "pools": pools}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--keep", default="50,25,12.5")
    parser.add_argument("--sizes", default="8,16")
    parser.add_argument("--prefix", type=int, default=64)
    parser.add_argument("--use_batches", type=int, default=32)
    arguments = parser.parse_args()
    numbers = lambda text, kind: [kind(part) for part in text.split(",")]
    cli.keep_compiled(data.cache_folder() / "compiled")  # the other models have the same programs
    try:
        found = measure(arguments.folder, numbers(arguments.keep, float), numbers(arguments.sizes, int),
                        arguments.prefix, arguments.use_batches)  # fmt: skip
    except UserError as error:
        sys.exit(f"error: {error}")
    write_text(arguments.out, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    terminal.replace_unprintable()
    main()
