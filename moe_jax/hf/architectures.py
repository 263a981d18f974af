"""`config.json` of Hugging Face ⇄ `ModelConfig`, from one table per architecture.

A key that says how the model computes is in a table, or must have the one value of `MUST`. Other keys are known to have
no effect (`INERT`), or are printed. Which architecture a model of ours can be exported as follows from the same table:
it is the one whose `config.json` reads back as this very model.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from moe_jax import config
from moe_jax.checkpoint import CheckpointError
from moe_jax.config import ConfigError, ModelConfig


class FormatError(CheckpointError):
    """Files that are not what they should be, in one line."""


Field = tuple[str, str]  # key of config.json, field of ModelConfig; several keys: "first|second", the first is written

COMMON: tuple[Field, ...] = (
    ("vocab_size", "vocab_size"),
    ("hidden_size", "d_model"),
    ("num_hidden_layers", "num_layers"),
    ("num_attention_heads", "num_heads"),
    ("num_key_value_heads", "num_kv_heads"),
    ("max_position_embeddings", "max_seq_len"),
    ("rms_norm_eps", "norm_eps"),
    ("tie_word_embeddings", "tie_embeddings"),
    ("initializer_range", "init_std"),
)
HEADS: tuple[Field, ...] = (("head_dim", "head_dim"),)
WIDTH: tuple[Field, ...] = (("intermediate_size", "d_ff"),)
MLA: tuple[Field, ...] = (
    ("kv_lora_rank", "mla.kv_rank"),
    ("q_lora_rank", "mla.q_rank"),
    ("qk_rope_head_dim", "mla.rope_dim"),
    ("v_head_dim", "mla.v_dim"),
)
# Where a key may be missing: the value it then has, from what is there.
DEFAULTS: dict[str, Callable[[dict], Any]] = {
    "num_key_value_heads": lambda c: c["num_attention_heads"],
    "head_dim": lambda c: c["hidden_size"] // max(c["num_attention_heads"], 1),
    "tie_word_embeddings": lambda c: False,
    "initializer_range": lambda c: 0.02,
    "q_lora_rank": lambda c: 0,
    "n_shared_experts": lambda c: 0,
}
MUST = {  # the only value that is computed here; a missing key has it
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_bias": False,
    "clip_qkv": None,
    "quantization_config": None,
    "decoder_sparse_step": 1,
    "moe_layer_freq": 1,
    "rope_interleave": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "partial_rotary_factor": 1.0,
}
LARGEST = 2**31 - 1
KEPT = ("bos_token_id", "eos_token_id", "pad_token_id")  # written again on export
ELSEWHERE = {"rope_theta", "rope_scaling", "rope_parameters", "sliding_window", "use_sliding_window", "layer_types",
             "max_window_layers", "mlp_only_layers", "qk_nope_head_dim", "qk_head_dim", "head_dim"}  # fmt: skip
INERT = {"architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "use_cache", "auto_map",
         "attention_dropout", "pretraining_tp", "output_router_logits", "router_aux_loss_coef", "router_jitter_noise",
         "aux_loss_alpha", "seq_aux", "ep_size", "num_nextn_predict_layers", "_name_or_path", "is_llama_config",
         "rope_interleaved"}  # fmt: skip


class Architecture(NamedTuple):
    name: str  # in `architectures`
    model_type: str
    fields: tuple[Field, ...]
    ours: dict[str, Any]  # what the architecture is by definition, in fields of ModelConfig
    extra: dict[str, Any]  # keys that are written and not read


EXPERTS: tuple[Field, ...] = (("num_experts_per_tok", "moe.top_k"),)
ARCHITECTURES = {
    a.name: a
    for a in (
        Architecture("LlamaForCausalLM", "llama", (*COMMON, *HEADS, *WIDTH), {}, {}),
        Architecture("MistralForCausalLM", "mistral", (*COMMON, *HEADS, *WIDTH), {}, {"sliding_window": None}),
        Architecture("Qwen3ForCausalLM", "qwen3", (*COMMON, *HEADS, *WIDTH), {"qk_norm": True}, {}),
        Architecture(
            "MixtralForCausalLM",
            "mixtral",
            (*COMMON, *HEADS, *EXPERTS, ("intermediate_size", "moe.d_expert"),
             ("num_local_experts", "moe.num_experts")),
            {"moe.renormalize": True, "num_dense_layers": 0},
            {"sliding_window": None},
        ),
        Architecture(
            "OlmoeForCausalLM",
            "olmoe",
            (*COMMON, *EXPERTS, ("intermediate_size", "moe.d_expert"), ("num_experts", "moe.num_experts"),
             ("norm_topk_prob", "moe.renormalize")),
            {"qk_norm": True, "qk_norm_over": "projection", "num_dense_layers": 0},
            {},
        ),
        Architecture(
            "Qwen3MoeForCausalLM",
            "qwen3_moe",
            (*COMMON, *HEADS, *WIDTH, *EXPERTS, ("moe_intermediate_size", "moe.d_expert"),
             ("num_experts|num_local_experts", "moe.num_experts"), ("norm_topk_prob", "moe.renormalize")),
            {"qk_norm": True},
            {"decoder_sparse_step": 1},
        ),
        Architecture(
            "DeepseekV3ForCausalLM",
            "deepseek_v3",
            (*COMMON, *WIDTH, *MLA, *EXPERTS, ("moe_intermediate_size", "moe.d_expert"),
             ("n_routed_experts|num_local_experts", "moe.num_experts"), ("n_shared_experts", "moe.num_shared_experts"),
             ("n_group", "moe.num_groups"), ("topk_group", "moe.top_groups"), ("norm_topk_prob", "moe.renormalize"),
             ("routed_scaling_factor", "moe.routed_scaling"), ("first_k_dense_replace", "num_dense_layers")),
            {"moe.score": "sigmoid", "moe.selection_bias": True},
            {"rope_interleave": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
             "num_nextn_predict_layers": 0},
        ),
    )
}  # fmt: skip


# --- config.json → ModelConfig ---------------------------------------------------------------------------------------


def read_config(hf: dict[str, Any], where: str) -> tuple[str, ModelConfig, list[str]]:
    """The architecture, the model, and lines about keys of no known effect. Raises FormatError, ConfigError."""
    names = hf.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise FormatError(f"{where}: architectures={names!r} is not among those that are known: {known}")
    arch = ARCHITECTURES[name]
    for key, value in MUST.items():
        if key in hf and hf[key] != value and not (hf[key] is None and not value):
            raise FormatError(f"{where}: {key}={hf[key]!r} is not computed here; nearest valid: {value!r}")
    flat: dict[str, Any] = {}
    for keys, ours in arch.fields:
        flat[ours] = _value(hf, keys.split("|"), where)
    flat |= arch.ours | _rope(hf, where) | _layers(hf, arch, where)
    if "mla.rope_dim" in flat:  # a head is its two parts
        flat["head_dim"] = _value(hf, ["qk_nope_head_dim"], where) + flat["mla.rope_dim"]
    elif "head_dim" not in flat:
        flat["head_dim"] = DEFAULTS["head_dim"](hf)
    lines = [f"{key}={hf[key]!r} in config.json is not known here and not used" for key in _unknown(hf, arch)]
    window = _window(hf)
    if window and window < flat["max_seq_len"]:
        flat["max_seq_len"] = window
        lines.append(f"sliding_window={window}: good for up to {window} positions only, where the window does nothing")
    return name, _model(flat, where), lines


def _value(hf: dict[str, Any], keys: list[str], where: str) -> Any:
    found = [key for key in keys if key in hf]
    value = hf[found[0]] if found else None
    if value is None and keys[0] in DEFAULTS:
        value = DEFAULTS[keys[0]](hf)
    if not isinstance(value, int | float):  # bool is int
        raise FormatError(f"{where}: {keys[0]} must be a number or true or false, not {value!r}")
    if abs(value) > LARGEST:
        raise FormatError(f"{where}: {keys[0]}={value!r} cannot be; the largest number is {LARGEST:,}")
    return value


def _model(flat: dict[str, Any], where: str) -> ModelConfig:
    values = config.to_dict(ModelConfig())
    for name, value in flat.items():
        group, _, field = name.rpartition(".")
        (values[group] if group else values)[field] = value
    try:
        return config.build_model(values)
    except ConfigError as e:
        raise FormatError(f"{where}: {e}") from None


def _rope(hf: dict[str, Any], where: str) -> dict[str, Any]:
    """transformers 5 writes `rope_parameters`, older versions `rope_theta` and `rope_scaling`."""
    parts = [hf.get(key) or {} for key in ("rope_scaling", "rope_parameters")]
    if not all(isinstance(part, dict) for part in parts):
        raise FormatError(f"{where}: rope_scaling and rope_parameters must be JSON objects")
    rope = parts[0] | parts[1]
    theta = rope.get("rope_theta", hf.get("rope_theta"))
    if theta is None and hf.get("model_type") == "llama":
        theta = 10_000.0  # the first Llama's files do not say it
    if not isinstance(theta, int | float):
        raise FormatError(f"{where}: rope_theta must be a number, not {theta!r}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    scaling = {}
    if kind == "llama3":
        keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        values = [_value(rope, [key], f"{where}: RoPE scaling") for key in keys]
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_length")
        scaling = {f"rope_scaling.{name}": value for name, value in zip(names, values, strict=True)}
    elif kind != "default":
        raise FormatError(f"{where}: rope_type={kind!r} is not computed here; nearest valid: 'default', 'llama3'")
    return {"rope_theta": theta} | scaling


def _layers(hf: dict[str, Any], arch: Architecture, where: str) -> dict[str, Any]:
    """Which layers are dense: all, those of `mlp_only_layers`, or what the table says."""
    if "moe.top_k" not in dict(map(reversed, arch.fields)):
        return {"num_dense_layers": hf["num_hidden_layers"]}
    dense = hf.get("mlp_only_layers") or []
    if not isinstance(dense, list) or dense != list(range(len(dense))):
        raise FormatError(f"{where}: mlp_only_layers={dense!r}: dense layers must be the first ones")
    return {"num_dense_layers": len(dense)} if arch.model_type == "qwen3_moe" else {}


def _window(hf: dict[str, Any]) -> int:
    """The sliding window of any layer, 0 without."""
    window = hf.get("sliding_window") if hf.get("use_sliding_window", True) else None
    return window if isinstance(window, int) else 0


def _unknown(hf: dict[str, Any], arch: Architecture) -> list[str]:
    table = {key for keys, _ in arch.fields for key in keys.split("|")}
    return [key for key in hf if key not in table | set(MUST) | set(KEPT) | ELSEWHERE | INERT]


# --- ModelConfig → config.json ---------------------------------------------------------------------------------------


def write_config(model: ModelConfig, seq_len: int, prefer: str = "") -> tuple[str, dict[str, Any]]:
    """An architecture that computes this model, and its config.json. Raises FormatError if there is none.

    seq_len: the number of positions, where the model does not say. prefer: the architecture to try first.
    """
    model = dataclasses.replace(model, max_seq_len=model.max_seq_len or seq_len)
    reasons = {}
    for name in sorted(ARCHITECTURES, key=lambda name: name != prefer):
        hf = _written(model, ARCHITECTURES[name])
        try:
            back = read_config(hf, name)[1]
        except (FormatError, ConfigError) as e:
            reasons[name] = [str(e)]
            continue
        reasons[name] = differences(model, back)
        if not reasons[name]:
            return name, hf
    nearest = min(reasons, key=lambda name: len(reasons[name]))
    rule = f"the nearest, {nearest}, has another {'; '.join(reasons[nearest][:5])}"
    raise FormatError(f"no architecture of {', '.join(ARCHITECTURES)} computes this model: {rule}")


def differences(a: ModelConfig, b: ModelConfig) -> list[str]:
    """Fields of which the function of a model with such weights depends, as "top_k (2 here, 1 there)"."""
    out = []
    for group in ("", "moe", "mla", "rope_scaling"):
        x, y = (getattr(m, group) if group else m for m in (a, b))
        for f in dataclasses.fields(x):
            one, two, name = getattr(x, f.name), getattr(y, f.name), f"{group}.{f.name}".removeprefix(".")
            if one == two or dataclasses.is_dataclass(one) or config.is_machine(f"model.{name}"):
                continue
            if _matters(a, group, f.name):
                out.append(f"{name} ({one} here, {two} there)")
    return out


def _matters(model: ModelConfig, group: str, name: str) -> bool:
    """Fields of parts that the model does not have do not."""
    if group == "moe":
        return model.num_moe_layers > 0 and (name != "top_groups" or model.moe.num_groups > 1)
    if group == "mla":
        return name == "kv_rank" or model.mla.kv_rank > 0
    if group == "rope_scaling":
        return name == "factor" or model.rope_scaling.factor > 1
    return {"d_ff": model.num_dense_layers > 0, "qk_norm_over": model.qk_norm}.get(name, True)


def _written(model: ModelConfig, arch: Architecture) -> dict[str, Any]:
    hf: dict[str, Any] = {"architectures": [arch.name], "model_type": arch.model_type, "hidden_act": "silu"}
    for keys, ours in arch.fields:
        value = model
        for part in ours.split("."):
            value = getattr(value, part)
        hf[keys.split("|")[0]] = value
    rope: dict[str, Any] = {"rope_theta": model.rope_theta, "rope_type": "default"}
    s = model.rope_scaling
    if s.factor > 1:
        rope |= {"rope_type": "llama3", "factor": s.factor, "low_freq_factor": s.low_freq_factor}
        rope |= {"high_freq_factor": s.high_freq_factor, "original_max_position_embeddings": s.original_length}
    hf |= {"rope_parameters": rope, "rope_theta": model.rope_theta, "use_cache": True, **arch.extra}
    if s.factor > 1:
        hf["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    if arch.model_type == "qwen3_moe":
        hf["mlp_only_layers"] = list(range(model.num_dense_layers))
    if "q_lora_rank" in hf:
        hf |= {"q_lora_rank": model.mla.q_rank or None, "qk_nope_head_dim": model.head_dim - model.mla.rope_dim}
    return hf
