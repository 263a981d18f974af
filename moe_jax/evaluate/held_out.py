"""Evaluates a model on held-out text: perplexity, bits per byte and the router's choices for each domain."""

import gzip
import json
import lzma
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from moe_jax.config import RunConfig
from moe_jax.config.fields import require
from moe_jax.config.layers import Place
from moe_jax.data import Corpus
from moe_jax.evaluate.switches import Switches
from moe_jax.moe.program import Program
from moe_jax.moe.stats import ChoiceSums, RouterStats, by_depth
from moe_jax.run import log
from moe_jax.train import step
from moe_jax.train.state import process_rows, put_batch

LN2 = math.log(2.0)
TOTAL = ""  # name of all domains together; no domain has an empty name


class EvalResult(NamedTuple):
    """Sums over the held-out split, on the host, by block where a block has experts. Letters: G domains, L layers."""

    domains: tuple[str, ...]
    nll: np.ndarray  # [G] nats
    tokens: np.ndarray  # [G]
    bytes_per_token: np.ndarray  # [G]
    places: tuple[Place, ...]  # of the model's blocks
    router: dict[str, RouterStats]  # numpy, [L, G(, E)]
    choices: dict[str, ChoiceSums] | None  # numpy, if recorded
    limit: int = 0  # batches asked for; 0: all
    sequences: tuple[int, int] = (0, 0)  # rows evaluated, and rows of the whole split
    left_out: np.ndarray | None = None  # [G] targets that `pool_prefix` leaves out; None without it

    def rows(self) -> list[dict[str, Any]]:
        """A row for each domain with tokens, then one for TOTAL: xent (nats per token), perplexity, bits_per_byte."""
        seen = [g for g in range(len(self.domains)) if self.tokens[g] > 0]
        groups = [(self.domains[g], [g]) for g in seen] + [(TOTAL, seen)]
        return [self._row(name, ids) for name, ids in groups]

    def unseen(self) -> list[str]:
        """The names of domains without tokens."""
        return [name for name, tokens in zip(self.domains, self.tokens, strict=True) if not tokens > 0]

    def left_out_shares(self) -> dict[str, float]:
        """The share of each domain's targets that are not scored because they may give a document's pool."""
        left = self.left_out if self.left_out is not None else np.zeros(len(self.domains))
        return {
            name: float(one / (one + tokens))
            for name, one, tokens in zip(self.domains, left, self.tokens, strict=True)
            if one > 0
        }

    def _row(self, name: str, ids: list[int]) -> dict[str, Any]:
        nll, tokens = float(self.nll[ids].sum()), float(self.tokens[ids].sum())
        size = float((self.tokens[ids] * self.bytes_per_token[ids]).sum())
        xent = nll / max(tokens, 1.0)
        return {
            "domain": name,
            "tokens": int(tokens),
            "xent": xent,
            "perplexity": math.exp(min(xent, 700.0)),
            "bits_per_byte": nll / LN2 / max(size, 1.0),
        }


def check_held_out(corpus: Corpus, prefix: int = 0, names: Sequence[str] | None = None) -> None:
    """Raises ConfigError if there is no held-out text, since the run could not be evaluated.

    prefix: `model.moe.pool_prefix`, the tokens of a document that are not scored. Some document must have as many.
    names: the sources that it must be a document of; None: any.
    """
    if not corpus.num_validation_batches():
        raise corpus.nothing_held_out()
    if prefix:
        splits = corpus.stores.items()
        stores = [store for (name, split), store in splits if split == "validation" and name in (names or (name,))]
        longest = max(int(np.diff(store.offsets).max(initial=0)) for store in stores)
        rule = f"leaves nothing to score of held-out documents, of which the longest has {longest} tokens"
        require(prefix <= longest, "model.moe.pool_prefix", prefix, rule, f"nearest valid: {longest}")


def evaluate(
    cfg: RunConfig,
    mesh: Mesh,
    params: dict,
    router_bias: dict,
    corpus: Corpus,
    *,
    limit: int = 0,
    progress: bool = True,
    record: bool = False,
    earlier: tuple[dict, dict] | None = None,
    program: Program | None = None,
    switches: Switches | None = None,
    run: Callable[..., Any] | None = None,
) -> EvalResult:
    """The result of an evaluation on the held-out split.

    limit: number of batches, spread over the split; 0: all. record: whether to sum the router's choices for `analysis`.
    earlier: params and router_bias of an earlier checkpoint, whose choices are compared with these.
    switches: experts that are off or on, in the earlier checkpoint too. run: the step of `make_eval_step` with the same
    arguments, where several models share it and compile it once.
    Raises ConfigError if `pool_prefix` leaves nothing to score.
    """
    run = run or step.make_eval_step(cfg, mesh, len(corpus.domains), record, program)
    rows = process_rows(mesh, cfg.data.batch_size)
    sums = None
    batches = corpus.validation_batches(rows, limit)
    total = corpus.num_validation_batches(limit)
    for batch in tqdm(
        batches, total=total, desc="evaluate", unit="batch", disable=None if progress else True, leave=False
    ):
        one = run(params, router_bias, put_batch(batch, mesh, cfg, by_domain=True), earlier, switches)
        sums = one if sums is None else jax.tree.map(jnp.add, sums, one)
    host = jax.tree.map(np.asarray, jax.device_get(sums))
    prefix = cfg.model.moe.pool_prefix
    rule = "leaves nothing to score: all documents of the held-out text that was read are shorter"
    require(not prefix or host.tokens.sum() > 0, "model.moe.pool_prefix", prefix, rule, "nearest valid: a smaller one")
    size = np.asarray(corpus.bytes_per_token)
    sequences = (corpus.num_validation_rows(limit), corpus.num_validation_rows())
    return EvalResult(
        corpus.domains, host.nll, host.tokens, size, cfg.model.places, host.router, host.choices, limit, sequences,
        host.left_out,
    )  # fmt: skip


def compression_bits_per_byte(texts: Iterable[tuple[str, str]]) -> dict[str, dict[str, float]]:
    """Bits per byte of compressed held-out text, a stream a domain: {"gzip -9": {domain: …, TOTAL: …}, "xz -9": …}."""
    by_domain: dict[str, list[bytes]] = {}
    for domain, text in texts:
        by_domain.setdefault(domain, []).append(text.encode())
    joined = {domain: b"".join(parts) for domain, parts in sorted(by_domain.items())}
    joined[TOTAL] = b"".join(joined.values())
    tools = {"gzip -9": lambda b: gzip.compress(b, 9), "xz -9": lambda b: lzma.compress(b, preset=9)}
    return {
        name: {domain: 8 * len(compress(data)) / max(len(data), 1) for domain, data in joined.items()}
        for name, compress in tools.items()
    }


def table(result: EvalResult, baselines: dict[str, dict[str, float]]) -> str:
    """A table of text with a row for each domain: the model's bits per byte beside those of compressors.

    The last row is all domains together. A line below names domains that were not evaluated.
    """
    head = f"{'domain':<12} {'tokens':>10} {'xent':>7} {'perplexity':>10} {'bits/byte':>9}"
    lines = [head + "".join(f" {name:>8}" for name in baselines)]
    for r in result.rows():
        line = f"{r['domain'] or 'all domains':<12} {r['tokens']:>10,} {r['xent']:>7.3f} {r['perplexity']:>10.2f}"
        line += f" {r['bits_per_byte']:>9.3f}"
        lines.append(line + "".join(f" {b.get(r['domain'], math.nan):>8.3f}" for b in baselines.values()))
    if missing := result.unseen():
        lines.append(f"not evaluated here: {', '.join(missing)}")
    scored, rows = result.sequences
    if baselines and scored < rows:
        lines.append(f"{scored:,} of {rows:,} sequences are scored here; compressors have all text")
    if shares := result.left_out_shares():
        names = ", ".join(f"{share:.1%} of {name}" for name, share in shares.items())
        lines.append(f"the first tokens of documents (pool_prefix) are not scored: {names}; compressors have all text")
    return "\n".join(lines)


def scores(workdir: str | os.PathLike, until: int) -> dict[int, float]:
    """Held-out loss by step, from the evaluations in `metrics.jsonl` up to a step. NaN if a loss was not finite."""
    if not (Path(workdir) / "metrics.jsonl").exists():
        return {}
    rows = log.read_metrics(workdir, "eval")
    return {row["step"]: math.nan if row["xent"] is None else row["xent"] for row in rows if row["step"] <= until}


def suffix(result: EvalResult, step_number: int, newest: int) -> str:
    """The suffix of the names of an evaluation's files, before their extension.

    It is empty for all held-out text at the newest checkpoint (eval.json), else .<step>[.<limit>batches].
    """
    return suffix_of(result.limit, result.sequences, step_number, newest)


def suffix_of(limit: int, sequences: tuple[int, int], step_number: int, newest: int) -> str:
    """The same before there is a result. sequences: rows to evaluate, and rows of the whole split."""
    limited = sequences[0] < sequences[1]
    if step_number == newest and not limited:
        return ""
    return f".{step_number}" + (f".{limit}batches" if limited else "")


def suffix_at_the_end(workdir: str | os.PathLike, result: EvalResult, step_number: int) -> str:
    """The suffix at the end of training. It is not empty if there is an eval.json of this step with more text."""
    try:
        old = json.loads((Path(workdir) / "eval.json").read_text(encoding="utf-8"))
        tokens = old["tokens"] if "tokens" in old else old["domains"][-1]["tokens"]
        fuller = old["step"] == step_number and tokens > result.tokens.sum()
    except (OSError, ValueError, LookupError, TypeError):  # missing or unreadable
        fuller = False
    return suffix(result, step_number, step_number) if fuller else ""


def to_json(
    step_number: int,
    result: EvalResult,
    baselines: dict[str, dict[str, float]],
    overrides: dict[str, Any] | None = None,
    experts: str | None = None,
) -> str:
    """The text of eval.json: the table, the baselines, and counts [layer][domain][expert] of assignments.

    The table's last row, and the baselines' entry "", are all domains together.
    `limit`: most batches (null: no limit); `rows` were evaluated of `of_rows`; `tokens`: number of targets in them.
    `overrides`: fields of the run's configuration that had other values, for this evaluation only. `experts`: those
    that were switched off or on, if any.
    Numbers that are not finite are null, and `nonfinite` beside them has their names.
    """
    layers = by_depth(result.places, result.router)
    rows, of_rows = result.sequences
    body = {
        "step": step_number,
        "limit": result.limit or None,
        "rows": rows,
        "of_rows": of_rows,
        "tokens": int(result.tokens.sum()),
        "overrides": overrides or {},
        **({"experts": experts} if experts else {}),
        "domains": [log.finite(row) for row in result.rows()],
        "domains_without_text": result.unseen(),
        **({"left_out_by_prefix": shares} if (shares := result.left_out_shares()) else {}),
        "bits_per_byte_of": {name: log.finite(of) for name, of in baselines.items()},
        "tokens_per_expert": [stats.tokens_per_expert.astype(int).tolist() for stats in layers],
        "tokens_per_layer_and_domain": [stats.tokens.astype(int).tolist() for stats in layers],
        "dropped": int(sum(stats.dropped.sum() for stats in layers)),
    }
    return json.dumps(body, indent=1, allow_nan=False) + "\n"
