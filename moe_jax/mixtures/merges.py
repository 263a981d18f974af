"""Infers what a tokenizer was trained on from the order of its merges: Data Mixture Inference, arXiv:2407.16607.

Letters: k domains, W words, P pairs of symbols.

A BPE trainer always merges the pair that is most frequent in its text. Where texts of each domain are known, the pair
of merge i must be at least as frequent, in the mixture of their counts, as any other pair after the merges before:

    Σ α (c_i(merge i) − c_i(q)) + v_i + u_q ≥ 0  for all pairs q,   α ≥ 0, Σ α = 1,   least Σ v + Σ u

with shares α of the bytes, counts c for each byte of a domain, and slacks v of merges and u of pairs. This linear
programme has too many constraints to write down. It is solved with those that its last solution violates, again and
again, until there are none or the shares no longer move.
"""

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import optimize, sparse

from moe_jax.errors import FileError, UserError

UNIT = 1e5  # counts are for so many bytes, so that the solver's tolerances are far below them
TOLERANCE = 1e-2  # of a constraint, in this unit
RIVALS = 4  # constraints that are added for a merge at a time
STILL, MOVED = 3, 1e-3  # rounds without a change of a share by more than this end the search
ROUNDS = 100
LEAN = 1e-3  # reward for a domain's whole share, in slack, with which one looks for other solutions
LOOSE = 0.05

Pair = tuple[str, str]
Split = Callable[[str], list[str]]


class Inferred(NamedTuple):
    """shares: of the bytes of the training text, by domain. slack: Σ v + Σ u. merges: used; missing: pairs of the list
    that no text has, left out. loose: domains that could have a share larger by LOOSE or more with the same slack."""

    shares: dict[str, float]
    slack: float
    merges: int
    missing: int
    loose: tuple[str, ...]


class Replay(NamedTuple):
    """Counts of all pairs while the merges are made. before: at first. steps: for each merge its pair, and the pairs
    whose counts it changes with the changes."""

    before: Float[np.ndarray, "P k"]
    steps: list[tuple[int, Int[np.ndarray, " n"], Float[np.ndarray, "n k"]]]
    missing: int


# --- the tokenizer ---------------------------------------------------------------------------------------------------


def read_tokenizer(path: Path) -> tuple[list[Pair], Split]:
    """The merges of a tokenizer.json in their order, and its function from text to words as strings of symbols.

    Raises UserError, FileError.
    """
    import tokenizers

    try:
        text = path.read_text(encoding="utf-8")
        model = json.loads(text)["model"]
        kind, found = model["type"], model["merges"]
        merges = [tuple(one.split(" ")) if isinstance(one, str) else tuple(one) for one in found]
        suffix = model.get("end_of_word_suffix") or model.get("continuing_subword_prefix")
    except OSError as e:
        raise UserError(f"--merges={path}: cannot be read ({e.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise FileError(f"{path}: is not a tokenizer.json with a model of merges") from None
    if kind != "BPE" or not merges or not all(len(p) == 2 and all(isinstance(x, str) and x for x in p) for p in merges):
        raise FileError(f"{path}: is not a tokenizer.json whose model is BPE with merges of two symbols")
    if suffix:
        raise FileError(f"{path}: marks parts of words with {suffix!r}; only byte-level and Metaspace BPE are read")
    try:
        loaded = tokenizers.Tokenizer.from_str(text)
    except Exception as e:  # the library raises Exception itself
        raise FileError(f"{path}: is not a valid tokenizer.json: {e}") from None
    if loaded.pre_tokenizer is None:
        raise FileError(f"{path}: has no pre_tokenizer, so that all text would be one word")

    def split(piece: str) -> list[str]:
        text = loaded.normalizer.normalize_str(piece) if loaded.normalizer else piece
        return [word for word, _ in loaded.pre_tokenizer.pre_tokenize_str(text)]

    return merges, split


def count_words(texts: Iterable[str], split: Split, most: int) -> tuple[Counter, int]:
    """Counts words in the first `most` bytes of texts. Returns them with the bytes that were read."""
    words, size = Counter(), 0
    for text in texts:
        piece = text.encode("utf-8", "replace")[: most - size].decode("utf-8", "ignore")
        words.update(split(piece))
        size += len(piece.encode())
        if size >= most:
            break
    return words, size


# --- counts ----------------------------------------------------------------------------------------------------------


def replay(words: list[Counter], sizes: list[int], merges: list[Pair]) -> Replay:
    """Makes the merges in all words, and notes how they change the counts of pairs for UNIT bytes of each domain."""
    spelled = sorted(set().union(*words))
    counts = np.array([[of[word] for of in words] for word in spelled], float) * (UNIT / np.array(sizes, float))
    symbols = [list(word) for word in spelled]
    number: dict[Pair, int] = {}
    where: list[set[int]] = []

    def pair_at(pair: Pair) -> int:
        if pair not in number:
            number[pair] = len(where)
            where.append(set())
        return number[pair]

    changes: list[tuple[int, int, int]] = []  # (pair, word, ±1)

    def note(word: int, sign: int) -> None:
        parts = symbols[word]
        for pair in itertools.pairwise(parts):
            at = pair_at(pair)
            where[at].add(word)
            changes.append((at, word, sign))

    def flush() -> tuple[np.ndarray, np.ndarray]:
        pairs, among, sign = np.array(changes, np.int64).reshape(-1, 3).T
        unique, inverse = np.unique(pairs, return_inverse=True)
        change = np.zeros((len(unique), counts.shape[1]))
        np.add.at(change, inverse, sign[:, None] * counts[among])
        changes.clear()
        return unique, change

    for word in range(len(symbols)):
        note(word, 1)
    first, amounts = flush()
    steps, missing = [], 0
    for pair in merges:
        if pair not in number or not where[number[pair]]:
            missing += 1
            continue
        at = number[pair]
        for word in sorted(where[at]):
            if joined := _joined(symbols[word], pair):
                note(word, -1)
                symbols[word] = joined
                note(word, 1)
        where[at] = set()
        steps.append((at, *flush()))
    before = np.zeros((len(where), counts.shape[1]))
    before[first] = amounts
    return Replay(before, steps, missing)


def _joined(parts: list[str], pair: Pair) -> list[str]:
    """A word's symbols after a merge, from left to right. Empty if the word has not got the pair."""
    out, i, found = [], 0, False
    while i < len(parts):
        if i + 1 < len(parts) and (parts[i], parts[i + 1]) == pair:
            out.append(parts[i] + parts[i + 1])
            i, found = i + 2, True
        else:
            out.append(parts[i])
            i += 1
    return out if found else []


# --- the linear programme --------------------------------------------------------------------------------------------


def infer(replayed: Replay, domains: list[str]) -> Inferred:
    """The shares with the least slack. Raises UserError if the programme cannot be solved, or no merge is in a text."""
    if not replayed.steps:
        raise UserError("--text: no merge of the tokenizer is in these texts, so that nothing tells their shares")
    k = replayed.before.shape[1]
    rows: list[tuple[np.ndarray, int, int]] = []  # coefficients of α, merge, rival
    shares, slack = _search(replayed, rows, np.zeros(k))
    loose = [name for i, name in enumerate(domains)
             if _search(replayed, rows, -LEAN * (1 + slack) * np.eye(k)[i])[0][i] - shares[i] > LOOSE]  # fmt: skip
    named = dict(zip(domains, shares.tolist(), strict=True))
    return Inferred(named, slack, len(replayed.steps), replayed.missing, tuple(loose))


def _search(replayed: Replay, rows: list, lean: Float[np.ndarray, " k"]) -> tuple[Float[np.ndarray, " k"], float]:
    """Shares and slack of the least Σ v + Σ u + lean · α. rows: constraints that are known, to which it adds others."""
    pairs, k = replayed.before.shape
    merges = len(replayed.steps)
    shares, of_merge, of_pair = np.full(k, 1 / k), np.zeros(merges), np.zeros(pairs)
    slack, still = 0.0, 0
    if rows:
        shares, of_merge, of_pair, slack = _solve(rows, k, merges, pairs, lean)
    elif lean.any():
        shares = (lean < 0).astype(float)
    for _ in range(ROUNDS):
        new = _violated(replayed, shares, of_merge, of_pair, {(merge, rival) for _, merge, rival in rows})
        if not new or still == STILL:
            break
        rows += new
        last = shares
        shares, of_merge, of_pair, slack = _solve(rows, k, merges, pairs, lean)
        still = still + 1 if np.abs(shares - last).max() < MOVED else 0
    return shares, slack


def _violated(replayed: Replay, shares, of_merge, of_pair, known) -> list[tuple[np.ndarray, int, int]]:
    """The constraints that a solution violates most, at most RIVALS of each merge."""
    counts = replayed.before.copy()
    mixed = counts @ shares - of_pair
    new = []
    for i, (pair, changed, change) in enumerate(replayed.steps):
        limit = counts[pair] @ shares + of_merge[i] + TOLERANCE
        rivals = np.flatnonzero(mixed > limit)
        rivals = rivals[np.argsort(-mixed[rivals], kind="stable")][: 8 * RIVALS]
        fresh = [int(q) for q in rivals if q != pair and (i, int(q)) not in known][:RIVALS]
        new += [(counts[pair] - counts[q], i, q) for q in fresh]
        counts[changed] += change
        mixed[changed] = counts[changed] @ shares - of_pair[changed]
    return new


def _solve(rows, k: int, merges: int, pairs: int, lean):
    """Solves the programme with some constraints. Returns shares, slacks of merges and of pairs, and their sum."""
    there, column = np.unique([rival for _, _, rival in rows], return_inverse=True)
    by_merge, which = np.unique([merge for _, merge, _ in rows], return_inverse=True)
    n, count = len(rows), np.arange(len(rows))
    ones = np.ones(n)
    left = sparse.hstack([
        sparse.csr_array(np.array([coefficients for coefficients, _, _ in rows])),
        sparse.csr_array((ones, (count, which)), (n, len(by_merge))),
        sparse.csr_array((ones, (count, column)), (n, len(there))),
    ])  # fmt: skip
    slacks = len(by_merge) + len(there)
    whole = sparse.csr_array(np.concatenate([np.ones(k), np.zeros(slacks)])[None])
    cost = np.concatenate([lean, np.ones(slacks)])
    found = optimize.linprog(cost, A_ub=-left.tocsr(), b_ub=np.zeros(n), A_eq=whole, b_eq=[1.0], method="highs")
    if found.x is None:
        raise UserError(f"--text: the linear programme cannot be solved: {found.message}")
    of_merge, of_pair = np.zeros(merges), np.zeros(pairs)
    of_merge[by_merge] = found.x[k : k + len(by_merge)]
    of_pair[there] = found.x[k + len(by_merge) :]
    shares = np.maximum(found.x[:k], 0.0)
    return shares / shares.sum(), of_merge, of_pair, float(found.x[k:].sum())
