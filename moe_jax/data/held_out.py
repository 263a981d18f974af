"""Finds domains without held-out text, and advises what to do about them."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from moe_jax.config import DataConfig, SourceConfig
from moe_jax.data.corpus import TokenStore

_LARGEST = 0.9  # the largest `validation_fraction`


def _domains(stores: Iterable[TokenStore]) -> Counter[str]:
    """The number of documents of each domain."""
    found: Counter[str] = Counter()
    for store in stores:
        for i, domain in enumerate(store.domains):
            found[domain] += int((store.document_domains == i).sum())
    return found


class NotHeldOut(NamedTuple):
    """A domain that is trained on but not evaluated, and advice how to change that."""

    domain: str
    source: str
    documents: int
    advice: str

    def __str__(self) -> str:
        many = f"{self.documents:,} documents" if self.documents > 1 else "one document"
        return f"domain {self.domain!r} of data.sources.{self.source} ({many}) has no held-out text: {self.advice}"


def not_held_out(cfg: DataConfig, stores: Mapping[tuple[str, str], TokenStore]) -> list[NotHeldOut]:
    """The domains without held-out text, in the order of the sources."""
    held = _domains(store for (_, split), store in stores.items() if split == "validation")
    found = []
    for (name, split), store in stores.items():
        for domain, count in _domains([store]).items() if split == "train" else ():
            if not held[domain]:
                hint = _advice(name, cfg.sources[name], count, store.least_fractions[domain], store.cut)
                found.append(NotHeldOut(domain, name, count, hint))
    return found


def _advice(name: str, source: SourceConfig, documents: int, least: float, cut: bool) -> str:
    """Advice how to get held-out text for a domain.

    documents: number of its training documents. least: the fraction above which the first of them is held out.
    cut: whether they were cut out of text files.
    """
    field = f"data.sources.{name}"
    if source.kind == "tfds":
        return f"set {field}.validation_split to a split that has this domain"
    enough = max(math.floor(least * 1000 + 1) / 1000, 0.05)
    if documents > 1 and enough <= _LARGEST:
        return f"{field}.validation_fraction={enough:g} holds out one document or more"
    if documents == 1 and cut and source.documents in ("auto", "file"):
        both = "" if source.validation_fraction else f" and {field}.validation_fraction=0.05"
        return f"cut it into documents, for example with {field}.documents=500{both}"
    return "it needs more documents"
