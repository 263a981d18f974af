"""The labels of domains (`data.labels`), and how much text each label has."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int

from moe_jax.config.fields import require
from moe_jax.errors import nearest


def of_domains(names: Mapping[str, int], domains: Sequence[str]) -> Int[np.ndarray, " domains"] | None:
    """The label of each domain, 0 for one that is not named; None without labels."""
    return np.array([names.get(domain, 0) for domain in domains], np.int32) if names else None


def lines(names: Mapping[str, int], domains: Sequence[str], stats: Sequence[dict]) -> list[str]:
    """Lines for the user: the domains of each label, their training tokens, and names of which there is no text.

    stats: those of `Corpus.stats`.
    """
    if not names:
        return []
    absent = [name for name in names if name not in domains]
    return [f"labels: {_say(names, domains, stats)}", *(f"labels: no text here is of the domain {n}" for n in absent)]


def check(names: Mapping[str, int], domains: Sequence[str], stats: Sequence[dict]) -> None:
    """Raises ConfigError for a name that is no domain of the text, and for a label without training text: what belongs
    to it in a new model would learn nothing."""
    for name in names:
        rule = f"must be a domain of the text: {', '.join(domains)}"
        require(name in domains, "data.labels", name, rule, nearest(name, domains))
    for label, (_, tokens) in enumerate(_text(names, domains, stats)):
        rule = f"leaves the label {label} without training text: {_say(names, domains, stats)}"
        require(tokens > 0, "data.labels", dict(names), rule, "name domains with text for each of 0, 1, …")


def _text(names: Mapping[str, int], domains: Sequence[str], stats: Sequence[dict]) -> list[tuple[list[str], int]]:
    """The domains of each label, and the tokens of their training text."""
    count = max(names.values(), default=-1) + 1
    found = [[name for name in domains if names.get(name, 0) == label] for label in range(count)]
    tokens = lambda its: sum(row["tokens"] for row in stats if row["split"] == "train" and row["domain"] in its)
    return [(its, tokens(its)) for its in found]


def _say(names: Mapping[str, int], domains: Sequence[str], stats: Sequence[dict]) -> str:
    text = enumerate(_text(names, domains, stats))
    return ", ".join(f"{label} = {' '.join(its) or 'no domain'} ({tokens:,} tokens)" for label, (its, tokens) in text)
