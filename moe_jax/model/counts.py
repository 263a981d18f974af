"""Numbers of parameters and FLOPs of a model, from the shapes and logical axes of its parameters."""

import dataclasses
import math
from collections.abc import Iterator

import jax

from moe_jax.config import ModelConfig
from moe_jax.model.transformer import abstract
from moe_jax.tree import flatten


@dataclasses.dataclass(frozen=True)
class Counts:
    """Numbers of parameters. Active parameters are those used for one token: without the experts it does not choose."""

    total: int
    active: int
    active_no_embedding: int  # also without the embedding and output tables


# Share of a leaf that one token uses, by logical axis: (config, size of the axis) → share. Other axes are used whole.
SHARE_IN_USE = {"experts": lambda cfg, e: dataclasses.replace(cfg.moe, num_experts=e).mean_slots / e}


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
    total, active = sum(size for _, _, size, _ in leaves), round(sum(used for *_, used in leaves))
    return Counts(total, active, active - tables)


def flops_per_token(cfg: ModelConfig, seq_len: int, frozen: frozenset[str] = frozenset()) -> float:
    """Model FLOPs of one training token, forward and backward: 6 per active matmul weight, plus causal attention.

    A third of the 6 is the weight's own gradient, which the parameters at the paths `frozen` do not have.

    The output matrix counts as a matmul, the embedding look-up does not. Attention is two products with S/2 keys on
    average: 6·S·N·H a layer; in MLA the product with values has their head size. Recomputation is not counted: these
    are the FLOPs of the model, MFU's numerator, not those that the hardware does.
    """
    looked_up = () if cfg.tie_embeddings else ("embed",)
    matmul = {path: used for path, names, _, used in _leaves(cfg) if "norm" not in names and path not in looked_up}
    fixed = sum(used for path, used in matmul.items() if path in frozen)
    heads = cfg.num_heads * (cfg.head_dim + cfg.v_dim)
    return 6.0 * sum(matmul.values()) - 2.0 * fixed + 3.0 * cfg.num_layers * seq_len * heads
