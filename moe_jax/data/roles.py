"""Documents with roles: a prompt that the model reads, and answers that it learns. Rows of files become such documents.

A document with roles is a dict of `text` and `domain`, as every document, and of
    answers   [(begin, end), …]: the characters of `text` that are learned; or
    messages  a conversation, which becomes text and answers later, with the tokenizer's chat template (chat.py).
              An answer of `weight` 0 is read and not learned, as in OpenAI's format.
    share     a number in [0, 1): the document is held out if it is below `validation_fraction`
    place     where the document comes from, for messages to the user
The hash of the prompt decides `share`, so that documents with the same prompt are on the same side of the split.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from moe_jax.config import SourceConfig
from moe_jax.config.template import filled, parts_of
from moe_jax.data import documents
from moe_jax.errors import ConfigError, nearest, shown

ASSISTANT = "assistant"
_DEPTH = 20  # of lists and objects in a message


class _Row:
    """A row while it is read: its place, by `str`, and whether characters in it were replaced."""

    def __init__(self, place: str):
        self._place, self.replaced = place, False

    def __str__(self) -> str:
        return self._place


class Roles:
    """Turns rows of a source into documents with roles. name: of the source."""

    def __init__(self, name: str, cfg: SourceConfig):
        self._name, self._cfg = name, cfg
        self._templates = {field: parts_of(getattr(cfg, field)) for field in ("prompt", "completion")}

    @property
    def columns(self) -> list[tuple[str, str]]:
        """Pairs of a field of the config and a field of the rows that it names."""
        if self._cfg.messages_field:
            return [("messages_field", self._cfg.messages_field)]
        return [(field, part.field) for field, parts in self._templates.items() for part in parts if part.field]

    @property
    def identity(self) -> list[str]:
        """The fields of the config that decide what the documents are."""
        return [self._cfg.prompt, self._cfg.completion, self._cfg.messages_field]

    def error(self, field: str, rule: str, hint: str = "") -> ConfigError:
        """An error of a field of the source."""
        return ConfigError(f"data.sources.{self._name}.{field}", getattr(self._cfg, field), rule, hint)

    def document(self, row: Mapping[str, Any], domain: str, place: str) -> dict[str, Any]:
        """The document of a row. Raises ConfigError, with the place, if the row has no prompt or no answer."""
        for field, name in self.columns:
            if row.get(name) is None:
                there = [str(key) for key, value in row.items() if value is not None]
                has = f"{place} has {', '.join(there) or 'nothing'}"
                raise self.error(field, f"names {name!r}, which is missing or null: {has}", nearest(name, there))
        at = _Row(place)
        made = self._conversation(row, at) if self._cfg.messages_field else self._pair(row, at)
        return made | {"domain": domain, "place": place} | ({"replaced": "yes"} if at.replaced else {})

    # --- prompt and completion ---

    def _pair(self, row: Mapping[str, Any], place: _Row) -> dict[str, Any]:
        prompt, completion = (
            filled(parts, {part.field: self._value(row, field, part.field, place) for part in parts if part.field})
            for field, parts in self._templates.items()
        )
        if not completion.strip():
            raise self.error("completion", f"is empty: {place}", "leave the row out or give it an answer")
        text = prompt + completion
        return {"text": text, "answers": [(len(prompt), len(text))], "share": documents.least_fraction(prompt or text)}

    def _value(self, row: Mapping[str, Any], field: str, name: str, place: _Row) -> str:
        value = row[name]
        value = value.item() if hasattr(value, "item") and not getattr(value, "shape", ()) else value  # of numpy
        if isinstance(value, bool) or not isinstance(value, str | bytes | int):
            rule = f"names {name!r}, which holds {type(value).__name__}, not text or a whole number: {place}"
            raise self.error(field, rule)
        return self._clean(value, place)

    def _clean(self, value: Any, place: _Row) -> str:
        text, replaced = documents.decoded(value)
        place.replaced |= replaced
        return text

    # --- messages ---

    def _conversation(self, row: Mapping[str, Any], place: _Row) -> dict[str, Any]:
        value = row[self._cfg.messages_field]
        if isinstance(value, str | bytes) and documents.as_text(value).lstrip().startswith("["):  # .csv has only text
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                raise self._wrong("is text, not a list of messages", place) from None
        if isinstance(value, Mapping):  # TFDS has a dict of lists
            value = self._from_columns(value, place)
        if isinstance(value, str | bytes) or not isinstance(value, Sequence):
            raise self._wrong(f"is {type(value).__name__}, not a list of messages", place)
        if not len(value):
            raise self._wrong("has no message", place)
        messages = [self._message(i, message, place) for i, message in enumerate(value, 1)]
        first = next((i for i, m in enumerate(messages) if m["role"] == ASSISTANT), None)
        if first is None:
            found = ", ".join(dict.fromkeys(m["role"] for m in messages))
            raise self._wrong(f"has no message of the role {ASSISTANT!r}, only {shown(found, 60)}", place)
        if all(m.get("weight") == 0 for m in messages if m["role"] == ASSISTANT):
            raise self._wrong("has no answer to learn, since all have the weight 0", place)
        prompt = json.dumps(messages[:first] or messages, ensure_ascii=False)
        return {
            "text": "\n".join(text_of(message) for message in messages),
            "messages": messages,
            "share": documents.least_fraction(prompt),
        }

    def _wrong(self, rule: str, place: _Row) -> ConfigError:
        return self.error("messages_field", f"{rule}: {place}")

    def _from_columns(self, value: Mapping[str, Any], place: _Row) -> list[dict[str, Any]]:
        sizes = {len(column) if isinstance(column, Sequence) or hasattr(column, "__len__") else -1
                 for column in value.values()}  # fmt: skip
        if len(sizes) != 1 or -1 in sizes or any(isinstance(column, str | bytes) for column in value.values()):
            raise self._wrong("is an object, not a list of messages", place)
        return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]

    def _message(self, number: int, message: Any, place: _Row) -> dict[str, Any]:
        """A message of plain values without nulls, which Parquet has for every key that another message has."""
        which = f"has a message {number} that"
        if not isinstance(message, Mapping):
            raise self._wrong(f"{which} is {type(message).__name__}, not an object", place)
        made = {str(k): self._plain(v, place) for k, v in message.items() if v is not None}
        if not isinstance(made.get("role"), str) or not made["role"].strip():
            keys = ", ".join(made) or "nothing"
            hint = nearest("role", list(made)) if made and "role" not in made else ""
            raise self.error("messages_field", f"{which} has no 'role', but {shown(keys, 80)}: {place}", hint)
        content = made.get("content")
        if content is not None and not isinstance(content, str | list):
            raise self._wrong(f"{which} has a 'content' of {type(content).__name__}, not text", place)
        if made["role"] == ASSISTANT and not text_of(made).strip() and not made.get("tool_calls"):
            raise self._wrong(f"{which} is an answer without text", place)
        if made["role"] == ASSISTANT and made.get("weight", 1) not in (0, 1):
            value = shown(made["weight"], 40)
            raise self._wrong(f"{which} has a 'weight' of {value}, not 0 (read) or 1 (learned)", place)
        return made

    def _plain(self, value: Any, place: _Row, depth: int = 0) -> Any:
        if depth > _DEPTH:
            raise self._wrong(f"has a message with more than {_DEPTH} levels", place)
        if isinstance(value, str | bytes):
            return self._clean(value, place)
        if value is None or isinstance(value, bool | int | float):
            return value
        if isinstance(value, Mapping):
            return {str(k): self._plain(v, place, depth + 1) for k, v in value.items()}
        if isinstance(value, Sequence):
            return [self._plain(v, place, depth + 1) for v in value]
        if hasattr(value, "tolist"):  # of numpy
            return self._plain(value.tolist(), place, depth + 1)
        raise self._wrong(f"has a message with {type(value).__name__}, which is not text", place)


def text_of(message: Mapping[str, Any]) -> str:
    """The text of a message, of which `content` may be a list of blocks."""
    content = message.get("content", "")
    if isinstance(content, str):
        return content
    texts = [block.get("text") if isinstance(block, Mapping) else block for block in content]
    return "".join(text for text in texts if isinstance(text, str))
