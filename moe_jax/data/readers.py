"""Reads rows and texts from local files. Anything unreadable raises an error with file and line; nothing is skipped."""

import csv
import gzip
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

EXTENSIONS = (".txt", ".jsonl", ".csv", ".parquet")


class Unreadable(ValueError):
    """A file, or a row of it, that cannot be read. The message is one line that names the place."""


class Rows(NamedTuple):
    """The rows of a file.

    names: the fields of every row, if the file has a header. rows: (number, fields); `place` explains the number.
    """

    names: list[str] | None
    rows: Iterator[tuple[int, dict[str, Any]]]


def extension(path: Path) -> str:
    """The extension of a file's name, without a .gz after it."""
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def place(path: Path, number: int) -> str:
    """The place of a row for messages: its line, or in a file without lines its number, from 1."""
    return f"{path}, row {number}" if extension(path) == ".parquet" else f"{path}:{number}"


def _open(path: Path):
    """The file opened as text. A byte that is not UTF-8 becomes half a surrogate pair, which tells its line."""
    opener = gzip.open if path.suffix == ".gz" else open
    newline = "" if extension(path) == ".csv" else None
    return opener(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def _checked(lines, path: Path) -> Iterator[str]:
    """Yields the lines. Raises Unreadable for a line that is not UTF-8."""
    for number, line in enumerate(lines, 1):
        if not line.isascii():
            try:
                line.encode("utf-8")
            except UnicodeEncodeError as e:
                byte = ord(line[e.start]) - 0xDC00
                raise Unreadable(f"{path}:{number}: has the byte 0x{byte:02x}, which is not UTF-8") from None
        yield line


def read_text(path: Path) -> str:
    """The text of a file. Every kind of line end becomes a newline."""
    with _open(path) as file:
        return "".join(_checked(file, path))


def open_rows(path: Path, wanted: Sequence[str]) -> Rows:
    """The rows of a .jsonl, .csv or .parquet file. wanted: the fields that the caller reads."""
    return {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}[extension(path)](path, wanted)


# --- JSON lines ------------------------------------------------------------------------------------------------------


class _Repeating(dict):
    """A JSON object that names a field twice, of which `json` keeps the last silently."""

    repeated: frozenset[str] = frozenset()


def _object(pairs: list[tuple[str, Any]]) -> dict:
    made = dict(pairs)
    if len(made) == len(pairs):
        return made
    names = [name for name, _ in pairs]
    made = _Repeating(made)
    made.repeated = frozenset(name for name in names if names.count(name) > 1)
    return made


def _jsonl(path: Path, wanted: Sequence[str]) -> Rows:
    return Rows(None, _json_rows(path, wanted))


def _json_rows(path: Path, wanted: Sequence[str]) -> Iterator[tuple[int, dict]]:
    with _open(path) as file:
        for number, line in enumerate(_checked(file, path), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line, object_pairs_hook=_object)
            except (ValueError, RecursionError) as e:
                why = f"{e.msg} (character {e.pos + 1})" if isinstance(e, json.JSONDecodeError) else e
                raise Unreadable(f"{path}:{number}: is not JSON: {why}") from None
            if not isinstance(row, dict):
                raise Unreadable(f"{path}:{number}: is {type(row).__name__}, not an object with fields")
            if isinstance(row, _Repeating) and (twice := row.repeated.intersection(wanted)):
                raise Unreadable(f"{path}:{number}: has the field {min(twice)!r} more than once")
            yield number, row


# --- CSV -------------------------------------------------------------------------------------------------------------


def _csv(path: Path, wanted: Sequence[str]) -> Rows:
    rows = _csv_rows(path)
    _, names = next(rows, (0, []))
    _check_unique(path, names, wanted)
    return Rows(names, _csv_records(path, names, rows))


def _check_unique(path: Path, names: Sequence[str], wanted: Sequence[str]) -> None:
    for name in wanted:
        if list(names).count(name) > 1:
            raise Unreadable(f"{path}: has the column {name!r} more than once")


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yields (line where the row begins, its fields).

    The reader is strict, since with unmatched quotes all rows between two of them would become one.
    """
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with _open(path) as file:
        reader = csv.reader(_checked(file, path), strict=True)
        while True:
            begin = reader.line_num + 1
            try:
                row = next(reader, None)
            except csv.Error as e:
                why = {
                    "unexpected end of data": "opens a quote that is never closed",
                    "',' expected after '\"'": 'has text after a closing quote (a quote inside a text is doubled, "")',
                }.get(str(e), str(e))
                raise Unreadable(f"{path}:{begin}: the row that begins here {why}") from None
            if row is None:
                return
            if row:  # else a blank line
                yield begin, row


def _csv_records(path: Path, names: list[str], rows: Iterator[tuple[int, list[str]]]) -> Iterator[tuple[int, dict]]:
    """Yields rows as dicts. A short row lacks its last fields. A row longer than the header raises Unreadable."""
    for begin, row in rows:
        if len(row) > len(names) and any(row[len(names) :]):
            rule = f"has {len(row)} fields, the header {len(names)}; a text with commas needs quotes around it"
            raise Unreadable(f"{path}:{begin}: {rule}")
        yield begin, dict(zip(names, row, strict=False))


# --- Parquet ---------------------------------------------------------------------------------------------------------


def _parquet(path: Path, wanted: Sequence[str]) -> Rows:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
    _check_unique(path, names, wanted)
    return Rows(names, _parquet_rows(path, [name for name in names if name in wanted]))


def _parquet_rows(path: Path, columns: list[str]) -> Iterator[tuple[int, dict]]:
    import pyarrow.parquet

    number = 0
    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(1024, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield number, row
