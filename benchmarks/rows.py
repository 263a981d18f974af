"""Batches that benchmarks train on."""

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
