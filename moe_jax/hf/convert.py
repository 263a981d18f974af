"""Converts a model's files to a run directory of weights, and back, one tensor at a time."""

import dataclasses
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moe_jax import config
from moe_jax.config import ModelConfig, RunConfig
from moe_jax.data.tokenizers import COMPANION_FILES, companion_files
from moe_jax.errors import FormatError
from moe_jax.hf import block_fp8, gguf, safetensors, tables
from moe_jax.hf.architectures import ARCHITECTURES, KEPT, echo_left_out, read_config, write_config
from moe_jax.hf.defaults import DEFAULTS
from moe_jax.hf.devices import Assembly, fetch, is_finite
from moe_jax.hf.tokenizer import exported, imported
from moe_jax.model import is_prediction
from moe_jax.parallel import sharding
from moe_jax.run import weights
from moe_jax.run.config_file import load_config
from moe_jax.train.state import abstract_weights
from moe_jax.tree import flatten

TOKENIZER_FILES = COMPANION_FILES
HEADS = {"lm_head.weight": "model.embed_tokens.weight", "output.weight": "token_embd.weight"}  # equal in a tied model
PREDICTION = ("num_nextn_predict_layers", "num_mtp_layers")  # of layers of multi-token prediction
IGNORED = ".rotary_emb.inv_freq"  # tensors of old Llama files, which follow from the configuration
SEQ_LEN = 2048  # largest default of data.seq_len


def whole_mesh() -> Mesh:
    """A mesh of all devices with the weights split over them."""
    return sharding.make_mesh((1, jax.device_count(), 1))


# --- import ----------------------------------------------------------------------------------------------------------


def import_model(
    source: str | os.PathLike, workdir: str | os.PathLike, *, seq_len: int = 0, mtp: bool = False,
    mesh: Mesh | None = None, echo: Callable[[str], Any] = print,
) -> RunConfig:  # fmt: skip
    """Makes a run directory of the model in `source`: a directory with config.json and safetensors, or a GGUF file.

    seq_len: data.seq_len of the run; 0: the model's number of positions, at most `SEQ_LEN`.
    mtp: keeps the layers of multi-token prediction, a head for training; False drops them with a line.
    mesh: the devices that hold the weights meanwhile, by default all; the result does not depend on it.
    Raises FormatError, ConfigError or CheckpointError in one line, and then there is no `workdir`.
    """
    workdir, mesh = Path(workdir).expanduser(), mesh or whole_mesh()
    weights.check_free(workdir)
    read = read_model(source, lambda model: mesh, workdir, seq_len=seq_len, mtp=mtp, echo=echo)
    weights.save_weights(workdir, read.cfg, read.params, read.router_bias, [read.origin], read.files)
    echo(f"{read.summary}, → {workdir}")
    if "tokenizer.json" not in read.files and "tokenizer.model" not in read.files:
        echo(f"the model has no tokenizer files: put its tokenizer.json into {workdir}")
    return read.cfg


class ReadModel(NamedTuple):
    """A model as its files hold it."""

    cfg: RunConfig  # of a run directory of its weights
    params: dict
    router_bias: dict
    files: dict[str, bytes]  # of its tokenizer, by name
    origin: dict[str, Any]  # the event that made the weights
    summary: str


def read_model(
    source: str | os.PathLike, mesh_for: Callable[[ModelConfig], Mesh], workdir: Path | None = None, *,
    seq_len: int = 0, mtp: bool = False, echo: Callable[[str], Any] = print,
) -> ReadModel:  # fmt: skip
    """Reads the model in `source` into memory, onto the mesh of `mesh_for`. The arguments are those of `import_model`.

    workdir: where its tokenizer's files will be; None: where they are.
    """
    source = Path(source).expanduser()
    if source.suffix == ".gguf":
        hf, entries, files = gguf.open_model(source)
        prefix, settings = tables.GGUF, "metadata"
    else:
        if source.is_file():
            raise FormatError(f"{source}: must be a directory of config.json and safetensors, or a .gguf file")
        if not source.is_dir():
            raise FormatError(f"{source}: no such directory")
        hf = safetensors.read_json(source / "config.json")
        files = companion_files(source)
        prefix, settings = "", "config.json"
    name, model, lines = read_config(hf, str(source))
    for line in lines:
        echo(line)
    if mtp:
        model = dataclasses.replace(model, mtp_layers=_declared(hf, prefix + name, str(source)))
    if not prefix:
        needed = lambda tensor: not (tensor.endswith(IGNORED) or (tensor in HEADS and model.tie_embeddings))
        block = block_fp8.block_of(hf.get("quantization_config"), str(source))
        entries = block_fp8.dequantised(safetensors.open_model(source, needed, echo), block, str(source), echo)
        if not mtp:
            hint = "; --mtp keeps them for training" if workdir else ""  # an import, which has this flag
            entries = without_prediction(entries, hf, name, model.num_layers, echo, hint)
    model = _in_dtype(model, entries)
    mesh = mesh_for(model)
    check_size(source, model, len(entries), tables.rules(prefix + name, model)[1], settings)
    abstract = abstract_weights(model, mesh)
    shapes = {path: leaf.shape for tree in abstract for path, leaf in flatten(tree).items()}
    wanted = tables.tensors(prefix + name, model, shapes)
    tied = {name: HEADS[name] for name in HEADS if model.tie_embeddings}
    skipped = check_names(source, wanted, entries, tied | tables.copies(model), settings)
    folder = workdir or (source.parent if source.suffix == ".gguf" else source)
    tokenizer, files, notes = imported(files, folder, model.vocab_size)
    for line in notes:
        echo(line)
    cfg = _run_config(model, tokenizer, seq_len)
    for tensor in skipped:
        echo(f"{tensor} is not needed")

    trees = [Assembly(tree) for tree in abstract]
    owner = {path: tree for tree, a in zip(trees, abstract, strict=True) for path in flatten(a)}
    for tensor in wanted:
        value = entries[tensor.name].read()
        safetensors.check_finite(source, tensor.name, value)
        for target, part in tensor.split(value):
            owner[target.path].put(target.path, target.index, part)
    params, bias = (tree.finish() for tree in trees)
    kept = {key: hf[key] for key in KEPT if key in hf}
    origin = {"event": "import", "from": str(source), "architecture": name, "config": kept}
    total = sum(math.prod(shape) for path, shape in shapes.items() if not path.endswith("router_bias"))
    summary = f"{name}: {total:,} parameters in {len(wanted):,} tensors, {model.param_dtype}"
    return ReadModel(cfg, params, bias, files, origin, summary)


def _declared(hf: dict[str, Any], name: str, where: str) -> int:
    """The number of layers of multi-token prediction that a config.json has. Raises FormatError without any."""
    declared = _layers_of_prediction(hf, name)
    if declared < 1:
        rule = f"has no layers of multi-token prediction: architecture {name}, {PREDICTION[0]}={declared}"
        raise FormatError(f"{where}: {rule}; nearest valid: no --mtp")
    return declared


def _layers_of_prediction(hf: dict[str, Any], name: str) -> int:
    """The number of layers of multi-token prediction by a config.json, or by the default of transformers' class."""
    if name not in tables.PREDICTS:
        return 0
    given = [hf[key] for key in PREDICTION if key in hf]
    default = 0 if given else DEFAULTS[ARCHITECTURES[name].model_type][PREDICTION[0]]
    return max([number for number in given if type(number) is int], default=default)


def without_prediction(
    entries: dict[str, Any], hf: dict[str, Any], name: str, num_layers: int, echo: Callable[[str], Any], hint: str = ""
) -> dict[str, Any]:
    """The tensors without those of multi-token prediction, which follow the decoder's layers as layers of their own.

    They are extra heads for training (arXiv:2412.19437, §2.2), which logits do not depend on.
    """
    extra = range(num_layers, num_layers + _layers_of_prediction(hf, name))
    layer_of = lambda tensor: int(found[1]) if (found := re.match(r"model\.layers\.(\d{1,9})\.", tensor)) else -1
    dropped = [tensor for tensor in entries if layer_of(tensor) in extra]
    if dropped:
        layers = ", ".join(map(str, sorted({layer_of(tensor) for tensor in dropped})))
        echo(f"{len(dropped):,} tensors of multi-token prediction (layer {layers}) are not used: no logits need them"
             f"{hint}")  # fmt: skip
    return {tensor: entries[tensor] for tensor in entries if layer_of(tensor) not in extra}


def _in_dtype(model: ModelConfig, entries: dict[str, Any]) -> ModelConfig:
    """The model with param_dtype bfloat16 if that loses nothing, else float32.

    The dtype of tensors that are always float32 here does not matter.
    """
    always = (".gate.weight", "e_score_correction_bias")
    lossless = all(e.dtype.name == "bfloat16" or name.endswith(always) for name, e in entries.items())
    return dataclasses.replace(model, param_dtype="bfloat16" if lossless else "float32")


def check_size(source: Path, model: ModelConfig, tensors: int, rules: tuple[tables.Rule, ...], settings: str) -> None:
    """Raises FormatError if a model has far fewer tensors than its settings imply.

    rules: of a layer. settings: what the settings are called, "config.json" or "metadata".

    Without this check wrong settings could ask for a huge list of names.
    """
    each = any("{expert}" in rule[0] for rule in rules)  # otherwise a layer's experts are one tensor
    experts = sum(place.kind.experts for place in model.places) if each and model.num_layers <= tensors else 0
    layers = model.num_layers + model.mtp_layers
    if max(layers, experts) > tensors:
        rule = f"has {tensors:,} tensors, too few for {layers:,} layers with {experts:,} experts in all"
        raise FormatError(f"{source}: {rule}, which its {settings} asks for")


def check_names(
    source: Path, wanted: list[tables.Tensor], entries: dict[str, Any], copies: dict[str, str], settings: str
) -> list[str]:
    """The names of unneeded tensors. Raises FormatError unless the files have the others, in these shapes.

    copies: tensors that files may have besides, and those that they must equal.
    settings: what the settings are called, "config.json" or "metadata".
    """
    names = {tensor.name for tensor in wanted}
    for tensor in wanted:
        if tensor.name not in entries:
            tie = (
                "; if the head is the embedding, it must have tie_word_embeddings=true" if tensor.name in HEADS else ""
            )
            raise FormatError(f"{source}: has no {tensor.name}, which its {settings} asks for{tie}")
        if entries[tensor.name].shape != tensor.shape:
            have, want = list(entries[tensor.name].shape), list(tensor.shape)
            raise FormatError(f"{source}: {tensor.name} has shape {have}; by its {settings} it must be {want}")
    skipped = [name for name in entries if name not in names and name.endswith(IGNORED)]
    for name in entries:
        if copies.get(name) in names:
            if not np.array_equal(entries[name].read(), entries[copies[name]].read()):
                why = "though config.json ties them" if name in HEADS else "though layers of prediction share it"
                raise FormatError(f"{source}: {name} differs from {copies[name]}, {why}")
            skipped.append(name)
    if unknown := [name for name in entries if name not in names and name not in skipped]:
        rule = f"has {unknown[0]}, for which there is no rule ({len(unknown)} such tensors); none is dropped silently"
        raise FormatError(f"{source}: {rule}")
    return skipped


def _run_config(model: ModelConfig, tokenizer: dict[str, str], seq_len: int) -> RunConfig:
    """The configuration of the new run directory: the model and its tokenizer, and defaults for the rest."""
    length = seq_len or min(model.max_seq_len, SEQ_LEN)
    return config.build(
        {
            "model": config.to_dict(model),
            "data": {"tokenizer": tokenizer, "seq_len": length},
            "sample": {"prompt": "The "},
        }
    )


# --- export ----------------------------------------------------------------------------------------------------------


def export_run(
    workdir: str | os.PathLike, target: str | os.PathLike, *, at: int | None = None, dtype: str = "",
    average: bool = False, mesh: Mesh | None = None, max_file: int = 5_000_000_000, echo: Callable[[str], Any] = print,
) -> str:  # fmt: skip
    """Writes a run's weights as a directory that transformers' `from_pretrained` loads. Returns the architecture.

    at: a checkpoint; by default the newest. dtype: dtype of the files, by default that of the parameters. max_file:
        largest number of bytes of a file. average: True writes the average of the weights (`optim.ema`).
    Raises FormatError if no supported architecture computes the run's model, or if a weight is not finite in `dtype`.
    Nothing is written then.
    """
    target, workdir = weights.check_free(target), Path(workdir).expanduser()
    cfg, leaves, origin = load_run(workdir, at, average, mesh)
    dtype = np.dtype(safetensors.DTYPES[_code(dtype or cfg.model.param_dtype)])
    source = imported_from(origin)
    name, hf = write_config(cfg.model, cfg.data.seq_len, source.get("architecture", ""))
    hf |= source.get("config", {}) | {"dtype": dtype.name, "torch_dtype": dtype.name}
    hf, files = exported(Path(workdir), hf, {event.get("event") for event in origin}, echo)
    written = cfg.model
    if written.mtp_layers and name in tables.PREDICTS and written.num_moe_layers:
        hf[PREDICTION[0]] = written.mtp_layers
    elif written.mtp_layers:
        written, leaves = drop_prediction(written, leaves, name, echo)
    echo_left_out(cfg.model, echo)
    found = tables.tensors(name, written, {path: leaf.shape for path, leaf in leaves.items()})
    by_name = {tensor.name: tensor for tensor in found}
    found += [by_name[of]._replace(name=copy) for copy, of in tables.copies(written).items()]
    kind = lambda t: np.dtype("float32") if t.targets[0].path.endswith("router_bias") else dtype
    specs = [safetensors.Spec(t.name, kind(t), t.shape) for t in found]
    for path, leaf in leaves.items():
        check_is_finite(workdir, path, leaf, np.dtype("float32") if path.endswith("router_bias") else dtype)

    def values() -> Iterator[np.ndarray]:
        for tensor in found:
            parts = [fetch(leaves[target.path], target.index) for target in tensor.targets]
            yield tensor.join(parts, kind(tensor))

    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # an earlier attempt that was killed
    try:
        partial.mkdir(parents=True)
        (partial / "config.json").write_text(json.dumps(hf, indent=2) + "\n", encoding="utf-8")
        for file, data in files.items():
            (partial / file).parent.mkdir(exist_ok=True)
            (partial / file).write_bytes(data)
        safetensors.write_model(partial, specs, values(), max_file)
        os.replace(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    echo(f"{name}: {len(found):,} tensors, {dtype.name}, {sum(s.size for s in specs):,} bytes, → {target}")
    return name


def load_run(
    workdir: Path, at: int | None, average: bool, mesh: Mesh | None
) -> tuple[RunConfig, dict[str, jax.Array], list[dict]]:
    """A run's configuration, its parameters and selection biases by path, and the events that made them.

    Adapters are merged.
    """
    cfg = load_config(workdir)
    cfg = dataclasses.replace(cfg, model=cfg.model.base)
    abstract = abstract_weights(cfg.model, mesh or whole_mesh())
    params, bias, origin = weights.load_weights(workdir, *abstract, step=at, average=average)
    return cfg, flatten(params) | flatten(bias), origin


def imported_from(origin: list[dict[str, Any]]) -> dict[str, Any]:
    """The first import among the events that made weights; {} without one."""
    return next((event for event in origin if event.get("event") == "import"), {})


def drop_prediction(
    model: ModelConfig, leaves: dict[str, jax.Array], name: str, echo: Callable[[str], Any]
) -> tuple[ModelConfig, dict[str, jax.Array]]:
    """The model and its parameters without layers of multi-token prediction, with a line. name: what has no place."""
    echo(f"the layers of multi-token prediction are not exported: {name} has no place for them")
    return model.without_mtp, {path: leaf for path, leaf in leaves.items() if not is_prediction(path)}


def check_is_finite(workdir: Path, path: str, leaf: jax.Array, dtype: np.dtype) -> None:
    """Raises FormatError for a parameter with a number that is not finite in a dtype."""
    if not is_finite(leaf, dtype):
        largest = f"{float(jnp.finfo(dtype).max):,.10g}"
        rule = f"{path} is not finite in {dtype.name}, whose largest number is {largest}"
        raise FormatError(f"{workdir}: {rule}; nearest valid: --dtype=float32, or a checkpoint without NaN")


def _code(dtype: str) -> str:
    return {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]
