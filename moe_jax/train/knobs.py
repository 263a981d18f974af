"""The `Knobs` of a step: what `explore` moves in the router during training, as numbers that the model takes."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from moe_jax.config import MoEConfig, RampConfig, RunConfig
from moe_jax.moe.routing import Knobs
from moe_jax.parallel import sharding

STREAM = 1  # sets these keys apart from others that are made of the config's seed and the step


def draws_noise(cfg: RunConfig) -> bool:
    """Whether routing in training differs from that of the model, or draws random numbers."""
    moe = cfg.model.moe
    return bool(cfg.model.num_moe_layers) and (cfg.explore.moves or moe.overflow == "random" or moe.pool_min > 0)


def of_step(cfg: RunConfig, step: Int[Array, ""] | int) -> Knobs | None:
    """The knobs of a step, counted from 0. None where nothing moves: the program is then that of evaluation."""
    if not draws_noise(cfg):
        return None
    explore, number = cfg.explore, lambda value: jnp.asarray(value, jnp.float32)
    return Knobs(
        key=jax.random.fold_in(jax.random.fold_in(jax.random.key(cfg.seed), STREAM), step),
        random=ramp_at(explore.random, step) if max(explore.random.start, explore.random.end) > 0 else None,
        noise=number(explore.noise) if explore.noise else None,
        temperature=ramp_at(explore.temperature, step) if explore.threshold else None,
        threshold=number(explore.threshold) if explore.threshold else None,
    )


def ramp_at(ramp: RampConfig, step: Int[Array, ""] | int) -> Float[Array, ""]:
    """The value of a ramp at a step, counted from 0."""
    share = jnp.clip(jnp.asarray(step, jnp.float32) / ramp.steps, 0.0, 1.0) if ramp.steps else 1.0
    if ramp.form == "linear":
        return jnp.asarray(ramp.start + (ramp.end - ramp.start) * share, jnp.float32)
    return jnp.asarray(ramp.start * (ramp.end / ramp.start) ** share, jnp.float32)


def number_tokens(shape: tuple[int, int]) -> Int[Array, "B S"]:
    """The number of each token in the optimizer batch, from which its noise is drawn."""
    numbers = jnp.arange(shape[0] * shape[1], dtype=jnp.int32).reshape(shape)
    return jax.sharding.reshard(numbers, P(sharding.AXES, None))


def describe(cfg: RunConfig) -> str:
    """Describes in one line how tokens are routed, where that is not the usual way; "" where it is."""
    moe, explore, parts = cfg.model.moe, cfg.explore, []
    if cfg.model.labels:
        parts.append(_say_labels(cfg))
    if not cfg.model.num_moe_layers:
        return f"routing: {parts[0]}" if parts else ""
    if moe.router != "linear":
        parts.append(f"{moe.router} router of width {moe.router_width}")
    if moe.choice == "expert":
        parts.append("experts choose tokens, later ones too: no text is written, and losses are not a causal model's")
    if moe.identity_experts:
        parts.append(f"{moe.identity_experts} identity experts, so {moe.mean_slots:.2f} of {moe.top_k} compute if all "
                     "are chosen alike")  # fmt: skip
    if moe.pool_min:
        parts.append(f"a document's tokens choose from {moe.pool_min} to {moe.pool_max or moe.num_experts} experts in "
                     f"training, {_say_pools(moe)}")  # fmt: skip
    if explore.top_k:
        parts.append(f"{explore.top_k} experts a token in training, {moe.top_k} in evaluation")
    if max(explore.random.start, explore.random.end) > 0:
        parts.append(f"a share of noise in the logits, {_say(explore.random)}")
    if explore.noise:
        parts.append(f"Gumbel noise × {explore.noise:g} in the selection")
    if explore.threshold:
        parts.append(f"scores over {explore.threshold:g} at temperature {_say(explore.temperature)}")
    return f"routing: {'; '.join(parts)}" if parts else ""


def _say_labels(cfg: RunConfig) -> str:
    moe = cfg.model.moe
    what = {
        "group of experts": moe.label_groups > 1,
        "router": moe.routers > 1,
        "expert": moe.table == "label",
        "attention matrices": cfg.model.untie > 1,
    }
    own = [name for name, on in what.items() if on] + ["norms"] * (cfg.model.untie > 1)
    listed = " and ".join([", ".join(own[:-1])] * (len(own) > 1) + own[-1:])
    return f"each of {cfg.model.labels} labels has its own {listed}"


def _say_pools(moe: MoEConfig) -> str:
    size = f"in evaluation from {moe.pool_size}"
    of = {
        "all": "in evaluation from all",
        "prefix": f"{size} by its first {moe.pool_prefix} tokens, which are not scored",
        "document": f"{size} by all of its tokens, the scored ones too: a leak",
    }
    return of[moe.pool_from]


def _say(ramp: RampConfig) -> str:
    return f"{ramp.start:g} to {ramp.end:g} in {ramp.steps} steps" if ramp.moves else f"{ramp.end:g}"
