"""The systems of configs/systems as tests take them: built, in toy sizes, with meshes and batches for them."""

import dataclasses
import functools
import importlib
from pathlib import Path

import jax
import numpy as np

from moe_jax import config
from moe_jax.config import ModelConfig, RunConfig
from moe_jax.parallel import sharding
from moe_jax.upcycle import Beside, Cluster, Depth, Drop, Grow, Mask, Quantize, Transform, VirtualGroups, Width

REPO = Path(__file__).parents[1]
NAMES = sorted(path.stem for path in (REPO / "configs" / "systems").glob("*.py"))
SOURCE = "base"  # the dense model that upcycling starts from
# What the first command of an upcycled system does to it.
CHAINS: dict[str, list[Transform]] = {
    "aquila": [Width(256, 512, 4, aki=True), Depth(6), VirtualGroups(8, 1, 2)],
    "cpm2": [VirtualGroups(8, 1, 1)],
    "drop_upcycling": [VirtualGroups(8, 1, 2), Drop(0.5)],
    "emoe": [Cluster(16, 4, dense_layers=2)],
    "evomoe": [VirtualGroups(8, 1, 1, "none", score_order="score_topk", dense_layers=2), Mask(0.2)],
    "llama3_meets_moe": [VirtualGroups(8, 1, 2)],
    "mixda": [Beside(16, 64, moe={"score": "softmax", "score_order": "topk_score", "renormalize": False,
                                  "routed_scaling": 1.0})],
    "mixture_growth": [VirtualGroups(8, 1, 2, score_order="score_topk", renormalize=True), Drop(0.5), Grow(16)],
    "mote": [Beside(4, top_k=1, init="copy", moe={"score": "softmax", "score_order": "score_topk",
                                                 "renormalize": False, "routed_scaling": 1.0}), Quantize()],
}  # fmt: skip
TEACHERS = {"runs/dense": "base", "runs/pr_moe": "pr_moe"}  # by the directory that a file names
MESH = (2, 2, 2)


@functools.cache
def load(name: str) -> tuple[str, RunConfig]:
    """The docstring and the built config."""
    module = importlib.import_module(f"configs.systems.{name}")
    return module.__doc__, config.build(module.get_config())


def toy(name: str) -> RunConfig:
    """The system on little text of a small vocabulary."""
    cfg = load(name)[1]
    small = dataclasses.replace(cfg.model, vocab_size=512)
    data = dataclasses.replace(cfg.data, batch_size=8, seq_len=16, tokenizer=config.TokenizerConfig())
    return dataclasses.replace(cfg, model=small, data=data)


def teacher_of(cfg: RunConfig) -> ModelConfig | None:
    """The model of a system's teacher; None if it has none."""
    return toy(TEACHERS[cfg.distill.teacher]).model if cfg.distill.teacher else None


@functools.cache
def mesh_of(*shape):
    return sharding.make_mesh(shape, jax.devices()[: int(np.prod(shape))])


def of_shapes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def batch_rows(cfg: RunConfig) -> dict[str, np.ndarray]:
    """Random tokens, each sequence one document."""
    b, s = cfg.data.batch_size, cfg.data.seq_len
    tokens = np.random.default_rng(0).integers(0, cfg.model.vocab_size, (b, s + 1)).astype(np.int32)
    ones, positions = np.ones((b, s), np.int32), np.tile(np.arange(s, dtype=np.int32), (b, 1))
    labels = {"label": np.arange(b, dtype=np.int32)[:, None] % 2 * ones} if cfg.data.labels else {}
    rows = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": ones.astype(np.float32),
            "segment_ids": ones, "positions": positions, "sequence_ids": np.arange(b, dtype=np.int32)}  # fmt: skip
    return rows | labels
