"""Balance of calibration: no expert reads far more tokens than its share, and none is left with too few.

EAQuant, arXiv:2506.13329, in one pass: its released code lets an expert keep twice its share of tokens, calibrates each
on its own, and those that no token chose on whole sequences. Here an expert that is starved, not only one that nobody
chose, reads tokens of others too. Which rows count does not depend on the mesh.

Letters: T tokens, S tokens of a sequence, K slots of a token, E experts.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe_jax.moe.routing import Routing
from moe_jax.parallel.axes import varying_like

MOST = 2.0  # of an equal share of all assignments: the tokens that an expert keeps; the released run's
LEAST = 0.1  # of an equal share: an expert with fewer is starved


def balanced(routing: Routing, counted: Bool[Array, " T"], seq_len: int, counts: Float[Array, " E"] | None) -> Routing:
    """The routing whose rows calibration takes, with one slot more a token: `taps.Slots`.

    counts: the tokens of each expert in all of the calibration; None: unchanged, for the pass that counts them.
    The added slot names one of the starved experts, in turns along a sequence, so that n of them read every n-th token
    besides their own. It has the weight 1.
    """
    if counts is None:
        return routing
    share = jnp.sum(counts) / counts.shape[0]
    kept = evenly_spread(routing, seq_len, jnp.minimum(1.0, MOST * share / jnp.maximum(counts, 1.0)))
    starved = counts < LEAST * share
    turn = varying_like(jnp.arange(routing.experts.shape[0]), routing.experts) % seq_len
    extra = jnp.argsort(~starved, stable=True)[turn % jnp.maximum(jnp.sum(starved), 1)][:, None]
    already = jnp.any(routing.valid & (routing.experts == extra), axis=1)
    add = counted & ~already & jnp.any(starved)
    join = lambda a, b: jnp.concatenate([a, b.astype(a.dtype)], axis=1)
    ones = jnp.ones_like(routing.weights[:, :1])
    return Routing(join(routing.experts, extra), join(routing.weights, ones), join(kept, add[:, None]))


def evenly_spread(routing: Routing, seq_len: int, ratio: Float[Array, " E"]) -> Bool[Array, "T K"]:
    """The slots that are kept: of the n rows that a sequence gives an expert ⌊ratio · n⌋, evenly spread over them."""
    experts = jnp.arange(ratio.shape[0])[None, None, :]
    mine = routing.valid[:, :, None] & (routing.experts[:, :, None] == experts)  # T K E
    rows = jnp.any(mine, axis=1).reshape(-1, seq_len, ratio.shape[0])
    number = jnp.cumsum(rows, axis=1)  # of this row among the expert's in its sequence, from 1
    # 1e-4 is less than any fraction that matters, and more than the rounding of ratio · number.
    steps = lambda n: jnp.floor(ratio[None, None, :] * n + 1e-4)
    take = (steps(number) > steps(number - 1)).reshape(-1, ratio.shape[0])
    return jnp.any(mine & take[:, None, :], axis=2)
