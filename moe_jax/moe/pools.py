"""Document pools: all tokens of a document choose from the experts that the document as a whole prefers.

In each layer the pool of a document is its d experts with the largest router probabilities, summed over its tokens. No
gradient passes through the choice. Outside the pool a token's logits are −∞, and scores, the choice, and the losses of
routers see these logits. Source: EMO, arXiv:2605.06663, §3.2, in the form of its released training code. OLMo-core has
another form, which is not here: its scores and losses are those of all experts, and only the choice is limited.

In training d is a random number for each document and layer. A pool of all experts is the plain router, bit for bit.

Letters: B sequences, S tokens of one, T tokens of all of them, C router columns, which are the experts.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_jax.config import MoEConfig
from moe_jax.moe.routing import STREAMS, Facts, Knobs, exclude, force, mask, score
from moe_jax.parallel.axes import varying_like


class Documents(NamedTuple):
    """The documents that tokens belong to, where routers take pools of them."""

    number: Int[Array, "B S"]  # of the document in its sequence, where its tokens follow each other
    given: Bool[Array, "B S"] | None = None  # whether the pool is taken from the token; None: from all


def documents_of(
    cfg: MoEConfig, number: Int[Array, "B S"], position: Int[Array, "B S"], training: bool
) -> Documents | None:
    """The documents of a batch; None where routers take no pools.

    number, position: the document of each token, and the token's place in it. A document that is cut by the end of a
    row is two: no row knows the others, and so the batch can be split anywhere. Attention across documents
    (`model.segment_mask=False`) does not join them.
    """
    if not cfg.pool_min or not (training or cfg.takes_pools):
        return None
    from_prefix = not training and cfg.pool_from == "prefix"
    return Documents(number, position < cfg.pool_prefix if from_prefix else None)


def document_pools(
    logits: Float[Array, "T C"], documents: Documents, facts: Facts, cfg: MoEConfig, knobs: Knobs | None
) -> Bool[Array, "T C"]:
    """Whether each expert is in the pool of the token's document. Between equal sums the lower id is taken.

    Experts that are switched off come last, and those that are switched on first.

    documents: their arrays have the shape `[T]` here. knobs: of the layer, in training, where `facts.index` has the
    number of each token in the optimizer batch; None: pools have `cfg.pool_size` experts.
    """
    tokens, columns = logits.shape
    _, probs = score(mask(jax.lax.stop_gradient(logits), facts), cfg)
    seen = facts.counted if documents.given is None else facts.counted & documents.given
    length = tokens // facts.sequences
    by_row = lambda a: a.reshape(facts.sequences, length, *a.shape[1:])
    sums = sum_by_document(by_row(jnp.where(seen[:, None], probs, 0.0)), by_row(documents.number))
    ranked = force(exclude(sums.reshape(tokens, columns), facts), facts)
    place = jnp.argsort(jnp.argsort(-ranked, axis=-1, stable=True), axis=-1)  # of each expert, from the best
    return place < _sizes(documents.number, facts.index, length, columns, cfg, knobs)


def sum_by_document(values: Float[Array, "B S C"], number: Int[Array, "B S"]) -> Float[Array, "B S C"]:
    """The sum over each token's document, in an order of additions that does not depend on other documents' values.

    A running sum that starts anew at each document: a difference of running sums would lose digits, and adding by
    number is a scatter, whose order is not fixed on GPUs.
    """
    length = number.shape[1]
    change = number[:, 1:] != number[:, :-1]
    edge = varying_like(jnp.ones((number.shape[0], 1), bool), number)
    first, last = jnp.concatenate([edge, change], axis=1), jnp.concatenate([change, edge], axis=1)

    def join(left, right):
        (a, _), (b, begins) = left, right
        return jnp.where(begins[:, :, None], b, a + b), left[1] | begins

    running, _ = jax.lax.associative_scan(join, (values, first), axis=1)
    at = jnp.where(last, jnp.arange(length)[None, :], length)
    ends = jax.lax.cummin(at, axis=1, reverse=True)  # place of the last token of each token's document
    return jnp.take_along_axis(running, ends[:, :, None], axis=1)


def confine(logits: Float[Array, "T C"], pool: Bool[Array, "T C"]) -> Float[Array, "T C"]:
    """Sets the logits of experts outside the pool to −∞."""
    return jnp.where(pool, logits.astype(jnp.float32), -jnp.inf)


def _sizes(
    number: Int[Array, " T"], index: Int[Array, " T"] | None, length: int, columns: int, cfg: MoEConfig,
    knobs: Knobs | None,
) -> Int[Array, "T 1"] | int:  # fmt: skip
    """The number of experts in each token's pool, in training drawn from a key of the step, the layer, the row of the
    batch and the document in it: the same on every mesh, in any number of micro-batches, and when computed again."""
    if knobs is None:
        return cfg.pool_size
    low, high = cfg.pool_min, cfg.pool_max or columns
    key = jax.random.fold_in(knobs.key, STREAMS.index("pool"))

    def draw(row, document):
        own = jax.random.fold_in(jax.random.fold_in(key, row), document)
        return jax.random.randint(own, (), low, high + 1)

    return jax.vmap(draw)(index // length, number)[:, None]
