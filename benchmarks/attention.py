"""Compares attention's back ends on this device with `xla` in float32, and times them, with and without segments.

    python -m benchmarks.attention --backends=xla,cudnn
    python -m benchmarks.attention --backends=xla,splash --batch=2 --kv_heads=4
    python -m benchmarks.attention --backends=chunked,cudnn --window=512 --length=8192 --batch=2

It prints one row for each back end and number of segments a row (0: no segments; for many cuDNN needs more than one
call, see nn/packed.py). A row has milliseconds forward and backward; TFLOP/s by the formula 12·B·S²·N·H/2 for the
causal half, which also counts keys of other segments and those outside a window; and the largest error of the result
and of the gradients of q, k and v, relative to the largest entry. In bfloat16 0.01 is rounding. An error near 1, or
NaN, is a wrong result.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks.rows import seconds
from moe_jax import cli
from moe_jax.nn import attend
from moe_jax.parallel import sharding

BACKENDS = flags.DEFINE_list("backends", ["xla", "cudnn"], "back ends to compare")
SEGMENTS = flags.DEFINE_list("segments", ["0", "1", "8", "100"], "segments a row; 0: none")
BATCH = flags.DEFINE_integer("batch", 4, "sequences a device")
LENGTH = flags.DEFINE_integer("length", 4096, "tokens of a sequence")
WINDOW = flags.DEFINE_integer("window", 0, "tokens that a query sees; 0: all before it")
HEADS = flags.DEFINE_integer("heads", 16, "query heads")
KV_HEADS = flags.DEFINE_integer("kv_heads", 16, "key and value heads")
HEAD_DIM = flags.DEFINE_integer("head_dim", 128, "head size")
STEPS = flags.DEFINE_integer("steps", 20, "timed calls")


def operands(rows: int, segments: int) -> tuple:
    """q, k, v, a cotangent and segment ids; documents begin anywhere, the last one of the first row is padding."""
    rng, s = np.random.default_rng(segments), LENGTH.value
    draw = lambda heads: rng.standard_normal((rows, s, heads, HEAD_DIM.value), np.float32)
    ids = 1 + np.sort(rng.integers(0, max(segments, 1), (rows, s)), axis=1).astype(np.int32)
    ids[0] = np.where(ids[0] == ids[0, -1], 0, ids[0])
    qkv = draw(HEADS.value), draw(KV_HEADS.value), draw(KV_HEADS.value)
    return qkv, draw(HEADS.value), ids if segments else None


def main(_):
    devices = jax.device_count()
    mesh, rows = sharding.make_mesh((devices, 1, 1)), BATCH.value * devices
    put = lambda tree: jax.device_put(tree, sharding.batch_sharding(mesh))

    @functools.partial(jax.jit, static_argnums=3)
    def run(qkv, dy, segments, backend):
        y, back = jax.vjp(lambda *x: attend.attend(*x, segments, backend, WINDOW.value), *qkv)
        return y, back(dy.astype(y.dtype))

    for segments in map(int, SEGMENTS.value):
        qkv, dy, ids = operands(rows, segments)
        with jax.set_mesh(mesh):
            host = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (qkv, dy))
            half, one = put(host), put(jax.tree.map(lambda x: x[:devices], (*host, ids)))  # float32 logits are large
            full = jax.tree.map(lambda x: x.astype(jnp.float32), one[:2])
            with jax.default_matmul_precision("highest"):
                want = jax.device_get(run(*full, one[2], "xla"))
            for backend in BACKENDS.value:
                got = jax.device_get(run(*one, backend))
                off = [
                    np.abs(np.asarray(a, np.float32) - b).max() / np.abs(b).max()
                    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
                ]
                step = functools.partial(run, backend=backend)
                time, _ = seconds(step, (*half, put(ids)), STEPS.value, carry=False)
                flops = 6 * rows * LENGTH.value**2 * HEADS.value * HEAD_DIM.value
                print(
                    f"{backend:7} {segments:4} segments a row: {time * 1e3:8.2f} ms, "
                    f"{flops / time / 1e12 / devices:6.1f} TFLOP/s a device, largest error y {off[0]:.1e}, "
                    f"dq {off[1]:.1e}, dk {off[2]:.1e}, dv {off[3]:.1e}",
                    flush=True,
                )
    shape = f"{BATCH.value} x {LENGTH.value} tokens a device, {HEADS.value}/{KV_HEADS.value} heads of {HEAD_DIM.value}"
    print(f"{shape}, {devices} x {jax.devices()[0].device_kind}, jax {jax.__version__}")


if __name__ == "__main__":
    cli.run(main)
