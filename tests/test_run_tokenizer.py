"""Weights are trained further, averaged and read with the tokenizer that they were made with, or not at all."""

import dataclasses
import json

import pytest
from test_begin_of_text import byte_level, folder_of

from configs import continued
from moe_jax import config, data
from moe_jax.config import RunConfig, TokenizerConfig
from moe_jax.data import tokenizers
from moe_jax.errors import CheckpointError, ConfigError
from moe_jax.run import config_file
from moe_jax.upcycle.convert import _check_same_tokenizer, _tokenizer_files

FAIL = lambda: pytest.fail("trained a new tokenizer")
BPE = TokenizerConfig(kind="bpe", vocab_size=280, train_bytes=2000)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory without weights: its configuration and a trained tokenizer, with a template of chats."""
    folder = tmp_path_factory.mktemp("run")
    body = config.to_dict(RunConfig())
    body["data"] |= {"tokenizer": config.to_dict(BPE), "seq_len": 16, "batch_size": 2}
    config_file.save_config(folder, config.build(body))
    tokenizers.load_or_make(BPE, folder, lambda: ["def add(a, b):\n    return a + b\n"] * 9)
    (folder / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    return folder


def test_continuing_takes_the_tokenizer_of_the_run(run, tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.jsonl").write_text(
        "\n".join(json.dumps({"text": f"other words {i} " * 5}) for i in range(40)), encoding="utf-8"
    )
    cfg = config.build(continued.get_config(f"{run},{tmp_path / 'text'}"))
    assert cfg.init_from == str(run) and cfg.data.tokenizer == BPE
    body = config.to_dict(config_file.load_config(run))
    body["data"]["labels"], body["model"]["untie"], body["sample"]["tokens"] = {"code": 1}, 2, 0
    config_file.save_config(tmp_path / "labelled", config.build(body))
    labelled = config.build(continued.get_config(f"{tmp_path / 'labelled'},{tmp_path / 'text'}"))
    assert labelled.model.untie == 2 and labelled.data.labels == {"code": 1} and labelled.sample.tokens == 0
    cfg = dataclasses.replace(cfg.data, cache_dir=str(tmp_path / "cache"), batch_size=2)
    made = data.prepare(cfg, workdir=tmp_path / "new", seed=0, progress=False, init_from=str(run))
    want = tokenizers.load(run)
    assert made.tokenizer.fingerprint == want.fingerprint == tokenizers.load(tmp_path / "new").fingerprint
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "new" / name).read_bytes() == (run / name).read_bytes()
    again = data.prepare(cfg, workdir=tmp_path / "new", seed=0, progress=False, init_from=str(tmp_path / "gone"))
    assert again.tokenizer.fingerprint == want.fingerprint


def test_another_tokenizer_is_refused_by_its_field(run, tmp_path):
    other = folder_of(tmp_path / "t", byte_level(), add_bos_token=True)
    for cfg, message in (
        (
            dataclasses.replace(BPE, vocab_size=300),
            r"vocab_size=300: differs from the run of init_from, .*, which has 280",
        ),
        (dataclasses.replace(BPE, train_bytes=9), r"train_bytes=9: differs from the run of init_from"),
        (TokenizerConfig(), r"kind='bytes': differs from the run of init_from, .*, which has 'bpe'; use 'bpe', whose"),
        (other, r"kind='huggingface': differs from the run of init_from"),
    ):
        with pytest.raises(ConfigError, match=rf"^config\.data\.tokenizer\.{message}") as error:
            tokenizers.load_or_make(cfg, tmp_path / "new", FAIL, str(run))
        assert "\n" not in str(error.value) and not (tmp_path / "new").exists()
    # The run's own, by its file.
    named = TokenizerConfig(kind="huggingface", path=str(run / "tokenizer.json"))
    made = tokenizers.load_or_make(named, tmp_path / "named", FAIL, str(run))
    assert made.fingerprint == tokenizers.load(run).fingerprint == tokenizers.load(tmp_path / "named").fingerprint

    # A run of a file: another file, another end or beginning of documents; the same file, also if it is gone.
    tokenizers.load_or_make(other, tmp_path / "first", FAIL)
    elsewhere = folder_of(tmp_path / "u", byte_level(("<s>", "</s>", "[C]")))
    for cfg, message in (
        (elsewhere, r"path=.*: differs from the run of init_from"),
        (dataclasses.replace(other, end_of_text="<s>"), r"end_of_text='<s>': differs from .*, which has '</s>'"),
        (dataclasses.replace(other, begin_of_text="none"), r"begin_of_text='none': differs from .*, which has '<s>'"),
    ):
        with pytest.raises(ConfigError, match=message):
            tokenizers.load_or_make(cfg, tmp_path / "new", FAIL, str(tmp_path / "first"))
    (tmp_path / "t" / "tokenizer.json").unlink()
    made = tokenizers.load_or_make(other, tmp_path / "second", FAIL, str(tmp_path / "first"))
    assert made.words == ("<s>", "</s>") == tokenizers.load(tmp_path / "second").words


def test_weights_without_a_tokenizer(tmp_path):
    """An import that had none: a file may be named for it, which cannot be checked; a new one is no use."""
    body = config.to_dict(RunConfig())
    body["data"]["tokenizer"] |= {"kind": "huggingface", "path": str(tmp_path / "run" / "tokenizer.json")}
    config_file.save_config(tmp_path / "run", config.build(body))
    with pytest.raises(
        ConfigError, match=r"tokenizer\.kind='bpe': a new tokenizer does not fit the weights of init_from"
    ):
        tokenizers.load_or_make(BPE, tmp_path / "new", FAIL, str(tmp_path / "run"))
    cfg = folder_of(tmp_path / "t", byte_level())
    made = tokenizers.load_or_make(cfg, tmp_path / "new", FAIL, str(tmp_path / "run"))
    assert made.lines[-1].startswith(f"{tmp_path / 'run'} has no tokenizer, so whether its weights")
    # Put there by hand, it is the one.
    byte_level().save(str(tmp_path / "run" / "tokenizer.json"))
    with pytest.raises(ConfigError, match=r"path=.*differs from the run of init_from"):
        tokenizers.load_or_make(
            folder_of(tmp_path / "u", byte_level(("</s>",))), tmp_path / "other", FAIL, str(tmp_path / "run")
        )


def test_upcycling_keeps_one_tokenizer(run, tmp_path):
    files = _tokenizer_files(run)
    assert set(files) == {"tokenizer.json", "chat_template.jinja", "tokenizer_settings.json"}
    _check_same_tokenizer(run, run)
    tokenizers.load_or_make(folder_of(tmp_path / "t", byte_level()), tmp_path / "b", FAIL)
    with pytest.raises(CheckpointError, match=r"b: its tokenizer \(huggingface\) differs from that of"):
        _check_same_tokenizer(run, tmp_path / "b")
