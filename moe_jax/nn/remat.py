"""What the backward pass of a layer keeps of its forward pass, and what it computes again: `model.remat`.

`selective` keeps the values named here, which cost a matmul, a sort or a collective sum to have again, and computes
again what costs one pass over memory: norms, RoPE, SiLU·up, casts, the K copies of a token that go to its experts.
In numbers of a token and layer, N·H and M·H the widths of queries and keys, N·W that of MLA's values:

| name           | what                                                        | numbers                         |
|----------------|-------------------------------------------------------------|---------------------------------|
| (the layer's input, which the scan over layers keeps in any case)            | D                               |
| `qkv`          | projections, before norm and RoPE                           | N·H + 2·M·H                     |
|                | MLA, of latents C (and of queries Q), P numbers rotated     | C + P + N·(2·H − P + W) (+ Q)   |
| `attention`    | its result; flash attention: and the logsumexp a query      | N·H (+ N float32)               |
| `residual`     | the layer's input plus attention                            | D                               |
| `router`       | logits                                                      | E float32                       |
| `rows`         | rows sorted by expert                                       | 2·K int32                       |
| `gate`, `up`   | pre-activations of routed and shared experts, or dense GLUs | 2·K·F, 2·F shared or dense      |
"""

from typing import TypeVar

import jax
from jax.ad_checkpoint import checkpoint_name

KEPT = ("qkv", "attention", "residual", "router", "rows", "gate", "up")
# cuDNN's attention without segments is a primitive of JAX's with result and logsumexp: nothing in it can be named.
KEPT_PRIMITIVES = ("dot_product_attention_fwd_wrapper",)

Tree = TypeVar("Tree")


def keep(values: Tree, name: str) -> Tree:
    """`values`, any pytree of arrays, which `model.remat='selective'` keeps for the backward pass."""
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
