"""Batches that benchmarks train on, and their clock."""

import time
from collections.abc import Callable

import jax
import numpy as np

from moe_jax import config


def random_rows(cfg: config.RunConfig, rows: list[int]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shape = (len(rows), cfg.data.seq_len)
    tokens = rng.integers(0, cfg.model.vocab_size, (shape[0], shape[1] + 1), dtype=np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": np.ones(shape, np.float32),
        "segment_ids": np.ones(shape, np.int32),
        "positions": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape).copy(),
        "sequence_ids": np.asarray(rows, np.int32),
    }


def seconds(fn: Callable, args: tuple, steps: int, *, carry: bool = True) -> tuple[float, tuple]:
    """Of one call, after one to warm up. carry: what fn returns is what it takes next."""
    out = jax.block_until_ready(fn(*args))
    args = out if carry else args
    began = time.perf_counter()
    for _ in range(steps):
        out = fn(*args)
        args = out if carry else args
    jax.block_until_ready(out)
    return (time.perf_counter() - began) / steps, args
