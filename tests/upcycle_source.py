"""A tiny dense model and one with experts, what a chain of transforms makes of them, and how far its logits are off.

Its random weights are of unit size, so that feed-forward layers are far from linear, and so are the norms' scales.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from absl.testing import flagsaver

from moe_jax import config, model, upcycle
from moe_jax.config import ModelConfig
from moe_jax.parallel import sharding
from moe_jax.tree import flatten, join
from moe_jax.upcycle import Prune, Transform
from moe_jax.upcycle import __main__ as program

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


def chain_of(options: str) -> list[Transform]:
    """The chain that the command makes of its options."""
    with flagsaver.flagsaver():
        flags.FLAGS(["upcycle", "--from=runs/dense", "--workdir=runs/made", *options.split()])
        program.check_options()
        made = program.chain_of_flags()
    flags.FLAGS.unparse_flags()
    return made


# --- models with experts ----------------------------------------------------------------------------------------------

# Interleaved, with two numbers of experts, shared ones, selection biases, and a router whose weights are not experts'.
BANK = dataclasses.replace(
    SOURCE, num_layers=3, num_dense_layers=0, layers="moe dense moe:8",
    moe=config.MoEConfig(num_experts=4, top_k=2, d_expert=16, num_shared_experts=1, selection_bias=True,
                         renormalize=True, score="sigmoid"),
)  # fmt: skip

PLAIN = dataclasses.replace(BANK, num_layers=2, layers="")


@functools.cache
def bank(shape=(1, 1, 1), seed=1, cfg: ModelConfig = BANK):
    """A model with experts, its weights large enough that layers are far from linear, and random selection biases."""
    with jax.set_mesh(mesh_of(*shape)):
        params, bias = model.init(cfg, jax.random.key(seed))
        noise = lambda b: 0.2 * jax.random.normal(jax.random.key(seed), b.shape) if b.dtype == jnp.float32 else b
        return cfg, join(params, jax.tree.map(noise, bias))


def made(chain, source, shape=(1, 1, 1), **given):
    with jax.set_mesh(mesh_of(*shape)):
        return upcycle.apply(chain, *source, **given)


def off(source, result, shape=(1, 1, 1)) -> float:
    return upcycle.logits_error(source, result, mesh_of(*shape), TOKENS)


def arrays(result) -> dict[str, np.ndarray]:
    return {path: np.asarray(w) for path, w in flatten(result[1]).items()}


def same_bits(a, b):
    assert a[0] == b[0]
    jax.tree.map(np.testing.assert_array_equal, arrays(a), arrays(b))


def scores_of(cfg, first: int):
    """Scores by which the first experts of every layer stay: `first` of those with the smaller number."""
    count = lambda e: first * e // min(cfg.expert_counts)
    return {path: np.arange(shape[1])[None] < np.full((shape[0], 1), count(shape[1])) + 0.0
            for path, shape in Prune(first).score_shapes(cfg).items()}  # fmt: skip
