"""Converts the keys of RoPE in a config.json to fields of the model, and back.

transformers 5 writes `rope_parameters`, older versions `rope_theta` and `rope_scaling`. A class with windows may have
one object for each kind of layer. Source of what is read and of what an absent key means: modeling_rope_utils.py of
transformers 5.24.
"""

from typing import Any

from moe_jax.config import ModelConfig
from moe_jax.config.positions import yarn_scale
from moe_jax.errors import FormatError
from moe_jax.hf.keys import Keys, number_of

ROPE = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "original_max_position_embeddings")
PARTIAL = ("glm4_moe",)  # model types that rotate a part of each head; others ignore its key
NESTED = ("olmo3",)  # model types with one object for layers with a window, one for those without
LABELS = ("full_attention", "sliding_attention")
TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
# Keys of the files and fields of RopeScalingConfig, by type; all must be there.
NUMBERS = {
    "linear": {"factor": "factor"},
    "dynamic": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_length",
    },
}
YARN = {"beta_fast": 32.0, "beta_slow": 1.0}  # 0 and null mean the same as no key
ALWAYS = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}
READ = {  # keys of each type beyond ALWAYS
    "default": set(),
    "yarn": {"factor", "original_max_position_embeddings", "attention_factor", "mscale", "mscale_all_dim", "truncate",
             *YARN},
    "longrope": {"factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"},
    **{kind: set(numbers) for kind, numbers in NUMBERS.items()},
}  # fmt: skip


def read_rope(keys: Keys, flat: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Fields of RoPE, and lines about its keys. flat: the other fields, of which the number of positions is one.

    Raises FormatError for a scaling that is not computed here.
    """
    hf, where = keys.hf, keys.where
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}  # transformers has this order too
    if not isinstance(rope, dict):
        raise FormatError(f"{where}: rope_scaling and rope_parameters must be JSON objects")
    if keys.model_type in NESTED:
        return _of_kinds_of_layers(keys, flat)
    if nested := next((key for key, value in rope.items() if isinstance(value, dict)), None):
        raise FormatError(f"{where}: a separate RoPE for {nested} is not supported; nearest valid: one for all layers")
    return _of_one(keys, rope, flat)


def _of_one(keys: Keys, rope: dict[str, Any], flat: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Fields and lines for one object."""
    where = keys.where
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in TYPES:
        valid = ", ".join(map(repr, TYPES))
        raise FormatError(f"{where}: rope_type={kind!r} is not supported; must be one of {valid}")
    theta = rope["rope_theta"] if "rope_theta" in rope else keys.get("rope_theta")
    fields: dict[str, Any] = {"rope_theta": number_of(theta, "rope_theta", where)}
    partial, lines = _partial(keys, rope, kind, flat)
    fields |= partial
    if kind not in ("default", "yarn") and "mla.rope_dim" in flat and rope.get("mscale_all_dim"):
        rule = f"mscale_all_dim={rope['mscale_all_dim']!r} with rope_type={kind!r} is not supported"
        raise FormatError(f"{where}: {rule}; nearest valid: null")  # transformers multiplies logits for every type
    if kind != "default":
        made = _scaling(keys, rope, kind, flat)
        if kind == "dynamic":  # its limit is where the file's begins to be exceeded, times the factor
            fields["max_seq_len"] = int(flat["max_seq_len"] * made["factor"])
        fields |= {f"rope_scaling.{name}": value for name, value in ({"type": kind} | made).items()}
    for key, value in rope.items():
        if key not in ALWAYS | READ[kind] and value is not None:
            lines.append(f"{key}={value!r} of RoPE is unknown and not used")
    return fields, lines


def _partial(keys: Keys, rope: dict[str, Any], kind: str, flat: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The field rope_dim, and a line for a share that the class does not read."""
    if keys.model_type not in PARTIAL:
        share = rope.get("partial_rotary_factor", keys.hf.get("partial_rotary_factor"))
        if share in (None, 1.0):
            return {}, []
        if kind != "default":
            rule = f"partial_rotary_factor={share!r} is not supported with rope_type={kind!r}"
            raise FormatError(f"{keys.where}: {rule}; nearest valid: 1.0")
        return {}, [f"partial_rotary_factor={share!r} is not used, as in transformers' {keys.model_type}"]
    share = rope["partial_rotary_factor"] if "partial_rotary_factor" in rope else keys.get("partial_rotary_factor")
    share = 1.0 if share is None else number_of(share, "partial_rotary_factor", keys.where)
    if not 0 < share <= 1:
        raise FormatError(f"{keys.where}: partial_rotary_factor={share!r} must be in (0, 1]; nearest valid: 1.0")
    size = int(flat["head_dim"] * share)
    return {"rope_dim": 0 if size == flat["head_dim"] else max(size, 1)}, []


def _scaling(keys: Keys, rope: dict[str, Any], kind: str, flat: dict[str, Any]) -> dict[str, Any]:
    """The fields of `rope_scaling` for a type, but for the type itself."""
    where, positions = keys.where, flat["max_seq_len"]
    number = lambda name, value: number_of(value, f"RoPE scaling: {name}", where)
    # Beside one object for all layers it wins (Phi-3).
    original = None if keys.model_type in NESTED else keys.hf.get("original_max_position_embeddings")
    if original is None:
        original = rope.get("original_max_position_embeddings", positions)
    if kind in NUMBERS:
        values = rope | {"original_max_position_embeddings": original}
        made = {ours: number(key, values.get(key)) for key, ours in NUMBERS[kind].items()}
        if kind == "dynamic":
            made["original_length"] = positions
        return made
    made = {"original_length": number("original_max_position_embeddings", original)}
    if "factor" not in rope and kind == "yarn":
        raise FormatError(f"{where}: RoPE scaling: factor is missing; nearest valid: a number, or null")
    factor = rope.get("factor")
    factor = positions / max(made["original_length"], 1) if factor is None else number("factor", factor)
    attention = rope.get("attention_factor")
    if kind == "longrope":
        lists = {name: rope.get(name) for name in ("short_factor", "long_factor")}
        for name, value in lists.items():
            if not isinstance(value, list):
                raise FormatError(f"{where}: RoPE scaling: {name} must be a list of numbers, not {value!r}")
            lists[name] = tuple(float(number(name, x)) for x in value)
        made |= {"factor": max(factor, 1.0), **lists}
    else:
        truncate = rope.get("truncate", True)
        made |= {"factor": factor, "truncate": bool(number("truncate", truncate))}
        made |= {name: number(name, rope.get(name) or default) for name, default in YARN.items()}
        some, all_dim = (number(name, rope.get(name) or 0.0) for name in ("mscale", "mscale_all_dim"))
        if attention is None and some and all_dim:
            attention = yarn_scale(factor, some) / yarn_scale(factor, all_dim)
        if "mla.rope_dim" in flat:
            made["mscale_all_dim"] = all_dim
    made["attention_factor"] = 0.0 if attention is None else number("attention_factor", attention)
    if attention is not None and made["attention_factor"] <= 0:
        raise FormatError(f"{where}: RoPE scaling: attention_factor={attention!r} must be > 0; nearest valid: 1.0")
    return made


def _of_kinds_of_layers(keys: Keys, flat: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Fields and lines for OLMo 3, whose scaling may be that of layers without a window.

    An older `rope_scaling` is that of those layers. transformers gives a `rope_theta` beside it to them only.
    """
    hf, where, lines = keys.hf, keys.where, []
    both = hf.get("rope_parameters") or {}
    if not isinstance(both, dict) or not all(isinstance(both.get(label) or {}, dict) for label in LABELS):
        raise FormatError(f"{where}: rope_parameters must be a JSON object of {' and '.join(LABELS)}")
    if other := next((key for key in both if key not in LABELS), None):
        raise FormatError(f"{where}: {other} of rope_parameters must be inside {' or '.join(LABELS)}")
    full, window = (dict(both.get(label) or {}) for label in LABELS)
    full |= hf.get("rope_scaling") or {}
    full = full if "rope_theta" in full else full | {"rope_theta": keys.get("rope_theta")}
    window = {"rope_theta": keys.defaults["rope_theta"]} | window
    as_there = f"is not used, as in transformers' {keys.model_type}"
    if "truncate" in full:  # transformers looks for it one level higher
        lines.append(f"truncate={full.pop('truncate')!r} of RoPE {as_there}")
    if (original := hf.get("original_max_position_embeddings")) is not None:
        lines.append(f"original_max_position_embeddings={original!r} {as_there}")
    (fields, more), (others, _) = _of_one(keys, full, flat), _of_one(keys, window, flat)
    lines += more
    if fields == others:
        return fields, lines
    if fields["rope_theta"] != others["rope_theta"]:
        rule = f"rope_theta={fields['rope_theta']!r} of layers without a window, {others['rope_theta']!r} of the others"
        raise FormatError(f"{where}: {rule}: must be one number; nearest valid: {fields['rope_theta']!r} of both")
    if len(others) > 1:
        rule = "a scaling of layers with a window alone is not supported"
        raise FormatError(f"{where}: {rule}; nearest valid: 'default'")
    return fields | {"rope_scaling.layers": "full"}, lines


# --- ModelConfig → config.json ---------------------------------------------------------------------------------------


def write_rope(model: ModelConfig, model_type: str) -> dict[str, Any]:
    """The keys of RoPE for a model. A reader of them finds out what the class cannot do."""
    s, theta = model.rope_scaling, {"rope_theta": model.rope_theta}
    rope = theta | _written(model)
    if model_type in NESTED:
        default = theta | {"rope_type": "default"}
        window = default if s.layers == "full" else rope
        return {"rope_parameters": dict(zip(LABELS, (rope, window), strict=True)), **theta}
    hf: dict[str, Any] = {"rope_parameters": rope, **theta}
    if model_type in PARTIAL:
        share = model.rope_size / model.head_dim
        if int(model.head_dim * share) != model.rope_size:  # rounding: the share is read back by ⌊head · share⌋
            share = (model.rope_size + 0.5) / model.head_dim
        rope["partial_rotary_factor"] = hf["partial_rotary_factor"] = share
    if s.on:
        hf["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
        if s.type == "dynamic":
            hf["max_position_embeddings"] = s.original_length
    return hf


def _written(model: ModelConfig) -> dict[str, Any]:
    s = model.rope_scaling
    if not s.on:
        return {"rope_type": "default"}
    out = {"rope_type": s.type}
    if s.type in NUMBERS:
        return out | {key: getattr(s, ours) for key, ours in NUMBERS[s.type].items()}
    out |= {"factor": s.factor, "original_max_position_embeddings": s.original_length}
    if s.attention_factor:
        out["attention_factor"] = s.attention_factor
    if s.type == "longrope":
        return out | {"short_factor": list(s.short_factor), "long_factor": list(s.long_factor)}
    out |= {"beta_fast": s.beta_fast, "beta_slow": s.beta_slow, "truncate": s.truncate}
    return out | ({"mscale_all_dim": s.mscale_all_dim} if model.mla.kv_rank else {})
