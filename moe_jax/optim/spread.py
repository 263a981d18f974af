"""Applies a function of single matrices to the leaves of a sharded tree, and moves matrices in groups.

A leaf is a batch of matrices; its rule says which axes form them. `layout` sorts the leaves into groups. `map_groups`
spreads the matrices of a group over the devices, each whole on one, applies the function, and moves the results back.
Every device gets as many matrices of a group as the others, or about as much work of all groups together (shares.py).
Work is repeated only in groups with fewer matrices than devices.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jaxtyping import Array, Bool, Float, Int

from moe_jax.optim import newton_schulz
from moe_jax.optim.leaves import Leaf, Rule, explicit_axes, make_leaf
from moe_jax.optim.leaves import Matrices as Matrices
from moe_jax.optim.leaves import one_matrix as one_matrix
from moe_jax.optim.shares import FLOPS_PER_BYTE, Shares, Work, even_out, in_batches, most, row_of
from moe_jax.tree import path_of


class Group(NamedTuple):
    """Leaves whose matrices have the same shape, are cut alike, and move together."""

    leaves: tuple[Leaf, ...]
    shares: Shares | None = None  # None: every device gets the same number of matrices

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
        """The number of whole matrices for which each device has room. Zero matrices fill up."""
        return self.shares.slots if self.shares else self._matrices_per_device(self.sharing)

    @property
    def computed(self) -> int:
        """The number of whole matrices that all devices iterate on together, with zeros and copies."""
        devices = math.prod(explicit_axes(self.leaves[0].mesh).values())
        if self.shares is None:
            return self.per_device * devices
        return self.shares.batch * int(self.shares.batches.sum()) * devices // self.shares.batches.size

    @property
    def fewest(self) -> int:
        """The number of matrices that the device with the fewest iterates on."""
        return self.shares.batch * int(self.shares.batches.min()) if self.shares else self.per_device

    @property
    def _exchanged(self) -> tuple[str, ...]:
        """The mesh axes over which matrices are spread, in the order of the slots."""
        return self.sharing + self.cut[0] + self.cut[1]

    @property
    def _apart(self) -> tuple[str, ...]:
        """The other mesh axes."""
        return tuple(name for name in explicit_axes(self.leaves[0].mesh) if name not in self._exchanged)

    def work(self, steps: int, dtype: Any) -> Work:
        """The cost of the group on one device. steps, dtype: of the iteration; without a dtype, in bf16."""
        (m, n), leaf, parts = self.shape, self.leaves[0], math.prod(self.parts)
        size = m * n * (2 if dtype is None else jnp.dtype(dtype).itemsize)
        return Work(
            flops=m * n // math.prod(leaf.matrix) * newton_schulz.flops(*leaf.matrix, steps, dtype),
            bytes=2 * size * (parts - 1) // parts + size * (self.replicas - 1),
            count=self._pieces,
            axes=self._exchanged,
            fixed=not self._exchanged or set(leaf.idle) != set(self.sharing),
        )

    @property
    def _pieces(self) -> int:
        return sum(leaf.pieces for leaf in self.leaves)

    def _matrices_per_device(self, sharing: tuple[str, ...]) -> int:
        """Whole matrices that each device gets if these axes share the work."""
        return -(-self._pieces // (math.prod(self.parts) * self.leaves[0].size(*sharing)))

    @property
    def moves(self) -> bool:
        """Whether matrices or results move between devices."""
        return any(self.cut) or bool(self.sharing)

    def collect(
        self, blocks: Sequence[Array], sources: Sequence[Array], narrow: bool
    ) -> tuple[Float[Array, "stack m n"], Bool[Array, "stack #m #n"]]:
        """This device's pieces of all matrices, in float16 with `narrow`, and which matrices are not zero in `sources`.

        It takes an all-reduce of a number or two for every matrix that is cut.
        """
        x = jnp.concatenate([leaf.to_stack(x) for leaf, x in zip(self.leaves, blocks, strict=True)])
        found = self._is_nonzero(sources)
        exponents = newton_schulz.largest_exponent(x, self._own_axes) if narrow else None
        if any(self.cut):
            flags, exponents = self._largest(found.astype(jnp.int32), exponents)
            found = flags > 0
        return newton_schulz.to_float16(x, exponents) if narrow else x, found

    def deliver(self, y: Float[Array, "stack m n"], found: Bool[Array, "stack #m #n"]) -> tuple[Array, ...]:
        """The leaves of the pieces y, with zeros for the matrices that were not `found`."""
        y = jnp.where(found, y, jnp.zeros_like(y))
        sizes = [math.prod(leaf.local) // math.prod(y.shape[1:]) for leaf in self.leaves]
        stacks = jnp.split(y, [sum(sizes[:i]) for i in range(1, len(sizes))])
        return tuple(leaf.from_stack(o) for leaf, o in zip(self.leaves, stacks, strict=True))

    @property
    def _own_axes(self) -> tuple[int, int] | int:
        """The axes of a piece that belong to one matrix, or to one row or column of a head that is cut."""
        heads = self.leaves[0].heads_after
        return (-2, -1) if heads is None else (-1 if heads[0] == 0 else -2)

    def _is_nonzero(self, blocks: Sequence[Array]) -> Bool[Array, "stack #m #n"]:
        """Whether this device's piece of each matrix has an entry that is not zero."""
        # No array of zeros is compared with: XLA would make one for all leaves of as many numbers (`to_float16`).
        stacks = (leaf.to_stack(jnp.abs(x)) for leaf, x in zip(self.leaves, blocks, strict=True))
        return jnp.concatenate([jnp.max(x, axis=self._own_axes, keepdims=True) for x in stacks]) != 0

    def _largest(
        self, first: Int[Array, "stack #m #n"], second: Int[Array, "stack #m #n"] | None
    ) -> tuple[Int[Array, "stack #m #n"], Int[Array, "stack #m #n"] | None]:
        """The largest number of every matrix on all devices that hold a piece of it; of both kinds, if there are two.

        This takes one all-reduce of a number a matrix for each kind.
        """
        names, heads = self.cut[0] + self.cut[1], self.leaves[0].heads_after
        numbers = first if second is None else jnp.concatenate([first, second])
        if heads is None:
            numbers = jax.lax.pmax(numbers, names)
        else:
            # A device holds parts of heads: its rows or columns are put at their index among those of all devices.
            axis, size = heads
            here, parts = jax.lax.axis_index(self.cut[axis]), self.parts[axis]
            mine = (jnp.arange(parts) == here)[None, :, None]
            own = jnp.where(mine, numbers.reshape(len(numbers), 1, -1), jnp.iinfo(jnp.int32).min)
            by_head = jax.lax.pmax(own, names).reshape(len(numbers), -1, size).max(-1, keepdims=True)
            by_row = jnp.broadcast_to(by_head, (*by_head.shape[:2], size)).reshape(len(numbers), parts, -1)
            numbers = jax.lax.dynamic_index_in_dim(by_row, here, axis=1, keepdims=False).reshape(numbers.shape)
        return (numbers, None) if second is None else tuple(jnp.split(numbers, 2))

    def make_whole(self, x: Float[Array, "stack m n"]) -> Float[Array, "own_stack M N"]:
        """The whole matrices that this device iterates on, of the pieces x on all devices. At most one all-to-all."""
        (rows, cols), count = self.parts, len(x)
        axes, sharing = self.cut[0] + self.cut[1], self.sharing
        # Zero matrices are added, so that all devices have the same number.
        if self.shares is None:
            x = jnp.pad(x, ((0, self.per_device * rows * cols * self.replicas - count), (0, 0), (0, 0)))
        else:
            x = x.at[row_of(self.shares.held, self._apart)].get(mode="fill", fill_value=0)
        if sharing:  # each takes a part of the pieces that several devices hold
            share = len(x) // self.replicas
            x = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(sharing) * share, share)
        if axes:  # device i gets the i-th share of the matrices, a piece from every device
            _, m, n = x.shape
            x = jax.lax.all_to_all(x.reshape(rows * cols, -1, m, n), axes, 0, 0)
            x = x.reshape(rows, cols, -1, m, n).transpose(2, 0, 3, 1, 4).reshape(-1, rows * m, cols * n)
        return x

    def hand_out(self, x: Float[Array, "own_stack M N"]) -> Float[Array, "stack m n"]:
        """Inverts `make_whole`. At most one all-to-all, and one all-gather."""
        (rows, cols), (_, m, n) = self.parts, x.shape
        axes, sharing = self.cut[0] + self.cut[1], self.sharing
        if axes:
            x = x.reshape(-1, rows, m // rows, cols, n // cols).transpose(1, 3, 0, 2, 4)
            x = jax.lax.all_to_all(x.reshape(rows * cols, -1, m // rows, n // cols), axes, 0, 0)
            x = x.reshape(-1, m // rows, n // cols)
        if sharing:
            x = jax.lax.all_gather(x, sharing, axis=0, tiled=True, to="invarying")
        return x[: self._pieces] if self.shares is None else x[row_of(self.shares.slot, self._apart)]

    def iterate(self, fn: Callable[[Array], Array], x: Float[Array, "stack m n"]) -> Float[Array, "stack m n"]:
        """Applies `fn` to this device's matrices: all at once, or its number of batches."""
        if self.shares is None:
            return self._apply_by_head(fn, x)
        own = row_of(self.shares.batches, self._apart)[jax.lax.axis_index(self._exchanged)]
        return in_batches(lambda x: self._apply_by_head(fn, x), x, self.shares.batch, own)

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


def map_groups(
    groups: Sequence[Group],
    fn: Callable[[Array], Array],
    arrays: Sequence[Array],
    sources: Sequence[Array],
    narrow: bool = False,
) -> dict[int, Array]:
    """Applies `fn` to every matrix of the leaves of `groups`. Returns the results by the leaves' indices.

    Groups whose work is evened out are mapped together: all their matrices are made whole before any is iterated on,
    and no result is handed out before all are there, of groups that are cut along the same axes of the mesh. So devices
    with more work of one group and less of another wait for one another at the end only.

    fn: `[stack, m, n]` → `[stack, m, n]`; it must map zero to zero. arrays, sources: by the leaves' indices. A matrix
    that is all zeros in its source gives zero too. narrow: matrices move in float16, each divided by a power of two
    that is the same on all devices; then `fn` must not depend on the scale of a matrix.
    """
    out: dict[int, Array] = {}
    even = [[group] for group in groups if group.shares is None]
    for some in [*even, [group for group in groups if group.shares is not None]]:
        take = lambda of, some=some: tuple(tuple(of[leaf.index] for leaf in group.leaves) for group in some)
        results = _map_together(some, fn, take(arrays), take(sources), narrow) if some else ()
        for group, leaves in zip(some, results, strict=True):
            out |= {leaf.index: y for leaf, y in zip(group.leaves, leaves, strict=True)}
    return out


def _map_together(groups: Sequence[Group], fn: Callable[[Array], Array], blocks: tuple, sources: tuple, narrow: bool):
    """Maps groups of one mesh; blocks, sources: a tuple for each group, with an array for each of its leaves."""
    mesh = groups[0].leaves[0].mesh

    def local(blocks, sources):
        scaled = narrow and mesh is not None
        found = [g.collect(x, s, scaled and g.moves) for g, x, s in zip(groups, blocks, sources, strict=True)]
        whole = [x if mesh is None else g.make_whole(x) for g, (x, _) in zip(groups, found, strict=True)]
        whole = _wait_for_all(whole)
        whole = _wait_for_all([g.iterate(fn, x) for g, x in zip(groups, whole, strict=True)])
        pieces = [y if mesh is None else g.hand_out(y) for g, y in zip(groups, whole, strict=True)]
        return tuple(g.deliver(y, flags) for g, y, (_, flags) in zip(groups, pieces, found, strict=True))

    if mesh is None:
        return local(blocks, sources)
    specs = tuple(tuple(leaf.spec for leaf in group.leaves) for group in groups)
    explicit = {n for n, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit}
    shard_map = jax.shard_map(
        local, mesh=mesh, in_specs=(specs, specs), out_specs=specs, axis_names=explicit, check_vma=True
    )
    return shard_map(blocks, sources)


def _wait_for_all(arrays: list[Array]) -> list[Array]:
    """Makes what uses one of the arrays wait for all that vary over the same axes of the mesh.

    A barrier over arrays of different axes would make each vary over all of these, in its type.
    """
    kinds: dict[frozenset, list[int]] = {}
    for i, x in enumerate(arrays):
        kinds.setdefault(frozenset(jax.typeof(x).manual_axis_type.varying), []).append(i)
    for at in kinds.values():
        waited = jax.lax.optimization_barrier([arrays[i] for i in at]) if len(at) > 1 else [arrays[i] for i in at]
        arrays = [waited[at.index(i)] if i in at else x for i, x in enumerate(arrays)]
    return arrays


def layout(tree: Any, matrices: Rule, steps: int = 5, dtype: Any = None) -> list[Group]:
    """Sorts the leaves of `tree` into groups: arrays, traced or not, or ShapeDtypeStructs with a NamedSharding.

    steps, dtype: of the iteration, whose FLOPs are evened out between devices.
    """
    groups: dict[tuple, list[Leaf]] = {}
    for index, (path, x) in enumerate(jax.tree_util.tree_leaves_with_path(tree)):
        name = path_of(path)
        leaf = make_leaf(index, name, x, matrices(name, x))
        groups.setdefault(leaf.key, []).append(leaf)
    found = [Group(tuple(leaves)) for leaves in groups.values()]
    meshes = {group.leaves[0].mesh for group in found}
    sizes = explicit_axes(meshes.pop()) if len(meshes) == 1 else {}
    if not sizes:
        return found
    shares = even_out([group.work(steps, dtype) for group in found], sizes)
    return [group._replace(shares=one) for group, one in zip(found, shares, strict=True)]


def most_flops(groups: Sequence[Group], steps: int, dtype: Any) -> int:
    """FLOPs of the device that has the most to do, for the groups of one `layout`."""
    sizes = next((explicit_axes(group.leaves[0].mesh) for group in groups), {})
    works = [group.work(steps, dtype) for group in groups]
    even = sum(w.flops * g.per_device for w, g in zip(works, groups, strict=True) if g.shares is None)
    return even + most([(w, g.shares) for w, g in zip(works, groups, strict=True) if g.shares], sizes)
