"""Converts the keys of attention windows, and of layers without RoPE, to fields of the model, and back.

Some classes have a window in every layer, others list the layers that have one; where the list is missing each has its
own rule. Source: the configuration classes of transformers 5.24.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from moe_jax.config import ModelConfig
from moe_jax.config.positions import Attends, write_layers
from moe_jax.errors import FormatError
from moe_jax.hf.defaults import DEFAULTS
from moe_jax.hf.keys import MOST_LAYERS, Keys

FULL, SLIDING = "full_attention", "sliding_attention"


def read_windows(keys: Keys, flat: dict[str, Any]) -> dict[str, Any]:
    """The fields window and attention_layers. flat: the other fields. A window as long as the context is none."""
    layers = flat["num_layers"]
    if "sliding_window" not in keys.defaults or type(layers) is not int or layers < 1:
        return {}  # a number of layers that is none is refused later
    if layers > MOST_LAYERS:
        raise FormatError(f"{keys.where}: num_hidden_layers={layers} is too large; the largest is {MOST_LAYERS:,}")
    window, rotated = _window(keys), _rotated(keys, layers)
    if "layer_types" not in keys.defaults:
        windowed = [window is not None] * layers
    else:
        windowed = _windowed(keys, layers, window, rotated)
    if window is not None and window >= flat["max_seq_len"]:
        windowed = [False] * layers
    attends = tuple(Attends(w, r) for w, r in zip(windowed, rotated, strict=True))
    return {"window": window if any(windowed) else 0, "attention_layers": _line(attends)}


def _line(attends: tuple[Attends, ...]) -> str:
    """The list in one line; "" where all layers are the same and rotated: the window alone says so."""
    return "" if len(set(attends)) == 1 and attends[0].rope else write_layers(attends)


def _window(keys: Keys) -> int | None:
    """The window; None if there is none."""
    window = keys.get("sliding_window")
    if "use_sliding_window" in keys.defaults and not keys.number("use_sliding_window"):
        window = None
        keys.absent.pop("sliding_window", None)
    if window is not None and (type(window) is not int or window < 1):
        raise FormatError(f"{keys.where}: sliding_window={window!r} must be a whole number ≥ 1, or null")
    return window


def _rotated(keys: Keys, layers: int) -> list[bool]:
    """Returns for each layer whether it has RoPE."""
    if "no_rope_layers" not in keys.defaults:
        return [True] * layers
    listed, every = keys.get("no_rope_layers"), keys.number("no_rope_layer_interval")
    if listed is None:
        if type(every) is not int or every < 1:
            raise FormatError(f"{keys.where}: no_rope_layer_interval={every!r} must be a whole number ≥ 1")
        return [bool((i + 1) % every) for i in range(layers)]
    keys.absent.pop("no_rope_layer_interval", None)
    if not (isinstance(listed, list) and len(listed) >= layers and all(x in (0, 1) for x in listed)):
        raise FormatError(f"{keys.where}: no_rope_layers={listed!r}: must be a list of {layers} numbers 0 or 1")
    return [bool(x) for x in listed[:layers]]


def _windowed(keys: Keys, layers: int, window: int | None, rotated: list[bool]) -> list[bool]:
    """Returns for each layer whether it has a window."""
    listed = keys.get("layer_types")
    if "max_window_layers" in keys.defaults:
        first = keys.number("max_window_layers")
    if listed is None:
        keys.absent.pop("layer_types", None)
        if keys.model_type == "qwen2_moe" and window is None and keys.number("use_sliding_window"):
            raise FormatError(f"{keys.where}: use_sliding_window is true, but there is no sliding window")
        if keys.model_type == "olmo3":
            found = [(i + 1) % 4 != 0 for i in range(layers)]
        elif keys.model_type == "smollm3":
            found = [window is not None and not rope for rope in rotated]
        elif keys.model_type == "qwen2_moe":
            found = [window is not None and i % 2 == 0 and i < first for i in range(layers)]
        else:
            found = [window is not None and i >= first for i in range(layers)]
    else:
        keys.absent.pop("max_window_layers", None)
        if not (isinstance(listed, list) and len(listed) == layers and all(x in (FULL, SLIDING) for x in listed)):
            rule = f"must be a list of {layers} values {FULL} or {SLIDING}"
            raise FormatError(f"{keys.where}: layer_types={listed!r}: {rule}")
        found = [x == SLIDING for x in listed]
    if any(found) and window is None:
        raise FormatError(f"{keys.where}: layer_types has {SLIDING!r}, but there is no sliding window")
    return found


# --- ModelConfig → config.json ---------------------------------------------------------------------------------------


def without_long_windows(model: ModelConfig) -> ModelConfig:
    """The model without a window that is as long as its context, as `read_windows` has it."""
    s = model.rope_scaling
    most = int(s.original_length * s.factor) if s.on and s.type == "dynamic" else model.max_seq_len
    if model.window < most or s.layers == "full":  # a window says which layers are scaled, too
        return model
    line = write_layers(tuple(attends._replace(window=False) for attends in model.attends))
    return dataclasses.replace(model, window=0, attention_layers=line)


def write_windows(model: ModelConfig, model_type: str) -> dict[str, Any]:
    """The keys of windows and of layers without RoPE that a class has. A reader finds out what it cannot do."""
    defaults, attends, hf = DEFAULTS[model_type], model.attends, {}
    there: Callable[[str], bool] = defaults.__contains__
    if there("sliding_window"):
        hf["sliding_window"] = model.window or None
    if there("use_sliding_window"):
        hf["use_sliding_window"] = bool(model.window)
        if not model.window and model_type != "smollm3":
            del hf["sliding_window"]  # the default, as it is where no window is used
    if there("layer_types") and (model.window or not there("use_sliding_window")):
        hf["layer_types"] = [SLIDING if a.window else FULL for a in attends]
    if there("no_rope_layers"):
        hf["no_rope_layers"] = [int(a.rope) for a in attends]
    return hf
