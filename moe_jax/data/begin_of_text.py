"""Finds the token that documents begin with, from the tokenizer's own files, read as transformers 5 reads them.

If the post-processor of `tokenizer.json` puts a token in front of a text, it is that one. Otherwise `add_bos_token` of
`tokenizer_config.json` decides. transformers 5 reads that setting for SentencePiece models only; its older versions and
llama.cpp always read it, and a model whose files have it was trained with it.
"""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from moe_jax.errors import ConfigError, FileError

AUTO, NONE = "auto", "none"
BEGIN = "documents begin with"  # the first words of the line
FIELD = "data.tokenizer.begin_of_text"
_REBUILT = ("GPTNeoXTokenizer", "GPTNeoXTokenizerFast")  # transformers 5 ignores the post-processor of their files


class BeginOfText(NamedTuple):
    """The token that documents begin with, and a line about it. "", None: only the end-of-text token precedes them."""

    word: str
    id: int | None
    line: str


def settings_of(files: dict[str, bytes]) -> dict[str, Any]:
    """The settings in `tokenizer_config.json`, and those that only `special_tokens_map.json` has. Raises FileError."""
    made: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        try:
            values = json.loads(files.get(name, b"{}"))
            made |= {key: value for key, value in dict(values).items() if value is not None}
        except (ValueError, TypeError, RecursionError):
            raise FileError(f"{name}: is not a JSON object") from None
    return made


def token(settings: dict[str, Any], name: str) -> str:
    """The special token of a setting, such as `bos_token`; "" if there is none."""
    value = settings.get(name)
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else ""


def in_front(processor: Any) -> list[str]:
    """The tokens that a post-processor of `tokenizer.json` puts in front of a text."""
    if not isinstance(processor, dict):
        return []
    if processor.get("type") == "Sequence":
        return [word for part in processor.get("processors", []) for word in in_front(part)]
    if processor.get("type") in ("BertProcessing", "RobertaProcessing"):
        return [processor["cls"][0]]
    words = []
    for piece in processor.get("single", []):
        if "SpecialToken" not in piece:
            break
        words += processor["special_tokens"][piece["SpecialToken"]["id"]]["tokens"]
    return words


def of_json(spec: dict[str, Any], settings: dict[str, Any]) -> tuple[list[str], str]:
    """The tokens that a `tokenizer.json` puts in front of a text, and the reason."""
    front = [] if settings.get("tokenizer_class") in _REBUILT else in_front(spec.get("post_processor"))
    if front:
        ignored = " (add_bos_token=false in tokenizer_config.json has no effect, as in transformers)"
        return front, f"tokenizer.json puts it in front{ignored if settings.get('add_bos_token') is False else ''}"
    return of_settings(settings, "tokenizer.json puts none in front")


def of_settings(settings: dict[str, Any], else_why: str, usual: str = "") -> tuple[list[str], str]:
    """The token that `add_bos_token` asks for, and the reason.

    else_why: the reason if it asks for none. usual: the vocabulary's own token, used if `bos_token` is not set.
    """
    word = token(settings, "bos_token") or usual
    if settings.get("add_bos_token") is True and word:
        return [word], "add_bos_token=true in tokenizer_config.json"
    return [], else_why


def choose(
    asked: str, own: tuple[list[str], str], lookup: Callable[[str], int | None], end_of_text: str
) -> BeginOfText:
    """Chooses the token that documents begin with.

    asked: `data.tokenizer.begin_of_text`; "": none, and no line about it. own: the tokens that the tokenizer's files
        put in front, and the reason.
    Raises: ConfigError for a token that is not in the vocabulary, and for more than one token.
    """
    if not asked:
        return BeginOfText("", None, "")
    (front, why), hint = own, f"{AUTO!r} follows the tokenizer, {NONE!r} is none"
    if asked in (NONE, *front[:1]) and len(front) == (asked != NONE):
        pass  # the tokenizer's files agree
    elif asked == NONE:
        front, why = [], f"{FIELD}={NONE!r}"
    elif asked != AUTO:
        if lookup(asked) is None:
            raise ConfigError(FIELD, asked, "is not in the vocabulary", hint)
        front, why = [asked], f"{FIELD}={asked!r}"
    elif len(front) > 1:
        raise ConfigError(
            FIELD, asked, f"the tokenizer puts {len(front)} tokens in front: {', '.join(front)}", "name one"
        )
    elif front and lookup(front[0]) is None:
        front, why = [], f"{why}, but the vocabulary has no {front[0]!r}"
    if front and front[0] != end_of_text:
        return BeginOfText(front[0], lookup(front[0]), f"{BEGIN} {front[0]!r}, id {lookup(front[0])}: {why}")
    line = f"{BEGIN} nothing but the end-of-text token {end_of_text!r} of the document before: {why}"
    return BeginOfText("", None, line)
