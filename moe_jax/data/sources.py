"""Sources of documents: TFDS datasets and local files behind one small interface.

`open_source(name, cfg, cache)` gives an object with `identity(split)`, a JSON-ready description of exactly what would
be read, cheap to compute, and `documents(split)`, a random-access sequence of `{"text": str, "domain": str}`; split is
"train" or "validation". Opening reads no document; a TFDS dataset that is missing is prepared on first use.
"""

import contextlib
import csv
import difflib
import glob
import gzip
import hashlib
import io
import json
import os
import re
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from absl import logging

from moe_jax.config import ConfigError, DataConfig, SourceConfig
from moe_jax.data.tokenizers import own_file

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")
EXTENSIONS = (".txt", ".jsonl", ".csv", ".parquet")
_WHOLE_FILE = 1_000_000  # bytes: a text file up to this size is one document
_PIECE = 20_000  # characters, about: documents cut out of larger ones


@runtime_checkable
class Source(Protocol):
    def identity(self, split: Split) -> dict: ...

    def documents(self, split: Split) -> Sequence[dict[str, str]]: ...


def cache_folder(cfg: DataConfig | None = None) -> Path:
    """Where prepared data lives: `cache_dir`, else $MOE_JAX_CACHE, else ~/.cache/moe_jax."""
    return Path((cfg and cfg.cache_dir) or os.environ.get("MOE_JAX_CACHE") or "~/.cache/moe_jax").expanduser()


def open_source(name: str, cfg: SourceConfig, cache: Path, progress: bool = False) -> Source:
    """The source of a config entry, checked as far as that is cheap. Raises: ConfigError `data.sources.<name>.…`."""
    if cfg.kind == "files":
        return FilesSource(name, cfg)
    return TfdsSource(name, cfg, cache, progress)


def as_text(value: Any) -> str:
    """str of a text or bytes value; what is not valid UTF-8 is replaced, so that every text can be encoded again."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    text = str(value)
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def _nearest(value: str, choices: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(value), list(choices), 1, 0.0)
    return f"nearest valid: {close[0]!r}" if close else "there is no valid choice"


# --- local files -----------------------------------------------------------------------------------------------------


class Documents(Sequence):
    """Documents held in memory."""

    def __init__(self, items: list[dict[str, str]]):
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> dict[str, str]:
        return self._items[index]


def held_out(text: str, fraction: float) -> bool:
    """Whether a document is in the validation split: by the hash of its text, so no change to other files moves it."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()) < fraction * 2**64


def split_text(text: str) -> list[str]:
    """A large text cut at blank lines into documents of about 20,000 characters; joined they are the text again.

    A stretch without a blank line is cut at line ends, and a line longer than two pieces anywhere.
    """
    for unit in (r"(?<=\n)(?=\n)", r"(?<=\n)"):
        parts = [part for part in re.split(unit, text) if part]
        if len(text) // max(len(parts), 1) < 2 * _PIECE:
            break
    pieces, current, size = [], [], 0
    for part in parts:
        while len(part) > 2 * _PIECE:
            pieces += ["".join(current), part[:_PIECE]] if current else [part[:_PIECE]]
            part, current, size = part[_PIECE:], [], 0
        current.append(part)
        size += len(part)
        if size >= _PIECE:
            pieces.append("".join(current))
            current, size = [], 0
    return pieces + (["".join(current)] if current else [])


class FilesSource:
    """.txt, .jsonl and .csv files, also with .gz, and .parquet files, by path or glob."""

    def __init__(self, name: str, cfg: SourceConfig):
        self.name, self.cfg = name, cfg
        self.files = self._find()
        self._splits: dict[str, Documents] = {}

    def _error(self, field: str, rule: str, hint: str = "") -> ConfigError:
        return ConfigError(f"data.sources.{self.name}.{field}", getattr(self.cfg, field), rule, hint)

    def _find(self) -> list[Path]:
        pattern = os.path.expanduser(self.cfg.path)
        if os.path.isdir(pattern):
            raise self._error("path", "is a folder", f"nearest valid: {os.path.join(self.cfg.path, '**/*.txt')!r}")
        if os.path.isfile(pattern):
            found = [Path(pattern)]
        else:
            found = sorted(Path(p) for p in glob.glob(_but_folders(pattern), recursive=True) if os.path.isfile(p))
        if not found:
            folder = Path(pattern).parent
            while not folder.is_dir():  # also walks up out of a glob's folders
                folder = folder.parent
            inside = [p.as_posix() for p in folder.iterdir() if p.is_dir() or _extension(p) in EXTENSIONS]
            raise self._error("path", "matches no file", _nearest(pattern, inside))
        for path in found:
            if _extension(path) not in EXTENSIONS or path.name.endswith(".parquet.gz"):
                rule = f"matches {path.name}, which is none of {' '.join(EXTENSIONS)} (.gz may follow but for .parquet)"
                raise self._error("path", rule, _nearest(_extension(path), EXTENSIONS))
            if self.cfg.domain_field and _extension(path) == ".txt":
                raise self._error("domain_field", f"is set, but {path.name} has no fields", "set domain instead")
        return found

    def identity(self, split: Split) -> dict:
        files = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in self.files]
        fields = (self.cfg.text_field, self.cfg.domain, self.cfg.domain_field, self.cfg.validation_fraction)
        return {"kind": "files", "name": self.name, "split": split, "files": files, "fields": fields}

    def documents(self, split: Split) -> Documents:
        """All documents of a split, in the order of the files. Raises: ConfigError (missing field, unreadable file)."""
        if not self._splits:
            train, validation = [], []
            for text, domain in self._read_all():
                chosen = validation if held_out(text, self.cfg.validation_fraction) else train
                chosen.append({"text": text, "domain": domain})
            self._splits = {"train": Documents(train), "validation": Documents(validation)}
        return self._splits[split]

    def _read_all(self) -> Iterator[tuple[str, str]]:
        for path in self.files:
            read = {".txt": self._read_txt, ".parquet": self._read_parquet}.get(_extension(path), self._read_records)
            try:
                yield from read(path)
            except ConfigError:
                raise
            except (OSError, EOFError, ValueError, RecursionError, NotImplementedError, zlib.error, csv.Error) as error:
                raise self._error("path", f"cannot be read: {path}: {error}".replace("\n", " ")) from error

    def _read_txt(self, path: Path) -> Iterator[tuple[str, str]]:
        with _open(path) as file:
            text = file.read()
        pieces = split_text(text) if len(text.encode("utf-8")) > _WHOLE_FILE else [text]
        return ((piece, self.cfg.domain or self.name) for piece in pieces if piece.strip())

    def _read_records(self, path: Path) -> Iterator[tuple[str, str]]:
        with _open(path) as file:
            if _extension(path) == ".csv":
                csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
                rows = csv.DictReader(file)
            else:
                rows = (json.loads(line) for line in file if line.strip())
            for row in rows:
                if not isinstance(row, dict):
                    raise ValueError(f"a line is {type(row).__name__}, not an object with fields")
                yield from self._document(row, path)

    def _read_parquet(self, path: Path) -> Iterator[tuple[str, str]]:
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            wanted = [f for f in (self.cfg.text_field, self.cfg.domain_field) if f]
            for batch in file.iter_batches(1024, columns=[n for n in names if n in wanted]):
                for row in batch.to_pylist():
                    yield from self._document(row, path, names)

    def _document(self, row: dict, path: Path, names: Sequence[str] = ()) -> Iterator[tuple[str, str]]:
        cfg = self.cfg
        needed = ("text_field",) if cfg.domain or not cfg.domain_field else ("text_field", "domain_field")
        for field in needed:
            if getattr(cfg, field) not in row:
                fields = [str(k) for k in names or row if k is not None]
                raise self._error(
                    field, f"is not a field of {path.name}: {', '.join(fields)}", _nearest(getattr(cfg, field), fields)
                )
        value = row[cfg.text_field]
        if value is not None and not isinstance(value, str | bytes):
            raise self._error("text_field", f"holds {type(value).__name__} in {path.name}, not text")
        text = as_text(value or "")
        if text.strip():
            domain = cfg.domain or (as_text(row[cfg.domain_field]) if cfg.domain_field else "") or self.name
            yield text, domain


def _but_folders(pattern: str) -> str:
    """The pattern with the folders it begins with, as far as there are any of that very name, taken as they are."""
    parts, known = Path(pattern).parts, Path()
    for i, part in enumerate(parts):
        if not (known / part).is_dir():
            return os.path.join(glob.escape(str(known)), *parts[i:])
        known = known / part
    return glob.escape(pattern)


def _extension(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def _open(path: Path):
    opener = gzip.open if path.suffix == ".gz" else open
    return opener(path, "rt", encoding="utf-8-sig", newline="" if _extension(path) == ".csv" else None)


# --- TFDS ------------------------------------------------------------------------------------------------------------


class TfdsDocuments(Sequence):
    """Documents of one split of a prepared TFDS dataset; every access reads and decodes one record."""

    def __init__(self, records: Sequence[dict], cfg: SourceConfig, name: str, labels: Any):
        self._records, self._cfg, self._name, self._labels = records, cfg, name, labels

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, str]:
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        record, cfg = self._records[index], self._cfg
        domain = cfg.domain or self._name
        if not cfg.domain and cfg.domain_field:
            value = record[cfg.domain_field]
            domain = self._labels(int(value)) if self._labels else as_text(value)
        return {"text": as_text(record[cfg.text_field]), "domain": domain}


@contextlib.contextmanager
def _errors_only() -> Iterator[None]:
    """TFDS warns of a folder without data, which is what there is before the first run."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)


class TfdsSource:
    """ "stdlib_text", or any dataset TFDS knows by name, read as ArrayRecord."""

    def __init__(self, name: str, cfg: SourceConfig, cache: Path, progress: bool = False):
        self.name, self.cfg, self.progress = name, cfg, progress
        self.folder = os.path.expanduser(cfg.data_dir) or str(cache / "tfds")
        self._builder = self._resolve()

    def _error(self, field: str, rule: str, hint: str = "") -> ConfigError:
        return ConfigError(f"data.sources.{self.name}.{field}", getattr(self.cfg, field), rule, hint)

    def _resolve(self):
        """The TFDS builder; nothing is downloaded or generated yet."""
        import tensorflow_datasets as tfds

        if ":" in self.cfg.name.split("/")[0]:
            rule = "names a community's data set, whose builder is code from elsewhere, and is not opened"
            raise self._error("name", rule, "nearest valid: 'stdlib_text', or files of text")
        if self.cfg.name == "stdlib_text":
            from moe_jax.data.stdlib_text import StdlibText

            return StdlibText(data_dir=self.folder, file_format="array_record")
        try:
            # `tfds.data_source` asks for the format while opening a prepared dataset and fails; the builder does not.
            return tfds.builder(self.cfg.name, data_dir=self.folder, try_gcs=False)
        except tfds.core.DatasetNotFoundError:
            known = ["stdlib_text", *tfds.list_builders(with_community_datasets=False)]
            rule = f"is neither known to TFDS nor prepared in {self.folder}"
            raise self._error("name", rule, _nearest(self.cfg.name, known)) from None
        except Exception as error:
            raise self._error("name", f"cannot be opened by TFDS: {_line(error)}", "try 'stdlib_text'") from error

    def _prepared(self):
        """The builder with its data on disk. Raises: ConfigError with the reason if it cannot be prepared."""
        with _errors_only():
            if self._builder.is_prepared():
                return self._builder
        import tensorflow_datasets as tfds

        if not self.progress:
            tfds.disable_progress_bar()
        try:
            config = tfds.download.DownloadConfig(try_download_gcs=False)
            if self.progress:
                print(f"preparing {self.cfg.name} in {self.folder}", file=sys.stderr, flush=True)
            # TFDS prints its own account of sizes it does not know.
            with contextlib.redirect_stdout(io.StringIO()):
                self._builder.download_and_prepare(file_format="array_record", download_config=config)
        except Exception as error:
            self._builder = self._resolve()  # another process may have finished it in the meantime
            if not self._builder.is_prepared():
                rule = f"could not be prepared in {self.folder}: {_line(error)}"
                raise self._error(
                    "name", rule, "prepare it elsewhere and set data_dir, or use 'stdlib_text'"
                ) from error
        return self._builder

    def _split(self, split: Split) -> str:
        return self.cfg.split if split == "train" else self.cfg.validation_split

    def _info(self, split: Split):
        field = "split" if split == "train" else "validation_split"
        splits = self._prepared().info.splits
        try:
            return splits[self._split(split)]
        except Exception:  # TFDS raises KeyError, ValueError and its own errors for a bad split expression
            hint = f"nearest valid: {next(iter(splits), '')!r}, or a part such as 'train[:95%]' and 'train[95%:]'"
            raise self._error(field, f"is not among the splits {', '.join(splits)}", hint) from None

    def identity(self, split: Split) -> dict:
        cfg, info, dataset = self.cfg, self._info(split), self._prepared().info
        sizes = [(s.name, s.num_examples, int(s.num_bytes)) for s in dataset.splits.values()]
        return {
            "kind": "tfds",
            "name": self.name,
            "dataset": dataset.full_name,
            "part": self._split(split),
            "examples": info.num_examples,
            "sizes": sizes,
            "fields": (cfg.text_field, cfg.domain, cfg.domain_field),
        }

    def documents(self, split: Split) -> TfdsDocuments:
        self._info(split)
        builder, cfg = self._prepared(), self.cfg
        features = builder.info.features
        for field in ("text_field", "domain_field"):
            value = getattr(cfg, field)
            if value and value not in features:
                raise self._error(
                    field, f"is not among the features {', '.join(features)}", _nearest(value, list(features))
                )
        labels = getattr(features[cfg.domain_field], "int2str", None) if cfg.domain_field else None
        try:
            records = builder.as_data_source(split=self._split(split))
        except Exception as error:
            raise self._error("name", f"cannot be read: {_line(error)}", "prepare it as array_record") from error
        return TfdsDocuments(records, cfg, self.name, labels)


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def check_sources(cfg: DataConfig, workdir: str | Path | None = None) -> None:
    """Finds user mistakes without reading a document: paths, extensions, dataset names, the tokenizer's file.

    workdir: of a run that has begun, which may have its own copy of the tokenizer's file.
    Raises: ConfigError naming the field and the nearest valid choice.
    """
    for name, source in cfg.sources.items():
        open_source(name, source, cache_folder(cfg))
    path = os.path.expanduser(cfg.tokenizer.path)
    external = cfg.tokenizer.kind in ("huggingface", "sentencepiece") and not own_file(cfg.tokenizer, workdir)
    if external and not os.path.isfile(path):
        folder = Path(path).parent
        inside = [p.as_posix() for p in folder.iterdir() if p.suffix in (".json", ".model")] if folder.is_dir() else []
        raise ConfigError("data.tokenizer.path", cfg.tokenizer.path, "is not a file", _nearest(path, inside))
