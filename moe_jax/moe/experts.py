"""(x, Routing, expert weights) → y: what a device does with the tokens it holds and its own experts.

`dense`: every expert on every token, the oracle. `grouped`: dropless, rows sorted by expert, grouped matmul.
`capacity`: a fixed number of rows an expert; the rest is dropped and counted. How tokens get here is exchange.py's
business.

Everything here runs inside the `shard_map` of moe.py. Letters: e experts of this device; T tokens and N = T·K slots
after the exchange, of which a device may have to compute all or none; R rows computed at a time (N on one device).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from moe_jax.config import MoEConfig
from moe_jax.kernels import grouped_matmul, grouped_matmuls
from moe_jax.moe.routing import Routing
from moe_jax.nn.layers import ACTIVATIONS
from moe_jax.nn.remat import keep


class ExpertWeights(NamedTuple):
    gate: Float[Array, "e D F"] | None  # None if the activation has none
    up: Float[Array, "e D F"]
    down: Float[Array, "e F D"]


@dataclasses.dataclass(frozen=True)
class ExpertCompute:
    """How a device computes its own experts."""

    cfg: MoEConfig
    backend: str = "reference"  # of the grouped matmul
    activation: str = "swiglu"

    def __call__(
        self, x: Float[Array, "T D"], routing: Routing, w: ExpertWeights
    ) -> tuple[Float[Array, "T D"], Bool[Array, "T K"]]:
        """y in float32 (sums over this device's experts) and which valid slots were computed (False: dropped)."""
        return COMPUTE[self.cfg.compute](x, routing, w, self)


class Compute(Protocol):
    def __call__(
        self, x: Array, routing: Routing, w: ExpertWeights, how: ExpertCompute
    ) -> tuple[Float[Array, "T D"], Bool[Array, "T K"]]:
        """As `ExpertCompute.__call__`."""


# --- compute ---------------------------------------------------------------------------------------------------------


def _hidden(activation: str, matmuls: Callable[[tuple[Array, ...]], Iterable[Array]], w: ExpertWeights) -> Array:
    """What the down projection sees; matmuls: the products of the tokens with matrices of every expert."""
    *gates, up = matmuls((w.up,) if w.gate is None else (w.gate, w.up))
    gate = keep(gates[0], "gate") if gates else None
    return ACTIVATIONS[activation].hidden(gate, keep(up, "up"))


def dense(x, routing, w, how):
    """The oracle: y = Σ_e weight[t, e] · GLU_e(x), every expert on every token. Cost follows E, not K."""
    one_hot = jax.nn.one_hot(routing.experts, w.up.shape[0], dtype=jnp.float32)
    combine_Te = jnp.einsum("tke,tk->te", one_hot, jnp.where(routing.valid, routing.weights, 0.0))
    h = _hidden(how.activation, lambda ms: (jnp.einsum("td,edf->etf", x, m) for m in ms), w)
    y_eTD = jnp.einsum("etf,efd->etd", h, w.down)
    return jnp.einsum("etd,te->td", y_eTD.astype(jnp.float32), combine_Te), routing.valid


class RowPlan(NamedTuple):
    """Slots (t, k) sorted by expert, slots that do nothing last: all N of them, or R in a row."""

    slot_R: Int[Array, " R"]  # sorted row → slot t·K + k
    row_N: Int[Array, " N"]  # slot → sorted row; R: it is none of these
    sizes_e: Int[Array, " e"]


def plan_rows(routing: Routing, num_experts: int) -> RowPlan:
    """Of all slots: both index arrays are permutations of 0 … N−1."""
    key = jnp.where(routing.valid, routing.experts, num_experts).reshape(-1)
    slot_N = jnp.argsort(key, stable=True)
    row_N = jnp.zeros_like(slot_N).at[slot_N].set(jnp.arange(slot_N.shape[0]), unique_indices=True)
    sizes_e = jnp.sum(key[:, None] == jnp.arange(num_experts)[None, :], axis=0, dtype=jnp.int32)
    return RowPlan(slot_N, row_N, sizes_e)


def part_of(plan: RowPlan, first: Int[Array, ""] | int, rows: int) -> RowPlan:
    """The plan of `rows` rows from row `first` of a plan of all. Past its end rows are as those that do nothing."""
    slot_R = jax.lax.dynamic_slice_in_dim(jnp.pad(plan.slot_R, (0, rows)), first, rows)
    row_N = plan.row_N - first
    inside = lambda row: jnp.clip(row - first, 0, rows)
    end_e = jnp.cumsum(plan.sizes_e)
    return RowPlan(
        slot_R, jnp.where((row_N >= 0) & (row_N < rows), row_N, rows), inside(end_e) - inside(end_e - plan.sizes_e)
    )


def _take(x: Shaped[Array, "R *n"], index: Int[Array, " N"]) -> Shaped[Array, "N *n"]:
    """x[index], and zeros where the index is R."""
    return x.at[index].get(mode="fill", fill_value=0)


@jax.custom_vjp
def permute(x: Float[Array, "N *n"], to: Int[Array, " R"], back: Int[Array, " N"]) -> Float[Array, "R *n"]:
    """x[to]; `back` says which of these rows each row of x is, R where none. Its gradient gathers instead of scattering
    (deterministic)."""
    return x[to]


permute.defvjp(lambda x, to, back: (x[to], back), lambda back, dy: (_take(dy, back), None, None))


@jax.custom_vjp
def dispatch(x: Float[Array, "T D"], plan: RowPlan) -> Float[Array, "R D"]:
    """The token of every sorted row, without materialising K copies first."""
    token_R = plan.slot_R // (plan.row_N.shape[0] // x.shape[0])
    return jax.lax.platform_dependent(x, token_R, cuda=_take_pairs, default=lambda x, index: x[index])


def _take_pairs(x: Float[Array, "T D"], index: Int[Array, " R"]) -> Float[Array, "R D"]:
    """x[index], two bfloat16 numbers at a time: XLA's gather copies twice the bytes a thread then, and is faster."""
    if x.dtype != jnp.bfloat16 or x.shape[1] % 2:
        return x[index]
    pairs = jax.lax.bitcast_convert_type(x.reshape(x.shape[0], -1, 2), jnp.uint32)
    return jax.lax.bitcast_convert_type(pairs[index], x.dtype).reshape(-1, x.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def combine(y: Float[Array, "R D"], plan: RowPlan, tokens: int) -> Float[Array, "T D"]:
    """The sum of every token's rows, in float32, one after the other, so that XLA reads and adds in one go."""
    row_TK = plan.row_N.reshape(tokens, -1)
    return sum(_take(y, row_TK[:, k]).astype(jnp.float32) for k in range(row_TK.shape[1]))


# Each is the other's transpose, so both gradients gather too.
dispatch.defvjp(
    lambda x, plan: (dispatch(x, plan), (plan, x.shape[0])),
    lambda saved, dx: (combine(dx, *saved).astype(dx.dtype), None),
)
combine.defvjp(
    lambda y, plan, tokens: (combine(y, plan, tokens), (plan, jnp.zeros((), y.dtype))),
    lambda tokens, saved, dy: (dispatch(dy.astype(saved[1].dtype), saved[0]), None),
)


def grouped(x, routing, w, how):
    """Dropless: rows sorted by expert, a grouped matmul for each matrix. Cost follows the rows in use.

    With experts on P devices, N rows would be P times what a device has to do on average, and most of what is copied,
    multiplied elementwise and kept would be nothing. So `moe.room` times the average is computed first, and what is
    more, where there is more, in further turns. These keep nothing: the backward pass computes them again.
    """
    with jax.named_scope("sort"):
        plan = keep(plan_rows(routing, w.up.shape[0]), "rows")
    weight_N = jnp.where(routing.valid, routing.weights, 0.0).reshape(-1)
    rows, more = room(how.cfg, weight_N.shape[0], w.up.shape[0])
    if rows == weight_N.shape[0]:
        return _compute_rows(x, weight_N, w, plan, how), routing.valid
    return _in_turns(x, weight_N, w, plan, rows, more, how), routing.valid


def room(cfg: MoEConfig, slots: int, local: int) -> tuple[int, int]:
    """Rows computed at first, all N at most, and in each further turn: a quarter of the average."""
    average = slots * local / cfg.num_experts
    rows, more = (8 * math.ceil(average * share / 8) for share in (cfg.room, 0.25))
    return min(rows, slots), more


def _compute_rows(x, weight_N, w: ExpertWeights, plan: RowPlan, how: ExpertCompute):
    """y `[T, D]` of the rows of a plan.

    A row's combine weight is put on the input of its down projection: then the sum over a token's rows is a plain one,
    and no gradient needs the down projection's result.
    """
    with jax.named_scope("dispatch"):
        x_RD = dispatch(x, plan)
        weight_R = permute(weight_N, plan.slot_R, plan.row_N)
    with jax.named_scope("experts"):
        h_RF = _hidden(how.activation, lambda ms: grouped_matmuls(x_RD, ms, plan.sizes_e, how.backend), w)
        h_RF = (h_RF.astype(jnp.float32) * weight_R[:, None]).astype(x.dtype)
        y_RD = grouped_matmul(h_RF, w.down, plan.sizes_e, how.backend)
    with jax.named_scope("combine"):
        return combine(y_RD, plan, x.shape[0])


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _in_turns(x, weight_N, w, plan, rows: int, more: int, how: ExpertCompute):
    return _in_turns_forward(x, weight_N, w, plan, rows, more, how)[0]


def _in_turns_forward(x, weight_N, w, plan, rows, more, how):
    y, back = jax.vjp(lambda *args: _compute_rows(*args, part_of(plan, 0, rows), how), x, weight_N, w)
    turn = lambda part, y: y + _compute_rows(x, weight_N, w, part, how)
    return _further_turns(plan, rows, more, turn, y), (back, x, weight_N, w, plan)


def _in_turns_backward(rows, more, how, saved, dy):
    back, x, weight_N, w, plan = saved
    kept = dy.astype(x.dtype)  # as `combine` rounds it, so that it is not written in float32 for a loop without turns

    def turn(part, grads):
        _, again = jax.vjp(lambda *args: _compute_rows(*args, part, how), x, weight_N, w)
        return jax.tree.map(jnp.add, grads, again(kept.astype(dy.dtype)))

    return *_further_turns(plan, rows, more, turn, back(dy)), None


_in_turns.defvjp(_in_turns_forward, _in_turns_backward)


def _further_turns(plan: RowPlan, rows: int, more: int, turn: Callable, start):
    """turn(part of the plan, what the turns before gave), as often as it takes: not at all where `rows` were enough."""
    count = (jnp.sum(plan.sizes_e) - rows + more - 1) // more
    return jax.lax.fori_loop(0, count, lambda i, sums: turn(part_of(plan, rows + i * more, more), sums), start)


def capacity_rows(cfg: MoEConfig, tokens: int) -> int:
    """C: the rows of one expert for `tokens` tokens after the exchange."""
    return max(1, -int(-cfg.capacity_factor * cfg.top_k * tokens // cfg.num_experts))


def capacity(x, routing, w, how):
    """GShard-style: an expert takes its first C rows in token order, later ones are dropped (their y is 0).

    C counts tokens of one `expert` row of the mesh, so unlike the other paths the result depends on the mesh.
    """
    rows, experts = capacity_rows(how.cfg, x.shape[0]), w.up.shape[0]
    plan = plan_rows(routing, experts)
    first_e = jnp.cumsum(plan.sizes_e) - plan.sizes_e
    position = plan.row_N.reshape(routing.experts.shape) - first_e[routing.experts]
    kept = routing.valid & (position < rows)
    # Buffer [e, C]: the sorted row of each place; places past an expert's rows read a row that is masked out.
    place_eC = first_e[:, None] + jnp.arange(rows)[None, :]
    filled_eC = jnp.arange(rows)[None, :] < plan.sizes_e[:, None]
    x_RD = dispatch(x, plan)
    x_eCD = jnp.where(filled_eC[:, :, None], x_RD[jnp.minimum(place_eC, x_RD.shape[0] - 1)], 0)
    h = _hidden(how.activation, lambda ms: (jnp.einsum("ecd,edf->ecf", x_eCD, m) for m in ms), w)
    y_eCD = jnp.einsum("ecf,efd->ecd", h, w.down)
    y_TKD = y_eCD[routing.experts, jnp.minimum(position, rows - 1)].astype(jnp.float32)
    return jnp.einsum("tkd,tk->td", y_TKD, jnp.where(kept, routing.weights, 0.0)), kept


COMPUTE: dict[str, Compute] = {"dense": dense, "grouped": grouped, "capacity": capacity}
