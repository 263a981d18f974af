"""The MoE layer in a model of one's own: the same without a mesh and with one, and one line for what does not fit."""

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from moe_jax import Matrices, MoELayer, load_balancing_loss, make_mesh, muon, router_z, stats_of
from moe_jax.errors import ConfigError

X = jax.random.normal(jax.random.key(1), (8, 3, 16))
COUNTED = jnp.arange(3)[None] < jnp.array([3, 2, 3, 1, 3, 3, 3, 2])[:, None]


def make(seed: int = 0, **settings) -> MoELayer:
    size = {"num_experts": 8, "top_k": 2, "d_expert": 12, "init_std": 0.3}
    return MoELayer(16, **(size | settings), rngs=nnx.Rngs(seed))


@nnx.jit
def gradients(layer, x):
    def loss(layer):
        out = layer(x, COUNTED)
        return jnp.mean(out.y**2) + load_balancing_loss(out.stats) + 0.1 * jnp.sum(router_z(out.stats)), out

    return nnx.value_and_grad(loss, has_aux=True)(layer)


def in_numpy(layer, x):
    """The layer in float64, a token and an expert at a time: y, and the experts of every token."""
    moe = jax.tree.map(lambda a: np.asarray(a, np.float64), nnx.to_pure_dict(nnx.state(layer.moe, nnx.Param)))
    silu = lambda z: z / (1 + np.exp(-z))
    y, chosen = np.zeros(x.shape), []
    for at in np.ndindex(x.shape[:2]):
        token = np.asarray(x[at], np.float64)
        z = token @ moe["w_router"]
        p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        experts = np.argsort(-p)[:2]
        chosen.append(experts)
        if COUNTED[at]:
            for e in experts:
                y[at] += p[e] * (silu(token @ moe["w_gate"][e]) * (token @ moe["w_up"][e])) @ moe["w_down"][e]
    return y, np.array(chosen).reshape(*x.shape[:2], 2)


def test_it_is_the_formula_and_the_same_on_a_mesh():
    layer = make()
    (value, out), grads = gradients(layer, X)
    want, chosen = in_numpy(layer, X)
    np.testing.assert_allclose(out.y, want, rtol=1e-5, atol=1e-5)
    mine = stats_of(X @ layer.moe.w_router[...], chosen, COUNTED)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), mine, out.stats)
    with jax.set_mesh(make_mesh((2, 2, 2))):
        there = make()
        (other, _), others = gradients(there, X)
    assert float(other) == pytest.approx(float(value), rel=1e-6)
    close = lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=2e-5, atol=2e-6)
    jax.tree.map(close, *(nnx.to_pure_dict(nnx.state(g)) for g in (grads, others)))


def test_what_does_not_fit_is_one_line():
    layer = make()
    mesh, axis = make_mesh((1, 1, 8)), jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        sharded = make()
    for call, under, error, message in (
        (lambda: layer(X[0]), None, ValueError, "x must have the shape [B, S, 16], not [3, 16]; x[None] is a batch"),
        (lambda: layer(X, COUNTED[:, :2]), None, ValueError, "counted must have the shape (8, 3) for x's tokens"),
        (lambda: layer(X, None, COUNTED + 1), None, ValueError, "group must be ≥ 0 and < balance_groups=1"),
        (lambda: layer(X[:, :0]), None, ValueError, "x has no tokens: its shape is [8, 0, 16]"),
        (lambda: jax.vmap(lambda x: sharded(x).y)(X[None]), mesh, ValueError, "call it inside jax.jit"),
        (lambda: MoELayer(16, rngs=0), None, TypeError, "rngs must be nnx.Rngs, such as nnx.Rngs(0), not int"),
        (lambda: make(grouped_matmul="hopper"), None, ConfigError, "needs a Hopper GPU, this is cpu"),
        (lambda: make_mesh((2, 2, 4)), None, ValueError, "whose product is at most the 8 devices"),
        (lambda: make(top=3), None, ConfigError, "model.moe.top=3: is not a field; nearest valid name: top_k"),
        (lambda: make(top_k=9), None, ConfigError, "top_k=9: must be ≤ num_experts=8; nearest valid: 8"),
        (lambda: make(num_experts=6), mesh, ConfigError, "num_experts=6: must be a multiple of the 8 devices"),
        (lambda: sharded(X[:3]), mesh, ValueError, "the 3 sequences of x must be a multiple of the 8 devices"),
        (lambda: layer(X), mesh, ValueError, "made with no mesh, but called with the mesh {'data': 1, 'fsdp': 1,"),
        (lambda: sharded(X), None, ValueError, "but called with no mesh; make the layer and call it under the same"),
        (make, axis, ValueError, "the mesh in use has x (Auto); nearest valid: make_mesh((1, 1, 8))"),
        (lambda: load_balancing_loss(X), None, TypeError, "takes RouterStats, those of MoELayer's output, or stats_of"),
        (lambda: router_z(X), None, TypeError, "router_z takes RouterStats"),
        (lambda: stats_of(X, jnp.zeros((8, 2), int)), None, ValueError, "must have the same tokens"),
    ):
        with pytest.raises(error, match=re.escape(message)):
            if under is None:
                call()
            else:
                with jax.set_mesh(under):
                    call()


OTHERS = [
    {"router": "mlp", "router_width": 8},
    {"compute": "capacity"},
    {"num_shared_experts": 1, "selection_bias": True, "score": "sigmoid"},
]


@pytest.mark.slow
@pytest.mark.parametrize("settings", OTHERS, ids=str)
def test_other_settings_run_without_a_mesh_too(settings):
    layer = make(**settings)
    (value, out), _ = gradients(layer, X)
    with jax.set_mesh(make_mesh((1, 1, 1), jax.devices()[:1])):
        there = make(**settings)
        (other, same), _ = gradients(there, X)
        np.testing.assert_allclose(there(X, COUNTED).y, same.y, atol=1e-6)  # outside jax.jit
    np.testing.assert_allclose(out.y, same.y, atol=1e-6)
    assert float(value) == pytest.approx(float(other), rel=1e-6)
    assert (out.state is not None) == ("router" in settings)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [None, (1, 2, 4)])
def test_muon_trains_it(shape):
    """`nnx.Optimizer` gives it the matrices alone; every update has the RMS that Muon promises, also on a mesh."""
    x = jax.random.normal(jax.random.key(2), (8, 32, 16))
    with jax.set_mesh(make_mesh(shape)) if shape else contextlib.nullcontext():
        layer = make()
        of = lambda path, _: "adamw" if "w_router" in jax.tree_util.keystr(path) else "muon"
        names = lambda params: jax.tree_util.tree_map_with_path(of, params)
        rule = lambda path, leaf: Matrices()
        tx = optax.multi_transform(
            {"muon": muon(0.1, weight_decay=0.0, matrices=rule), "adamw": optax.adamw(1e-3)}, names
        )
        optimizer = nnx.Optimizer(layer, tx, wrt=nnx.Param)
        before = np.asarray(layer.moe.w_up[...])

        @nnx.jit
        def step(layer, optimizer):
            loss = lambda layer: jnp.mean((layer(x).y - jnp.roll(x, 1, axis=-1)) ** 2)
            value, grads = nnx.value_and_grad(loss)(layer)
            optimizer.update(layer, grads)
            return value

        losses = [float(step(layer, optimizer))]
        change = np.asarray(layer.moe.w_up[...]) - before
        rms = np.sqrt((change**2).mean((1, 2)))
        np.testing.assert_allclose(rms, 0.1 * 0.2, rtol=0.3)
        losses += [float(step(layer, optimizer)) for _ in range(40)]
    assert losses[-1] < 0.8 * losses[0]
