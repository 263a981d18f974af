"""Imports and exports a model's tokenizer files, which include its special tokens and its settings for generation.

An imported model that was not trained here is exported with the same files. Otherwise the files are changed to name the
special tokens with which it was trained here.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_jax.config import TokenizerConfig
from moe_jax.data.begin_of_text import AUTO, NONE, of_json, settings_of, token
from moe_jax.data.tokenizers import (
    SETTINGS,
    JsonTokenizer,
    SentencePieceTokenizer,
    companion_files,
    first_token,
    of_run,
    settings,
)
from moe_jax.errors import ConfigError, FileError, FormatError

PLAIN = "PreTrainedTokenizerFast"  # in transformers the class that takes a file as it is
KINDS = {"huggingface": ("tokenizer.json", JsonTokenizer), "sentencepiece": ("tokenizer.model", SentencePieceTokenizer)}


def imported(
    files: dict[str, bytes], workdir: Path, vocab_size: int
) -> tuple[dict[str, str], dict[str, bytes], list[str]]:
    """`data.tokenizer` for a run directory with these files, the files with its settings added, and lines about it.

    Raises FormatError for a tokenizer with more tokens than the model has.
    """
    kind = "huggingface" if "tokenizer.json" in files or "tokenizer.model" not in files else "sentencepiece"
    name, make = KINDS[kind]
    try:
        made = {"kind": kind, "path": str(workdir / name), "end_of_text": token(settings_of(files), "eos_token")}
    except FileError as e:
        raise FormatError(str(e)) from None
    if name not in files:
        return made, files, []
    if kind == "huggingface":
        _check_vocabulary(files[name], vocab_size)
    try:
        tokenizer = make(files[name], made["end_of_text"], made["path"], AUTO, files)
    except ConfigError as e:  # the weights can be used without a tokenizer
        return made, files, [f"the tokenizer cannot be used yet: {e}"]
    begin, end = tokenizer.words
    made |= {"end_of_text": end, "begin_of_text": begin or NONE}
    return made, files | {SETTINGS: settings(tokenizer, TokenizerConfig(**made))}, list(tokenizer.lines)


def _check_vocabulary(data: bytes, vocab_size: int) -> None:
    import tokenizers

    try:
        vocabulary = tokenizers.Tokenizer.from_str(data.decode("utf-8")).get_vocab(with_added_tokens=True)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # the library raises Exception, and PanicException, which is not one
        raise FormatError(f"tokenizer.json: is not a valid tokenizer: {e}") from None
    largest = max(vocabulary.values(), default=0)
    if largest >= vocab_size:
        rule = f"has token {largest}, but config.json says vocab_size={vocab_size}"
        raise FormatError(f"tokenizer.json: {rule}: it belongs to another model")


# --- export ----------------------------------------------------------------------------------------------------------


def exported(
    workdir: Path, hf: dict[str, Any], events: set[str], echo: Callable[[str], Any]
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """config.json with the special tokens of a run's tokenizer, and the files that are copied with the weights.

    events: the events that made the weights ("import", "train", …).
    """
    files = companion_files(workdir)
    tokenizer, _ = of_run(workdir)
    if tokenizer is None:
        return hf, files
    if tokenizer.vocab_size > hf["vocab_size"]:
        raise FormatError(f"{workdir}: its tokenizer has {tokenizer.vocab_size} tokens, its model {hf['vocab_size']}")
    came, trained = "import" in events, "train" in events
    end = tokenizer.end_of_text
    ours = {"bos_token_id": first_token(tokenizer), "eos_token_id": end}
    hf = (hf if came else {"pad_token_id": None} | hf) | _differing(hf, ours, trained or not came, echo)
    if "generation_config.json" not in files:
        files["generation_config.json"] = _json({k: hf[k] for k in (*ours, "pad_token_id") if hf.get(k) is not None})
    elif trained:
        generation = _read(files, "generation_config.json")
        files["generation_config.json"] = _json(generation | _differing(generation, ours, True, echo))
    if tokenizer.files:
        _settle(files, tokenizer, 0 if came else hf["max_position_embeddings"], trained or not came)
    return hf, files


def _differing(
    values: dict[str, Any], ours: dict[str, int], always: bool, echo: Callable[[str], Any]
) -> dict[str, int]:
    """The special-token ids of `ours` that the values lack, or, with `always`, that are not among theirs."""
    made = {}
    for key, value in ours.items():
        theirs = values.get(key)
        if key not in values or (always and value not in (theirs if isinstance(theirs, list) else [theirs])):
            made[key] = value
            if theirs is not None:
                echo(f"{key}={theirs!r} of the imported model becomes {value}, which training used")
    return made


def _settle(files: dict[str, bytes], tokenizer, positions: int, ours: bool) -> None:
    """Changes the files of a tokenizer so that they name the tokens that begin and end documents.

    positions: value of model_max_length; 0 keeps that of the files.
    """
    begin, end = tokenizer.words
    new = "tokenizer_config.json" not in files
    changed = {"tokenizer_class": PLAIN} if new else {}
    found = settings_of(files)
    changed |= {} if token(found, "eos_token") == end else {"eos_token": end}
    if begin or ours or new:
        changed |= {} if token(found, "bos_token") == (begin or end) else {"bos_token": begin or end}
    if positions:
        changed["model_max_length"] = positions
    if "tokenizer.json" in files:
        spec = json.loads(files["tokenizer.json"])
        front, _ = of_json(spec, found | changed | {"add_bos_token": None})
        if front not in ([begin], [end]) if begin else front not in ([], [end]):
            spec["post_processor"] = _in_front(spec.get("post_processor"), begin, tokenizer.begin_of_text, bool(front))
            files["tokenizer.json"] = _json(spec)
            changed |= {"tokenizer_class": PLAIN, "add_bos_token": bool(begin)}
    elif (found.get("add_bos_token") is True) != bool(begin):
        changed["add_bos_token"] = bool(begin)
    if changed:
        files["tokenizer_config.json"] = _json(_read(files, "tokenizer_config.json") | changed)
    if "special_tokens_map.json" in files:  # it overrides the other files in transformers
        have = _read(files, "special_tokens_map.json")
        files["special_tokens_map.json"] = _json(have | {k: v for k, v in changed.items() if k in have})


def _in_front(old: dict[str, Any] | None, word: str, number: int | None, replace: bool) -> dict[str, Any] | None:
    """A post-processor that puts a token in front. It runs after the old one, or replaces it if that put one there."""
    if not word:
        return None
    mark = lambda i: {"SpecialToken": {"id": word, "type_id": i}}
    text = lambda name, i: {"Sequence": {"id": name, "type_id": i}}
    made = {
        "type": "TemplateProcessing",
        "single": [mark(0), text("A", 0)],
        "pair": [mark(0), text("A", 0), mark(1), text("B", 1)],
        "special_tokens": {word: {"id": word, "ids": [number], "tokens": [word]}},
    }
    return made if replace or not old else {"type": "Sequence", "processors": [copy.copy(old), made]}


def _read(files: dict[str, bytes], name: str) -> dict[str, Any]:
    try:
        return dict(json.loads(files.get(name, b"{}")))
    except (ValueError, TypeError, RecursionError):
        raise FormatError(f"{name}: is not a JSON object") from None


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
