"""A Hugging Face directory opened from Python, against transformers; runs with adapters, averages and several steps."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from test_lora import write_runs
from test_opened import config_of, write_run

import moe_jax
from moe_jax import model
from moe_jax.data.tokenizers import train_bpe
from moe_jax.errors import CheckpointError, ConfigError
from moe_jax.nn import lora
from moe_jax.run import weights
from moe_jax.run.checkpoint import Checkpoints
from moe_jax.run.config_file import save_config
from moe_jax.train.state import init_state, parts_of
from moe_jax.tree import flatten, split

hf_models = pytest.importorskip("tests.hf_models" if __package__ else "hf_models")
MODELS, SIZE, TOKENS = hf_models.MODELS, hf_models.SIZE, hf_models.TOKENS
build, forward, saved = hf_models.build, hf_models.forward, hf_models.saved
torch, transformers = hf_models.torch, hf_models.transformers
pytestmark = pytest.mark.slow
QUIET = lambda line: None


@pytest.mark.parametrize("name", ["olmoe", "qwen3_moe"])
def test_everything_is_what_transformers_computes(name):
    run = moe_jax.load(saved(name), compute_dtype="float32", echo=QUIET)
    logits, chosen = forward(build(name), TOKENS)
    texts = [row[: 12 - i] for i, row in enumerate(TOKENS)]  # causal: a prefix has the same logits
    for i, (found, routing) in enumerate(zip(run.logits(texts), run.routing(texts), strict=True)):
        np.testing.assert_allclose(found, logits[i, : 12 - i], rtol=1e-4, atol=1e-4)
        assert routing.layers.tolist() == ([0, 1, 2] if name == "olmoe" else [1, 2])
        for layer, experts in zip(routing.experts, chosen, strict=True):
            of_text = experts.reshape(*TOKENS.shape, -1)[i, : 12 - i]
            np.testing.assert_array_equal(np.sort(layer, axis=-1), of_text)
    with torch.no_grad():
        states = build(name)(torch.tensor(TOKENS[:1], dtype=torch.long), output_hidden_states=True).hidden_states
    for layer, want in zip((0, 1, 2, -1), states, strict=True):
        np.testing.assert_allclose(run.hidden(TOKENS[0], layer), want[0].numpy(), rtol=1e-4, atol=1e-4)
    score, row = run.score(TOKENS[0, :8], TOKENS[0, 8:]), TOKENS[0]
    log_p = torch.log_softmax(torch.tensor(logits[0]), -1).numpy()
    assert score.logprob == pytest.approx(float(sum(log_p[i - 1, row[i]] for i in range(8, 12))), abs=1e-4)
    with pytest.raises(ValueError, match=r"no tokenizer: give token ids"):
        run.logits("a")
    with pytest.raises(CheckpointError, match="neither steps nor an average"):
        moe_jax.load(saved(name), average=True)


def test_texts_of_a_model_with_a_tokenizer(tmp_path):
    tokenizer = train_bpe(["the old river bends and the light is low"] * 9, 270)
    special = {"bos_token_id": tokenizer.end_of_text, "eos_token_id": tokenizer.end_of_text}
    fields = SIZE | MODELS["mixtral"][1] | special | {"vocab_size": tokenizer.vocab_size, "initializer_range": 0.2}
    torch.manual_seed(0)
    theirs = transformers.MixtralForCausalLM(transformers.MixtralConfig(**fields)).eval()
    theirs.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}), encoding="utf-8")
    run = moe_jax.load(tmp_path, compute_dtype="float32", echo=QUIET)
    ids = run.encode("the old light")
    assert ids == [tokenizer.end_of_text, *tokenizer.encode(["the old light"])[0]] and len(ids) > 2
    want = forward(theirs, [ids])[0][0]
    np.testing.assert_allclose(run.logits("the old light"), want, rtol=1e-4, atol=1e-4)
    routing = run.routing("the old light")
    assert "".join(routing.tokens[1:]) == "the old light" and routing.tokens[0] == "<|endoftext|>"
    np.testing.assert_allclose(routing.weights.sum(-1), 1.0, atol=1e-5)
    with torch.no_grad():
        out = theirs.generate(torch.tensor([ids]), max_new_tokens=5, do_sample=False, pad_token_id=0)
    whole, end = out[0].tolist(), tokenizer.end_of_text
    whole = whole[: whole.index(end, 1)] if end in whole[1:] else whole
    assert run.generate("the old light", 5, temperature=0.0) == tokenizer.decode(whole)


def test_a_run_of_adapters(tmp_path):
    root, cfg, _, _ = write_runs(tmp_path)
    run = moe_jax.load(root / "run", compute_dtype="float32")
    assert run.step == 1 and any(map(lora.is_adapter, flatten(run.params)))
    ids = [list(range(3, 12))]
    base = moe_jax.load(root / "base", compute_dtype="float32")
    adapters, rest = split(run.params, lora.is_adapter)
    jax.tree.map(np.testing.assert_array_equal, rest, base.params)
    with jax.set_mesh(run.mesh):
        base.params = lora.merge(base.params, adapters, cfg.model.lora.scale)
    np.testing.assert_allclose(run.logits(ids)[0], base.logits(ids)[0], rtol=1e-4, atol=1e-4)


def test_steps_and_the_average(tmp_path):
    cfg = config_of(write_run(tmp_path / "texts"))
    cfg = dataclasses.replace(cfg, optim=dataclasses.replace(cfg.optim, ema=0.9))
    mesh = moe_jax.make_mesh((1, 1, 1), jax.devices()[:1])
    state = init_state(cfg, mesh)
    save_config(tmp_path, cfg)
    moved = state._replace(params=jax.tree.map(lambda x: x + 1, state.params), step=state.step + 2)
    ema = jax.tree.map(lambda x: x + 3, parts_of(state.opt_state).ema)
    moved = moved._replace(opt_state=state.opt_state | {"ema": ema})
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, state, {}, wait=True)
        checkpoints.save(2, moved, {}, wait=True)
    for how, want, step in (({"step": 1}, 0, 1), ({}, 1, 2), ({"average": True}, 3, 2)):
        run = moe_jax.load(tmp_path, mesh=mesh, **how)
        assert run.step == step
        np.testing.assert_array_equal(run.params["embed"], state.params["embed"] + want)


@pytest.mark.parametrize("moe", [{"choice": "expert"}, {"compute": "capacity", "overflow": "score"}], ids=str)
def test_texts_do_not_depend_on_each_other(tmp_path, moe):
    """Also where routing would let them: experts that choose tokens, and experts of limited capacity."""
    cfg, said = config_of(write_run(tmp_path / "texts"), 0.0, **moe), []
    weights.save_weights(tmp_path / "run", cfg, *model.init(cfg.model, jax.random.key(0)), [])
    run = moe_jax.load(tmp_path / "run", echo=said.append)
    assert said == [] if "choice" in moe else "no token is dropped" in said[0]
    texts = ["the old river", "a", "the low light is"]
    for text, logits, routing in zip(texts, run.logits(texts), run.routing(texts), strict=True):
        np.testing.assert_allclose(logits, run.logits(text), atol=1e-5)
        assert routing.experts.shape == (2, len(text) + 1, 4 if "choice" in moe else 2)
        if "choice" in moe:
            counts = [(routing.experts == e).any(-1).sum(-1) for e in range(4)]
            assert np.ptp(counts) == 0
    if "choice" in moe:
        with pytest.raises(ConfigError, match=r"choice='expert': .* later tokens"):
            run.score("a", "b")
        with pytest.raises(ConfigError, match="choice='expert'"):
            run.generate("a", 3)
