"""The transformer against plain code, its invariances, and generation with a cache against the full forward pass."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from moe_jax import model
from moe_jax.config import ModelConfig, MoEConfig
from moe_jax.errors import ConfigError
from moe_jax.evaluate.generate import generate, pick_token
from moe_jax.model.blocks import Inputs
from moe_jax.moe.layer import TokenInfo
from moe_jax.parallel import sharding
from moe_jax.train import cross_entropy

VOCAB, WIDTH, SEQ = 24, 16, 8
MOE = MoEConfig(num_experts=4, top_k=2, d_expert=12, renormalize=True)
PLAIN = ModelConfig(
    vocab_size=VOCAB, d_model=WIDTH, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=8, init_std=0.3,
    compute_dtype="float32", moe=MOE,
)  # fmt: skip
# Leading dense layers, grouped queries, QK norm, a tied head, a shared expert, sigmoid scores with a selection bias.
EVERYTHING = dataclasses.replace(
    PLAIN, num_layers=3, num_dense_layers=1, d_ff=20, num_kv_heads=2, qk_norm=True, tie_embeddings=True,
    moe=dataclasses.replace(MOE, num_shared_experts=1, score="sigmoid", selection_bias=True),
)  # fmt: skip
# No gate matrices, in a dense layer, the routed and the shared experts.
UNGATED = dataclasses.replace(PLAIN, activation="relu2", num_layers=3, num_dense_layers=1, d_ff=20,
                              moe=dataclasses.replace(MOE, num_shared_experts=1))  # fmt: skip
CONFIGS = {"plain": PLAIN, "everything": EVERYTHING, "ungated": UNGATED}


@functools.cache
def mesh_of(*shape):
    return sharding.make_mesh(shape, jax.devices()[: int(np.prod(shape))])


@functools.cache
def init(cfg, shape=(1, 1, 1), seed=0):
    with jax.set_mesh(mesh_of(*shape)):
        params, bias = jax.jit(functools.partial(model.init, cfg))(jax.random.key(seed))
    return params, bias


def inputs_of(tokens, positions=None, segments=None, counted=None):
    tokens = np.asarray(tokens, np.int32)
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape) if positions is None else positions
    counted = np.ones(tokens.shape, bool) if counted is None else counted
    made = Inputs(
        tokens, np.asarray(positions, np.int32), segments, TokenInfo(np.asarray(counted), np.zeros_like(tokens))
    )
    return put(made)


def put(tree):
    return jax.device_put(tree, NamedSharding(mesh_of(1, 1, 1), sharding.BATCH))


def forward(cfg, params, bias, inputs):
    """Hidden states and router statistics."""
    return model.abstract(cfg).bind(params, bias)(inputs)[:2]


def under_mesh(fn, **kw):
    jitted = jax.jit(fn, **kw)

    def run(*args):
        with jax.set_mesh(mesh_of(1, 1, 1)):
            return jitted(*args)

    return run


def biased(bias, seed=1):
    """Selection biases that are not zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda b: jnp.asarray(rng.normal(size=b.shape) * 0.3, jnp.float32), bias)


def packed(seed=0):
    """Two rows: segments 1 1 1 2 2 2 2 0 and 1 1 1 1 1 3 3 3; positions restart; segment 0 is padding."""
    segments = np.int32([[1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 1, 1, 1, 3, 3, 3]])
    positions = np.int32([[0, 1, 2, 0, 1, 2, 3, 0], [0, 1, 2, 3, 4, 0, 1, 2]])
    tokens = np.stack([np.random.default_rng(seed + i).permutation(VOCAB)[:SEQ] for i in range(2)])
    return inputs_of(tokens, positions, segments, segments > 0), segments


# --- against plain code ----------------------------------------------------------------------------------------------


def plain_norm(x, scale):
    return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * jnp.broadcast_to(scale, x.shape)


def plain_rope(x, positions, theta):
    """Component i of every head turns with component i + H/2, as a complex number."""
    half = x.shape[-1] // 2
    angle = positions[..., None] * jnp.broadcast_to(theta ** (-jnp.arange(half) / half), (*positions.shape, half))
    turned = (x[..., :half] + 1j * x[..., half:]) * jnp.exp(1j * angle)[:, :, None]
    return jnp.concatenate([turned.real, turned.imag], -1)


def plain_attention(cfg, w, x, inputs):
    b, s = x.shape[:2]
    q, k, v = (x @ w[f"w_{n}"] + (w[f"b_{n}"][None, None] if cfg.qkv_bias else 0) for n in "qkv")
    if cfg.qk_norm and cfg.qk_norm_over == "projection":
        q, k = plain_norm(q, w["q_norm"]), plain_norm(k, w["k_norm"])
    q, k, v = (a.reshape(b, s, -1, cfg.head_dim) for a in (q, k, v))
    if cfg.qk_norm and cfg.qk_norm_over == "head":
        q, k = plain_norm(q, w["q_norm"]), plain_norm(k, w["k_norm"])
    q, k = (plain_rope(a, inputs.positions, cfg.rope_theta) for a in (q, k))
    out = []
    for n in range(cfg.num_heads):
        m = n // (cfg.num_heads // cfg.num_kv_heads)
        scores = jnp.einsum("bsh,bzh->bsz", q[:, :, n], k[:, :, m]) * (cfg.attention_multiplier or cfg.head_dim**-0.5)
        seen = jnp.tril(jnp.ones((s, s), bool))[None] & (inputs.segments[:, :, None] == inputs.segments[:, None])
        out.append(jax.nn.softmax(jnp.where(seen, scores, -1e30), -1) @ v[:, :, m])
    return jnp.concatenate(out, -1) @ w["w_o"]


def plain_glu(w, x, ungated=lambda h: jnp.maximum(h, 0) ** 2):
    if "w_gate" not in w:
        return ungated(x @ w["w_up"]) @ w["w_down"]
    return (jax.nn.silu(x @ w["w_gate"]) * (x @ w["w_up"])) @ w["w_down"]


def plain_moe(cfg, w, bias, x, counted):
    """Every expert on every token; the experts outside a token's best K have weight zero. Returns y and the loads."""
    logits = x @ w["w_router"]
    scores = jax.nn.softmax(logits) if cfg.score == "softmax" else jax.nn.sigmoid(logits)
    ranked = scores if bias is None else scores + jnp.broadcast_to(bias, scores.shape)
    chosen = ranked >= jnp.sort(ranked, -1)[..., -cfg.top_k][..., None]
    weights = jnp.where(chosen, scores, 0)
    weights = weights / weights.sum(-1, keepdims=True) * counted[..., None]
    y = plain_glu(w["shared"], x) if cfg.num_shared_experts else 0
    for e in range(cfg.num_experts):
        y = y + weights[..., e : e + 1] * plain_glu({n: w[n][e] for n in ("w_gate", "w_up", "w_down") if n in w}, x)
    return y, jnp.sum(chosen * counted[..., None], (0, 1))


def plain_forward(cfg, params, bias, inputs):
    """The model as a loop over layers and slices of their stacked weights."""
    x, loads = params["embed"][inputs.tokens], []
    for stack in ("dense_layers", "layers"):
        for i in range(len(params[stack]["mlp_norm"]) if stack in params else 0):
            w = jax.tree.map(lambda a, i=i: a[i], params[stack])
            x = x + plain_attention(cfg, w["attention"], plain_norm(x, w["attention_norm"]), inputs)
            h = plain_norm(x, w["mlp_norm"])
            if stack == "dense_layers":
                x = x + plain_glu(w["mlp"], h)
            else:
                b = jax.tree.leaves(bias)[0][i] if bias else None
                y, load = plain_moe(cfg.moe, w["moe"], b, h, inputs.info.counted)
                x, loads = x + y, [*loads, load]
    return plain_norm(x, params["final_norm"]), jnp.stack(loads)


def score(fn, cfg, params, bias, inputs):
    """A function of all logits and its by-products: what the gradients below are of."""
    hidden, stats = fn(cfg, params, bias, inputs)
    logits = hidden @ sharding.replicate(params["embed" if cfg.tie_embeddings else "head"]).T
    return jnp.sum(jnp.sin(logits + 0.1 * jnp.arange(VOCAB)[None, None])), (hidden, stats)


@functools.cache
def gradients(cfg):
    """(((score, (hidden, stats)), gradients), FLOPs of the compiled program)."""
    params, bias = init(cfg)
    with jax.set_mesh(mesh_of(1, 1, 1)):
        step = jax.jit(jax.value_and_grad(functools.partial(score, forward, cfg), has_aux=True))
        compiled = step.lower(params, biased(bias), packed()[0]).compile()
        return compiled(params, biased(bias), packed()[0]), compiled.cost_analysis()["flops"]


def close(got, want, atol: float, rtol: float = 0.0, least: float = 0.0):
    """Compares two trees leaf by leaf. atol is a share of a leaf's largest entry, which is above `least`."""
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        where, scale = jax.tree_util.keystr(path), np.abs(b).max()
        assert scale > least, where
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol * scale, err_msg=where)


@pytest.mark.slow  # the fast part has it in test_stacks.py
@pytest.mark.parametrize("name", CONFIGS)
def test_scanned_layers_equal_a_plain_loop(name):
    """Hidden states, expert loads, and the gradient of a function of the logits in every parameter."""
    cfg = CONFIGS[name]
    ((_, (hidden, stats)), grads), _ = gradients(cfg)
    # The plain code knows of no mesh.
    params, bias = init(cfg)
    local = jax.tree.map(jnp.asarray, jax.device_get((params, biased(bias), packed()[0])))
    plain = jax.jit(jax.value_and_grad(functools.partial(score, plain_forward, cfg), has_aux=True))
    (_, (want, loads)), want_grads = plain(*local)
    np.testing.assert_allclose(hidden, want, rtol=1e-5, atol=2e-5)
    np.testing.assert_array_equal(stats["layers"].tokens_per_expert[:, 0], loads)
    np.testing.assert_array_equal(stats["layers"].tokens[:, 0], [15] * cfg.num_moe_layers)
    close(grads, want_grads, 2e-5, rtol=1e-4, least=1e-3)


def counted_by_hand(cfg):
    d, h, moe = cfg.d_model, cfg.head_dim, cfg.moe
    attention = 2 * d * cfg.num_heads * h + 2 * d * cfg.num_kv_heads * h + (2 * h if cfg.qk_norm else 0) + 2 * d
    mlp = (3 if cfg.activation == "swiglu" else 2) * d
    sparse = d * moe.num_experts + mlp * moe.d_expert * (moe.num_experts + moe.num_shared_experts)
    layers = cfg.num_layers * attention + cfg.num_dense_layers * mlp * cfg.d_ff
    layers += (cfg.num_layers - cfg.num_dense_layers) * sparse
    return layers + d + cfg.vocab_size * d * (1 if cfg.tie_embeddings else 2)


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_as_counted(name):
    cfg = CONFIGS[name]
    params, bias = init(cfg)
    counts = model.count_parameters(cfg)
    assert counts.total == sum(x.size for x in jax.tree.leaves(params)) == counted_by_hand(cfg)
    fewer = dataclasses.replace(cfg, moe=dataclasses.replace(cfg.moe, num_experts=cfg.moe.top_k))
    routers = (cfg.num_layers - cfg.num_dense_layers) * WIDTH * (cfg.moe.num_experts - cfg.moe.top_k)
    assert counts.active == counted_by_hand(fewer) + routers
    assert counts.active_no_embedding == counts.active - VOCAB * WIDTH * (1 if cfg.tie_embeddings else 2)
    assert [b.shape for b in jax.tree.leaves(bias)] == ([(2, 4)] if cfg.moe.selection_bias else [])


def test_initial_values_do_not_depend_on_the_mesh():
    for a, b in zip(jax.tree.leaves(init(EVERYTHING)), jax.tree.leaves(init(EVERYTHING, (2, 2, 2))), strict=True):
        np.testing.assert_array_equal(a, b)
    other = init(EVERYTHING, seed=1)[0]
    assert np.abs(other["embed"] - init(EVERYTHING)[0]["embed"]).max() > 0.1


@pytest.mark.slow
def test_remat_changes_nothing_but_work():
    out = {remat: gradients(dataclasses.replace(PLAIN, remat=remat)) for remat in ("none", "dots", "selective", "full")}
    for remat in ("dots", "selective", "full"):
        for a, b in zip(jax.tree.leaves(out[remat][0]), jax.tree.leaves(out["none"][0]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())
    assert out["none"][1] < out["dots"][1] < out["full"][1]
    assert out["none"][1] < out["selective"][1] < out["full"][1]


# --- who sees whom ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def influence():
    """influence(tokens…)[b, t, s]: the size of d hidden[b, t] / d embedding of the token at s."""

    def gradient(params, bias, inputs, cotangent):
        f = lambda embed: jnp.sum(forward(PLAIN, {**params, "embed": embed}, bias, inputs)[0] * cotangent)
        return jax.grad(f)(params["embed"])

    run = under_mesh(gradient)

    def of(inputs):
        tokens = np.asarray(inputs.tokens)
        out = np.zeros((*tokens.shape, SEQ))
        for b, t in np.ndindex(tokens.shape):
            one = np.zeros((*tokens.shape, WIDTH), np.float32)
            one[b, t] = np.cos(np.arange(WIDTH))
            grad = np.asarray(run(*init(PLAIN), inputs, put(one)))
            out[b, t] = np.abs(grad[tokens[b]]).max(-1)
            assert not grad[np.setdiff1d(np.arange(VOCAB), tokens[b])].any()  # nor the other row
        return out

    return of


@pytest.mark.parametrize("mask", [True, False])
def test_a_token_sees_the_past_of_its_segment_and_nothing_else(influence, mask):
    inputs, segments = packed()
    past = np.tril(np.ones((SEQ, SEQ), bool))[None]
    want = past & (segments[:, :, None] == segments[:, None]) if mask else np.broadcast_to(past, (2, SEQ, SEQ))
    seen = influence(inputs if mask else inputs._replace(segments=None))
    assert not seen[~want].any()
    assert seen[want].min() > 1e-5


def test_a_segment_may_stand_anywhere_in_its_row():
    """Three tokens at the start of a row, behind another document, or behind padding: the same nll and gradient."""
    document, rng = np.int32([3, 7, 1, 12]), np.random.default_rng(3)

    def row(at, before):
        tokens, segments, positions = (np.zeros((1, SEQ), np.int32) for _ in range(3))
        tokens[0, :at] = rng.integers(0, VOCAB, at)
        segments[0, :at], positions[0, :at] = before, np.arange(at)
        tokens[0, at : at + 3], segments[0, at : at + 3], positions[0, at : at + 3] = document[:3], 2, np.arange(3)
        return inputs_of(tokens, positions, segments, segments > 0)

    @under_mesh
    def run(params, inputs, targets, weights):
        def f(params):
            nll = cross_entropy.token_nll(
                forward(PLAIN, params, {}, inputs)[0], sharding.replicate(params["head"]), targets
            )
            return jnp.sum(nll * weights), nll

        return jax.grad(f, has_aux=True)(params)

    def nll(params, inputs, at):
        targets, weights = np.zeros((1, SEQ), np.int32), np.zeros((1, SEQ), np.float32)
        targets[0, at : at + 3], weights[0, at : at + 3] = document[1:], 1.0
        grad, each = run(params, inputs, *put((targets, weights)))
        return jax.device_get(grad), np.asarray(each)[0, at : at + 3]

    params, _ = init(PLAIN)
    want_grad, want = nll(params, row(0, 0), 0)
    assert np.ptp(want) > 0.1
    for at, before in ((4, 1), (5, 0)):
        grad, each = nll(params, row(at, before), at)
        np.testing.assert_allclose(each, want, rtol=1e-5)
        for a, b in zip(jax.tree.leaves(grad), jax.tree.leaves(want_grad), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())
    # Only distances count: all positions moved by 50. And they do count: all positions equal.
    inputs = row(4, 1)
    moved = inputs._replace(positions=inputs.positions + 50)
    np.testing.assert_allclose(nll(params, moved, 4)[1], want, rtol=1e-4)
    still = inputs._replace(positions=inputs.positions * 0)
    assert np.abs(nll(params, still, 4)[1] - want).max() > 1e-2


# --- generation ------------------------------------------------------------------------------------------------------

PROMPTS = [[5], [3, 9, 14], [1, 2, 3, 4, 5, 6], [11, 2]]


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_generation_is_the_argmax_of_the_full_forward(name):
    """Prompts of several lengths, continued by 6. By causality one pass over the result gives every step's logits."""
    cfg = CONFIGS[name]
    params, bias = init(cfg)
    bias = biased(bias)
    out = generate(cfg, mesh_of(1, 1, 1), params, bias, PROMPTS, 6)
    table = np.zeros((len(out), max(map(len, out))), np.int32)
    for row, ids in enumerate(out):
        table[row, : len(ids)] = ids
    hidden, _ = under_mesh(functools.partial(forward, cfg))(params, bias, inputs_of(table))
    logits = np.asarray(hidden, np.float64) @ np.asarray(params["embed" if cfg.tie_embeddings else "head"]).T
    drawn = []
    for row, prompt in enumerate(PROMPTS):
        assert out[row][: len(prompt)] == prompt and len(out[row]) == len(prompt) + 6
        best = np.sort(logits[row, len(prompt) - 1 : len(prompt) + 5], -1)
        assert (best[:, -1] - best[:, -2]).min() > 1e-4  # no near ties: the comparison means something
        assert out[row][len(prompt) :] == logits[row, len(prompt) - 1 : len(prompt) + 5].argmax(-1).tolist()
        drawn += out[row][len(prompt) :]
    assert len(set(drawn)) > 2
    assert generate(cfg, mesh_of(1, 1, 1), params, bias, PROMPTS, 0) == PROMPTS


@pytest.mark.slow
def test_generation_is_the_same_on_a_mesh():
    """Sampled, not greedy: the same draws although the batch is padded from 4 rows to 8."""
    kw = dict(tokens=6, temperature=0.8, top_p=0.9, seed=3)
    one, many = (
        generate(PLAIN, mesh_of(*shape), *init(PLAIN, shape), PROMPTS, **kw) for shape in ((1, 1, 1), (2, 2, 2))
    )
    assert one == many
    assert one != generate(PLAIN, mesh_of(1, 1, 1), *init(PLAIN), PROMPTS, **{**kw, "seed": 4})


@functools.partial(jax.jit, static_argnums=1)
def draw(logits, temperature, top_p, vocab):
    keys = jax.random.split(jax.random.key(0), 4000)
    return jax.vmap(lambda key: pick_token(logits[None], key, temperature, top_p, vocab)[0])(keys)


def draws(logits, temperature, top_p, vocab):
    """The share of every token among the draws of one row."""
    return np.bincount(draw(logits, temperature, top_p, vocab), minlength=len(logits)) / 4000


def test_sampling_draws_from_the_nucleus():
    """Probabilities .5 .3 .15 .05: top_p keeps the fewest that reach it, with their shares; temperature flattens."""
    p = np.float32([0.15, 0.5, 0.05, 0.3])
    near = functools.partial(np.testing.assert_allclose, atol=0.03)
    near(draws(np.log(p), 1.0, 1.0, 4), p)
    near(draws(np.log(p), 2.0, 1.0, 4), np.sqrt(p) / np.sqrt(p).sum())
    for top_p, kept in ((1e-6, [1]), (0.0, [1]), (0.45, [1]), (0.7, [1, 3]), (0.9, [0, 1, 3])):
        want = np.where(np.isin(np.arange(4), kept), p, 0)
        got = draws(np.log(p), 1.0, top_p, 4)
        near(got, want / want.sum())
        assert not got[want == 0].any()
    # Ids past the vocabulary are never drawn, however likely; the nucleus is that of the rest.
    near(draws(np.log(p)[[0, 2, 1, 3]], 1.0, 0.8, 2), [0.75, 0.25, 0, 0])
    near(draws(np.log(p)[[0, 2, 1, 3]], 1.0, 0.7, 2), [1, 0, 0, 0])
    greedy = pick_token(jnp.log(jnp.asarray([[0.1, 0.2, 0.7], [0.6, 0.3, 0.1]])), jax.random.key(0), 0.0, 1.0, 2)
    assert greedy.tolist() == [1, 0]


def test_generation_ends_at_the_last_position():
    with pytest.raises(ConfigError, match=r"tokens=6: exceeds .*=8 after a prompt of 3 tokens; nearest valid: 5"):
        generate(ModelConfig(max_seq_len=8), mesh_of(1, 1, 1), {}, {}, [[1, 2, 3], [1]], 6)


def test_generation_honours_the_vocabulary():
    run = functools.partial(generate, PLAIN, mesh_of(1, 1, 1), *init(PLAIN), PROMPTS, 6)
    few = [i for out, p in zip(run(temperature=3.0, vocab=4), PROMPTS, strict=True) for i in out[len(p) :]]
    assert set(few) == {0, 1, 2, 3}
    for bad in ([], [[1], []]):
        with pytest.raises(ValueError, match="at least one"):
            generate(PLAIN, mesh_of(1, 1, 1), *init(PLAIN), bad, 6)
