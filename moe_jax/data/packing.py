"""Rows of fixed length of which each holds complete documents. `S`: tokens of a row."""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence

import numpy as np

from moe_jax.data.corpus import TokenStore
from moe_jax.data.rows import padding_row, permutation


def best_fit(sizes: Sequence[int], room: int) -> tuple[np.ndarray, int]:
    """The row of each document, and the number of rows. A document goes to the fullest row that has space for it.

    sizes: from 1 to `room`. Of rows with the same space the one that was used last is taken.
    """
    spaces: list[int] = []  # that rows have left, sorted, each once
    rows: dict[int, list[int]] = {}  # rows by the space they have left
    placed, count = np.empty(len(sizes), np.int64), 0
    for i, size in enumerate(sizes):
        at = bisect_left(spaces, size)
        if at == len(spaces):
            row, space, count = count, room, count + 1
        else:
            space = spaces[at]
            row = rows[space].pop()
            if not rows[space]:
                del rows[space], spaces[at]
        placed[i], left = row, space - size
        if left and left not in rows:
            insort(spaces, left)
        if left:
            rows.setdefault(left, []).append(row)
    return placed, count


class WholeRows:
    """Rows of S tokens, each of one or more complete documents of a store of documents with roles, and padding.

    A row is the dict of `rows.PackedRows`, with
        tokens, targets  each document without its last token, and without its first
        weights          1 where the target is learned, else 0
        segment_ids      1, 2, … for the documents of the row; 0 is padding
    So nothing is predicted from another document. A document of more than S + 1 tokens is cut, and left out if no token
    is learned in what is left.

    Documents are packed from the longest to the shortest ("best fit decreasing", arXiv:2404.10830).
    seed: those of one length are in a permutation that depends on (seed, name); None: in stored order.
    domain_ids: global index of each of the store's domains; None: the store's own numbers.
    cut, left_out: numbers of documents. tokens_cut: learned tokens that the store has and the rows have not.
    targets, bytes: [documents of the store] int64, the learned tokens of each document that the rows have, and the
        bytes of UTF-8 of their text; 0 for a document that is left out.
    """

    def __init__(
        self,
        store: TokenStore,
        seq_len: int,
        seed: int | None,
        *,
        name: str = "",
        domain_ids: Sequence[int] | None = None,
    ):
        self.store, self.seq_len = store, seq_len
        self._arguments = (seed, name, domain_ids)
        self._domain_ids = np.asarray(range(len(store.domains)) if domain_ids is None else domain_ids, np.int32)
        lengths, total = np.diff(store.offsets), store.targets_per_document()
        kept, self.bytes = total.copy(), np.array(store.document_bytes, np.int64)
        for d in np.flatnonzero(lengths > seq_len + 1):
            part = slice(int(store.offsets[d]), int(store.offsets[d]) + seq_len + 1)
            kept[d] = np.sum(store.learned[part], dtype=np.int64)
            self.bytes[d] = np.sum(store.sizes[part], dtype=np.int64) if kept[d] else 0
        self.targets = kept
        self.cut = int((lengths > seq_len + 1).sum())
        self.left_out = int((kept == 0).sum())
        self.tokens_cut = int((total - kept).sum())
        n = len(lengths)
        order = np.arange(n) if seed is None else permutation(n, "documents", seed, name)
        order = order[kept[order] > 0]
        sizes = np.minimum(lengths - 1, seq_len)
        order = order[np.argsort(-sizes[order], kind="stable")]
        placed, self._length = best_fit(sizes[order].tolist(), seq_len)
        by_row = np.argsort(placed, kind="stable")
        self._documents = order[by_row]
        self._starts = np.searchsorted(placed[by_row], np.arange(self._length + 1))

    def __reduce__(self):
        seed, name, domain_ids = self._arguments
        return _whole_rows, (self.store, self.seq_len, seed, name, domain_ids)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        """The arrays of a row. Raises: IndexError outside range(len(self))."""
        if not 0 <= row < self._length:
            raise IndexError(f"row {row} of {self._length}")
        store, s = self.store, self.seq_len
        made, at = padding_row(s, store.end_of_text), 0
        for k, document in enumerate(self._documents[self._starts[row] : self._starts[row + 1]], 1):
            begin, end = (int(x) for x in store.offsets[document : document + 2])
            n = min(end - begin - 1, s)
            place = slice(at, at + n)
            made["tokens"][place] = store.tokens[begin : begin + n]
            made["targets"][place] = store.tokens[begin + 1 : begin + n + 1]
            made["weights"][place] = store.learned[begin + 1 : begin + n + 1]
            made["segment_ids"][place] = k
            made["positions"][place] = np.arange(n)
            made["domain_ids"][place] = self._domain_ids[store.document_domains[document]]
            at += n
        return made

    @property
    def tokens(self) -> int:
        """Number of tokens of documents in all rows."""
        return int(np.minimum(np.diff(self.store.offsets)[self._documents] - 1, self.seq_len).sum())

    def texts(self) -> Iterator[tuple[str, str]]:
        """Yields (domain, text) of what is learned of every document in a row, in stored order; of a held-out split."""
        for (domain, text), size in zip(self.store.texts(), self.bytes, strict=True):
            if size:
                yield domain, text.encode()[:size].decode()

    def least(self) -> int:
        """The least `seq_len` with which a row has a document."""
        learned = np.flatnonzero(self.store.learned)
        begins = self.store.offsets[np.searchsorted(self.store.offsets, learned, "right") - 1]
        return int((learned - begins).min())

    def note(self) -> str:
        """A line about how full the rows are, and about documents that are longer than a row."""
        kept, s = len(self._documents), self.seq_len
        used = self.tokens / max(self._length * s, 1)
        line = f"{kept:,} documents in {self._length:,} rows of {s:,} tokens, {used:.1%} full".replace("%", " %")
        if not self.cut:
            return line
        line += f"; {self.cut:,} of {self.store.num_documents:,} documents have more than {s + 1:,} tokens"
        line += f" (data.seq_len + 1) and are cut: {self.tokens_cut:,} tokens of answers are not learned"
        return line + (f"; without an answer left and so left out: {self.left_out:,}" if self.left_out else "")


def _whole_rows(store, seq_len, seed, name, domain_ids) -> WholeRows:
    return WholeRows(store, seq_len, seed, name=name, domain_ids=domain_ids)
