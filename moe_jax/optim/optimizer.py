"""The optimizer: who updates which parameter, learning-rate schedules, and the chain of clipping, AdamW and Muon."""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from moe_jax.config import OptimConfig
from moe_jax.nn.lora import is_adapter
from moe_jax.optim import groups, muon, newton_schulz
from moe_jax.optim.plan import Plan, make_plan
from moe_jax.optim.spread import Matrices
from moe_jax.parallel import axes, sharding
from moe_jax.tree import flatten, path_of

# The first match counts. `label_params` refuses a parameter without a rule, and a rule without a parameter unless it
# belongs to a part that the model does not have (`PARTS`).
# Weight decay applies to all: without it the scales of norms and the output RMS grow (arXiv:2502.16982, app. D).
# Groups (groups.py) may make exceptions.
RULES = (
    (r"^(embed|head)$", "adamw"),
    (r"norm$", "adamw"),
    (r"/w_router$", "router"),
    (r"/router/w_(in|1|2)$", "router"),
    (r"/router/(b_in|b_1|b_2|carry|log_scale)$", "adamw"),
    (r"/moe/w_(in|out)$", "matrix"),
    (r"/moe/[wb]_shared_gate$", "adamw"),  # one or two columns: too few to have a spectrum
    (r"/attention/b_(q|k|v)$", "adamw"),
    (r"/w_(q|k|v|o|gate|up|down|q_down|q_up|kv_down|k_rope|k_up|v_up)$", "matrix"),
    (r"^mtp/w_join$", "matrix"),
    (r"/memory/w_query$", "matrix"),
    (r"/memory/(b_query|keys|values)$", "adamw"),  # rows and keys are read one by one: tables, like the embedding
    (r"(^embed|_residual/(stream|branch))_(bias|scale)$", "adamw"),
    (r"/lora_[ab]$", "adamw"),  # the factors of an adapter, which Muon never updates: their product is the matrix
)
PARTS = {  # rule → text in the paths of the part that it belongs to
    r"/w_router$": "/moe/w_router",
    r"/router/w_(in|1|2)$": "/router/",
    r"/router/(b_in|b_1|b_2|carry|log_scale)$": "/router/",
    r"/moe/w_(in|out)$": "/moe/w_in",
    r"/moe/[wb]_shared_gate$": "_shared_gate",
    r"/attention/b_(q|k|v)$": "/attention/b_",
    r"^mtp/w_join$": "mtp/",
    r"/memory/w_query$": "/memory/",
    r"/memory/(b_query|keys|values)$": "/memory/",
    r"(^embed|_residual/(stream|branch))_(bias|scale)$": "_residual/",
    r"/lora_[ab]$": "/lora_",
}

# The axes of leaves that Muon updates; the last two are input and output of a matrix. Gate and up projections are
# separate leaves. The router is a matrix like the others: Moonlight's released code gives Muon every weight of two or
# more dimensions but embedding and head, and the router spectra in its paper (§3.4) are from such a run.
GEOMETRY = (
    (r"/w_router$", "layers in out"),
    (r"/w_router$", "layers labels in out"),
    (r"/router/w_(in|1|2)$", "layers in out"),
    (r"(^|/)attention/w_(q|k|v)$", "layers in heads"),
    (r"(^|/)attention/w_(q_down|q_up|kv_down|k_rope|k_up|v_up)$", "layers in out"),
    (r"(^|/)attention/w_o$", "layers heads out"),
    (r"(^|/)attention/w_(q|k|v)$", "layers labels in heads"),
    (r"(^|/)attention/w_o$", "layers labels heads out"),
    (r"(^|/)moe/w_(in|out)$", "layers in out"),
    (r"(^|/)moe/w_(gate|up|down)$", "layers experts in out"),
    (r"(^|/)(mlp|shared)/w_(gate|up|down)$", "layers in out"),
    (r"(^|/)memory/w_query$", "layers in out"),
    (r"^mtp/w_join$", "layers in out"),
)


def label_params(params: Any, some: bool = False) -> Any:
    """The label of every parameter, in the tree of `params`. Raises ValueError where the table is not total.

    some: whether `params` are some of a model's parameters, so that a rule may match none of them.
    """
    unused = {pattern for pattern, _ in RULES}

    def label(path, _):
        name = path_of(path)
        for pattern, value in RULES:
            if re.search(pattern, name):
                unused.discard(pattern)
                return value
        raise ValueError(f"no optimizer rule for the parameter {name}; add one to RULES in moe_jax/optim/optimizer.py")

    labels = jax.tree_util.tree_map_with_path(label, params)
    paths = [path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    unused -= {pattern for pattern, part in PARTS.items() if not any(part in path for path in paths)}
    if unused and not some and not all(map(is_adapter, paths)):
        raise ValueError(f"optimizer rules that match no parameter: {sorted(unused)}")
    return labels


def schedule(cfg: OptimConfig, steps: int) -> Callable[[Any], Any]:
    """Learning rate by step from 0: a linear warm-up to `lr`, then a decay to `final_lr_fraction` of it at steps − 1.

    The last step of the warm-up is at `lr` and is the first of the schedule; without a warm-up, step 0 is. "wsd" stays
    at `lr` until `decay_fraction` of the steps after the warm-up are left, and falls in each of those. A run of one
    step takes it at `lr`. Skipped steps do not count: a run that skipped n of them ends n steps before the schedule.
    """
    top = max(cfg.warmup_steps - 1, 0)
    last, decaying = cfg.lr * cfg.final_lr_fraction, max(steps - 1 - top, 1)
    if cfg.schedule == "cosine":
        body = optax.cosine_decay_schedule(cfg.lr, decaying, cfg.final_lr_fraction)
    elif cfg.schedule == "linear":
        body = optax.linear_schedule(cfg.lr, last, decaying)
    elif cfg.schedule == "wsd":  # warm-up, stable, decay
        decay = min(max(1, round((steps - cfg.warmup_steps) * cfg.decay_fraction)), decaying)
        body = optax.join_schedules(
            [optax.constant_schedule(cfg.lr), optax.linear_schedule(cfg.lr, last, decay)], [decaying - decay]
        )
    else:
        body = optax.constant_schedule(cfg.lr)
    if not cfg.warmup_steps:
        return body
    # The first step has a rate above 0, which would waste its batch.
    warmup = lambda step: cfg.lr * (step + 1) / cfg.warmup_steps
    return optax.join_schedules([warmup, body], [top])


def describe_stretch(cfg: OptimConfig, before: int, steps: int, done: int) -> str:
    """One line on how `steps` instead of `before` changes the learning rate after `done` updates; "" if it does not."""
    if before == steps or cfg.schedule == "constant":
        return ""
    old, new, last = (float(schedule(cfg, n)(at)) for n, at in ((before, done), (steps, done), (steps, steps - 1)))
    return (
        f"the learning rate's schedule is that of {steps} steps, no longer of {before}: {new:.3g} in the next step "
        f"instead of {old:.3g}, {last:.3g} in the last"
    )


def matrices_of(cfg: OptimConfig, head_dim: int = 0) -> Callable[[str, Any], Matrices]:
    """Makes Muon's rule for the parameters of `GEOMETRY`. It raises ValueError for one of unknown name or rank."""
    if cfg.per_head and not head_dim:
        raise ValueError("optim.per_head needs the model's head_dim")

    def rule(path: str, leaf: Any) -> Matrices:
        for pattern, where in GEOMETRY:
            names = where.split()
            if re.search(pattern, path) and leaf.ndim == len(names):
                split = cfg.per_head and "heads" in names[-2:]
                return Matrices(heads=(names[-2:].index("heads"), head_dim) if split else None)
        raise ValueError(f"no matrices known for the parameter {path} {leaf.shape}; add a line to optim.GEOMETRY")

    return rule


def make_optimizer(cfg: OptimConfig, steps: int, head_dim: int = 0) -> optax.GradientTransformation:
    """Chains global-norm clipping with AdamW or Muon by label. Only `cfg.per_head` needs `head_dim`.

    Its parameters are those that are trained (`groups.split`).
    """
    lr = schedule(cfg, steps)
    adamw = optax.adamw(lr, cfg.beta1, cfg.beta2, cfg.eps, weight_decay=cfg.weight_decay)
    if cfg.name == "adamw":
        by_label = {"adamw": adamw, "router": adamw, "matrix": adamw}
    else:
        matrix = muon.muon(
            lr,
            weight_decay=cfg.weight_decay,
            cautious_decay=cfg.cautious_decay,
            momentum=cfg.momentum,
            nesterov=cfg.nesterov,
            coefficients=newton_schulz.coefficients(cfg.coefficients, cfg.newton_schulz_steps),
            scale=cfg.scale,
            update_rms=cfg.update_rms,
            dtype=cfg.newton_schulz_dtype,
            matrices=matrices_of(cfg, head_dim),
        )
        by_label = {"adamw": adamw, "router": matrix if cfg.router == "muon" else adamw, "matrix": matrix}
    clip = optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity()
    some = any(group.freeze for group in cfg.groups.values())
    labels = functools.partial(label_params, some=True) if some else label_params
    return groups.with_factors(optax.chain(clip, optax.partition(by_label, labels)), cfg)


def owners(cfg: OptimConfig) -> dict[str, str]:
    """The optimizer that updates the parameters of each label."""
    return {"adamw": "adamw", "router": cfg.router if cfg.name == "muon" else "adamw", "matrix": cfg.name}


def muon_plan(cfg: OptimConfig, graph: Any, sizes: dict[str, int], head_dim: int = 0) -> Plan:
    """Plans Muon for the parameters of a `model.Graph` on a mesh of these axis sizes. Allocates nothing."""
    explicit = (jax.sharding.AxisType.Explicit,) * len(sizes)
    mesh = jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=explicit)

    def placed(x, names):
        spec = sharding.weight_spec(names, x.shape, sizes)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.NamedSharding(mesh, spec))

    owner, rule = owners(cfg), matrices_of(cfg, head_dim)
    labels = flatten(label_params(graph.shapes))
    return make_plan(
        jax.tree.map(placed, graph.shapes, graph.axes),
        lambda path, leaf: rule(path, leaf) if owner[labels[path]] == "muon" else None,
        coefficients=newton_schulz.coefficients(cfg.coefficients, cfg.newton_schulz_steps),
        dtype=cfg.newton_schulz_dtype,
        in_place=("expert",),
        frozen=groups.frozen_paths(cfg, labels),
    )


def describe(cfg: OptimConfig, graph: Any, sizes: dict[str, int], head_dim: int = 0) -> str:
    """Describes which optimizer updates how many parameters of a `model.Graph`, and Muon's cost on such a mesh."""
    labels, shapes = flatten(label_params(graph.shapes)), flatten(graph.shapes)
    owner, frozen = owners(cfg), groups.frozen_paths(cfg, shapes)
    sums = {label: 0 for label in owner}
    for path, x in shapes.items():
        sums[labels[path]] += 0 if path in frozen else x.size
    lines = ["; ".join(f"{label}: {owner[label]}, {n:,} parameters" for label, n in sums.items())]
    if frozen:
        lines[0] += f"; frozen: {sum(shapes[path].size for path in frozen):,} parameters"
    lines += groups.describe(cfg, graph.shapes)
    if cfg.ema:
        lines += [f"average of the weights: decay {cfg.ema:g}, {sum(sums.values()):,} parameters in float32"]
    norms = [x for path, x in shapes.items() if path.endswith("norm") and path not in frozen]
    # AdamW's largest step. Half the distance from 1 down to the next bfloat16 number is 2^-9: a smaller step is lost.
    step = cfg.lr * (1 + cfg.weight_decay)
    if step < 2**-9 and any(x.dtype == jnp.bfloat16 for x in norms):
        lines += [
            f"a norm's scale of 1 stays as it is: a step of optim.lr={cfg.lr:g} rounds away in bfloat16; "
            "model.param_dtype=float32 trains it"
        ]
    if any(owner[label] == "muon" and (size or not frozen) for label, size in sums.items()):
        plan = muon_plan(cfg, graph, sizes, head_dim)
        lines += [str(plan)]
        if cfg.newton_schulz_dtype == newton_schulz.AUTO:
            kind = axes.current_kind()
            lines += [f"  optim.newton_schulz_dtype=auto is {plan.dtype} on this device ({kind}); resumed on "
                      "another kind of device, the run may iterate in another dtype"]  # fmt: skip
    return "\n".join(lines)
