"""Mesh construction, the table from logical axes to mesh axes, and when XLA sends.

The mesh always has the axes of `AXES`, all Explicit; an axis of size 1 is kept. The batch is split over all three.

| tensor                       | spec                                                         |
|------------------------------|--------------------------------------------------------------|
| activations `[B, S, D]`      | `(data, fsdp, expert), None, None`                           |
| expert weights `[L, E, D, F]`| `None, (expert, fsdp), None, None` if it divides E           |
|                              | `None, expert, fsdp, None`, or `fsdp` on F, if it does not   |
| other matrices               | `(fsdp, expert)` on the first of `FSDP_ORDER` that divides   |
| router, norms                | replicated                                                   |
| optimizer moments            | as their parameter (their type carries it)                   |
"""

import math
from collections.abc import Callable
from typing import TypeVar

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moe_jax.config.fields import require

Tree = TypeVar("Tree")
AXES = ("data", "fsdp", "expert")
BATCH = PartitionSpec(AXES)  # the leading (batch) dimension of activations and data
# Logical axes of weights: what may be sharded, in the order in which it is tried, and what never is.
FSDP_ORDER = ("vocab", "embed", "mlp", "heads")
REPLICATED = ("layers", "norm", "latent", "router_embed", "router_experts")


def make_mesh(shape: tuple[int, int, int], devices=None) -> Mesh:
    """The mesh of `(data, fsdp, expert)` sizes over the first of `devices` (default: all).

    An axis may be a part of an axis of a TPU's torus (8 chips of 4 × 4 × 4). Of several TPU slices each has its own
    part of `data`, so that nothing else crosses the network between them; ConfigError where it cannot be divided so.
    """
    devices = list(jax.devices() if devices is None else devices)[: math.prod(shape)]
    slices = count_slices(devices)
    rule = f"must be a multiple of the {slices} slices: only data lies across them"
    require(shape[0] % slices == 0, "mesh.data", shape[0], rule, f"nearest valid: {-(-shape[0] // slices) * slices}")
    if slices > 1:
        of_slice = (shape[0] // slices, *shape[1:])
        placed = mesh_utils.create_hybrid_device_mesh(of_slice, (slices, 1, 1), devices, allow_split_physical_axes=True)
    else:
        placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(AxisType.Explicit,) * 3)


def count_slices(devices) -> int:
    """TPU slices that these devices are of: within one chips are wired together, between them there is a network."""
    return len({getattr(d, "slice_index", None) for d in devices if d.platform == "tpu"} or {None})


def weight_spec(
    axes: tuple[str, ...], shape: tuple[int, ...], sizes: dict[str, int], *, cut_experts: bool = False
) -> PartitionSpec:
    """The spec of a weight with logical `axes` on a mesh with axis `sizes`. Total: an unknown axis is a ValueError.

    cut_experts: as if there were too few of them for whole matrices.
    """
    for name in axes:
        if name not in (*FSDP_ORDER, *REPLICATED, "experts"):
            raise ValueError(f"no sharding rule for the logical axis {name!r} of a weight with axes {axes}")
    spec: list = [None] * len(axes)
    wanted = [("fsdp", "expert"), ("fsdp",), ("expert",)]
    if "experts" in axes:
        at = axes.index("experts")
        # Whole matrices, if there are enough: they are gathered without a transposition, and Muon's need not travel.
        if not cut_experts and shape[at] % (sizes["expert"] * sizes["fsdp"]) == 0:
            spec[at] = ("expert", "fsdp")
            return PartitionSpec(*spec)
        spec[at] = "expert"
        wanted = [("fsdp",)]
    # A matrix that no axis divides stays replicated: right, only larger. `train.py` prints the bytes per device.
    for mesh_axes in wanted:
        parts = math.prod(sizes[a] for a in mesh_axes)
        for name in FSDP_ORDER:
            if name in axes and shape[axes.index(name)] % parts == 0:
                spec[axes.index(name)] = mesh_axes if len(mesh_axes) > 1 else mesh_axes[0]
                return PartitionSpec(*spec)
    return PartitionSpec(*spec)


def current_sizes() -> dict[str, int]:
    """Axis sizes of the mesh in use (`jax.set_mesh`); empty outside one."""
    return dict(jax.sharding.get_abstract_mesh().shape)


def replicate(x: jax.Array) -> jax.Array:
    """`x` gathered to every device: how a sharded weight is read. Its gradient is reduced and scattered back."""
    return jax.sharding.reshard(x, PartitionSpec(*[None] * x.ndim)) if current_sizes() else x


def reshape_tail(x: jax.Array, keep: int, *tail: int) -> jax.Array:
    """`x` with all but its first `keep` dimensions reshaped to `tail`; those `keep` stay sharded as they are.

    Said explicitly, because a reshape forgets the sharding of a dimension of size 1 (one row, one new token).
    """
    if not current_sizes():
        return x.reshape(*x.shape[:keep], *tail)
    spec = [*jax.typeof(x).sharding.spec[:keep], *[None] * len(tail)]
    return x.reshape(*x.shape[:keep], *tail, out_sharding=PartitionSpec(*spec))


def per_device(fn: Callable, split: int, whole: int = 0, *, check_vma: bool = True) -> Callable:
    """fn on each device's own sequences: `split` arguments cut along the batch, then `whole` ones replicated.

    For functions of one sequence at a time: nothing is communicated going forward, and the gradient of a `whole`
    argument is summed over the mesh once. Without `check_vma` there must be none: nobody would sum it.
    """
    if whole and not check_vma:
        raise ValueError("without check_vma the gradient of a replicated argument would not be summed")
    if not current_sizes():
        return fn
    specs = (BATCH,) * split + (PartitionSpec(),) * whole
    return jax.shard_map(fn, in_specs=specs, out_specs=BATCH, check_vma=check_vma)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, BATCH)
