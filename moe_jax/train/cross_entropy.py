"""Cross-entropy of tokens, a chunk at a time: the logits of a whole batch never exist."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.parallel import sharding
from moe_jax.parallel.axes import varying_like

CHUNK = 2048  # tokens of a device whose logits exist at one time


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
