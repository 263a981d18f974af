"""Router logits → which experts each token uses, and with what weights. Pure functions without parameters.

Letters: T tokens, E experts, K experts per token.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_jax.config import MoEConfig
from moe_jax.parallel.axes import varying_like


class Routing(NamedTuple):
    """The experts of each token, and their weights: all that the experts need to know."""

    experts: Int[Array, "T K"]  # expert ids
    weights: Float[Array, "T K"]  # combine weights, float32
    valid: Bool[Array, "T K"]  # False: this slot does nothing and costs nothing


def router_logits(x: Float[Array, "T D"], w: Float[Array, "D E"]) -> Float[Array, "T E"]:
    """Computes x·w as exactly as in float32, at bfloat16's speed if x is bfloat16.

    With weights rounded to bfloat16 a router would pick other experts.

    A float32 number is the sum of three bfloat16 numbers (24 bits of 3 · 8), whose products with bfloat16 are exact in
    float32, so x·w is one product with three times the columns. The gradient of w is computed likewise. That of x,
    which is rounded to bfloat16, is the sum of the three products that reach 2⁻¹⁶ of it. Products of float32 arrays
    take HIGHEST, because accelerators would otherwise round to bf16 or tf32.
    """
    return _logits(x, varying_like(w, x))  # marked here, so that its gradient is summed over the mesh once


@jax.custom_vjp
def _logits(x, w):
    return _logits_forward(x, w)[0]


def _logits_forward(x, w):
    if x.dtype != jnp.bfloat16:
        return _product("td,de->te", x, w), (x, w)
    return jnp.sum(_product("td,pde->tpe", x, jnp.stack(_thirds(w))), axis=1), (x, w)


def _logits_backward(saved, dy):
    x, w = saved
    if x.dtype != jnp.bfloat16:
        return _product("te,de->td", dy, w), _product("td,te->de", x, dy)
    dy, w = _thirds(dy), _thirds(w)
    dw = jnp.sum(_product("td,pte->pde", x, jnp.stack(dy)), axis=0)
    pairs = [(0, 0), (0, 1), (1, 0)]
    dx = _product("pte,pde->td", *(jnp.stack([parts[pair[i]] for pair in pairs]) for i, parts in enumerate((dy, w))))
    return dx.astype(x.dtype), dw


_logits.defvjp(_logits_forward, _logits_backward)


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


def route(
    logits: Float[Array, "T E"], bias: Float[Array, " E"] | None, counted: Bool[Array, " T"], cfg: MoEConfig
) -> tuple[Routing, Float[Array, "T E"]]:
    """Chooses the K best experts for every token (token choice).

    `bias` moves the selection only, never the weights (DeepSeek-V3's loss-free balancing, arXiv:2408.15664).
    Group-limited selection ranks a group by the sum of its best two scores, however small K is, and keeps `top_groups`
    groups (DeepSeek-V3's code). Ties go to the lower expert id.

    Returns the routing and the router probabilities over *all* experts, each row summing to 1: the softmax of the
    logits, or sigmoid scores divided by their sum. The load-balancing loss uses them.
    """
    logits = logits.astype(jnp.float32)
    if cfg.score == "softmax":
        probs = jax.nn.softmax(logits, axis=-1)
        scores = probs
    else:
        scores = jax.nn.sigmoid(logits)
        probs = scores / (jnp.sum(scores, axis=-1, keepdims=True) + 1e-20)
    # Where softmax is taken over the chosen K, logits are ranked. A selection bias adds to what is ranked.
    ranked = logits if cfg.score_order == "topk_score" else scores
    ranked = jax.lax.stop_gradient(ranked)
    if bias is not None:
        ranked = ranked + jax.lax.stop_gradient(bias.astype(jnp.float32))[None, :]
    if cfg.top_groups < cfg.num_groups:
        ranked = _limit_groups(ranked, cfg)
    _, experts = jax.lax.top_k(ranked, cfg.top_k)
    if cfg.combine == "one":
        weights = jnp.ones(experts.shape, jnp.float32)
    elif cfg.score_order == "topk_score":
        weights = jax.nn.softmax(pick_chosen(logits, experts), axis=-1)
    else:
        weights = pick_chosen(scores, experts)
    if cfg.renormalize:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    valid = jnp.broadcast_to(counted[:, None], experts.shape)
    return Routing(experts, weights * cfg.routed_scaling, valid), probs


def pick_chosen(values: Float[Array, "T E"], experts: Int[Array, "T K"]) -> Float[Array, "T K"]:
    """The values of the chosen experts. A gather's gradient would be a scatter: slow on GPUs, in no fixed order."""
    chosen_TKE = experts[:, :, None] == jnp.arange(values.shape[1])[None, None, :]
    return jnp.sum(jnp.where(chosen_TKE, values[:, None, :], 0), axis=-1)


def _limit_groups(ranked: Float[Array, "T E"], cfg: MoEConfig) -> Float[Array, "T E"]:
    """Sets the scores of experts outside a token's best groups to −∞."""
    tokens, experts = ranked.shape
    grouped = ranked.reshape(tokens, cfg.num_groups, experts // cfg.num_groups)
    best, _ = jax.lax.top_k(grouped, min(2, grouped.shape[-1]))
    _, groups = jax.lax.top_k(jnp.sum(best, axis=-1), cfg.top_groups)
    kept = jnp.any(jax.nn.one_hot(groups, cfg.num_groups, dtype=bool), axis=1)
    return jnp.where(kept[:, :, None], grouped, -jnp.inf).reshape(tokens, experts)
