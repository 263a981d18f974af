"""Applies a chain of transforms to parameters, which are sharded by the model's spec table before and after."""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int, Key

from moe_jax import model
from moe_jax.config import ModelConfig
from moe_jax.errors import ConfigError
from moe_jax.moe.layer import TokenInfo
from moe_jax.nn.layers import weight
from moe_jax.parallel import sharding
from moe_jax.train.state import abstract_weights
from moe_jax.tree import flatten, nest


@dataclasses.dataclass(frozen=True)
class Transform:
    """One step of a chain. `describe` records its fields."""

    def config(self, cfg: ModelConfig) -> ModelConfig:
        """The model that the transform makes of `cfg`. Raises ConfigError, named `upcycle.<field>`, if it cannot."""
        raise NotImplementedError

    def params(self, cfg: ModelConfig, params: dict[str, Array], key: Key[Array, ""]) -> dict[str, Array]:
        """The new model's parameters, by path, from those of `cfg`. A pure function, which is traced."""
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
    require(not routed, "from", f"num_moe_layers={routed}", rule, "nearest valid: a model without MoE layers")
    memory = any(place.kind.name == "memory" for place in cfg.places)
    require(not memory, "from", f"layers={cfg.layers!r}", "the model has memory blocks, for which there is no rule",
            "nearest valid: a model of dense blocks")  # fmt: skip
    rule = "its layers do not attend alike, and the rules are for layers in one stack"
    require(len(set(cfg.attends)) == 1, "from", f"attention_layers={cfg.attention_layers!r}", rule,
            "nearest valid: one word for all layers")  # fmt: skip


def describe(chain: Sequence[Transform]) -> list[dict[str, Any]]:
    """The record of a chain in a checkpoint's origin: one JSON object for each transform."""
    return [{"transform": type(t).__name__, **dataclasses.asdict(t)} for t in chain]


# --- trees -----------------------------------------------------------------------------------------------------------


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
    return functools.reduce(lambda c, t: t.config(c), chain, cfg)


def specs_of(cfg: ModelConfig, **options: bool) -> dict:
    """The sharding of a model's parameters on the mesh in use. Options are those of `sharding.weight_spec`."""
    graph, sizes = model.abstract(cfg), sharding.current_sizes()
    spec = lambda x, axes: sharding.weight_spec(axes, x.shape, sizes, **options)
    return jax.tree.map(spec, graph.shapes, graph.axes)


def traced(chain: Sequence[Transform], cfg: ModelConfig) -> Callable[[dict, Key[Array, ""]], dict]:
    """The jitted function (params, key) → params of a chain. Under a mesh its result is sharded over the mesh.

    The compiler distributes the work from the sharding of the result, so no device and no host ever holds all experts.
    """
    shapes = flatten(model.abstract(final_config(chain, cfg)).shapes)

    def run(params, key):
        here, flat = cfg, flatten(params)
        for i, transform in enumerate(chain):
            flat = transform.params(here, flat, jax.random.fold_in(key, i))
            here = transform.config(here)
        for path, x in shapes.items():
            if (flat[path].shape, flat[path].dtype) != (x.shape, x.dtype):
                raise ValueError(f"{path} became {jax.typeof(flat[path])}, the model has {x.dtype}{list(x.shape)}")
        if extra := set(flat) - set(shapes):
            raise ValueError(f"{sorted(extra)[0]} is not a parameter of the model")
        return nest(flat)

    if not sharding.current_sizes():
        return jax.jit(run)
    final = final_config(chain, cfg)
    # If the compiler had to make whole experts from a sharded dense layer, it would gather the layer on every device.
    # So it shards experts like the layer, and then each piece is sent to the device of its expert.
    spread = jax.sharding.auto_axes(run, out_sharding=specs_of(final, cut_experts=True))
    return jax.jit(lambda params, key: jax.tree.map(jax.sharding.reshard, spread(params, key), specs_of(final)))


def apply(chain: Sequence[Transform], cfg: ModelConfig, params: dict, seed: int = 0) -> tuple[ModelConfig, dict]:
    """The config and parameters that a chain makes of a model, on the mesh in use (`jax.set_mesh`), if any.

    The values do not depend on the mesh. Raises ConfigError before anything is compiled.
    """
    final = final_config(chain, cfg)
    return final, traced(chain, cfg)(params, jax.random.key(seed))


@jax.jit
def _mean(total: dict, params: dict, share: float) -> dict:
    return jax.tree.map(lambda t, p: t + share * p.astype(jnp.float32), total, params)


def average(several: Iterable[dict], count: int) -> dict:
    """The mean of `count` models' parameters, summed in float32 and cast to the dtypes of the first model.

    Only one model is in memory at a time. Source: checkpoint averaging, arXiv:2203.05482 (model soups).
    """
    total, dtypes = None, None
    for params in several:
        dtypes = dtypes or jax.tree.map(lambda p: p.dtype, params)
        total = total or jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params)
        total = _mean(total, params, 1.0 / count)
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
        out = jax.sharding.PartitionSpec(sharding.AXES, None, None)
        matrix = weight(net.output_matrix, jnp.float32)
        return jnp.einsum("bsd,vd->bsv", hidden, matrix, precision=jax.lax.Precision.HIGHEST, out_sharding=out)

    return run


def logits(cfg: ModelConfig, params: dict, tokens: Int[np.ndarray, "B S"], mesh: Mesh) -> Float[Array, "B S V"]:
    """The logits of a model in float32, with selection biases of zero. B must be a multiple of the devices."""
    cfg = dataclasses.replace(cfg, compute_dtype="float32", attention="xla", remat="none")
    with jax.set_mesh(mesh):
        bias = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract_weights(cfg, mesh)[1])
        return _forward(cfg)(params, bias, jax.device_put(tokens, NamedSharding(mesh, sharding.BATCH)))


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
