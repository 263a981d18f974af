"""Cross-entropy, load-balancing loss, router z-loss, and the one place where coefficients meet losses."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax import sharding
from moe_jax.config import LoadBalanceConfig, LossConfig
from moe_jax.kernels.common import varying_like
from moe_jax.routing import RouterStats

CHUNK = 2048  # tokens of a device whose logits exist at one time


class Maxima(NamedTuple):
    """Of micro-batches, devices and hosts the largest counts, where everything else adds up."""

    logit: dict[str, Float[Array, "L N"]]  # by stack of layers, see `attention.max_logits`


class BatchSums(NamedTuple):
    """Everything the loss needs of a batch, as sums: micro-batches, devices and hosts add up."""

    nll: Float[Array, ""]  # Σ weight · negative log-likelihood, nats
    tokens: Float[Array, ""]  # Σ weight
    router: RouterStats
    maxima: Maxima | None = None  # not for the loss: for QK-clip


class LossParts(NamedTuple):
    """Terms with their coefficients, which add up to the loss that was differentiated, and without."""

    xent: Float[Array, ""]  # nats per token
    router_z: Float[Array, ""]
    load_balance: dict[str, Float[Array, ""]]  # by the names of `LossConfig.load_balance`
    raw: dict[str, Float[Array, ""]]  # router losses without coefficients, by the names they are logged under

    def total(self) -> Float[Array, ""]:
        return self.xent + self.router_z + sum(self.load_balance.values())

    def scalars(self) -> dict[str, Float[Array, ""]]:
        """Every term of the loss by the name it is logged under."""
        return {"xent": self.xent, **self.load_balance, "router_z": self.router_z}


class Frame(NamedTuple):
    """What the loss of a micro-batch takes from outside it.

    Given a frame, the loss is linear in the micro-batch's sums: the parts of all micro-batches add up to those of the
    optimizer batch.
    """

    weights: Float[Array, ""]  # Σ weight of the optimizer batch
    counted: Float[Array, ""]  # counted tokens of the optimizer batch
    load: Float[Array, "L G E"]  # assignments that f is taken from …
    load_tokens: Float[Array, "L G"]  # … and the tokens they belong to
    prob_tokens: Float[Array, "L G"]  # tokens that P is a mean over
    share: float  # of this micro-batch in the mean over micro-batches: 1 if P is a mean over the optimizer batch


def exact_frame(weights: Float[Array, ""], stats: RouterStats) -> Frame:
    """The definition: both means over the optimizer batch, whose statistics these are."""
    counted = jnp.sum(stats.tokens[:1])  # every layer sees the same tokens
    return Frame(weights, counted, stats.tokens_per_expert, stats.tokens, stats.tokens, 1.0)


def token_nll(
    hidden: Float[Array, "B S D"], output: Float[Array, "V D"], targets: Int[Array, "B S"]
) -> Float[Array, "B S"]:
    """−log softmax(hidden · outputᵀ)[target] in float32, nats, for evaluation. `[B, S, V]` never exists."""

    def local(hidden, targets, output):
        step = lambda _, part: (None, _logits(part[0], output, part[1])[1])
        parts = _chunks(hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1))
        _, nll = jax.lax.scan(step, None, parts)
        return nll.reshape(-1)[: targets.size].reshape(targets.shape)

    return sharding.per_device(local, 2, 1)(hidden, targets, output)


def summed_nll(
    hidden: Float[Array, "B S D"],
    output: Float[Array, "V D"],
    targets: Int[Array, "B S"],
    weights: Float[Array, "B S"],
) -> Float[Array, ""]:
    """Σ weights · `token_nll`, for training: every logit is computed once, and so is its gradient.

    The gradient of a sum is known up to a factor when it is computed, so the forward pass leaves those in hidden and
    output behind, and no logits. There is none in weights.
    """

    def local(hidden, targets, weights, output):
        # Marked as varying here, so that its gradient is summed over devices once and not once a chunk.
        output = jax.lax.pcast(output, sharding.AXES, to="varying") if sharding.current_sizes() else output
        return _summed_nll(hidden.reshape(-1, hidden.shape[-1]), output, targets.reshape(-1), weights.reshape(-1))[None]

    return jnp.sum(sharding.per_device(local, 3, 1)(hidden, targets, weights, output))


def _chunks(*arrays: Array) -> tuple[Array, ...]:
    """`[T, …]` → `[n, C, …]` with C ≤ CHUNK and the fewest chunks; what is padded, under n tokens, comes last."""
    tokens = arrays[0].shape[0]
    count = -(-tokens // CHUNK)
    chunk = -(-tokens // count)
    pad = lambda a: jnp.pad(a, [(0, count * chunk - tokens)] + [(0, 0)] * (a.ndim - 1))
    return tuple(pad(a).reshape(count, chunk, *a.shape[1:]) for a in arrays)


def _logits(h_CD, output, target_C):
    """log softmax over the vocabulary, and the nll."""
    logits = jnp.einsum("cd,vd->cv", h_CD, output, preferred_element_type=jnp.float32)
    log_p = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    return log_p, -jnp.take_along_axis(log_p, target_C[:, None], axis=-1)[:, 0]


@jax.custom_vjp
def _summed_nll(h_TD, output, targets_T, weights_T):
    step = lambda total, part: (total + jnp.sum(part[2] * _logits(part[0], output, part[1])[1]), None)
    return jax.lax.scan(step, varying_like(jnp.zeros(()), h_TD), _chunks(h_TD, targets_T, weights_T))[0]


def _summed_nll_forward(h_TD, output, targets_T, weights_T):
    """d logits = (softmax − one-hot) · weight, chunk by chunk."""

    def step(sums, part):
        total, d_output = sums
        h, target, weight = part
        log_p, nll = _logits(h, output, target)
        hit = jnp.arange(output.shape[0])[None, :] == target[:, None]
        d_logits = ((jnp.exp(log_p) - hit) * weight[:, None]).astype(h.dtype)
        d_output += jnp.einsum("cv,cd->vd", d_logits, h, preferred_element_type=jnp.float32)
        return (total + jnp.sum(weight * nll), d_output), d_logits @ output

    zeros = varying_like(jnp.zeros(()), h_TD), jnp.zeros_like(output, dtype=jnp.float32)
    (total, d_output), d_h = jax.lax.scan(step, zeros, _chunks(h_TD, targets_T, weights_T))
    d_h = d_h.reshape(-1, h_TD.shape[1])[: h_TD.shape[0]]
    return total, (d_h, d_output, jnp.zeros((), output.dtype))


def _summed_nll_backward(saved, d_total):
    d_h, d_output, like = saved
    scaled = lambda a, dtype: (a.astype(jnp.float32) * d_total).astype(dtype)
    return scaled(d_h, d_h.dtype), scaled(d_output, like.dtype), None, None


_summed_nll.defvjp(_summed_nll_forward, _summed_nll_backward)


def load_balancing_loss(
    stats: RouterStats, top_k: int, frequency: Float[Array, "*L G E"] | None = None
) -> Float[Array, "*L"]:
    """Load-balancing loss of each layer: the mean over balance groups of E · Σ_e f_e · P_e.

    f_e = tokens_per_expert / (K · tokens), carries no gradient; P_e = mean router probability, does. Groups without a
    counted token are left out of the mean. `frequency` puts another f in the place of that of `stats`.

    Value: 1.0 at uniform routing for every E and K; E/K when all tokens pick the same K experts with probability 1/K
        each. What other frameworks' coefficients are here: docs/balancing.md.
    Scope: the group of each token, see `LossConfig.balance_batch`; with one group, the whole optimizer batch.
    Source: arXiv:2501.11873, eqs. 2–6, with f divided by K.
    """
    num_experts = stats.prob_per_expert.shape[-1]
    f = expert_frequency(stats.tokens_per_expert, stats.tokens, top_k) if frequency is None else frequency
    p = stats.prob_per_expert / jnp.maximum(stats.tokens, 1.0)[..., None]
    per_group = num_experts * jnp.sum(jax.lax.stop_gradient(f) * p, axis=-1)
    counted = (stats.tokens > 0).astype(jnp.float32)
    return jnp.sum(per_group * counted, axis=-1) / jnp.maximum(jnp.sum(counted, axis=-1), 1.0)


def expert_frequency(load: Float[Array, "*L G E"], tokens: Float[Array, "*L G"], top_k: int) -> Float[Array, "*L G E"]:
    """f: each expert's share of the assignments, from 0 to 1/K; sums to 1."""
    return load / (top_k * jnp.maximum(tokens, 1.0))[..., None]


def router_z_loss(stats: RouterStats) -> Float[Array, " L"]:
    """Mean of logsumexp(router logits)² over tokens, per layer; (log E)² for zero logits. arXiv:2202.08906, eq. 5."""
    return jnp.sum(stats.z_sq, axis=-1) / jnp.maximum(jnp.sum(stats.tokens, axis=-1), 1.0)


def total_loss(
    sums: BatchSums, cfg: LossConfig, top_k: int, step: Int[Array, ""] | int = 0, frame: Frame | None = None
) -> tuple[Float[Array, ""], LossParts]:
    """The training loss at `step`: nats per token, and the router losses averaged (or summed) over layers.

    Of a whole optimizer batch; or, with a `frame`, the part that one micro-batch has in it.
    """
    frame = exact_frame(sums.tokens, sums.router) if frame is None else frame
    over_layers = jnp.mean if cfg.router_loss_layers == "mean" and len(sums.router.tokens) else jnp.sum
    z = over_layers(jnp.sum(sums.router.z_sq, axis=-1)) / jnp.maximum(frame.counted, 1.0)
    terms = cfg.load_balance
    raw = {name: over_layers(_in_frame(sums.router, frame, cfg, term, top_k)) for name, term in terms.items()}
    parts = LossParts(
        xent=sums.nll / jnp.maximum(frame.weights, 1.0),
        router_z=cfg.router_z_coef * z,
        load_balance={name: _coef(term, step) * raw[name] for name, term in terms.items()},
        raw={name.replace("load_balance", "load_balance_raw", 1): x for name, x in raw.items()} | {"router_z_raw": z},
    )
    return parts.total(), parts


def _coef(term: LoadBalanceConfig, step: Int[Array, ""] | int) -> Float[Array, ""] | float:
    """The term's coefficient at a step, counted from 0."""
    if term.start_step == term.stop_step == 0:
        return term.coef
    on = (step >= term.start_step) & ((term.stop_step == 0) | (step < term.stop_step))
    return jnp.where(on, term.coef, 0.0)


def _in_frame(
    stats: RouterStats, frame: Frame, cfg: LossConfig, term: LoadBalanceConfig, top_k: int
) -> Float[Array, " L"]:
    fine = stats.tokens.shape[-1]
    groups = 1 if term.balance_batch == "global" else fine * cfg.balance_unit // term.balance_batch
    merge = lambda x: jnp.sum(x.reshape(x.shape[0], groups, fine // groups, *x.shape[2:]), axis=2)
    stats = jax.tree.map(merge, stats._replace(tokens=frame.prob_tokens))
    frequency = expert_frequency(merge(frame.load), merge(frame.load_tokens), top_k)
    return frame.share * load_balancing_loss(stats, top_k, frequency)


def describe(cfg: LossConfig, micro_batches: int) -> str:
    """One line: which load-balancing losses are on, and whether they are exact."""
    over = lambda b: "the optimizer batch" if b == "global" else "each sequence" if b == 1 else f"{b} sequences"
    dealt = " at random, token by token" if cfg.shuffle_tokens else ""
    when = lambda t: (
        (f" after step {t.start_step}" if t.start_step else "") + (f" until step {t.stop_step}" if t.stop_step else "")
    )
    terms = [f"{t.coef:g} over {over(t.balance_batch)}{dealt}{when(t)}" for t in cfg.load_balance.values() if t.coef]
    if not terms:
        return "load-balancing loss: none"
    running = cfg.accumulation == "running" and micro_batches > 1
    how = "running counts, an approximation (arXiv:2501.11873, algorithm 1)" if running else "exact"
    return f"load-balancing loss, {cfg.router_loss_layers} over layers, {how}: {' + '.join(terms)}"
