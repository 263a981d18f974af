"""Initialisers, RMSNorm, activations, and the dense feed-forward layer. Axis letters: CONTRIBUTING.md."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from moe_jax.nn.remat import keep
from moe_jax.parallel import sharding


class Keys:
    """The keys of `nnx.Rngs(params=key)`, one after another, counted in Python.

    `nnx.Rngs` counts in an array. While JAX traces, each count makes it print the program so far, into an error message
    that nobody sees.
    """

    def __init__(self, key: Array):
        self._key, self._count = key, 0

    def params(self) -> Array:
        """Returns the next key."""
        self._count += 1
        return jax.random.fold_in(self._key, self._count - 1)


class Init:
    """Declares weights: value, shape and logical axes on one line. They are created sharded when a mesh is set.

    With `layers=L` every weight gets a leading axis `[L]`, over which `jax.lax.scan` runs.
    Values are drawn in float32 and rounded to `dtype`.
    """

    def __init__(
        self, rngs: nnx.Rngs | Keys, std: float, layers: int | None = None, dtype: Any = jnp.float32, labels: int = 1
    ):
        self.rngs, self.std, self.layers, self.dtype, self.labels = rngs, std, layers, jnp.dtype(dtype), labels

    def stack(self, layers: int) -> "Init":
        """Returns an `Init` for a stack of `layers` layers."""
        return Init(self.rngs, self.std, layers, self.dtype)

    def by_label(self, labels: int) -> "Init":
        """Returns an `Init` whose weights have an axis of labels before their own, if there are several."""
        return Init(self.rngs, self.std, self.layers, self.dtype, labels)

    def as_float32(self) -> "Init":
        """Returns an `Init` whose weights are float32."""
        return Init(self.rngs, self.std, self.layers)

    def _axes(self, shape: tuple[int, ...], axes: str) -> tuple[tuple[int, ...], tuple[str, ...], PartitionSpec | None]:
        names = tuple(axes.split())
        if self.labels > 1:
            shape, names = (self.labels, *shape), ("labels", *names)
        if self.layers is not None:
            shape, names = (self.layers, *shape), ("layers", *names)
        sizes = sharding.current_sizes()
        return shape, names, sharding.weight_spec(names, shape, sizes) if sizes else None

    def normal(self, shape: tuple[int, ...], axes: str, std: float | None = None) -> nnx.Param:
        """Draws from a normal distribution of standard deviation `std` (default `init_std`), cut off at 3 of them."""
        shape, names, spec = self._axes(shape, axes)
        x = _normal(self.rngs.params(), self.std if std is None else std, shape, spec, self.dtype)
        return nnx.Param(x, axes=names)

    def uniform(self, shape: tuple[int, ...], axes: str, limit: float) -> nnx.Param:
        """Draws from the uniform distribution between −limit and limit."""
        shape, names, spec = self._axes(shape, axes)
        x = jax.random.uniform(self.rngs.params(), shape, jnp.float32, -limit, limit, out_sharding=spec)
        return nnx.Param(x.astype(self.dtype), axes=names)

    def ones(self, shape: tuple[int, ...], axes: str) -> nnx.Param:
        """Makes a weight of ones, for the scale of a norm."""
        return self.filled(shape, axes, 1.0)

    def filled(self, shape: tuple[int, ...], axes: str, value: float) -> nnx.Param:
        """Makes a weight whose entries are all `value`."""
        shape, names, spec = self._axes(shape, axes)
        return nnx.Param(jnp.full(shape, value, self.dtype, out_sharding=spec), axes=names)

    def zeros(self, shape: tuple[int, ...]) -> Array:
        """Makes a replicated array that is not a weight: it has no axes, and no optimizer updates it."""
        return jnp.zeros(self._axes(shape, " ".join(["norm"] * len(shape)))[0], jnp.float32)

    def drawn(self, draw: Callable[[Array], Array]) -> Array:
        """Makes a replicated array that is not a weight by draw(key), with a key of its own for each layer."""
        if self.layers is None:
            return draw(self.rngs.params())
        return jax.vmap(draw)(jax.random.split(self.rngs.params(), self.layers))


@functools.partial(jax.jit, static_argnums=(2, 3, 4))  # compiled once per shape, not once per weight
def _normal(key, std, shape, spec, dtype):
    return (std * jax.random.truncated_normal(key, -3.0, 3.0, shape, jnp.float32, out_sharding=spec)).astype(dtype)


def weight(w: nnx.Param | Array, dtype) -> Array:
    """A weight as it enters a matmul: cast first, so that the gather over the mesh moves the smaller type."""
    return sharding.replicate(w[...].astype(dtype))


def linear(x: Float[Array, "B S D"], layer: nnx.Module, name: str) -> Float[Array, "B S F"]:
    """x times the matrix of this name in a layer, with its adapter (lora.py) and its bias where it has them.

    The bias of `w_q` is `b_q`.
    """
    y, adapter = x @ weight(getattr(layer, name), x.dtype), getattr(layer, f"{name}_adapter", None)
    y = y if adapter is None else y + adapter(x)
    bias = getattr(layer, f"b_{name.removeprefix('w_')}", None)
    return y if bias is None else y + bias[...].astype(x.dtype)[None, None]


def rms_norm(x: Float[Array, "*B D"], scale: Float[Array, "*b D"], eps: float) -> Float[Array, "*B D"]:
    """x / √(mean x² + eps) · scale, computed in float32. Source: arXiv:1910.07467, eq. 4.

    scale: `[D]`, or an array that is broadcast to the shape of x.
    """
    with jax.named_scope("norm"):
        x32 = x.astype(jnp.float32)
        y = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
        scale = scale.astype(jnp.float32)
        scale = scale.reshape((1,) * (x.ndim - 1) + (-1,)) if scale.ndim == 1 else scale
        return (y * scale).astype(x.dtype)


def times(x: Array, factor: float) -> Array:
    """x · factor, computed in float32, in x's dtype. A factor of 1 is no operation."""
    return x if factor == 1 else (x.astype(jnp.float32) * factor).astype(x.dtype)


def unit_rows(w: Float[Array, "V D"]) -> Float[Array, "V D"]:
    """Divides each row by its length, in float32. A row of zeros stays zero."""
    w = w.astype(jnp.float32)
    return w * jax.lax.rsqrt(jnp.sum(jnp.square(w), axis=-1, keepdims=True) + 1e-12)


class Activation(NamedTuple):
    """The activation of a feed-forward layer."""

    gated: bool  # whether there is a matrix w_gate
    hidden: Callable[[Array | None, Array], Array]  # (x · w_gate or None, x · w_up) → the input of w_down


# Values of `model.activation`, for dense layers and experts.
ACTIVATIONS = {
    "swiglu": Activation(True, lambda gate, up: jax.nn.silu(gate) * up),  # arXiv:2002.05202
    "gelu": Activation(False, lambda gate, up: jax.nn.gelu(up)),  # arXiv:1606.08415, its form with tanh
    "relu2": Activation(False, lambda gate, up: jnp.square(jax.nn.relu(up))),  # squared ReLU, arXiv:2109.08668
}


class GLU(nnx.Module):
    """The feed-forward layer hidden(x · w_gate, x · w_up) · w_down: a gated linear unit, or an MLP without a gate."""

    def __init__(self, d_model: int, d_ff: int, init: Init, out_std: float, activation: str = "swiglu"):
        self.activation = ACTIVATIONS[activation]
        self.w_gate = init.normal((d_model, d_ff), "embed mlp") if self.activation.gated else None
        self.w_up = init.normal((d_model, d_ff), "embed mlp")
        self.w_down = init.normal((d_ff, d_model), "mlp embed", out_std)

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        gate = keep(linear(x, self, "w_gate"), "gate") if self.activation.gated else None
        up = keep(linear(x, self, "w_up"), "up")
        return linear(self.activation.hidden(gate, up), self, "w_down")
