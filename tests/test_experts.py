"""Row movement, the three ways to compute experts, and the MoE layer on meshes: values and gradients.

Letters: T tokens, E experts, K experts per token, R rows, D in, F out or hidden width.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from moe_jax.config import ModelConfig, MoEConfig
from moe_jax.config.layers import Kind
from moe_jax.moe import experts
from moe_jax.moe.experts import ExpertCompute, ExpertWeights
from moe_jax.moe.layer import MoE, TokenInfo
from moe_jax.moe.program import Program
from moe_jax.moe.routing import Routing
from moe_jax.nn.layers import Init
from moe_jax.parallel import sharding

# --- rows ------------------------------------------------------------------------------------------------------------


def make_routing(rng, t, k, e, valid=1.0):
    ids = np.stack([rng.permutation(e)[:k] for _ in range(t)]).astype(np.int32)
    weights = rng.random((t, k)).astype(np.float32)
    return Routing(*map(jnp.asarray, (ids, weights, rng.random((t, k)) < valid)))


def test_rows_move_as_plain_indexing_does():
    """permute, dispatch and combine: their hand-written gradients against those of x[index]."""
    rng = np.random.default_rng(2)
    t, k, e, d = 9, 3, 5, 4
    routing = make_routing(rng, t, k, e, valid=0.7)
    plan = experts.plan_rows(routing, e)
    x, rows = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((t, d), (t * k, d)))

    # The plan itself: every slot once, sorted by expert and then by token, idle slots last.
    key = np.where(routing.valid, routing.experts, e).reshape(-1)
    np.testing.assert_array_equal(plan.slot_R, sorted(range(t * k), key=lambda s: (key[s], s)))
    np.testing.assert_array_equal(np.asarray(plan.slot_R)[plan.row_A], np.arange(t * k))
    np.testing.assert_array_equal(plan.sizes_e, [(key == i).sum() for i in range(e)])

    pairs = [
        (lambda x: experts.permute(x, plan.slot_R, plan.row_A), lambda x: x[plan.slot_R], (rows,)),
        (lambda x: experts.permute(x, plan.row_A, plan.slot_R), lambda x: x[plan.row_A], (rows,)),
        (lambda x: experts.dispatch(x, plan), lambda x: x[plan.slot_R // k], (x,)),
        (lambda y: experts.combine(y, plan, t), lambda y: sum(y[plan.row_A[i::k]] for i in range(k)), (rows,)),
    ]

    @functools.partial(jax.jit, static_argnums=0)
    def both(fn, dy, *args):
        y, vjp = jax.vjp(fn, *args)
        return y, *vjp(dy)

    for fast, plain, args in pairs:
        dy = np.float32(rng.normal(size=jax.eval_shape(plain, *args).shape))
        for a, b in zip(both(fast, dy, *args), both(plain, dy, *args), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("width", [6, 5])
def test_pairs_of_bfloat16_are_taken_as_they_are(width):
    x = jax.random.normal(jax.random.key(0), (4, width), jnp.bfloat16)
    index = jnp.asarray([3, 0, 0, 2, 1])
    np.testing.assert_array_equal(experts._take_pairs(x, index), x[index])


# --- compute ---------------------------------------------------------------------------------------------------------

T, E, D, F = 12, 4, 6, 5


def cases(k):
    """Routings of one shape [T, K], and the experts they leave idle."""
    rng = np.random.default_rng(3)
    plain = make_routing(rng, T, k, E)
    everywhere = plain._replace(experts=jnp.full((T, k), 2, jnp.int32))
    if k == E:
        return {"all_experts": plain, "invalid": plain._replace(valid=jnp.asarray(rng.random((T, k)) < 0.5))}
    padded = np.asarray(rng.random((T, k)) < 0.7)
    padded[[3, 11]] = False
    return {
        "random": plain,
        "idle_expert": plain._replace(experts=jnp.where(plain.experts == 1, 3, plain.experts)),
        "one_expert": everywhere._replace(valid=jnp.asarray(np.arange(k)[None] == 0) & plain.valid),
        "one_expert_twice": everywhere,
        "invalid": plain._replace(valid=jnp.asarray(padded)),
        "nothing": plain._replace(valid=jnp.zeros((T, k), bool)),
    }


def make_weights(seed=4):
    rng = np.random.default_rng(seed)
    array = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return ExpertWeights(array(E, D, F), array(E, D, F), array(E, F, D)), array(T, D)


def loop(x, routing, w):
    """y = Σ_k weight · GLU of the slot's expert, slot by slot in float64."""
    x, w = np.asarray(x, np.float64), [np.asarray(a, np.float64) for a in w[:3]]
    y = np.zeros(x.shape)
    for t, k in zip(*np.nonzero(np.asarray(routing.valid)), strict=True):
        gate, up, down = (a[int(routing.experts[t, k])] for a in w)
        a = x[t] @ gate
        y[t] += float(routing.weights[t, k]) * ((a / (1 + np.exp(-a)) * (x[t] @ up)) @ down)
    return y


def make_run(cfg):
    """Jitted (x, routing, weights, cotangent) → y, kept, and the gradients in x, combine weights, expert weights."""

    @jax.jit
    def run(x, routing, w, dy):
        def f(x, combine_weights, w):
            return experts.ExpertCompute(cfg)(x, routing._replace(weights=combine_weights), w)

        y, vjp, kept = jax.vjp(f, x, routing.weights, w, has_aux=True)
        return y, kept, vjp(dy)

    return run


@pytest.mark.parametrize("k", [2, pytest.param(E, marks=pytest.mark.slow)])
def test_every_compute_path_equals_the_oracle(k):
    """`dense` against the loop (value, and gradient along a random direction), the others against `dense`."""
    w, x = make_weights()
    rng = np.random.default_rng(5)
    dy = jnp.asarray(rng.normal(size=(T, D)), jnp.float32)
    make = lambda compute: make_run(MoEConfig(num_experts=E, top_k=k, compute=compute, capacity_factor=float(E)))
    dense, others = make("dense"), {c: make(c) for c in ("grouped", "capacity")}
    # As on a fourth of the devices that all tokens chose: up to four further turns.
    others["in turns"] = make_run(MoEConfig(num_experts=4 * E, top_k=k, compute="grouped"))
    assert experts.rows_per_pass(ExpertCompute(MoEConfig(num_experts=4 * E, top_k=k)), T * k, E) == (4 * k, 8)
    for name, routing in cases(k).items():
        y, kept, grads = dense(x, routing, w, dy)
        assert y.dtype == jnp.float32
        np.testing.assert_array_equal(kept, routing.valid)
        np.testing.assert_allclose(y, loop(x, routing, w), rtol=1e-5, atol=1e-5, err_msg=name)
        args = (x, routing.weights, w)
        way = jax.tree.map(lambda a: rng.normal(size=a.shape), args)
        ends = []
        for step in (1e-5, -1e-5):
            a, b, c = jax.tree.map(lambda a, d, step=step: np.asarray(a, np.float64) + step * d, args, way)
            ends.append(np.sum(loop(a, routing._replace(weights=b), c) * np.asarray(dy)))
        slope = sum(np.sum(g * d) for g, d in zip(jax.tree.leaves(grads), jax.tree.leaves(way), strict=True))
        np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2e-5, rtol=1e-4, atol=1e-6, err_msg=name)
        idle = sorted(set(range(E)) - set(np.asarray(routing.experts)[np.asarray(routing.valid)].tolist()))
        for compute, run in others.items():
            y2, kept2, grads2 = run(x, routing, w, dy)
            np.testing.assert_array_equal(kept2, routing.valid)
            for a, b in zip((y2, *jax.tree.leaves(grads2)), (y, *jax.tree.leaves(grads)), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5, err_msg=f"{compute} {name}")
            assert not np.asarray(grads2[1])[~np.asarray(routing.valid)].any()  # slots that do nothing
            assert not any(np.asarray(g)[idle].any() for g in jax.tree.leaves(grads2[2]))
    assert len(idle) in (0, E)


def test_capacity_by_hand():
    """C = ⌈0.5 · 1 · 4 / 2⌉ = 1: each expert keeps the first of its tokens."""
    cfg = MoEConfig(num_experts=2, top_k=1, compute="capacity", capacity_factor=0.5)
    assert experts.capacity_rows(ExpertCompute(cfg), 4) == 1
    # ⌈1.25 · 2 · 12 / 8⌉ = ⌈3.75⌉; never less than one row.
    assert experts.capacity_rows(ExpertCompute(MoEConfig(num_experts=8, top_k=2, capacity_factor=1.25)), 12) == 4
    assert experts.capacity_rows(ExpertCompute(MoEConfig(num_experts=64, top_k=1, capacity_factor=0.1)), 4) == 1
    ones, run = np.ones((2, 1, 1), np.float32), jax.jit(lambda *args: experts.ExpertCompute(cfg)(*args))
    w = ExpertWeights(ones, ones, np.float32([[[1.0]], [[10.0]]]))
    routing = Routing(np.int32([[0], [0], [1], [0]]), np.float32([[1.0], [1.0], [0.5], [1.0]]), np.ones((4, 1), bool))
    y, kept = jax.device_get(run(np.ones((4, 1), np.float32), routing, w))
    silu = 1 / (1 + np.exp(-1.0))
    np.testing.assert_array_equal(kept[:, 0], [True, False, True, False])
    np.testing.assert_allclose(y[:, 0], [silu, 0, 5 * silu, 0], rtol=1e-6)
    # A slot that is not valid takes no place.
    without_first = routing._replace(valid=np.array([[0], [1], [1], [1]], bool))
    kept = np.asarray(run(np.ones((4, 1), np.float32), without_first, w)[1])
    np.testing.assert_array_equal(kept[:, 0], [False, True, True, False])


def test_dropped_slots_are_as_if_never_chosen():
    """Kept slots are the first C of each expert in token order; values and gradients are the oracle's on those."""
    cfg = MoEConfig(num_experts=E, top_k=2, compute="capacity", capacity_factor=0.6)
    rows = experts.capacity_rows(ExpertCompute(cfg), T)
    assert rows == 4
    w, x = make_weights()
    dy = jnp.asarray(np.random.default_rng(6).normal(size=(T, D)), jnp.float32)
    run, dense = make_run(cfg), make_run(MoEConfig(num_experts=E, top_k=2, compute="dense"))
    for name, routing in cases(2).items():
        left = np.full(E, rows)
        want = np.zeros((T, 2), bool)
        for t, k in np.ndindex(T, 2):
            e = int(routing.experts[t, k])
            if routing.valid[t, k] and left[e]:
                want[t, k], left[e] = True, left[e] - 1
        y, kept, grads = run(x, routing, w, dy)
        np.testing.assert_array_equal(kept, want, err_msg=name)
        assert want.sum() < np.sum(routing.valid) or name == "nothing"  # something was dropped
        y2, _, grads2 = dense(x, routing._replace(valid=jnp.asarray(want)), w, dy)
        for a, b in zip((y, *jax.tree.leaves(grads)), (y2, *jax.tree.leaves(grads2)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5, err_msg=name)


# --- the layer on meshes ---------------------------------------------------------------------------------------------

BATCH, SEQ, WIDTH, GROUPS = 8, 4, 16, 2


def layer_cfg(**kw):
    usual = dict(num_experts=8, top_k=2, d_expert=12, num_shared_experts=1, renormalize=True, exchange="ring")
    return MoEConfig(**{**usual, **kw})


def layer_batch():
    rng = np.random.default_rng(7)
    x = rng.normal(size=(BATCH, SEQ, WIDTH)).astype(np.float32)
    counted = rng.random((BATCH, SEQ)) < 0.75
    group = np.broadcast_to((np.arange(BATCH) // (BATCH // GROUPS))[:, None], (BATCH, SEQ)).astype(np.int32)
    cotangent = rng.normal(size=x.shape).astype(np.float32)
    return x, TokenInfo(counted, group), cotangent


def set_weights(params, seed=8):
    """The same numbers on any mesh, sharded as the layer's own."""
    rng = np.random.default_rng(seed)
    fill = lambda p: jax.device_put(rng.normal(size=p.shape).astype(np.float32) * p.shape[-2] ** -0.5, p.sharding)
    return jax.tree.map(fill, params)


def make_layer(cfg, exchange="ring"):
    model = ModelConfig(d_model=WIDTH, moe=cfg)
    program = Program(exchange=exchange, balance_groups=GROUPS)
    return MoE(model, Kind("moe", cfg.num_experts), Init(nnx.Rngs(0), 1.0), 1.0, program)


@functools.cache
def run_layer(shape, cfg):
    """(y, stats, gradients) of one layer as numpy. The loss reaches the router through weights and statistics."""
    mesh = sharding.make_mesh(shape, jax.devices()[: int(np.prod(shape))])
    put = lambda tree: jax.device_put(tree, NamedSharding(mesh, sharding.BATCH))
    with jax.set_mesh(mesh):
        layer = make_layer(cfg, cfg.exchange)
        graph, params, rest = nnx.split(layer, nnx.Param, ...)
        params = set_weights(params)
        x, info, cotangent = put(layer_batch())

        def loss(params, x):
            y, stats, *_ = nnx.merge(graph, params, rest)(x, info)
            value = jnp.sum(y * cotangent) + jnp.sum(jnp.sin(stats.prob_per_expert)) + 0.1 * jnp.sum(stats.z_sq)
            return value, (y, stats)

        grads, (y, stats) = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x)
    flat = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(grads[0]))
    grads = {"x": grads[1], **{jax.tree_util.keystr(path): leaf for path, leaf in flat}}
    return jax.device_get((y, stats, grads))


LAYERS = [(shape, how) for shape in ((2, 2, 2), (1, 1, 8), (8, 1, 1))
          for how in (("grouped", "all_to_all"), ("capacity", "ring"))]  # fmt: skip


# Of grouped experts the fast part has more in test_exchange.py.
@pytest.mark.parametrize(
    ("shape", "how"), [pytest.param(*c, marks=() if i == 1 else pytest.mark.slow) for i, c in enumerate(LAYERS)]
)
def test_layer_is_the_same_on_every_mesh(shape, how):
    compute, exchange = how
    y, stats, grads = run_layer(shape, layer_cfg(compute=compute, exchange=exchange, capacity_factor=8.0))
    y1, stats1, grads1 = run_layer((1, 1, 1), layer_cfg(compute="dense"))
    np.testing.assert_allclose(y, y1, rtol=1e-5, atol=1e-5)
    assert stats.tokens.sum() == layer_batch()[1].counted.sum()
    assert not stats.dropped.any()
    for a, b in zip(jax.tree.leaves(stats), jax.tree.leaves(stats1), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    assert set(grads) == set(grads1) and len(grads) == 8
    for name in grads:
        assert np.abs(grads1[name]).max() > 1e-2, name
        np.testing.assert_allclose(grads[name], grads1[name], rtol=1e-4, atol=2e-5, err_msg=name)


def test_drops_on_a_mesh_are_counted_once():
    """Capacity counts the tokens of one `expert` row of the mesh: every row drops by itself, in token order."""
    cfg = layer_cfg(compute="capacity", capacity_factor=0.5)
    x, info, _ = layer_batch()
    w_router = next(np.asarray(w) for w in _layer_weights(cfg) if w.shape == (WIDTH, cfg.num_experts))
    chosen = np.argsort(-(x.astype(np.float64) @ w_router.astype(np.float64)), -1)[..., : cfg.top_k]
    for shape in ((1, 1, 1), (2, 2, 2), (1, 1, 8)):
        rows = shape[0] * shape[1]  # of `shape[2]` devices each, consecutive in the batch
        per_row = BATCH // rows
        most = experts.capacity_rows(ExpertCompute(cfg), per_row * SEQ)
        want = np.zeros(GROUPS)
        for r in range(rows):
            left = np.full(cfg.num_experts, most)
            for b, s in np.ndindex(per_row, SEQ):
                b += r * per_row
                for e in chosen[b, s] if info.counted[b, s] else ():
                    want[info.group[b, s]] += left[e] == 0
                    left[e] = max(0, left[e] - 1)
        assert want.min() > 0
        _, stats, _ = run_layer(shape, cfg)
        np.testing.assert_array_equal(stats.dropped, want, err_msg=str(shape))
        assert stats.tokens_per_expert.sum() == cfg.top_k * info.counted.sum()  # choices, dropped or not


def _layer_weights(cfg):
    with jax.set_mesh(sharding.make_mesh((1, 1, 1), jax.devices()[:1])):
        layer = make_layer(cfg)
        return jax.tree.leaves(set_weights(nnx.state(layer, nnx.Param)))


def test_shared_experts_add_to_the_routed():
    """Without routed weights the output is the shared GLU of width 2·F, without shared ones the routed sum alone."""
    cfg = layer_cfg(num_shared_experts=2, compute="dense")
    mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
    x, info, _ = jax.device_put(layer_batch(), NamedSharding(mesh, sharding.BATCH))
    with jax.set_mesh(mesh):
        layer = make_layer(cfg)
        graph, params = nnx.split(layer)
        params = nnx.to_pure_dict(set_weights(params))
        run = jax.jit(lambda params: nnx.merge(graph, params)(x, info)[0])
        zero = lambda w: jnp.zeros_like(w)
        both = run(params)
        shared = run({**params, "w_down": zero(params["w_down"])})
        routed = run({**params, "shared": {**params["shared"], "w_down": zero(params["shared"]["w_down"])}})
    w = {n: np.asarray(a, np.float64) for n, a in params["shared"].items()}
    assert w["w_gate"].shape == (WIDTH, 2 * cfg.d_expert)
    a = np.asarray(x, np.float64) @ w["w_gate"]
    want = (a / (1 + np.exp(-a)) * (np.asarray(x, np.float64) @ w["w_up"])) @ w["w_down"]
    np.testing.assert_allclose(shared, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(both, shared + routed, rtol=1e-5, atol=1e-5)
    assert not np.asarray(routed)[~np.asarray(info.counted)].any()  # padding uses no routed expert
    assert np.abs(routed)[np.asarray(info.counted)].max() > 0.1
