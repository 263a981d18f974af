"""Times one training step of a config on this machine's devices, on random tokens or text.

    python -m benchmarks.train_step --config=configs/olmoe_8l_bench.py --steps=10
    python -m benchmarks.train_step --config=configs/olmoe_8l_bench.py --text --settle=100
    python -m benchmarks.train_step --config=configs/olmoe_8l_bench.py --loads=own,1,1.5,2,4

With --text every step has its own batch of the config's training text, which is on the device before the timing starts.
--settle=N trains N steps on it first, since a router with initial weights distinguishes little more than frequent
tokens. --tokens_to saves the tokens of the first batch, for a comparison with another framework.

It prints one row: step time, tokens/s, model TFLOP/s by formula (6 per active matmul weight and token, plus causal
attention), MFU against the data sheet, maximum expert load, dropped share, peak memory, and the versions.

With --loads it times one compiled step at learning rate 0 under several loads, in turns, with one row each. `own` are
the choices of the router with its initial weights. A number adds selection biases that give one expert of each layer
that multiple of the mean load.
"""

import itertools
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks.rows import milliseconds, random_rows, steer, where
from moe_jax import chips, cli, config, data, model, optim
from moe_jax.errors import UserError
from moe_jax.moe.stats import by_depth
from moe_jax.parallel import sharding
from moe_jax.train import metrics, step
from moe_jax.train.state import choose_program, init_state, process_rows, put_batch
from moe_jax.tree import flatten

CONFIG = cli.define_config()
STEPS = flags.DEFINE_integer("steps", 10, "timed steps", 1)
WARMUP = flags.DEFINE_integer("warmup", 4, "steps before the clock starts, compilation included", 1)
TEXT = flags.DEFINE_bool("text", False, "the config's training text instead of random tokens")
SETTLE = flags.DEFINE_integer("settle", 0, "training steps before all others", 0)
TOKENS_TO = cli.define_path("tokens_to", None, "with --text: .npy file for the tokens of one batch, [B, S]")
LOADS = flags.DEFINE_list("loads", [], "own, or maximum load over mean")
ROUNDS = flags.DEFINE_integer("rounds", 3, "with --loads: times that every load has its turn", 1)


def build() -> config.RunConfig:
    if TOKENS_TO.value and not TEXT.value:
        raise UserError(f"--tokens_to={TOKENS_TO.value}: needs --text")
    if not LOADS.value:
        return config.build(CONFIG.value)
    c = CONFIG.value.copy_and_resolve_references()
    c.unlock()
    c.model.moe.selection_bias = True
    c.loss.bias_update_rate = c.optim.lr = 0.0
    return config.build(c)


def batches(cfg: config.RunConfig, rows: list[int], count: int) -> list[dict[str, np.ndarray]]:
    if not TEXT.value:
        return [random_rows(cfg, rows)]
    with tempfile.TemporaryDirectory() as folder:
        corpus = data.prepare(cfg.data, workdir=folder, seed=cfg.seed, progress=False)
        config.check_vocabulary(cfg, corpus.vocab_size)
        iterator = corpus.train_iterator(rows)
        found = list(itertools.islice(iterator, count))
        iterator.close()
    if TOKENS_TO.value:
        np.save(TOKENS_TO.value, found[0]["tokens"])
    return found


def main(_):
    cfg = build()
    device = jax.devices()[0]
    mesh = sharding.make_mesh(config.check_devices(cfg, jax.device_count(), device.platform, device.device_kind))
    print(choose_program(cfg, mesh).why, flush=True)
    rows = batches(cfg, process_rows(mesh, cfg.data.batch_size), SETTLE.value + WARMUP.value + STEPS.value)
    ready = itertools.cycle([put_batch(row, mesh, cfg) for row in rows])
    state, train_step = init_state(cfg, mesh), step.make_train_step(cfg, mesh)
    biases = {"": state.router_bias}
    if LOADS.value:
        by_domain, evaluate = put_batch(rows[0], mesh, cfg, by_domain=True), step.make_eval_step(cfg, mesh, 1)
        paths = {place.path for place in cfg.model.places if place.kind.experts}
        if len(paths) != 1:
            raise UserError("--loads steers models whose layers with experts lie in one stack")
        (block,) = paths
        stats = lambda bias: evaluate(state.params, bias, by_domain).router[block]
        with jax.set_mesh(mesh):
            steered = lambda load: steer(state.router_bias, stats, cfg.model.moe, float(load))
            biases = {load: state.router_bias if load == "own" else steered(load) for load in LOADS.value}
            biases = {load: jax.tree.map(jnp.copy, bias) for load, bias in biases.items()}  # the step donates its own
        del stats, evaluate, by_domain

    began = time.time()
    for _ in range(SETTLE.value + WARMUP.value):
        state, aux = train_step(state, next(ready))
    first_loss = float(aux.loss)
    warm = time.time() - began
    turns, last = {load: [] for load in biases}, {}
    for _ in range(ROUNDS.value if LOADS.value else 1):
        for load, bias in biases.items():
            if LOADS.value:
                state = state._replace(router_bias=jax.tree.map(jnp.copy, bias))
            jax.block_until_ready(state)
            began = time.perf_counter()
            for _ in range(STEPS.value):
                state, last[load] = train_step(state, next(ready))
            jax.block_until_ready(state)
            turns[load].append((time.perf_counter() - began) / STEPS.value)

    tokens = cfg.data.batch_size * cfg.data.seq_len
    frozen = optim.frozen_paths(cfg.optim, flatten(model.abstract(cfg.model).shapes))
    flops = model.flops_per_token(cfg.model, cfg.data.seq_len, frozen) * tokens
    peak, source = chips.peak_flops(device)
    memory = (device.memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30
    for load, taken in turns.items():
        aux, seconds = last[load], statistics.median(taken)
        router = metrics.router_metrics(by_depth(cfg.model.places, metrics.to_host(aux.router)))
        print(
            f"moe_jax {model.count_parameters(cfg.model).total / 1e9:.2f}B{', text' * TEXT.value}"
            f"{f' after {SETTLE.value} steps' * bool(SETTLE.value)}{load and f', load {load:<3}'}: "
            f"step {milliseconds(taken).strip()}, "
            f"{tokens / seconds:.0f} tokens/s, {flops / seconds / 1e12:.1f} TFLOP/s, "
            f"MFU {flops / seconds / peak / mesh.size:.1%} of {peak * mesh.size / 1e12:.2f} ({source}), "
            f"max load {router['max_load']:.2f}, dropped {router['dropped']:.1%}, peak {memory:.1f} GiB a device, "
            f"warm-up {warm:.0f} s, loss {first_loss:.3f} -> {float(aux.loss):.3f}, {where()}",
            flush=True,
        )


if __name__ == "__main__":
    cli.run(main)
