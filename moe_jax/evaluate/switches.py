"""Experts that are switched off or on in evaluation: `off:3/17 on:5/2`, as tables that the model's forward pass takes.

A layer is named by its number among the layers with experts, from 0, as in `eval.py`'s tables and figures; an expert by
its router column: routed experts from 0, then identity experts.
Source: Mixture of Tunable Experts, arXiv:2502.11096.

Letters: L units of a stack, C router columns, K experts per token.
"""

import re
from collections.abc import Iterable

import numpy as np
from jaxtyping import Int

from moe_jax.config import ModelConfig
from moe_jax.config.layers import Place

Switches = dict[str, Int[np.ndarray, "L C"]]  # −1 off, 1 on, 0 as the router says, by the block's path
Expert = tuple[int, int]  # layer, expert

ITEM = re.compile(r"(off|on):(\*|\d+)/(\d+)(?:-(\d+))?")
FORM = "is a list of off:LAYER/EXPERT and on:LAYER/EXPERT, such as 'off:3/17 on:5/2', 'off:3/0-7' or 'off:*/17'"


def parse(text: str, model: ModelConfig) -> Switches:
    """The tables of a line such as `off:3/0-7 on:*/2`: an expert, or several that follow each other, of a layer or all.

    Raises ValueError that names the line, the rule and the nearest valid choice.
    """
    try:
        columns, found = [_columns(model, place) for place in _layers(model)], {"off": [], "on": []}
        if not text.split():
            raise ValueError(FORM)
        for item in text.split():
            matched = ITEM.fullmatch(item)
            if not matched:
                raise ValueError(f"{item!r}: {FORM}")
            word, layer, first, last = matched.groups()
            last = first if last is None else last
            if int(last) < int(first):
                raise ValueError(f"{item}: ends before it begins; nearest valid: {word}:{layer}/{last}-{first}")
            for number in range(len(columns)) if layer == "*" else [int(layer)]:
                _check_expert(columns, number, int(last))
                found[word] += [(number, expert) for expert in range(int(first), int(last) + 1)]
        return tables(model, **found)
    except ValueError as e:
        raise ValueError(f"experts={text}: {e}") from None


def tables(model: ModelConfig, off: Iterable[Expert] = (), on: Iterable[Expert] = ()) -> Switches:
    """The tables in which these experts, as (layer, expert), are switched. All of a model are there, also of zeros.

    Raises ValueError for an expert that does not exist, one that is both off and on, and layers in which a token could
    not choose `top_k` experts.
    """
    layers = _layers(model)
    made = [np.zeros(_columns(model, place), np.int8) for place in layers]
    columns = [len(one) for one in made]
    for value, experts in ((-1, off), (1, on)):
        for layer, expert in experts:
            _check_expert(columns, layer, expert)
            if made[layer][expert] == -value:
                raise ValueError(f"{layer}/{expert} is both off and on")
            made[layer][expert] = value
    for layer, (place, one) in enumerate(zip(layers, made, strict=True)):
        if reason := _why_not(model, place, one):
            raise ValueError(f"layer {layer}: {reason}")
    by_path: dict[str, list] = {}
    for place, one in zip(layers, made, strict=True):  # in the order of `place.index`
        by_path.setdefault(place.path, []).append(one)
    return {path: np.stack(rows) for path, rows in by_path.items()}


def spell(off: Iterable[Expert]) -> str:
    """The line that switches these experts off."""
    return " ".join(f"off:{layer}/{expert}" for layer, expert in off)


def first_valid(model: ModelConfig, experts: Iterable[Expert], most: int) -> list[Expert]:
    """The first `most` of these experts that can be switched off together; one that leaves too few is passed over."""
    kept: list[Expert] = []
    for expert in experts:
        if len(kept) == most:
            break
        try:
            tables(model, off=[*kept, expert])
        except ValueError:
            continue
        kept.append(expert)
    return kept


# --- what can be switched --------------------------------------------------------------------------------------------


def _layers(model: ModelConfig) -> list[Place]:
    places = [place for place in model.places if place.kind.experts]
    if not places:
        raise ValueError("the model has no experts: model.num_moe_layers is 0")
    return places


def _columns(model: ModelConfig, place: Place) -> int:
    return place.kind.experts + model.moe.identity_experts


def _check_expert(columns: list[int], layer: int, expert: int) -> None:
    if not 0 <= layer < len(columns):
        rule = f"the model has {len(columns)} layers with experts, from 0"
        raise ValueError(f"layer {layer}: {rule}; nearest valid: {min(max(layer, 0), len(columns) - 1)}")
    if not 0 <= expert < columns[layer]:
        rule = f"the router of layer {layer} has {columns[layer]} choices, from 0"
        raise ValueError(f"expert {expert}: {rule}; nearest valid: {min(max(expert, 0), columns[layer] - 1)}")


def _why_not(model: ModelConfig, place: Place, switches: Int[np.ndarray, " C"]) -> str:
    """The reason why tokens of a layer cannot choose as these switches say; "" if they can.

    With expert choice a token may have any number of experts, and so it may where a table names them.
    """
    moe, k = model.moe, model.moe.top_k
    left, on = switches >= 0, switches > 0
    if place.kind.name == "table":
        return f"a table of model.layers={model.layers!r} names its experts, so that none can be on" * bool(on.any())
    if moe.choice == "expert":
        return ""
    if moe.label_groups > 1:
        return _why_not_by_label(model, place.kind.experts, left, on)
    for group in range(moe.shard_groups):
        share, its = k // moe.shard_groups, slice(group, None, moe.shard_groups)
        of = f" of group {group} (model.moe.shard_groups={moe.shard_groups})" if moe.shard_groups > 1 else ""
        each = f"top_k={k}" if moe.shard_groups == 1 else f"top_k / shard_groups = {share}"
        if left[its].sum() < share:
            return f"{left[its].sum()} experts{of} would be left for {each} choices"
        if on[its].sum() > share:
            return f"{on[its].sum()} experts{of} would be on, but a token has {each} choices"
    if moe.top_groups < moe.num_groups:
        return _why_not_in_groups(model, left.reshape(moe.num_groups, -1), on.reshape(moe.num_groups, -1))
    return ""


def _why_not_by_label(model: ModelConfig, experts: int, left: np.ndarray, on: np.ndarray) -> str:
    """The same for groups of experts by label: each must have enough, with the identity experts."""
    size, k = experts // model.moe.label_groups, model.moe.top_k
    for label in range(model.moe.label_groups):
        own = np.r_[label * size : (label + 1) * size, experts : len(left)]
        of = f"of label {label} (model.moe.label_groups={model.moe.label_groups})"
        if left[own].sum() < k:
            return f"{left[own].sum()} experts {of} would be left for top_k={k} choices"
        if on[own].sum() > k:
            return f"{on[own].sum()} experts {of} would be on, but a token has top_k={k} choices"
    return ""


def _why_not_in_groups(model: ModelConfig, left: np.ndarray, on: np.ndarray) -> str:
    """The same for `top_groups`: whichever groups a token takes, they must have enough experts."""
    moe = model.moe
    ranked_by = min({"best_two": 2, "best": 1}[moe.group_score], left.shape[1])  # a group with fewer is taken last
    free = np.sort((left & ~on).sum(1)[left.sum(1) >= ranked_by])
    if len(free) < moe.top_groups:
        return (
            f"{len(free)} groups would have {ranked_by} experts left, by which model.moe.group_score="
            f"{moe.group_score!r} ranks them, but a token takes top_groups={moe.top_groups}"
        )
    if (fewest := free[: moe.top_groups].sum() + on.sum()) < moe.top_k:
        return f"a token's top_groups={moe.top_groups} groups may have {fewest} experts left for top_k={moe.top_k}"
    return ""
