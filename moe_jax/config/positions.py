"""Fields of positions: the scaling of RoPE; and the list of layers with windows and without RoPE, in one line.

The list has one word for each layer, with an optional count, and is repeated from the first layer to the last:
`"3*window full"`, `"3*full full:nope"`.
"""

import difflib
import math
import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

from moe_jax.config.fields import FIXED, FUNCTION, Checked, number, require
from moe_jax.errors import ConfigError

# Fields of RopeScalingConfig that only some types read, and these types.
READ_BY = {
    "low_freq_factor": ("llama3",),
    "high_freq_factor": ("llama3",),
    "original_length": ("dynamic", "yarn", "llama3", "longrope"),
    "beta_fast": ("yarn",),
    "beta_slow": ("yarn",),
    "truncate": ("yarn",),
    "attention_factor": ("yarn", "longrope"),
    "mscale_all_dim": ("yarn",),
    "short_factor": ("longrope",),
    "long_factor": ("longrope",),
}


@dataclass(frozen=True)
class RopeScalingConfig(Checked, resume=FIXED, weights=FUNCTION):
    """RoPE for contexts longer than those that a model was trained on (docs/layers.md).

    Every type but "longrope" is off with `factor`=1, but for an `attention_factor` of "yarn".
    """

    # How frequencies are scaled: all divided by `factor` ("linear"); a larger base, the larger the longer the sequence
    # is beyond original_length ("dynamic", NTK); slow ones divided, fast ones kept, as YaRN (arXiv:2309.00071) or Llama
    # 3.1 draws the line ("yarn", "llama3"); or each divided by its own number ("longrope", arXiv:2402.13753).
    type: Literal["linear", "dynamic", "yarn", "llama3", "longrope"] = "llama3"
    factor: float = number(1.0, 1.0)  # how many times longer the context becomes; 1: off
    # llama3: a frequency is slow if it makes fewer turns in original_length.
    low_freq_factor: float = number(1.0, 0.0)
    # llama3: a frequency is fast if it makes more turns in original_length. Greater than low_freq_factor.
    high_freq_factor: float = number(4.0, 0.0)
    original_length: int = number(8192, 1)  # positions that the model was trained on before it was extended
    beta_fast: float = number(32.0, 0.0)  # yarn: a frequency is fast if it makes more turns in original_length
    beta_slow: float = number(1.0, 1e-6)  # yarn: a frequency is slow if it makes fewer turns in original_length
    truncate: bool = True  # yarn: round the line between fast and slow to whole pairs of a head
    # yarn, longrope: what cosine and sine are multiplied by, so that logits grow by its square; 0: 0.1·ln(factor) + 1
    # for yarn, √(1 + ln(factor) / ln(original_length)) for longrope.
    attention_factor: float = number(0.0, 0.0)
    # yarn with MLA (DeepSeek): all logits are also multiplied by (0.1·mscale_all_dim·ln(factor) + 1)²; 0: they are not.
    mscale_all_dim: float = number(0.0, 0.0)
    # longrope: the divisor of each frequency in sequences of at most original_length tokens, the fastest first.
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()  # longrope: those in longer sequences
    # Layers whose RoPE is scaled. "full": those without a window (OLMo 3).
    layers: Literal["all", "full"] = "all"

    @property
    def on(self) -> bool:
        """Whether frequencies, cosines or sines are scaled."""
        multiplied = self.type == "yarn" and self.attention_factor not in (0.0, 1.0)
        return self.factor > 1 or self.type == "longrope" or multiplied

    @property
    def by_length(self) -> bool:
        """Whether frequencies depend on the number of tokens of a sequence, so that padding would be a part of it."""
        return self.on and self.type in ("dynamic", "longrope")

    @property
    def cos_sin_factor(self) -> float:
        """The number that cosine and sine are multiplied by."""
        if not self.on or self.type not in ("yarn", "longrope"):
            return 1.0
        if self.attention_factor:
            return self.attention_factor
        if self.type == "yarn":
            return yarn_scale(self.factor, 1.0)
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_length)) if self.factor > 1 else 1.0

    @property
    def logit_factor(self) -> float:
        """The number that all logits of MLA are multiplied by, besides what cosine and sine do."""
        return yarn_scale(self.factor, self.mscale_all_dim) ** 2 if self.on else 1.0

    def check(self):
        high, low = self.high_freq_factor, self.low_freq_factor
        require(high > low, "high_freq_factor", high, f"must be > low_freq_factor={low}", f"nearest valid: {low + 1}")
        fast, slow = self.beta_fast, self.beta_slow
        require(fast >= slow, "beta_fast", fast, f"must be ≥ beta_slow={slow}", f"nearest valid: {slow}")
        for name, types in READ_BY.items():
            value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
            require(value == default or self.type in types, name, value, f"has no effect with type={self.type!r}",
                    f"nearest valid: {default!r}")  # fmt: skip
        if self.type == "longrope":
            for name in ("short_factor", "long_factor"):
                value = getattr(self, name)
                rule = "must have a number > 0 for each pair that RoPE rotates, with type='longrope'"
                ok = bool(value) and all(0 < x < math.inf for x in value)
                require(ok, name, value, rule, "nearest valid: 1.0 for each")
            require(self.original_length > 1, "original_length", self.original_length,
                    "must be > 1 with type='longrope'", "nearest valid: 2")  # fmt: skip


def yarn_scale(factor: float, weight: float) -> float:
    """YaRN's 0.1 · weight · ln(factor) + 1. Source: arXiv:2309.00071, eq. 22; the weight is DeepSeek's."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


class Attends(NamedTuple):
    """How a layer attends."""

    window: bool = False  # to the last `model.window` tokens only
    rope: bool = True  # whether queries and keys are rotated


FULL = Attends()
WORDS = {
    "full": FULL,
    "window": Attends(window=True),
    "full:nope": Attends(rope=False),
    "window:nope": Attends(window=True, rope=False),
}
MOST = 9999  # layers of a word
TOKEN = re.compile(r"(?:(\d+)\s*\*\s*)?([^\s*]+)")


def read_layers(text: str) -> tuple[Attends, ...]:
    """The list of a line, once. Raises ConfigError for a word that is not one."""
    found: list[Attends] = []
    end, hint = 0, f"a list of {', '.join(WORDS)} with counts, such as '3*window full'"
    for token in TOKEN.finditer(text):
        count, word = token[1], token[2]
        between = text[end : token.start()].strip()
        end = token.end()
        if between or (count and not (len(count) < 6 and 0 < int(count) <= MOST)):
            at = f"at character {token.start() + 1}, {token[0]!r}"
            raise ConfigError("attention_layers", text, f"{at}: a count must be in [1, {MOST}], before a word", hint)
        if word not in WORDS:
            close = difflib.get_close_matches(word, WORDS, 1, 0.0)[0] if word else "full"
            rule = f"at character {token.start() + 1}, {word!r}: must be one of {', '.join(WORDS)}"
            mended = text[: token.start(2)] + close + text[token.end(2) :]
            raise ConfigError("attention_layers", text, rule, f"nearest: {mended!r}")
        found += [WORDS[word]] * int(count or 1)
    if text[end:].strip() or (text and not found):
        raise ConfigError("attention_layers", text, "is not a list of layers", hint)
    return tuple(found)


def write_layers(layers: tuple[Attends, ...]) -> str:
    """The line of a list: its shortest beginning that gives it when repeated, the last time perhaps in part."""
    size = next(n for n in range(1, len(layers) + 1) if all(a == layers[i % n] for i, a in enumerate(layers)))
    names, parts = {attends: word for word, attends in WORDS.items()}, []
    for attends in layers[:size]:
        if parts and parts[-1][1] == names[attends]:
            parts[-1][0] += 1
        else:
            parts.append([1, names[attends]])
    return " ".join(word if count == 1 else f"{count}*{word}" for count, word in parts)
