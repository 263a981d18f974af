"""Groups of parameters: factors of the learning rate and the weight decay, and parameters that are not trained.

A group is a regular expression over the paths of parameters (`optim.groups`). Where groups overlap their factors are
multiplied, one group that freezes is enough, and the latest start counts. So their order means nothing.

A frozen parameter is split off before the loss is differentiated (`split`). Nothing below sees it: there is no gradient
of it, no moment, no share in the norm that clipping takes, no decay. The factors of the others act around the optimizer
(`with_factors`), whose own leaves stay together: Muon moves the same groups of matrices with and without factors.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from moe_jax import model
from moe_jax.config import GroupConfig, OptimConfig, RunConfig
from moe_jax.config.fields import require
from moe_jax.errors import ConfigError
from moe_jax.nn.lora import is_adapter
from moe_jax.nn.qk_clip import CLIPPED
from moe_jax.tree import flatten, nest, path_of

NOTHING: frozenset[str] = frozenset()


def check(cfg: RunConfig) -> None:
    """Raises ConfigError for a group that does nothing to the model's parameters, and if none is left to train, or not
    the rows that tokens of gaps need.

    It makes the model's graph, which raises for adapters that match nothing.
    """
    if not (cfg.optim.groups or cfg.model.lora.rank):
        return
    paths = list(flatten(model.abstract(cfg.model).shapes))
    for name, group in cfg.optim.groups.items():
        close = difflib.get_close_matches(group.match, paths, 1, 0.0)[0]
        found = any(re.search(group.match, path) for path in paths)
        rule = f"matches no parameter of {len(paths)}"
        require(found, f"optim.groups.{name}.match", group.match, rule, f"nearest valid: {close!r}")
    frozen = frozen_paths(cfg.optim, paths)
    for name in cfg.data.with_gaps:
        still = [p for p in ("embed", "head") if p in paths and (p in frozen or not factor(cfg.optim, "lr", p))]
        rule = f"has tokens of its own, which cannot be learned: {' and '.join(still)} stay as they are"
        require(not still, f"data.sources.{name}.denoise", cfg.data.sources[name].denoise, rule, "nearest valid: 0.0")
    last = [name for name, group in cfg.optim.groups.items() if group.freeze][-1:]
    for name in last:
        require(len(frozen) < len(paths), f"optim.groups.{name}.freeze", True, "leaves no parameter to train",
                "nearest valid: False")  # fmt: skip
    trained = [path for path in paths if path not in frozen]
    for name, group in cfg.optim.groups.items():
        if _acts(group) and not any(re.search(group.match, path) for path in trained):
            close = difflib.get_close_matches(group.match, trained, 1, 0.0)[0]
            raise ConfigError(f"optim.groups.{name}.match", group.match, "matches frozen parameters only, on which "
                              "lr, weight_decay and start have no effect", f"nearest valid: {close!r}")  # fmt: skip
        clipped = [path for path in trained if re.search(rf"/attention/({'|'.join(CLIPPED)})$", path)]
        moved = cfg.optim.qk_clip and any(re.search(group.match, path) for path in clipped)
        rule = "is not available with optim.qk_clip > 0 for matrices of queries and keys, which it scales in every step"
        require(not (group.start and moved), f"optim.groups.{name}.start", group.start, rule, "nearest valid: 0")


def without_lost(cfg: RunConfig) -> tuple[RunConfig, list[str]]:
    """The configuration without groups of parameters that match none of the new model, and a line about each."""
    paths = flatten(model.abstract(cfg.model).shapes) if cfg.optim.groups else {}
    has = {name: any(re.search(g.match, path) for path in paths) for name, g in cfg.optim.groups.items()}
    kept = {name: group for name, group in cfg.optim.groups.items() if has[name]}
    lines = [f"optim.groups.{name} is left out: it matches no parameter of the new model" for name in has.keys() - kept]
    return dataclasses.replace(cfg, optim=dataclasses.replace(cfg.optim, groups=kept)), sorted(lines)


# --- frozen parameters -----------------------------------------------------------------------------------------------


def frozen_paths(cfg: OptimConfig, paths: Collection[str]) -> frozenset[str]:
    """The paths of the frozen parameters among `paths`, which may be a dict by path.

    Where there are adapters, they alone are trained.
    """
    patterns = [group.match for group in cfg.groups.values() if group.freeze]
    adapted = any(map(is_adapter, paths))
    if not patterns and not adapted:
        return NOTHING
    frozen = lambda path: (adapted and not is_adapter(path)) or any(re.search(p, path) for p in patterns)
    return frozenset(filter(frozen, paths))


def split(params: dict, frozen: frozenset[str]) -> tuple[dict, dict]:
    """Splits nested dicts of parameters into those that are trained and the frozen ones, {} if there are none."""
    if not frozen:
        return params, {}
    flat = flatten(params)
    return tuple(nest({p: x for p, x in flat.items() if (p in frozen) == which}) for which in (False, True))


def join(trained: dict, fixed: dict) -> dict:
    """Joins both parts of `split` again. Other trees of trained parameters may take the place of the first."""
    return nest(flatten(fixed) | flatten(trained)) if fixed else trained


def fixed_biases(frozen: frozenset[str], params: dict, router_bias: dict) -> frozenset[str]:
    """The paths of the selection biases that stay as they are: those of routers all of whose parameters are frozen."""
    if not frozen:
        return NOTHING
    found = set()
    for name in flatten(router_bias):
        block = name.removesuffix("router_bias")
        router = [path for path in flatten(params) if path.startswith((f"{block}w_router", f"{block}router/"))]
        if router and frozen.issuperset(router):
            found.add(name)
    return frozenset(found)


def split_biases(frozen: frozenset[str], params: dict, router_bias: dict) -> tuple[frozenset[str], frozenset[str]]:
    """The paths of the selection biases that stay as they are, and of those that move."""
    fixed = fixed_biases(frozen, params, router_bias)
    return fixed, frozenset(path for path in flatten(router_bias) if path.endswith("/router_bias")) - fixed


# --- factors ---------------------------------------------------------------------------------------------------------


def _acts(group: GroupConfig) -> bool:
    return (group.lr, group.weight_decay, group.start) != (1, 1, 0)


def factor(cfg: OptimConfig, which: str, path: str) -> float:
    """The product of the factors of all groups that match a path. which: "lr" or "weight_decay"."""
    return math.prod(getattr(group, which) for group in cfg.groups.values() if re.search(group.match, path))


def start(cfg: OptimConfig, path: str) -> int:
    """The number of updates before a parameter moves: the largest `start` of all groups that match its path."""
    return max((group.start for group in cfg.groups.values() if re.search(group.match, path)), default=0)


def updates_so_far(state: Any) -> Int[Array, ""] | None:
    """The number of updates that an optimizer's state counts; None if it counts none."""
    counts = optax.tree_utils.tree_get_all_with_path(state, "count")
    return counts[0][1] if counts else None


def with_factors(optimizer: optax.GradientTransformation, cfg: OptimConfig) -> optax.GradientTransformation:
    """Multiplies the learning rate and the weight decay of each parameter by its factors. The state stays the same.

    optimizer: one whose update is rate · (direction + decay · parameter), that uses parameters for nothing else, and
    whose state counts updates. So the parameter times a factor decays with that factor, and the update times a factor
    has that factor's rate, which is 0 before the parameter's start.
    """
    if not any(map(_acts, cfg.groups.values())):
        return optimizer

    def update(grads, state, params=None):
        decayed = None if params is None else _scaled(cfg, "weight_decay", params)
        before = updates_so_far(state)
        updates, state = optimizer.update(grads, state, decayed)
        return _started(cfg, before, _scaled(cfg, "lr", updates)), state

    return optax.GradientTransformation(optimizer.init, update)


def _scaled(cfg: OptimConfig, which: str, tree: Any) -> Any:
    def one(path, x):
        by = factor(cfg, which, path_of(path))
        if by == 1:
            return x
        # In float32: the factor itself may not be a bfloat16 number.
        return jnp.zeros_like(x) if by == 0 else (x.astype(jnp.float32) * by).astype(x.dtype)

    return jax.tree_util.tree_map_with_path(one, tree)


def _started(cfg: OptimConfig, before: Int[Array, ""] | None, updates: Any) -> Any:
    def one(path, x):
        first = start(cfg, path_of(path))
        return jnp.where(before >= first, x, 0) if first else x

    return jax.tree_util.tree_map_with_path(one, updates)


# --- what is printed -------------------------------------------------------------------------------------------------


def describe(cfg: OptimConfig, shapes: dict) -> list[str]:
    """Lines about the groups: how many parameters each has, and what it does to them."""
    flat, lines = flatten(shapes), []
    frozen = frozen_paths(cfg, flat)
    for name, group in cfg.groups.items():
        found = {path: x.size for path, x in flat.items() if re.search(group.match, path)}
        does = [f"{word} × {value:g}" for word, value in
                (("learning rate", group.lr), ("weight decay", group.weight_decay)) if value != 1]  # fmt: skip
        does += [f"as they are for the first {group.start:,} updates"] if group.start else []
        if group.freeze:
            router = any(re.search("/(w_router$|router/)", path) for path in found)
            does += ["frozen; a router that is frozen whole keeps its selection bias"] if router else ["frozen"]
        also = sum(flat[path].size for path in found if path in frozen)
        rest = f"; {also:,} of them frozen" if also and not group.freeze else ""
        tensors = "tensor" if len(found) == 1 else "tensors"
        what = ", ".join(does) or "as all others"
        lines.append(f"group {name}: {sum(found.values()):,} parameters in {len(found)} {tensors}, {what}{rest}")
    return lines
