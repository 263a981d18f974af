"""Reads the memory of a training step from the compiled program, for each policy of recomputation (`model.remat`).

    python -m benchmarks.remat --config=configs/olmoe_8l_bench.py                        # for the devices at hand
    pip install "jax[tpu]"    # brings the TPU compiler, libtpu, in the version that this jax asks for
    JAX_PLATFORMS=cpu python -m benchmarks.remat --config=configs/olmoe_8l_bench.py --topology=v5p:2x2x1

Nothing is run, so a topology needs no TPU. It prints one row a policy, for one device: bytes a token kept between the
forward and the backward pass of a layer; bytes of temporaries (activations, gradients and work space), of arguments
(state and batch) and of those arguments that are donated; FLOPs by XLA, which counts a loop once, so they can only
compare policies; the number of attention kernels; and the largest array that has S twice among its dimensions, like
`[B, N, S, S]`.
"""

import dataclasses
import math
import os
import re
import time

import jax
import jax.numpy as jnp
from absl import flags

from moe_jax import cli, config, model
from moe_jax.aot import compile_only, machines
from moe_jax.moe.layer import TokenInfo
from moe_jax.moe.program import Program
from moe_jax.nn import remat
from moe_jax.parallel import sharding
from moe_jax.train.state import abstract_state, choose_program

CONFIG = cli.define_config()
TOPOLOGY = flags.DEFINE_string("topology", "", "compile for the first chip of a TPU topology that need not be here")
POLICY = flags.DEFINE_multi_string("policy", list(remat.POLICIES), "policies to compare")
HLO = cli.define_path("hlo", None, "write the compiled programs to this folder")


def mesh_of(cfg: config.RunConfig) -> jax.sharding.Mesh:
    chips = machines.devices(TOPOLOGY.value)[:1] if TOPOLOGY.value else jax.devices()
    return compile_only.mesh_of(cfg, chips)


def kept(cfg: config.RunConfig, mesh: jax.sharding.Mesh) -> float:
    """Bytes that the backward pass of one MoE layer is given, a token, weights aside: by differences."""

    m = cfg.model
    program = Program.choose(m, mesh, seq_len=cfg.data.seq_len)

    def total(layers: int, batch: int) -> int:
        this = dataclasses.replace(cfg, model=dataclasses.replace(m, num_layers=m.num_dense_layers + layers, layers=""))
        ints = jax.ShapeDtypeStruct((batch, cfg.data.seq_len), jnp.int32, sharding=sharding.batch_sharding(mesh))
        info = TokenInfo(ints.update(dtype=bool), ints, label=ints if m.labels else None)
        inputs = model.Inputs(ints, ints, ints if m.segment_mask else None, info)
        graph, state = model.abstract(this.model, program), abstract_state(this, mesh)

        def residuals(params, bias, inputs):
            return jax.vjp(lambda params: graph.bind(params, bias)(inputs)[:2], params)[1]

        found = jax.eval_shape(residuals, state.params, state.router_bias, inputs)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(found))

    b = mesh.size
    with jax.set_mesh(mesh):
        more = (total(2, 2 * b) - total(2, b)) - (total(1, 2 * b) - total(1, b))
    return more / (b * cfg.data.seq_len)


def square_array(text: str, s: int) -> str:
    """The largest array of a compiled module with S twice among its dimensions; "none" if there is none."""
    shapes = {m.group(0): [int(n) for n in m.group(2).split(",")] for m in re.finditer(r"\b(\w+)\[([\d,]+)\]", text)}
    twice = [(math.prod(dims), name) for name, dims in shapes.items() if dims.count(s) > 1]
    return max(twice, default=(0, "none"))[1]


def main(_):
    cfg = config.build(CONFIG.value)
    mesh = mesh_of(cfg)
    print(choose_program(cfg, mesh).why)
    print(
        f"{mesh.size} x {mesh.devices.flat[0].device_kind}, jax {jax.__version__}, {cfg.model.num_layers} layers, "
        f"{cfg.data.batch_size} x {cfg.data.seq_len} tokens",
        flush=True,
    )
    for policy in POLICY.value:
        began = time.time()
        this = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, remat=policy))
        row = f"{policy:10} kept {kept(this, mesh) / 1e3:7.1f} kB a token and layer, "
        try:
            compiled = compile_only.compile_step(this, mesh)
        except jax.errors.JaxRuntimeError as e:  # does not fit
            print(row + " ".join(str(e).split())[:160], flush=True)
            continue
        memory, text = compiled.memory_analysis(), compiled.as_text()
        if HLO.value:
            os.makedirs(HLO.value, exist_ok=True)
            with open(os.path.join(HLO.value, f"{policy}.txt"), "w", encoding="utf-8") as f:
                f.write(text)
        kernels = sorted(set(re.findall(r"splash_mha_\w+?(?=_(?:no_)?residuals)|fmhaSoftmax\w*", text)))
        gib = lambda n: f"{n / 2**30:.2f} GiB"
        print(
            f"{row}temporaries {gib(memory.temp_size_in_bytes)}, arguments {gib(memory.argument_size_in_bytes)}, "
            f"aliased {gib(memory.alias_size_in_bytes)}, XLA {compiled.cost_analysis()['flops'] / 1e12:.2f} TFLOP, "
            f"kernels {', '.join(kernels) or 'none'}, [S, S] {square_array(text, cfg.data.seq_len)}, "
            f"{time.time() - began:.0f} s to compile",
            flush=True,
        )


if __name__ == "__main__":
    cli.run(main)
