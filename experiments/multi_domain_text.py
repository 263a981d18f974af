"""Makes the corpus that `configs/balance_scope.py` reads: one Parquet file for each of twelve domains.

    python -m experiments.multi_domain_text data/domains --local=FOLDER

Eight domains are made of Debian 12 packages (`PACKAGES`), fetched with `apt-get download`, so they need Debian or
Ubuntu, dpkg-deb and groff. Four are files that you put into FOLDER (`LOCAL`). A missing file is left out with a
message. A document is a source file, a manual page, a problem, a poem, an article, or several dictionary entries or
speeches. Exact duplicates are dropped. Of a large domain the documents with the smallest hashes are kept, `LIMIT` bytes
in all, so that the choice is random but always the same. `sources.json` records package versions and sizes.
"""

import argparse
import csv
import gzip
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

LIMIT = 18_000_000  # bytes of UTF-8 a domain
LARGEST = 100_000  # bytes of UTF-8; larger source files are mostly tables
SMALLEST = 20  # characters
GROUP = 4_000  # characters, about: entries and speeches that make one document

Texts = Iterable[str]


# --- one file → documents ---------------------------------------------------------------------------------------------


def plain(text: str) -> Texts:
    return [text] if len(text.encode()) <= LARGEST else []


def manual_page(source: str) -> Texts:
    """The text of a manual page without hyphenation and justification; nothing for a page that only names another."""
    if source.startswith(".so "):
        return []
    command = "groff -Kutf8 -Tutf8 -t -man -P-cbou -rLL=100n -rHY=0".split()
    done = subprocess.run(command, input=source.encode(), capture_output=True)
    lines = [re.sub(r"(?<=\S) {2,}", " ", line.rstrip()) for line in done.stdout.decode("utf-8", "replace").split("\n")]
    return [re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"]


def grouped(text: str) -> Iterator[str]:
    """Groups of paragraphs that begin at the margin, of about `GROUP` characters each."""
    run, size = [], 0
    for part in re.split(r"\n\n+(?=\S)", text):
        run.append(part)
        size += len(part)
        if size >= GROUP:
            yield "\n\n".join(run)
            run, size = [], 0
    if run:
        yield "\n\n".join(run)


def articles(text: str) -> Texts:
    """The articles of a file in WikiText format, where a title is a line ` = Title = `."""
    return re.split(r"(?m)^(?= = [^=\n]+ = *$)", text)


def problems(text: str) -> Texts:
    return ["{question}\n{answer}".format(**json.loads(line)) for line in text.splitlines()]


def poems(text: str) -> Texts:
    """The poems of a file with the columns title, dynasty, author, text."""
    return ["\n".join((title, author, body)) for title, _, author, body in list(csv.reader(io.StringIO(text)))[1:]]


# --- the domains ------------------------------------------------------------------------------------------------------

PACKAGES: dict[str, tuple[tuple[str, ...], str, Callable[[str], Texts]]] = {
    "python": (("python3-django", "python3-networkx", "python3-sympy"), r"\.py$", plain),
    # Without the headers that a program wrote: hundreds of them differ by a number.
    "cpp": (("libboost1.74-dev",), r"^(?!.*(preprocess|/aux_/|/fusion/.*/cpp03/)).*\.[hi]pp$", plain),
    "lisp": (("emacs-el",), r"\.el\.gz$", plain),
    "manual_en": (("manpages", "manpages-dev", "git-man"), r"/man/man\d/", manual_page),
    "manual_de": (("manpages-de", "manpages-de-dev"), r"/man/de/man\d/", manual_page),
    "manual_fr": (("manpages-fr", "manpages-fr-dev"), r"/man/fr/man\d/", manual_page),
    "manual_ja": (("manpages-ja", "manpages-ja-dev"), r"/man/ja/man\d/", manual_page),
    "dictionary": (("dict-gcide",), r"gcide\.dict\.dz$", grouped),
}
LOCAL: dict[str, tuple[str, str, Callable[[str], Texts]]] = {
    "encyclopedia": ("wikitext2_valid.txt", "WikiText-2, validation split", articles),
    "drama": ("tinyshakespeare.txt", "tinyshakespeare of karpathy/char-rnn", grouped),
    "maths": ("gsm8k_train.jsonl", "train.jsonl of openai/grade-school-math", problems),
    "poetry_zh": ("poetry_zh.csv", "files of Werneror/Poetry", poems),
}


def package_files(package: Path, pattern: str) -> Iterator[str]:
    """The texts of those files in a .deb whose path matches. Files that are not UTF-8 are left out."""
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE) as unpack:
        with tarfile.open(fileobj=unpack.stdout, mode="r|") as archive:
            for member in archive:
                if member.isfile() and re.search(pattern, member.name):
                    data = archive.extractfile(member).read()
                    data = gzip.decompress(data) if member.name.endswith((".gz", ".dz")) else data
                    text = data.decode("utf-8", "replace")
                    if text.count("\ufffd") * 1000 <= len(text):
                        yield text


def chosen(documents: Texts) -> list[str]:
    """The distinct documents in the order of their hashes, up to `LIMIT` bytes."""
    by_hash = {hashlib.blake2b(d.encode(), digest_size=16).digest(): d for d in documents if len(d) >= SMALLEST}
    out, left = [], LIMIT
    for _, document in sorted(by_hash.items()):
        left -= len(document.encode())
        if left < 0:
            break
        out.append(document)
    return out


def write(path: Path, documents: list[str]) -> int:
    """Writes a Parquet file of one row group with large pages, which zstd compresses best. Returns the text's bytes."""
    table = pa.table({"text": documents})
    options = {"compression": "zstd", "compression_level": 19, "use_dictionary": False, "data_page_size": 1 << 26}
    pq.write_table(table, path, row_group_size=len(documents), **options)
    return sum(len(d.encode()) for d in documents)


def build(out: Path, local: Path | None) -> dict[str, dict]:
    """Writes out/<domain>.parquet. Returns {domain: from, documents, bytes}."""
    out.mkdir(parents=True, exist_ok=True)
    made = {}

    def add(domain: str, source: list[str], documents: Texts) -> None:
        kept = chosen(documents)
        made[domain] = {"from": source, "documents": len(kept), "bytes": write(out / f"{domain}.parquet", kept)}

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
        for domain, (names, pattern, read) in tqdm(PACKAGES.items(), desc="packages", unit="domain"):
            before = set(Path(folder).iterdir())
            subprocess.run(["apt-get", "download", "-q", *names], cwd=folder, check=True, capture_output=True)
            packages = sorted(set(Path(folder).iterdir()) - before)
            files = (text for package in packages for text in package_files(package, pattern))
            add(domain, [p.name for p in packages], (d for found in pool.map(read, files) for d in found))
    for domain, (name, origin, read) in LOCAL.items():
        if local is not None and (local / name).is_file():
            add(domain, [f"{name}: {origin}"], read((local / name).read_text(encoding="utf-8-sig")))
        else:
            print(f"{domain}: left out, there is no {name} ({origin}) in --local={local}", file=sys.stderr)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the domains' files")
    parser.add_argument("--local", type=os.path.expanduser, help="folder of the files that are fetched by hand")
    arguments = parser.parse_args()
    made = build(arguments.out, arguments.local and Path(arguments.local))
    (arguments.out / "sources.json").write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for domain, row in sorted(made.items()):
        stored = (arguments.out / f"{domain}.parquet").stat().st_size
        print(f"{domain:<14} {row['documents']:>7,} documents {row['bytes']:>12,} bytes {stored:>11,} stored")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")
    main()
