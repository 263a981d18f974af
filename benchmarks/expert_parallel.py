"""Times expert parallelism at a config's shape: the exchanges and their chunks, beside `fsdp` and one device.

    python -m benchmarks.expert_parallel --config=configs/olmoe_8l_bench.py
    python -m benchmarks.expert_parallel --config=configs/olmoe_8l_bench.py --train --config.model.remat=full
    JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=8 python -m benchmarks.expert_parallel --config=configs/debug.py \\
        --config.model.moe.num_experts=8 --steps=2

It times forward and backward of one MoE layer on random activations, or with --train a training step on random tokens.
The router chooses freely. Every device has the config's batch on every mesh, so one device is the upper bound. The
variants are timed in turns. Each has one row: median time and its range; tokens/s of a device; bytes that a device
sends to experts of other devices in one layer, by the cost model (`moe_jax.moe.exchange.bytes_sent`); temporaries by
the compiler; maximum expert load and dropped share; and a value and a gradient norm, which are equal on meshes of the
same size if they compute the same. `padded` is the all-to-all of full blocks, which CPU always uses, for comparison on
other devices.
"""

import functools
import gc
import math
import statistics
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import optax
from absl import flags

from benchmarks.rows import Timed, milliseconds, moe_layer, seconds, training_step
from moe_jax import cli, config
from moe_jax.moe import exchange
from moe_jax.moe.stats import by_depth
from moe_jax.parallel import sharding
from moe_jax.train import metrics

CONFIG = cli.define_config()
ROUNDS = flags.DEFINE_integer("rounds", 3, "times that every variant has its turn", 1)
STEPS = flags.DEFINE_integer("steps", 10, "calls of a turn", 1)
CHUNKS = flags.DEFINE_list("chunks", ["1", "2", "4"], "values of model.moe.exchange_chunks")
DEVICES = flags.DEFINE_integer("devices", 0, "use this many devices; 0: all", 0)
ONLY = flags.DEFINE_string("only", "", "variants whose name contains this")
TRAIN = flags.DEFINE_bool("train", False, "a whole training step instead of one layer")


class Variant(NamedTuple):
    mesh: tuple[int, int, int]
    exchange: str = "ring"
    chunks: int = 1
    padded: bool = False

    @property
    def devices(self) -> int:
        return math.prod(self.mesh)

    @property
    def name(self) -> str:
        _, fsdp, expert = self.mesh
        if expert == 1:
            return f"fsdp={fsdp}" if fsdp > 1 else "1 device"
        parts = f", {self.chunks} chunks" if self.chunks > 1 else ""
        return f"expert={expert}, {'padded ' * self.padded}{self.exchange}{parts}"


def variants(n: int) -> list[Variant]:
    """n: devices."""
    found = [Variant((1, 1, 1))]
    if n > 1:
        found += [Variant((1, n, 1))]
        pads = (False,) if jax.default_backend() == "cpu" else (False, True)  # CPU always pads
        ways = [("ring", False), *(("all_to_all", padded) for padded in pads)]
        found += [Variant((1, 1, n), name, int(chunks), pad) for name, pad in ways for chunks in CHUNKS.value]
    return [v for v in found if ONLY.value in v.name]


# --- what is timed ---------------------------------------------------------------------------------------------------


def build(variant: Variant) -> config.RunConfig:
    c = CONFIG.value.copy_and_resolve_references()
    c.unlock()
    c.mesh.update(dict(zip(sharding.AXES, variant.mesh, strict=True)))
    c.model.moe.update(exchange=variant.exchange, exchange_chunks=variant.chunks)
    c.data.batch_size *= variant.devices
    return config.build(c)


def of_layer(cfg: config.RunConfig, mesh: Any) -> Timed:
    """One MoE layer; ½ Σ y² is differentiated in its parameters and in x."""
    layer = moe_layer(cfg, mesh)

    def loss(params, x, graph, rest):
        y, router = layer.apply(params, x, graph, rest)
        return 0.5 * jnp.sum(jnp.square(y.astype(jnp.float32))), router

    @functools.partial(jax.jit, static_argnums=2)
    def run(params, x, graph, rest):
        (value, router), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x, graph, rest)
        return grads, {"value": value, "norm": optax.tree.norm(grads), "router": router}

    def start():
        _, params, rest = layer.make()
        return params, layer.draw(), rest

    params, x, rest = start()
    compiled = run.lower(params, x, layer.make()[0], rest).compile()

    def call(params, x, rest, *_):
        grads, aux = compiled(params, x, rest)
        return params, x, rest, grads, aux

    return Timed(start, call, compiled.memory_analysis().temp_size_in_bytes)


class Row:
    """One variant: its arrays live only during its turn, so that each has the devices' memory for itself."""

    def __init__(self, variant: Variant, devices: list[jax.Device]):
        self.variant, self.turns, self.note, self.cfg = variant, [], "", build(variant)
        self.mesh = sharding.make_mesh(variant.mesh, devices[: variant.devices])
        config.check_devices(self.cfg, variant.devices, devices[0].platform, devices[0].device_kind)
        padded = lambda *args, pieces=1: exchange._swap_padded(*args)
        swap = padded if variant.padded else exchange._swap_ragged
        with jax.set_mesh(self.mesh), mock.patch.object(exchange, "_swap_ragged", swap):
            self.timed = (training_step if TRAIN.value else of_layer)(self.cfg, self.mesh)

    def turn(self) -> None:
        gc.collect()
        with jax.set_mesh(self.mesh):
            took, out = seconds(self.timed.call, self.timed.start(), STEPS.value)
        self.turns.append(took)
        router = metrics.router_metrics(by_depth(self.cfg.model.places, metrics.to_host(out[-1]["router"])))
        self.note = (f"max load {router['max_load']:.2f}, dropped {router['dropped']:.1%}, "
                     f"value {float(out[-1]['value']):.6g}, gradient {float(out[-1]['norm']):.6g}")  # fmt: skip

    def __str__(self) -> str:
        cfg, median = self.cfg, statistics.median(self.turns)
        once = cfg.data.batch_size * cfg.data.seq_len // (self.variant.devices * cfg.train.micro_batches)
        tokens = once * (cfg.train.micro_batches if TRAIN.value else 1)
        platform = "cpu" if self.variant.padded else jax.default_backend()
        itemsize = jnp.dtype(cfg.model.compute_dtype).itemsize
        peers = self.mesh.shape["expert"]
        sent = exchange.bytes_sent(cfg.model.moe, platform, peers, cfg.model.expert_dim, once, itemsize)
        return (f"{self.variant.name:<40} {milliseconds(self.turns)}, "
                f"{tokens / median:9.0f} tokens/s a device, {sent[self.variant.exchange] / 1e6:8.1f} MB sent, "
                f"temporaries {self.timed.temporaries / 2**30:.2f} GiB, {self.note}")  # fmt: skip


# --- rows ------------------------------------------------------------------------------------------------------------


def main(_):
    devices = jax.devices()[: DEVICES.value or None]
    cfg, moe = config.build(CONFIG.value), CONFIG.value.model.moe
    what = "training step" if TRAIN.value else "MoE layer, forward and backward"
    print(f"{what}: E={moe.num_experts}, K={moe.top_k}, D={cfg.model.d_model}, F={moe.d_expert}, "
          f"{cfg.data.batch_size} × {cfg.data.seq_len} tokens a device in {cfg.train.micro_batches} micro-batches, "
          f"{cfg.model.compute_dtype}, remat {cfg.model.remat}, {len(devices)} × {devices[0].device_kind}, "
          f"jax {jax.__version__}", flush=True)  # fmt: skip
    rows = []
    for variant in variants(len(devices)):
        try:
            rows.append(Row(variant, devices))
            rows[-1].turn()
            print(f"first turn of {rows[-1]}", flush=True)
        except Exception as error:  # the others can be compared all the same
            rows = [row for row in rows if row.turns]
            why = " ".join(str(error).split())[:200]
            print(f"{variant.name:<40} cannot run here: {type(error).__name__}: {why}", flush=True)
    for _ in range(ROUNDS.value - 1):
        for row in rows:
            row.turn()
    for row in rows:
        print(row, flush=True)


if __name__ == "__main__":
    cli.run(main)
