"""Hashes and checksums of files, cached so that an unchanged file is not read again at each start.

The cache knows a file by its path, size, inode, and the times of change of its content (mtime) and of its entry
(ctime). Programs cannot set ctime, so a file that was replaced by another of the same size and mtime counts as changed.
"""

import contextlib
import hashlib
import json
import os
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_SETTLED = 2.0  # seconds: a file that changed more recently may change again within one tick of the file system's clock


def _blocks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            yield block


def content_hash(path: Path) -> str:
    """A hash of a file's content that differs for any two contents."""
    digest = hashlib.blake2b(digest_size=16)
    for block in _blocks(path):
        digest.update(block)
    return digest.hexdigest()


def checksum(path: Path) -> str:
    """A CRC of a file's content, which detects damage. It is several times as fast as `content_hash`."""
    crc = 0
    for block in _blocks(path):
        crc = zlib.crc32(block, crc)
    return f"{crc:08x}"


def stamp(path: Path) -> list[int]:
    """Size, mtime, ctime and inode of a file. Any change of its content changes them."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


class Remembered:
    """A cache of `compute(path)` for files.

    memory: a JSON file that keeps the results; None: every file is read every time.
    """

    def __init__(self, compute: Callable[[Path], str], memory: Path | None):
        self._compute, self._memory = compute, memory

    def __call__(self, paths: Sequence[Path]) -> list[str]:
        """The result for each file, in the order of `paths`."""
        known, found, new = self._read(), {}, {}
        before = {path: stamp(path) for path in paths}
        for path, now in before.items():
            kept = known.get(str(path.absolute()))
            if isinstance(kept, list) and kept[:-1] == now:
                found[path] = kept[-1]
        missing = [path for path in before if path not in found]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for path, result in zip(missing, pool.map(self._compute, missing), strict=True):
                found[path] = result
                settled = time.time() - max(before[path][1:3]) / 1e9 > _SETTLED
                if settled and stamp(path) == before[path]:
                    new[str(path.absolute())] = [*before[path], result]
        if new and self._memory:
            self._write(self._memory, new)
        return [found[path] for path in paths]

    def _read(self) -> dict:
        with contextlib.suppress(OSError, ValueError, RecursionError):
            if self._memory and isinstance(known := json.loads(self._memory.read_text(encoding="utf-8")), dict):
                return known
        return {}

    def _write(self, memory: Path, new: dict) -> None:
        """Adds results to the memory. Results that another process adds at the same time may be lost."""
        with contextlib.suppress(OSError):  # preparing the stores reports a cache that cannot be written
            memory.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=memory.parent, prefix=f".{memory.name}-")
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(self._read() | new, file, indent=0)
            os.replace(name, memory)
