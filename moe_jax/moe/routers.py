"""Router logits from each token's own activations, and the table that names experts by token id.

A kind of router is an entry of `ROUTERS`: the weights that it has besides `w_router`, the last matrix, and the function
that computes logits. All compute in float32. They run inside the `shard_map` of layer.py, on the tokens of one device.

Letters: T tokens, D model width, R `router_width`, C router columns, V vocabulary, K experts per token.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from moe_jax.config import MoEConfig
from moe_jax.nn.layers import Init, rms_norm
from moe_jax.parallel.axes import varying_like

Weights = dict[str, Array]  # by name, `w_router` among them
State = Float[Array, "T R"] | None  # what a router hands to that of the next layer


class Router(NamedTuple):
    """A kind of router: a value of `moe.router`."""

    width: Callable[[MoEConfig, int], int]  # (config, D) → rows of `w_router`
    weights: Callable[[MoEConfig, int, Init], dict[str, nnx.Param]]  # the others
    logits: Callable[[Weights, Float[Array, "T D"], State], tuple[Float[Array, "T C"], State]]
    has_state: bool = False  # whether a layer's logits depend on the layer before


class RouterWeights(nnx.Module):
    """The weights of a router besides `w_router`."""

    def __init__(self, weights: dict[str, nnx.Param]):
        for name, w in weights.items():
            setattr(self, name, w)


# --- linear ----------------------------------------------------------------------------------------------------------


def linear(w: Weights, x: Float[Array, "T D"], state: State) -> tuple[Float[Array, "T C"], State]:
    """x · w_router."""
    return float32_product(x, w["w_router"]), state


def float32_product(x: Float[Array, "T D"], w: Float[Array, "D E"]) -> Float[Array, "T E"]:
    """Computes x·w as exactly as in float32, at bfloat16's speed if x is bfloat16.

    With weights rounded to bfloat16 a router would pick other experts.

    A float32 number is the sum of three bfloat16 numbers (24 bits of 3 · 8), whose products with bfloat16 are exact in
    float32, so x·w is one product with three times the columns. The gradient of w is computed likewise. That of x,
    which is rounded to bfloat16, is the sum of the three products that reach 2⁻¹⁶ of it. Products of float32 arrays
    take HIGHEST, because accelerators would otherwise round to bf16 or tf32.
    """
    return _product3(x, varying_like(w, x))  # marked here, so that its gradient is summed over the mesh once


@jax.custom_vjp
def _product3(x, w):
    return _product3_forward(x, w)[0]


def _product3_forward(x, w):
    if x.dtype != jnp.bfloat16:
        return _product("td,de->te", x, w), (x, w)
    return jnp.sum(_product("td,pde->tpe", x, jnp.stack(_thirds(w))), axis=1), (x, w)


def _product3_backward(saved, dy):
    x, w = saved
    if x.dtype != jnp.bfloat16:
        return _product("te,de->td", dy, w), _product("td,te->de", x, dy)
    dy, w = _thirds(dy), _thirds(w)
    dw = jnp.sum(_product("td,pte->pde", x, jnp.stack(dy)), axis=0)
    pairs = [(0, 0), (0, 1), (1, 0)]
    dx = _product("pte,pde->td", *(jnp.stack([parts[pair[i]] for pair in pairs]) for i, parts in enumerate((dy, w))))
    return dx.astype(x.dtype), dw


_product3.defvjp(_product3_forward, _product3_backward)


def _thirds(a: Float[Array, "..."]) -> tuple[Array, Array, Array]:
    """Three bfloat16 arrays whose sum is a."""
    parts = []
    for _ in range(3):
        # XLA may remove a conversion to bfloat16 and back, which astype alone would be.
        parts.append(jax.lax.reduce_precision(a, exponent_bits=8, mantissa_bits=7).astype(jnp.bfloat16))
        a = a - parts[-1].astype(a.dtype)
    return tuple(parts)


def _product(letters: str, a: Array, b: Array) -> Array:
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(letters, a, b, precision=precision, preferred_element_type=jnp.float32)


# --- cosine ----------------------------------------------------------------------------------------------------------

LARGEST_SCALE = 100.0  # of cosines; the smallest temperature is 1/100


def _cosine_weights(cfg: MoEConfig, d_model: int, init: Init) -> dict[str, nnx.Param]:
    log_scale = init.filled((1,), "norm", math.log(2.0))
    return {"w_in": init.normal((d_model, cfg.router_width), "router_embed router_width"), "log_scale": log_scale}


def cosine(w: Weights, x: Float[Array, "T D"], state: State) -> tuple[Float[Array, "T C"], State]:
    """cos(x · w_in, w_router[:, e]) · exp(log_scale): the scale begins at 2 and stays at most 100.

    Logits depend on the direction of a token's projection alone. Source: X-MoE, arXiv:2204.09179, eq. 4, in the form of
    microsoft/tutel's cosine gate, whose projection has a bias besides.
    """
    w = {name: varying_like(a, x) for name, a in w.items()}
    token = _unit(float32_product(x, w["w_in"]), 1)
    cosines = float32_product(token, _unit(w["w_router"], 0))
    return cosines * jnp.exp(jnp.minimum(w["log_scale"], math.log(LARGEST_SCALE)))[None, :], state


def _unit(a: Float[Array, "m n"], axis: int) -> Float[Array, "m n"]:
    """Divides by the norm along an axis. The gradient is finite at 0."""
    return a * jax.lax.rsqrt(jnp.sum(jnp.square(a), axis=axis, keepdims=True) + 1e-12)


# --- mlp -------------------------------------------------------------------------------------------------------------


def _mlp_weights(cfg: MoEConfig, d_model: int, init: Init) -> dict[str, nnx.Param]:
    r = cfg.router_width
    square = lambda: init.normal((r, r), "router_width router_width")
    vector = lambda value: init.filled((r,), "norm", value)
    return {
        "w_in": init.normal((d_model, r), "router_embed router_width"), "b_in": vector(0.0), "carry": vector(1.0),
        "norm": vector(1.0), "w_1": square(), "b_1": vector(0.0), "w_2": square(), "b_2": vector(0.0),
    }  # fmt: skip


def mlp(w: Weights, x: Float[Array, "T D"], state: State) -> tuple[Float[Array, "T C"], State]:
    """Two hidden layers on the RMSNorm of a state s = x · w_in + b_in + carry ⊙ (state of the layer before).

    The first layer's state before is zeros. `carry` begins at 1, so that a state begins as the sum of all projections
    so far. Source: ZAYA1, arXiv:2511.17127 and 2605.05365, §II-A.
    """
    w = {name: varying_like(a, x) for name, a in w.items()}
    state = float32_product(x, w["w_in"]) + w["b_in"][None, :] + w["carry"][None, :] * state
    hidden = rms_norm(state, w["norm"], 1e-6)
    for i in "12":
        hidden = _gelu(float32_product(hidden, w[f"w_{i}"]) + w[f"b_{i}"][None, :])
    return float32_product(hidden, w["w_router"]), state


@jax.custom_jvp
def _gelu(x: Float[Array, "T R"]) -> Float[Array, "T R"]:
    """x · Φ(x), exactly. JAX 0.12 refuses the gradient of its own inside `shard_map`."""
    return x * _normal_share(x)


@_gelu.defjvp
def _gelu_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    density = jnp.exp(-0.5 * jnp.square(x)) / math.sqrt(2 * math.pi)
    return _gelu(x), (_normal_share(x) + x * density) * dx


def _normal_share(x: Float[Array, "T R"]) -> Float[Array, "T R"]:
    """Φ(x), the share of a normal distribution below x."""
    return 0.5 * jax.lax.erfc(-x * math.sqrt(0.5))


def _nothing(cfg: MoEConfig, d_model: int, init: Init) -> dict[str, nnx.Param]:
    return {}


ROUTERS: dict[str, Router] = {
    "linear": Router(lambda cfg, d: d, _nothing, linear),
    "cosine": Router(lambda cfg, d: cfg.router_width, _cosine_weights, cosine),
    "mlp": Router(lambda cfg, d: cfg.router_width, _mlp_weights, mlp, has_state=True),
}


def linear_by_label(w: Float[Array, "Y D C"], x: Float[Array, "T D"], label: Int[Array, " T"]) -> Float[Array, "T C"]:
    """x · w[label]: each label has a router of its own. One product computes those of all labels, which are few."""
    routers, width, columns = w.shape
    logits = float32_product(x, jnp.swapaxes(w, 0, 1).reshape(width, routers * columns))
    own = label[:, None, None] == jnp.arange(routers)[None, :, None]
    return jnp.sum(jnp.where(own, logits.reshape(-1, routers, columns), 0.0), axis=1)


# --- a table of experts ----------------------------------------------------------------------------------------------


def draw_table(key: Array, vocab: int, experts: int, top_k: int) -> Int[Array, "V K"]:
    """Draws K distinct experts for each token id, such that experts have equally many ids, up to K.

    Ids are dealt in a random order. Each E of them that follow each other take all E experts as their first, and the
    same random K − 1 steps from there to the others, so that they use each expert K times.
    Source: the random and balanced tables of Hash Layers, arXiv:2106.04426, §3.1, here with K experts.
    """
    order, steps = jax.random.split(key)
    place = jax.random.permutation(order, vocab)
    deals = -(-vocab // experts)
    others = jax.vmap(lambda k: jax.random.permutation(k, experts - 1)[: top_k - 1] + 1)(jax.random.split(steps, deals))
    step_VK = jnp.pad(others, ((0, 0), (1, 0)))[place // experts]
    return ((place[:, None] + step_VK) % experts).astype(jnp.int32)
