"""Log-likelihoods of continuations of contexts, over a mesh, in batches of sequences of similar length.

A score does not depend on its neighbours in the batch, on padding, or on the mesh, beyond rounding. So models whose
experts have room for a part of the tokens (`capacity`), or choose tokens, are refused.
"""

import dataclasses
import functools
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from moe_jax import model
from moe_jax.config import ModelConfig, RunConfig
from moe_jax.config.fields import require
from moe_jax.config.labels import check_label
from moe_jax.data import Tokenizer, tokenizers
from moe_jax.evaluate.switches import Switches
from moe_jax.moe.layer import TokenInfo
from moe_jax.moe.pools import Documents
from moe_jax.moe.program import Program
from moe_jax.nn.layers import weight
from moe_jax.parallel import sharding
from moe_jax.train import cross_entropy
from moe_jax.train.state import process_rows, under_mesh

# Lengths to which sequences are padded, below the longest; further ones are 1 and 1.5 times a power of two.
LENGTHS = (32, 48, 64, 96, 128)
IN_FLIGHT = 2  # batches that the devices have been given and whose results are not yet read


class Request(NamedTuple):
    """A continuation to score, after a context. Both are token ids, and have at least one."""

    context: np.ndarray
    continuation: np.ndarray
    text: str = ""  # what the continuation's tokens stand for
    lost: int = 0  # bytes of context and continuation that no token represents


class Score(NamedTuple):
    """The log-probabilities of a continuation's tokens, each given all that is before it."""

    token_logprobs: np.ndarray  # float32, nats
    greedy: bool  # whether each token is the most probable one
    cut: int  # tokens of the context that were left out on the left, because a sequence has a greatest length
    pieces: int  # sequences that were computed: 1 unless the continuation alone is longer than a sequence

    @property
    def logprob(self) -> float:
        """The log-probability of the continuation, in nats."""
        return float(np.sum(self.token_logprobs, dtype=np.float64))


class _Row(NamedTuple):
    """One sequence of a batch: of the tokens `ids`, the last `scored` are scored, and all but the last are read."""

    request: int
    first: int  # number of the first scored token in the continuation
    ids: np.ndarray
    scored: int

    @property
    def length(self) -> int:
        return len(self.ids) - 1


def encode(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> list[Request]:
    """Requests of pairs of texts (context, continuation), in the way of lm-eval.

    Both are encoded as one text, which is divided after the tokens that the context alone begins with. (lm-eval divides
    after as many tokens as the context alone has: another place only where a token spans the border.) Spaces and line
    ends at the end of a context belong to the continuation, because a token begins with its space. `begin_of_text`
    comes first if the tokenizer has one; an empty context is `tokenizers.first_token`.
    """
    moved = [(context.rstrip(), context[len(context.rstrip()) :] + more) for context, more in pairs]
    front = [] if tokenizer.begin_of_text is None else [tokenizer.begin_of_text]
    alone = dict(zip(texts := list({context for context, _ in moved}), tokenizer.encode(texts), strict=True))
    together = tokenizer.encode_and_count([context + continuation for context, continuation in moved])
    made = []
    for (context, continuation), (ids, lost) in zip(moved, together, strict=True):
        begin = _common(alone[context], ids)
        before = np.concatenate([front, ids[:begin]]).astype(np.int32)
        before = before if len(before) else np.asarray([tokenizers.first_token(tokenizer)], np.int32)
        made.append(Request(before, ids[begin:].astype(np.int32), continuation, lost))
    return made


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """The number of equal ids at the beginning of two sequences."""
    size = min(len(a), len(b))
    differ = np.flatnonzero(a[:size] != b[:size])
    return int(differ[0]) if len(differ) else size


def encode_text(tokenizer: Tokenizer, text: str) -> Request:
    """The request that scores every token of a text once."""
    ((ids, lost),) = tokenizer.encode_and_count([text])
    return Request(np.asarray([tokenizers.first_token(tokenizer)], np.int32), ids.astype(np.int32), text, lost)


# --- what can be scored ----------------------------------------------------------------------------------------------


def check(cfg: RunConfig) -> None:
    """Raises ConfigError for a model whose score of a sequence depends on the other sequences of its batch.

    And for one whose sequences can be neither padded, which would change their RoPE, nor of any length.
    """
    kind, backend = cfg.model.rope_scaling.type, cfg.model.attention
    rule = f"needs padding, which is a part of the sequence with rope_scaling.type={kind!r}"
    require(not cfg.model.rope_scaling.by_length or backend != "splash", "model.attention", backend, rule,
            "--config.model.attention=auto takes any length")  # fmt: skip
    check_label(cfg.model, cfg.sample.label)
    if not cfg.model.num_moe_layers:
        return
    moe, why = cfg.model.moe, "would make a score depend on the other sequences of its batch"
    require(moe.choice != "expert", "model.moe.choice", moe.choice, f"{why}, and on later tokens", "use 'token'")
    hint = "--config.model.moe.compute=grouped drops none"
    require(moe.compute != "capacity", "model.moe.compute", moe.compute, why, hint)


def check_gives_pool(cfg: ModelConfig, tokens: int) -> None:
    """Raises ConfigError for a context of one token where contexts give document pools.

    It is the token that begins a document, of a text without a context, or all that is left of a context before a
    continuation as long as a sequence. tokens: those of the context.
    """
    rule = "takes pools from contexts, but one has a single token, which says nothing of a text"
    require(not cfg.moe.takes_pools or tokens > 1, "model.moe.pool_from", cfg.moe.pool_from, rule,
            "nearest valid: 'all', with pool_size=0")  # fmt: skip


# --- sequences -------------------------------------------------------------------------------------------------------


def _rows_of(requests: Sequence[Request], longest: int) -> list[_Row]:
    """The sequences of requests. A context that does not fit is cut on its left.

    A continuation that is longer than a sequence alone is scored in several, as lm-eval does: each token once, and
    the last sequence is full, so that its tokens have as much before them as fits.
    """
    rows = []
    for number, request in enumerate(requests):
        ids, at = np.concatenate([request.context, request.continuation]), len(request.context)
        while at < len(ids):
            end = min(at + longest, len(ids))
            rows.append(_Row(number, at - len(request.context), ids[max(end - longest - 1, 0) : end], end - at))
            at = end
    return rows


def _padded(length: int, longest: int, step: int) -> int:
    """The length that a sequence is padded to: a few different ones, since each is compiled. step: divides it."""
    sizes = [*LENGTHS, *(size * 2**i for i in range(1, 24) for size in (128, 192))]
    return min(next(size for size in sizes if size >= length and size % step == 0), longest)


def _batches(
    rows: list[_Row], longest: int, tokens: int, devices: int, step: int, exact: bool
) -> Iterator[tuple[list[_Row], int, int]]:
    """Yields (rows, number of sequences of the batch, their length), the longest first.

    tokens: the most of a batch. exact: whether sequences have no padding. A batch of few rows has a power of two
    sequences for each device, so that few programs are compiled.
    """
    by_length: dict[int, list[_Row]] = {}
    for row in sorted(rows, key=lambda row: -row.length):
        by_length.setdefault(row.length if exact else _padded(row.length, longest, step), []).append(row)
    for length, its in by_length.items():
        most = max(tokens // length // devices, 1) * devices
        size = most if len(its) >= most else devices * (1 << (-(-len(its) // devices) - 1).bit_length())
        size = min(size, most)
        for i in range(0, len(its), size):
            yield its[i : i + size], size, length


@functools.lru_cache(maxsize=64)
def _scorer(cfg: ModelConfig, mesh: Mesh, tokens: int, length: int):
    """The jitted function (params, bias, tokens, targets, lengths, contexts, switches, label) → nats of each target,
    and whether it is the most probable token; both `[B, S]`, on every device. contexts: lengths of what is not scored.

    tokens: of one device. It compiles once for a shape.
    """
    graph = model.abstract(cfg, Program.choose(cfg, mesh, tokens, length))
    rows = P(sharding.AXES, None)

    def run(params, bias, ids, targets, lengths, contexts, switches, label):
        net = graph.bind(params, bias)
        at = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32)[None], ids.shape, out_sharding=rows)
        documents = None
        if cfg.moe.takes_pools:  # a context gives the pool, as a prompt does, whatever gives it in held-out text
            documents = Documents(jnp.ones_like(ids), at < contexts[:, None])
        own = None if label is None else jnp.full_like(ids, label)
        info = TokenInfo(at < lengths[:, None], jnp.zeros_like(ids), documents=documents, label=own)
        # Padding comes last, so that no token that counts attends to it.
        hidden = net(model.Inputs(ids, at, None, info, switches=switches)).hidden
        nll, best = cross_entropy.token_scores(hidden, weight(net.output_matrix, hidden.dtype), targets)
        return sharding.replicate(nll), sharding.replicate(best)

    return under_mesh(mesh, jax.jit(run))


def score(
    cfg: RunConfig,
    mesh: Mesh,
    params: dict,
    router_bias: dict,
    requests: Sequence[Request],
    *,
    progress: bool = False,
    describe: str = "score",
    switches: Switches | None = None,
) -> list[Score]:
    """The scores of requests, in their order.

    cfg: of `config.for_evaluation`. A sequence has at most `data.seq_len` tokens; a batch about as many as one of
        `data.batch_size` such sequences. Its `sample.label` is that of all requests.
    progress: whether to show a bar, named `describe`.
    switches: experts that are off or on.
    Every process of a run calls this, and has all the scores. Raises ConfigError (`check`, `check_gives_pool`).
    """
    check(cfg)
    label = check_label(cfg.model, cfg.sample.label)
    if empty := [i for i, r in enumerate(requests) if not (len(r.context) and len(r.continuation))]:
        raise ValueError(f"request {empty[0]} has no token in its context or in its continuation")
    longest, step = cfg.data.seq_len, 128 if cfg.model.attention == "splash" else 1
    rows = _rows_of(requests, longest)
    check_gives_pool(cfg.model, min((len(row.ids) - row.scored for row in rows), default=2))
    shape = dataclasses.replace(cfg.model, segment_mask=False)  # one sequence a row needs no mask
    nats = [np.zeros(len(r.continuation), np.float32) for r in requests]
    greedy, cut, pieces = np.ones(len(requests), bool), np.zeros(len(requests), int), np.zeros(len(requests), int)

    def read(its: list[_Row], nll, best):
        nll, best = np.asarray(nll), np.asarray(best)
        for i, row in enumerate(its):
            scored = slice(row.length - row.scored, row.length)
            nats[row.request][row.first : row.first + row.scored] = -nll[i, scored]
            greedy[row.request] &= bool(best[i, scored].all())
            pieces[row.request] += 1
            if row.first == 0:
                cut[row.request] = len(requests[row.request].context) - (len(row.ids) - row.scored)

    exact = cfg.model.rope_scaling.by_length
    waiting: deque = deque()
    with tqdm(total=len(rows), desc=describe, unit="sequence", disable=None if progress else True, leave=False) as bar:
        for its, size, length in _batches(rows, longest, cfg.data.batch_size * longest, mesh.size, step, exact):
            run = _scorer(shape, mesh, size * length // mesh.size, length)
            waiting.append((its, *run(params, router_bias, *_arrays(its, size, length, mesh), switches, label)))
            if len(waiting) == IN_FLIGHT:
                read(*waiting.popleft())
            bar.update(len(its))
        while waiting:
            read(*waiting.popleft())
    return [Score(*made) for made in zip(nats, greedy.tolist(), cut.tolist(), pieces.tolist(), strict=True)]


def _arrays(its: list[_Row], size: int, length: int, mesh: Mesh) -> list[jax.Array]:
    """Token ids, targets, lengths, and lengths of what is not scored, of a batch, as global arrays. Rows that are
    missing have length 0."""
    ids, targets = np.zeros((size, length), np.int32), np.zeros((size, length), np.int32)
    lengths, contexts = np.zeros(size, np.int32), np.zeros(size, np.int32)
    for i, row in enumerate(its):
        ids[i, : row.length], targets[i, : row.length], lengths[i] = row.ids[:-1], row.ids[1:], row.length
        contexts[i] = len(row.ids) - row.scored
    own = process_rows(mesh, size)
    put = functools.partial(jax.make_array_from_process_local_data, sharding.batch_sharding(mesh))
    return [put(np.ascontiguousarray(x[own])) for x in (ids, targets, lengths, contexts)]
