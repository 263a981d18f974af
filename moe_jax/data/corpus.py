"""Token stores on disk: the tokens of one split of one source, made once and read by every run.

A store holds every document once, as `[end_of_text, tokens…]`, and one more `end_of_text` at the end. With a tokenizer
that has a `begin_of_text` it holds `[begin_of_text, tokens…, end_of_text]`, and one more `begin_of_text`. A store of
documents with roles (roles.py) holds complete documents, one more `end_of_text`, and which tokens are learned.

A store is written to a temporary folder, which is renamed when complete. So a killed run leaves no incomplete store,
and several processes may prepare the same store at the same time. A run that opens a store compares its checksums; a
damaged store is written again.
"""

import hashlib
import json
import os
import shutil
import sys
import tempfile
import tokenize
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
from tqdm import tqdm

from moe_jax.data import documents as docs
from moe_jax.data.digests import Remembered, checksum, content_hash
from moe_jax.data.tokenizers import Tokenizer

_VERSION = 2
# Exceptions of numpy, besides ValueError, for a damaged header: numpy parses it as a Python literal.
BAD_HEADER = (SyntaxError, OverflowError, MemoryError, tokenize.TokenError)
_BATCH = 64  # documents tokenised together
_LARGE = 4 * 2**30  # bytes: the checksums of a larger store are compared only if the file system reports a change
_ARRAYS = ("tokens", "offsets", "domains", "bytes", "text", "learned", "sizes")


class Encoded(NamedTuple):
    """A document as it lies in a store."""

    document: dict[str, Any]
    tokens: np.ndarray | None  # [n] with special tokens; None for a blank document, which is left out
    text: bytes  # UTF-8 of what is learned
    lost: int  # bytes of it that no token represents
    learned: np.ndarray | None = None  # [n] bool; None: all tokens
    notes: tuple[str, ...] = ()  # what the user should know, each a plural such as "blank documents, left out"
    sizes: np.ndarray | None = None  # [n] uint32, beside `learned`: bytes of `text` that end with each token


Encoder = Callable[[Sequence[dict[str, Any]]], list[Encoded]]


class TokenStore:
    """A prepared split: memory-mapped arrays of `D` documents and `N` tokens.

    tokens: [N] uint16 or uint32.
    offsets: [D+1] int64, the first token of each document; the last entry is the closing token's.
    document_domains: [D] int32, indices into `domains`. document_bytes: [D] int64, UTF-8 bytes of the text, or of the
        answers in it.
    learned: [N] uint8, 1 for a token that is learned; None: all are. sizes: [N] uint32, the bytes of the text that end
        with each token, if `learned` is given.
    lost_bytes: for each domain, the number of bytes that no token represents, if any.
    text: held-out splits only, [Σ document_bytes] uint8, the documents one after another.
    content: a hash of all arrays. notes: lines about what the reader left out.
    least_fractions: for each domain, the least `validation_fraction` that would hold out one of these documents.
    cut: whether documents were cut out of text files.
    A store pickles as its path. Raises: ValueError if the folder is not a complete store.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        try:
            meta = json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))
            if meta["version"] != _VERSION:
                raise ValueError(f"version {meta['version']}")
            if meta.pop("sum") != _sum_of(meta):
                raise ValueError("meta.json has other values than were written")
            self.domains: tuple[str, ...] = tuple(map(str, meta["domains"]))
            self.end_of_text: int = int(meta["end_of_text"])
            self.begin_of_text: int | None = meta.get("begin_of_text")
            self.lost_bytes: dict[str, int] = {str(k): int(v) for k, v in meta.get("lost_bytes", {}).items()}
            self.num_documents: int = meta["documents"]
            self.content: str = meta["content"]
            self.notes: tuple[str, ...] = tuple(meta["notes"])
            self.least_fractions: dict[str, float] = meta["least_fractions"]
            self.cut: bool = meta["cut"]
            self.checksums: dict[str, str] = meta["checksums"]
            self.tokens = self._load("tokens", meta["tokens"])
            self.offsets = self._load("offsets", self.num_documents + 1)
            self.document_domains = self._load("domains", self.num_documents)
            self.document_bytes = self._load("bytes", self.num_documents)
            self.text = self._load("text", int(self.document_bytes.sum())) if "text" in self.checksums else None
            self.learned = self._load("learned", meta["tokens"]) if "learned" in self.checksums else None
            self.sizes = self._load("sizes", meta["tokens"]) if self.learned is not None else None
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
        """Raises ValueError for an index outside its array."""
        ends, inside = (0, len(self.tokens) - 1), self.document_domains
        integers = all(a.dtype.kind in "iu" for a in (self.tokens, self.offsets, inside, self.document_bytes))
        ordered = integers and tuple(self.offsets[[0, -1]]) == ends and bool((np.diff(self.offsets) > 0).all())
        outside = len(inside) and not 0 <= inside.min() <= inside.max() < len(self.domains)
        if self.learned is not None and (self.learned.dtype, self.sizes.dtype) != (np.uint8, np.uint32):
            raise ValueError("learned or sizes has another dtype")
        if not ordered or outside or not 0 <= self.end_of_text < 2**31:
            raise ValueError("offsets or domain ids are inconsistent")

    def verify(self) -> None:
        """Compares the checksums, which takes about a second a GB.

        A large store is read only if its files have changed since the last time. Raises: ValueError naming the first
        array that differs.
        """
        paths = [self.folder / f"{name}.npy" for name in self.checksums]
        large = sum(path.stat().st_size for path in paths) > _LARGE
        sums = Remembered(checksum, self.folder.parent / "verified.json" if large else None)(paths)
        for path, found in zip(paths, sums, strict=True):
            if found != self.checksums[path.stem]:
                raise ValueError(f"{path.name} has other bytes than were written")

    def __reduce__(self):
        return TokenStore, (self.folder,)

    def targets_per_document(self) -> np.ndarray:
        """Number of predicted tokens of each document, [D] int64, the end_of_text after it included."""
        if self.learned is not None:
            return np.add.reduceat(self.learned, self.offsets[:-1], dtype=np.int64)
        return np.diff(self.offsets) - (self.begin_of_text is not None)

    def texts(self) -> Iterator[tuple[str, str]]:
        """Yields (domain, text) of every document of a held-out split."""
        ends = np.cumsum(self.document_bytes)
        for which, begin, end in zip(self.document_domains, ends - self.document_bytes, ends, strict=True):
            yield self.domains[which], self.text[begin:end].tobytes().decode("utf-8")


def _sum_of(meta: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


def store_folder(cache: Path, identity: dict, tokenizer: Tokenizer) -> Path:
    """The folder of a store. Any change of the data, the source's fields or the tokenizer gives another folder."""
    key = json.dumps([_VERSION, identity, tokenizer.fingerprint], sort_keys=True)
    return cache / "tokens" / hashlib.blake2b(key.encode(), digest_size=12).hexdigest()


def _opened(folder: Path) -> TokenStore:
    """The store in `folder`, after a comparison of its checksums. Raises ValueError."""
    store = TokenStore(folder)
    try:
        store.verify()
    except (OSError, KeyError) as error:
        raise ValueError(str(error)) from error
    return store


def prepare_store(
    folder: Path,
    documents: Callable[[], Sequence[dict[str, str]]],
    tokenizer: Tokenizer,
    description: str = "",
    progress: bool = False,
    keep_text: bool = False,
    encode: Encoder | None = None,
) -> TokenStore:
    """The store in `folder`. A missing or damaged store is written first; damage is reported on stderr.

    documents: returns the sequence of `{"text", "domain"}`; called only if the store must be written.
    keep_text: whether the store also holds the text. encode: of documents with roles; None: they are texts.
    """
    try:
        return _opened(folder)
    except ValueError as error:
        if folder.exists():
            print(f"{description}: {folder} is damaged ({error}), so it is prepared again", file=sys.stderr, flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".partial-{folder.name}-"))
    # The folder of mkdtemp ignores the umask and belongs to its owner alone, but a cache is shared.
    partial = temporary / folder.name
    try:
        partial.mkdir()
        _write_store(partial, documents(), tokenizer, description, progress, keep_text, encode)
        return _publish(partial, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _publish(partial: Path, folder: Path) -> TokenStore:
    """The store after the rename to its place. A store of another process there is kept; a damaged one is removed."""
    for _ in range(10):  # other processes may do the same to this folder at the same time
        try:
            os.rename(partial, folder)
        except OSError:
            if not partial.exists():
                raise
        try:
            return _opened(folder)
        except ValueError:
            if not partial.exists():
                raise
        removed = tempfile.mkdtemp(dir=folder.parent, prefix=".damaged-")
        try:
            os.rename(folder, os.path.join(removed, folder.name))
        except FileNotFoundError:
            pass
        finally:
            shutil.rmtree(removed, ignore_errors=True)
    return TokenStore(folder)


class EncodeText:
    """Turns a batch of texts into `Encoded`: all of their tokens are learned."""

    def __init__(self, tokenizer: Tokenizer, description: str):
        self._tokenizer, self._description = tokenizer, description
        begin, end = tokenizer.begin_of_text, np.asarray([tokenizer.end_of_text], np.int32)
        self._front, self._back = (end, end[:0]) if begin is None else (np.asarray([begin], np.int32), end)

    def __call__(self, documents: Sequence[dict[str, str]]) -> list[Encoded]:
        kept = [d for d in documents if d["text"].strip()]
        made = self._tokenizer.encode_and_count([d["text"] for d in kept])
        full = [self._encoded(d, ids, lost) for (ids, lost), d in zip(made, kept, strict=True)]
        return [*full, *(Encoded(d, None, b"", 0, None, (docs.BLANK,)) for d in documents if not d["text"].strip())]

    def _encoded(self, document: dict[str, str], ids: np.ndarray, lost: int) -> Encoded:
        if np.isin(ids, [self._tokenizer.end_of_text, *self._front]).any():
            raise RuntimeError(f"{self._description}: the tokenizer made a special token from text")
        return Encoded(document, np.concatenate([self._front, ids, self._back]), document["text"].encode(), lost)


def _write_store(
    folder: Path,
    documents: Sequence,
    tokenizer: Tokenizer,
    description: str,
    progress: bool,
    keep_text: bool = False,
    encode: Encoder | None = None,
) -> None:
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    lengths, domains, sizes = array("q"), array("l"), array("q")
    numbers: dict[str, int] = {}
    least: dict[str, float] = {}
    counts: Counter[str] = Counter()
    lost: dict[str, int] = {}
    begin, roles = tokenizer.begin_of_text, encode is not None
    closing = np.asarray([tokenizer.end_of_text if begin is None or roles else begin], dtype)
    encode = encode or EncodeText(tokenizer, description)
    with (
        open(folder / "tokens.raw", "wb") as file,
        open(folder / "text.raw", "wb") as text_file,
        open(folder / "learned.raw", "wb") as learned_file,
        open(folder / "sizes.raw", "wb") as sizes_file,
        tqdm(total=len(documents), desc=f"tokenize {description}", unit="doc", disable=not progress) as bar,
    ):
        if len(documents):
            read = grain.MapDataset.source(documents).batch(_BATCH, batch_fn=list).map(encode)
            iterator = iter(read.to_iter_dataset(grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)))
            for batch in iterator:
                for made in batch:
                    document, tokens = made.document, made.tokens
                    counts.update(made.notes)
                    counts[docs.REPLACED] += "replaced" in document
                    if tokens is None:
                        continue
                    if not 0 <= tokens.min() <= tokens.max() < tokenizer.vocab_size:
                        raise RuntimeError(f"{description}: the tokenizer made ids beyond its vocabulary")
                    tokens.astype(dtype).tofile(file)
                    if roles:
                        made.learned.astype(np.uint8).tofile(learned_file)
                        made.sizes.astype(np.uint32).tofile(sizes_file)
                    if keep_text:
                        text_file.write(made.text)
                    domain = document["domain"]
                    lengths.append(len(tokens))
                    domains.append(numbers.setdefault(domain, len(numbers)))
                    sizes.append(len(made.text))
                    if made.lost:
                        lost[domain] = lost.get(domain, 0) + made.lost
                    least[domain] = min(least.get(domain, 1.0), docs.share_of(document))
                bar.update(min(_BATCH, len(documents) - bar.n))
            iterator.close()
        closing.tofile(file)
        np.zeros(1, np.uint8).tofile(learned_file)
        np.zeros(1, np.uint32).tofile(sizes_file)
    total = sum(lengths) + 1
    _as_array(folder, "tokens", dtype, total)
    optional = ("text", keep_text, np.uint8, sum(sizes)), ("learned", roles, np.uint8, total)
    for name, kept, kind, size in (*optional, ("sizes", roles, np.uint32, total)):
        _as_array(folder, name, kind, size) if kept else (folder / f"{name}.raw").unlink()
    np.save(folder / "offsets.npy", np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64))
    np.save(folder / "domains.npy", np.asarray(domains, np.int32))
    np.save(folder / "bytes.npy", np.asarray(sizes, np.int64))
    meta = {"version": _VERSION, "documents": len(lengths), "tokens": total, "end_of_text": tokenizer.end_of_text}
    meta |= {"domains": list(numbers), "source": description, "least_fractions": least}
    meta |= {} if begin is None else {"begin_of_text": begin}
    meta |= {"lost_bytes": lost} if lost else {}
    meta["cut"] = getattr(documents, "cut", False)
    lines = encode.lines() if roles else ()
    meta["notes"] = [*getattr(documents, "notes", ()), *lines, *_account(description, counts)]
    arrays = {name: path for name in _ARRAYS if (path := folder / f"{name}.npy").exists()}
    meta["checksums"] = {name: checksum(path) for name, path in arrays.items()}
    parts = [
        meta["domains"],
        meta["end_of_text"],
        *([] if begin is None else [begin]),
        [content_hash(path) for path in arrays.values()],
    ]
    meta["content"] = hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
    (folder / "meta.json").write_text(json.dumps(meta | {"sum": _sum_of(meta)}, indent=1) + "\n", encoding="utf-8")


def _as_array(folder: Path, name: str, dtype: Any, length: int) -> None:
    """Turns `<name>.raw` into `<name>.npy`."""
    with open(folder / f"{name}.npy", "wb") as file, open(folder / f"{name}.raw", "rb") as raw:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": (length,)}
        np.lib.format.write_array_header_1_0(file, header)
        shutil.copyfileobj(raw, file, 1 << 22)
    (folder / f"{name}.raw").unlink()


def _account(description: str, counts: Counter[str]) -> list[str]:
    return [f"{description}: {what}: {n:,}" for what, n in counts.items() if n]
