"""Leaves of a sharded tree as batches of matrices: which axes form a matrix, and which mesh axes cut it."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float

from moe_jax.parallel.axes import as_tuple


class Matrices(NamedTuple):
    """The axes of a leaf that form its matrices; all others are batch axes."""

    axes: tuple[int, int] = (-2, -1)  # (input, output): x @ W sums over the first
    heads: tuple[int, int] | None = None  # (0 or 1, size): cuts the input or output axis into heads, each a matrix


# (path such as "layers/moe/w_up", leaf) → the leaf's matrices. Raises ValueError for a leaf that it does not know.
Rule = Callable[[str, Any], Matrices]


def one_matrix(path: str, leaf: Any) -> Matrices:
    """The default rule: a 2-D leaf is one matrix. A leaf of any other rank needs a rule of its own."""
    if leaf.ndim != 2:
        raise ValueError(f"muon: no rule says which axes of {path} {leaf.shape} form a matrix; pass `matrices`")
    return Matrices()


class Leaf(NamedTuple):
    """A leaf as a batch of matrices on its mesh. Mesh axes of size 1 appear only in `spec`."""

    index: int  # in the flattened tree
    path: str
    shape: tuple[int, ...]  # global
    local: tuple[int, ...]  # shape of one device's shard
    mesh: Any  # abstract; None where no axis is Explicit, so that collectives cannot be written
    spec: PartitionSpec
    axes: tuple[int, int]  # input and output, counted from the front
    heads: tuple[int, int] | None  # heads that are separated before matrices are made whole,
    heads_after: tuple[int, int] | None  # or after, where a device holds less than a head
    matrix: tuple[int, int]  # inputs and outputs of one matrix
    whole: tuple[int, int]  # inputs and outputs that are made whole: one matrix, or all heads with heads_after
    cut: tuple[tuple[str, ...], tuple[str, ...]]  # the mesh axes that cut its inputs and outputs
    idle: tuple[str, ...]  # the mesh axes over which the leaf is not sharded

    @property
    def transposed(self) -> bool:
        """Whether its matrices join a group as outputs × inputs, so that those of w_down are grouped with w_up's."""
        inputs, outputs = ((n, -len(cut)) for n, cut in zip(self.whole, self.cut, strict=True))
        return inputs > outputs and self.heads_after is None

    def oriented(self, pair: tuple) -> tuple:
        """A pair (of inputs, of outputs) in the order of the group."""
        return pair[::-1] if self.transposed else pair

    @property
    def key(self) -> tuple:
        """The key of its group: leaves with the same key form one."""
        # Where nothing moves, a group of several leaves would only cost a copy.
        alone = self.index if not (self.idle or any(self.cut)) else None
        # Mesh axes of size 1 cut nothing, but shard_map's checks do not join arrays that name them with others.
        named = frozenset(name for names in self.spec for name in as_tuple(names))
        return self.mesh, self.oriented(self.whole), self.oriented(self.cut), named, self.heads_after, alone

    @property
    def pieces(self) -> int:
        """The number of matrices that one device holds a piece of, or the whole."""
        return math.prod(self.local) * self.size(*self.cut[0], *self.cut[1]) // math.prod(self.whole)

    def size(self, *names: str) -> int:
        """The number of devices along these mesh axes."""
        return math.prod(self.mesh.shape[name] for name in names)  # no names without a mesh

    def to_stack(self, x: Float[Array, "..."]) -> Float[Array, "stack m n"]:
        """Reshapes a device's shard into its pieces of matrices, in the orientation of the group."""
        x = jnp.moveaxis(x, self.axes, (-2, -1))
        if self.heads is not None:
            axis, size = self.heads
            *batch, rows, cols = x.shape
            x = x.reshape(*batch, -1, size, cols) if axis == 0 else x.reshape(*batch, rows, -1, size)
            x = x if axis == 0 else jnp.swapaxes(x, -3, -2)
        x = jnp.swapaxes(x, -2, -1) if self.transposed else x
        return x.reshape(-1, *x.shape[-2:])

    def from_stack(self, x: Float[Array, "stack m n"]) -> Float[Array, "..."]:
        """Inverts `to_stack`."""
        x = jnp.swapaxes(x, -2, -1) if self.transposed else x
        batch = [size for i, size in enumerate(self.local) if i not in self.axes]
        if self.heads is not None and self.heads[0] == 1:
            x = jnp.swapaxes(x.reshape(*batch, -1, *x.shape[-2:]), -3, -2)
        x = x.reshape(*batch, *(self.local[a] for a in self.axes))
        return jnp.moveaxis(x, (-2, -1), self.axes)


class Placement(NamedTuple):
    """How an array is sharded over the Explicit axes of its mesh. Those of size 1 appear only in `sizes` and `spec`."""

    mesh: Any
    sizes: dict[str, int]
    spec: PartitionSpec
    used: tuple[tuple[str, ...], ...]  # the mesh axes that cut each dimension

    def parts(self, *names: tuple[str, ...]) -> int:
        """The number of pieces into which these mesh axes cut."""
        return math.prod(self.sizes[name] for group in names for name in group)

    @property
    def idle(self) -> tuple[str, ...]:
        """The axes over which the array is not sharded."""
        return tuple(n for n, size in self.sizes.items() if size > 1 and not any(n in names for names in self.used))


def placement(x: Any) -> Placement:
    """The placement of an array, traced or not, or of a ShapeDtypeStruct with a sharding."""
    sharding = x.sharding if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x).sharding
    mesh = getattr(sharding, "mesh", None)
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True) if mesh is not None else ()
    sizes = {name: mesh.shape[name] for name, kind in kinds if kind == AxisType.Explicit}
    if not sizes:
        return Placement(None, {}, PartitionSpec(), ((),) * x.ndim)
    names = [*sharding.spec, *[None] * (x.ndim - len(sharding.spec))]
    used = tuple(tuple(n for n in as_tuple(entry) if sizes[n] > 1) for entry in names)
    return Placement(getattr(mesh, "abstract_mesh", mesh), sizes, sharding.spec, used)


def make_leaf(index: int, path: str, x: Any, where: Matrices) -> Leaf:
    """Makes the `Leaf` of x. Raises ValueError, naming the leaf, where `where` does not fit its shape."""
    axes = tuple(a % x.ndim for a in where.axes if -x.ndim <= a < x.ndim)
    if len(set(axes)) != 2:
        raise ValueError(f"muon: axes {where.axes} of {path} {x.shape} are not two axes of it")
    placed = placement(x)
    local = tuple(n // placed.parts(names) for n, names in zip(x.shape, placed.used, strict=True))
    cut, matrix, before = [placed.used[a] for a in axes], [x.shape[a] for a in axes], True
    if where.heads is not None:
        axis, size = where.heads
        if matrix[axis] % size:
            raise ValueError(f"muon: heads of {size} do not divide axis {axes[axis]} of {path} {x.shape}")
        matrix[axis] = size
        before = local[axes[axis]] % size == 0
        if before:  # every device holds whole heads, so that this axis is a batch of them
            cut[axis] = ()
    return Leaf(
        index=index,
        path=path,
        shape=x.shape,
        local=local,
        mesh=placed.mesh,
        spec=placed.spec,
        axes=axes,
        heads=where.heads if before else None,
        heads_after=None if before else where.heads,
        matrix=tuple(matrix),
        whole=tuple(matrix) if before else tuple(x.shape[a] for a in axes),
        cut=tuple(cut),
        idle=placed.idle,
    )


def explicit_axes(mesh: Any) -> dict[str, int]:
    """The Explicit axes of more than one device, and their sizes. None without a mesh."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True) if mesh is not None else ()
    return {name: mesh.shape[name] for name, kind in kinds if kind == AxisType.Explicit and mesh.shape[name] > 1}
