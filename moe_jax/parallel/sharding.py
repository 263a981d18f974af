"""Mesh construction, and the table from logical axes to mesh axes.

The mesh always has the axes of `AXES`, all Explicit; an axis of size 1 is kept. The batch is split over all three.

| tensor                       | spec                                                         |
|------------------------------|--------------------------------------------------------------|
| activations `[B, S, D]`      | `(data, fsdp, expert), None, None`                           |
| expert weights `[L, E, D, F]`| `None, (expert, fsdp), None, None` if it divides E           |
|                              | `None, expert, fsdp, None`, or `fsdp` on F, if it does not   |
| rows of a memory `[L, n², D]`| `None, (fsdp, expert), None`                                 |
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
# Logical axes of weights: those that may be sharded, in the order in which they are tried, and those that never are.
FSDP_ORDER = ("vocab", "embed", "mlp", "heads", "memory")
REPLICATED = (
    "layers", "labels", "norm", "latent", "rank", "router_embed", "router_width", "router_experts", "keys", "value",
)  # fmt: skip


def make_mesh(shape: tuple[int, int, int], devices=None) -> Mesh:
    """The mesh of `(data, fsdp, expert)` sizes over the first of `devices` (default: all).

    A mesh axis may be a part of an axis of a TPU's torus (8 chips of 4 × 4 × 4). Where there are several TPU slices,
    `data` is divided between them, so that only its sums cross the network. Raises ConfigError where it cannot be.
    """
    devices = list(jax.devices() if devices is None else devices)
    if len(shape) != 3 or not 0 < math.prod(shape) <= len(devices):
        rule = f"must be three sizes (data, fsdp, expert) whose product is at most the {len(devices)} devices"
        raise ValueError(f"make_mesh: {tuple(shape)} {rule}")
    devices = devices[: math.prod(shape)]
    slices = count_slices(devices)
    rule = f"must be a multiple of the {slices} slices: only data lies across them"
    require(shape[0] % slices == 0, "mesh.data", shape[0], rule, f"nearest valid: {-(-shape[0] // slices) * slices}")
    if slices > 1:
        slice_shape = (shape[0] // slices, *shape[1:])
        sizes = (slice_shape, (slices, 1, 1))
        placed = mesh_utils.create_hybrid_device_mesh(*sizes, devices, allow_split_physical_axes=True)
    else:
        placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(AxisType.Explicit,) * 3)


def count_slices(devices) -> int:
    """The number of TPU slices among these devices. Chips of one slice are wired together; a network joins slices."""
    return len({getattr(d, "slice_index", None) for d in devices if d.platform == "tpu"} or {None})


def weight_spec(
    axes: tuple[str, ...], shape: tuple[int, ...], sizes: dict[str, int], *, cut_experts: bool = False
) -> PartitionSpec:
    """The spec of a weight with logical `axes` on a mesh with axis `sizes`. Raises ValueError for an unknown axis.

    cut_experts: shards the experts' matrices even where there are enough experts to keep each matrix whole.
    """
    for name in axes:
        if name not in (*FSDP_ORDER, *REPLICATED, "experts"):
            raise ValueError(f"no sharding rule for the logical axis {name!r} of a weight with axes {axes}")
    spec: list = [None] * len(axes)
    wanted = [("fsdp", "expert"), ("fsdp",), ("expert",)]
    if "experts" in axes:
        at = axes.index("experts")
        # Whole matrices are gathered without a transposition, and Muon need not move them.
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
    """Gathers `x` to every device, as a sharded weight is read. Its gradient is reduced and scattered back."""
    return jax.sharding.reshard(x, PartitionSpec(*[None] * x.ndim)) if current_sizes() else x


def reshape_tail(x: jax.Array, keep: int, *tail: int) -> jax.Array:
    """Reshapes all but the first `keep` dimensions of `x` to `tail`; the first `keep` stay sharded.

    The sharding is given explicitly, because a reshape loses that of a dimension of size 1 (one row, one new token).
    """
    if not current_sizes():
        return x.reshape(*x.shape[:keep], *tail)
    spec = [*jax.typeof(x).sharding.spec[:keep], *[None] * len(tail)]
    return x.reshape(*x.shape[:keep], *tail, out_sharding=PartitionSpec(*spec))


def per_device(fn: Callable, split: int, whole: int = 0, *, check_vma: bool = True) -> Callable:
    """Runs fn on each device's own sequences: the first `split` arguments are sharded along the batch, then `whole`
    ones are replicated.

    fn must treat each sequence on its own. The forward pass communicates nothing; the gradient of a replicated argument
    is summed over the mesh once. Without `check_vma` that sum would be missing, so replicated arguments are refused.
    """
    if whole and not check_vma:
        raise ValueError("without check_vma the gradient of a replicated argument would not be summed")
    if not current_sizes():
        return fn
    specs = (BATCH,) * split + (PartitionSpec(),) * whole
    return jax.shard_map(fn, in_specs=specs, out_specs=BATCH, check_vma=check_vma)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of an array whose leading dimension is the batch."""
    return NamedSharding(mesh, BATCH)
