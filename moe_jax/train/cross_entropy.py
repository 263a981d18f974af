"""Cross-entropy of tokens, computed in chunks, so that the logits of a whole batch never exist."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_jax.parallel import axes, sharding
from moe_jax.parallel.axes import varying_like

CHUNK = 2048  # tokens of a device in one chunk: only their logits exist at a time
CPU_CHUNK = 256  # in training on a CPU, so that the logits of a chunk stay in its cache


def token_nll(
    hidden: Float[Array, "B S D"], output: Float[Array, "V D"], targets: Int[Array, "B S"]
) -> Float[Array, "B S"]:
    """The negative log-likelihood of each target in nats, for evaluation: −log softmax(hidden · outputᵀ)[target].

    It is float32. `[B, S, V]` never exists.
    """

    def local(hidden, targets, output):
        step = lambda _, part: (None, _log_softmax(part[0], output, part[1])[1])
        parts = split_chunks(hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1))
        _, nll = jax.lax.scan(step, None, parts)
        return nll.reshape(-1)[: targets.size].reshape(targets.shape)

    return sharding.per_device(local, 2, 1)(hidden, targets, output)


def token_scores(
    hidden: Float[Array, "B S D"], output: Float[Array, "V D"], targets: Int[Array, "B S"]
) -> tuple[Float[Array, "B S"], Bool[Array, "B S"]]:
    """`token_nll`, and whether each target is the most probable token."""

    def local(hidden, targets, output):
        def step(_, part):
            log_p, nll = _log_softmax(part[0], output, part[1])
            return None, (nll, jnp.argmax(log_p, axis=-1) == part[1])

        parts = split_chunks(hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1))
        _, made = jax.lax.scan(step, None, parts)
        return tuple(x.reshape(-1)[: targets.size].reshape(targets.shape) for x in made)

    return sharding.per_device(local, 2, 1)(hidden, targets, output)


def summed_nll(
    hidden: Float[Array, "B S D"],
    output: Float[Array, "V D"],
    targets: Int[Array, "B S"],
    weights: Float[Array, "B S"],
) -> Float[Array, ""]:
    """The sum Σ weights · `token_nll`, for training. Every logit is computed once, and so is its gradient.

    The gradient of a sum is known up to a factor when the sum is computed. So the forward pass keeps the gradients of
    hidden and output for the backward pass, and no logits. The gradient of weights is not computed: it is zero.
    """

    def local(hidden, targets, weights, output):
        # Marked as varying here, so that its gradient is summed over devices once, and not once for each chunk.
        output = jax.lax.pcast(output, sharding.AXES, to="varying") if sharding.current_sizes() else output
        return _summed_nll(hidden.reshape(-1, hidden.shape[-1]), output, targets.reshape(-1), weights.reshape(-1))[None]

    return jnp.sum(sharding.per_device(local, 3, 1)(hidden, targets, weights, output))


def split_chunks(*arrays: Array, most: int | None = None) -> tuple[Array, ...]:
    """Splits `[T, …]` into the fewest chunks of at most `most` (default CHUNK) tokens: `[chunks, tokens, …]`.

    Padding comes last.
    """
    tokens = arrays[0].shape[0]
    count = -(-tokens // (most or CHUNK))
    chunk = -(-tokens // count)
    pad = lambda a: jnp.pad(a, [(0, count * chunk - tokens)] + [(0, 0)] * (a.ndim - 1))
    return tuple(pad(a).reshape(count, chunk, *a.shape[1:]) for a in arrays)


def _log_softmax(hidden, output, targets):
    """Log-probabilities over the vocabulary of the tokens of a chunk, and their negative log-likelihoods."""
    logits = jnp.einsum("td,vd->tv", hidden, output, preferred_element_type=jnp.float32)
    log_p = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    return log_p, -jnp.take_along_axis(log_p, targets[:, None], axis=-1)[:, 0]


@jax.custom_vjp
def _summed_nll(h_TD, output, targets_T, weights_T):
    step = lambda total, part: (total + jnp.sum(part[2] * _log_softmax(part[0], output, part[1])[1]), None)
    return jax.lax.scan(step, varying_like(jnp.zeros(()), h_TD), split_chunks(h_TD, targets_T, weights_T))[0]


def _summed_nll_forward(h_TD, output, targets_T, weights_T):
    """Computes loss and gradients chunk by chunk: d logits = (softmax − one-hot) · weight."""
    if axes.current_kind() == "cpu" and h_TD.dtype == output.dtype == jnp.float32:
        total, d_h, d_output = _on_cpu(h_TD, output, targets_T, weights_T)
        return total, (d_h, d_output, jnp.zeros((), output.dtype))

    def step(sums, part):
        total, d_output = sums
        h, target, weight = part
        log_p, nll = _log_softmax(h, output, target)
        one_hot = jnp.arange(output.shape[0])[None, :] == target[:, None]
        d_logits = ((jnp.exp(log_p) - one_hot) * weight[:, None]).astype(h.dtype)
        d_output += jnp.einsum("tv,td->vd", d_logits, h, preferred_element_type=jnp.float32)
        return (total + jnp.sum(weight * nll), d_output), d_logits @ output

    zeros = varying_like(jnp.zeros(()), h_TD), jnp.zeros_like(output, dtype=jnp.float32)
    (total, d_output), d_h = jax.lax.scan(step, zeros, split_chunks(h_TD, targets_T, weights_T))
    d_h = d_h.reshape(-1, h_TD.shape[1])[: h_TD.shape[0]]
    return total, (d_h, d_output, jnp.zeros((), output.dtype))


def _on_cpu(h_TD, output, targets_T, weights_T):
    """Computes what `_summed_nll_forward` does, in fewer passes over the logits, which take a CPU as long as products.

    The softmax is never formed: its denominator divides rows of the products. The one-hot part of d logits selects rows
    of `output`, and adds to rows of its gradient, after the loop. That gradient is summed as `[D, V]`, the order in
    which the product reads the logits as they lie in memory.
    """

    def step(sums, part):
        total, d_output_DV = sums
        h, target, weight = part
        logits = h @ output.T
        top = jnp.max(logits, axis=-1, keepdims=True)
        exp = jnp.exp(logits - top)
        denominator = jnp.sum(exp, axis=-1, keepdims=True)
        nll = (top + jnp.log(denominator) - jnp.take_along_axis(logits, target[:, None], axis=-1))[:, 0]
        scale = weight[:, None] / denominator
        return (total + jnp.sum(weight * nll), d_output_DV + (h * scale).T @ exp), (exp @ output) * scale

    zeros = varying_like(jnp.zeros(()), h_TD), jnp.zeros_like(output.T)
    parts = split_chunks(h_TD, targets_T, weights_T, most=min(CHUNK, CPU_CHUNK))
    (total, d_output_DV), d_h = jax.lax.scan(step, zeros, parts)
    d_h = d_h.reshape(-1, h_TD.shape[1])[: h_TD.shape[0]] - weights_T[:, None] * output[targets_T]
    return total, d_h, d_output_DV.T.at[targets_T].add(-weights_T[:, None] * h_TD)


def _summed_nll_backward(saved, d_total):
    d_h, d_output, like = saved
    scaled = lambda a, dtype: (a.astype(jnp.float32) * d_total).astype(dtype)
    return scaled(d_h, d_h.dtype), scaled(d_output, like.dtype), None, None


_summed_nll.defvjp(_summed_nll_forward, _summed_nll_backward)
