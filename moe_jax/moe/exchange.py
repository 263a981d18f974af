"""The exchange of tokens along the mesh's `expert` axis: to the devices that hold their experts, and back.

| exchange     | out                                                     | back                                        |
|--------------|---------------------------------------------------------|---------------------------------------------|
| `ring`       | every token to every device: all-gather                 | float32 sums: reduce-scatter; gradients in  |
|              |                                                         | the compute dtype                           |
| `all_to_all` | a token once to each device that has an expert of its   | that device's sum over its own experts, in  |
|              | choice, however many it has: ragged all-to-all          | the compute dtype: ragged all-to-all        |

Tokens are sent to devices, not to experts: at most min(K, P) rows a token travel instead of K, and a device receives
tokens and their `Routing`, which is what `ExpertCompute` (experts.py) takes. Both exchanges are dropless, so both have
buffers for every token of the axis, T·D numbers; experts.py has not. `moe.exchange_chunks` divides these buffers.

Everything here runs inside the `shard_map` of layer.py. Letters: P devices of the `expert` axis; t tokens and e experts
of this device; T = P·t tokens of the axis in the order of its devices, m = min(K, P).
"""

import functools
import math
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from moe_jax import chips
from moe_jax.config import MoEConfig
from moe_jax.kernels.rows import permute
from moe_jax.moe.experts import ExpertCompute, ExpertWeights
from moe_jax.moe.routing import Routing
from moe_jax.parallel import sharding


class Exchange(Protocol):
    """Applies the experts of the whole axis to this device's tokens."""

    def __call__(
        self, x: Float[Array, "t D"], routing: Routing, w: ExpertWeights, compute: ExpertCompute
    ) -> tuple[Float[Array, "t D"], Bool[Array, "t K"]]:
        """Returns y in the dtype of x, and which slots were not dropped."""


def run_experts(
    x: Float[Array, "t D"], routing: Routing, w: ExpertWeights, exchange: str, compute: ExpertCompute
) -> tuple[Float[Array, "t D"], Bool[Array, "t K"]]:
    """Applies the experts of the whole axis to this device's tokens, in `moe.exchange_chunks` chunks.

    Chunks do not depend on each other, so that one can be sent while another is computed. Where their number does not
    divide that of the tokens (a decoding step has one a sequence), it is the greatest common divisor of the two.
    Without a mesh nothing is exchanged.
    """
    apply = EXCHANGE[exchange] if sharding.current_sizes() else no_exchange
    chunks = math.gcd(compute.cfg.exchange_chunks, x.shape[0])
    cut = lambda a: jnp.split(a, chunks)
    absent = [None] * chunks
    parts = [
        apply(x_c, Routing(*routing_c), w, compute)
        for x_c, *routing_c in zip(cut(x), *(absent if a is None else cut(a) for a in routing), strict=True)
    ]
    y, computed = zip(*parts, strict=True)
    return jnp.concatenate(y), jnp.concatenate(computed)


# --- the two exchanges -----------------------------------------------------------------------------------------------


def ring(x, routing, w, compute):
    """All-gathers the tokens, computes local experts, and reduce-scatters the sums back."""
    own = _local_routing(routing, w.up.shape[0])
    y_TD, computed = compute(_gather(x), own, w)
    return _sum_and_scatter(y_TD, x.dtype), _scatter((own.valid & ~computed).astype(jnp.int32)) == 0


def all_to_all(x, routing, w, compute):
    """Sends a token to the devices that hold its experts, computes, and sends back the sums over each device's experts.

    Ids and weights of all tokens are all-gathered, as in `ring` (8·K bytes a token, beside 2·D of its activations).
    From them a device knows how many rows it receives from each peer. Padding is not sent.
    In bfloat16 the sum of each device is rounded once, to be sent back; the sums are added in float32.
    """
    local, peers = w.up.shape[0], jax.lax.axis_size("expert")
    own = _local_routing(routing, local)
    owner_tK = routing.experts // local
    sends_Pt = jnp.any((owner_tK[None] == jnp.arange(peers)[:, None, None]) & routing.valid[None], axis=2)
    sent, received = Blocks.of(sends_Pt), Blocks.of(jnp.any(own.valid, axis=1).reshape(sends_Pt.shape))
    to, back = received.slot_T, received.row_T
    priority = None if own.priority is None else own.priority[to]
    own = Routing(own.experts[to], permute(own.weights, to, back), own.valid[to], priority)
    route = Route.of(sends_Pt, sent, min(routing.experts.shape[1], peers))
    x_TD = swap(pack(x, route), sent.size_P, received.size_P)
    y_TD, computed = compute(x_TD, own, w)
    y = unpack(swap(y_TD.astype(x.dtype), received.size_P, sent.size_P), route)
    return y, _scatter((own.valid & ~computed)[back].astype(jnp.int32)) == 0


def no_exchange(x, routing, w, compute):
    """Computes the experts of the only device."""
    y, computed = compute(x, routing, w)
    return y.astype(x.dtype), computed


EXCHANGE: dict[str, Exchange] = {"ring": ring, "all_to_all": all_to_all}


def _gather(a: Shaped[Array, "t *n"]) -> Shaped[Array, "T *n"]:
    return jax.lax.all_gather(a, "expert", axis=0, tiled=True)


def _scatter(a: Shaped[Array, "T *n"]) -> Shaped[Array, "t *n"]:
    return jax.lax.psum_scatter(a, "expert", scatter_dimension=0, tiled=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _sum_and_scatter(y: Float[Array, "T D"], dtype) -> Float[Array, "t D"]:
    """Sums over devices in float32, and scatters. The gradient is gathered in `dtype`."""
    return _scatter(y).astype(dtype)


_sum_and_scatter.defvjp(
    lambda y, dtype: (_sum_and_scatter(y, dtype), jnp.zeros((), y.dtype)),
    lambda dtype, like, dy: (_gather(dy).astype(like.dtype),),
)


def _local_routing(routing: Routing, local: int) -> Routing:
    """The routing of all T tokens to this device's experts: slots of other devices' experts are not valid."""
    gathered = jax.tree.map(_gather, routing)
    experts = gathered.experts - jax.lax.axis_index("expert") * local
    own = gathered.valid & (experts >= 0) & (experts < local)
    return gathered._replace(experts=jnp.where(own, experts, 0), valid=own)


# --- rows of all_to_all ----------------------------------------------------------------------------------------------

# Pieces in which a GPU sends its rows to all peers together. Within a host XLA copies each piece with few of the GPU's
# threads, so that one piece for each peer leaves links idle (openxla/xla#33386). Between hosts a piece is a message.
PIECES = 64


class Blocks(NamedTuple):
    """P blocks of t rows, one for each peer. The rows in use come first in a block, in token order. Slot p·t + i is
    token i to or from peer p. Both index arrays are permutations of 0 … T−1 that permute each block."""

    slot_T: Int[Array, " T"]  # row → slot
    row_T: Int[Array, " T"]  # slot → row
    size_P: Int[Array, " P"]  # rows in use

    @classmethod
    def of(cls, used_Pt: Bool[Array, "P t"]) -> "Blocks":
        first_P = jnp.arange(used_Pt.shape[0])[:, None] * used_Pt.shape[1]
        token_Pt = jnp.argsort(~used_Pt, axis=1, stable=True)
        size_P = jnp.sum(used_Pt, axis=1, dtype=jnp.int32)
        row_Pt = jnp.where(used_Pt, jnp.cumsum(used_Pt, axis=1), size_P[:, None] + jnp.cumsum(~used_Pt, axis=1)) - 1
        return cls((first_P + token_Pt).reshape(-1), (first_P + row_Pt).reshape(-1), size_P)


class Route(NamedTuple):
    """The rows of this device's tokens in the blocks that it sends."""

    token_T: Int[Array, " T"]  # row → token; past a block's rows in use, some token
    row_tm: Int[Array, "t m"]  # the rows of a token, one for each of its devices, then rows that are not in use

    @classmethod
    def of(cls, sends_Pt: Bool[Array, "P t"], blocks: Blocks, most: int) -> "Route":
        _, peer_tm = jax.lax.top_k(sends_Pt.T.astype(jnp.int32), most)
        row_tP = blocks.row_T.reshape(sends_Pt.shape).T
        return cls(blocks.slot_T % sends_Pt.shape[1], jnp.take_along_axis(row_tP, peer_tm, axis=1))


@jax.custom_vjp
def pack(x: Float[Array, "t D"], route: Route) -> Float[Array, "T D"]:
    """Gathers the token of every row. `unpack` is its transpose, so that the gradient is a gather too (deterministic).

    Rows that are not in use hold some token, which `swap` does not send.
    """
    return x[route.token_T]


@jax.custom_vjp
def unpack(y: Float[Array, "T D"], route: Route) -> Float[Array, "t D"]:
    """Sums the rows of each token in float32. Rows that are not in use must be zeros, as `swap` returns them."""
    return jnp.sum(y[route.row_tm].astype(jnp.float32), axis=1).astype(y.dtype)


pack.defvjp(lambda x, route: (pack(x, route), route), lambda route, dx: (unpack(dx, route), None))
unpack.defvjp(lambda y, route: (unpack(y, route), route), lambda route, dy: (pack(dy, route), None))


@jax.custom_vjp
def swap(x: Float[Array, "T D"], send_P: Int[Array, " P"], receive_P: Int[Array, " P"]) -> Float[Array, "T D"]:
    """Sends the first send_P[p] rows of block p to device p; block p of the result is what p sends, then zeros.

    The gradient is the opposite exchange. XLA has no ragged all-to-all on CPU, so that whole blocks are sent there.
    """
    in_pieces = functools.partial(_swap_ragged, pieces=max(1, PIECES // send_P.shape[0]))
    return jax.lax.platform_dependent(x, send_P, receive_P, cpu=_swap_padded, tpu=_swap_ragged, default=in_pieces)


swap.defvjp(lambda x, *sizes: (swap(x, *sizes), sizes), lambda sizes, dy: (swap(dy, *sizes[::-1]), None, None))


def _swap_ragged(x: Array, send_P: Array, receive_P: Array, pieces: int = 1) -> Array:
    """`swap` by a ragged all-to-all. pieces: the number sent to each peer."""
    block = x.shape[0] // send_P.shape[0]
    from_P = jnp.arange(send_P.shape[0], dtype=jnp.int32) * block
    to_P = jnp.full_like(from_P, block) * jax.lax.axis_index("expert")  # at the receivers
    first, size = _cut(send_P, pieces)
    _, arriving = _cut(receive_P, pieces)  # the sender cuts its block alike
    offsets = lambda start_P: (start_P[:, None] + first).reshape(-1)
    return jax.lax.ragged_all_to_all(
        x, jnp.zeros_like(x), offsets(from_P), size.reshape(-1), offsets(to_P), arriving.reshape(-1), axis_name="expert"
    )


def _cut(size_P: Array, pieces: int) -> tuple[Array, Array]:
    """First rows and sizes of the pieces of every block, each [P, pieces]. Sizes are equal but for the last pieces."""
    each_P = -(-size_P // pieces)
    first = jnp.minimum(jnp.arange(pieces, dtype=jnp.int32)[None] * each_P[:, None], size_P[:, None])
    return first, jnp.minimum(each_P[:, None], size_P[:, None] - first)


def _swap_padded(x: Array, send_P: Array, receive_P: Array) -> Array:
    """`swap` by an all-to-all of whole blocks."""
    x_PtD = x.reshape(send_P.shape[0], -1, x.shape[1])
    in_use = jnp.arange(x_PtD.shape[1])[None, :] < send_P[:, None]
    return jax.lax.all_to_all(jnp.where(in_use[:, :, None], x_PtD, 0), "expert", 0, 0).reshape(x.shape)


# --- the choice ------------------------------------------------------------------------------------------------------


def devices_per_token(cfg: MoEConfig, peers: int) -> float:
    """Mean number of devices that hold one of the K experts that a token is expected to use, with uniform routing.

    It is P · (1 − binom(E−e, K) / binom(E, K)).
    """
    e, k = cfg.num_experts, max(1, min(round(cfg.mean_slots), cfg.num_experts))
    return peers * (1 - math.comb(e - e // peers, k) / math.comb(e, k))


def bytes_sent(cfg: MoEConfig, platform: str, peers: int, width: int, tokens: int, itemsize: int) -> dict[str, float]:
    """Bytes of activations that a device sends in one layer, forward and backward, by exchange.

    width: of a row, D or `moe.latent`. tokens: t. `ring` sends every token to the P − 1 others in the compute dtype,
    sums in float32, and both gradients in the compute dtype. `all_to_all` sends rows and results in the compute dtype,
    and their gradients likewise.
    """
    others = peers - 1 if platform == "cpu" else devices_per_token(cfg, peers) * (peers - 1) / peers
    numbers = tokens * width
    return {"ring": numbers * (peers - 1) * (3 * itemsize + 4), "all_to_all": numbers * others * 4 * itemsize}


def choose_exchange(
    cfg: MoEConfig, platform: str, peers: int, width: int, tokens: int, itemsize: int, device_kind: str = ""
) -> tuple[str, str]:
    """Chooses the exchange. Also returns the line about it that is printed at start-up.

    A `moe.exchange` other than "auto" is taken. "auto" takes the exchange that sends fewer bytes on TPU, and `ring`
    elsewhere: on CPU, where `all_to_all` pads; on GPU, where `ring` took less time (docs/scaling.md); on TPU v5e, for
    which XLA does not compile a ragged all-to-all.
    """
    if peers == 1:
        return "ring", "none (mesh.expert=1)"  # collectives over one device do nothing
    sent = bytes_sent(cfg, platform, peers, width, tokens, itemsize)
    name, why = cfg.exchange, "set in the config"
    if name == "auto":
        name, why = min(sent, key=sent.get), "sends less"
        if platform != "tpu" or not chips.has_ragged_exchange(device_kind):
            missing = {"cpu": "no ragged all-to-all on CPU", "tpu": "no ragged all-to-all on TPU v5e"}
            name, why = "ring", missing.get(platform, "faster on two H200s")
    elif platform == "cpu" and name == "all_to_all":
        why += ", padded on CPU"
    (other,) = set(sent) - {name}
    received = peers * tokens * width * itemsize // cfg.exchange_chunks
    return name, (
        f"{name} ({why}), {_with_unit(sent[name])} a layer and device against {_with_unit(sent[other])} for {other}, "
        f"room for {_with_unit(received)} received, chunks: {cfg.exchange_chunks}"
    )


def _with_unit(n: float) -> str:
    unit, name = next((u, s) for u, s in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (0, "bytes")) if n >= u)
    return f"{n / (unit or 1):.3g} {name}"
