"""A Gaussian process over mixtures and the cost of a run, and what a run would tell of the best loss.

Letters: n runs, M sources, c candidates.

The kernel is k0(x, x') + (1 − s)(1 − s')(1 + s s')^q k1(x, x') with Matérn-5/2 kernels k0 and k1 and the fidelity s: 1
is the training that is aimed at, smaller values are cheaper ones. It is BoTorch's "linear truncated" kernel, which
ADMIRE-BayesOpt uses. Its mean is a constant and, where costs differ, a slope on 1 − s: a small model is worse on all
mixtures, which says nothing of any of them.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import linalg, optimize

SQRT5 = 5.0**0.5
NOISE = 1e-3  # where the search for the standard deviation of the noise begins, of standardised losses


class Kernel(NamedTuple):
    """Parameters. length0, length1: of each source. scale0, scale1: standard deviations of k0 and k1. noise: too."""

    length0: Float[np.ndarray, " M"]
    scale0: float
    length1: Float[np.ndarray, " M"]
    scale1: float
    power: float
    noise: float


def matern(x: Float[np.ndarray, "n M"], y: Float[np.ndarray, "c M"], length, scale) -> Float[np.ndarray, "n c"]:
    """scale² (1 + √5 r + 5/3 r²) exp(−√5 r), where r is the distance with each source divided by its length."""
    a, b = x / length, y / length
    square = np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T, 0.0)
    r = SQRT5 * np.sqrt(square)
    return scale**2 * (1 + r + r**2 / 3) * np.exp(-r)


def truncated(s: Float[np.ndarray, " n"], t: Float[np.ndarray, " c"], power: float) -> Float[np.ndarray, "n c"]:
    """(1 − s)(1 − t)(1 + s t)^power for each pair."""
    return (1 - s)[:, None] * (1 - t) * (1 + s[:, None] * t) ** power


def covariance(kernel: Kernel, x, s, y, t) -> Float[np.ndarray, "n c"]:
    """The kernel between runs (x, s) and (y, t), without noise."""
    near = matern(x, y, kernel.length0, kernel.scale0)
    if not kernel.scale1:
        return near
    return near + truncated(s, t, kernel.power) * matern(x, y, kernel.length1, kernel.scale1)


class Process(NamedTuple):
    """A Gaussian process that has seen runs. mean, slope, spread: losses are standardised inside by mean +
    slope (1 − s) and spread."""

    kernel: Kernel
    x: Float[np.ndarray, "n M"]
    s: Float[np.ndarray, " n"]
    factor: Float[np.ndarray, "n n"]
    weights: Float[np.ndarray, " n"]
    mean: float
    slope: float
    spread: float

    def joint(self, x, s) -> tuple[Float[np.ndarray, " c"], Float[np.ndarray, "c c"]]:
        """Mean and covariance of the losses of runs (x, s), without noise."""
        across = covariance(self.kernel, self.x, self.s, x, s)
        solved = linalg.solve_triangular(self.factor, across, lower=True)
        left = covariance(self.kernel, x, s, x, s) - solved.T @ solved
        return self._level(s) + self.spread * (across.T @ self.weights), self.spread**2 * left

    def mean_of(self, x, s) -> Float[np.ndarray, " c"]:
        """The expected losses of runs (x, s)."""
        return self._level(s) + self.spread * (covariance(self.kernel, x, s, self.x, self.s) @ self.weights)

    def _level(self, s) -> Float[np.ndarray, " c"]:
        return self.mean + self.slope * (1 - s)

    def correlation(self, x, level: float) -> Float[np.ndarray, " c"]:
        """The correlation of what runs at fidelity `level` would measure, noise included, with their losses at 1."""
        low, high = np.full(len(x), level), np.ones(len(x))
        solved = [linalg.solve_triangular(self.factor, covariance(self.kernel, self.x, self.s, x, s), lower=True)
                  for s in (low, high)]  # fmt: skip
        own = self.kernel.scale0**2 + truncated_diagonal(low, self.kernel.power) * self.kernel.scale1**2
        left = np.maximum(own - (solved[0] ** 2).sum(0), 0.0) + self.kernel.noise**2
        last = np.maximum(self.kernel.scale0**2 - (solved[1] ** 2).sum(0), 1e-12)
        return (self.kernel.scale0**2 - (solved[0] * solved[1]).sum(0)) / np.sqrt(left * last)


def truncated_diagonal(s: Float[np.ndarray, " n"], power: float) -> Float[np.ndarray, " n"]:
    """The values of `truncated` for s = t."""
    return (1 - s) ** 2 * (1 + s**2) ** power


# --- fitting ---------------------------------------------------------------------------------------------------------


def _unpack(p: np.ndarray, sources: int, several: bool) -> Kernel:
    e = np.exp(p)
    length0, scale0, noise = e[:sources], float(e[sources]), float(e[sources + 1])
    if not several:
        return Kernel(length0, scale0, length0, 0.0, 1.0, noise)
    rest = e[sources + 2 :]
    return Kernel(length0, scale0, rest[:sources], float(rest[sources]), float(rest[sources + 1]), noise)


def _matern_gradients(x, length, scale) -> tuple[np.ndarray, np.ndarray]:
    """The matrix of `matern`, and its derivatives by the logarithm of each length `[M, n, n]`."""
    apart = ((x[:, None, :] - x[None, :, :]) / length) ** 2  # [n, n, M]
    r = SQRT5 * np.sqrt(apart.sum(-1))
    decay = scale**2 * np.exp(-r)
    return decay * (1 + r + r**2 / 3), np.moveaxis(apart * (5 / 3 * decay * (1 + r))[..., None], -1, 0)


def _objective(p, x, s, y, several, typical) -> tuple[float, np.ndarray]:
    """The negative logarithm of likelihood times priors, and its gradient."""
    sources = x.shape[1]
    kernel = _unpack(p, sources, several)
    k0, lengths0 = _matern_gradients(x, kernel.length0, kernel.scale0)
    parts = [*lengths0, 2 * k0, 2 * kernel.noise**2 * np.eye(len(y))]
    total = k0 + kernel.noise**2 * np.eye(len(y))
    if several:
        k1, lengths1 = _matern_gradients(x, kernel.length1, kernel.scale1)
        cut = truncated(s, s, kernel.power)
        by_power = kernel.power * np.log1p(s[:, None] * s) * cut * k1
        parts += [*(cut * one for one in lengths1), 2 * cut * k1, by_power]
        total = total + cut * k1
    try:
        factor = linalg.cholesky(total + 1e-8 * np.eye(len(y)), lower=True)
    except linalg.LinAlgError:
        return 1e10, np.zeros_like(p)
    inverse = linalg.cho_solve((factor, True), np.eye(len(y)))
    weights = inverse @ y
    outer = np.outer(weights, weights) - inverse
    value = 0.5 * y @ weights + np.log(np.diag(factor)).sum()
    gradient = np.array([-0.5 * (outer * part).sum() for part in parts])
    # Without priors a source that few runs vary would get any length: logarithms are within about √2 of typical.
    return value + 0.5 * ((p - typical) ** 2 / 2).sum(), gradient + (p - typical) / 2


def _line(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> tuple[float, float]:
    """Intercept and slope of the line of least squares through points; slope 0 if all x are equal."""
    away = x - x.mean()
    slope = float(away @ y) / (float(away @ away) or 1.0)
    return float(y.mean() - slope * x.mean()), slope


def fit(x: Float[np.ndarray, "n M"], s: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> Process:
    """A process whose parameters are the most probable, given losses y of runs with features x and fidelities s.

    Each source has lengths of its own; priors on their logarithms keep them near the spread of its features. k1 and its
    parameters are fitted only if some s is below 1.
    """
    sources, several = x.shape[1], bool((s < 1).any())
    mean, slope = _line(1 - s, y) if several else (float(y.mean()), 0.0)
    y = y - mean - slope * (1 - s)
    spread = float(y.std()) or 1.0
    typical_length = np.log(np.maximum(x.std(0), 1e-3) * 2 * sources**0.5)
    typical = np.concatenate([typical_length, [0.0, np.log(NOISE)]])
    if several:
        typical = np.concatenate([typical, typical_length, [0.0, 0.0]])
    bounds = [(value - 6, value + 6) for value in typical]
    found = optimize.minimize(
        _objective, typical + 0.01, (x, s, y / spread, several, typical), jac=True, method="L-BFGS-B",
        bounds=bounds, options={"maxiter": 200},
    )  # fmt: skip
    kernel = _unpack(found.x, sources, several)
    total = covariance(kernel, x, s, x, s) + (kernel.noise**2 + 1e-8) * np.eye(len(y))
    factor = linalg.cholesky(total, lower=True)
    return Process(kernel, x, s, factor, linalg.cho_solve((factor, True), y / spread), mean, slope, spread)
