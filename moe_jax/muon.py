"""Muon as an `optax.GradientTransformation`: orthogonalised momentum, RMS-matched, with decoupled weight decay.

Usable alone: `optax.chain(optax.clip_by_global_norm(1.0), muon(3e-4))`. A leaf is a matrix or a batch of matrices; each
matrix is orthogonalised on its own (each expert of each layer of an `[L, E, D, F]` leaf).

Sources: Keller Jordan et al. 2024 (kellerjordan.github.io/posts/muon); arXiv:2502.16982, eqs. 1–4.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

JORDAN = (3.4445, -4.7750, 2.0315)


def last_two_axes(path: str, leaf: Any) -> tuple[int, int]:
    """The default rule: a 2-D leaf is one matrix. A leaf of any other rank needs a rule of its own."""
    if leaf.ndim != 2:
        raise ValueError(f"muon: no rule says which axes of {path} {leaf.shape} form a matrix; pass `matrix_axes`")
    return (-2, -1)


class MuonState(NamedTuple):
    momentum: optax.Updates


def muon(
    learning_rate: float | Callable[[Array], Array],
    *,
    momentum: float = 0.95,
    nesterov: bool = True,
    weight_decay: float = 0.1,
    update_rms: float = 0.2,
    steps: int = 5,
    dtype: Any = jnp.bfloat16,
    matrix_axes: Callable[[str, Any], tuple[int, int]] = last_two_axes,
) -> optax.GradientTransformation:
    """W ← W − η·(update_rms·√max(m, n)·O + λ·W), O = Newton–Schulz(G + μ·M) or (M) without Nesterov, M ← μ·M + G.

    Args:
        learning_rate: η, a number or an optax schedule. The factor update_rms·√max(m, n) gives every matrix an update
            RMS of about `update_rms`, that of AdamW, so AdamW's η and λ carry over.
        momentum: μ in [0, 1), in sum form.
        weight_decay: λ, decoupled, multiplied by η.
        steps: Newton–Schulz steps with Jordan's quintic; singular values end in about [0.7, 1.2].
        dtype: of the iteration. The momentum stays in the gradient's dtype.
        matrix_axes: (path, leaf) → the two axes of the leaf that form a matrix; all others are batch axes. Raise
            ValueError for a leaf of unknown geometry.
    """
    scale = scale_by_muon(momentum, nesterov, update_rms, steps, dtype, matrix_axes)
    return optax.chain(scale, optax.add_decayed_weights(weight_decay), optax.scale_by_learning_rate(learning_rate))


def scale_by_muon(momentum, nesterov, update_rms, steps, dtype, matrix_axes) -> optax.GradientTransformation:
    """The direction of `muon`: before weight decay and learning rate."""

    def init(params):
        jax.tree_util.tree_map_with_path(lambda path, p: matrix_axes(jax.tree_util.keystr(path), p), params)
        return MuonState(jax.tree.map(jnp.zeros_like, params))

    def update(grads, state, params=None):
        del params
        m = jax.tree.map(lambda m, g: momentum * m + g, state.momentum, grads)
        direction = jax.tree.map(lambda m, g: g + momentum * m, m, grads) if nesterov else m

        def one(path, x):
            axes = matrix_axes(jax.tree_util.keystr(path), x)
            matrices = jnp.moveaxis(x, axes, (-2, -1))
            factor = update_rms * math.sqrt(max(matrices.shape[-2:]))
            o = spread_over_mesh(functools.partial(orthogonalize, steps=steps, dtype=dtype), matrices)
            return jnp.moveaxis(factor * o.astype(x.dtype), (-2, -1), axes)

        return jax.tree_util.tree_map_with_path(one, direction), MuonState(m)

    return optax.GradientTransformation(init, update)


def orthogonalize(x: Float[Array, "*L m n"], steps: int = 5, dtype: Any = jnp.bfloat16) -> Float[Array, "*L m n"]:
    """U·Vᵀ of each matrix, approximately: quintic Newton–Schulz from X / ‖X‖_F. A zero matrix stays zero.

    X ← a·X + (b·A + c·A²)·X with A = X·Xᵀ, on the side where A is smaller. Source: arXiv:2502.16982, eq. 2.
    """
    tall = x.shape[-2] > x.shape[-1]
    norm = jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=(-2, -1), keepdims=True))
    y = (x / (norm + 1e-7)).astype(dtype)
    # HIGHEST matters for float32 only: accelerators would otherwise multiply in tf32 or bf16.
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)

    def step(y, coefficients):
        a, b, c = coefficients  # float32: rounded to bf16, 3.4445 is 3.4375 and the error of the result doubles
        gram = product("...mk,...nk->...mn", y, y)
        polynomial = (b * gram + c * product("...mk,...kn->...mn", gram, gram)).astype(dtype)
        return (a * y + product("...mk,...kn->...mn", polynomial, y)).astype(dtype), None

    coefficients = jnp.tile(jnp.asarray(JORDAN, jnp.float32), (steps, 1))
    y, _ = jax.lax.scan(step, jnp.swapaxes(y, -2, -1) if tall else y, coefficients)
    return jnp.swapaxes(y, -2, -1) if tall else y


def spread_over_mesh(fn: Callable[[Array], Array], x: Float[Array, "*L m n"]) -> Float[Array, "*L m n"]:
    """fn(x) with every matrix whole on one device: one reshard in, one out, no collective in between.

    The batch axes are spread over the mesh axes that divide them; a mesh axis that divides none repeats the work.
    """
    sharding = jax.typeof(x).sharding
    sizes = dict(sharding.mesh.shape)
    if not sizes:
        return fn(x)
    old = [*sharding.spec, *[None] * (x.ndim - len(sharding.spec))]
    as_tuple = lambda names: () if names is None else names if isinstance(names, tuple) else (names,)
    new = [as_tuple(names) for names in old[:-2]]
    used = {name for names in new for name in names}
    # First the axes that cut the matrices (moving them is an all-to-all), then idle ones such as `data`.
    cutting = [name for names in old[-2:] for name in as_tuple(names)]
    for name in dict.fromkeys([*cutting, *sizes]):
        for i, names in enumerate(new):
            parts = math.prod(sizes[n] for n in names) * sizes[name]
            if name not in used and x.shape[i] % parts == 0:
                new[i] = (*names, name)
                used.add(name)
    y = fn(jax.sharding.reshard(x, PartitionSpec(*[n or None for n in new], None, None)))
    return jax.sharding.reshard(y, PartitionSpec(*old))
