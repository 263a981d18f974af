"""Learned scales of the residual stream, for `model.residual_scale`. Source: ZAYA1, arXiv:2605.05365, §II-A.

The form is that of the released weights: a bias is added before its scale is applied.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moe_jax.nn.layers import Init


class ResidualScale(nnx.Module):
    """The sum of a residual stream and a branch, each with a learned bias and scale; at first the plain sum."""

    def __init__(self, d_model: int, init: Init):
        self.stream_bias, self.branch_bias = (init.filled((d_model,), "norm", 0.0) for _ in range(2))
        self.stream_scale, self.branch_scale = (init.ones((d_model,), "norm") for _ in range(2))

    def __call__(self, x: Float[Array, "B S D"], y: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """(x + stream_bias) ⊙ stream_scale + (y + branch_bias) ⊙ branch_scale, computed in float32, in x's dtype."""
        with jax.named_scope("residual_scale"):
            stream = shifted(x, self.stream_bias[...], self.stream_scale[...])
            return (stream + shifted(y, self.branch_bias[...], self.branch_scale[...])).astype(x.dtype)


def shifted(x: Float[Array, "B S D"], bias: Float[Array, " D"], scale: Float[Array, " D"]) -> Float[Array, "B S D"]:
    """(x + bias) ⊙ scale, in float32."""
    bias, scale = (a.astype(jnp.float32)[None, None] for a in (bias, scale))
    return (x.astype(jnp.float32) + bias) * scale
