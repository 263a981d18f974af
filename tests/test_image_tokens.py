"""experiments/image_tokens.py and the config that trains on its corpus: codes, tokens, and what is held out."""

import hashlib
import io
import json
import sys
import tarfile

import numpy as np
import pyarrow.parquet as pq
import pytest
from threadpoolctl import threadpool_limits

from experiments import emoji, image_tokens, pool
from experiments.emoji import Images
from experiments.image_tokens import BEGIN
from moe_jax.data.tokenizers import train_bpe
from moe_jax.data.vocabularies import JsonTokenizer
from moe_jax.errors import ConfigError, UserError

TEXT = "Whereas the party of the first part, hereinafter called «the owner», has … agreed:\n"
CODES = 32


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("domains")
    for name in ("law", "prose"):
        lines = "".join(json.dumps({"text": f"{TEXT}{name} {i}"}) + "\n" for i in range(40))
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def corpus(text, tmp_path_factory):
    """The folder made of 200 digits, what `build` says of it, the digits, and the patches that k-means saw.

    Every fifth digit is mirrored in the next one.
    """
    out, found = tmp_path_factory.mktemp("images"), emoji.digits()
    images = Images(found.names[:200], found.names[:200], found.pixels[:200].copy())
    images.pixels[1::5] = images.pixels[0::5][:, :, ::-1]
    seen, codebook = [], image_tokens.codebook
    with pytest.MonkeyPatch.context() as patch, threadpool_limits(1):  # threads of k-means wait for each other
        patch.setenv("MOE_JAX_CACHE", str(out / "cache"))
        patch.setattr(image_tokens, "codebook", lambda cut, codes: codebook(seen.append(cut) or cut, codes))
        made = image_tokens.build(out, str(text), images, 2, CODES, 1e-4)
    (out / "sources.json").write_text(json.dumps(made), encoding="utf-8")
    return out, made, images, seen[0]


def rows(folder, name):
    return {row["name"]: row["text"] for row in pq.read_table(folder / f"{name}.parquet").to_pylist()}


def test_one_code_is_one_token(corpus, text):
    """Each document is the begin-of-image token and a token a patch; text has the tokens it has without images."""
    folder, made, *_ = corpus
    tokenizer = JsonTokenizer((folder / "tokenizer.json").read_bytes(), "", "")
    base = JsonTokenizer(image_tokens.text_tokenizer(str(text), image_tokens.VOCABULARY - CODES - 1), "", "")
    assert tokenizer.vocab_size == base.vocab_size + CODES + 1 <= image_tokens.VOCABULARY
    documents = list((rows(folder, "train") | rows(folder, "held_out")).values())
    for document, ids in zip(documents, tokenizer.encode(documents), strict=True):
        assert len(ids) == made["tokens_per_image"] == 17 and ids[0] == base.vocab_size
        np.testing.assert_array_equal(ids[1:] - ids[0] - 1, image_tokens.codes_of(document))
    assert tokenizer.decode(tokenizer.encode(documents[:1])[0]) == documents[0]
    (plain,), (both,) = base.encode([TEXT]), tokenizer.encode([f"{TEXT}{documents[0]}{TEXT}"])
    np.testing.assert_array_equal(np.concatenate([plain, tokenizer.encode(documents[:1])[0], plain]), both)


def test_pictures_of_tokens(corpus):
    """Patches and pictures are inverses; codes give nearly the picture; white stays white."""
    folder, made, images, seen = corpus
    cut = image_tokens.patches(images.pixels, 2)
    np.testing.assert_array_equal(cut[3, 5].reshape(2, 2, 3) * 255, images.pixels[3, 2:4, 2:4])
    np.testing.assert_array_equal(image_tokens.pictures(cut, 2), images.pixels)
    means = np.load(folder / "codebook.npy")
    assert means.shape == (CODES, 12) and (means == 1).all(-1).sum() == 1
    distances = ((cut[:9, :, None] - means) ** 2).sum(-1)
    np.testing.assert_array_equal(image_tokens.nearest_codes(cut[:9], means), distances.argmin(-1))
    trained = [images.names.index(name) for name in rows(folder, "train")]
    np.testing.assert_array_equal(seen, cut[trained])  # k-means saw no held-out image
    documents = rows(folder, "held_out")
    codes = np.stack([image_tokens.codes_of(document) for document in documents.values()])
    originals = images.pixels[[images.names.index(name) for name in documents]]
    error = np.mean((image_tokens.pictures(means[codes], 2).astype(float) - originals) ** 2)
    assert error < 0.3 * originals.astype(float).var()
    assert made["held_out_psnr_db"] == pytest.approx(10 * np.log10(255**2 / error))
    assert (folder / "reconstructions.png").stat().st_size > 5_000


def test_held_out_images_are_new(corpus):
    """A group is on one side, and an image whose mirror image is trained on is on neither."""
    folder, made, images, _ = corpus
    train, held = rows(folder, "train"), rows(folder, "held_out")
    assert not set(train) & set(held) and (len(train), len(held)) == (made["images"], made["held_out_images"])
    assert all(image_tokens.is_held_out(name) for name in held)
    pairs = zip(images.names[0::5], images.names[1::5], strict=True)
    split = [pair for pair in pairs if (pair[0] in train) != (pair[1] in train)]
    assert split and not any(name in held for pair in split for name in pair)
    assert made["held_out_dropped"] >= len(split)
    trained, kept = (np.stack([image_tokens.codes_of(text) for text in side.values()]) for side in (train, held))
    black = image_tokens.nearest_codes(np.zeros((1, 1, 12), np.float32), np.load(folder / "codebook.npy")).item()
    common = image_tokens.most_in_common(kept, trained, black)  # around digits; white is the ink
    near = {str(share): np.mean(common > share) for share in image_tokens.IN_COMMON}
    assert made["held_out_near_copies"] == pytest.approx(near)
    white = int((np.load(folder / "codebook.npy") == 1).all(-1).argmax())
    assert not np.allclose(image_tokens.most_in_common(kept, trained, white), common)
    one = image_tokens.patches(images.pixels[:1], 2)
    for turned in (np.rot90(images.pixels[:1], 1, (1, 2)), images.pixels[:1, ::-1]):
        assert image_tokens.resembling(one, image_tokens.patches(turned, 2), 2)[0] < 1e-3
    assert image_tokens.resembling(one, image_tokens.patches(images.pixels[2:3], 2), 2)[0] > 0.1


def packed(folder, name, icons, characters):
    """A package of icons as npm packs it, and its entry of PACKAGES."""
    path = folder / f"iconify-json-{name}-1.0.tgz"
    with tarfile.open(path, "w:gz") as archive:
        for file, body in (("icons.json", {"icons": icons, "width": 4}), ("chars.json", characters)):
            member, data = tarfile.TarInfo(f"package/{file}"), json.dumps(body).encode()
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return {name: ("1.0", "MIT", hashlib.sha256(path.read_bytes()).hexdigest())}


def test_icons_of_packages(tmp_path, monkeypatch, capsys):
    """Drawings of a character in all packages are one group; tones, hidden icons and drawings of nothing are left out;
    files are those that were meant."""
    icon = lambda body, **more: {"body": body, **more}
    icons = {"cook": icon("c"), "cook-dark": icon("d"), "logo": icon("l"), "old": icon("o", hidden=True)}
    codes = {"1f468-200d-1f373": "cook", "1f468-1f3ff-200d-1f373": "cook-dark", "e001": "logo", "2764": "old"}
    one = packed(tmp_path, "one", icons, codes)
    two = packed(tmp_path, "two", {"man": icon("m"), "cook": icon("k"), "flag": icon("f")},
                 {"1f468": "man", "1f1e9-1f1ea": "flag"})  # fmt: skip
    monkeypatch.setattr(emoji, "PACKAGES", one | two)
    monkeypatch.setattr(emoji, "drawn", lambda svg, size: np.full((size, size, 3), len(svg), np.uint8))
    found = emoji.emoji(tmp_path, 4)
    groups = {"one:cook": "1f468", "two:man": "1f468", "two:cook": "1f468", "two:flag": "1f1e9-1f1ea"}
    assert dict(zip(found.names, found.groups, strict=True)) == groups and found.pixels.shape == (4, 4, 4, 3)
    names = emoji.characters([tmp_path / f"iconify-json-{name}-1.0.tgz" for name in ("one", "two")])
    assert names["cook"] == "1f468-200d-1f373" and "logo" not in names
    with open(tmp_path / "iconify-json-two-1.0.tgz", "ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=r"two-1\.0\.tgz: is not @iconify-json/two@1\.0, whose SHA-256 is"):
        emoji.emoji(tmp_path, 4)
    (tmp_path / "iconify-json-two-1.0.tgz").unlink()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"npm pack --silent @iconify-json/two@1\.0: .*lacks iconify-json-two"):
        emoji.emoji(tmp_path, 4)
    with pytest.raises(UserError, match=r"--packages=.*nowhere: no such folder"):
        emoji.emoji(tmp_path / "nowhere", 4)
    for flags, says in (
        ("--codes=0", "--codes=0: must be ≥ 1 and ≤ 15871, which leaves text 512 tokens"),
        ("--patch=0", "--patch=0: must be ≥ 1 and divide the 60 pixels of a side"),
        ("--digits --patch=3", "--patch=3: must be ≥ 1 and divide the 8 pixels of a side"),
        ("--digits --size=8", "--size=8: has no effect with --digits"),
    ):
        monkeypatch.setattr(sys, "argv", ["image_tokens", f"{tmp_path}/out", "--text=text", *flags.split()])
        with pytest.raises(SystemExit):
            image_tokens.main()
        assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_near_copies():
    """Of the tokens that are not paper, the most that one other image has at the same places."""
    others = np.array([[9, 1, 2, 3], [9, 1, 0, 0], [1, 9, 9, 9]])
    one = np.array([[9, 1, 2, 9], [9, 1, 3, 2], [9, 9, 9, 9]])
    np.testing.assert_allclose(image_tokens.most_in_common(one, others, paper=9), [1, 1 / 3, 0])


def test_groups_of_emoji():
    """Variants of a character are one group: by hair and profession, presentation, and tone. Flags have two letters."""
    codes = (
        "1f468-200d-1f9b0",
        "1f468-1f3fd-200d-1f680",
        "1f468",
        "1f1e9-1f1ea",
        "1f1e9-1f1f0",
        "2764-fe0f-200d-1f525",
    )
    assert [emoji.group_of(code) for code in codes] == ["1f468"] * 3 + ["1f1e9-1f1ea", "1f1e9-1f1f0", "2764"]
    svg = emoji.svg_of({"body": "<path/>", "left": 2, "width": 20}, {"width": 16, "height": 12})
    assert 'viewBox="2 0 20 12"><path/></svg>' in svg


def test_text_with_codes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_JAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text").mkdir()
    lines = "".join(json.dumps({"text": f"{TEXT}{i}"}) + "\n" for i in range(30))
    (tmp_path / "text" / "law.jsonl").write_text(lines + json.dumps({"text": chr(BEGIN + 5)}), encoding="utf-8")
    with pytest.raises(UserError, match=r"law has U\+F0005, which is a character of images"):
        image_tokens.text_tokenizer(str(tmp_path / "text"), 300)


def test_config(corpus, text):
    """Images are trained on at most 4.5 times, from one file, and evaluated on another; labels are an option."""
    folder, made, *_ = corpus
    load = lambda argument: pool.load_config("configs/modalities.py", argument, {})
    cfg = load(f"{text},{folder}")
    sources, tokens = cfg.data.sources, cfg.train.steps * cfg.data.batch_size * cfg.data.seq_len
    total = sum(source.weight for source in sources.values())
    assert sources["images"].weight / total * tokens == pytest.approx(4.5 * made["tokens"])
    assert sources["images"].validation_fraction == 0 and sources["images_held_out"].weight == 0
    assert {s.domain for s in sources.values()} == {"law", "prose", "images"} and not cfg.data.labels
    for argument, rule in (
        (f"{text}", "must be a folder of text and a folder of images"),
        (f"{text},{text}", "is not a folder of image tokens"),
        (f"{text},{folder},label", "must be a folder of text and a folder of images"),
    ):
        with pytest.raises(ConfigError, match=rule):
            load(argument)


def test_base_of_the_tokenizer():
    """Codes are added behind the tokens of the text, and are no special tokens."""
    base = train_bpe([TEXT], 300)
    made = JsonTokenizer(image_tokens.with_codes(base.files["tokenizer.json"], 3), "", "")
    assert made.vocab_size == base.vocab_size + 4 and made.end_of_text == base.end_of_text
    assert not set(made.special) & {chr(BEGIN + i) for i in range(4)}
