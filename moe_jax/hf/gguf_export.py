"""Writes a run as a GGUF file with the `gguf` package, which rounds matrices to a format with scales of blocks.

The architectures are those that gguf.py reads. A file is read back as the same model, and matrices as the package
rounds them. Norms and routers are float32.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moe_jax.errors import FormatError
from moe_jax.hf import gguf, tables
from moe_jax.hf.architectures import echo_left_out, write_config
from moe_jax.hf.convert import check_is_finite, drop_prediction, imported_from, load_run
from moe_jax.hf.devices import fetch
from moe_jax.hf.gguf_tokenizer import tokenizer_keys
from moe_jax.run import weights

# Names of types here, and in the package: of these it has both ways. The others of GGUF it can only read.
TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0", "q5_1": "Q5_1", "q5_0": "Q5_0",
         "q4_1": "Q4_1", "q4_0": "Q4_0"}  # fmt: skip
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "BF16": 32}  # of llama.cpp
FLOATS = {"float32": np.dtype("float32"), "bfloat16": np.dtype(jnp.bfloat16)}  # the others have scales in float16
NAMES = (*gguf.KINDS.values(), "MixtralForCausalLM")


def export_gguf(
    workdir: str | os.PathLike, target: str | os.PathLike, *, at: int | None = None, dtype: str = "",
    experts_dtype: str = "", average: bool = False, mesh: Mesh | None = None, echo: Callable[[str], Any] = print,
) -> str:  # fmt: skip
    """Writes a run's weights as one GGUF file. Returns its architecture.

    at: a checkpoint; by default the newest. dtype: type of all matrices, an entry of `TYPES`; by default that of the
        parameters. experts_dtype: type of the matrices of routed experts; by default `dtype`. average: True writes the
        average of the weights (`optim.ema`).
    Raises FormatError if no architecture of gguf.py computes the run's model, if rows are not as long as the type asks
    for, if `experts_dtype` is given and there are no experts, or if a weight is not finite. Nothing is written then.
    """
    try:
        from gguf import GGUFWriter
    except ImportError:
        raise FormatError(f"{target}: writing GGUF needs a package: pip install gguf") from None
    target, workdir = weights.check_free(target), Path(workdir).expanduser()
    if target.is_dir():
        raise FormatError(f"{target}: is a folder; nearest valid: {target}/model.gguf")
    cfg, leaves, origin = load_run(workdir, at, average, mesh)
    model, dtype = cfg.model, dtype or cfg.model.param_dtype
    if model.mtp_layers:
        model, leaves = drop_prediction(model, leaves, "GGUF", echo)
    source = imported_from(origin).get("architecture", "")
    name, hf = write_config(model, cfg.data.seq_len, source, NAMES, lambda hf: _kept(hf, model.tie_embeddings))
    echo_left_out(model, echo)
    kind, keys = metadata(hf)
    found = tables.tensors(tables.GGUF + name, model, {path: leaf.shape for path, leaf in leaves.items()})
    types = {tensor.name: _type_of(tensor, dtype, experts_dtype or dtype) for tensor in found}
    if experts_dtype and not any("_exps" in tensor.name for tensor in found):
        raise FormatError(f"{target}: --experts_dtype={experts_dtype}: the model has no experts; leave it out")
    for tensor in found:
        _check_rows(target, tensor, types[tensor.name], "experts_dtype" if "_exps" in tensor.name else "dtype")
    for tensor in found:
        for goal in tensor.targets:
            number = FLOATS.get(types[tensor.name], np.dtype("float16"))
            check_is_finite(workdir, goal.path, leaves[goal.path], number)

    partial = target.with_name(f".{target.name}.partial")
    target.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(str(partial), kind)
    for key, value in keys.items():
        {int: writer.add_uint32, float: writer.add_float32}[type(value)](f"{kind}.{key}", value)
    writer.add_file_type(FILE_TYPES[TYPES[_most(found, types)]])
    writer.add_quantization_version(2)
    for key, value in tokenizer_keys(workdir, model.vocab_size, echo).items():
        _add(writer, key, value)
    sizes = {tensor.name: _bytes_of(tensor, types[tensor.name]) for tensor in found}
    for tensor in found:
        raw = _raw(types[tensor.name])
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype("float32"), sizes[tensor.name], raw)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in found:
            parts = [fetch(leaves[goal.path], goal.index) for goal in tensor.targets]
            writer.write_tensor_data(_rounded(tensor.join(parts, np.dtype("float32")), types[tensor.name]))
        writer.close()
        os.replace(partial, target)
    except BaseException:
        writer.close()
        partial.unlink(missing_ok=True)
        raise
    numbers, total = sum(int(np.prod(tensor.shape)) for tensor in found), sum(sizes.values())
    shown = dtype + (f", experts {experts_dtype}" if experts_dtype and experts_dtype != dtype else "")
    echo(
        f"{kind}: {len(found):,} tensors, {shown}, {total:,} bytes, {8 * total / numbers:.2f} bits a weight, → {target}"
    )
    return kind


# --- settings --------------------------------------------------------------------------------------------------------


def metadata(hf: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The value of general.architecture, and the keys below it, of a model with this config.json."""
    name = hf["architectures"][0]
    kind = next((kind for kind, of in gguf.KINDS.items() if of == name), "llama")
    hf = {"num_local_experts": hf.get("num_experts"), **hf}
    keys = {ours: hf[theirs] for ours, theirs in gguf.keys_of(kind, name == "MixtralForCausalLM")}
    head, rope = hf["head_dim"], hf.get("rope_parameters") or hf
    keys |= {"attention.head_count_kv": hf["num_key_value_heads"], "attention.key_length": head,
             "attention.value_length": head, "rope.dimension_count": head, "vocab_size": hf["vocab_size"],
             "rope.freq_base": float(rope["rope_theta"])}  # fmt: skip
    return kind, keys


def _kept(hf: dict[str, Any], tied: bool) -> dict[str, Any]:
    """What gguf.py reads of the file of a model with this config.json."""
    kind, keys = metadata(hf)
    as_stored = {key: float(np.float32(value)) if isinstance(value, float) else value for key, value in keys.items()}
    return gguf.settings("the file", kind, as_stored.get) | {
        "tie_word_embeddings": tied,
        "vocab_size": hf["vocab_size"],
    }


def _add(writer: Any, key: str, value: Any) -> None:
    add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
    add[type(value)](key, value)


# --- tensors ---------------------------------------------------------------------------------------------------------


def _type_of(tensor: tables.Tensor, dtype: str, experts_dtype: str) -> str:
    """The type of a tensor: float32 for norms and routers."""
    if len(tensor.shape) == 1 or "ffn_gate_inp" in tensor.name:
        return "float32"
    return experts_dtype if "_exps" in tensor.name else dtype


def _most(found: list[tables.Tensor], types: dict[str, str]) -> str:
    """The type that most numbers of the file have, by which programs call the file."""
    numbers: dict[str, int] = {}
    for tensor in found:
        numbers[types[tensor.name]] = numbers.get(types[tensor.name], 0) + int(np.prod(tensor.shape))
    return max(numbers, key=numbers.get)


def _raw(dtype: str) -> Any:
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType[TYPES[dtype]]


def _bytes_of(tensor: tables.Tensor, dtype: str) -> int:
    from gguf import GGML_QUANT_SIZES

    numbers, size = GGML_QUANT_SIZES[_raw(dtype)]
    return int(np.prod(tensor.shape)) // numbers * size


def _check_rows(target: Path, tensor: tables.Tensor, dtype: str, flag: str) -> None:
    from gguf import GGML_QUANT_SIZES

    numbers, _ = GGML_QUANT_SIZES[_raw(dtype)]
    if tensor.shape[-1] % numbers:
        rule = f"{tensor.name} has rows of {tensor.shape[-1]}, but --{flag}={dtype} has blocks of {numbers}"
        raise FormatError(f"{target}: {rule}; nearest valid: --{flag}=float16")


def _rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    from gguf.quants import quantize

    return np.ascontiguousarray(quantize(np.ascontiguousarray(x), _raw(dtype)))
