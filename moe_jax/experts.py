"""(x, Routing, expert weights) → y: what a device does with the tokens it holds and its own experts.

`dense`: every expert on every token, the oracle. `grouped`: dropless, rows sorted by expert, grouped matmul.
`capacity`: a fixed number of rows an expert; the rest is dropped and counted. How tokens get here is exchange.py's
business.

Everything here runs inside the `shard_map` of moe.py. Letters: e experts of this device, T tokens and R = T·K rows
after the exchange.
"""

import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_jax.config import MoEConfig
from moe_jax.kernels import grouped_matmul, grouped_matmuls
from moe_jax.layers import ACTIVATIONS
from moe_jax.remat import keep
from moe_jax.routing import Routing


class ExpertWeights(NamedTuple):
    gate: Float[Array, "e D F"] | None  # None if the activation has none
    up: Float[Array, "e D F"]
    down: Float[Array, "e F D"]


class Compute(Protocol):
    def __call__(
        self, x: Array, routing: Routing, w: ExpertWeights, cfg: MoEConfig, backend: str, activation: str = "swiglu"
    ) -> tuple[Float[Array, "T D"], Bool[Array, "T K"]]:
        """y in float32 (sums over this device's experts) and which valid slots were computed (False: dropped)."""


# --- compute ---------------------------------------------------------------------------------------------------------


def _hidden(activation: str, matmuls: Callable[[tuple[Array, ...]], Iterable[Array]], w: ExpertWeights) -> Array:
    """What the down projection sees; matmuls: the products of the tokens with matrices of every expert."""
    *gates, up = matmuls((w.up,) if w.gate is None else (w.gate, w.up))
    gate = keep(gates[0], "gate") if gates else None
    return ACTIVATIONS[activation].hidden(gate, keep(up, "up"))


def dense(x, routing, w, cfg, backend, activation="swiglu"):
    """The oracle: y = Σ_e weight[t, e] · GLU_e(x), every expert on every token. Cost follows E, not K."""
    one_hot = jax.nn.one_hot(routing.experts, w.up.shape[0], dtype=jnp.float32)
    combine_Te = jnp.einsum("tke,tk->te", one_hot, jnp.where(routing.valid, routing.weights, 0.0))
    h = _hidden(activation, lambda ms: (jnp.einsum("td,edf->etf", x, m) for m in ms), w)
    y_eTD = jnp.einsum("etf,efd->etd", h, w.down)
    return jnp.einsum("etd,te->td", y_eTD.astype(jnp.float32), combine_Te), routing.valid


class RowPlan(NamedTuple):
    """Slots (t, k) sorted by expert, slots that do nothing last. Both index arrays are permutations of 0 … R−1."""

    slot_R: Int[Array, " R"]  # sorted row → slot t·K + k
    row_R: Int[Array, " R"]  # slot → sorted row
    sizes_e: Int[Array, " e"]


def plan_rows(routing: Routing, num_experts: int) -> RowPlan:
    key = jnp.where(routing.valid, routing.experts, num_experts).reshape(-1)
    slot_R = jnp.argsort(key, stable=True)
    row_R = jnp.zeros_like(slot_R).at[slot_R].set(jnp.arange(slot_R.shape[0]), unique_indices=True)
    sizes_e = jnp.sum(key[:, None] == jnp.arange(num_experts)[None, :], axis=0, dtype=jnp.int32)
    return RowPlan(slot_R, row_R, sizes_e)


@jax.custom_vjp
def permute(x: Float[Array, "R D"], to: Int[Array, " R"], back: Int[Array, " R"]) -> Float[Array, "R D"]:
    """x[to] for a permutation `to` with inverse `back`. Its gradient gathers instead of scattering (deterministic)."""
    return x[to]


permute.defvjp(lambda x, to, back: (x[to], back), lambda back, dy: (dy[back], None, None))


@jax.custom_vjp
def dispatch(x: Float[Array, "T D"], plan: RowPlan) -> Float[Array, "R D"]:
    """The token of every sorted row, without materialising K copies first."""
    token_R = plan.slot_R // (plan.slot_R.shape[0] // x.shape[0])
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
    row_TK = plan.row_R.reshape(tokens, -1)
    return sum(y[row_TK[:, k]].astype(jnp.float32) for k in range(row_TK.shape[1]))


# Each is the other's transpose, so both gradients gather too.
dispatch.defvjp(
    lambda x, plan: (dispatch(x, plan), (plan, x.shape[0])),
    lambda saved, dx: (combine(dx, *saved).astype(dx.dtype), None),
)
combine.defvjp(
    lambda y, plan, tokens: (combine(y, plan, tokens), (plan, jnp.zeros((), y.dtype))),
    lambda tokens, saved, dy: (dispatch(dy.astype(saved[1].dtype), saved[0]), None),
)


def grouped(x, routing, w, cfg, backend, activation="swiglu"):
    """Dropless: rows sorted by expert, a grouped matmul for each matrix. Cost follows the rows in use.

    A row's combine weight is put on the input of its down projection: then the sum over a token's rows is a plain one,
    and no gradient needs the down projection's result.
    """
    with jax.named_scope("sort"):
        plan = keep(plan_rows(routing, w.up.shape[0]), "rows")
    with jax.named_scope("dispatch"):
        x_RD = dispatch(x, plan)
        weight_R = permute(jnp.where(routing.valid, routing.weights, 0.0).reshape(-1), plan.slot_R, plan.row_R)
    with jax.named_scope("experts"):
        h_RF = _hidden(activation, lambda ms: grouped_matmuls(x_RD, ms, plan.sizes_e, backend), w)
        h_RF = (h_RF.astype(jnp.float32) * weight_R[:, None]).astype(x.dtype)
        y_RD = grouped_matmul(h_RF, w.down, plan.sizes_e, backend)
    with jax.named_scope("combine"):
        return combine(y_RD, plan, x.shape[0]), routing.valid


def capacity_rows(cfg: MoEConfig, tokens: int) -> int:
    """C: the rows of one expert for `tokens` tokens after the exchange."""
    return max(1, -int(-cfg.capacity_factor * cfg.top_k * tokens // cfg.num_experts))


def capacity(x, routing, w, cfg, backend, activation="swiglu"):
    """GShard-style: an expert takes its first C rows in token order, later ones are dropped (their y is 0).

    C counts tokens of one `expert` row of the mesh, so unlike the other paths the result depends on the mesh.
    """
    rows, experts = capacity_rows(cfg, x.shape[0]), w.up.shape[0]
    plan = plan_rows(routing, experts)
    first_e = jnp.cumsum(plan.sizes_e) - plan.sizes_e
    position = plan.row_R.reshape(routing.experts.shape) - first_e[routing.experts]
    kept = routing.valid & (position < rows)
    # Buffer [e, C]: the sorted row of each place; places past an expert's rows read a row that is masked out.
    place_eC = first_e[:, None] + jnp.arange(rows)[None, :]
    filled_eC = jnp.arange(rows)[None, :] < plan.sizes_e[:, None]
    x_RD = dispatch(x, plan)
    x_eCD = jnp.where(filled_eC[:, :, None], x_RD[jnp.minimum(place_eC, x_RD.shape[0] - 1)], 0)
    h = _hidden(activation, lambda ms: (jnp.einsum("ecd,edf->ecf", x_eCD, m) for m in ms), w)
    y_eCD = jnp.einsum("ecf,efd->ecd", h, w.down)
    y_TKD = y_eCD[routing.experts, jnp.minimum(position, rows - 1)].astype(jnp.float32)
    return jnp.einsum("tkd,tk->td", y_TKD, jnp.where(kept, routing.weights, 0.0)), kept


COMPUTE: dict[str, Compute] = {"dense": dense, "grouped": grouped, "capacity": capacity}
