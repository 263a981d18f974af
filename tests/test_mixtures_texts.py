"""What the merges of a tokenizer tell of its text, and clusters of documents."""

import itertools
import json
import random
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from moe_jax.errors import UserError
from moe_jax.mixtures import clusters, design, merges

# --- merges ----------------------------------------------------------------------------------------------------------


def trained(texts, size):
    """A byte-level BPE tokenizer, as this library trains them."""
    from moe_jax.data import tokenizers

    return tokenizers.train_bpe(texts, size)


def test_replayed_counts():
    """Of every pair after every merge, those that are counted in words that are merged from the start."""
    words = [Counter({"abab": 3, "aaab": 1, "b": 9}), Counter({"ab": 5, "baa": 2})]
    order = [("a", "b"), ("ab", "ab"), ("x", "y"), ("a", "a")]
    found = merges.replay(words, [100, 1000], order)
    assert found.missing == 1 and len(found.steps) == 3

    def counted(pair, done):
        total = np.zeros(2)
        for domain, (of, size) in enumerate(zip(words, (100, 1000), strict=True)):
            for word, count in of.items():
                parts = list(word)
                for merge in done:
                    parts = merges._joined(parts, merge) or parts
                total[domain] += sum(p == pair for p in itertools.pairwise(parts)) * count * 1e5 / size
        return total

    counts = found.before.copy()
    for i, (at, changed, change) in enumerate(found.steps):
        pair = [p for p in order if p != ("x", "y")][i]
        assert counts[at] == pytest.approx(counted(pair, order[: order.index(pair)]))
        counts[changed] += change
        assert counts[at] == pytest.approx(0)


def prose(count, seed):
    """Sentences of made-up words with frequencies as words have them, other ones for each seed."""
    rng = random.Random(seed)
    syllables = ["".join(rng.choice(s) for s in ("bcdfgklmnprstvz", "aeiouy", "nrslt ")).strip() for _ in range(60)]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(3000)]
    frequency = [1 / (i + 3) for i in range(len(words))]
    return " ".join(rng.choices(words, frequency, k=count))


@pytest.mark.slow
def test_mixture_of_a_tokenizer(tmp_path):
    """Of four domains in known shares, from other text of the same domains: error below 0.05."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    random.Random(0).shuffle(files)
    code = "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)[:1_600_000]
    texts = {"code": code} | {f"language {seed}": prose(160_000, seed) for seed in range(3)}
    shares = (0.1, 0.6, 0.05, 0.25)
    true = dict(zip(texts, shares, strict=True))
    parts = {name: text[: int(400_000 * true[name])] for name, text in texts.items()}
    trained(list(parts.values()), 1500).save(tmp_path)
    pairs, split = merges.read_tokenizer(tmp_path / "tokenizer.json")
    rest = {name: text[-500_000:] for name, text in texts.items()}
    counted = [merges.count_words([text], split, 500_000) for text in rest.values()]
    found = merges.infer(merges.replay(*map(list, zip(*counted, strict=True)), pairs), list(rest))
    assert max(abs(found.shares[name] - true[name]) for name in true) < 0.05, (found.shares, true)
    assert not found.loose


def test_merges_of_equal_text():
    """From the tokenizer's own text the shares are within 0.1, without slack; other orders of merges need slack."""
    texts = ["the cat sat on the mat and the hat " * 40, "lorem ipsum dolor sit amet ipsum " * 70]
    made = json.loads(trained(texts, 300)._tokenizer.to_str())["model"]["merges"]
    order = [tuple(pair) if not isinstance(pair, str) else tuple(pair.split(" ")) for pair in made]
    from tokenizers import pre_tokenizers

    cut = pre_tokenizers.ByteLevel(add_prefix_space=False)
    counted = [merges.count_words([text], lambda t: [w for w, _ in cut.pre_tokenize_str(t)], 10**6) for text in texts]
    words, sizes = map(list, zip(*counted, strict=True))
    found = merges.infer(merges.replay(words, sizes, order), ["a", "b"])
    share = sizes[0] / sum(sizes)
    assert found.slack < 1e-3 and abs(found.shares["a"] - share) < 0.1 and found.missing == 0
    assert merges.infer(merges.replay(words, sizes, order[::-1]), ["a", "b"]).slack > 1


def test_merges_that_tell_nothing():
    """Without a merge in the texts there is no answer; where texts are alike, any share is one, and that is said."""
    words = [Counter({"abab": 3, "aab": 1, "ba": 4}), Counter({"ab": 5, "ba": 2})]
    with pytest.raises(UserError, match="no merge of the tokenizer is in these texts"):
        merges.infer(merges.replay(words, [100, 100], [("x", "y")]), ["a", "b"])
    alike = merges.infer(merges.replay([words[0]] * 2, [100, 100], [("a", "b")]), ["a", "b"])
    assert alike.loose == ("a", "b")


# --- clusters --------------------------------------------------------------------------------------------------------


def test_files_of_clusters(tmp_path):
    """Written whole; a folder with clusters of an earlier call or with an input is refused."""
    made = clusters.Clusters(np.array([0, 2, 0]), [["a"], ["b"], ["c"]])
    assert clusters.write(tmp_path, ["x", "yy", "z"], made) == {"cluster00": 2, "cluster02": 2}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["cluster00.jsonl", "cluster02.jsonl", "prior.json"]
    with pytest.raises(UserError, match=r"holds cluster00.jsonl of an earlier call"):
        clusters.check_output(tmp_path, [])
    (tmp_path / "new").mkdir()
    with pytest.raises(UserError, match="holds the input"):
        clusters.check_output(tmp_path / "new", [tmp_path / "new" / "a.txt"])


@pytest.mark.slow
def test_clusters(tmp_path):
    """Documents of three vocabularies are told apart; the files are sources, and prior.json is a prior."""
    pytest.importorskip("sklearn")
    texts = [prose(60, seed % 3) + f" number {seed}" for seed in range(60)]
    found = clusters.cluster(texts, 3, 6, 0)
    for kind in range(3):
        assert len(set(found.labels[kind::3].tolist())) == 1
    assert len(set(found.labels.tolist())) == 3 and all(len(words) == clusters.SHOWN for words in found.words)
    sizes = clusters.write(tmp_path, texts, found)
    assert design.numbers(str(tmp_path / "prior.json"), "--prior", "") == sizes
    rows = [json.loads(line) for line in (tmp_path / "cluster01.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 20 and {row["domain"] for row in rows} == {"cluster01"}
    assert sum(map(len, texts)) == sum(sizes.values())
    given = np.eye(3)[np.arange(60) // 20]
    by_rows = clusters.cluster(texts, 3, 3, 0, embeddings=given)
    assert all(len(set(by_rows.labels[20 * i : 20 * i + 20].tolist())) == 1 for i in range(3))
