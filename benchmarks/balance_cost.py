"""Measures the cost of load balancing in a training step: variants of one config, timed in turns on one state.

    python -m benchmarks.balance_cost --config=configs/olmoe_8l_bench.py --rounds=4 --steps=5

With one micro-batch the variants are no balancing (without statistics), statistics without a loss, and the global loss.
With four micro-batches, each as large as the config's batch, they are no balancing, exact and running accumulation. The
learning rate is 0, so every variant has the same router. It prints one row a variant: the median over rounds and the
difference to no balancing.
"""

import statistics as stats_lib
import time

import jax
import jax.numpy as jnp
from absl import flags

from benchmarks.rows import random_rows
from moe_jax import cli, config
from moe_jax.moe import layer
from moe_jax.moe.stats import RouterStats, by_depth, router_stats
from moe_jax.parallel import sharding
from moe_jax.train import metrics, step
from moe_jax.train.state import init_state, process_rows, put_batch

CONFIG = cli.define_config()
ROUNDS = flags.DEFINE_integer("rounds", 4, "times that every variant has its turn", 1)
STEPS = flags.DEFINE_integer("steps", 5, "steps of a turn", 1)
ONLY = flags.DEFINE_string("only", "", "variants whose name contains this")

NONE = {"load_balance_coef": 0.0, "router_z_coef": 0.0}
VARIANTS = {  # name: (micro-batches, fields of config.loss, statistics?)
    "1 micro-batch, no balancing": (1, NONE, False),
    "1 micro-batch, statistics, no loss": (1, NONE, True),
    "1 micro-batch, global": (1, {"balance_batch": "global"}, True),
    "4 micro-batches, no balancing": (4, NONE | {"accumulation": "running"}, False),
    "4 micro-batches, global, running": (4, {"accumulation": "running"}, True),
    "4 micro-batches, global, exact": (4, {"accumulation": "exact"}, True),
}


def no_statistics(logits, probs, routing, computed, counted, group, balance_groups) -> RouterStats:
    """Zeros in the place of the sums: what a step costs that knows nothing of its router."""
    g, ge = (balance_groups,), (balance_groups, logits.shape[-1])
    zeros = lambda shape: jax.lax.pcast(jnp.zeros(shape), sharding.AXES, to="varying")
    return RouterStats(*(zeros(shape) for shape in (g, ge, ge, g, g)))


real_statistics = router_stats


def build(micro_batches: int, loss: dict, counted: bool):
    """One variant; its step is traced at the first call, which has to come before the next `build`."""
    c = CONFIG.value.copy_and_resolve_references()
    c.unlock()
    c.loss.update({"load_balance_coef": 0.01, "router_z_coef": 0.001} | loss)
    c.optim.lr = 0.0
    c.data.batch_size *= micro_batches
    c.train.micro_batches = micro_batches
    cfg = config.build(c)
    device = jax.devices()[0]
    mesh = sharding.make_mesh(config.check_devices(cfg, jax.device_count(), device.platform, device.device_kind))
    batch = put_batch(random_rows(cfg, process_rows(mesh, cfg.data.batch_size)), mesh, cfg)
    layer.router_stats = real_statistics if counted else no_statistics
    return cfg, mesh, step.make_train_step(cfg, mesh), batch


def main(_):
    base_of = lambda name: f"{name.split(',')[0]}, no balancing"
    asked = {name for name in VARIANTS if ONLY.value in name}
    chosen = {name: VARIANTS[name] for name in VARIANTS if name in asked | {base_of(n) for n in asked}}
    seconds = {name: [] for name in chosen}
    state, made = None, {}
    for round_ in range(ROUNDS.value + 1):  # the first compiles
        for name, variant in chosen.items():
            if name not in made:
                cfg, mesh, run, batch = build(*variant)
                made[name] = (run, batch)
                state = init_state(cfg, mesh) if state is None else state
            run, batch = made[name]
            state, aux = run(state, batch)
            jax.block_until_ready(state)
            if round_:
                began = time.perf_counter()
                for _ in range(STEPS.value):
                    state, aux = run(state, batch)
                jax.block_until_ready(state)
                seconds[name].append((time.perf_counter() - began) / STEPS.value)
            elif "global" in name:
                load = metrics.router_metrics(by_depth(cfg.model.places, metrics.to_host(aux.router)))["max_load"]
                print(f"{name}: loss {float(aux.loss):.3f}, max load {load:.2f}", flush=True)
    for name, turns in seconds.items():
        base = seconds[base_of(name)]
        median, spread = stats_lib.median(turns), max(turns) - min(turns)
        print(
            f"{name:<36} {median * 1e3:8.2f} ms  {median / stats_lib.median(base) - 1:+7.2%}  "
            f"(spread {spread * 1e3:.2f} ms, {mesh.size} x {jax.devices()[0].device_kind}, jax {jax.__version__})",
            flush=True,
        )


if __name__ == "__main__":
    cli.run(main)
