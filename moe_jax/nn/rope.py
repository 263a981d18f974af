"""Rotary position embedding (arXiv:2104.09864), whole or of a part of each head, and its scaling for longer contexts.

Letters: B sequences, S tokens, N heads, H head size, P pairs of a head that are rotated.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moe_jax.config import ModelConfig, RopeScalingConfig
from moe_jax.config.positions import Attends


class Rotation(NamedTuple):
    """How queries and keys of a layer are rotated."""

    freq: Float[np.ndarray, " P"] | Float[Array, " P"]  # radians a position
    factor: float = 1.0  # of cosine and sine (YaRN, LongRoPE)
    logit_factor: float = 1.0  # of all logits, besides that: what MLA multiplies them by (YaRN)


def rotation(cfg: ModelConfig, attends: Attends, tokens: int | Int[Array, ""]) -> Rotation | None:
    """The rotation in a layer; None if it has none. tokens: those of a sequence so far, which some scalings read."""
    if not attends.rope:
        return None
    s = cfg.rope_scaling
    scaled = s.on and not (s.layers == "full" and attends.window)
    freq = rope_frequencies(cfg, cfg.rope_size, tokens, scaled)
    return Rotation(freq, s.cos_sin_factor, s.logit_factor) if scaled else Rotation(freq)


def rope_frequencies(
    cfg: ModelConfig, size: int, tokens: int | Int[Array, ""] = 0, scaled: bool = True
) -> Float[np.ndarray, " P"] | Float[Array, " P"]:
    """The angle by which each pair of `size` numbers rotates per position: θ^(−2i/size), scaled by `rope_scaling`.

    tokens: those of a sequence so far. For a number of Python the frequencies are constants of the program.
    """
    freq = cfg.rope_theta ** (-np.arange(size // 2) / (size // 2))
    if scaled and cfg.rope_scaling.on:
        freq = SCALINGS[cfg.rope_scaling.type](cfg.rope_scaling, freq, cfg.rope_theta, tokens)
    return freq.astype(np.float32)


def rope(
    x: Float[Array, "B S N H"], positions: Int[Array, "B S"], freq: Float[np.ndarray, " P"], factor: float = 1.0
) -> Float[Array, "B S N H"]:
    """Rotates the first 2·P components of each head: component i is paired with component i + P. Others stay."""
    half = freq.shape[-1]
    angle = positions[:, :, None].astype(jnp.float32) * freq[None, None, :]
    cos, sin = jnp.cos(angle)[:, :, None, :], jnp.sin(angle)[:, :, None, :]
    if factor != 1:
        cos, sin = cos * factor, sin * factor
    x1, x2 = x[..., :half].astype(jnp.float32), x[..., half : 2 * half].astype(jnp.float32)
    turned = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)
    return turned if 2 * half == x.shape[-1] else jnp.concatenate([turned, x[..., 2 * half :]], axis=-1)


def rotate(x: Float[Array, "B S N H"], positions: Int[Array, "B S"], turn: Rotation | None) -> Float[Array, "B S N H"]:
    """Applies a layer's rotation; x itself where it has none."""
    return x if turn is None else rope(x, positions, turn.freq, turn.factor)


# --- scalings: (settings, frequencies, θ, tokens) → frequencies ------------------------------------------------------
# Sources: the papers at `rope_scaling.type`, and transformers' modeling_rope_utils.py, which released models rely on.


def _linear(s: RopeScalingConfig, freq, theta, tokens):
    return freq / s.factor


def _dynamic(s: RopeScalingConfig, freq, theta, tokens):
    """A base θ·r^(d/(d−2)) for d numbers, r = factor·tokens/original_length − factor + 1, at least 1."""
    power = -2 * np.arange(len(freq)) / max(2 * len(freq) - 2, 1)
    if isinstance(tokens, int):
        return freq * (s.factor * max(tokens, s.original_length) / s.original_length - (s.factor - 1)) ** power
    ratio = s.factor * jnp.maximum(tokens, s.original_length) / s.original_length - (s.factor - 1)
    return freq.astype(np.float32) * ratio ** power.astype(np.float32)


def _yarn(s: RopeScalingConfig, freq, theta, tokens):
    """Pairs that turn more than beta_fast times keep their frequency, those below beta_slow have it divided."""
    d = 2 * len(freq)
    pair = lambda turns: d * math.log(s.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))
    low, high = pair(s.beta_fast), pair(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d - 1)
    slow = np.clip((np.arange(d // 2) - low) / (high - low if high != low else 0.001), 0.0, 1.0)
    return freq * (1 - slow) + freq / s.factor * slow


def _llama3(s: RopeScalingConfig, freq, theta, tokens):
    """A line between frequencies that are kept and those that are divided."""
    turns = s.original_length * freq / (2 * np.pi)
    ramp = np.clip((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor), 0.0, 1.0)
    return freq * (ramp + (1 - ramp) / s.factor)


def _longrope(s: RopeScalingConfig, freq, theta, tokens):
    """Two lists of divisors: one for sequences within original_length, one for longer ones."""
    short, long = (freq / np.asarray(divisors) for divisors in (s.short_factor, s.long_factor))
    if isinstance(tokens, int):
        return long if tokens > s.original_length else short
    return jnp.where(tokens > s.original_length, long.astype(np.float32), short.astype(np.float32))


SCALINGS = {"linear": _linear, "dynamic": _dynamic, "yarn": _yarn, "llama3": _llama3, "longrope": _longrope}
