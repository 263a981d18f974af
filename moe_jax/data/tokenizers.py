"""Tokenizers: text → token ids and back, with one `<|endoftext|>` between documents, behind one interface.

Text never produces `end_of_text` or `begin_of_text`, even where it spells them. `fingerprint` changes whenever ids
could change, and is part of the key of prepared token stores. A run directory keeps its tokenizer (`save`, `load`), so
that evaluation uses that of training. A run that starts from weights uses the tokenizer of these weights (`of_run`).
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol, SupportsInt, runtime_checkable

import numpy as np

from moe_jax.config import TokenizerConfig
from moe_jax.data import vocabularies
from moe_jax.data.begin_of_text import AUTO, NONE
from moe_jax.data.vocabularies import (
    END_OF_TEXT,
    BytesTokenizer,
    JsonTokenizer,
    SentencePieceTokenizer,
    Spanned,
    train_bpe,
    write,
)
from moe_jax.errors import ConfigError, FileError, shown

_USUAL_NAMES = vocabularies.USUAL_NAMES
SETTINGS = "tokenizer_settings.json"
_MOST = 200_000_000  # bytes of a tokenizer file; the largest in use have a tenth of that
_FILES = {"bpe": "tokenizer.json", "huggingface": "tokenizer.json", "sentencepiece": "tokenizer.model"}
_KINDS = {"bpe": JsonTokenizer, "huggingface": JsonTokenizer, "sentencepiece": SentencePieceTokenizer}
# Files beside a tokenizer's file, about special tokens and chats.
BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json")
COMPANION_FILES = (  # files that are copied with the weights on import, training and export; none is code
    "tokenizer.json", "tokenizer.model", *BESIDE, "added_tokens.json", "vocab.json", "merges.txt",
    "generation_config.json",
)  # fmt: skip
MORE_TEMPLATES = "additional_chat_templates"  # a folder


@runtime_checkable
class Tokenizer(Protocol):
    """The interface of a tokenizer. ids are int32 arrays of shape [tokens]; `vocab_size` counts special tokens too.

    begin_of_text: the token in front of every document; None: only the `end_of_text` of the document before.
    words: begin_of_text and end_of_text in the vocabulary's spelling; "" for none. special: ids of special tokens
        by their spelling, if a text of `encode_spans` may have them.
    files: the files that a run keeps, by name. lines: messages for the user.
    """

    vocab_size: int
    end_of_text: int
    begin_of_text: int | None
    fingerprint: str
    words: tuple[str, str]
    special: dict[str, int]
    files: dict[str, bytes]
    lines: tuple[str, ...]

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """ids of each text, without any special token. A text that cannot be encoded has none."""

    def encode_and_count(self, texts: Sequence[str]) -> list[tuple[np.ndarray, int]]:
        """ids of each text, and the number of its bytes that no token represents."""

    def encode_spans(self, text: str, special: bool = False) -> Spanned:
        """Tokens of a text and their places. special: whether special tokens that it spells become those tokens."""

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        """The text of ids, without `begin_of_text` and `end_of_text`."""

    def save(self, folder: str | Path) -> None: ...


def first_token(tokenizer: Tokenizer) -> int:
    """The token in front of a text: begin-of-text, else the end of the text before."""
    return tokenizer.end_of_text if tokenizer.begin_of_text is None else tokenizer.begin_of_text


def read_file(path: Path, most: int = _MOST) -> bytes:
    """The content of a file of at most `most` bytes. Raises FileError."""
    try:
        size = path.stat().st_size
        if size > most:
            raise FileError(f"{path}: has {size:,} bytes; a tokenizer has at most {most:,}")
        return path.read_bytes()
    except OSError as e:
        raise FileError(f"{path}: cannot be read: {e.strerror}") from None


def read_files(folder: Path, names: Iterable[str]) -> dict[str, bytes]:
    """The contents of those files that exist, by name. Raises FileError."""
    return {name: read_file(folder / name) for name in names if (folder / name).is_file()}


def companion_files(folder: Path, names: Sequence[str] = COMPANION_FILES) -> dict[str, bytes]:
    """Those files of a folder that belong to its weights, or have other `names`, and its further chat templates.

    Raises FileError.
    """
    more = sorted((folder / MORE_TEMPLATES).glob("*.jinja")) if (folder / MORE_TEMPLATES).is_dir() else []
    return read_files(folder, (*names, *(f"{MORE_TEMPLATES}/{path.name}" for path in more)))


# --- the tokenizer of a run directory --------------------------------------------------------------------------------


def _defining_fields(cfg: TokenizerConfig) -> dict:
    """The fields that define a tokenizer of this kind."""
    names = {"bytes": (), "bpe": ("vocab_size", "train_bytes")}.get(cfg.kind, ("path", "end_of_text", "begin_of_text"))
    return {"kind": cfg.kind, **{n: v for n, v in dataclasses.asdict(cfg).items() if n in names}}


def settings(tokenizer: Tokenizer, cfg: TokenizerConfig) -> bytes:
    """The content of `tokenizer_settings.json`, which a run directory keeps beside a tokenizer's files."""
    made = _defining_fields(cfg)
    if cfg.kind in ("huggingface", "sentencepiece"):
        begin, end = tokenizer.words
        made |= {"end_of_text": end, "begin_of_text": begin or NONE}
    return (json.dumps({**made, "fingerprint": tokenizer.fingerprint}, indent=1) + "\n").encode()


def save(tokenizer: Tokenizer, cfg: TokenizerConfig, workdir: str | Path) -> None:
    """Writes a tokenizer and its settings into a run directory."""
    tokenizer.save(workdir)
    write(Path(workdir) / SETTINGS, settings(tokenizer, cfg))


def load(workdir: str | Path) -> Tokenizer | None:
    """The tokenizer of a run directory; None if it has none.

    Raises: FileError for a file that differs from the one with which the run was made.
    """
    path = Path(workdir) / SETTINGS
    if not path.is_file():
        return None
    kept = _read_settings(path)
    made = _open(workdir, kept["kind"], kept.get("end_of_text") or "", kept.get("begin_of_text", ""))
    if made is not None and kept.get("fingerprint", made.fingerprint) != made.fingerprint:
        file = Path(workdir) / _FILES[kept["kind"]]
        raise FileError(f"{file}: is not the tokenizer with which this run was made; restore that file")
    return made


def _open(folder: str | Path, kind: str, end_of_text: str, begin_of_text: str) -> Tokenizer | None:
    """The tokenizer in a folder. None if its file is missing.

    begin_of_text: "" for a run made before this setting existed, whose documents begin without such a token.
    """
    if kind == "bytes":
        return BytesTokenizer()
    file = Path(folder) / _FILES[kind]
    if not file.is_file():
        return None
    files = companion_files(file.parent, BESIDE) if kind != "bpe" else {}
    make = lambda begin: _KINDS[kind](read_file(file), end_of_text, str(file), begin, files)
    made = make(begin_of_text)
    if not begin_of_text and kind != "bpe" and (word := make(AUTO).words[0]):
        made.lines = (
            f"documents do not begin with {word!r}, though the tokenizer's files ask for it: this run began without it",
        )
    return made


def _read_settings(path: Path) -> dict:
    try:
        kept = json.loads(read_file(path))
        words = [kept.get(name, "") for name in ("end_of_text", "begin_of_text")]
        if kept["kind"] in ("bytes", *_FILES) and all(isinstance(word, str) for word in words):
            return kept
        problem = f"kind={shown(kept['kind'])}, end_of_text={shown(words[0])}, begin_of_text={shown(words[1])}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        problem = f"{type(e).__name__}: {e}"
    raise FileError(f"{path}: is not a tokenizer's settings: {problem}")


def of_run(folder: str | Path) -> tuple[Tokenizer | None, dict]:
    """The tokenizer of the weights of a run directory, or None, and its settings.

    A run directory without training may have no settings file; its `config.json` has the settings then.
    """
    made = load(folder)
    if made is not None:
        return made, _read_settings(Path(folder) / SETTINGS)
    try:
        kept = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["data"]["tokenizer"]
        kind, words = kept["kind"], [kept.get(name, "") for name in ("end_of_text", "begin_of_text")]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None, {}
    return _open(folder, kind, *words), kept


def check_same(cfg: TokenizerConfig, made: Tokenizer, kept: dict, where: str, way: str) -> None:
    """Raises ConfigError, naming the field, if a configuration asks for a tokenizer other than that of the weights.

    made, kept: the tokenizer of the weights and its settings. where: the run that has it. way: the end of the hint.
    """
    for name, value in _defining_fields(cfg).items():
        have = kept.get(name)
        same = value == have
        if name == "kind":  # a tokenizer trained here may be given as its file
            same |= value == "huggingface" and have == "bpe" and _is_file_of(cfg, made)
        elif name == "path":  # the run and the file may have been moved, copied or deleted
            same |= _is_file_of(cfg, made) or not Path(os.path.expanduser(value)).is_file()
        elif name == "end_of_text":
            have = made.words[1]
            same = value in ("", have)
        elif name == "begin_of_text":
            have = made.words[0] or NONE
            same = value in (AUTO, have)
        if not same:
            rule = f"differs from {where}, which has {have!r}"
            raise ConfigError(f"data.tokenizer.{name}", value, rule, f"use {have!r}{way}")


def _is_file_of(cfg: TokenizerConfig, made: Tokenizer) -> bool:
    file = Path(os.path.expanduser(cfg.path))
    return bool(cfg.path) and file.is_file() and read_file(file) in made.files.values()


def own_file(cfg: TokenizerConfig, workdir: str | Path | None) -> Path | None:
    """The path of the run directory's own copy of an external tokenizer; None if it has none yet."""
    if workdir is None or cfg.kind not in ("huggingface", "sentencepiece"):
        return None
    file = Path(workdir) / _FILES[cfg.kind]
    return file if file.is_file() else None


def load_or_make(cfg: TokenizerConfig, workdir: str | Path | None, training_text, init_from: str = "") -> Tokenizer:
    """The tokenizer of a run: that of its directory, else that of `init_from`, else a new one. It is saved in workdir.

    workdir: None for a run that has not begun, which saves nothing. If a run directory has its own copy of an external
        tokenizer, the file `cfg.path` may be gone.
    training_text: returns an iterable of texts; called only if a tokenizer of kind "bpe" must be trained.
    init_from: a run directory of weights, which need its tokenizer; "" for none.
    Raises: ConfigError if the run directory, or init_from, has a tokenizer with other settings.
    """
    kept = None if workdir is None else load(workdir)
    if kept is not None:
        path = Path(workdir) / SETTINGS
        check_same(cfg, kept, _read_settings(path), str(path), " or another workdir")
        return kept
    made, lines = None, ()
    if init_from:
        made, its = of_run(init_from)
        if made is not None:
            check_same(cfg, made, its, f"the run of init_from, {init_from}", ", whose weights need it")
            made.files = made.files | companion_files(Path(init_from))
        elif cfg.kind == "bpe":
            rule = f"a new tokenizer does not fit the weights of init_from={init_from!r}, which come without one"
            raise ConfigError("data.tokenizer.kind", cfg.kind, rule, "use 'huggingface' and the path of theirs")
        else:
            lines = (f"{init_from} has no tokenizer, so whether its weights were made with this one is unknown",)
    if made is None:
        made = _make(cfg, workdir, training_text)
        made.lines = (*made.lines, *lines)
    if workdir is not None:
        save(made, cfg, workdir)
    return made


def _make(cfg: TokenizerConfig, workdir: str | Path | None, training_text) -> Tokenizer:
    if cfg.kind == "bytes":
        return BytesTokenizer()
    if cfg.kind == "bpe":
        return train_bpe(training_text(), cfg.vocab_size)
    file = own_file(cfg, workdir) or Path(os.path.expanduser(cfg.path))
    if not file.is_file():
        raise ConfigError("data.tokenizer.path", cfg.path, "is not a file", "a tokenizer.json or a .model file")
    files = companion_files(file.parent, BESIDE) if file.name == _FILES[cfg.kind] else {}
    return _KINDS[cfg.kind](read_file(file), cfg.end_of_text, cfg.path, cfg.begin_of_text, files)


__all__ = [
    "AUTO",
    "COMPANION_FILES",
    "END_OF_TEXT",
    "NONE",
    "SETTINGS",
    "BytesTokenizer",
    "JsonTokenizer",
    "SentencePieceTokenizer",
    "Tokenizer",
    "check_same",
    "companion_files",
    "load",
    "load_or_make",
    "of_run",
    "own_file",
    "read_file",
    "read_files",
    "save",
    "settings",
    "train_bpe",
]
