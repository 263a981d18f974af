"""How tokens reach the experts of other devices of the mesh's `expert` axis, and how their results come back.

| exchange     | out                                                     | back                                        |
|--------------|---------------------------------------------------------|---------------------------------------------|
| `ring`       | every token to every device: all-gather                 | float32 sums: reduce-scatter; gradients in  |
|              |                                                         | the compute dtype                           |
| `all_to_all` | a token once to each device that has an expert of its   | that device's sum over its own experts, in  |
|              | choice, however many it has: ragged all-to-all          | the compute dtype: ragged all-to-all        |

A token goes to a device and not to an expert: at most min(K, P) rows a token travel instead of K, and what arrives is
again "tokens and their `Routing`", which `ExpertCompute` (experts.py) takes as it is. Both are dropless, so both hold
room for every token of the axis on one device, T·D numbers; experts.py does not. `moe.exchange_chunks` divides it.

Everything here runs inside the `shard_map` of moe.py. Letters: P devices of the `expert` axis, t tokens of this device,
e experts of this device, T = P·t tokens of the axis in the order of its devices, m = min(K, P).
"""

import functools
import math
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from moe_jax import chips
from moe_jax.config import MoEConfig
from moe_jax.moe.experts import ExpertCompute, ExpertWeights, permute
from moe_jax.moe.routing import Routing


class Exchange(Protocol):
    def __call__(
        self, x: Float[Array, "t D"], routing: Routing, w: ExpertWeights, compute: ExpertCompute
    ) -> tuple[Float[Array, "t D"], Bool[Array, "t K"]]:
        """y in the dtype of x, and which slots were not dropped."""


def run_experts(
    x: Float[Array, "t D"], routing: Routing, w: ExpertWeights, exchange: str, compute: ExpertCompute
) -> tuple[Float[Array, "t D"], Bool[Array, "t K"]]:
    """What the experts of the whole axis make of this device's tokens, in `moe.exchange_chunks` chunks of them.

    Chunks do not depend on each other, so that one can be on its way while another is computed. Where they do not
    divide the tokens (a decoding step has one a sequence), there are as many as do.
    """
    chunks = math.gcd(compute.cfg.exchange_chunks, x.shape[0])
    cut = lambda a: jnp.split(a, chunks)
    parts = [
        EXCHANGE[exchange](x_c, Routing(*routing_c), w, compute)
        for x_c, *routing_c in zip(cut(x), *map(cut, routing), strict=True)
    ]
    y, kept = zip(*parts, strict=True)
    return jnp.concatenate(y), jnp.concatenate(kept)


# --- the two exchanges -----------------------------------------------------------------------------------------------


def ring(x, routing, w, compute):
    """All-gather the tokens, compute local experts, reduce-scatter the sums back."""
    here = _here(routing, w.up.shape[0])
    y_TD, kept = compute(_gather(x), here, w)
    return _sum_home(y_TD, x.dtype), _scatter((here.valid & ~kept).astype(jnp.int32)) == 0


def all_to_all(x, routing, w, compute):
    """Send a token to the devices that have its experts, compute, send back the sums over each device's experts.

    Ids and weights of all tokens are all-gathered, as in `ring` (8·K bytes a token, beside 2·D of its activations): a
    device then knows what will arrive from whom, and nothing else has to be agreed on. Padding goes nowhere.
    In bfloat16 each device's sum is rounded once, for its way home; the sums are added in float32.
    """
    local, peers = w.up.shape[0], jax.lax.axis_size("expert")
    here = _here(routing, local)
    owner_tK = routing.experts // local
    goes_Pt = jnp.any((owner_tK[None] == jnp.arange(peers)[:, None, None]) & routing.valid[None], axis=2)
    sent, arrived = Blocks.of(goes_Pt), Blocks.of(jnp.any(here.valid, axis=1).reshape(goes_Pt.shape))
    to, back = arrived.slot_T, arrived.row_T
    here = Routing(here.experts[to], permute(here.weights, to, back), here.valid[to])
    route = Route.of(goes_Pt, sent, min(compute.cfg.top_k, peers))
    x_TD = swap(pack(x, route), sent.size_P, arrived.size_P)
    y_TD, kept = compute(x_TD, here, w)
    y = unpack(swap(y_TD.astype(x.dtype), arrived.size_P, sent.size_P), route)
    return y, _scatter((here.valid & ~kept)[back].astype(jnp.int32)) == 0


EXCHANGE: dict[str, Exchange] = {"ring": ring, "all_to_all": all_to_all}


def _gather(a: Shaped[Array, "t *n"]) -> Shaped[Array, "T *n"]:
    return jax.lax.all_gather(a, "expert", axis=0, tiled=True)


def _scatter(a: Shaped[Array, "T *n"]) -> Shaped[Array, "t *n"]:
    return jax.lax.psum_scatter(a, "expert", scatter_dimension=0, tiled=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _sum_home(y: Float[Array, "T D"], dtype) -> Float[Array, "t D"]:
    """Summed in float32. Its gradient travels in `dtype`, in which it arrives."""
    return _scatter(y).astype(dtype)


_sum_home.defvjp(
    lambda y, dtype: (_sum_home(y, dtype), jnp.zeros((), y.dtype)),
    lambda dtype, like, dy: (_gather(dy).astype(like.dtype),),
)


def _here(routing: Routing, local: int) -> Routing:
    """The routing of all T tokens as this device sees it: slots of other devices' experts are not valid."""
    everywhere = Routing(*map(_gather, routing))
    experts = everywhere.experts - jax.lax.axis_index("expert") * local
    mine = everywhere.valid & (experts >= 0) & (experts < local)
    return Routing(jnp.where(mine, experts, 0), everywhere.weights, mine)


# --- rows of all_to_all ----------------------------------------------------------------------------------------------

# Of what a GPU sends in one ragged exchange, to all its peers together. Within a host XLA copies each with a few of the
# GPU's threads, so that one for every peer leaves the links idle (openxla/xla#33386). Between hosts each is a message.
PIECES = 64


class Blocks(NamedTuple):
    """P blocks of t rows, one for each peer: the rows in use come first, in token order. Slot p·t + i is token i of
    peer p, or for it. Both index arrays are permutations of 0 … T−1 that keep to their block."""

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
    """Where this device's tokens stand in its blocks."""

    token_T: Int[Array, " T"]  # row → token; past a block's rows in use, tokens that do not go there
    row_tm: Int[Array, "t m"]  # the rows of a token, one for each device it goes to, then rows that are not in use

    @classmethod
    def of(cls, goes_Pt: Bool[Array, "P t"], blocks: Blocks, most: int) -> "Route":
        _, peer_tm = jax.lax.top_k(goes_Pt.T.astype(jnp.int32), most)
        row_tP = blocks.row_T.reshape(goes_Pt.shape).T
        return cls(blocks.slot_T % goes_Pt.shape[1], jnp.take_along_axis(row_tP, peer_tm, axis=1))


@jax.custom_vjp
def pack(x: Float[Array, "t D"], route: Route) -> Float[Array, "T D"]:
    """The token of every row. Its gradient gathers instead of scattering (deterministic); `unpack` is its transpose.

    Rows that are not in use hold some token, too, and nobody reads them: `swap` leaves them behind.
    """
    return x[route.token_T]


@jax.custom_vjp
def unpack(y: Float[Array, "T D"], route: Route) -> Float[Array, "t D"]:
    """Σ over the devices that a token went to, in float32. Rows that are not in use must be zeros, as after `swap`."""
    return jnp.sum(y[route.row_tm].astype(jnp.float32), axis=1).astype(y.dtype)


pack.defvjp(lambda x, route: (pack(x, route), route), lambda route, dx: (unpack(dx, route), None))
unpack.defvjp(lambda y, route: (unpack(y, route), route), lambda route, dy: (pack(dy, route), None))


@jax.custom_vjp
def swap(x: Float[Array, "T D"], send_P: Int[Array, " P"], receive_P: Int[Array, " P"]) -> Float[Array, "T D"]:
    """Block p goes to device p, whose block of this device it becomes: its first send_P[p] rows, the others are zeros.

    Its gradient is the opposite exchange. XLA has no ragged all-to-all for CPU: there whole blocks are sent.
    """
    in_pieces = functools.partial(_swap_ragged, pieces=max(1, PIECES // send_P.shape[0]))
    return jax.lax.platform_dependent(x, send_P, receive_P, cpu=_swap_padded, tpu=_swap_ragged, default=in_pieces)


swap.defvjp(lambda x, *sizes: (swap(x, *sizes), sizes), lambda sizes, dy: (swap(dy, *sizes[::-1]), None, None))


def _swap_ragged(x: Array, send_P: Array, receive_P: Array, pieces: int = 1) -> Array:
    """pieces: to each peer."""
    block = x.shape[0] // send_P.shape[0]
    from_P = jnp.arange(send_P.shape[0], dtype=jnp.int32) * block
    to_P = jnp.full_like(from_P, block) * jax.lax.axis_index("expert")  # at the receivers
    first, size = _cut(send_P, pieces)
    _, arriving = _cut(receive_P, pieces)  # the sender cuts its block alike
    place = lambda start_P: (start_P[:, None] + first).reshape(-1)
    return jax.lax.ragged_all_to_all(
        x, jnp.zeros_like(x), place(from_P), size.reshape(-1), place(to_P), arriving.reshape(-1), axis_name="expert"
    )


def _cut(size_P: Array, pieces: int) -> tuple[Array, Array]:
    """[P, pieces] each: where the pieces of every block begin, and their sizes, equal but for the last ones."""
    each_P = -(-size_P // pieces)
    first = jnp.minimum(jnp.arange(pieces, dtype=jnp.int32)[None] * each_P[:, None], size_P[:, None])
    return first, jnp.minimum(each_P[:, None], size_P[:, None] - first)


def _swap_padded(x: Array, send_P: Array, receive_P: Array) -> Array:
    x_PtD = x.reshape(send_P.shape[0], -1, x.shape[1])
    in_use = jnp.arange(x_PtD.shape[1])[None, :] < send_P[:, None]
    return jax.lax.all_to_all(jnp.where(in_use[:, :, None], x_PtD, 0), "expert", 0, 0).reshape(x.shape)


# --- which one -------------------------------------------------------------------------------------------------------


def devices_per_token(cfg: MoEConfig, peers: int) -> float:
    """Devices that have an expert of a token's K, on average over uniform routing: P · (1 − C(E−e, K) / C(E, K))."""
    e, k = cfg.num_experts, cfg.top_k
    return peers * (1 - math.comb(e - e // peers, k) / math.comb(e, k))


def bytes_sent(cfg: MoEConfig, platform: str, peers: int, d_model: int, tokens: int, itemsize: int) -> dict[str, float]:
    """Bytes of activations that a device sends to others in one layer, forward and backward, by each exchange.

    tokens: t. `ring` sends every token to the P − 1 others in the compute dtype and sums of all in float32, and both
    gradients in the compute dtype; `all_to_all` rows in the compute dtype, out and home, and the same going back.
    """
    others = peers - 1 if platform == "cpu" else devices_per_token(cfg, peers) * (peers - 1) / peers
    numbers = tokens * d_model
    return {"ring": numbers * (peers - 1) * (3 * itemsize + 4), "all_to_all": numbers * others * 4 * itemsize}


def choose_exchange(
    cfg: MoEConfig, platform: str, peers: int, d_model: int, tokens: int, itemsize: int, device_kind: str = ""
) -> tuple[str, str]:
    """The exchange, and the line that tells it, printed once at start-up. `moe.exchange` other than "auto" is taken.

    "auto" is the one that sends fewer bytes on TPU, and `ring` on CPU, which would pad, on GPU, where it took less time
    (docs/scaling.md), and on TPU v5e, for which XLA refuses to compile a ragged all-to-all.
    """
    if peers == 1:
        return "ring", "none (mesh.expert=1)"  # its collectives over one device are nothing
    sent = bytes_sent(cfg, platform, peers, d_model, tokens, itemsize)
    name, why = cfg.exchange, "set in the config"
    if name == "auto":
        name, why = min(sent, key=sent.get), "sends less"
        if platform != "tpu" or not chips.has_ragged_exchange(device_kind):
            missing = {"cpu": "no ragged all-to-all on CPU", "tpu": "no ragged all-to-all on TPU v5e"}
            name, why = "ring", missing.get(platform, "faster on two H200s")
    elif platform == "cpu" and name == "all_to_all":
        why += ", padded on CPU"
    (other,) = set(sent) - {name}
    room = peers * tokens * d_model * itemsize // cfg.exchange_chunks
    return name, (
        f"{name} ({why}), {_size(sent[name])} a layer and device against {_size(sent[other])} for {other}, "
        f"room for {_size(room)} received, chunks: {cfg.exchange_chunks}"
    )


def _size(n: float) -> str:
    unit, name = next((u, s) for u, s in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (0, "bytes")) if n >= u)
    return f"{n / (unit or 1):.3g} {name}"
