"""Mixtures of sources: designs, surrogates, proposals."""

import json
import subprocess
import sys

import numpy as np
import pytest
from scipy import special

from moe_jax.errors import FileError, UserError
from moe_jax.mixtures import clusters, design, gaussian, measured, propose, surrogates
from moe_jax.mixtures.measured import Measured

NAMES = ("law", "code", "prose", "sums")
PRIOR = design.make_prior(dict(zip(NAMES, (4e9, 3e9, 2e9, 1e9), strict=True)), 4.0)
EVEN = {"a": 1.0, "b": 1.0}
BEST = np.array([0.1, 0.2, 0.3, 0.4])


def planted(weights, fidelity=1.0):
    """A loss with its least value at BEST; at lower fidelities also another one, with its least value elsewhere."""
    away = ((np.log(weights + 0.02) - np.log(BEST + 0.02)) ** 2).sum(-1)
    return 2 + 0.3 * away + (1 - fidelity) * (0.5 + 0.4 * weights[..., 0])


def runs_of(weights, fidelity=1.0):
    rows = zip(weights, np.broadcast_to(fidelity, len(weights)), strict=True)
    return [Measured(f"mix{i:03d}", dict(zip(NAMES, map(float, w), strict=True)),
                     {"law": float(planted(w, s)), "code": 1.0}, 1e12 * float(s))
            for i, (w, s) in enumerate(rows)]  # fmt: skip


def drawn(count, seed=0, prior=PRIOR):
    return np.array([list(mixture.weights.values()) for mixture in design.sample(prior, count, seed)])


@pytest.mark.slow
def test_imports_without_jax():
    """The modules can be used without JAX, which only the command line and what reads files of runs or text load."""
    names = ["design", "surrogates", "propose", "measured", "forms", "merges", "clusters"]
    code = f"import sys; from moe_jax.mixtures import {', '.join(names)}; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    assert done.stdout == "False\n"


# --- designs ---------------------------------------------------------------------------------------------------------


def test_design(tmp_path):
    """Different mixtures within the bounds, no share between 0 and the floor, near corners and near the prior."""
    found = drawn(400)
    assert np.allclose(found.sum(1), 1) and len(np.unique(found, axis=0)) == 400
    assert (found <= PRIOR.most + 1e-6).all() and (found[:, 3] > 0.3).any() and PRIOR.most[3] == pytest.approx(0.4)
    assert not ((found > 0) & (found < 0.99 * design.FLOOR)).any() and (found == 0).any()
    assert (found == drawn(400)).all() and (found != drawn(400, seed=1)).any()
    tempered = PRIOR.shares**0.5 / (PRIOR.shares**0.5).sum()
    free = drawn(4000, prior=PRIOR._replace(most=np.ones(4)))
    assert np.abs(free.mean(0) - tempered).max() < 0.03
    path = tmp_path / "mix.jsonl"
    path.write_text(design.lines(design.sample(PRIOR, 3, 0)), encoding="utf-8")
    assert [list(mixture.weights.values()) for mixture in design.read(path)] == [pytest.approx(w) for w in drawn(3)]


def test_files_of_numbers(tmp_path):
    """Names may have spaces around them; a key that is there twice is refused."""
    assert design.numbers("a:1, b:2", "--prior", "") == {"a": 1, "b": 2}
    (tmp_path / "a.json").write_text('{"a": 1, "a": 5}', encoding="utf-8")
    with pytest.raises(FileError, match="has the key 'a' twice"):
        design.numbers(str(tmp_path / "a.json"), "--prior", "")
    (tmp_path / "a.npy").write_bytes(b"PK\x03\x04junk")
    with pytest.raises(FileError, match="is not a NumPy file"):
        clusters.read_embeddings(tmp_path / "a.npy", 2)


def test_settled_shares():
    """Multiples of the floor with sum 1 within the bounds, each less than the floor away."""
    most = np.array([0.3, 1, 1, 1])
    for weights in np.random.default_rng(0).dirichlet(np.full(4, 0.3), 80):
        if weights[0] > most[0]:
            continue
        found = design.settled(weights, most)
        units = found / design.FLOOR
        assert np.allclose(units, units.round(), atol=1e-6) and found.sum() == pytest.approx(1)
        assert (found <= most + 1e-9).all() and np.abs(found - weights).max() < design.FLOOR
    full = np.array([0.10005, 0.19995, 0.7])  # no source has room for what the others would lose
    assert np.array_equal(design.settled(full, full), full)


def test_dirichlet():
    """Mean and variance of the distribution, also where gamma variates would all be 0."""
    alpha = np.broadcast_to([0.002, 0.003, 0.005], (40_000, 3))
    found = design.dirichlet(alpha, np.random.default_rng(0))
    share = np.array([0.2, 0.3, 0.5])
    assert np.allclose(found.sum(1), 1) and np.abs(found.mean(0) - share).max() < 0.01
    assert np.allclose(found.var(0), share * (1 - share) / 1.01, rtol=0.05)


@pytest.mark.parametrize("said, call", [
    ("--prior: 'b' is not NAME:NUMBER", lambda: design.numbers("a:1,b", "--prior", "a:1")),
    ("'a' has 'x', which must be a finite number", lambda: design.numbers("a:x", "--prior", "a:1")),
    ("--prior: names 'a' twice", lambda: design.numbers("a:1,a:2", "--prior", "a:1")),
    ("mix000 and mix000 have the same mixture, cost and losses", lambda: measured.check_alike(runs_of(drawn(2)) * 2)),
    ("two sources or more, not 1", lambda: design.make_prior({"a": 1.0}, 4)),
    ("--epochs=0.5: all text together is not enough; nearest valid: 1", lambda: design.make_prior(EVEN, 0.5)),
    ("is not enough; nearest valid: 5", lambda: design.make_prior(EVEN, 4, tokens=10)),
    ("raise --epochs or lower --count", lambda: design.sample(design.make_prior(EVEN, 1.0), 9, 0)),
    ("--target=lwa: is not a domain of the runs; nearest valid: 'law'",
     lambda: measured.make_fit(runs_of(drawn(8)), "ridge", ["lwa"], 0)),
    ("a fit needs 5 runs or more, these are 4", lambda: measured.make_fit(runs_of(drawn(4)), "ridge", None, 0)),
    ("need --surrogate=gp", lambda: measured.make_fit(runs_of(drawn(8), [0.1, 1] * 4), "ridge", None, 0)),
    ("all runs have the same mixture", lambda: measured.make_fit(runs_of(drawn(1)) * 6, "ridge", None, 0)),
    ("source 'prose' is not in both", lambda: measured.check_alike(
        [*runs_of(drawn(2)), Measured("x", {"law": 0.5, "code": 0.5}, {"law": 1.0, "code": 1.0}, 1.0)])),
    ("--costs: names 3 and the runs have 2 costs", lambda: propose.acquire(
        measured.make_fit(runs_of(drawn(8), [0.1, 1] * 4), "gp", None, 0), PRIOR, [1, 2, 3])),
])  # fmt: skip
def test_mistakes(said, call):
    with pytest.raises(UserError, match=said.replace("(", r"\(")):
        call()


@pytest.mark.parametrize("line, said", [
    ("{", "line 1: is not JSON"),
    ('{"name": "../a", "weights": {"a": 1}}', "it becomes a folder"),
    ('{"name": "a", "weights": {"a": "much"}}', "weight 'much' of 'a' must be a number ≥ 0"),
    ('{"name": "a", "weights": {"a": 0, "b": 0}}', "must not all be 0"),
    ('{"name": "a", "weights": {"a": 1}}\n{"name": "b", "weights": {"b": 1}}', "is not in all mixtures"),
])  # fmt: skip
def test_files_of_mixtures(tmp_path, line, said):
    (tmp_path / "mix.jsonl").write_text(line + "\n", encoding="utf-8")
    with pytest.raises(FileError, match=said):
        design.read(tmp_path / "mix.jsonl")


# --- surrogates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", surrogates.SURROGATES)
def test_surrogates_recover_the_ranking(name):
    """Of mixtures that they have not seen; the penalty of ridge is that of least error with each run left out."""
    if name == "lightgbm":
        pytest.importorskip("lightgbm")
    train, test = drawn(40), drawn(128, seed=1)
    predict = surrogates.SURROGATES[name](train, planted(train))
    assert surrogates.spearman(predict(test), planted(test)) > (0.9 if name == "lightgbm" else 0.99)
    assert surrogates.spearman(train[:, 0], planted(test[:40])) < 0.5


def test_equal_mixtures_are_left_out_together(monkeypatch):
    """A surrogate that knows only what it has seen predicts nothing of a run by another of the same mixture."""
    seen = lambda weights, losses, seed: lambda w: np.array([
        losses[(weights == row).all(1)].mean() if (weights == row).all(1).any() else -1.0 for row in w])  # fmt: skip
    monkeypatch.setitem(surrogates.SURROGATES, "seen", seen)
    weights = np.repeat(drawn(12), 2, axis=0)
    assert (surrogates.left_out("seen", weights, planted(weights)) == -1).all()


def test_process_of_two_costs_with_an_offset():
    """That small models are worse on every mixture says nothing of any mixture at the largest cost."""
    found, asked = drawn(30), drawn(100, seed=1)
    s = np.where(np.arange(30) < 22, 0.06, 1.0)
    models = [gaussian.fit(surrogates.logs(found), s, planted(found) + offset * (1 - s)) for offset in (0, 20)]
    predicted = [model.mean_of(surrogates.logs(asked), np.ones(100)) for model in models]
    assert np.allclose(*predicted, atol=1e-3) and surrogates.spearman(predicted[0], planted(asked)) > 0.95


def test_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    with pytest.raises(UserError, match=r"--surrogate=lightgbm needs LightGBM .*pip install -e '.\[mixtures\]'"):
        surrogates.boosted(drawn(8), planted(drawn(8)))
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(UserError, match=r"cluster needs scikit-learn .*pip install -e '.\[mixtures\]'"):
        clusters.cluster(["a b", "c d"], 2, 2, 0)


def test_process():
    """Values at s = 1 are those of k0 alone; the gradient is that of the objective; the mean is the textbook's."""
    rng = np.random.default_rng(0)
    x, s, y = rng.normal(size=(9, 3)), rng.choice([0.1, 0.4, 1.0], 9), rng.normal(size=9)
    kernel = gaussian.Kernel(np.array([1.0, 2, 3]), 1.2, np.array([2.0, 1, 1]), 0.7, 1.5, 0.1)
    ones = np.ones(9)
    whole = gaussian.covariance(kernel, x, s, x, s)
    assert np.array_equal(gaussian.covariance(kernel, x, ones, x, ones), gaussian.matern(x, x, kernel.length0, 1.2))
    assert np.linalg.eigvalsh(whole).min() > -1e-12 and not np.allclose(
        whole, gaussian.covariance(kernel, x, ones, x, ones)
    )
    p = rng.normal(size=10) * 0.3
    arguments = (x, s, y, True, np.zeros(10))
    value, gradient = gaussian._objective(p, *arguments)
    slopes = [(gaussian._objective(p + h, *arguments)[0] - gaussian._objective(p - h, *arguments)[0]) / 2e-5
              for h in np.eye(10) * 1e-5]  # fmt: skip
    assert np.isfinite(value) and np.allclose(gradient, slopes, rtol=1e-4, atol=1e-6)
    made = gaussian.fit(x, s, y)
    at, t = rng.normal(size=(4, 3)), np.array([1.0, 0.4, 1.0, 0.1])
    total = gaussian.covariance(made.kernel, x, s, x, s) + (made.kernel.noise**2 + 1e-8) * np.eye(9)
    across = gaussian.covariance(made.kernel, at, t, x, s)
    line = np.polyfit(1 - s, y, 1)
    spread = (y - np.polyval(line, 1 - s)).std()
    rest = across @ np.linalg.solve(total, y - np.polyval(line, 1 - s))
    assert np.allclose(made.mean_of(at, t), np.polyval(line, 1 - t) + rest)
    mean, left = made.joint(at, t)
    assert np.allclose(mean, made.mean_of(at, t))
    pair, noise = made.joint(np.repeat(at[:1], 2, 0), np.array([0.4, 1.0]))[1] / spread**2, made.kernel.noise**2
    assert made.correlation(at[:1], 0.4) == pytest.approx(pair[0, 1] / np.sqrt((pair[0, 0] + noise) * pair[1, 1]))
    prior = gaussian.covariance(made.kernel, at, t, at, t)
    assert np.allclose(left / spread**2, prior - across @ np.linalg.solve(total, across.T))


# --- proposals -------------------------------------------------------------------------------------------------------


def test_proposals_are_never_worse(monkeypatch):
    """On the surrogate, for any runs; within the bounds; different; near the planted best; the same for a seed."""
    monkeypatch.setattr(propose, "DRAWN", 4000)
    monkeypatch.setattr(propose, "AVERAGED", 26)  # the same part of them
    for seed in range(2):
        fit = measured.make_fit(runs_of(drawn(24, seed)), "ridge", ["law"], seed)
        one, several = propose.best(fit, PRIOR), propose.around(fit, PRIOR, 8)
        for found in (one, several):
            assert found.predicted.min() <= found.known + 1e-12 and (found.weights <= PRIOR.most + 1e-5).all()
        assert len(np.unique(several.weights.round(3), axis=0)) == 8
        assert np.abs(one.weights - BEST).max() < 0.12 and planted(one.weights)[0] < fit.losses.min()
        again = propose.around(fit, PRIOR, 8)
        assert np.array_equal(again.weights, several.weights)
    runs = runs_of(drawn(9))
    needle = max((list(run.weights.values()) for run in runs), key=min)  # no other mixture is as good
    steep = lambda weights, losses, seed: lambda w: np.where(np.abs(w - needle).sum(1) < 1e-6, 1.0, 2 + w[:, 0])
    monkeypatch.setitem(surrogates.SURROGATES, "steep", steep)
    fit = measured.make_fit(runs, "steep", ["law"], 0)
    for found in (propose.best(fit, PRIOR), propose.around(fit, PRIOR, 4)):
        assert found.predicted[0] == found.known == 1 and np.allclose(found.weights[0], needle)


def test_best_is_the_mean_of_draws(monkeypatch):
    """Not of the candidates around the best, which are close to each other."""
    monkeypatch.setattr(propose, "DRAWN", 2000)
    fit = measured.make_fit(runs_of(drawn(24)), "ridge", ["law"], 0)
    found = propose.draws(PRIOR, np.random.default_rng(0))
    mean = found[np.argsort(propose.predictor(fit)(found))[: propose.AVERAGED]].mean(0)
    assert np.abs(propose.best(fit, PRIOR).weights[0] - mean).max() < design.FLOOR


def test_names_of_proposals():
    names = ("mix007/seed0", "a/mix002", "mixed9")
    runs = [run._replace(name=name) for run, name in zip(runs_of(drawn(3)), names, strict=True)]
    assert [measured.first_free(runs, word) for word in ("mix", "mixed", "best")] == [8, 10, 0]


def test_information():
    """That of a measurement of the loss itself is the closed form, that of anything else 0, and it grows between."""
    gamma = np.array([[0.5, 1.0, 3.0], [0.1, 2.0, 4.0]])
    density = np.exp(-(gamma**2) / 2) / np.sqrt(2 * np.pi)
    closed = (gamma * density / (2 * special.ndtr(gamma)) - np.log(special.ndtr(gamma))).mean(0)
    assert np.allclose(propose.information(gamma, np.ones(3)), closed, atol=0.02)
    values = [propose.information(gamma, np.full(3, rho)) for rho in (0.0, 0.3, 0.6, 0.9, 0.99)]
    assert np.allclose(values[0], 0, atol=1e-9) and (np.diff(values, axis=0) > 0).all()


@pytest.mark.slow
def test_acquisition(monkeypatch):
    """At equal cost the run that is aimed at, at a thousandth the cheap one; the next run is near the best."""
    monkeypatch.setattr(propose, "DRAWN", 600)
    monkeypatch.setattr(propose, "CONSIDERED", 60)
    fit = measured.make_fit(runs_of(drawn(14), [0.05] * 10 + [1.0] * 4), "gp", ["law"], 0)
    equal, cheap = propose.acquire(fit, PRIOR, [1, 1]), propose.acquire(fit, PRIOR, [0.001, 1])
    assert (equal.level, cheap.level) == (1, 0) and equal.gain > cheap.gain > 0
    assert planted(equal.weights) < np.median(planted(drawn(200)))


@pytest.mark.slow
def test_search_at_two_costs(monkeypatch):
    """It finds the planted best mixture for the cost of a few full runs, of which random ones come nowhere near."""
    monkeypatch.setattr(propose, "DRAWN", 2000)
    found = drawn(400, seed=5)
    runs, paid = runs_of(found[:8], [0.05] * 6 + [1.0] * 2), 2.3
    for step in range(10):
        fit = measured.make_fit(runs, "gp", ["law"], step)
        best = propose.acquire(fit, PRIOR, None)
        paid += fit.levels[best.level] / 1e12
        runs += runs_of(best.weights[None], fit.levels[best.level] / 1e12)
    answer = propose.best(measured.make_fit(runs, "gp", ["law"], 0), PRIOR)
    random_best = [planted(found[i : i + round(paid)]).min() for i in range(8, 380, round(paid))]
    assert paid < 10 and planted(answer.weights)[0] < 2.05 < np.min(random_best)


def test_fit_is_read_again(tmp_path):
    fit = measured.make_fit(runs_of(drawn(6)), "ridge", ["code"], 3)
    path = tmp_path / "fit.json"
    path.write_text(measured.to_json(fit, {"left_out": {"spearman": None}}), encoding="utf-8")
    read = measured.read_fit(path)
    assert read._replace(runs=[]) == fit._replace(runs=[]) and np.allclose(read.weights, fit.weights)
    path.write_text(json.dumps([run._asdict() for run in fit.runs]), encoding="utf-8")  # as experiments.mixtures does
    assert measured.read_runs([path])[2].losses == fit.runs[2].losses
