"""Draws mixtures of sources to train on, as RegMix does, and writes and reads them, one a line.

Letters: M sources, n mixtures.
"""

import json
import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from moe_jax.errors import FileError, UserError, nearest, shown

TEMPERATURE = 0.5  # power of the prior's shares
STRENGTHS = np.geomspace(0.1, 5.0, 15)  # of the Dirichlet distributions: small ones are near the corners
FLOOR = 2e-4  # smaller shares become 0, and the others multiples of it
TRIES = 100  # draws for each mixture that is wanted


class Prior(NamedTuple):
    """The text of each source. shares: of all text, sum 1. most: largest shares of a mixture, all ≤ 1."""

    names: tuple[str, ...]
    shares: Float[np.ndarray, " M"]
    most: Float[np.ndarray, " M"]


class Mixture(NamedTuple):
    """A named mixture. weights: shares by source, sum 1."""

    name: str
    weights: dict[str, float]


# --- what the user names ---------------------------------------------------------------------------------------------


def numbers(text: str, flag: str, example: str) -> dict[str, float]:
    """The numbers of `a:1,b:2.5` by name, or of the JSON object in a file whose name ends in .json. Raises UserError.

    example: what the flag could be, for the error message.
    """
    found: list[tuple[str, object]]
    if text.endswith(".json"):
        read = read_json(Path(text))
        if not isinstance(read, dict):
            raise UserError(f"{flag}={text}: holds no object of names and numbers; for example {example}")
        found = list(read.items())
    else:
        pairs = [part.rpartition(":") for part in text.split(",")]
        if bad := [part for part, (name, _, _) in zip(text.split(","), pairs, strict=True) if not name.strip()]:
            raise UserError(f"{flag}: {shown(bad[0])} is not NAME:NUMBER; for example {flag}={example}")
        found = [(name.strip(), value) for name, _, value in pairs]
    made: dict[str, float] = {}
    for name, value in found:
        number = as_number(value)
        if number is None or number <= 0:
            raise UserError(f"{flag}: {shown(name)} has {shown(value)}, which must be a finite number > 0")
        if name in made:
            raise UserError(f"{flag}: names {shown(name)} twice")
        made[name] = number
    return made


def as_number(value: object) -> float | None:
    """A finite number, given as one or as its text; else None."""
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def make_prior(counts: dict[str, float], epochs: float, tokens: float | None = None) -> Prior:
    """The prior of sources with these counts of tokens, or shares of all text. Raises UserError.

    epochs: how often a source may be read at most. tokens: of a training; by default as many as there are, so that
    RegMix's bound of `epochs` times the source's share holds.
    """
    if not (0 < epochs < math.inf):
        raise UserError(f"--epochs={epochs:g}: must be > 0, nearest valid: 15")
    if tokens is not None and not (0 < tokens < math.inf):
        raise UserError(f"--tokens={tokens:g}: must be > 0")
    if len(counts) < 2:
        raise UserError(f"--prior: a mixture has two sources or more, not {len(counts)}")
    there = np.array(list(counts.values()))
    total = float(there.sum())
    with np.errstate(over="ignore"):  # of few tokens, which every source has more than once
        most = np.minimum(epochs * there / (total if tokens is None else tokens), 1.0)
    if not most.sum() >= 1.0:
        least = 1.0 if tokens is None else tokens / total
        raise UserError(f"--epochs={epochs:g}: all text together is not enough; nearest valid: {least:.3g}")
    return Prior(tuple(counts), there / total, most)


# --- drawing ---------------------------------------------------------------------------------------------------------


def dirichlet(alpha: Float[np.ndarray, "n M"], rng: np.random.Generator) -> Float[np.ndarray, "n M"]:
    """One draw from each of n Dirichlet distributions, also with α so small that every gamma variate would be 0."""
    logs = np.log(rng.standard_gamma(alpha + 1)) + np.log1p(-rng.random(alpha.shape)) / alpha
    weights = np.exp(logs - logs.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


def rounded(weights: Float[np.ndarray, "n M"], floor: float = FLOOR) -> Float[np.ndarray, "n M"]:
    """Shares without those below `floor`, the others multiples of it but for a last division by their sum."""
    kept = np.where(weights < floor, 0.0, weights)
    kept = np.round(kept / kept.sum(1, keepdims=True) / floor)
    return kept / kept.sum(1, keepdims=True)


def settled(weights: Float[np.ndarray, " M"], most: Float[np.ndarray, " M"]) -> Float[np.ndarray, " M"]:
    """Shares as multiples of FLOOR, so that none is between 0 and it, at most `most`: rounded down, and what is left
    goes to those that have lost most. Unchanged where the bounds leave no room for that."""
    exact = weights / FLOOR
    units, limit = np.floor(exact + 1e-6), np.floor(most / FLOOR + 1e-6)
    for i in np.argsort(units - exact, kind="stable"):
        units[i] += units.sum() < round(1 / FLOOR) and units[i] < limit[i]
    return units / units.sum() if units.sum() == round(1 / FLOOR) else weights


def draw(prior: Prior, count: int, rng: np.random.Generator, tries: int = TRIES) -> Float[np.ndarray, "n M"]:
    """Different mixtures around the prior, at most `count`, within the prior's bounds: RegMix's design.

    The prior's shares to the power TEMPERATURE, normalised, times one of STRENGTHS at random are the parameters of a
    Dirichlet distribution. There are up to `tries` draws for each mixture; those outside the bounds do not count. They
    hold after the rounding too. arXiv:2407.01492 and its mixture_config/synthesize_mixture.py.
    """
    tempered = prior.shares**TEMPERATURE
    tempered = tempered / tempered.sum()
    found, left = np.empty((0, len(prior.shares))), tries * count
    while left > 0 and len(found) < count:
        block = min(left, max(2 * count, 1024))
        left -= block
        drawn = rounded(dirichlet(rng.choice(STRENGTHS, (block, 1)) * tempered, rng))
        inside = drawn[(drawn <= prior.most + 1e-9).all(1)]
        found = np.concatenate([found, inside])
        _, first = np.unique(np.round(found, 7), axis=0, return_index=True)
        found = found[np.sort(first)]
    return found[:count]


def sample(prior: Prior, count: int, seed: int) -> list[Mixture]:
    """`count` different mixtures, the same for the same seed. Raises UserError if the bounds leave too few."""
    found = draw(prior, count, np.random.default_rng(seed))
    if len(found) < count:
        rule = f"{TRIES * count:,} draws hold {len(found)} different mixtures within it, and --count={count} are wanted"
        raise UserError(f"--epochs: {rule}; raise --epochs or lower --count")
    return named(prior.names, found)


def named(names: Sequence[str], weights: Float[np.ndarray, "n M"], first: int = 0, word: str = "mix") -> list[Mixture]:
    """Mixtures with the names mix000, mix001, … from number `first` on."""
    return [
        Mixture(f"{word}{first + i:03d}", {n: round(float(w), 9) for n, w in zip(names, row, strict=True)})
        for i, row in enumerate(weights)
    ]


# --- files -----------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> object:
    """The content of a JSON file. Raises UserError where there is none, FileError where it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_object)
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None
    except FileError as e:
        raise FileError(f"{path}: {e}") from None
    except (ValueError, RecursionError) as e:
        raise FileError(f"{path}: is not JSON: {str(e)[:200]}") from None


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    names = [name for name, _ in pairs]
    if twice := [name for name in names if names.count(name) > 1] if len(set(names)) < len(names) else []:
        raise FileError(f"has the key {shown(twice[0])} twice")
    return dict(pairs)


def lines(mixtures: Iterable[Mixture]) -> str:
    """The text of a file of mixtures."""
    return "".join(json.dumps(mixture._asdict()) + "\n" for mixture in mixtures)


def text_of(path: Path, flag: str = "") -> str:
    """The text of a file, with or without a byte order mark. Raises UserError, whose path follows `flag`, FileError."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as e:
        raise UserError(f"{flag}{path}: cannot be read ({e.strerror})") from None
    except ValueError:
        raise FileError(f"{path}: is not a text in UTF-8") from None


def read(path: Path) -> list[Mixture]:
    """The mixtures of a file that `lines` made. Weights are divided by their sum. Raises UserError, FileError."""
    text = text_of(path)
    found: dict[str, Mixture] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise FileError(f"{where}: is not JSON") from None
        if not (isinstance(row, dict) and isinstance(row.get("name"), str) and isinstance(row.get("weights"), dict)):
            raise FileError(f'{where}: is not an object {{"name": "mix000", "weights": {{"a": 0.5, "b": 0.5}}}}')
        name = row["name"]
        if name in found or not name or not name.replace("_", "").replace("-", "").isalnum():
            rule = "is there twice" if name in found else "must be letters, digits, - and _: it becomes a folder"
            raise FileError(f"{where}: name {shown(name)} {rule}")
        found[name] = Mixture(name, normal(row["weights"], where))
    if not found:
        raise FileError(f"{path}: holds no mixture")
    names = set(next(iter(found.values())).weights)
    for mixture in found.values():
        if extra := sorted(set(mixture.weights) ^ names):
            raise FileError(f"{path}: {mixture.name}: source {extra[0]!r} is not in all mixtures; "
                            f"{nearest(extra[0], names - set(extra))}")  # fmt: skip
    return list(found.values())


def normal(weights: dict, where: str) -> dict[str, float]:
    """Weights by source, divided by their sum. Raises FileError unless they are numbers ≥ 0, not all 0."""
    made = {}
    for name, value in weights.items():
        number = None if isinstance(value, str) else as_number(value)
        if number is None or number < 0:
            raise FileError(f"{where}: weight {shown(value)} of {shown(name)} must be a number ≥ 0")
        made[name] = number
    if not any(made.values()):
        raise FileError(f"{where}: weights must not all be 0")
    total = sum(map(Fraction, made.values()))  # exact, as in `config.shares`, which imports JAX
    return {name: float(Fraction(value) / total) for name, value in made.items()}
