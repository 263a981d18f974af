"""Measures of weight matrices: RMS, entropy of singular values, and similarity of experts.

Letters: L layers, E experts.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from moe_jax.config.layers import Place
from moe_jax.evaluate.analysis import _ratio
from moe_jax.tree import flatten

# The kind of a parameter's matrices. The first match decides; None: the parameter is not a matrix.
KINDS = (
    (r"norm$", None),
    (r"/lora_[ab]$", None),  # of interest is the merged matrix: load a run's weights for `model.base`, which merges
    (r"/b_(q|k|v)$|/moe/[wb]_shared_gate$", None),
    (r"^embed$", "embedding"),
    (r"^head$", "head"),
    (r"attention/w_(q|k|v|o|q_down|q_up|kv_down|k_rope|k_up|v_up)$", r"attention \1"),
    (r"moe/w_router$", "router"),
    (r"moe/w_(in|out)$", r"latent \1"),
    (r"moe/w_(gate|up|down)$", r"expert \1"),
    (r"shared/w_(gate|up|down)$", r"shared \1"),
    (r"mlp/w_(gate|up|down)$", r"dense \1"),
    (r"memory/w_query$", "memory query"),
    (r"memory/(b_query|keys|values)$", None),
    (r"(^embed|_residual/(stream|branch))_(bias|scale)$", None),
)


def kind_of(name: str) -> str | None:
    """The kind of a parameter's matrices: `attention q` for `layers/attention/w_q`. Raises ValueError for no match."""
    for pattern, kind in KINDS:
        if found := re.search(pattern, name):
            return kind and found.expand(kind)
    raise ValueError(f"no kind for the parameter {name}; add one to KINDS of moe_jax/evaluate/spectra.py")


def matrices(params: Any, places: Sequence[Place]) -> dict[str, Float[np.ndarray, "L *batch m n"]]:
    """The matrices of each kind, by layer, from the first to the last. Embedding and head are `[1, V, D]`.

    params: the nested dicts of the train state, or a tree of the same form, such as a step's update. Kinds of experts
    are apart for each number of experts, if there are several: `expert gate, 32 experts`.
    """
    leaves = {name: np.asarray(leaf) for name, leaf in flatten(params).items() if kind_of(name)}
    counts = {place.kind.experts for place in places} - {0}
    found: dict[str, list[np.ndarray]] = {}
    for name in ("embed", "head"):
        if name in leaves:
            found[kind_of(name)] = [leaves[name]]
    for place in places:
        for name, leaf in leaves.items():
            if not name.startswith(f"{place.path}/"):
                continue
            kind = kind_of(name)
            if len(counts) > 1 and kind.startswith(("expert ", "router")):
                kind += f", {place.kind.experts} experts"
            found.setdefault(kind, []).append(leaf[place.index])
    return {kind: np.stack(parts) for kind, parts in found.items()}


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
