"""Smoothing before rounding: factors move from what a matrix reads into the matrix, and the model stays the same.

EAQuant's shared smoothing, arXiv:2506.13329: one vector s for a layer of experts. The scale of the norm before it is
divided by s, and the rows of every matrix that reads the norm's result are multiplied by s: the router, all experts,
shared experts and their gate. Hidden units of an expert that are far larger than the others are divided by a factor in
w_up, which w_down takes back.

All factors are rounded to powers of two, which the released code does not do. A product with one is exact, so that the
layer computes the same bits as before, with the same choices, in any dtype.

Letters: D width of the residual stream, E experts, F hidden width of an expert, C router columns.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from moe_jax.config import ModelConfig
from moe_jax.errors import ConfigError
from moe_jax.nn.layers import ACTIVATIONS
from moe_jax.parallel import sharding
from moe_jax.quant.taps import BlockTaps, Tap
from moe_jax.tree import flatten, nest

ALPHA = 0.6  # the released run's
LEAST = 1e-5  # in the place of smaller values, as in SmoothQuant's code
SPREAD, FENCE, POWER = 0.65, 1.5, 0.7  # of outliers: the quantile, and how far beyond it; the power of their ratio

# Matrices that read the result of a block's second norm, by path in the block: of these "moe/w_in" with latent experts,
# which then read what it makes.
EXPERTS = ("moe/w_gate", "moe/w_up")
READERS = (
    "moe/w_in", "moe/w_shared_gate", "moe/shared/w_gate", "moe/shared/w_up", "mlp/w_gate", "mlp/w_up",
)  # fmt: skip
ROUTERS = {"linear": "moe/w_router", "cosine": "moe/router/w_in", "mlp": "moe/router/w_in"}
# What else a block with experts holds after that norm.
INSIDE = ("log_scale", "b_in", "carry", "norm", "w_1", "b_1", "w_2", "b_2")  # of a router
OTHERS = (
    "moe/w_router", "moe/w_down", "moe/w_out", "moe/latent_norm", "moe/b_shared_gate", "moe/shared/w_down",
    "mlp/w_down", *(f"moe/router/{name}" for name in INSIDE),
)  # fmt: skip


class Smoothed(NamedTuple):
    """A block after smoothing."""

    params: dict  # of the block
    taps: BlockTaps  # what the changed matrices read
    factors: Float[Array, " D"]  # s
    moved: Float[np.ndarray, "E F"]  # factors between w_up and w_down; 1 where a unit is no outlier


def check(cfg: ModelConfig) -> None:
    """Raises ConfigError for a model in which no factor can move without another result."""
    if cfg.moe.expert_inputs == "int8":
        rule = "rounds rows by their largest entry, which --smooth would change"
        raise ConfigError("model.moe.expert_inputs", "int8", rule, "nearest valid: without --smooth")
    if cfg.norm == "post":
        rule = "leaves no norm before the experts, whose scale --smooth would change"
        raise ConfigError("model.norm", cfg.norm, rule, "nearest valid: without --smooth")
    if cfg.moe.identity_experts and cfg.moe.identity_output == "input":
        rule = "return what --smooth would scale"
        raise ConfigError(
            "model.moe.identity_experts", cfg.moe.identity_experts, rule, "nearest valid: without --smooth"
        )


def smooth(
    cfg: ModelConfig, params: dict, taps: BlockTaps, alpha: float = ALPHA, router: bool = False, down: bool = True
) -> Smoothed:
    """Moves factors in a block with experts. Other blocks are not for this function.

    taps: of the block as it is. alpha: the power of the largest inputs; 1 − alpha that of the largest
    weights. router: whether the router's matrix counts in s, which the released run leaves out. down: whether outliers
    among hidden units move too; not where an activation has no gate.
    Raises KeyError for a parameter that this module does not know.
    """
    flat = flatten(params)
    route, latent = ROUTERS[cfg.moe.router], "moe/w_in" in flat
    readers = [path for path in (*READERS, *(() if latent else EXPERTS), route) if path in flat]
    known = {*readers, *OTHERS, *(EXPERTS if latent else ())}
    if unknown := [p for p in flat if p.startswith(("moe/", "mlp/", "memory/")) and p not in known]:
        raise KeyError(f"smoothing has no rule for {unknown}")

    s = shared_factors(flat, taps, readers, None if router else route, alpha)
    new = flat | {"mlp_norm": flat["mlp_norm"] / s}
    by_row = lambda w: s.reshape(*[1] * (w.ndim - 2), -1, 1).astype(w.dtype)
    new |= {path: flat[path] * by_row(flat[path]) for path in readers}
    dense = {path: _divided(tap, s) if path in readers else tap for path, tap in taps.dense.items()}
    found = taps._replace(fed=taps.fed / s, dense=dense)
    found = found if latent else found._replace(expert_in=_divided(taps.expert_in, s))
    largest = jax.device_get(taps.expert_hidden.largest)
    t = np.ones_like(largest)  # numpy, the same in every process
    if down and ACTIVATIONS[cfg.activation].gated:
        t = outlier_factors(largest)
        new["moe/w_up"] = new["moe/w_up"] / t[:, None, :]
        new["moe/w_down"] = new["moe/w_down"] * t[:, :, None]
        found = found._replace(expert_hidden=_divided(taps.expert_hidden, t))
    return Smoothed(nest({path: w.astype(flat[path].dtype) for path, w in new.items()}), found, s, t)


def shared_factors(
    flat: dict[str, Array], taps: BlockTaps, readers: list[str], left_out: str | None, alpha: float
) -> Float[Array, " D"]:
    """The largest, over all matrices that read, of max|x|^alpha / max|w|^(1 − alpha), as a power of two.

    Of an expert max|x| is that of its own tokens, and max|w| that of gate and up together.
    """
    term = lambda x, w: jnp.maximum(x, LEAST) ** alpha / jnp.maximum(w, LEAST) ** (1 - alpha)
    largest = lambda path: sharding.replicate(jnp.max(jnp.abs(flat[path].astype(jnp.float32)), axis=-1))
    own = [largest(path) for path in readers if path in EXPERTS]
    terms = [jnp.max(term(taps.expert_in.largest, jnp.maximum(*own) if own[1:] else own[0]), axis=0)] if own else []
    terms += [term(taps.fed, largest(path)) for path in readers if path not in (*EXPERTS, left_out)]
    return powers_of_two(jnp.max(jnp.stack(terms), axis=0))


def powers_of_two(x: Array) -> Array:
    """The nearest powers of two, by their logarithms."""
    return jnp.exp2(jnp.round(jnp.log2(x)))


def outlier_factors(largest: Float[np.ndarray, "E F"]) -> Float[np.ndarray, "E F"]:
    """(|x| / the largest |x| of the other units)^0.7, as a power of two, for the outliers of each expert; else 1.

    largest: the largest |x| of each hidden unit. Candidates are beyond the upper quantile by 1.5 times the distance of
    two quantiles. Among them the cut is where the gap to the next is largest against the variance of those below
    (`cut_of`). The released code treats the largest and the least value of a unit apart, this its absolute value.
    """
    factors = np.ones(largest.shape, np.float32)
    for row, made in zip(np.asarray(largest, np.float64), factors, strict=True):
        low, high = np.quantile(row, [1 - SPREAD, SPREAD])
        beyond = row[row > high + FENCE * (high - low)]
        if not beyond.size:
            continue
        limit = cut_of(beyond) if beyond.size > 1 else high + FENCE * (high - low)
        out = row > limit
        normal = row[~out].max(initial=0.0)
        if normal > 0:
            made[out] = np.exp2(np.round(POWER * np.log2(row[out] / normal)))
    return factors


def cut_of(values: Float[np.ndarray, " n"]) -> float:
    """The largest of those below the cut that maximises (gap above − variance below); two values or more."""
    ordered = np.sort(values)[::-1]
    below = [np.var(ordered[i:], ddof=1) if len(ordered) - i > 1 else 0.0 for i in range(1, len(ordered))]
    return float(ordered[1 + int(np.argmax(ordered[:-1] - ordered[1:] - below))])


def _divided(tap: Tap, s: Float[Array | np.ndarray, "*E D"]) -> Tap:
    """The statistics of x / s. s: for each expert, or for all."""
    s = s if s.ndim == tap.largest.ndim else jnp.broadcast_to(s, tap.largest.shape)
    return Tap(tap.gram / s[..., :, None] / s[..., None, :], tap.largest / s)
