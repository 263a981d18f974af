"""What a tokenizer drops is counted and said, and no text makes a special token or stops the others."""

import dataclasses
import json

import numpy as np
import pytest
import tokenizers as hf_tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from test_begin_of_text import byte_level, sentencepiece_model
from tokenizers import AddedToken, models, normalizers, pre_tokenizers

from moe_jax import data
from moe_jax.config import DataConfig, SampleConfig, SourceConfig, TokenizerConfig
from moe_jax.data import kept_text, tokenizers
from moe_jax.errors import ConfigError

assert sentencepiece_model  # a fixture
END = "<|endoftext|>"


def opened(made, end=END, begin=""):
    return tokenizers.JsonTokenizer(made.to_str().encode(), end, "", begin)


def plain(**fields):
    """An end of text that is not marked special, so that text may make it."""
    made = byte_level((), normalizer=fields.pop("normalizer", None))
    made.add_tokens([AddedToken(END, **fields)])
    return opened(made)


# --- no text makes a special token -----------------------------------------------------------------------------------

SPELLED = {  # a tokenizer, a text that makes its end of text, what is decoded of it
    "itself": (lambda: plain(), f"a {END} b{END}", f"a {END} b{END}"),
    "NFKC": (lambda: plain(normalizer=normalizers.NFKC()), "a ＜|endoftext|＞ b", f"a {END} b"),
    "lower case": (lambda: plain(normalizer=normalizers.Lowercase()), "a<|ENDOFTEXT|>B", f"a{END}b"),
    "both, many": (
        lambda: plain(normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])),
        "＜|endofTEXT|＞" * 3 + END * 2,
        END * 5,
    ),
    "spaces around": (lambda: plain(lstrip=True, rstrip=True), f" a   {END}     b", f" a   {END}     b"),
    "one letter": (lambda: plain(normalizer=normalizers.Replace("E", END)), "aEbE", "ab"),
}


@pytest.mark.parametrize("what", SPELLED)
def test_no_text_makes_end_of_text(what):
    make, text, decoded = SPELLED[what]
    made = make()
    before, ids, after = made.encode(["before", text, "after"])
    assert made.end_of_text not in ids and made.decode(ids) == decoded
    assert made.decode(before) == "before" and made.decode(after) == "after"
    lost = made.encode_and_count([text])[0][1]
    assert lost == (2 if what == "one letter" else 0)


def test_a_config_of_bytes_that_are_not_utf8_is_one_line():
    """Such an argument comes as a surrogate: config.json could not be written, when all data was prepared."""
    with pytest.raises(ConfigError, match=r"^config\.prompt='a\\udcffb': holds bytes .*; nearest valid: 'a\?b'$"):
        SampleConfig(prompt="a\udcffb")


def test_no_text_makes_the_beginning():
    made = opened(byte_level((END,), ordinary=["<s>"]), begin="<s>")
    (ids,) = made.encode(["a<s>b"])
    assert not np.isin([made.begin_of_text, made.end_of_text], ids).any() and made.decode(ids) == "a<s>b"
    assert made.decode([made.begin_of_text, *ids, made.end_of_text]) == "a<s>b"


@pytest.mark.parametrize("text", [f"the quick {END} x", "the quick \uff1c|endoftext|\uff1e x", f"{END}{END}"])
def test_no_text_makes_end_of_text_in_sentencepiece(sentencepiece_model, text):
    made = tokenizers.SentencePieceTokenizer(sentencepiece_model.read_bytes(), END, "")
    ids, more = made.encode([text, "the fox"])
    assert made.end_of_text not in ids and len(ids) > 5 and made.decode(more) == "the fox"


# --- what is dropped -------------------------------------------------------------------------------------------------


def of(model, *added, split=None, normalizer=None):
    made = hf_tokenizers.Tokenizer(model)
    made.pre_tokenizer = split or pre_tokenizers.WhitespaceSplit()
    if normalizer:
        made.normalizer = normalizer
    made.add_special_tokens(["</s>", *added])
    return opened(made, "</s>")


letters = {c: i for i, c in enumerate("abcdehlowr ")}
DROPS = {  # a tokenizer, a text, ids as words, bytes lost of it
    "BPE without unk": (
        lambda: of(models.BPE(letters, []), split=pre_tokenizers.Digits()), "hé 日 a7",
        ["h", " ", " ", "a"], 2 + 3 + 1,
    ),
    "BPE with unk": (lambda: of(models.BPE(letters | {"?": 11}, [], unk_token="?")), "hé a", ["h", "?", "a"], 2 + 1),
    "WordLevel without unk": (
        lambda: of(models.WordLevel({"hello": 0, "world": 1})), "hello you world", ["hello", "world"], 3 + 2,
    ),
    "WordPiece without unk": (
        lambda: of(models.WordPiece({"a": 0, "##b": 1}, unk_token="[UNK]")), "ab ac a", ["a", "##b", "a"], 2 + 2,
    ),
    "Unigram without unk": (
        lambda: of(models.Unigram([("a", -1.0), ("b", -2.0)], unk_id=None)), "ab7日a", ["a", "b", "a"], 1 + 3,
    ),
    "normaliser": (
        lambda: of(models.BPE(letters, []), normalizer=normalizers.Replace(hf_tokenizers.Regex("[a-d]"), "")),
        "abe", ["e"], 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", DROPS)
def test_dropped_bytes_are_counted(what):
    make, text, words, lost = DROPS[what]
    made = make()
    (ids, found), (nothing, none) = made.encode_and_count([text, ""])
    assert [made._tokenizer.id_to_token(int(i)) for i in ids] == words and found == lost
    assert len(nothing) == none == 0


def test_sentencepiece_counts_what_is_unknown(sentencepiece_model):
    made = tokenizers.SentencePieceTokenizer(sentencepiece_model.read_bytes(), "</s>", "")
    found = made.encode_and_count(["the fox", " the 日本 fox ", "fox\n\nfox  fox"])
    assert [lost for _, lost in found] == [0, 1 + 6 + 1, 0]


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40))
def test_a_tokenizer_that_keeps_everything_is_known_as_such(text):
    """… without looking at any text; and looking at it finds the same."""
    for made in (byte_level(), byte_level(normalizer=normalizers.NFC())):
        spec = json.loads(made.to_str())
        assert kept_text.keeps_everything(spec)
        encoded = made.encode(text, add_special_tokens=False)
        assert kept_text.lost_bytes(text, encoded.offsets) == 0
    for change in ({"normalizer": {"type": "Strip"}}, {"pre_tokenizer": {"type": "Whitespace"}}):
        assert not kept_text.keeps_everything(spec | change)


def test_a_prepared_store_says_again_what_is_lost(tmp_path):
    """… and every document is there, the one that the library refuses with no tokens."""
    rows = [{"text": "a hello 日", "d": "x"}, {"text": "zzz", "d": "y"}, {"text": "world hello", "d": "x"}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows * 8), encoding="utf-8")
    made = hf_tokenizers.Tokenizer(models.WordLevel({"hello": 0, "world": 1, "a": 2}))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["</s>"])
    made.save(str(tmp_path / "t.json"))
    source = SourceConfig(kind="files", path=str(tmp_path / "a.jsonl"), domain_field="d", validation_fraction=0.0)
    cfg = DataConfig(batch_size=2, seq_len=8, sources={"s": source}, cache_dir=str(tmp_path / "cache"),
                     tokenizer=TokenizerConfig(kind="huggingface", path=str(tmp_path / "t.json")))  # fmt: skip
    lines = [data.prepare(cfg, workdir=tmp_path / "run", seed=0, progress=False).notes() for _ in range(2)]
    assert lines[0] == lines[1] and len(lines[0]) == 4  # the others: x and y have no held-out text
    assert lines[0][1].startswith("s/train: 72 of 200 bytes (36 %) of text are lost (x 48, y 24): the tokenizer has no")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "zzz", "d": "y"}) + "\n", encoding="utf-8")
    with pytest.raises(
        ConfigError, match=r"tokenizer\.path=.*: has a token for none of the 3 bytes of data\.sources\.s"
    ):
        data.prepare(dataclasses.replace(cfg, seq_len=2), workdir=tmp_path / "run", seed=0, progress=False)
