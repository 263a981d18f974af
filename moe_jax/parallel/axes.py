"""Mesh axes: those named in a PartitionSpec, and those a value in `shard_map` varies over; the kind of the devices."""

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


def current_kind() -> str:
    """The kind of the devices of the mesh in use, or without one those of the process, such as "cpu"."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    return device.device_kind if device else jax.devices()[0].device_kind
