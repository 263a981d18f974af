"""Benchmarks: which of several continuations a model finds most probable, and bits per byte of texts and answers.

| number          | what it is                                                                                |
|-----------------|-------------------------------------------------------------------------------------------|
| `acc`           | share of documents whose right continuation has the largest log-likelihood                |
| `acc_per_token` | the same with the log-likelihood divided by the continuation's tokens                     |
| `acc_per_char`  | … by its characters, the space in front included                                          |
| `acc_per_byte`  | … by its bytes in UTF-8                                                                   |
| `greedy`        | share of documents whose only continuation consists of most probable tokens               |
| `bits_per_byte` | mean over documents of the bits of the right continuation, divided by its bytes           |

Each has a standard error, `<name>_se`: s/√n, with the sample deviation s over n documents. Results of two models on one
task are better compared by the standard error of their differences, document by document.
"""

import hashlib
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from moe_jax.config import RunConfig
from moe_jax.data import Tokenizer, readers
from moe_jax.errors import FileError, UserError
from moe_jax.evaluate import loglikelihood
from moe_jax.evaluate.loglikelihood import Request, Score
from moe_jax.evaluate.switches import Switches
from moe_jax.evaluate.tasks import Task

LN2 = math.log(2.0)
ACCURACIES = ("acc", "acc_per_token", "acc_per_char", "acc_per_byte")
NUMBERS = (*ACCURACIES, "greedy", "bits_per_byte")

Scorer = Callable[[list[Request], str], list[Score]]


def scorer(
    cfg: RunConfig,
    mesh: Mesh,
    params: dict,
    router_bias: dict,
    progress: bool = False,
    switches: Switches | None = None,
) -> Scorer:
    """The function (requests, name of the progress bar) → scores of a model. switches: experts that are off or on."""
    loglikelihood.check(cfg)
    return lambda requests, name: loglikelihood.score(
        cfg, mesh, params, router_bias, requests, progress=progress, describe=name, switches=switches
    )


def numbers(document: list[Request], scores: list[Score], gold: int) -> dict[str, float]:
    """The numbers of one document. Of equal values the first is chosen. NaN if a log-likelihood is not finite."""
    nats = np.asarray([score.logprob for score in scores])
    bits = -nats[gold] / LN2 / len(document[gold].text.encode())
    if len(document) == 1:
        return {"greedy": float(scores[0].greedy), "bits_per_byte": bits}
    sizes = (
        [1] * len(document),
        [len(request.continuation) for request in document],
        [len(request.text) for request in document],
        [len(request.text.encode()) for request in document],
    )
    if not np.isfinite(nats).all():
        return dict.fromkeys((*ACCURACIES, "bits_per_byte"), math.nan)
    chosen = (np.argmax(nats / np.asarray(size)) for size in sizes)
    return {name: float(one == gold) for name, one in zip(ACCURACIES, chosen, strict=True)} | {"bits_per_byte": bits}


def of_task(task: Task, tokenizer: Tokenizer, score: Scorer, prefix: int = 0) -> dict[str, Any]:
    """The results of a task: the mean over documents and the standard error of each number, and what was cut or lost.

    prefix: tokens of a context from which pools are taken otherwise; shorter contexts are counted.
    Raises FileError for a continuation for which the tokenizer has no token.
    """
    requests = loglikelihood.encode(tokenizer, [pair for document in task.documents for pair in document.pairs])
    for request in requests:
        if not len(request.continuation):
            raise FileError(f"{task.name}: the tokenizer has no token for the continuation {request.text[:40]!r}")
    scores, rows, at = score(requests, task.name), [], 0
    for document in task.documents:
        own = slice(at, at := at + len(document.pairs))
        rows.append(numbers(requests[own], scores[own], document.gold))
    made: dict[str, Any] = {"documents": len(rows), "requests": len(requests)}
    for name in NUMBERS:
        if found := [row[name] for row in rows if name in row]:
            made[name] = float(np.mean(found))
            made[f"{name}_se"] = float(np.std(found, ddof=1) / math.sqrt(len(found))) if len(found) > 1 else math.nan
    made |= {"short_contexts": short} if (short := sum(len(r.context) < prefix for r in requests)) else {}
    return made | _losses(requests, scores) | {"unconditional_left_out": task.unconditional, "digest": task.digest}


def of_text(text: str, tokenizer: Tokenizer, score: Scorer, name: str = "text") -> dict[str, Any]:
    """Bits per byte and nats per token of a text, each of whose tokens is scored once."""
    request = loglikelihood.encode_text(tokenizer, text)
    if not len(request.continuation):
        raise FileError(f"{name}: the tokenizer has no token for this text")
    (scored,) = score([request], name)
    nats, size = -scored.logprob, len(text.encode())
    made = {"bytes": size, "tokens": len(request.continuation), "sequences": scored.pieces}
    made |= {"bits_per_byte": nats / LN2 / size, "xent": nats / len(request.continuation)}
    digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return made | {"lost_bytes": request.lost, "digest": digest}


def read_text(path: str) -> str:
    """The text of a file, of any extension, also with .gz. Raises UserError without one, FileError for another."""
    file = Path(path)
    if not file.is_file():
        raise UserError(f"--text={path}: no such file")
    try:
        return readers.read_text(file)
    except readers.Unreadable as error:
        raise FileError(str(error)) from None
    except (OSError, EOFError, zlib.error) as error:
        raise FileError(f"{path}: cannot be read: {error}") from None


def _losses(requests: list[Request], scores: list[Score]) -> dict[str, int]:
    """The counts of what was not scored as it was asked for."""
    return {
        "cut_requests": sum(score.cut > 0 for score in scores),
        "cut_tokens": sum(score.cut for score in scores),
        "in_pieces": sum(score.pieces > 1 for score in scores),
        "lost_bytes": sum(request.lost for request in requests),
    }


# --- results ---------------------------------------------------------------------------------------------------------


def table(results: dict[str, dict[str, Any]]) -> str:
    """A table with a row for each task, and lines below about what was cut or lost."""
    width = max(len("task"), *map(len, results))
    head = ("sequence", "/ token", "/ char", "/ byte", "greedy", "bits/byte")
    lines = [f"{'task':<{width}} {'documents':>9}" + "".join(f" {name:>15}" for name in head)]
    for name, row in results.items():
        cells = "".join(f" {_cell(row, number):>15}" for number in NUMBERS)
        lines.append(f"{name:<{width}} {row['documents']:>9,}{cells}")
    for name, row in results.items():
        if row["documents"] < row.get("of_documents", 0):
            lines.append(f"{name}: {row['documents']:,} of {row['of_documents']:,} documents, spread over the task")
        for what, how in _REMARKS.items():
            if row.get(what):
                lines.append(f"{name}: {how.format(n=row[what], requests=row['requests'], tokens=row['cut_tokens'])}")
    return "\n".join(lines)


_REMARKS = {
    "cut_requests": "{n:,} of {requests:,} contexts are cut on the left, {tokens:,} tokens in all; see data.seq_len",
    "in_pieces": "{n:,} of {requests:,} continuations are longer than a sequence and scored in pieces",
    "lost_bytes": "no token represents {n:,} bytes",
    "short_contexts": "{n:,} of {requests:,} contexts give their document pool by fewer than pool_prefix tokens",
    "unconditional_left_out": "{n:,} rows without a question are left out",
}


def _cell(row: dict[str, Any], name: str) -> str:
    if name not in row:
        return "–"
    value, error = row[name], row[f"{name}_se"]
    if name == "bits_per_byte":
        return f"{value:.3f} ± {error:.3f}"
    return f"{100 * value:.1f} ± {100 * error:.1f} %"


def text_lines(results: dict[str, dict[str, Any]]) -> list[str]:
    """A line for each text."""
    lost = lambda row: f"; no token represents {row['lost_bytes']:,} bytes" if row["lost_bytes"] else ""
    return [
        f"{name}: {row['bits_per_byte']:.4f} bits per byte, {row['xent']:.4f} nats per token, {row['bytes']:,} bytes, "
        f"{row['tokens']:,} tokens in {row['sequences']:,} sequences{lost(row)}"
        for name, row in results.items()
    ]
