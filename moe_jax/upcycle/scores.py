"""Scores for transforms that keep the best: counts of tokens of each expert, and the importance of hidden units.

Letters: L layers, F hidden width of a dense layer, E experts, N sequences, S tokens of each.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from moe_jax import data, model
from moe_jax.config import ModelConfig, RunConfig
from moe_jax.errors import FileError
from moe_jax.model import Inputs
from moe_jax.moe.layer import TokenInfo
from moe_jax.nn.layers import weight
from moe_jax.run import log
from moe_jax.tree import flatten, nest
from moe_jax.upcycle.chain import Scores, require, require_dense

# --- of experts ------------------------------------------------------------------------------------------------------


def scores_by_block(cfg: ModelConfig, by_layer: Iterable[Any]) -> Scores:
    """The scores that `Prune` takes, from one array `[C]` for each layer with experts, the first layer first.

    Columns of identity experts are left out. Raises ConfigError if there are not as many layers, or columns.
    """
    places = [place for place in cfg.places if place.kind.experts]
    rows = [np.asarray(row, np.float32) for row in by_layer]
    rule = f"the model has {len(places)} layers with experts"
    require(len(rows) == len(places), "scores", f"{len(rows)} layers", rule, f"nearest valid: {len(places)} layers")
    found: dict[str, list[np.ndarray]] = {}
    for place, row in zip(places, rows, strict=True):
        columns = place.kind.experts + cfg.moe.identity_experts
        rule = f"a layer of {place.path} has {columns} router columns"
        require(row.shape == (columns,), "scores", list(row.shape), rule, f"nearest valid: {columns} numbers")
        found.setdefault(place.path, []).append(row[: place.kind.experts])
    return {path: np.stack(rows) for path, rows in found.items()}


def read_counts(path: str | Path, cfg: ModelConfig) -> tuple[Scores, int | None]:
    """The tokens of each expert in an evaluation, and its step: from a run directory, or a file such as its eval.json.

    Raises FileError for a file without counts, ConfigError for counts of another model.
    """
    path = Path(path).expanduser()
    file = path / "eval.json" if path.is_dir() else path
    if not file.is_file():
        made = f"; eval.py --workdir={path} writes it" if path.is_dir() else ""
        raise FileError(f"{file}: no such file{made}")
    body = log.read_eval(file.parent, file.name)
    try:
        by_layer = [np.asarray(layer, np.float64).sum(0) for layer in body["tokens_per_expert"]]
        step = int(body["step"]) if "step" in body else None
    except (KeyError, TypeError, ValueError, OverflowError, IndexError) as e:
        raise FileError(f"{file}: has no counts [layer][domain][expert]: {type(e).__name__}: {e}") from None
    return scores_by_block(cfg, by_layer), step


# --- of hidden units -------------------------------------------------------------------------------------------------


def unit_scores(cfg: ModelConfig, params: dict, rows: Mapping[str, np.ndarray]) -> Scores:
    """The importance of each hidden unit of a dense model on a batch: the scores that `Importance` takes.

    It is the sum over sequences of |Σ w·∂loss/∂w|, where the sum inside is over a unit's weights in gate, up and down,
    and the loss is the mean cross-entropy of the sequence. Source: MoEBERT, arXiv:2204.07675, §3.1, whose units have no
    gate. One sequence at a time, in float32, on one device, whose memory holds the model and one gradient of it.

    rows: arrays [N, S] `tokens` and `targets`, and as a batch of train.py has them `weights`, `segment_ids` and
        `positions`; without these all targets count, and each sequence is one document.
    """
    require_dense(cfg)
    tokens = np.asarray(rows["tokens"], np.int32)
    usual = {"weights": np.ones(tokens.shape, np.float32), "segment_ids": np.ones_like(tokens)}
    usual["positions"] = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    names = ("tokens", "targets", "weights", "segment_ids", "positions")
    batch = {name: jnp.asarray(rows.get(name, usual.get(name))) for name in names}
    cfg = dataclasses.replace(cfg, compute_dtype="float32", attention="xla", remat="none")
    # A sharding, not a device: JAX leaves the type of an array that is on that device already, with the mesh in it.
    here = jax.device_put((params, batch), jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        return {"dense_layers": _unit_scores(cfg, *here)}


@functools.partial(jax.jit, static_argnums=0)
def _unit_scores(cfg: ModelConfig, params: dict, batch: dict[str, Array]) -> Float[Array, "L F"]:
    graph, flat = model.abstract(cfg), flatten(params)
    inside = {path: w for path, w in flat.items() if "/mlp/w_" in path}

    def loss(own, row):
        one = {name: x[None] for name, x in row.items()}
        segments = one["segment_ids"] if cfg.segment_mask else None
        info = TokenInfo(one["segment_ids"] > 0, jnp.zeros_like(one["tokens"]))
        net = graph.bind(nest(flat | own), {})
        hidden = net(Inputs(one["tokens"], one["positions"], segments, info)).hidden[0]
        logits = jnp.matmul(hidden, weight(net.output_matrix, jnp.float32).T, precision=jax.lax.Precision.HIGHEST)
        picked = jnp.take_along_axis(logits, row["targets"][:, None], axis=1)[:, 0]
        nll = jax.nn.logsumexp(logits, axis=1) - picked
        return jnp.sum(nll * row["weights"]) / jnp.maximum(jnp.sum(row["weights"]), 1.0)

    def add(total, row):
        grads = jax.grad(loss)(inside, row)
        over = lambda path: 2 if path.endswith("w_down") else 1  # the axis D
        parts = [jnp.sum(w.astype(jnp.float32) * grads[path], axis=over(path)) for path, w in inside.items()]
        return total + jnp.abs(sum(parts)), None

    return jax.lax.scan(add, jnp.zeros((cfg.num_layers, cfg.d_ff)), batch)[0]


def read_units(path: str | Path) -> Scores:
    """The scores of hidden units in a NumPy file of one array `[L, F]`. Raises FileError for another file."""
    path = Path(path).expanduser()
    try:
        found = np.load(path, allow_pickle=False)
        if not (isinstance(found, np.ndarray) and found.dtype.kind in "fiu"):
            raise ValueError("it holds something else")
        return {"dense_layers": found.astype(np.float32)}
    except Exception as e:  # a damaged header or array can raise anything
        raise FileError(f"{path}: is not a NumPy file with one array of numbers: {type(e).__name__}: {e}") from None


def training_rows(cfg: RunConfig, folder: Path, count: int) -> dict[str, np.ndarray]:
    """The first `count` sequences of a run's training text, as its training reads them. folder: the run directory."""
    size = cfg.data.batch_size
    corpus = data.prepare(cfg.data, workdir=None, seed=cfg.seed, progress=False, init_from=str(folder))
    batches = iter(corpus.train_iterator(range(size)))
    read = [next(batches) for _ in range(-(-count // size))]
    batches.close()
    return {name: np.concatenate([rows[name] for rows in read])[:count] for name in read[0]}
