"""Models with each kind of router, their states on meshes, and all that one optimizer batch of them makes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from test_invariance import batch_rows, run_config

from moe_jax import config
from moe_jax.config import ExploreConfig, RampConfig
from moe_jax.parallel import sharding
from moe_jax.train import step
from moe_jax.train.gradients import make_gradients
from moe_jax.train.state import abstract_state, init_state, put_batch

MLP = (
    {"num_experts": 4, "top_k": 2, "router": "mlp", "router_width": 8, "identity_experts": 2},
    ExploreConfig(RampConfig(1.0, 0.2, 4), 1.0, 0.1, RampConfig(2.0, 0.5, 4, "exponential"), 3),
)
MODELS = {
    "latent": (
        {"layers": "", "num_layers": 3, "num_dense_layers": 1, "qkv_bias": True},
        {"num_experts": 4, "top_k": 3, "identity_experts": 2, "latent": 12, "latent_norm": True,
         "shared_gate": "softmax", "min_ratio": 0.8},
        ExploreConfig(),
    ),
    # A state carried over layers, identity experts, and all that `explore` moves.
    "mlp": ({"layers": "", "num_layers": 2}, *MLP),
    "mlp in any order": ({"layers": "dense 2*(late dense) moe:8", "num_layers": 6}, *MLP),
    "cosine": (
        {"layers": "dense 2*moe table", "num_layers": 4},
        {"num_experts": 8, "top_k": 2, "router": "cosine", "router_width": 8, "score": "sqrt_softplus",
         "renormalize": True, "routed_scaling": 1.5},
        ExploreConfig(noise=0.5),
    ),
    "expert choice": (
        {"layers": "", "num_layers": 1},
        {"num_experts": 4, "top_k": 2, "choice": "expert", "selection_bias": False},
        ExploreConfig(RampConfig(0.5, 0.0, 4)),
    ),
    "identity": (
        {"layers": "", "num_layers": 3, "num_dense_layers": 1},
        {"num_experts": 4, "top_k": 4, "identity_experts": 4, "identity_output": "nothing", "score": "sigmoid"},
        ExploreConfig(),
    ),
    "shards": (
        {"layers": "", "num_layers": 1},
        {"num_experts": 8, "top_k": 4, "shard_groups": 2, "combine": "share", "num_shared_experts": 0},
        ExploreConfig(noise=0.5),
    ),
}  # fmt: skip


def routers_config(name: str, *args, **kwargs) -> config.RunConfig:
    model, moe, explore = MODELS[name]
    cfg = run_config(*args, **kwargs)
    routed = dataclasses.replace(cfg.model.moe, **moe)
    loss, sample = cfg.loss, cfg.sample
    if routed.choice == "expert":
        loss = dataclasses.replace(loss, load_balance_coef=0.0)
        sample = dataclasses.replace(sample, tokens=0)
    placed = {"num_dense_layers": 0} | model
    changed = dataclasses.replace(cfg.model, **placed, moe=routed)
    return dataclasses.replace(cfg, model=changed, explore=explore, loss=loss, sample=sample)


@functools.cache
def state_on(name: str, shape):
    """The mesh and a fresh state on it, with selection biases; the values are those of one device."""
    mesh = sharding.make_mesh(shape, jax.devices()[: int(np.prod(shape))])
    if mesh.size == 1:
        state = init_state(routers_config(name), mesh)
        slope = lambda b: b if b.dtype == jnp.int32 else b + jnp.linspace(-0.05, 0.05, b.shape[-1])[None]
        return mesh, state._replace(router_bias=jax.tree.map(slope, state.router_bias))
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(routers_config(name), mesh))
    return mesh, jax.device_put(jax.device_get(state_on(name, (1, 1, 1))[1]), shardings)


def everything(name: str, shape, *args, **kwargs) -> dict:
    """Loss, parts, sums, gradients and the next selection biases of step 1, of a batch with padding."""
    mesh, state = state_on(name, shape)
    cfg = routers_config(name, *args, **kwargs)
    gradients = make_gradients(cfg, mesh)

    @jax.jit
    def one(state, batch):
        found = gradients(state.params, state.router_bias, batch, 1)
        return found._asdict() | {"bias": step.update_biases(cfg, state.router_bias, found.sums.router, {})}

    with jax.set_mesh(mesh):
        return jax.device_get(one(state, put_batch(batch_rows(0.25), mesh, cfg)))


@functools.cache
def oracle(name: str) -> dict:
    return everything(name, (1, 1, 1))
