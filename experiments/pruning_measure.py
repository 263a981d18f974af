"""Counts the tokens of each expert of a finished run on training text, prunes its model, and evaluates what is left.

    python -m experiments.pruning_measure RUN_DIRECTORY --out=FOLDER --experts=24,16 --batches=32

The counts are in FOLDER/counts.json, in the form of an eval.json, pruned weights in FOLDER/pruned/N, and held-out
losses by domain in FOLDER/pruned.json: of the whole model, of those with the most used experts, and of those with
experts that are kept at random.
"""

import argparse
import dataclasses
import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments import records
from moe_jax import cli, config, data, terminal, upcycle
from moe_jax.config import RunConfig
from moe_jax.errors import UserError
from moe_jax.evaluate import held_out
from moe_jax.moe.stats import by_depth
from moe_jax.parallel import sharding
from moe_jax.run import checkpoint, config_file, weights
from moe_jax.run.log import write_text
from moe_jax.train import step
from moe_jax.train.state import abstract_weights, process_rows, put_batch
from moe_jax.tree import join, split


def count(cfg: RunConfig, mesh, params: dict, bias: dict, corpus, batches: int) -> list[np.ndarray]:
    """The tokens of each expert on the first batches of training text, `[G, E]` of each layer."""
    run = step.make_eval_step(cfg, mesh, len(corpus.domains), False, None)
    rows, total = corpus.train_iterator(process_rows(mesh, cfg.data.batch_size)), None
    for _ in range(batches):
        one = run(params, bias, put_batch(next(rows), mesh, cfg, by_domain=True), None).router
        total = one if total is None else jax.tree.map(jnp.add, total, one)
    rows.close()
    layers = by_depth(cfg.model.places, jax.tree.map(np.asarray, jax.device_get(total)))
    return [np.asarray(stats.tokens_per_expert) for stats in layers]


def measure(folder: Path, out: Path, experts: list[int], batches: int) -> dict:
    cfg, shape = config.for_evaluation(config_file.load_config(folder), jax.device_count())
    mesh = sharding.make_mesh(shape)
    corpus = data.prepare(cfg.data, workdir=folder, seed=cfg.seed, progress=False)
    with checkpoint.Checkpoints(folder) as checkpoints:
        number = checkpoints.latest()
    params, bias, _ = weights.load_weights(folder, *abstract_weights(cfg.model, mesh), step=number)
    counts = count(cfg, mesh, params, bias, corpus, batches)
    body = {"step": number, "batches": batches, "tokens_per_expert": [c.astype(int).tolist() for c in counts]}
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "counts.json", json.dumps(body) + "\n")
    used = [np.sort(c.sum(0))[::-1] for c in counts]

    def losses(model, params, bias) -> dict[str, float]:
        own = dataclasses.replace(cfg, model=model)
        return {row["domain"]: row["xent"] for row in
                held_out.evaluate(own, mesh, params, bias, corpus, progress=False).rows()}  # fmt: skip

    whole = cfg.model.moe.num_experts
    found = {"used": {str(whole): losses(cfg.model, params, bias)}, "random": {}}
    found |= {"kept": {str(n): float(np.mean([c[:n].sum() / c.sum() for c in used])) for n in (whole, *experts)}}
    for n in experts:
        made = out / "pruned" / str(n)
        shutil.rmtree(made, ignore_errors=True)  # of an attempt that did not end
        chain = [upcycle.Prune(n)]
        report = upcycle.convert([str(folder)], made, chain, scores=out / "counts.json", check=False)
        abstract = abstract_weights(report.cfg.model, mesh)
        found["used"][str(n)] = losses(report.cfg.model, *weights.load_weights(made, *abstract)[:2])
        rng = np.random.default_rng(n)
        scores = upcycle.scores_by_block(cfg.model, [rng.random(whole) for _ in counts])
        with jax.set_mesh(mesh):
            model, kept = upcycle.apply(chain, cfg.model, join(params, bias), scores=scores)
        found["random"][str(n)] = losses(model, *split(kept, lambda path: path.endswith("/router_bias"))[::-1])
    options = {"experts": experts, "batches": batches}
    return {"settings": records.settings_in(folder), "options": options, "whole": whole, "steps": number} | found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--experts", required=True)
    parser.add_argument("--batches", type=int, default=32)
    arguments = parser.parse_args()
    cli.keep_compiled(data.cache_folder() / "compiled")  # each evaluation traces the same program again
    experts = [int(n) for n in arguments.experts.split(",")]
    try:
        found = measure(arguments.folder, arguments.out, experts, arguments.batches)
    except UserError as error:
        sys.exit(f"error: {error}")
    write_text(arguments.out / "pruned.json", json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    terminal.replace_unprintable()
    main()
