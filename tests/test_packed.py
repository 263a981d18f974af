"""cuDNN's attention to packed rows: the lists of segments against brute force, and the arithmetic around the calls.

The calls themselves need a GPU: a stand-in computes what they promise, and rubbish everywhere else. On a GPU
benchmarks/attention.py compares with `xla`.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_jax.nn import attend, cudnn, packed
from tests.test_attend import check, operands

ROWS, LENGTH = 2, 64


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Sizes at which rows of 64 tokens need every kind of call: pieces of 16, calls of 8, 16, 16, … segments."""
    for name, value in {"PIECE": 16, "WHOLE": 3, "PLACES": 2, "COUNTED": 16}.items():
        monkeypatch.setattr(packed, name, value)
    assert packed.shapes(ROWS, LENGTH) == (8, 8, 16, 16)
    assert packed.shapes(1, 2**17).whole == packed.MOST  # its memory times the length of a row is not quadratic


@pytest.mark.parametrize("length", [64, 60, 61, 8])
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_segment_is_in_one_list(length, data):
    """Any segments of rows whose length pieces divide, or do not, or that are shorter than a piece."""
    begins = [sorted(data.draw(st.sets(st.integers(1, length - 1)))) for _ in range(ROWS)]
    ids = np.stack([np.searchsorted(row, np.arange(length), side="right") for row in begins]).astype(np.int32)
    sizes = packed.shapes(ROWS, length)
    assert sizes.rows * sizes.length == ROWS * length
    calls = jax.device_get(all_calls(ids, sizes))
    want = {}  # the segments, by offset
    for i, row in enumerate(begins):
        edges = [0, *row, length]
        want |= {i * length + a: b - a for a, b in itertools.pairwise(edges)}
    found = {}
    for i, (listed, inside) in enumerate(calls):
        assert len(listed.size) % sizes.rows == 0 or i == 0
        taken = {o: n for o, n in zip(listed.offset.tolist(), listed.size.tolist(), strict=True) if n}
        assert set(listed.offset[listed.size == 0].tolist()) <= {ROWS * length}
        assert not taken.keys() & found.keys() and (i == 0 or max(taken.values(), default=0) <= sizes.length)
        tokens = [t for o, n in taken.items() for t in range(o, o + n)]
        assert sorted(tokens) == np.flatnonzero(inside).tolist()
        found |= taken
    assert found == want


@functools.partial(jax.jit, static_argnums=1)
def all_calls(ids, sizes):
    cut = packed.lists(ids)
    further = -(-ids.size // sizes.rest)
    return [(cut.first_call(sizes), cut.in_first_call())] + [
        (cut.further_call(sizes, i), cut.in_further_call(sizes, i)) for i in range(further)
    ]


@pytest.mark.parametrize("length", [1, 15, 16, 17, 300])
def test_count_is_a_cumulative_sum(length):
    which = np.random.default_rng(length).random(length) < 0.3
    np.testing.assert_array_equal(packed.count(jnp.asarray(which)), np.cumsum(which))


def slots(packed_, tokens, longest):
    """The place in a call's list that a token belongs to; −1: none. Segments longer than a row are cut off."""
    at = jnp.arange(tokens)[:, None]
    inside = (at >= packed_.offset[None]) & (at < (packed_.offset + jnp.minimum(packed_.size, longest))[None])
    return jnp.where(inside.any(1), inside.argmax(1), -1)


def logits(q, k, packed_, scale, window):
    """Returns the logits of all tokens of all rows, and the place of each token in the list."""
    slot = slots(packed_, q.shape[0] * q.shape[1], q.shape[1])
    at = jnp.arange(len(slot))
    visible = (slot[:, None] == slot[None, :]) & (at[:, None] >= at[None, :])
    visible &= at[:, None] - at[None, :] < (window or len(slot))
    q, k = (x.reshape(-1, *x.shape[2:]) for x in (q, k))
    return jnp.where(
        visible[None], scale * jnp.einsum("tnh,snh->nts", q, jnp.repeat(k, q.shape[1] // k.shape[1], 1)), -1e30
    ), slot


def forward(q, k, v, packed_, scale, window):
    """Stands in for `cudnn.forward`: results of tokens in the list, and logsumexps by place in the list."""
    x, slot = logits(q, k, packed_, scale, window)
    values = jnp.repeat(v.reshape(-1, *v.shape[2:]), q.shape[2] // v.shape[2], 1)
    y = jnp.einsum("nts,snh->tnh", jax.nn.softmax(x), values)
    lse = jax.nn.logsumexp(x, -1)
    at = packed_.offset[:, None] + jnp.arange(q.shape[1])[None]
    own = jnp.arange(q.shape[1])[None] < packed_.size[:, None]
    lse = jnp.where(own[:, None], lse[:, jnp.minimum(at, len(slot) - 1)].swapaxes(0, 1), jnp.nan)
    return jnp.where((slot >= 0)[:, None, None], y, jnp.nan).reshape(q.shape), lse


def backward(q, k, v, packed_, scale, lse, y, dy, window):
    """Stands in for `cudnn.backward`, with the logsumexps and the result that it is given."""
    x, slot = logits(q, k, packed_, scale, window)
    flat = lambda z: z.reshape(-1, *z.shape[2:])
    begin = packed_.offset[slot]
    own = jnp.where((slot >= 0)[:, None], lse[slot, :, jnp.arange(len(slot)) - begin], 0)
    p = jnp.where(slot[None, :, None] >= 0, jnp.exp(x - own.T[:, :, None]), 0)
    groups, y, dy = q.shape[2] // k.shape[2], flat(y), flat(dy)
    keys, values = (jnp.repeat(flat(z), groups, 1) for z in (k, v))
    dp = jnp.einsum("tnh,snh->nts", dy, values) - jnp.sum(y * dy, -1).T[:, :, None]
    ds = jnp.where(p > 0, p * dp * scale, 0)
    shared = lambda z: z.reshape(len(slot), -1, groups, z.shape[-1]).sum(2)
    gradients = (
        jnp.einsum("nts,snh->tnh", ds, keys),
        shared(jnp.einsum("nts,tnh->snh", ds, flat(q))),
        shared(jnp.einsum("nts,tnh->snh", p, dy)),
    )
    rubbish = lambda z, like: jnp.where((slot >= 0)[:, None, None], z, jnp.nan).reshape(like.shape)
    return tuple(rubbish(z, like) for z, like in zip(gradients, (q, k, v), strict=True))


@pytest.mark.parametrize(
    ("segments", "window"), [(3, 0), (40, 0), (9, 5), *(pytest.param(n, 0, marks=pytest.mark.slow) for n in (1, 9, 23))]
)
def test_every_segment_is_attended_once(monkeypatch, segments, window):
    """Values and gradients, for as many segments as need no further call, one, and several. No rubbish gets out."""
    monkeypatch.setattr(cudnn, "forward", forward)
    monkeypatch.setattr(cudnn, "backward", backward)
    qkv, dy, ids = operands(b=4, segments=segments, s=LENGTH)
    check(functools.partial(attend.attend, backend="cudnn", window=window), qkv, dy, ids, window)
