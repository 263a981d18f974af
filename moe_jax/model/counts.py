"""Numbers of parameters and FLOPs of a model, from the shapes and logical axes of its parameters."""

import dataclasses
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from moe_jax.config import ModelConfig
from moe_jax.model.transformer import abstract
from moe_jax.nn import fake_quant
from moe_jax.tree import flatten


@dataclasses.dataclass(frozen=True)
class Counts:
    """Numbers of parameters. Active parameters are those used for one token: without the experts it does not choose.

    Layers of multi-token prediction are counted, which only training uses.
    """

    total: int
    active: int
    active_no_embedding: int  # also without the embedding and output tables


# Share of a leaf that one token uses, by logical axis: (config, size of the axis) → share. Other axes are used whole.
SHARE_IN_USE = {
    "experts": lambda cfg, e: dataclasses.replace(cfg.moe, num_experts=e).mean_slots / e,
    "labels": lambda cfg, labels: 1 / labels,
    "memory": lambda cfg, rows: cfg.memory.reads / rows,
}


def _leaves(cfg: ModelConfig) -> Iterator[tuple[str, tuple[str, ...], int, float]]:
    """Yields path, logical axes, size, and the size that one token uses, of each parameter."""
    graph = abstract(cfg)
    axes = flatten(jax.tree.map(" ".join, graph.axes, is_leaf=lambda x: isinstance(x, tuple)))
    for path, x in flatten(graph.shapes).items():
        names = tuple(axes[path].split())
        shares = [SHARE_IN_USE[name](cfg, n) for name, n in zip(names, x.shape, strict=True) if name in SHARE_IN_USE]
        yield path, names, x.size, x.size * math.prod(shares)


def count_parameters(cfg: ModelConfig) -> Counts:
    """Counts the parameters of a model, without allocating any."""
    leaves = list(_leaves(cfg))
    tables = sum(size for _, names, size, _ in leaves if "vocab" in names)
    total, active = sum(size for _, _, size, _ in leaves), round(math.fsum(used for *_, used in leaves))
    return Counts(total, active, active - tables)


def flops_per_token(cfg: ModelConfig, seq_len: int, frozen: frozenset[str] = frozenset()) -> float:
    """Model FLOPs of one training token, forward and backward: 6 per active matmul weight, plus causal attention.

    Of the 6, 2 are the forward pass, 2 the gradient of the weight's input, and 2 its own. The parameters at the paths
    `frozen` lack the last; in stacks below the first that has something to train they lack the last two.

    The output matrix counts as a matmul, the embedding look-up does not. Attention is two products with S/2 keys on
    average: 6·S·N·H a layer; in MLA the product with values has their head size. With a window of W < S tokens the keys
    are W − W²/2S on average. Recomputation is not counted: these
    are the FLOPs of the model, MFU's numerator, not those that the hardware does. The rows of a
    memory that a token reads count like weights: 2 FLOPs for each number, forward and for each of two gradients.
    Layers of multi-token prediction count like others, and the output matrix once more for each.
    """
    looked_up = () if cfg.tie_embeddings else ("embed",)
    leaves = list(_leaves(cfg))
    stacks = [stack.name for stack in cfg.stacks]
    order = ["embed", "embed_bias", "embed_scale", *stacks, "final_norm", "mtp", "head"]
    place = lambda path: order.index(path.partition("/")[0])
    trained = [place(path) for path, *_ in leaves if path not in frozen]
    first = min(trained, default=0)
    first_below_head = min((at for at in trained if at != place("mtp")), default=len(order))  # of the decoder's own use
    factor = lambda path, at, first: 2.0 if at < first else 4.0 if path in frozen else 6.0
    flops = 0.0
    for path, names, _, used in leaves:
        if "norm" in names or path in looked_up:
            continue
        product = "head" if path == "embed" else path  # the tied embedding is a product at the end
        at = place(product)
        if product == "head":
            flops += used * (factor(path, at, first_below_head) + cfg.mtp_layers * factor(path, at, first))
        else:
            flops += used * factor(path, at, first)
    heads = cfg.num_heads * (cfg.head_dim + cfg.v_dim)
    for name, _, kind in (*cfg.places, *cfg.mtp_places):
        window = min(cfg.window, seq_len) if kind.attends.window else seq_len
        flops += (1.0 if place(name) < first else 3.0) * (2 * window - window**2 / seq_len) * heads
    return flops


def stored_bytes(cfg: ModelConfig, *, packed: bool = True) -> int:
    """Bytes of a model's weights in the compute dtype, those of ternary experts packed (`fake_quant.packed_bytes`).

    packed: False counts ternary experts in the compute dtype too.
    """
    size, itemsize = 0, jnp.dtype(cfg.compute_dtype).itemsize
    graph = abstract(cfg)
    axes = flatten(jax.tree.map(" ".join, graph.axes, is_leaf=lambda x: isinstance(x, tuple)))
    for path, x in flatten(graph.shapes).items():
        rounded = packed and cfg.moe.expert_weights == "ternary" and "experts" in axes[path].split()
        size += fake_quant.packed_bytes(x.shape) if rounded else x.size * itemsize
    return size
