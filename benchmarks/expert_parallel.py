"""Times expert parallelism at a config's shape: exchanges and their chunks, beside `fsdp`, both axes, and one device.

    python -m benchmarks.expert_parallel --config=configs/olmoe_8l_bench.py
    python -m benchmarks.expert_parallel --config=configs/olmoe_8l_bench.py --train --rows=rows.jsonl --figure=rows.png
    python -m benchmarks.expert_parallel --config=configs/olmoe_8l_bench.py --train --kinds=plain,latent,pairs,late
    JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=8 python -m benchmarks.expert_parallel --config=configs/debug.py \\
        --config.model.moe.num_experts=8 --steps=2

It times forward and backward of one MoE layer on random activations, or with --train a training step on random tokens.
The router chooses freely. Every device has the config's batch on every mesh, so one device is the upper bound. The
variants are timed in turns. Each has one row: median time and its range; tokens/s of a device, and the share of one
device alone that this is; bytes that a device sends to experts of other devices in one layer, by the cost model
(`moe_jax.moe.exchange.bytes_sent`); temporaries by the compiler; maximum expert load and dropped share; and a value and
a gradient norm, which are equal on meshes of the same size if they compute the same. `padded` is the all-to-all of full
blocks, which CPU always uses, for comparison on other devices.

--kinds compares models that send or wait for less: `plain` is the config's, `latent` has four times the experts and
choices at a quarter of the width, and some FLOPs more, for two more products a token and a router of four times the
columns. `pairs` and `late` have equal FLOPs: `pairs` has experts in every second block and a feed-forward
layer of their active width in the others, `late` has half of that width in all blocks and its experts beside a whole
block, so that their exchange may run beside it (`benchmarks.profile_step` says whether it does).

After each round a row of each variant, of all its `turns` so far, is appended to --rows, and --figure draws the last
ones of that file: tokens/s of all devices against their number. With --rounds=0 nothing is timed.
"""

import functools
import gc
import json
import statistics
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import optax
from absl import flags

from benchmarks.meshes import OF_TRAINING, Variant, change, draw, read, variants
from benchmarks.rows import Timed, milliseconds, moe_layer, seconds, training_step, where
from moe_jax import cli, config
from moe_jax.errors import UserError
from moe_jax.model.counts import flops_per_token
from moe_jax.moe import exchange
from moe_jax.moe.stats import by_depth
from moe_jax.parallel import sharding
from moe_jax.train import metrics

CONFIG = cli.define_config()
ROUNDS = flags.DEFINE_integer("rounds", 3, "times that every variant has its turn; 0: only draw --rows", 0)
STEPS = flags.DEFINE_integer("steps", 10, "calls of a turn", 1)
CHUNKS = flags.DEFINE_list("chunks", ["1", "2", "4"], "values of model.moe.exchange_chunks")
DEVICES = flags.DEFINE_integer("devices", 0, "use this many devices; 0: all", 0)
ONLY = flags.DEFINE_list("only", [""], "variants whose name contains one of these")
PADDED = flags.DEFINE_bool("padded", True, "the all-to-all of full blocks too")
TRAIN = flags.DEFINE_bool("train", False, "a whole training step instead of one layer")
KINDS = flags.DEFINE_list("kinds", ["plain"], "plain, latent, pairs or late")
ROWS = cli.define_path("rows", None, "file that rows are appended to, one JSON object each")
FIGURE = cli.define_path("figure", None, "figure of the rows of --rows")


# --- what is timed ---------------------------------------------------------------------------------------------------


def build(variant: Variant) -> config.RunConfig:
    c = CONFIG.value.copy_and_resolve_references()
    c.unlock()
    c.mesh.update(dict(zip(sharding.AXES, variant.mesh, strict=True)))
    c.model.moe.update(exchange=variant.exchange, exchange_chunks=variant.chunks)
    c.data.batch_size *= variant.devices
    change(c, variant.kind)
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
        self.where = where(len(devices))
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

    def numbers(self) -> dict[str, Any]:
        """The numbers that --rows keeps, but for the share of one device."""
        cfg, median = self.cfg, statistics.median(self.turns)
        once = cfg.data.batch_size * cfg.data.seq_len // (self.variant.devices * cfg.train.micro_batches)
        tokens = once * (cfg.train.micro_batches if TRAIN.value else 1)
        platform = "cpu" if self.variant.padded else jax.default_backend()
        itemsize = jnp.dtype(cfg.model.compute_dtype).itemsize
        peers = self.mesh.shape["expert"]
        sent = exchange.bytes_sent(cfg.model.moe, platform, peers, cfg.model.expert_dim, once, itemsize)
        return {
            "what": what(),
            "name": self.variant.name,
            "line": self.variant.line,
            "kind": self.variant.kind,
            "devices": self.variant.devices,
            "ms": 1e3 * median,
            "low": 1e3 * min(self.turns),
            "high": 1e3 * max(self.turns),
            "tokens_per_second": tokens / median,  # of a device
            "sent": sent[self.variant.exchange],
            "temporaries": self.timed.temporaries,
            "note": self.note,
            "turns": len(self.turns),  # whose median it is; a row with more of them is of these too
            "flops_per_token": flops_per_token(cfg.model, cfg.data.seq_len),  # of the whole model in training
            "where": self.where,
        }

    def __str__(self) -> str:
        row = self.numbers()
        return (f"{row['name']:<40} {milliseconds(self.turns)}, "
                f"{row['tokens_per_second']:9.0f} tokens/s a device, {row['sent'] / 1e6:8.1f} MB sent, "
                f"{row['flops_per_token'] / 1e9:.3g} GFLOP a token of the model, "
                f"temporaries {row['temporaries'] / 2**30:.2f} GiB, {row['note']}")  # fmt: skip


# --- rows and figure -------------------------------------------------------------------------------------------------


def what() -> str:
    """Describes what is timed by all that decides its work. Rows with another description are not to be compared."""
    cfg, moe = config.build(CONFIG.value), CONFIG.value.model.moe
    return (f"{'training step' if TRAIN.value else 'MoE layer, forward and backward'}: E={moe.num_experts}, "
            f"K={moe.top_k}, D={cfg.model.d_model}, F={moe.d_expert}, {cfg.model.num_layers} layers, "
            f"{cfg.data.batch_size} × {cfg.data.seq_len} tokens a device in {cfg.train.micro_batches} micro-batches, "
            f"{cfg.model.compute_dtype}, weights {cfg.model.param_dtype}, remat {cfg.model.remat}")  # fmt: skip


def measure(devices: list[jax.Device]) -> list[dict[str, Any]]:
    """Times the variants in turns and prints them. One that cannot run here says why."""
    print(f"{what()}, {len(devices)} × {devices[0].device_kind}, jax {jax.__version__}", flush=True)
    rows = []
    pads = (False, True) if PADDED.value and jax.default_backend() != "cpu" else (False,)  # CPU always pads
    named = lambda variant: any(part in variant.name for part in ONLY.value)
    for variant in filter(named, variants(len(devices), KINDS.value, CHUNKS.value, pads)):
        try:
            rows.append(Row(variant, devices))
            rows[-1].turn()
            print(f"first turn of {rows[-1]}", flush=True)
        except Exception as error:  # the others can be compared all the same
            rows = [row for row in rows if row.turns]
            why = " ".join(str(error).split())[:200]
            print(f"{variant.name:<40} cannot run here: {type(error).__name__}: {why}", flush=True)
    found = keep(rows)
    for _ in range(ROUNDS.value - 1):
        for row in rows:
            row.turn()
        found = keep(rows)
    for row, made in zip(rows, found, strict=True):
        print(f"{row}" + (f", {made['share']:.2f} of one device" if made["share"] else ""), flush=True)
    return found


def keep(rows: list[Row]) -> list[dict[str, Any]]:
    """The numbers of rows, after a round, which are appended to --rows."""
    found = [row.numbers() for row in rows]
    alone = {row["kind"]: row["tokens_per_second"] for row in found if row["devices"] == 1}
    for made in found:
        made["share"] = made["tokens_per_second"] / alone[made["kind"]] if made["kind"] in alone else None
    if ROWS.value:
        Path(ROWS.value).parent.mkdir(parents=True, exist_ok=True)
        with open(ROWS.value, "a", encoding="utf-8") as f:
            f.writelines(json.dumps(made) + "\n" for made in found)
    return found


def main(_):
    if not ROUNDS.value and not (ROWS.value and FIGURE.value):
        raise UserError("--rounds=0: times nothing; needs --rows, a file that is there, and --figure")
    if unknown := [kind for kind in KINDS.value if kind not in ("plain", "latent", *OF_TRAINING)]:
        raise UserError(f"--kinds={unknown[0]}: must be among plain, latent, {', '.join(OF_TRAINING)}")
    layers = CONFIG.value.model.num_layers
    if (order := [kind for kind in KINDS.value if kind in OF_TRAINING]) and not TRAIN.value:
        raise UserError(f"--kinds={order[0]}: orders blocks; needs --train")
    if order and (layers < 4 or layers % 2):
        raise UserError(f"--kinds={order[0]}: needs an even model.num_layers ≥ 4, not {layers}")
    found = measure(jax.devices()[: DEVICES.value or None]) if ROUNDS.value else []
    if FIGURE.value:
        found = read(ROWS.value) if ROWS.value else found
        if not found:
            raise UserError(f"--figure={FIGURE.value}: there is no row to draw: no variant could run")
        draw(found).savefig(FIGURE.value, dpi=160)


if __name__ == "__main__":
    cli.run(main)
