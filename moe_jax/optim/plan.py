"""The plan of Muon: which matrices move between devices, and what a step costs in FLOPs, bytes and memory."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax

from moe_jax.optim import newton_schulz
from moe_jax.optim.leaves import placement
from moe_jax.optim.newton_schulz import Coefficients
from moe_jax.optim.spread import Group, Matrices, layout, most_flops
from moe_jax.tree import path_of


class PlanRow(NamedTuple):
    """The costs of one group in one step on one device. It sends the bytes given here, and receives as many.

    FLOPs are those of the products, symmetric ones in full, on the mean of all devices.
    """

    leaves: tuple[str, ...]
    shape: tuple[int, int]  # of one matrix
    matrices: int
    per_device: int  # matrices for which every device has room, zeros included
    fewest: int  # matrices that the device with the fewest iterates on; per_device where all do the same
    batch: int  # matrices that it iterates on at a time
    copies: int  # devices that get the same matrices and do the same work
    padding: float  # the share of zeros and copies among the matrices that devices iterate on
    gram: bool  # whether the iteration is Gram Newton–Schulz
    flops: int
    bytes_in: int  # by the all-to-all that makes matrices whole
    bytes_out: int  # by the all-to-all of the results
    bytes_gather: int  # by the all-gather of results over devices that hold the same shards


class Plan(NamedTuple):
    """The costs of Muon for the matrices of a parameter tree in each step, and AdamW's traffic for the whole tree."""

    devices: int
    steps: int
    dtype: str
    rows: tuple[PlanRow, ...]
    adamw_bytes: int  # sent by a device: gradients and parameters, see `make_plan`
    state_bytes: int  # of one device: one momentum for matrices, AdamW's two moments for the rest
    adamw_state_bytes: int
    flops: int  # of Muon's iterations on the device that has the most to do

    @property
    def bytes(self) -> int:
        """Bytes that a device sends for Muon, beyond AdamW's."""
        return sum(row.bytes_in + row.bytes_out + row.bytes_gather for row in self.rows)

    @property
    def mean_flops(self) -> int:
        """FLOPs of Muon's iterations on the mean of all devices."""
        return sum(row.flops for row in self.rows)

    @property
    def ratio(self) -> float:
        """Traffic of a step with Muon, divided by that of a step with AdamW."""
        return 1.0 + (self.bytes / self.adamw_bytes if self.adamw_bytes else 0.0)

    def __str__(self) -> str:
        rows = [("matrices", "shape", "a device", "padding", "GFLOP", "MB in", "MB out", "MB gather")]
        for r in self.rows:
            sizes = (r.flops / 1e9, r.bytes_in / 1e6, r.bytes_out / 1e6, r.bytes_gather / 1e6)
            shape = "×".join(map(str, r.shape))
            rows.append((str(r.matrices), shape, _range(r), f"{r.padding:.1%}", *map(_short, sizes)))
        if self.devices == 1:  # nothing moves
            rows = [row[:5] for row in rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        same = lambda row: (f", the same on {row.copies} devices" if row.copies > 1 else "") + ", Gram" * row.gram
        names = ["", *(_names(row.leaves) + same(row) for row in self.rows)]
        mb = lambda n: f"{_short(n / 1e6)} MB"
        on = "1 device" if self.devices == 1 else f"each of {self.devices} devices"
        traffic = (
            f"; {mb(self.bytes)} sent, beside {mb(self.adamw_bytes)} of gradients and parameters: "
            f"{self.ratio:.2f} of AdamW's traffic"
        )
        uneven = self.flops / max(self.mean_flops, 1) > 1.0005
        busiest = f", {_short(self.flops / 1e9)} on the device that has the most" if uneven else ""
        return "\n".join(
            [
                f"muon: {self.steps} steps in {self.dtype}; a step of {on}:",
                *(f"  {line}  {name}".rstrip() for line, name in zip(lines, names, strict=True)),
                f"  {_short(self.mean_flops / 1e9)} GFLOP{busiest}{traffic if self.devices > 1 else ''}",
                f"  optimizer state {mb(self.state_bytes)}; AdamW's {mb(self.adamw_state_bytes)}",
            ]
        )


def _short(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def _range(row: PlanRow) -> str:
    return f"{row.fewest}–{row.per_device}" if row.fewest < row.per_device else str(row.per_device)


def _names(paths: tuple[str, ...]) -> str:
    """Joins paths, naming a folder once: `layers/moe/w_down, w_gate, w_up`."""
    out, last = [], None
    for path in paths:
        folder, _, name = path.rpartition("/")
        out.append(name if folder == last else path)
        last = folder
    return ", ".join(out)


def make_plan(
    params: Any,
    matrices: Callable[[str, Any], Matrices | None],
    *,
    coefficients: str | Coefficients = "jordan",
    dtype: Any = newton_schulz.AUTO,
    in_place: tuple[str, ...] = (),
    frozen: frozenset[str] = frozenset(),
) -> Plan:
    """Plans Muon for all parameters: arrays, or ShapeDtypeStructs with a sharding (an abstract mesh is enough).

    `matrices` gives None for leaves that AdamW updates. AdamW's traffic is that of arXiv:2502.16982, §2.3: float32
    gradients are reduce-scattered over the mesh axes that shard a leaf, and its parameters gathered in their own dtype;
    over the other mesh axes gradients are all-reduced. in_place: mesh axes of expert parallelism. Where they shard
    batch axes of matrices, weights stay on their device. frozen: paths of leaves that are gathered, but have neither
    gradients nor states.
    """
    chosen = newton_schulz.coefficients(coefficients) if isinstance(coefficients, str) else coefficients
    dtype = newton_schulz.iteration_dtype(dtype)
    with_muon, adamw_bytes, state_bytes, adamw_state_bytes, devices = {}, 0, 0, 0, 1
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        name = path_of(path)
        placed, where = placement(x), matrices(name, x)
        local = x.size // placed.parts(*placed.used)
        states = 2 if where is None else 1
        inner = {a % x.ndim for a in where.axes} if where is not None else set(range(x.ndim))
        gathered = [tuple(n for n in names if i in inner or n not in in_place) for i, names in enumerate(placed.used)]
        replicas = placed.parts(placed.idle)
        trained = name not in frozen
        adamw_bytes += local * (placed.parts(*gathered) - 1) * (4 * trained + x.dtype.itemsize)
        devices = max(devices, math.prod(placed.sizes.values()))
        if not trained:
            continue
        adamw_bytes += 2 * 4 * local * (replicas - 1) // replicas
        state_bytes += states * local * x.dtype.itemsize
        adamw_state_bytes += 2 * local * x.dtype.itemsize
        if where is not None:
            with_muon[name] = x
    steps = len(chosen.steps)
    groups = layout(with_muon, matrices, steps, dtype)
    rows = _join(_row(group, devices, steps, dtype) for group in groups)
    flops = most_flops(groups, steps, dtype)
    return Plan(devices, steps, dtype.name, rows, adamw_bytes, state_bytes, adamw_state_bytes, flops)


def _join(rows: Iterable[PlanRow]) -> tuple[PlanRow, ...]:
    """Joins the rows of groups of one shape that do not move, each of which is a single leaf."""
    out: dict[Any, PlanRow] = {}
    for i, row in enumerate(rows):
        key = i if row.bytes_in or row.bytes_gather else (row.shape, row.padding)
        before = out.get(key)
        if before is not None:
            row = before._replace(
                leaves=before.leaves + row.leaves,
                matrices=before.matrices + row.matrices,
                per_device=before.per_device + row.per_device,
                fewest=before.fewest + row.fewest,
                batch=before.batch + row.batch,
                flops=before.flops + row.flops,
            )
        out[key] = row
    return tuple(out.values())


def _row(group: Group, devices: int, steps: int, dtype: Any) -> PlanRow:
    parts, m, n, matrix = math.prod(group.parts), *group.shape, group.leaves[0].matrix
    total = sum(math.prod(leaf.shape) for leaf in group.leaves) // (m * n)
    exchanged = group.per_device * m * n * dtype.itemsize * (parts - 1) // parts
    return PlanRow(
        leaves=tuple(leaf.path for leaf in group.leaves),
        shape=group.shape,
        matrices=total,
        per_device=group.per_device,
        fewest=group.fewest,
        batch=group.shares.batch if group.shares else group.per_device,
        copies=group.leaves[0].size(*group.leaves[0].idle) // group.replicas,
        padding=1.0 - total / group.computed,
        gram=newton_schulz.uses_gram(*matrix, steps, dtype),
        flops=group.computed * group.work(steps, dtype).flops // devices,
        bytes_in=exchanged,
        bytes_out=exchanged,
        bytes_gather=group.per_device * m * n * dtype.itemsize * (group.replicas - 1),
    )
