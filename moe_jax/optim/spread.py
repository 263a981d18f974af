"""A function of single matrices, applied to the leaves of a sharded tree: which matrices move together, and how.

A leaf is a batch of matrices; its rule says which axes form them. `layout` sorts the leaves into groups; `Group.map`
moves a group once, so that every matrix is whole on one device and the matrices are spread evenly, applies the
function, and moves the results back. No work is repeated, but for a group with fewer matrices than devices.
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

# FLOPs worth as much as sending a byte, for groups with fewer matrices than devices: 100 TFLOP/s beside 100 GB/s. By
# their data sheets, TPU v5p and H200 are at 800 to 20,000, so that rather less work is repeated than would pay.
FLOPS_PER_BYTE = 1000


class Matrices(NamedTuple):
    """Where the matrices of a leaf lie; all other axes are batch axes."""

    axes: tuple[int, int] = (-2, -1)  # (input, output): x @ W sums over the first
    heads: tuple[int, int] | None = None  # (0 or 1, size): along the input or output axis, each `size` is a matrix


Rule = Callable[[str, Any], Matrices]  # (path such as "layers/moe/w_up", leaf) → Matrices; ValueError if it has no rule


def one_matrix(path: str, leaf: Any) -> Matrices:
    """The default rule: a 2-D leaf is one matrix. A leaf of any other rank needs a rule of its own."""
    if leaf.ndim != 2:
        raise ValueError(f"muon: no rule says which axes of {path} {leaf.shape} form a matrix; pass `matrices`")
    return Matrices()


class Leaf(NamedTuple):
    """One leaf as a batch of matrices on its mesh. Mesh axes of size 1 appear only in `spec`."""

    index: int  # in the flattened tree
    path: str
    shape: tuple[int, ...]  # global
    local: tuple[int, ...]  # of one device's block
    mesh: Any  # abstract; None where no axis is Explicit, so that nothing can be moved by hand
    spec: PartitionSpec
    axes: tuple[int, int]  # input and output, counted from the front
    heads: tuple[int, int] | None  # cut off before the matrices are made whole …
    late_heads: tuple[int, int] | None  # … or after, where a device holds less than a head
    block: tuple[int, int]  # inputs and outputs of one matrix
    whole: tuple[int, int]  # of what is made whole: the matrix, or with late_heads all its heads
    cut: tuple[tuple[str, ...], tuple[str, ...]]  # the mesh axes that cut its inputs and outputs
    idle: tuple[str, ...]  # those over which the leaf is not sharded at all

    @property
    def turned(self) -> int:
        """−1: it joins its group as outputs × inputs, so that w_down's matrices go with w_up's. Else 1."""
        inputs, outputs = ((n, -len(cut)) for n, cut in zip(self.whole, self.cut, strict=True))
        return -1 if inputs > outputs and self.late_heads is None else 1

    @property
    def key(self) -> tuple:
        """Leaves with the same key form a group."""
        alone = self.index if not (self.idle or any(self.cut)) else None  # nothing moves: joining would only copy
        # Mesh axes of size 1 cut nothing, but shard_map's checks keep apart what names them and what does not.
        named = frozenset(name for names in self.spec for name in as_tuple(names))
        return self.mesh, self.whole[:: self.turned], self.cut[:: self.turned], named, self.late_heads, alone

    @property
    def pieces(self) -> int:
        """Matrices of which one device holds a piece, or the whole."""
        return math.prod(self.local) * self.size(*self.cut[0], *self.cut[1]) // math.prod(self.whole)

    def size(self, *names: str) -> int:
        return math.prod(self.mesh.shape[name] for name in names)  # no names without a mesh

    def to_stack(self, x: Float[Array, "..."]) -> Float[Array, "b m n"]:
        """A device's block → its pieces of matrices, in the group's orientation."""
        x = jnp.moveaxis(x, self.axes, (-2, -1))
        if self.heads is not None:
            axis, size = self.heads
            *batch, rows, cols = x.shape
            x = x.reshape(*batch, -1, size, cols) if axis == 0 else x.reshape(*batch, rows, -1, size)
            x = x if axis == 0 else jnp.swapaxes(x, -3, -2)
        x = jnp.swapaxes(x, -2, -1) if self.turned < 0 else x
        return x.reshape(-1, *x.shape[-2:])

    def from_stack(self, x: Float[Array, "b m n"]) -> Float[Array, "..."]:
        """The inverse of `to_stack`."""
        x = jnp.swapaxes(x, -2, -1) if self.turned < 0 else x
        batch = [size for i, size in enumerate(self.local) if i not in self.axes]
        if self.heads is not None and self.heads[0] == 1:
            x = jnp.swapaxes(x.reshape(*batch, -1, *x.shape[-2:]), -3, -2)
        x = x.reshape(*batch, *(self.local[a] for a in self.axes))
        return jnp.moveaxis(x, (-2, -1), self.axes)


class Group(NamedTuple):
    """Leaves whose matrices have one shape, are cut alike, and move together."""

    leaves: tuple[Leaf, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Of one whole matrix, in the group's orientation."""
        return self.leaves[0].whole[:: self.leaves[0].turned]

    @property
    def cut(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return self.leaves[0].cut[:: self.leaves[0].turned]

    @property
    def parts(self) -> tuple[int, int]:
        """Into how many pieces rows and columns are cut."""
        rows, cols = (self.leaves[0].size(*names) for names in self.cut)
        return rows, cols

    @property
    def sharing(self) -> tuple[str, ...]:
        """The mesh axes that share the work, of those over which the leaves are not sharded; the rest repeat it.

        All of them, if there is a matrix for every device. If not, most devices would iterate on zeros, and zeros would
        be gathered: then those that take least, FLOPs and bytes together.
        """
        idle = self.leaves[0].idle
        if self._pieces >= math.prod(self.parts) * self.leaves[0].size(*idle):
            return idle
        choices: list[tuple[str, ...]] = [()]
        for name in idle:
            choices += [(*names, name) for names in choices]
        return min(choices, key=self._cost)

    def _cost(self, sharing: tuple[str, ...]) -> float:
        """FLOPs, and bytes gathered in FLOPs, of one device: of five steps, in bf16."""
        m, n = self.shape
        block, others = self.leaves[0].block, self.leaves[0].size(*sharing) - 1
        flops = m * n // math.prod(block) * newton_schulz.flops(*block, steps=5)
        return self._each(sharing) * (flops + FLOPS_PER_BYTE * 2 * m * n * others)

    @property
    def replicas(self) -> int:
        """Devices that hold the same pieces and share the work."""
        return self.leaves[0].size(*self.sharing)

    @property
    def per_device(self) -> int:
        """Whole matrices that each device gets, zeros that fill up included: all get the same number."""
        return self._each(self.sharing)

    @property
    def _pieces(self) -> int:
        return sum(leaf.pieces for leaf in self.leaves)

    def _each(self, sharing: tuple[str, ...]) -> int:
        return -(-self._pieces // (math.prod(self.parts) * self.leaves[0].size(*sharing)))

    def map(
        self, fn: Callable[[Array], Array], blocks: Sequence[Array], sources: Sequence[Array] | None = None
    ) -> list[Array]:
        """`fn`, `[b, m, n]` → `[b, m, n]`, of every matrix of the leaves. A zero matrix must give zero.

        sources: arrays that lie like `blocks`. A matrix that is all zeros in them gives zero as well.
        """
        mesh, specs = self.leaves[0].mesh, tuple(leaf.spec for leaf in self.leaves)
        sources = tuple(sources or ())
        if mesh is None:
            return self._on_device(fn, blocks, sources)
        explicit = {n for n, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit}
        local = lambda blocks, sources: tuple(self._on_device(fn, blocks, sources))
        in_specs = specs, specs[: len(sources)]
        shard_map = jax.shard_map(
            local, mesh=mesh, in_specs=in_specs, out_specs=specs, axis_names=explicit, check_vma=True
        )
        return list(shard_map(tuple(blocks), sources))

    def _on_device(
        self, fn: Callable[[Array], Array], blocks: Sequence[Array], sources: Sequence[Array]
    ) -> list[Array]:
        stacks = [leaf.to_stack(x) for leaf, x in zip(self.leaves, blocks, strict=True)]
        x = stacks[0] if len(stacks) == 1 else jnp.concatenate(stacks)
        if self.leaves[0].mesh is None:
            y = self._heads_apart(fn, x)
        else:
            y = self._scatter_and_gather(fn, x)
        if sources:
            y = jnp.where(self._nonzero(sources), y, jnp.zeros_like(y))
        ends = [sum(len(s) for s in stacks[:i]) for i in range(1, len(stacks))]
        return [leaf.from_stack(o) for leaf, o in zip(self.leaves, jnp.split(y, ends), strict=True)]

    def _nonzero(self, blocks: Sequence[Array]) -> Bool[Array, "b #m #n"]:
        """Whether the matrix of each of a device's pieces has an entry that is not zero, here or on another device.

        Where matrices are cut that takes one all-reduce of a number for each.
        """
        names, heads = self.cut[0] + self.cut[1], self.leaves[0].late_heads
        axes = (-2, -1) if heads is None else (-1 if heads[0] == 0 else -2)
        stacks = (leaf.to_stack(x) != 0 for leaf, x in zip(self.leaves, blocks, strict=True))
        found = jnp.concatenate([jnp.any(x, axis=axes, keepdims=True) for x in stacks])
        if heads is None:
            return jax.lax.pmax(found.astype(jnp.int32), names) > 0 if names else found
        # A device holds parts of heads: each of its rows or columns has its place in the row of them all.
        axis, size = heads
        here, parts = jax.lax.axis_index(self.cut[axis]), self.parts[axis]
        mine = (jnp.arange(parts) == here)[None, :, None] & found.reshape(len(found), 1, -1)
        of_heads = jax.lax.pmax(mine.astype(jnp.int32), names).reshape(len(found), -1, size).max(-1, keepdims=True) > 0
        of_all = jnp.broadcast_to(of_heads, (*of_heads.shape[:2], size)).reshape(len(found), parts, -1)
        return jax.lax.dynamic_index_in_dim(of_all, here, axis=1, keepdims=False).reshape(found.shape)

    def _scatter_and_gather(self, fn: Callable[[Array], Array], x: Float[Array, "b m n"]) -> Float[Array, "b m n"]:
        """`fn` of all matrices of which the devices hold pieces x: at most three collectives."""
        (rows, cols), count = self.parts, len(x)
        axes, sharing = self.cut[0] + self.cut[1], self.sharing
        # Zero matrices fill up the devices for which there is no matrix left.
        x = jnp.pad(x, ((0, self.per_device * rows * cols * self.replicas - count), (0, 0), (0, 0)))
        if sharing:  # of what several devices hold, each takes a part
            share = len(x) // self.replicas
            x = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(sharing) * share, share)
        _, m, n = x.shape
        if axes:  # device i gets the i-th share of the matrices, from every device a piece
            x = jax.lax.all_to_all(x.reshape(rows * cols, -1, m, n), axes, 0, 0)
            x = x.reshape(rows, cols, -1, m, n).transpose(2, 0, 3, 1, 4).reshape(-1, rows * m, cols * n)
        x = self._heads_apart(fn, x)
        if axes:
            x = x.reshape(-1, rows, m, cols, n).transpose(1, 3, 0, 2, 4).reshape(rows * cols, -1, m, n)
            x = jax.lax.all_to_all(x, axes, 0, 0).reshape(-1, m, n)
        if sharing:
            x = jax.lax.all_gather(x, sharing, axis=0, tiled=True, to="invarying")
        return x[:count]

    def _heads_apart(self, fn: Callable[[Array], Array], x: Float[Array, "b m n"]) -> Float[Array, "b m n"]:
        heads, (b, m, n) = self.leaves[0].late_heads, x.shape
        if heads is None:
            return fn(x)
        axis, size = heads
        if axis == 0:
            return fn(x.reshape(-1, size, n)).reshape(b, m, n)
        apart = jnp.swapaxes(x.reshape(b, m, -1, size), 1, 2).reshape(-1, m, size)
        return jnp.swapaxes(fn(apart).reshape(b, -1, m, size), 1, 2).reshape(b, m, n)


class Placement(NamedTuple):
    """How an array lies on the Explicit axes of its mesh. Those of size 1 appear only in `sizes` and `spec`."""

    mesh: Any
    sizes: dict[str, int]
    spec: PartitionSpec
    used: tuple[tuple[str, ...], ...]  # the mesh axes that cut each dimension

    def parts(self, *names: tuple[str, ...]) -> int:
        """Into how many pieces these mesh axes cut."""
        return math.prod(self.sizes[name] for group in names for name in group)

    @property
    def idle(self) -> tuple[str, ...]:
        """The axes over which it is not sharded."""
        return tuple(n for n, size in self.sizes.items() if size > 1 and not any(n in names for names in self.used))


def placement(x: Any) -> Placement:
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
    """The groups of all leaves of `tree`: arrays, traced or not, or ShapeDtypeStructs with a NamedSharding."""
    groups: dict[tuple, list[Leaf]] = {}
    for index, (path, x) in enumerate(jax.tree_util.tree_leaves_with_path(tree)):
        name = path_of(path)
        leaf = make_leaf(index, name, x, matrices(name, x))
        groups.setdefault(leaf.key, []).append(leaf)
    return [Group(tuple(leaves)) for leaves in groups.values()]


def make_leaf(index: int, path: str, x: Any, where: Matrices) -> Leaf:
    """Raises ValueError, naming the leaf, where `where` does not fit its shape."""
    axes = tuple(a % x.ndim for a in where.axes if -x.ndim <= a < x.ndim)
    if len(set(axes)) != 2:
        raise ValueError(f"muon: axes {where.axes} of {path} {x.shape} are not two axes of it")
    placed = placement(x)
    local = tuple(n // placed.parts(names) for n, names in zip(x.shape, placed.used, strict=True))
    cut, block, early = [placed.used[a] for a in axes], [x.shape[a] for a in axes], True
    if where.heads is not None:
        axis, size = where.heads
        if block[axis] % size:
            raise ValueError(f"muon: heads of {size} do not divide axis {axes[axis]} of {path} {x.shape}")
        block[axis] = size
        early = local[axes[axis]] % size == 0
        if early:  # every device holds whole heads: along this axis they are a batch, cut or not
            cut[axis] = ()
    return Leaf(
        index=index,
        path=path,
        shape=x.shape,
        local=local,
        mesh=placed.mesh,
        spec=placed.spec,
        axes=axes,
        heads=where.heads if early else None,
        late_heads=None if early else where.heads,
        block=tuple(block),
        whole=tuple(block) if early else tuple(x.shape[a] for a in axes),
        cut=tuple(cut),
        idle=placed.idle,
    )
