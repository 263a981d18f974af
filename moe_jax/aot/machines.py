"""Machines for which XLA can compile without having them: slices of TPUs, hosts of GPUs.

`v5p:4x4x4` is a slice of 64 chips. `2xv5p:4x4x4` is two slices, connected by the data-centre network. `h100:8` is a
host with 8 GPUs.
"""

import importlib.metadata
import importlib.util
import math
import os
import re
from typing import NamedTuple

import jax

from moe_jax.chips import ABSENT_TPU, GPUS, TPUS, Chip
from moe_jax.errors import UserError

CHIPS = TPUS | GPUS
MOST_TPUS, MOST_GPUS = 256, 8  # in a slice; in a host
QUIET = ABSENT_TPU | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
                      "TF_CPP_MIN_LOG_LEVEL": "2"}  # fmt: skip
# XLA's description of a GPU, a GpuTargetConfigProto.
TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {gpu.threads}
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {gpu.block_memory}
  shared_memory_per_core: {gpu.core_memory} core_count: {gpu.cores} fpus_per_core: {gpu.units}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  l2_cache_size: {gpu.cache} clock_rate_ghz: {gpu.clock}
  memory_bandwidth: {chip.memory_rate:.0f} device_memory_size: {chip.memory:.0f}
  cuda_compute_capability {{ major: {gpu.capability[0]} minor: {gpu.capability[1]} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: {cuda} minor: {minor} patch: 0 }}
device_description_str: "NVIDIA {gpu.name}"
"""


class Gpu(NamedTuple):
    """The numbers of a GPU that XLA's compiler asks for, beside those of `Chip`."""

    name: str  # after "NVIDIA"
    capability: tuple[int, int]  # of CUDA
    cores: int  # streaming multiprocessors
    units: int  # float32 units of a core
    threads: int  # of a core, at most
    block_memory: int  # shared memory that a block may have, bytes
    core_memory: int  # shared memory of a core, bytes
    cache: int  # level 2, bytes
    clock: float  # GHz


_GPUS = {  # XLA's own descriptions of these GPUs; the L40S by NVIDIA's data sheet and the CUDA guide's table for 8.9
    "a100": Gpu("A100-SXM4-80GB", (8, 0), 108, 64, 2048, 166_912, 167_936, 41_943_040, 1.41),
    "l40s": Gpu("L40S", (8, 9), 142, 128, 1536, 101_376, 102_400, 100_663_296, 2.52),
    "h100": Gpu("H100 80GB HBM3", (9, 0), 132, 128, 2048, 232_448, 233_472, 52_428_800, 1.98),
    "h200": Gpu("H200", (9, 0), 132, 128, 2048, 232_448, 233_472, 52_428_800, 1.98),
    "b200": Gpu("B200", (10, 0), 148, 128, 2048, 232_448, 233_472, 132_644_864, 1.965),
}


def chip(machine: str) -> Chip:
    """The chip of a machine such as `v5p:4x4x4`."""
    return CHIPS[next(name for name in CHIPS if name in machine)]


def is_gpu(machine: str) -> bool:
    """Whether a machine consists of GPUs."""
    return any(name in machine for name in GPUS)


def devices(machine: str) -> list[jax.Device]:
    """The chips of `[<slices>x]<v5e|v5p|v6e>:<n>x<n>[x<n>]` or `<a100|l40s|h100|h200|b200>:<n>`. Raises UserError."""
    found = re.fullmatch(r"(?:([1-9]\d?)x)?(\w+?):(\d{1,3}(?:x\d{1,3}){1,2})", machine)
    chips = math.prod(map(int, found[3].split("x"))) if found else 0
    gpus = re.fullmatch(rf"({'|'.join(GPUS)}):([1-{MOST_GPUS}])", machine)
    if not gpus and (not found or found[2] not in TPUS or not 0 < chips <= MOST_TPUS):
        rule = f"must be [<slices>x]<{'|'.join(TPUS)}>:<sizes> with at most {MOST_TPUS} chips a slice"
        rule += f", or <{'|'.join(GPUS)}>:<GPUs of a host, at most {MOST_GPUS}>"
        raise UserError(f"--compile_only={machine}: {rule}; nearest valid: {_nearest(machine)}")
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        return _gpus(machine, gpus[1], gpus[2]) if gpus else _tpus(machine, int(found[1] or 1))
    except UserError:
        raise
    except Exception as e:  # libtpu and the CUDA plugin raise various exceptions
        rule = f"the compiler refuses it ({str(e).splitlines()[0][:120]})"
        raise UserError(f"--compile_only={machine}: {rule}; nearest valid: {_nearest(machine)}") from None


def _nearest(machine: str) -> str:
    name = next((name for name in CHIPS if name in machine), "v5p")
    return {"v5e": "v5e:8x8", "v6e": "v6e:16x16", "v5p": "v5p:4x4x4"}.get(name, f"{name}:{MOST_GPUS}")


def _tpus(machine: str, slices: int) -> list[jax.Device]:
    from jax.experimental import topologies

    if importlib.util.find_spec("libtpu") is None:
        asked = [r.split(";")[0].strip() for r in importlib.metadata.requires("jax") or () if r.startswith("libtpu")]
        package = (asked or ["libtpu"])[0]
        raise UserError(f'--compile_only={machine}: needs the TPU compiler; pip install "{package}"')
    name, more = (machine, {}) if slices == 1 else (machine.removeprefix(f"{slices}x"), {"num_slices": slices})
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **more).devices


def _gpus(machine: str, name: str, count: str) -> list[jax.Device]:
    from jax.experimental import topologies

    plugins = importlib.util.find_spec("jax_plugins")
    found = [n for n in (13, 12) if plugins and importlib.util.find_spec(f"jax_plugins.xla_cuda{n}")]
    if not found:
        package = f"jax[cuda13]=={jax.__version__}"
        raise UserError(f'--compile_only={machine}: needs the compiler for GPUs; pip install "{package}"')
    cuda, minor = (found[0], 0) if found[0] == 13 else (12, 8)
    target = TARGET.format(gpu=_GPUS[name], chip=GPUS[name], cuda=cuda, minor=minor)
    topology = f"1x1x{count}"  # slices, hosts, GPUs of a host
    return topologies.get_topology_desc(platform="cuda", target_config=target, topology=topology).devices
