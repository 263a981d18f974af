"""Who optimises which parameter: the label table, schedules, and the assembly of clipping, AdamW and Muon."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from moe_jax import muon
from moe_jax.config import OptimConfig

# First match wins; `label_params` refuses a parameter without a rule and a rule without a parameter.
# Every parameter decays, norms included: without it their scales and the output RMS grow (arXiv:2502.16982, app. D).
RULES = (
    (r"^(embed|head)$", "adamw"),
    (r"norm$", "adamw"),
    (r"/w_router$", "router"),
    (r"/w_(q|k|v|o|gate|up|down)$", "matrix"),
)


def path_of(path: tuple) -> str:
    """`layers/moe/w_gate` for a key path of jax.tree_util: the one spelling of a parameter's name."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def label_params(params: Any) -> Any:
    """The label of every parameter, in the tree of `params`. Raises ValueError where the table is not total."""
    unused = {pattern for pattern, _ in RULES}

    def label(path, _):
        name = path_of(path)
        for pattern, value in RULES:
            if re.search(pattern, name):
                unused.discard(pattern)
                return value
        raise ValueError(f"no optimizer rule for the parameter {name}; add one to optim.RULES")

    labels = jax.tree_util.tree_map_with_path(label, params)
    if unused:
        raise ValueError(f"optimizer rules that match no parameter: {sorted(unused)}")
    return labels


def schedule(cfg: OptimConfig, steps: int) -> Callable[[Any], Any]:
    """Learning rate by step: linear warm-up, then the schedule down to `final_lr_fraction` at the last step."""
    last = cfg.lr * cfg.final_lr_fraction
    rest = steps - cfg.warmup_steps
    if cfg.schedule == "cosine":
        body = optax.cosine_decay_schedule(cfg.lr, rest, cfg.final_lr_fraction)
    elif cfg.schedule == "linear":
        body = optax.linear_schedule(cfg.lr, last, rest)
    elif cfg.schedule == "wsd":  # warm-up, stable, decay
        decay = max(1, round(rest * cfg.decay_fraction))
        body = optax.join_schedules(
            [optax.constant_schedule(cfg.lr), optax.linear_schedule(cfg.lr, last, decay)], [rest - decay]
        )
    else:
        body = optax.constant_schedule(cfg.lr)
    if not cfg.warmup_steps:
        return body
    # The first step already moves: a rate of 0 would spend a batch on nothing.
    warmup = lambda step: cfg.lr * (step + 1) / cfg.warmup_steps
    return optax.join_schedules([warmup, body], [cfg.warmup_steps])


def make_optimizer(cfg: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Global-norm clipping, then AdamW or Muon by label."""
    lr = schedule(cfg, steps)
    adamw = optax.adamw(lr, cfg.beta1, cfg.beta2, cfg.eps, weight_decay=cfg.weight_decay)
    if cfg.name == "adamw":
        by_label = {"adamw": adamw, "router": adamw, "matrix": adamw}
    else:
        matrix = muon.muon(
            lr,
            momentum=cfg.momentum,
            nesterov=cfg.nesterov,
            weight_decay=cfg.weight_decay,
            update_rms=cfg.update_rms,
            steps=cfg.newton_schulz_steps,
            dtype=jnp.dtype(cfg.newton_schulz_dtype),
            matrix_axes=lambda path, leaf: (-2, -1),  # every weight is [..., in, out]; the label table let it in
        )
        by_label = {"adamw": adamw, "router": matrix if cfg.router == "muon" else adamw, "matrix": matrix}
    clip = optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity()
    return optax.chain(clip, optax.partition(by_label, label_params))


def describe(cfg: OptimConfig, shapes: Any) -> str:
    """One line per label: who updates how many parameters."""
    labels = jax.tree.leaves(label_params(shapes))
    who = {"adamw": "adamw", "router": cfg.router if cfg.name == "muon" else "adamw", "matrix": cfg.name}
    sums = {label: 0 for label in who}
    for label, x in zip(labels, jax.tree.leaves(shapes), strict=True):
        sums[label] += x.size
    return "; ".join(f"{label}: {who[label]}, {n:,} parameters" for label, n in sums.items())
