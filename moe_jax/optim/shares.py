"""Shares of the matrices of each group, one for each device, that give all devices about as much work.

Matrices that devices cannot share out evenly leave some with more work than others: of 84 matrices on 64 devices, 20
devices get two. `even_out` gives these devices less of the other groups. Shapes are the same on all devices, so each
has room for the largest number; it iterates on its own number of batches, in a loop whose length depends on the device.
"""

import heapq
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

# FLOPs that take as long as sending a byte. Data sheets give 800 by the links of a TPU v5p and 4,600 by the bisection
# of 256 of them, 2,200 by the NVLink of an H200 and 20,000 by a network of hosts. With a low number little work is
# repeated to save bytes. With a high one bytes are sent to even work out only where that pays on a slice or a host.
FLOPS_PER_BYTE = 1000
FLOPS_PER_BYTE_TO_EVEN_OUT = 4000
PARTS = 32  # a batch is about this part of a device's work: the more, the more even, and the smaller the products


class Work(NamedTuple):
    """The costs of a group of matrices."""

    flops: int  # of one matrix
    bytes: int  # that a device sends for each matrix that it gets
    count: int  # matrices of a set of devices, among which they may be spread at will
    axes: tuple[str, ...]  # the mesh axes over which such a set extends
    fixed: bool  # whether every device gets ⌈count / devices of a set⌉ in any case


class Shares(NamedTuple):
    """The matrices of a group that each device gets. Sets and devices of a set are in the order of the mesh axes."""

    batch: int  # matrices that a device iterates on at a time
    batches: Int[np.ndarray, "sets devices"]  # that each device iterates on
    held: Int[np.ndarray, "sets slots"]  # the matrix in each slot of the first device, the second …; `count` for none
    slot: Int[np.ndarray, "sets count"]  # the slot of each matrix

    @property
    def slots(self) -> int:
        """The number of matrices for which a device has room."""
        return self.batch * int(self.batches.max())


def even_out(groups: Sequence[Work], sizes: dict[str, int]) -> list[Shares | None]:
    """Shares out the matrices of all groups together. None for a group that is spread as if it were alone.

    sizes: the mesh axes of more than one device. Batches are given out one by one, the most costly first, each to the
    device of its set that has the least to do. All are None if the busiest device gains less than what is sent for it
    and 1/32 of its work, which small batches and loops may cost.
    """
    devices = math.prod(sizes.values())
    alone = [-(-work.count // math.prod(sizes[name] for name in work.axes)) for work in groups]
    plain = sum(n * work.flops for n, work in zip(alone, groups, strict=True))
    share = math.fsum(
        work.flops * (n if work.fixed else work.count / math.prod(sizes[name] for name in work.axes))
        for n, work in zip(alone, groups, strict=True)
    )
    target = int(share / PARTS)
    moving = [i for i, work in enumerate(groups) if not work.fixed and alone[i] * work.flops > target // 4]
    load = np.full(devices, sum(n * w.flops for i, (n, w) in enumerate(zip(alone, groups, strict=True))
                                if i not in moving), np.int64)  # fmt: skip
    batch = {i: max(1, min(alone[i], target // groups[i].flops)) for i in moving}
    out: list[Shares | None] = [None] * len(groups)
    moving.sort(key=lambda i: -batch[i] * groups[i].flops)
    # Of devices with as much to do, those come first that lie in different sets of the group with the smallest batches:
    # it fills what the others leave, and within a set only.
    order = np.empty(devices, np.int64)
    sets = _sets(groups[moving[-1]], sizes) if moving else np.arange(devices)[None]
    order[sets.T.ravel()] = np.arange(devices)
    for i in moving:
        out[i] = _share_out(groups[i], batch[i], load, order, sizes)
    more = sum(s.slots * w.bytes - n * w.bytes for s, n, w in zip(out, alone, groups, strict=True) if s is not None)
    if int(load.max()) + FLOPS_PER_BYTE_TO_EVEN_OUT * more >= plain - plain // PARTS:
        return [None] * len(groups)
    # Where all devices iterate on as much as alone, the order may stay.
    same = lambda s, n: s is not None and s.slots == n and bool((s.batches == s.batches.max()).all())
    return [None if same(s, n) else s for s, n in zip(out, alone, strict=True)]


def _share_out(
    work: Work, batch: int, load: Int[np.ndarray, " devices"], order: Int[np.ndarray, " devices"], sizes: dict[str, int]
) -> Shares:
    """Shares out one group, and adds its FLOPs to the loads. order: of devices that have as much to do."""
    ids = _sets(work, sizes)
    batches = np.zeros(ids.shape, np.int64)
    for row, own in zip(ids, batches, strict=True):
        heap = [(int(load[device]), int(order[device]), position) for position, device in enumerate(row)]
        heapq.heapify(heap)
        for _ in range(-(-work.count // batch)):
            so_far, turn, position = heap[0]
            own[position] += 1
            heapq.heapreplace(heap, (so_far + batch * work.flops, turn, position))
        load[row] += own * batch * work.flops
    first = batch * (np.cumsum(batches, axis=1) - batches)[:, :, None]  # of each device
    index = np.arange(batch * batches.max())
    held = np.where(index < batch * batches[:, :, None], first + index, work.count)
    held = np.minimum(held, work.count).reshape(len(ids), -1).astype(np.int32)
    slot = np.argsort(held, axis=1, kind="stable")[:, : work.count].astype(np.int32)
    return Shares(batch, batches.astype(np.int32), held, slot)


def _sets(work: Work, sizes: dict[str, int]) -> Int[np.ndarray, "sets devices"]:
    """The numbers of the devices of each set, counted along the mesh axes in their order."""
    where = [list(sizes).index(name) for name in work.axes]
    ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
    return np.moveaxis(ids, where, range(-len(where), 0)).reshape(-1, math.prod(sizes[name] for name in work.axes))


def most(shared: Sequence[tuple[Work, Shares]], sizes: dict[str, int]) -> int:
    """FLOPs of the device that has the most to do of these groups."""
    load = np.zeros(math.prod(sizes.values()), np.int64)
    for work, shares in shared:
        load[_sets(work, sizes)] += shares.batches.astype(np.int64) * (shares.batch * work.flops)
    return int(load.max())


def row_of(table: np.ndarray, axes: tuple[str, ...]) -> Array:
    """The row of a table at this device's index along mesh axes, inside `shard_map`."""
    if (table == table[0]).all():
        return jnp.asarray(table[0])
    return jax.lax.dynamic_index_in_dim(jnp.asarray(table), jax.lax.axis_index(axes), keepdims=False)


def in_batches(
    fn: Callable[[Array], Array], x: Float[Array, "stack m n"], batch: int, count: Array
) -> Float[Array, "stack m n"]:
    """Applies `fn` to the first `count` batches of x, of `batch` matrices each. The other matrices stay as they are.

    count: an integer, which may be another one on each device. fn: keeps shape and dtype; it contains no collective.
    """
    stacks = x.reshape(-1, batch, *x.shape[1:])
    one = lambda i, y: jax.lax.dynamic_update_index_in_dim(y, fn(y[i]), i, 0)
    return jax.lax.fori_loop(0, count, one, stacks).reshape(x.shape)
