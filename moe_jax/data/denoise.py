"""Rows whose text has gaps to fill (UL2R, arXiv:2210.11399), in the form of a causal model. `S`: tokens of a row."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from moe_jax.data.rows import PackedRows, padding_row, permutation, random_number

MODES = ("R", "S", "X")  # the tokens of modes, after the one of gaps: together `GAP_TOKENS`


class Denoiser(NamedTuple):
    """A way to take spans out of a text."""

    mode: str
    length: float  # mean number of tokens of a span; 0: one span, the end of the text
    rate: float  # share of the tokens that are in spans


# UL2's seven, each as often as the others.
DENOISERS = (
    Denoiser("R", 3, 0.15), Denoiser("R", 8, 0.15), Denoiser("S", 0, 0.25), Denoiser("X", 3, 0.5),
    Denoiser("X", 8, 0.5), Denoiser("X", 64, 0.15), Denoiser("X", 64, 0.5),
)  # fmt: skip


@functools.lru_cache(64)
def sizes(denoiser: Denoiser, seq_len: int) -> tuple[int, int, int]:
    """The numbers of tokens of text that fit a row, of those in spans, and of spans.

    A row holds the mode, the text with a gap token for each span, and the spans, each after a gap token: S + 1 tokens
    with the last target. Without gap tokens for one span at the end.
    """
    if not denoiser.length:
        return seq_len, min(max(round(denoiser.rate * seq_len), 1), seq_len - 1), 1
    text = seq_len
    while True:
        removed = max(round(denoiser.rate * text), 1)
        spans = max(round(removed / denoiser.length), 1)
        spans = min(spans, removed, text - removed)
        if text + 2 * spans <= seq_len:
            return text, removed, spans
        text -= 1


def parts(total: int, count: int, draw: Callable[[int], np.ndarray]) -> np.ndarray:
    """`count` numbers ≥ 1 with a given sum, every such list with the same probability. draw: n → a permutation of n."""
    cuts = np.sort(draw(total - 1)[: count - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


class DenoisedRows:
    """The rows of `PackedRows`, of which a share has gaps. Row r is a function of (seed, name, r).

    A row with gaps has one of `DENOISERS`, at random, and the first tokens of the row that it is made of:
        tokens   a mode token; the text, with a gap token in place of each span; each span after a gap token
        targets  the next token
        weights  where the target is of the spans, what it has without gaps; 1 for a gap token among them; else 0
        segment_ids, positions  of one segment: what is to be filled is seen with all of the text
        domain_ids  of the target's text; of a gap token that of the text after it
    So filling the gaps with the spans in order gives the text again. In mode "S" the span is the end of the text, and
    there are no gap tokens.

    share: of rows with gaps. first: id of the gap token; those of the modes follow.
    """

    def __init__(self, rows: PackedRows, share: float, seed: int, name: str, first: int):
        self.rows, self.share, self._seed, self._name, self._first = rows, share, seed, name, first
        self.store, self.seq_len = rows.store, rows.seq_len

    def __len__(self) -> int:
        return len(self.rows)

    def denoiser(self, row: int) -> Denoiser | None:
        """How a row is denoised; None for one that stays as it is."""
        number = random_number("denoise", self._seed, self._name, row)
        place, which = divmod(number, len(DENOISERS))
        return DENOISERS[which] if place < self.share * (2**64 / len(DENOISERS)) else None

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        """The arrays of a row. Raises: IndexError outside range(len(self))."""
        made, denoiser = self.rows[row], self.denoiser(row)
        return made if denoiser is None else self._with_gaps(row, made, denoiser)

    def _with_gaps(self, row: int, plain: dict[str, np.ndarray], denoiser: Denoiser) -> dict[str, np.ndarray]:
        text, removed, spans = sizes(denoiser, self.seq_len)
        stream, domains = plain["tokens"][:text], np.append(plain["domain_ids"][:1], plain["domain_ids"])
        weights = np.append(plain["weights"][:1], plain["weights"])
        draw = lambda what: lambda n: permutation(n, "gaps", self._seed, self._name, row, what)
        if denoiser.length:
            lengths = np.zeros(2 * spans + 1, np.int64)
            lengths[::2] = parts(text - removed + 2, spans + 1, draw("kept"))
            lengths[[0, -1]] -= 1  # nothing need stand before the first span and after the last
            lengths[1::2] = parts(removed, spans, draw("removed"))
        else:
            lengths = np.array([text - removed, removed, 0])
        pieces = np.split(np.arange(text), np.cumsum(lengths)[:-1])  # of the text, kept and removed in turn
        gap = [-1] if denoiser.length else []
        before = [p for kept in pieces[::2] for p in (kept, gap)][:-1]  # no gap after the last
        after = [p for taken in pieces[1::2] for p in (gap, taken)]
        places = np.concatenate([[-2], *before, *after]).astype(np.int64)  # −1: a gap, −2: the mode
        ids = np.where(places >= 0, stream[np.maximum(places, 0)], self._first)
        ids[0] = self._first + 1 + MODES.index(denoiser.mode)
        index = np.arange(len(places))
        following = np.minimum.accumulate(np.where(places >= 0, index, len(places))[::-1])[::-1]  # the text ends all
        domain, weight = domains[places[following]], np.where(places >= 0, weights[np.maximum(places, 0)], 1.0)
        learned = len(np.concatenate(after))
        made, n = padding_row(self.seq_len, self.store.end_of_text), len(ids) - 1
        made["tokens"][:n], made["targets"][:n] = ids[:-1], ids[1:]
        made["weights"][n - learned : n] = weight[len(ids) - learned :]
        made["segment_ids"][:n], made["positions"][:n], made["domain_ids"][:n] = 1, np.arange(n), domain[1:]
        return made

    def note(self) -> str:
        """A line about the rows with gaps and the tokens that they add."""
        last = self._first + len(MODES)
        share = f"{100 * self.share:g} % of the training rows have gaps to fill"
        tokens = f"tokens {self._first} to {last} are the gap and the modes {', '.join(MODES)}"
        return f"data.sources.{self._name}: {share}; {tokens}"
