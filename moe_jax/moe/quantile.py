"""Quantile balancing: selection biases that are solved for, from a histogram of the biases that tokens ask for.

A token i would use expert e if e's bias were above r_ie = α_i − s_ie, where s are its scores without bias, and α_i is
the (K+1)-th largest of s_i + b: the best that it does not use. The K/C-quantile of r_ie over the tokens of the
optimizer batch is thus the bias with which e gets its share of tokens, were the α_i to stay as they are. They do not,
since all biases move at once: loads become equal over a few updates, not in one. There is no rate, and no average over
steps.

The quantile comes from counts in bins, integers, which add up over devices and micro-batches without rounding. So it
is that of the optimizer batch, where a mean of the quantiles of its parts would not be. All experts have the same bins:
scores lie in (0, 1), so r lies between min b − 1 and max b + 1.

Source: Kimi K3 Technical Report, arXiv:2607.24653, §2.3.3, eqs. 13 and 14, appendices C and D, as published code
describes it (Megatron-LM #6637, torchtitan #4577). Letters: T tokens, C router columns, K experts per token, L layers.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_jax.parallel.axes import varying_like

BINS = 1000  # of one expert; a bin is 2/BINS wide where the biases are equal


def _grid(bias: Float[Array, "*L C"]) -> tuple[Float[Array, "*L 1"], Float[Array, "*L 1"]]:
    """The lower end of the bins, and their range together."""
    low = jnp.min(bias, axis=-1, keepdims=True) - 1.0
    return low, jnp.max(bias, axis=-1, keepdims=True) + 1.0 - low


def histogram(
    logits: Float[Array, "T C"],
    bias: Float[Array, " C"],
    chosen: Int[Array, "T K"],
    counted: Bool[Array, " T"],
    bins: int,
) -> Int[Array, "C bins"]:
    """Counts the biases r that these tokens ask of each expert, in bins. Tokens that are not counted are left out.

    chosen: the K experts with the largest sigmoid(logits) + bias, so that α is the largest of the others: a maximum,
        where another top-k would be a sort on accelerators.

    On one kind of device equal logits and biases give equal counts in every program. A compiler may compute a sigmoid
    in another way when it fuses it with something else: the barrier makes scores once, for α and for r. After it there
    are a sum, a maximum, differences and a product with one quotient, each rounded once; no product is added to, which
    might be fused.

    The counts are added one by one (a scatter). Together with all else here that takes 3 to 8 ns a token and expert on
    one CPU core. It was not measured on a GPU or TPU. TPUs scatter slowly: there a product of two one-hot matrices, for
    the high and the low digits of the bin, would give the same integers.
    """
    column = jnp.arange(logits.shape[-1])[None]
    scores = jax.lax.optimization_barrier(jax.nn.sigmoid(jax.lax.stop_gradient(logits).astype(jnp.float32)))
    bias = varying_like(bias.astype(jnp.float32), scores)
    free = ~jnp.any(chosen[:, :, None] == column[None], axis=1)
    best_free = jnp.max(jnp.where(free, scores + bias[None], -jnp.inf), axis=-1, keepdims=True)
    low, width = _grid(bias)
    required, per_width = jax.lax.optimization_barrier((best_free - scores, bins / width))
    bin_TC = jnp.clip(jnp.floor((required - low[None]) * per_width[None]).astype(jnp.int32), 0, bins - 1)
    index = jnp.where(counted[:, None], bin_TC + bins * column, bins * column.size)
    empty = varying_like(jnp.zeros(bins * column.size, jnp.int32), index)
    return empty.at[index.reshape(-1)].add(1, mode="drop").reshape(column.size, bins)


def update_bias(bias: Float[Array, "*L C"], counts: Int[Array, "*L C bins"], top_k: int) -> Float[Array, "*L C"]:
    """The bias at which each expert gets K/C of the tokens, from the histogram under the bias in force.

    It lies in the first bin at whose end q = K·T/C tokens are reached, between the two ends as if the bin's tokens were
    spread evenly: off by at most one bin. Then the mean over the experts is subtracted, on which no selection depends.
    Without a counted token the bias stays.

    Counts and q are compared as integers: float32 is exact up to 2²⁴, fewer tokens than a large batch has. q is kept as
    a whole number and C-ths, whose terms stay below T and K·C.
    """
    columns, bins = counts.shape[-2:]
    tokens = jnp.sum(counts[..., :1, :], axis=-1)  # every expert's histogram has all of them
    parts = tokens % columns * top_k
    whole, rest = tokens // columns * top_k + parts // columns, parts % columns
    upto = jnp.cumsum(counts, axis=-1)
    enough = upto >= (whole + (rest > 0))[..., None]
    first = jnp.argmax(enough, axis=-1)
    at_first = lambda x: jnp.take_along_axis(x, first[..., None], axis=-1)[..., 0]
    inside, before = at_first(counts), at_first(upto - counts)
    needed = (whole - before).astype(jnp.float32) + rest.astype(jnp.float32) / columns
    low, width = _grid(bias)
    new = low + (first + needed / jnp.maximum(inside, 1)) * (width / bins)
    new -= jnp.mean(new, axis=-1, keepdims=True)
    return jnp.where(tokens > 0, new, bias)
