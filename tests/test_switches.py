"""Experts that are switched off or on: the router against a loop over tokens, the model on meshes, what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special
from test_model import EVERYTHING, PLAIN, biased, init, inputs_of, mesh_of

from moe_jax import model
from moe_jax.config import LoRAConfig, ModelConfig, MoEConfig
from moe_jax.evaluate import switches
from moe_jax.evaluate.generate import generate
from moe_jax.moe import routing
from moe_jax.moe.program import Program
from moe_jax.moe.routing import Facts
from moe_jax.moe.stats import by_depth
from moe_jax.parallel import sharding

# --- one router -------------------------------------------------------------------------------------------------------

T, C = 12, 8
ROUTERS = {
    "softmax": {},
    "renormalised": {"renormalize": True, "score_order": "topk_score"},
    "sigmoid, biased": {"score": "sigmoid", "selection_bias": True, "renormalize": True},
    "square root, biased": {"score": "sqrt_softplus", "selection_bias": True},
    "best groups": {"num_groups": 4, "top_groups": 2, "score": "sigmoid", "selection_bias": True},
    "shards": {"shard_groups": 2, "combine": "share"},
    "identity": {"num_experts": 6, "identity_experts": 2},
    "weights of one": {"combine": "one"},
    "expert choice": {"choice": "expert"},
    "table": {},
}
OFF, ON = [1, 6], [3]


def scores_of(z, cfg):
    """Scores in float64; −∞ gives 0."""
    if cfg.score == "softmax":
        return special.softmax(z, -1)
    return special.expit(z) if cfg.score == "sigmoid" else np.sqrt(np.logaddexp(0, z))


def by_hand(logits, bias, cfg, off, on, counted, table):
    """Combine weights `[T, C]`, 0 where not chosen, and the choices, by a loop over tokens."""
    z = np.where(np.isin(np.arange(C), off), -np.inf, logits.astype(np.float64))
    scores, chosen = scores_of(z, cfg), np.zeros((T, C), bool)
    ranked = (z if cfg.score_order == "topk_score" else scores) + (0 if bias is None else bias)
    for t in range(T):
        left = [c for c in range(C) if c not in off and c not in on]
        if table is not None:
            chosen[t, [c for c in table[t] if c not in off]] = True
            continue
        if cfg.choice == "expert":
            best = (-ranked).argsort(0, kind="stable").argsort(0)[t] < -(-cfg.top_k * T // C)
            chosen[t] = [c in on or (c in left and best[c]) for c in range(C)]
            continue
        if cfg.num_groups > 1:
            members = np.arange(C).reshape(cfg.num_groups, -1)
            worth = [-np.inf if set(its) & set(off) else ranked[t, its].sum() for its in members]  # of two experts each
            left = [c for g in np.argsort(worth)[::-1][: cfg.top_groups] for c in members[g] if c in left]
        for shard in range(cfg.shard_groups):
            of = lambda some, shard=shard: [c for c in some if c % cfg.shard_groups == shard]
            free = sorted(of(left), key=lambda c: -ranked[t, c])
            chosen[t, (of(on) + free)[: cfg.top_k // cfg.shard_groups]] = True
    if cfg.combine == "one":
        weights = np.where(chosen, 1.0, 0.0)
    elif cfg.combine == "share":
        weights = np.where(chosen, np.exp(z), 0.0)
        for shard in range(cfg.shard_groups):
            weights[:, shard :: cfg.shard_groups] /= weights[:, shard :: cfg.shard_groups].sum(1, keepdims=True)
    elif cfg.score_order == "topk_score":
        weights = special.softmax(np.where(chosen, z, -np.inf), -1)
    else:
        weights = np.where(chosen, scores, 0.0)
    weights = weights / weights.sum(1, keepdims=True) if cfg.renormalize else weights
    return np.where(counted[:, None], weights, 0), chosen & counted[:, None]


@pytest.fixture(scope="module")
def route():
    """The router as one program for each configuration."""

    def one(logits, bias, counted, table, switched, cfg):
        return routing.route(logits, bias, Facts(counted, None, table, 1, switched), cfg)

    return jax.jit(one, static_argnames="cfg")


@pytest.mark.parametrize("name", ROUTERS)
def test_a_router_with_switches_is_a_loop_over_tokens(name, route):
    """An expert that is off is in no choice, whatever its bias; one that is on in all, with its own weight."""
    cfg = MoEConfig(**{"num_experts": C, "top_k": 4} | ROUTERS[name])
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(T, C)).astype(np.float32) * 2
    counted = np.arange(T) < (T if cfg.choice == "expert" else 10)
    bias = np.float32([0, 3, 0.2, -2, 0, 0.1, 3, 0]) if cfg.selection_bias else None  # high for those that are off
    table = np.stack([rng.permutation(C)[:4] for _ in range(T)]) if name == "table" else None
    off, on = OFF, [] if name == "table" else ON
    switched = np.zeros(C, np.int8)
    switched[off], switched[on] = -1, 1

    def run(switched):
        plan, probs = jax.device_get(route(logits, bias, counted, table, switched, cfg=cfg))
        one_hot = np.eye(C)[plan.experts] * plan.valid[..., None]
        return plan, probs, (one_hot * plan.weights[..., None]).sum(1), one_hot.sum(1)

    _, probs, weights, counts = run(switched)
    want, chosen = by_hand(logits, bias, cfg, off, on, counted, table)
    np.testing.assert_array_equal(counts, chosen)
    np.testing.assert_allclose(weights, want * cfg.routed_scaling, rtol=2e-5, atol=1e-6)
    assert not counts[:, off].any() and not probs[:, off].any() and counts[counted][:, on].all()

    for one, other in zip(jax.tree.leaves(run(np.zeros(C, np.int8))), jax.tree.leaves(run(None)), strict=True):
        np.testing.assert_array_equal(one, other)


# --- a model ----------------------------------------------------------------------------------------------------------


def outputs(cfg, shape, tables):
    """Hidden states and counts of 8 sequences on a mesh."""
    params, bias = jax.device_get((init(cfg)[0], biased(init(cfg)[1])))
    net, mesh = model.abstract(cfg, Program(exchange="ring")), mesh_of(*shape)
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (8, 8))
    inputs = jax.device_put(jax.device_get(inputs_of(tokens)), sharding.batch_sharding(mesh))
    run = jax.jit(lambda params, bias, inputs: net.bind(params, bias)(inputs)[:2])
    with jax.set_mesh(mesh):
        return [jax.device_get(run(params, bias, inputs._replace(switches=one))) for one in tables]


def test_a_model_with_switches_is_the_same_on_a_mesh():
    found = switches.parse("off:0/1 off:1/0-1 on:1/3", EVERYTHING)
    assert found["layers"].tolist() == [[0, -1, 0, 0], [-1, -1, 0, 1]]
    plain, (hidden, stats) = outputs(EVERYTHING, (1, 1, 1), [jax.tree.map(np.zeros_like, found), found])
    count = stats["layers"].tokens_per_expert[:, 0]
    assert count[0, 1] == count[1, 0] == count[1, 1] == 0 and count[1, 3] == 64 and (count.sum(1) == 128).all()
    assert np.abs(hidden - plain[0]).max() > 0.01 and plain[1]["layers"].tokens_per_expert[:, 0].min() > 0
    (there,) = outputs(EVERYTHING, (2, 2, 2), [found])
    np.testing.assert_allclose(there[0], hidden, atol=2e-5)
    np.testing.assert_array_equal(there[1]["layers"].tokens_per_expert, stats["layers"].tokens_per_expert)


@pytest.mark.slow
def test_a_table_of_zeros_changes_no_bit():
    """With adapters, and units of several blocks; and what is off is off, in its own block."""
    blocks = dict(layers="dense 2*(moe dense moe)", num_layers=7, num_dense_layers=0)
    cfg = dataclasses.replace(EVERYTHING, lora=LoRAConfig(rank=2), **blocks)
    off = switches.parse("off:1/1", cfg)
    plain, none, found = outputs(cfg, (2, 2, 2), [None, jax.tree.map(np.zeros_like, off), off])
    jax.tree.map(np.testing.assert_array_equal, plain, none)
    before, after = ([one.tokens_per_expert for one in by_depth(cfg.places, out[1])] for out in (plain, found))
    assert before[1][0, 1] > 0 == after[1][0, 1]
    np.testing.assert_array_equal(before[0], after[0])
    assert all(len(layer) and layer[0, 1] > 0 for layer in after[2:])


@pytest.mark.slow
def test_generation_with_switches_is_the_argmax_of_the_full_forward():
    """With a cache, on a mesh, for prompts of different lengths."""
    params, bias = init(PLAIN, (2, 2, 2))
    found = switches.parse("off:0/0-1 on:1/3", PLAIN)
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6], [20, 2, 8], [7, 7, 3]]
    run = lambda its: generate(PLAIN, mesh_of(2, 2, 2), params, bias, prompts, 4, switches=its)
    made = run(found)
    assert made != run(jax.tree.map(np.zeros_like, found)) == run(None)
    net, own = model.abstract(PLAIN), jax.device_get((params, bias))

    @jax.jit
    def best(inputs):
        one = net.bind(*own)
        return jnp.argmax(one(inputs).hidden @ jnp.asarray(one.output_matrix[...]).T, -1)

    for row in made:
        with jax.set_mesh(mesh_of(1, 1, 1)):
            assert best(inputs_of([row])._replace(switches=found))[0, -5:-1].tolist() == row[-4:]


# --- lines ------------------------------------------------------------------------------------------------------------


def model_of(layers: str = "dense 2*moe", blocks: int = 3, **moe) -> ModelConfig:
    plain = layers == "dense 2*moe"
    stacks = {"num_dense_layers": 1} if plain else {"layers": layers}
    settings = {"num_experts": 4, "top_k": 2, "d_expert": 12} | moe
    return ModelConfig(vocab_size=24, d_model=16, d_ff=8, num_layers=blocks, moe=MoEConfig(**settings), **stacks)


def test_lines_name_layers_and_experts():
    found = switches.parse("off:*/2  on:1/0", model_of())
    assert {path: one.tolist() for path, one in found.items()} == {"layers": [[0, 0, -1, 0], [1, 0, -1, 0]]}
    mixed = model_of("dense 2*(moe dense) moe:8 moe", 7)
    found = switches.parse("off:1/3 on:2/7 off:3/0", mixed)
    layers = [found[place.path][place.index].tolist() for place in mixed.places if place.kind.experts]
    assert layers == [[0] * 4, [0, 0, 0, -1], [0] * 7 + [1], [-1, 0, 0, 0]]


@pytest.mark.parametrize(
    ("line", "moe", "words"),
    [
        ("", {}, "is a list of off:LAYER/EXPERT"),
        ("off:3", {}, "'off:3': is a list of off:LAYER/EXPERT"),
        ("out:0/1", {}, "'out:0/1': is a list"),
        ("off:2/1", {}, "layer 2: the model has 2 layers with experts, from 0; nearest valid: 1"),
        ("on:1/4", {}, "expert 4: the router of layer 1 has 4 choices, from 0; nearest valid: 3"),
        ("off:0/3-1", {}, "ends before it begins; nearest valid: off:0/1-3"),
        ("off:0/1 on:*/1", {}, "0/1 is both off and on"),
        ("off:1/0-2", {}, "layer 1: 1 experts would be left for top_k=2 choices"),
        ("on:1/0-2", {}, "layer 1: 3 experts would be on, but a token has top_k=2 choices"),
        ("off:0/0 off:0/2", {"shard_groups": 2}, "0 experts of group 0 (model.moe.shard_groups=2) would be left"),
        ("on:0/0 on:0/2", {"shard_groups": 2}, "2 experts of group 0 (model.moe.shard_groups=2) would be on"),
        ("off:0/0", {"num_groups": 2, "top_groups": 1, "top_k": 2, "num_experts": 6, "group_score": "best"}, ""),
        ("off:0/0-1", {"num_groups": 2, "top_groups": 1, "num_experts": 6, "group_score": "best"},
         "a token's top_groups=1 groups may have 1 experts left for top_k=2"),
        ("off:0/0-1 off:0/3-4", {"num_groups": 2, "top_groups": 1, "num_experts": 6},
         "0 groups would have 2 experts left, by which model.moe.group_score='best_two' ranks them"),
        ("off:0/0-3", {"choice": "expert"}, ""),
    ],
)  # fmt: skip
def test_what_cannot_be_switched_is_refused(line, moe, words):
    if not words:
        switches.parse(line, model_of(**moe))
        return
    with pytest.raises(ValueError) as error:
        switches.parse(line, model_of(**moe))
    assert str(error.value).startswith(f"experts={line}: ") and words in str(error.value)


def test_tables_and_models_without_experts():
    tables = model_of("dense table moe")
    with pytest.raises(ValueError, match=r"layer 0: a table of model.layers='dense table moe' names its experts"):
        switches.parse("on:0/1", tables)
    assert switches.parse("off:0/0-3 on:1/1", tables)
    with pytest.raises(ValueError, match="the model has no experts"):
        switches.parse("off:0/1", ModelConfig(num_layers=2, num_dense_layers=2))
    experts = [(0, 3), (0, 1), (0, 0), (1, 2)]  # a third of layer 0 would leave one for two choices
    assert switches.first_valid(model_of(), experts, 3) == [(0, 3), (0, 1), (1, 2)]
    assert switches.spell([(0, 3), (1, 2)]) == "off:0/3 off:1/2"
