"""What travels with a model beside its weights, judged by transformers: special tokens, ids, where generation ends."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from test_begin_of_text import byte_level, folder_of, sentencepiece_model
from test_hf_files import mesh, write

from moe_jax import config
from moe_jax.config import ModelConfig, MoEConfig, TokenizerConfig
from moe_jax.data import tokenizers
from moe_jax.errors import FormatError
from moe_jax.hf import export_run, import_model
from moe_jax.run import weights
from moe_jax.train.state import abstract_weights

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

assert sentencepiece_model  # a fixture
QUIET = lambda line: None
MODEL = ModelConfig(vocab_size=264, d_model=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8,
                    moe=MoEConfig(num_experts=4, top_k=2, d_expert=8, renormalize=True))  # fmt: skip
OLMOE = dataclasses.replace(MODEL, qk_norm=True, qk_norm_over="projection",
                            moe=dataclasses.replace(MODEL.moe, renormalize=False))  # fmt: skip
QWEN = dataclasses.replace(MODEL, qk_norm=True)
FRONT = ("<s>",)
BPE = TokenizerConfig(kind="bpe", vocab_size=264)


def trained(folder, tokenizer, model=MODEL, events=(), make=None, **data):
    """A run directory as training leaves it, of random weights."""
    cfg = config.build({"model": config.to_dict(model), "data": {"tokenizer": config.to_dict(tokenizer), **data}})
    rng = np.random.default_rng(0)
    values = lambda x: jax.device_put(rng.normal(size=x.shape).astype(x.dtype), x.sharding)
    params, bias = (jax.tree.map(values, tree) for tree in abstract_weights(model, mesh()))
    weights.save_weights(folder, cfg, params, bias, [{"event": event} for event in events])
    made = tokenizers.load_or_make(tokenizer, folder, lambda: ["def add(a, b): return a + b\n" * 9])
    return made


def steered(folder, token):
    """The exported model, whose every next token is this one."""
    there = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        there.lm_head.weight.zero_()
        there.model.norm.weight.zero_()
        there.model.norm.forward = lambda x: torch.ones_like(x)
        there.lm_head.weight[token] = 1.0
    return there


def check_agrees(folder, ours):
    """transformers' tokenizer and generation have our special tokens, and nothing beyond the vocabulary."""
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    begin, end = (ours.end_of_text if ours.begin_of_text is None else ours.begin_of_text), ours.end_of_text
    assert (theirs.bos_token_id, theirs.eos_token_id) == (begin, end)
    said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert (said["bos_token_id"], said["eos_token_id"], len(theirs)) == (begin, end, ours.vocab_size)
    ids = theirs("return a").input_ids
    ids = ids[:-1] if ids[-1] == end else ids  # where a post-processor puts one behind
    first = [] if ours.begin_of_text is None else [begin]
    assert ids == [*first, *ours.encode(["return a"])[0]]
    there = steered(folder, end)
    assert there.generation_config.eos_token_id == end and there.generation_config.bos_token_id == begin
    made = there.generate(torch.tensor([ids]), max_new_tokens=5, do_sample=False)[0].tolist()
    assert made == [*ids, end]
    made = steered(folder, 2 if end != 2 else 3).generate(torch.tensor([ids]), max_new_tokens=5, do_sample=False)
    assert made.shape[1] == len(ids) + 5
    return theirs, said


slow = lambda *values: pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("model", [MODEL, slow(OLMOE), slow(QWEN)], ids=["mixtral", "olmoe", "qwen3_moe"])
def test_a_run_of_a_trained_tokenizer_ends_its_texts(tmp_path, model):
    ours = trained(tmp_path / "run", BPE, model, seq_len=24)
    export_run(tmp_path / "run", tmp_path / "out", mesh=mesh(), echo=QUIET)
    theirs, said = check_agrees(tmp_path / "out", ours)
    assert theirs.model_max_length == said["max_position_embeddings"] == 24
    assert said["pad_token_id"] is None and theirs.eos_token == "<|endoftext|>"


@pytest.mark.parametrize(
    ("front", "asked"),
    [
        ((), "<s>"),
        slow((), "auto"),
        slow((), "none"),
        slow(("<s>",), "<s>"),
        slow(("<s>",), "auto"),
        (("<s>",), "none"),
    ],
)
def test_documents_begin_there_as_they_did_in_training(tmp_path, front, asked):
    """… whatever the tokenizer's own files say, which are changed where they say another thing."""
    cfg = folder_of(tmp_path / "t", byte_level(front=front), model_max_length=131072, bos_token=None, eos_token="<x>",
                    unk_token=None)  # fmt: skip
    (tmp_path / "t" / "special_tokens_map.json").write_text('{"eos_token": "<x>"}', encoding="utf-8")
    (tmp_path / "t" / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    cfg = dataclasses.replace(cfg, begin_of_text=asked)
    ours = trained(tmp_path / "run", cfg, seq_len=24)
    shutil.rmtree(tmp_path / "t")
    export_run(tmp_path / "run", tmp_path / "out", mesh=mesh(), echo=QUIET)
    theirs, _ = check_agrees(tmp_path / "out", ours)
    assert theirs.chat_template == "{{ messages }}" and theirs.model_max_length == 24
    assert ours.begin_of_text == (256 if asked == "<s>" or (asked == "auto" and front) else None)


@pytest.mark.parametrize("begin", ["auto", "<s>"])
def test_a_sentencepiece_run(tmp_path, sentencepiece_model, begin):
    cfg = TokenizerConfig(kind="sentencepiece", path=str(sentencepiece_model), end_of_text="</s>", begin_of_text=begin)
    ours = trained(tmp_path / "run", cfg, seq_len=24)
    export_run(tmp_path / "run", tmp_path / "out", mesh=mesh(), echo=QUIET)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    first = 1 if begin == "<s>" else 2
    assert (theirs.bos_token_id, theirs.eos_token_id, len(theirs)) == (first, 2, ours.vocab_size)
    assert theirs("the fox").input_ids == [*[1] * (begin == "<s>"), *ours.encode(["the fox"])[0]]
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text(encoding="utf-8"))
    assert generation == {"bos_token_id": first, "eos_token_id": 2}


def test_an_imported_model_comes_back_as_it_was_unless_trained(tmp_path):
    """Also where its end of text was found by name, or several tokens end generation."""
    write(tmp_path / "in", vocab_size=300, eos_token_id=[257, 5], bos_token_id=256)
    byte_level().save(str(tmp_path / "in" / "tokenizer.json"))
    (tmp_path / "in" / "generation_config.json").write_text('{"eos_token_id": [257, 5], "top_k": 7}', encoding="utf-8")
    (tmp_path / "in" / "additional_chat_templates").mkdir()
    (tmp_path / "in" / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}", encoding="utf-8")
    import_model(tmp_path / "in", tmp_path / "run", mesh=mesh(), echo=QUIET)
    export_run(tmp_path / "run", tmp_path / "out", mesh=mesh(), echo=QUIET)
    for name in ("tokenizer.json", "generation_config.json", "additional_chat_templates/tools.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "in" / name).read_bytes()
    said = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert said["eos_token_id"] == [257, 5] and said["bos_token_id"] == 256 and "pad_token_id" not in said
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (theirs.eos_token, theirs.eos_token_id, len(theirs)) == ("</s>", 257, 258)

    # The same weights, trained on documents that end otherwise.
    loaded = weights.load_weights(
        tmp_path / "run", *abstract_weights(config.build(_config(tmp_path / "run")).model, mesh())
    )
    events = [*loaded[2], {"event": "train"}]
    cfg = config.build(_config(tmp_path / "run") | {"init_from": str(tmp_path / "run")})
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, tokenizer=TokenizerConfig()))
    weights.save_weights(tmp_path / "more", cfg, *loaded[:2], events)
    tokenizers.save(tokenizers.BytesTokenizer(), cfg.data.tokenizer, tmp_path / "more")
    lines = []
    export_run(tmp_path / "more", tmp_path / "out2", mesh=mesh(), echo=lines.append)
    said = json.loads((tmp_path / "out2" / "config.json").read_text(encoding="utf-8"))
    assert (said["bos_token_id"], said["eos_token_id"]) == (256, 256)
    assert "eos_token_id=[257, 5] of the imported model becomes 256" in lines[0]


def _config(folder):
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def test_a_tokenizer_larger_than_the_model_is_not_exported(tmp_path):
    trained(tmp_path / "run", BPE)
    made = byte_level(("<s>", "</s>", *(f"[{i}]" for i in range(9))))
    cfg = folder_of(tmp_path / "t", made)
    tokenizers.save(tokenizers.load_or_make(cfg, tmp_path / "u", None), cfg, tmp_path / "run")
    with pytest.raises(FormatError, match=r"its tokenizer has 267 tokens, its model 264"):
        export_run(tmp_path / "run", tmp_path / "out", mesh=mesh(), echo=QUIET)
    assert not (tmp_path / "out").exists()


def test_gguf_says_whether_documents_begin_with_a_token():
    from moe_jax.data.begin_of_text import of_json, settings_of
    from moe_jax.hf.gguf_tokenizer import tokenizer_files

    alphabet = sorted(tokenizers.train_bpe(["ab"], 257)._tokenizer.get_vocab())
    words = ["<s>", "</s>", *(w for w in alphabet if len(w) == 1)]
    values = {"model": "gpt2", "pre": "gpt-2", "tokens": words, "merges": [], "bos_token_id": 0, "eos_token_id": 1,
              "token_type": [3, 3, *[1] * (len(words) - 2)]}  # fmt: skip
    for add in (True, False, None):
        found = {f"tokenizer.ggml.{k}": v for k, v in (values | {"add_bos_token": add}).items()}
        files = tokenizer_files(found.get)
        front, _ = of_json(json.loads(files["tokenizer.json"]), settings_of(files))
        assert front == (["<s>"] if add else [])
