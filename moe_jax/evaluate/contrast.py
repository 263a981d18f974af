"""Finds the experts whose use differs most between two domains of text, or between two sets of prompts.

The measure is the difference of selection frequencies: the share of a side's tokens that choose an expert, minus that
of the other side. Source: Mixture of Tunable Experts, arXiv:2502.11096, which compares prompts that a model answers
with prompts that it refuses.

Letters: L layers with experts, E routed experts of a layer; the two sides are the first and the second.
"""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from moe_jax.config import ModelConfig
from moe_jax.data import readers
from moe_jax.errors import FileError, UserError, nearest
from moe_jax.evaluate import switches
from moe_jax.evaluate.analysis import INK, QUIET, Analysis, number_of
from moe_jax.evaluate.drawing import GRID, plain
from moe_jax.evaluate.opened import OpenedRun

MOST = 10  # experts in a table and in the line that switches them off
FIELDS = ("prompt", "text")  # of a row of a .jsonl file of prompts


class Contrast(NamedTuple):
    """The use of every expert on the two sides. Identity experts compute nothing and are not among them."""

    names: tuple[str, str]
    tokens: tuple[int, int]
    frequency: list[Float[np.ndarray, "2 E"]]  # of each layer; layers may have different numbers of experts


class Row(NamedTuple):
    """An expert and its use on both sides, as shares of the tokens."""

    layer: int
    expert: int
    first: float
    second: float

    @property
    def difference(self) -> float:
        return self.first - self.second


def ranked(found: Contrast) -> list[Row]:
    """All experts, from the most specific to the first side to the most specific to the second. Ties: the lower id."""
    rows = [
        Row(layer, expert, float(first), float(second))
        for layer, frequency in enumerate(found.frequency)
        for expert, (first, second) in enumerate(frequency.T)
    ]
    return sorted(rows, key=lambda row: -row.difference)


def off_line(found: Contrast, model: ModelConfig, most: int = MOST) -> str:
    """The line that switches off the experts most specific to the first side, for `eval.py --experts=`.

    Only experts that the first side uses more are in it, and of a layer only so many that a token has enough left.
    """
    more = [(row.layer, row.expert) for row in ranked(found) if row.difference > 0]
    return switches.spell(switches.first_valid(model, more, most))


# --- from where ------------------------------------------------------------------------------------------------------


def of_domains(analyses: dict[str, Analysis], first: str, second: str, identity_experts: int = 0) -> Contrast:
    """The contrast of two domains of an evaluation's text. analyses: those of `analysis.analyse`.

    Raises UserError for a domain of which nothing was evaluated.
    """
    one = next(iter(analyses.values()))
    ids = [one.domains.index(name) for name in (first, second)]
    for name, g in zip((first, second), ids, strict=True):
        if not one.tokens[g] > 0:
            raise UserError(f"--contrast={first},{second}: no text of {name} was evaluated")
    layers = {}
    for bank in analyses.values():
        experts = bank.selection_frequency.shape[-1] - identity_experts
        for i, frequency in enumerate(bank.selection_frequency):
            layers[number_of(bank, i)] = frequency[ids, :experts]
    return Contrast((first, second), tuple(int(one.tokens[g]) for g in ids), [layers[i] for i in sorted(layers)])


def of_prompts(run: OpenedRun, first: Sequence[str], second: Sequence[str], names: tuple[str, str]) -> Contrast:
    """The contrast of two sets of prompts. The token that begins a document is the same in all, and is not counted."""
    experts = [place.kind.experts for place in run.model.places if place.kind.experts]
    sides, tokens = [], []
    for prompts in (first, second):
        routings = run.routing(list(prompts))
        counts = [np.zeros(e) for e in experts]
        for routing in routings:
            for layer, count in enumerate(counts):
                chosen = routing.experts[layer, 1:].ravel()
                count += np.bincount(chosen[(chosen >= 0) & (chosen < len(count))], minlength=len(count))
        tokens.append(sum(len(routing.ids) - 1 for routing in routings))
        sides.append([count / max(tokens[-1], 1) for count in counts])
    return Contrast(names, tuple(tokens), [np.stack(pair) for pair in zip(*sides, strict=True)])


def are_files(given: Sequence[str], domains: Sequence[str] | None = None) -> bool:
    """Whether the two names of --contrast are files of prompts; else they are domains.

    domains: those of the run, where they are known. Raises UserError for another number of names, for a domain beside
    a file, and for a name that is neither.
    """
    shown = f"--contrast={','.join(given)}"
    if len(given) != 2 or given[0] == given[1]:
        raise UserError(f"{shown}: takes two domains, such as --contrast=code,prose, or two files of prompts")
    files = [readers.extension(Path(name)) in (".txt", ".jsonl") for name in given]
    if files[0] != files[1]:
        raise UserError(f"{shown}: {given[files.index(True)]} is a file of prompts, the other one is not")
    for name in given:
        if files[0] and not Path(name).expanduser().is_file():
            raise UserError(f"{shown}: {name}: no such file; domains have no extension .txt or .jsonl")
        if not files[0] and domains is not None and name not in domains:
            rule = f"{name!r} is no domain of the held-out text, which are {', '.join(domains)}"
            raise UserError(f"{shown}: {rule}; {nearest(name, domains)}")
    return files[0]


def titles(paths: Sequence[str]) -> tuple[str, str]:
    """The names of two files of prompts: those of the files without extensions, or their paths if these are equal."""
    first, second = (Path(path).name.partition(".")[0] for path in paths)
    return (first, second) if first != second else tuple(paths)


def read_prompts(path: str) -> list[str]:
    """The prompts of a file: of a .txt file its lines, of a .jsonl file the field `prompt` or `text` of its rows.

    Empty lines are left out. Both may be compressed (.gz). Raises FileError for a file of another form, or without any.
    """
    file = Path(path).expanduser()
    try:
        if readers.extension(file) == ".txt":
            found = readers.read_text(file).split("\n")
        else:
            rows = readers.open_rows(file, FIELDS).rows
            found = [_prompt_of(readers.place(file, number), row) for number, row in rows]
    except readers.Unreadable as error:
        raise FileError(str(error)) from None
    except (OSError, EOFError, zlib.error) as error:
        raise FileError(f"{path}: cannot be read: {error}") from None
    found = [text for text in found if text.strip()]
    if not found:
        raise FileError(f"{path}: has no prompt; it needs one a line, or rows with the field prompt or text")
    return found


def check_prompts(run: OpenedRun, path: str, prompts: Sequence[str]) -> None:
    """Raises UserError for a prompt of a file that the run cannot read."""
    for number, prompt in enumerate(prompts, 1):
        try:
            run.ids(prompt)
        except ValueError as error:
            raise UserError(f"--contrast: {path}, prompt {number}: {error}") from None


def _prompt_of(place: str, row: dict) -> str:
    text = next((row[name] for name in FIELDS if name in row), None)
    if not isinstance(text, str):
        raise FileError(f"{place}: needs a field prompt, or text, that is a text")
    return text


# --- what is shown ---------------------------------------------------------------------------------------------------


def to_json(
    found: Contrast,
    step: int | None,
    line: str,
    experts: str | None = None,
    label: int | None = None,
    overrides: dict[str, Any] | None = None,
) -> str:
    """The text of contrast.json: every expert with its use on both sides, the most specific to the first side first.

    line: `off_line`. experts: those that were switched when the use was measured, if any. label: that of prompts, for a
    model that depends on it. overrides: fields of the run's configuration that had other values, if any.
    """
    first, second = found.names
    rows = [row._asdict() | {"difference": row.difference} for row in ranked(found)]
    body = {"step": step, "first": first, "second": second, "tokens": list(found.tokens), "off": line,
            **({"experts": experts} if experts else {}), **({} if label is None else {"label": label}),
            **({"overrides": overrides} if overrides else {}), "ranked": rows}  # fmt: skip
    return json.dumps(body, indent=1, allow_nan=False) + "\n"


def table(found: Contrast, line: str) -> str:
    """A table of the experts most specific to each side, and the line that switches off those of the first."""
    rows, (first, second) = ranked(found), found.names
    few = min(MOST, -(-len(rows) // 2))
    heads = ("layer/expert", first, second, "difference")
    widths = [max(len(head), 10) for head in heads]
    show = lambda cells: "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
    cells = lambda row: (f"{row.layer}/{row.expert}", f"{row.first:.1%}", f"{row.second:.1%}", f"{row.difference:+.1%}")
    lines = [
        f"share of the tokens that use an expert: {first} {found.tokens[0]:,}, {second} {found.tokens[1]:,} tokens"
    ]
    lines += [show(heads), *(show(cells(row)) for row in rows[:few]), show(["…"] * 4)]
    lines += [show(cells(row)) for row in rows[len(rows) - few :]]
    off = f'to switch off those of {first}: --experts="{line}"' if line else f"no expert is used more by {first}"
    return "\n".join([*lines, off])


def figure(found: Contrast, line: str) -> Figure:
    """A figure of the use of every expert on the two sides, and of its difference by layer.

    Filled points are the experts of `line`, those most specific to the first side.
    """
    rows, off = ranked(found), set(line.replace("off:", "").split())
    first, second = map(plain, found.names)
    chosen = [f"{row.layer}/{row.expert}" in off for row in rows]
    layers, x, y = (np.array([getattr(row, name) for row in rows]) for name in ("layer", "second", "first"))
    made = Figure((10.5, 4.6), layout="constrained")
    use, depth = made.subplots(1, 2, width_ratios=(1, 1.15))
    top = 1.05 * max(x.max(), y.max(), 0.01)
    use.plot([0, top], [0, top], color=QUIET, lw=0.8, zorder=1)
    for axis, across, up in ((use, x, y), (depth, layers, y - x)):
        for is_off in (False, True):
            at = np.array(chosen) == is_off
            colour = {"facecolors": "#c8442f"} if is_off else {"facecolors": "none", "edgecolors": "#3c6fb0"}
            label = f"most specific to {first}" if is_off else "others"
            axis.scatter(across[at], up[at], s=20, lw=0.8, zorder=2 + is_off, label=label, **colour)
        axis.grid(color=GRID, zorder=0)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    for i in np.flatnonzero(chosen)[:5]:
        name = f"{rows[i].layer}/{rows[i].expert}"
        use.annotate(name, (x[i], y[i]), (4, 3), textcoords="offset points", fontsize=7, color=INK)
    use.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    use.set(xlim=(0, top), ylim=(0, top), aspect="equal")
    use.set_xlabel(f"share of the tokens of {second}", fontsize=9, color=INK)
    use.set_ylabel(f"share of the tokens of {first}", fontsize=9, color=INK)
    use.set_title("use of each expert (layer/expert)", fontsize=10, color=INK, loc="left")
    use.legend(fontsize=8, frameon=False)
    depth.axhline(0, color=QUIET, lw=0.8)
    depth.set_xticks(range(len(found.frequency)))
    depth.set_xlabel("layer with experts", fontsize=9, color=INK)
    depth.set_title(f"difference, {first} − {second}", fontsize=10, color=INK, loc="left")
    return made
