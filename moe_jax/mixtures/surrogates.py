"""Predicts the loss of a model from the mixture that it would be trained on.

Letters: n runs, M sources, P features.
"""

import itertools
from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from moe_jax.errors import UserError
from moe_jax.mixtures import gaussian

Predict = Callable[[Float[np.ndarray, "n M"]], Float[np.ndarray, " n"]]
EPSILON = 1e-3  # added to a share before its logarithm: a source of a thousandth is nearly as good as none
PENALTIES = np.geomspace(1e-6, 1e4, 41)
FOLDS = 8
LEAST = 5  # runs of a fit


def logs(weights: Float[np.ndarray, "n M"]) -> Float[np.ndarray, "n M"]:
    """log(w + EPSILON), less its value at 0, so that a source that is left out counts nothing."""
    return np.log1p(weights / EPSILON)


def quadratic(weights: Float[np.ndarray, "n M"]) -> Float[np.ndarray, "n P"]:
    """The logarithms of the shares and the products of any two of them."""
    z = logs(weights)
    pairs = itertools.combinations_with_replacement(range(z.shape[1]), 2)
    return np.concatenate([z, *(z[:, [i]] * z[:, [j]] for i, j in pairs)], axis=1)


def ridge(weights: Float[np.ndarray, "n M"], losses: Float[np.ndarray, " n"], seed: int = 0) -> Predict:
    """Ridge regression on `quadratic`. Its penalty is the one with the least error of each run left out."""
    x = quadratic(weights)
    mean, scale = x.mean(0), x.std(0)
    scale = np.where(scale > 1e-12, scale, 1.0)
    centre = float(losses.mean())
    u, d, vt = np.linalg.svd((x - mean) / scale, full_matrices=False)
    along = u.T @ (losses - centre)
    errors = []
    for penalty in PENALTIES:
        shrink = d**2 / (d**2 + penalty)
        leverage = (u**2 @ shrink) + 1 / len(losses)
        rest = (losses - centre) - u @ (shrink * along)
        errors.append(float(np.mean((rest / np.maximum(1 - leverage, 1e-9)) ** 2)))
    penalty = PENALTIES[int(np.argmin(errors))]
    coefficients = vt.T @ (d / (d**2 + penalty) * along)
    return lambda w: centre + (quadratic(w) - mean) / scale @ coefficients


def boosted(weights: Float[np.ndarray, "n M"], losses: Float[np.ndarray, " n"], seed: int = 0) -> Predict:
    """LightGBM with RegMix's settings: 1000 trees, rate 0.01, on the shares themselves. Raises UserError without it."""
    try:
        import lightgbm
    except (ImportError, OSError) as e:  # OSError: its library lacks one of the system's
        raise missing("--surrogate=lightgbm", "LightGBM", e) from None
    few = len(losses) < 60  # LightGBM's default of 20 runs a leaf would leave one leaf
    options = {"objective": "regression", "learning_rate": 0.01, "seed": seed, "num_threads": 1, "verbosity": -1,
               "deterministic": True, **({"min_data_in_leaf": 3, "min_data_in_bin": 1} if few else {})}  # fmt: skip
    model = lightgbm.train(options, lightgbm.Dataset(weights, losses, params={"verbosity": -1}), 1000)
    return lambda w: np.asarray(model.predict(w, num_threads=1))


def process(weights: Float[np.ndarray, "n M"], losses: Float[np.ndarray, " n"], seed: int = 0) -> Predict:
    """The mean of a Gaussian process on the logarithms of the shares."""
    model = gaussian.fit(logs(weights), np.ones(len(weights)), losses)
    return lambda w: model.mean_of(logs(w), np.ones(len(w)))


SURROGATES = {"ridge": ridge, "lightgbm": boosted, "gp": process}


def missing(what: str, package: str, error: Exception) -> UserError:
    """The error for a package of the extra `mixtures` that cannot be imported."""
    return UserError(f"{what} needs {package} ({error}): pip install -e '.[mixtures]' in the repository")


# --- how well it predicts --------------------------------------------------------------------------------------------


def ranks(x: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """The rank of each value, from 0; equal values share the mean of theirs."""
    _, which, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[which]


def spearman(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> float:
    """Spearman's rank correlation; NaN if all values of one are equal."""
    a, b = ranks(x) - (len(x) - 1) / 2, ranks(y) - (len(y) - 1) / 2
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale else float("nan")


def left_out(name: str, weights: Float[np.ndarray, "n M"], losses: Float[np.ndarray, " n"], seed: int = 0):
    """Predicts the loss of each run by a surrogate of runs of other mixtures, `[n]`: FOLDS parts of the mixtures are
    left out in turn."""
    _, mixture = np.unique(np.round(weights, 6), axis=0, return_inverse=True)
    order = np.random.default_rng(seed).permutation(mixture.max() + 1)
    out = np.empty(len(losses))
    for few in np.array_split(order, min(FOLDS, len(order))):
        part = np.isin(mixture.ravel(), few)
        rest = ~part
        out[part] = SURROGATES[name](weights[rest], losses[rest], seed)(weights[part])
    return out
