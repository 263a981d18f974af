"""Reads adapters that PEFT wrote into a run directory: `python -m moe_jax.hf import --from=ADAPTER --base=RUN`.

The layouts of the files are in peft.py. The result is a run with `model.lora` that refers to the run directory of its
base: it is evaluated, exported and trained like any other. All its adapters have one rank and one scale. Where those in
the files have several, smaller ones are filled with zeros, and the factor between two scales goes into B.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moe_jax.config import LoRAConfig, ModelConfig, RunConfig
from moe_jax.data import tokenizers
from moe_jax.errors import FormatError
from moe_jax.hf import safetensors, tables
from moe_jax.hf.architectures import write_config
from moe_jax.hf.convert import whole_mesh
from moe_jax.hf.peft import CONFIG, PREFIX, TENSORS, layer_of, shapes_of, single, unfuse, unstack
from moe_jax.nn.lora import SUFFIX, is_adapter
from moe_jax.run import weights
from moe_jax.run.config_file import load_config
from moe_jax.train.state import abstract_weights
from moe_jax.tree import nest, split

MUST = {  # settings that would change what the adapter computes; absent ones are these
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None,),
}
NEW = (0, 19, 1)  # the first version whose A of experts spans their input; before, it spanned the output


class Factors(NamedTuple):
    """The adapter of one matrix: what it adds to the matrix is scale · a · b."""

    a: np.ndarray  # [in, r]
    b: np.ndarray  # [r, out]
    scale: float


Found = dict[tuple[str, tuple[int, ...]], Factors]  # by path of the matrix, and (layer,) or (layer, expert)


def import_adapter(
    source: str | os.PathLike, base: str | os.PathLike, workdir: str | os.PathLike, *, mesh: Mesh | None = None,
    echo: Callable[[str], Any] = print,
) -> RunConfig:  # fmt: skip
    """Makes a run directory of the adapters in `source`, for the base in the run directory `base`.

    Raises FormatError, ConfigError or CheckpointError in one line, and then there is no `workdir`.
    """
    source, base, mesh = Path(source).expanduser(), Path(base).expanduser(), mesh or whole_mesh()
    weights.check_free(workdir)
    of_base = load_config(base)
    model = of_base.model.base
    params, bias, origin, record = weights.load_base(
        workdir, dataclasses.replace(of_base, init_from=str(base)), *abstract_weights(model, mesh)
    )
    del params, bias
    event = next((e for e in origin if e.get("event") == "import"), {})
    name, _ = write_config(model, of_base.data.seq_len, event.get("architecture", ""))
    found = read_adapter(source, name, model)
    lora, leaves = one_rank(source, found, model)
    tokenizer = of_base.data.tokenizer
    if own := tokenizers.own_file(tokenizer, base):
        tokenizer = dataclasses.replace(tokenizer, path=str(Path(workdir) / own.name))
    cfg = dataclasses.replace(
        of_base,
        init_from=str(base),
        model=dataclasses.replace(model, lora=lora),
        data=dataclasses.replace(of_base.data, tokenizer=tokenizer),
        optim=dataclasses.replace(of_base.optim, qk_clip=0.0),
    )
    abstract = abstract_weights(cfg.model, mesh)[0]
    files = tokenizers.companion_files(base) | tokenizers.read_files(base, (tokenizers.SETTINGS,))
    place = lambda x, like: jax.device_put(jnp.asarray(x), like.sharding)
    adapters = jax.tree.map(place, nest(leaves), split(abstract, is_adapter)[0])
    own_event = {"event": "import_adapter", "from": str(source), "base": str(base)}
    weights.save_weights(workdir, cfg, adapters, {}, [*origin, own_event], files, record)
    echo(f"{len(leaves) // 2} adapters of rank {lora.rank}, for the base {base}, → {workdir}")
    return cfg


def one_rank(source: Path, found: Found, model: ModelConfig) -> tuple[LoRAConfig, dict[str, np.ndarray]]:
    """The config of adapters with one rank and scale that compute what `found` do, and their parameters by path."""
    rank, scale = max(f.a.shape[1] for f in found.values()), next(iter(found.values())).scale
    shapes, paths = shapes_of(model), list(dict.fromkeys(path for path, _ in found))
    leaves = {}
    for path in paths:
        *lead, inner, outer = shapes[path]
        a, b = np.zeros((*lead, inner, rank), np.float32), np.zeros((*lead, rank, outer), np.float32)
        for index in np.ndindex(*lead):
            if (path, index) not in found:
                have = next(i for p, i in found if p == path)
                rule = f"{path} {list(have)} has an adapter, but {path} {list(index)} has none"
                raise FormatError(f"{source}: {rule}; here all layers and experts of a stack have one, or none has")
            f = found[path, index]
            r = f.a.shape[1]
            a[*index, :, :r] = f.a
            b[*index, :r] = f.b if f.scale == scale else f.b * np.float32(f.scale / scale)
        leaves |= {f"{path}{SUFFIX}/lora_a": a, f"{path}{SUFFIX}/lora_b": b}
    match = f"^({'|'.join(re.escape(path) for path in paths)})$"
    return LoRAConfig(rank=rank, alpha=scale * rank, match=match), leaves


# --- the files -------------------------------------------------------------------------------------------------------


class Adapter(NamedTuple):
    """An adapter directory whose tensors are taken one after the other."""

    where: Path
    settings: dict[str, Any]
    entries: dict[str, safetensors.Entry]

    def take(self, module: str) -> tuple[np.ndarray, np.ndarray] | None:
        """A and B of a module, which are then no longer there; None if it has none."""
        keys = [f"{PREFIX}{module}.lora_{part}.weight" for part in "AB"]
        there = [key for key in keys if key in self.entries]
        if len(there) == 1:
            raise FormatError(f"{self.where}: has {there[0]}, but not both of {' and '.join(keys)}")
        if not there:
            return None
        found = []
        for key in keys:
            x = self.entries.pop(key).read()
            safetensors.check_finite(self.where, key, x)
            if x.ndim != 2:
                raise FormatError(f"{self.where}: {key} has shape {list(x.shape)}; must have two dimensions")
            found.append(x.astype(np.float32))
        return found[0], found[1]

    def scale(self, key: str, rank: int) -> float:
        """α/r, or α/√r, of the module or parameter `key`."""
        alpha = self.settings.get("lora_alpha", 8)
        for pattern, value in (self.settings.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", key):
                alpha = value
                break
        return alpha / (rank**0.5 if self.settings.get("use_rslora") else rank)


def open_adapter(source: Path) -> Adapter:
    """The directory, checked for settings that are not supported. Raises FormatError."""
    settings = safetensors.read_json(source / CONFIG)
    if settings.get("peft_type") != "LORA":
        kind = settings.get("peft_type")
        raise FormatError(f"{source}: peft_type={kind!r} is not supported; nearest valid: 'LORA'")
    for key, values in MUST.items():
        if settings.get(key, values[0]) not in values:
            raise FormatError(f"{source}: {key}={settings[key]!r} is not supported; nearest valid: {values[0]!r}")
    if not (source / TENSORS).is_file():
        raise FormatError(f"{source}: has no {TENSORS}; save the adapter with safe_serialization=True")
    return Adapter(source, settings, dict(safetensors.read_header(source / TENSORS)))


def read_adapter(source: Path, name: str, model: ModelConfig) -> Found:
    """The adapters of a PEFT directory. name: the architecture of the base. Raises FormatError."""
    adapter, found = open_adapter(source), {}
    experts: dict[int, list[tables.Tensor]] = {}
    for tensor in tables.tensors(name, model, shapes_of(model)):
        module = tensor.name.removesuffix(".weight")
        if (pair := adapter.take(module)) is not None:
            target, (a, b) = single(tensor), pair
            _check_shapes(source, module, a, b, tensor.shape)
            b = b if target.rows is None else b[target.rows]
            found[target.path, target.index] = Factors(a.T, b.T, adapter.scale(module, len(a)))
        if len(tensor.targets[0].index) == 2:
            experts.setdefault(layer_of(tensor.name), []).append(tensor)
    for layer, tensors in experts.items():
        found |= dict(_read_experts(adapter, f"model.layers.{layer}.mlp.experts", tensors, model))
    if adapter.entries:
        rule = f"has {next(iter(adapter.entries))}, for which there is no rule ({len(adapter.entries)} such tensors)"
        raise FormatError(f"{source}: {rule}; none is dropped silently")
    if not found:
        raise FormatError(f"{source}: {TENSORS} has no adapter of a matrix of the base")
    return found


def _check_shapes(where: Path, module: str, a: np.ndarray, b: np.ndarray, shape: tuple[int, ...]) -> None:
    if (b.shape[0], a.shape[1]) != shape or a.shape[0] != b.shape[1]:
        have = f"{list(a.shape)} and {list(b.shape)}"
        raise FormatError(f"{where}: A and B of {module} have shapes {have}; the base's matrix is {list(shape)}")


def _read_experts(adapter: Adapter, module: str, tensors: list[tables.Tensor], model: ModelConfig) -> Iterator:
    """Yields the adapters of a layer's experts, which are stored as stacks."""
    places = {t.targets[0].path.rpartition("/")[2]: t.targets[0].path for t in tensors}
    layer, experts = tensors[0].targets[0].index[0], len(tensors) // len(places)
    inner = adapter.take(f"{module}.base_layer")
    outer = adapter.take(module)
    if inner is not None and outer is None:
        raise FormatError(f"{adapter.where}: has an adapter of {module}.base_layer, but none of {module}")
    if inner is not None:
        named = [("gate_up_proj", inner), ("down_proj", outer)]
    else:
        named = [(_parameter(adapter, module), outer)] if outer is not None else []
    d, f = model.d_model, model.moe.d_expert
    for parameter, (a, b) in named:
        key = f"{module}.{parameter}"
        shape = (2 * f, d) if parameter == "gate_up_proj" else (d, f)  # [out, in]
        if len(a) % experts or len(a) != b.shape[1]:
            rule = f"A and B of {key} have shapes {list(a.shape)} and {list(b.shape)}"
            raise FormatError(f"{adapter.where}: {rule}; must be [r·{experts}, in] and [out, r·{experts}]")
        scale = adapter.scale(key, len(a) // experts)
        for e, (a_e, b_e) in enumerate(_oriented(adapter, key, a, b, experts, shape)):
            if parameter == "down_proj":
                yield (places["w_down"], (layer, e)), Factors(a_e, b_e, scale)
                continue
            for kind, part in zip(("w_gate", "w_up"), unfuse(a_e, b_e), strict=True):
                yield (places[kind], (layer, e)), Factors(*part, scale)


def _parameter(adapter: Adapter, module: str) -> str:
    """The parameter of the experts that alone has an adapter, by `target_parameters`."""
    targets = adapter.settings.get("target_parameters") or []
    found = {p for p in ("gate_up_proj", "down_proj") if any(f"{module}.{p}".endswith(t) for t in targets)}
    if len(found) != 1:
        rule = f"target_parameters={targets!r} does not say which parameter of {module} has the adapter"
        raise FormatError(f"{adapter.where}: {rule}; nearest valid: one of gate_up_proj and down_proj")
    return found.pop()


def _oriented(
    adapter: Adapter, key: str, a: np.ndarray, b: np.ndarray, experts: int, shape: tuple[int, int]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(a [in, r], b [r, out]) of each expert, whichever version of PEFT wrote them."""
    out, inner = shape
    new, old = (a.shape[1], b.shape[0]) == (inner, out), (a.shape[1], b.shape[0]) == (out, inner)
    if new and old:  # a square matrix
        new = _version(adapter, key) >= NEW
    elif not (new or old):
        have = f"{list(a.shape)} and {list(b.shape)}"
        raise FormatError(
            f"{adapter.where}: A and B of {key} have shapes {have}; the base's matrices are {list(shape)}"
        )
    pairs = unstack(a, b, experts)
    return pairs if new else [(b_e.T, a_e.T) for a_e, b_e in pairs]


def _version(adapter: Adapter, key: str) -> tuple[int, ...]:
    text = str(adapter.settings.get("peft_version") or "")
    numbers = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", text)
    if not numbers:
        rule = f"the matrices of {key} are square, so only peft_version in {CONFIG} tells how A and B are stored"
        raise FormatError(f'{adapter.where}: {rule}; nearest valid: add "peft_version", such as "0.19.1"')
    return tuple(int(n or 0) for n in numbers.groups())
