"""Reads weights in float8 with a scale for each block of a matrix, the format of DeepSeek-V3's release.

A tensor `NAME.weight` in E4M3 comes with `NAME.weight_scale_inv`, whose entries multiply the blocks of
`quantization_config.weight_block_size` rows and columns; those at the edges may be smaller. Source: README_WEIGHTS.md
of DeepSeek-V3, and weight_dequant_kernel of its inference/kernel.py.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from moe_jax.errors import FormatError
from moe_jax.hf.safetensors import FLOAT8, Entry

SCALE = "_scale_inv"  # behind the name of the tensor that it scales


class Scaled(NamedTuple):
    """A tensor in float8 and its scales, which is read as float32."""

    values: Entry
    scales: Entry
    block: tuple[int, int]

    @property
    def dtype(self) -> np.dtype:
        return np.dtype("float32")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def read(self) -> np.ndarray:
        """The numbers: each is its float8 value times the scale of its block, in float32."""
        out, scales = self.values.read().astype(np.float32), self.scales.read().astype(np.float32)
        rows, columns = self.block
        for i, of_row in enumerate(scales):  # a row of blocks at a time: no second array of the tensor's size
            part = out[i * rows : (i + 1) * rows]
            part *= np.repeat(of_row, columns)[None, : part.shape[1]]
        return out


def block_of(quantization: Any, where: str) -> tuple[int, int] | None:
    """The size of blocks by `quantization_config`; None if that is null. Raises FormatError for another format."""
    if quantization is None:
        return None
    size = quantization.get("weight_block_size") if isinstance(quantization, dict) else None
    pair = isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)
    if not pair or quantization.get("quant_method") != "fp8" or quantization.get("fmt", "e4m3") != "e4m3":
        shown = repr(quantization) if len(repr(quantization)) < 200 else f"{repr(quantization)[:200]}…"
        rule = "nearest valid: quant_method='fp8', fmt='e4m3' with weight_block_size=[128, 128], or null"
        raise FormatError(f"{where}: quantization_config={shown} is not supported; {rule}")
    return size[0], size[1]


def dequantised(
    entries: dict[str, Entry], block: tuple[int, int] | None, where: str, echo: Callable[[str], Any]
) -> dict[str, Entry | Scaled]:
    """The tensors of a model, those in float8 joined with their scales. block: as `block_of` returns it."""
    out: dict[str, Entry | Scaled] = {}
    for name, entry in entries.items():
        owner = entries.get(name.removesuffix(SCALE)) if name.endswith(SCALE) else None
        if owner is not None and owner.dtype == FLOAT8:
            continue
        if entry.dtype != FLOAT8:
            out[name] = entry
            continue
        if block is None:
            raise FormatError(f"{where}: {name} is float8, but config.json has no quantization_config that says how")
        if (scales := entries.get(name + SCALE)) is None:
            raise FormatError(f"{where}: {name} is float8, but has no {name}{SCALE}")
        if len(entry.shape) != 2:
            raise FormatError(f"{where}: {name} of shape {list(entry.shape)} is float8; only matrices may be")
        want = tuple(-(-n // size) for n, size in zip(entry.shape, block, strict=True))
        if scales.shape != want or scales.dtype == FLOAT8:
            have = f"{list(scales.shape)} in {scales.dtype.name}"
            rule = (
                f"with blocks of {block[0]} × {block[1]} of {list(entry.shape)} it must be {list(want)}, and no float8"
            )
            raise FormatError(f"{where}: {name}{SCALE} is {have}; {rule}")
        out[name] = Scaled(entry, scales, block)
    if count := sum(isinstance(entry, Scaled) for entry in out.values()):
        echo(f"{count:,} tensors in float8 with blocks of {block[0]} × {block[1]} are read as float32")
    return out
