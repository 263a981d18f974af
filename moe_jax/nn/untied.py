"""Weights that each label of tokens has of its own: products and norms of them (`model.untie`).

A leaf has a leading axis of labels. A product sorts a device's tokens by label and multiplies each group by its own
matrix: as many FLOPs as with one matrix for all. Tokens are moved into that order and back for each product, and norms
have a scale of each token. Source: Mixture-of-Transformers, arXiv:2411.04996, §2.

Letters: B sequences, S tokens of one, Y labels, D inputs, F outputs; b sequences of one device, T = b · S its tokens.
"""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from moe_jax.kernels import grouped_matmul
from moe_jax.kernels.rows import permute
from moe_jax.nn.layers import weight
from moe_jax.parallel import sharding
from moe_jax.parallel.axes import varying_like


class ByLabel(NamedTuple):
    """The labels of tokens, and the order by label of each device's own tokens."""

    label: Int[Array, "B S"]
    row: Int[Array, "B S"]  # place of each token in that order, from 0 to T − 1 on each device
    token: Int[Array, "B S"]  # the inverse: the token at each place
    sizes: Int[Array, "devices Y"]  # tokens of each label


def sort(label: Int[Array, "B S"], labels: int) -> ByLabel:
    """Sorts the tokens of each device by label. Tokens of a label stay in their order."""

    def local(label):
        flat = label.reshape(-1)
        token = jnp.argsort(flat, stable=True).astype(jnp.int32)
        row = jnp.argsort(token).astype(jnp.int32)
        sizes = jnp.sum(flat[:, None] == jnp.arange(labels)[None, :], axis=0, dtype=jnp.int32)
        return row.reshape(label.shape), token.reshape(label.shape), sizes[None]

    return ByLabel(label, *sharding.per_device(local, 1)(label))


def linear(
    x: Float[Array, "B S D"], layer: nnx.Module, names: tuple[str, ...], by: ByLabel, backend: str
) -> tuple[Float[Array, "B S F"], ...]:
    """x times the matrix `[Y, D, F]` of each name in a layer, for each token that of its label.

    backend: of the grouped matmul.
    """
    ws = tuple(weight(getattr(layer, name), x.dtype) for name in names)

    def local(x, row, token, sizes, *ws):
        row, token = row.reshape(-1), token.reshape(-1)
        rows = permute(x.reshape(-1, x.shape[-1]), token, row)
        products = (grouped_matmul(rows, varying_like(w, x), sizes[0], backend) for w in ws)
        return tuple(permute(y, row, token).reshape(*x.shape[:2], -1) for y in products)

    return sharding.per_device(local, 4, len(ws))(x, by.row, by.token, by.sizes, *ws)


def own(w: Float[Array, "Y D"], by: ByLabel) -> Float[Array, "B S D"]:
    """The vector of each token's label. A gather's gradient would be a scatter: slow on GPUs, in no fixed order."""
    pick = lambda m: jnp.where((by.label == m)[:, :, None], w[m][None, None, :], 0)
    return sum(map(pick, range(w.shape[0])))
