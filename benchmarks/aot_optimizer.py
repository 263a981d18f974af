"""Compiles an optimizer update for TPU pod slices without having them, and measures the compiled program.

    pip install "jax[tpu]"    # brings the TPU compiler, libtpu, in the version that this jax asks for
    JAX_PLATFORMS=cpu python -m benchmarks.aot_optimizer --config=configs/demons_43b.py --config.optim.name=muon \\
        --topology=v5p:2x4x8 --topology=v5p:4x8x8

It needs no TPU and takes minutes. For each chip it prints the Newton–Schulz FLOPs of the plan, beside all matrices'
FLOPs divided by the chips (1.00: no work is repeated and no chip idles); the plan's FLOPs of one step of one batch of
matrices of each group, beside XLA's count, which counts a loop once; the bytes that collectives receive, beside the
plan's; and the bytes of arguments and temporaries.
"""

import math
import time

import jax
from absl import flags

from moe_jax import cli, config, model, optim
from moe_jax.aot import hlo, machines
from moe_jax.optim import groups, newton_schulz
from moe_jax.parallel import sharding
from moe_jax.train.state import abstract_state, parts_of
from moe_jax.tree import flatten

CONFIG = cli.define_config()
TOPOLOGY = flags.DEFINE_multi_string("topology", ["v5p:2x4x8", "v5p:4x8x8"], "TPU topologies, 64 and 256 chips")
MESH = flags.DEFINE_string("mesh", "", "data,fsdp,expert with one -1; default: the config's expert axis, fsdp the rest")


def shape_of(chips: int, cfg: config.RunConfig) -> tuple[int, int, int]:
    if MESH.value:
        sizes = [int(n) for n in MESH.value.split(",")]
    else:
        sizes = [max(cfg.mesh.data, 1), -1, max(cfg.mesh.expert, 1)]
    rest = chips // math.prod(n for n in sizes if n != -1)
    return tuple(rest if n == -1 else n for n in sizes)


def main(_):
    cfg = config.build(CONFIG.value)
    optimizer = optim.make_optimizer(cfg.optim, cfg.train.steps, cfg.model.head_dim)
    for name in TOPOLOGY.value:
        devices = machines.devices(name)
        mesh = sharding.make_mesh(shape_of(len(devices), cfg), devices)
        state = abstract_state(cfg, mesh)
        trained, _ = groups.split(state.params, optim.frozen_paths(cfg.optim, flatten(state.params)))
        began = time.time()
        with jax.set_mesh(mesh):
            compiled = jax.jit(optimizer.update).lower(trained, parts_of(state.opt_state).optimizer, trained).compile()
        memory, moved = compiled.memory_analysis(), {}
        for c in hlo.collectives(compiled.as_text(), dict(mesh.shape)):
            moved[c.kind] = moved.get(c.kind, 0) + c.size  # loops once
        counted = (compiled.cost_analysis() or {}).get("flops", float("nan"))
        with jax.set_mesh(mesh):
            plan = optim.muon_plan(cfg.optim, model.abstract(cfg.model), dict(mesh.shape), cfg.model.head_dim)
        once = sum(r.batch * newton_schulz.flops(*r.shape, 1) for r in plan.rows)
        fair = sum(r.matrices * newton_schulz.flops(*r.shape, plan.steps) for r in plan.rows) / len(devices)
        mib = lambda n: f"{n / 2**20:,.1f} MiB"
        print(
            f"{name}: {len(devices)} x {devices[0].device_kind}, mesh {dict(mesh.shape)}, {time.time() - began:.0f} s"
        )
        print(f"  GFLOP a chip: plan {plan.flops / 1e9:,.1f} = {plan.flops / fair:.2f} of an even share; "
              f"loops once: plan {once / 1e9:,.1f}, XLA {counted / 1e9:,.1f}")  # fmt: skip
        print(f"  plan: {mib(plan.bytes)} sent, {plan.ratio:.3f} of AdamW's traffic; "
              f"program receives {({k: mib(v) for k, v in moved.items()})}")  # fmt: skip
        arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
        print(f"  arguments {mib(arguments)}, temporaries {mib(temporaries)}", flush=True)


if __name__ == "__main__":
    cli.run(main)
