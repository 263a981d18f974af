"""A record of the text that a run has read, kept in its checkpoints (`read` of their data item), and changes since."""

from collections.abc import Mapping, Sequence
from typing import Any

from moe_jax.data.corpus import TokenStore
from moe_jax.errors import FileError

_MOST = 1000  # files that a record lists by name
_SHOWN = 3  # files that a line names


def record(sources: Mapping[str, Any], tokenizer: str, stores: Mapping[tuple[str, str], TokenStore]) -> dict[str, Any]:
    """The record, as JSON values: the tokenizer's fingerprint, and for every source and split the hash of the prepared
    text, the numbers of documents and tokens, and the files with their sizes."""
    found: dict[str, Any] = {}
    for (name, split), store in stores.items():
        files = sources[name].listing(split)
        found.setdefault(name, {})[split] = {
            "content": store.content,
            "documents": store.num_documents,
            "tokens": len(store.tokens) - 1,
            "files": files if len(files) <= _MOST else len(files),
        }
    return {"tokenizer": tokenizer, "sources": found}


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Lines about the differences of two records, one a source; [] if the prepared text and its order are the same."""
    if before["tokenizer"] != now["tokenizer"]:
        return ["the tokenizer of the run directory has changed, so all of the text has other tokens"]
    lines = []
    for name in dict.fromkeys([*before["sources"], *now["sources"]]):
        old, new = (r["sources"].get(name, {}) for r in (before, now))
        differ = [s for s in dict.fromkeys([*old, *new]) if _content(old, s) != _content(new, s)]
        if differ:
            files = list(dict.fromkeys(w for s in differ for w in _files(old.get(s, {}), new.get(s, {}))))
            what = files or ["the same files by name and size, with other text, or read with other settings"]
            counts = [f"{split}: {_size(old.get(split))} then, {_size(new.get(split))} now" for split in differ]
            lines.append(f"data.sources.{name}: {'; '.join([*_first(what), *counts])}")
    return lines


def _together(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The first process's record. Raises FileError if another process reads other text; paths may differ."""
    for i, other in enumerate(records):
        if lines := changes(records[0], other):
            raise FileError(f"process {i} ('now') reads other text than process 0 ('then'): {'; '.join(lines)}")
    return dict(records[0])


def since(before: Mapping[str, Any] | None, records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines about what has changed since a training checkpoint, one a source.

    before: the checkpoint's data state. With None, or the state of a checkpoint of weights, nothing is compared.
    records: those of all processes, or one if they are equal.
    """
    now = _together(records)
    if not before or "batches" not in before:
        return []
    if "read" not in before:
        return ["the checkpoint has no record of its training text, so whether the text has changed is unknown"]
    return [f"the text has changed since the checkpoint: {line}" for line in changes(before["read"], now)]


def resume(
    before: Mapping[str, Any] | None, records: Sequence[Mapping[str, Any]], accept: bool
) -> tuple[dict[str, Any], list[str]]:
    """The record that later checkpoints keep as `read`, and lines for the user. Arguments as in `since`.

    Raises FileError if the text has changed, unless `accept`; the record then lists the accepted changes.
    """
    lines, now = since(before, records), _together(records)
    kept = (before or {}).get("read", {})
    accepted = list(kept.get("accepted", []))
    if lines and kept:
        if not accept:
            rule = "restore it, use another --workdir, or continue on the changed text with --accept_changed_data"
            raise FileError(f"{'; '.join(lines)}; {rule}")
        accepted.append({"batches": before["batches"], "changes": lines})
    return now | ({"accepted": accepted} if accepted else {}), lines


def _content(parts: Mapping[str, Any], split: str) -> str | None:
    return parts.get(split, {}).get("content")


def _size(part: Mapping[str, Any] | None) -> str:
    return f"{part['documents']:,} documents, {part['tokens']:,} tokens" if part else "nothing"


def _first(lines: list[str]) -> list[str]:
    more = len(lines) - _SHOWN
    return lines if more <= 0 else [*lines[:_SHOWN], f"{more:,} more files differ"]


def _files(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Lines about how the files of a split differ, by name and size."""
    old, new = old.get("files", []), new.get("files", [])
    if isinstance(old, int) or isinstance(new, int):
        then, now = (f if isinstance(f, int) else len(f) for f in (old, new))
        return [] if then == now else [f"{then:,} files then, {now:,} now"]
    old, new = dict(map(tuple, old)), dict(map(tuple, new))
    lines = [f"{n} had {old[n]:,} bytes, has {new[n]:,}" for n in old if n in new and old[n] != new[n]]
    gone, come = [n for n in old if n not in new], [n for n in new if n not in old]
    for name in list(gone):
        if same := next((n for n in come if new[n] == old[name]), None):
            lines.append(f"{name} is now {same}")
            gone.remove(name), come.remove(same)
    return [*lines, *(f"{n} is gone" for n in gone), *(f"{n} is new" for n in come)]
