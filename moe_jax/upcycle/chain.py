"""Applies a chain of transforms to parameters, which are sharded by the model's spec table before and after."""

import contextlib
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Key

from moe_jax import model
from moe_jax.config import ModelConfig, labels
from moe_jax.config.layers import Units, is_plain, simplest, spell, units_of
from moe_jax.config.positions import FULL
from moe_jax.errors import ConfigError
from moe_jax.moe.layer import TokenInfo
from moe_jax.nn.layers import weight
from moe_jax.parallel import sharding
from moe_jax.tree import flatten, nest, split

Scores = dict[str, Array | np.ndarray]  # by the path of a block: an array [L, n] of its layers


@dataclasses.dataclass(frozen=True)
class Transform:
    """One step of a chain. `describe` records its fields."""

    needs_scores = False  # whether `params` takes a fourth argument, the scores given to `apply`
    sources = 1  # number of models of which it makes one; more than one only at the start of a chain

    def config(self, cfg: ModelConfig) -> ModelConfig:
        """The model that the transform makes of `cfg`. Raises ConfigError, named `upcycle.<field>`, if it cannot."""
        raise NotImplementedError

    def params(self, cfg: ModelConfig, params: dict[str, Array], key: Key[Array, ""]) -> dict[str, Array]:
        """The new model's parameters, by path, from those of `cfg`. A pure function, which is traced.

        Selection biases and tables are among them. With several sources `params` is a tuple.
        """
        raise NotImplementedError

    def changes(self, cfg: ModelConfig) -> str:
        """The reason why the new model computes another function than `cfg`; "" if it computes the same."""
        raise NotImplementedError


def require(ok: bool, name: str, value: Any, rule: str, hint: str) -> None:
    """Raises ConfigError unless `ok`."""
    if not ok:
        raise ConfigError(f"upcycle.{name}", value, rule, hint)


def require_dense(cfg: ModelConfig) -> None:
    """Raises ConfigError if the model has MoE layers, or a memory."""
    layers, routed = cfg.num_layers, cfg.num_moe_layers
    rule = f"the model is a Mixture of Experts already, in {routed} of its {layers} layers"
    hint = "nearest valid: a model without MoE layers, or --method=none for what needs no dense one"
    require(not routed, "from", f"num_moe_layers={routed}", rule, hint)
    memory = any(place.kind.name == "memory" for place in cfg.places)
    require(not memory, "from", f"layers={cfg.layers!r}", "the model has memory blocks, for which there is no rule",
            "nearest valid: a model of dense blocks")  # fmt: skip
    rule = "its layers do not attend alike, and the rules are for layers in one stack"
    require(len(set(cfg.attends)) == 1, "from", f"attention_layers={cfg.attention_layers!r}", rule,
            "nearest valid: one word for all layers")  # fmt: skip


def with_units(cfg: ModelConfig, units: Units) -> ModelConfig:
    """The model with these units of blocks one after the other, whose attention `attention_layers` still says.

    If no block has `moe.num_experts` experts, that number becomes the smallest one that a block has.
    """
    units, moe = [(n, tuple(kind._replace(attends=FULL) for kind in unit)) for n, unit in units], cfg.moe
    counts = sorted({kind.experts for _, unit in units for kind in unit} - {0})
    if counts and moe.num_experts not in counts:
        moe = dataclasses.replace(moe, num_experts=counts[0])
    whole = units_of(tuple(kind for count, unit in units for kind in unit * count))
    late = any(kind.name == "late" for _, unit in units for kind in unit)  # whose unit must stay as it is
    runs = [(unit, list(same)) for unit, same in itertools.groupby(units, lambda pair: pair[1])]
    merged = simplest([(sum(count for count, _ in same), unit) for unit, same in runs])
    units = whole if len(whole) == 1 and not late else merged
    dense = sum(count for count, unit in units if not unit[0].experts)
    plain = is_plain(units, moe.num_experts)
    order = {"num_dense_layers": dense, "layers": ""} if plain else {"num_dense_layers": 0}
    order |= {} if plain else {"layers": spell(units, moe.num_experts)}
    layers = sum(count * len(unit) for count, unit in units)
    try:
        return dataclasses.replace(cfg, num_layers=layers, **order, moe=moe, unroll=min(cfg.unroll, layers))
    except ConfigError as e:
        raise (e if e.name.startswith("upcycle.") else e.inside("upcycle")) from None


def describe(chain: Sequence[Transform]) -> list[dict[str, Any]]:
    """The record of a chain in a checkpoint's origin: one JSON object for each transform."""
    return [{"transform": type(t).__name__, **dataclasses.asdict(t)} for t in chain]


# --- trees -----------------------------------------------------------------------------------------------------------


def fixed_shapes(cfg: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes, by path, of what a model has beside its parameters: selection biases, and tables of experts."""
    moe, found = cfg.moe, {}
    for stack in cfg.stacks:
        for path, kind in zip(stack.paths, stack.unit, strict=True):
            if kind.name == "table":
                shape = (stack.repeat, cfg.vocab_size, moe.top_k)
                tables = {f"{path}/moe/table": jax.ShapeDtypeStruct(shape, jnp.int32)}
                found |= tables if moe.table == "token" else {}
            elif kind.experts and moe.selection_bias:
                shape = (stack.repeat, kind.experts + moe.identity_experts)
                found[f"{path}/moe/router_bias"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return found


def is_fixed(path: str) -> bool:
    """Whether a path is that of a selection bias or of a table, which no optimizer updates."""
    return path.endswith(("/moe/router_bias", "/moe/table"))


def shapes_of(cfg: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a model's parameters, selection biases and tables, by path."""
    return flatten(model.abstract(cfg).shapes) | fixed_shapes(cfg)


def _with_biases(cfg: ModelConfig, flat: dict[str, Array]) -> dict[str, Array]:
    """The parameters by path, with selection biases of zero where there are none. Raises ValueError without a table."""
    missing = {path: x for path, x in fixed_shapes(cfg).items() if path not in flat}
    if tables := [path for path in missing if path.endswith("/table")]:
        raise ValueError(f"{tables[0]} is not there: a table of experts is a part of the model")
    return flat | {path: jnp.zeros(x.shape, x.dtype) for path, x in missing.items()}


Rules = Iterable[tuple[str, str, Callable]]


def by_table(rules: Rules, shapes: dict[str, Any], params: dict[str, Array]) -> dict[str, Array]:
    """The parameters of a model of these shapes, made by rules (pattern, source, function).

    The first rule whose pattern matches the full path of a parameter decides. Its function makes the parameter from the
    one named `source`, or from nothing if that is "". A parameter without a rule, and one of `params` that no rule
    uses, are ValueErrors.
    """
    made, unused = {}, set(params)
    for path in shapes:
        found = next(((m, source, how) for p, source, how in rules if (m := re.fullmatch(p, path))), None)
        if found is None:
            raise ValueError(f"no upcycling rule for the parameter {path}")
        match, source, how = found
        name = match.expand(source)
        unused.discard(name)
        made[path] = how(params[name] if name else None, path)
    if unused:
        raise ValueError(f"no rule uses the parameter {', '.join(sorted(unused))}")
    return made


def scaled(w: Array, factor: Any) -> Array:
    """The product w · factor, computed in float32; `w` itself for a factor of 1."""
    if isinstance(factor, float) and factor == 1.0:
        return w
    return (w.astype(jnp.float32) * factor).astype(w.dtype)


# --- application -----------------------------------------------------------------------------------------------------


def final_config(chain: Sequence[Transform], cfg: ModelConfig) -> ModelConfig:
    """The model that a chain makes of `cfg`. Raises ConfigError if it cannot."""
    final = functools.reduce(lambda c, t: t.config(c), chain, cfg)
    for one, what in ((cfg, "the model"), (final, "the model that is made")):
        for name, count in labels.needs(one).items():
            rule = f"{what} depends on labels of tokens, which no transform knows"
            raise ConfigError(f"upcycle.model.{name.split('=')[0]}", count, rule, "nearest valid: 1")
    return final


def specs_of(cfg: ModelConfig, *, cut_experts: bool = False, whole_banks: bool = False) -> dict:
    """The sharding of a model's parameters on the mesh in use; selection biases and tables lie on every device.

    cut_experts: as in `sharding.weight_spec`. whole_banks: shards no axis of experts, but another one instead.
    """
    graph, sizes = model.abstract(cfg), sharding.current_sizes()

    def spec(x, axes):
        axes = tuple("norm" if whole_banks and name == "experts" else name for name in axes)
        return sharding.weight_spec(axes, x.shape, sizes, cut_experts=cut_experts)

    found = flatten(jax.tree.map(spec, graph.shapes, graph.axes))
    return nest(found | {path: PartitionSpec(*[None] * x.ndim) for path, x in fixed_shapes(cfg).items()})


def traced(chain: Sequence[Transform], cfg: ModelConfig) -> Callable[..., dict]:
    """The jitted function (params, key, scores=None) → params of a chain. Under a mesh its result is sharded over it.

    The compiler distributes the work from the sharding of the result, so no device and no host ever holds all experts.
    """
    shapes = shapes_of(final_config(chain, cfg))

    def run(params, key, scores=None):
        here = cfg
        several = isinstance(params, tuple)
        flat = tuple(_with_biases(cfg, flatten(p)) for p in (params if several else (params,)))
        flat = flat if several else flat[0]
        for i, transform in enumerate(chain):
            given = (scores,) if transform.needs_scores else ()
            flat = transform.params(here, flat, jax.random.fold_in(key, i), *given)
            here = transform.config(here)
            flat = _with_biases(here, flat)
        for path, x in shapes.items():
            if (flat[path].shape, flat[path].dtype) != (x.shape, x.dtype):
                raise ValueError(f"{path} became {jax.typeof(flat[path])}, the model has {x.dtype}{list(x.shape)}")
        if extra := set(flat) - set(shapes):
            raise ValueError(f"{sorted(extra)[0]} is not a parameter of the model")
        return nest(flat)

    if not sharding.current_sizes():
        return jax.jit(run)
    final = final_config(chain, cfg)
    if not cfg.num_moe_layers and not any(t.sources > 1 for t in chain):
        # If the compiler had to make whole experts from a sharded dense layer, it would gather the layer on every
        # device. So it shards experts like the layer, and then each piece is sent to the device of its expert.
        spread = jax.sharding.auto_axes(run, out_sharding=specs_of(final, cut_experts=True))
        return jax.jit(lambda *given: jax.tree.map(jax.sharding.reshard, spread(*given), specs_of(final)))
    # What takes experts out of a bank or adds some reads all experts of a layer: here each device has a piece of each.
    before, after = specs_of(cfg, whole_banks=True), specs_of(final, whole_banks=True)
    spread = jax.sharding.auto_axes(run, out_sharding=after)

    def moved(params, *given):
        pieces = lambda tree: nest({p: jax.sharding.reshard(w, flatten(before)[p]) for p, w in flatten(tree).items()})
        params = tuple(map(pieces, params)) if isinstance(params, tuple) else pieces(params)
        return jax.tree.map(jax.sharding.reshard, spread(params, *given), specs_of(final))

    return jax.jit(moved)


def _check_sources(chain: Sequence[Transform], count: int) -> None:
    """Raises ConfigError if a chain does not make one model of `count`."""
    wanted = chain[0].sources if chain else 1
    require(count == wanted, "from", count, f"the chain makes one model of {wanted}", f"nearest valid: {wanted} models")
    for transform in chain[1:]:
        rule = f"{type(transform).__name__} makes one model of several"
        require(transform.sources == 1, "method", type(transform).__name__, rule, "put it at the start of the chain")


def check_scores(chain: Sequence[Transform], cfg: ModelConfig, scores: Scores | None) -> None:
    """Raises ConfigError if a chain needs scores and has none, or has other ones than it needs.

    scores: of the transform that needs them, by the path of a block in the model before it.
    """
    needs = [i for i, transform in enumerate(chain) if transform.needs_scores]
    names = ", ".join(type(chain[i]).__name__ for i in needs)
    require(len(needs) < 2, "scores", names, "each needs scores of another model", "nearest valid: two chains")
    if not needs:
        require(scores is None, "scores", "given", "no transform of the chain uses scores", "nearest valid: None")
        return
    want = chain[needs[0]].score_shapes(final_config(chain[: needs[0]], cfg))
    rule = f"{names} needs scores of the model's layers"
    require(scores is not None, "scores", None, rule, f"nearest valid: an array [L, n] for each of {sorted(want)}")
    for path in sorted(want.keys() | scores.keys()):
        have, shape = tuple(scores[path].shape) if path in scores else None, want.get(path)
        require(path in want, "scores", path, "is not a block that is scored", f"nearest valid: {sorted(want)}")
        require(have == shape, "scores", have, f"must have the shape {shape} for {path}", f"nearest valid: {shape}")
        finite = bool(jnp.all(jnp.isfinite(scores[path])))
        require(finite, "scores", path, "has a score that is not a finite number", "nearest valid: finite numbers")


def apply(
    chain: Sequence[Transform],
    cfg: ModelConfig,
    params: dict | tuple[dict, ...],
    seed: int = 0,
    scores: Scores | None = None,
) -> tuple[ModelConfig, dict]:
    """The config and parameters that a chain makes of a model, on the mesh in use (`jax.set_mesh`), else `params`' own.

    params: with selection biases and tables among them (`tree.join(params, router_bias)`), as they are in the result.
        Biases that are not there are 0. A tuple for a chain that begins with `Merge`.
    scores: of experts for `Prune`, of hidden units for `Importance`; refused without one of them.
    The values do not depend on the mesh. Raises ConfigError before anything is compiled.
    """
    final = final_config(chain, cfg)
    _check_sources(chain, len(params) if isinstance(params, tuple) else 1)
    check_scores(chain, cfg, scores)
    given = [scores] if scores is not None else []
    mesh = None if sharding.current_sizes() else _mesh_of(params)
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():  # parameters of an opened run need one
        return final, traced(chain, cfg)(params, jax.random.key(seed), *given)


def _mesh_of(params: dict | tuple[dict, ...]) -> Mesh | None:
    """The mesh that parameters are sharded over; None if they are not."""
    found = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(params))
    return next((one.mesh for one in found if isinstance(one, NamedSharding)), None)


@jax.jit
def _mean(total: dict, params: dict, share: float) -> dict:
    return jax.tree.map(lambda t, p: t + share * p.astype(jnp.float32), total, params)


def shares_of(weights: Sequence[float] | None, count: int) -> list[float]:
    """The share of each of `count` models in an average: its weight over the sum of all; equal shares without weights.

    Raises ConfigError for weights that are no shares.
    """
    weights = [1.0] * count if weights is None else list(weights)
    hint = f"nearest valid: {','.join(['1'] * count)}"
    require(len(weights) == count, "weights", weights, f"must be {count} numbers, one for each model", hint)
    good = all(math.isfinite(w) and w >= 0 for w in weights) and 0 < sum(weights) < math.inf
    require(good, "weights", weights, "must be ≥ 0, and not all 0", hint)
    return [w / math.fsum(weights) for w in weights]


def average(several: Iterable[dict], count: int, weights: Sequence[float] | None = None) -> dict:
    """The mean of `count` models' parameters, summed in float32 and cast to the dtypes of the first model.

    weights: of the models, divided by their sum; by default equal. Only one model is in memory at a time. Raises
    ValueError for integers, such as a table of experts. Source: checkpoint averaging, arXiv:2203.05482 (model soups).
    """
    total, dtypes = None, None
    for params, share in zip(several, shares_of(weights, count), strict=True):
        for path, w in flatten(params).items():
            if not jnp.issubdtype(w.dtype, jnp.floating):
                raise ValueError(f"{path} has no mean: it is of {w.dtype}")
        dtypes = dtypes or jax.tree.map(lambda p: p.dtype, params)
        total = total or jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params)
        total = _mean(total, params, share)
    return jax.tree.map(lambda t, dtype: t.astype(dtype), total, dtypes)


# --- comparison ------------------------------------------------------------------------------------------------------


@functools.cache
def _forward(cfg: ModelConfig) -> Callable[..., Array]:
    graph = model.abstract(cfg)

    @jax.jit
    def run(params, bias, tokens):
        b, s = tokens.shape
        positions = jnp.broadcast_to(jnp.arange(s, dtype=jnp.int32), (b, s), out_sharding=sharding.BATCH)
        info = TokenInfo(jnp.ones_like(tokens, bool), jnp.zeros_like(tokens))
        net = graph.bind(params, bias)
        hidden = net(model.Inputs(tokens, positions, None, info)).hidden
        out = PartitionSpec(sharding.AXES, None, None)
        matrix = weight(net.output_matrix, jnp.float32)
        return jnp.einsum("bsd,vd->bsv", hidden, matrix, precision=jax.lax.Precision.HIGHEST, out_sharding=out)

    return run


def logits(cfg: ModelConfig, params: dict, tokens: Int[np.ndarray, "B S"], mesh: Mesh) -> Float[Array, "B S V"]:
    """The logits of a model in float32. B must be a multiple of the devices.

    params: with selection biases and tables among them; biases that are not there are 0.
    """
    cfg = dataclasses.replace(cfg, compute_dtype="float32", attention="xla", remat="none")
    with jax.set_mesh(mesh):
        fixed, params = split(nest(_with_biases(cfg, flatten(params))), is_fixed)
        return _forward(cfg)(params, fixed, jax.device_put(tokens, NamedSharding(mesh, sharding.BATCH)))


@jax.jit
def _relative(a: Array, b: Array) -> Array:
    return jnp.sqrt(jnp.sum(jnp.square(b - a)) / jnp.sum(jnp.square(a)))


def logits_error(before: tuple[ModelConfig, dict], after: tuple[ModelConfig, dict], mesh: Mesh,
                 tokens: Int[np.ndarray, "B S"] | None = None) -> float:  # fmt: skip
    """‖logits after − logits before‖ / ‖logits before‖ in float32, over `tokens` (default: random ones)."""
    if tokens is None:
        rng = np.random.default_rng(0)
        tokens = rng.integers(0, before[0].vocab_size, (mesh.size, 64)).astype(np.int32)
    out = [logits(cfg, params, tokens, mesh) for cfg, params in (before, after)]
    with jax.set_mesh(mesh):
        return float(_relative(*out))
