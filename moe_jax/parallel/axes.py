"""Mesh axes: of an entry of a PartitionSpec, and the marks that `shard_map` wants on results."""

import jax
from jaxtyping import Array


def as_tuple(names: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """An entry of a PartitionSpec."""
    return () if names is None else names if isinstance(names, tuple) else (names,)


def varying_like(y: Array, *like: Array) -> Array:
    """y, marked as varying over the mesh axes of `like`: loop carries start and kernels end without the mark."""
    axes = {a: None for x in like for a in jax.typeof(x).manual_axis_type.varying}
    missing = tuple(a for a in axes if a not in jax.typeof(y).manual_axis_type.varying)
    return jax.lax.pcast(y, missing, to="varying") if missing else y
