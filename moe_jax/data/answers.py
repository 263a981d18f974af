"""Documents with roles made tokens: the ids of a document, and which of them are learned.

A token is learned if one of its characters is in an answer, as in transformers' `assistant_masks`. A pair of prompt and
completion is encoded as one text. `begin_of_text` is in front, or `end_of_text` without one, and `end_of_text` follows,
which is learned. A conversation has the special tokens that its template writes and no others, but for one:
`end_of_text` follows where an answer is the end of the text and no special token says so.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from moe_jax.config import SourceConfig
from moe_jax.data.chat import Chat
from moe_jax.data.corpus import Encoded
from moe_jax.data.documents import as_text
from moe_jax.data.kept_text import size
from moe_jax.data.roles import text_of
from moe_jax.data.tokenizers import Spanned, Tokenizer, first_token
from moe_jax.errors import ConfigError, shown

VERSION = 2  # of how documents with roles become tokens
BOTH = "documents in which one token is the end of the prompt and the beginning of the answer; it is learned"
SPELLED = "conversations whose messages spell special tokens, which become these tokens, as in transformers"
EMPTY = (
    "gives an answer without text but for special tokens; the template may leave out its tool_calls, and "
    "a message with a 'weight' of 0 is only read"
)
OPEN = "conversations whose last answer does not end with {!r}, at which samples end (data.tokenizer.end_of_text)"


@contextlib.contextmanager
def open_roles(
    name: str, cfg: SourceConfig, tokenizer: Tokenizer
) -> Iterator[tuple[dict[str, Any], "EncodeAnswers | None"]]:
    """Returns what decides the tokens of a source with roles, and its encoder of documents; {} and None without roles.

    Ends the process of its chat template at the end. Raises: ConfigError `data.sources.<name>.…`.
    """
    if not cfg.has_roles:
        yield {}, None
        return
    chat = Chat(name, cfg, tokenizer) if cfg.messages_field else None
    its = {"answers": [VERSION, chat and chat.fingerprint]}
    try:
        yield its, EncodeAnswers(name, cfg, tokenizer, chat)
    finally:
        if chat:
            chat.close()


class EncodeAnswers:
    """Turns a batch of documents with roles into `Encoded`. chat: None for pairs of prompt and completion."""

    def __init__(self, name: str, cfg: SourceConfig, tokenizer: Tokenizer, chat: Chat | None):
        self._name, self._cfg, self._tokenizer, self._chat = name, cfg, tokenizer, chat
        self._special = np.asarray(sorted(tokenizer.special.values()), np.int64)

    def __call__(self, documents: Sequence[dict[str, Any]]) -> list[Encoded]:
        return [self._pair(d) if self._chat is None else self._conversation(d) for d in documents]

    @property
    def template(self) -> str:
        """The text of the chat template; "" without one."""
        return self._chat.template if self._chat else ""

    def lines(self) -> tuple[str, ...]:
        """Lines for the user about the chat template."""
        return self._chat.lines if self._chat else ()

    def _pair(self, document: dict[str, Any]) -> Encoded:
        text, answers, tokenizer = document["text"], document["answers"], self._tokenizer
        made = tokenizer.encode_spans(text)
        learned = overlap(made.spans, answers)
        ids = [[first_token(tokenizer)], made.ids, [tokenizer.end_of_text]]
        masks = [[False], learned, [learned.any()]]
        return self._encoded(document, text, answers, made, ids, masks, ())

    def _conversation(self, document: dict[str, Any]) -> Encoded:
        text, answers = self._chat.render(document["messages"], document["place"])
        text, tokenizer = as_text(text), self._tokenizer
        made = tokenizer.encode_spans(text, special=True)
        begin, end = tokenizer.begin_of_text, tokenizer.end_of_text
        if begin is not None and made.ids[:2].tolist() == [begin, begin]:
            raise self._error(f"writes the begin-of-text token {tokenizer.words[0]!r} twice: {document['place']}")
        learned, notes = overlap(made.spans, answers), []
        unfinished = bool(learned.size and learned[-1] and made.ids[-1] not in self._special)
        last = end if unfinished or not learned.any() else int(made.ids[learned][-1])
        if last != end:
            notes.append(OPEN.format(tokenizer.words[1]))
        said = "\n".join(text_of(message) for message in document["messages"])
        if any(word in said for word in tokenizer.special):
            notes.append(SPELLED)
        closing = [end] * unfinished
        ids, masks = [[], made.ids, closing], [[], learned, closing]
        return self._encoded(document, text, answers, made, ids, masks, tuple(notes))

    def _encoded(
        self,
        document: dict[str, Any],
        text: str,
        answers: Sequence[tuple[int, int]],
        made: Spanned,
        ids: list[Any],
        masks: list[Any],
        notes: tuple[str, ...],
    ) -> Encoded:
        """The document of the joined ids and masks, and the bytes of its answers without special tokens.

        ids, masks: what is in front of the text, of the text, and behind it.
        """
        tokens = np.concatenate([np.asarray(part, np.int32) for part in ids])
        learned = np.concatenate([np.asarray(part, bool) for part in masks])
        said = _inside(answers, len(text))
        if self._chat:
            special = made.spans[np.isin(made.ids, self._special)]
            said &= ~_inside(special, len(text))
            for begin, end in _joined(answers):
                if not _picked(text[begin:end], said[begin:end]).strip():
                    raise self._error(f"{EMPTY}: {document['place']}, {shown(text[max(begin - 40, 0) : end], 80)}")
        starts = np.maximum.accumulate([0, *made.spans[1:, 0], len(text)][: len(made.ids) + 1])
        if learned[:1].any():  # nothing before predicts it
            learned[0], said[: starts[1]] = False, False
        if not learned.any():
            raise self._error(f"gives no token to learn: {document['place']}, {shown(text, 80)}")
        if any(((made.spans[:, 0] < begin) & (made.spans[:, 1] > begin)).any() for begin, _ in answers):
            notes = (*notes, BOTH)
        lost = said & ~_inside(made.spans[made.known], len(text))
        sizes = np.zeros(len(tokens), np.uint32)
        sizes[len(ids[0]) : len(ids[0]) + len(made.ids)] = np.diff(_bytes_before(text, said)[starts])
        return Encoded(document, tokens, _picked(text, said).encode(), size(_picked(text, lost)), learned, notes, sizes)

    def _error(self, rule: str) -> ConfigError:
        field = "messages_field" if self._chat else "completion"
        return ConfigError(f"data.sources.{self._name}.{field}", getattr(self._cfg, field), rule)


def overlap(spans: np.ndarray, answers: Sequence[tuple[int, int]]) -> np.ndarray:
    """Finds the spans [n, 2] of tokens that have a character in an answer: [n] bool."""
    found = np.zeros(len(spans), bool)
    for begin, end in answers:
        found |= (spans[:, 1] > begin) & (spans[:, 0] < end)
    return found


def _joined(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The spans, in order, with those that touch as one: a template may mark the parts of an answer."""
    made: list[tuple[int, int]] = []
    for begin, end in sorted(spans):
        if made and begin <= made[-1][1]:
            begin, end = made[-1][0], max(end, made.pop()[1])
        made.append((begin, end))
    return made


def _picked(text: str, kept: np.ndarray) -> str:
    """The characters that are kept. kept: [len(text)] bool."""
    return "".join(text[i] for i in np.flatnonzero(kept))


def _bytes_before(text: str, kept: np.ndarray) -> np.ndarray:
    """The bytes of UTF-8 of the kept characters before each character and before the end, [len(text) + 1]."""
    code = np.frombuffer(text.encode("utf-32-le"), "<u4")
    return np.concatenate([[0], np.cumsum((1 + (code > 0x7F) + (code > 0x7FF) + (code > 0xFFFF)) * kept)])


def _inside(spans: Sequence[tuple[int, int]] | np.ndarray, length: int) -> np.ndarray:
    """Finds the characters, of `length`, that are in a span: [length] bool."""
    steps = np.zeros(length + 1, np.int64)
    spans = np.asarray(spans, np.int64).reshape(-1, 2)
    np.add.at(steps, spans[:, 0], 1)
    np.add.at(steps, spans[:, 1], -1)
    return np.cumsum(steps)[:length] > 0
