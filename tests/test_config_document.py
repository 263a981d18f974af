"""docs/config.md is what the dataclasses of the configuration and their comments say, of every field."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from moe_jax.config import RunConfig, classes
from moe_jax.config.document import comments_of, page
from moe_jax.config.fields import FIXED, FUNCTION, Checked, changeable, machine, newer, number

PAGE = Path(__file__).parents[1] / "docs" / "config.md"


def rows(text: str) -> dict[str, list[str]]:
    """The cells of each field's row by the field's dotted name."""
    found, group = {}, ""
    for line in text.splitlines():
        if line.startswith("## "):
            group = line.removeprefix("## ").replace("config", "").replace("NAME", "*")
        elif line.startswith("| `"):
            name, *cells = line.removeprefix("| ").removesuffix(" |").split(" | ")
            found[f"{group}.{name.strip('`')}".lstrip(".")] = cells
    return found


def test_the_page_is_what_the_dataclasses_say():
    command = "run `python -m moe_jax.config.document > docs/config.md`"
    assert PAGE.read_text(encoding="utf-8") == page(), command


def test_it_has_every_field():
    found = rows(page())
    assert list(sorted(found)) == sorted(name for name, _, _ in classes.fields())
    assert all(len(cells) == 4 and all(cells) for cells in found.values())


@dataclass(frozen=True)
class Inner(Checked, resume=FIXED, weights=FUNCTION):
    """A part."""

    # Of two lines, (a | b),
    # above.
    size: int = machine(number(1, 1, 5_000), FIXED)
    how: int | Literal["auto"] = newer("auto", was=3)  # how it is done; see docs/muon.md


@dataclass(frozen=True)
class Outer(Checked, resume=FIXED):
    """The whole."""

    share: float = changeable(number(0.5, 0.0, 1.0))  # a share
    on: bool = True  # fmt: skip
    inner: Inner = Inner()


def test_a_row(monkeypatch):
    monkeypatch.setattr("moe_jax.config.document.RunConfig", Inner)
    was = 'A run that was begun before `"auto"` was the default has `3`.'
    assert rows(page()) == {
        "size": ["integer from 1 to 5,000", "`1`", "fixed; free with `init_from`", r"Of two lines, (a \| b), above."],
        "how": ['integer or `"auto"`', '`"auto"`', "fixed", f"How it is done; see [muon.md](muon.md). {was}"],
    }


def test_a_field_without_a_comment_is_named(monkeypatch):
    assert comments_of(Outer) == {"share": "a share", "on": "", "inner": ""}
    monkeypatch.setattr("moe_jax.config.document.RunConfig", Outer)
    with pytest.raises(ValueError, match=r"Outer\.on has no comment"):
        page()


def test_a_component_without_a_docstring_is_named(monkeypatch):
    monkeypatch.setattr(RunConfig, "__doc__", "RunConfig(seed: int = 0)")
    with pytest.raises(ValueError, match="RunConfig has no docstring"):
        page()
