"""The scaling laws of the literature that `laws.py` fits, and what each needs to know.

A law's power terms are searched for as exp(a − α log(x / x0)), with x0 the geometric mean of the column: a and α are
then nearly independent, which A and α of A·x^−α are not.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moe_jax.errors import UserError
from moe_jax.mixtures import laws
from moe_jax.mixtures.laws import Columns, Fitted, Problem, require_apart, require_different, require_points

CLOSE = 1e-6  # relative difference of weights that are the same


def centre(x: np.ndarray) -> float:
    """The logarithm of the geometric mean."""
    return float(np.log(x).mean())


def terms(places: tuple[int, ...], least: float) -> dict[int, tuple[float, float]]:
    """The ranges of logarithms of terms, by their places: not so small that their gradients vanish."""
    return dict.fromkeys(places, (float(np.log(laws.FLOOR * least)), np.inf))


def factor(a: float, exponent: float = 0.0, middle: float = 0.0) -> float:
    """A of A·x^−α, of a term exp(a − α (log x − middle)). Infinite where it is too large for a number."""
    with np.errstate(over="ignore"):
        return float(np.exp(a + exponent * middle))


# --- model size and tokens -------------------------------------------------------------------------------------------


def chinchilla(columns: Columns) -> Problem:
    """L = E + A / N^α + B / D^β, for N parameters and D tokens. arXiv:2203.15556."""
    names = ("E", "A", "alpha", "B", "beta")
    require_points(columns, len(names))
    for name in ("params", "tokens"):
        require_different(columns, name, 3)
    require_apart(columns, ("params", "tokens"))
    n0, d0, least = centre(columns["params"]), centre(columns["tokens"]), float(columns["loss"].min())

    def predict(p, at):
        e, a, alpha, b, beta = p
        n, d = np.log(at["params"]) - n0, np.log(at["tokens"]) - d0
        return np.exp(e) + np.exp(a - alpha * n) + np.exp(b - beta * d)

    def start(rng):
        e = least * rng.uniform(0.2, 0.95)
        rest = max(least - e, 0.05 * least)
        return np.array([np.log(e), np.log(rest * rng.uniform(0.2, 2)), rng.uniform(0.1, 1.0),
                         np.log(rest * rng.uniform(0.2, 2)), rng.uniform(0.1, 1.0)])  # fmt: skip

    def report(p):
        e, a, alpha, b, beta = map(float, p)
        return {"E": factor(e), "A": factor(a, alpha, n0), "alpha": alpha, "B": factor(b, beta, d0), "beta": beta}

    return Problem(names, columns, columns["loss"], start, predict, report, terms((0, 1, 3), least))


def optimal_growth(parameters: dict[str, float]) -> dict[str, float]:
    """The exponents with which the best N and D grow with compute C ∝ N·D."""
    total = parameters["alpha"] + parameters["beta"]
    return {"params ~ compute^": parameters["beta"] / total, "tokens ~ compute^": parameters["alpha"] / total}


# --- Mixtures of Experts ---------------------------------------------------------------------------------------------


def upcycling(columns: Columns) -> Problem:
    """L = A · D1^−α1 · D2^(−α2 + α3 log D1) + B / N^β + E. D1: tokens of the dense model; D2: after it was upcycled; N:
    parameters. Without a column of N, or with one value in it, its term is part of E. arXiv:2502.03009."""
    sized = "params" in columns and len(np.unique(columns["params"])) > 1
    names = ("A", "alpha1", "alpha2", "alpha3", "E") + (("B", "beta") if sized else ())
    require_points(columns, len(names))
    require_different(columns, "dense_tokens", 2)
    require_different(columns, "tokens", 3)
    if sized:
        require_different(columns, "params", 3, ", or one, or no such column")
    require_apart(columns, ("dense_tokens", "tokens") + (("params",) if sized else ()))
    m1, m2, least = centre(columns["dense_tokens"]), centre(columns["tokens"]), float(columns["loss"].min())
    n0 = centre(columns["params"]) if sized else 0.0

    def predict(p, at):
        d1, d2 = np.log(at["dense_tokens"]) - m1, np.log(at["tokens"]) - m2
        value = np.exp(p[0] - p[1] * d1 - p[2] * d2 + p[3] * d1 * d2) + np.exp(p[4])
        return value + np.exp(p[5] - p[6] * (np.log(at["params"]) - n0)) if sized else value

    def start(rng):
        e = least * rng.uniform(0.05, 0.9)
        rest = max(least - e, 0.05 * least) * rng.uniform(0.3, 1.5)
        first = [np.log(rest), rng.uniform(0, 0.3), rng.uniform(0, 0.3), rng.uniform(-0.005, 0.01), np.log(e)]
        return np.array([*first, np.log(rest * rng.uniform(0.1, 1)), rng.uniform(0.05, 0.5)] if sized else first)

    def report(p):
        c0, c1, c2, alpha3, e, *rest = map(float, p)
        alpha1, alpha2 = c1 + alpha3 * m2, c2 + alpha3 * m1
        with np.errstate(over="ignore"):
            a = float(np.exp(c0 + alpha1 * m1 + alpha2 * m2 - alpha3 * m1 * m2))
        made = {"A": a, "alpha1": alpha1, "alpha2": alpha2, "alpha3": alpha3, "E": factor(e)}
        return made | ({"B": factor(rest[0], rest[1], n0), "beta": rest[1]} if sized else {})

    limits = terms((0, 4, 5) if sized else (0, 4), least)
    return Problem(names, columns, columns["loss"], start, predict, report, limits)


def saturated(experts: np.ndarray, most: float) -> np.ndarray:
    """Ê of 1/Ê = 1/(E − 1 + 1/(1 − 1/E_max)) + 1/E_max: 1 for one expert, and never above E_max."""
    return 1 / (1 / (experts - 1 + 1 / (1 - 1 / most)) + 1 / most)


def inference(columns: Columns) -> Problem:
    """log L = log(A / N^α + B / Ê^β + C / D^γ + F) + d · log N · log Ê, with `saturated` numbers of experts Ê and N
    parameters of the model with one expert a layer. arXiv:2404.02852."""
    names = ("A", "alpha", "B", "beta", "C", "gamma", "F", "d", "E_max")
    require_points(columns, len(names))
    for name in ("params", "experts", "tokens"):
        require_different(columns, name, 3)
    if (columns["experts"] < 1).any():
        raise UserError(f"--data: column experts has {columns['experts'].min():g}, which must be ≥ 1")
    require_apart(columns, ("params", "experts", "tokens"))
    n0, d0, least = centre(columns["params"]), centre(columns["tokens"]), float(columns["loss"].min())

    def predict(p, at):
        a, alpha, b, beta, c, gamma, f, d, most = p
        n, tokens = np.log(at["params"]), np.log(at["tokens"])
        many = np.log(saturated(at["experts"], 1 + np.exp(most)))
        total = np.exp(a - alpha * (n - n0)) + np.exp(b - beta * many) + np.exp(c - gamma * (tokens - d0)) + np.exp(f)
        return total * np.exp(d * n * many)

    def start(rng):
        f = least * rng.uniform(0.2, 0.9)
        rest = lambda: np.log(max(least - f, 0.05 * least) * rng.uniform(0.2, 1))
        power = lambda: rng.uniform(0.1, 0.7)
        return np.array([rest(), power(), rest(), power(), rest(), power(), np.log(f), rng.uniform(-1e-3, 1e-3),
                         np.log(rng.uniform(1, 10) * columns["experts"].max())])  # fmt: skip

    def report(p):
        a, alpha, b, beta, c, gamma, f, d, most = map(float, p)
        return {"A": factor(a, alpha, n0), "alpha": alpha, "B": factor(b), "beta": beta, "C": factor(c, gamma, d0),
                "gamma": gamma, "F": factor(f), "d": d, "E_max": 1 + factor(most)}  # fmt: skip

    largest = float(columns["experts"].max())  # above a thousand times as many, E_max changes nothing
    limits = terms((0, 2, 4, 6), least) | {8: (-2.3, float(np.log(1e3 * largest)))}
    return Problem(names, columns, columns["loss"], start, predict, report, limits)


def dense_and_moe(columns: Columns) -> Problem:
    """L = E + a / C^α for dense models and E + b / C^β for models with experts, of training compute C.

    They share E. The law is of this library; arXiv:2112.10684 compares the compute at equal loss, which is `saving`.
    """
    names = ("E", "a", "alpha", "b", "beta")
    require_points(columns, len(names))
    dense = columns["model"] == "dense"
    if unknown := sorted(set(columns["model"].tolist()) - {"dense", "moe"}):
        raise UserError(f"--data: column model has {unknown[0]!r}, which must be dense or moe")
    for kind, rows in (("dense", dense), ("moe", ~dense)):
        require_different({"compute": columns["compute"][rows]}, "compute", 3, f" of {kind} models")
    c0, least = centre(columns["compute"]), float(columns["loss"].min())

    def predict(p, at):
        e, a, alpha, b, beta = p
        c = np.log(at["compute"]) - c0
        return np.exp(e) + np.where(at["model"] == "dense", np.exp(a - alpha * c), np.exp(b - beta * c))

    def start(rng):
        e = least * rng.uniform(0.1, 0.95)
        rest = lambda: np.log(max(least - e, 0.05 * least) * rng.uniform(0.5, 2))
        return np.array([np.log(e), rest(), rng.uniform(0.05, 0.6), rest(), rng.uniform(0.05, 0.6)])

    def report(p):
        e, a, alpha, b, beta = map(float, p)
        return {"E": factor(e), "a": factor(a, alpha, c0), "alpha": alpha, "b": factor(b, beta, c0), "beta": beta}

    return Problem(names, columns, columns["loss"], start, predict, report, terms((0, 1, 3), least))


def saving(parameters: dict[str, float], compute: float) -> float:
    """How many times `compute` a dense model needs for the loss of a model with experts that has had `compute`."""
    with np.errstate(all="ignore"):
        above = np.log(parameters["b"]) - parameters["beta"] * np.log(compute)
        return float(np.exp((np.log(parameters["a"]) - above) / parameters["alpha"]) / compute)


# --- mixtures --------------------------------------------------------------------------------------------------------


def same(weights: np.ndarray) -> np.ndarray:
    """Weights with those that differ by 1e-6 of them or less made equal, such as 0.3 and 0.1 + 0.2."""
    there, where = np.unique(weights, return_inverse=True)
    first = np.concatenate([[True], np.diff(there) > CLOSE * there[1:]])
    return np.round(there[first], 12)[np.cumsum(first) - 1][where]


def weighted(columns: Columns) -> Problem:
    """L = β_p / N^α + L∞ of one domain, for each of its weights p in the mixture, which changes the factor alone.
    arXiv:2302.09650."""
    domain, columns = str(columns["domain"][0]), columns | {"weight": same(columns["weight"])}
    shares = np.unique(columns["weight"])
    names = ("L_inf", "alpha", *(f"beta at {share:.9g}" for share in shares))
    require_points(columns, len(names), f" for domain {domain}")
    require_different(columns, "params", 3, f" for domain {domain}")
    n0, least = centre(columns["params"]), float(columns["loss"].min())

    def predict(p, at):
        return np.exp(p[0]) + np.exp(p[2:][np.searchsorted(shares, at["weight"])] - p[1] * (np.log(at["params"]) - n0))

    def start(rng):
        e = least * rng.uniform(0.1, 0.95)
        rest = np.log(max(least - e, 0.05 * least) * rng.uniform(0.5, 2, len(shares)))
        return np.array([np.log(e), rng.uniform(0.05, 0.8), *rest])

    def report(p):
        factors = {f"beta at {share:.9g}": factor(b, p[1], n0) for share, b in zip(shares, p[2:], strict=True)}
        return {"L_inf": factor(p[0]), "alpha": float(p[1])} | factors

    limits = terms((0, *range(2, len(names))), least)
    return Problem(names, columns, columns["loss"], start, predict, report, limits)


def effective_shares(parameters: dict[str, float]) -> dict[str, float]:
    """f(p) of N_eff = f(p)·N: the parameters that work for a domain at weight p, relative to its largest weight."""
    factors = {name.removeprefix("beta at "): b for name, b in parameters.items() if name.startswith("beta at ")}
    largest = factors[max(factors, key=float)]
    with np.errstate(all="ignore"):
        return {f"f({share})": float(np.float64(b / largest) ** (-1 / parameters["alpha"]))
                for share, b in factors.items()}  # fmt: skip


def rises(columns: Columns) -> Problem:
    """rise = a·R^s + b of the general loss, after some tokens of continued training with share R of the new domain."""
    where = f" at {columns['tokens'][0]:g} tokens"
    names = ("a", "s", "b")
    require_points(columns, len(names), where)
    require_different(columns, "ratio", 3, where)
    if (columns["ratio"] > 1).any():
        raise UserError(f"--data: column ratio has {columns['ratio'].max():g}, which must be ≤ 1")
    low, high = float(columns["rise"].min()), float(columns["rise"].max())

    def predict(p, at):
        return np.exp(p[0]) * at["ratio"] ** np.exp(p[1]) + p[2]

    def start(rng):
        return np.array([np.log(max(high - low, 1e-6) * rng.uniform(0.5, 2)), np.log(rng.uniform(0.3, 4)), low])

    report = lambda p: {"a": factor(p[0]), "s": factor(p[1]), "b": float(p[2])}
    size = max(high - low, 1e-6)
    limits = {0: (float(np.log(laws.FLOOR * size)), float(np.log(1e3 * size))), 1: (float(np.log(0.01)), 4.6)}
    return Problem(names, columns, columns["rise"], start, predict, report, limits, log=False)


CRITICAL = ("b0", "b1", "s")  # parameters of `critical_ratios`


def critical_ratio(parameters: dict[str, float], tolerance: float) -> float:
    """The largest share R at which the general loss rises by at most `tolerance`, in [0, 1]."""
    left = (tolerance - parameters["b"]) / parameters["a"]
    with np.errstate(all="ignore"):
        return 0.0 if left <= 0 else min(float(np.float64(left) ** (1 / parameters["s"])), 1.0)


def critical_ratios(columns: Columns) -> Problem:
    """R = b0 + b1·T^s: critical ratios by tokens T of continued training, for one model. arXiv:2407.17467."""
    require_points(columns, len(CRITICAL), ": critical ratios between 0 and 1, one for each number of tokens")
    t0, ratios = centre(columns["tokens"]), columns["ratio"]

    def predict(p, at):
        return p[0] + p[1] * np.exp(p[2] * (np.log(at["tokens"]) - t0))

    def start(rng):
        s = rng.choice([-1, 1]) * rng.uniform(0.05, 1)
        design = np.stack([np.ones(len(ratios)), np.exp(s * (np.log(columns["tokens"]) - t0))], 1)
        return np.array([*np.linalg.lstsq(design, ratios, rcond=None)[0], s])

    report = lambda p: {"b0": float(p[0]), "b1": float(p[1]) * factor(0.0, -float(p[2]), t0), "s": float(p[2])}
    return Problem(CRITICAL, columns, ratios, start, predict, report, {}, log=False)


# --- from a file to fits ---------------------------------------------------------------------------------------------


class Asked(NamedTuple):
    """The settings of a fit. refits: for intervals. tolerance: rise of the general loss, in nats, of `cmr`."""

    refits: int = 200
    seed: int = 0
    tolerance: float = 0.05


def _fit(problem: Problem, title: str, asked: Asked, derive=lambda parameters: {}) -> Fitted:
    return laws.fit(problem, title, asked.refits, asked.seed, derive)


def fit_chinchilla(path: Path, asked: Asked) -> list[Fitted]:
    problem = chinchilla(laws.read_points(path, ("params", "tokens", "loss")))
    return [_fit(problem, "L = E + A/params^alpha + B/tokens^beta", asked, optimal_growth)]


def fit_upcycling(path: Path, asked: Asked) -> list[Fitted]:
    problem = upcycling(laws.read_points(path, ("dense_tokens", "tokens", "loss"), ("params",)))
    sized = " + B/params^beta" if "B" in problem.names else ""
    title = f"L = A dense_tokens^-alpha1 tokens^(-alpha2 + alpha3 log dense_tokens){sized} + E"
    return [_fit(problem, title, asked)]


def fit_inference(path: Path, asked: Asked) -> list[Fitted]:
    problem = inference(laws.read_points(path, ("params", "experts", "tokens", "loss")))
    title = "log L = log(A/params^alpha + B/Ê^beta + C/tokens^gamma + F) + d log params log Ê"
    return [_fit(problem, title, asked)]


def fit_dense_and_moe(path: Path, asked: Asked) -> list[Fitted]:
    problem = dense_and_moe(laws.read_points(path, ("model", "compute", "loss"), texts=("model",)))
    computes = np.unique(problem.columns["compute"][problem.columns["model"] == "moe"])
    derive = lambda parameters: {f"saving at {c:.3g}": saving(parameters, c) for c in computes}
    return [_fit(problem, "L = E + a/compute^alpha (dense), E + b/compute^beta (moe)", asked, derive)]


def fit_weighted(path: Path, asked: Asked) -> list[Fitted]:
    columns = laws.read_points(path, ("domain", "weight", "params", "loss"), texts=("domain",))
    require_points(columns, 3)
    parts = [_rows(columns, columns["domain"] == domain) for domain in dict.fromkeys(columns["domain"].tolist())]
    problems = [weighted(part) for part in parts]
    return [_fit(problem, f"{problem.columns['domain'][0]}: L = beta_p/params^alpha + L_inf", asked, effective_shares)
            for problem in problems]  # fmt: skip


def fit_critical(path: Path, asked: Asked) -> list[Fitted]:
    columns = laws.read_points(path, ("ratio", "tokens", "rise"), signed=("rise",))
    require_points(columns, 3)
    problems = [rises(_rows(columns, columns["tokens"] == t)) for t in np.unique(columns["tokens"])]
    derive = lambda parameters: {"critical ratio": critical_ratio(parameters, asked.tolerance)}
    made = [laws.fit(one, f"at {one.columns['tokens'][0]:g} tokens: rise = a ratio^s + b", asked.refits,
                     (asked.seed, i), derive) for i, one in enumerate(problems)]  # fmt: skip
    found = [one for one in made if 0 < one.derived["critical ratio"][0] < 1]
    if len(found) > 3:  # else nothing is left to check the three parameters with
        tokens = np.array([one.problem.columns["tokens"][0] for one in found])
        ratios = np.array([one.derived["critical ratio"][0] for one in found])
        targets = list(np.array([one.drawn["critical ratio"] for one in found]).T)
        law = critical_ratios({"tokens": tokens, "ratio": ratios})
        made.append(laws.fit(law, "critical ratio = b0 + b1 tokens^s", 0, asked.seed, lambda parameters: {}, targets))
    return made


def _rows(columns: Columns, chosen: np.ndarray) -> Columns:
    return {name: column[chosen] for name, column in columns.items()}


FORMS: dict[str, Callable[[Path, Asked], list[Fitted]]] = {
    "chinchilla": fit_chinchilla,
    "upcycling": fit_upcycling,
    "inference": fit_inference,
    "cmr": fit_critical,
    "mnmt": fit_weighted,
    "efficient-lm": fit_dense_and_moe,
}
