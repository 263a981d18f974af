"""Balancing the load of experts without a loss: the update of selection biases. router_losses.py has the losses.

Letters: L layers, C router columns: the experts that a token may choose.
"""

from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from moe_jax.config import LossConfig, ModelConfig
from moe_jax.moe import quantile


def _stateless(direction: Callable[[Array, Array], Array]) -> optax.GradientTransformationExtraArgs:
    """A controller without a state: `direction(missing load, all load)` of each bias."""

    def update(missing, state, params=None, *, total, **_):
        return jax.tree.map(direction, missing, total), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def _centred_sign(missing: Float[Array, "*L C"], total: Float[Array, "*L 1"]) -> Float[Array, "*L C"]:
    direction = jnp.sign(missing)
    return direction - jnp.mean(direction, axis=-1, keepdims=True)


def _share(missing: Float[Array, "*L C"], total: Float[Array, "*L 1"]) -> Float[Array, "*L C"]:
    return missing / jnp.maximum(total, 1.0)


# How selection biases follow the loads, by `loss.bias_update`: transformations of optax from what each column lacks to
# a direction, which the rate multiplies. What a column lacks is target load − load, the negative of the gradient that
# an optimizer would descend; every one of these is odd, so the result is that of the descent. "quantile" is not among
# them: it needs more than loads (moe/quantile.py).
CONTROLLERS = {
    # arXiv:2408.15664, algorithm 1
    "sign": _stateless(lambda missing, total: jnp.sign(missing)),
    # Subtracts the mean of the signs, so that the biases keep their mean (Moonlight, arXiv:2502.16982, appendix C). The
    # selection is the same.
    "centred": _stateless(_centred_sign),
    # target share − share of the assignments (LongCat-Flash, arXiv:2509.01322, eq. 2)
    "proportional": _stateless(_share),
    # AdamW of share − target share (ZAYA1, arXiv:2605.05365, eq. 5). The report gives neither its betas nor its decay:
    # these are optax's defaults, 0.9, 0.999 and 1e-8, and no decay.
    "adamw": optax.chain(_stateless(_share), optax.scale_by_adam()),
}
WITH_STATE = ("adamw",)  # each bias has a state of its own, in `TrainState.opt_state`


def update_bias(
    bias: Float[Array, "*L C"],
    load: Float[Array, "*L C"],
    rate: float,
    form: str = "sign",
    target: tuple[float, ...] = (),
    moved: int = 0,
    state: Any = None,
) -> tuple[Float[Array, "*L C"], Any]:
    """Updates selection biases (loss-free balancing): bias + rate · direction. Returns them and the controller's state.

    load: assignments of each column, over the whole optimizer batch.
    form: the controller, a name in `CONTROLLERS`.
    target: relative target load of each column; () gives all the same. It is scaled to the sum of the loads.
    moved: number of the first columns that are updated, where the others keep their bias; 0: all are updated.
    state: of the controller, at first `CONTROLLERS[form].init(bias)`. Only "adamw" has one.
    """
    share = jnp.asarray(target or (1.0,) * bias.shape[-1], jnp.float32)
    share = (share / jnp.sum(share)).reshape((1,) * (bias.ndim - 1) + share.shape)
    total = jnp.sum(load, axis=-1, keepdims=True)
    missing = total * share - load
    if moved:
        missing = jnp.where(jax.lax.broadcasted_iota(jnp.int32, missing.shape, missing.ndim - 1) < moved, missing, 0.0)
    direction, state = CONTROLLERS[form].update(missing, state, total=total)
    return bias + rate * direction, state


def budget_target(columns: int, num_experts: int, top_k: int, budget: float) -> tuple[float, ...]:
    """The target share of each column with which a token uses `budget` experts on average (LongCat-Flash, eq. 2).

    The first `num_experts` columns are experts, with a share of budget / (top_k · num_experts) each. The rest is shared
    by the identity experts after them. Their biases are not to be updated: what matters is the difference of the two.
    """
    identity, share = columns - num_experts, budget / top_k
    return (share / num_experts,) * num_experts + ((1.0 - share) / max(identity, 1),) * identity


def describe(loss: LossConfig, model: ModelConfig, fixed: Collection[str] = (), moving: bool = True) -> str:
    """Describes in one line how the selection biases move, and what quantile balancing counts.

    fixed: the paths of biases that stay as they are. moving: whether there are others.
    """
    if not moving:
        return "selection bias: stays as it is, since the routers are frozen"
    return _how(loss, model) + (f"; {', '.join(sorted(fixed))} stay as they are" if fixed else "")


def _how(loss: LossConfig, model: ModelConfig) -> str:
    if loss.bias_update == "quantile":
        columns = max(model.routed_counts, default=0) + model.moe.identity_experts
        count = f"{quantile.BINS:,} bins for each of {columns:,} experts, {4 * quantile.BINS * columns:,} bytes a layer"
        return f"selection bias: quantile over the optimizer batch, {count}"
    budget, k = model.moe.expert_budget, model.moe.top_k
    aim = f", towards {budget:g} of {k} choices for experts" if budget else ""
    return f"selection bias: {loss.bias_update}, rate {loss.bias_update_rate:g}{aim}"
