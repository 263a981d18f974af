"""Log-likelihoods of continuations against transformers, a row at a time: on meshes, cut on the left, and long."""

import dataclasses
import functools
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest

from moe_jax import config
from moe_jax.data.tokenizers import BytesTokenizer
from moe_jax.errors import ConfigError
from moe_jax.evaluate import loglikelihood
from moe_jax.evaluate.loglikelihood import Request, encode, encode_text, score
from moe_jax.hf import import_model
from moe_jax.parallel import sharding
from moe_jax.run import weights
from moe_jax.train.state import abstract_weights
from tests import two_processes

hf_models = pytest.importorskip("tests.hf_models" if __package__ else "hf_models")
build, saved, torch = hf_models.build, hf_models.saved, hf_models.torch
LONGEST = 24


@functools.cache
def mesh_of(*shape):
    return sharding.make_mesh(shape, jax.devices()[: int(np.prod(shape))])


@functools.cache
def opened(name, shape=(1, 1, 2)):
    """(cfg, mesh, params, bias) of a tiny model of transformers, in float32."""
    workdir, mesh = Path(tempfile.mkdtemp(prefix="score-")) / "run", mesh_of(*shape)
    cfg = import_model(saved(name), workdir, seq_len=LONGEST, mesh=mesh, echo=lambda line: None)
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, compute_dtype="float32"))
    params, bias, _ = weights.load_weights(workdir, *abstract_weights(cfg.model, mesh))
    return cfg, mesh, params, bias


def requests() -> list[Request]:
    """Requests of many lengths: 40 that fit, some whose context is cut, and two longer than a sequence."""
    rng = np.random.default_rng(3)
    sizes = [(int(c), int(k)) for c, k in rng.integers(1, 12, (40, 2))] + [
        (30, 5),
        (20, 5),
        (24, 1),
        (3, 24),
        (1, 70),
        (9, 50),
    ]
    draw = lambda n: rng.integers(0, 96, n).astype(np.int32)
    return [Request(draw(c), draw(k)) for c, k in sizes]


def oracle(logits_of, request: Request) -> tuple[np.ndarray, bool, int]:
    """One row at a time, without padding: every window that lm-eval's rule makes of a request."""
    context, continuation = request.context.tolist(), request.continuation.tolist()
    out, best, cut, at = [], True, None, 0
    while at < len(continuation):
        more = min(LONGEST, len(continuation) - at)
        ids = (context + continuation[: at + more])[-(LONGEST + 1) :]
        cut = max(len(context) + more - (LONGEST + 1), 0) if cut is None else cut
        logits = logits_of(ids[:-1])[-more:].astype(np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        out += log_p[np.arange(more), ids[-more:]].tolist()
        best &= bool((logits.argmax(-1) == ids[-more:]).all())
        at += more
    return np.asarray(out), best, cut


def check(got, want):
    for one, (nats, greedy, cut) in zip(got, want, strict=True):
        np.testing.assert_allclose(one.token_logprobs, nats, atol=1e-4)
        assert abs(one.logprob - nats.sum()) < 1e-4 * max(1, len(nats)) and (one.greedy, one.cut) == (greedy, cut)
    total = np.asarray([[one.logprob, want_one[0].sum()] for one, want_one in zip(got, want, strict=True)])
    of_four = total[:40].reshape(10, 4, 2)  # as choices of ten questions
    assert (of_four[..., 0].argmax(1) == of_four[..., 1].argmax(1)).all()


def by_transformers(name):
    def logits_of(ids):
        with torch.no_grad():
            return build(name)(torch.tensor([ids]), use_cache=False).logits[0].numpy()

    return logits_of


def most_probable(name) -> Request:
    """A continuation of most probable tokens."""
    ids = [5]
    for _ in range(3):
        ids.append(int(by_transformers(name)(ids)[-1].argmax()))
    return Request(np.asarray(ids[:1], np.int32), np.asarray(ids[1:], np.int32))


def compare(name, shape):
    asked = [*requests(), most_probable(name)]
    want = [oracle(by_transformers(name), r) for r in asked]
    got = score(*opened(name, shape), asked)
    check(got, want)
    assert [s.pieces for s in got[-4:]] == [1, 3, 3, 1] and got[40].cut == 10
    assert [s.greedy for s in got] == [False] * (len(got) - 1) + [True]


def test_scores_are_those_of_transformers():
    """Experts on two devices give log-likelihoods to 1e-4, the same choices, the same context cut."""
    compare("olmoe", (1, 1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("name, shape", [("smollm2", (8, 1, 1)), ("moonlight", (2, 2, 2)), ("qwen3_moe", (1, 1, 1))])
def test_scores_on_more_meshes(name, shape):
    compare(name, shape)


def test_text_is_divided_after_the_context():
    """lm-eval's rule: encoded together, spaces at the end of the context belong to the continuation."""
    tokenizer = BytesTokenizer()
    a, b, c = encode(tokenizer, [("Q: x", " yes"), ("Q: x \n", "yes"), ("", "é")])
    decode = lambda ids: bytes(ids.tolist()).decode()
    assert (decode(a.context), decode(a.continuation), a.text) == ("Q: x", " yes", " yes")
    assert (decode(b.context), decode(b.continuation), b.text) == ("Q: x", " \nyes", " \nyes")
    assert c.context.tolist() == [tokenizer.end_of_text] and decode(c.continuation) == "é"
    whole = encode_text(tokenizer, "ab")
    assert whole.context.tolist() == [256] and whole.continuation.tolist() == [97, 98]


def test_a_score_that_depends_on_its_neighbours_is_refused():
    cfg = config.RunConfig()
    capacity = dataclasses.replace(cfg.model, moe=dataclasses.replace(cfg.model.moe, compute="capacity"))
    with pytest.raises(ConfigError, match=r"config.model.moe.compute='capacity': .* other sequences .*compute=grouped"):
        loglikelihood.check(dataclasses.replace(cfg, model=capacity))
    moe = dataclasses.replace(cfg.model.moe, choice="expert", selection_bias=False)
    loss, sample = dataclasses.replace(cfg.loss, load_balance_coef=0.0), dataclasses.replace(cfg.sample, tokens=0)
    with pytest.raises(ConfigError, match=r"config.model.moe.choice='expert': .* later tokens"):
        model = dataclasses.replace(cfg.model, moe=moe)
        loglikelihood.check(dataclasses.replace(cfg, loss=loss, sample=sample, model=model))


PROCESSES = """
import dataclasses, json
import numpy as np
from moe_jax import config, model
from moe_jax.evaluate import switches
from moe_jax.evaluate.loglikelihood import Request, score
from moe_jax.parallel import sharding

def scores(devices, shape):
    moe = config.MoEConfig(num_experts=4, top_k=2, d_expert=16)
    small = dict(d_model=16, num_layers=1, num_heads=2, num_kv_heads=1, vocab_size=264, compute_dtype="float32")
    cfg = config.RunConfig(model=config.ModelConfig(**small, moe=moe), data=config.DataConfig(batch_size=8, seq_len=16))
    mesh, rng = sharding.make_mesh(shape, devices), np.random.default_rng(0)
    with jax.set_mesh(mesh):
        params, bias = model.init(cfg.model, jax.random.key(0))
    draw = lambda n: rng.integers(0, 264, n).astype(np.int32)
    asked = [Request(draw(a), draw(b)) for a, b in ((3, 2), (9, 30), (20, 4))]
    tables = (None, switches.parse("off:0/1 on:0/3", cfg.model))
    return [one.logprob for its in tables for one in score(cfg, mesh, params, bias, asked, switches=its)]
"""


@pytest.mark.slow
def test_two_processes():
    """Each process has all the scores, those of one device, also with experts switched off and on."""
    names = {"jax": jax}
    exec(PROCESSES, names)
    want = names["scores"](jax.devices()[:1], (1, 1, 1))
    assert all(plain != switched for plain, switched in zip(want[:3], want[3:], strict=True))
    two_processes.run(PROCESSES + f"np.testing.assert_allclose(scores(jax.devices(), (2, 2, 2)), {want}, rtol=1e-5)\n")
