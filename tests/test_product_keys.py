"""Product-key memory against brute force over all rows, on every mesh: values, gradients, and what devices send."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_invariance import PADDING, assert_same, batch_rows, run_config
from test_model import close
from test_residual import plain_memory

from moe_jax import optim
from moe_jax.aot import hlo
from moe_jax.config import MemoryConfig, ModelConfig, RunConfig
from moe_jax.moe import product_keys
from moe_jax.moe.product_keys import ProductKeys, nearest_rows
from moe_jax.nn.layers import Init
from moe_jax.parallel import sharding
from moe_jax.train.gradients import make_gradients
from moe_jax.train.state import abstract_state, init_state, put_batch

BATCH, SEQ, WIDTH = 8, 5, 16
LARGE = MemoryConfig(keys=64, heads=3, top=7, key_dim=6)  # 4096 rows
CASES = {
    "rows by fsdp and expert": ((1, 2, 4), LARGE),
    "rows on each replica": ((2, 2, 2), LARGE),
    "rows by fsdp alone": ((1, 4, 2), dataclasses.replace(LARGE, keys=14)),  # 8 does not divide 14²
    "rows everywhere": ((2, 2, 2), dataclasses.replace(LARGE, keys=7)),  # nothing divides 7²
}


@functools.cache
def mesh_of(*shape):
    return sharding.make_mesh(shape, jax.devices()[: int(np.prod(shape))])


def model_of(memory: MemoryConfig, dtype: str = "float32") -> ModelConfig:
    return ModelConfig(d_model=WIDTH, num_layers=2, layers="dense memory", compute_dtype=dtype, memory=memory)


def drawn(memory: MemoryConfig) -> tuple[nnx.GraphDef, dict]:
    """The layer on the mesh in use, and its parameters, of which none is constant."""
    definition, params = nnx.split(ProductKeys(model_of(memory), Init(nnx.Rngs(0), 0.5)))
    params = nnx.to_pure_dict(params)
    rng = np.random.default_rng(1)
    for name in ("b_query", "query_norm"):
        params[name] = params[name] + 0.5 * rng.normal(size=params[name].shape).astype(np.float32)
    return definition, params


X = np.random.default_rng(0).normal(size=(BATCH, SEQ, WIDTH)).astype(np.float32)
WAVE = np.linspace(0, 3, WIDTH, dtype=np.float32)[None, None]
total = lambda y: jnp.sum(jnp.sin(3 * y + WAVE))  # a function of the result, whose gradient in it varies


@functools.cache
def brute_force(memory: MemoryConfig):
    """The value and the gradients in parameters and input, computed on one device from all rows' scores."""
    with jax.set_mesh(mesh_of(1, 1, 1)):
        params = jax.device_get(drawn(memory)[1])
    value = lambda params, x: total(plain_memory(memory, params, x))
    return jax.device_get(jax.jit(jax.value_and_grad(value, (0, 1)))(jax.tree.map(jnp.asarray, params), X))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "rows by fsdp and expert" else pytest.mark.slow) for n in CASES]
)
@pytest.mark.parametrize("chunk", [pytest.param(2**25, marks=pytest.mark.slow), 3 * 21 * WIDTH])
def test_brute_force(name, chunk, monkeypatch):
    """The rows are the best of all n²; queries, keys, values and the input have the gradients of that. Rows stay."""
    shape, memory = CASES[name]
    monkeypatch.setattr(product_keys, "CHUNK", chunk)
    mesh = mesh_of(*shape)
    with jax.set_mesh(mesh):
        definition, params = drawn(memory)
        x = jax.device_put(X, sharding.batch_sharding(mesh))
        value = lambda params, x: total(nnx.merge(definition, params)(x))
        compiled = jax.jit(jax.value_and_grad(value, (0, 1))).lower(params, x).compile()
        got, grads = compiled(params, x)
    want, want_grads = brute_force(memory)
    close((got, jax.device_get(grads)), (want, want_grads), 2e-5)
    assert min(np.abs(g).max() for g in jax.tree.leaves(want_grads)) > 1e-3
    assert grads[0]["values"].sharding == params["values"].sharding
    if name == "rows by fsdp and expert":
        assert {s.data.shape for s in params["values"].addressable_shards} == {(memory.rows // 8, WIDTH)}
        largest = max(c.sent for c in hlo.collectives(compiled.as_text(), dict(mesh.shape)))
        assert largest < params["values"].nbytes / 20


def test_only_rows_that_are_read_have_a_gradient():
    """Every other row's is exactly 0, and an id past the last reads none."""
    gradient = brute_force(LARGE)[1][0]["values"]
    read = np.abs(gradient).max(1) > 0
    assert 0 < read.sum() <= BATCH * SEQ * LARGE.reads
    values = jnp.asarray(np.random.default_rng(0).normal(size=(9, 4)), jnp.float32)
    ids, weights = jnp.int32([[1, 9], [9, 9], [4, 1]]), jnp.ones((3, 2))
    rows, back = jax.vjp(lambda v, w: product_keys.sum_rows(v, ids, w, jnp.float32), values, weights)
    np.testing.assert_array_equal(rows, [values[1], np.zeros(4), values[4] + values[1]])
    d_values, d_weights = back(jnp.ones((3, 4)))
    np.testing.assert_array_equal(d_values[:, 0], [0, 2, 0, 0, 1, 0, 0, 0, 0])
    np.testing.assert_allclose(d_weights[:, 1], [0, 0, values[1].sum()], rtol=1e-6)


@pytest.mark.parametrize("top", [1, 5, 12])
def test_the_best_pairs_are_the_best_rows(top):
    """Ids and weights of every `top` up to all keys of a half, ties of scores apart."""
    cfg = MemoryConfig(keys=12, heads=2, top=top, key_dim=4)
    rng = np.random.default_rng(top)
    q, keys = rng.normal(size=(50, 2, 4)).astype(np.float32), rng.normal(size=(2, 2, 12, 2)).astype(np.float32)
    ids, weights = (np.asarray(a).reshape(50, 2, top) for a in nearest_rows(jnp.asarray(q), jnp.asarray(keys), cfg))
    halves = np.einsum("tupk,upnk->tupn", q.reshape(50, 2, 2, 2).astype(np.float64), keys)
    scores = (halves[:, :, 0, :, None] + halves[:, :, 1, None, :]).reshape(50, 2, -1)
    best = np.argsort(-scores, -1)[..., :top]
    np.testing.assert_array_equal(ids, best)
    chosen = np.exp(np.take_along_axis(scores, best, -1))
    np.testing.assert_allclose(weights, chosen / chosen.sum(-1, keepdims=True), rtol=1e-4)


# --- the invariance matrix -------------------------------------------------------------------------------------------


def banks(*args, **kwargs) -> RunConfig:
    """The matrix' model in the order of OLMo 2, with memories, scales of its residual stream and NormHead."""
    cfg = run_config(*args, **kwargs)
    made = dataclasses.replace(
        cfg.model, num_layers=4, num_dense_layers=0, layers="2*(memory moe)", norm="post", residual_scale=True,
        norm_head=True, qk_norm_over="projection", memory=MemoryConfig(keys=8, heads=2, top=3, key_dim=6),
    )  # fmt: skip
    return dataclasses.replace(cfg, model=made)


@functools.cache
def state_on(shape):
    """The mesh and a fresh state on it, with selection biases; the values are those of one device."""
    mesh = mesh_of(*shape)
    if mesh.size == 1:
        state = init_state(banks(), mesh)
        slope = lambda b: b + jnp.linspace(-0.05, 0.05, b.shape[-1])[None]
        return mesh, state._replace(router_bias=jax.tree.map(slope, state.router_bias))
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(banks(), mesh))
    return mesh, jax.device_put(jax.device_get(state_on((1, 1, 1))[1]), shardings)


def everything(shape, *args, **kwargs) -> list[dict]:
    """Loss, parts, sums, gradients, and parameters after a step of Muon, for each padding."""
    mesh, state = state_on(shape)
    cfg = banks(*args, **kwargs)
    gradients, optimizer = make_gradients(cfg, mesh), optim.make_optimizer(cfg.optim, cfg.train.steps)

    @jax.jit
    def one(state, batch):
        loss, parts, sums, grads = gradients(state.params, state.router_bias, batch, 0)
        updates, _ = optimizer.update(grads, state.opt_state, state.params)
        params = jax.tree.map(jnp.add, state.params, updates)
        return {"loss": loss, "parts": parts, "sums": sums, "grads": grads, "params": params}

    with jax.set_mesh(mesh):
        return [jax.device_get(one(state, put_batch(batch_rows(p), mesh, cfg))) for p in PADDING]


@functools.cache
def oracle() -> list[dict]:
    return everything((1, 1, 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "args", "exchange"),
    [
        ((1, 2, 4), (4, "selective", "grouped"), "all_to_all"),
        ((2, 2, 2), (2, "full", "grouped"), "ring"),
        ((8, 1, 1), (1, "none", "grouped"), "ring"),
    ],
)
def test_invariance(shape, args, exchange):
    for got, want in zip(everything(shape, *args, exchange=exchange), oracle(), strict=True):
        assert_same(got, want)
    assert all(np.abs(g).max() > 1e-6 for g in jax.tree.leaves(got["grads"]))
