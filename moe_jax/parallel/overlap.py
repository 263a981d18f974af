"""When XLA communicates: compiler options, and a barrier that schedules the sums of gradients earlier."""

import functools
import os

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from moe_jax.parallel.sharding import BATCH, Tree


def compiler_options(mesh: Mesh) -> dict[str, bool]:
    """XLA options for a program on this mesh: on GPUs they let it communicate while it computes.

    An option that the user's XLA_FLAGS name is left to them.
    """
    flag, device = "xla_gpu_enable_latency_hiding_scheduler", mesh.devices.flat[0]
    if mesh.size == 1 or device.platform != "gpu" or flag in os.environ.get("XLA_FLAGS", ""):
        return {}
    return {flag: True}


@jax.custom_vjp
def reduce_first(x: Array, weights: Tree) -> tuple[Array, Tree]:
    """Identity. In the backward pass the gradient of x is delayed until the summed gradients of `weights` arrive.

    x: the input of a layer, sharded as `BATCH`. weights: a pytree of weights of a later part of the layer. XLA then
    computes the gradients between the two while the sums are under way. Without this, its scheduler for GPUs puts the
    weight gradients of all layers, and their sums, after the backward pass of the first layer, where too little
    computation is left to overlap with them. On other platforms the gradient passes through.
    """
    return x, weights


def _wait(dx: Array, dws: Tree) -> Array:
    """dx, made to depend on one entry of each of dws. XLA removes optimization barriers before it schedules, so the
    dependency must be one of data: an infinite entry makes dx NaN, and such a step is lost in any case."""
    bad = functools.reduce(jnp.logical_or, (jnp.isinf(dw[(0,) * dw.ndim]) for dw in jax.tree.leaves(dws)))
    return jnp.where(bad, jnp.nan, dx).astype(dx.dtype)


def _reduce_first_bwd(_, gradients):
    dx, dws = gradients
    on_gpu = functools.partial(jax.lax.platform_dependent, cuda=_wait, default=lambda dx, dws: dx)
    specs = jax.tree.map(lambda dw: jax.typeof(dw).sharding.spec, dws)
    return jax.shard_map(on_gpu, in_specs=(BATCH, specs), out_specs=BATCH)(dx, dws), dws


reduce_first.defvjp(lambda x, weights: ((x, weights), None), _reduce_first_bwd)
