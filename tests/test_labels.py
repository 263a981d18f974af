"""Labels: tokens choose from their label's experts, have a router of it, or the one expert of it; and what they must
not change.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import config, optim
from moe_jax.config import MoEConfig
from moe_jax.evaluate import switches
from moe_jax.moe.router_losses import label_information
from moe_jax.moe.routers import linear_by_label
from moe_jax.moe.routing import Facts, allowed_by_label, route
from moe_jax.moe.stats import router_stats
from moe_jax.nn import untied
from moe_jax.optim import newton_schulz
from moe_jax.optim.muon import muon
from moe_jax.train.gradients import make_gradients
from moe_jax.train.state import abstract_state, init_state, put_batch
from moe_jax.tree import flatten, nest
from tests.labelled import E, M, T, labelled, rows_of, state_on
from tests.test_invariance import assert_same

slow = pytest.mark.slow
LABEL = np.random.default_rng(5).integers(0, M, T).astype(np.int32)
COUNTED = np.arange(T) % 7 != 3


def gradients_of(way, cfg, shape) -> dict:
    mesh, state = state_on(way, shape)
    with jax.set_mesh(mesh):
        batch = put_batch(rows_of(0.25), mesh, cfg)
        return jax.device_get(jax.jit(make_gradients(cfg, mesh))(state.params, state.router_bias, batch, 1)._asdict())


@functools.cache
def oracle(way) -> dict:
    return gradients_of(way, labelled(way), (1, 1, 1))


@pytest.mark.parametrize(
    ("way", "shape", "micro", "remat"),
    [
        ("all", (2, 2, 2), 2, "full"),
        pytest.param("experts", (1, 2, 4), 4, "selective", marks=slow),
        pytest.param("table", (1, 2, 2), 2, "selective", marks=slow),
    ],
)
def test_invariance(way, shape, micro, remat):
    assert_same(gradients_of(way, labelled(way, micro, remat, "grouped"), shape), oracle(way))


@functools.cache
def program(way):
    """The mesh of one device, and (params, rows) → `Gradients` on it."""
    cfg = labelled(way)
    mesh, state = state_on(way, (1, 1, 1))
    run = jax.jit(make_gradients(cfg, mesh))

    def of(params, rows):
        with jax.set_mesh(mesh):
            return jax.device_get(run(params, state.router_bias, put_batch(rows, mesh, cfg), 1))

    return of


@slow
@pytest.mark.parametrize("way", ["groups", "routers", "experts", "untied", "table"])
def test_labels_take_part(way):
    """Other labels of the same batch are another loss. Weights of a label that no token has get no gradient at all."""
    rows, params = rows_of(0.25), state_on(way, (1, 1, 1))[1].params
    one, other = (program(way)(params, rows | {"label": label}) for label in (rows["label"], 1 - rows["label"]))
    assert abs(one.loss - other.loss) > 1e-4
    if way == "experts":  # of each row's n tokens of a label, the ⌈2n/4⌉ of each of its experts
        own = rows["label"][:, None] == np.arange(M)[:, None]
        n = (own & (rows["segment_ids"] > 0)[:, None]).sum(-1)
        loads = next(iter(one.sums.router.values())).tokens_per_expert.sum(1)
        np.testing.assert_array_equal(loads, np.tile(np.repeat((-(-2 * n // 4)).sum(0), 4), (2, 1)))
    alone = program(way)(params, rows | {"label": np.zeros_like(rows["label"])}).grads["layers"]
    moe, own = alone["moe"], [*alone["attention"].values(), alone["attention_norm"], alone["mlp_norm"]]
    experts, first = [moe[name] for name in ("w_gate", "w_up", "w_down")], 4 if way in ("groups", "experts") else 1
    grads = {"untied": own, "table": own + experts, "routers": [moe.get("w_router")]}.get(way, experts)
    for grad in grads:
        assert np.abs(grad[:, :first]).max() > 1e-6 and not np.asarray(grad[:, first:]).any()


@slow
def test_equal_weights_are_the_plain_model():
    """Loss and gradients, those of a shared weight as the sum over labels: of attention and norms of its own, of a
    router, and of experts, where a table names one of two copies."""
    for way in ("untied", "routers", "table"):
        cfg = labelled(way)
        one = {"num_experts": 1, "table": "token"} if way == "table" else {"routers": 1}
        labels = {} if way == "table" else cfg.data.labels  # which a loss reads
        plain = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, labels=labels), model=dataclasses.replace(
            cfg.model, untie=1, moe=dataclasses.replace(cfg.model.moe, **one)))  # fmt: skip
        mesh, state = state_on(way, (1, 1, 1))
        bias = init_state(plain, mesh).router_bias  # of a table the one expert of all tokens
        shapes = {path: x.shape for path, x in flatten(abstract_state(plain, mesh).params).items()}
        leaves = flatten(state.params)
        by_label = {path for path, x in leaves.items() if x.size > np.prod(shapes[path])}
        first = {path: x[:, 0].reshape(shapes[path]) if path in by_label else x for path, x in leaves.items()}
        both = {path: jnp.stack([first[path]] * 2, 1).reshape(leaves[path].shape) for path in by_label}
        same = nest(first | both)
        found = program(way)(same, rows_of(0.25))
        with jax.set_mesh(mesh):
            batch = put_batch(rows_of(0.25), mesh, plain)
            want = jax.device_get(jax.jit(make_gradients(plain, mesh))(nest(first), bias, batch, 1))
        grads = {path: g.sum(1).reshape(shapes[path]) if path in by_label else g
                 for path, g in flatten(found.grads).items()}  # fmt: skip
        number = {"untied": 8, "routers": 1, "table": 11}[way]
        assert len(by_label) == number
        assert_same({"loss": found.loss, "grads": grads}, {"loss": want.loss, "grads": flatten(want.grads)})


@slow
def test_a_teacher_that_depends_on_labels():
    """A student without labels learns from it what it would from a plain teacher of the weights of the text's label."""
    cfg, rows = labelled("untied"), rows_of(0.25)
    model, distill = dataclasses.replace(cfg.model, untie=1), config.DistillConfig(teacher="runs/a", coef=1.0)
    loss = dataclasses.replace(cfg.loss, more={})
    student = dataclasses.replace(cfg, model=model, distill=distill, loss=loss)
    mesh, state = state_on("untied", (1, 1, 1))
    shapes = {path: x.shape for path, x in flatten(abstract_state(student, mesh).params).items()}
    first, second = (
        nest({path: x if x.shape == shapes[path] else x[:, m] for path, x in flatten(state.params).items()})
        for m in range(M)
    )

    def learned(of, weights, label):
        with jax.set_mesh(mesh):
            batch = put_batch(rows | {"label": np.full_like(rows["label"], label)}, mesh, student)
            run = jax.jit(make_gradients(student, mesh, teacher=of))
            return jax.device_get(run(first, {}, batch, 1, (weights, {})))._asdict()

    found = learned(cfg.model, state.params, 1)
    assert_same(found, learned(model, second, 1))
    assert abs(found["loss"] - learned(cfg.model, state.params, 0)["loss"]) > 1e-4


@slow
def test_muon_takes_each_label_alone():
    """The update of a label's matrix is that of the matrix by itself, and the same on a mesh."""
    cfg = dataclasses.replace(labelled("all").optim, clip_norm=0.0)
    optimizer, updates = optim.make_optimizer(cfg, 10), {}
    grads = jax.tree.map(lambda x: normal(*x.shape, seed=x.size), state_on("all", (1, 1, 1))[1].params)
    for shape in ((1, 1, 1), (2, 2, 2)):
        mesh, state = state_on("all", shape)
        with jax.set_mesh(mesh):
            put = jax.tree.map(lambda g, p: jax.device_put(g, p.sharding), grads, state.params)
            moments = jax.jit(optimizer.init)(state.params)
            updates[shape] = flatten(jax.device_get(jax.jit(optimizer.update)(put, moments, state.params)[0]))
    assert_same(updates[2, 2, 2], updates[1, 1, 1])
    lr = optim.schedule(cfg, 10)
    coefficients = newton_schulz.coefficients(cfg.coefficients, cfg.newton_schulz_steps)
    alone = muon(lr, weight_decay=cfg.weight_decay, momentum=cfg.momentum, coefficients=coefficients, dtype="float32")
    w, g = (jnp.asarray(tree["layers"]["attention"]["w_q"][0, 1]) for tree in (jax.device_get(state.params), grads))
    (want,) = alone.update((g,), alone.init((w,)), (w,))[0]
    np.testing.assert_allclose(updates[1, 1, 1]["layers/attention/w_q"][0, 1], want, rtol=1e-4, atol=1e-6)


# --- one layer, by hand -----------------------------------------------------------------------------------------------


def normal(*shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def routed(logits, identity=0, **fields):
    """The routing and the probabilities of logits `[T, C]` with groups by label."""
    cfg = MoEConfig(num_experts=E, label_groups=M, identity_experts=identity, **fields)

    @jax.jit
    def run(logits):
        allowed = allowed_by_label(jnp.asarray(LABEL), E + identity, cfg)
        facts = Facts(jnp.asarray(COUNTED), sequences=2, pool=allowed, label=jnp.asarray(LABEL))
        return route(jnp.where(allowed, logits, -jnp.inf), None, facts, cfg)

    return jax.device_get(run(logits))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_no_token_in_a_foreign_group(score):
    """Also where scores in the group underflow to the 0 of the others. Weights, and gradients, are those of a router
    of the group alone; identity experts are open to all."""
    logits = normal(T, E + 1)
    logits[3:6, (1 - LABEL[3]) * 4 : (1 - LABEL[3]) * 4 + 4] += 500
    logits[8:10] -= 300
    routing, probs = routed(logits, 1, top_k=3, score=score)
    own = (routing.experts == E) | (routing.experts // (E // M) == LABEL[:, None])
    assert own.all() and (routing.experts == E).any()
    plain = MoEConfig(num_experts=E // M, top_k=3, score=score, identity_experts=1)
    alone = jax.jit(lambda logits, counted: route(logits, None, Facts(counted), plain))
    for t in range(T):
        columns = np.r_[np.arange(E // M) + LABEL[t] * (E // M), E]
        want, shares = jax.device_get(alone(logits[t : t + 1, columns], COUNTED[t : t + 1]))
        np.testing.assert_array_equal(routing.experts[t], columns[want.experts[0]])
        np.testing.assert_allclose(routing.weights[t], want.weights[0], rtol=1e-6)
        np.testing.assert_allclose(probs[t, columns], shares[0], rtol=1e-6)
        assert probs[t].sum() == pytest.approx(probs[t, columns].sum())


def test_experts_choose_among_tokens_of_their_label():
    """Loads of a group are equal, ⌈K·n/(E/M)⌉ of n tokens, and the best; a later token changes an earlier choice."""
    logits = normal(T, E)
    choose = lambda logits: routed(logits, top_k=2, choice="expert", score="sigmoid")[0]
    routing = choose(logits)
    valid = routing.valid.reshape(2, T // 2, E)
    for row in range(2):
        part = slice(row * T // 2, (row + 1) * T // 2)
        for e in range(E):
            own = COUNTED[part] & (LABEL[part] == e // (E // M))
            take = -(-2 * own.sum() // (E // M))
            best = np.argsort(-np.where(own, logits[part, e], -np.inf), kind="stable")[:take]
            np.testing.assert_array_equal(np.flatnonzero(valid[row, :, e]), np.sort(best))
    np.testing.assert_allclose(routing.weights, np.where(routing.valid, 1 / (1 + np.exp(-logits)), 0), rtol=1e-5)
    later = logits.copy()
    later[T // 2 - 1] += 20
    assert (choose(later).valid[: T // 2 - 1] != routing.valid[: T // 2 - 1]).any()


def test_a_router_by_label():
    x, w, cotangent = normal(T, 6), normal(M, 6, E, seed=1), normal(T, E, seed=2)
    value = lambda x, w: jnp.sum(linear_by_label(w, x, jnp.asarray(LABEL)) * cotangent)
    by_label = jax.jit(linear_by_label)
    logits = by_label(w, x, LABEL)
    dx, dw = jax.device_get(jax.jit(jax.grad(value, (0, 1)))(x, w))
    np.testing.assert_allclose(logits, np.einsum("td,tdc->tc", x, w[LABEL]), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx, np.einsum("tc,tdc->td", cotangent, w[LABEL]), rtol=1e-5, atol=1e-5)
    for m in range(M):
        own = LABEL == m
        np.testing.assert_allclose(dw[m], x[own].T @ cotangent[own], rtol=1e-5, atol=1e-5)
    same = np.stack([w[0]] * M)
    np.testing.assert_array_equal(by_label(same, x, LABEL), by_label(same, x, 0 * LABEL))


def test_switches_keep_to_groups():
    """An expert that is on is used by all tokens of its label, and by no other; each group needs enough."""
    logits = normal(T, E)
    cfg = MoEConfig(num_experts=E, label_groups=M, top_k=2)
    allowed, on = allowed_by_label(jnp.asarray(LABEL), E, cfg), np.zeros(E, np.int8)
    on[[1, 6]], on[[2, 4]] = 1, -1
    facts = Facts(jnp.asarray(COUNTED), pool=allowed, label=jnp.asarray(LABEL), switches=jnp.asarray(on))
    chosen = jax.device_get(route(jnp.where(allowed, logits, -jnp.inf), None, facts, cfg))[0].experts
    assert (chosen // (E // M) == LABEL[:, None]).all() and (chosen == np.where(LABEL == 0, 1, 6)[:, None]).any(1).all()
    assert not np.isin(chosen, [2, 4]).any()
    model = labelled("groups").model
    switches.parse("on:0/0-1 on:0/4-5", model)
    with pytest.raises(ValueError, match=r"1 experts of label 1 \(model\.moe\.label_groups=2\) would be left"):
        switches.parse("off:0/4-6", model)
    with pytest.raises(ValueError, match=r"3 experts of label 0 .* would be on"):
        switches.parse("on:0/0-2", model)


@pytest.mark.parametrize("backend", ["reference", pytest.param("batched", marks=slow)])
def test_products_of_untied_weights(backend):
    """Values and gradients are those of a product by every label's matrix, one of which is taken."""
    label = jnp.asarray(LABEL.reshape(2, T // 2))
    x, w, scale, cotangent = normal(2, T // 2, 6), normal(3, 6, 5, seed=1), normal(3, 6, seed=2), normal(2, T // 2, 5)

    class Layer:
        pass

    def fast(x, w, scale):
        layer, by = Layer(), untied.sort(label, 3)
        layer.w = w
        (y,) = untied.linear(x * untied.own(scale, by), layer, ("w",), by, backend)
        return jnp.sum(y * cotangent), y

    def slow(x, w, scale):
        y = jnp.einsum("bsd,bsdf->bsf", x * scale[label], w[label], precision="highest")
        return jnp.sum(y * cotangent), y

    one, other = (jax.jit(jax.value_and_grad(f, (0, 1, 2), has_aux=True))(x, w, scale) for f in (fast, slow))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), one, other)
    assert not np.asarray(one[1][1][2]).any()  # a label without a token


def test_information_of_labels_and_columns():
    """0 where labels are routed alike, −log E for E labels that share no column, as Mod-Squad has them (its code adds
    1e-4 inside the logarithm, and gives +7e-4 and −1.3855)."""
    label, counted = np.arange(T) % 4, np.ones(T, bool)

    @jax.jit
    def of(probs):
        none = np.zeros((T, 1), np.int32)
        routing = route(jnp.log(probs + 1e-30), None, Facts(jnp.asarray(counted)), MoEConfig(num_experts=4, top_k=1))[0]
        stats = router_stats(probs, probs, routing, routing.valid, counted, none[:, 0], 1, label=label, labels=4)
        return label_information(stats)

    np.testing.assert_allclose(of(np.full((T, 4), 0.25, np.float32)), 0.0, atol=1e-6)
    np.testing.assert_allclose(of(np.tile(np.float32([0.7, 0.1, 0.1, 0.1]), (T, 1))), 0.0, atol=1e-6)
    np.testing.assert_allclose(of(np.eye(4, dtype=np.float32)[3 - label]), -np.log(4), rtol=1e-6)
