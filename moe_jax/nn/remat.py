"""Rematerialisation (`model.remat`): which values of a layer are kept for the backward pass, and which computed again.

`selective` keeps the values named here, because computing them again would take a matmul, a sort or a collective sum.
It computes again what takes one pass over memory: norms, RoPE, SiLU·up, casts, the K copies of a token that go to its
experts. The last column counts numbers for each token and layer. `kv`, `q` and `r` stand for kv_rank, q_rank and
rope_dim of MLA, W for its head size of values:

| name           | values                                                      | numbers                         |
|----------------|-------------------------------------------------------------|---------------------------------|
| (the layer's input, which the scan over layers keeps in any case)            | D                               |
| `qkv`          | projections, before norm and RoPE                           | N·H + 2·M·H                     |
|                | MLA: latents, rotated keys, queries, keys and values        | kv + r + N·(2·H − r + W) (+ q)  |
| `attention`    | its result; flash attention also the logsumexp of a query   | N·H (+ N float32)               |
|                | cuDNN, packed: one for each of its lists' 24 to 48 places   | (+ 24·N to 48·N float32)        |
| `residual`     | the layer's input plus attention; with model.mtp_layers     | D                               |
|                | also what the block of such a layer reads                   |                                 |
| `router`       | logits                                                      | E float32                       |
| `rows`         | rows sorted by expert                                       | 2·K int32                       |
| `latent`       | with moe.latent, what routed experts read and their sum     | 2·latent                        |
| `branches`     | with moe.shared_gate, routed and shared experts' results    | 2·D                             |
| `gate`, `up`   | pre-activations of routed and shared experts, or dense GLUs | 2·K·F, 2·F shared or dense      |
| `memory`       | queries before their norm; rows that are read, their scores | heads · key_dim; heads · top    |
|                |                                                             | int32 and float32               |
"""

from typing import TypeVar

import jax
from jax.ad_checkpoint import checkpoint_name

KEPT = ("qkv", "attention", "residual", "router", "rows", "latent", "branches", "gate", "up", "memory")
# cuDNN's attention without segments is one primitive that returns result and logsumexp: no value in it can be named.
KEPT_PRIMITIVES = ("dot_product_attention_fwd_wrapper",)

Tree = TypeVar("Tree")


def keep(values: Tree, name: str) -> Tree:
    """Marks `values`, any pytree of arrays: `model.remat='selective'` keeps them for the backward pass."""
    if name not in KEPT:
        raise ValueError(f"{name!r} is not in remat.KEPT={KEPT}")
    return jax.tree.map(lambda x: checkpoint_name(x, name), values)


_named = jax.checkpoint_policies.save_only_these_names(*KEPT)


def _selective(primitive, *args, **params):
    return primitive.name in KEPT_PRIMITIVES or _named(primitive, *args, **params)


POLICIES = {
    "none": None,  # everything is kept
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "selective": _selective,
    "full": jax.checkpoint_policies.nothing_saveable,
}
