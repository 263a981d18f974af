"""Tokenizers: text → token ids and back, with one `<|endoftext|>` between documents, behind one small interface.

Text never produces `end_of_text`, even if it spells it. `fingerprint` changes whenever ids could: it is part of the key
of prepared token stores. A run directory keeps its tokenizer (`save`, `load`), so that evaluation reads what training
wrote.
"""

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol, SupportsInt, runtime_checkable

import numpy as np

from moe_jax.config import ConfigError, FileError, TokenizerConfig
from moe_jax.config.fields import shown

END_OF_TEXT = "<|endoftext|>"
_USUAL_NAMES = (END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>")
_SETTINGS = "tokenizer_settings.json"
_MOST = 200_000_000  # bytes of a tokenizer file; the largest in use have a tenth
_FILES = {"bpe": "tokenizer.json", "huggingface": "tokenizer.json", "sentencepiece": "tokenizer.model"}


@runtime_checkable
class Tokenizer(Protocol):
    """ids are int32 arrays of shape [tokens]; `vocab_size` counts `end_of_text` too."""

    vocab_size: int
    end_of_text: int
    fingerprint: str

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]: ...

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        """The text of ids; `end_of_text` is left out."""

    def save(self, folder: str | Path) -> None: ...


def _digest(*parts: bytes) -> str:
    return hashlib.blake2b(b"\0".join(parts), digest_size=16).hexdigest()


def _write(path: Path, data: bytes) -> None:
    """Writes a file at once: another process sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    with os.fdopen(handle, "wb") as file:
        file.write(data)
    os.chmod(name, 0o644)
    os.replace(name, path)


def read_file(path: Path, most: int = _MOST) -> bytes:
    """A file of at most `most` bytes. Raises FileError."""
    try:
        size = path.stat().st_size
        if size > most:
            raise FileError(f"{path}: has {size:,} bytes; a tokenizer has at most {most:,}")
        return path.read_bytes()
    except OSError as e:
        raise FileError(f"{path}: cannot be read: {e.strerror}") from None


class BytesTokenizer:
    """One token a byte of UTF-8; `end_of_text` is 256."""

    vocab_size = 257
    end_of_text = 256
    fingerprint = "bytes-1"

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32) for text in texts]

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        return bytes(int(i) for i in ids if int(i) < 256).decode("utf-8", "replace")

    def save(self, folder: str | Path) -> None:
        """Nothing to keep."""


def _without(text: str, word: str, encode) -> np.ndarray:
    """ids of a text that spells the end-of-text token, which is cut where it would be recognised."""
    pieces, cut = [], max(1, len(word) // 2)
    parts = text.split(word)
    for i, part in enumerate(parts):
        head = word[cut:] if i else ""
        tail = word[:cut] if i < len(parts) - 1 else ""
        pieces.append(encode(head + part + tail))
    return np.concatenate(pieces)


class JsonTokenizer:
    """A `tokenizer.json` of the `tokenizers` library: trained here (kind "bpe") or elsewhere (kind "huggingface")."""

    def __init__(self, data: bytes, end_of_text: str, path: str):
        import tokenizers

        self._data = data
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library raises bare Exception, and PanicException, which is none
            raise ConfigError("data.tokenizer.path", path, f"is no tokenizer.json: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # "<|endoftext|>" in a text is these letters, not the token
        special = {t.content for t in self._tokenizer.get_added_tokens_decoder().values()}
        self._word, self.end_of_text = _find_end_of_text(self._tokenizer.token_to_id, end_of_text, sorted(special))
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1  # it has end_of_text
        self.fingerprint = _digest(b"json-1", data, self._word.encode())

    def _ids(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(e.ids, np.int32) for e in encoded]

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        out = self._ids(texts)
        for i, ids in enumerate(out):
            if (ids == self.end_of_text).any():  # an added token that is not marked special
                out[i] = _without(texts[i], self._word, lambda t: self._ids([t])[0])
        return out

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        kept = [int(i) for i in ids if int(i) != self.end_of_text]
        return self._tokenizer.decode(kept, skip_special_tokens=False)

    def save(self, folder: str | Path) -> None:
        _write(Path(folder) / "tokenizer.json", self._data)


class SentencePieceTokenizer:
    """A SentencePiece `.model`."""

    def __init__(self, data: bytes, end_of_text: str, path: str):
        import sentencepiece

        self._data = data
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(data)
        except Exception as error:
            raise ConfigError("data.tokenizer.path", path, "is no SentencePiece model") from error
        self.vocab_size = self._processor.GetPieceSize()
        pieces = {self._processor.IdToPiece(i): i for i in range(self.vocab_size)}
        special = [p for p, i in pieces.items() if self._processor.IsControl(i)]
        self._word, self.end_of_text = _find_end_of_text(pieces.get, end_of_text, special)
        self.fingerprint = _digest(b"sentencepiece-1", data, self._word.encode())

    def _ids(self, text: str) -> np.ndarray:
        return np.asarray(self._processor.EncodeAsIds(text), np.int32)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        out = [self._ids(text) for text in texts]
        for i, ids in enumerate(out):
            if (ids == self.end_of_text).any():
                out[i] = _without(texts[i], self._word, self._ids)
        return out

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        return self._processor.DecodeIds([int(i) for i in ids if int(i) != self.end_of_text])

    def save(self, folder: str | Path) -> None:
        _write(Path(folder) / "tokenizer.model", self._data)


def _find_end_of_text(lookup, wanted: str, special: Sequence[str]) -> tuple[str, int]:
    """The end-of-text token and its id. Raises: ConfigError listing the vocabulary's special tokens."""
    for name in (wanted,) if wanted else _USUAL_NAMES:
        if lookup(name) is not None:
            return name, lookup(name)
    rule = "is not in the vocabulary" if wanted else f"is needed: the vocabulary has none of {', '.join(_USUAL_NAMES)}"
    raise ConfigError("data.tokenizer.end_of_text", wanted, rule, f"its special tokens: {', '.join(special) or 'none'}")


def train_bpe(texts: Iterable[str], vocab_size: int) -> JsonTokenizer:
    """Byte-level BPE of at most `vocab_size` tokens (fewer if the text has no more pairs), the same from the same text.

    Every text can be encoded and decodes to itself, byte for byte.
    """
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    return JsonTokenizer(made.to_str(pretty=True).encode("utf-8"), END_OF_TEXT, "")


# --- the tokenizer of a run directory --------------------------------------------------------------------------------


def _settings(cfg: TokenizerConfig) -> dict:
    """The fields that decide what this kind of tokenizer is."""
    names = {"bytes": (), "bpe": ("vocab_size", "train_bytes")}.get(cfg.kind, ("path", "end_of_text"))
    return {"kind": cfg.kind, **{n: v for n, v in dataclasses.asdict(cfg).items() if n in names}}


def save(tokenizer: Tokenizer, cfg: TokenizerConfig, workdir: str | Path) -> None:
    """Keeps a tokenizer and its settings in a run directory."""
    tokenizer.save(workdir)
    settings = {**_settings(cfg), "fingerprint": tokenizer.fingerprint}
    _write(Path(workdir) / _SETTINGS, (json.dumps(settings, indent=1) + "\n").encode())


def load(workdir: str | Path) -> Tokenizer | None:
    """The tokenizer of a run directory, whatever it was made of; None if there is none."""
    path = Path(workdir) / _SETTINGS
    if not path.is_file():
        return None
    settings = _read_settings(path)
    if settings["kind"] == "bytes":
        return BytesTokenizer()
    file = Path(workdir) / _FILES[settings["kind"]]
    if not file.is_file():
        return None
    made = SentencePieceTokenizer if settings["kind"] == "sentencepiece" else JsonTokenizer
    return made(read_file(file), settings.get("end_of_text") or "", str(file))


def _read_settings(path: Path) -> dict:
    try:
        settings = json.loads(read_file(path))
        if settings["kind"] in ("bytes", *_FILES) and isinstance(settings.get("end_of_text", ""), str):
            return settings
        problem = f"kind={shown(settings['kind'])}, end_of_text={shown(settings.get('end_of_text'))}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        problem = f"{type(e).__name__}: {e}"
    raise FileError(f"{path}: is not a tokenizer's settings: {problem}")


def own_file(cfg: TokenizerConfig, workdir: str | Path | None) -> Path | None:
    """The run directory's own copy of an external tokenizer; None if it has none yet."""
    if workdir is None or cfg.kind not in ("huggingface", "sentencepiece"):
        return None
    file = Path(workdir) / _FILES[cfg.kind]
    return file if file.is_file() else None


def load_or_make(cfg: TokenizerConfig, workdir: str | Path | None, training_text) -> Tokenizer:
    """The run directory's tokenizer, or a new one that is then kept there.

    workdir: None for a run that has not begun; nothing is kept. Where a run directory has its own copy of an external
        tokenizer, `cfg.path` is only where it came from, and need not be there any more.
    training_text: called, only for kind "bpe" and only if there is none yet, for an iterable of texts.
    Raises: ConfigError if the run directory holds a tokenizer of other settings (its checkpoints need that one).
    """
    kept = None if workdir is None else load(workdir)
    if kept is not None:
        _check_settings(cfg, Path(workdir))
        return kept
    if cfg.kind == "bytes":
        made = BytesTokenizer()
    elif cfg.kind == "bpe":
        made = train_bpe(training_text(), cfg.vocab_size)
    else:
        file = own_file(cfg, workdir) or Path(os.path.expanduser(cfg.path))
        if not file.is_file():
            raise ConfigError("data.tokenizer.path", cfg.path, "is not a file", "a tokenizer.json or a .model file")
        kind = JsonTokenizer if cfg.kind == "huggingface" else SentencePieceTokenizer
        made = kind(read_file(file), cfg.end_of_text, cfg.path)
    if workdir is not None:
        save(made, cfg, workdir)
    return made


def _check_settings(cfg: TokenizerConfig, workdir: Path) -> None:
    """Raises ConfigError if `cfg` asks for another tokenizer than the run directory's."""
    path = workdir / _SETTINGS
    settings, own = _read_settings(path), own_file(cfg, workdir)
    for name, value in _settings(cfg).items():
        has = settings.get(name)
        if name == "path" and value != has:  # the run may have been moved or copied, and the file, too, or be gone
            file = Path(os.path.expanduser(value))
            if own and not (file.is_file() and read_file(file) != read_file(own)):
                continue
        if has != value:
            raise ConfigError(f"data.tokenizer.{name}", value, f"differs from {path}, which has {has!r}",
                              f"use {has!r} or another workdir")  # fmt: skip
