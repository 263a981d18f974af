"""Latent experts, the gate of shared experts, and biases of queries, keys and values.

The layer is compared with a loop over its experts, values and gradients; whole models are in
test_routers_models.py (meshes), test_systems.py (systems of the literature) and test_hf.py (Qwen2).
"""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_alone import X, make
from test_model import init, inputs_of, mesh_of, plain_attention
from test_systems import plain_experts

from moe_jax import config, make_mesh, model, optim, upcycle
from moe_jax.aot import hlo
from moe_jax.config import LoRAConfig, MLAConfig, ModelConfig, MoEConfig
from moe_jax.errors import ConfigError
from moe_jax.evaluate import spectra
from moe_jax.evaluate.generate import generate
from moe_jax.nn import lora
from moe_jax.nn.attention import Attention
from moe_jax.nn.layers import Init
from moe_jax.nn.qk_clip import clip_attention
from moe_jax.optim import optimizer
from moe_jax.parallel import sharding
from moe_jax.tree import flatten, nest
from moe_jax.upcycle import VirtualGroups, Width
from tests.upcycle_source import STD, dense

D = 16
LAYERS = {
    "all": dict(top_k=3, identity_experts=2, num_shared_experts=1, shared_gate="softmax", latent=4, latent_norm=True),
    "sigmoid": dict(num_shared_experts=2, shared_gate="sigmoid", latent=12),
    "plain": dict(top_k=3, identity_experts=2, num_shared_experts=1, shared_gate="softmax"),
}


@functools.cache
def drawn(name: str) -> dict[str, np.ndarray]:
    """The parameters of a layer by path, all of them drawn so that they matter."""
    leaves, rng = flatten(nnx.to_pure_dict(nnx.state(make(**LAYERS[name]).moe, nnx.Param))), np.random.default_rng(0)
    drawn = lambda path, x: (0.4 * rng.normal(size=x.shape) + path.endswith("norm")).astype(np.float32)
    return {path: drawn(path, x) for path, x in sorted(leaves.items())}


def score(y, load):
    """A function of all of a layer's results."""
    return jnp.sum(jnp.sin(y + 0.1 * jnp.arange(D)[None, None])), load


@functools.cache
def oracle(name: str):
    """Returns value, loads and gradients of a loop over the experts."""
    cfg = MoEConfig(**(dict(num_experts=8, top_k=2, d_expert=12) | LAYERS[name]))

    def loss(params, x):
        y, _, load = plain_experts(cfg, params, {}, x, None)
        return score(y, load)

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(nest(drawn(name)), X)


@functools.cache
def compiled(name: str, shape: tuple[int, ...] | None, **settings):
    """The layer's value, loads and gradients as a compiled program, and its arguments. shape: of the mesh, if any."""
    with jax.set_mesh(make_mesh(shape)) if shape else contextlib.nullcontext():
        layer = make(**LAYERS[name], **settings)
        graph, state, rest = nnx.split(layer, nnx.Param, ...)
        put = lambda path, a: jax.device_put(drawn(name)["/".join(str(key.key) for key in path[1:])], a.sharding)
        state = jax.tree_util.tree_map_with_path(put, nnx.to_pure_dict(state))

        def loss(params, x):
            out = nnx.merge(graph, params, rest)(x)
            return score(out.y, jnp.sum(out.stats.tokens_per_expert, 0))

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True)).lower(state, X).compile(), (state, X)


def check(name: str, shape, **settings):
    """The layer against the loop."""
    run, args = compiled(name, shape, **settings)
    (value, load), (grads, dx) = jax.device_get(run(*args))
    (want, loads), (want_grads, want_dx) = oracle(name)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    np.testing.assert_array_equal(load, loads)
    want_grads = flatten(want_grads) | {"x": want_dx}
    for path, g in ({"x": dx} | flatten(grads["moe"])).items():
        scale = np.abs(want_grads[path]).max()
        assert scale > 1e-3, path
        np.testing.assert_allclose(g, want_grads[path], rtol=0, atol=2e-5 * scale, err_msg=path)


run_layer = nnx.jit(lambda layer, counted=None: layer(X, counted).y)
CASES = [
    ("all", (1, 2, 4), {"exchange": "all_to_all"}),
    ("sigmoid", (2, 2, 2), {}),
    ("all", None, {}),
    ("all", (2, 2, 2), {"compute": "dense"}),
    ("sigmoid", None, {}),
    ("plain", (2, 2, 2), {"exchange_chunks": 3}),
]


@pytest.mark.parametrize(
    ("name", "shape", "settings"), [CASES[0], *(pytest.param(*c, marks=pytest.mark.slow) for c in CASES[1:])]
)
def test_the_layer_is_the_loop(name, shape, settings):
    """Values, loads, and gradients of all parameters and of x."""
    check(name, shape, **settings)


@pytest.mark.slow
def test_a_quarter_of_the_width_sends_a_quarter():
    """Bytes of the all-to-alls in the compiled programs, forward and backward; what is sent besides is no wider."""
    sent = {}
    for name in ("plain", "all"):
        run, _ = compiled(name, (1, 2, 4), exchange="all_to_all")
        found = [c for c in hlo.collectives(run.as_text(), {"data": 1, "fsdp": 2, "expert": 4})]
        sent[name] = sum(c.sent for c in found if c.kind == "all-to-all")
        assert sum(c.kind == "all-to-all" for c in found) == 4
    assert sent["plain"] == 4 * sent["all"] > 0


@pytest.mark.slow
def test_as_wide_as_the_model_with_identities_it_is_the_plain_layer():
    """Gives the bits of the plain layer, since a product with the identity is exact."""
    plain, wide = make(num_shared_experts=1), make(num_shared_experts=1, latent=D)
    for name in ("w_router", "w_gate", "w_up", "w_down"):
        getattr(wide.moe, name)[...] = getattr(plain.moe, name)[...]
    for name in ("w_gate", "w_up", "w_down"):
        getattr(wide.moe.shared, name)[...] = getattr(plain.moe.shared, name)[...]
    wide.moe.w_in[...] = wide.moe.w_out[...] = jnp.eye(D)
    np.testing.assert_array_equal(run_layer(plain), run_layer(wide))


@pytest.mark.slow
def test_the_norm_forgets_the_size_of_the_weights():
    """A common factor of the combine weights changes nothing, and a token without experts gets zeros."""
    a, b = (make(latent=4, latent_norm=True, routed_scaling=scale, init_std=1.0) for scale in (1.0, 4.0))
    counted = jnp.arange(3)[None] < jnp.full((8, 1), 2)
    y, other = run_layer(a, counted), run_layer(b, counted)
    np.testing.assert_allclose(y, other, rtol=1e-3, atol=1e-4)
    assert not np.any(y[:, 2]) and np.abs(y[:, :2]).min(axis=-1).max() > 0


def test_a_closed_gate_leaves_the_shared_experts():
    """c = (0, 1) is the dense layer of the shared experts; a fresh gate has ½ and ½."""
    layer = make(num_shared_experts=1, shared_gate="softmax")
    plain = make(num_shared_experts=1)
    np.testing.assert_allclose(run_layer(layer), run_layer(plain) / 2, rtol=1e-5, atol=1e-6)
    layer.moe.b_shared_gate[...] = jnp.array([-200.0, 0.0])
    np.testing.assert_allclose(run_layer(layer), layer.moe.shared(X), rtol=1e-6, atol=1e-6)


# --- tables of parameters --------------------------------------------------------------------------------------------

BANK = ModelConfig(
    vocab_size=24, d_model=D, num_layers=2, num_dense_layers=1, d_ff=20, num_heads=4, num_kv_heads=2, head_dim=8,
    init_std=0.3, compute_dtype="float32", qkv_bias=True,
    moe=MoEConfig(**LAYERS["all"] | {"num_experts": 4, "top_k": 2, "d_expert": 12}),
)  # fmt: skip


def test_every_table_has_a_line_for_them():
    """Counts by hand, optimizers, kinds of matrices, adapters, and sharding on a mesh that divides nothing."""
    shapes = flatten(model.abstract(BANK).shapes)
    counts, glu = model.count_parameters(BANK), 3 * D * 12
    attention = 2 * D * 32 + 2 * D * 16 + 32 + 2 * 16 + 2 * D
    experts = lambda n: n * 3 * 4 * 12 + 2 * 4 * D + 4 + D * 6 + glu + 2 * D + 2
    rest = 2 * attention + 3 * D * 20 + 2 * 24 * D + D
    assert counts.total == rest + experts(4)
    assert counts.active == pytest.approx(rest + experts(2 * 4 / 6), abs=1)
    vectors = sum(x.size for path, x in shapes.items() if path.endswith("norm") or "/b_" in path)
    attended = 3 * 2 * 8 * 4 * 16
    matmul = rest + experts(2 * 4 / 6) - vectors - 24 * D
    assert model.flops_per_token(BANK, 8) == pytest.approx(6 * matmul + attended)
    labels = flatten(optim.label_params(model.abstract(BANK).shapes))
    new = {path.removeprefix("layers/"): label for path, label in labels.items() if path.startswith("layers/")}
    assert {new[f"moe/{name}"] for name in ("w_in", "w_out")} == {"matrix"}
    vectors = ("moe/latent_norm", "moe/w_shared_gate", "moe/b_shared_gate", *(f"attention/b_{x}" for x in "qkv"))
    assert {new[name] for name in vectors} == {"adamw"}
    assert {spectra.kind_of(f"layers/{name}") for name in vectors} == {None}
    assert spectra.kind_of("layers/moe/w_in") == "latent in"
    for path, label in labels.items():
        if label == "matrix":
            optimizer.matrices_of(config.OptimConfig())(path, shapes[path])
    adapted = dataclasses.replace(BANK, lora=LoRAConfig(rank=2))
    found = {lora.matrix_of(path) for path in flatten(model.abstract(adapted).shapes) if lora.is_adapter(path)}
    assert {"layers/moe/w_in", "layers/moe/w_out", "layers/moe/w_up"} < found
    assert not [path for path in found if "shared_gate" in path or "router" in path]
    graph, sizes = model.abstract(BANK), {"data": 1, "fsdp": 3, "expert": 5}
    jax.tree.map(lambda x, axes: sharding.weight_spec(axes, x.shape, sizes), graph.shapes, graph.axes)


@pytest.mark.slow
def test_adapters_of_them_are_merged():
    """The model with adapters computes what the model with merged weights does."""
    cfg = dataclasses.replace(BANK, lora=LoRAConfig(rank=2))
    params, bias = init(cfg)
    rng = np.random.default_rng(0)
    params = nest({path: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype) if lora.is_adapter(path) else x
                   for path, x in flatten(params).items()})  # fmt: skip
    inputs = inputs_of([[1, 2, 3, 4, 5, 6, 7, 8]])
    base, adapters = ({p: x for p, x in flatten(params).items() if lora.is_adapter(p) == which} for which in (0, 1))
    with jax.set_mesh(mesh_of(1, 1, 1)):
        run = lambda cfg, params: model.abstract(cfg).bind(params, bias)(inputs).hidden
        merged = lora.merge(nest(base), nest(adapters), cfg.lora.scale)
        got = jax.jit(functools.partial(run, cfg))(params)
        want = jax.jit(functools.partial(run, BANK))(merged)
        plain = jax.jit(functools.partial(run, BANK))(nest(base))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    assert np.abs(want - plain).max() > 0.1


@pytest.mark.slow
def test_generation_with_a_cache():
    """Greedy samples are the argmax of the full forward pass over them."""
    params, bias = init(BANK)
    rng = np.random.default_rng(0)
    drawn = lambda path, x: rng.normal(0, 1, x.shape).astype(x.dtype) if "/b_" in path or "_gate" in path else x
    params = nest({path: jnp.asarray(drawn(path, x)) for path, x in flatten(params).items()})
    out = generate(BANK, mesh_of(1, 1, 1), params, bias, [[5], [3, 9, 14]], 4)
    for tokens, prompt in zip(out, (1, 3), strict=True):
        with jax.set_mesh(mesh_of(1, 1, 1)):
            hidden = model.abstract(BANK).bind(params, bias)(inputs_of([tokens])).hidden
        logits = np.asarray(hidden[0] @ params["head"].T)
        assert tokens[prompt:] == logits.argmax(-1)[prompt - 1 : -1].tolist()


# --- biases of queries, keys and values ------------------------------------------------------------------------------


@pytest.mark.parametrize("qk_norm", [pytest.param(False, marks=pytest.mark.slow), True])
def test_attention_with_biases(qk_norm):
    """Compares with plain code; biases come before the norm. QK-clip brings every group of heads to the threshold."""
    cfg = dataclasses.replace(BANK, qk_norm=qk_norm)
    layer = Attention(cfg, Init(nnx.Rngs(0), 0.5), 0.5, "xla")
    for i, x in enumerate("qkv"):
        b = getattr(layer, f"b_{x}")
        assert not np.any(b[...])
        b[...] = jnp.sin(jnp.arange(b.shape[0]) + i)
    inputs = inputs_of(np.zeros((2, 8)), segments=np.ones((2, 8), np.int32))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, D)), jnp.float32)
    local = jax.tree.map(jnp.asarray, jax.device_get(inputs))
    graph, state = nnx.split(layer)

    @jax.jit
    def run(w):
        net = nnx.merge(graph, jax.tree.map(lambda a: a, state))
        for name, value in w.items():
            getattr(net, name)[...] = value
        return net(x, local.positions, local.segments, counted=jnp.ones((2, 8), bool))

    w = nnx.to_pure_dict(state)
    y, _, largest = run(w)
    np.testing.assert_allclose(y, plain_attention(cfg, w, x, local), rtol=1e-4, atol=1e-4)
    if qk_norm:  # which norms what clipping would scale
        return
    of_groups = lambda top: jnp.max(top, 0).reshape(2, 2).max(1)
    limit = float(of_groups(largest).mean())
    clipped = clip_attention(jax.tree.map(lambda a: a[None], w), jnp.max(largest, 0)[None], limit)
    again = run({name: a[0] for name, a in clipped.items()})[2]
    np.testing.assert_allclose(of_groups(again), jnp.minimum(of_groups(largest), limit), rtol=1e-5)
    assert {name for name in w if not np.array_equal(w[name], clipped[name][0])} == {"w_q", "w_k", "b_q", "b_k"}


@pytest.mark.slow
def test_biases_are_upcycled():
    """Wider, with more heads, and copied into experts, it is the dense function."""
    cfg, params = dense(qkv_bias=True, qk_norm=False)
    flat = flatten(params)
    rng = np.random.default_rng(0)
    flat |= {path: jnp.asarray(rng.normal(size=x.shape), x.dtype) for path, x in flat.items() if "/b_" in path}
    with jax.set_mesh(mesh_of(1, 1, 1)):
        made = upcycle.apply([Width(32, 64, 4), VirtualGroups(4, 2, 2, router_std=STD)], cfg, nest(flat), 0)
    assert upcycle.logits_error((cfg, nest(flat)), made, mesh_of(1, 1, 1)) < 1e-5


REFUSED = {
    "latent_norm=True: needs latent > 0; nearest valid: False": {"moe": {"latent_norm": True}},
    "shared_gate='softmax': needs num_shared_experts > 0; nearest valid: 'none'": {"moe": {"shared_gate": "softmax"}},
    "qkv_bias=True: is not available with mla.kv_rank > 0; nearest valid: False": {
        "qkv_bias": True, "mla": config.to_dict(MLAConfig(8, 0, 8, 16))},
    "latent=-1: must be ≥ 0; nearest valid: 0": {"moe": {"latent": -1}},
}  # fmt: skip


@pytest.mark.parametrize("line", REFUSED)
def test_refused(line):
    with pytest.raises(ConfigError) as raised:
        config.build_model(REFUSED[line])
    assert line in str(raised.value)


def test_upcycling_makes_none_of_them():
    for name, value in {"latent": 8, "shared_gate": "sigmoid", "router": "mlp"}.items():
        more = {"num_shared_experts": 1} if name == "shared_gate" else {}
        with pytest.raises(ConfigError, match=rf"upcycle\.moe\.{name}={value!r}: is not a part of copies"):
            VirtualGroups(4, 1, 1, moe={name: value}, **more).config(ModelConfig(num_dense_layers=4))
