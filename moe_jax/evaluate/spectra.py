"""Measures of weight matrices: RMS, entropy of singular values, and similarity of experts.

Letters: L layers, E experts.
"""

import re
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from moe_jax.evaluate.analysis import _ratio
from moe_jax.tree import path_of

# The kind of a parameter's matrices. The first match decides; None: the parameter is not a matrix.
KINDS = (
    (r"norm$", None),
    (r"^embed$", "embedding"),
    (r"^head$", "head"),
    (r"attention/w_(q|k|v|o|q_down|q_up|kv_down|k_rope|k_up|v_up)$", r"attention \1"),
    (r"moe/w_router$", "router"),
    (r"moe/w_(gate|up|down)$", r"expert \1"),
    (r"shared/w_(gate|up|down)$", r"shared \1"),
    (r"mlp/w_(gate|up|down)$", r"dense \1"),
)


def kind_of(name: str) -> str | None:
    """The kind of a parameter's matrices: `attention q` for `layers/attention/w_q`. Raises ValueError for no match."""
    for pattern, kind in KINDS:
        if found := re.search(pattern, name):
            return kind and found.expand(kind)
    raise ValueError(f"no kind for the parameter {name}; add one to KINDS of moe_jax/evaluate/spectra.py")


def matrices(params: Any) -> dict[str, Float[np.ndarray, "L *batch m n"]]:
    """The matrices of each kind, by layer, the leading dense layers first. Embedding and head are `[1, V, D]`.

    params: the nested dicts of the train state, or a tree of the same form, such as a step's update.
    """
    found: dict[str, list[np.ndarray]] = {kind: [] for _, kind in KINDS if kind and "\\" not in kind}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if kind := kind_of(path_of(path)):
            found.setdefault(kind, []).append(np.asarray(leaf)[None] if leaf.ndim == 2 else np.asarray(leaf))
    return {kind: np.concatenate(parts) for kind, parts in found.items() if parts}


def rms(x: Float[np.ndarray, "L *batch m n"]) -> Float[np.ndarray, " L"]:
    """Root mean square of the entries of each layer."""
    return np.array([np.sqrt(np.mean(np.square(layer, dtype=np.float64))) for layer in x])


def expert_similarity(x: Float[np.ndarray, "L E m n"], granularity: int = 1) -> Float[np.ndarray, " L"]:
    """Mean cosine similarity of two experts' matrices, over all pairs of a layer, −1 to 1; 1 if all are equal.

    granularity: G counts only pairs of the same shard of a dense layer, whose ids e and e' have e mod G = e' mod G
        (upcycling into virtual groups). NaN without such a pair.
    """
    flat = np.asarray(x, np.float64).reshape(x.shape[0], x.shape[1], -1)
    unit = _ratio(flat, np.linalg.norm(flat, axis=2, keepdims=True))
    copies = unit.reshape(x.shape[0], -1, granularity, unit.shape[2])  # [L, E/G, G, m·n]
    count = copies.shape[1]
    # Σ over pairs = ‖Σ of the unit vectors‖² − the pairs of each vector with itself.
    pairs = np.square(copies.sum(1)).sum(-1).mean(-1) - count
    return pairs / (count * (count - 1)) if count > 1 else np.full(x.shape[0], np.nan)


def svd_entropy(x: Float[np.ndarray, "*L m n"]) -> Float[np.ndarray, "*L"]:
    """Entropy of the singular values σ of each matrix: −Σ q log q / log min(m, n) with q = σ² / Σσ².

    It is 1 if all singular values are equal and 0 at rank one. NaN for a matrix of zeros, and for one row or column.
    Source: arXiv:2502.16982, §3.4.
    """
    x = np.asarray(x, np.float64)
    x = x if x.shape[-2] <= x.shape[-1] else np.swapaxes(x, -2, -1)
    squares = np.maximum(np.linalg.eigvalsh(x @ np.swapaxes(x, -2, -1)), 0.0)  # σ² from the smaller Gram matrix
    q = _ratio(squares, squares.sum(-1, keepdims=True))
    with np.errstate(divide="ignore", invalid="ignore"):
        return -np.where(q == 0, 0.0, q * np.log(q)).sum(-1) / np.log(x.shape[-2])
