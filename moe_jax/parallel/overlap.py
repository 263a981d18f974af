"""When XLA sends: options of the compiler, and a barrier that brings gradients forward."""

import functools
import os

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from moe_jax.parallel.sharding import BATCH, Tree


def compiler_options(mesh: Mesh) -> dict[str, bool]:
    """What XLA is told for programs whose devices talk: on GPUs, to send while it computes, which it does not unasked.

    If the user's XLA_FLAGS name it, they decide.
    """
    flag, device = "xla_gpu_enable_latency_hiding_scheduler", mesh.devices.flat[0]
    if mesh.size == 1 or device.platform != "gpu" or flag in os.environ.get("XLA_FLAGS", ""):
        return {}
    return {flag: True}


@jax.custom_vjp
def reduce_first(x: Array, weights: Tree) -> tuple[Array, Tree]:
    """Both unchanged; going back, the gradient of x waits for those of `weights`, summed over the mesh.

    x: what a layer starts from, split as `BATCH`; weights, a pytree: those of a later part of the layer, so that what
    lies between the two is computed while the sums are on their way. Left to itself, XLA's scheduler for GPUs puts the
    weight gradients of all layers, and all that is sent of them, behind the backward pass of the first layer, where too
    little is left to compute beside them. The schedulers of other platforms are left to themselves.
    """
    return x, weights


def _wait(dx: Array, dws: Tree) -> Array:
    """dx, once a number of each of dws is there. XLA removes optimization barriers before it schedules, so the
    dependency is one of data: an infinite gradient, of which every later one is as good as NaN, makes it NaN."""
    bad = functools.reduce(jnp.logical_or, (jnp.isinf(dw[(0,) * dw.ndim]) for dw in jax.tree.leaves(dws)))
    return jnp.where(bad, jnp.nan, dx).astype(dx.dtype)


def _reduce_first_bwd(_, gradients):
    dx, dws = gradients
    on_gpu = functools.partial(jax.lax.platform_dependent, cuda=_wait, default=lambda dx, dws: dx)
    specs = jax.tree.map(lambda dw: jax.typeof(dw).sharding.spec, dws)
    return jax.shard_map(on_gpu, in_specs=(BATCH, specs), out_specs=BATCH)(dx, dws), dws


reduce_first.defvjp(lambda x, weights: ((x, weights), None), _reduce_first_bwd)
