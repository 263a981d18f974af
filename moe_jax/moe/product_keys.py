"""Product-key memory: a token reads the few rows of a large table whose keys are nearest to its queries.

Source: arXiv:1907.05242; beside the feed-forward layer, arXiv:2010.03881. A head's query has two halves, and each half
n keys of its own. Row i·n + j has the score (first half · key i) + (second half · key j). The best of all n² rows are
among the pairs of the best of each half, so that 2·n scores are computed instead of n².

The paper norms queries over the batch. In a language model that would show a token what comes after it, and training
and evaluation would differ. Here each query has an RMSNorm instead.

Values lie on the devices of `fsdp` and `expert` by rows. Every device is sent the rows' numbers and weights of all
tokens of these axes and sums those rows that it holds; the sums are added up and sent back. Rows never move.

Letters: T tokens, t tokens of this device, D model width, U heads, n keys of a half, k size of a query, A rows that a
token reads (U · `top`), R rows of this device.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from moe_jax.config import MemoryConfig, ModelConfig
from moe_jax.nn.layers import Init, linear, rms_norm
from moe_jax.nn.remat import keep
from moe_jax.parallel import sharding
from moe_jax.parallel.axes import as_tuple, varying_like

CHUNK = 2**25  # numbers of the rows that are read at a time: T' · A · D for T' tokens


class ProductKeys(nnx.Module):
    """The memory of a block: queries, keys and values."""

    def __init__(self, model: ModelConfig, init: Init):
        cfg, d = model.memory, model.d_model
        self.cfg, self.eps = cfg, model.norm_eps
        self.w_query = init.normal((d, cfg.heads * cfg.key_dim), "embed mlp")
        self.b_query = init.filled((cfg.heads * cfg.key_dim,), "norm", 0.0)
        self.query_norm = init.ones((cfg.key_dim,), "norm")
        half = cfg.key_dim // 2
        # In float32, like routers: with rounded keys a token would read other rows.
        self.keys = init.as_float32().uniform((cfg.heads, 2, cfg.keys, half), "keys keys keys keys", half**-0.5)
        self.values = init.normal((cfg.rows, d), "memory value")  # as large as embeddings, as in the paper's code

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """Returns the sum of the heads' rows, each row times its weight."""
        with jax.named_scope("memory"):
            queries = keep(linear(x, self, "w_query"), "memory")  # with b_query
            keys, scale, values = self.keys[...], self.query_norm[...], self.values[...]
            if not sharding.current_sizes():
                return self._region(P(), queries, scale, keys, values)
            spec = jax.typeof(values).sharding.spec
            region = jax.shard_map(
                functools.partial(self._region, spec),
                in_specs=(sharding.BATCH, P(), P(), spec),
                out_specs=sharding.BATCH,
                check_vma=True,
            )
            return region(queries, scale, keys, values)

    def _region(self, spec: P, queries: Float[Array, "b S Uk"], scale, keys, values) -> Float[Array, "b S D"]:
        """The memory of one device's tokens. spec: where the rows of `values` lie."""
        q = queries.reshape(-1, self.cfg.heads, self.cfg.key_dim).astype(jnp.float32)
        q = rms_norm(q, varying_like(scale, q), self.eps)
        ids, weights = nearest_rows(q, varying_like(keys, q), self.cfg)
        y = look_up(values, ids, weights, as_tuple(spec[0]) if len(spec) else (), queries.dtype)
        return y.reshape(*queries.shape[:2], -1)


# --- which rows ------------------------------------------------------------------------------------------------------


def nearest_rows(
    q: Float[Array, "T U k"], keys: Float[Array, "U 2 n k/2"], cfg: MemoryConfig
) -> tuple[Int[Array, "T A"], Float[Array, "T A"]]:
    """The `top` rows of the largest scores of each head, and their weights, a softmax over a head's rows.

    Which rows those are has no gradient; queries and keys are trained through the weights. All is float32.
    """
    halves = q.reshape(*q.shape[:2], 2, -1)
    scores = jnp.einsum("tupk,upnk->tupn", halves, keys, precision=jax.lax.Precision.HIGHEST)
    best, index = jax.lax.top_k(jax.lax.stop_gradient(scores), cfg.top)
    # Of the pairs (a-th best, b-th best) one with (a + 1) · (b + 1) > top has as many before it that are no worse.
    a, b = np.array([(a, b) for a in range(cfg.top) for b in range(cfg.top // (a + 1))]).T
    _, pair = jax.lax.top_k(best[:, :, 0, a] + best[:, :, 1, b], cfg.top)
    pick = lambda from_, at: jnp.take_along_axis(from_, at, axis=-1)
    first, second = pick(index[:, :, 0, a], pair), pick(index[:, :, 1, b], pair)
    ids = keep(first * cfg.keys + second, "memory")
    score = pick(scores[:, :, 0], ids // cfg.keys) + pick(scores[:, :, 1], ids % cfg.keys)
    weights = jax.nn.softmax(keep(score, "memory"), axis=-1)
    return ids.reshape(len(q), -1), weights.reshape(len(q), -1)


# --- their sum -------------------------------------------------------------------------------------------------------


def look_up(
    values: Float[Array, "R D"], ids: Int[Array, "t A"], weights: Float[Array, "t A"], axes: tuple[str, ...], dtype
) -> Float[Array, "t D"]:
    """Σ weight · row over the rows of each token, in `dtype`. Rows are rounded to it, and summed in float32.

    axes: the mesh axes over which the rows lie, in order; (): every device has all of them.
    """
    values = varying_like(values, weights)  # marked here, so that its gradient is summed over replicas once
    if not axes:
        return sum_rows(values, ids, weights, dtype).astype(dtype)
    ids, weights = (jax.lax.all_gather(a, axes, axis=0, tiled=True) for a in (ids, weights))
    own = ids - jax.lax.axis_index(axes) * len(values)
    own = jnp.where((own >= 0) & (own < len(values)), own, len(values))  # a row past the last is none
    return _sum_and_scatter(sum_rows(values, own, weights, dtype), axes, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _sum_and_scatter(y: Float[Array, "T D"], axes: tuple[str, ...], dtype) -> Float[Array, "t D"]:
    """Sums over devices in float32, and scatters. The gradient is gathered in `dtype`."""
    return jax.lax.psum_scatter(y, axes, scatter_dimension=0, tiled=True).astype(dtype)


_sum_and_scatter.defvjp(
    lambda y, axes, dtype: (_sum_and_scatter(y, axes, dtype), None),
    lambda axes, dtype, _, dy: (jax.lax.all_gather(dy, axes, axis=0, tiled=True).astype(jnp.float32),),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def sum_rows(
    values: Float[Array, "R D"], ids: Int[Array, "T A"], weights: Float[Array, "T A"], dtype
) -> Float[Array, "T D"]:
    """Σ_a weights[a] · values[ids[a]] in float32, of rows rounded to `dtype`. An id of R is no row.

    Forward and backward go through the tokens in chunks, so that the rows of all tokens never exist together. The
    gradient of values adds up in float32, row by row.
    """

    def step(_, part):
        ids, weights = part
        return None, jnp.sum(_rows(values, ids, dtype) * weights[:, :, None], axis=1)

    _, y = jax.lax.scan(step, None, _chunks(values, ids, weights))
    return y.reshape(-1, values.shape[1])[: len(ids)]


def _sum_rows_backward(dtype, saved, dy):
    values, ids, weights = saved

    def step(d_values, part):
        ids, weights, dy = part
        d_weights = jnp.sum(_rows(values, ids, dtype) * dy[:, None, :], axis=2)
        return d_values.at[ids].add(weights[:, :, None] * dy[:, None, :], mode="drop"), d_weights

    zeros = varying_like(jnp.zeros(values.shape, jnp.float32), values, dy)
    d_values, d_weights = jax.lax.scan(step, zeros, _chunks(values, ids, weights, dy))
    return d_values.astype(values.dtype), None, d_weights.reshape(-1, ids.shape[1])[: len(ids)]


sum_rows.defvjp(lambda *args: (sum_rows(*args), args[:3]), _sum_rows_backward)


def _rows(values: Float[Array, "R D"], ids: Int[Array, "c A"], dtype) -> Float[Array, "c A D"]:
    """The rows of these ids, rounded to `dtype`, in float32; zeros for an id of R."""
    return values.at[ids].get(mode="fill", fill_value=0).astype(dtype).astype(jnp.float32)


def _chunks(values: Array, ids: Array, *more: Array) -> tuple[Array, ...]:
    """Splits `[T, …]` into chunks of tokens that read at most CHUNK numbers: `[chunks, c, …]`. Padding reads no row."""
    tokens = len(ids)
    count = -(-tokens * ids.shape[1] * values.shape[1] // CHUNK)
    size = -(-tokens // count)
    pad = lambda a, fill: jnp.pad(a, [(0, count * size - tokens), (0, 0)], constant_values=fill)
    return tuple(pad(a, fill).reshape(count, size, -1) for a, fill in ((ids, len(values)), *((a, 0) for a in more)))
