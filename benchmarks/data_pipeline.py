"""Measures how fast the input pipeline makes batches, and compares it with the need of a training step.

    python -m benchmarks.data_pipeline --config=configs/quickstart.py

It reads rows of the config's data as train.py does, by threads of this process and by reader processes, in turns, and
prepares the data first if necessary. It prints one row for each number of reader processes: median and spread of rows/s
and tokens/s, and their ratio to --needed tokens/s. Then it prints the time to copy one batch to the device. It takes
half a minute.
"""

import os
import statistics
import tempfile
import time

import jax
from absl import flags

from benchmarks.rows import milliseconds, seconds, where
from moe_jax import cli, config, data
from moe_jax.parallel import sharding
from moe_jax.train.state import process_rows, put_batch

CONFIG = cli.define_config()
WORKERS = flags.DEFINE_list("workers", ["0", "2"], "values of data.num_workers")
ROUNDS = flags.DEFINE_integer("rounds", 3, "times that every number of readers has its turn", 1)
SECONDS = flags.DEFINE_float("seconds", 3.0, "length of a turn", 0.1)
NEEDED = flags.DEFINE_float("needed", 100_000, "tokens/s that a step takes; one H200 at OLMoE's shape: 64,000", 1)


def turn(corpus: data.Corpus, rows: range) -> float:
    """Batches a second, after the first ones: readers have started, what they read ahead is used up."""
    batches = corpus.train_iterator(rows)
    for _ in range(20):
        next(batches)
    count, began = 0, time.perf_counter()
    while (taken := time.perf_counter() - began) < SECONDS.value:
        next(batches)
        count += 1
    batches.close()
    return count / taken


def main(_):
    base, corpora = CONFIG.value.copy_and_resolve_references(), {}
    base.unlock()
    with tempfile.TemporaryDirectory() as workdir:  # of the tokenizer
        for workers in WORKERS.value:
            base.data.num_workers = int(workers)
            cfg = config.build(base)
            began = time.perf_counter()
            corpora[workers] = data.prepare(cfg.data, workdir=workdir, seed=cfg.seed, progress=False)
            print(f"prepared or found in {time.perf_counter() - began:.1f} s", flush=True)
        size, length = cfg.data.batch_size, cfg.data.seq_len
        turns: dict[str, list[float]] = {workers: [] for workers in corpora}
        for _ in range(ROUNDS.value):
            for workers, corpus in corpora.items():
                turns[workers].append(turn(corpus, range(size)))
    for workers, rates in turns.items():
        median, spread = statistics.median(rates), max(rates) - min(rates)
        tokens = median * size * length
        print(f"{workers} reader processes: {median * size:9.0f} rows/s (spread {spread * size:.0f}), "
              f"{tokens:11.0f} tokens/s, {tokens / NEEDED.value:.1f} × {NEEDED.value:.0f} needed; "
              f"batches of {size} × {length}, {os.cpu_count()} cores", flush=True)  # fmt: skip
    device = jax.devices()[0]
    mesh = sharding.make_mesh(config.check_devices(cfg, jax.device_count(), device.platform, device.device_kind))
    batches = corpora[WORKERS.value[0]].train_iterator(process_rows(mesh, size))
    batch = next(batches)
    batches.close()
    put = [seconds(lambda: put_batch(batch, mesh, cfg), (), 20, carry=False)[0] for _ in range(ROUNDS.value)]
    print(f"a batch to the device: {milliseconds(put).strip()}, {where()}")


if __name__ == "__main__":
    cli.run(main)
