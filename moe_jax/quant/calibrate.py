"""Calibration text: rows of a run's own training sources, or of text files, as training packs them."""

import dataclasses
import glob
import itertools
import os
from pathlib import Path

import numpy as np

from moe_jax import config, data
from moe_jax.config import RunConfig, SourceConfig
from moe_jax.data import phases
from moe_jax.errors import ConfigError, nearest

MINE = "calibration"  # name of a source of files


def calibration_rows(
    cfg: RunConfig, folder: Path, count: int, seed: int, names: str = ""
) -> tuple[dict[str, np.ndarray], str]:
    """`count` rows of calibration text, arrays [count, S] as of a batch, and where they are from.

    folder: the run directory, whose tokenizer is used. seed: decides which rows. names: sources of the run, divided by
    commas, or the path or glob of text files; "": all sources that the run is trained on, in its proportions. Held-out
    text is never read: of files its share is left out as the run leaves it out. Raises ConfigError for a source that is
    not there, for files that are held-out text in part, and for too little text.
    """
    sources, where = _sources(cfg, names)
    # One batch has the rows of each source in proportion to its weight.
    fields = dataclasses.replace(cfg.data, sources=sources, batch_size=count)
    try:
        corpus = data.prepare(fields, workdir=None, seed=seed, progress=False, init_from=str(folder))
    except ConfigError as e:
        if not e.name.startswith(("data.seq_len", "data.sources", "path", "seq_len", "sources")):
            raise
        raise ConfigError("quant.calibrate", names, f"{e.name}={e.value!r} {e.rule}", e.hint) from None
    found = sum(len(corpus.rows_of(name, "train")) for name in corpus.trained)
    if found < count:
        rule = f"needs {count} rows of {cfg.data.seq_len} tokens, but the text of {where} has {found}"
        raise ConfigError("quant.rows", count, rule, f"nearest valid: {found}; or name more text in --calibrate")
    taken = lambda count: zip(corpus.trained, phases.counts(weights, 0, count), strict=True)
    weights = [sources[name].weight for name in corpus.trained]
    short = lambda count: [(name, n) for name, n in taken(count) if n > len(corpus.rows_of(name, "train"))]
    if wrong := short(count):  # rows would be repeated
        fits = next(n for n in range(count - 1, 0, -1) if not short(n))
        name, n = wrong[0]
        has = len(corpus.rows_of(name, "train"))
        rule = f"takes {n} rows of {cfg.data.seq_len} tokens from {name}, which has {has}"
        raise ConfigError("quant.rows", count, rule, f"nearest valid: {fits}; or name other sources in --calibrate")
    batches = iter(corpus.train_iterator(range(count)))
    rows = next(batches)
    batches.close()
    return rows, where


def _sources(cfg: RunConfig, names: str) -> tuple[dict[str, SourceConfig], str]:
    """The sources that are read, and their names in one line. Weights are shares of the run's rows."""
    shares = _shares(cfg)
    alone = lambda name, weight: dataclasses.replace(cfg.data.sources[name], weight=weight, stage_weights=())
    if not names:
        return {name: alone(name, share) for name, share in shares.items()}, ", ".join(shares)
    wanted = [name.strip() for name in names.split(",")]
    if all(name in cfg.data.sources for name in wanted):
        return {name: alone(name, shares.get(name, 1.0)) for name in wanted}, ", ".join(wanted)
    if any(mark in names for mark in "/*.") or Path(names).expanduser().exists():
        return {MINE: _files(cfg, str(Path(names).expanduser()))}, names
    wrong = next(name for name in wanted if name not in cfg.data.sources)
    rule = f"{wrong!r} is neither a source of the run nor a file"
    raise ConfigError("quant.calibrate", names, rule, nearest(wrong, cfg.data.sources))


def _shares(cfg: RunConfig) -> dict[str, float]:
    """The share of each source in the rows of the run, by its configuration: of all stages together."""
    steps, shares = cfg.train.steps, dict.fromkeys(cfg.data.sources, 0.0)
    borders = (0, *(min(stage, steps) for stage in cfg.mixture.stages), steps)
    for stage, (begin, end) in enumerate(itertools.pairwise(borders)):
        weights = {name: source.weight_in(stage) for name, source in cfg.data.sources.items()}
        for name, share in config.shares(weights).items():
            shares[name] += (end - begin) / steps * share
    return {name: share for name, share in shares.items() if share > 0}


def _files(cfg: RunConfig, path: str) -> SourceConfig:
    """The source of the text files at a path or glob.

    A document that the run would hold out is left out. Raises ConfigError for files of a source of the run, which that
    source may cut into other documents.
    """
    theirs = {name: source for name, source in cfg.data.sources.items() if source.kind == "files" and source.holds_out}
    found = set(map(os.path.realpath, glob.glob(path, recursive=True)))
    for name, source in theirs.items():
        if found & set(map(os.path.realpath, glob.glob(os.path.expanduser(source.path), recursive=True))):
            rule = f"names files of the source {name!r}, of whose documents some are held out"
            raise ConfigError("quant.calibrate", path, rule, f"nearest valid: {name!r}")
    fraction = max((source.validation_fraction for source in theirs.values()), default=0.0)
    return SourceConfig(kind="files", path=path, validation_fraction=fraction)
