"""A run opened from Python: each method against the plain model, `eval.py`'s counts, and from another folder."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_jax
from moe_jax import config, data, model
from moe_jax.errors import CheckpointError, ConfigError
from moe_jax.evaluate import held_out, loglikelihood
from moe_jax.moe.layer import TokenInfo
from moe_jax.nn.layers import rms_norm
from moe_jax.parallel import sharding
from moe_jax.run import weights

REPO = Path(__file__).parents[1]
TEXTS = ["the old river bends", "and", "the light is low, and ä"]
FIRST = 256  # the bytes tokenizer's end of text, which begins a document


def config_of(folder: Path, balance: float = 0.01, **moe) -> config.RunConfig:
    cfg = config.default_config()
    files = lambda name: config.source(kind="files", path=f"{folder}/{name}/*.txt", validation_fraction=0.5)
    cfg.data.sources = {name: files(name) for name in ("prose", "numbers")}
    cfg.data.update(batch_size=8, seq_len=32, cache_dir=str(folder / "cache"))
    cfg.model.update(vocab_size=260, d_model=32, num_layers=3, num_dense_layers=1, num_heads=2, num_kv_heads=2)
    cfg.model.update(head_dim=16, d_ff=48, compute_dtype="float32", init_std=0.2)
    cfg.model.moe.update(num_experts=4, d_expert=32, **moe)
    cfg.loss.load_balance_coef = balance
    cfg.sample.update(tokens=0 if moe.get("choice") == "expert" else 5, prompt="the ")
    return config.build(cfg)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("opened"))


def write_run(root: Path) -> Path:
    """Writes a run directory of fresh weights, with two domains of text beside it."""
    words = {"prose": "the old river bends and the light is low".split(), "numbers": [str(n) for n in range(90, 110)]}
    for name, choices in words.items():
        (root / name).mkdir(parents=True)
        for i in range(12):
            text = " ".join(np.random.default_rng(i).choice(choices, 5 + i)) + "\n"
            (root / name / f"{i}.txt").write_text(text, encoding="utf-8")
    cfg = config_of(root)
    weights.save_weights(root / "run", cfg, *model.init(cfg.model, jax.random.key(0)), [{"event": "test"}])
    return root


@pytest.fixture(scope="module")
def opened(folder):
    return moe_jax.load(folder / "run", mesh=sharding.make_mesh((1, 1, 1), jax.devices()[:1]))


def plain(run, text: str) -> model.Output:
    """The output of the model for one text alone, without padding and without a mesh."""
    ids = jnp.asarray([[FIRST, *text.encode()]])
    info = TokenInfo(jnp.ones(ids.shape, bool), jnp.zeros_like(ids))
    inputs = model.Inputs(ids, jnp.arange(ids.shape[1])[None], None, info)
    program = dataclasses.replace(model.transformer.REFERENCE, record=True, residual=True)
    net = model.abstract(run.model, program).bind(
        *jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), (run.params, run.router_bias))
    )
    return jax.jit(lambda inputs: net(inputs))(inputs), net


def test_logits_and_routing_are_those_of_the_plain_model(opened):
    logits, found = opened.logits(TEXTS[2:]), opened.routing(TEXTS[2])
    out, net = plain(opened, TEXTS[2])
    np.testing.assert_allclose(logits[0], out.hidden[0] @ net.head[...].T, atol=2e-5)
    assert found.tokens[:4] == ["<|endoftext|>", "t", "h", "e"] and found.tokens[-2:] == ["ä", "ä"]
    assert found.ids.tolist() == [FIRST, *TEXTS[2].encode()] and found.layers.tolist() == [1, 2]
    np.testing.assert_array_equal(found.experts, out.choices["layers"].experts[:, 0])
    np.testing.assert_allclose(found.weights, out.choices["layers"].weights[:, 0], atol=1e-5)


@pytest.mark.slow
def test_hidden_states_and_scores(folder):
    """Texts of several lengths, on eight devices."""
    opened, ends = moe_jax.load(folder / "run"), [" the", "?", "ö"]
    normed, stream, scores = opened.hidden(TEXTS), opened.hidden(TEXTS, 2), opened.score(TEXTS, ends)
    for i, text in enumerate(TEXTS):
        out, net = plain(opened, text)
        np.testing.assert_allclose(normed[i], out.hidden[0], atol=2e-5)
        np.testing.assert_allclose(stream[i], out.residual["layers"][0, 0], atol=2e-5)
    last = rms_norm(opened.hidden(TEXTS[2], 3), net.final_norm[...], opened.model.norm_eps)
    np.testing.assert_allclose(last, out.hidden[0], atol=2e-5)
    embedded = np.asarray(opened.params["embed"])[np.array([FIRST, *b"and"])]
    np.testing.assert_array_equal(opened.hidden("and", 0), embedded)
    for text, end, score in zip(TEXTS, ends, scores, strict=True):
        size, ids = len(end.encode()), list((text + end).encode())
        log_p = jax.nn.log_softmax(opened.logits(ids))
        places = range(len(ids) - size, len(ids))
        np.testing.assert_allclose(score.token_logprobs, [log_p[i - 1, ids[i]] for i in places], atol=1e-4)
        assert score.logprob == pytest.approx(float(np.sum(score.token_logprobs)), abs=1e-4)
        assert score.greedy == all(int(log_p[i - 1].argmax()) == ids[i] for i in places)
        again = opened.score(ids[:-size], log_p[len(ids) - size - 1 :][:1].argmax(-1).tolist())
        assert again.greedy and len(again.token_logprobs) == 1
    whole = opened.generate(["the ", "a"], 4, temperature=0.0)
    assert whole == [opened.generate(text, 4, temperature=0.0) for text in ("the ", "a")]
    assert whole[0].startswith("the ") and len(opened.generate("the ")) >= len("the ")


def test_one_text_or_ids_and_bad_input(opened, folder, tmp_path):
    ids = [FIRST, *b"and"]
    assert opened.encode("and") == ids and opened.logits([]) == []
    np.testing.assert_array_equal(opened.logits("and"), opened.logits(np.array(ids)))
    np.testing.assert_array_equal(opened.logits("and"), opened.logits([ids])[0])
    for call, message in (
        (lambda: opened.logits([[300]]), "token id 300: must be ≥ 0 and < model.vocab_size=260"),
        (lambda: opened.hidden("a", 4), "layer=4: must be from 0 to 3, or −1; nearest valid: 3"),
        (lambda: opened.score("a", [" b"]), "one context and one continuation, or a list of each"),
        (lambda: opened.score("a", [97]), "takes texts, or token ids of both"),
        (lambda: opened.score("a ", ""), "the continuation '' has no tokens"),
        (lambda: opened.generate("a", temperature=-1.0), "temperature"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            call()
    (tmp_path / "empty").mkdir()
    for path, message in (
        (folder / "rum", "no such directory; nearest valid: '.*run'"),
        (tmp_path / "empty", "is neither a run directory nor a model of Hugging Face"),
    ):
        with pytest.raises(CheckpointError, match=message):
            moe_jax.load(path)
    with pytest.raises(CheckpointError, match="has no step 7; it has 0"):
        moe_jax.load(folder / "run", step=7)
    with pytest.raises(CheckpointError, match="no average of the weights"):
        moe_jax.load(folder / "run", average=True)
    with pytest.raises(ConfigError, match="compute_dtype='float16': must be one of"):
        moe_jax.load(folder / "run", compute_dtype="float16")


@pytest.mark.slow
def test_texts_of_a_call_do_not_limit_each_other(folder, tmp_path):
    """A long prompt leaves a short one its tokens; the batches of the training divide nothing here."""
    cfg = config_of(folder)
    cfg = dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, max_seq_len=40),
        train=dataclasses.replace(cfg.train, micro_batches=8),
        loss=dataclasses.replace(cfg.loss, balance_batch=4),
    )
    weights.save_weights(tmp_path / "run", cfg, *model.init(cfg.model, jax.random.key(0)), [])
    run = moe_jax.load(tmp_path / "run", mesh=sharding.make_mesh((1, 1, 1), jax.devices()[:1]))
    prompts = [[FIRST, 97, 98], [7] * 37, [9] * 40]
    found = run.generate(prompts, 12, temperature=0.0)
    assert found == [run.generate(prompt, 12, temperature=0.0) for prompt in prompts]
    counts = []
    for sizes in ((3, 1), (20, 3), (30, 10)):
        context, end = (list(range(1, size + 1)) for size in sizes)
        want = np.asarray(jax.nn.log_softmax(run.logits([*context, *end])))[sizes[0] - 1 : -1]
        np.testing.assert_allclose(run.score(context, end).token_logprobs, want[range(len(end)), end], atol=1e-4)
        counts.append(loglikelihood._scorer.cache_info().currsize)
    for length in range(21, 29):
        run.score([5] * length, [6])
    assert loglikelihood._scorer.cache_info().currsize == counts[-1]  # no program for each length


@pytest.mark.slow
def test_routing_is_what_eval_counts(folder):
    """Over every row that eval.py reads, on another mesh: by the ids of each document in it."""
    run = moe_jax.load(folder / "run")
    cfg, shape = config.for_evaluation(run.cfg, jax.device_count())
    corpus = data.prepare(cfg.data, workdir=None, seed=cfg.seed)
    mesh = sharding.make_mesh(shape)
    result = held_out.evaluate(cfg, mesh, run.params, run.router_bias, corpus, progress=False)
    counts = np.zeros(result.router["layers"].tokens_per_expert.shape)
    texts, domains = [], []
    for batch in corpus.validation_batches(list(range(cfg.data.batch_size)), 0):
        for tokens, segments, of in zip(batch["tokens"], batch["segment_ids"], batch["domain_ids"], strict=True):
            for k in range(1, segments.max() + 1):
                texts.append(tokens[segments == k])
                domains.append(of[segments == k])
    for found, of in zip(run.routing(texts), domains, strict=True):
        for layer in range(2):
            np.add.at(counts[layer], (np.repeat(of, 2), found.experts[layer].reshape(-1)), 1)
    assert counts.sum() > 1000
    np.testing.assert_array_equal(counts, result.router["layers"].tokens_per_expert)


def test_names_are_lazy():
    code = "import sys, moe_jax; assert 'jax' not in sys.modules; print(*dir(moe_jax))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, encoding="utf-8", check=True)
    assert set(moe_jax.__all__) <= set(done.stdout.split())
    for name in moe_jax.__all__:
        assert callable(getattr(moe_jax, name))
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        getattr(moe_jax, "lo" + "de")
