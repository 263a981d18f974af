"""What transforms refuse, before anything is computed: models, numbers, scores."""

import dataclasses
import json
import re

import numpy as np
import pytest

from moe_jax import upcycle
from moe_jax.config import ModelConfig
from moe_jax.errors import ConfigError, FileError
from moe_jax.upcycle import Beside, Cluster, Depth, Grow, Importance, Mask, Merge, Prune, VirtualGroups, Width
from moe_jax.upcycle.convert import _given_scores
from tests.upcycle_source import BANK, SOURCE, bank, scores_of


def moe_of(**fields) -> ModelConfig:
    layers = fields.pop("layers", BANK.layers)
    return dataclasses.replace(BANK, layers=layers, moe=dataclasses.replace(BANK.moe, **fields))


UNBIASED = dataclasses.replace(BANK.moe, selection_bias=False)
TABLES = dataclasses.replace(BANK, num_layers=4, layers="2*(dense table)", moe=UNBIASED)
MEMORY = dataclasses.replace(SOURCE, num_dense_layers=0, layers="dense memory")
LATE = dataclasses.replace(BANK, num_layers=6, layers="3*(late dense)")
WINDOWS = dataclasses.replace(BANK, num_layers=6, layers="3*(dense moe)", window=4, attention_layers="window 2*full")
PYRAMID = moe_of(num_experts=32, layers="moe dense moe:8")
POOLS = moe_of(pool_min=2, pool_max=4, pool_from="all", selection_bias=False)
SKIPS = moe_of(identity_experts=1)
TOPK = moe_of(score="softmax", score_order="topk_score", renormalize=False)
REFUSED = [
    (Prune(1), BANK, "upcycle.prune=1: must be in [2, 4]"),
    (Prune(5), BANK, "upcycle.prune=5: must be in [2, 4]"),
    (Prune(3), moe_of(layers="moe dense moe:6"), "upcycle.prune=3: must be a multiple of 2"),
    (Prune(2), SOURCE, "it has no experts"),
    (Prune(2), TABLES, "the model has layers='2*(dense table)': tables name experts"),
    (Prune(2), moe_of(num_groups=2), "the model has moe.num_groups=2: groups of experts"),
    (Prune(2), POOLS, "upcycle.prune=2: makes a model with pool_max=4, which must be from pool_min=2 to num_experts=2"),
    (Prune(4), PYRAMID, "upcycle.prune=4: must be in [8, 32]"),
    (Prune(2), moe_of(choice="expert", selection_bias=False), "moe.choice='expert': experts that choose tokens"),
    (Grow(3), BANK, "upcycle.grow=3: must be ≥ the model's num_experts=4"),
    (Grow(8), TOPK, "the model has moe.score_order='topk_score': a bias closes only"),
    (Grow(8), moe_of(score="sqrt_softplus"), "moe.score='sqrt_softplus': a bias"),
    (Grow(8), moe_of(choice="expert", selection_bias=False), "moe.choice='expert': a bias"),
    (Grow(8), TABLES, "tables name experts"),
    (Merge(2), moe_of(identity_experts=2), "moe.identity_experts=2: those of several models"),
    (Merge(2), TABLES, "tables name experts"),
    (Merge(2, layers="2*(dense moe)"), BANK, "upcycle.layers='2*(dense moe)': the models have experts and routers"),
    (Merge(2, top_k=9), BANK, "upcycle.top_k=9: must be in [1, 8]; nearest valid: 8"),
    (Merge(2, top_k=3), SOURCE, "upcycle.top_k=3: must be in [1, 2]"),
    (Merge(2), MEMORY, "memory blocks"),
    (Merge(0), SOURCE, "upcycle.sources=0: must be ≥ 1"),
    (Beside(4, 5), SOURCE, "upcycle.d_expert=5: must divide the dense d_ff=32"),
    (Beside(4, 8, init="ones"), SOURCE, "upcycle.init='ones': must be zero or copy"),
    (Beside(4, 8, layers="(late dense)"), SOURCE, "a late block has its feed-forward layer beside"),
    (Beside(4, 8, layers="2*table"), SOURCE, "upcycle.layers='2*table': the table"),
    (Beside(4, 8, moe={"router": "mlp"}), SOURCE, "upcycle.moe.router='mlp': has weights"),
    (Beside(4, 8, moe={"identity_experts": 2}), SOURCE, "upcycle.moe.identity_experts=2: has weights"),
    (Beside(4, 8, moe={"num_shared_experts": 2}), SOURCE, "upcycle.moe.num_shared_experts=2: is set by the transform"),
    (VirtualGroups(4, moe={"identity_experts": 2}), SOURCE, "upcycle.moe.identity_experts=2: is not a part"),
    (VirtualGroups(4, moe={"score": "sigmoid"}), SOURCE, "upcycle.moe.score='sigmoid': is set by the transform"),
    (Beside(4, 8), BANK, "the model is a Mixture of Experts already"),
    (Importance(4, 33), SOURCE, "upcycle.shared=33: must be in [0, 32]"),
    (Importance(4, 8, 15), SOURCE, "upcycle.d_expert=15: must be in [8, 14]"),
    (Importance(40), SOURCE, "upcycle.num_experts=40: 32 hidden units"),
    (Importance(4, layers="dense moe:8"), SOURCE, "upcycle.layers='dense moe:8': has no block with 4 experts"),
    (Importance(4, layers="moe table:8"), SOURCE, "a layer's hidden units are dealt to num_experts=4"),
    (Importance(4), MEMORY, "memory blocks"),
    (Importance(4), BANK, "the model is a Mixture of Experts already"),
    (Depth(0), BANK, "upcycle.depth=0: must be in [1, 9999]"),
    (Depth(5), LATE, "upcycle.depth=5: is no number of blocks of whole units"),
    (Depth(9, new="identity"), WINDOWS, "upcycle.depth=9: would give layers another attention than they have"),
    (Depth(7), WINDOWS, "'window 2*full'; nearest valid: 6"),
    (Depth(8), WINDOWS, "would give layers another attention"),
    (Depth(8, new="identity"), SKIPS, "upcycle.depth_new='identity': a layer with identity_experts=1"),
    (Width(32), BANK, "the model is a Mixture of Experts already"),
    (Mask(1.5), BANK, "upcycle.mask=1.5: must be in [0, 1]; nearest valid: 1.0"),
    (Mask(0.1), SOURCE, "upcycle.mask=0.1: needs a model with experts"),
    (VirtualGroups(2), BANK, "the model is a Mixture of Experts already"),
    (Cluster(4), BANK, "the model is a Mixture of Experts already"),
]  # fmt: skip


@pytest.mark.parametrize(("transform", "cfg", "said"), REFUSED, ids=range(len(REFUSED)))
def test_refused(transform, cfg, said):
    with pytest.raises(ConfigError) as raised:
        upcycle.final_config([transform], cfg)
    assert said in str(raised.value) and re.search("nearest valid|name dense and moe|put it after", str(raised.value))


def test_scores_are_checked_before_anything_is_computed():
    good = scores_of(BANK, 2)
    path = sorted(good)[0]
    cases = {
        "upcycle.scores=None: Prune needs scores": ([Prune(2)], None),
        "upcycle.scores='given': no transform of the chain uses scores": ([Mask(0.1)], good),
        "is not a block that is scored": ([Prune(2)], good | {"embed": np.ones(3)}),
        "upcycle.scores=None: must have the shape": ([Prune(2)], {k: v for k, v in good.items() if k != path}),
        "upcycle.scores=(1, 3): must have the shape": ([Prune(2)], good | {path: np.ones((1, 3))}),
        "has a score that is not a finite number": ([Prune(2)], good | {path: np.full(good[path].shape, np.nan)}),
        "each needs scores of another model": ([Prune(3), Prune(2)], good),
        "upcycle.from=1: the chain makes one model of 2": ([Merge(2)], None),
        "put it at the start of the chain": ([Mask(0.1), Merge(2)], None),
    }
    for said, (chain, scores) in cases.items():
        if "Prune(3)" in str(chain):
            chain = [Prune(4), Prune(2)]
        with pytest.raises(ConfigError) as raised:
            upcycle.apply(chain, *bank(), scores=scores)
        assert said in str(raised.value), said


def test_counts_of_an_evaluation(tmp_path):
    """Summed over domains; what is no such file, and what is of another model, is said in one line."""
    counts = [[[1, 2, 3, 4], [1, 1, 1, 1]], [[0] * 8, list(range(8))]]
    (tmp_path / "eval.json").write_text(json.dumps({"step": 7, "tokens_per_expert": counts}), encoding="utf-8")
    found, step = upcycle.read_counts(tmp_path, BANK)
    assert step == 7
    np.testing.assert_array_equal(np.concatenate([w[0] for w in found.values()]), [2, 3, 4, 5, *range(8)])
    for body in ("[]", "{}", '{"tokens_per_expert": 3}', '{"tokens_per_expert": [["a"]]}', "{", '{"step": "x"}',
                 '{"tokens_per_expert": [[[1], [2, 3]]]}'):  # fmt: skip
        (tmp_path / "bad.json").write_text(body, encoding="utf-8")
        with pytest.raises((FileError, ConfigError)):
            upcycle.read_counts(tmp_path / "bad.json", BANK)
    with pytest.raises(ConfigError, match="has 4 router columns"):
        upcycle.scores_by_block(BANK, [counts[1][0], counts[1][0]])
    with pytest.raises(FileError, match=r"eval\.py --workdir=.* writes it"):
        upcycle.read_counts(tmp_path.parent, BANK)


def test_scores_are_of_the_same_step(tmp_path):
    """Whether the run is named as --scores or by default; what another run has counted is taken as it is."""
    cfg, chain = VirtualGroups(4, 2, 2).config(SOURCE), [Prune(4)]
    other, run = tmp_path / "other", tmp_path / "run"
    for folder in (other, run):
        folder.mkdir()
        counts = {"step": 7, "tokens_per_expert": [[[1] * 8]] * 2}
        (folder / "eval.json").write_text(json.dumps(counts), encoding="utf-8")
    for scores in ("", str(run), run / "eval.json"):
        with pytest.raises(ConfigError, match=r"is of step 7, its weights of step 9; nearest valid: --from=.*run@7"):
            _given_scores(chain, cfg, scores, [(run, None)], [9])
        assert _given_scores(chain, cfg, scores, [(run, None)], [7])[1] == f"{scores or run}@7"
    assert _given_scores(chain, cfg, other, [(run, None)], [9])[1] == f"{other}@7"
