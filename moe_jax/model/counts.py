"""Numbers of parameters and FLOPs of a model, by formula."""

import dataclasses

import jax

from moe_jax.config import ModelConfig
from moe_jax.model.transformer import abstract
from moe_jax.nn.layers import ACTIVATIONS


@dataclasses.dataclass(frozen=True)
class Counts:
    """Numbers of parameters. Active parameters are those used for one token: without the experts it does not choose."""

    total: int
    active: int
    active_no_embedding: int  # also without the embedding and output tables


def count_parameters(cfg: ModelConfig) -> Counts:
    """Counts the parameters of a model, without allocating any."""
    shapes = abstract(cfg).shapes
    total = sum(x.size for x in jax.tree.leaves(shapes))
    expert = (2 + ACTIVATIONS[cfg.activation].gated) * cfg.d_model * cfg.moe.d_expert
    idle = cfg.num_moe_layers * (cfg.moe.num_experts - cfg.moe.top_k) * expert
    tables = cfg.vocab_size * cfg.d_model * (1 if cfg.tie_embeddings else 2)
    return Counts(total, total - idle, total - idle - tables)


def flops_per_token(cfg: ModelConfig, seq_len: int) -> float:
    """Model FLOPs of one training token, forward and backward: 6 per active matmul weight, plus causal attention.

    The output matrix counts as a matmul, the embedding look-up does not. Attention is two products with S/2 keys on
    average: 6·S·N·H a layer; in MLA the product with values has their head size. Recomputation is not counted: these
    are the FLOPs of the model, MFU's numerator, not those that the hardware does.
    """
    matmul = count_parameters(cfg).active_no_embedding + cfg.vocab_size * cfg.d_model
    leaves = jax.tree_util.tree_leaves_with_path(abstract(cfg).shapes)
    norms = sum(x.size for path, x in leaves if path[-1].key.endswith("norm"))
    heads = cfg.num_heads * (cfg.head_dim + cfg.v_dim)
    return 6.0 * (matmul - norms) + 3.0 * cfg.num_layers * seq_len * heads
