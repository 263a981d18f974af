"""Writes adapters as PEFT does, and reads PEFT's: `adapter_config.json` and `adapter_model.safetensors`.

A linear layer `q_proj` has `q_proj.lora_A.weight` [r, in] and `q_proj.lora_B.weight` [out, r]. The experts of a layer
are two parameters in transformers 5, `gate_up_proj` [E, 2F, D] and `down_proj` [E, D, F], which PEFT adapts by the
names in `target_parameters`. For E experts its A is [E·r, in], in which the rows of one expert lie together. Its B is
[out, r·E], in which the columns of all experts for one of the r lie together. The adapters of gate and up, two here,
are one of rank 2r there: A has the columns of both, and B is block diagonal. Where both parameters of a layer have an
adapter, PEFT wraps the wrapper: `experts.lora_A` is of down_proj, `experts.base_layer.lora_A` of gate_up_proj.

PEFT before 0.19.1 stored A and B of experts for the transposed matrix. This file writes for 0.19.1 and newer. What is
read is told apart by its shapes, and where in = out by the `peft_version` of adapter_config.json.
Source: peft 0.21.2, tuners/lora/layer.py (ParamWrapper) and tuners/tuners_utils.py (_inject_parameters).
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from moe_jax.config import ModelConfig
from moe_jax.errors import FormatError
from moe_jax.hf import safetensors, tables
from moe_jax.hf.architectures import echo_left_out, write_config
from moe_jax.hf.convert import whole_mesh
from moe_jax.nn import lora
from moe_jax.run import weights
from moe_jax.run.config_file import load_config
from moe_jax.train.state import abstract_weights
from moe_jax.tree import flatten

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# Names that PEFT replaces by those of experts in models that have some (utils/transformers_weight_conversion.py).
EXPERTS_TOO = (".gate_proj", ".up_proj", ".down_proj")
WRITTEN_FOR = "0.19.1"  # the first version with this layout of experts


class Wrapped(NamedTuple):
    """A thing that PEFT adapts, which is a linear layer or a parameter of the experts of a layer, and its adapter."""

    module: str  # such as model.layers.0.self_attn.q_proj or model.layers.0.mlp.experts
    parameter: str  # gate_up_proj or down_proj; "": a linear layer
    nested: bool  # whether another wrapper is around this one
    rank: int
    a: np.ndarray
    b: np.ndarray

    @property
    def tensors(self) -> dict[str, np.ndarray]:
        """The tensors of the file."""
        stem = f"{PREFIX}{self.module}{'.base_layer' if self.nested else ''}"
        return {f"{stem}.lora_A.weight": self.a, f"{stem}.lora_B.weight": self.b}


# --- the layout of experts -------------------------------------------------------------------------------------------


def stack(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """PEFT's A [E·r, in] and B [out, r·E] of (a [in, r], b [r, out]) of each expert."""
    a = np.concatenate([a.T for a, _ in parts])
    b = np.stack([b.T for _, b in parts], axis=-1)  # [out, r, E]
    return a, b.reshape(b.shape[0], -1)


def unstack(a: np.ndarray, b: np.ndarray, experts: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The inverse of `stack`."""
    a = a.reshape(experts, -1, a.shape[1])
    b = b.reshape(b.shape[0], -1, experts)
    return [(a[e].T, b[:, :, e].T) for e in range(experts)]


def fuse(gate: tuple | None, up: tuple | None, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The adapter (a, b) of gate_up_proj from those of gate and up, one of which may be missing. width: F."""
    ranks = [0 if part is None else part[0].shape[1] for part in (gate, up)]
    a = np.concatenate([part[0] for part in (gate, up) if part is not None], axis=1)
    b = np.zeros((sum(ranks), 2 * width), np.float32)
    if gate is not None:
        b[: ranks[0], :width] = gate[1]
    if up is not None:
        b[ranks[0] :, width:] = up[1]
    return a, b


def unfuse(a: np.ndarray, b: np.ndarray) -> tuple[tuple, tuple]:
    """The adapters (a, b) of gate and up. They share A, unless B is block diagonal, as `fuse` makes it."""
    half, width = a.shape[1] // 2, b.shape[1] // 2
    if a.shape[1] % 2 == 0 and not b[:half, width:].any() and not b[half:, :width].any():
        return (a[:, :half], b[:half, :width]), (a[:, half:], b[half:, width:])
    return (a, b[:, :width]), (a, b[:, width:])


# --- export ----------------------------------------------------------------------------------------------------------


def export_adapter(
    workdir: str | os.PathLike, target: str | os.PathLike, *, at: int | None = None, average: bool = False,
    mesh: Mesh | None = None, echo: Callable[[str], Any] = print,
) -> None:  # fmt: skip
    """Writes the adapters of a run as a directory that PEFT loads. The base need not be there.

    at: a checkpoint; by default the newest. average: True writes the average of the adapters (`optim.ema`).
    The files name the base only if it is an imported model as it was: PEFT would put the adapters on another one.
    Raises FormatError for a run without adapters, or adapters that PEFT has no place for.
    """
    target, workdir = weights.check_free(target), Path(workdir).expanduser()
    cfg = load_config(workdir)
    if not cfg.model.lora.rank:
        raise FormatError(f"{workdir}: has no adapters (model.lora.rank is 0); nearest valid: no --adapter")
    adapters, data = weights.load_adapters(workdir, cfg, mesh or whole_mesh(), at, average)
    source = next((event for event in data.get("origin", []) if event.get("event") == "import"), {})
    name, _ = write_config(cfg.model.base, cfg.data.seq_len, source.get("architecture", ""))
    echo_left_out(cfg.model, echo)
    found = wrapped(name, cfg.model, jax.tree.map(np.asarray, flatten(adapters)))
    tensors = {key: x for w in found for key, x in w.tensors.items()}
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # an earlier attempt that was killed
    try:
        partial.mkdir(parents=True)
        settings = json.dumps(_settings(cfg.model, found, named := data["base"]["imported_from"]), indent=2)
        (partial / CONFIG).write_text(settings + "\n", encoding="utf-8")
        specs = [safetensors.Spec(key, x.dtype, x.shape) for key, x in tensors.items()]
        safetensors.write_file(partial / TENSORS, specs, tensors.values())
        os.replace(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    linear = next((w.module for w in found if not w.parameter and w.module.endswith(EXPERTS_TOO)), None)
    if linear and cfg.model.num_moe_layers:
        echo(
            f"PEFT 0.21.2 takes {linear} for experts, since it goes by the end of the name: it cannot load this adapter"
        )
    echo(f"adapters of {name}: {len(tensors):,} tensors, {sum(s.size for s in specs):,} bytes, → {target}")
    if not named:
        rule = f"is null, since {data['base']['from']} is no unchanged import: export the base too and name it there"
        echo(f"base_model_name_or_path of {target / CONFIG} {rule}")


def _settings(model: ModelConfig, found: list[Wrapped], base: str | None) -> dict[str, Any]:
    rank, alpha = model.lora.rank, model.lora.scale * model.lora.rank  # of α/r, also where the run has α/√r
    other = {f"{w.module}.{w.parameter}": w.rank for w in found if w.rank != rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "peft_version": WRITTEN_FOR,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": [w.module for w in found if not w.parameter],
        "target_parameters": [f"{w.module}.{w.parameter}" for w in found if w.parameter],
        "rank_pattern": other,
        "alpha_pattern": {key: alpha * r / rank for key, r in other.items()},
    }


def wrapped(name: str, model: ModelConfig, adapters: dict[str, np.ndarray]) -> list[Wrapped]:
    """The adapters in PEFT's layout. name: the architecture. adapters: every `…/lora_a` and `…/lora_b`, by path."""
    mine: dict[str, dict[str, np.ndarray]] = {}
    for path, x in adapters.items():
        mine.setdefault(lora.matrix_of(path), {})[path.rpartition("/")[2]] = x
    out: list[Wrapped] = []
    experts: dict[int, dict[str, list[tuple]]] = {}  # by layer and matrix, those of every expert
    for tensor in tables.tensors(name, model.base, shapes_of(model.base)):
        if not any(target.path in mine for target in tensor.targets):
            continue
        target = single(tensor)
        a, b = (mine[target.path][part][target.index] for part in lora.NAMES)
        if len(target.index) == 2:
            experts.setdefault(layer_of(tensor.name), {}).setdefault(target.path.rpartition("/")[2], []).append((a, b))
            continue
        theirs = np.empty((b.shape[1], b.shape[0]), b.dtype)
        theirs[slice(None) if target.rows is None else target.rows] = b.T
        module = tensor.name.removesuffix(".weight")
        out.append(Wrapped(module, "", False, a.shape[1], np.ascontiguousarray(a.T), theirs))
    for layer, kinds in experts.items():
        out += _wrapped_experts(f"model.layers.{layer}.mlp.experts", kinds, model.moe.d_expert)
    return out


def _wrapped_experts(module: str, kinds: dict[str, list[tuple]], width: int) -> list[Wrapped]:
    """The adapters of a layer's experts. kinds: (a, b) of every expert, by matrix."""
    out, down = [], kinds.get("w_down")
    gate, up = kinds.get("w_gate"), kinds.get("w_up")
    if gate or up:
        count = len(gate or up)
        pairs = zip(gate or [None] * count, up or [None] * count, strict=True)
        parts = [fuse(g, u, width) for g, u in pairs]
        out.append(Wrapped(module, "gate_up_proj", down is not None, parts[0][0].shape[1], *stack(parts)))
    if down:
        out.append(Wrapped(module, "down_proj", False, down[0][0].shape[1], *stack(down)))
    return out


def single(tensor: tables.Tensor) -> tables.Target:
    """The parameter here that a tensor of the files belongs to. Raises FormatError if there are several, and for the
    experts of a layer in one tensor (Granite-MoE)."""
    ours = " and ".join(target.path for target in tensor.targets)
    if len(tensor.targets) > 1 or len(tensor.shape) > 2:
        one = "matrix" if len(tensor.shape) == 2 else "tensor of all experts"
        rule = f"{tensor.name} is one {one} in the files and {ours} here, whose adapters have no name in PEFT"
        raise FormatError(f"{rule}; nearest valid: the merged model, without --adapter")
    return tensor.targets[0]


def layer_of(name: str) -> int:
    """The number of the layer in the name of a tensor."""
    return int(re.match(r"model\.layers\.(\d+)\.", name)[1])


def shapes_of(base: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of all parameters and router biases of a model, by path. Allocates nothing."""
    return {path: x.shape for tree in abstract_weights(base, whole_mesh()) for path, x in flatten(tree).items()}
