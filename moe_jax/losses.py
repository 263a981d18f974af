"""Cross-entropy, load-balancing loss, router z-loss, and the one place where coefficients meet losses."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax import sharding
from moe_jax.config import LossConfig
from moe_jax.routing import RouterStats

CHUNK = 1024  # tokens of a device whose logits exist at one time


class BatchSums(NamedTuple):
    """Everything the loss needs of a batch, as sums: micro-batches, devices and hosts add up."""

    nll: Float[Array, ""]  # Σ weight · negative log-likelihood, nats
    tokens: Float[Array, ""]  # Σ weight
    router: RouterStats


class LossParts(NamedTuple):
    """Terms with their coefficients: they add up to the loss that was differentiated."""

    xent: Float[Array, ""]  # nats per token
    load_balance: Float[Array, ""]
    router_z: Float[Array, ""]


def token_nll(
    hidden: Float[Array, "B S D"], output: Float[Array, "V D"], targets: Int[Array, "B S"]
) -> Float[Array, "B S"]:
    """−log softmax(hidden · outputᵀ)[target] in float32, nats. `[B, S, V]` never exists, forward or backward."""

    def local(hidden, targets, output):
        # Marked as varying here, so that its gradient is summed over devices once and not once a chunk.
        output = jax.lax.pcast(output, sharding.AXES, to="varying") if sharding.current_sizes() else output
        nll, _ = _chunked_nll(hidden.reshape(-1, hidden.shape[-1]), output, targets.reshape(-1))
        return nll.reshape(targets.shape)

    return sharding.per_device(local, 2, 1)(hidden, targets, output)


def _chunks(*arrays: Array) -> tuple[Array, ...]:
    """`[T, …]` → `[T/C, C, …]` for the largest C ≤ CHUNK that divides T."""
    tokens = arrays[0].shape[0]
    chunk = next(c for c in range(min(CHUNK, tokens), 0, -1) if tokens % c == 0)
    return tuple(a.reshape(tokens // chunk, chunk, *a.shape[1:]) for a in arrays)


def _logits(h_CD, output):
    return jnp.einsum("cd,vd->cv", h_CD, output, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _chunked_nll(h_TD, output, targets_T):
    """nll and logsumexp of every token."""

    def step(_, part):
        h, target = part
        logits = _logits(h, output)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        return None, (log_z - jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0], log_z)

    _, (nll, log_z) = jax.lax.scan(step, None, _chunks(h_TD, targets_T))
    return nll.reshape(-1), log_z.reshape(-1)


def _chunked_nll_forward(h_TD, output, targets_T):
    nll, log_z = _chunked_nll(h_TD, output, targets_T)
    return (nll, log_z), (h_TD, output, targets_T, log_z)


def _chunked_nll_backward(saved, cotangents):
    """d logits = (softmax − one-hot) · cotangent, from logits computed again chunk by chunk."""
    h_TD, output, targets_T, log_z_T = saved
    d_nll_T, _ = cotangents  # log_z leaves `token_nll` unused

    def step(d_output, part):
        h, target, log_z, d_nll = part
        p = jnp.exp(_logits(h, output) - log_z[:, None])
        hit = jnp.arange(output.shape[0])[None, :] == target[:, None]
        d_logits = ((p - hit) * d_nll[:, None]).astype(h.dtype)
        d_output += jnp.einsum("cv,cd->vd", d_logits, h, preferred_element_type=jnp.float32)
        return d_output, d_logits @ output

    zeros = jnp.zeros_like(output, dtype=jnp.float32)
    d_output, d_h = jax.lax.scan(step, zeros, _chunks(h_TD, targets_T, log_z_T, d_nll_T))
    return d_h.reshape(h_TD.shape), d_output.astype(output.dtype), None


_chunked_nll.defvjp(_chunked_nll_forward, _chunked_nll_backward)


def load_balancing_loss(stats: RouterStats, top_k: int) -> Float[Array, " L"]:
    """Load-balancing loss of each layer: the mean over balance groups of E · Σ_e f_e · P_e.

    f_e = tokens_per_expert / (K · tokens), carries no gradient; P_e = mean router probability, does. Groups without a
    counted token are left out of the mean.

    Value: 1.0 at uniform routing for every E and K; E/K when all tokens pick the same K experts with probability 1/K
        each. HF transformers' formula gives K at uniform: its coefficient c is K·c here.
    Scope: the group of each token, see `LossConfig.balance_batch`; with one group, the whole optimizer batch.
    Source: arXiv:2501.11873, eqs. 2–6, with f divided by K.
    """
    num_experts = stats.prob_per_expert.shape[-1]
    tokens = jnp.maximum(stats.tokens, 1.0)[..., None]
    f = jax.lax.stop_gradient(stats.tokens_per_expert) / (top_k * tokens)
    per_group = num_experts * jnp.sum(f * (stats.prob_per_expert / tokens), axis=-1)
    counted = (stats.tokens > 0).astype(jnp.float32)
    return jnp.sum(per_group * counted, axis=-1) / jnp.maximum(jnp.sum(counted, axis=-1), 1.0)


def router_z_loss(stats: RouterStats) -> Float[Array, " L"]:
    """Mean of logsumexp(router logits)² over tokens, per layer; (log E)² for zero logits. arXiv:2202.08906, eq. 5."""
    return jnp.sum(stats.z_sq, axis=-1) / jnp.maximum(jnp.sum(stats.tokens, axis=-1), 1.0)


def total_loss(sums: BatchSums, cfg: LossConfig, top_k: int) -> tuple[Float[Array, ""], LossParts]:
    """The training loss of one optimizer batch: nats per token, plus both router losses averaged over layers."""
    parts = LossParts(
        xent=sums.nll / jnp.maximum(sums.tokens, 1.0),
        load_balance=cfg.load_balance_coef * jnp.mean(load_balancing_loss(sums.router, top_k)),
        router_z=cfg.router_z_coef * jnp.mean(router_z_loss(sums.router)),
    )
    return parts.xent + parts.load_balance + parts.router_z, parts
