"""Token stores on disk, and fixed-length rows packed from them.

A store holds one split of one source: every document once, as `[end_of_text, tokens…]`, and one more `end_of_text` at
the end; with a tokenizer that has a `begin_of_text`, as `[begin_of_text, tokens…, end_of_text]`, and one more
`begin_of_text`. It is written to a temporary folder that is renamed when complete, so a killed run leaves no half store
behind and processes that prepare the same one at once all end well. Letters: `S` tokens of a row.
"""

import hashlib
import json
import os
import shutil
import tempfile
import tokenize
from collections.abc import Sequence
from pathlib import Path

import grain
import numpy as np
from tqdm import tqdm

from moe_jax.data.kept_text import size
from moe_jax.data.tokenizers import Tokenizer

_VERSION = 1
# What numpy raises, besides ValueError, for a header that it reads as a literal, and for absurd numbers in it.
BAD_HEADER = (SyntaxError, OverflowError, MemoryError, tokenize.TokenError)
_BATCH = 64  # documents tokenised together


def permutation(n: int, *key: object) -> np.ndarray:
    """A permutation of range(n) decided by `key` alone, on every machine and NumPy version."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    raw = np.random.Philox(key=np.frombuffer(digest, "<u8")).random_raw(n)
    return np.argsort(raw, kind="stable")


class TokenStore:
    """A prepared split: memory-mapped arrays, `D` documents and `N` tokens.

    tokens [N] uint16 or uint32; offsets [D+1] int64, where each document begins (the last: where the closing
    token is); document_domains [D] int32, indices into `domains`; document_bytes [D] int64, UTF-8 bytes of the
    text; lost_bytes, how many of them no token stands for, by domain, where there are any. Pickles as its path.
    Raises: ValueError if the folder is no complete store.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        try:
            meta = json.loads((self.folder / "meta.json").read_text())
            if meta["version"] != _VERSION:
                raise ValueError(f"version {meta['version']}")
            self.domains: tuple[str, ...] = tuple(map(str, meta["domains"]))
            self.end_of_text: int = int(meta["end_of_text"])
            self.begin_of_text: int | None = meta.get("begin_of_text")
            self.lost_bytes: dict[str, int] = {str(k): int(v) for k, v in meta.get("lost_bytes", {}).items()}
            self.num_documents: int = meta["documents"]
            self.tokens = self._load("tokens", meta["tokens"])
            self.offsets = self._load("offsets", self.num_documents + 1)
            self.document_domains = self._load("domains", self.num_documents)
            self.document_bytes = self._load("bytes", self.num_documents)
            self._check()
        except (OSError, ValueError, KeyError, TypeError, EOFError, RecursionError, *BAD_HEADER) as error:
            raise ValueError(f"{self.folder} is not a complete token store: {error}") from error

    def _load(self, name: str, length: int) -> np.ndarray:
        path = self.folder / f"{name}.npy"
        array = np.load(path, mmap_mode="r" if length else None, allow_pickle=False)
        if array.shape != (length,):
            raise ValueError(f"{path} has shape {array.shape}, not {(length,)}")
        return array

    def _check(self) -> None:
        """That what points into another array stays inside it."""
        ends, inside = (0, len(self.tokens) - 1), self.document_domains
        whole = all(a.dtype.kind in "iu" for a in (self.tokens, self.offsets, inside, self.document_bytes))
        ordered = whole and tuple(self.offsets[[0, -1]]) == ends and bool((np.diff(self.offsets) > 0).all())
        outside = len(inside) and not 0 <= inside.min() <= inside.max() < len(self.domains)
        if not ordered or outside or not 0 <= self.end_of_text < 2**31:
            raise ValueError("its numbers are no token store's")

    def __reduce__(self):
        return TokenStore, (self.folder,)

    def targets_per_document(self) -> np.ndarray:
        """[D] int64: predicted tokens of each document, the end_of_text after it included."""
        return np.diff(self.offsets) - (self.begin_of_text is not None)


def store_folder(cache: Path, identity: dict, tokenizer: Tokenizer) -> Path:
    """Where the store of a source's split lives: any change of data, fields or tokenizer is another folder."""
    key = json.dumps([_VERSION, identity, tokenizer.fingerprint], sort_keys=True)
    return cache / "tokens" / hashlib.blake2b(key.encode(), digest_size=12).hexdigest()


def prepare_store(
    folder: Path, documents, tokenizer: Tokenizer, description: str = "", progress: bool = False
) -> TokenStore:
    """The store in `folder`, written first if it is not there.

    documents: called for the sequence of `{"text", "domain"}`, only if the store must be written.
    """
    try:
        return TokenStore(folder)
    except ValueError:
        pass
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".partial-{folder.name}-"))
    try:
        _write_store(partial, documents(), tokenizer, description, progress)
        _publish(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return TokenStore(folder)


def _publish(partial: Path, folder: Path) -> None:
    """Renames a complete store to its place, unless another process was faster; a damaged one there is moved away."""
    try:
        os.rename(partial, folder)
    except OSError:
        try:
            TokenStore(folder)
        except ValueError:
            grave = tempfile.mkdtemp(dir=folder.parent, prefix=".damaged-")
            os.rename(folder, os.path.join(grave, folder.name))
            shutil.rmtree(grave, ignore_errors=True)
            os.rename(partial, folder)


class _Encode:
    """Documents → (ids, domains, bytes, bytes lost)."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    def __call__(self, documents: Sequence[dict[str, str]]) -> list[tuple[np.ndarray, str, int, int]]:
        documents = [d for d in documents if d["text"]]
        made = self._tokenizer.encode_and_count([d["text"] for d in documents])
        return [(ids, d["domain"], size(d["text"]), lost) for (ids, lost), d in zip(made, documents, strict=True)]


def _write_store(folder: Path, documents: Sequence, tokenizer: Tokenizer, description: str, progress: bool) -> None:
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    lengths, domains, sizes = [], [], []
    numbers: dict[str, int] = {}
    lost: dict[str, int] = {}
    begin, end = tokenizer.begin_of_text, np.asarray([tokenizer.end_of_text], dtype)
    front, back = (end, end[:0]) if begin is None else (np.asarray([begin], dtype), end)
    with (
        open(folder / "tokens.raw", "wb") as file,
        tqdm(total=len(documents), desc=f"tokenize {description}", unit="doc", disable=not progress) as bar,
    ):
        if len(documents):
            read = grain.MapDataset.source(documents).batch(_BATCH, batch_fn=list).map(_Encode(tokenizer))
            iterator = iter(read.to_iter_dataset(grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)))
            for batch in iterator:
                for ids, domain, length, dropped in batch:
                    if np.isin(ids, [tokenizer.end_of_text, *front]).any():
                        raise RuntimeError(f"{description}: the tokenizer made a special token from text")
                    whole = np.concatenate([front, ids.astype(dtype), back])
                    whole.tofile(file)
                    lengths.append(len(whole))
                    domains.append(numbers.setdefault(domain, len(numbers)))
                    sizes.append(length)
                    if dropped:
                        lost[domain] = lost.get(domain, 0) + dropped
                bar.update(min(_BATCH, len(documents) - bar.n))
            iterator.close()
        front.tofile(file)
    total = sum(lengths) + 1
    with open(folder / "tokens.npy", "wb") as file, open(folder / "tokens.raw", "rb") as raw:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": (total,)}
        np.lib.format.write_array_header_1_0(file, header)
        shutil.copyfileobj(raw, file, 1 << 22)
    (folder / "tokens.raw").unlink()
    np.save(folder / "offsets.npy", np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64))
    np.save(folder / "domains.npy", np.asarray(domains, np.int32))
    np.save(folder / "bytes.npy", np.asarray(sizes, np.int64))
    meta = {"version": _VERSION, "documents": len(lengths), "tokens": total, "end_of_text": tokenizer.end_of_text}
    meta |= {"domains": list(numbers), "source": description}
    meta |= {} if begin is None else {"begin_of_text": begin}
    meta |= {"lost_bytes": lost} if lost else {}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")


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
        domain_ids       int32: of the target's document; the end_of_text after a document belongs to it

    seed: documents in a permutation decided by (seed, name); None: in stored order.
    partial: whether the last incomplete row is kept, padded (validation), or dropped (training).
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
        """Raises: IndexError outside range(len(self))."""
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
