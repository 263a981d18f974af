"""How documents begin: as transformers reads the tokenizer's files, in the stream, in a run directory, in samples."""

import dataclasses
import json
import shutil
from collections import Counter

import numpy as np
import pytest
import sentencepiece
import tokenizers as hf_tokenizers
from test_data import brute_rows

from moe_jax import data
from moe_jax.config import DataConfig, RunConfig, SourceConfig, TokenizerConfig, build
from moe_jax.data import corpus as corpus_lib
from moe_jax.data import documents, tokenizers
from moe_jax.errors import ConfigError, FileError
from moe_jax.evaluate import generate
from moe_jax.train.state import abstract_weights

TEXT = "the fox: naïve 数"


def byte_level(special=("<s>", "</s>"), front=(), ordinary=(), normalizer=None):
    """A tokenizer of bytes. front: what its post-processor puts in front."""
    alphabet = sorted(hf_tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = hf_tokenizers.Tokenizer(hf_tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    made.pre_tokenizer = hf_tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = hf_tokenizers.decoders.ByteLevel()
    if normalizer:
        made.normalizer = normalizer
    made.add_special_tokens(list(special))
    made.add_tokens(list(ordinary))
    if front:
        made.post_processor = hf_tokenizers.processors.TemplateProcessing(
            single=f"{' '.join(front)} $A </s>", special_tokens=[(w, made.token_to_id(w)) for w in (*front, "</s>")]
        )
    return made


def folder_of(path, made, **settings):
    path.mkdir(parents=True, exist_ok=True)
    made.save(str(path / "tokenizer.json"))
    if settings:
        (path / "tokenizer_config.json").write_text(
            json.dumps({"bos_token": "<s>", "eos_token": "</s>"} | settings), encoding="utf-8"
        )
    return TokenizerConfig(kind="huggingface", path=str(path / "tokenizer.json"), end_of_text="</s>")


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    root = tmp_path_factory.mktemp("sp")
    (root / "text.txt").write_text(
        "\n".join(f"the quick brown fox number {i} jumps" for i in range(200)), encoding="utf-8"
    )
    sentencepiece.SentencePieceTrainer.train(
        input=str(root / "text.txt"), model_prefix=str(root / "tokenizer"), vocab_size=45, minloglevel=2,
        model_type="bpe", user_defined_symbols=["<|endoftext|>"],
    )  # fmt: skip
    return root / "tokenizer.model"


# --- the choice ------------------------------------------------------------------------------------------------------

FILES = {  # tokens in front of the text by the post-processor, tokenizer_config.json
    "nothing said": ((), {}),
    "put in front": (("<s>",), {}),
    "put in front, and asked for": (("<s>",), {"add_bos_token": True}),
    "put in front, though not asked for": (("<s>",), {"add_bos_token": False}),
    "end of text in front": (("</s>",), {}),
    "asked not to": ((), {"add_bos_token": False}),
    "rebuilt by its class": (("<s>",), {"tokenizer_class": "GPTNeoXTokenizer"}),
}


@pytest.mark.parametrize("what", FILES)
def test_documents_begin_as_transformers_begins_a_text(tmp_path, what):
    transformers = pytest.importorskip("transformers")
    front, settings = FILES[what]
    cfg = (
        folder_of(tmp_path / "t", byte_level(front=front), tokenizer_class="PreTrainedTokenizerFast", **settings)
        if ("tokenizer_class" not in settings)
        else folder_of(tmp_path / "t", byte_level(front=front), **settings)
    )
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "t")
    want = theirs(TEXT).input_ids
    want = want[:-1] if want[-1] == theirs.eos_token_id else want
    made = tokenizers.load_or_make(cfg, tmp_path / "run", None)
    assert made.end_of_text == theirs.eos_token_id
    first = [] if made.begin_of_text is None else [made.begin_of_text]
    if what == "end of text in front":  # which is in front of every document in any case
        assert not first and want[0] == made.end_of_text
        first = [made.end_of_text]
    assert [*first, *made.encode([TEXT])[0]] == want
    assert len(made.lines) == 1 and made.lines[0].startswith("documents begin with")
    kept = data.load_tokenizer(tmp_path / "run")
    assert (kept.begin_of_text, kept.fingerprint, kept.lines) != (0, 0, 0) and kept.fingerprint == made.fingerprint
    assert kept.begin_of_text == made.begin_of_text


@pytest.mark.parametrize("add", [None, True, False])
def test_sentencepiece_begins_documents_as_transformers_does(tmp_path, sentencepiece_model, add):
    transformers = pytest.importorskip("transformers")
    shutil.copy(sentencepiece_model, tmp_path)
    if add is not None:
        settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": add, "eos_token": "</s>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    cfg = TokenizerConfig(kind="sentencepiece", path=str(tmp_path / "tokenizer.model"), end_of_text="</s>")
    made = tokenizers.load_or_make(cfg, tmp_path / "run", None)
    first = [] if made.begin_of_text is None else [made.begin_of_text]
    assert [*first, *made.encode(["the fox"])[0]] == theirs("the fox").input_ids
    assert bool(first) == bool(add)


def test_what_only_tokenizer_config_asks_for(tmp_path):
    """transformers 5 does not read it beside a tokenizer.json; its older versions and llama.cpp do."""
    cfg = folder_of(tmp_path / "t", byte_level(), add_bos_token=True)
    made = tokenizers.load_or_make(cfg, tmp_path / "run", None)
    assert made.words == ("<s>", "</s>") and made.begin_of_text == 256
    (line,) = made.lines
    assert line == "documents begin with '<s>', id 256: add_bos_token=true in tokenizer_config.json"
    assert data.load_tokenizer(tmp_path / "run").lines == made.lines
    cfg = folder_of(tmp_path / "u", byte_level(), add_bos_token=True, bos_token="<bos>")
    made = tokenizers.load_or_make(cfg, tmp_path / "v", None)
    assert made.begin_of_text is None and "the vocabulary has no '<bos>'" in made.lines[0]


def test_the_config_has_the_last_word(tmp_path):
    cfg = folder_of(tmp_path / "t", byte_level(("<s>", "</s>", "[B]"), ("<s>", "[B]")))
    with pytest.raises(ConfigError, match=r"begin_of_text='auto': the tokenizer puts 2 tokens in front: <s>, \[B\]"):
        tokenizers.load_or_make(cfg, tmp_path / "a", None)
    for asked, found in (("none", None), ("[B]", 258), ("</s>", None)):
        one = dataclasses.replace(cfg, begin_of_text=asked)
        made = tokenizers.load_or_make(one, tmp_path / f"run{asked}", None)
        assert made.begin_of_text == found and f"begin_of_text={asked!r}" in made.lines[0]
    with pytest.raises(ConfigError, match=r"begin_of_text='<b>': is not in the vocabulary"):
        tokenizers.load_or_make(dataclasses.replace(cfg, begin_of_text="<b>"), tmp_path / "b", None)
    with pytest.raises(ConfigError, match=r"begin_of_text='<s>': must be 'auto' or 'none' for kind='bytes'"):
        TokenizerConfig(begin_of_text="<s>")


def test_a_run_keeps_its_choice(tmp_path):
    """… and one of before there was a choice begins documents as it did, says so, and keeps its stores."""
    cfg = folder_of(tmp_path / "t", byte_level(front=["<s>"]), add_bos_token=True)
    made = tokenizers.load_or_make(cfg, tmp_path / "run", None)
    (tmp_path / "t" / "tokenizer_config.json").unlink()
    assert tokenizers.load_or_make(cfg, tmp_path / "run", None).fingerprint == made.fingerprint
    with pytest.raises(ConfigError, match=r"begin_of_text='none': differs from .*, which has '<s>'; use '<s>' or"):
        tokenizers.load_or_make(dataclasses.replace(cfg, begin_of_text="none"), tmp_path / "run", None)

    plain = tokenizers.JsonTokenizer((tmp_path / "t" / "tokenizer.json").read_bytes(), "</s>", "")
    assert plain.begin_of_text is None and plain.fingerprint != made.fingerprint
    path = tmp_path / "run" / "tokenizer_settings.json"
    old = json.loads(path.read_text(encoding="utf-8")) | {"fingerprint": plain.fingerprint}
    del old["begin_of_text"]
    path.write_text(json.dumps(old), encoding="utf-8")
    kept = tokenizers.load_or_make(cfg, tmp_path / "run", None)
    assert kept.begin_of_text is None and kept.fingerprint == plain.fingerprint
    assert kept.lines == (
        "documents do not begin with '<s>', though the tokenizer's files ask for it: this run began without it",
    )
    path.write_text(json.dumps(old | {"fingerprint": made.fingerprint}), encoding="utf-8")
    with pytest.raises(FileError, match=r"tokenizer\.json: is not the tokenizer with which this run was made"):
        data.load_tokenizer(tmp_path / "run")


# --- the stream ------------------------------------------------------------------------------------------------------

DOCUMENTS = [{"text": t, "domain": d} for t, d in (("ab", "x"), ("", "x"), ("cde<s>", "y"), ("f", "x"))]


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A tokenizer with a token in front of documents, and a store of it."""
    made = tokenizers.JsonTokenizer(byte_level(ordinary=["[B]"]).to_str().encode(), "</s>", "", "<s>")
    root = tmp_path_factory.mktemp("begun")
    return made, corpus_lib.prepare_store(root / "s", lambda: documents.Documents(DOCUMENTS), made)


def test_a_document_is_its_beginning_its_tokens_and_its_end(begun):
    made, store = begun
    b, e = made.begin_of_text, made.end_of_text
    stream = [i for d in DOCUMENTS if d["text"] for i in (b, *made.encode([d["text"]])[0], e)]
    assert store.tokens.tolist() == [*stream, b] and store.begin_of_text == b
    assert Counter(store.tokens.tolist())[b] == 4  # "<s>" in a text is letters
    assert store.targets_per_document().tolist() == [3, 7, 2] and store.document_bytes.tolist() == [2, 6, 1]


@pytest.mark.parametrize("seq_len", [2, 3, 7, 100])
def test_rows_predict_every_token_once_and_no_beginning(begun, seq_len):
    made, store = begun
    rows = data.PackedRows(store, seq_len, None, partial=True)
    b, e, seen = made.begin_of_text, made.end_of_text, Counter()
    # The definition, with the document's first token in the place of end_of_text.
    like = type("Store", (), {"end_of_text": b, "tokens": store.tokens, "offsets": store.offsets,
                              "document_domains": store.document_domains})  # fmt: skip
    expected = list(brute_rows(like, range(3), seq_len))
    assert len(rows) == len(expected)
    for row, (tokens, targets, weights, segments, positions, owners) in zip(rows, expected, strict=True):
        real = weights == 1
        np.testing.assert_array_equal(row["tokens"][real], tokens[real])
        predicted = row["weights"] == 1
        np.testing.assert_array_equal(row["targets"][predicted], targets[predicted])
        assert (row["tokens"][~real] == e).all()
        for name, column in (("segment_ids", segments), ("positions", positions), ("domain_ids", owners)):
            np.testing.assert_array_equal(row[name], column)
        np.testing.assert_array_equal(row["weights"], weights * (targets != b))
        seen.update(row["targets"][row["weights"] == 1].tolist())
    whole = Counter(store.tokens.tolist())
    del whole[b]
    assert seen == whole and sum(seen.values()) == store.targets_per_document().sum()


def test_counts_of_a_corpus(tmp_path):
    """Bytes per token, the table and the weights of all batches agree."""
    (tmp_path / "a.jsonl").write_text(
        "\n".join(json.dumps({"text": f"text {i} " * (i % 5 + 1)}) for i in range(60)), encoding="utf-8"
    )
    source = SourceConfig(kind="files", path=str(tmp_path / "a.jsonl"), validation_fraction=0.4)
    tokenizer = folder_of(tmp_path / "t", byte_level(front=["<s>"]))
    cfg = DataConfig(batch_size=4, seq_len=16, sources={"a": source}, tokenizer=tokenizer,
                     cache_dir=str(tmp_path / "cache"))  # fmt: skip
    made = data.prepare(cfg, workdir=tmp_path / "run", seed=0, progress=False)
    texts = [text for _, text in made.validation_texts()]
    tokens = sum(len(made.tokenizer.encode([text])[0]) + 1 for text in texts)
    batches = list(made.validation_batches(range(4)))
    assert sum(int(b["weights"].sum()) for b in batches) == tokens
    (held,) = (row for row in made.stats() if row["split"] == "validation")
    assert (held["tokens"], held["bytes"]) == (tokens, sum(len(text) for text in texts))
    np.testing.assert_allclose(made.bytes_per_token, [held["bytes"] / tokens])
    first = batches[0]["tokens"][0]
    assert first[0] == 256 and (first[1:][batches[0]["segment_ids"][0][1:] == 1] != 256).all()
    assert made.notes() == ["documents begin with '<s>', id 256: tokenizer.json puts it in front"]


@pytest.mark.parametrize("begin", ["<s>", "none"])
def test_a_sample_begins_as_documents_do(monkeypatch, begin):
    made = tokenizers.JsonTokenizer(byte_level().to_str().encode(), "</s>", "", begin)
    seen = []

    def continued(cfg, mesh, params, bias, prompts, tokens, **_):
        seen.extend(prompts[0])
        return [[*prompts[0], 64, made.end_of_text, 65]]

    monkeypatch.setattr(generate, "generate", continued)
    text = generate.sample_text(RunConfig(), None, {}, {}, made, "ab\udcff")  # an argument that is not UTF-8
    assert seen == [256 if begin == "<s>" else 257, *made.encode(["ab?"])[0]]
    assert text == "ab?a"


@pytest.mark.slow
def test_the_loss_of_a_document_is_transformers_own(tmp_path):
    """A model with a beginning of text, imported, evaluated on one document, and the same ids in transformers."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from test_hf import mesh_of

    from moe_jax import config
    from moe_jax.evaluate import held_out
    from moe_jax.hf import import_model
    from moe_jax.run import weights

    there = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=258, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                 intermediate_size=40, max_position_embeddings=128)
    ).eval()  # fmt: skip
    with torch.no_grad():
        for name, x in there.named_parameters():
            x.copy_(1 + 0.3 * torch.randn_like(x) if "norm" in name else 0.4 * torch.randn_like(x))
    there.save_pretrained(tmp_path / "in")
    folder_of(tmp_path / "in", byte_level(front=["<s>"]), tokenizer_class="PreTrainedTokenizerFast")
    said = []
    cfg = import_model(tmp_path / "in", tmp_path / "run", mesh=mesh_of(1, 1, 1), echo=said.append)
    assert "documents begin with '<s>', id 256: tokenizer.json puts it in front" in said
    assert cfg.data.tokenizer.begin_of_text == "<s>"
    (tmp_path / "a.jsonl").write_text(
        "\n".join(json.dumps({"text": f"{i} {TEXT}"}) for i in range(8)), encoding="utf-8"
    )
    source = {"kind": "files", "path": str(tmp_path / "a.jsonl"), "validation_fraction": 0.5}
    plain = config.to_dict(cfg)
    plain["data"] |= {"sources": {"a": source}, "seq_len": 40, "batch_size": 2, "cache_dir": str(tmp_path / "cache")}
    plain["model"] |= {"compute_dtype": "float32"}
    cfg = build(plain)
    made = data.prepare(cfg.data, workdir=tmp_path / "run", seed=0, progress=False)
    mesh = mesh_of(1, 1, 1)
    params, bias, _ = weights.load_weights(tmp_path / "run", *abstract_weights(cfg.model, mesh))
    # One document a row, so that each is seen whole, as there.
    store = made.stores["a", "validation"]
    assert len(set(np.diff(store.offsets))) == 1
    plain["data"]["seq_len"] = int(np.diff(store.offsets)[0])
    cfg = build(plain)
    made = data.prepare(cfg.data, workdir=tmp_path / "run", seed=0, progress=False)
    ours = held_out.evaluate(cfg, mesh, params, bias, made, progress=False).rows()[-1]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "in")
    ids = [theirs(text).input_ids for _, text in made.validation_texts()]
    assert all(i[0] == 256 and i[-1] == 257 for i in ids)
    with torch.no_grad():
        want = [float(there(torch.tensor([i]), labels=torch.tensor([i])).loss) for i in ids]
    assert ours["tokens"] == sum(len(i) - 1 for i in ids)
    assert abs(ours["xent"] - np.mean(want)) < 1e-4 and want[0] > 1
