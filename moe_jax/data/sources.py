"""Sources of documents: TFDS data sets and local files behind one interface.

`open_source(name, cfg, cache)` returns a `Source`. Its `identity(split)` is a description, as JSON values, of exactly
what would be read. Its `documents(split)` is a random-access sequence of `{"text": str, "domain": str}`, with a key
`replaced` if parts of the text were not Unicode, and with further keys for documents with roles (roles.py). A split is
"train" or "validation". Opening reads no document. A missing TFDS data set is prepared on first use.
"""

import contextlib
import io
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from absl import logging

from moe_jax.config import DataConfig, SourceConfig
from moe_jax.data.documents import decoded, domain_of
from moe_jax.data.files import FilesSource
from moe_jax.data.readers import extension
from moe_jax.data.roles import Roles
from moe_jax.data.tokenizers import own_file
from moe_jax.errors import ConfigError, nearest

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")


@runtime_checkable
class Source(Protocol):
    """The interface of a source."""

    def identity(self, split: Split) -> dict:
        """A description of what would be read, as JSON values. Equal descriptions mean equal documents."""

    def documents(self, split: Split) -> Sequence[dict[str, str]]:
        """The documents of a split."""

    def forget(self) -> None:
        """Frees documents that are in memory, after they were prepared."""

    def listing(self, split: Split) -> list[list]:
        """A list of [name, size] of what is read: files and bytes, or a split of a data set and its examples."""


def cache_folder(cfg: DataConfig | None = None) -> Path:
    """The folder of prepared data: `cache_dir`, else $MOE_JAX_CACHE, else ~/.cache/moe_jax."""
    named = (cfg and cfg.cache_dir) or os.environ.get("MOE_JAX_CACHE")
    path = os.path.expanduser(named or "~/.cache/moe_jax")
    if path.startswith("~"):
        hint = "set $MOE_JAX_CACHE or data.cache_dir to a folder"
        raise ConfigError("data.cache_dir", cfg.cache_dir if cfg else "", f"no home folder is known for {path}", hint)
    return Path(path)


def check_cache(cfg: DataConfig) -> Path:
    """The folder of `cache_folder`, made if missing. Raises ConfigError if it cannot be written to."""
    path, why = cache_folder(cfg), ""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        why = "is a file" if path.is_file() else error.strerror or str(error)
    if why:
        rule = f"prepared data cannot be kept in {path} ({why})"
        raise ConfigError("data.cache_dir", cfg.cache_dir, rule, "set $MOE_JAX_CACHE or data.cache_dir to a folder")
    return path


def open_source(name: str, cfg: SourceConfig, cache: Path, progress: bool = False) -> Source:
    """The source of a config entry, after checks that read no document. Raises: ConfigError `data.sources.<name>.…`."""
    if cfg.kind == "files":
        return FilesSource(name, cfg, cache)
    return TfdsSource(name, cfg, cache, progress)


# --- TFDS ------------------------------------------------------------------------------------------------------------


class TfdsDocuments(Sequence):
    """The documents of one split of a prepared TFDS data set. Every access reads and decodes one record."""

    def __init__(self, records: Sequence[dict], cfg: SourceConfig, name: str, labels: Any):
        self._records, self._cfg, self._name, self._labels = records, cfg, name, labels
        self._roles = Roles(name, cfg) if cfg.has_roles else None

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, str]:
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        record, cfg = self._records[index], self._cfg
        domain = cfg.domain or self._name
        if not cfg.domain and cfg.domain_field:
            value = record[cfg.domain_field]
            if self._labels:  # TFDS writes −1 where there is no label
                value = self._labels(int(value)) if int(value) >= 0 else None
            domain = domain_of(value, self._name)
        if self._roles:
            return self._roles.document(record, domain, f"example {index} of {cfg.name}")
        text, replaced = decoded(record[cfg.text_field])
        return {"text": text, "domain": domain} | ({"replaced": "yes"} if replaced else {})


@contextlib.contextmanager
def _errors_only() -> Iterator[None]:
    """Hides warnings: TFDS warns of a folder without data, and there is no data before the first run."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)


class TfdsSource:
    """The source "stdlib_text", or any data set that TFDS knows by name, read as ArrayRecord."""

    def __init__(self, name: str, cfg: SourceConfig, cache: Path, progress: bool = False):
        self.name, self.cfg, self.progress = name, cfg, progress
        self.folder = os.path.expanduser(cfg.data_dir) or str(cache / "tfds")
        self._builder = self._resolve()

    def _error(self, field: str, rule: str, hint: str = "") -> ConfigError:
        return ConfigError(f"data.sources.{self.name}.{field}", getattr(self.cfg, field), rule, hint)

    def _resolve(self):
        """The TFDS builder. Nothing is downloaded or generated here."""
        import tensorflow_datasets as tfds

        if ":" in self.cfg.name.split("/")[0]:
            rule = "names a community data set, whose builder is code of others; it is not run"
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
            raise self._error("name", rule, nearest(self.cfg.name, known)) from None
        except Exception as error:
            raise self._error("name", f"cannot be opened by TFDS: {_line(error)}", "try 'stdlib_text'") from error

    def _prepared(self):
        """The builder, after its data is on disk. Raises: ConfigError with the reason if it cannot be prepared."""
        with _errors_only():
            if self._builder.is_prepared():
                if not self._builder.info.splits:  # another source has prepared it since this builder was made
                    self._builder = self._resolve()
                return self._builder
        import tensorflow_datasets as tfds

        if not self.progress:
            tfds.disable_progress_bar()
        try:
            config = tfds.download.DownloadConfig(try_download_gcs=False)
            if self.progress:
                print(f"preparing {self.cfg.name} in {self.folder}", file=sys.stderr, flush=True)
            # TFDS prints sizes, most of them unknown.
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
            hint = f"nearest valid: {next(iter(splits), '')!r}, or a slice such as 'train[:95%]' and 'train[95%:]'"
            raise self._error(field, f"is not among the splits {', '.join(splits)}", hint) from None

    def forget(self) -> None:
        """Nothing is in memory: records are read from their files."""

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
            "shards": list(info.shard_lengths),
            "fields": (cfg.text_field, cfg.domain, cfg.domain_field),
        } | ({"roles": Roles(self.name, cfg).identity} if cfg.has_roles else {})

    def listing(self, split: Split) -> list[list]:
        return [[f"{self._prepared().info.full_name} {self._split(split)}", int(self._info(split).num_examples)]]

    def documents(self, split: Split) -> TfdsDocuments:
        self._info(split)
        builder, cfg = self._prepared(), self.cfg
        features = builder.info.features
        columns = Roles(self.name, cfg).columns if cfg.has_roles else [("text_field", cfg.text_field)]
        for field, value in [*columns, ("domain_field", cfg.domain_field)]:
            if value and value not in features:
                what = "is" if getattr(cfg, field) == value else f"names {value!r}, which is"
                rule = f"{what} not among the features {', '.join(features)}"
                raise self._error(field, rule, nearest(value, list(features)))
        labels = getattr(features[cfg.domain_field], "int2str", None) if cfg.domain_field else None
        try:
            records = builder.as_data_source(split=self._split(split))
        except Exception as error:
            raise self._error("name", f"cannot be read: {_line(error)}", "prepare it as array_record") from error
        return TfdsDocuments(records, cfg, self.name, labels)


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def check_sources(cfg: DataConfig, workdir: str | Path | None = None) -> None:
    """Raises ConfigError for a wrong path, extension, data set or tokenizer file, without reading a document.

    workdir: the directory of a run that has begun, which may have its own copy of the tokenizer's file.
    """
    check_cache(cfg)
    sources = {name: open_source(name, source, cache_folder(cfg)) for name, source in cfg.sources.items()}
    _check_no_text_is_on_both_sides([s for s in sources.values() if isinstance(s, FilesSource)])
    path = os.path.expanduser(cfg.tokenizer.path)
    external = cfg.tokenizer.kind in ("huggingface", "sentencepiece") and not own_file(cfg.tokenizer, workdir)
    if external and not os.path.isfile(path):
        folder = Path(path).parent
        inside = [p.as_posix() for p in folder.iterdir() if p.suffix in (".json", ".model")] if folder.is_dir() else []
        raise ConfigError("data.tokenizer.path", cfg.tokenizer.path, "is not a file", nearest(path, inside))


def _check_no_text_is_on_both_sides(sources: Sequence[FilesSource]) -> None:
    """Raises ConfigError if two sources split the same file differently, since one would train on the other's held-out
    text."""
    seen: dict[str, FilesSource] = {}
    for source in sources:
        for path in map(os.path.realpath, source.files):
            other = seen.setdefault(path, source)
            pairs = ((source.cfg, other.cfg), (other.cfg, source.cfg))
            if other is source or not any(a.is_trained and b.validation_fraction > 0 for a, b in pairs):
                continue
            field, cfg, where = f"data.sources.{source.name}", source.cfg, f"data.sources.{other.name}"
            why = "held-out text would be trained on"
            if cfg.validation_fraction != other.cfg.validation_fraction:
                rule = f"differs from that of {where}, though both read {path}: {why}"
                hint = f"nearest valid: {other.cfg.validation_fraction}"
                raise ConfigError(f"{field}.validation_fraction", cfg.validation_fraction, rule, hint)
            if source.cutting(path) != other.cutting(path) and extension(Path(path)) != ".txt":
                fields = ("text_field", "prompt", "completion", "messages_field")
                name = next(name for name in fields if getattr(cfg, name) != getattr(other.cfg, name))
                rule = f"makes other documents of {path} than {where}: {why}"
                hint = f"nearest valid: {getattr(other.cfg, name)!r} in both"
                raise ConfigError(f"{field}.{name}", getattr(cfg, name), rule, hint)
            if source.cutting(path) != other.cutting(path):
                same = other.cfg.documents if other.cfg.documents != "auto" else "file"
                rule = f"cuts {path} in other places than {where}: {why}"
                raise ConfigError(f"{field}.documents", cfg.documents, rule, f"nearest valid: {same!r} in both")
