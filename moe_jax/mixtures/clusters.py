"""Sorts documents into clusters, which become domains to mix: CLIMB's first step, with scikit-learn.

Letters: n documents, D numbers of an embedding.
"""

import json
import os
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from moe_jax.errors import ConfigError, FileError, UserError
from moe_jax.mixtures.surrogates import missing

WORDS = 50_000  # of the vocabulary of TF-IDF
WIDTH = 128  # of its embeddings, which are its main directions
SHOWN = 8  # words that describe a cluster


class Clusters(NamedTuple):
    """The cluster of each document, from 0, the largest first, and words that are typical of each."""

    labels: Int[np.ndarray, " n"]
    words: list[list[str]]


def documents(path: str, flag: str) -> Sequence[dict[str, str]]:
    """The documents of files, named as `data.sources.NAME.path` names them. Raises UserError, which names the flag."""
    from moe_jax.config import SourceConfig  # these import JAX, which the other functions need not
    from moe_jax.data import cache_folder
    from moe_jax.data.sources import open_source

    if not path:
        raise UserError(f"{flag}: names no files; for example {flag}=data/*.jsonl")
    try:
        config = SourceConfig(kind="files", path=path, validation_fraction=0.0)
        return open_source("text", config, cache_folder()).documents("train")
    except ConfigError as e:
        raise UserError(f"{flag}={path}: {e.rule}" + (f"; {e.hint}" if e.hint else "")) from None


def texts(path: str, flag: str) -> Iterator[str]:
    """The texts of `documents`."""
    return (document["text"] for document in documents(path, flag))


def read_embeddings(path: Path, count: int) -> Float[np.ndarray, "n D"]:
    """One row for each document, from a NumPy file. Raises UserError, FileError."""
    try:
        found = np.load(path, allow_pickle=False)
    except OSError as e:
        raise UserError(f"--embeddings={path}: cannot be read ({e.strerror or e})") from None
    except (ValueError, EOFError, SyntaxError, zipfile.BadZipFile) as e:
        raise FileError(f"{path}: is not a NumPy file of numbers: {str(e)[:200]}") from None
    if not (isinstance(found, np.ndarray) and found.ndim == 2 and found.dtype.kind == "f" and found.shape[1]):
        raise FileError(f"{path}: must be an array [documents, numbers] of floating point")
    if len(found) != count:
        raise UserError(f"--embeddings={path}: has {len(found)} rows for {count} documents")
    if not np.isfinite(found).all():
        raise FileError(f"{path}: has numbers that are not finite")
    return found.astype(np.float32)


def cluster(found: Sequence[str], count: int, fine: int, seed: int, embeddings=None) -> Clusters:
    """Sorts texts into `count` clusters: K-means into `fine` small ones, which are then merged by Ward's method.

    Documents are compared by the directions of their embeddings, by default the main directions of TF-IDF. CLIMB
    (arXiv:2504.13161) embeds with a language model and prunes clusters by quality before it merges them.
    Raises UserError for too few documents, and where scikit-learn is missing.
    """
    try:
        from sklearn.cluster import AgglomerativeClustering, MiniBatchKMeans
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError as e:
        raise missing("cluster", "scikit-learn", e) from None
    if len(found) < count:
        raise UserError(f"--count={count}: there are only {len(found)} documents; nearest valid: {len(found)}")
    if not 2 <= count <= fine:
        raise UserError(f"--count={count}: must be in [2, {fine}], the number of small clusters (--fine)")
    if len(found) < fine:
        raise UserError(f"--fine={fine}: there are only {len(found)} documents; nearest valid: {len(found)}")
    least = 2 if len(found) > 20 else 1
    words = TfidfVectorizer(max_features=WORDS, sublinear_tf=True, min_df=least, max_df=0.5 if least > 1 else 1.0,
                            token_pattern=r"(?u)\b\w\w+\b", stop_words=None)  # fmt: skip
    try:
        weights = words.fit_transform(found)
    except ValueError as e:  # no word is left
        raise UserError(f"--data: there are no words to compare documents by ({e})") from None
    if embeddings is None:
        width = min(WIDTH, weights.shape[1] - 1, len(found) - 1)
        embeddings = TruncatedSVD(width, random_state=seed).fit_transform(weights) if width > 1 else weights.toarray()
    length = np.linalg.norm(embeddings, axis=1, keepdims=True)
    directions = embeddings / np.maximum(length, 1e-12)
    small = MiniBatchKMeans(fine, random_state=seed, n_init=3, batch_size=4096).fit(directions)
    merged = AgglomerativeClustering(count).fit_predict(small.cluster_centers_) if count < fine else np.arange(fine)
    labels = merged[small.labels_]
    sizes = np.bincount(labels, minlength=count)
    place = np.argsort(np.argsort(-sizes, kind="stable"), kind="stable")
    labels = place[labels]
    names, whole = words.get_feature_names_out(), np.asarray(weights.mean(0)).ravel()
    typical = [np.asarray(weights[labels == c].mean(0)).ravel() - whole if (labels == c).any() else whole * 0
               for c in range(count)]  # fmt: skip
    return Clusters(labels, [[str(names[i]) for i in np.argsort(-own)[:SHOWN]] for own in typical])


def check_output(out: Path, inputs: Sequence[str | os.PathLike], flag: str = "--out") -> None:
    """Raises UserError for a folder with clusters of an earlier call, which would be left among the new ones or
    overwritten, and for one that holds an input."""
    if earlier := sorted(out.glob("cluster*.jsonl")):
        raise UserError(
            f"{flag}={out}: holds {earlier[0].name} of an earlier call; remove its clusters, or name another"
        )
    inside = [path for path in inputs if out.resolve() in (Path(path).resolve(), *Path(path).resolve().parents)]
    if inside:
        raise UserError(f"{flag}={out}: holds the input {inside[0]}; name a folder beside it")


def write(out: Path, found: Sequence[str], clusters: Clusters) -> dict[str, int]:
    """Writes OUT/cluster00.jsonl, … and OUT/prior.json with the bytes of each, which is returned.

    A file is a source for `data.sources`, the folder one for configs/balance_scope.py, prior.json a --prior. A cluster
    without documents has no file. Files get their names when all of them are written, prior.json last.
    """
    sizes: dict[str, int] = {}
    for label in np.unique(clusters.labels):
        name, size = f"cluster{label:02d}", 0
        with open(out / f"{name}.jsonl.tmp", "w", encoding="utf-8", errors="replace") as file:
            for i in np.flatnonzero(clusters.labels == label):
                file.write(json.dumps({"text": found[i], "domain": name}) + "\n")
                size += len(found[i].encode("utf-8", "replace"))
        sizes[name] = size
    sizes = {name: size for name, size in sizes.items() if size}
    for name in sizes:
        os.replace(out / f"{name}.jsonl.tmp", out / f"{name}.jsonl")
    (out / "prior.json.tmp").write_text(json.dumps(sizes, indent=1) + "\n", encoding="utf-8")
    os.replace(out / "prior.json.tmp", out / "prior.json")
    return sizes
