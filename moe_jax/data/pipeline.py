"""Turns a `DataConfig` into batches: prepared stores, one Grain pipeline, and an iterator whose state is a count.

Batch s of the optimizer consists of the elements s·B … s·B+B−1 of one infinite sequence, which depends on (config,
seed) alone. The sequence has the rows of `rows.PackedRows` of each source, shuffled anew each epoch, mixed by weight,
and in random order within a batch. A process asks for its `rows` of each batch and reads only these. Neither that split
nor `num_workers` changes the content of a batch.

A batch is the dict of `PackedRows`, stacked to [n, S], and `sequence_ids` [n] int32, the index of each row in the
optimizer batch. `n`: rows of this process; `S`: tokens of a row.
"""

import hashlib
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
from absl import flags

from moe_jax.config import DataConfig
from moe_jax.data import record, tokenizers
from moe_jax.data.corpus import TokenStore, prepare_store, store_folder
from moe_jax.data.held_out import NotHeldOut, not_held_out
from moe_jax.data.rows import PackedRows, padding_row, permutation
from moe_jax.data.sources import SPLITS, Source, Split, check_cache, check_sources, open_source
from moe_jax.errors import ConfigError

Rows = dict[str, np.ndarray]
SHARED_MEMORY = Path("/dev/shm")
BUFFERED = 2  # batches that each reader process has ready


def prepare(
    cfg: DataConfig, *, workdir: str | Path | None, seed: int, progress: bool = True, init_from: str = ""
) -> "Corpus":
    """The corpus of a run. Prepares data sets, tokenizer and token stores first where they do not exist yet.

    workdir: the directory that keeps the tokenizer; None for a run that has not begun (`Corpus.keep_tokenizer`).
    seed: decides the order of the training data. The prepared data does not depend on it.
    init_from: the run directory whose weights, and so whose tokenizer, a new run starts with.
    Raises: ConfigError for a mistake in the configuration.
    """
    cache = check_cache(cfg)
    sources = {name: open_source(name, source, cache, progress) for name, source in cfg.sources.items()}
    tokenizer = tokenizers.load_or_make(cfg.tokenizer, workdir, lambda: _training_text(cfg, sources), init_from)
    stores = {}
    for name, source in sources.items():
        for split in SPLITS:
            if _is_read(cfg, name, split):
                folder = store_folder(cache, source.identity(split), tokenizer)
                read = lambda source=source, split=split: source.documents(split)
                stores[name, split] = prepare_store(
                    folder, read, tokenizer, f"{name}/{split}", progress, keep_text=split == "validation"
                )
                if split == "train":
                    _check_some_text_is_kept(cfg, name, stores[name, split])
    return Corpus(cfg, sources, tokenizer, stores, seed)


def _check_some_text_is_kept(cfg: DataConfig, name: str, store: TokenStore) -> None:
    size = int(store.document_bytes.sum())
    if size and store.targets_per_document().sum() == store.num_documents:  # the only targets are the ends of documents
        rule = f"has a token for none of the {size:,} bytes of data.sources.{name}"
        raise ConfigError("data.tokenizer.path", cfg.tokenizer.path, rule, "use a tokenizer of such text")


def _is_read(cfg: DataConfig, name: str, split: Split) -> bool:
    source = cfg.sources[name]
    if split == "train":
        return source.weight > 0
    return bool(source.validation_split) if source.kind == "tfds" else source.validation_fraction > 0


def _training_text(cfg: DataConfig, sources: dict[str, Source]) -> Iterator[str]:
    """Yields documents to train the tokenizer on, `train_bytes` of UTF-8 in all, in a fixed random order.

    Each source has a share in proportion to its weight. The sources after a small one share what it does not use.
    """
    left, weight_left = cfg.tokenizer.train_bytes, sum(s.weight for s in cfg.sources.values())
    for name, source in cfg.sources.items():
        if source.weight == 0:
            continue
        share = budget = round(left * source.weight / weight_left)
        documents = sources[name].documents("train")
        for index in permutation(len(documents), "tokenizer", name):
            if share <= 0:
                break
            raw = documents[int(index)]["text"].encode("utf-8")
            yield raw[:share].decode("utf-8", "ignore")
            share -= len(raw[:share])
        left, weight_left = left - (budget - share), weight_left - source.weight


# --- random access ---------------------------------------------------------------------------------------------------


class _Share(grain.MapDataset):
    """The rows that one process reads: element k is row `rows[k mod n]` of batch `first + k div n`."""

    def __init__(self, elements: grain.MapDataset, batch_size: int, rows: tuple[int, ...], first: int):
        super().__init__(elements)
        self._elements, self._batch_size, self._rows, self._first = elements, batch_size, rows, first

    def __len__(self) -> int:
        return (len(self._elements) // self._batch_size - self._first) * len(self._rows)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        batch, i = divmod(index, len(self._rows))
        row = self._rows[i]
        element = self._elements[(self._first + batch) * self._batch_size + row]
        return element | {"sequence_ids": np.int32(row)}


class _ValidationRows:
    """Chosen rows of all sources' validation splits, followed by rows of padding that fill the last batch."""

    def __init__(self, parts: Sequence[PackedRows], chosen: np.ndarray, length: int, padding: Rows):
        self._parts, self._chosen, self._length, self._padding = parts, chosen, length, padding
        self._starts = np.cumsum([0] + [len(p) for p in parts])

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Rows:
        if index >= len(self._chosen):
            return dict(self._padding)
        row = int(self._chosen[index])
        part = int(np.searchsorted(self._starts, row, "right")) - 1
        return self._parts[part][row - int(self._starts[part])]


def _key(*parts: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest())


def _check_rows(rows: Sequence[int], batch_size: int) -> tuple[int, ...]:
    rows = tuple(int(r) for r in rows)
    if not rows or list(rows) != sorted(set(rows)) or rows[0] < 0 or rows[-1] >= batch_size:
        raise ValueError(f"rows must be sorted, distinct and in range({batch_size}), at least one: {rows}")
    return rows


def _check_shared_memory(num_workers: int, batch_bytes: int) -> None:
    """Raises ConfigError if there is too little shared memory for the batches of reader processes."""
    need = num_workers * (BUFFERED + 1) * batch_bytes
    if not SHARED_MEMORY.is_dir():  # some systems have shared memory elsewhere
        return
    free = shutil.disk_usage(SHARED_MEMORY).free
    try:
        with tempfile.TemporaryFile(dir=SHARED_MEMORY):
            pass
    except OSError as error:
        rule = f"reader processes pass batches through {SHARED_MEMORY}, which cannot be written ({error.strerror})"
        raise ConfigError("data.num_workers", num_workers, rule, "nearest valid: 0") from None
    if free < need:
        rule = f"reader processes need up to {need / 2**20:,.1f} MiB in {SHARED_MEMORY}; {free / 2**20:,.1f} are free"
        raise ConfigError("data.num_workers", num_workers, rule, "nearest valid: 0")


def _batches(
    elements: grain.MapDataset, batch_size: int, rows: tuple[int, ...], first: int, num_workers: int
) -> grain.IterDataset:
    share = _Share(elements, batch_size, rows, first).batch(len(rows), drop_remainder=True)
    threads = 1 if num_workers else 4
    made = share.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads))
    if num_workers:
        if not flags.FLAGS.is_parsed():  # in a notebook; Grain needs the defaults of its own flags
            flags.FLAGS.mark_as_parsed()
        made = made.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=BUFFERED))
    return made


class TrainIterator:
    """An endless iterator over the training batches of one process.

    Its state is the number of batches delivered, so a process with other `rows` can continue from it.
    """

    def __init__(self, elements, batch_size: int, rows: Sequence[int], num_workers: int):
        self._elements, self._batch_size, self._num_workers = elements, batch_size, num_workers
        self._rows = _check_rows(rows, batch_size)
        self._count = self._begun = 0
        self._iterator = None

    def __iter__(self) -> "TrainIterator":
        return self

    def __next__(self) -> Rows:
        try:
            batch = self._read()
        except RuntimeError as error:  # a reader process was killed
            if self._count == self._begun:
                raise
            line = f"reader processes ended ({str(error).splitlines()[0]}); new ones start at batch {self._count}"
            print(line, file=sys.stderr, flush=True)
            self.close()
            batch = self._read()
        self._count += 1
        # The arrays of a reader process lie in shared memory, which it may reuse while the batch is in use: copy them.
        return {k: np.array(v) for k, v in batch.items()} if self._num_workers else batch

    def _read(self) -> Rows:
        if self._iterator is None:
            made = _batches(self._elements, self._batch_size, self._rows, self._count, self._num_workers)
            self._iterator, self._begun = iter(made), self._count
        return next(self._iterator)

    def get_state(self) -> dict[str, int]:
        """The state as JSON values."""
        return {"batches": self._count}

    def set_state(self, state: dict[str, int]) -> None:
        """Continues after `state["batches"]` batches, without reading those before."""
        self.close()
        self._count = int(state["batches"])

    def close(self) -> None:
        """Ends reader threads and processes. The next batch starts new ones."""
        if self._iterator is not None:
            self._iterator.close()
        self._iterator = None


# --- the corpus ------------------------------------------------------------------------------------------------------


class Corpus:
    """The prepared data of a run.

    domains: names of the domains of all sources and splits, sorted; `domain_ids` of batches are indices into it.
    bytes_per_token: [domains] float64, UTF-8 bytes per predicted token of the validation split, or of the training
        split for a domain without validation documents. Bits per byte = nats per token / ln 2 / bytes_per_token.
    """

    def __init__(self, cfg: DataConfig, sources: dict[str, Source], tokenizer, stores: dict, seed: int):
        self._cfg, self._sources, self._seed = cfg, sources, seed
        self.tokenizer: tokenizers.Tokenizer = tokenizer
        self.stores: dict[tuple[str, Split], TokenStore] = stores
        self.domains: tuple[str, ...] = tuple(sorted({d for store in stores.values() for d in store.domains}))
        self._train, self._weights = [], []
        for name, source in cfg.sources.items():
            if source.weight > 0:
                self._train.append(self._rows(name, "train"))
                self._weights.append(source.weight)
        self._validation = [self._rows(name, split) for name, split in stores if split == "validation"]
        self.bytes_per_token = self._bytes_per_token()

    def keep_tokenizer(self, workdir: str | Path) -> None:
        """Saves the tokenizer in the directory of a new run, which then needs no other file of it."""
        tokenizers.save(self.tokenizer, self._cfg.tokenizer, workdir)

    def _rows(self, name: str, split: Split) -> PackedRows:
        store, s = self.stores[name, split], self._cfg.seq_len
        ids = [self.domains.index(d) for d in store.domains]
        if split == "validation":
            return PackedRows(store, s, None, partial=True, domain_ids=ids)
        rows = PackedRows(store, s, self._seed, name=name, domain_ids=ids)
        if len(rows) == 0:
            targets = len(store.tokens) - 1
            rule = f"must be ≤ {targets}, the tokens in the training split of data.sources.{name}"
            raise ConfigError("data.seq_len", s, rule, f"nearest valid: {targets}" if targets > 1 else "add documents")
        return rows

    def _bytes_per_token(self) -> np.ndarray:
        sums = {split: np.zeros((2, len(self.domains))) for split in SPLITS}
        for row in self.stats():
            sums[row["split"]][:, self.domains.index(row["domain"])] += row["bytes"], row["tokens"]
        size, tokens = np.where(sums["validation"][1] > 0, sums["validation"], sums["train"])
        return size / tokens

    def stats(self) -> list[dict]:
        """A dict for each (source, split, domain): documents, bytes of UTF-8 text, tokens (predicted in one epoch)."""
        out = []
        for (name, split), store in self.stores.items():
            which, targets = store.document_domains, store.targets_per_document()
            for i, domain in enumerate(store.domains):
                mine = which == i
                size, tokens = int(store.document_bytes[mine].sum()), int(targets[mine].sum())
                counts = {"documents": int(mine.sum()), "bytes": size, "tokens": tokens}
                out.append({"source": name, "split": split, "domain": domain, **counts})
        return sorted(out, key=lambda row: (row["source"], row["split"], row["domain"]))

    def table(self) -> str:
        """The rows of `stats` as a table of text."""
        rows = self.stats()
        width = [max(len(c), *(len(r[c]) for r in rows), 1) for c in ("source", "split", "domain")]
        line = "  ".join([f"{{:<{w}}}" for w in width] + ["{:>9}", "{:>13}", "{:>13}"])
        head = line.format("source", "split", "domain", "documents", "bytes", "tokens")
        numbers = ("documents", "bytes", "tokens")
        body = [line.format(r["source"], r["split"], r["domain"], *(f"{r[c]:,}" for c in numbers)) for r in rows]
        return "\n".join([head, *body])

    def train_iterator(self, rows: Sequence[int]) -> TrainIterator:
        """An endless iterator over training batches. rows: sorted indices in range(batch_size) of this process.

        Raises: ConfigError if there is too little shared memory for `num_workers` readers.
        """
        if self._cfg.num_workers:  # six arrays of four bytes a token
            _check_shared_memory(self._cfg.num_workers, len(rows) * self._cfg.seq_len * 6 * 4)
        mixed = []
        for name, packed in zip((n for n, s in self._cfg.sources.items() if s.weight > 0), self._train, strict=True):
            mixed.append(grain.MapDataset.source(packed).shuffle(seed=_key("rows", self._seed, name)).repeat())
        elements = mixed[0]
        if len(mixed) > 1:
            # `mix` takes sources in turn, so a few neighbours would always have all sources in proportion. Training on
            # shuffled documents does not have that, and a load-balancing loss over few sequences should not see it.
            in_turn = grain.MapDataset.mix(mixed, self._weights)
            elements = grain.experimental.WindowShuffleMapDataset(
                in_turn, window_size=self._cfg.batch_size, seed=_key("batch", self._seed)
            )
        return TrainIterator(elements, self._cfg.batch_size, rows, self._cfg.num_workers)

    def num_validation_batches(self, limit: int = 0) -> int:
        """Number of batches of held-out text, at most `limit`; 0: all."""
        batches = -(-self.num_validation_rows() // self._cfg.batch_size)
        return min(batches, limit) if limit else batches

    def num_validation_rows(self, limit: int = 0) -> int:
        """Number of rows of held-out text in `limit` batches, or in all (0), without the padding in the last."""
        total = sum(len(part) for part in self._validation)
        return min(total, limit * self._cfg.batch_size) if limit else total

    def validation_batches(self, rows: Sequence[int], limit: int = 0) -> Iterator[Rows]:
        """Batches of the held-out split, read once, one source after another. Padding rows fill the last batch.

        limit: maximum number of batches, whose rows are spread evenly over the split; 0: all.
        """
        rows = _check_rows(rows, self._cfg.batch_size)
        total, length = self.num_validation_rows(), self.num_validation_batches(limit) * self._cfg.batch_size
        taken = min(total, length)
        # These are all rows if taken == total.
        chosen = (2 * np.arange(taken, dtype=np.int64) + 1) * total // (2 * max(taken, 1))
        padding = padding_row(self._cfg.seq_len, self.tokenizer.end_of_text)
        return self._validate(_ValidationRows(self._validation, chosen, length, padding), rows)

    def _validate(self, elements: _ValidationRows, rows: tuple[int, ...]) -> Iterator[Rows]:
        if len(elements):
            iterator = iter(_batches(grain.MapDataset.source(elements), self._cfg.batch_size, rows, 0, 0))
            yield from iterator
            iterator.close()

    def validation_texts(self) -> Iterator[tuple[str, str]]:
        """Yields (domain, text) of every held-out document, in the order of the validation batches."""
        for (_, split), store in self.stores.items():
            if split == "validation":
                yield from store.texts()

    def notes(self) -> list[str]:
        """Lines for the user: how documents begin, what readers and the tokenizer left out, domains without held-out
        text."""
        read = [line for store in self.stores.values() for line in store.notes]
        return [*self.tokenizer.lines, *dict.fromkeys(read), *self._lost(), *map(str, self.not_held_out())]

    def _lost(self) -> Iterator[str]:
        """Yields a line for each store from whose text the tokenizer dropped something."""
        for (name, split), store in self.stores.items():
            if lost := store.lost_bytes:
                total, size = sum(lost.values()), int(store.document_bytes.sum())
                where = ", ".join(f"{domain} {count:,}" for domain, count in sorted(lost.items()))
                share = f"{total:,} of {size:,} bytes ({100 * total / size:.2g} %)"
                rule = "the tokenizer has no token for them, but bits per byte counts them"
                yield f"{name}/{split}: {share} of text are lost ({where}): {rule}"

    def not_held_out(self) -> list[NotHeldOut]:
        """The domains that are trained on but not evaluated."""
        return not_held_out(self._cfg, self.stores)

    def record(self) -> dict[str, Any]:
        """The record of what was read, as JSON values."""
        return record.record(self._sources, self.tokenizer.fingerprint, self.stores)


__all__ = ["Corpus", "Rows", "TrainIterator", "check_sources", "prepare"]
