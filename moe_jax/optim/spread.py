"""Applies a function of single matrices to the leaves of a sharded tree, and moves matrices in groups.

A leaf is a batch of matrices; its rule says which axes form them. `layout` sorts the leaves into groups. `Group.map`
spreads the matrices of a group evenly over the devices, each whole on one, applies the function, and moves the results
back. Work is repeated only in groups with fewer matrices than devices.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Bool, Float

from moe_jax.optim import newton_schulz
from moe_jax.parallel.axes import as_tuple
from moe_jax.tree import path_of

# FLOPs that take as long as sending a byte, for groups with fewer matrices than devices: 100 TFLOP/s at 100 GB/s. By
# their data sheets TPU v5p and H200 reach 800 to 20,000, so this repeats less work than would pay, rather than more.
FLOPS_PER_BYTE = 1000


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


class Group(NamedTuple):
    """Leaves whose matrices have the same shape, are cut alike, and move together."""

    leaves: tuple[Leaf, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of one whole matrix, in the orientation of the group."""
        return self.leaves[0].oriented(self.leaves[0].whole)

    @property
    def cut(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The mesh axes that cut rows and columns."""
        return self.leaves[0].oriented(self.leaves[0].cut)

    @property
    def parts(self) -> tuple[int, int]:
        """The numbers of pieces into which rows and columns are cut."""
        rows, cols = (self.leaves[0].size(*names) for names in self.cut)
        return rows, cols

    @property
    def sharing(self) -> tuple[str, ...]:
        """The mesh axes that share the work, among those over which the leaves are not sharded. The others repeat it.

        All of them share it if there is a matrix for every device. If not, most devices would iterate on zeros and
        gather zeros: then the axes are those with the lowest cost in FLOPs and bytes together.
        """
        idle = self.leaves[0].idle
        if self._pieces >= math.prod(self.parts) * self.leaves[0].size(*idle):
            return idle
        choices: list[tuple[str, ...]] = [()]
        for name in idle:
            choices += [(*names, name) for names in choices]
        return min(choices, key=self._cost)

    def _cost(self, sharing: tuple[str, ...]) -> float:
        """FLOPs of five steps on one device, and the bytes that it gathers in bf16, converted to FLOPs."""
        m, n = self.shape
        matrix, others = self.leaves[0].matrix, self.leaves[0].size(*sharing) - 1
        flops = m * n // math.prod(matrix) * newton_schulz.flops(*matrix, steps=5)
        return self._matrices_per_device(sharing) * (flops + FLOPS_PER_BYTE * 2 * m * n * others)

    @property
    def replicas(self) -> int:
        """The number of devices that hold the same pieces and share the work."""
        return self.leaves[0].size(*self.sharing)

    @property
    def per_device(self) -> int:
        """The number of whole matrices that each device gets. All get the same: zero matrices fill up."""
        return self._matrices_per_device(self.sharing)

    @property
    def _pieces(self) -> int:
        return sum(leaf.pieces for leaf in self.leaves)

    def _matrices_per_device(self, sharing: tuple[str, ...]) -> int:
        """Whole matrices that each device gets if these axes share the work."""
        return -(-self._pieces // (math.prod(self.parts) * self.leaves[0].size(*sharing)))

    def map(
        self, fn: Callable[[Array], Array], blocks: Sequence[Array], sources: Sequence[Array] | None = None
    ) -> list[Array]:
        """Applies `fn` to every matrix of the leaves `blocks`.

        fn: `[stack, m, n]` → `[stack, m, n]`; it must map zero to zero. sources: arrays sharded like `blocks`. A matrix
        that is all zeros in its source gives zero too.
        """
        mesh, specs = self.leaves[0].mesh, tuple(leaf.spec for leaf in self.leaves)
        sources = tuple(sources or ())
        if mesh is None:
            return self._map_local(fn, blocks, sources)
        explicit = {n for n, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit}
        local = lambda blocks, sources: tuple(self._map_local(fn, blocks, sources))
        in_specs = specs, specs[: len(sources)]
        shard_map = jax.shard_map(
            local, mesh=mesh, in_specs=in_specs, out_specs=specs, axis_names=explicit, check_vma=True
        )
        return list(shard_map(tuple(blocks), sources))

    def _map_local(
        self, fn: Callable[[Array], Array], blocks: Sequence[Array], sources: Sequence[Array]
    ) -> list[Array]:
        stacks = [leaf.to_stack(x) for leaf, x in zip(self.leaves, blocks, strict=True)]
        x = stacks[0] if len(stacks) == 1 else jnp.concatenate(stacks)
        if self.leaves[0].mesh is None:
            y = self._apply_by_head(fn, x)
        else:
            y = self._map_whole(fn, x)
        if sources:
            y = jnp.where(self._is_nonzero(sources), y, jnp.zeros_like(y))
        ends = [sum(len(s) for s in stacks[:i]) for i in range(1, len(stacks))]
        return [leaf.from_stack(o) for leaf, o in zip(self.leaves, jnp.split(y, ends), strict=True)]

    def _is_nonzero(self, blocks: Sequence[Array]) -> Bool[Array, "stack #m #n"]:
        """Whether the matrix of each piece has an entry that is not zero, here or on another device.

        Where matrices are cut, this takes one all-reduce of one number a matrix.
        """
        names, heads = self.cut[0] + self.cut[1], self.leaves[0].heads_after
        axes = (-2, -1) if heads is None else (-1 if heads[0] == 0 else -2)
        stacks = (leaf.to_stack(x) != 0 for leaf, x in zip(self.leaves, blocks, strict=True))
        found = jnp.concatenate([jnp.any(x, axis=axes, keepdims=True) for x in stacks])
        if heads is None:
            return jax.lax.pmax(found.astype(jnp.int32), names) > 0 if names else found
        # A device holds parts of heads: its rows or columns are put at their index among those of all devices.
        axis, size = heads
        here, parts = jax.lax.axis_index(self.cut[axis]), self.parts[axis]
        own = (jnp.arange(parts) == here)[None, :, None] & found.reshape(len(found), 1, -1)
        by_head = jax.lax.pmax(own.astype(jnp.int32), names).reshape(len(found), -1, size).max(-1, keepdims=True) > 0
        by_row = jnp.broadcast_to(by_head, (*by_head.shape[:2], size)).reshape(len(found), parts, -1)
        return jax.lax.dynamic_index_in_dim(by_row, here, axis=1, keepdims=False).reshape(found.shape)

    def _map_whole(self, fn: Callable[[Array], Array], x: Float[Array, "stack m n"]) -> Float[Array, "stack m n"]:
        """Applies `fn` to all matrices of which devices hold the pieces x, with at most three collectives."""
        (rows, cols), count = self.parts, len(x)
        axes, sharing = self.cut[0] + self.cut[1], self.sharing
        # Zero matrices are added, so that all devices get the same number.
        x = jnp.pad(x, ((0, self.per_device * rows * cols * self.replicas - count), (0, 0), (0, 0)))
        if sharing:  # each takes a part of the pieces that several devices hold
            share = len(x) // self.replicas
            x = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(sharing) * share, share)
        _, m, n = x.shape
        if axes:  # device i gets the i-th share of the matrices, a piece from every device
            x = jax.lax.all_to_all(x.reshape(rows * cols, -1, m, n), axes, 0, 0)
            x = x.reshape(rows, cols, -1, m, n).transpose(2, 0, 3, 1, 4).reshape(-1, rows * m, cols * n)
        x = self._apply_by_head(fn, x)
        if axes:
            x = x.reshape(-1, rows, m, cols, n).transpose(1, 3, 0, 2, 4).reshape(rows * cols, -1, m, n)
            x = jax.lax.all_to_all(x, axes, 0, 0).reshape(-1, m, n)
        if sharing:
            x = jax.lax.all_gather(x, sharing, axis=0, tiled=True, to="invarying")
        return x[:count]

    def _apply_by_head(self, fn: Callable[[Array], Array], x: Float[Array, "stack m n"]) -> Float[Array, "stack m n"]:
        """Applies `fn` to whole matrices, or to each of their heads."""
        heads, (b, m, n) = self.leaves[0].heads_after, x.shape
        if heads is None:
            return fn(x)
        axis, size = heads
        if axis == 0:
            return fn(x.reshape(-1, size, n)).reshape(b, m, n)
        apart = jnp.swapaxes(x.reshape(b, m, -1, size), 1, 2).reshape(-1, m, size)
        return jnp.swapaxes(fn(apart).reshape(b, -1, m, size), 1, 2).reshape(b, m, n)


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


def layout(tree: Any, matrices: Rule) -> list[Group]:
    """Sorts the leaves of `tree` into groups: arrays, traced or not, or ShapeDtypeStructs with a NamedSharding."""
    groups: dict[tuple, list[Leaf]] = {}
    for index, (path, x) in enumerate(jax.tree_util.tree_leaves_with_path(tree)):
        name = path_of(path)
        leaf = make_leaf(index, name, x, matrices(name, x))
        groups.setdefault(leaf.key, []).append(leaf)
    return [Group(tuple(leaves)) for leaves in groups.values()]


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
