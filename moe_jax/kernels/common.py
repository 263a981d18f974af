"""The marks that `shard_map` wants on what kernels give."""

import jax
from jaxtyping import Array


def varying_like(y: Array, *like: Array) -> Array:
    """y, marked as varying over the mesh axes of `like`: loop carries start and kernels end without the mark."""
    axes = {a: None for x in like for a in jax.typeof(x).manual_axis_type.varying}
    missing = tuple(a for a in axes if a not in jax.typeof(y).manual_axis_type.varying)
    return jax.lax.pcast(y, missing, to="varying") if missing else y
