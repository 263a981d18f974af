"""Converts `config.json` of Hugging Face to `ModelConfig` and back, from one table per architecture.

A key that changes the model's function is in a table, or must have the value in `MUST`. Other keys have no effect
(`INERT`), or are printed. The same tables decide how a model can be exported: as an architecture whose `config.json`
reads back as the same model.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from moe_jax import config
from moe_jax.config import ModelConfig
from moe_jax.config.layers import spell, units_of
from moe_jax.config.positions import Attends
from moe_jax.errors import ConfigError, FormatError
from moe_jax.hf.keys import (
    DENSE_ANYWHERE,
    Keys,
    attention_multiplier,
    best_groups,
    layers_of,
    shared_experts,
)
from moe_jax.hf.rope import ROPE, read_rope, write_rope
from moe_jax.hf.windows import read_windows, without_long_windows, write_windows

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
# The only value that is supported; in every class of transformers that has the key it is the default. An architecture
# whose table reads the key takes other values, and its row may name another one.
MUST = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_bias": False,
    "clip_qkv": None,
    "moe_layer_freq": 1,
    "rope_interleave": True,
}
SIGMOID = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
QUIET = {"initializer_range", "use_sliding_window", "max_window_layers"}  # no message if one of these is missing
KEPT = ("bos_token_id", "eos_token_id", "pad_token_id")  # kept from import to export
INERT = {"architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "use_cache", "auto_map",
         "attention_dropout", "pretraining_tp", "output_router_logits", "router_aux_loss_coef", "router_jitter_noise",
         "aux_loss_alpha", "seq_aux", "ep_size", "num_nextn_predict_layers", "num_mtp_layers", "_name_or_path",
         "is_llama_config", "rope_interleaved"}  # fmt: skip


class Architecture(NamedTuple):
    """An architecture of transformers, and its table of keys."""

    name: str  # in `architectures`
    model_type: str
    fields: tuple[Field, ...]
    ours: dict[str, Any]  # fields of ModelConfig that every model of the architecture has
    extra: dict[str, Any]  # keys that are written but not read
    inert: tuple[str, ...] = ()  # keys without effect in this architecture, which others may use
    # Fields that take several keys, from those keys and the fields that take one; and the keys, from the model.
    read: Callable[[Keys, dict[str, Any]], dict[str, Any]] = lambda keys, flat: {}
    write: Callable[[ModelConfig], dict[str, Any]] = lambda model: {}
    must: Mapping[str, Any] = MappingProxyType({})  # beyond or instead of MUST

    @property
    def required(self) -> dict[str, Any]:
        """The keys that must have one value, and the value."""
        read = {key for keys, _ in self.fields for key in keys.split("|")}
        return {key: value for key, value in (MUST | self.must).items() if key not in read}


EXPERTS: tuple[Field, ...] = (("num_experts_per_tok", "moe.top_k"),)
DEEPSEEK_EXPERTS: tuple[Field, ...] = (
    ("moe_intermediate_size", "moe.d_expert"), ("n_shared_experts", "moe.num_shared_experts"),
    ("routed_scaling_factor", "moe.routed_scaling"), ("first_k_dense_replace", "num_dense_layers"),
)  # fmt: skip
DEEPSEEK: tuple[Field, ...] = (*COMMON, *WIDTH, *MLA, *EXPERTS, *DEEPSEEK_EXPERTS)
BEST_TWO: tuple[Field, ...] = (
    ("n_group", "moe.num_groups"), ("topk_group", "moe.top_groups"), ("norm_topk_prob", "moe.renormalize"),
)  # fmt: skip
ARCHITECTURES = {
    a.name: a
    for a in (
        Architecture("LlamaForCausalLM", "llama", (*COMMON, *HEADS, *WIDTH), {}, {}),
        Architecture("MistralForCausalLM", "mistral", (*COMMON, *HEADS, *WIDTH), {}, {}),
        Architecture("Qwen2ForCausalLM", "qwen2", (*COMMON, *HEADS, *WIDTH), {"qkv_bias": True}, {}),
        Architecture("Qwen3ForCausalLM", "qwen3", (*COMMON, *HEADS, *WIDTH), {"qk_norm": True}, {}),
        Architecture(
            "MixtralForCausalLM",
            "mixtral",
            (*COMMON, *HEADS, *EXPERTS, ("intermediate_size", "moe.d_expert"),
             ("num_local_experts|num_experts", "moe.num_experts")),
            {"moe.renormalize": True, "num_dense_layers": 0},
            {},
        ),
        Architecture(
            "OlmoeForCausalLM",
            "olmoe",
            (*COMMON, *HEADS, *EXPERTS, ("intermediate_size", "moe.d_expert"),
             ("num_experts|num_local_experts", "moe.num_experts"), ("norm_topk_prob", "moe.renormalize")),
            {"qk_norm": True, "qk_norm_over": "projection", "num_dense_layers": 0},
            {},
        ),
        Architecture(
            "Qwen2MoeForCausalLM",
            "qwen2_moe",
            (*COMMON, *HEADS, *WIDTH, *EXPERTS, ("moe_intermediate_size", "moe.d_expert"),
             ("num_experts|num_local_experts", "moe.num_experts"), ("norm_topk_prob", "moe.renormalize"),
             ("qkv_bias", "qkv_bias")),
            {"moe.shared_gate": "sigmoid"},
            {"decoder_sparse_step": 1},
            read=shared_experts,
            write=lambda m: {"shared_expert_intermediate_size": m.moe.num_shared_experts * m.moe.d_expert},
        ),
        Architecture(
            "Qwen3MoeForCausalLM",
            "qwen3_moe",
            (*COMMON, *HEADS, *WIDTH, *EXPERTS, ("moe_intermediate_size", "moe.d_expert"),
             ("num_experts|num_local_experts", "moe.num_experts"), ("norm_topk_prob", "moe.renormalize")),
            {"qk_norm": True},
            {"decoder_sparse_step": 1},
            ("max_window_layers",),
        ),
        Architecture(
            "DeepseekV3ForCausalLM",
            "deepseek_v3",
            (*DEEPSEEK, *BEST_TWO, ("n_routed_experts|num_local_experts", "moe.num_experts")),
            {"moe.score": "sigmoid", "moe.selection_bias": True},
            {"rope_interleave": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
             "num_nextn_predict_layers": 0},
            ("head_dim", "qk_head_dim"),
            must=SIGMOID,
        ),
        Architecture(
            "Olmo2ForCausalLM", "olmo2", (*COMMON, *HEADS, *WIDTH),
            {"qk_norm": True, "qk_norm_over": "projection", "norm": "post"}, {},
        ),
        Architecture(
            "FlexOlmoForCausalLM",
            "flex_olmo",
            (*COMMON, *HEADS, *EXPERTS, ("intermediate_size", "moe.d_expert"),
             ("num_experts|num_local_experts", "moe.num_experts"), ("norm_topk_prob", "moe.renormalize")),
            {"qk_norm": True, "qk_norm_over": "projection", "num_dense_layers": 0, "norm": "post"},
            {},
        ),
        Architecture(
            "Olmo3ForCausalLM", "olmo3", (*COMMON, *HEADS, *WIDTH),
            {"qk_norm": True, "qk_norm_over": "projection", "norm": "post"}, {},
        ),
        Architecture("SmolLM3ForCausalLM", "smollm3", (*COMMON, *HEADS, *WIDTH), {}, {}),
        Architecture(
            "Glm4MoeForCausalLM",
            "glm4_moe",
            (*COMMON, *HEADS, *WIDTH, *EXPERTS, *DEEPSEEK_EXPERTS, *BEST_TWO,
             ("n_routed_experts|num_local_experts", "moe.num_experts"), ("attention_bias", "qkv_bias"),
             ("use_qk_norm", "qk_norm")),
            {"moe.score": "sigmoid", "moe.selection_bias": True},
            {"num_nextn_predict_layers": 0},
            must=SIGMOID,
        ),
        Architecture(
            "GraniteMoeForCausalLM",
            "granitemoe",
            (*COMMON, *HEADS, *EXPERTS, ("intermediate_size", "moe.d_expert"),
             ("num_local_experts|num_experts", "moe.num_experts"), ("embedding_multiplier", "embedding_multiplier"),
             ("residual_multiplier", "residual_multiplier"), ("logits_scaling", "logits_divisor")),
            {"moe.score_order": "topk_score", "num_dense_layers": 0},
            {},
            read=attention_multiplier,
            write=lambda m: {"attention_multiplier": m.attention_multiplier or m.head_dim**-0.5},
        ),
        Architecture(
            "DeepseekV2ForCausalLM",
            "deepseek_v2",
            (*DEEPSEEK, ("n_routed_experts|num_experts", "moe.num_experts")),
            {},
            {"norm_topk_prob": False, "scoring_func": "softmax"},
            ("head_dim", "qk_head_dim"),
            read=best_groups,
            write=lambda m: {
                "topk_method": "greedy" if m.moe.num_groups == 1 else "group_limited_greedy",
                "n_group": m.moe.num_groups, "topk_group": m.moe.top_groups,
            },
            # transformers ignores norm_topk_prob, and the code of the release does not; all releases have false.
            must={"norm_topk_prob": False, "scoring_func": "softmax"},
        ),
    )
}  # fmt: skip


# --- config.json → ModelConfig ---------------------------------------------------------------------------------------


def read_config(hf: dict[str, Any], where: str) -> tuple[str, ModelConfig, list[str]]:
    """The architecture, the model, and lines about keys that are unknown or missing.

    Raises FormatError, ConfigError.
    """
    names = hf.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise FormatError(f"{where}: architectures={names!r} is not supported; must be one of {known}")
    arch = ARCHITECTURES[name]
    for key, value in arch.required.items():
        if key in hf and hf[key] != value and not (hf[key] is None and not value):
            raise FormatError(f"{where}: {key}={hf[key]!r} is not supported; nearest valid: {value!r}")
    keys = Keys(hf, arch.model_type, where)
    flat = {ours: keys.number(theirs) for theirs, ours in arch.fields}
    flat |= arch.ours | layers_of(keys, flat)
    flat |= arch.read(keys, flat)
    if "mla.rope_dim" in flat:  # a head has a part without RoPE and one with it
        if flat["mla.kv_rank"] < 1:
            rule = f"kv_lora_rank={flat['mla.kv_rank']!r} must be ≥ 1: {name} has latent attention"
            raise FormatError(f"{where}: {rule}; nearest valid: 1")
        flat["head_dim"] = keys.number("qk_nope_head_dim") + flat["mla.rope_dim"]
    rope, lines = read_rope(keys, flat)
    flat |= rope
    flat |= read_windows(keys, flat)
    model = _model(flat, where)
    known = keys.asked | set(arch.required) | {"quantization_config"} | set(KEPT) | set(ROPE) | INERT | set(arch.inert)
    unknown = [key for key in hf if key not in known and hf[key] is not None]
    file = _file(where)
    lines += [f"{key}={hf[key]!r} in {file} is unknown and not used" for key in unknown]
    if absent := {key: value for key, value in keys.absent.items() if value is not None and key not in QUIET}:
        defaults = ", ".join(f"{key}={value!r}" for key, value in absent.items())
        lines.append(f"{file} has no {', '.join(absent)}; defaults of transformers' {arch.model_type}: {defaults}")
    return name, model, lines


def _file(where: str) -> str:
    """The name of the file that has the settings, for messages."""
    return "the file" if where.endswith(".gguf") else "config.json"


def _model(flat: dict[str, Any], where: str) -> ModelConfig:
    values = config.to_dict(ModelConfig())
    for name, value in flat.items():
        group, _, field = name.rpartition(".")
        (values[group] if group else values)[field] = value
    try:
        return config.build_model(values)
    except ConfigError as e:
        raise FormatError(f"{where}: {e}") from None


WITHOUT_POOLS = "document pools are not exported: tokens choose from all experts, as with model.moe.pool_from='all'"

WITHOUT_RATIO = "choices that weigh little are not left out there, as with model.moe.min_ratio=0"


def echo_left_out(model: ModelConfig, echo: Callable[[str], Any]) -> None:
    """Prints what of a model's routing no file has, for a model that has it."""
    if model.num_moe_layers and model.moe.pool_min:
        echo(WITHOUT_POOLS)
    if model.num_moe_layers and model.moe.min_ratio:
        echo(WITHOUT_RATIO)


# --- ModelConfig → config.json ---------------------------------------------------------------------------------------


def write_config(
    model: ModelConfig, seq_len: int, prefer: str = "", among: Sequence[str] = tuple(ARCHITECTURES),
    kept: Callable[[dict[str, Any]], dict[str, Any]] = lambda hf: hf,
) -> tuple[str, dict[str, Any]]:  # fmt: skip
    """An architecture that computes this model, and its config.json. Raises FormatError if there is none.

    seq_len: the number of positions if the model has no max_seq_len. prefer: the architecture to try first.
    among: those that the files can be of. kept: what files of another form keep of a config.json.
    """
    moe = config.plain_routing(model.moe) if model.num_moe_layers else model.moe
    kinds = tuple(place.kind for place in model.places)
    if model.layers and all(kind.name in ("dense", "moe") for kind in kinds):  # one spelling for each order of blocks
        plain = tuple(kind._replace(attends=Attends()) for kind in kinds)  # of which attention_layers is apart
        model = dataclasses.replace(model, layers=spell(units_of(plain), model.moe.num_experts))
    model = dataclasses.replace(model, max_seq_len=model.max_seq_len or seq_len, moe=moe)
    model = without_long_windows(model)
    reasons, unlike = {}, set()
    for name in sorted(among, key=lambda name: name != prefer):
        hf = _written(model, ARCHITECTURES[name])
        try:
            back = read_config(kept(hf), name)[1]
        except (FormatError, ConfigError) as e:
            reasons[name] = [str(e)]
            unlike.add(name)
            continue
        reasons[name] = differences(model, back)
        if not reasons[name]:
            return name, hf
    nearest = min(reasons, key=lambda name: (name in unlike, len(reasons[name])))
    rule = f"the nearest, {nearest}, differs in {'; '.join(reasons[nearest][:5])}"
    raise FormatError(f"none of {', '.join(among)} computes the same function as this model: {rule}")


def differences(a: ModelConfig, b: ModelConfig) -> list[str]:
    """Fields that make two models different functions of the same weights, such as "top_k (2 here, 1 there)"."""
    a, b = config.plain(a), config.plain(b)
    out = []
    for group in ("", "moe", "mla", "rope_scaling", "memory"):
        x, y = (getattr(m, group) if group else m for m in (a, b))
        for f in dataclasses.fields(x):
            one, two, name = getattr(x, f.name), getattr(y, f.name), f"{group}.{f.name}".removeprefix(".")
            same = dataclasses.is_dataclass(one) or config.same_value(one, two)
            if not (same or config.is_machine(f"model.{name}")):
                out.append(f"{name} ({one} here, {two} there)")
    return out


def _written(model: ModelConfig, arch: Architecture) -> dict[str, Any]:
    hf: dict[str, Any] = {"architectures": [arch.name], "model_type": arch.model_type, "hidden_act": "silu"}
    for keys, ours in arch.fields:
        value = model
        for part in ours.split("."):
            value = getattr(value, part)
        hf[keys.split("|")[0]] = value
    hf |= {"use_cache": True, **arch.extra}
    hf |= write_rope(model, arch.model_type) | write_windows(model, arch.model_type) | arch.write(model)
    if arch.model_type in DENSE_ANYWHERE:
        hf["mlp_only_layers"] = [i for i, place in enumerate(model.places) if not place.kind.experts]
    if "q_lora_rank" in hf:
        hf |= {"q_lora_rank": model.mla.q_rank or None, "qk_nope_head_dim": model.head_dim - model.mla.rope_dim}
    return hf
