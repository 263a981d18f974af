"""Documents, which are texts with a domain: cuts them out of text files, holds some out, counts what is left out."""

import hashlib
import json
import os
import re
import tempfile
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, BinaryIO

LARGEST = 1_000_000  # bytes: a larger text file is never one document
PIECE = 20_000  # approximate characters of a document cut out of a larger text
SHORTEST = 2_000  # approximate characters of a document cut out of a source with little text
IN_MEMORY = 2**28  # bytes of text of a split that stay in memory while a source is prepared
FEW = 20  # with fewer text files each is cut, so that the source has documents to hold out


class Documents(Sequence):
    """Documents that a reader appends one after another.

    The first `IN_MEMORY` bytes or so of them stay in memory. The others lie in a file without a name, which ends with
    the process, so that a corpus may be larger than memory; they are of JSON's types, with lists in place of tuples.
    Several threads may read at the same time.

    folder: of that file; None: the system's for temporary files. notes: lines about what the reader left out, changed
    or decided. cut: whether any were cut out of text files.
    """

    def __init__(
        self, items: Iterable[dict[str, Any]] = (), folder: str | os.PathLike | None = None, cut: bool = False
    ):
        self.notes: tuple[str, ...] = ()
        self.cut = cut
        self._folder, self._size = folder, 0
        self._items: list[dict[str, Any]] = []
        self._file: BinaryIO | None = None
        self._ends = array("q", [0])  # in the file
        for item in items:
            self.append(item)

    def append(self, document: dict[str, Any]) -> None:
        """Adds a document. Those in the file can be read after `finish`."""
        if self._size < IN_MEMORY:
            self._size += len(document["text"] if "text" in document else json.dumps(document))
            self._items.append(document)
            return
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder)
        data = json.dumps(document).encode()
        self._file.write(data)
        self._ends.append(self._ends[-1] + len(data))

    def finish(self) -> None:
        """Ends the writing: all documents can be read from now on."""
        if self._file is not None:
            self._file.flush()

    def free(self) -> None:
        """Frees memory and file. No document can be read after it."""
        self._items, self._ends = [], array("q", [0])
        if self._file is not None:
            self._file.close()
            self._file = None

    def __len__(self) -> int:
        return len(self._items) + len(self._ends) - 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        if index < len(self._items):
            return self._items[index]
        begin, end = self._ends[index - len(self._items) : index - len(self._items) + 2]
        return json.loads(os.pread(self._file.fileno(), end - begin, begin))


class Account:
    """Counts what a reader left out or changed, and keeps the first place of each."""

    def __init__(self):
        self._found: dict[str, list] = {}

    def add(self, what: str, place: str, times: int = 1) -> None:
        """Counts `what`, a plural such as "rows without text, left out"."""
        self._found.setdefault(what, [0, place])[0] += times

    def lines(self) -> list[str]:
        """A line for each kind of change, with its number and first place."""
        return [f"{what}: {count:,}, the first at {place}" for what, (count, place) in self._found.items()]


REPLACED = "documents with bytes or characters that are not Unicode text, replaced by � or ?"
WITHOUT_TEXT = "rows without text, left out"
BLANK = "blank documents, left out"


def decoded(value: Any) -> tuple[str, bool]:
    """A value as text that UTF-8 can encode, and whether something in it had to be replaced."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8"), False
        except UnicodeDecodeError:
            return value.decode("utf-8", "replace"), True
    text = str(value)
    if text.isascii():
        return text, False
    clean = text.encode("utf-8", "replace").decode("utf-8")
    return clean, clean != text


def as_text(value: Any) -> str:
    """The text of a text or bytes value. Parts that are not valid UTF-8 are replaced, so that UTF-8 can encode it."""
    return decoded(value)[0]


def domain_of(value: Any, default: str) -> str:
    """The domain that a row names; `default` if the value is null, missing or blank."""
    text = "" if value is None else as_text(value)
    return text if text.strip() else default


# --- held out --------------------------------------------------------------------------------------------------------


def _number(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest())


def held_out(text: str, fraction: float) -> bool:
    """Whether a document is in the validation split. The hash of its text decides, so other documents do not matter."""
    return _number(text) < fraction * 2**64


def least_fraction(text: str) -> float:
    """The `validation_fraction` above which a document is held out."""
    return _number(text) / 2**64


def is_held_out(document: Mapping[str, Any], fraction: float) -> bool:
    """Whether a document is in the validation split. The prompt decides for one with roles, else the complete text."""
    return document["share"] < fraction if "share" in document else held_out(document["text"], fraction)


def share_of(document: Mapping[str, Any]) -> float:
    """The number that `validation_fraction` is compared with: `share` of a document with roles, else of its text."""
    return document["share"] if "share" in document else least_fraction(document["text"])


# --- a text file -----------------------------------------------------------------------------------------------------


def split_text(text: str, piece: int = PIECE) -> list[str]:
    """Documents of about `piece` characters, made by cutting a text at blank lines. Joined they are the text again.

    Text without a blank line is cut at line ends, and a line longer than two pieces at any character.
    """
    for unit in (r"(?<=\n)(?=\n)", r"(?<=\n)"):
        parts = [part for part in re.split(unit, text) if part]
        if len(text) // max(len(parts), 1) < 2 * piece:
            break
    pieces, current, size = [], [], 0
    for part in parts:
        while len(part) > 2 * piece:
            pieces += ["".join(current), part[:piece]] if current else [part[:piece]]
            part, current, size = part[piece:], [], 0
        current.append(part)
        size += len(part)
        if size >= piece:
            pieces.append("".join(current))
            current, size = [], 0
    return pieces + (["".join(current)] if current else [])


def paragraphs(text: str) -> list[str]:
    """The paragraphs of a text, which blank lines separate."""
    return re.split(r"\n(?:[^\S\n]*\n)+", text.strip("\n"))


def cut(text: str, how: int | str, separator: str, files: int) -> list[str]:
    """The documents of a text file, cut by the rule of `SourceConfig.documents`. Blank ones are left out.

    files: number of text files of the source. Only separators, blank lines and blank documents are lost.
    """
    if how == "separator":
        pieces = text.split(separator)
    elif how == "blank_lines":
        pieces = paragraphs(text)
    elif isinstance(how, int):
        pieces = split_text(text, how)
    elif how == "auto" and files < FEW:
        pieces = split_text(text, min(max(len(text) * files // 100, SHORTEST), PIECE))
    else:
        pieces = split_text(text) if len(text.encode("utf-8")) > LARGEST else [text]
    return [piece for piece in pieces if piece.strip()]


def describe(how: int | str, files: int, documents: int) -> str:
    """A line that tells how the text files of a source became documents."""
    few = how == "auto" and files < FEW
    methods = {
        "separator": "cut at each separator",
        "blank_lines": "cut at every blank line",
        "auto": "cut at blank lines" if few else "each one document",
        "file": "each one document",
    }
    method = methods.get(how) or f"cut at blank lines about every {how:,} characters"
    if how == "file" or (how == "auto" and not few):
        method += f" (files above {LARGEST:,} bytes are cut)"
    return f"{files:,} text file{'s' * (files != 1)}, {method}: {documents:,} documents (documents={how!r})"
