"""Balance of calibration against a loop: how many tokens experts keep, and who reads for the starved."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from test_model import mesh_of

from moe_jax.moe.routing import Routing
from moe_jax.parallel import sharding
from moe_jax.quant import balance

T, S, K, E = 64, 16, 2, 8


def routing_of(seed=0):
    """Choices of which expert 0 has most, expert 6 one and expert 7 none; some tokens are padding."""
    rng = np.random.default_rng(seed)
    share = np.array([0.55, 0.15, 0.1, 0.08, 0.07, 0.05, 0.0, 0.0])
    experts = np.stack([rng.choice(E, K, replace=False, p=share) for _ in range(T)]).astype(np.int32)
    experts[5, 1] = 6
    counted = rng.random(T) < 0.9
    counted[5] = True
    valid = np.repeat(counted[:, None], K, 1)
    return Routing(experts, rng.random((T, K)).astype(np.float32), valid), counted


def counts_of(routing):
    return np.bincount(routing.experts[routing.valid], minlength=E).astype(np.float32)


def by_hand(routing, counted, counts):
    """(token, expert) pairs that calibration reads, token by token."""
    share = counts.sum() / E
    starved = [e for e in range(E) if counts[e] < 0.1 * share]
    pairs, seen = set(), {}
    for t in range(T):
        for k in range(K):
            if routing.valid[t, k]:
                e = int(routing.experts[t, k])
                n = seen[t // S, e] = seen.get((t // S, e), 0) + 1
                ratio = min(1.0, 2 * share / counts[e])
                if np.floor(ratio * n + 1e-4) > np.floor(ratio * (n - 1) + 1e-4):
                    pairs.add((t, e))
        if starved and counted[t]:
            e = starved[t % S % len(starved)]
            if not (routing.valid[t] & (routing.experts[t] == e)).any():
                pairs.add((t, e))
    return pairs


def pairs_of(routing):
    experts, valid = np.asarray(routing.experts), np.asarray(routing.valid)
    made = [(int(t), int(experts[t, k])) for t, k in np.argwhere(valid)]
    assert len(set(made)) == len(made)  # nobody reads a token twice
    return set(made)


def test_no_expert_reads_much_more_than_its_share_and_none_too_little():
    routing, counted = routing_of()
    counts = counts_of(routing)
    run = jax.jit(balance.balanced, static_argnums=2)
    got = run(routing, counted, S, counts)
    assert pairs_of(got) == by_hand(routing, counted, counts)
    after, share = counts_of(jax.device_get(got)), counts.sum() / E
    assert counts[0] > 2 * share > after[0] > 1.8 * share and counts[7] == 0 and counts[6] == 1
    assert (after >= balance.LEAST * share).all() and min(after[6:]) > counted.sum() / 2 - 5
    np.testing.assert_array_equal(got.weights[:, :K], routing.weights)
    np.testing.assert_array_equal(got.weights[:, K], 1)
    assert balance.balanced(routing, counted, S, None) is routing


def test_equal_use_stays_as_it_is():
    """Nothing is left out, and the added slot does nothing."""
    experts = np.stack([np.arange(T) % E, (np.arange(T) + 3) % E], 1).astype(np.int32)
    routing = Routing(experts, np.ones((T, K), np.float32), np.ones((T, K), bool))
    got = jax.jit(balance.balanced, static_argnums=2)(routing, np.ones(T, bool), S, counts_of(routing))
    assert np.asarray(got.valid[:, :K]).all() and not np.asarray(got.valid[:, K]).any()


@pytest.mark.slow
def test_it_does_not_depend_on_the_mesh():
    """Sequences lie on four devices, which know the counts of all."""
    routing, counted = routing_of(1)
    counts = counts_of(routing)
    want = balance.balanced(jax.tree.map(jnp.asarray, routing), jnp.asarray(counted), S, jnp.asarray(counts))
    mesh = mesh_of(2, 2, 1)
    own = functools.partial(balance.balanced, seq_len=S)
    with jax.set_mesh(mesh):
        rows = P(sharding.AXES)
        given = jax.device_put((routing, counted), jax.sharding.NamedSharding(mesh, rows))
        split = lambda routing, counted, counts: own(routing, counted, counts=counts)
        run = jax.shard_map(split, in_specs=(rows, rows, P()), out_specs=rows, check_vma=True)
        got = jax.jit(run)(*given, counts)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)
