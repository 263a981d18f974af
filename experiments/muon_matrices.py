"""Measures the matrices of a finished run: weight RMS, update RMS and SVD entropy of every kind, by layer.

    python -m experiments.muon_matrices RUN_DIRECTORY

It restores the newest checkpoint and takes one more training step on the next batch. The update of that step,
(old − new) / η without the decay's λ·W, is what the optimizer subtracts at a learning rate of 1. It writes
matrices.json into the run directory.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np

from moe_jax import config, data, terminal
from moe_jax.errors import UserError
from moe_jax.evaluate import spectra
from moe_jax.parallel import sharding
from moe_jax.run import checkpoint, config_file
from moe_jax.run.log import write_text
from moe_jax.train import step
from moe_jax.train.state import abstract_state, process_rows, put_batch

ENTROPY = ("attention", "expert", "router")  # kinds whose name begins so


def measure(folder: Path) -> dict:
    cfg = config_file.load_config(folder)
    if cfg.model.lora.rank or any(group.freeze for group in cfg.optim.groups.values()):
        raise UserError(f"{folder}: has frozen matrices (model.lora or optim.groups), whose updates mean nothing")
    device = jax.devices()[0]
    mesh = sharding.make_mesh(config.check_devices(cfg, jax.device_count(), device.platform, device.device_kind))
    corpus = data.prepare(cfg.data, workdir=folder, seed=cfg.seed, progress=False)
    with checkpoint.Checkpoints(folder) as checkpoints:
        state, saved = checkpoints.restore(abstract_state(cfg, mesh))
    batches = corpus.train_iterator(process_rows(mesh, cfg.data.batch_size))
    batches.set_state(saved["batches"])
    done, old = int(state.step), jax.tree.map(np.asarray, jax.device_get(state.params))
    state, aux = step.make_train_step(cfg, mesh)(state, put_batch(next(batches), mesh, cfg))
    batches.close()
    lr, decay = float(aux.lr), cfg.optim.weight_decay
    update = jax.tree.map(lambda a, b: (a - np.asarray(b)) / lr - decay * a, old, jax.device_get(state.params))
    weights, updates = (spectra.matrices(tree, cfg.model.places) for tree in (old, update))
    kinds = sorted(kind for kind in weights if kind.startswith(ENTROPY))
    return {
        "step": done,
        "lr": lr,
        "weight_rms": {kind: spectra.rms(x).tolist() for kind, x in weights.items()},
        "update_rms": {kind: spectra.rms(x).tolist() for kind, x in updates.items()},
        "svd_entropy": {kind: spectra.svd_entropy(weights[kind]).tolist() for kind in kinds},
    }


def main() -> None:
    folder = Path(sys.argv[1])
    try:
        found = measure(folder)
    except UserError as error:
        sys.exit(f"error: {error}")
    write_text(folder / "matrices.json", json.dumps(found) + "\n")


if __name__ == "__main__":
    terminal.replace_unprintable()
    main()
