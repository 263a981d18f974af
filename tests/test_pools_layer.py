"""Document pools in one layer: against a loop over documents in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import special

from moe_jax import config
from moe_jax.config import MoEConfig
from moe_jax.config.layers import Kind
from moe_jax.errors import ConfigError
from moe_jax.moe import pools
from moe_jax.moe.layer import MoE, TokenInfo
from moe_jax.moe.pools import Documents
from moe_jax.moe.program import Program
from moe_jax.moe.router_losses import load_balancing_loss, router_z
from moe_jax.moe.routing import Facts, Knobs, route
from moe_jax.moe.stats import router_stats
from moe_jax.nn.layers import Init

B, S, C, K = 3, 10, 8, 2
# Documents of rows, with padding (0): several, one, and some of one token.
NUMBER = np.int32([[1, 1, 1, 2, 2, 2, 2, 3, 3, 3], [1] * 10, [1, 2, 2, 2, 3, 3, 0, 0, 0, 0]])
COUNTED = NUMBER > 0
INDEX = jnp.arange(B * S)
POOLED = MoEConfig(num_experts=C, top_k=K, pool_min=3, pool_max=5, pool_from="document", pool_size=4)


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


@functools.partial(jax.jit, static_argnums=(3, 4))
def found_in(logits, number, given, cfg, rows, index, knobs, counted=None):
    facts = Facts(number > 0 if counted is None else counted, index, sequences=rows)
    return pools.document_pools(logits, Documents(number, given), facts, cfg, knobs)


def pools_by(cfg, logits, number=NUMBER, knobs=None, index=INDEX, given=None, counted=None):
    """`document_pools` of rows `[B, S, C]`."""
    flat = lambda a: None if a is None else jnp.asarray(a).reshape(-1, *np.shape(a)[2:])
    found = found_in(flat(logits), flat(number), flat(given), cfg, len(number), index, knobs, flat(counted))
    return np.asarray(found).reshape(logits.shape)


def loop(logits, pool_of, score="softmax", renormalize=False):
    """Weights `[B, S, C]`, load-balancing loss and z-loss, in float64, document by document.

    pool_of: (row, document) → its experts. Outside of them an expert has no part in any sum.
    """
    weights, load, prob, z = np.zeros((B, S, C)), np.zeros(C), np.zeros(C), 0.0
    for row in range(B):
        for document in sorted(set(NUMBER[row]) - {0}):
            pool = pool_of(row, document)
            for s in np.flatnonzero(NUMBER[row] == document):
                own = np.float64(logits[row, s, pool])
                scores = special.softmax(own) if score == "softmax" else special.expit(own)
                best = np.argsort(-scores, kind="stable")[:K]
                share = scores[best] / scores[best].sum() if renormalize else scores[best]
                weights[row, s, pool[best]] = share
                load[pool[best]] += 1
                prob[pool] += scores / scores.sum()
                z += special.logsumexp(own) ** 2
    return weights, C * (load / load.sum()) @ (prob / COUNTED.sum()), z


def preferred(logits, size, score):
    """(row, document) → the `size` experts that the sum of its tokens' probabilities prefers, in ascending order."""

    def pool_of(row, document):
        own = np.float64(logits[row, NUMBER[row] == document])
        scores = special.softmax(own, -1) if score == "softmax" else special.expit(own)
        sums = (scores / scores.sum(-1, keepdims=True)).sum(0)
        return np.sort(np.argsort(-sums, kind="stable")[:size])

    return pool_of


@pytest.mark.parametrize(("score", "renormalize"), [("softmax", False), ("sigmoid", True)])
def test_weights_losses_and_gradients_are_those_of_a_loop(score, renormalize):
    """Gradients by central differences of the loop with its pools held: none passes through the choice of a pool, and
    none reaches a logit outside of it."""
    cfg = dataclasses.replace(POOLED, score=score, renormalize=renormalize)
    logits, cotangent = normal(B, S, C), normal(B, S, C, seed=1)
    pool_of = preferred(logits, cfg.pool_size, score)

    @jax.jit
    def value(logits):
        flat = logits.reshape(-1, C)
        counted = jnp.asarray(COUNTED.ravel())
        documents, facts = Documents(jnp.asarray(NUMBER.ravel())), Facts(counted, sequences=B)
        pool = pools.document_pools(flat, documents, facts, cfg, None)
        confined = pools.confine(flat, pool)
        routing, probs = route(confined, None, Facts(counted, pool=pool), cfg)
        one_hot = jax.nn.one_hot(routing.experts, C) * (routing.weights * routing.valid)[..., None]
        weights = one_hot.sum(1).reshape(logits.shape)
        stats = router_stats(confined, probs, routing, routing.valid, counted, jnp.zeros(len(flat), int), 1)
        losses = load_balancing_loss(stats), router_z(stats)
        return (weights * cotangent).sum() + losses[0] + losses[1], (weights, losses)

    def by_hand(logits):
        weights, balance, z = loop(logits, pool_of, score, renormalize)
        return (weights * cotangent).sum() + balance + z

    (_, (weights, losses)), grad = jax.value_and_grad(value, has_aux=True)(jnp.asarray(logits))
    want = loop(logits, pool_of, score, renormalize)
    np.testing.assert_allclose(weights, want[0], rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(losses, want[1:], rtol=2e-5)
    inside = np.zeros((B, S, C), bool)
    for row, s in np.argwhere(COUNTED):
        inside[row, s, pool_of(row, NUMBER[row, s])] = True
    assert (np.asarray(grad)[~inside] == 0).all() and (np.abs(grad)[inside] > 0).all()
    for at in list(map(tuple, np.argwhere(inside)))[::7]:
        ends = []
        for sign in (1, -1):
            moved = np.float64(logits)
            moved[at] += sign * 1e-6
            ends.append(by_hand(moved))
        np.testing.assert_allclose(grad[at], (ends[0] - ends[1]) / 2e-6, rtol=2e-3, atol=2e-3)


def test_a_layer_is_the_loop():
    """Its result, its losses, and the pool that it hands on: that of the last document of each sequence."""
    model = config.ModelConfig(d_model=6, moe=dataclasses.replace(POOLED, d_expert=4, num_shared_experts=0))
    layer = MoE(model, Kind("moe", C), Init(nnx.Rngs(0), 1.0), 1.0, Program())
    graph, state = nnx.split(layer)
    x, info = normal(B, S, 6), TokenInfo(COUNTED, np.zeros((B, S), np.int32), documents=Documents(NUMBER))
    before = np.zeros((B, C), bool)
    run = jax.jit(lambda x, info: nnx.merge(graph, state)(x, info, pool=before))
    out = run(x, info)
    w = {name: np.float64(getattr(layer, f"w_{name}")[...]) for name in ("router", "gate", "up", "down")}
    logits = x @ w["router"]
    pool_of = preferred(logits, POOLED.pool_size, "softmax")
    weights, balance, z = loop(logits, pool_of)
    gate = np.einsum("bsd,edf->bsef", x, w["gate"])
    hidden = gate * special.expit(gate) * np.einsum("bsd,edf->bsef", x, w["up"])
    want = np.einsum("bse,bsef,efd->bsd", weights, hidden, w["down"])
    np.testing.assert_allclose(np.where(COUNTED[..., None], out.y, 0), want, rtol=2e-4, atol=1e-5)
    np.testing.assert_allclose((load_balancing_loss(out.stats), router_z(out.stats)), (balance, z), rtol=2e-5)
    for row, document in ((0, 3), (1, 1)):
        np.testing.assert_array_equal(np.flatnonzero(out.pool[row]), pool_of(row, document))


def test_packed_documents_are_those_alone_in_any_order():
    """A document has the pool that it has in a row of its own, whatever stands beside it."""
    logits = normal(B, S, C)
    packed = pools_by(POOLED, logits)
    assert (packed.sum(-1) == 4).all()
    number, alone = np.zeros((B, S), np.int32), normal(B, S, C, seed=2)
    documents = [NUMBER[row] == document for row, document in ((0, 1), (0, 2), (2, 2))]
    for i, (row, own) in enumerate(zip((0, 0, 2), documents, strict=True)):
        number[i, : own.sum()], alone[i, : own.sum()] = 1, logits[row, own]
    found = pools_by(POOLED, alone, number)
    for i, (row, own) in enumerate(zip((0, 0, 2), documents, strict=True)):
        np.testing.assert_array_equal(found[i, : own.sum()], packed[row, own])
    order = np.concatenate([np.flatnonzero(NUMBER[0] == d) for d in (3, 1, 2)])
    turned = pools_by(POOLED, logits[:, order], NUMBER[:, order])
    np.testing.assert_array_equal(turned[0], packed[0, order])


def test_a_prefix_gives_the_pool():
    """Tokens after it, and padding, have no part in it; a running sum over many tokens loses nothing."""
    logits = normal(B, S, C)
    given = np.cumsum(np.ones((B, S), int), 1) <= 2  # the first two tokens of each row's first document
    found = pools_by(POOLED, logits, given=given)
    later = np.where(given[:, :, None], logits, normal(B, S, C, seed=3))
    np.testing.assert_array_equal(found[:, 0], pools_by(POOLED, later, given=given)[:, 0])
    assert (found[:, 0] != pools_by(POOLED, logits)[:, 0]).any()
    ones, counted = np.ones((B, S), np.int32), np.arange(S)[None] < np.array([[4], [7], [1]])  # padding of one text
    padded = np.where(counted[:, :, None], logits, 9 * normal(B, S, C, seed=4))
    for given in (None, ones > 0):
        own = [pools_by(POOLED, logits, ones, given=given, counted=counted), pools_by(POOLED, padded, ones,
               given=given, counted=counted)]  # fmt: skip
        np.testing.assert_array_equal(own[0][counted], own[1][counted])
    number = np.repeat(np.int32([1, 2, 3]), [3000, 1, 1000])[None]
    values = np.random.default_rng(0).random((1, 4001, 4)).astype(np.float32)
    sums = np.asarray(jax.jit(pools.sum_by_document)(jnp.asarray(values), jnp.asarray(number)))
    for document in (1, 2, 3):
        own = number[0] == document
        want = np.broadcast_to(np.float64(values[0, own]).sum(0), (own.sum(), 4))
        np.testing.assert_allclose(sums[0, own], want, rtol=1e-6)


def test_no_token_leaves_its_pool():
    """Also where the scores of a pool underflow to the 0 of those outside."""
    logits = normal(1, 4, C) - 1000 * (np.arange(C) > 3)
    logits[0, :2] = np.roll(logits[0, :2], 4, axis=-1)  # each half of the document is far from what the other wants
    cfg = dataclasses.replace(POOLED, top_k=3, pool_size=5)
    pool = pools_by(cfg, logits, np.ones((1, 4), np.int32))[0]
    routing, _ = route(pools.confine(jnp.asarray(logits[0]), pool), None, Facts(jnp.ones(4, bool), pool=pool), cfg)
    assert np.take_along_axis(pool, np.asarray(routing.experts), 1).all()
    assert (np.diff(np.sort(np.asarray(routing.experts), 1), axis=1) > 0).all()


def test_switches_come_before_the_pool():
    """An expert that is off is in no pool, one that is on in every pool: chosen with its weight in the pool."""
    logits = normal(1, S, C)
    order = np.argsort(-special.softmax(np.float64(logits[0]), -1).sum(0))
    off, on = order[:2], order[-1]
    switched = np.zeros(C, np.int8)
    switched[off], switched[on] = -1, 1
    documents, facts = Documents(jnp.ones(S, int)), Facts(jnp.ones(S, bool), switches=jnp.asarray(switched))

    @jax.jit
    def run(flat):
        pool = pools.document_pools(flat, documents, facts, POOLED, None)
        return pool, route(pools.confine(flat, pool), None, facts._replace(pool=pool), POOLED)[0]

    pool, routing = run(jnp.asarray(logits[0]))
    left = np.where(np.isin(np.arange(C), off), -np.inf, np.float64(logits[0]))
    members = [on, *[e for e in np.argsort(-special.softmax(left, -1).sum(0)) if e != on][:3]]
    np.testing.assert_array_equal(pool, np.tile(np.isin(np.arange(C), members), (S, 1)))
    scores = np.zeros((S, C))
    scores[:, members] = special.softmax(left[:, members], -1)
    experts, weights = np.asarray(routing.experts), np.asarray(routing.weights)
    assert (experts == on).any(1).all() and not np.isin(experts, off).any()
    np.testing.assert_allclose(weights, np.take_along_axis(scores, experts, 1), rtol=1e-5)
    assert (weights > 0).all()


def test_sizes_are_drawn_by_document():
    """Uniform in [min, max]; one number for a document, and another in another row, layer and step."""
    rows, documents = 40, 10
    number = np.tile(np.repeat(np.arange(1, documents + 1, dtype=np.int32), 2), (rows, 1))
    index, logits = jnp.arange(number.size), normal(rows, 2 * documents, C)
    sizes = lambda key: pools_by(POOLED, logits, number, Knobs(jax.random.key(key)), index).sum(-1)
    drawn = sizes(0)
    np.testing.assert_array_equal(drawn[:, ::2], drawn[:, 1::2])
    counts = np.bincount(drawn[:, ::2].ravel(), minlength=6)
    assert counts[:3].sum() == 0 and (abs(counts[3:] - 400 / 3) < 4 * np.sqrt(400 * 2 / 9)).all()
    assert (drawn != sizes(1)).mean() > 0.5 and (drawn[0] != drawn[1]).any()
    part = slice(20, 400)  # the numbers of tokens decide, not their places
    some = pools_by(POOLED, logits[1:20], number[1:20], Knobs(jax.random.key(0)), index[part]).sum(-1)
    np.testing.assert_array_equal(some, drawn[1:20])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pool_from": ""}, "pool_from='': must say where evaluation and samples take pools from: 'prefix'"),
        ({"pool_min": 1}, "pool_min=1: must be from top_k=2"),
        ({"pool_max": 9}, "pool_max=9: must be from pool_min=3 to num_experts=8"),
        ({"pool_size": 1}, "pool_size=1: must be from top_k=2"),
        ({"pool_from": "all"}, "pool_size=4: has no effect with pool_from='all'"),
        ({"pool_from": "prefix"}, "pool_prefix=0: must be > 0"),
        ({"pool_min": 0}, "pool_max=5: needs pool_min"),
        ({"choice": "expert"}, "choice='expert': is not available with pool_min"),
        ({"identity_experts": 2}, "identity_experts=2: is not available"),
        ({"selection_bias": True}, "selection_bias=True: is not available"),
        ({"num_groups": 2, "top_groups": 2}, "num_groups=2: is not available"),
        ({"shard_groups": 2}, "shard_groups=2: is not available"),
    ],
)
def test_refused_in_a_layer(fields, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(POOLED, **fields)
