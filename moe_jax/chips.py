"""Chips by the names that JAX gives them: their peaks and sizes from data sheets, and what XLA can do on them."""

import functools
import math
import re
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Chip(NamedTuple):
    """A chip for which programs are compiled without having one. `peak_flops` gives its peak FLOP/s."""

    memory: float  # bytes
    memory_rate: float  # bytes/s
    link_rate: float  # bytes/s that its links to other chips send
    network_rate: float  # bytes/s to the data-centre network


TPUS = {  # Google's pages on v5e, v5p and v6e
    "v5e": Chip(16e9, 0.819e12, 200e9, 3.125e9),
    "v5p": Chip(95e9, 2.765e12, 600e9, 6.25e9),
    "v6e": Chip(32e9, 1.6e12, 400e9, 12.5e9),
}
GPUS = {  # NVIDIA's data sheets, of the SXM boards where there are any; memory as CUDA counts it; no network: one host
    "a100": Chip(85_100_068_864, 2.039e12, 300e9, math.inf),  # of 80 GB
    "l40s": Chip(44.42 * 2**30, 0.864e12, 32e9, math.inf),  # links: PCIe 4.0 × 16
    "h100": Chip(84_929_347_584, 3.35e12, 450e9, math.inf),
    "h200": Chip(150_121_545_728, 4.8e12, 450e9, math.inf),
    "b200": Chip(191_514_411_008, 7.67e12, 900e9, math.inf),
}
# Environment in which libtpu neither looks for a TPU in the network nor prints that it has found none.
ABSENT_TPU = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5p-8", "TPU_WORKER_HOSTNAMES": "localhost",
              "TPU_WORKER_ID": "0", "TPU_MIN_LOG_LEVEL": "3", "TPU_STDERR_LOG_LEVEL": "3"}  # fmt: skip
HOPPER = ("H100", "H200", "H800", "GH200")
BLACKWELL = ("B100", "B200", "B300", "GB200", "GB300")  # of data centres


def is_hopper(device_kind: str) -> bool:
    """Whether the device is an NVIDIA Hopper GPU."""
    return any(name in device_kind for name in HOPPER)


def has_packed_attention(device_kind: str) -> bool:
    """Whether cuDNN has attention to packed sequences for the device: JAX asks for compute capability 9.0 or more."""
    return is_hopper(device_kind) or any(name in device_kind for name in BLACKWELL)


def has_ragged_exchange(device_kind: str) -> bool:
    """Whether XLA compiles a ragged all-to-all for the device. libtpu 0.0.42 refuses TPU v5e: "limited ICI routing"."""
    return device_kind not in ("TPU v5 lite", "TPU v5e")


# Dense peak of one JAX device in bf16 (V100 and T4 have no bf16: fp16), from the vendors' data sheets.
_PEAKS = (
    (r"^TPU v4$", 275e12),
    (r"^TPU v5( lite|e)$", 197e12),
    (r"^TPU v5p?$", 459e12),
    (r"^TPU v6( lite|e)$", 918e12),
    (r"^TPU7x$", 2307e12 / 2),  # 2307e12 a chip, and a chip is two devices (no megacore)
    (r"\bH[12]00 NVL\b", 835e12),
    (r"\bH100 PCIe\b", 756e12),
    (r"\bG?H[12]00\b", 989.4e12),
    (r"\bA100\b", 312e12),
    (r"\bL4\b", 121e12),
    (r"\bL40S\b", 362e12),
    (r"\bV100\b", 125e12),
    (r"\bRTX 4090$", 165e12),
    (r"\bT4\b", 65e12),
    (r"\bB200\b", 2250e12),
)


def peak_flops(device: jax.Device) -> tuple[float, str]:
    """Peak FLOP/s of one device and the source of the number: "datasheet", or "measured" for a device not listed.

    A slice of a GPU (MIG) is measured, since the data sheet describes the whole.
    """
    kind = device.device_kind
    for pattern, peak in _PEAKS:
        if re.search(pattern, kind, re.IGNORECASE) and "MIG" not in kind:
            return peak, "datasheet"
    return _measured_flops(device), "measured"


@functools.cache
def _measured_flops(device: jax.Device, seconds: float = 0.2) -> float:
    """FLOP/s of the fastest of several square matmuls (float32 on a CPU, else bf16), found in less than 0.5 s."""
    n, dtype = (1024, jnp.float32) if device.platform == "cpu" else (4096, jnp.bfloat16)
    with jax.set_mesh(jax.sharding.Mesh(np.array([device]), ("x",))):  # instead of the mesh that the caller has set
        x = jax.device_put(np.ones((n, n), dtype), device)
        matmul = jax.jit(lambda a: a @ a)
        matmul(x).block_until_ready()
        best, began = math.inf, time.perf_counter()
        while time.perf_counter() - began < seconds:
            start = time.perf_counter()
            matmul(x).block_until_ready()
            best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best
