"""Reads GGUF files of Llama, Mixtral, Qwen3 and Qwen3-MoE with the `gguf` package. Quantised formats become float32."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe_jax.errors import FormatError
from moe_jax.hf.gguf_tokenizer import tokenizer_files

# Values of general.architecture, and the architecture of transformers; Mixtral is a llama that has experts.
KINDS = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM", "qwen3moe": "Qwen3MoeForCausalLM"}
# Key of the file below its architecture, as in `llama.block_count`, and key of config.json.
KEYS = (
    ("embedding_length", "hidden_size"),
    ("block_count", "num_hidden_layers"),
    ("feed_forward_length", "intermediate_size"),
    ("attention.head_count", "num_attention_heads"),
    ("attention.layer_norm_rms_epsilon", "rms_norm_eps"),
    ("context_length", "max_position_embeddings"),
)
EXPERTS = (("expert_used_count", "num_experts_per_tok"), ("expert_count", "num_local_experts"))
EXPERT_WIDTH = (("expert_feed_forward_length", "moe_intermediate_size"),)
# What llama.cpp does with every Qwen3-MoE, whatever the file says (qwen3moe.cpp); transformers' own default is false.
QWEN3_MOE = {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
# Further keys below the architecture that are read, or repeat what the tensors show.
READ = {"rope.freq_base", "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear",
        "rope.scaling.attn_factor", "rope.scaling.original_context_length", "rope.scaling.finetuned",
        "attention.key_length", "attention.value_length", "vocab_size", "attention.head_count_kv",
        "expert_count", "expert_used_count"}  # fmt: skip


class Entry(NamedTuple):
    """A tensor of the file."""

    tensor: Any
    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self) -> np.ndarray:
        """The numbers, in float32."""
        from gguf.quants import dequantize

        return dequantize(self.tensor.data, self.tensor.tensor_type).reshape(self.shape)


def open_model(path: Path) -> tuple[dict[str, Any], dict[str, Entry], dict[str, bytes]]:
    """The equivalent of a config.json, the tensors by name, and the tokenizer's files. Raises FormatError."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise FormatError(f"{path}: reading GGUF needs a package: pip install gguf") from None
    if not path.is_file():
        raise FormatError(f"{path}: no such file")
    try:
        _check_lengths(path)
        reader = GGUFReader(str(path))
        value = lambda key: None if key not in reader.fields else reader.fields[key].contents()
        kind = value("general.architecture")
        if kind not in KINDS:
            valid = ", ".join(map(repr, KINDS))
            raise FormatError(f"{path}: general.architecture={kind!r} is not supported; must be one of {valid}")
        of_kind = lambda key: value(f"{kind}.{key}")
        entries = {}
        for t in reader.tensors:
            if t.name in entries:
                raise FormatError(f"{path}: has {t.name} twice")
            entries[t.name] = Entry(t, tuple(int(n) for n in t.shape[::-1]), np.dtype("float32"))
        _check_rope(path, kind, of_kind, entries)
        hf = settings(path, kind, of_kind) | {
            "tie_word_embeddings": "output.weight" not in entries,
            "vocab_size": entries["token_embd.weight"].shape[0],
            "bos_token_id": value("tokenizer.ggml.bos_token_id"), "eos_token_id": value("tokenizer.ggml.eos_token_id"),
        }  # fmt: skip
        known = {f"{kind}.{key}" for key in READ | {ours for ours, _ in keys_of(kind, True)}}
        unknown = [key for key in reader.fields if key.startswith(f"{kind}.") and key not in known]
        hf |= {key: value(key) for key in unknown}  # read_config reports them like unknown keys of a config.json
        files = tokenizer_files(value)
    except FormatError:
        raise
    except Exception as e:  # the package may raise anything for a damaged file
        raise FormatError(f"{path}: is not a complete GGUF file: {type(e).__name__}: {e}") from None
    return hf, entries, files


def keys_of(kind: str, experts: bool) -> tuple[tuple[str, str], ...]:
    """The keys that every file of an architecture has, below its name, and those of config.json.

    experts: whether a llama has experts.
    """
    if kind == "qwen3moe":
        return (*KEYS, *EXPERTS, *EXPERT_WIDTH)
    return (*KEYS, *EXPERTS) if kind == "llama" and experts else KEYS


def settings(path: Path | str, kind: str, value: Callable[[str], Any]) -> dict[str, Any]:
    """The keys of config.json that the keys of a file say, without what its tensors show. Raises FormatError.

    value: of a key below the architecture `kind`.
    """
    name, hf, experts = KINDS[kind], {}, bool(value("expert_count"))
    if kind == "llama" and experts:
        name = "MixtralForCausalLM"
    if kind == "qwen3moe":
        hf = dict(QWEN3_MOE)
    for ours, theirs in keys_of(kind, experts):
        if (number := value(ours)) is None:
            raise FormatError(f"{path}: has no {kind}.{ours}, which every {kind} file has")
        # The shortest decimal of a float32, which is the number of config.json that the file was made from.
        hf[theirs] = float(str(np.float32(number))) if isinstance(number, float) else number
    width, heads = hf["hidden_size"], hf["num_attention_heads"]
    head = value("attention.key_length") or value("rope.dimension_count") or width // heads
    for key in ("rope.dimension_count", "attention.value_length"):
        if (size := value(key)) not in (None, head):
            rule = f"{kind}.{key}={size} with heads of {head} is not supported"
            raise FormatError(f"{path}: {rule}; nearest valid: {head}")
    rope = {"rope_theta": float(value("rope.freq_base") or 10_000.0), "rope_type": "default"}
    kv_heads = value("attention.head_count_kv") or heads
    return hf | {
        "num_key_value_heads": kv_heads,
        "architectures": [name],
        "rope_parameters": rope,
        "head_dim": head,
    }


def _check_rope(path: Path, kind: str, value: Callable[[str], Any], entries: dict[str, Entry]) -> None:
    """Raises FormatError for scaled positions. Defaults are those of llama.cpp (llama-model.cpp, load_hparams):
    the type "linear", and the factor of `rope.scale_linear`, its older name. A factor of 0 means 1.

    value: of a key below the architecture `kind`.
    """
    scaling = value("rope.scaling.type") or "linear"
    newer, older = (value(f"rope.{key}") for key in ("scaling.factor", "scale_linear"))
    factor = older if newer is None else newer
    scaled = scaling == "linear" and factor not in (None, 0, 1)
    if scaled or scaling not in ("linear", "none") or "rope_freqs.weight" in entries:
        setting = f"{kind}.rope.scaling.type={scaling!r}, factor={factor}"
        raise FormatError(f"{path}: {setting}: scaled positions in GGUF are not supported; nearest valid: 'none'")
    if (factor := value("rope.scaling.attn_factor")) not in (None, 0, 1):
        raise FormatError(f"{path}: {kind}.rope.scaling.attn_factor={factor} is not supported; nearest valid: 1")


_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes by type; 8: text, 9: array


def _check_lengths(path: Path) -> None:
    """Raises FormatError for a count or length in the header that exceeds the file.

    The package trusts these numbers, and a wrong one could make it loop for very long.
    """
    data = np.memmap(path, np.uint8, "r")
    at = 0

    def take(n: int) -> int:
        nonlocal at
        if n > len(data) - at:
            raise FormatError(
                f"{path}: a length of {n:,} bytes at byte {at:,} is impossible: the file has {len(data):,}"
            )
        at += n
        return at - n

    def number(size: int) -> int:
        return int.from_bytes(data[(begin := take(size)) : begin + size].tobytes(), "little")

    def skip(kind: int, depth: int = 0) -> None:
        if kind == 8:
            take(number(8))
        elif kind == 9 and depth < 2:
            inner, count = number(4), number(8)
            if inner in _SIZES:
                take(count * _SIZES[inner])
                return
            if 8 * count > len(data):
                take(8 * count)  # raises FormatError
            for _ in range(count):
                skip(inner, depth + 1)
        else:
            take(_SIZES[kind])

    take(8)
    tensors, values = number(8), number(8)
    for _ in range(values):
        take(number(8))
        skip(number(4))
    for _ in range(tensors):
        take(number(8))
        take(8 * number(4) + 12)
