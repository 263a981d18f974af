"""Muon as an `optax.GradientTransformation`: orthogonalised momentum, RMS-matched, with decoupled weight decay.

Usable alone, in any optax chain: `optax.chain(optax.clip_by_global_norm(1.0), muon(3e-4))`. A leaf is a matrix or a
batch of matrices; each matrix is orthogonalised on its own (each expert of each layer of an `[L, E, D, F]` leaf).

On a mesh with Explicit axes no collective lies inside the iteration. Leaves whose matrices have one shape and are cut
alike form a group, and a group moves once: one all-to-all makes its matrices whole and spreads them evenly over the
devices, one brings the results back; where devices hold the same shards (`data` replicas), each takes a part of the
matrices and one all-gather hands out the results. Of matrices that are cut, an all-reduce of a number each says which
have a gradient. `plan` says what the rest costs. Without a mesh, under Auto axes and inside a `shard_map`, each leaf is
one batched iteration on the matrices as they are seen there: right everywhere, but under Auto axes the partitioner may
put collectives into the iteration.

Sources: Keller Jordan et al. 2024 (kellerjordan.github.io/posts/muon); arXiv:2502.16982, eqs. 1–4.
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from moe_jax import newton_schulz
from moe_jax.newton_schulz import Coefficients
from moe_jax.spread import Group, Matrices, Rule, layout, one_matrix, placement
from moe_jax.tree import path_of

Number = float | Array  # traced or not
# Defaults that can be called would be schedules to `optax.inject_hyperparams`: jnp.bfloat16 can, its dtype cannot.
BFLOAT16 = jnp.dtype(jnp.bfloat16)


class MuonState(NamedTuple):
    momentum: optax.Updates  # sharded like the parameters


def muon(
    learning_rate: Number | optax.Schedule,
    *,
    weight_decay: Number | optax.Schedule = 0.1,
    cautious_decay: bool = False,
    momentum: Number = 0.95,
    nesterov: bool = True,
    coefficients: str | Coefficients = "jordan",
    scale: Literal["match_rms", "spectral"] = "match_rms",
    update_rms: Number = 0.2,
    dtype: Any = BFLOAT16,
    matrices: Rule | None = None,
) -> optax.GradientTransformation:
    """W ← W − η·(scale·O + λ·W), O = Newton–Schulz(G + μ·M) or (M) without Nesterov, M ← μ·M + G.

    Args:
        learning_rate: η, a number or an optax schedule.
        weight_decay: λ, decoupled, multiplied by η; a number or an optax schedule. With 0, `update` needs no params.
        cautious_decay: decay only the entries that the update shrinks too (arXiv:2510.12402).

    The other arguments are those of `scale_by_muon`. `optax.inject_hyperparams(muon)` makes the numbers a part of the
    state; name `dtype` and `matrices` in its static_args where they are passed.
    """
    if isinstance(weight_decay, int | float) and weight_decay == 0:
        decay = optax.identity()
    else:
        decay = _cautious_decay(weight_decay) if cautious_decay else optax.add_decayed_weights(weight_decay)
    direction = scale_by_muon(
        momentum=momentum,
        nesterov=nesterov,
        coefficients=coefficients,
        scale=scale,
        update_rms=update_rms,
        dtype=dtype,
        matrices=matrices,
    )
    return optax.chain(direction, decay, optax.scale_by_learning_rate(learning_rate))


def scale_by_muon(
    *,
    momentum: Number = 0.95,
    nesterov: bool = True,
    coefficients: str | Coefficients = "jordan",
    scale: Literal["match_rms", "spectral"] = "match_rms",
    update_rms: Number = 0.2,
    dtype: Any = BFLOAT16,
    matrices: Rule | None = None,
) -> optax.GradientTransformation:
    """scale·O: the direction of `muon`, before weight decay and learning rate.

    It does not depend on the gradient's scale. A matrix whose gradient is all zeros in a step, as that of an expert
    without tokens, gets no update in that step; its momentum decays.

    Args:
        momentum: μ in [0, 1), in sum form.
        coefficients: a name in `newton_schulz.SETS`, or Coefficients.
        scale: "match_rms", update_rms·√max(m, n): every matrix gets an update RMS of about `update_rms`, that of AdamW,
            so AdamW's η and λ carry over. "spectral", √max(1, n/m) for m inputs and n outputs. Of one head's m and n
            where `matrices` says so.
        dtype: of the iteration, and of what moves between devices. The momentum stays in the parameter's dtype.
        matrices: which axes of a leaf form its matrices; None: every leaf is one matrix. Raises ValueError for a leaf
            of unknown geometry.
    """
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r}: must be one of {', '.join(SCALES)}")
    if isinstance(dtype, jax.Array):
        raise ValueError("muon: dtype is not a schedule; name it in static_args of optax.inject_hyperparams")
    chosen = newton_schulz.coefficients(coefficients) if isinstance(coefficients, str) else coefficients
    iterate = functools.partial(newton_schulz.orthogonalize, coefficients=chosen, dtype=dtype)
    factor = lambda block: SCALES[scale](*block) * (update_rms if scale == "match_rms" else 1.0)
    # Matrices are scaled when they are whole, so that what moves needs the range of float32, as bfloat16 has it.
    moved = dtype if jnp.finfo(dtype).maxexp >= jnp.finfo(jnp.float32).maxexp else jnp.float32
    rule = matrices or one_matrix

    def init(params):
        layout(params, rule)
        return MuonState(jax.tree.map(jnp.zeros_like, params))

    def update(grads, state, params=None):
        del params
        m = jax.tree.map(lambda m, g: (momentum * m + g).astype(m.dtype), state.momentum, grads)
        direction = jax.tree.map(lambda m, g: (g + momentum * m).astype(g.dtype), m, grads) if nesterov else m
        flat, tree = jax.tree.flatten(direction)
        gradients = jax.tree.leaves(grads)
        out: list = [None] * len(flat)
        for group in layout(direction, rule):
            indices = [leaf.index for leaf in group.leaves]
            results = group.map(iterate, [flat[i].astype(moved) for i in indices], [gradients[i] for i in indices])
            for leaf, o in zip(group.leaves, results, strict=True):
                x = flat[leaf.index]
                out[leaf.index] = (factor(leaf.block) * o.astype(jnp.float32)).astype(x.dtype)
        return jax.tree.unflatten(tree, out), MuonState(m)

    return optax.GradientTransformation(init, update)


SCALES = {  # by (inputs, outputs) of one matrix
    "match_rms": lambda m, n: math.sqrt(max(m, n)),
    "spectral": lambda m, n: math.sqrt(max(1.0, n / m)),
}


def _cautious_decay(weight_decay: Number | optax.Schedule) -> optax.GradientTransformation:
    # An update u moves W by −η·u: it shrinks the entries of its own sign.
    decay = optax.add_decayed_weights(weight_decay)
    shrunk = lambda u, w: jnp.where(u * w > 0, w, jnp.zeros_like(w)).astype(u.dtype)

    def update(updates, state, params=None):
        return decay.update(updates, state, None if params is None else jax.tree.map(shrunk, updates, params))

    return optax.GradientTransformation(decay.init, update)


# --- the plan --------------------------------------------------------------------------------------------------------


class PlanRow(NamedTuple):
    """One group. FLOPs and bytes of one device and one step; bytes are those it sends, as many as it receives."""

    leaves: tuple[str, ...]
    shape: tuple[int, int]  # of one matrix
    matrices: int
    per_device: int  # matrices that every device gets, zeros included
    copies: int  # devices that get the same matrices and do the same work
    padding: float  # the share of zeros and copies among them
    flops: int
    bytes_in: int  # all-to-all that makes the matrices whole
    bytes_out: int  # all-to-all of the results
    bytes_gather: int  # all-gather of the results over devices that hold the same shards


class Plan(NamedTuple):
    """What the matrices of a parameter tree cost in each step, beside AdamW's traffic for the whole tree."""

    devices: int
    steps: int
    dtype: str
    rows: tuple[PlanRow, ...]
    adamw_bytes: int  # sent by a device: gradients and parameters, see `plan`
    state_bytes: int  # of a device: one momentum for matrices, AdamW's two for the rest
    adamw_state_bytes: int

    @property
    def bytes(self) -> int:
        """That Muon adds."""
        return sum(row.bytes_in + row.bytes_out + row.bytes_gather for row in self.rows)

    @property
    def flops(self) -> int:
        return sum(row.flops for row in self.rows)

    @property
    def ratio(self) -> float:
        """Traffic of a step with Muon against AdamW's."""
        return 1.0 + (self.bytes / self.adamw_bytes if self.adamw_bytes else 0.0)

    def __str__(self) -> str:
        rows = [("matrices", "shape", "a device", "padding", "GFLOP", "MB in", "MB out", "MB gather")]
        for r in self.rows:
            sizes = (r.flops / 1e9, r.bytes_in / 1e6, r.bytes_out / 1e6, r.bytes_gather / 1e6)
            shape = "×".join(map(str, r.shape))
            rows.append((str(r.matrices), shape, str(r.per_device), f"{r.padding:.1%}", *map(_short, sizes)))
        if self.devices == 1:  # nothing moves
            rows = [row[:5] for row in rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        same = lambda row: f", the same on {row.copies} devices" if row.copies > 1 else ""
        names = ["", *(_names(row.leaves) + same(row) for row in self.rows)]
        mb = lambda n: f"{_short(n / 1e6)} MB"
        on = "1 device" if self.devices == 1 else f"each of {self.devices} devices"
        traffic = (
            f"; {mb(self.bytes)} sent, beside {mb(self.adamw_bytes)} of gradients and parameters: "
            f"{self.ratio:.2f} of AdamW's traffic"
        )
        return "\n".join(
            [
                f"muon: {self.steps} steps in {self.dtype}; a step of {on}:",
                *(f"  {line}  {name}".rstrip() for line, name in zip(lines, names, strict=True)),
                f"  {_short(self.flops / 1e9)} GFLOP{traffic if self.devices > 1 else ''}",
                f"  optimizer state {mb(self.state_bytes)}; AdamW's {mb(self.adamw_state_bytes)}",
            ]
        )


def _short(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def _names(paths: tuple[str, ...]) -> str:
    """`layers/moe/w_down, w_gate, w_up`: a folder is named once."""
    out, last = [], None
    for path in paths:
        folder, _, name = path.rpartition("/")
        out.append(name if folder == last else path)
        last = folder
    return ", ".join(out)


def plan(
    params: Any,
    matrices: Callable[[str, Any], Matrices | None],
    *,
    coefficients: str | Coefficients = "jordan",
    dtype: Any = jnp.bfloat16,
    in_place: tuple[str, ...] = (),
) -> Plan:
    """The plan for all parameters: arrays, or ShapeDtypeStructs with a sharding (an abstract mesh will do).

    `matrices` gives None for leaves that are AdamW's. AdamW's traffic, as in arXiv:2502.16982, §2.3: float32 gradients
    are reduced and scattered over the mesh axes that shard a leaf, and its parameters gathered in their own type; over
    the other mesh axes gradients are all-reduced. `in_place`: mesh axes that are expert parallelism where they lie on
    batch axes of matrices; over them weights stay in place.
    """
    chosen = newton_schulz.coefficients(coefficients) if isinstance(coefficients, str) else coefficients
    mine, adamw_bytes, state_bytes, adamw_state_bytes, devices = {}, 0, 0, 0, 1
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        name = path_of(path)
        placed, where = placement(x), matrices(name, x)
        local = x.size // placed.parts(*placed.used)
        states = 2 if where is None else 1
        inner = {a % x.ndim for a in where.axes} if where is not None else set(range(x.ndim))
        gathered = [tuple(n for n in names if i in inner or n not in in_place) for i, names in enumerate(placed.used)]
        replicas = placed.parts(placed.idle)
        adamw_bytes += local * (placed.parts(*gathered) - 1) * (4 + x.dtype.itemsize)
        adamw_bytes += 2 * 4 * local * (replicas - 1) // replicas
        state_bytes += states * local * x.dtype.itemsize
        adamw_state_bytes += 2 * local * x.dtype.itemsize
        devices = max(devices, math.prod(placed.sizes.values()))
        if where is not None:
            mine[name] = x
    groups = layout(mine, matrices)
    rows = _join(_row(group, devices, len(chosen.steps), jnp.dtype(dtype).itemsize) for group in groups)
    return Plan(devices, len(chosen.steps), jnp.dtype(dtype).name, rows, adamw_bytes, state_bytes, adamw_state_bytes)


def _join(rows: Iterable[PlanRow]) -> tuple[PlanRow, ...]:
    """Groups of one shape that do not move, each a leaf of its own, in one row."""
    out: dict[Any, PlanRow] = {}
    for i, row in enumerate(rows):
        key = i if row.bytes_in or row.bytes_gather else (row.shape, row.padding)
        before = out.get(key)
        if before is not None:
            row = before._replace(
                leaves=before.leaves + row.leaves,
                matrices=before.matrices + row.matrices,
                per_device=before.per_device + row.per_device,
                flops=before.flops + row.flops,
            )
        out[key] = row
    return tuple(out.values())


def _row(group: Group, devices: int, steps: int, itemsize: int) -> PlanRow:
    parts, m, n = math.prod(group.parts), *group.shape
    block = group.leaves[0].block
    total = sum(math.prod(leaf.shape) for leaf in group.leaves) // (m * n)
    exchanged = group.per_device * m * n * itemsize * (parts - 1) // parts
    return PlanRow(
        leaves=tuple(leaf.path for leaf in group.leaves),
        shape=group.shape,
        matrices=total,
        per_device=group.per_device,
        copies=group.leaves[0].size(*group.leaves[0].idle) // group.replicas,
        padding=1.0 - total / (group.per_device * devices),
        flops=group.per_device * (m * n // math.prod(block)) * newton_schulz.flops(*block, steps),
        bytes_in=exchanged,
        bytes_out=exchanged,
        bytes_gather=group.per_device * m * n * itemsize * (group.replicas - 1),
    )
