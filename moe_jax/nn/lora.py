"""LoRA: y = x · W + scale · (x · A) · B, where W is frozen and A and B are trained. Source: arXiv:2106.09685.

A matrix `layers/attention/w_q` has its adapter beside it: `layers/attention/w_q_adapter/lora_a` and `…/lora_b`. A stack
of experts has an A and a B for each expert. Both are float32, whatever the dtype of W. A is uniform in ±1/√in and B is
zero, as in PEFT, so that a fresh adapter adds exactly 0. No product A · B is made while a model is trained.

`layers.linear` adds the adapter's part to a dense product, and moe/experts.py to the products of experts.
"""

import difflib
import re

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moe_jax.config import LoRAConfig, ModelConfig
from moe_jax.errors import ConfigError
from moe_jax.nn.layers import Init, weight
from moe_jax.parallel import sharding
from moe_jax.tree import flatten, nest

SUFFIX = "_adapter"
NAMES = ("lora_a", "lora_b")
# Paths of matrices without one: those of routers, whose logits are computed in float32 from W alone, and the one or two
# columns of the shared experts' gate.
NEVER = r"/router/|/w_(router|shared_gate)$"


class Adapter(nnx.Module):
    """The adapter of a matrix, or of a stack of them."""

    def __init__(self, w: nnx.Param, cfg: LoRAConfig, init: Init):
        """w: the matrix. init: for weights of its stack."""
        axes, shape, init = w.get_metadata()["axes"], w.shape, init.as_float32()
        if init.layers is not None:
            axes, shape = axes[1:], shape[1:]
        *lead, inner, outer = shape
        *names, first, last = axes
        self.scale = cfg.scale
        a, b = " ".join((*names, first, "rank")), " ".join((*names, "rank", last))
        self.lora_a = init.uniform((*lead, inner, cfg.rank), a, inner**-0.5)
        self.lora_b = init.filled((*lead, cfg.rank, outer), b, 0.0)

    @property
    def factors(self) -> tuple[Float[Array, "*E D r"], Float[Array, "*E r F"]]:
        """scale · A, and B, in float32."""
        return self.scale * self.lora_a[...], self.lora_b[...]

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S F"]:
        """Returns what the adapter of a dense matrix adds to x · W."""
        a, b = (sharding.replicate(m.astype(x.dtype)) for m in self.factors)
        return (x @ a) @ b


def adapter_of(layer: nnx.Module, name: str) -> Adapter | None:
    """The adapter of the matrix of this name in a layer; None without one."""
    return getattr(layer, name + SUFFIX, None)


def whole_matrix(layer: nnx.Module, name: str, dtype) -> Float[Array, "D F"]:
    """W + scale · A · B of a dense matrix, where one is used as a matrix and not in a product with tokens."""
    w, adapter = weight(getattr(layer, name), dtype), adapter_of(layer, name)
    if adapter is None:
        return w
    a, b = map(sharding.replicate, adapter.factors)
    return (w.astype(jnp.float32) + a @ b).astype(dtype)


def adapt(module: nnx.Module, cfg: LoRAConfig, path: str, init: Init) -> tuple[list[str], list[str]]:
    """Gives every matrix of a module that `cfg.match` matches an adapter. path: of the module in the parameters.

    Returns the paths of the matrices that have one now, and of all that may have one.
    """
    matched, possible = [], []
    for name, value in list(vars(module).items()):
        where = f"{path}/{name}"
        if isinstance(value, nnx.Module):
            inner = adapt(value, cfg, where, init)
            matched, possible = matched + inner[0], possible + inner[1]
        elif isinstance(value, nnx.Param) and name.startswith("w_") and not re.search(NEVER, where):
            possible.append(where)
            if re.search(cfg.match, where):
                setattr(module, name + SUFFIX, Adapter(value, cfg, init))
                matched.append(where)
    return matched, possible


def check_matched(cfg: LoRAConfig, matched: list[str], possible: list[str]) -> None:
    """Raises ConfigError if no matrix has an adapter."""
    if not matched:
        rule = f"matches none of the {len(possible)} matrices that may have an adapter"
        (close,) = difflib.get_close_matches(cfg.match, possible, 1, 0.0)
        raise ConfigError("model.lora.match", cfg.match, rule, f"nearest valid: {close!r}")


def describe(cfg: ModelConfig, shapes: dict[str, jax.ShapeDtypeStruct]) -> str:
    """One line about the adapters of a run: which matrices have one, and which have none. shapes: by path."""
    size = sum(x.size for path, x in shapes.items() if is_adapter(path))
    adapted = {matrix_of(path) for path in shapes if is_adapter(path)}
    tables = ("embed", "head", "memory/keys", "memory/values")
    is_matrix = lambda path: path.endswith(tables) or path.rpartition("/")[2].startswith("w_")
    without = {path for path in shapes if is_matrix(path) and not is_adapter(path)} - adapted
    # Without the stack, in which blocks of one kind are alike.
    names = lambda paths: ", ".join(sorted({path.partition("/")[2] or path for path in paths}))
    return (
        f"adapters of rank {cfg.lora.rank}, {size:,} parameters, which AdamW updates, on {names(adapted)}; none on "
        f"{names(without)}; all weights of the base are frozen"
    )


# --- trees of parameters ---------------------------------------------------------------------------------------------


def is_adapter(path: str) -> bool:
    """Whether the parameter at a path is part of an adapter."""
    return path.endswith(NAMES)


def matrix_of(path: str) -> str:
    """The path of the matrix whose adapter a parameter at a path is part of."""
    return path.rpartition("/")[0].removesuffix(SUFFIX)


def merge(base: dict, adapters: dict, scale: float) -> dict:
    """The parameters W + scale · A · B, computed in float32 and cast to the dtype of W. Exact in real arithmetic.

    base, adapters: parameters of the model without adapters, and those of the adapters. Call it under the mesh.
    """
    flat, parts = flatten(base), flatten(adapters)
    for path in sorted({path.rpartition("/")[0] for path in parts}):
        name = path.removesuffix(SUFFIX)
        flat[name] = _merged(flat[name], parts[f"{path}/lora_a"], parts[f"{path}/lora_b"], scale)
    return nest(flat)


@jax.jit
def _merged(w: Array, a: Array, b: Array, scale: float) -> Array:
    """One matrix or stack, sharded as W."""
    spec = jax.typeof(w).sharding.spec if sharding.current_sizes() else None
    whole = [sharding.replicate(m) for m in (scale * a, b)]
    letters = "leij"[-w.ndim :]
    delta = jnp.einsum(
        f"{letters[:-1]}r,{letters[:-2]}r{letters[-1]}->{letters}", *whole, precision="highest", out_sharding=spec
    )
    return (w.astype(jnp.float32) + delta).astype(w.dtype)
