"""Local files as a source of documents."""

import csv
import glob
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from moe_jax.config import SourceConfig
from moe_jax.data import documents, readers
from moe_jax.data.digests import Remembered, content_hash, stamp
from moe_jax.data.documents import Account, Documents
from moe_jax.data.readers import EXTENSIONS, Unreadable, extension, place
from moe_jax.data.roles import Roles
from moe_jax.errors import ConfigError, nearest

Document = dict[str, Any]


class FilesSource:
    """A source of .txt, .jsonl and .csv files, also with .gz, and of .parquet files, given by path or glob.

    The contents of its files and their order identify it. File names and times do not matter.
    """

    def __init__(self, name: str, cfg: SourceConfig, cache: Path | None = None):
        self.name, self.cfg, self._cache = name, cfg, cache
        self.files = self._find()
        self._texts = sum(extension(path) == ".txt" for path in self.files)
        self._hashes = Remembered(content_hash, cache and cache / "content_hashes.json")
        self._contents: list[str] = []
        self._stamps: list[list[int]] = []
        self._splits: dict[str, Documents] = {}
        self._account = Account()
        self._unread: dict[str, None] = {}  # fields of rows with roles
        self._roles = Roles(name, cfg) if cfg.has_roles else None
        self._check_documents()

    def _error(self, field: str, rule: str, hint: str = "") -> ConfigError:
        return ConfigError(f"data.sources.{self.name}.{field}", getattr(self.cfg, field), rule, hint)

    # --- which files ---

    def _find(self) -> list[Path]:
        pattern = os.path.expanduser(self.cfg.path)
        if os.path.isdir(pattern):
            raise self._error("path", "is a folder", f"nearest valid: {os.path.join(self.cfg.path, '**/*.txt')!r}")
        folder = Path(pattern).parent
        while not folder.is_dir():  # the first parent that exists; a folder's own name may contain brackets
            folder = folder.parent
        if os.path.isfile(pattern):
            found = [Path(pattern)]
        else:
            inside = str(Path(pattern).relative_to(folder))
            found = sorted(folder / p for p in glob.glob(inside, root_dir=folder, recursive=True))
            found = [path for path in found if path.is_file()]
        if not found:
            candidates = [p.as_posix() for p in folder.iterdir() if p.is_dir() or extension(p) in EXTENSIONS]
            raise self._error("path", "matches no file", nearest(pattern, candidates))
        for path in found:
            if extension(path) not in EXTENSIONS or path.name.endswith(".parquet.gz"):
                rule = f"matches {path.name}, not one of {' '.join(EXTENSIONS)} (.gz may follow all but .parquet)"
                raise self._error("path", rule, nearest(extension(path), EXTENSIONS))
            if self.cfg.domain_field and extension(path) == ".txt":
                raise self._error("domain_field", f"is set, but {path.name} has no fields", "set domain instead")
            if self.cfg.has_roles and extension(path) == ".txt":
                field = "messages_field" if self.cfg.messages_field else "prompt"
                raise self._error(field, f"is set, but {path.name} has no fields", nearest(".txt", EXTENSIONS[1:]))
        return found

    def _check_documents(self) -> None:
        if self.cfg.documents not in ("auto", "file") and not self._texts:
            rule = f"has an effect on .txt files only; in {self.files[0].name} each row is a document"
            raise self._error("documents", rule, "nearest valid: 'auto'")

    def cutting(self, path: str) -> tuple:
        """The settings that decide which documents a file gives. With "auto" all files of the source belong to them."""
        if extension(Path(path)) != ".txt":
            return tuple(self._roles.identity) if self._roles else (self.cfg.text_field,)
        auto = sorted(map(os.path.realpath, self.files)) if self.cfg.documents == "auto" else []
        return self.cfg.documents, self.cfg.separator, *auto

    def contents(self) -> list[str]:
        """The content hash of every file."""
        if not self._contents:
            self._stamps = [stamp(path) for path in self.files]
            self._contents = self._hashes(self.files)
        return self._contents

    def listing(self, split: str) -> list[list]:
        """A list of [path, bytes] of every file."""
        self.contents()
        return [[str(path), size] for path, (size, *_) in zip(self.files, self._stamps, strict=True)]

    def identity(self, split: str) -> dict:
        cfg = self.cfg
        kinds = [[extension(path) + path.suffix * (path.suffix == ".gz"), h] for path, h in self._named_contents()]
        fields = [cfg.text_field, cfg.domain, cfg.domain_field, cfg.validation_fraction]
        fields += [str(cfg.documents), cfg.separator] if self._texts else []
        roles = {"roles": self._roles.identity} if self._roles else {}
        return {"kind": "files", "name": self.name, "split": split, "files": kinds, "fields": fields} | roles

    def _named_contents(self) -> Iterator[tuple[Path, str]]:
        return zip(self.files, self.contents(), strict=True)

    # --- reading ---

    def documents(self, split: str) -> Documents:
        """All documents of a split, in the order of the files.

        Raises: ConfigError for a missing field, an unreadable file, or a file that changes while it is read.
        """
        if not self._splits:
            self.contents()  # hashes the files first, so that a later change is noticed
            made = {name: Documents(folder=self._cache, cut=bool(self._texts)) for name in ("train", "validation")}
            pieces = 0
            for path in self.files:
                for document in self._read(path):
                    held_out = documents.is_held_out(document, self.cfg.validation_fraction)
                    made["validation" if held_out else "train"].append(document)
                    pieces += extension(path) == ".txt"
            for path, before in zip(self.files, self._stamps, strict=True):
                if stamp(path) != before:
                    raise self._error("path", f"{path} changed while it was read", "run the same command again")
            lines = self._account.lines()
            if self._unread:
                lines.append(f"fields that are not read: {', '.join(self._unread)}")
            if self._texts:
                lines = [documents.describe(self.cfg.documents, self._texts, pieces), *lines]
            notes = [f"data.sources.{self.name}: {line}" for line in lines]
            for split_of in made.values():
                split_of.finish()
                split_of.notes = tuple(notes)
            self._splits = made
        return self._splits[split]

    def forget(self) -> None:
        """Frees the documents, after they were prepared."""
        for split in self._splits.values():
            split.free()
        self._splits = {}

    def _read(self, path: Path) -> Iterator[Document]:
        try:
            yield from (self._read_text if extension(path) == ".txt" else self._read_rows)(path)
        except ConfigError:
            raise
        except Unreadable as error:
            raise self._error("path", f"cannot be read: {error}") from None
        except (OSError, EOFError, ValueError, RecursionError, NotImplementedError, zlib.error, csv.Error) as error:
            raise self._error("path", f"cannot be read: {path}: {error}".replace("\n", " ")) from error

    def _read_text(self, path: Path) -> Iterator[Document]:
        text = readers.read_text(path)
        pieces = documents.cut(text, self.cfg.documents, self.cfg.separator, self._texts)
        if not pieces:
            self._account.add(documents.BLANK, str(path))
        return ({"text": piece, "domain": self.cfg.domain or self.name} for piece in pieces)

    def _read_rows(self, path: Path) -> Iterator[Document]:
        domain = self.cfg.domain_field if not self.cfg.domain else ""
        needed = self._roles.columns if self._roles else [("text_field", self.cfg.text_field)]
        needed = [*needed, ("domain_field", domain)] if domain else needed
        wanted = [name for _, name in needed]
        names, rows = readers.open_rows(path, wanted)
        if names:
            self._note_unread(names, wanted)
            self._check_fields(path, needed, names)
        found, first = set(), None
        for number, row in rows:
            if names is None:  # each row of a .jsonl has its own fields; a field that no row has is a mistake
                first = row if first is None else first
                found.update(pair for pair in needed if pair[1] in row)
                self._note_unread(row, wanted)
            yield from self._document(row, place(path, number), domain)
        if first is not None:
            self._check_fields(path, [pair for pair in needed if pair not in found], list(first))

    def _note_unread(self, names: Iterable[str], wanted: Sequence[str]) -> None:
        if self._roles:
            self._unread |= dict.fromkeys(name for name in names if name not in wanted)

    def _check_fields(self, path: Path, needed: Sequence[tuple[str, str]], names: Sequence[Any]) -> None:
        """Raises ConfigError for a field that the file does not have. needed: (field of the config, field of rows)."""
        names = [str(name) for name in names if name is not None]
        for field, name in needed:
            if name not in names:
                what = "" if getattr(self.cfg, field) == name else f"names {name!r}, which "
                rule = f"{what}is not a field of {path.name}: {', '.join(names)}"
                raise self._error(field, rule, nearest(name, names))

    def _document(self, row: dict, where: str, domain_field: str) -> Iterator[Document]:
        if self._roles:
            document = self._roles.document(row, self._domain(row, where, domain_field), where)
            if document.pop("replaced", ""):
                self._account.add(documents.REPLACED, where)
            yield document
            return
        value = row.get(self.cfg.text_field)
        if value is not None and not isinstance(value, str | bytes):
            raise self._error("text_field", f"holds {type(value).__name__}, not text: {where}")
        text, replaced = documents.decoded(value or "")
        if not text.strip():
            self._account.add(documents.WITHOUT_TEXT, where)
            return
        if replaced:
            self._account.add(documents.REPLACED, where)
        yield {"text": text, "domain": self._domain(row, where, domain_field)}

    def _domain(self, row: dict, where: str, domain_field: str) -> str:
        domain = self.cfg.domain or self.name
        if domain_field:
            domain = documents.domain_of(row.get(domain_field), "")
            if not domain:
                domain = self.name
                self._account.add(f"documents without {domain_field!r}, assigned to the domain {domain!r}", where)
        return domain
