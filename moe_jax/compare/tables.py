"""Compares runs in numbers: which fields differ, losses at equal steps, tokens and time, benchmarks, balance."""

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from moe_jax import config
from moe_jax.compare.runs import AXES, MEASURES, Curve, Run

LAST = 0.05  # share of a run, at its end, over which training metrics are averaged
WIDEST = 130  # characters of a line in a terminal; wider tables are continued below
LONGEST = 28  # characters of a field's value
NONE = "–"
ABSENT = object()  # the value of a field that a config does not have
UNITS = {"xent": "nats per token", "bits_per_byte": "bits per byte"}
ACCURACIES = ("acc", "acc_per_char")
# Fields of `data` that decide neither which text is held out nor how it is cut into tokens.
_NOT_OF_THE_TEXT = ("weight", "batch_size", "num_workers", "cache_dir", "train_bytes")


class Table(NamedTuple):
    """A table of text. The first column names the rows."""

    title: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def text(self) -> str:
        """The table for a terminal. Columns that do not fit beside one another follow in another block."""
        every = [self.head, *self.rows]
        widths = [max(len(row[i]) for row in every) for i in range(len(self.head))]
        blocks: list[list[int]] = [[]]
        for i in range(1, len(self.head)):
            if blocks[-1] and widths[0] + sum(widths[j] + 2 for j in [*blocks[-1], i]) > WIDEST:
                blocks.append([])
            blocks[-1].append(i)
        line = lambda row, block: "  ".join(
            [row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in block)]
        ).rstrip()
        return "\n".join([self.title, "\n\n".join("\n".join(line(row, block) for row in every) for block in blocks)])

    def markdown(self) -> str:
        """The table in Markdown."""
        line = lambda row: f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"
        rule = f"|---{'|---:' * (len(self.head) - 1)}|"
        return "\n".join([f"**{self.title}**", "", line(self.head), rule, *map(line, self.rows)])


# --- settings --------------------------------------------------------------------------------------------------------


def differing(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The fields in which runs differ, in the order of the config: the value of each run, `ABSENT` without one.

    Of a part that not all runs have, such as a source of text, not the fields are compared but the names: the value of
    "data.sources" is then a list of names.
    """
    shared = set.intersection(*({part for name in run.config for part in _parts(name)} for run in runs))
    names = {}
    for name in dict.fromkeys(name for run in runs for name in run.config):
        lacking = next((part for part in _parts(name) if part not in shared), "")
        names[lacking.rpartition(".")[0] or name] = None
    values = {name: [_setting(run, name) for run in runs] for name in names}
    return {name: row for name, row in values.items() if not all(config.same_value(value, row[0]) for value in row)}


def _parts(name: str) -> list[str]:
    """The parts that a field lies in, from the outside: "data" and "data.sources" for "data.sources.a"."""
    return [name[:i] for i, letter in enumerate(name) if letter == "."]


def _setting(run: Run, name: str) -> Any:
    """A field's value, or the names inside a part."""
    inside = [field[len(name) + 1 :].split(".")[0] for field in run.config if field.startswith(f"{name}.")]
    return list(dict.fromkeys(inside)) or run.config.get(name, ABSENT)


def _cut(text: str) -> str:
    """A value of at most `LONGEST` characters. The end of a path says more than its beginning."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2 - 1]}…{text[-LONGEST // 2 :]}"


def of_settings(runs: Sequence[Run]) -> Table:
    """The table of the fields in which runs differ: a row a run if it fits a terminal, otherwise a row a field."""
    shown = lambda value: NONE if value is ABSENT else _cut(json.dumps(value, ensure_ascii=False))
    found = {name: list(map(shown, values)) for name, values in differing(runs).items()}
    if not found:
        return Table("settings: the same in all runs", ("run",), [(run.name,) for run in runs])
    title = "settings that differ"
    by_field = Table(title, ("config", *(run.name for run in runs)), [(name, *row) for name, row in found.items()])
    by_run = Table(
        title, ("run", *found), [(run.name, *(row[i] for row in found.values())) for i, run in enumerate(runs)]
    )
    return min(by_field, by_run, key=lambda table: table.text().count("\n"))


# --- losses ----------------------------------------------------------------------------------------------------------


def metric(runs: Sequence[Run]) -> str:
    """The loss by which runs are compared: nats per token, or bits per byte if their tokens are not the same."""
    known = {run.tokenizer for run in runs if run.tokenizer}
    return "xent" if len(known) < 2 else "bits_per_byte"


class Point(NamedTuple):
    """A held-out loss. between: whether it lies between two evaluations, on a straight line."""

    value: float
    between: bool

    def __str__(self) -> str:
        return f"{'~' if self.between else ''}{self.value:.4f}" if math.isfinite(self.value) else "not finite"


def common(runs: Sequence[Run], axis: str) -> float | None:
    """The last place on an axis of `AXES` that the held-out losses of all runs reach, of those that have any there.

    None if fewer than two runs have.
    """
    places = [getattr(run.held_out, axis) for run in runs]
    ends = [float(at[np.isfinite(at)].max()) for at in places if np.isfinite(at).any()]
    return min(ends) if len(ends) > 1 else None


def loss_at(curve: Curve, name: str, axis: str, place: float) -> Point | None:
    """The held-out loss of a run at a place on an axis; None before its first evaluation and after its last."""
    at, values = getattr(curve, axis), curve.values[name]
    at, values = at[np.isfinite(at)], values[np.isfinite(at)]  # the last may be ahead of the rows of training
    if not len(at) or not at[0] <= place <= at[-1]:
        return None
    i = int(np.searchsorted(at, place))
    if at[i] == place:
        return Point(float(values[i]), False)
    share = (place - at[i - 1]) / (at[i] - at[i - 1])
    return Point(float((1 - share) * values[i - 1] + share * values[i]), True)


def _at_the_end(curve: Curve, name: str) -> float:
    """The mean of a training metric over the last `LAST` of a run's steps; NaN without rows."""
    values = curve.values.get(name, np.empty(0))
    if not len(values):
        return math.nan
    return float(values[curve.step > (1 - LAST) * curve.step[-1]].mean())


def seconds(number: float) -> str:
    """A time such as 59 s, 12:04 min or 3:05 h."""
    if not math.isfinite(number):
        return NONE
    whole = round(number)
    if whole < 60:
        return f"{number:.3g} s"
    large, unit = (whole // 60, "min") if whole < 3600 else (whole // 3600, "h")
    return f"{large}:{whole % 60 if unit == 'min' else whole % 3600 // 60:02d} {unit}"


def _number(value: float, text: str = "{:.4f}") -> str:
    return text.format(value) if math.isfinite(value) else NONE


def of_losses(runs: Sequence[Run]) -> Table:
    """The table of losses: of training and held-out text at the end, and held out at equal steps, tokens and time."""
    name = metric(runs)
    places = {axis: common(runs, axis) for axis in AXES}
    titles = {"step": "at step {:,.0f}", "tokens": "at {:,.0f} tokens"}
    heads = {
        axis: f"after {seconds(place)}" if axis == "seconds" else titles[axis].format(place)
        for axis, place in places.items()
        if place is not None
    }
    by = next((axis for axis in ("tokens", "step") if axis in heads), "")
    points = [{axis: loss_at(run.held_out, name, axis, places[axis]) for axis in heads} for run in runs]
    against = next((i for i, own in enumerate(points) if by and own[by]), 0)
    first = points[against][by].value if by and points[against][by] else math.nan
    rows = []
    for run, own in zip(runs, points, strict=True):
        value = own[by].value if by and own[by] else math.nan
        last = run.held_out.values[name]
        end = [float(curve[-1]) if len(curve) else math.nan for curve in (run.training.step, run.training.tokens)]
        rows.append((
            run.name, _number(end[0], "{:,.0f}"), _number(end[1], "{:,.0f}"),
            seconds(float(run.training.seconds[-1]) if len(run.training.step) else math.nan),
            _number(_at_the_end(run.training, "xent")), _number(float(last[-1]) if len(last) else math.nan),
            *(NONE if own[axis] is None else str(own[axis]) for axis in heads),
            *([_number(value - first, "{:+.4f}")] if by else []),
        ))  # fmt: skip
    head = ("run", "steps", "tokens", "time", "training", "held out", *heads.values(), *(["Δ"] if by else []))
    title = f"loss: training in nats per token (last {100 * LAST:g} % of the steps), held out in {UNITS[name]}"
    title += f"; Δ: held out against {runs[against].name} at equal {by}" if by else ""
    return Table(title, head, rows)


def of_domains(runs: Sequence[Run]) -> Table:
    """The table of held-out losses by domain, from eval.json."""
    name = metric(runs)
    domains = dict.fromkeys(domain for run in runs for domain in run.domains)
    cell = lambda row: _number(row[name], "{:.3f}") if row else NONE
    rows = [(domain, *(cell(run.domains.get(domain)) for run in runs)) for domain in domains]
    return Table(f"held-out loss by domain, {UNITS[name]}", ("domain", *(run.name for run in runs)), rows)


# --- benchmarks ------------------------------------------------------------------------------------------------------


def scores(run: Run, measures: Sequence[str] = MEASURES) -> dict[str, tuple[float, float]]:
    """Values and standard errors of the benchmarks in eval.json, by "task, measure"."""
    tasks = (run.evaluation or {}).get("tasks", {})
    return {
        f"{task}, {MEASURES[name]}": (row[name], row[f"{name}_se"])
        for task, row in tasks.items()
        for name in measures
        if name in row
    }


def _score(name: str, value: float, error: float) -> str:
    unit, digits, scale = ("", 3, 1) if name.endswith(MEASURES["bits_per_byte"]) else (" %", 1, 100)
    return f"{scale * value:.{digits}f} ± {scale * error:.{digits}f}{unit}"


def of_benchmarks(runs: Sequence[Run]) -> Table:
    """The table of benchmarks with their standard errors, from eval.json."""
    found = [scores(run) for run in runs]
    names = dict.fromkeys(name for one in found for name in one)
    rows = [(name, *(_score(name, *one[name]) if name in one else NONE for one in found)) for name in names]
    return Table("benchmarks, ± standard error", ("task", *(run.name for run in runs)), rows)


# --- routers ---------------------------------------------------------------------------------------------------------


def of_routers(runs: Sequence[Run]) -> Table:
    """The table of balance and specialisation, of the runs with routers. A load is that of the layer where it is
    largest."""
    head = ("run", "maximum load", "load CV", "dropped", "held out: maximum load", "dead experts", "I(expert; domain)",
            "largest")  # fmt: skip
    rows = []
    for run in _with_routers(runs):
        mean = lambda name, text, run=run: _number(_at_the_end(run.training, name), text)
        bits = [layer.specialisation for layer in run.layers]
        held_out = [
            _number(max(layer.max_load for layer in run.layers), "{:.2f}"),
            f"{sum(layer.dead for layer in run.layers)}",
            f"{np.mean(bits):.3f} bits",
            f"{max(bits):.3f} (layer {int(np.argmax(bits))})",
        ] if bits else [NONE] * 4  # fmt: skip
        rows.append(
            (run.name, mean("max_load", "{:.2f}"), mean("load_cv", "{:.3f}"), mean("dropped", "{:.2%}"), *held_out)
        )
    title = (
        f"routers: balance in training (last {100 * LAST:g} % of the steps), then on held-out text; mean and largest "
    )
    return Table(f"{title}of layers", head, rows)


def _with_routers(runs: Sequence[Run]) -> list[Run]:
    return [run for run in runs if run.layers or "max_load" in run.training.values]


# --- all -------------------------------------------------------------------------------------------------------------


def all_tables(runs: Sequence[Run]) -> list[Table]:
    """The tables for which the runs have numbers."""
    tables = [of_settings(runs), of_losses(runs)]
    if len(dict.fromkeys(domain for run in runs for domain in run.domains)) > 1:
        tables.append(of_domains(runs))
    if any(map(scores, runs)):
        tables.append(of_benchmarks(runs))
    if _with_routers(runs):
        tables.append(of_routers(runs))
    return tables


def _of_the_text(name: str) -> bool:
    return name.startswith("data.") and name.rpartition(".")[2] not in _NOT_OF_THE_TEXT


def notes(runs: Sequence[Run]) -> Iterator[str]:
    """Yields what a reader of the tables should know: losses that are not comparable, runs that lack something."""
    differs = differing(runs)
    if metric(runs) == "bits_per_byte":
        yield "the tokenizers differ, so held-out losses are in bits per byte; training losses are not comparable"
    same_tokens = len({run.tokenizer for run in runs}) == 1 and runs[0].tokenizer
    text = [name for name in differs if _of_the_text(name)]
    if text := [name for name in text if not (same_tokens and name.startswith("data.tokenizer."))]:
        yield f"the held-out text, or how it is cut, may differ between runs: {', '.join(text[:5])}"
    if "train.eval_batches" in differs or len({run.evaluation.get("limit") for run in runs if run.domains}) > 1:
        yield "held-out losses are of different parts of the text: train.eval_batches, or --batches of eval.py, differs"
    tasks = [(run.evaluation or {}).get("tasks", {}) for run in runs]
    digests = {name: {one[name].get("digest") for one in tasks if name in one} for one in tasks for name in one}
    if other := [name for name, found in digests.items() if len(found) > 1]:
        yield f"benchmarks of other documents or requests, not comparable: {', '.join(other)}"
    for run in runs:
        steps, done = run.config.get("train.steps"), run.training.step
        if len(done) and isinstance(steps, int) and done[-1] < steps:
            yield f"{run.name}: at step {done[-1]:,.0f} of {steps:,}"
        if run.evaluation and len(done) and (step := run.evaluation.get("step", done[-1])) < done[-1]:
            yield f"{run.name}: eval.json is of step {step:,}, and the run is at step {done[-1]:,.0f}"
        if run.changed:
            yield f"{run.name}: went on with other settings from step {', '.join(map(str, run.changed))}; see " + (
                "config_history.jsonl"
            )
    for file, lacking in (("metrics.jsonl", [r for r in runs if not len(r.training.step)]),
                          ("eval.json", [r for r in runs if r.evaluation is None])):  # fmt: skip
        if lacking:
            yield f"without {file}: {', '.join(run.name for run in lacking)}"
    if any("~" in cell for row in of_losses(runs).rows for cell in row):
        yield "~: between two evaluations, on a straight line"


def as_json(runs: Sequence[Run]) -> dict[str, Any]:
    """All numbers of the comparison as JSON values. A number that is not finite is null."""
    name = metric(runs)
    places = {axis: common(runs, axis) for axis in AXES}

    def one(i: int, run: Run) -> dict[str, Any]:
        points = {axis: loss_at(run.held_out, name, axis, p) for axis, p in places.items() if p is not None}
        ends = {n: _at_the_end(run.training, n) for n in run.training.values}
        return {
            "run": run.name,
            "settings": {field: None if row[i] is ABSENT else row[i] for field, row in differing(runs).items()},
            "training": ends,
            "held_out": [[float(x) for x in row] for row in
                         zip(*(getattr(run.held_out, a) for a in AXES), run.held_out.values[name], strict=True)],
            "held_out_at": {a: p and p._asdict() for a, p in points.items()},
            "domains": {domain: row[name] for domain, row in run.domains.items()},
            "tasks": scores(run),
            "layers": [layer._asdict() for layer in run.layers],
        }  # fmt: skip

    rows = [one(*numbered) for numbered in enumerate(runs)]
    return _finite({"loss": name, "places": places, "notes": list(notes(runs)), "runs": rows})


def _finite(value: Any) -> Any:
    """A value of dicts, lists and tuples, with None for a number in it that is not finite."""
    if isinstance(value, dict):
        return {key: _finite(of) for key, of in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(of) for of in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
