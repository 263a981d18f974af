"""Three kinds of tokenizers with the interface of `tokenizers.Tokenizer`: bytes, `tokenizer.json`, SentencePiece."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple, SupportsInt

import numpy as np

from moe_jax.data.begin_of_text import BeginOfText, choose, of_json, of_settings, settings_of
from moe_jax.data.kept_text import (
    Span,
    encode_without,
    keeps_everything,
    lost_bytes,
    size,
    with_offsets,
    with_unknown,
)
from moe_jax.errors import ConfigError

END_OF_TEXT = "<|endoftext|>"
USUAL_NAMES = (END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>")


def _digest(*parts: bytes) -> str:
    return hashlib.blake2b(b"\0".join(parts), digest_size=16).hexdigest()


def write(path: Path, data: bytes) -> None:
    """Writes a file atomically: another process sees the old content or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    with os.fdopen(handle, "wb") as file:
        file.write(data)
    os.chmod(name, 0o644)
    os.replace(name, path)


class Spanned(NamedTuple):
    """The tokens of a text with their places in it."""

    ids: np.ndarray  # [n] int32
    spans: np.ndarray  # [n, 2] int64, the characters [begin, end) of each token
    known: np.ndarray  # [n] bool: whether it represents its characters, which the unknown token does not


class BytesTokenizer:
    """A tokenizer with one token for each byte of UTF-8; `end_of_text` is 256."""

    vocab_size = 257
    end_of_text = 256
    begin_of_text = None
    fingerprint = "bytes-1"
    words = ("", "")
    special: ClassVar[dict[str, int]] = {}
    files: ClassVar[dict[str, bytes]] = {}
    lines: tuple[str, ...] = ()

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32) for text in texts]

    def encode_and_count(self, texts: Sequence[str]) -> list[tuple[np.ndarray, int]]:
        return [(ids, 0) for ids in self.encode(texts)]

    def encode_spans(self, text: str, special: bool = False) -> Spanned:
        sizes = [len(character.encode()) for character in text]
        at = np.repeat(np.arange(len(text)), sizes)
        return Spanned(self.encode([text])[0], np.stack([at, at + 1], axis=1), np.ones(len(at), bool))

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        return bytes(int(i) for i in ids if int(i) < 256).decode("utf-8", "replace")

    def save(self, folder: str | Path) -> None:
        """Writes nothing, since this tokenizer has no files."""


class _FileTokenizer:
    """The base class of tokenizers that are read from a file.

    A subclass has `_batch`, which returns ids and lost bytes of texts, `_spans`, which returns the places where a text
    would produce `begin_of_text` or `end_of_text`, and `_places`, which returns (id, begin, end) of every token.
    """

    vocab_size: int
    special: dict[str, int]
    _unknown_id: int = -1

    def _settle(self, name: str, data: bytes, files: dict[str, bytes] | None, end: tuple[str, int], begin: BeginOfText):
        """Sets the attributes of `Tokenizer`. files: further files to keep beside the file `name`, by name."""
        self.files = {**(files or {}), name: data}
        self.words = (begin.word, end[0])
        self.begin_of_text, self.end_of_text = begin.id, end[1]
        self.lines: tuple[str, ...] = (begin.line,) if begin.line else ()
        self._marks = [i for i in (begin.id, end[1]) if i is not None]
        kind = {"tokenizer.json": b"json-1", "tokenizer.model": b"sentencepiece-1"}[name]
        begins = [begin.word.encode()] if begin.word else []  # without one, the fingerprint of runs before this setting
        self.fingerprint = _digest(kind, data, end[0].encode(), *begins)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [ids for ids, _ in self.encode_and_count(texts)]

    def encode_and_count(self, texts: Sequence[str]) -> list[tuple[np.ndarray, int]]:
        out = self._safely(list(texts))
        for i, (ids, lost) in enumerate(out):
            if np.isin(ids, self._marks).any():  # the text spells a mark that the vocabulary does not list as special
                made, more = encode_without(texts[i], self._spans, lambda part: self._safely([part])[0][0])
                out[i] = made, lost + more
        return out

    def encode_spans(self, text: str, special: bool = False) -> Spanned:
        try:
            found = np.asarray(self._places(text, special), np.int64).reshape(-1, 3)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # as in `_safely`
            found = np.zeros((0, 3), np.int64)
        if not special:  # a mark that the text spells is lost
            found = found[~np.isin(found[:, 0], self._marks)]
        return Spanned(found[:, 0].astype(np.int32), found[:, 1:], found[:, 0] != self._unknown_id)

    def _safely(self, texts: list[str]) -> list[tuple[np.ndarray, int]]:
        """ids and lost bytes of each text. A text that the library refuses has no tokens, and loses all its bytes."""
        try:
            return self._batch(texts)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # the libraries raise Exception, and PanicException, which is not one
            if len(texts) > 1:
                return [self._safely([text])[0] for text in texts]
            return [(np.zeros(0, np.int32), size(texts[0]))]

    def save(self, folder: str | Path) -> None:
        for name, data in self.files.items():
            write(Path(folder) / name, data)


class JsonTokenizer(_FileTokenizer):
    """A `tokenizer.json` of the `tokenizers` library: trained here (kind "bpe") or elsewhere (kind "huggingface").

    begin_of_text: a value of `data.tokenizer.begin_of_text`. files: the files beside it that belong to it, by name.
    """

    def __init__(
        self,
        data: bytes,
        end_of_text: str,
        path: str,
        begin_of_text: str = "",
        files: dict[str, bytes] | None = None,
    ):
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
            spec = json.loads(data)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library raises Exception, and PanicException, which is not one
            raise ConfigError("data.tokenizer.path", path, f"is not a tokenizer.json: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # "<|endoftext|>" in a text becomes letters, not the token
        added = self._tokenizer.get_added_tokens_decoder()
        special = {t.content for t in added.values()}
        self.special = {t.content: i for i, t in added.items() if t.special}
        lookup = self._tokenizer.token_to_id
        end = _find_end_of_text(lookup, end_of_text, sorted(special))
        # The vocabulary is not empty, since it has end_of_text.
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        begin = choose(begin_of_text, of_json(spec, settings_of(files or {})), lookup, end[0])
        self._settle("tokenizer.json", data, files, end, begin)
        # A second tokenizer, with an unknown token, tells which characters are lost, if any can be.
        self._counting, self._unknown = self._tokenizer, None
        if not keeps_everything(spec):
            self._counting, self._unknown = with_unknown(spec, self._tokenizer)
        self._drops = spec["model"].get("type") == "BPE"  # without an unknown token a BPE drops characters
        if self._unknown is not None and self._unknown < self.vocab_size:
            self._unknown_id = self._unknown
        self._with_offsets: dict[bool, tokenizers.Tokenizer] = {}  # by `special` of `encode_spans`

    def _batch(self, texts: list[str]) -> list[tuple[np.ndarray, int]]:
        ids_of = lambda encoded: [np.asarray(e.ids, np.int32) for e in encoded]
        if self._unknown is None:
            return [(ids, 0) for ids in ids_of(self._tokenizer.encode_batch_fast(texts, add_special_tokens=False))]
        encoded = self._counting.encode_batch(texts, add_special_tokens=False)
        known = lambda e: (span for span, i in zip(e.offsets, e.ids, strict=True) if i != self._unknown)
        lost = [lost_bytes(text, known(e)) for text, e in zip(texts, encoded, strict=True)]
        ids = ids_of(encoded)
        if self._unknown >= self.vocab_size:  # the unknown token was added here
            ids = [i[i != self._unknown] for i in ids]
            if self._drops:
                ids = ids_of(self._tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        return list(zip(ids, lost, strict=True))

    def _spans(self, text: str) -> list[Span]:
        made = self._counting.encode(text, add_special_tokens=False)
        return [span for span, i in zip(made.offsets, made.ids, strict=True) if i in self._marks]

    def _places(self, text: str, special: bool) -> list[tuple[int, int, int]]:
        if special not in self._with_offsets:
            self._with_offsets[special] = with_offsets(json.loads(self.files["tokenizer.json"]), special)
        made = self._with_offsets[special].encode(text, add_special_tokens=False)
        return [(i, *span) for i, span in zip(made.ids, made.offsets, strict=True)]

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        kept = [int(i) for i in ids if int(i) not in self._marks]
        return self._tokenizer.decode(kept, skip_special_tokens=False)


class SentencePieceTokenizer(_FileTokenizer):
    """A SentencePiece `.model`. `JsonTokenizer` explains begin_of_text and files."""

    def __init__(
        self,
        data: bytes,
        end_of_text: str,
        path: str,
        begin_of_text: str = "",
        files: dict[str, bytes] | None = None,
    ):
        import sentencepiece

        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(data)
        except Exception as error:
            raise ConfigError("data.tokenizer.path", path, "is not a SentencePiece model") from error
        self.vocab_size = self._processor.GetPieceSize()
        pieces = {self._processor.IdToPiece(i): i for i in range(self.vocab_size)}
        special = [p for p, i in pieces.items() if self._processor.IsControl(i)]
        end = _find_end_of_text(pieces.get, end_of_text, special)
        first = self._processor.bos_id()
        usual = self._processor.IdToPiece(first) if first >= 0 else ""
        self._unknown_id, self.special = self._processor.unk_id(), {}
        own = of_settings(settings_of(files or {}), "no tokenizer_config.json says add_bos_token=true", usual)
        begin = choose(begin_of_text, own, pieces.get, end[0])
        self._settle("tokenizer.model", data, files, end, begin)

    def _batch(self, texts: list[str]) -> list[tuple[np.ndarray, int]]:
        out, unknown = [], self._processor.unk_id()
        for text in texts:
            ids, lost = np.asarray(self._processor.EncodeAsIds(text), np.int32), 0
            if (ids == unknown).any() or text != text.strip():
                lost = lost_bytes(text, (span for i, *span in self._pieces(text) if i != unknown))
            out.append((ids, lost))
        return out

    def _pieces(self, text: str) -> Iterator[tuple[int, int, int]]:
        """Yields (id, begin, end) of every piece; begin and end are the characters that it represents."""
        new = hasattr(self._processor, "EncodeAsOffsetMapping")  # since 0.2.3, which dropped immutable_proto
        at = 0
        for piece in self._processor.encode(text, out_type="proto" if new else "immutable_proto").pieces:
            begin = max(text.find(piece.surface, at), at)
            at = begin + len(piece.surface)
            yield piece.id, begin, at

    def _spans(self, text: str) -> list[Span]:
        return [(begin, end) for i, begin, end in self._pieces(text) if i in self._marks]

    def _places(self, text: str, special: bool) -> list[tuple[int, int, int]]:
        return list(self._pieces(text))

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        return self._processor.DecodeIds([int(i) for i in ids if int(i) not in self._marks])


def _find_end_of_text(lookup, wanted: str, special: Sequence[str]) -> tuple[str, int]:
    """The end-of-text token and its id. Raises: ConfigError listing the vocabulary's special tokens."""
    for name in (wanted,) if wanted else USUAL_NAMES:
        if lookup(name) is not None:
            return name, lookup(name)
    rule = "is not in the vocabulary" if wanted else f"is needed: the vocabulary has none of {', '.join(USUAL_NAMES)}"
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
