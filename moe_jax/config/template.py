"""Templates over the fields of a row, such as "{question}\\n": text with the names of fields in braces."""

import string
from typing import NamedTuple


class Part(NamedTuple):
    """Text of a template, and the field that follows it; "" after the last text."""

    text: str
    field: str


def parts_of(template: str) -> list[Part]:
    """The parts of a template. Raises ValueError, with a rule in one line, if it is not one.

    `{{` and `}}` are braces in the text. Nothing is evaluated: a name with a dot, a bracket, `!` or `:` is refused.
    """
    try:
        found = list(string.Formatter().parse(template))
    except ValueError as error:  # a brace without its partner
        raise ValueError(f"is not a template ({str(error).lower()}); a brace in the text is written twice") from None
    made = []
    for text, name, form, conversion in found:
        if name is not None and (form or conversion or not name or any(c in name for c in ".[]{}")):
            how = f"{name}{'!' + conversion if conversion else ''}{':' + form if form else ''}"
            raise ValueError(f"may have names of fields in braces and nothing else, not {{{how}}}")
        made.append(Part(text, name or ""))
    return made


def fields_of(template: str) -> list[str]:
    """The fields that a template names, each once, in order. Raises ValueError."""
    return list(dict.fromkeys(part.field for part in parts_of(template) if part.field))


def filled(parts: list[Part], values: dict[str, str]) -> str:
    """The text of a template's parts with the values of a row."""
    return "".join(part.text + (values[part.field] if part.field else "") for part in parts)
