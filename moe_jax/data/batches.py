"""Batches from rows by random access: the rows that a process reads, and an iterator whose state is a count."""

import hashlib
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import grain
import numpy as np
from absl import flags

from moe_jax.data.packing import WholeRows
from moe_jax.data.rows import PackedRows
from moe_jax.errors import ConfigError

Rows = dict[str, np.ndarray]
SHARED_MEMORY = Path("/dev/shm")
BUFFERED = 2  # batches that each reader process has ready


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


class ValidationRows:
    """Chosen rows of all sources' validation splits, followed by rows of padding that fill the last batch."""

    def __init__(self, parts: Sequence[PackedRows | WholeRows], chosen: np.ndarray, length: int, padding: Rows):
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


def random_key(*parts: object) -> int:
    """A seed for Grain that depends on the parts alone."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest())


def with_labels(batch: Rows, labels: np.ndarray | None) -> Rows:
    """The batch with the label of each token's domain, `label` [n, S] int32; the batch itself without labels.

    labels: [domains] int32, the label of each domain.
    """
    return batch if labels is None else batch | {"label": labels[batch["domain_ids"]]}


def check_rows(rows: Sequence[int], batch_size: int) -> tuple[int, ...]:
    """The rows of a batch that a process reads. Raises ValueError unless they are sorted, distinct and in the batch."""
    rows = tuple(int(r) for r in rows)
    if not rows or list(rows) != sorted(set(rows)) or rows[0] < 0 or rows[-1] >= batch_size:
        raise ValueError(f"rows must be sorted, distinct and in range({batch_size}), at least one: {rows}")
    return rows


def check_shared_memory(num_workers: int, batch_bytes: int) -> None:
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


def read_batches(
    elements: grain.MapDataset, batch_size: int, rows: tuple[int, ...], first: int, num_workers: int
) -> grain.IterDataset:
    """Batches of chosen rows from batch `first` on, read ahead by threads or by processes."""
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

    def __init__(
        self, elements, batch_size: int, rows: Sequence[int], num_workers: int, labels: np.ndarray | None = None
    ):
        """labels: of each domain, for `with_labels`."""
        self._labels, self._elements, self._batch_size, self._num_workers = labels, elements, batch_size, num_workers
        self._rows = check_rows(rows, batch_size)
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
        batch = {k: np.array(v) for k, v in batch.items()} if self._num_workers else batch
        return with_labels(batch, self._labels)

    def _read(self) -> Rows:
        if self._iterator is None:
            made = read_batches(self._elements, self._batch_size, self._rows, self._count, self._num_workers)
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
