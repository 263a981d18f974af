"""Values of the keys of a config.json, with the defaults of transformers, and the fields that take several keys."""

from typing import Any

from moe_jax.config.layers import Kind, spell, units_of
from moe_jax.errors import FormatError
from moe_jax.hf.defaults import DEFAULTS, NULL

LARGEST = 2**31 - 1
MOST_LAYERS = 10_000  # of a model whose dense layers are not the first ones
DENSE_ANYWHERE = ("qwen2_moe", "qwen3_moe")  # model types whose keys may make any layer dense


class Keys:
    """The keys of a config.json, with the defaults of transformers' class of the architecture."""

    def __init__(self, hf: dict[str, Any], model_type: str, where: str):
        self.hf, self.model_type, self.where = hf, model_type, where
        self.defaults, self.null = DEFAULTS[model_type], NULL[model_type]
        self.asked: set[str] = set()
        self.absent: dict[str, Any] = {}  # keys that were read but are missing, with the class's default

    def get(self, keys: str) -> Any:
        """The value of the first of `keys` ("first|second"), or the default."""
        names = keys.split("|")
        self.asked.update(names)
        there = [name for name in names if name in self.hf]
        if len(there) > 1 and self.hf[there[0]] != self.hf[there[1]]:
            rule = f"{there[0]}={self.hf[there[0]]!r} and {there[1]}={self.hf[there[1]]!r} name the same setting"
            raise FormatError(f"{self.where}: {rule}; remove one of them")
        if there:
            return self.hf[there[0]]
        self.absent[names[0]] = self.defaults[names[0]]
        return self.defaults[names[0]]

    def number(self, keys: str) -> Any:
        """The value as a number. Where the class allows null, it stands for a number derived from other keys."""
        name = keys.split("|")[0]
        value = self.get(keys)
        if value is None and (name in self.null or name in self.absent):
            value = self._derived(name)
        return number_of(value, name, self.where)

    def _derived(self, name: str) -> int | None:
        if name == "q_lora_rank":
            return 0  # no latent
        if name not in ("num_key_value_heads", "head_dim"):
            return None
        heads = self.number("num_attention_heads")
        return heads if name == "num_key_value_heads" else self.number("hidden_size") // max(heads, 1)


def number_of(value: Any, name: str, where: str) -> Any:
    """The value of the key `name`. Raises FormatError if it is no number, true or false, or too large."""
    if not isinstance(value, int | float) or value != value:  # bool is int; NaN is no number
        raise FormatError(f"{where}: {name} must be a number or true or false, not {value!r}")
    if abs(value) > LARGEST:
        raise FormatError(f"{where}: {name}={value!r} is too large; the largest number is {LARGEST:,}")
    return value


# --- fields that take several keys -----------------------------------------------------------------------------------


def layers_of(keys: Keys, flat: dict[str, Any]) -> dict[str, Any]:
    """The fields num_dense_layers and layers: which layers are dense."""
    if "moe.top_k" not in flat:
        return {"num_dense_layers": flat["num_layers"]}
    if keys.model_type in DENSE_ANYWHERE:
        return _dense_anywhere(keys, flat["num_layers"], flat["moe.num_experts"])
    first = flat.get("num_dense_layers", 0)
    return {"num_dense_layers": min(first, flat["num_layers"])}  # the key may exceed the number of layers


def _dense_anywhere(keys: Keys, num_layers: int, num_experts: int) -> dict[str, Any]:
    """The fields for the keys `mlp_only_layers` and `decoder_sparse_step`, which may make any layer dense."""
    listed, step = keys.get("mlp_only_layers") or [], keys.number("decoder_sparse_step")
    if not isinstance(listed, list) or not all(type(i) is int for i in listed):
        raise FormatError(f"{keys.where}: mlp_only_layers={listed!r} must be a list of layers")
    if type(step) is not int or step < 1:
        raise FormatError(f"{keys.where}: decoder_sparse_step={step!r} must be a whole number ≥ 1")
    listed = set(listed)
    if type(num_layers) is not int or (step == 1 and sorted(listed) == list(range(len(listed)))):
        return {"num_dense_layers": min(len(listed), num_layers)}  # a number that is not whole is refused later
    if num_layers > MOST_LAYERS:
        raise FormatError(f"{keys.where}: num_hidden_layers={num_layers} is too large; the largest is {MOST_LAYERS:,}")
    dense, moe = Kind("dense"), Kind("moe", num_experts)
    kinds = tuple(dense if i in listed or (i + 1) % step else moe for i in range(num_layers))
    at_start = sum(not kind.experts for kind in kinds)
    if not any(kind.experts for kind in kinds[:at_start]):
        return {"num_dense_layers": at_start}
    return {"num_dense_layers": 0, "layers": spell(units_of(kinds), num_experts)}


def shared_experts(keys: Keys, flat: dict[str, Any]) -> dict[str, Any]:
    """The number of shared experts: Qwen2-MoE's file has their width together, a multiple of a routed expert's."""
    width, expert_width = keys.number("shared_expert_intermediate_size"), flat["moe.d_expert"]
    number = width / max(expert_width, 1)
    if type(width) is not int or number < 1 or number != int(number):
        nearest = max(1, round(number)) * expert_width
        rule = f"must be a whole number, and a multiple of moe_intermediate_size={expert_width}"
        raise FormatError(f"{keys.where}: shared_expert_intermediate_size={width} {rule}; nearest valid: {nearest}")
    return {"moe.num_shared_experts": int(number)}


def best_groups(keys: Keys, flat: dict[str, Any]) -> dict[str, Any]:
    """The groups of DeepSeek-V2, ranked by their best expert. With topk_method "greedy" it does not use them."""
    method, valid = keys.get("topk_method"), ("greedy", "group_limited_greedy")
    if method not in valid:
        raise FormatError(f"{keys.where}: topk_method={method!r} is not supported; must be {' or '.join(valid)}")
    groups, kept = keys.get("n_group"), keys.get("topk_group")
    if method == "greedy":
        return {}
    groups, kept = number_of(groups, "n_group", keys.where), number_of(kept, "topk_group", keys.where)
    return {"moe.num_groups": groups, "moe.top_groups": kept, "moe.group_score": "best" if groups > 1 else "best_two"}


def attention_multiplier(keys: Keys, flat: dict[str, Any]) -> dict[str, Any]:
    """Granite's factor on q·k. Its 0 would make all logits 0, where the field's 0 stands for 1/√head_dim."""
    value = keys.number("attention_multiplier")
    if value <= 0:
        nearest = flat["head_dim"] ** -0.5
        raise FormatError(f"{keys.where}: attention_multiplier={value!r} must be > 0; nearest valid: {nearest!r}")
    return {"attention_multiplier": value}
