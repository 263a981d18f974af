"""Reads adapters that PEFT wrote into a run directory: `python -m moe_jax.hf import --from=ADAPTER --base=RUN`.

The layouts of the files are in peft.py. The result is a run with `model.lora` that refers to the run directory of its
base: it is evaluated and exported like any other. All its adapters have one rank and one scale. Where those in the
files have several, smaller ones are filled with zeros, and the factor between two scales goes into B.

A run with this one as its `init_from`, and with `model.lora` of the same matrices, rank and scale, trains on from its
A and B, on the same base (`run.weights.load_start`).
"""

import dataclasses
import math
import os
import re
import shlex
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
from moe_jax.nn.lora import NEVER, SUFFIX, is_adapter, matrix_of
from moe_jax.optim import groups
from moe_jax.run import weights
from moe_jax.run.base import check_not_rounded, imported_from, rounded_by
from moe_jax.run.config_file import load_config
from moe_jax.train.state import abstract_weights
from moe_jax.tree import nest, split

# Settings that are read here, or that change neither what the adapter computes nor its base. In PEFT 0.21.2 and later
# versions any other may, so it must be None, False, 0 or empty.
KNOWN = {
    "peft_type", "peft_version", "base_model_name_or_path", "lora_alpha", "alpha_pattern", "use_rslora",
    "target_parameters", "init_lora_weights", "bias",
    "r", "rank_pattern", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",  # shapes tell
    "auto_mapping", "revision", "task_type", "inference_mode", "lora_dropout", "ensure_weight_tying",
    # Each has an effect only beside another setting, which is refused, or in the making of A and B.
    "corda_config", "eva_config", "loftq_config", "lora_ga_config", "megatron_core", "qalora_group_size",
}  # fmt: skip
# Ways to make A and B that leave the weights of the base as they are; "pissa" and others subtract A and B from them.
STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
DEFAULT_ALPHA = 8  # of PEFT
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
    of_base, lost = groups.without_lost(load_config(base).without_mtp)
    model = of_base.model.base
    adapter = open_adapter(source)
    as_base = dataclasses.replace(of_base, init_from=str(base))
    params, bias, origin, record = weights.load_base(workdir, as_base, *abstract_weights(model, mesh))
    del params, bias
    event = next((e for e in origin if e.get("event") == "import"), {})
    name, _ = write_config(model, of_base.data.seq_len, event.get("architecture", ""))
    found = read_adapter(adapter, name, model)
    lora, leaves = one_rank(source, found, model)
    check_not_rounded(rounded_by(origin), str(base), lora.rank)
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
    for line in lost:
        echo(line)
    if line := compare_names(adapter, base, origin):
        echo(line)
    echo(f"{len(leaves) // 2} adapters of rank {lora.rank}, for the base {base}, → {workdir}")
    fields = {name: getattr(lora, name) for name in ("rank", "alpha", "match")}
    set_so = [f"--config.model.lora.{k}={shlex.quote(str(x))}" for k, x in fields.items() if x != LoRAConfig.match]
    echo(f"to train on from them: --config.init_from={shlex.quote(str(workdir))} {' '.join(set_so)}")
    return cfg


def compare_names(adapter: "Adapter", base: Path, origin: list[dict]) -> str:
    """A warning if the adapter names another base than the one of this origin; "" if not, or if one has no name.

    Names are no proof: a model may have several, so the shapes decide.
    """
    theirs, own = adapter.settings.get("base_model_name_or_path"), imported_from(origin)
    earlier = next((e["from"] for e in origin if e.get("event") == "import" and e.get("from")), None)
    if not theirs or not earlier:
        return ""
    same = theirs == earlier or Path(str(theirs)).expanduser().resolve() == Path(earlier).expanduser().resolve()
    if same == bool(own):
        return ""
    is_now = f"was imported from {earlier!r}" + ("" if own else " and has changed since")
    return f"warning: the adapter is of {theirs!r}, and {base} {is_now}; the shapes fit, but is it the same model?"


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
    usual = LoRAConfig(rank=rank, alpha=scale * rank)
    by_default = {matrix_of(path) for path in shapes_of(dataclasses.replace(model, lora=usual)) if is_adapter(path)}
    match = usual.match if by_default == set(paths) else f"^({'|'.join(re.escape(path) for path in paths)})$"
    return dataclasses.replace(usual, match=match), leaves


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
            if x.ndim != 2 or not x.size:
                raise FormatError(f"{self.where / TENSORS}: {key} has shape {list(x.shape)}; must be a matrix")
            found.append(x.astype(np.float32))
        return found[0], found[1]

    def scale(self, key: str, rank: int) -> float:
        """α/r, or α/√r, of the module or parameter `key`."""
        alpha = self.settings.get("lora_alpha", DEFAULT_ALPHA)
        for pattern, value in (self.settings.get("alpha_pattern") or {}).items():
            if re.match(_whole(pattern), key):
                alpha = value
                break
        return alpha / (rank**0.5 if self.settings.get("use_rslora") else rank)


def open_adapter(source: Path) -> Adapter:
    """The directory, checked for settings that are not supported and for values of no meaning. Raises FormatError."""
    settings = safetensors.read_json(source / CONFIG)
    if settings.get("peft_type") != "LORA":
        kind = settings.get("peft_type")
        raise FormatError(f"{source}: peft_type={kind!r} is not supported; nearest valid: 'LORA'")
    start = settings.get("init_lora_weights")
    if (start.lower() if isinstance(start, str) else start) not in STARTS:
        rule = f"init_lora_weights={start!r} is not supported, since it changes the base's weights too"
        raise FormatError(f"{source / CONFIG}: {rule}; nearest valid: True, once PEFT has converted the adapter")
    if settings.get("bias") not in ("none", None):
        raise FormatError(f"{source / CONFIG}: bias={settings['bias']!r} is not supported; nearest valid: 'none'")
    for key, value in settings.items():
        if value and key not in KNOWN:
            nearest = False if value is True else None
            raise FormatError(f"{source / CONFIG}: {key}={value!r} is not supported; nearest valid: {nearest!r}")
    _check_alphas(source / CONFIG, settings)
    if not (source / TENSORS).is_file():
        raise FormatError(f"{source}: has no {TENSORS}; save the adapter with safe_serialization=True")
    return Adapter(source, settings, dict(safetensors.read_header(source / TENSORS, safetensors.DTYPES)))


def _check_alphas(where: Path, settings: dict[str, Any]) -> None:
    """Raises FormatError for an α that is not a number > 0, and for a pattern that is not a regular expression."""
    patterns = settings.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise FormatError(f"{where}: alpha_pattern={patterns!r} must have an α for each pattern; nearest valid: {{}}")
    alphas = {"lora_alpha": settings.get("lora_alpha", DEFAULT_ALPHA)}
    alphas |= {f"alpha_pattern[{pattern!r}]": alpha for pattern, alpha in patterns.items()}
    for name, alpha in alphas.items():
        number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
        if not (number and 0 < alpha < math.inf):
            raise FormatError(f"{where}: {name}={alpha!r} must be a number > 0; nearest valid: {DEFAULT_ALPHA}")
    for pattern in patterns:
        try:
            re.compile(_whole(pattern))
        except re.error as e:
            rule = f"alpha_pattern has {pattern!r}, which is not a regular expression: {e}"
            raise FormatError(f"{where}: {rule}; nearest valid: {re.escape(pattern)!r}") from None


def _whole(pattern: str) -> str:
    """The expression with which PEFT looks for a pattern: at the end of a module's name, after a dot."""
    return rf"(.*\.)?({pattern})$"


def read_adapter(adapter: Adapter, name: str, model: ModelConfig) -> Found:
    """The adapters of a PEFT directory. name: the architecture of the base. Raises FormatError."""
    source, found = adapter.where, {}
    experts: dict[int, list[tables.Tensor]] = {}
    for tensor in tables.tensors(name, model, shapes_of(model)):
        module = tensor.name.removesuffix(".weight")
        if (pair := adapter.take(module)) is not None:
            target, (a, b) = single(tensor), pair
            if re.search(NEVER, target.path):
                rule = f"has an adapter of {module}, which is {target.path} here and has none"
                raise FormatError(f"{source}: {rule}; nearest valid: an adapter trained without it")
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
    d, f = model.expert_dim, model.moe.d_expert
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
    targets = targets if isinstance(targets, list) else [str(targets)]
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
