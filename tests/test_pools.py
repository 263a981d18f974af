"""Document pools in a model: on meshes, in evaluation, samples and scores. One layer is in test_pools_layer.py."""

import dataclasses
import functools
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx
from scipy import special
from test_invariance import assert_same, batch_rows, run_config

from moe_jax import config, hf
from moe_jax.config import ExploreConfig, RampConfig
from moe_jax.errors import ConfigError
from moe_jax.evaluate import held_out, loglikelihood, overrides, passes
from moe_jax.evaluate.generate import generate
from moe_jax.moe.alone import MoELayer
from moe_jax.parallel import sharding
from moe_jax.run import weights
from moe_jax.train import knobs, step
from moe_jax.train.gradients import forward, make_gradients
from moe_jax.train.state import EvalSums, abstract_state, init_state, put_batch

OFF = {"pool_min": 0, "pool_max": 0, "pool_from": "", "pool_size": 0, "pool_prefix": 0}


def pooled(*args, moe=None, **kwargs) -> config.RunConfig:
    cfg = run_config(*args, balance_batch="1", **kwargs)
    own = {"selection_bias": False, "num_experts": 8, "pool_min": 2, "pool_max": 5, "pool_from": "prefix",
           "pool_size": 3, "pool_prefix": 2}  # fmt: skip
    routed = dataclasses.replace(cfg.model.moe, **own | (moe or {}))
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, num_layers=2, num_dense_layers=0, moe=routed))


@functools.cache
def state_on(shape):
    """The mesh and a fresh state on it; the values are those of one device."""
    mesh = sharding.make_mesh(shape, jax.devices()[: int(np.prod(shape))])
    if mesh.size == 1:
        return mesh, init_state(pooled(), mesh)
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(pooled(), mesh))
    return mesh, jax.device_put(jax.device_get(state_on((1, 1, 1))[1]), shardings)


def gradients_of(cfg, shape) -> dict:
    mesh, state = state_on(shape)
    with jax.set_mesh(mesh):
        batch = put_batch(batch_rows(0.25), mesh, cfg)
        return jax.device_get(jax.jit(make_gradients(cfg, mesh))(state.params, state.router_bias, batch, 1)._asdict())


@functools.cache
def oracle() -> dict:
    return gradients_of(pooled(), (1, 1, 1))


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("shape", "micro", "remat"),
    [((2, 2, 2), 2, "full"), pytest.param((8, 1, 1), 4, "selective", marks=slow)],
)
def test_invariance(shape, micro, remat):
    """In two layers. Of rows with one document the experts with a probability are its pool, of a size of its own."""
    assert_same(gradients_of(pooled(micro, remat, "grouped"), shape), oracle())
    sizes = (oracle()["sums"].router["layers"].prob_per_expert[:, :16] > 0).sum(-1)
    assert sizes.shape == (2, 16) and sizes.min() == 2 and sizes.max() == 5 and (sizes[0] != sizes[1]).any()


@slow
def test_pools_of_all_experts_are_the_plain_router():
    """Bit for bit: loss, statistics and every gradient."""
    plain, all_of_them = (gradients_of(pooled(moe=moe), (1, 1, 1)) for moe in (OFF, {"pool_min": 8, "pool_max": 8}))
    jax.tree.map(np.testing.assert_array_equal, all_of_them, plain)


@slow
def test_evaluation_takes_pools_from_prefixes_alone():
    """Logits of scored tokens do not depend on tokens after them, unless the whole document gives the pool: the leak.
    Tokens of a prefix are not scored, in any of the ways."""
    mesh, state = state_on((1, 1, 1))
    rows = batch_rows(0.0) | {"domain_ids": np.zeros((32, 8), np.int32)}
    rows["weights"][:] = 1
    changed = rows | {"tokens": rows["tokens"].copy()}
    changed["tokens"][:, 3::4] = 7  # the last token of each of the two documents of a row
    earlier = np.arange(8) % 4 < 3
    for way, moves in (("prefix", False), ("all", False), ("document", True)):
        cfg = pooled(moe={"pool_from": way, "pool_size": 0 if way == "all" else 3})
        graph = step.model.abstract(cfg.model)
        with jax.set_mesh(mesh):
            run = jax.jit(lambda batch, graph=graph: forward(graph, state.params, state.router_bias, batch)[0].hidden)
            one, other = (np.asarray(run(put_batch(r, mesh, cfg, by_domain=True))) for r in (rows, changed))
            assert (one[:, earlier] != other[:, earlier]).any() == moves
            evaluation = step.make_eval_step(cfg, mesh, 1)
            sums = evaluation(state.params, state.router_bias, put_batch(rows, mesh, cfg, by_domain=True))
        assert sums.tokens.sum() == 32 * 2 * 3  # of 4 tokens of a document the first predicts one of the prefix
        assert sums.left_out.tolist() == [32 * 2]


def of_two_stacks(way: str) -> config.RunConfig:
    cfg = pooled(moe={"pool_from": way, "pool_max": 4})
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, layers="moe:8 moe:4"))


@slow
def test_samples_and_scores_take_the_pool_of_the_prompt():
    """A text is written token by token, from prompts of different lengths, as one pass computes it whose pools are from
    as many first tokens; a continuation is scored alike. In layers of different numbers of experts."""
    mesh, cfg = state_on((1, 1, 1))[0], of_two_stacks("prefix")
    state = init_state(cfg, mesh)
    own = state.params, state.router_bias
    prompts, texts = [[5, 7, 2], [37, 22, 1, 12, 33], [43, 23, 18, 7, 10, 33, 38, 14]], []
    cfg = cfg.model
    short = dataclasses.replace(cfg, moe=dataclasses.replace(cfg.moe, pool_prefix=3))
    for prompt, out in zip(prompts, generate(cfg, mesh, *own, prompts, 4), strict=True):
        n = len(prompt)
        assert len(out) == n + 4
        seen = dataclasses.replace(cfg, moe=dataclasses.replace(cfg.moe, pool_prefix=n))
        (logits,) = passes.run(seen, mesh, *own, [out], "logits")
        best = np.sort(logits[n - 1 : -1], -1)
        assert (best[:, -1] - best[:, -2]).min() > 1e-4
        assert out[n:] == logits[n - 1 : -1].argmax(-1).tolist()
        if n > 3:  # the first three tokens, which all prompts have, would give other pools
            (others,) = passes.run(short, mesh, *own, [out], "logits")
            assert np.abs(others - logits).max() > 1e-3
        texts.append((prompt, out[n:], special.log_softmax(np.float64(logits), -1)))
    requests = [loglikelihood.Request(np.int32(prompt), np.int32(more)) for prompt, more, _ in texts]
    run = dataclasses.replace(pooled(), model=cfg, data=dataclasses.replace(pooled().data, batch_size=8, seq_len=16))
    by_document = dataclasses.replace(run, model=of_two_stacks("document").model)
    scores = [loglikelihood.score(each, mesh, *own, requests) for each in (run, by_document)]
    for one, other, (prompt, more, logs) in zip(*scores, texts, strict=True):
        want = [logs[len(prompt) - 1 + i, token] for i, token in enumerate(more)]
        np.testing.assert_allclose(one.token_logprobs, want, rtol=1e-4)
        np.testing.assert_array_equal(other.token_logprobs, one.token_logprobs)
    for size, more in ((1, 3), (9, 16)):  # a text without a context, and a continuation that leaves none
        alone = loglikelihood.Request(np.arange(1, 1 + size, dtype=np.int32), np.ones(more, np.int32))
        with pytest.raises(ConfigError, match=r"model\.moe\.pool_from='prefix': .* a single token"):
            loglikelihood.score(run, mesh, *own, [*requests, alone])
    (routed,) = passes.run(cfg, mesh, *own, [prompts[1]], "routing")
    assert all(len(np.unique(its)) <= 3 and its.max() < e for its, e in zip(routed[0], (8, 4), strict=True))


@slow
def test_export_says_that_pools_are_left_out(tmp_path):
    """The model that is written is that of a run without pools. Its own evaluation may take pools from elsewhere."""
    said, written = [], []
    for name, moe in (("pools", {}), ("plain", OFF)):
        cfg = pooled(moe=moe | {"num_shared_experts": 0})
        _, state = state_on((1, 1, 1))
        params = jax.device_get(state.params)
        del params["layers"]["moe"]["shared"]
        weights.save_weights(tmp_path / name, cfg, params, {}, [{"event": "test"}])
        hf.export_run(tmp_path / name, tmp_path / f"{name}_hf", echo=said.append)
        written.append([(tmp_path / f"{name}_hf" / file).read_bytes() for file in ("config.json", "model.safetensors")])
    assert written[0] == written[1] and sum("document pools are not exported" in line for line in said) == 1
    pairs = overrides.Overrides([("model.moe.pool_from", "document"), ("model.moe.pool_size", "4")])
    changed, names = overrides.apply(pooled(), pairs)
    assert changed.model.moe.pool_size == 4 and overrides.changes_results(names)  # its files have names of their own


def test_a_prefix_that_leaves_nothing_to_score_is_refused():
    """Before training, by the longest held-out document; after an evaluation, of what it has read."""
    stores = {("a", "train"): SimpleNamespace(offsets=[0, 90]), ("a", "validation"): SimpleNamespace(offsets=[0, 4, 9])}
    rows = batch_rows(0.0) | {"domain_ids": np.zeros((32, 8), np.int32)}
    corpus = SimpleNamespace(
        stores=stores, domains=("a",), bytes_per_token=(3.0,), num_validation_batches=lambda limit=0: 1,
        validation_batches=lambda rows_, limit: iter([rows]), num_validation_rows=lambda limit=0: 32,
    )  # fmt: skip
    held_out.check_held_out(corpus, 5)
    with pytest.raises(ConfigError, match=r"pool_prefix=6: leaves nothing to score .* 5 tokens; nearest valid: 5"):
        held_out.check_held_out(corpus, 6)
    cfg, (mesh, _) = pooled(), state_on((1, 1, 1))
    sums = EvalSums(np.zeros(1), np.zeros(1), {}, None, np.ones(1))
    result = lambda tokens: held_out.evaluate(
        cfg, mesh, {}, {}, corpus, progress=False, run=lambda *_: sums._replace(tokens=np.float64([tokens]))
    )
    with pytest.raises(ConfigError, match=r"model\.moe\.pool_prefix=2: leaves nothing to score"):
        result(0)
    assert "not scored: 25.0% of a" in held_out.table(result(3), {})
    assert json.loads(held_out.to_json(1, result(3), {}))["left_out_by_prefix"] == {"a": 0.25}


def test_the_step_draws_sizes():
    assert knobs.draws_noise(pooled()) and "from 2 to 5 experts" in knobs.describe(pooled())


def test_refused_in_a_run():
    cfg = pooled()
    with pytest.raises(ConfigError, match=r"model\.moe\.pool_min=2: is not available with explore\.random"):
        dataclasses.replace(cfg, explore=ExploreConfig(random=RampConfig(0.5, 0.0, 4)))
    with pytest.raises(ConfigError, match=r"explore\.top_k=3: as pool_min must be from top_k=3"):
        dataclasses.replace(cfg, explore=ExploreConfig(top_k=3))
    tables = {"layers": "moe table", "num_layers": 2}
    for fields, message in ((tables, "table blocks"), ({"num_dense_layers": 2}, "needs layers whose router chooses")):
        with pytest.raises(ConfigError, match=rf"pool_min=2: .*{message}"):
            dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, **fields))
    moe = dataclasses.replace(cfg.model.moe, pool_prefix=8)
    with pytest.raises(ConfigError, match=r"pool_prefix=8: must be < data\.seq_len=8"):
        dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, moe=moe))
    with pytest.raises(ConfigError, match=r"model\.moe\.pool_min=2: needs documents"):
        MoELayer(8, rngs=nnx.Rngs(0), num_experts=4, pool_min=2, pool_from="all")
