"""Turns a `DataConfig` into batches: prepared stores, one Grain pipeline, and an iterator whose state is a count.

A source is an infinite sequence of the rows of `rows.PackedRows` (of `packing.WholeRows` for one with roles), shuffled
anew each epoch. A batch has the next rows of each source; phases.py says how many. So it depends on (config, seed) and,
where a controller sets the weights of sources during training, on these. A process asks for its `rows` of each batch
and reads only these. Neither that split nor `num_workers` changes the content of a batch.

A batch is the dict of `PackedRows`, stacked to [n, S], and `sequence_ids` [n] int32, the index of each row in the
optimizer batch; with `data.labels` also `label` [n, S] int32. `n`: rows of this process; `S`: tokens of a row.
"""

import itertools
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import grain
import numpy as np

from moe_jax import config
from moe_jax.config import DataConfig, MixtureConfig
from moe_jax.config.data import GAP_TOKENS
from moe_jax.data import chat, labels, record, tokenizers
from moe_jax.data.answers import open_roles
from moe_jax.data.batches import (
    Rows,
    TrainIterator,
    ValidationRows,
    check_rows,
    check_shared_memory,
    random_key,
    read_batches,
    with_labels,
)
from moe_jax.data.begin_of_text import BEGIN
from moe_jax.data.corpus import TokenStore, prepare_store, store_folder
from moe_jax.data.denoise import DenoisedRows
from moe_jax.data.held_out import NotHeldOut, not_held_out, targets_of
from moe_jax.data.packing import WholeRows
from moe_jax.data.phases import MixedIterator
from moe_jax.data.rows import PackedRows, padding_row, permutation
from moe_jax.data.sources import SPLITS, Source, Split, check_cache, check_sources, open_source
from moe_jax.errors import ConfigError

_SAMPLED = 32  # characters of a document with which a sample begins, at most


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
    stores, templates = {}, set()
    for name, source in sources.items():
        with open_roles(name, cfg.sources[name], tokenizer) as (its, encode):
            for split in SPLITS:
                if _is_read(cfg, name, split):
                    folder = store_folder(cache, source.identity(split) | its, tokenizer)
                    read = lambda source=source, split=split: source.documents(split)
                    what, keep = f"{name}/{split}", split == "validation"
                    stores[name, split] = prepare_store(folder, read, tokenizer, what, progress, keep, encode)
                    if split == "train":
                        _check_some_text_is_kept(cfg, name, stores[name, split])
            templates |= {encode.template} if encode and encode.template else set()
        source.forget()
    if len(templates) == 1:
        chat.keep(tokenizer, *templates)
    return Corpus(cfg, sources, tokenizer, stores, seed)


def _check_some_text_is_kept(cfg: DataConfig, name: str, store: TokenStore) -> None:
    size = int(store.document_bytes.sum()) if store.learned is None else 0
    if size and store.targets_per_document().sum() == store.num_documents:  # the only targets are the ends of documents
        rule = f"has a token for none of the {size:,} bytes of data.sources.{name}"
        raise ConfigError("data.tokenizer.path", cfg.tokenizer.path, rule, "use a tokenizer of such text")


def _is_read(cfg: DataConfig, name: str, split: Split) -> bool:
    source = cfg.sources[name]
    return source.is_trained if split == "train" else source.holds_out


def _training_text(cfg: DataConfig, sources: dict[str, Source]) -> Iterator[str]:
    """Yields documents to train the tokenizer on, `train_bytes` of UTF-8 in all, in a fixed random order.

    Each source has a share in proportion to its weight. The sources after a small one share what it does not use.
    """
    left, weight_left = cfg.tokenizer.train_bytes, sum(Fraction(s.weight) for s in cfg.sources.values())
    for name, source in cfg.sources.items():
        if source.weight == 0:
            continue
        share = budget = round(left * Fraction(source.weight) / weight_left)
        documents = sources[name].documents("train")
        for index in permutation(len(documents), "tokenizer", name):
            if share <= 0:
                break
            raw = documents[int(index)]["text"].encode("utf-8")
            yield raw[:share].decode("utf-8", "ignore")
            share -= len(raw[:share])
        left, weight_left = left - (budget - share), weight_left - Fraction(source.weight)


# --- the corpus ------------------------------------------------------------------------------------------------------


class Corpus:
    """The prepared data of a run.

    domains: names of the domains of all sources and splits, sorted; `domain_ids` of batches are indices into it.
    bytes_per_token: [domains] float64, UTF-8 bytes per predicted token of the validation split, or of the training
        split for a domain without validation documents. Bits per byte = nats per token / ln 2 / bytes_per_token. Of
        documents with roles those tokens count that rows have. NaN for a domain of which rows have nothing.
    labels: [domains] int32, the label of each domain; None without data.labels.
    """

    def __init__(self, cfg: DataConfig, sources: dict[str, Source], tokenizer, stores: dict, seed: int):
        self._cfg, self._sources, self._seed = cfg, sources, seed
        self.tokenizer: tokenizers.Tokenizer = tokenizer
        self.stores: dict[tuple[str, Split], TokenStore] = stores
        self.domains: tuple[str, ...] = tuple(sorted({d for store in stores.values() for d in store.domains}))
        self.labels = labels.of_domains(cfg.labels, self.domains)
        self._train: dict[str, PackedRows | WholeRows | DenoisedRows] = {}  # of sources that are trained on
        self._packed: dict[tuple[str, Split], WholeRows] = {}  # of sources with roles
        for name, source in cfg.sources.items():
            if source.is_trained:
                self._train[name] = self._rows(name, "train")
        self._validation = {name: self._rows(name, split) for name, split in stores if split == "validation"}
        self.bytes_per_token = self._bytes_per_token()

    def check_labels(self) -> None:
        """Raises ConfigError for a label without training text, as `labels.check` says."""
        labels.check(self._cfg.labels, self.domains, self.stats())

    @property
    def trained(self) -> tuple[str, ...]:
        """The names of the sources that are trained on, sorted: the order of cursors and weights of a phase."""
        return tuple(sorted(self._train))

    def rows_of(self, name: str, split: Split) -> PackedRows | WholeRows | DenoisedRows | None:
        """The rows of a source's split, each once; None if nothing of it is read."""
        return (self._train if split == "train" else self._validation).get(name)

    def targets(self, cfg: MixtureConfig) -> tuple[str, ...]:
        """The sources whose held-out text a controller observes. Raises ConfigError if it has no row of it."""
        return targets_of(cfg, self.trained, self._validation)

    def keep_tokenizer(self, workdir: str | Path) -> None:
        """Saves the tokenizer in the directory of a new run, which then needs no other file of it."""
        tokenizers.save(self.tokenizer, self._cfg.tokenizer, workdir)

    @property
    def vocab_size(self) -> int:
        """The number of token ids in batches: those of the tokenizer, and of rows with gaps after them."""
        return self.tokenizer.vocab_size + GAP_TOKENS * bool(self._cfg.with_gaps)

    def _rows(self, name: str, split: Split) -> PackedRows | WholeRows | DenoisedRows:
        store, s = self.stores[name, split], self._cfg.seq_len
        ids = [self.domains.index(d) for d in store.domains]
        if store.learned is not None:
            return self._whole_rows(store, name, split, ids)
        if split == "validation":
            return PackedRows(store, s, None, partial=True, domain_ids=ids)
        rows = PackedRows(store, s, self._seed, name=name, domain_ids=ids)
        if len(rows) == 0:
            targets = len(store.tokens) - 1
            rule = f"must be ≤ {targets}, the tokens in the training split of data.sources.{name}"
            raise ConfigError("data.seq_len", s, rule, f"nearest valid: {targets}" if targets > 1 else "add documents")
        share = self._cfg.sources[name].denoise
        return DenoisedRows(rows, share, self._seed, name, self.tokenizer.vocab_size) if share else rows

    def _whole_rows(self, store: TokenStore, name: str, split: Split, ids: list[int]) -> WholeRows:
        s, seed = self._cfg.seq_len, None if split == "validation" else self._seed
        rows = self._packed[name, split] = WholeRows(store, s, seed, name=name, domain_ids=ids)
        if split == "train" and len(rows) == 0:
            raise self._nothing_fits(name, "document", rows)
        return rows

    def _nothing_fits(self, name: str, what: str, rows: WholeRows) -> ConfigError:
        s = self._cfg.seq_len
        rule = f"must be larger: no {what} of data.sources.{name} has an answer in its first {s + 1} tokens"
        hint = f"nearest valid: {rows.least()}" if rows.store.num_documents else "add documents"
        return ConfigError("data.seq_len", s, rule, hint)

    def _bytes_per_token(self) -> np.ndarray:
        sums = {split: np.zeros((2, len(self.domains))) for split in SPLITS}
        for row in self.stats():
            sums[row["split"]][:, self.domains.index(row["domain"])] += row["bytes"], row["tokens"]
        size, tokens = np.where(sums["validation"][1] > 0, sums["validation"], sums["train"])
        return np.divide(size, tokens, out=np.full(len(tokens), np.nan), where=tokens > 0)

    def stats(self) -> list[dict]:
        """A dict for each (source, split, domain): documents, bytes of UTF-8 text, tokens (predicted in one epoch).

        Of a source with roles: documents in rows, and the bytes and tokens of answers that rows have of these.
        """
        out = []
        for (name, split), store in self.stores.items():
            rows = self._packed.get((name, split))
            targets, sizes = store.targets_per_document(), store.document_bytes
            if rows is not None:
                targets, sizes = rows.targets, rows.bytes
            for i, domain in enumerate(store.domains):
                mine = (store.document_domains == i) & (targets > 0)
                size, tokens = int(sizes[mine].sum()), int(targets[mine].sum())
                counts = {"documents": int(mine.sum()), "bytes": size, "tokens": tokens}
                out.append({"source": name, "split": split, "domain": domain, **counts})
        return sorted(out, key=lambda row: (row["source"], row["split"], row["domain"]))

    def epochs(self, steps: int, stages: Sequence[int] = ()) -> dict[str, tuple[float, float]]:
        """Share of the training rows, 0 to 1, and epochs in `steps` steps, of each source that is trained on.

        stages: those of `mixture.stages`, some of which may never begin. What other controllers will do is not known.
        """
        shares = dict.fromkeys(self._train, 0.0)
        borders = (0, *(min(stage, steps) for stage in stages), steps)
        for stage, (begin, end) in enumerate(itertools.pairwise(borders)):
            weights = {name: self._cfg.sources[name].weight_in(stage) for name in shares}
            for name, share in config.shares(weights).items():
                shares[name] += (end - begin) / steps * share
        drawn = steps * self._cfg.batch_size
        return {name: (shares[name], shares[name] * drawn / len(rows)) for name, rows in self._train.items()}

    def table(self, steps: int = 0, stages: Sequence[int] = ()) -> str:
        """The rows of `stats` as a table of text. steps: of the run; with it each source also has its weight, its share
        of the training rows, and how often the run reads it. stages: see `epochs`."""
        rows, found = self.stats(), self.epochs(steps, stages) if steps else {}
        cells = [[r["source"], r["split"], r["domain"], *(f"{r[c]:,}" for c in ("documents", "bytes", "tokens"))]
                 for r in rows]  # fmt: skip
        head = ["source", "split", "domain", "documents", "bytes", "tokens"]
        if steps:
            head += ["weight", "share", "epochs"]
            for row in cells:
                share, epochs = found.pop(row[0], (0.0, 0.0)) if row[1] == "train" else (0.0, 0.0)
                source = self._cfg.sources[row[0]]
                weights = ", ".join(f"{w:g}" for w in (source.weight, *source.stage_weights))
                named = [weights, f"{share:.1%}", f"{epochs:.2f}"]
                row += named if share else [""] * 3
        widths = [max(len(row[i]) for row in [head, *cells]) for i in range(len(head))]
        line = lambda row: "  ".join(
            f"{cell:<{w}}" if i < 3 else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        return "\n".join(line(row).rstrip() for row in [head, *cells])

    def train_iterator(self, rows: Sequence[int]) -> TrainIterator:
        """An endless iterator over training batches. rows: sorted indices in range(batch_size) of this process.

        Raises: ConfigError if there is too little shared memory for `num_workers` readers.
        """
        if self._cfg.num_workers:  # six arrays of four bytes a token
            check_shared_memory(self._cfg.num_workers, len(rows) * self._cfg.seq_len * 6 * 4)
        mixed, workers = [], self._cfg.num_workers
        for name in self.trained:
            rows_of = grain.MapDataset.source(self._train[name])
            mixed.append(rows_of.shuffle(seed=random_key("rows", self._seed, name)).repeat())
        if len(mixed) > 1:
            weights = [self._cfg.sources[name].weight for name in self.trained]
            return MixedIterator(mixed, weights, self._seed, self._cfg.batch_size, rows, workers, self.labels)
        return TrainIterator(mixed[0], self._cfg.batch_size, rows, workers, self.labels)

    def num_validation_batches(self, limit: int = 0) -> int:
        """Number of batches of held-out text, at most `limit`; 0: all."""
        batches = -(-self.num_validation_rows() // self._cfg.batch_size)
        return min(batches, limit) if limit else batches

    def num_validation_rows(self, limit: int = 0) -> int:
        """Number of rows of held-out text in `limit` batches, or in all (0), without the padding in the last."""
        total = sum(map(len, self._validation.values()))
        return min(total, limit * self._cfg.batch_size) if limit else total

    def validation_batches(self, rows: Sequence[int], limit: int = 0) -> Iterator[Rows]:
        """Batches of the held-out split, read once, one source after another. Padding rows fill the last batch.

        limit: maximum number of batches, whose rows are spread evenly over the split; 0: all.
        """
        rows = check_rows(rows, self._cfg.batch_size)
        total, length = self.num_validation_rows(), self.num_validation_batches(limit) * self._cfg.batch_size
        taken = min(total, length)
        # These are all rows if taken == total.
        chosen = (2 * np.arange(taken, dtype=np.int64) + 1) * total // (2 * max(taken, 1))
        padding = padding_row(self._cfg.seq_len, self.tokenizer.end_of_text)
        return self._validate(ValidationRows([*self._validation.values()], chosen, length, padding), rows)

    def _validate(self, elements: ValidationRows, rows: tuple[int, ...]) -> Iterator[Rows]:
        if len(elements):
            iterator = iter(read_batches(grain.MapDataset.source(elements), self._cfg.batch_size, rows, 0, 0))
            yield from (with_labels(batch, self.labels) for batch in iterator)
            iterator.close()

    def beginning(self) -> list[int]:
        """The tokens with which a document of the held-out text begins, for a sample: its first words, or the prompt
        before the first answer of the first document whose prompt fits into a row."""
        held_out = (store for (_, split), store in self.stores.items() if split == "validation")
        store = next(store for store in held_out if store.num_documents)
        first = int(store.tokens[0])
        if store.learned is not None:
            for begin, end in zip(store.offsets[:-1], store.offsets[1:], strict=True):
                length = int(np.argmax(store.learned[begin:end]))  # 0: no answer
                if 0 < length < self._cfg.seq_len:
                    return store.tokens[begin : begin + length].tolist()
            return [first]
        words = next(store.texts())[1].lstrip()[:_SAMPLED]
        words = words[: max(words.rfind(" "), words.rfind("\n"))] if len(words) == _SAMPLED else words
        return [first, *self.tokenizer.encode([words])[0].tolist()]

    def validation_texts(self) -> Iterator[tuple[str, str]]:
        """Yields (domain, text) of what is evaluated of every held-out document, in the order of the store."""
        for (name, split), store in self.stores.items():
            if split == "validation":
                yield from self._packed.get((name, split), store).texts()

    def notes(self) -> list[str]:
        """Lines for the user: how documents begin, what readers and the tokenizer left out, domains without held-out
        text."""
        read = [line for store in self.stores.values() for line in store.notes]
        read += [f"{n}/{s}: {rows.note()}" for (n, s), rows in self._packed.items() if s == "train" or rows.cut]
        read += self._answers()
        read += [rows.note() for rows in self._train.values() if isinstance(rows, DenoisedRows)]
        read += labels.lines(self._cfg.labels, self.domains, self.stats())
        return [*self._begin(), *dict.fromkeys(read), *self._lost(), *map(str, self.not_held_out())]

    def _begin(self) -> tuple[str, ...]:
        """The tokenizer's lines, without how documents begin if that is of no source; `_answers` tells it of others."""
        front, sources = self.tokenizer.begin_of_text is not None, self._cfg.sources.values()
        told = any(not source.messages_field if front else not source.has_roles for source in sources)
        return tuple(line for line in self.tokenizer.lines if told or not line.startswith(BEGIN))

    def _answers(self) -> Iterator[str]:
        """Yields a line for each source of which only answers are learned."""
        begin, _ = self.tokenizer.words
        for name, source in self._cfg.sources.items():
            parts = []
            for split, does in (("train", "tokens are learned"), ("validation", "held-out tokens are evaluated")):
                if (rows := self._packed.get((name, split))) is not None:
                    parts.append(f"{int(rows.targets.sum()):,} of {rows.tokens:,} {does}")
            if parts:
                seen = "; compressors see them without their prompts" * ((name, "validation") in self._packed)
                front = repr(begin) if begin else "an end-of-text token"
                how = "as the chat template says" if source.messages_field else f"with {front}"
                yield f"data.sources.{name}: answers alone, {', '.join(parts)}{seen}; documents begin {how}"

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
        in_rows = {key: rows.targets > 0 for key, rows in self._packed.items()}
        return not_held_out(self._cfg, self.stores, in_rows)

    def nothing_held_out(self) -> ConfigError:
        """The error of a corpus without a row of held-out text."""
        for (name, split), rows in self._packed.items():
            if split == "validation" and rows.left_out:
                return self._nothing_fits(name, "held-out document", rows)
        hints = [missing.advice for missing in self.not_held_out()] or ["add documents"]
        return ConfigError("data.sources", sorted({name for name, _ in self.stores}), "have no held-out text", hints[0])

    def record(self) -> dict[str, Any]:
        """The record of what was read, as JSON values."""
        return record.record(self._sources, self.tokenizer.fingerprint, self.stores)


__all__ = ["Corpus", "Rows", "TrainIterator", "check_sources", "prepare"]
