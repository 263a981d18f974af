"""What a run has read, kept in its checkpoints (`read` of their data item), and what has changed in it since."""

from collections.abc import Mapping, Sequence
from typing import Any

from moe_jax.data.corpus import TokenStore
from moe_jax.errors import FileError

_MOST = 1000  # files that a record lists by name
_SHOWN = 3  # files that a line names


def record(sources: Mapping[str, Any], tokenizer: str, stores: Mapping[tuple[str, str], TokenStore]) -> dict[str, Any]:
    """As JSON: the tokenizer's fingerprint, and of every source and split the hash of what was prepared, documents,
    tokens, and the files with their sizes."""
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
    """What differs between two records, one line a source; [] if the prepared text is the same, in the same order."""
    if before["tokenizer"] != now["tokenizer"]:
        return ["the tokenizer of the run directory is another one, so all of the text has other tokens"]
    lines = []
    for name in dict.fromkeys([*before["sources"], *now["sources"]]):
        old, new = (r["sources"].get(name, {}) for r in (before, now))
        differ = [s for s in dict.fromkeys([*old, *new]) if _content(old, s) != _content(new, s)]
        if differ:
            files = list(dict.fromkeys(w for s in differ for w in _files(old.get(s, {}), new.get(s, {}))))
            what = files or ["the same files by name and size, with other text or read in another way"]
            counts = [f"{split}: {_size(old.get(split))} then, {_size(new.get(split))} now" for split in differ]
            lines.append(f"data.sources.{name}: {'; '.join([*_first(what), *counts])}")
    return lines


def _together(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The first process's record. Raises FileError if another process reads other text, wherever its files lie."""
    for i, other in enumerate(records):
        if lines := changes(records[0], other):
            raise FileError(f"process {i} reads other text than process 0 ('then'): {'; '.join(lines)}")
    return dict(records[0])


def since(before: Mapping[str, Any] | None, records: Sequence[Mapping[str, Any]]) -> list[str]:
    """What has changed since a checkpoint of training, one line a source.

    before: the checkpoint's data state; None, or one of weights only: there is nothing to compare with. records: those
    of all processes, or one if they are equal.
    """
    now = _together(records)
    if not before or "batches" not in before:
        return []
    if "read" not in before:
        return ["the checkpoint does not say what it was trained on, so whether the text has changed is unknown"]
    return [f"the text has changed since the checkpoint: {line}" for line in changes(before["read"], now)]


def resume(
    before: Mapping[str, Any] | None, records: Sequence[Mapping[str, Any]], accept: bool
) -> tuple[dict[str, Any], list[str]]:
    """What the next checkpoints keep as `read`, and lines for the user. As in `since`.

    Raises FileError, if the text has changed, unless that is accepted; the record then says so.
    """
    lines, now = since(before, records), _together(records)
    kept = (before or {}).get("read", {})
    accepted = list(kept.get("accepted", []))
    if lines and kept:
        if not accept:
            rule = "bring it back, use another --workdir, or go on over other text with --accept_changed_data"
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
    """How the files of a split differ, by name and size."""
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
