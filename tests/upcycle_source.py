"""A tiny dense model, what a chain of transforms makes of it, and how far its logits are from the dense ones.

Its random weights are of unit size, so that feed-forward layers are far from linear, and so are the norms' scales.
"""

import dataclasses
import functools

import jax
import numpy as np

from moe_jax import model, upcycle
from moe_jax.config import ModelConfig
from moe_jax.parallel import sharding

ACTIVATIONS = ("swiglu", "gelu", "relu2")
SOURCE = ModelConfig(
    vocab_size=32, d_model=16, num_layers=2, num_dense_layers=2, d_ff=32, num_heads=2, num_kv_heads=1, head_dim=8,
    qk_norm=True, init_std=0.3, compute_dtype="float32",
)  # fmt: skip
STD = 0.5  # of the router: its logits have a standard deviation of 2
TOKENS = np.random.default_rng(0).integers(0, 32, (8, 16)).astype(np.int32)

# Routing with combine weights of a fixed sum.
FIXED = {
    "topk_softmax": {"score_order": "topk_score"},
    "softmax_renormalised": {"score_order": "score_topk", "renormalize": True, "routed_scaling": 1.5},
    "sigmoid_renormalised": {"score": "sigmoid", "score_order": "score_topk", "renormalize": True,
                             "routed_scaling": 2.5},
}  # fmt: skip
SOFTMAX_TOPK = {"score_order": "score_topk"}


@functools.cache
def mesh_of(*shape):
    return sharding.make_mesh(shape, jax.devices()[: int(np.prod(shape))])


@functools.cache
def dense(activation="swiglu", shape=(1, 1, 1), **fields) -> tuple[ModelConfig, dict]:
    """A dense model and its parameters, the norms' scales random, too."""
    cfg = dataclasses.replace(SOURCE, activation=activation, **fields)
    with jax.set_mesh(mesh_of(*shape)):
        params, _ = jax.jit(functools.partial(model.init, cfg))(jax.random.key(1))
        random = lambda path, w: w * (1 + 0.3 * jax.random.normal(jax.random.key(len(str(path))), w.shape))
        norms = lambda path, w: random(path, w).astype(w.dtype) if "norm" in path[-1].key else w
        return cfg, jax.tree_util.tree_map_with_path(norms, params)


@functools.cache
def dense_logits(activation="swiglu"):
    return np.asarray(upcycle.logits(*dense(activation), TOKENS, mesh_of(1, 1, 1)))


def apply(chain, activation="swiglu", shape=(1, 1, 1), seed=0):
    with jax.set_mesh(mesh_of(*shape)):
        return upcycle.apply(chain, *dense(activation, shape), seed)


def distance(logits, activation="swiglu") -> float:
    """Largest difference of a logit from the dense model's, over its largest."""
    return float(np.abs(logits - dense_logits(activation)).max() / np.abs(dense_logits(activation)).max())


def error(chain, activation="swiglu", shape=(1, 1, 1)) -> float:
    """`distance` of what a chain makes."""
    return distance(upcycle.logits(*apply(chain, activation, shape), TOKENS, mesh_of(*shape)), activation)
