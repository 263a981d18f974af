"""Mesh axes: those named in an entry of a PartitionSpec, and those that a value inside `shard_map` varies over."""

import jax
from jaxtyping import Array


def as_tuple(names: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes that an entry of a PartitionSpec names."""
    return () if names is None else names if isinstance(names, tuple) else (names,)


def varying_like(y: Array, *like: Array) -> Array:
    """Marks y as varying over the mesh axes of `like`. Initial loop carries and kernels' results need it."""
    axes = {a: None for x in like for a in jax.typeof(x).manual_axis_type.varying}
    missing = tuple(a for a in axes if a not in jax.typeof(y).manual_axis_type.varying)
    return jax.lax.pcast(y, missing, to="varying") if missing else y
