"""Prints docs/config.md from the schema: each field's values, default and meaning, and what a change does on resume.

    python -m moe_jax.config.document > docs/config.md

The meaning of a field is the comment beside it or above it. A field without a comment is an error.
"""

import ast
import dataclasses
import inspect
import io
import re
import sys
import textwrap
import tokenize
import types
import typing
from typing import Any, Literal

from moe_jax.config.fields import FIXED, MACHINE, MAY_CHANGE, Checked
from moe_jax.config.schema import RunConfig

HEAD = """\
# Every field of a configuration

Made from [moe_jax/config/](../moe_jax/config/schema.py) by `python -m moe_jax.config.document > docs/config.md`.

A file of [configs/](../configs) sets fields, and then the command line does. A field's name there is `--config.`, the
heading of its table, a dot and the name in the table:

```
python train.py --config=configs/quickstart.py --workdir=runs/mine --config.model.moe.top_k=4 --config.optim.lr=3e-3
```

A value outside its range, of another type or against a rule between fields is refused in one line, before anything is
compiled. The line names the field, the rule and the nearest valid value.

**On resume** says what happens when you resume a run with another value. The run continues with it (*may change*), or
the command is refused (*fixed*): use another `--workdir` then, which is a new run. *fixed; free with `init_from`* means
that the new run may still start from the weights of the old one.
"""

RESUME = {
    (MAY_CHANGE, None): "may change",
    (MAY_CHANGE, MACHINE): "may change",
    (FIXED, MACHINE): "fixed; free with `init_from`",
}
COLUMNS = ("| field | values | default | on resume | meaning |", "|---|---|---|---|---|")


def page() -> str:
    """The text of docs/config.md. Raises ValueError for a field or a component without a description."""
    sections = list(_sections(RunConfig, ""))
    names = [section.partition("\n")[0].removeprefix("## ") for section in sections]
    links = [f"[{name}](#{re.sub(r'[^a-z0-9_]', '', name.lower())})" for name in names]
    contents = textwrap.fill(f"Groups of fields: {', '.join(links)}.", 120, break_long_words=False)
    return "\n".join([HEAD, contents, "", *sections])


def _sections(component: type[Checked], name: str, note: str = "") -> typing.Iterator[str]:
    """The section of a component, and after it those of the components that it holds."""
    hints, comments = typing.get_type_hints(component), comments_of(component)
    rows, below = [], []
    for f in dataclasses.fields(component):
        hint, comment, path = hints[f.name], comments.get(f.name, ""), f"{name}.{f.name}".lstrip(".")
        if typing.get_origin(hint) is dict and dataclasses.is_dataclass(typing.get_args(hint)[1]):
            below.append((typing.get_args(hint)[1], f"{path}.NAME", comment))
        elif dataclasses.is_dataclass(hint):
            below.append((hint, path, comment))
        elif comment:
            rows.append(_row(component, f, hint, comment))
        else:
            raise ValueError(f"{component.__name__}.{f.name} has no comment that says what it means")
    if not component.__doc__ or component.__doc__.startswith(f"{component.__name__}("):  # the one that dataclass makes
        raise ValueError(f"{component.__name__} has no docstring")
    text = "\n\n".join(filter(None, [f"## {name or 'config'}", inspect.cleandoc(component.__doc__), note]))
    yield _linked("\n".join([text, "", *COLUMNS, *rows, ""]))
    for section in below:
        yield from _sections(*section)


def _row(component: type[Checked], f: dataclasses.Field, hint: Any, comment: str) -> str:
    classes = component.class_of(f.name, "resume"), component.class_of(f.name, "weights")
    meaning = comment[0].upper() + comment[1:] + ("" if comment.endswith(".") else ".")
    if "was" in f.metadata:
        meaning += f" A run that was begun before {_code(f.default)} was the default has {_code(f.metadata['was'])}."
    default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
    cells = [_code(f.name, ""), _values(f, hint), _code(default), RESUME.get(classes, "fixed"), meaning]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _linked(text: str) -> str:
    """The text with the names of pages, such as docs/muon.md, made links."""
    return re.sub(r"docs/(\w+\.md)", r"[\1](\1)", text)


def _code(value: Any, quotes: str = '"') -> str:
    """A value as Python writes it, in the page's quotes."""
    return f"`{quotes}{value}{quotes}`" if isinstance(value, str) else f"`{value!r}`"


def _values(f: dataclasses.Field, hint: Any) -> str:
    """The valid values of a field: its type with its range, or its choices."""
    if typing.get_origin(hint) is Literal:
        return ", ".join(map(_code, typing.get_args(hint)))
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return " or ".join(_values(f, part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return "numbers"
    if typing.get_origin(hint) is dict:
        return "names of integers"
    kind = {int: "integer", float: "number", bool: "`True`, `False`", str: "text"}[hint]
    low, high = f.metadata.get("low"), f.metadata.get("high", float("inf"))
    if low is None:
        return kind
    return f"{kind} ≥ {low:g}" if high == float("inf") else f"{kind} from {low:g} to {high:,}".removesuffix(".0")


def comments_of(component: type) -> dict[str, str]:
    """The comment of each field of a dataclass: the comment lines above it, and the comments on its own lines."""
    source = textwrap.dedent(inspect.getsource(component))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {
        t.start[0]: re.sub(r"^#\s*|\s*#?\s*fmt: skip", "", t.string) for t in tokens if t.type == tokenize.COMMENT
    }
    alone = {line for line in comments if source.splitlines()[line - 1].lstrip().startswith("#")}
    found = {}
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.AnnAssign):
            first = node.lineno
            while first - 1 in alone:
                first -= 1
            lines = [comments[line] for line in range(first, node.end_lineno + 1) if line in comments]
            found[node.target.id] = " ".join(filter(None, lines))
    return found


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")
    print(page(), end="")
