"""Makes a corpus of images as tokens: emoji in patches, of which each is the nearest entry of a codebook.

    pip install resvg-py==0.5.0 pillow==13.0.0 scikit-learn==1.9.1     # and npm, which fetches the icons
    python -m experiments.multi_domain_text data/domains --local=FOLDER
    python -m experiments.image_tokens data/images --text=data/domains

The icons are the packages in emoji.py, under Apache-2.0, MIT and CC-BY-4.0; with `--packages=FOLDER` those that lie
there are not fetched. Icons with a skin tone are left out. An image has 60×60 pixels, and 20×20 patches of three
channels. The codebook is the means that k-means finds of patches of training images. `--digits` makes the same of the
digits of scikit-learn, 8×8 pixels, which need no download.

One code is one character, of a private-use plane of Unicode, and one token: an image is a document of a begin-of-image
character and a character for each patch, row by row. `tokenizer.json` is a byte-level BPE of the text, with a token for
each of these characters behind it, so that text has the tokens that it would have without images. Text with such a
character is refused. Another version of a package may give other pixels or other codes, and so another corpus:
sources.json has the versions and the SHA-256 of train.parquet.

Whole images are held out. All drawings of one character, in every package, are on the same side, and a held-out image
is dropped if it, mirrored or turned, resembles an emoji that is trained on. Near copies remain: sources.json says which
share of the held-out images have how much of their drawing in common with one image that is trained on.

OUT has train.parquet, held_out.parquet, tokenizer.json, codebook.npy, sources.json with packages, licences and counts,
and reconstructions.png: held-out originals beside what their tokens say. Whoever publishes that picture credits the
sets with the licence CC-BY-4.0 beside it. `configs/modalities.py` trains on this folder and on the text.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Int, UInt8
from matplotlib.figure import Figure

from experiments import pool
from experiments.emoji import PACKAGES, Images, digits, emoji
from moe_jax import terminal
from moe_jax.data.rows import permutation
from moe_jax.data.sources import SPLITS, cache_folder, open_source
from moe_jax.data.tokenizers import train_bpe
from moe_jax.errors import UserError
from moe_jax.evaluate.drawing import save

VOCABULARY = 16_384  # tokens of text and images together
FEWEST = 512  # of text, of which 256 are bytes
TEXT_CONFIG = "configs/balance_scope.py"  # names the sources of a folder of text
TEXT_BYTES = 40_000_000  # of text that the tokenizer is trained on
BEGIN = 0xF0000  # the character before an image; code i is the character BEGIN + 1 + i
CODES = re.compile(f"[{chr(BEGIN)}-{chr(BEGIN + 0xFFFD)}]")  # that plane of Unicode
HELD_OUT = 0.1  # of the characters that are drawn
SAMPLE = 200_000  # different patches that k-means sees
MADE_WITH = ("numpy", "pillow", "resvg-py", "scikit-learn")  # what decides pixels and codes
INSTALL = "pip install resvg-py==0.5.0 pillow==13.0.0 scikit-learn==1.9.1"
IN_COMMON = (0.5, 0.66, 0.8)  # shares of the tokens of a drawing, for the count of near copies
RESEMBLES = 0.1  # root mean square difference of colours, 0 to 1, under which an emoji counts as a variant of another

# --- patches and codes -----------------------------------------------------------------------------------------------


def patches(pixels: UInt8[np.ndarray, "N S S 3"], side: int) -> Float[np.ndarray, "N P D"]:
    """Squares of side × side pixels, row by row, as numbers from 0 to 1."""
    n, size, _, channels = pixels.shape
    cut = pixels.reshape(n, size // side, side, size // side, side, channels).swapaxes(2, 3)
    return cut.reshape(n, -1, side * side * channels).astype(np.float32) / 255


def pictures(cut: Float[np.ndarray, "N P D"], side: int) -> UInt8[np.ndarray, "N S S 3"]:
    """The inverse of `patches`."""
    n, count, _ = cut.shape
    rows = round(count**0.5)
    whole = cut.reshape(n, rows, rows, side, side, 3).swapaxes(2, 3).reshape(n, rows * side, rows * side, 3)
    return (whole * 255).round().astype(np.uint8)


def codebook(cut: Float[np.ndarray, "N P D"], codes: int) -> Float[np.ndarray, "C D"]:
    """The means of k-means on different patches, of which each counts once. One of them is made white exactly."""
    from sklearn.cluster import MiniBatchKMeans

    different = np.unique(cut.reshape(-1, cut.shape[-1]), axis=0)
    if len(different) > SAMPLE:
        different = different[np.sort(permutation(len(different), "patches")[:SAMPLE])]
    model = MiniBatchKMeans(min(codes, len(different)), random_state=0, batch_size=8192, n_init=1)
    means = model.fit(different).cluster_centers_.astype(np.float32)
    means[np.argmin(((means - 1) ** 2).sum(-1))] = 1.0  # most of a picture is paper
    return means


def nearest_codes(cut: Float[np.ndarray, "N P D"], means: Float[np.ndarray, "C D"]) -> Int[np.ndarray, "N P"]:
    """The number of the nearest mean of each patch."""
    half = 0.5 * (means**2).sum(-1)
    return np.stack([np.argmax(one @ means.T - half, axis=-1) for one in cut])


# --- codes and text --------------------------------------------------------------------------------------------------


def as_text(codes: Int[np.ndarray, " P"]) -> str:
    """The document of an image: the begin-of-image character, and a character for each code."""
    return chr(BEGIN) + "".join(chr(BEGIN + 1 + int(code)) for code in codes)


def codes_of(text: str) -> Int[np.ndarray, " P"]:
    """The inverse of `as_text`."""
    return np.array([ord(character) - BEGIN - 1 for character in text[1:]], np.int64)


def with_codes(text_tokenizer: bytes, codes: int) -> bytes:
    """A tokenizer.json with a token for the begin of an image and for each code, behind those that it has."""
    import tokenizers

    made = tokenizers.Tokenizer.from_str(text_tokenizer.decode())
    words = [chr(BEGIN + i) for i in range(codes + 1)]
    made.add_tokens([tokenizers.AddedToken(word, normalized=False, special=False) for word in words])
    return made.to_str().encode()


def text_tokenizer(folder: str, vocabulary: int) -> bytes:
    """The tokenizer.json of a byte-level BPE of a folder's training text.

    Raises UserError for text with characters of images.
    """
    sample: list[str] = []
    for name, source in pool.load_config(TEXT_CONFIG, folder, {}).data.sources.items():
        opened = open_source(name, source, cache_folder())
        for split in SPLITS:
            documents, share = opened.documents(split), TEXT_BYTES * source.weight if split == "train" else 0
            for index in permutation(len(documents), "tokenizer", name):
                text = documents[int(index)]["text"]
                if found := CODES.search(text):
                    rule = f"has U+{ord(found[0]):X}, which is a character of images"
                    raise UserError(f"--text={folder}: {name} {rule}")
                if share > 0:
                    sample.append(text)
                    share -= len(text.encode())
        opened.forget()
    return train_bpe(sample, vocabulary).files["tokenizer.json"]


# --- held out --------------------------------------------------------------------------------------------------------


def is_held_out(group: str) -> bool:
    """Whether the images of a group are held out. A hash decides."""
    return int.from_bytes(hashlib.blake2b(group.encode(), digest_size=8).digest()) < HELD_OUT * 2**64


def resembling(
    one: Float[np.ndarray, "N P D"], others: Float[np.ndarray, "M P D"], side: int
) -> Float[np.ndarray, " N"]:
    """The smallest root mean square difference of each image, turned and mirrored in all ways, to one of `others`.

    Images are compared at one colour a patch.
    """
    small = lambda cut: cut.reshape(*cut.shape[:2], side * side, 3).mean(2, dtype=np.float64)
    rows = round(one.shape[1] ** 0.5)
    flat = small(others).reshape(len(others), -1)
    square, best = small(one).reshape(len(one), rows, rows, 3), np.full(len(one), np.inf)
    for turns in range(4):
        for mirrored in (False, True):
            turned = np.rot90(square[:, :, ::-1] if mirrored else square, turns, (1, 2)).reshape(len(one), -1)
            squares = (turned**2).sum(-1)[:, None] + (flat**2).sum(-1) - 2 * turned @ flat.T
            best = np.minimum(best, np.sqrt(np.maximum(squares, 0).min(-1) / flat.shape[1]))
    return best


def most_in_common(one: Int[np.ndarray, "N P"], others: Int[np.ndarray, "M P"], paper: int) -> Float[np.ndarray, " N"]:
    """The share of each image's tokens that are not `paper` that some image of `others` has too, place by place; the
    largest over these images."""
    found = np.zeros(len(one))
    for i, codes in enumerate(one):
        drawn = np.flatnonzero(codes != paper)
        if len(drawn):
            found[i] = (others[:, drawn] == codes[drawn]).mean(1).max()
    return found


# --- files -----------------------------------------------------------------------------------------------------------


def comparison(originals: UInt8[np.ndarray, "N S S 3"], made: UInt8[np.ndarray, "N S S 3"]) -> Figure:
    """A figure of originals beside what their tokens say, four pairs in a row."""
    columns = min(4, len(made))
    framed = np.pad(np.concatenate([originals, made], 2), ((0, 0), (3, 3), (6, 6), (0, 0)), constant_values=255)
    framed = np.insert(framed, [framed.shape[2] // 2] * 2, 255, axis=2)
    framed = framed[: len(framed) // columns * columns]
    rows = framed.reshape(-1, columns, *framed.shape[1:]).swapaxes(1, 2)
    figure = Figure((9.6, 5.0), layout="constrained")
    axis = figure.subplots()
    axis.imshow(rows.reshape(rows.shape[0] * rows.shape[1], -1, 3), interpolation="nearest")
    axis.set_axis_off()
    figure.suptitle("Held-out images: left the original, right what its tokens say", fontsize=10)
    return figure


def write(path: Path, names: list[str], codes: Int[np.ndarray, "N P"]) -> None:
    """Writes a Parquet file with the columns name and text."""
    table = pa.table({"name": names, "text": [as_text(row) for row in codes]})
    pq.write_table(table, path, compression="zstd", compression_level=19, use_dictionary=False)


def build(out: Path, text: str, images: Images, side: int, codes: int, resembles: float) -> dict[str, Any]:
    """Writes the files of OUT but sources.json. Returns counts, shares and the error of held-out images.

    side: of a patch, in pixels. resembles: a held-out image at most so far from one that is trained on is dropped.
    """
    held = np.array([is_held_out(group) for group in images.groups])
    cut = patches(images.pixels, side)
    distance = resembling(cut[held], cut[~held], side)
    kept = held.copy()
    kept[held] = distance > resembles
    if not kept.any():
        raise UserError("no held-out image differs from those that are trained on")
    means = codebook(cut[~held], codes)
    numbers = nearest_codes(cut, means)
    made = pictures(means[numbers], side)
    tokenizer = with_codes(text_tokenizer(text, VOCABULARY - len(means) - 1), len(means))

    out.mkdir(parents=True, exist_ok=True)
    np.save(out / "codebook.npy", means)
    (out / "tokenizer.json").write_bytes(tokenizer)
    for name, which in (("train", ~held), ("held_out", kept)):
        write(out / f"{name}.parquet", images.where(which).names, numbers[which])
    shown = np.flatnonzero(kept)[:16]
    save(comparison(images.pixels[shown], made[shown]), out / "reconstructions", ("png",))
    counts = np.bincount(numbers[~held].ravel())
    paper = int(counts.argmax())  # white around emoji, black around digits
    copies = most_in_common(numbers[kept], numbers[~held], paper)
    error = (made[kept].astype(float) - images.pixels[kept]) ** 2
    tokens = numbers.shape[1] + 1
    return {
        "images": int((~held).sum()),
        "tokens": int((~held).sum()) * tokens,
        "held_out_images": int(kept.sum()),
        "held_out_tokens": int(kept.sum()) * tokens,
        "held_out_dropped": int((held & ~kept).sum()),
        "held_out_near_copies": {str(share): float((copies > share).mean()) for share in IN_COMMON},
        "tokens_per_image": tokens,
        "codes": len(means),
        "codes_used": len(np.unique(numbers[~held])),
        "commonest_code": float(counts[paper] / numbers[~held].size),
        "held_out_psnr_db": float(10 * np.log10(255**2 / error.mean())),
        "train_sha256": hashlib.sha256((out / "train.parquet").read_bytes()).hexdigest(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the corpus")
    parser.add_argument("--text", type=os.path.expanduser, required=True, help="folder of the domains of text")
    parser.add_argument("--packages", type=os.path.expanduser, help="folder of the packages; default: OUT")
    parser.add_argument("--digits", action="store_true", help="the digits of scikit-learn in place of emoji")
    parser.add_argument("--size", type=int, default=None, help="pixels of a side of an emoji; default: 60")
    parser.add_argument("--patch", type=int, default=None, help="pixels of a side of a patch; default: 3, of digits 2")
    parser.add_argument("--codes", type=int, default=None, help="size of the codebook; default: 1024, of digits 64")
    given = parser.parse_args()
    for flag in ("size", "packages") if given.digits else ():
        if (value := getattr(given, flag)) is not None:
            parser.error(f"--{flag}={value}: has no effect with --digits")
    usual = {"size": 8, "patch": 2, "codes": 64} if given.digits else {"size": 60, "patch": 3, "codes": 1024}
    size, side, codes = (usual[name] if getattr(given, name) is None else getattr(given, name) for name in usual)
    if size < 1 or side < 1 or size % side:
        parser.error(f"--patch={side}: must be ≥ 1 and divide the {size} pixels of a side")
    most = VOCABULARY - FEWEST - 1
    if not 1 <= codes <= most:
        parser.error(f"--codes={codes}: must be ≥ 1 and ≤ {most}, which leaves text {FEWEST} tokens")
    given.out.mkdir(parents=True, exist_ok=True)
    try:
        needed = ("numpy", "scikit-learn") if given.digits else MADE_WITH
        versions = {name: importlib.metadata.version(name) for name in needed}
        if given.digits:  # different digits resemble each other: only equal ones are dropped
            made = build(given.out, given.text, digits(), side, codes, 1e-6)
        else:
            images = emoji(given.out if given.packages is None else Path(given.packages), size)
            made = build(given.out, given.text, images, side, codes, RESEMBLES)
    except (UserError, ValueError) as error:
        sys.exit(f"error: {error}")
    except ImportError as error:
        sys.exit(f"error: {error}; {INSTALL}")
    packages = {f"@iconify-json/{name}": dict(zip(("version", "licence", "sha256"), row, strict=True))
                for name, row in PACKAGES.items()}  # fmt: skip
    made["made_with"] = versions
    made["from"] = {"scikit-learn": "load_digits"} if given.digits else packages
    (given.out / "sources.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    for name, value in made.items():
        if name != "from":
            print(f"{name:<18} {value:,.3f}" if isinstance(value, float) else f"{name:<18} {value}")


if __name__ == "__main__":
    terminal.replace_unprintable()
    main()
