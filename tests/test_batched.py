"""Grouped matmul by XLA's batched products: passes, devices, memory, other GPUs. Values: test_grouped_matmul.py."""

import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moe_jax.aot import machines
from moe_jax.kernels import batched, choose_backend, grouped_matmuls

SIZES = {"balanced": (213, 214, 213), "past_C": (600, 0, 30), "one_group": (0, 0, 640), "few": (7, 0, 2)}


def products(x, ws, sizes, dys, backend):
    """The two products, and their gradients in x and ws."""
    ys, vjp = jax.vjp(lambda x, ws: grouped_matmuls(x, ws, sizes, backend), x, ws)
    return ys, *vjp(dys)


def test_two_products_in_several_passes(monkeypatch):
    """Two matrices a group, blocks of 112 rows, two of them a pass: two passes where one group has all rows.

    Two devices have other rows, sizes and matrices, and so other numbers of passes.
    """
    monkeypatch.setattr(batched, "PASS", 2)
    assert batched.heights(640, 3) == (320, 112)
    rng = np.random.default_rng(0)
    x, w, w2, dy, dy2 = (
        jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((1280, 6), *[(6, 6, 4)] * 2, *[(1280, 4)] * 2)
    )
    with jax.set_mesh(jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))):
        split = lambda tree: jax.device_put(tree, P("d"))
        run = jax.jit(jax.shard_map(functools.partial(products, backend="batched"), in_specs=P("d"), out_specs=P("d")))
        found = {
            pair: run(*split((x, (w, w2), jnp.asarray((*SIZES[pair[0]], *SIZES[pair[1]])), (dy, dy2))))
            for pair in (("balanced", "one_group"), ("past_C", "few"))
        }
    one = jax.jit(functools.partial(products, backend="reference"))
    for pair, got in found.items():
        for device, name in enumerate(pair):
            half = lambda a, device=device: jnp.split(jnp.asarray(np.asarray(a)), 2)[device]
            want = one(*jax.tree.map(half, (x, (w, w2))), jnp.asarray(SIZES[name]), jax.tree.map(half, (dy, dy2)))
            for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
                np.testing.assert_allclose(half(a), b, rtol=2e-5, atol=2e-5, err_msg=name)


def lowered(rows, experts, width, hidden, dtype, **where):
    shape = lambda *s, of=dtype: jax.ShapeDtypeStruct(s, of, **where)
    run = jax.jit(lambda x, w, sizes, dy: products(x, (w,), sizes, (dy,), "batched"))
    sizes = shape(experts, of=jnp.int32)
    return run.lower(shape(rows, width), shape(experts, width, hidden), sizes, shape(rows, hidden))


def memory_and_bound(compiled, rows, experts, width, hidden, itemsize):
    """Bytes of temporaries, and a bound: the buffers of the first products, of one pass, and dw in float32 together."""
    first, block = batched.heights(rows, experts)
    buffers = experts * first + batched.PASS * block
    bound = itemsize * (2 * buffers * (width + hidden) + rows * (width + hidden) + batched.PASS * width * hidden)
    return compiled.memory_analysis().temp_size_in_bytes, bound + 4 * (experts + batched.PASS) * width * hidden


def test_memory_grows_with_rows_not_with_rows_and_experts():
    size = (4096, 64, 32, 16)
    found, bound = memory_and_bound(lowered(*size, jnp.float32).compile(), *size, 4)
    assert found < bound < 4096 * 64 * 16 * 4


@pytest.mark.slow
@pytest.mark.parametrize("machine", ["a100:1", "l40s:1", "b200:1"])
def test_it_compiles_for_gpus_that_are_not_here(machine):
    """The products of an OLMoE layer in bfloat16: what `auto` takes there, no other matrix product, bounded memory."""
    if importlib.util.find_spec("jax_plugins") is None or importlib.util.find_spec("jax_plugins.xla_cuda13") is None:
        pytest.skip("needs jax_plugins.xla_cuda13")
    (device,) = machines.devices(machine)
    assert choose_backend("auto", "gpu", device.device_kind, "bfloat16")[0] == "batched"
    size = (65536, 64, 2048, 1024)
    compiled = lowered(*size, jnp.bfloat16, sharding=jax.sharding.SingleDeviceSharding(device)).compile(
        {"xla_gpu_autotune_level": 0}
    )
    found, bound = memory_and_bound(compiled, *size, 2)
    assert found < bound < 2.5e9
    shapes = re.findall(r"= \w+\[([\d,]+)\].* (?:calls=%gemm_fusion|custom_call_target=\"__cublas)", compiled.as_text())
    first, block = batched.heights(65536, 64)
    one = {f"64,{first},1024", f"64,{first},2048", "64,2048,1024"}
    assert {*shapes} >= one and {*shapes} - one <= {f"8,{block},1024", f"8,{block},2048", "8,2048,1024"}
