"""Texts of a label: samples, scores, and a whole run with its data, held-out text and saved settings."""

import dataclasses
import json
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from scipy import special

from moe_jax import config, data
from moe_jax.errors import ConfigError, UserError
from moe_jax.evaluate import held_out, loglikelihood, opened, passes
from moe_jax.evaluate.generate import generate
from moe_jax.parallel import sharding
from moe_jax.run import config_file, weights
from moe_jax.train.state import init_state, put_batch
from tests.labelled import M, labelled, state_on
from tests.test_contrast import evaluate

slow = pytest.mark.slow


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
