"""Time one training step of a config on the devices at hand: random tokens, the router's own choices.

    python -m benchmarks.train_step --config=configs/olmoe_8l_bench.py --steps=10

Prints one row: step time, tokens/s, model TFLOP/s by formula (6 per active matmul weight and token, plus causal
attention), MFU against the datasheet, maximum expert load, dropped share, peak memory, and the versions.
"""

import time

import jax
from absl import flags

from benchmarks.rows import random_rows
from moe_jax import cli, config, metrics, model, sharding, step

CONFIG = cli.define_config()
STEPS = flags.DEFINE_integer("steps", 10, "timed steps", 1)
WARMUP = flags.DEFINE_integer("warmup", 4, "steps before the clock starts, compilation included", 1)


def main(_):
    cfg = config.build(CONFIG.value)
    device = jax.devices()[0]
    mesh = sharding.make_mesh(config.check_devices(cfg, jax.device_count(), device.platform, device.device_kind))
    print(step.describe_backends(cfg, mesh), flush=True)
    batch = step.put_batch(random_rows(cfg, step.process_rows(mesh, cfg.data.batch_size)), mesh, cfg)
    state, train_step = step.init_state(cfg, mesh), step.make_train_step(cfg, mesh)
    began = time.time()
    for _ in range(WARMUP.value):
        state, aux = train_step(state, batch)
    first_loss = float(aux["loss"])
    warm = time.time() - began
    began = time.perf_counter()
    for _ in range(STEPS.value):
        state, aux = train_step(state, batch)
    jax.block_until_ready(state)
    seconds = (time.perf_counter() - began) / STEPS.value

    tokens = cfg.data.batch_size * cfg.data.seq_len
    flops = model.flops_per_token(cfg.model, cfg.data.seq_len) * tokens
    peak, source = metrics.peak_flops(device)
    memory = (device.memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30
    router = metrics.router_metrics(metrics.to_host(aux["router"]), cfg.model.moe.top_k)
    print(
        f"moe_jax {model.count_parameters(cfg.model).total / 1e9:.2f}B: step {seconds * 1e3:.1f} ms, "
        f"{tokens / seconds:.0f} tokens/s, {flops / seconds / 1e12:.1f} TFLOP/s, "
        f"MFU {flops / seconds / peak / mesh.size:.1%} of {peak * mesh.size / 1e12:.2f} ({source}), "
        f"max load {router['max_load']:.2f}, dropped {router['dropped']:.1%}, peak {memory:.1f} GiB a device, "
        f"warm-up {warm:.0f} s, loss {first_loss:.3f} -> {float(aux['loss']):.3f}, "
        f"{mesh.size} x {device.device_kind}, jax {jax.__version__}",
        flush=True,
    )


if __name__ == "__main__":
    cli.run(main)
