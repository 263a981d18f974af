"""Evaluation with a part of the experts: which are kept, and what is left against a model that is pruned to them."""

import dataclasses
import itertools
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from test_contrast import evaluate, planted  # noqa: F401 (a fixture)
from test_invariance import B, S, V, run_config
from test_pools import pooled

from moe_jax import upcycle
from moe_jax.errors import UserError
from moe_jax.evaluate import held_out, subsets, switches
from moe_jax.parallel import sharding
from moe_jax.train.state import init_state
from moe_jax.tree import join, split

DOMAINS = ("code", "prose", "letters")  # of the last there is no training text


def rows_of(seed: int, domains: list[int]) -> dict[str, np.ndarray]:
    """A batch whose sequences are of these domains in turn, each with words of its own."""
    rng = np.random.default_rng(seed)
    domain = np.resize(domains, B)[:, None]
    tokens = (domain * 12 + rng.integers(0, 16, (B, S + 1))).astype(np.int32) % V
    ones = np.ones((B, S), np.int32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": ones.astype(np.float32),
            "segment_ids": ones, "positions": np.tile(np.arange(S, dtype=np.int32), (B, 1)),
            "domain_ids": domain * ones, "sequence_ids": np.arange(B, dtype=np.int32)}  # fmt: skip


class Rows:
    """An endless iterator of training batches."""

    def __init__(self):
        self._seeds = itertools.count()

    def __next__(self):
        return rows_of(next(self._seeds), [0, 1])

    def close(self):
        pass


CORPUS = SimpleNamespace(
    domains=DOMAINS, bytes_per_token=(3.0, 4.0, 5.0), train_iterator=lambda rows: Rows(),
    validation_batches=lambda rows, limit: iter([rows_of(100, [0]), rows_of(101, [1, 0]), rows_of(102, [2])]),
    num_validation_batches=lambda limit: 3, num_validation_rows=lambda limit=0: 3 * B,
)  # fmt: skip


@pytest.fixture(scope="module")
def opened():
    cfg = pooled()
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, num_layers=1))
    mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
    state = init_state(cfg, mesh)
    return cfg, mesh, state.params, state.router_bias, CORPUS


@pytest.mark.slow
def test_what_is_left_is_a_pruned_model(opened):
    """All experts: the losses of the whole model. A half: those of a model of the kept experts alone, each domain with
    its own; pools, which this model has, limit nothing further."""
    cfg, mesh, params, bias, corpus = opened
    use = subsets.measure_use(*opened, 2, progress=False)
    found = subsets.evaluate(*opened, use, (0.5, 1.0), progress=False)
    assert found.domains == DOMAINS[:2] and found.kept == [[8], [4]] and found.tokens.sum() == 2 * B * S
    plain = pooled(moe=dict.fromkeys(("pool_min", "pool_max", "pool_size", "pool_prefix"), 0) | {"pool_from": ""})
    plain = dataclasses.replace(plain, model=dataclasses.replace(plain.model, num_layers=1))
    assert not subsets.without_pools(cfg).model.moe.takes_pools
    (one,) = use
    assert one[2].sum() == 0 and np.allclose(one[:2].sum(1), 1) and set(np.argsort(one[0])[4:]) != set(
        np.argsort(one[1])[4:])  # fmt: skip
    whole = held_out.evaluate(plain, mesh, params, bias, corpus, progress=False)
    np.testing.assert_allclose(found.nll[0], whole.nll[:2], rtol=1e-6)
    for g, domain in enumerate(DOMAINS[:2]):
        with jax.set_mesh(mesh):
            scores = upcycle.scores_by_block(plain.model, [one[g]])
            model, kept = upcycle.apply([upcycle.Prune(4)], plain.model, join(params, bias), scores=scores)
        left = dataclasses.replace(plain, model=model)
        own = split(kept, lambda path: path.endswith("/router_bias"))[::-1]
        pruned = held_out.evaluate(left, mesh, *own, corpus, progress=False)
        np.testing.assert_allclose(found.nll[1, g], pruned.nll[g], rtol=1e-5)
        off = switches.parse(found.off[domain][1], plain.model)["layers"][0]  # the line is for `eval.py --experts`
        assert found.off[domain][0] == "" and set(np.flatnonzero(off < 0)) == set(np.argsort(one[g])[:4])
    by_code = subsets.evaluate(*opened, use, (1.0, 0.5), "code", progress=False)
    assert by_code.domains == DOMAINS and by_code.nll[1, 0] == pytest.approx(found.nll[1, 0])
    assert by_code.nll[1, 1] != pytest.approx(found.nll[1, 1], rel=1e-6)
    with pytest.raises(UserError, match="keep_by=letters: none of its text"):
        subsets.evaluate(*opened, use, (1.0,), "letters", progress=False)
    with pytest.raises(UserError, match=r"keep_experts=12.5: keeps 1 of 8 experts of layer 0, .* chooses 2;.* 25$"):
        subsets.evaluate(*opened, use, (1.0, 0.125), progress=False)
    body = json.loads(subsets.to_json(found, 7, 2, {}))
    assert body["domains_without_text"] == ["letters"] and "not evaluated here" not in subsets.table(by_code)
    assert body["domains"][0]["perplexity"] == found.perplexity("code") and body["mean"] == found.mean
    text = subsets.table(found)
    assert text.splitlines()[0].split() == ["perplexity", "tokens", "100", "%", "50", "%"]
    assert "nor in the rows of all domains: letters (nothing is held out, or was in the training text" in text
    assert "experts of a layer: 8; 4" in text and f"{found.mean[1]:.2f}" in text
    assert subsets.figure(found).axes[0].get_xlabel() == "experts of a layer that are kept"


def test_which_experts_are_kept():
    """The most used; as many of each shard group; identity experts always. Fewer than a token chooses are refused."""
    model = run_config().model
    of = lambda **moe: dataclasses.replace(
        model, num_dense_layers=0, num_layers=2,
        moe=dataclasses.replace(model.moe, **{"num_experts": 8, "selection_bias": False} | moe),
    )  # fmt: skip
    use = [np.arange(8.0), np.float64([5, 5, 0, 0, 0, 0, 0, 9])]
    kept = lambda model, share: [
        sorted({*range(8)} - {e for i, e in subsets.switched_off(model, use, share) if i == layer}) for layer in (0, 1)
    ]
    assert kept(of(), 0.5) == [[4, 5, 6, 7], [0, 1, 2, 7]] and kept(of(), 1.0) == [[*range(8)]] * 2
    assert kept(of(top_k=4, shard_groups=2), 0.5) == [[4, 5, 6, 7], [0, 1, 2, 7]]
    for moe, near in (({"top_k": 3}, "37.5"), ({"top_k": 4, "shard_groups": 2}, "50")):
        subsets.check_shares(of(**moe), (1.0, float(near) / 100))
        with pytest.raises(UserError, match=rf"--keep_experts=25: keeps 2 of 8 experts .*nearest valid: {near}$"):
            subsets.check_shares(of(**moe), (1.0, 0.25))
    assert kept(of(label_groups=2), 0.75) == [[1, 2, 3, 5, 6, 7], [0, 1, 2, 4, 5, 7]]
    subsets.check_shares(of(label_groups=2), (0.5,))
    with pytest.raises(UserError, match=r"--keep_experts=25: keeps 2 of 8 experts .*nearest valid: 50$"):
        subsets.check_shares(of(label_groups=2), (0.25,))
    use = [np.arange(10.0), np.arange(10.0)]
    assert kept(of(identity_experts=2), 0.25) == [[6, 7]] * 2


@pytest.mark.slow
def test_eval_keeps_experts(planted):  # noqa: F811
    """The command writes its own files."""
    run = planted / "planted"
    said = evaluate(planted, "--keep_experts=50", "--keep_batches=2", "--batches=1")
    body = json.loads((run / "subsets.0.1batches.json").read_text(encoding="utf-8"))
    assert "checkpoint of step 0, mesh" in said  # after what has changed in the data
    assert body["shares"] == [1.0, 0.5] and body["kept"] == [[4, 4], [2, 2]] and "perplexity" in said
    assert (run / "figures" / "subsets.0.1batches.png").stat().st_size > 5000
