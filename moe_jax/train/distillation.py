"""Sums of the losses that a teacher adds: the divergence of its predictions, and the distance of its hidden states.

Like cross-entropy, the divergence is computed in chunks: the logits of a whole batch never exist, those of the teacher
neither. No gradient reaches the teacher.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.parallel import sharding
from moe_jax.parallel.axes import varying_like
from moe_jax.train import cross_entropy


class Lesson(NamedTuple):
    """The states of a teacher for a (micro-)batch, and its output matrix."""

    hidden: Float[Array, "B S D'"]
    output: Float[Array, "V D'"]  # maps hidden states to logits
    blocks: list[Float[Array, "B S D"]] | None  # residual stream after each block; None unless it is compared


def summed_losses(
    hidden: Float[Array, "B S D"],
    output: Float[Array, "V D"],
    targets: Int[Array, "B S"],
    weights: Float[Array, "B S"],
    lesson: Lesson,
    temperature: float,
    symmetric: bool,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The sums Σ weights · negative log-likelihood, as `cross_entropy.summed_nll`, and Σ weights · divergence, in nats.

    The divergence is KL(q ‖ p) of the softmaxes q of the teacher's logits / temperature, and p of the student's; with
    `symmetric` ½ KL(q ‖ p) + ½ KL(p ‖ q). Source: arXiv:1503.02531, §2, without its factor temperature².

    Only hidden and output have gradients. The backward pass computes logits again: the two sums have factors of their
    own, which are not known before.
    """

    def local(hidden, targets, weights, taught, output, output_of_teacher):
        # Marked as varying here, so that its gradient is summed over devices once, and not once for each chunk.
        output = jax.lax.pcast(output, sharding.AXES, to="varying") if sharding.current_sizes() else output
        rows = (x.reshape(-1, *x.shape[2:]) for x in (hidden, targets, weights, taught))
        sums = _summed(*rows, output, output_of_teacher, temperature, symmetric)
        return tuple(x[None] for x in sums)

    sums = sharding.per_device(local, 4, 2)(hidden, targets, weights, lesson.hidden, output, lesson.output)
    return tuple(map(jnp.sum, sums))


def summed_distance(
    blocks: Sequence[Float[Array, "B S D"]], others: Sequence[Float[Array, "B S D"]], weights: Float[Array, "B S"]
) -> Float[Array, ""]:
    """The sum over blocks and tokens of weight · the mean over D of (block − other)², in float32. Source:
    arXiv:2204.07675, eq. 8, where it is a mean over tokens."""
    far = lambda x, y: jnp.mean(jnp.square(x.astype(jnp.float32) - y.astype(jnp.float32)), axis=-1)
    return sum(jnp.sum(weights * far(x, y)) for x, y in zip(blocks, others, strict=True))


def _chunks(*arrays: Array) -> tuple[Array, ...]:
    """Chunks of half as many tokens as those of cross-entropy alone: two models have logits."""
    return cross_entropy.split_chunks(*arrays, most=max(1, cross_entropy.CHUNK // 2))


def _logits(h, output):
    return jnp.einsum("td,vd->tv", h, output, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _summed(h_TD, targets_T, weights_T, taught_TD, output, output_of_teacher, temperature, symmetric):
    def step(sums, part):
        h, target, weight, taught = part
        logits = _logits(h, output)
        log_p = jax.nn.log_softmax(logits / temperature)
        log_q = jax.nn.log_softmax(_logits(taught, output_of_teacher) / temperature)
        half = (jnp.exp(log_q) - jnp.exp(log_p)) / 2 if symmetric else jnp.exp(log_q)
        divergence = jnp.sum(half * (log_q - log_p), axis=-1)
        found = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
        nll = jax.nn.logsumexp(logits, axis=-1) - found
        return (sums[0] + jnp.sum(weight * nll), sums[1] + jnp.sum(weight * divergence)), None

    zero = varying_like(jnp.zeros(()), h_TD)
    return jax.lax.scan(step, (zero, zero), _chunks(h_TD, targets_T, weights_T, taught_TD))[0]


def _summed_backward(temperature, symmetric, saved, d_sums):
    h_TD, targets_T, weights_T, taught_TD, output, output_of_teacher = saved

    def step(d_output, part):
        h, target, weight, taught = part
        logits = _logits(h, output)
        log_p = jax.nn.log_softmax(logits / temperature)
        log_q = jax.nn.log_softmax(_logits(taught, output_of_teacher) / temperature)
        p, d = jnp.exp(log_p), jnp.exp(log_p) - jnp.exp(log_q)
        if symmetric:
            ratio = log_p - log_q
            d = (d + p * (ratio - jnp.sum(p * ratio, axis=-1, keepdims=True))) / 2
        one_hot = jnp.arange(output.shape[0])[None, :] == target[:, None]
        d_logits = d_sums[0] * (jax.nn.softmax(logits) - one_hot) + d_sums[1] / temperature * d
        d_logits = (d_logits * weight[:, None]).astype(h.dtype)
        d_output += jnp.einsum("tv,td->vd", d_logits, h, preferred_element_type=jnp.float32)
        return d_output, d_logits @ output

    start = varying_like(jnp.zeros_like(output, dtype=jnp.float32), h_TD)
    d_output, d_h = jax.lax.scan(step, start, _chunks(h_TD, targets_T, weights_T, taught_TD))
    d_h = d_h.reshape(-1, h_TD.shape[1])[: h_TD.shape[0]]
    return d_h, None, None, None, d_output.astype(output.dtype), None


_summed.defvjp(lambda *args: (_summed(*args), args[:6]), _summed_backward)
