"""Fits scaling laws to measured losses: Huber loss, many starts, intervals from refits, and what the laws say.

Letters: n points, p parameters. `forms.py` has the laws.
"""

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import optimize

from moe_jax.errors import FileError, UserError, nearest, shown
from moe_jax.mixtures.design import text_of

HUBER = 1e-3  # residuals of log loss above it count linearly, as in Chinchilla's fits
STARTS = 32
AGAIN = 2  # new starts of each refit
POLISHED = 3  # searches that go on after least squares
FLOOR = 1e-4  # least size of a term, of the least loss: below it the loss does not depend on the term's logarithm
INSIDE = 2.0  # a refit begins so far, of a logarithm, from the ends of the range
APART = 0.02  # least singular value of columns' logarithms, relative to the largest
RANK = 1e-3  # least singular value of scaled columns, relative to the largest, with which they are told apart
LEVEL = 0.95  # of the intervals
EXPONENTS = ("alpha", "beta", "gamma")  # parameters with which a term falls

Columns = dict[str, np.ndarray]


class Problem(NamedTuple):
    """A law with the points that it is fitted to.

    start: draws where a search begins `[p]`. predict: of parameters as they are searched for, and of columns, the
    values of the law. report: parameters as they are named in the law. limits: the range of each parameter in the
    search, by its place, if it has one. log: whether residuals are of logarithms.
    """

    names: tuple[str, ...]
    columns: Columns
    target: Float[np.ndarray, " n"]
    start: Callable[[np.random.Generator], np.ndarray]
    predict: Callable[[np.ndarray, Columns], np.ndarray]
    report: Callable[[np.ndarray], dict[str, float]]
    limits: dict[int, tuple[float, float]]
    log: bool = True

    @property
    def bounds(self) -> Float[np.ndarray, "2 p"]:
        """The ends of the range of each parameter."""
        return np.array([self.limits.get(i, (-np.inf, np.inf)) for i in range(len(self.names))]).T


class Solution(NamedTuple):
    """Fitted parameters, as they are searched for, and the values of the law at the points."""

    parameters: Float[np.ndarray, " p"]
    values: Float[np.ndarray, " n"]
    cost: float


class Fitted(NamedTuple):
    """A law after its fit. parameters and derived: value and interval (low, high) by name, which is NaN without refits.
    drawn: the values of the refits. error: root mean square of the residuals, of log loss or, with log=False, of the
    values themselves. doubts: sentences that say why not to trust it."""

    title: str
    problem: Problem
    solution: Solution
    parameters: dict[str, tuple[float, float, float]]
    derived: dict[str, tuple[float, float, float]]
    drawn: dict[str, list[float]]
    error: float
    doubts: tuple[str, ...]


# --- points ----------------------------------------------------------------------------------------------------------


def read_points(path: Path, needed: tuple[str, ...], optional: tuple[str, ...] = (), texts: tuple[str, ...] = (),
                signed: tuple[str, ...] = ()) -> Columns:  # fmt: skip
    """The columns of a CSV file with a header. Further columns are left out. Raises UserError, FileError.

    texts: columns of words. signed: columns whose numbers may be ≤ 0; all others must be > 0.
    """
    text = text_of(path, "--data=")
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        lines = [(reader.line_num, row) for row in reader if any(map(str.strip, row))]
    except csv.Error as e:
        raise FileError(f"{path}: is not CSV: {e}") from None
    head = [name.strip() for name in lines[0][1]] if lines else []
    for name in needed:
        if name not in head:
            raise FileError(f"{path}: has no column {name!r}; {nearest(name, head)}; needed are {', '.join(needed)}")
    if twice := [name for name in needed + optional if head.count(name) > 1]:
        raise FileError(f"{path}: has the column {twice[0]!r} twice")
    made: dict[str, list] = {name: [] for name in (*needed, *optional) if name in head}
    for number, row in lines[1:]:
        if len(row) != len(head):
            raise FileError(f"{path}: row {number} has {len(row)} values for {len(head)} columns")
        for name, into in made.items():
            value = row[head.index(name)].strip()
            into.append(value if name in texts else _number(value, name in signed, f"{path}: row {number}: {name}"))
    return {name: np.array(values, str if name in texts else float) for name, values in made.items()}


def _number(text: str, signed: bool, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or not (signed or value > 0):
        raise FileError(f"{where}={shown(text)}: must be a finite number{'' if signed else ' > 0'}")
    return value


def require_points(columns: Columns, parameters: int, where: str = "") -> None:
    """Raises UserError unless there are more points than parameters."""
    count = len(next(iter(columns.values())))
    if count <= parameters:
        rule = f"a law of {parameters} parameters needs {parameters + 1} points or more{where}"
        raise UserError(f"--data: {rule}; there {'is' if count == 1 else 'are'} {count}")


def require_different(columns: Columns, name: str, least: int, what: str = "") -> None:
    """Raises UserError unless a column has `least` different values or more."""
    there = len(np.unique(columns[name]))
    if there < least:
        rule = f"needs {least} different values or more{what}; there {'is' if there == 1 else 'are'} {there}"
        raise UserError(f"--data: column {name} {rule}")


def require_apart(columns: Columns, names: tuple[str, ...]) -> None:
    """Raises UserError where the logarithm of one column is a linear function of those of the others.

    With 20 tokens for each parameter, say, nothing tells the terms of the two apart.
    """
    logs = np.stack([np.log(columns[name]) for name in names], 1)
    logs = logs - logs.mean(0)
    left = np.linalg.svd(logs / np.linalg.norm(logs, axis=0), compute_uv=False)
    if left[-1] < APART * left[0]:
        raise UserError(f"--data: columns {', '.join(names)}: one follows from the others, and no law tells their "
                        "terms apart; points are needed in which each changes alone")  # fmt: skip


# --- fitting ---------------------------------------------------------------------------------------------------------


def solve(problem: Problem, target: Float[np.ndarray, " n"], starts: list[np.ndarray],
          thorough: bool = True) -> Solution:  # fmt: skip
    """The parameters with the least Huber loss of the residuals, of several searches within the limits.

    Least squares, which converges faster, leads from each start to where the search for the Huber loss begins.
    thorough: False for refits, of which there are many, and whose intervals need no more than a few digits.
    """
    wanted = np.log(target) if problem.log else target
    spread = HUBER if problem.log else max(0.1 * float(np.std(target)), 1e-9)
    bounds = problem.bounds
    polished, steps, least = (POLISHED, 200, 1e-12) if thorough else (1, 40, 1e-8)

    def residuals(p):
        value = problem.predict(p, problem.columns)
        found = (np.log(value) if problem.log else value) - wanted
        return np.clip(np.nan_to_num(found, nan=np.inf), -1e6 * spread, 1e6 * spread)

    def search(start, steps=200, **options):
        try:
            return optimize.least_squares(residuals, np.clip(start, *bounds), x_scale="jac", max_nfev=steps,
                                          bounds=bounds, **options)  # fmt: skip
        except (ValueError, np.linalg.LinAlgError):  # no finite step from this start
            return None

    near = [found for start in starts if (found := search(start, steps)) is not None]
    near = sorted(near, key=lambda found: found.cost)[:polished]
    huber = {"loss": "huber", "f_scale": spread, "xtol": least, "ftol": least, "gtol": least}
    last = [found for one in near if (found := search(one.x, **huber)) is not None]
    if not last:
        raise UserError("--data: no start leads to a fit; are the columns what the form needs?")
    best = min(last, key=lambda found: found.cost)
    return Solution(best.x, problem.predict(best.x, problem.columns), float(best.cost))


def fit(problem: Problem, title: str, refits: int, seed: int | Sequence[int],
        derive: Callable[[dict[str, float]], dict[str, float]],
        targets: list[Float[np.ndarray, " n"]] | None = None) -> Fitted:  # fmt: skip
    """Fits a law, and again to `refits` sets of its own values with residuals put in at random, for intervals.

    Residuals are scaled by √(n / (n − p)), since p parameters have made them smaller. derive: of the parameters by
    name, further numbers that get intervals too. targets: the sets of values, if they are known otherwise.
    """
    with np.errstate(all="ignore"):  # a parameter may be too large for a number, and is shown as infinite
        return _fit(problem, title, refits, seed, derive, targets)


def _fit(problem: Problem, title: str, refits: int, seed: int | Sequence[int], derive, targets) -> Fitted:
    if not np.ptp(problem.target):
        raise UserError(f"--data: all values are {problem.target[0]:g}, which tells nothing of a law: {title}")
    rng = np.random.default_rng(seed)
    solution = solve(problem, problem.target, [problem.start(rng) for _ in range(STARTS)])
    forward, back = (np.log, np.exp) if problem.log else (np.asarray, np.asarray)
    rest = forward(problem.target) - forward(solution.values)
    scaled = (rest - rest.mean()) * math.sqrt(len(rest) / (len(rest) - len(problem.names)))
    if targets is None:
        targets = [back(forward(solution.values) + rng.choice(scaled, len(rest))) for _ in range(refits)]
    error = float(np.sqrt(np.mean(rest**2)))
    if not math.isfinite(error):
        raise UserError(f"--data: no law of this form goes through the points: {title}")
    named = lambda found: {name: np.float64(value) for name, value in problem.report(found.parameters).items()}
    own = named(solution)  # of NumPy, in which a division by 0 is infinite
    own_derived = derive(own)
    drawn: dict[str, list[float]] = {name: [] for name in own | own_derived}
    low, high = problem.bounds
    inside = np.clip(solution.parameters, low + INSIDE, high - INSIDE)  # at an end a search would not move
    for target in targets:
        starts = [inside, *(problem.start(rng) for _ in range(AGAIN))]
        again = named(solve(problem, target, starts, thorough=False))
        for name, value in (again | derive(again)).items():
            drawn[name].append(value)
    given = lambda values: {name: _interval(value, drawn[name]) for name, value in values.items()}
    doubts = [*_doubts(problem, solution, own), *_unknown(drawn)]
    return Fitted(title, problem, solution, given(own), given(own_derived), drawn, error, tuple(doubts))


def _interval(value: float, drawn: list[float]) -> tuple[float, float, float]:
    """A value with the quantiles of its refits, infinite ones included."""
    known = sorted(x for x in drawn if not math.isnan(x))
    if not known:
        return float(value), math.nan, math.nan
    ends = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="linear" if np.isfinite(known).all() else
                       "inverted_cdf")  # fmt: skip
    return float(value), float(ends[0]), float(ends[1])


def _unknown(drawn: dict[str, list[float]]) -> list[str]:
    shares = {name: np.mean(np.isnan(values)) for name, values in drawn.items() if values}
    return [f"{name}: {share:.0%} of the refits give none" for name, share in shares.items() if share]


def _doubts(problem: Problem, solution: Solution, named: dict[str, float]) -> list[str]:
    """Why the points do not determine a law: parameters at the end of their range, exponents with which nothing falls,
    and parameters whose effects on the values are the same ones."""
    p, (low, high) = solution.parameters, problem.bounds
    ends = [name for name, least, x, most in zip(problem.names, low, p, high, strict=True)
            if x < least + 0.01 or x > most - 0.01]  # fmt: skip
    found = [f"{name} is at the end of its range: the points do not determine it" for name in ends]
    found += [f"{name}={named[name]:.3g} is not above 0: nothing falls with it" for name in EXPONENTS
              if name in named and not named[name] > 0]  # fmt: skip
    size = 1e-5 * np.maximum(np.abs(p), 1e-2)
    effects = np.stack([problem.predict(p + step, problem.columns) - problem.predict(p - step, problem.columns)
                        for step in np.diag(size)], 1)  # fmt: skip
    if problem.log:
        effects = effects / solution.values[:, None]
    effects = np.nan_to_num(effects)  # of a parameter that is too large for a number
    length = np.linalg.norm(effects, axis=0)
    left = np.linalg.svd(effects / np.where(length > 0, length, 1.0), compute_uv=False)
    if not left[-1] > RANK * left[0]:
        found.append("other parameters fit as well: the points do not tell their effects apart")
    return found


# --- what is said ----------------------------------------------------------------------------------------------------


def table(fitted: Fitted) -> str:
    """Parameters and what follows from them, one a line, with their intervals."""
    rows = [*fitted.parameters.items(), *fitted.derived.items()]
    width = max(len(name) for name, _ in rows)
    lines = [f"{fitted.title}: {len(fitted.problem.target)} points"]
    for name, (value, low, high) in rows:
        interval = "" if math.isnan(low) else f"   [{low:.4g}, {high:.4g}]"
        lines.append(f"  {name:<{width}}  {value:>11.5g}{interval}")
    what = "root mean square error of log loss" if fitted.problem.log else "root mean square error"
    return "\n".join([*lines, f"  {what}: {fitted.error:.2g}", *(f"  warning: {doubt}" for doubt in fitted.doubts)])


def as_json(fitted: list[Fitted]) -> str:
    """The text of law.json: for each law its parameters with intervals, and its points with their fitted values."""
    clean = lambda numbers: [float(x) if math.isfinite(x) else None for x in numbers]
    made: list[dict[str, Any]] = []
    for one in fitted:
        points = {name: column.tolist() for name, column in one.problem.columns.items()}
        made.append({
            "law": one.title,
            "parameters": {name: clean(value) for name, value in one.parameters.items()},
            "derived": {name: clean(value) for name, value in one.derived.items()},
            "error": one.error,
            "warnings": list(one.doubts),
            "points": points | {"measured": one.problem.target.tolist(), "fitted": clean(one.solution.values)},
        })  # fmt: skip
    return json.dumps({"level": LEVEL, "laws": made}, indent=1, allow_nan=False) + "\n"
