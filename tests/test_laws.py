"""Scaling laws: planted ones are recovered, their intervals hold them, and bad points are refused in one line."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest

from moe_jax.errors import FileError, UserError
from moe_jax.mixtures import drawings, forms, laws
from moe_jax.mixtures.forms import Asked


def write(path, columns, rows):
    text = [",".join(columns), *(",".join(x if isinstance(x, str) else repr(float(x)) for x in row) for row in rows)]
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    return path


GRID = list(itertools.product([1e7, 4e7, 1.6e8, 6.4e8], [2e8, 1e9, 5e9, 2.5e10]))


def chinchilla(n, d):
    return 1.69 + 406.4 / n**0.34 + 410.7 / d**0.28


def upcycling(d1, d2, n=1e9):
    """With the coefficients of table 3 of arXiv:2502.03009."""
    return 16.3 * d1**-0.043 * d2 ** (-0.085 + 7.98e-4 * np.log(d1)) + 8.53 * n**-0.112 + 0.165


def inference(n, experts, d):
    many = 1 / (1 / (experts - 1 + 1 / (1 - 1 / 200)) + 1 / 200)
    return (20 / n**0.2 + 0.5 / many**0.4 + 300 / d**0.3 + 1.2) * np.exp(8e-4 * np.log(n) * np.log(many))


UPCYCLED = list(itertools.product([5e9, 2e10, 7e10], [1e9, 4e9, 1.6e10, 6e10], [1e8, 3e8, 1e9]))
EXPERTS = list(itertools.product([1e8, 3e8, 7e8], [1, 4, 8, 32], [2e9, 6e9, 2e10]))
PLANTED = {  # form → columns, rows, parameters of the last law
    "chinchilla": (("params", "tokens", "loss"), [(n, d, chinchilla(n, d)) for n, d in GRID],
                   {"E": 1.69, "A": 406.4, "alpha": 0.34, "B": 410.7, "beta": 0.28}),
    "upcycling": (("dense_tokens", "tokens", "params", "loss"), [(*x, upcycling(*x)) for x in UPCYCLED],
                  {"A": 16.3, "alpha1": 0.043, "alpha2": 0.085, "alpha3": 7.98e-4, "E": 0.165, "B": 8.53,
                   "beta": 0.112}),
    "inference": (("params", "experts", "tokens", "loss"), [(*x, inference(*x)) for x in EXPERTS],
                  {"A": 20, "alpha": 0.2, "B": 0.5, "beta": 0.4, "C": 300, "gamma": 0.3, "F": 1.2, "d": 8e-4,
                   "E_max": 200}),
    # rise = 0.06 (R / critical)^1.5 − 0.01, which is the tolerance of 0.05 at the critical ratio
    "cmr": (("ratio", "tokens", "rise"),
            [(r, t, 0.06 * (r / (0.1 + 1e-6 * t**0.5)) ** 1.5 - 0.01)
             for r in (0.05, 0.1, 0.2, 0.4, 0.8) for t in (1e9, 3e9, 1e10, 3e10)],
            {"b0": 0.1, "b1": 1e-6, "s": 0.5}),
    "mnmt": (("domain", "weight", "params", "loss"),
             [("fr", p, n, 1.0 + 60 * (p**0.5 * n) ** -0.3) for p in (0.1, 0.3, 0.9) for n in (1e7, 3e7, 1e8, 3e8)],
             {"L_inf": 1.0, "alpha": 0.3, "beta at 0.1": 60 * 0.1**-0.15}),
    "efficient-lm": (("model", "compute", "loss"),
                     [(kind, c, 1.5 + a * c**-0.07) for kind, a in (("dense", 30), ("moe", 24))
                      for c in 10 ** np.arange(17, 22, 0.75)],
                     {"E": 1.5, "a": 30, "alpha": 0.07, "b": 24, "beta": 0.07}),
}  # fmt: skip


@pytest.mark.parametrize("form", PLANTED)
def test_planted_laws_are_recovered(form, tmp_path, monkeypatch):
    monkeypatch.setattr(laws, "STARTS", 3)
    columns, rows, wanted = PLANTED[form]
    found = forms.FORMS[form](write(tmp_path / "points.csv", columns, rows), Asked(refits=0))
    values = {name: value for name, (value, *_) in found[-1].parameters.items()}
    assert {name: values[name] for name in wanted} == pytest.approx(wanted, rel=2e-3)
    assert all(one.error < 1e-6 for one in found)
    derived = {name: value for name, (value, *_) in found[-1].derived.items()}
    if form == "chinchilla":
        assert derived["params ~ compute^"] == pytest.approx(0.28 / 0.62)
    if form == "mnmt":  # N_eff = p^0.5 N, relative to p = 0.9
        assert derived["f(0.1)"] == pytest.approx((0.1 / 0.9) ** 0.5)
    if form == "efficient-lm":
        assert derived["saving at 1e+17"] == pytest.approx((30 / 24) ** (1 / 0.07))


def test_intervals_and_files(tmp_path, monkeypatch):
    """Intervals of noisy points hold the planted values, and are wider for more noise. A law without sizes has no B."""
    monkeypatch.setattr(laws, "STARTS", 3)
    rng = np.random.default_rng(1)
    widths = []
    for noise in (1e-3, 4e-3):
        rows = [(n, d, chinchilla(n, d) * np.exp(noise * rng.normal())) for n, d in GRID]
        (found,) = forms.FORMS["chinchilla"](write(tmp_path / "a.csv", ("params", "tokens", "loss"), rows), Asked(8))
        wanted = PLANTED["chinchilla"][2]
        inside = [low <= wanted[name] <= high for name, (_, low, high) in found.parameters.items()]
        assert sum(inside) >= 4 and 0.3 * noise < found.error < 2 * noise
        widths.append(found.parameters["alpha"][2] - found.parameters["alpha"][1])
    assert widths[1] > 1.5 * widths[0]
    text = json.loads(laws.as_json([found]))
    assert text["laws"][0]["parameters"]["E"] == list(found.parameters["E"])
    assert "[" in laws.table(found) and "16 points" in laws.table(found)
    rows = [(*x, upcycling(*x)) for x in itertools.product([5e9, 2e10, 7e10], [1e9, 4e9, 1.6e10])]
    path = write(tmp_path / "b.csv", ("dense_tokens", "tokens", "loss"), rows)
    (same_size,) = forms.FORMS["upcycling"](path, Asked(0))
    assert set(same_size.parameters) == {"A", "alpha1", "alpha2", "alpha3", "E"} and same_size.error < 1e-6
    figure = drawings.law([found], "params", "chinchilla")
    assert [axis.get_xlabel() for axis in figure.axes] == ["params", "value of the law"]
    assert len(figure.axes[0].lines) == 2 * 4  # a curve and points for each number of tokens


def shallow(seed=4):
    """Points of a law whose L_inf the noise hides: the best fit has none, and many refits have one."""
    n, rng = np.array([1e7, 3e7, 1e8, 3e8, 1e9, 3e9]), np.random.default_rng(seed)
    loss = (0.3 + 30 * n**-0.15) * np.exp(0.02 * rng.normal(size=6))
    return {"domain": np.array(["fr"] * 6), "weight": np.full(6, 0.5), "params": n, "loss": loss}


def test_refits_leave_the_end_of_a_range(monkeypatch):
    """Where the term of the best fit has vanished, it comes back in refits, and a warning says that it is unknown."""
    monkeypatch.setattr(laws, "STARTS", 3)
    found = laws.fit(forms.weighted(shallow()), "", 8, 0, forms.effective_shares)
    assert found.parameters["L_inf"][0] < 0.01 and found.parameters["L_inf"][2] > 0.2
    assert found.doubts == ("L_inf is at the end of its range: the points do not determine it",)
    assert f"warning: {found.doubts[0]}" in laws.table(found)
    assert json.loads(laws.as_json([found]))["laws"][0]["warnings"] == list(found.doubts)


def test_doubts_and_intervals():
    """Terms that do not fall, or that nothing tells apart, are named. Infinite refits widen an interval."""
    n = np.tile([1e7, 4e7, 1.6e8], 3)
    d = np.repeat([1e9, 4e9, 1.6e10], 3)
    problem = forms.chinchilla({"params": n, "tokens": d, "loss": 2 + (n / 1e8) ** 0.1 * 0.1 + 0 * d})

    def doubts(*p):
        p = np.array(p)
        return laws._doubts(problem, laws.Solution(p, problem.predict(p, problem.columns), 0.0), problem.report(p))

    assert doubts(0.0, 0.0, 0.3, 0.0, 0.3) == []
    assert doubts(0.0, 0.0, 0.3, 0.0, -0.3) == ["beta=-0.3 is not above 0: nothing falls with it"]
    flat = doubts(0.0, 0.0, 0.0, 0.0, 0.3)
    assert "nothing falls" in flat[0] and "tell their effects apart" in flat[1]
    assert laws._interval(1.0, [*range(9), np.inf])[1:] == (0, np.inf)
    assert laws._unknown({"f": [1.0, np.nan]}) == ["f: 50% of the refits give none"]


def test_levels_have_seeds_of_their_own(tmp_path, monkeypatch):
    """Refits of one number of tokens have nothing to do with those of another, which the law of ratios is fitted to."""
    seeds, none = [], SimpleNamespace(derived={"critical ratio": (1.0, 0, 0)})
    monkeypatch.setattr(laws, "fit", lambda problem, title, refits, seed, derive: seeds.append(seed) or none)
    columns, rows, _ = PLANTED["cmr"]
    forms.FORMS["cmr"](write(tmp_path / "points.csv", columns, rows), Asked(0))
    assert len(set(seeds)) == len(seeds) == 4


def test_weights_that_are_the_same(tmp_path, monkeypatch):
    """0.1 + 0.2 and 0.3 are one weight. Points of one weight are drawn as well."""
    monkeypatch.setattr(laws, "STARTS", 2)
    rows = [("fr", p, n, 1.0 + 60 * n**-0.3) for p in (0.3, 0.1 + 0.2) for n in (1e7, 3e7, 1e8, 3e8)]
    (found,) = forms.FORMS["mnmt"](write(tmp_path / "a.csv", ("domain", "weight", "params", "loss"), rows), Asked(0))
    assert found.problem.names == tuple(found.parameters) == ("L_inf", "alpha", "beta at 0.3")
    assert drawings.law([found], "params", "mnmt").axes[0].get_xlabel() == "params"


@pytest.mark.slow
@pytest.mark.parametrize("form", ["chinchilla", "mnmt"])
def test_intervals_cover_the_truth(form, monkeypatch):
    """In most of several sets of noisy points; the noise hides a term in some of those of mnmt."""
    monkeypatch.setattr(laws, "STARTS", 6)
    inside = []
    for seed in range(6):
        if form == "mnmt":
            problem, truth = forms.weighted(shallow(seed)), {"L_inf": 0.3, "alpha": 0.15}
        else:
            n, d = np.array(GRID).T
            noise = np.exp(3e-3 * np.random.default_rng(seed).normal(size=len(n)))
            problem = forms.chinchilla({"params": n, "tokens": d, "loss": chinchilla(n, d) * noise})
            truth = PLANTED["chinchilla"][2]
        found = laws.fit(problem, "", 20, seed, lambda parameters: {})
        inside.append([found.parameters[name][1] <= x <= found.parameters[name][2] for name, x in truth.items()])
    assert np.mean(inside) > 0.75, np.mean(inside, axis=0)


@pytest.mark.parametrize("form, text, said", [
    ("chinchilla", "params,tokens,loss\n1e7,1e9,3\n2e7,1e9,2.9\n", "5 parameters needs 6 points or more; there are 2"),
    ("chinchilla", "params,token,loss\n1,2,3\n", "has no column 'tokens'; nearest valid: 'token'"),
    ("chinchilla", "", "has no column 'params'"),
    ("chinchilla", "params,tokens,loss\n1e7,many,3\n", "row 2: tokens='many': must be a finite number > 0"),
    ("chinchilla", "params,tokens,loss\n1e7,-1,3\n", "row 2: tokens='-1': must be a finite number > 0"),
    ("chinchilla", "params,tokens,loss\n1e7,3\n", "row 2 has 2 values for 3 columns"),
    ("chinchilla", "params,tokens,loss\n" + "1e7,1e9,3\n" * 8, "params needs 3 different values or more; there is 1"),
    ("efficient-lm", "model,compute,loss\n" + "sparse,1e7,3\n" * 8, "'sparse', which must be dense or moe"),
    ("chinchilla", "params,tokens,loss\n\n\n1e7,many,3\n", "row 4: tokens='many'"),
    ("chinchilla", "params,tokens,loss\n" + "".join(f"{n}e7,{20 * n}e7,{4 - n / 9}\n" for n in range(1, 9)),
     "columns params, tokens: one follows from the others"),
    ("efficient-lm", "model,compute,loss\n" + "".join(f"{m},1e{c},3\n" for m in ("dense", "moe") for c in (7, 8, 9)),
     "all values are 3, which tells nothing of a law"),
    ("cmr", "ratio,tokens,rise\n2,1e9,0.1\n0.1,1e9,-0.1\n0.2,1e9,0\n0.3,1e9,0\n", "ratio has 2, which must be ≤ 1"),
    ("mnmt", "domain,weight,params,loss\nfr,0.1,1e7,2\nfr,0.1,1e8,2\nfr,0.1,1e9,2\nfr,0.1,1e9,2\nde,1,1,1\n",
     "needs 4 points or more for domain de; there is 1"),
])  # fmt: skip
def test_bad_points(form, text, said, tmp_path):
    (tmp_path / "points.csv").write_text(text, encoding="utf-8")
    with pytest.raises((UserError, FileError)) as error:
        forms.FORMS[form](tmp_path / "points.csv", Asked(0))
    assert said in str(error.value)
