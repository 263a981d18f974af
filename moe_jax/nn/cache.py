"""The KV cache: of all tokens so far, or in a layer with a window of its last ones.

Letters: L layers, B sequences, S new tokens, N query heads, M key/value heads, H head size, Z length of the cache.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_jax.nn.attend import plain_attention
from moe_jax.parallel import sharding


class KVCache(NamedTuple):
    """Keys and values of the tokens so far. The scan over layers adds a leading L.

    In a layer with a window the token at position i lies at i mod Z, in the place of the one Z before it.
    """

    k: Float[Array, "*L B Z M H"]
    v: Float[Array, "*L B Z M H"] | None  # None: the keys are the values (MLA)
    # The experts that each sequence may choose in the layer, with document pools. Attention leaves it out.
    pool: Bool[Array, "*L B C"] | None = None

    def write(self, k: Float[Array, "B S M H"], v: Float[Array, "B S M H"] | None, start: Int[Array, ""]) -> "KVCache":
        """Returns the cache with S new tokens written at `start`."""
        update = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), start, axis=1)
        return KVCache(update(self.k, k), None if v is None else update(self.v, v))


def attend_and_write(
    q: Float[Array, "B S N H"],
    k: Float[Array, "B S M H"],
    v: Float[Array, "B S M H"] | None,
    cache: KVCache,
    start: Int[Array, ""],
    scale: float,
    window: int = 0,
) -> tuple[Float[Array, "B S N H"], KVCache]:
    """Attention of S new tokens, at positions start … start+S−1, to those of the cache and to each other; and the cache
    with the new tokens. v: None if the keys are the values. window: that of the layer; 0: it has none.
    """
    if not window:
        cache = cache.write(k, v, start)
        return attend_cache(q, cache, start, scale), cache
    with_values = cache.v is not None
    operands = (q, cache.k, k.astype(cache.k.dtype))
    operands += (cache.v, v.astype(cache.v.dtype)) if with_values else ()

    def local(q, *rest):
        *arrays, start = rest
        (old_k, new_k), values = arrays[:2], arrays[2:]
        if q.shape[1] == 1:  # the new token takes the place of one that no query sees any more
            seen = _positions(old_k.shape[1], start)
            k, *v = (_put(old, new, start) for old, new in zip(arrays[::2], arrays[1::2], strict=True))
            y = plain_attention(q, k, v[0] if v else k, mask=(seen >= 0)[None, None, None], scale=scale)
            return (y, k, *v)
        new = start + jnp.arange(q.shape[1])
        seen, at = jnp.concatenate([_positions(old_k.shape[1], start - 1), new])[None, :], new[:, None]
        visible: Bool[Array, "S Z+S"] = (seen >= 0) & (seen <= at) & (at - seen < window)
        join = lambda old, new: jnp.concatenate([old, new], axis=1)
        keys = join(old_k, new_k)
        y = plain_attention(q, keys, join(*values) if values else keys, mask=visible[None, None], scale=scale)
        return (y, *(_put(old, new, start) for old, new in zip(arrays[::2], arrays[1::2], strict=True)))

    y, *arrays = sharding.per_device(local, len(operands), 1)(*operands, start)
    return y, KVCache(arrays[0], arrays[1] if with_values else None)


def _positions(length: int, last: Int[Array, ""]) -> Int[Array, " Z"]:
    """The position of the token in each place of a cache whose newest one is at `last`; negative: none yet."""
    return last - (last - jnp.arange(length)) % length


def _put(old: Float[Array, "B Z M H"], new: Float[Array, "B S M H"], start: Int[Array, ""]) -> Float[Array, "B Z M H"]:
    """The cache of a window with the last Z of the new tokens, which begin at `start`."""
    length, tokens = old.shape[1], new.shape[1]
    kept = min(length, tokens)
    at = (start + tokens - kept + jnp.arange(kept)) % length
    return old.at[:, at].set(new[:, tokens - kept :])


def attend_cache(
    q: Float[Array, "B S N H"], cache: KVCache, start: Int[Array, ""], scale: float
) -> Float[Array, "B S N H"]:
    """Attention of S new tokens, at positions start … start+S−1, to all tokens of the cache up to their own."""

    def local(q, cache, start):
        length, new = cache.k.shape[1], q.shape[1]
        visible: Bool[Array, "S Z"] = jnp.arange(length)[None, :] <= start + jnp.arange(new)[:, None]
        values = cache.k if cache.v is None else cache.v
        return plain_attention(q, cache.k, values, mask=visible[None, None], scale=scale)

    return sharding.per_device(local, 2, 1)(q, cache, start)
