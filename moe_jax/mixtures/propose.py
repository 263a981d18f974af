"""Proposes mixtures from a fit: the best, the next round of a search, or the run that tells most for its cost.

Letters: n runs or mixtures, M sources.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import linalg
from scipy.special import log_ndtr

from moe_jax.errors import UserError
from moe_jax.mixtures import design, gaussian
from moe_jax.mixtures.design import Prior
from moe_jax.mixtures.measured import Fit
from moe_jax.mixtures.surrogates import SURROGATES, Predict, logs

DRAWN = 20_000  # candidate mixtures
AVERAGED = 128  # of the best candidates, in RegMix's answer
NEAR = (0.5, 0.25, 0.1, 0.03)  # shares of another mixture in candidates around the best
BEST = 8  # mixtures around which more candidates are
CONSIDERED = 200  # candidates of an acquisition, whose joint covariance is needed
SAMPLES = 16  # of the best loss
GRID = np.linspace(-7.0, 7.0, 281)  # standard deviations over which an entropy is integrated


class Proposal(NamedTuple):
    """Mixtures with their predicted losses. known: the lowest prediction for a mixture that was measured."""

    weights: Float[np.ndarray, "n M"]
    predicted: Float[np.ndarray, " n"]
    known: float


def prior_of(fit: Fit) -> Prior:
    """The prior for a fit without one: the mean of its mixtures, without bounds."""
    mean = np.maximum(fit.weights.mean(0), design.FLOOR)
    return Prior(fit.sources, mean / mean.sum(), np.ones(len(mean)))


def process_of(fit: Fit) -> gaussian.Process:
    """The Gaussian process of a fit. The fidelity of a run is its cost, relative to the largest."""
    fidelity = np.array([run.cost for run in fit.runs]) / fit.levels[-1]
    return gaussian.fit(logs(fit.weights), fidelity, fit.losses)


def at_full_cost(model: gaussian.Process) -> Predict:
    """The prediction of a process for runs of the largest cost."""
    return lambda w: model.mean_of(logs(w), np.ones(len(w)))


def predictor(fit: Fit) -> Predict:
    """The prediction of a fit, at the largest cost if its runs have several."""
    if len(fit.levels) == 1:
        return SURROGATES[fit.surrogate](fit.weights, fit.losses, fit.seed)
    return at_full_cost(process_of(fit))


def draws(prior: Prior, rng: np.random.Generator) -> Float[np.ndarray, "n M"]:
    """DRAWN candidates around the prior, or fewer where its bounds are narrow. Raises UserError if there is none."""
    found = design.draw(prior, DRAWN, rng, tries=3)
    if not len(found):
        raise UserError("--epochs: none of the mixtures that were drawn is within it; raise it")
    return found


def pool(fit: Fit, prior: Prior, drawn: Float[np.ndarray, "n M"], predict: Predict, rng) -> Proposal:
    """Candidates within the prior's bounds, the best first: `drawn`, measured mixtures, and mixtures between the best
    of both and others, ever closer to the best."""
    there = np.concatenate([fit.weights[(fit.weights <= prior.most + 1e-6).all(1)], drawn])
    predicted = predict(there)
    for share in NEAR:
        best = there[np.argsort(predicted, kind="stable")[:BEST]]
        other = there[rng.integers(len(there), size=len(drawn) // 8 + 1)]
        near = (1 - share) * best[rng.integers(len(best), size=len(other))] + share * other
        there, predicted = np.concatenate([there, near]), np.concatenate([predicted, predict(near)])
    order = np.argsort(predicted, kind="stable")
    return Proposal(there[order], predicted[order], float(predict(fit.weights).min()))


def _first(predict: Predict, found: Proposal, prior: Prior, *better: Float[np.ndarray, " M"]) -> np.ndarray:
    """The first of some mixtures that is predicted to be no worse than the measured ones: of `better`, and of the best
    candidate, with rounded shares and as it is."""
    options = [design.settled(w, prior.most) for w in (*better, found.weights[0])]
    good = predict(np.array(options)) <= found.known
    return options[int(np.argmax(good))] if good.any() else found.weights[0]


def best(fit: Fit, prior: Prior) -> Proposal:
    """RegMix's answer: the mean of the AVERAGED best draws. Where this is predicted to be worse than a measured
    mixture, it is the best candidate instead."""
    predict, rng = predictor(fit), np.random.default_rng(fit.seed)
    drawn = draws(prior, rng)
    mean = drawn[np.argsort(predict(drawn), kind="stable")[:AVERAGED]].mean(0)
    found = pool(fit, prior, drawn, predict, rng)
    chosen = _first(predict, found, prior, mean)[None]
    return Proposal(chosen, predict(chosen), found.known)


def around(fit: Fit, prior: Prior, count: int) -> Proposal:
    """CLIMB's next round: the best candidate, and count − 1 others at random from the best hundredth of the draws, or
    from the best count − 1 of them if these are more.

    A mixture that was measured comes again only if it is predicted to be the best.
    """
    predict, rng = predictor(fit), np.random.default_rng(fit.seed)
    drawn = draws(prior, rng)
    found = pool(fit, prior, drawn, predict, rng)
    few = max(len(drawn) // 100, count - 1)
    top = drawn[np.argsort(predict(drawn), kind="stable")[: few + len(fit.runs) + 1]]
    first = _first(predict, found, prior)[None]
    others = np.concatenate([fit.weights, first])
    top = top[(np.abs(top[:, None] - others).sum(-1) > 1e-3).all(1)][:few]
    if len(top) < count - 1:
        raise UserError(f"--count={count}: there are fewer different candidates; nearest valid: {len(top) + 1}")
    others = top[np.sort(rng.choice(len(top), count - 1, replace=False))]
    chosen = np.concatenate([first, others])
    return Proposal(chosen, predict(chosen), found.known)


# --- acquisition -----------------------------------------------------------------------------------------------------


class Next(NamedTuple):
    """The next run. level: its place among the costs, from 0. gain: expected information on the best loss, in nats,
    which are not those of a loss. predicted: its loss at the largest cost."""

    weights: Float[np.ndarray, " M"]
    level: int
    gain: float
    predicted: float


def information(gamma: Float[np.ndarray, "b c"], correlation: Float[np.ndarray, " c"]) -> Float[np.ndarray, " c"]:
    """Mutual information, in nats, of a measurement and the best loss: max-value entropy search.

    gamma: (μ − f*)/σ of each candidate's loss at the largest cost, for each sample f* of the best loss. correlation: of
    that loss with the measurement. Given that no loss is below f*, the standardised measurement z has the density
    φ(z) Φ((γ + ρz)/√(1 − ρ²)) / Φ(γ). How much less its entropy is than that of φ is integrated numerically. At ρ = 1
    it is γφ(γ)/(2Φ(γ)) − log Φ(γ), the acquisition of arXiv:1703.01968.
    """
    rho = np.clip(correlation, 0.0, 0.9999)
    z = GRID
    step = z[1] - z[0]
    own = -0.5 * z**2 - 0.5 * np.log(2 * np.pi)
    gain = np.zeros(gamma.shape[1])
    for row in gamma:
        inside = (row[:, None] + rho[:, None] * z) / np.sqrt(1 - rho**2)[:, None]
        ratio = log_ndtr(inside) - log_ndtr(row)[:, None]  # logarithm of the densities' ratio
        gain += (np.exp(own + ratio) * (own + ratio)).sum(1) * step
    return gain / len(gamma) + 0.5 * np.log(2 * np.pi * np.e)


def acquire(fit: Fit, prior: Prior, costs: Sequence[float] | None) -> Next:
    """ADMIRE's next run: the mixture and cost that tell most of the best loss for their cost.

    costs: of the levels of the fit, the least first; by default what the runs have cost. The losses at a lower level
    are another function of the mixture, correlated with that of the highest (`gaussian`). arXiv:2508.11551.
    """
    measured = np.array(fit.levels)
    paid = measured / measured[-1] if costs is None else np.array(costs) / costs[-1]
    if len(paid) != len(measured):
        rule = f"the runs have {len(measured)} costs, {', '.join(f'{cost:.3g}' for cost in measured)} FLOPs"
        raise UserError(f"--costs: names {len(paid)} and {rule}: one for each, the least first")
    model, rng = process_of(fit), np.random.default_rng(fit.seed)
    found = pool(fit, prior, draws(prior, rng), at_full_cost(model), rng)
    chosen = np.concatenate([np.arange(CONSIDERED // 2), rng.integers(len(found.weights), size=CONSIDERED // 2)])
    x = np.unique([design.settled(w, prior.most) for w in found.weights[chosen % len(found.weights)]], axis=0)
    mean, covariance = model.joint(logs(x), np.ones(len(x)))
    spread = np.sqrt(np.maximum(np.diag(covariance), 1e-18))
    factor = linalg.cholesky(covariance + 1e-8 * spread.max() ** 2 * np.eye(len(x)), lower=True)
    bests = mean + rng.standard_normal((SAMPLES, len(x))) @ factor.T
    gamma = (mean - bests.min(1, keepdims=True)) / spread
    gains = np.array([information(gamma, model.correlation(logs(x), level)) for level in measured / measured[-1]])
    level, which = np.unravel_index(int(np.argmax(gains / paid[:, None])), gains.shape)
    return Next(x[which], int(level), float(gains[level, which]), float(mean[which]))
