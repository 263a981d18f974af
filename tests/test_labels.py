"""Labels: tokens choose from their label's experts, have a router of it, or the one expert of it; and what they must
not change.
"""

import dataclasses
import functools
import json
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import special

from moe_jax import config, data, optim, upcycle
from moe_jax.config import MoEConfig
from moe_jax.errors import ConfigError, UserError
from moe_jax.evaluate import held_out, loglikelihood, opened, overrides, passes, switches
from moe_jax.evaluate.generate import generate
from moe_jax.moe.alone import MoELayer
from moe_jax.moe.router_losses import label_information
from moe_jax.moe.routers import linear_by_label
from moe_jax.moe.routing import Facts, allowed_by_label, route
from moe_jax.moe.stats import router_stats
from moe_jax.nn import untied
from moe_jax.optim import newton_schulz
from moe_jax.optim.muon import muon
from moe_jax.parallel import sharding
from moe_jax.run import config_file, teacher, weights
from moe_jax.train import knobs
from moe_jax.train.gradients import make_gradients
from moe_jax.train.state import abstract_state, init_state, put_batch
from moe_jax.tree import flatten, nest
from tests.test_contrast import evaluate
from tests.test_invariance import V, assert_same, batch_rows, run_config

slow = pytest.mark.slow
T, E, M = 24, 8, 2
LABEL = np.random.default_rng(5).integers(0, M, T).astype(np.int32)
COUNTED = np.arange(T) % 7 != 3
WAYS = {
    "groups": {"label_groups": 2},
    "routers": {"routers": 2},
    "experts": {"label_groups": 2, "choice": "expert", "score": "sigmoid"},
    "untied": {},
    "all": {"label_groups": 2, "routers": 2, "identity_experts": 1},
    "table": {"num_experts": 2, "top_k": 1, "combine": "one", "table": "label"},
}
MODEL = {"untied": {"untie": 2}, "all": {"untie": 2}, "table": {"untie": 2, "layers": "2*table"}}


def rows_of(padding: float) -> dict[str, np.ndarray]:
    """The batch of test_invariance.py with labels: two documents a row, and a row may have both labels.

    No token is twice in a row: two that begin a document, or follow their like there, would have equal scores, and
    rounding would decide which one an expert chooses.
    """
    rows, rng = batch_rows(padding), np.random.default_rng(3)
    low = np.minimum(rows["tokens"].min(1, keepdims=True), V - 16)  # unlike vocabulary
    rows["tokens"] = low + np.array([rng.permutation(16)[:8] for _ in low], np.int32)
    of_document = np.random.default_rng(2).integers(0, M, (len(rows["tokens"]), 2)).astype(np.int32)
    return rows | {"label": np.repeat(of_document, 4, axis=1)}


def labelled(way: str, *args, **kwargs) -> config.RunConfig:
    cfg = run_config(*args, **kwargs)
    own = {"selection_bias": False, "num_experts": 8} | WAYS[way]
    routed = dataclasses.replace(cfg.model.moe, **own)
    fields = {"num_layers": 2, "num_dense_layers": 0} | MODEL.get(way, {})
    model = dataclasses.replace(cfg.model, **fields, moe=routed)
    told = way in ("table", "groups", "experts")  # an expert tells the label, so that the loss would be a constant
    more = {} if told else {"apart": config.RouterLossConfig("label_information", 0.3)}
    coefs = {"load_balance_coef": 0.5 * (way not in ("experts", "table")), "router_z_coef": 0.1 * (way != "table")}
    loss = dataclasses.replace(cfg.loss, more=more, **coefs)
    data = dataclasses.replace(cfg.data, labels={"b": 1})
    sample = dataclasses.replace(cfg.sample, tokens=0)
    return dataclasses.replace(cfg, model=model, loss=loss, data=data, sample=sample)


@functools.cache
def state_on(way, shape):
    """The mesh and a fresh state on it; the values are those of one device."""
    mesh = sharding.make_mesh(shape, jax.devices()[: int(np.prod(shape))])
    if mesh.size == 1:
        return mesh, init_state(labelled(way), mesh)
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(labelled(way), mesh))
    return mesh, jax.device_put(jax.device_get(state_on(way, (1, 1, 1))[1]), shardings)


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


# --- texts ------------------------------------------------------------------------------------------------------------


@slow
@pytest.mark.parametrize("way", ["all", "table"])
def test_texts_have_a_label(way):
    """A text is written token by token, and scored, as one pass over it with its label computes it."""
    cfg, (mesh, state) = labelled(way), state_on(way, (1, 1, 1))
    own = cfg.model, mesh, state.params, state.router_bias
    prompts, made = [[5, 7, 2], [3]], []
    for label in range(M):
        written = generate(*own, prompts, 5, label=label)
        if (way, label) == ("all", 1):
            several, sharded = state_on(way, (2, 2, 2))
            assert generate(cfg.model, several, sharded.params, sharded.router_bias, prompts, 5, label=1) == written
        for prompt, out in zip(prompts, written, strict=True):
            logits, other = (passes.run(*own, [out], "logits", label=m)[0] for m in (label, 1 - label))
            assert out[len(prompt) :] == logits[len(prompt) - 1 : -1].argmax(-1).tolist()
            assert np.abs(logits - other).max() > 1e-2
            made.append((label, prompt, out, special.log_softmax(np.float64(logits), -1)))
    for label, prompt, out, logs in made:
        run = dataclasses.replace(cfg, sample=dataclasses.replace(cfg.sample, label=label))
        request = loglikelihood.Request(np.int32(prompt), np.int32(out[len(prompt) :]))
        (score,) = loglikelihood.score(run, mesh, state.params, state.router_bias, [request])
        want = [logs[len(prompt) - 1 + i, token] for i, token in enumerate(out[len(prompt) :])]
        np.testing.assert_allclose(score.token_logprobs, want, rtol=1e-3, atol=1e-4)
    for call in (
        lambda: generate(*own, prompts, 5),
        lambda: passes.run(*own, prompts, "logits"),
        lambda: loglikelihood.score(cfg, mesh, state.params, state.router_bias, [request]),
    ):
        with pytest.raises(ConfigError, match=r"sample\.label=-1: must be the label of the text.*valid: 0, 1"):
            call()


def test_experts_that_choose_write_no_text():
    cfg = labelled("experts")
    with pytest.raises(ConfigError, match=r"model\.moe\.choice='expert': depends on later tokens"):
        generate(cfg.model, sharding.make_mesh((1, 1, 1), jax.devices()[:1]), {}, {}, [[1]], 2, label=1)


@slow
def test_a_run_with_labels(tmp_path):
    """Domains of two files: batches, held-out text and samples have their labels, and a run opened from Python."""
    for name, words in (("prose", "the sun is red "), ("code", "x = f(y); ")):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(f"{i} {words * 20}" for i in range(60)), encoding="utf-8")
    c = config.default_config()
    c.model.update(vocab_size=257, d_model=16, num_layers=2, d_ff=16, num_heads=2, num_kv_heads=2, head_dim=8, untie=2)
    c.model.moe.update(num_experts=4, top_k=1, d_expert=8, label_groups=2)
    c.data.update(batch_size=8, seq_len=32, cache_dir=str(tmp_path / "cache"))
    c.data.labels = {"prose": 1}
    kind = {"kind": "files", "documents": "blank_lines", "validation_fraction": 0.2}
    c.data.sources = {name: config.source(path=str(tmp_path / f"{name}.txt"), **kind) for name in ("prose", "code")}
    c.sample.update(tokens=4, label=1)
    cfg = config.build(c)
    corpus = data.prepare(cfg.data, workdir=None, seed=0, progress=False)
    assert corpus.domains == ("code", "prose")
    mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
    state = init_state(cfg, mesh)
    for batches in (corpus.train_iterator(range(8)), corpus.validation_batches(range(8))):
        rows = next(iter(batches))
        np.testing.assert_array_equal(rows["label"], rows["domain_ids"])
        np.testing.assert_array_equal(put_batch(rows, mesh, cfg).label, rows["label"])
    one, resumed = corpus.train_iterator(range(8)), corpus.train_iterator(range(8))
    next(one)
    resumed.set_state(one.get_state())
    np.testing.assert_array_equal(next(resumed)["label"], next(one)["label"])
    result = held_out.evaluate(cfg, mesh, state.params, state.router_bias, corpus, progress=False)
    load = next(iter(result.router.values())).tokens_per_expert  # [L, domain, expert]
    assert load[:, 0, 2:].sum() == load[:, 1, :2].sum() == 0 and load.sum((0, 2)).min() > 0
    run = opened.OpenedRun(cfg, cfg.model, mesh, state.params, state.router_bias, corpus.tokenizer, 0, [])
    assert set(np.unique(run.routing("x = y").experts)) <= {2, 3}
    assert set(np.unique(run.labelled("prose").labelled(0).routing("x = y").experts)) <= {0, 1}
    assert (run.switched("on:0/3").routing("x = y").experts[0] == 3).all()
    assert set(np.unique(run.switched("on:0/0").routing("x = y").experts)) <= {2, 3}
    assert run.generate("the").startswith("the")
    with pytest.raises(UserError, match=r"labelled\('pose'\): is not a name in data\.labels=.*'prose'; labelled\(0\)"):
        run.labelled("pose")
    config_file.save_config(tmp_path, cfg)
    other = dataclasses.replace(cfg, init_from=str(tmp_path), data=dataclasses.replace(cfg.data, labels={"code": 1}))
    line = f'config.data.labels: {{"prose": 1}} in {tmp_path}, {{"code": 1}} now'
    assert weights.check_same_model(other) == [line]
    spelt = dataclasses.replace(other, data=dataclasses.replace(cfg.data, labels={"code": 0, "prose": 1}), init_from="")
    assert config_file.resume(tmp_path, spelt) == (spelt, [])  # a domain without a name has the label 0
    assert weights.check_same_model(dataclasses.replace(spelt, init_from=str(tmp_path))) == []
    corpus.check_labels()
    said = re.compile(r"labels: 0 = code \([\d,]+ tokens\), 1 = prose \([\d,]+ tokens\)")
    assert any(map(said.fullmatch, corpus.notes()))
    for labels, message in [
        ({"prose": 1, "code": 1}, r"leaves the label 0 without training text: 0 = no domain \(0 tokens\), 1 = code pr"),
        ({"poetry": 1}, r"data\.labels='poetry': must be a domain of the text: code, prose"),
    ]:
        wrong = data.prepare(dataclasses.replace(cfg.data, labels=labels), workdir=None, seed=0, progress=False)
        with pytest.raises(ConfigError, match=message):
            wrong.check_labels()
    assert "labels: no text here is of the domain poetry" in wrong.notes()
    weights.save_weights(tmp_path / "planted", cfg, state.params, state.router_bias, [{"event": "test"}])
    files = f"{tmp_path}/code.txt,{tmp_path}/prose.txt"
    for name in ("code", "prose"):
        (tmp_path / f"{name}.txt").write_text(f"{name}\n", encoding="utf-8")
    evaluate(tmp_path, f"--contrast={files}", "--config.sample.label=0", devices=1)
    body = json.loads((tmp_path / "planted" / "contrast.0.changed.json").read_text(encoding="utf-8"))
    assert body["label"] == 0 and not any(row["first"] + row["second"] for row in body["ranked"] if row["expert"] > 1)
    pytest.importorskip("lm_eval")
    from moe_jax.evaluate.harness import RunModel

    asked, scores = loglikelihood.encode(run.tokenizer, [("the sun", " is red")]), []
    for label in range(2):
        adapter = RunModel(run.labelled(label), progress=False)
        made = adapter.generate_until([SimpleNamespace(args=("the", {"max_gen_toks": 4}))])
        assert made == [run.labelled(label).generate("the", tokens=4, temperature=0.0).removeprefix("the")]
        scores.append(adapter._loglikelihood_tokens([(("", ""), *asked[0][:2])])[0][0])
    assert scores[0] != scores[1]


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"label_groups": 2, "compute": "capacity"}, "compute='capacity': has equal room for all experts"),
        ({"label_groups": 3}, "label_groups=3: must divide num_experts=8; nearest valid: 2"),
        ({"label_groups": 4, "top_k": 3}, "top_k=3: must be ≤ num_experts / label_groups = 2"),
        ({"label_groups": 2, "selection_bias": True}, "selection_bias=True: is not available with label_groups"),
        ({"label_groups": 2, "pool_min": 2, "pool_from": "all"}, "pool_min=2: is not available"),
        ({"label_groups": 2, "num_groups": 2}, "num_groups=2: is not available"),
        ({"routers": 2, "router": "cosine"}, "routers=2: is not available with router='cosine'"),
    ],
)
def test_refused_in_a_layer(fields, message):
    with pytest.raises(ConfigError, match=message):
        MoEConfig(num_experts=8, **fields)


def test_refused_in_a_run():
    cfg = labelled("groups")
    change = lambda cfg, **groups: dataclasses.replace(
        cfg, **{name: dataclasses.replace(getattr(cfg, name), **fields) for name, fields in groups.items()}
    )
    moe = dataclasses.replace(cfg.model.moe, routers=4)
    said = "routing: each of 2 labels has its own group of experts, router, attention matrices and norms; 1 identity"
    assert knobs.describe(labelled("all")).startswith(f"{said} experts, so 1.60 of 2 compute")
    table = {"layers": "2*table"}
    for groups, message in [
        ({"data": {"labels": {}}}, r"data\.labels=\{\}: must name domains of the labels 0 to 1, for model\.moe\.label"),
        ({"data": {"labels": {"b": 1, "c": 2}}}, "must name domains of the labels 0 to 1"),
        ({"data": {"labels": {"b": 2}}}, r"labels=\{'b': 2\}: must be 0, 1, … without a gap"),
        ({"sample": {"tokens": 4}}, r"sample\.label=-1: must be the label .* valid: 0 \(all other text\), 1 \(b\)"),
        ({"sample": {"label": 2}}, r"sample\.label=2: must be the label of the text"),
        ({"model": {"moe": moe}}, r"moe\.routers=4: is for another number of labels than moe\.label_groups=2"),
        ({"model": {"num_dense_layers": 2}}, r"moe\.label_groups=2: needs layers whose router chooses"),
        ({"model": {"mtp_layers": 1}}, r"mtp_layers=1: is not available with moe\.label_groups=2"),
        ({"explore": {"random": config.RampConfig(0.5, 0.0, 4)}}, r"explore\.random=.*: is not available"),
        ({"model": table}, r"moe\.label_groups=2: needs layers whose router"),
    ]:
        with pytest.raises(ConfigError, match=message):
            change(cfg, **groups)
    with pytest.raises(ConfigError, match=r"lora\.rank=2: is not available with moe\.label_groups=2"):
        dataclasses.replace(cfg.model, lora=config.LoRAConfig(rank=2))
    untied_model = {"untie": 2, "num_dense_layers": 2, "moe": MoEConfig()}
    with pytest.raises(ConfigError, match=r"qkv_bias=True: is not available with untie > 1"):
        dataclasses.replace(cfg.model, **untied_model, qkv_bias=True)
    with pytest.raises(ConfigError, match=r"optim\.qk_clip=1\.0: is not available with model\.untie > 1"):
        change(cfg, model={**untied_model, "qk_norm": False}, optim={"qk_clip": 1.0})
    with pytest.raises(ConfigError, match=r"upcycle\.model\.moe\.label_groups=2: the model depends on labels"):
        upcycle.final_config([], cfg.model)
    with pytest.raises(ConfigError, match=r"model\.moe\.routers=2: needs labels, which the layer alone"):
        MoELayer(8, rngs=nnx.Rngs(0), num_experts=4, routers=2)
    plain = run_config()
    for whole, labels, message in [
        (cfg, {}, r"data\.labels=\{\}: must be the labels of the run of distill\.teacher='runs/a'"),
        (cfg, {"c": 1}, r"data\.labels=\{'c': 1\}: must be the labels of the run .*valid: \{'b': 1\}"),
        (plain, {"b": 1}, r"data\.labels=\{'b': 1\}: has no effect: neither the model, nor a loss, nor distill"),
    ]:
        student = change(plain, distill={"teacher": "runs/a", "coef": 1.0}, data={"labels": labels})
        with pytest.raises(ConfigError, match=message):
            teacher._check_labels(student, whole)
    changes = overrides.changes_results
    assert changes(["sample.label"], texts=True) and not changes(["sample.label"]) and not changes(["sample.tokens"])
    with pytest.raises(ConfigError, match=r"sample\.label=1: has no effect"):
        change(plain, sample={"label": 1})
    mesh, _ = state_on("groups", (1, 1, 1))
    with pytest.raises(ConfigError, match=r"data\.labels=\{'b': 1\}: has no effect"):
        make_gradients(change(plain, data={"labels": {"b": 1}}), mesh)
    term = config.RouterLossConfig("label_information", 0.1)
    for wrong, message in [
        (plain, r"data\.labels=\{\}: must name labels for loss\.more\.a\.kind"),
        (cfg, r"loss\.more\.a\.kind='label_information': is a constant with model\.moe\.label_groups > 1"),
        (
            change(plain, model={"num_dense_layers": 3}, data={"labels": {"b": 1}}),
            r"a\.kind=.*: has no effect: no layer",
        ),
    ]:
        with pytest.raises(ConfigError, match=message):
            make_gradients(change(wrong, loss={"more": {"a": term}}), mesh)
