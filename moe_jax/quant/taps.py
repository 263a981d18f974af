"""Statistics of what the matrices of one block read, as sums over tokens: Gram matrices, largest values, counts.

They exist for one block at a time, outside the model's scan over layers, so training pays nothing for them. A dense
matrix is watched by what stands in the place of its LoRA adapter, which adds nothing. The rows of experts are made
again from the tokens' choices; the Gram matrices of all experts are the weight gradient of a grouped product whose
cotangent is its own input.

Letters: D inputs of a matrix, E experts, F hidden width of an expert, T tokens, K slots, R rows sorted by expert.
"""

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from moe_jax.kernels import grouped_matmul, grouped_matmuls
from moe_jax.model import Inputs
from moe_jax.model.blocks import Block, BlockOutput
from moe_jax.moe.experts import dispatch, permute, plan_rows
from moe_jax.moe.routing import Routing
from moe_jax.moe.stats import Choices
from moe_jax.nn.fake_quant import int8
from moe_jax.nn.layers import ACTIVATIONS, linear
from moe_jax.nn.lora import NEVER, SUFFIX
from moe_jax.parallel import sharding
from moe_jax.parallel.axes import varying_like

EXPERT_MATRICES = ("w_gate", "w_up", "w_down")  # of routed experts, `moe/…` in a block

# (routing of the tokens of one device, whole sequences one after another; counted [T]; tokens of a sequence; tokens of
# each expert [E] in an earlier pass) → the routing whose rows the statistics of experts have
Slots = Callable[[Routing, Bool[Array, " T"], int, Float[Array, " E"] | None], Routing]


class Tap(NamedTuple):
    """What a matrix, or each of a stack of experts, read."""

    gram: Float[Array, "*E D D"]  # Σ x·xᵀ; weighted where the walk weights rows
    largest: Float[Array, "*E D"]  # the largest |x| of each input; never weighted


class BlockTaps(NamedTuple):
    """Sums over the counted tokens of one block, but for the largest values, in float32."""

    tokens: Float[Array, ""]
    cosine: Float[Array, ""]  # Σ cos(x, y), where the feed-forward layer makes y of the residual stream x
    fed: Float[Array, " D"]  # the largest |h| of each input of the feed-forward layer, after its norm
    dense: dict[str, Tap]  # by the matrix's path in the block, such as "attention/w_q" or "moe/shared/w_up"
    expert_in: Tap | None  # of w_gate and w_up; None in a block without experts
    expert_hidden: Tap | None  # of w_down
    counts: Float[Array, " E"] | None  # rows of each expert
    weights: Float[Array, " E"] | None  # Σ of their combine weights
    change: Float[Array, "E B"] | None = None  # Σ‖w·(E'(x) − E(x))‖² for other matrices E' (`walk`'s `others`)


def joined(a: BlockTaps, b: BlockTaps) -> BlockTaps:
    """The statistics of two sets of tokens together."""
    is_largest = lambda path: getattr(path[-1], "name", "") in ("largest", "fed")
    return jax.tree_util.tree_map_with_path(lambda p, x, y: jnp.maximum(x, y) if is_largest(p) else x + y, a, b)


class _Reads:
    """Stands in the place of a matrix's adapter: keeps what the matrix reads, and adds nothing."""

    def __init__(self, seen: dict[str, Array], path: str):
        self.seen, self.path = seen, path

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, ""]:
        self.seen[self.path] = x
        return jnp.zeros((), x.dtype)


class _Watched:
    """Stands in the place of a block's MoE layer: runs it, and keeps what it read and chose."""

    def __init__(self, moe: Any, seen: dict[str, Any]):
        self.moe, self.seen = moe, seen

    def __call__(self, h: Float[Array, "B S D"], *given):
        out = self.moe(h, *given)
        self.seen |= {"h": h, "choices": out.choices}
        return out


def _watch(module: nnx.Module, seen: dict[str, Array], path: str = "") -> None:
    """Puts `_Reads` beside every dense matrix that a module multiplies rows by; memories and routers have none."""
    for name, value in list(vars(module).items()):
        where = f"{path}/{name}" if path else name
        if isinstance(value, nnx.Module) and name != "memory":
            _watch(value, seen, where)
        elif isinstance(value, nnx.Param) and is_dense(where):
            setattr(module, name + SUFFIX, _Reads(seen, where))


def is_dense(path: str) -> bool:
    """Whether a parameter at a path in a block is a matrix that every token reads, and that may be rounded."""
    *folders, name = path.split("/")
    never = is_routed(path) or "memory" in folders or re.search(NEVER, f"/{path}")
    return name.startswith("w_") and not never


def is_routed(path: str) -> bool:
    """Whether a parameter at a path in a block is a stack of matrices of routed experts."""
    return path in tuple(f"moe/{name}" for name in EXPERT_MATRICES)


def run_block(
    block: Block,
    x: Float[Array, "B S D"],
    state: Float[Array, "B S R"] | None,
    inputs: Inputs,
    *,
    gated: bool = False,
    slots: Slots | None = None,
    counts: Float[Array, " E"] | None = None,
    others: tuple[Float[Array, "E I O"], ...] | None = None,
) -> tuple[BlockOutput, BlockTaps]:
    """Runs a block whose program records choices, and returns its statistics too. Call it while tracing.

    gated: weights the rows of an expert by the combine weight, and those of shared experts by their gate (MoEQuant's
        affinity). slots: changes whose rows count (`Slots`). counts: for it, the tokens of each expert in another pass.
    others: matrices of experts, in the order of `EXPERT_MATRICES`, for `BlockTaps.change`, here of one column.
    """
    seen: dict[str, Any] = {}
    _watch(block, seen)
    moe, add = block.moe, block._add
    if moe is not None:
        block.moe = _Watched(moe, seen)

    def added(x, *given):
        y = add(x, *given)
        seen["residual"] = (x, y)  # of attention, and then of the feed-forward layer
        return y

    block._add = added
    out = block(x, state, None, inputs, None, None)
    counted = inputs.info.counted
    before, after = seen.pop("residual")
    if out.late is not None:  # not the dense layer beside the experts, whose result waits
        after = before + out.late
    h, choices = seen.pop("h", None), seen.pop("choices", None)
    routed, shared = (None, None) if moe is None else _branch_weights(moe, h)
    shared = shared if gated else None
    weights = lambda path: shared if path.startswith("moe/shared/") else None
    dense = {path: _tap(read, counted, weights(path)) for path, read in seen.items()}
    fed = _largest(h if h is not None else seen["mlp/w_up"], counted)
    sums = (jnp.sum(counted, dtype=jnp.float32), _cosine(before, after, counted), fed)
    if moe is None:
        return out, BlockTaps(*sums, dense, None, None, None, None)
    z = h if moe.w_in is None else linear(h, moe, "w_in")
    if routed is not None:
        choices = choices._replace(weights=choices.weights * routed[:, :, None])
    change = None if others is None else _change(moe, z, choices, counted, others)
    return out, BlockTaps(*sums, dense, *_expert_taps(moe, z, choices, counted, gated, slots, counts), change)


# --- dense matrices --------------------------------------------------------------------------------------------------


def _tap(x: Float[Array, "B S D"], counted: Bool[Array, "B S"], weight: Float[Array, "B S"] | None) -> Tap:
    rows = jnp.where(counted[:, :, None], x.astype(jnp.float32), 0.0)
    weighted = rows if weight is None else rows * jnp.sqrt(weight)[:, :, None]
    replicated = {"out_sharding": P(None, None)} if sharding.current_sizes() else {}
    gram = jnp.einsum("bsd,bse->de", weighted, weighted, precision=jax.lax.Precision.HIGHEST, **replicated)
    return Tap(gram, _largest(x, counted))


def _largest(x: Float[Array, "B S D"], counted: Bool[Array, "B S"]) -> Float[Array, " D"]:
    return jnp.max(jnp.where(counted[:, :, None], jnp.abs(x.astype(jnp.float32)), 0.0), axis=(0, 1))


def _cosine(x: Float[Array, "B S D"], y: Float[Array, "B S D"], counted: Bool[Array, "B S"]) -> Float[Array, ""]:
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    length = lambda a: jnp.sqrt(jnp.sum(jnp.square(a), axis=-1))
    cosine = jnp.sum(x * y, axis=-1) / jnp.maximum(length(x) * length(y), 1e-30)
    return jnp.sum(jnp.where(counted, cosine, 0.0))


def _branch_weights(
    moe: Any, h: Float[Array, "B S D"]
) -> tuple[Float[Array, "B S"] | None, Float[Array, "B S"] | None]:
    """The weights that the gate of shared experts gives to routed and to shared experts; None where it gives none."""
    if moe.w_shared_gate is None:
        return None, None
    logits = linear(h, moe, "w_shared_gate").astype(jnp.float32)
    if moe.cfg.shared_gate == "sigmoid":
        return None, jax.nn.sigmoid(logits)[:, :, 0]
    share = jax.nn.softmax(logits)
    return share[:, :, 0], share[:, :, 1]


# --- experts ---------------------------------------------------------------------------------------------------------


def _expert_taps(
    moe: Any, z: Float[Array, "B S D"], choices: Choices, counted, gated: bool, slots: Slots | None, counts
) -> tuple[Tap, Tap, Float[Array, " E"], Float[Array, " E"]]:
    """What experts read and make, their rows and combine weights. z: the input of experts. moe: the layer."""
    own = functools.partial(_own_taps, moe.compute, moe.cfg.num_experts, gated, slots)
    tokens, ws = (z, choices.experts, choices.weights, counted), _matrices(moe, z)[:-1]
    if not sharding.current_sizes():
        return own(*tokens, ws, counts)

    def region(*given):
        in_tap, hidden, *sums = own(*given)
        total = lambda tap: Tap(jax.lax.psum(tap.gram, sharding.AXES), jax.lax.pmax(tap.largest, sharding.AXES))
        return total(in_tap), total(hidden), *(jax.lax.psum(s, sharding.AXES) for s in sums)

    split = (sharding.BATCH,) * 4
    return jax.shard_map(region, in_specs=(*split, P(), P()), out_specs=P(), check_vma=True)(*tokens, ws, counts)


def _change(moe: Any, z: Float[Array, "B S D"], choices: Choices, counted, others: tuple) -> Float[Array, "E 1"]:
    """Σ‖w·(E'(x) − E(x))‖² over the tokens of each expert E, and E' with other matrices."""
    own = functools.partial(_own_change, moe.compute, moe.cfg.num_experts)
    tokens, ws = (z, choices.experts, choices.weights, counted), _matrices(moe, z)
    others = tuple(sharding.replicate(w.astype(z.dtype)) for w in others)
    if not sharding.current_sizes():
        return own(*tokens, ws, others)
    total = lambda *given: jax.lax.psum(own(*given), sharding.AXES)
    split = (sharding.BATCH,) * 4
    return jax.shard_map(total, in_specs=(*split, P(), P()), out_specs=P(), check_vma=True)(*tokens, ws, others)


def _matrices(moe: Any, z: Float[Array, "B S D"]) -> tuple[Float[Array, "E I O"], ...]:
    """The matrices of all experts on every device, in the order of `EXPERT_MATRICES`."""
    found = (moe.w_gate, moe.w_up, moe.w_down)
    return tuple(sharding.replicate(w[...].astype(z.dtype)) for w in found if w is not None)


class _Rows(NamedTuple):
    """The rows of all experts on one device, sorted by expert, r tokens and slots in use first."""

    x: Float[Array, "R D"]
    weight: Float[Array, " R"]  # combine weights
    ids: Int[Array, " R"]  # experts
    sizes: Int[Array, " E"]
    live: Bool[Array, " R"]


def _rows(compute, experts: int, slots: Slots | None, z_bSD, chosen, weights, counted, counts) -> _Rows:
    """The rows of the tokens of one device, b = B / devices sequences."""
    b, s, _ = chosen.shape
    x, chosen, weights = (a.reshape(b * s, a.shape[-1]) for a in (z_bSD, chosen, weights))
    valid = (chosen >= 0) & (chosen < experts)  # the others are identity experts, or no choices
    routing = Routing(jnp.where(valid, chosen, 0), weights, valid)
    if slots is not None:
        routing = slots(routing, counted.reshape(b * s), s, counts)
    x = int8(x) if compute.cfg.expert_inputs == "int8" else x
    plan = plan_rows(routing, experts)
    live = jnp.arange(plan.slot_R.shape[0]) < jnp.sum(plan.sizes_e)
    x_R = jnp.where(live[:, None], dispatch(x, plan), 0.0)
    weight_R = jnp.where(live, permute(routing.weights.reshape(-1), plan.slot_R, plan.row_A), 0.0)
    return _Rows(x_R, weight_R, routing.experts.reshape(-1)[plan.slot_R], plan.sizes_e, live)


def _hidden(compute, rows: _Rows, ws: tuple) -> Float[Array, "R F"]:
    """What w_down reads. ws: w_gate, where there is one, and w_up."""
    *gates, up = grouped_matmuls(rows.x, tuple(varying_like(w, rows.x) for w in ws), rows.sizes, compute.backend)
    h_R = ACTIVATIONS[compute.activation].hidden(gates[0] if gates else None, up)
    return int8(h_R) if compute.cfg.expert_inputs == "int8" else h_R


def _own_taps(compute, experts: int, gated: bool, slots: Slots | None, z, chosen, weights, counted, ws, counts):
    """The sums over the tokens of one device of each of all experts."""
    found = _rows(compute, experts, slots, z, chosen, weights, counted, counts)

    def tap(rows):
        rows = rows.astype(jnp.float32)
        weighted = rows * jnp.sqrt(jnp.maximum(found.weight, 0.0))[:, None] if gated else rows
        width = rows.shape[1]
        zeros = varying_like(jnp.zeros((experts, width, width), jnp.float32), rows)
        _, gradient = jax.vjp(lambda w: grouped_matmul(weighted, w, found.sizes, compute.backend), zeros)
        largest = jax.ops.segment_max(jnp.abs(rows), found.ids, experts)
        return Tap(gradient(weighted)[0], jnp.maximum(largest, 0.0))  # an expert without rows has −∞

    sums = jax.ops.segment_sum(found.weight, found.ids, experts)
    return tap(found.x), tap(_hidden(compute, found, ws)), found.sizes.astype(jnp.float32), sums


def _own_change(compute, experts: int, z, chosen, weights, counted, ws, others) -> Float[Array, "E 1"]:
    """`_change` over the tokens of one device."""
    rows = _rows(compute, experts, None, z, chosen, weights, counted, None)

    def made(ws):
        down = varying_like(ws[-1], rows.x)
        return grouped_matmul(_hidden(compute, rows, ws[:-1]), down, rows.sizes, compute.backend)

    change = jnp.where(rows.live[:, None], (made(others) - made(ws)).astype(jnp.float32), 0.0) * rows.weight[:, None]
    return jax.ops.segment_sum(jnp.sum(jnp.square(change), axis=-1), rows.ids, experts)[:, None]
