"""Rows with gaps (UL2R): what they hold, how much of the text is in gaps, and their place in batches."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
from test_phases import SIZE, made_corpus

from moe_jax import config, data, optim
from moe_jax.data import denoise
from moe_jax.data.denoise import DENOISERS, DenoisedRows
from moe_jax.errors import ConfigError
from moe_jax.run import config_file, teacher

FIRST = 257  # the id of a gap; then the modes


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return made_corpus(tmp_path_factory.mktemp("denoise"))


def filled(tokens: list[int]) -> list[int]:
    """The text, with the spans in place of the gaps, one after another."""
    first = tokens.index(FIRST)
    gaps = [i for i, t in enumerate(tokens) if t == FIRST]
    spans = len(gaps) // 2
    begin = gaps[spans]  # of the spans
    pieces = [[]]
    for t in tokens[begin + 1 :]:
        pieces.append([]) if t == FIRST else pieces[-1].append(t)
    text, taken = [], iter(pieces)
    assert first < begin and len(pieces) == spans and all(pieces)
    for t in tokens[1:begin]:
        text += next(taken) if t == FIRST else [t]
    return text


@pytest.mark.parametrize("seq_len", [16, 64, 250])
def test_filling_the_gaps_gives_the_text(corpus, seq_len):
    plain = data.PackedRows(corpus.stores["a", "train"], seq_len, 1, name="a", domain_ids=[7])
    rows, seen, removed = DenoisedRows(plain, 1.0, 1, "a", FIRST), Counter(), {}
    places = {denoiser: set() for denoiser in DENOISERS}
    for r in range(min(len(rows), 150)):
        made, before, denoiser = rows[r], plain[r], rows.denoiser(r)
        text, taken, spans = denoise.sizes(denoiser, seq_len)
        n = int(made["segment_ids"].sum())
        ids = [*made["tokens"][:n].tolist(), int(made["targets"][n - 1])]
        assert (made["targets"][: n - 1] == made["tokens"][1:n]).all() and n <= seq_len
        assert ids[0] == FIRST + 1 + "RSX".index(denoiser.mode)
        if denoiser.mode == "S":
            assert ids[1:] == before["tokens"].tolist() and ids.count(FIRST) == 0
            learned = before["tokens"].tolist()[-taken:]
        else:
            assert filled(ids) == before["tokens"][:text].tolist()
            assert ids.count(FIRST) == 2 * spans
            learned = ids[-taken - spans :]
        weights = made["weights"][:n]
        assert made["targets"][:n][weights == 1].tolist() == learned and not made["weights"][n:].any()
        np.testing.assert_array_equal(made["positions"][:n], np.arange(n))
        assert set(made["domain_ids"][:n].tolist()) == {7} and not made["segment_ids"][n:].any()
        assert made.keys() == before.keys() and all(made[k].dtype == before[k].dtype for k in made)
        seen[denoiser] += 1
        places[denoiser].add(tuple(np.flatnonzero(made["tokens"] == FIRST)))
        removed[denoiser] = taken / text
        assert all((made[k] == again).all() for k, again in rows[r].items())  # a function of the row
    several = [d for d, n in seen.items() if n > 4 and d.mode != "S" and denoise.sizes(d, seq_len)[2] > 1]
    assert all(len(places[d]) > 1 for d in several) and (several or seq_len > 64)
    if seq_len == 16:
        assert set(seen) == set(DENOISERS)
    for denoiser, share in removed.items():
        assert share == pytest.approx(denoiser.rate, abs=0.5 / (seq_len * 0.6))


def test_domains_and_weights_are_those_of_the_text(corpus):
    """Of text that changes its domain at each token, with some that nothing predicts, such as a begin_of_text."""
    s = 64
    plain = data.PackedRows(corpus.stores["a", "train"], s, 1, name="a")
    domain_of, weight_of = np.arange(s + 1), np.arange(s + 1) % 5 != 0  # of each place
    row = plain[0] | {"domain_ids": domain_of[1:], "weights": weight_of[1:].astype(np.float32)}
    rows, checked = DenoisedRows(plain, 1.0, 1, "a", FIRST), 0
    rows.rows = {r: row | {"tokens": np.arange(s)} for r in range(40)}  # a token names its place
    for r in range(40):
        made, (_, removed, spans) = rows[r], denoise.sizes(rows.denoiser(r), s)
        n = int(made["segment_ids"].sum())
        learned = removed + (spans if rows.denoiser(r).length else 0)
        after = None  # the place of the next token that is text; a row has no domain and weight of its first token
        for i in reversed(range(n)):
            token = int(made["targets"][i])
            is_text = token < s
            after = token if is_text else after
            assert made["domain_ids"][i] == max(domain_of[after], 1)
            assert made["weights"][i] == (i >= n - learned and (not is_text or weight_of[max(token, 1)]))
            checked += not is_text
    assert checked > 40


def test_spans_have_their_mean_length_and_a_row_is_full():
    for denoiser in DENOISERS:
        for seq_len in (16, 17, 100, 2048):
            text, removed, spans = denoise.sizes(denoiser, seq_len)
            assert 0 < spans <= removed < text
            if denoiser.length:
                assert seq_len - 4 <= text + 2 * spans <= seq_len
                if seq_len == 2048:
                    assert removed / spans == pytest.approx(denoiser.length, rel=0.1)
    draw = lambda n: np.random.default_rng(n).permutation(n)
    made = [denoise.parts(total, count, draw) for total, count in ((1, 1), (5, 5), (40, 7))]
    assert [x.sum() for x in made] == [1, 5, 40] and all((x > 0).all() for x in made)


def test_a_share_of_the_training_rows(tmp_path):
    made_corpus(tmp_path)
    source = config.SourceConfig(kind="files", path=f"{tmp_path}/a*.txt", denoise=0.4, validation_fraction=0.3)
    cfg = config.DataConfig(batch_size=8, seq_len=SIZE, sources={"a": source}, cache_dir=str(tmp_path / "cache"))
    corpora = [data.prepare(cfg, workdir=tmp_path / "run", seed=seed, progress=False) for seed in (1, 2)]
    modes = [[corpora[0]._train["a"].denoiser(r) for r in range(4000)] for _ in range(2)]
    assert modes[0] == modes[1] != [corpora[1]._train["a"].denoiser(r) for r in range(4000)]
    assert sum(m is not None for m in modes[0]) / 4000 == pytest.approx(0.4, abs=0.03)
    counts = Counter(modes[0])
    assert all(counts[d] / 4000 == pytest.approx(0.4 / 7, abs=0.015) for d in DENOISERS)
    assert corpora[0].vocab_size == FIRST + 4 and cfg.has_roles
    assert (
        "data.sources.a: 40 % of the training rows have gaps to fill; tokens 257 to 260 are" in corpora[0].notes()[-1]
    )
    iterator = corpora[0].train_iterator(range(8))
    seen = [next(iterator) for _ in range(6)]
    iterator.close()
    gaps = np.concatenate([(batch["tokens"] >= FIRST).any(1) for batch in seen])
    assert 0.2 < gaps.mean() < 0.6
    assert all((batch["tokens"] < FIRST).all() for batch in corpora[0].validation_batches(range(8)))


def test_what_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"denoise=0\.5: is for text, not for prompts"):
        config.SourceConfig(kind="files", path="a.jsonl", prompt="{q}", completion="{a}", denoise=0.5)
    source = config.SourceConfig(kind="files", path="a.txt", denoise=0.5)
    with pytest.raises(
        ConfigError, match=r"seq_len=15: must be ≥ 16 with data\.sources\.a\.denoise; nearest valid: 16"
    ):
        config.DataConfig(seq_len=15, sources={"a": source})
    gaps = lambda name: config.DataConfig(sources={"a": dataclasses.replace(source, denoise=0.5, path=f"{name}.txt")})
    model = dataclasses.replace(config.RunConfig().model, vocab_size=260)
    with pytest.raises(ConfigError, match=r"model\.vocab_size=260: must hold the tokenizer's 257 tokens and 4 of gaps"):
        config.RunConfig(data=gaps("a"), model=model)
    group = config.GroupConfig(match="^embed$", freeze=True)
    whole = config.RunConfig(data=gaps("a"), optim=config.OptimConfig(groups={"e": group}))
    adapted = dataclasses.replace(whole.model, lora=config.LoRAConfig(rank=2))
    for cfg in (whole, config.RunConfig(data=gaps("a"), model=adapted, init_from="base")):
        with pytest.raises(
            ConfigError, match=r"data\.sources\.a\.denoise=0\.5: has tokens of its own, which cannot .*: em"
        ):
            optim.check_groups(cfg)
    own = config.RunConfig(data=gaps("a"), distill=config.DistillConfig(teacher=str(tmp_path)))
    config_file.save_config(tmp_path, config.RunConfig())
    with pytest.raises(
        ConfigError, match=r"distill\.teacher=.*has learned no tokens of gaps, which data\.sources\.a\."
    ):
        teacher.find(own)
    cfg = config.RunConfig()
    with pytest.raises(ConfigError, match=r"model\.vocab_size=\d+: must hold the 99999 tokens of the text"):
        config.check_vocabulary(dataclasses.replace(cfg), 99_999)
