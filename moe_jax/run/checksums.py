"""Checksums of a checkpoint's files, which detect damage that Orbax does not notice.

`<checkpoint>/checksums.json` has the size and CRC-32 of every other file. It is written, atomically, once the
checkpoint is complete. A run killed between the two leaves a checkpoint without it, which is read with a warning.
"""

import json
import os
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

NAME = "checksums.json"
_CHANGES = {NAME, "_CHECKPOINT_METADATA"}  # Orbax writes times into the second one later


def _files(folder: Path) -> dict[str, Path]:
    found = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: p for name, p in found.items() if name not in _CHANGES}


def _sum(path: Path) -> list[int]:
    size = crc = 0
    with open(path, "rb") as f:
        while block := f.read(1 << 22):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]


def _sums(folder: Path) -> dict[str, list[int]]:
    files = _files(folder)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(files, pool.map(_sum, files.values()), strict=True))


def write(folder: Path) -> None:
    """Writes `checksums.json` of a checkpoint, atomically."""
    temporary = folder.parent.parent / f"{folder.name}.{NAME}.tmp"  # outside, so that after a kill it is not summed
    with open(temporary, "w", encoding="utf-8") as f:
        json.dump(_sums(folder), f, indent=0)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, folder / NAME)


def damage(folder: Path) -> str | None:
    """A message about the first file that differs from its checksum; "" if none differs; None without checksums."""
    if not (folder / NAME).exists():
        return None
    try:
        saved = json.loads((folder / NAME).read_text(encoding="utf-8"))
        pairs = {name: (int(size), int(crc)) for name, (size, crc) in saved.items()}
    except (ValueError, TypeError, AttributeError):
        return f"{NAME} is not readable"
    try:
        now = _sums(folder)
    except OSError as e:
        return f"{e.filename}: {e.strerror}"
    for name, (size, crc) in pairs.items():
        if name not in now:
            return f"{name} is missing"
        if now[name][0] != size:
            return f"{name} has {now[name][0]:,} bytes, {size:,} were written"
        if now[name][1] != crc:
            return f"{name} has other bytes than were written"
    return ""


class ChecksumWriter:
    """Writes the checksums of a checkpoint in the background, as soon as it is complete."""

    def __init__(self, folder: Path):
        self._folder, self._settled, self._error = folder, threading.Event(), None
        self._thread = threading.Thread(target=self._run, name=f"checksums of {folder.name}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._folder.is_dir():  # Orbax renames the folder to this name when it is complete
            if self._settled.wait(0.05) and not self._folder.is_dir():
                return  # the save failed
        try:
            write(self._folder)
        except OSError as e:
            self._error = e

    def finish(self) -> None:
        """Waits for the checksums, after the save has ended or failed. Raises OSError if they could not be written."""
        self._settled.set()
        self._thread.join()
        if self._error is not None:
            raise self._error
