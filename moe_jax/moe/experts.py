"""The experts of one device: (x, Routing, expert weights) → y, for the tokens that the device holds.

`dense` computes every expert on every token: the oracle. `grouped` is dropless: it sorts rows by expert and calls a
grouped matmul. `capacity` computes a fixed number of rows for each expert; it drops and counts the rest. exchange.py
brings the tokens here.

Everything here runs inside the `shard_map` of layer.py. Letters: e experts of this device; T tokens and A = T·K slots
after the exchange, all or none of which may belong to this device; R rows computed at a time (A on one device).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal
from jaxtyping import Array, Bool, Float, Int

from moe_jax.config import MoEConfig
from moe_jax.kernels import grouped_matmuls
from moe_jax.kernels.rows import permute, take
from moe_jax.moe.routing import Routing
from moe_jax.nn.fake_quant import int8
from moe_jax.nn.layers import ACTIVATIONS
from moe_jax.nn.remat import keep


class ExpertWeights(NamedTuple):
    """The matrices of a device's experts."""

    gate: Float[Array, "e D F"] | None  # None if the activation has none
    up: Float[Array, "e D F"]
    down: Float[Array, "e F D"]
    # LoRA: (scale · A [e in r], B [e r out]) of the matrices "gate", "up", "down" that have an adapter; None: none has
    adapters: dict[str, tuple[Array, Array]] | None = None


@dataclasses.dataclass(frozen=True)
class ExpertCompute:
    """A function that computes a device's own experts, with everything it depends on besides arrays."""

    cfg: MoEConfig
    backend: str = "reference"  # of the grouped matmul
    activation: str = "swiglu"
    fill: float = 1.0  # expected share of the slots that are valid, for which buffers are made

    def __call__(
        self, x: Float[Array, "T D"], routing: Routing, w: ExpertWeights
    ) -> tuple[Float[Array, "T D"], Bool[Array, "T K"]]:
        """y in float32, summed over this device's experts, and which valid slots were computed (False: dropped)."""
        return COMPUTE[self.cfg.compute](x, routing, w, self)


class Compute(Protocol):
    """One way to compute experts: a value of `moe.compute`."""

    def __call__(
        self, x: Array, routing: Routing, w: ExpertWeights, compute: ExpertCompute
    ) -> tuple[Float[Array, "T D"], Bool[Array, "T K"]]:
        """Returns what `ExpertCompute.__call__` does."""


# --- compute ---------------------------------------------------------------------------------------------------------


# (rows, matrices of one shape, one for each expert) → the products of the rows with each of them
Matmuls = Callable[[Array, tuple[Array, ...]], Sequence[Array]]


def _products(x: Array, names: tuple[str, ...], matmuls: Matmuls, w: ExpertWeights) -> Sequence[Array]:
    """The products of the rows with the matrices of these names, adapters included."""
    ys = matmuls(x, tuple(getattr(w, name) for name in names))
    found = [name for name in names if name in (w.adapters or {})]
    if not found:
        return ys
    # One product with all A side by side: a kernel pads the few columns of each to those of a tile.
    a = jnp.concatenate([w.adapters[name][0] for name in found], axis=-1)
    lows = dict(zip(found, jnp.split(matmuls(x, (a,))[0], len(found), axis=-1), strict=True))
    low = lambda name, y: y if name not in lows else y + matmuls(lows[name], (w.adapters[name][1],))[0]
    return [low(name, y) for name, y in zip(names, ys, strict=True)]


def _hidden(compute: ExpertCompute, x: Array, matmuls: Matmuls, w: ExpertWeights) -> Array:
    """The input of the down projection, before combine weights."""
    *gates, up = _products(x, ("up",) if w.gate is None else ("gate", "up"), matmuls, w)
    gate = keep(gates[0], "gate") if gates else None
    h = ACTIVATIONS[compute.activation].hidden(gate, keep(up, "up"))
    return int8(h) if compute.cfg.expert_inputs == "int8" else h


def dense(x, routing, w, compute):
    """Computes every expert on every token: y = Σ_e weight[t, e] · GLU_e(x). The cost grows with E. The oracle."""
    one_hot = jax.nn.one_hot(routing.experts, w.up.shape[0], dtype=jnp.float32)
    combine_Te = jnp.einsum("tke,tk->te", one_hot, jnp.where(routing.valid, routing.weights, 0.0))
    rows = {2: "td,edf->etf", 3: "etf,efd->etd"}  # the tokens, and what each expert makes of them
    matmuls = lambda x, ms: [jnp.einsum(rows[x.ndim], x, m) for m in ms]
    h = _hidden(compute, x, matmuls, w)
    (y_eTD,) = _products(h, ("down",), matmuls, w)
    return jnp.einsum("etd,te->td", y_eTD.astype(jnp.float32), combine_Te), routing.valid


class RowPlan(NamedTuple):
    """Slots (t, k) sorted by expert, slots that are not valid last: all A of them, or R consecutive ones."""

    slot_R: Int[Array, " R"]  # sorted row → slot t·K + k
    row_A: Int[Array, " A"]  # slot → sorted row; R if it is not among these rows
    sizes_e: Int[Array, " e"]


def plan_rows(routing: Routing, num_experts: int) -> RowPlan:
    """The plan of all slots, those of an expert by priority. Both index arrays are permutations of 0 … A−1."""
    key = jnp.where(routing.valid, routing.experts, num_experts).reshape(-1)
    if routing.priority is None:
        slot_A = jnp.argsort(key, stable=True)
    else:
        slot_A = jnp.lexsort((-routing.priority.reshape(-1), key))
    row_A = jnp.zeros_like(slot_A).at[slot_A].set(jnp.arange(slot_A.shape[0]), unique_indices=True)
    sizes_e = jnp.sum(key[:, None] == jnp.arange(num_experts)[None, :], axis=0, dtype=jnp.int32)
    return RowPlan(slot_A, row_A, sizes_e)


def slice_plan(plan: RowPlan, first: Int[Array, ""] | int, rows: int) -> RowPlan:
    """The plan of `rows` rows from row `first` of a plan of all slots. Rows past its end compute nothing."""
    slot_R = jax.lax.dynamic_slice_in_dim(jnp.pad(plan.slot_R, (0, rows)), first, rows)
    row_A = plan.row_A - first
    inside = lambda row: jnp.clip(row - first, 0, rows)
    end_e = jnp.cumsum(plan.sizes_e)
    return RowPlan(
        slot_R, jnp.where((row_A >= 0) & (row_A < rows), row_A, rows), inside(end_e) - inside(end_e - plan.sizes_e)
    )


@jax.custom_vjp
def dispatch(x: Float[Array, "T D"], plan: RowPlan) -> Float[Array, "R D"]:
    """Gathers the token of every sorted row, without making K copies of all tokens first."""
    token_R = plan.slot_R // (plan.row_A.shape[0] // x.shape[0])
    return jax.lax.platform_dependent(x, token_R, cuda=_take_pairs, default=lambda x, index: x[index])


def _take_pairs(x: Float[Array, "T D"], index: Int[Array, " R"]) -> Float[Array, "R D"]:
    """Returns x[index], gathered as pairs of bfloat16 numbers: a thread of XLA's gather then copies twice the bytes."""
    if x.dtype != jnp.bfloat16 or x.shape[1] % 2:
        return x[index]
    pairs = jax.lax.bitcast_convert_type(x.reshape(x.shape[0], -1, 2), jnp.uint32)
    return jax.lax.bitcast_convert_type(pairs[index], x.dtype).reshape(-1, x.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def combine(y: Float[Array, "R D"], plan: RowPlan, tokens: int) -> Float[Array, "T D"]:
    """Sums the rows of every token in float32. One addition for each of K lets XLA fuse it with the reads."""
    row_TK = plan.row_A.reshape(tokens, -1)
    return sum(take(y, row_TK[:, k]).astype(jnp.float32) for k in range(row_TK.shape[1]))


# Each is the transpose of the other, so both gradients are gathers too.
dispatch.defvjp(
    lambda x, plan: (dispatch(x, plan), (plan, x.shape[0])),
    lambda saved, dx: (combine(dx, *saved).astype(dx.dtype), None),
)
combine.defvjp(
    lambda y, plan, tokens: (combine(y, plan, tokens), (plan, jnp.zeros((), y.dtype))),
    lambda tokens, saved, dy: (dispatch(dy.astype(saved[1].dtype), saved[0]), None),
)


def grouped(x, routing, w, compute):
    """Computes rows sorted by expert with a grouped matmul for each matrix. Dropless; the cost follows the rows in use.

    With experts on P devices, a device uses A·fill/P of its A rows on average: buffers of A rows would mostly be empty.
    So the first pass computes `moe.room` times the average, and further passes compute the rest where there is more.
    Those keep nothing for the backward pass, which computes them again.
    """
    with jax.named_scope("sort"):
        plan = keep(plan_rows(routing, w.up.shape[0]), "rows")
    weight_A = jnp.where(routing.valid, routing.weights, 0.0).reshape(-1)
    rows, further = rows_per_pass(compute, weight_A.shape[0], w.up.shape[0])
    if rows == weight_A.shape[0]:
        return _compute_rows(x, weight_A, w, plan, compute), routing.valid
    return _in_passes(x, weight_A, w, plan, rows, further, compute), routing.valid


def rows_per_pass(compute: ExpertCompute, slots: int, local: int) -> tuple[int, int]:
    """Rows of the first pass, at most all A, and of each further pass, a quarter of the average number."""
    cfg = compute.cfg
    average = slots * compute.fill * local / cfg.num_experts
    first, further = (8 * math.ceil(average * share / 8) for share in (cfg.room, 0.25))
    return min(first, slots), further


def _compute_rows(x, weight_A, w: ExpertWeights, plan: RowPlan, compute: ExpertCompute):
    """The sum y `[T, D]` over the rows of a plan.

    The combine weight multiplies the input of the down projection. Then the sum over a token's rows has no weights, and
    no gradient needs the result of the down projection.
    """
    with jax.named_scope("dispatch"):
        x_RD = dispatch(x, plan)
        weight_R = permute(weight_A, plan.slot_R, plan.row_A)
    with jax.named_scope("experts"):
        matmuls = lambda x, ms: grouped_matmuls(x, ms, plan.sizes_e, compute.backend)
        h_RF = _hidden(compute, x_RD, matmuls, w)
        h_RF = (h_RF.astype(jnp.float32) * weight_R[:, None]).astype(x.dtype)
        (y_RD,) = _products(h_RF, ("down",), matmuls, w)
    with jax.named_scope("combine"):
        return combine(y_RD, plan, x.shape[0])


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _in_passes(x, weight_A, w, plan, rows: int, further: int, compute: ExpertCompute):
    """Computes the rows of a plan of all slots: `rows` at first, then `further` at a time."""
    y = _compute_rows(x, weight_A, w, slice_plan(plan, 0, rows), compute)
    return _further_passes(plan, rows, further, lambda part, y: y + _compute_rows(x, weight_A, w, part, compute), y)


def _in_passes_forward(x, weight_A, w, plan, rows, further, compute):
    """Splits the arguments into those with a gradient and the frozen ones. A loop of further passes would carry the
    gradients of these too, and compute them, though nobody wants them."""
    where = lambda node: isinstance(node, CustomVJPPrimal)
    pick = lambda which: lambda p: p.value if p.perturbed in which else None
    moving, fixed = (jax.tree.map(pick(which), (x, weight_A, w), is_leaf=where) for which in ((True,), (False,)))
    plan = jax.tree.map(pick((True, False)), plan, is_leaf=where)
    compute_rows = lambda moving, part: _compute_rows(*_filled(moving, fixed), part, compute)
    y, back = jax.vjp(lambda moving: compute_rows(moving, slice_plan(plan, 0, rows)), moving)
    add = lambda part, y: y + compute_rows(moving, part)
    return _further_passes(plan, rows, further, add, y), (back, moving, fixed, plan)


def _in_passes_backward(rows, further, compute, saved, dy):
    back, moving, fixed, plan = saved
    # `combine` rounds dy so too. Without this, XLA writes it in float32 even for a loop of no passes.
    rounded = dy.astype(_filled(moving, fixed)[0].dtype)

    def add(part, grads):
        _, again = jax.vjp(lambda moving: _compute_rows(*_filled(moving, fixed), part, compute), moving)
        return jax.tree.map(jnp.add, grads, again(rounded.astype(dy.dtype))[0])

    return *_further_passes(plan, rows, further, add, back(dy)[0]), None


_in_passes.defvjp(_in_passes_forward, _in_passes_backward, symbolic_zeros=True)


def _filled(moving: Any, fixed: Any) -> Any:
    """Joins two trees, each of which has None where the other has a leaf."""
    return jax.tree.map(lambda m, f: f if m is None else m, moving, fixed, is_leaf=lambda node: node is None)


def _further_passes(plan: RowPlan, rows: int, further: int, add: Callable, start):
    """Applies add(part of the plan, sums so far) to the rows after the first `rows`, `further` at a time, if any."""
    count = (jnp.sum(plan.sizes_e) - rows + further - 1) // further
    return jax.lax.fori_loop(0, count, lambda i, sums: add(slice_plan(plan, rows + i * further, further), sums), start)


def capacity_rows(compute: ExpertCompute, tokens: int) -> int:
    """Q: the rows of one expert for `tokens` tokens after the exchange."""
    cfg = compute.cfg
    return max(1, -int(-cfg.capacity_factor * compute.fill * cfg.slots * tokens // cfg.num_experts))


def capacity(x, routing, w, compute):
    """Computes the first Q rows of each expert and drops the others (their y is 0).

    The order is that of `Routing.priority`, or of tokens, as in GShard.

    Q depends on the tokens of one `expert` row of the mesh: unlike that of the other paths, this result depends on the
    mesh.
    """
    rows, experts = capacity_rows(compute, x.shape[0]), w.up.shape[0]
    plan = plan_rows(routing, experts)
    first_e = jnp.cumsum(plan.sizes_e) - plan.sizes_e
    position = plan.row_A.reshape(routing.experts.shape) - first_e[routing.experts]
    computed = routing.valid & (position < rows)
    # The sorted row of each entry of the buffer [e, Q]. Entries past an expert's rows read a row that is masked out.
    row_eQ = first_e[:, None] + jnp.arange(rows)[None, :]
    filled_eQ = jnp.arange(rows)[None, :] < plan.sizes_e[:, None]
    x_RD = dispatch(x, plan)
    x_eQD = jnp.where(filled_eQ[:, :, None], x_RD[jnp.minimum(row_eQ, x_RD.shape[0] - 1)], 0)
    matmuls = lambda x, ms: [jnp.einsum("eqd,edf->eqf", x, m) for m in ms]
    h = _hidden(compute, x_eQD, matmuls, w)
    (y_eQD,) = _products(h, ("down",), matmuls, w)
    y_TKD = y_eQD[routing.experts, jnp.minimum(position, rows - 1)].astype(jnp.float32)
    return jnp.einsum("tkd,tk->td", y_TKD, jnp.where(computed, routing.weights, 0.0)), computed


COMPUTE: dict[str, Compute] = {"dense": dense, "grouped": grouped, "capacity": capacity}
