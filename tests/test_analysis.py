"""The evaluation sums against a loop over tokens on every mesh, the measures against cases worked by hand, the figures.

Letters: L MoE layers, G domains, E experts, K experts per token, B batch, S sequence.
"""

import functools
import io

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from matplotlib.text import Text

from moe_jax import config, model
from moe_jax.evaluate import analysis, figures, spectra
from moe_jax.moe.layer import TokenInfo
from moe_jax.moe.program import Program
from moe_jax.moe.stats import ChoiceSums, RouterStats
from moe_jax.parallel import sharding
from moe_jax.train import step
from moe_jax.train.state import EvalSums, abstract_state, put_batch

B, S, V, L, G, E, K = 8, 6, 257, 2, 3, 8, 2


def run_config() -> config.RunConfig:
    c = config.default_config()
    c.model.update(vocab_size=V, d_model=16, num_layers=3, num_dense_layers=1, d_ff=24, num_heads=2, num_kv_heads=2,
                   head_dim=8, compute_dtype="float32", init_std=0.3)  # fmt: skip
    c.model.moe.update(num_experts=E, top_k=K, d_expert=8, selection_bias=True)
    c.data.update(batch_size=B, seq_len=S)
    return config.build(c)


def batch_rows() -> dict[str, np.ndarray]:
    """A quarter is padding, which has domain 0 and token 0 as the pipeline's has."""
    rng = np.random.default_rng(0)
    kept = np.ones((B, S), bool)
    kept[: B // 2, S // 2 :] = False
    tokens = np.where(kept, rng.integers(1, V, (B, S)), 0).astype(np.int32)
    return {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, 1),
        "weights": kept.astype(np.float32),
        "segment_ids": kept.astype(np.int32),
        "positions": np.tile(np.arange(S, dtype=np.int32), (B, 1)),
        "domain_ids": np.where(kept, rng.integers(0, G, (B, S)), 0).astype(np.int32),
    }


@functools.cache
def weights(seed: int, shape: tuple[int, int, int]) -> tuple[sharding.Mesh, dict, dict]:
    """Mesh, parameters and selection biases; the values are those of one device."""
    mesh = sharding.make_mesh(shape, jax.devices()[: int(np.prod(shape))])
    if mesh.size > 1:
        like = abstract_state(run_config(), mesh)
        to = jax.tree.map(lambda x: x.sharding, (like.params, like.router_bias))
        return mesh, *jax.device_put(jax.device_get(weights(seed, (1, 1, 1))[1:]), to)
    with jax.set_mesh(mesh):
        params, bias = model.init(run_config().model, jax.random.key(seed))
    return mesh, params, jax.tree.map(lambda b: b + np.linspace(-0.02, 0.02, E, dtype=np.float32)[None], bias)


@functools.cache
def eval_step(shape: tuple[int, int, int], record: bool):
    return step.make_eval_step(run_config(), weights(0, shape)[0], G, record)


def sums(shape: tuple[int, int, int], earlier: int | None = 1, record: bool = True) -> EvalSums:
    """The sums, of which those by block are of the only one."""
    mesh, params, bias = weights(0, shape)
    batch = put_batch(batch_rows(), mesh, run_config(), by_domain=True)
    before = () if earlier is None else (weights(earlier, shape)[1:],)
    found = jax.device_get(eval_step(shape, record)(params, bias, batch, *before))
    return found._replace(router=found.router["layers"], choices=found.choices and found.choices["layers"])


@functools.cache
def outputs() -> tuple[model.Output, model.Output]:
    """What the models of seeds 0 and 1 return on one device, the choices of every token among it."""
    mesh, *both = weights(0, (1, 1, 1))
    rows = batch_rows()
    put = lambda x: jax.device_put(x, NamedSharding(mesh, sharding.BATCH))
    info = TokenInfo(rows["segment_ids"] > 0, rows["domain_ids"])
    segments = rows["segment_ids"] if run_config().model.segment_mask else None
    inputs = jax.tree.map(put, model.Inputs(rows["tokens"], rows["positions"], segments, info))
    graph = model.abstract(run_config().model, Program(balance_groups=G, record=True))
    run = jax.jit(lambda params, bias: graph.bind(params, bias)(inputs))
    with jax.set_mesh(mesh):
        return jax.device_get((run(*both), run(*weights(1, (1, 1, 1))[1:])))


def by_hand() -> ChoiceSums:
    rows, (now, before) = batch_rows(), (out.choices["layers"] for out in outputs())
    score, pairs, kept = np.zeros((L, G)), np.zeros((L, E, E)), np.zeros((L, G))
    for layer, b, s in np.ndindex(L, B, S):
        if not rows["segment_ids"][b, s]:
            continue
        g, chosen = rows["domain_ids"][b, s], now.experts[layer, b, s]
        score[layer, g] += now.score[layer, b, s]
        kept[layer, g] += len(set(chosen) & set(before.experts[layer, b, s]))
        for i in chosen:
            pairs[layer, i, chosen] += 1
    return ChoiceSums(score, pairs, kept)


@pytest.mark.parametrize("shape", [pytest.param((1, 1, 1), marks=pytest.mark.slow), (2, 2, 2)])
def test_sums_equal_a_loop_over_tokens(shape):
    got, want = sums(shape), by_hand()
    np.testing.assert_allclose(got.choices.score, want.score, rtol=1e-5)
    np.testing.assert_array_equal(got.choices.pairs, want.pairs)
    np.testing.assert_array_equal(got.choices.kept, want.kept)
    assert 0 < want.kept.sum() < K * L * batch_rows()["weights"].sum()
    # … and agree with the statistics that the router sums by itself.
    np.testing.assert_array_equal(np.diagonal(want.pairs, 0, 1, 2), got.router.tokens_per_expert.sum(1))
    np.testing.assert_array_equal(got.router.tokens.sum(1), [batch_rows()["weights"].sum()] * L)


def test_only_a_recording_model_returns_choices():
    """… and recording changes nothing else. The score of K experts out of E is between K/E and 1, a bias aside."""
    choices = outputs()[0].choices["layers"]
    assert choices.experts.shape == (L, B, S, K) and choices.score.shape == (L, B, S)
    counted = batch_rows()["segment_ids"] > 0
    assert (choices.score[:, counted] > K / E * 0.9).all() and (choices.score < 1).all()
    assert [len(set(row)) for row in choices.experts[:, counted].reshape(-1, K)] == [K] * (L * counted.sum())
    assert (choices.experts[:, ~counted] == -1).all() and not choices.score[:, ~counted].any()
    plain, alone = sums((1, 1, 1), earlier=None, record=False), sums((1, 1, 1), earlier=None)
    assert plain.choices is None and alone.choices.kept is None
    same = functools.partial(np.testing.assert_allclose, rtol=1e-6)
    jax.tree.map(same, plain[:3], alone[:3])


def test_a_run_agrees_with_itself():
    got = sums((2, 2, 2), earlier=0)
    np.testing.assert_array_equal(analysis.saturation(got.choices, got.router), np.ones((L, G)))


# --- measures --------------------------------------------------------------------------------------------------------


def stats_of(tokens_per_expert, top_k: int) -> RouterStats:
    """Statistics [L, G, E] of a router; only what the measures read is filled in."""
    load = np.asarray(tokens_per_expert, np.float64)
    return RouterStats(load.sum(-1) / top_k, load, load, load.sum(-1), np.zeros(load.shape[:2]))


UNIFORM = np.full((1, 2, 8), 25.0)
DISJOINT = np.array([[[50.0] * 4 + [0] * 4, [0] * 4 + [500.0] * 4]])  # a domain ten times as large has the same weight
ALIKE = np.array([[[60.0, 60, 40, 40, 0, 0, 0, 0]] * 2])


@pytest.mark.parametrize(
    ("load", "bits", "overlap", "dead", "most"),
    [(UNIFORM, 0, np.nan, 0, 1), (DISJOINT, 1, 0, 0, 500 / 275), (ALIKE, 0, 1, 4, 120 / 50)],
    ids=["uniform", "disjoint", "alike"],
)
def test_domains(load, bits, overlap, dead, most):
    stats = stats_of(load, 2)
    frequency = analysis.selection_frequency(stats)
    np.testing.assert_allclose(frequency.sum(-1), 2)
    np.testing.assert_allclose(analysis.specialisation(stats), [bits], atol=1e-12)
    np.testing.assert_array_equal(analysis.overlap(analysis.high_frequency(frequency))[0, 0, 1], overlap)
    assert analysis.dead_experts(load.sum(1)) == [dead]
    np.testing.assert_allclose(analysis.max_load(stats), [most], atol=1e-12)


def test_a_partial_overlap():
    """K/E = 1/4, so 3/8 of the tokens make a high-frequency expert: {0, 1} and {1, 2, 3} share one of four."""
    load = np.array([[[40.0, 60, 37, 37, 26], [10, 40, 40, 80, 30]]])
    load = np.concatenate([load, np.zeros((1, 2, 3))], -1)
    frequency = analysis.selection_frequency(stats_of(load, 2))
    np.testing.assert_array_equal(analysis.high_frequency(frequency)[0].sum(-1), [2, 3])
    np.testing.assert_allclose(analysis.overlap(analysis.high_frequency(frequency))[0], [[1, 0.25], [0.25, 1]])


def test_experts():
    """10 tokens of domain 0, none of domain 1: 6 choose {0, 1}, 4 choose {0, 2}; nobody chooses 3."""
    stats = stats_of([[[10, 6, 4, 0], [0, 0, 0, 0]]], 2)
    pairs = np.array([[[10, 6, 4, 0], [6, 6, 0, 0], [4, 0, 4, 0], [0, 0, 0, 0]]], float)
    choices = ChoiceSums(np.array([[7.0, 0]]), pairs, np.array([[15.0, 0]]))
    nan = np.nan
    together = [[1, 0.6, 0.4, 0], [1, 1, 0, 0], [1, 0, 1, 0], [nan] * 4]
    found = analysis.analyse_bank(stats, choices, ("seen", "unseen"), 2, earlier_step=5)
    np.testing.assert_allclose(found.coactivation[0], together)
    np.testing.assert_allclose(found.topk_score, [[0.7, nan]])
    np.testing.assert_allclose(found.saturation, [[0.75, nan]])
    np.testing.assert_array_equal(found.dead_experts, [1])
    np.testing.assert_array_equal(found.dead_experts_by_domain, [[1, nan]])
    np.testing.assert_allclose(found.specialisation, [0])
    row = analysis.layer_table(found).splitlines()[1]
    assert row.split() == ["0", "2.00", "1", "0.00%", "1.40", "0.000", "bits", "75.0%"]


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 6), (5, 12), (12, 5)])
def test_svd_entropy_of_known_spectra(shape):
    """Orthogonal rows: 1. Rank one: 0. Two equal values of n: log 2 / log n. Scale does not count."""
    rng = np.random.default_rng(0)
    n = min(shape)
    u, _, vt = np.linalg.svd(rng.normal(size=(2, *shape)), full_matrices=False)
    of = lambda values: spectra.svd_entropy(7.0 * (u * np.asarray(values, float)) @ vt)
    np.testing.assert_allclose(of([1] * n), [1, 1], atol=1e-12)
    np.testing.assert_allclose(of([1] + [0] * (n - 1)), [0, 0], atol=1e-12)
    np.testing.assert_allclose(of([1, 1] + [0] * (n - 2)), [np.log(2) / np.log(n)] * 2, atol=1e-12)
    sigma = rng.uniform(0.1, 3.0, n)
    q = sigma**2 / np.sum(sigma**2)
    np.testing.assert_allclose(of(sigma), [-(q * np.log(q)).sum() / np.log(n)] * 2, atol=1e-12)
    assert np.isnan(spectra.svd_entropy(np.zeros(shape))) and np.isnan(spectra.svd_entropy(np.ones((1, 5))))


def test_matrices_by_kind():
    """Every parameter of a model with dense layers and shared experts has a kind; none is left out or twice."""
    c = config.default_config()
    c.model.update(num_layers=3, num_dense_layers=1, qk_norm=True)
    c.model.moe.update(num_experts=8, num_shared_experts=1)
    shapes = model.abstract(config.build(c).model).shapes
    counter = iter(range(1000))
    params = jax.tree.map(lambda x: np.full(x.shape, next(counter) + 1.0, np.float32), shapes)
    found = spectra.matrices(params, config.build(c).model.places)
    glu = {f"{kind} {x}" for kind in ("expert", "shared", "dense") for x in ("gate", "up", "down")}
    assert set(found) == {"embedding", "head", "router", *(f"attention {x}" for x in "qkvo"), *glu}
    assert found["embedding"].shape == (1, 512, 128) and found["expert down"].shape == (2, 8, 256, 128)
    q = [params[name]["attention"]["w_q"].flat[0] for name in ("dense_layers", "layers")]
    np.testing.assert_allclose(spectra.rms(found["attention q"]), [q[0], q[1], q[1]])
    matrices_of = [x for x in jax.tree.leaves(params) if x.ndim > 2 or x.shape == (512, 128)]
    assert sum(x.size for x in found.values()) == sum(x.size for x in matrices_of)
    with pytest.raises(ValueError, match="no kind for the parameter layers/moe/w_new"):
        spectra.matrices({"layers": {"moe": {"w_new": np.zeros((1, 2, 2))}}}, ())


# --- arrays and figures ----------------------------------------------------------------------------------------------


def made_up(layers: int, domains: int, experts: int, top_k: int, earlier: int | None = 7) -> analysis.Analysis:
    """Random choices of 20 tokens a domain; the first of several domains is empty."""
    rng = np.random.default_rng(0)
    empty = domains > 1
    tokens, load = np.zeros((layers, domains)), np.zeros((layers, domains, experts))
    pairs = np.zeros((layers, experts, experts))
    for layer, g, _ in np.ndindex(layers, domains, 20):
        chosen = rng.choice(experts, top_k, replace=False)
        if g or not empty:
            tokens[layer, g] += 1
            load[layer, g, chosen] += 1
            pairs[(layer, *np.ix_(chosen, chosen))] += 1
    zeros = np.zeros_like(tokens)
    choices = ChoiceSums(0.6 * tokens, pairs, None if earlier is None else 0.9 * top_k * tokens)
    names = tuple(f"a_rather_long_name_{g}" for g in range(domains))
    return analysis.analyse_bank(RouterStats(tokens, load, load, zeros, zeros), choices, names, top_k, earlier)


@pytest.mark.parametrize(
    "shape",
    [(3, 4, 8, 2), *(pytest.param(s, marks=pytest.mark.slow) for s in ((1, 1, 64, 8), (2, 3, 4, 1), (18, 2, 4, 4)))],
)
@pytest.mark.filterwarnings("error")
def test_figures_of_any_shape(shape, tmp_path):
    found = made_up(*shape)
    names = dict(figures.all_figures(found))
    assert {"expert_domain", "topk_score", "saturation"} <= set(names)
    assert ("coactivation" in names) == (shape[3] > 1) and ("overlap" in names) == (shape[1] > 2)
    drawn = {**names, "compare": figures.compare({"one": found, "two": found}, shape[0] - 1)}
    for name, figure in drawn.items():
        figure.savefig(tmp_path / f"{name}.png", dpi=40)


def test_names_from_outside_are_drawn_as_they_are():
    """A pair of dollar signs is a formula to matplotlib, and one that it cannot read ends the whole figure."""
    found = made_up(2, 3, 4, 2)._replace(domains=("$x^$", r"$\frac$", "$y_$"))
    for name, figure in [*figures.all_figures(found), ("compare", figures.compare({"$y^$": found}, 0))]:
        figure.savefig(io.BytesIO(), dpi=40)
        drawn = {text.get_text() for text in figure.findobj(Text)}
        assert name == "coactivation" or any("$" in text for text in drawn)


def test_arrays_come_back(tmp_path):
    for found in (made_up(2, 3, 8, 2), made_up(1, 2, 4, 1, earlier=None)):
        found.save(tmp_path / "analysis.npz")
        again = analysis.load(tmp_path / "analysis.npz")
        assert again._fields == found._fields
        for name, a, b in zip(found._fields, again, found, strict=True):
            assert (a is None) == (b is None), name
            if b is not None:
                np.testing.assert_array_equal(a, b, err_msg=name)
        assert "saturation" not in dict(figures.all_figures(again)) or found.saturation is not None
