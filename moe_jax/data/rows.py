"""Rows of fixed length, packed from the documents of a token store. `S`: tokens of a row."""

import hashlib
from collections.abc import Sequence

import numpy as np

from moe_jax.data.corpus import TokenStore


def permutation(n: int, *key: object) -> np.ndarray:
    """A permutation of range(n) that depends on `key` alone: the same on every machine and with every NumPy version."""
    return np.argsort(_random(n, key), kind="stable")


def random_number(*key: object) -> int:
    """A number of 64 bits that depends on `key` alone."""
    return int(_random(1, key)[0])


def _random(n: int, key: tuple) -> np.ndarray:
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.Philox(key=np.frombuffer(digest, "<u8")).random_raw(n)


def padding_row(seq_len: int, end_of_text: int) -> dict[str, np.ndarray]:
    """A row of padding only: all weights and segment ids are 0."""
    row = {k: np.zeros(seq_len, np.int32) for k in ("segment_ids", "positions", "domain_ids")}
    row |= {k: np.full(seq_len, end_of_text, np.int32) for k in ("tokens", "targets")}
    return row | {"weights": np.zeros(seq_len, np.float32)}


class PackedRows:
    """Rows of S tokens cut from the concatenated documents of a store.

    Row r covers positions r·S … r·S+S of the stream (neighbours share one token), so every target is predicted exactly
    once an epoch. A row is a dict of arrays [S]:
        tokens, targets  int32; padding is end_of_text
        weights          float32: 1, or 0 for padding and for a begin_of_text, which nothing before it predicts
        segment_ids      int32: from 1 within the row, a new one at each document's first token; 0 is padding
        positions        int32: from 0 at each segment's start
        domain_ids       int32: domain of the target's document; the end_of_text after a document belongs to it

    seed: the documents are in a permutation that depends on (seed, name); None: in stored order.
    partial: True keeps the last incomplete row and pads it (validation); False drops it (training).
    domain_ids: global index of each of the store's domains; None: the store's own numbers.
    """

    def __init__(
        self,
        store: TokenStore,
        seq_len: int,
        seed: int | None,
        *,
        name: str = "",
        partial: bool = False,
        domain_ids: Sequence[int] | None = None,
    ):
        self.store, self.seq_len = store, seq_len
        self._arguments = (seed, name, partial, domain_ids)
        self._domain_ids = np.asarray(range(len(store.domains)) if domain_ids is None else domain_ids, np.int32)
        lengths = np.diff(store.offsets)
        self._order = np.arange(len(lengths)) if seed is None else permutation(len(lengths), "documents", seed, name)
        self._starts = np.concatenate([[0], np.cumsum(lengths[self._order], dtype=np.int64)]).astype(np.int64)
        inputs = int(self._starts[-1])
        self._length = -(-inputs // seq_len) if partial else inputs // seq_len

    def __reduce__(self):
        seed, name, partial, domain_ids = self._arguments
        return _packed_rows, (self.store, self.seq_len, seed, name, partial, domain_ids)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        """The arrays of a row. Raises: IndexError outside range(len(self))."""
        if not 0 <= row < self._length:
            raise IndexError(f"row {row} of {self._length}")
        store, s = self.store, self.seq_len
        begin = row * s
        count = min(s + 1, int(self._starts[-1]) + 1 - begin)  # stream positions in this row, the closing one included
        stream = np.full(s + 1, store.end_of_text, np.int32)
        domains = np.zeros(s + 1, np.int32)
        first = np.zeros(s + 1, bool)  # a segment begins here
        first[0] = True
        k = int(np.searchsorted(self._starts, begin, "right")) - 1
        at = 0
        while at < count and k < len(self._order):
            document = self._order[k]
            skip = begin + at - int(self._starts[k])
            n = min(int(self._starts[k + 1] - self._starts[k]) - skip, count - at)
            where = int(store.offsets[document]) + skip
            stream[at : at + n] = store.tokens[where : where + n]
            domains[at : at + n] = self._domain_ids[store.document_domains[document]]
            first[at] |= skip == 0
            at, k = at + n, k + 1
        valid = np.arange(s) < count - 1
        index = np.arange(s, dtype=np.int32)
        starts = np.maximum.accumulate(np.where(first[:-1], index, 0))
        predicted = valid
        if store.begin_of_text is not None:
            closing = np.arange(begin + 1, begin + s + 1) == self._starts[-1]
            predicted = valid & ~first[1:] & ~closing
        return {
            "tokens": stream[:-1],
            "targets": stream[1:],
            "weights": predicted.astype(np.float32),
            "segment_ids": np.where(valid, np.cumsum(first[:-1]), 0).astype(np.int32),
            "positions": np.where(valid, index - starts, 0).astype(np.int32),
            "domain_ids": np.where(valid, domains[:-1], 0).astype(np.int32),
        }


def _packed_rows(store, seq_len, seed, name, partial, domain_ids) -> PackedRows:
    return PackedRows(store, seq_len, seed, name=name, partial=partial, domain_ids=domain_ids)
