"""Post-norm, learned scales and fixed multipliers, and a memory in a block; and NormHead after the last one.

Values and gradients are those of a plain loop. What cannot be is refused by the field's name.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_model import (
    EVERYTHING,
    SEQ,
    VOCAB,
    biased,
    close,
    init,
    inputs_of,
    mesh_of,
    packed,
    plain_attention,
    plain_glu,
    plain_moe,
    plain_norm,
    put,
)

from moe_jax import config, model, optim, upcycle
from moe_jax.config import MemoryConfig
from moe_jax.errors import ConfigError, FormatError
from moe_jax.evaluate import spectra
from moe_jax.evaluate.generate import generate
from moe_jax.hf.architectures import write_config
from moe_jax.nn.layers import weight
from moe_jax.train import cross_entropy
from moe_jax.tree import flatten, nest

MEMORY = MemoryConfig(keys=6, heads=2, top=3, key_dim=6)
GRANITE = {"embedding_multiplier": 1.5, "attention_multiplier": 0.4, "residual_multiplier": 0.7, "logits_divisor": 1.2}
# Every block in the order of OLMo 2, with ZAYA1's scales, multipliers and a memory; NormHead on a tied matrix.
POST = dataclasses.replace(
    EVERYTHING, num_dense_layers=0, num_layers=2, layers="memory moe", memory=MEMORY, norm="post",
    residual_scale=True, norm_head=True, qk_norm_over="projection", **GRANITE,
)  # fmt: skip
MODELS = {
    "memory": dataclasses.replace(POST, layers="2*memory"),
    "post": POST,
    "pre": dataclasses.replace(POST, norm="pre", tie_embeddings=False, layers="dense memory moe", num_layers=3),
    "post alone": dataclasses.replace(POST, residual_scale=False, norm_head=False, layers="2*(moe memory)",
                                      num_layers=4),
}  # fmt: skip
TARGETS = np.random.default_rng(3).integers(0, VOCAB, (2, SEQ)).astype(np.int32)
WEIGHTS = np.random.default_rng(4).random((2, SEQ)).astype(np.float32)


# --- against plain code ----------------------------------------------------------------------------------------------


def plain_memory(cfg, w, x):
    """The sum of the best of all n² rows of each head, every row's score computed."""
    q = (x @ w["w_query"] + w["b_query"][None, None]).reshape(*x.shape[:2], cfg.heads, cfg.key_dim)
    first, second = jnp.split(plain_norm(q, w["query_norm"]), 2, axis=-1)
    y = 0.0
    for u in range(cfg.heads):
        one, two = first[:, :, u] @ w["keys"][u, 0].T, second[:, :, u] @ w["keys"][u, 1].T
        scores = (one[..., :, None] + two[..., None, :]).reshape(*x.shape[:2], -1)
        chosen = scores >= jnp.sort(scores, -1)[..., -cfg.top][..., None]
        y = y + jax.nn.softmax(jnp.where(chosen, scores, -jnp.inf), -1) @ w["values"]
    return y


def plain_scaled(w, name, x):
    """(x + bias) times a scale."""
    over = lambda a: a[None, None]
    return (x + over(w[f"{name}_bias"])) * over(w[f"{name}_scale"])


def plain_add(cfg, w, branch, x, y):
    """The residual stream after what attention or the feed-forward layer adds. branch: "attention" or "mlp"."""
    y = cfg.residual_multiplier * (plain_norm(y, w[f"{branch}_norm"]) if cfg.norm == "post" else y)
    if not cfg.residual_scale:
        return x + y
    w = w[f"{branch}_residual"]
    return plain_scaled(w, "stream", x) + plain_scaled(w, "branch", y)


def plain_read(cfg, w, branch, x):
    """The input of attention or of the feed-forward layer."""
    return x if cfg.norm == "post" else plain_norm(x, w[f"{branch}_norm"])


def block_of(params, place):
    """The parameters of a block; {} where there are none."""
    for name in place.path.split("/"):
        params = params.get(name, {})
    return jax.tree.map(lambda a: a[place.index], params)


def plain_blocks(cfg, params, fixed, inputs, experts, glu=plain_glu):
    """Hidden states, and the loads of the blocks with experts, by a loop over the blocks.

    experts: (place, weights, selection biases or tables, input, state of the router) → (result, state, loads).
    """
    x, state, loads = cfg.embedding_multiplier * params["embed"][inputs.tokens], 0.0, []
    x = plain_scaled(params, "embed", x) if cfg.residual_scale else x
    for place in cfg.places:
        w, b = block_of(params, place), block_of(fixed, place).get("moe", {})
        h = plain_read(cfg, w, "attention", x)
        x = plain_add(cfg, w, "attention", x, plain_attention(cfg, w["attention"], h, inputs))
        h = plain_read(cfg, w, "mlp", x)
        if "moe" in w:
            y, state, load = experts(place, w["moe"], b, h, state)
            loads.append(load)
        else:
            y = glu(w["mlp"], h)
        if "memory" in w:
            y = y + plain_memory(cfg.memory, w["memory"], h)
        x = plain_add(cfg, w, "mlp", x, y)
    return plain_norm(x, params["final_norm"]) / cfg.logits_divisor, loads


def plain_forward(cfg, params, bias, inputs):
    """Hidden states of a model whose routers have selection biases."""

    def experts(place, w, b, h, state):
        y, load = plain_moe(cfg.moe, w, b["router_bias"], h, inputs.info.counted)
        return y, state, load

    return plain_blocks(cfg, params, bias, inputs, experts)[0]


def plain_loss(cfg, params, bias, inputs):
    matrix = params["embed" if cfg.tie_embeddings else "head"]
    if cfg.norm_head:
        matrix = matrix / jnp.sqrt(jnp.sum(matrix**2, axis=1, keepdims=True))
    hidden = plain_forward(cfg, params, bias, inputs)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(hidden @ matrix.T), TARGETS[..., None], axis=-1)[..., 0]
    return -jnp.sum(WEIGHTS * chosen), hidden


def loss(cfg, params, bias, inputs):
    net = model.abstract(cfg).bind(params, bias)
    hidden = net(inputs).hidden
    return cross_entropy.summed_nll(hidden, weight(net.output_matrix, hidden.dtype), *put((TARGETS, WEIGHTS))), hidden


def ready(cfg):
    """Parameters that all matter, those that begin as ones and zeros included, and selection biases."""
    params, bias = init(cfg)
    rng = np.random.default_rng(5)
    constant = lambda path: path.endswith(("norm", "_bias", "_scale", "b_query"))
    moved = lambda path, w: w + 0.3 * rng.normal(size=w.shape).astype(np.float32) if constant(path) else w
    with jax.set_mesh(mesh_of(1, 1, 1)):
        return nest({path: moved(path, w) for path, w in flatten(params).items()}), biased(bias)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "memory" else pytest.mark.slow) for n in MODELS])
def test_a_plain_loop(name):
    """Loss, hidden states, and the gradient of every parameter; with NormHead the size of a row does not matter."""
    cfg = MODELS[name]
    params, bias = ready(cfg)
    inputs = packed()[0]
    with jax.set_mesh(mesh_of(1, 1, 1)):
        run = jax.jit(jax.value_and_grad(functools.partial(loss, cfg), has_aux=True))
        (got, hidden), grads = run(params, bias, inputs)
        table = "embed" if cfg.tie_embeddings else "head"
        if cfg.norm_head and not cfg.tie_embeddings:
            sizes = np.exp2(np.arange(VOCAB) % 5 - 2).astype(np.float32)[:, None]
            (again, _), of_larger = run(params | {table: params[table] * sizes}, bias, inputs)
            np.testing.assert_allclose(again, got, rtol=1e-6)
            np.testing.assert_allclose(of_larger[table] * sizes, grads[table], rtol=1e-4, atol=1e-6)
    local = jax.tree.map(jnp.asarray, jax.device_get((params, bias, inputs)))  # which knows of no mesh
    plain = jax.jit(jax.value_and_grad(functools.partial(plain_loss, cfg), has_aux=True))
    (want, want_hidden), want_grads = plain(*local)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(hidden, want_hidden, rtol=1e-4, atol=2e-5)
    close(grads, want_grads, 3e-5, rtol=1e-4, least=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_generation_with_a_cache(name):
    """Greedy samples are the argmax of the full forward pass over them."""
    cfg = MODELS[name]
    params, bias = ready(cfg)
    out = generate(cfg, mesh_of(1, 1, 1), params, bias, [[5], [3, 9, 14]], 4)
    for tokens, prompt in zip(out, (1, 3), strict=True):
        with jax.set_mesh(mesh_of(1, 1, 1)):
            net = model.abstract(cfg).bind(params, bias)
            logits = np.asarray(net(inputs_of([tokens])).hidden[0]) @ np.asarray(weight(net.output_matrix, "float32")).T
        assert tokens[prompt:] == logits.argmax(-1)[prompt - 1 : -1].tolist()


@pytest.mark.slow
def test_a_memory_of_zeros_changes_nothing():
    """A memory block whose values are zeros is the dense block, bit for bit."""
    cfg = dataclasses.replace(POST, layers="2*memory moe", num_layers=3)
    plain = dataclasses.replace(cfg, layers="", num_dense_layers=2, memory=MemoryConfig())
    params, bias = ready(cfg)
    params["layers"]["memory"]["values"] = jnp.zeros_like(params["layers"]["memory"]["values"])
    dense = {name: w for name, w in params["layers"].items() if name != "memory"}
    others = {name: w for name, w in params.items() if name not in ("layers", "layers_2")}
    same = others | {"dense_layers": dense, "layers": params["layers_2"]}
    with jax.set_mesh(mesh_of(1, 1, 1)):
        hidden = [
            model.abstract(c).bind(p, b)(packed()[0]).hidden
            for c, p, b in ((cfg, params, bias), (plain, same, {"layers": bias["layers_2"]}))
        ]
    np.testing.assert_array_equal(*hidden)


@pytest.mark.slow
def test_fresh_scales_are_the_plain_sum():
    """A model whose scales are as they begin is the model without them, bit for bit."""
    params, bias = init(POST)
    learned = lambda path: "_residual/" in path or path in ("embed_bias", "embed_scale")
    without = nest({path: w for path, w in flatten(params).items() if not learned(path)})
    assert len(flatten(params)) > len(flatten(without)) + 2
    plain = dataclasses.replace(POST, residual_scale=False)
    with jax.set_mesh(mesh_of(1, 1, 1)):
        hidden = [model.abstract(c).bind(p, bias)(packed()[0]).hidden for c, p in ((POST, params), (plain, without))]
    np.testing.assert_array_equal(*hidden)


# --- counts ----------------------------------------------------------------------------------------------------------


def test_rows_in_use_are_counted():
    """Counts the rows that a token reads, of n², in parameters and FLOPs, and all keys."""
    cfg = dataclasses.replace(POST, layers="dense memory")
    plain = dataclasses.replace(POST, layers="", num_dense_layers=2, memory=MemoryConfig())
    counts, without = model.count_parameters(cfg), model.count_parameters(plain)
    d, u, k, n, top = cfg.d_model, MEMORY.heads, MEMORY.key_dim, MEMORY.keys, MEMORY.top
    query, vectors, keys = d * u * k, u * k + k, u * n * k
    assert counts.total - without.total == query + vectors + keys + n * n * d
    assert counts.active - without.active == query + vectors + keys + u * top * d
    flops = [model.flops_per_token(c, SEQ) for c in (cfg, plain)]
    assert flops[0] - flops[1] == pytest.approx(6 * (query + keys + u * top * d))


def test_tables_know_every_parameter():
    """The optimizer's, and that of kinds of matrices; AdamW has rows and keys, Muon the matrix of queries."""
    shapes = model.abstract(MODELS["post alone"]).shapes | model.abstract(POST).shapes
    labels = {path.rpartition("/")[2]: label for path, label in flatten(optim.label_params(shapes)).items()}
    assert {name: labels[name] for name in ("values", "keys", "b_query", "query_norm", "w_query", "stream_bias")} == {
        "values": "adamw", "keys": "adamw", "b_query": "adamw", "query_norm": "adamw", "w_query": "matrix",
        "stream_bias": "adamw",
    }  # fmt: skip
    kinds = {spectra.kind_of(path) for path in flatten(shapes)}
    assert {"memory query", "dense up", "expert up", "embedding"} < kinds
    assert optim.muon_plan(config.OptimConfig(), model.abstract(POST), {"data": 1, "fsdp": 2, "expert": 4}).rows


# --- what is refused -------------------------------------------------------------------------------------------------

LATE = {"layers": "2*(late dense)", "num_layers": 4, "num_dense_layers": 0, "memory": MemoryConfig()}
BAD = {
    "norm='post': is not available with late blocks.*nearest valid: 'pre'": LATE | {"residual_scale": False},
    "residual_scale=True: is not available with late blocks.*nearest valid: False": LATE | {"norm": "pre"},
    "residual_multiplier=0.7: is not available with late blocks.*nearest valid: 1.0": LATE
    | {"norm": "pre", "residual_scale": False},
    "norm_eps=0.0: must be > 0 with norm='post'": {"norm_eps": 0.0},
    "memory.keys=6: has no effect without a memory block in layers; nearest valid: 512": {"layers": "moe dense"},
    "layers=.*'memory:4': a memory block has no experts; nearest valid: 'memory moe'": {"layers": "memory:4 moe"},
}  # fmt: skip


@pytest.mark.parametrize("rule", BAD)
def test_refused(rule):
    with pytest.raises(ConfigError, match=rule):
        dataclasses.replace(POST, moe=dataclasses.replace(POST.moe, num_experts=8), **BAD[rule])


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        ({"top": 7}, r"top=7: must be ≤ keys=6; nearest valid: 6"),
        ({"key_dim": 5}, r"key_dim=5: must be even.*nearest valid: 6"),
        ({"heads": 20}, r"heads=20: heads · top=60 must be ≤ keys²=36; nearest valid: 12"),
    ],
)
def test_a_memory_has_limits(values, rule):
    with pytest.raises(ConfigError, match=rule):
        dataclasses.replace(MEMORY, **values)


WRITTEN = {
    "norm": dataclasses.replace(EVERYTHING, norm="post"),
    "norm_head": dataclasses.replace(EVERYTHING, norm_head=True),
    "residual_scale": dataclasses.replace(EVERYTHING, residual_scale=True),
    "embedding_multiplier": dataclasses.replace(EVERYTHING, embedding_multiplier=2.0),
    "layers": dataclasses.replace(EVERYTHING, num_dense_layers=0, layers="memory 2*moe", memory=MEMORY),
}


@pytest.mark.parametrize("field", WRITTEN)
def test_export_refuses(field):
    """Names the field that no architecture of Hugging Face has, beside a plain model's."""
    moe = dataclasses.replace(EVERYTHING.moe, score="softmax", selection_bias=False, num_shared_experts=0)
    with pytest.raises(FormatError, match=rf"differs in .*\b{field} \("):
        write_config(dataclasses.replace(WRITTEN[field], moe=moe), 16)


def test_a_memory_is_not_upcycled():
    dense = dataclasses.replace(POST, layers="dense memory")
    with pytest.raises(ConfigError, match=r"upcycle.from=.*memory blocks, for which there is no rule"):
        upcycle.final_config([upcycle.VirtualGroups(2, 1, 1)], dense)
    plain = dataclasses.replace(POST, layers="", num_dense_layers=2, memory=MemoryConfig())
    with pytest.raises(ConfigError, match=r"upcycle.layers='memory moe': a memory would be fresh"):
        upcycle.final_config([upcycle.VirtualGroups(2, 1, 1, layers="memory moe")], plain)


CHAINS = {
    "experts": [upcycle.VirtualGroups(4, 2, 2, dense_layers=1)],
    "width": [upcycle.Width(32, 60, 8)],
    "depth": [upcycle.Depth(6, new="identity")],
}


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("name", CHAINS)
def test_an_upcycled_model_is_the_same_function(name, norm):
    """Upcycles models with post-norm, scales of the residual stream, multipliers and NormHead."""
    cfg = dataclasses.replace(POST, layers="", num_layers=3, num_dense_layers=3, memory=MemoryConfig(), norm=norm)
    params, _ = ready(cfg)
    mesh = mesh_of(1, 1, 1)
    with jax.set_mesh(mesh):
        after, made = upcycle.apply(CHAINS[name], cfg, params)
    assert config.plain(after) != config.plain(cfg)
    assert upcycle.logits_error((cfg, params), (after, made), mesh) < 1e-5
