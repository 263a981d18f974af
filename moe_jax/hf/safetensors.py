"""Reads and writes safetensors files one tensor at a time. Everything in a file is checked before it is used.

The format is 8 bytes of header length, a JSON header `{name: {dtype, shape, data_offsets}}`, and the numbers. A model
is one file, or several beside `model.safetensors.index.json`, which lists the file of each tensor. No other format is
opened, since a pickle (`.bin`, `.pt`) can run code when it is loaded.
"""

import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from moe_jax.errors import FormatError

DTYPES = {"F32": np.dtype("float32"), "BF16": np.dtype(jnp.bfloat16), "F16": np.dtype("float16")}
CODES = {dtype: code for code, dtype in DTYPES.items()}
FLOAT8 = np.dtype(jnp.float8_e4m3fn)
READ = DTYPES | {"F8_E4M3": FLOAT8}  # block_fp8.py makes float32 of it
EXPONENT = {"F32": 0x7F800000, "BF16": 0x7F80, "F16": 0x7C00}  # bits of the exponent; all are set in NaN and infinity
HEADER_LIMIT = 100_000_000  # bytes; the safetensors library has the same limit
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Entry(NamedTuple):
    """The place of a tensor in a file."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int  # byte of the file

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The numbers. They are read and not memory-mapped, so that freeing the array frees the memory."""
        out = np.empty(self.shape, self.dtype)
        with open(self.file, "rb", buffering=0) as f:
            f.seek(self.start)
            view = memoryview(out.reshape(-1).view(np.uint8))
            while len(view):
                count = f.readinto(view)
                if not count:
                    raise FormatError(f"{self.file}: is incomplete")
                view = view[count:]
        return out


def check_finite(where: Path, name: str, x: np.ndarray) -> None:
    """Raises FormatError if there is a NaN or an infinity in a tensor, whose dtype is one of `DTYPES`."""
    bits = np.ascontiguousarray(x).reshape(-1).view(f"u{x.itemsize}")
    exponent = bits.dtype.type(EXPONENT[CODES[x.dtype]])
    chunk = 1 << 20  # numbers at a time, so that no second array of the tensor's size is made
    bad = sum(int(((bits[i : i + chunk] & exponent) == exponent).sum()) for i in range(0, bits.size, chunk))
    if bad:
        count = "1 value that is" if bad == 1 else f"{bad:,} values that are"
        raise FormatError(f"{where}: {name} has {count} NaN or infinite, of {bits.size:,}: the model is broken")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, in any encoding of JSON. Raises FormatError if a name occurs twice in it."""

    def unique(pairs):
        names = [name for name, _ in pairs]
        if twice := next((n for n in names if names.count(n) > 1), None) if len(names) != len(set(names)) else None:
            raise FormatError(f"{path}: has {twice!r} twice")
        return dict(pairs)

    try:
        if path.stat().st_size > HEADER_LIMIT:
            raise FormatError(f"{path}: has {path.stat().st_size:,} bytes; the limit is {HEADER_LIMIT:,}")
        value = json.loads(path.read_bytes(), object_pairs_hook=unique)
    except FileNotFoundError:
        raise FormatError(f"{path}: no such file") from None
    except (ValueError, RecursionError, OSError) as e:
        raise FormatError(f"{path}: is not valid JSON: {e}") from None
    if not isinstance(value, dict):
        raise FormatError(f"{path}: must hold a JSON object, not a {type(value).__name__}")
    return value


def open_model(
    folder: Path, needed: Callable[[str], bool] = lambda name: True, echo: Callable[[str], Any] = lambda line: None
) -> dict[str, Entry]:
    """All tensors of a model's files, by name: those of one file, or else those of the shards in an index.

    needed: tells whether a tensor that the index lists must be in the files.
    Raises FormatError for anything missing, duplicate or incomplete.
    """
    if not folder.is_dir():
        raise FormatError(f"{folder}: no such directory")
    if (folder / SINGLE).is_file():  # transformers has the same order: saving a model again may leave an old index
        if (folder / INDEX).exists():
            echo(f"{INDEX} is not read, because there is {SINGLE}, which transformers prefers too")
        return read_header(folder / SINGLE)
    if (folder / INDEX).exists():
        return _open_shards(folder, needed, echo)
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt"))
    if pickles:
        rule = f"{pickles[0]} is a pickle, which can run code when it is loaded, so it is never opened"
        raise FormatError(f"{folder}: {rule}; convert the model to safetensors on a machine where you trust it")
    raise FormatError(f"{folder}: has neither {SINGLE} nor {INDEX}")


def _open_shards(folder: Path, needed: Callable[[str], bool], echo: Callable[[str], Any]) -> dict[str, Entry]:
    where = folder / INDEX
    owners = read_json(where).get("weight_map")
    if not (isinstance(owners, dict) and owners and all(isinstance(f, str) for f in owners.values())):
        raise FormatError(f"{where}: must have a weight_map of tensor names to file names")
    found: dict[str, Entry] = {}
    names = sorted(set(owners.values()))
    for name in names:
        if name != os.path.basename(name) or not name.endswith(".safetensors"):
            raise FormatError(f"{where}: {name!r} is not the name of a .safetensors file beside it")
        if not os.path.isfile(folder / name):  # also False for a name that no file can have
            raise FormatError(f"{where}: the file {name} is missing")
    for name in names:
        for tensor, entry in read_header(folder / name).items():
            if tensor in found:
                raise FormatError(f"{folder}: {tensor} is both in {found[tensor].file.name} and in {name}")
            if owners.get(tensor, name) != name:  # a tensor that the index does not list is read too
                raise FormatError(f"{where}: says that {tensor} is in {owners[tensor]}, but {name} has it")
            found[tensor] = entry
    missing = [tensor for tensor in owners if tensor not in found]
    if wanted := next(filter(needed, missing), None):
        raise FormatError(f"{folder / owners[wanted]}: has no {wanted}, which {INDEX} lists in it")
    for tensor in missing:
        echo(f"{tensor} is listed in {INDEX} but missing; it is not needed")
    return found


def read_header(path: Path, types: dict[str, np.dtype] = READ) -> dict[str, Entry]:
    """The tensors of one file, from its header. No numbers are read. types: dtypes that it may have, by their codes."""
    if not path.is_file():
        raise FormatError(f"{path}: is not a file")
    total = path.stat().st_size
    with open(path, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if total < 8 or length > min(HEADER_LIMIT, total - 8):
            rule = f"its header has {length:,} bytes, but the file has {total:,} and the limit is {HEADER_LIMIT:,}"
            raise FormatError(f"{path}: {rule}")
        text = f.read(length)
    header = _parse_header(path, text)
    header.pop("__metadata__", None)
    return {name: _entry(path, name, body, 8 + length, total, types) for name, body in header.items()}


def _parse_header(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs):
        if len({name for name, _ in pairs}) != len(pairs):
            raise FormatError(f"{path}: its header names a tensor twice")
        return dict(pairs)

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as e:
        raise FormatError(f"{path}: its header is not valid JSON: {e}") from None
    if not isinstance(header, dict):
        raise FormatError(f"{path}: its header is not a JSON object")
    return header


def _entry(path: Path, name: str, body: Any, base: int, total: int, types: dict[str, np.dtype]) -> Entry:
    try:
        code, shape, (start, end) = body["dtype"], tuple(body["shape"]), body["data_offsets"]
        valid = all(type(n) is int and n >= 0 for n in (*shape, start, end))
    except (TypeError, KeyError, ValueError):
        valid = False
    if not valid:
        raise FormatError(f"{path}: the header's entry of {name} is not valid")
    if code not in types:
        raise FormatError(f"{path}: {name} is of type {code}; must be one of {', '.join(types)}")
    entry = Entry(path, types[code], shape, base + start)
    if entry.size != end - start:
        raise FormatError(
            f"{path}: {name} of shape {list(shape)} in {code} is {entry.size:,} bytes, not {end - start:,}"
        )
    if base + end > total:
        raise FormatError(f"{path}: is incomplete: {name} ends at byte {base + end:,}, the file at {total:,}")
    return entry


class Spec(NamedTuple):
    """A tensor to be written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_model(folder: Path, specs: list[Spec], tensors: Iterable[np.ndarray], max_file: int = 5_000_000_000) -> None:
    """Writes the tensors of `specs` into files of at most `max_file` bytes. `tensors` yields them in that order."""
    files: list[list[Spec]] = []
    for spec in specs:
        if not files or sum(s.size for s in files[-1]) + spec.size > max_file:
            files.append([])
        files[-1].append(spec)
    count, source = len(files), iter(tensors)
    names = [SINGLE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    for name, members in zip(names, files, strict=True):
        write_file(folder / name, members, source)
    if count > 1:
        total = sum(spec.size for spec in specs)
        owners = {spec.name: name for name, members in zip(names, files, strict=True) for spec in members}
        index = {"metadata": {"total_size": total}, "weight_map": owners}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_file(path: Path, specs: list[Spec], tensors: Iterable[np.ndarray]) -> None:
    """Writes the tensors of `specs`, which `tensors` yields in that order, into one file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for spec in specs:
        header[spec.name] = {
            "dtype": CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [at, at + spec.size],
        }
        at += spec.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the numbers must begin at a multiple of 8
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for spec, x in zip(specs, tensors, strict=False):  # the rest of the tensors is for later files
            if x.shape != spec.shape or x.dtype != spec.dtype:
                raise ValueError(f"{spec.name}: got {x.dtype}{x.shape} for {spec}")
            f.write(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)
