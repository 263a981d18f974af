"""The exponential moving average of the weights during training (`optim.ema`).

It is kept in float32, sharded as the parameters, and begins as the weights. A skipped step leaves it. Selection biases
are not averaged, nor are frozen parameters, whose average they are themselves.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.optim import groups
from moe_jax.tree import flatten


def start(trained: dict) -> dict:
    """The average before the first step: a copy of the weights that are trained, which shares no memory with them."""
    return jax.tree.map(lambda w: jnp.copy(w).astype(jnp.float32), trained)


def weight_of_new(decay: float, updates: Int[Array, ""]) -> Float[Array, ""]:
    """The weight of the new weights in the average: 1 − min(decay, (1 + n) / (10 + n)), after n earlier updates.

    So the first averages are over few steps and forget the first weights. decay: `optim.ema`.
    Source: `tf.train.ExponentialMovingAverage` with `num_updates`. The default of diffusers' EMAModel is the same, but
    for the first average, which is the weights.
    """
    return jnp.maximum(1.0 - decay, 9.0 / (10.0 + updates.astype(jnp.float32)))


def update(average: dict, trained: dict, decay: float, updates: Int[Array, ""]) -> dict:
    """Moves the average towards the weights after an update of the optimizer: a + (1 − d) · (w − a).

    updates: the number of updates before this one. An average that equals the weights keeps every bit.
    """
    share = weight_of_new(decay, updates)
    return jax.tree.map(lambda a, w: a + share * (w.astype(jnp.float32) - a), average, trained)


def as_params(average: dict, params: dict) -> dict:
    """The parameters of the averaged model, in the dtypes of `params`, from which frozen ones are taken."""
    fixed = frozenset(flatten(params)) - frozenset(flatten(average))
    trained, fixed = groups.split(params, fixed)
    return groups.join(jax.tree.map(lambda a, w: a.astype(w.dtype), average, trained), fixed)
