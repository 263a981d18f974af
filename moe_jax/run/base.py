"""The base of a run with adapters (`model.lora`): its checkpoints hold the adapters, and name the base.

`data` of such a checkpoint has

    {"base": {"from": "runs/a", "step": 200, "average": false, "fingerprint": "0123…", "imported_from": null}}

The base is the run directory `<workdir>/base` if there is one (a link, once the base has moved), else `from`. Its
weights must have the fingerprint, which is one of the bits in its files: a copy has the same, on any mesh, and another
model has not. A base that has adapters itself is merged as it is loaded, and the last bits of the sums depend on the
mesh. Its fingerprint is made of its adapters and the fingerprint of its own base.

`imported_from` is the model of Hugging Face that the base is, and None if the base was trained or changed since.
"""

import hashlib
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.config import RunConfig
from moe_jax.errors import CheckpointError, ConfigError
from moe_jax.nn.lora import is_adapter
from moe_jax.parallel import sharding
from moe_jax.train.state import TrainState
from moe_jax.tree import flatten, split

LINK = "base"


def kept(cfg: RunConfig, state: TrainState) -> TrainState:
    """Returns what a checkpoint keeps of a state: all of it, or with adapters what is not in the base."""
    if not cfg.model.lora.rank:
        return state
    return state._replace(params=split(state.params, is_adapter)[0], router_bias={})


def has_adapters_only(saved: dict[str, Any]) -> bool:
    """Whether a checkpoint holds adapters without their base. saved: what `Checkpoints.contents` returns."""
    paths = list(flatten(saved.get("params") or {}))
    return bool(paths) and all(map(is_adapter, paths))


def folder_of(workdir: Path, name: str) -> Path:
    """The run directory of the base. name: `from` of the record. Raises CheckpointError if it is not there."""
    link = Path(workdir) / LINK
    folder = link if link.is_dir() else Path(name).expanduser()
    if not (folder / "config.json").is_file():
        rule = f"{workdir} holds adapters of the base {name}, which is not there"
        raise CheckpointError(f"{rule}; nearest valid: a link {link} to the run directory of the base")
    return folder


def check(workdir: Path, folder: Path, record: dict[str, Any], found: str) -> None:
    """Raises CheckpointError if the weights of the fingerprint `found` are not those of the recorded base."""
    if found != record["fingerprint"]:
        rule = f"{folder}, step {record['step']}, is not the base of the adapters in {workdir}"
        was = f"{record['fingerprint']}, of {record['from']}"
        raise CheckpointError(f"{rule}: the fingerprint of its weights is {found}, that of the base was {was}")


def imported_from(origin: list[dict]) -> str | None:
    """The model that weights of this origin are, unchanged since it was imported; None for others."""
    last = origin[-1] if origin else {}
    return (last.get("from") or None) if last.get("event") == "import" else None


def fingerprint(params: dict, router_bias: dict, below: str = "") -> str:
    """16 hexadecimal digits that depend on the path, shape, dtype and every bit of all weights, and on no mesh.

    below: for adapters, what else their function depends on: their base and their scale.
    """
    digest = hashlib.sha256(below.encode())
    for path, x in sorted({**flatten(params), **flatten(router_bias)}.items()):
        digest.update(f"{path} {x.shape} {x.dtype} {[int(n) for n in _sums(x)]}\n".encode())
    return digest.hexdigest()[:16]


@jax.jit
def _sums(x: jax.Array) -> list[jax.Array]:
    """Two sums over the entries of x, each mixed with its place, modulo 2³²."""
    spec = jax.typeof(x).sharding.spec if sharding.current_sizes() else None
    number = lambda axis: jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis, out_sharding=spec)
    stride = lambda axis: jnp.uint32(math.prod(x.shape[axis + 1 :]) % 2**32)
    place = sum(stride(axis) * number(axis) for axis in range(x.ndim))
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
    return [jnp.sum(_mix(_mix(bits ^ jnp.uint32(seed)) ^ _mix(place)), dtype=jnp.uint32) for seed in (0, 0x9E3779B9)]


def _mix(x: jax.Array) -> jax.Array:
    """The last steps of MurmurHash3, a permutation of the 32-bit numbers."""
    for factor, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)


def rounded_by(origin: list[dict]) -> dict | None:
    """The event that rounded the weights of an origin (quant/), if nothing after it gave them other values."""
    for event in reversed(origin):
        if event.get("event") == "quantize":
            return event
        if event.get("event") != "upcycle" or event.get("chain"):  # an empty chain copies the weights
            return None
    return None


def check_not_rounded(found: dict | None, source: str, rank: int) -> None:
    """Raises ConfigError for adapters of a rank on rounded weights. found: what `rounded_by` gives for their origin."""
    if found and rank:
        rule = f"must be 0 with the rounded weights of {source}: adapters merged into them would leave their grids"
        hint = f"nearest valid: --config.init_from={found['from'].rpartition('@')[0]}, which was rounded"
        raise ConfigError("model.lora.rank", rank, rule, hint)
