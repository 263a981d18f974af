"""Muon as an `optax.GradientTransformation`: orthogonalised momentum, RMS-matched, with decoupled weight decay.

Usable alone, in any optax chain: `optax.chain(optax.clip_by_global_norm(1.0), muon(3e-4))`. A leaf is a matrix or a
batch of matrices; each matrix is orthogonalised on its own (each expert of each layer of an `[L, E, D, F]` leaf).

On a mesh with Explicit axes the iteration contains no collective. Leaves whose matrices have one shape and are cut
alike form a group, which moves once: one all-to-all makes its matrices whole and spreads them evenly over the devices,
and one brings the results back. Where devices hold the same shards (`data` replicas), each computes a part of the
matrices, and one all-gather distributes the results. An all-reduce of one number a matrix finds cut matrices without a
gradient. plan.py gives the cost. Without a mesh, under Auto axes and inside a `shard_map`, each leaf is one batched
iteration on the matrices as they appear there. The result is the same, but under Auto axes the partitioner may put
collectives into the iteration.

Sources: Keller Jordan et al. 2024 (kellerjordan.github.io/posts/muon); arXiv:2502.16982, eqs. 1–4.
"""

import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from moe_jax.optim import newton_schulz
from moe_jax.optim.newton_schulz import AUTO, Coefficients
from moe_jax.optim.spread import Rule, layout, map_groups, one_matrix

Number = float | Array  # traced or not


class MuonState(NamedTuple):
    """The state of Muon."""

    momentum: optax.Updates  # sharded like the parameters


def muon(
    learning_rate: Number | optax.Schedule,
    *,
    weight_decay: Number | optax.Schedule = 0.1,
    cautious_decay: bool = False,
    momentum: Number = 0.95,
    nesterov: bool = True,
    coefficients: str | Coefficients = "jordan",
    scale: Literal["match_rms", "spectral"] = "match_rms",
    update_rms: Number = 0.2,
    dtype: Any = AUTO,
    matrices: Rule | None = None,
) -> optax.GradientTransformation:
    """Makes Muon: W ← W − η·(scale·O + λ·W), with M ← μ·M + G and O = Newton–Schulz(G + μ·M), or of M without Nesterov.

    Args:
        learning_rate: η, a number or an optax schedule.
        weight_decay: λ, decoupled, multiplied by η; a number or an optax schedule. With 0, `update` needs no params.
        cautious_decay: decays only the entries that the update shrinks as well (arXiv:2510.12402).

    The other arguments are those of `scale_by_muon`. `optax.inject_hyperparams(muon)` makes the numbers a part of the
    state; name `dtype` and `matrices` in its static_args if you pass them.
    """
    if isinstance(weight_decay, int | float) and weight_decay == 0:
        decay = optax.identity()
    else:
        decay = _cautious_decay(weight_decay) if cautious_decay else optax.add_decayed_weights(weight_decay)
    direction = scale_by_muon(
        momentum=momentum,
        nesterov=nesterov,
        coefficients=coefficients,
        scale=scale,
        update_rms=update_rms,
        dtype=dtype,
        matrices=matrices,
    )
    return optax.chain(direction, decay, optax.scale_by_learning_rate(learning_rate))


def scale_by_muon(
    *,
    momentum: Number = 0.95,
    nesterov: bool = True,
    coefficients: str | Coefficients = "jordan",
    scale: Literal["match_rms", "spectral"] = "match_rms",
    update_rms: Number = 0.2,
    dtype: Any = AUTO,
    matrices: Rule | None = None,
) -> optax.GradientTransformation:
    """Makes the direction of `muon`, scale·O, before weight decay and learning rate.

    It does not depend on the gradient's scale. A matrix whose gradient is all zeros in a step, like that of an expert
    without tokens, gets no update in that step; its momentum decays.

    Args:
        momentum: μ in [0, 1), in sum form.
        coefficients: a name in `newton_schulz.SETS`, or Coefficients.
        scale: "match_rms" is update_rms·√max(m, n): every matrix gets an update RMS of about `update_rms`, like that of
            AdamW, so one η and one λ serve both optimizers. "spectral" is √max(1, n/m) for m inputs and n outputs. They
            are those of one head where `matrices` cuts heads.
        dtype: of the iteration, and of the matrices that move between devices; "auto" is float16 on GPUs, bfloat16 on
            TPUs and float32 on CPUs (`newton_schulz.iteration_dtype`). The momentum has the parameter's dtype.
        matrices: a rule that gives the axes of a leaf that form its matrices, and raises ValueError for a leaf that it
            does not know. With None every leaf is one matrix.
    """
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r}: must be one of {', '.join(SCALES)}")
    if isinstance(dtype, jax.Array):
        raise ValueError("muon: dtype is not a schedule; name it in static_args of optax.inject_hyperparams")
    chosen = newton_schulz.coefficients(coefficients) if isinstance(coefficients, str) else coefficients
    factor = lambda shape: SCALES[scale](*shape) * (update_rms if scale == "match_rms" else 1.0)
    rule = matrices or one_matrix

    def init(params):
        layout(params, rule)
        return MuonState(jax.tree.map(jnp.zeros_like, params))

    def update(grads, state, params=None):
        del params
        m = jax.tree.map(lambda m, g: (momentum * m + g).astype(m.dtype), state.momentum, grads)
        direction = jax.tree.map(lambda m, g: (g + momentum * m).astype(g.dtype), m, grads) if nesterov else m
        own = newton_schulz.iteration_dtype(dtype)
        iterate = functools.partial(newton_schulz.orthogonalize, coefficients=chosen, dtype=own)
        # Matrices are normalised after they moved. Those of a type without the range of float32 are scaled before.
        narrow = jnp.finfo(own).maxexp < jnp.finfo(jnp.float32).maxexp
        moved = (lambda x: x) if narrow else (lambda x: x.astype(own))
        flat, tree = jax.tree.flatten(direction)
        gradients = jax.tree.leaves(grads)
        out: list = [None] * len(flat)
        groups = layout(direction, rule, len(chosen.steps), own)
        results = map_groups(groups, iterate, [moved(x) for x in flat], gradients, narrow)
        for leaf in (leaf for group in groups for leaf in group.leaves):
            x, o = flat[leaf.index], results[leaf.index]
            out[leaf.index] = (factor(leaf.matrix) * o.astype(jnp.float32)).astype(x.dtype)
        return jax.tree.unflatten(tree, out), MuonState(m)

    return optax.GradientTransformation(init, update)


SCALES = {  # functions of the inputs and outputs of one matrix
    "match_rms": lambda m, n: math.sqrt(max(m, n)),
    "spectral": lambda m, n: math.sqrt(max(1.0, n / m)),
}


def _cautious_decay(weight_decay: Number | optax.Schedule) -> optax.GradientTransformation:
    # An update u moves W by −η·u, so it shrinks the entries of W that have its sign.
    decay = optax.add_decayed_weights(weight_decay)
    shrunk = lambda u, w: jnp.where(u * w > 0, w, jnp.zeros_like(w)).astype(u.dtype)

    def update(updates, state, params=None):
        return decay.update(updates, state, None if params is None else jax.tree.map(shrunk, updates, params))

    return optax.GradientTransformation(decay.init, update)
