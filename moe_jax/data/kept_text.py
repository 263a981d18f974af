"""Counts the bytes of a text that its tokens do not represent, and keeps text from producing special tokens.

A tokenizer loses characters that its vocabulary lacks, those with the unknown token only, and what its normaliser or
pre-tokenizer removes. Bits per byte divides by all bytes, lost ones included, so their number is reported.
A mark is a special token between documents (`end_of_text`, `begin_of_text`).
"""

import copy
import json
from collections.abc import Callable, Iterable, Sequence

import numpy as np

Span = tuple[int, int]  # of characters, the end excluded
_KEEPS = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Prepend", "ByteLevel", "Digits", "Metaspace", "UnicodeScripts"}


def size(text: str) -> int:
    """Number of UTF-8 bytes of a text."""
    return len(text) if text.isascii() else len(text.encode("utf-8"))


def lost_bytes(text: str, spans: Iterable[Span]) -> int:
    """Number of bytes of a text outside the spans that its tokens cover."""
    covered = np.zeros(len(text), bool)
    for begin, end in spans:
        covered[begin:end] = True
    return 0 if covered.all() else sum(size(text[i]) for i in np.flatnonzero(~covered))


def encode_without(
    text: str, spans_of: Callable[[str], Sequence[Span]], encode: Callable[[str], np.ndarray]
) -> tuple[np.ndarray, int]:
    """ids of a text that would produce marks, and bytes lost. The text is cut inside every place that produces one.

    spans_of: returns the places of marks in a text, in order. A single character that produces a mark is left out.
    """
    parts, todo, lost = [], [text], 0
    while todo:
        part = todo.pop()
        spans = spans_of(part) if part else []
        if not spans:
            parts.append(encode(part))
            continue
        at, cut = 0, []
        for begin, end in spans:
            while end - begin > 1 and part[begin].isspace():  # the span of a mark may include the spaces around it
                begin += 1
            while end - begin > 1 and part[end - 1].isspace():
                end -= 1
            if end - begin > 1:
                cut.append(part[at : (at := (begin + end) // 2)])
            else:
                cut.append(part[at:begin])
                at = begin + 1
                lost += size(part[begin:at])
        todo += [*cut, part[at:]][::-1]
    return np.concatenate(parts), lost


# --- tokenizer.json --------------------------------------------------------------------------------------------------


def _steps(part: dict | None) -> list[dict]:
    """The list of the steps of a normaliser or pre-tokenizer, with those inside a Sequence in its place."""
    if not isinstance(part, dict):
        return []
    inner = part.get("normalizers") or part.get("pretokenizers") if part.get("type") == "Sequence" else None
    return [step for p in inner for step in _steps(p)] if inner else [part]


def keeps_everything(spec: dict) -> bool:
    """Whether the tokenizer loses no byte of any text: every byte has a token, and no step before removes any."""
    model, steps = spec["model"], [*_steps(spec.get("normalizer")), *_steps(spec.get("pre_tokenizer"))]
    for step in steps:
        kind = step.get("type")
        removes = step.get("content") == "" if kind == "Replace" else step.get("behavior") == "Removed"
        if removes or kind not in _KEEPS | {"Replace", "Split", "Punctuation"}:
            return False
    vocab = model.get("vocab") or {}
    words = set(vocab) if isinstance(vocab, dict) else {word for word, _ in vocab}
    if model.get("byte_fallback"):
        return words >= {f"<0x{i:02X}>" for i in range(256)}
    import tokenizers

    by_bytes = any(step.get("type") == "ByteLevel" for step in steps)
    return by_bytes and model.get("type") == "BPE" and words >= set(tokenizers.pre_tokenizers.ByteLevel.alphabet())


def with_offsets(spec: dict, special: bool):
    """The tokenizer with complete spans. special: whether special tokens that a text spells become those tokens."""
    import tokenizers

    # The post-processor would trim spans.
    made = tokenizers.Tokenizer.from_str(json.dumps(spec | {"post_processor": None}))
    made.no_truncation()
    made.no_padding()
    made.encode_special_tokens = not special
    return made


def with_unknown(spec: dict, tokenizer):
    """The tokenizer with an unknown token, added if it has none, and the id of that token.

    Without an unknown token a BPE drops characters that its vocabulary lacks, and other models refuse the text.
    """
    import tokenizers

    model = spec["model"]
    vocab, word = model.get("vocab"), model.get("unk_token")
    made = with_offsets(spec, special=False)
    if isinstance(vocab, list):
        if model.get("unk_id") is not None:
            return made, model["unk_id"]
    elif word in vocab:
        return made, vocab[word]
    unknown = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    model = copy.copy(model) | {"unk_token": (name := "\0unknown\0")}
    if isinstance(vocab, list):
        least = min((score for _, score in vocab), default=0.0)
        fill = [[f"\0{i}\0", least - 100.0] for i in range(len(vocab), unknown)]
        model |= {"vocab": [*vocab, *fill, [name, least - 100.0]], "unk_id": unknown}
    else:
        model["vocab"] = vocab | {name: unknown}
    bare = {"version": "1.0", "added_tokens": [], "model": model}
    made.model = tokenizers.Tokenizer.from_str(json.dumps(bare)).model
    return made, unknown
