"""Ternary experts and int8 inputs: their values, the straight-through gradient, every way to compute them, meshes, and
what does not go with them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_invariance import assert_same, batch_rows, run_config

from moe_jax import config, model, upcycle
from moe_jax.config import ModelConfig, MoEConfig, RunConfig
from moe_jax.errors import ConfigError, FormatError
from moe_jax.hf.architectures import write_config
from moe_jax.moe.experts import ExpertCompute, ExpertWeights
from moe_jax.moe.routing import Routing
from moe_jax.nn.fake_quant import int8, packed_bytes, ternary
from moe_jax.parallel import sharding
from moe_jax.train.gradients import make_gradients
from moe_jax.train.state import abstract_weights, put_batch
from moe_jax.tree import flatten, nest

PADDING = 0.25


def plain_ternary(w):
    """In float64, rounded to the dtype of w."""
    exact = np.asarray(w, np.float64)
    s = np.maximum(np.abs(exact).mean((-2, -1), keepdims=True), 1e-5)
    return (np.clip(np.round(exact / s), -1, 1) * s).astype(w.dtype)


def plain_int8(x):
    exact = np.asarray(x, np.float64)
    s = np.maximum(np.abs(exact).max(-1, keepdims=True), 1e-5) / 127
    return (np.round(exact / s) * s).astype(x.dtype)


def test_values():
    """Each matrix has a scale of its own; matrices and rows of zeros stay zeros; gradients are passed on."""
    rng = np.random.default_rng(0)
    w = (rng.normal(size=(2, 3, 6, 5)) * np.logspace(-2, 1, 6).reshape(2, 3, 1, 1)).astype(np.float32)
    w[0, 0] = 0
    for fn, plain, x in ((ternary, plain_ternary, w), (int8, plain_int8, w[1, 2])):
        got, back = jax.vjp(fn, jnp.asarray(x))
        np.testing.assert_allclose(got, plain(x), rtol=1e-6)
        np.testing.assert_array_equal(back(2 * jnp.asarray(x))[0], 2 * x)
    made = np.asarray(ternary(jnp.asarray(w))).reshape(6, 30)
    assert [len(np.unique(matrix)) for matrix in made] == [1, 3, 3, 3, 3, 3]
    assert len(np.unique(np.abs(made))) == 6  # five scales, and zero
    assert not np.isnan(int8(jnp.zeros((2, 3)))).any()
    assert packed_bytes((2, 3, 6, 5)) == 6 * (8 + 4)


@pytest.mark.parametrize(
    "compute", ["grouped", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dense", "capacity"))]
)
def test_experts_against_products_of_rounded_numbers(compute):
    """Values and gradients. The oracle multiplies what NumPy has rounded; what rounding adds is a constant to it."""
    rng, (t, e, d, f, k) = np.random.default_rng(1), (8, 3, 6, 5, 2)
    cfg = MoEConfig(e, k, f, compute=compute, capacity_factor=3.0, expert_inputs="int8")
    x = rng.normal(size=(t, d)).astype(np.float32)
    ws = [rng.normal(size=s).astype(np.float32) for s in ((e, d, f), (e, d, f), (e, f, d))]
    chosen = np.stack([rng.permutation(e)[:k] for _ in range(t)]).astype(np.int32)
    combine, dy = rng.random((t, k)).astype(np.float32), rng.normal(size=(t, d)).astype(np.float32)

    def fast(x, combine, *ws):
        routing = Routing(jnp.asarray(chosen), combine, jnp.ones((t, k), bool))
        y, _ = ExpertCompute(cfg)(int8(x), routing, ExpertWeights(*map(ternary, ws)))
        return jnp.sum(y * dy)

    q, *rounded = plain_int8(x), *map(plain_ternary, ws)
    gate, up = (np.einsum("td,tkdf->tkf", q.astype(np.float64), w[chosen]) for w in rounded[:2])
    h = gate / (1 + np.exp(-gate)) * up
    added = [q - x, plain_int8(h.astype(np.float32)) - h, *(r - w for r, w in zip(rounded, ws, strict=True))]

    def slow(x, combine, *ws):
        gate, up, down = ((w + more)[chosen] for w, more in zip(ws, added[2:], strict=True))
        x = x + added[0]
        h = jax.nn.silu(jnp.einsum("td,tkdf->tkf", x, gate)) * jnp.einsum("td,tkdf->tkf", x, up) + added[1]
        return jnp.einsum("tk,tkf,tkfd,td->", combine, h, down, dy)

    runs = [jax.jit(jax.value_and_grad(fn, argnums=range(5)))(x, combine, *ws) for fn in (fast, slow)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *runs)


# --- a model ---------------------------------------------------------------------------------------------------------


def ternary_run(micro=1, remat="none", inputs="float", weights="ternary") -> RunConfig:
    """One layer of six experts, which on most meshes are cut into parts, so that a scale is a sum over devices."""
    cfg = run_config(micro, remat, "dense" if micro == 1 else "grouped", "global")
    moe = dataclasses.replace(cfg.model.moe, num_experts=6, expert_weights=weights, expert_inputs=inputs)
    shape = {"num_layers": 1, "num_dense_layers": 0}
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, moe=moe, **shape))


def gradients_of(cfg: RunConfig, shape, change=lambda params: params):
    """The gradients of one batch, of weights that do not depend on the mesh, after a change of them."""
    mesh = sharding.make_mesh(shape, jax.devices()[: int(np.prod(shape))])
    with jax.set_mesh(sharding.make_mesh((1, 1, 1), jax.devices()[:1])):
        weights = jax.device_get(model.init(cfg.model, jax.random.key(0)))
    places = jax.tree.map(lambda x: x.sharding, abstract_weights(cfg.model, mesh))
    with jax.set_mesh(mesh):
        params, bias = jax.device_put((change(weights[0]), weights[1]), places)
        batch = put_batch(batch_rows(PADDING), mesh, cfg)
        return jax.device_get(jax.jit(make_gradients(cfg, mesh))(params, bias, batch, jnp.int32(0)))


def rounded(params: dict) -> dict:
    """The weights with the matrices of routed experts rounded by NumPy."""
    takes = lambda path: path.rpartition("/")[0].endswith("/moe") and path.endswith(("w_gate", "w_up", "w_down"))
    return nest({path: plain_ternary(w) if takes(path) else w for path, w in flatten(params).items()})


@pytest.mark.slow
def test_a_model_on_a_mesh():
    """Loss and gradients are those of a float model whose experts were rounded before: the straight-through gradient.

    Shared experts, the router and everything else stay as they are.
    """
    want = gradients_of(ternary_run(weights="float"), (1, 1, 1), rounded)
    assert_same(gradients_of(ternary_run(2, "full"), (2, 2, 2))._asdict(), want._asdict())


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "micro"), [((2, 2, 2), 4), ((8, 1, 1), 1)])
def test_int8_inputs_on_meshes(shape, micro):
    want = gradients_of(ternary_run(inputs="int8"), (1, 1, 1))
    assert_same(gradients_of(ternary_run(micro, "selective", "int8"), shape)._asdict(), want._asdict())
    with pytest.raises(AssertionError):  # the same comparison sees what rounds nothing
        assert_same(gradients_of(ternary_run(), (1, 1, 1))._asdict(), want._asdict())


def test_what_it_does_not_go_with():
    """An adapter of a ternary matrix could not be merged; no architecture of Hugging Face has such experts."""
    moe = MoEConfig(expert_weights="ternary")
    with pytest.raises(ConfigError, match=r"lora.match=.*gives layers/moe/w_gate an adapter.*nearest valid: '/\("):
        ModelConfig(moe=moe, lora=config.LoRAConfig(rank=2))
    ModelConfig(moe=moe, lora=config.LoRAConfig(rank=2, match="/(attention|mlp|shared)/"))
    ModelConfig(moe=MoEConfig(expert_inputs="int8"), lora=config.LoRAConfig(rank=2))
    for field in ({"expert_weights": "ternary"}, {"expert_inputs": "int8"}):
        with pytest.raises(FormatError, match=f"{next(iter(field))} \\({next(iter(field.values()))} here, float there"):
            write_config(ModelConfig(moe=MoEConfig(**field)), 64)


def test_upcycling():
    """Every bit of the weights stays; the function is another one, which the report names."""
    dense = ModelConfig(num_dense_layers=4)
    copies = upcycle.VirtualGroups(4, 1, 1)
    rounds = upcycle.Quantize()
    float_model, made = (upcycle.final_config(chain, dense) for chain in ([copies], [copies, rounds]))
    moe = dataclasses.replace(float_model.moe, expert_weights="ternary", expert_inputs="int8")
    assert made == dataclasses.replace(float_model, moe=moe)
    params = {"layers/moe/w_up": np.ones(1)}
    assert rounds.params(float_model, params, None) is params
    assert rounds.changes(float_model) == "experts have three values a matrix and their inputs are rounded"
    inputs = upcycle.Quantize(None, "int8")  # keeps what it does not name
    assert inputs.config(float_model).moe == dataclasses.replace(float_model.moe, expert_inputs="int8")
    assert inputs.config(made) == made and inputs.changes(made) == rounds.changes(made) == ""
    back = upcycle.Quantize("float", None)
    assert back.config(made).moe == dataclasses.replace(float_model.moe, expert_inputs="int8")
    assert back.changes(made) == "experts have any values" and not back.changes(float_model)
    with pytest.raises(ConfigError, match=r"upcycle\.expert_weights='ternary': the model has no experts to round"):
        upcycle.final_config([rounds], dense)


def test_packed_size():
    """By hand: two bits a number of the experts' matrices, a scale each, and bfloat16 for the rest."""
    cfg = ModelConfig(moe=MoEConfig(expert_weights="ternary"))
    total, experts = model.count_parameters(cfg).total, 4 * 8 * 3 * 128 * 256
    assert model.stored_bytes(cfg, packed=False) == 2 * total
    assert model.stored_bytes(cfg) == 2 * (total - experts) + experts // 4 + 4 * 8 * 3 * 4
