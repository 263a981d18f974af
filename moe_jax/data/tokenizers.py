"""Tokenizers: text → token ids and back, with one `<|endoftext|>` between documents, behind one small interface.

Text never produces `end_of_text`, nor `begin_of_text`, even if it spells it. `fingerprint` changes whenever ids could:
it is part of the key of prepared token stores. A run directory keeps its tokenizer (`save`, `load`), so that evaluation
reads what training wrote, and weights are started from with the tokenizer that they were made with (`of_run`).
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
    train_bpe,
    write,
)
from moe_jax.errors import ConfigError, FileError, shown

_USUAL_NAMES = vocabularies.USUAL_NAMES
SETTINGS = "tokenizer_settings.json"
_MOST = 200_000_000  # bytes of a tokenizer file; the largest in use have a tenth
_FILES = {"bpe": "tokenizer.json", "huggingface": "tokenizer.json", "sentencepiece": "tokenizer.model"}
_KINDS = {"bpe": JsonTokenizer, "huggingface": JsonTokenizer, "sentencepiece": SentencePieceTokenizer}
# Beside a tokenizer's file: what it says of special tokens and of chats.
BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json")
TRAVELS = (  # all that goes from model to run to model; none is code
    "tokenizer.json", "tokenizer.model", *BESIDE, "added_tokens.json", "vocab.json", "merges.txt",
    "generation_config.json",
)  # fmt: skip
MORE_TEMPLATES = "additional_chat_templates"  # a folder


@runtime_checkable
class Tokenizer(Protocol):
    """ids are int32 arrays of shape [tokens]; `vocab_size` counts the special ones too.

    begin_of_text: the token in front of every document; None: the `end_of_text` before it alone. words: of the two as
    the vocabulary spells them ("" without). files: what a run keeps of it, by name. lines: what the user should know.
    """

    vocab_size: int
    end_of_text: int
    begin_of_text: int | None
    fingerprint: str
    words: tuple[str, str]
    files: dict[str, bytes]
    lines: tuple[str, ...]

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """ids of texts, without any special token. No text stops the others."""

    def encode_and_count(self, texts: Sequence[str]) -> list[tuple[np.ndarray, int]]:
        """… and of each text the bytes that no token stands for."""

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        """The text of ids; `begin_of_text` and `end_of_text` are left out."""

    def save(self, folder: str | Path) -> None: ...


def read_file(path: Path, most: int = _MOST) -> bytes:
    """A file of at most `most` bytes. Raises FileError."""
    try:
        size = path.stat().st_size
        if size > most:
            raise FileError(f"{path}: has {size:,} bytes; a tokenizer has at most {most:,}")
        return path.read_bytes()
    except OSError as e:
        raise FileError(f"{path}: cannot be read: {e.strerror}") from None


def read_files(folder: Path, names: Iterable[str]) -> dict[str, bytes]:
    """Those of the files that are there, by name. Raises FileError."""
    return {name: read_file(folder / name) for name in names if (folder / name).is_file()}


def travelling(folder: Path) -> dict[str, bytes]:
    """The files of a folder that go with its weights wherever they go, by name. Raises FileError."""
    more = sorted((folder / MORE_TEMPLATES).glob("*.jinja")) if (folder / MORE_TEMPLATES).is_dir() else []
    return read_files(folder, (*TRAVELS, *(f"{MORE_TEMPLATES}/{path.name}" for path in more)))


# --- the tokenizer of a run directory --------------------------------------------------------------------------------


def _asked(cfg: TokenizerConfig) -> dict:
    """The fields that decide what this kind of tokenizer is."""
    names = {"bytes": (), "bpe": ("vocab_size", "train_bytes")}.get(cfg.kind, ("path", "end_of_text", "begin_of_text"))
    return {"kind": cfg.kind, **{n: v for n, v in dataclasses.asdict(cfg).items() if n in names}}


def settings(tokenizer: Tokenizer, cfg: TokenizerConfig) -> bytes:
    """What a run directory keeps of a tokenizer beside its files: `tokenizer_settings.json`."""
    made = _asked(cfg)
    if cfg.kind in ("huggingface", "sentencepiece"):
        begin, end = tokenizer.words
        made |= {"end_of_text": end, "begin_of_text": begin or NONE}
    return (json.dumps({**made, "fingerprint": tokenizer.fingerprint}, indent=1) + "\n").encode()


def save(tokenizer: Tokenizer, cfg: TokenizerConfig, workdir: str | Path) -> None:
    """Keeps a tokenizer and its settings in a run directory."""
    tokenizer.save(workdir)
    write(Path(workdir) / SETTINGS, settings(tokenizer, cfg))


def load(workdir: str | Path) -> Tokenizer | None:
    """The tokenizer of a run directory, whatever it was made of; None if there is none.

    Raises: FileError for a file that is another than the one that the run was made with.
    """
    path = Path(workdir) / SETTINGS
    if not path.is_file():
        return None
    kept = _read_settings(path)
    made = _open(workdir, kept["kind"], kept.get("end_of_text") or "", kept.get("begin_of_text", ""))
    if made is not None and kept.get("fingerprint", made.fingerprint) != made.fingerprint:
        file = Path(workdir) / _FILES[kept["kind"]]
        raise FileError(f"{file}: is not the tokenizer that this run was made with; put that one there")
    return made


def _open(folder: str | Path, kind: str, end_of_text: str, begin_of_text: str) -> Tokenizer | None:
    """The tokenizer in a folder, which had another begin_of_text before there was a choice (""): that is kept."""
    if kind == "bytes":
        return BytesTokenizer()
    file = Path(folder) / _FILES[kind]
    if not file.is_file():
        return None
    files = read_files(file.parent, BESIDE if kind != "bpe" else ())
    make = lambda begin: _KINDS[kind](read_file(file), end_of_text, str(file), begin, files)
    made = make(begin_of_text)
    if not begin_of_text and kind != "bpe" and (word := make(AUTO).words[0]):
        made.lines = (f"documents do not begin with {word!r}, though the tokenizer says so: this run began without it",)
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
    """The tokenizer that the weights of a run directory need, and its settings; None if it has none.

    A run directory that has not been trained in may have no settings yet: its `config.json` says them.
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
    """Raises ConfigError, naming the field, if a configuration asks for another tokenizer than weights were made with.

    made, kept: the tokenizer and its settings. where: who has it. way: what else to do.
    """
    for name, value in _asked(cfg).items():
        have = kept.get(name)
        same = value == have
        if name == "kind":  # a trained one may be named by its file
            same |= value == "huggingface" and have == "bpe" and _is_file_of(cfg, made)
        elif name == "path":  # the run may have been moved or copied, and the file, too, or be gone
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
    """The run directory's own copy of an external tokenizer; None if it has none yet."""
    if workdir is None or cfg.kind not in ("huggingface", "sentencepiece"):
        return None
    file = Path(workdir) / _FILES[cfg.kind]
    return file if file.is_file() else None


def load_or_make(cfg: TokenizerConfig, workdir: str | Path | None, training_text, init_from: str = "") -> Tokenizer:
    """The run directory's tokenizer, or that of the run whose weights it starts from, or a new one; kept there.

    workdir: None for a run that has not begun; nothing is kept. Where a run directory has its own copy of an external
        tokenizer, `cfg.path` is only where it came from, and need not be there any more.
    training_text: called, only for kind "bpe" and only if there is none yet, for an iterable of texts.
    init_from: a run directory of weights, which need its tokenizer; "" for none.
    Raises: ConfigError if the run directory, or init_from, has a tokenizer of other settings.
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
            made.files = made.files | travelling(Path(init_from))
        elif cfg.kind == "bpe":
            rule = f"a new one does not fit the weights of init_from={init_from!r}, which come without a tokenizer"
            raise ConfigError("data.tokenizer.kind", cfg.kind, rule, "use 'huggingface' and the path of theirs")
        else:
            lines = (f"{init_from} has no tokenizer: whether its weights were made with this one is not known",)
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
    files = read_files(file.parent, BESIDE if file.name == _FILES[cfg.kind] else ())
    return _KINDS[cfg.kind](read_file(file), cfg.end_of_text, cfg.path, cfg.begin_of_text, files)


__all__ = [
    "AUTO",
    "END_OF_TEXT",
    "NONE",
    "SETTINGS",
    "TRAVELS",
    "BytesTokenizer",
    "JsonTokenizer",
    "SentencePieceTokenizer",
    "Tokenizer",
    "check_same",
    "load",
    "load_or_make",
    "of_run",
    "own_file",
    "read_file",
    "read_files",
    "save",
    "settings",
    "train_bpe",
    "travelling",
]
