"""Moves parameters to devices and back one tensor at a time. Each device gets its own part of a tensor only.

There is no communication: the buffers of a parameter's shards are written one by one, in place, and become one array at
the end. So a host never holds more than one tensor.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from moe_jax.tree import flatten, path_of


class Assembly:
    """Arrays like `abstract` (ShapeDtypeStructs with shardings), which `put` fills part by part."""

    def __init__(self, abstract: Any):
        self._abstract = abstract
        self._leaves = flatten(abstract)
        self._buffers: dict[str, dict[jax.Device, jax.Array]] = {path: {} for path in self._leaves}

    def put(self, path: str, index: tuple[int, ...], value: np.ndarray) -> None:
        """Sets leaf[index] = value, cast to the leaf's dtype, on the devices of this process that hold part of it."""
        leaf, buffers = self._leaves[path], self._buffers[path]
        for device, where in leaf.sharding.addressable_devices_indices_map(leaf.shape).items():
            bounds = [s.indices(n)[:2] for s, n in zip(where, leaf.shape, strict=True)]
            if device not in buffers:
                shape = tuple(stop - start for start, stop in bounds)
                buffers[device] = _zeros(shape, leaf.dtype, SingleDeviceSharding(device))
            if all(start <= i < stop for i, (start, stop) in zip(index, bounds, strict=False)):
                mine = value[tuple(slice(*b) for b in bounds[len(index) :])].astype(leaf.dtype)
                at = [i - start for i, (start, _) in zip(index, bounds, strict=False)]
                buffers[device] = _write(buffers[device], jax.device_put(mine, device), tuple(at))
        jax.block_until_ready([*buffers.values()])  # from here on the caller may free the value

    def finish(self) -> Any:
        """The tree of arrays."""

        def made(path, leaf):
            shards = list(self._buffers.pop(path_of(path)).values())
            return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards)

        return jax.tree_util.tree_map_with_path(made, self._abstract)


def _zeros(shape: tuple[int, ...], dtype: Any, where: SingleDeviceSharding) -> jax.Array:
    """Zeros, made on their own device: `jnp.zeros(device=…)` makes them on the first device and sends a copy."""
    return jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=where)(shape, np.dtype(dtype))


@functools.partial(jax.jit, donate_argnums=0)
def _write(buffer: jax.Array, value: jax.Array, at: tuple) -> jax.Array:
    start = [*at, *[0] * value.ndim]
    return jax.lax.dynamic_update_slice(buffer, value.reshape((1,) * len(at) + value.shape), start)


@jax.jit
def _read(buffer: jax.Array, at: tuple) -> jax.Array:
    shape = buffer.shape[len(at) :]
    return jax.lax.dynamic_slice(buffer, [*at, *[0] * len(shape)], (1,) * len(at) + shape).reshape(shape)


@functools.partial(jax.jit, static_argnums=1)
def _all_finite(x: jax.Array, dtype: np.dtype) -> jax.Array:
    return jnp.all(jnp.isfinite(x.astype(dtype)))


def is_finite(x: jax.Array, dtype: np.dtype) -> bool:
    """Whether every number of x on devices of this process is finite after a cast to `dtype`."""
    return all(_all_finite(shard.data, dtype) for shard in x.addressable_shards if shard.replica_id == 0)


def fetch(x: jax.Array, index: tuple[int, ...]) -> np.ndarray:
    """x[index] on the host. Raises ValueError unless all its shards are on devices of this process."""
    out = np.empty(x.shape[len(index) :], x.dtype)
    missing = math.prod(out.shape)
    for shard in x.addressable_shards:
        bounds = [s.indices(n)[:2] for s, n in zip(shard.index, x.shape, strict=True)]
        inside = all(start <= i < stop for i, (start, stop) in zip(index, bounds, strict=False))
        if shard.replica_id == 0 and inside:
            at = tuple(i - start for i, (start, _) in zip(index, bounds, strict=False))
            part = np.asarray(_read(shard.data, at))
            out[tuple(slice(*b) for b in bounds[len(index) :])] = part
            missing -= part.size
    if missing:
        raise ValueError("a part of the array is on devices of another process")
    return out
