"""Finds domains without held-out text, and advises what to do about them."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from moe_jax.config import DataConfig, MixtureConfig, SourceConfig
from moe_jax.data.corpus import TokenStore
from moe_jax.errors import ConfigError

_LARGEST = 0.9  # the largest `validation_fraction`


def _domains(store: TokenStore, which: np.ndarray | None) -> Counter[str]:
    """The number of documents of each domain. which: those that count, [documents] bool; None: all."""
    ids = store.document_domains if which is None else store.document_domains[which]
    return Counter({domain: int((ids == i).sum()) for i, domain in enumerate(store.domains)})


class NotHeldOut(NamedTuple):
    """A domain that is trained on but not evaluated, and advice how to change that."""

    domain: str
    source: str
    documents: int
    advice: str

    def __str__(self) -> str:
        many = f"{self.documents:,} documents" if self.documents > 1 else "one document"
        return f"domain {self.domain!r} of data.sources.{self.source} ({many}) has no held-out text: {self.advice}"


def targets_of(cfg: MixtureConfig, trained: Sequence[str], rows: Mapping[str, Sequence]) -> tuple[str, ...]:
    """The sources whose held-out text counts for a controller: `mixture.target`, or all trained ones that have some.

    rows: of held-out text, by source. Raises ConfigError if there are none.
    """
    found = tuple(name for name in ((cfg.target,) if cfg.target else trained) if len(rows.get(name, ())))
    if not found:
        raise ConfigError("mixture.target", cfg.target, "has no row of held-out text", "add documents")
    return found


def not_held_out(
    cfg: DataConfig, stores: Mapping[tuple[str, str], TokenStore], in_rows: Mapping[tuple[str, str], np.ndarray]
) -> list[NotHeldOut]:
    """The domains that are trained on and without held-out text, in the order of the sources.

    in_rows: for sources with roles, which documents of a store are in a row.
    """
    held, left_out = Counter(), Counter()
    for (name, split), store in stores.items():
        if split == "validation":
            which = in_rows.get((name, split))
            held.update(_domains(store, which))
            left_out.update({} if which is None else _domains(store, ~which))
    found = []
    for (name, split), store in stores.items():
        for domain, count in _domains(store, in_rows.get((name, split))).items() if split == "train" else ():
            if count and not held[domain]:
                hint = _advice(name, cfg.sources[name], count, store.least_fractions[domain], store.cut)
                if left_out[domain]:
                    hint = f"its {left_out[domain]:,} held-out documents have no answer in a row; raise data.seq_len"
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
