"""Walks through a model block by block with calibration text: each block reads what those before it made.

A visitor may change a block's parameters after it has seen the block's statistics. Later blocks then read what the
changed block makes, so that they can make up for its errors. The walk computes in float32, without dropping tokens.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from moe_jax import model
from moe_jax.config import ModelConfig
from moe_jax.config.fields import require
from moe_jax.config.labels import needs
from moe_jax.config.layers import Kind, Place
from moe_jax.model import Inputs
from moe_jax.model.blocks import Block
from moe_jax.moe.layer import RouterBias, TokenInfo
from moe_jax.moe.pools import documents_of
from moe_jax.moe.program import Program
from moe_jax.nn.layers import Init, Keys
from moe_jax.parallel import sharding
from moe_jax.quant import taps as taps_lib
from moe_jax.quant.taps import BlockTaps, Slots
from moe_jax.tree import at_path, update_at

TOKENS = 16_384  # of one pass over all devices, unless a row for each device has more
KEYS = ("tokens", "positions", "segment_ids")

# (number of the block in the decoder, its place, parameters and statistics) → its new parameters; None: as they are
Visit = Callable[[int, Place, dict, BlockTaps], dict | None]
# (parameters and statistics of a block with experts) → parameters of the same function, and matrices of experts to
# compare with theirs, one set after another
Others = Callable[[dict, BlockTaps], tuple[dict, Iterable[tuple[Array, ...]]]]


class _Stream(NamedTuple):
    """What flows between the blocks, for one batch."""

    x: Float[Array, "B S D"]
    state: Float[Array, "B S R"] | None  # of the routers so far
    waiting: tuple[Array, ...]  # what late blocks of this unit hold back


def check_labels(cfg: ModelConfig) -> None:
    """Raises ConfigError for a model that depends on labels, which calibration text has not."""
    for name in needs(cfg):
        path = name.split("=")[0]
        value = functools.reduce(getattr, path.split("."), cfg)
        rule = "depends on labels, without which the calibration text is read: its weights are not rounded"
        require(False, f"model.{path}", value, rule, "name a run without labels")


def computed(cfg: ModelConfig) -> ModelConfig:
    """The model as the walk computes it: in float32, on any machine, without dropping tokens."""
    moe = dataclasses.replace(cfg.moe, exchange="auto", grouped_matmul="auto", exchange_chunks=1)
    if moe.compute == "capacity":
        moe = dataclasses.replace(moe, compute="grouped", overflow="first")
    return dataclasses.replace(cfg, moe=moe, attention="auto", remat="none", compute_dtype="float32")


def walk(
    cfg: ModelConfig,
    mesh: Mesh,
    params: dict,
    router_bias: dict,
    rows: dict[str, np.ndarray],
    visit: Visit,
    *,
    gated: bool = False,
    slots: Slots | None = None,
    others: Others | None = None,
    progress: str = "",
) -> dict:
    """Visits each block once, the first first, and returns the parameters with all changes. `params` is used up.

    rows: arrays [N, S] `tokens`, `positions` and `segment_ids`, of which 0 is padding, as a batch of train.py has them.
    gated, slots: see `taps.run_block`; with `slots` a first pass counts the tokens of each expert.
    others: matrices that experts are compared with, in one further pass each: a column of `BlockTaps.change`.
    progress: the label of a progress bar; "": none.
    Raises ConfigError for a model that depends on labels.
    """
    check_labels(cfg)
    cfg = computed(cfg)
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        batches = list(_batches(cfg, mesh, rows))
        size, seq_len = batches[0].tokens.shape
        chosen = Program.choose(cfg, mesh, size * seq_len // mesh.size, seq_len)
        program = dataclasses.replace(chosen, record=True)
        start = _start(cfg, program)
        streams = [_Stream(*start(params, router_bias, batch.tokens), ()) for batch in batches]
        ends = {stack.paths[-1] for stack in cfg.stacks}
        bar = tqdm(cfg.places, desc=progress, unit="block", disable=None if progress else True, leave=False)
        for number, place in enumerate(bar):
            own, bias = _take(params, place), _take(router_bias, place)
            watch = functools.partial(_pass, cfg, place.kind, program, own, bias, streams, batches, gated)
            after, found = watch(None, None)
            if slots is not None and found.counts is not None:
                after, found = watch(slots, found.counts)
            if others is not None and found.counts is not None:
                found = found._replace(
                    change=_changes(cfg, place.kind, program, others(own, found), bias, streams, batches)
                )
            new = visit(number, place, own, found)
            if new is not None:
                params = _put(params, place, new)
                after = [_run(cfg, place.kind, program)(new, bias, s.x, s.state, b)
                         for s, b in zip(streams, batches, strict=True)]  # fmt: skip
            streams = [_next(s, out, place.path in ends) for s, out in zip(streams, after, strict=True)]
        return params


def _next(stream: _Stream, out: tuple, at_end: bool) -> _Stream:
    """The stream after a block. What late blocks hold back is added at the end of their unit."""
    x, state, late = out
    waiting = stream.waiting if late is None else (*stream.waiting, late)
    return _Stream(sum(waiting, x), state, ()) if at_end else _Stream(x, state, waiting)


def _batches(cfg: ModelConfig, mesh: Mesh, rows: dict[str, np.ndarray]) -> Iterator[Inputs]:
    """The rows in batches of one size, which rows of padding fill."""
    count, seq_len = rows["tokens"].shape
    each = max(1, min(TOKENS // (seq_len * mesh.size), -(-count // mesh.size))) * mesh.size
    sharding_of = NamedSharding(mesh, sharding.BATCH)
    for first in range(0, count, each):
        cut = (np.asarray(rows[name][first : first + each], np.int32) for name in KEYS)
        tokens, positions, segments = (np.pad(a, ((0, each - len(a)), (0, 0))) for a in cut)
        documents = documents_of(cfg.moe, segments, positions, training=False)
        info = TokenInfo(segments > 0, np.zeros_like(tokens), documents=documents)
        batch = Inputs(tokens, positions, segments if cfg.segment_mask else None, info)
        yield jax.device_put(batch, sharding_of)


# --- the programs ----------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def _start(cfg: ModelConfig, program: Program) -> Callable:
    """The jitted function (params, bias, tokens) → what the first block reads, and the state of its router."""
    graph = model.abstract(cfg, program)

    @jax.jit
    def run(params, bias, tokens):
        net = graph.bind(params, bias)
        x = net.embedded(tokens)
        return x, net._router_state(x)

    return run


@functools.lru_cache(maxsize=32)
def _definition(cfg: ModelConfig, kind: Kind, program: Program) -> Any:
    """The structure of one block."""
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        init = Init(Keys(jax.random.key(0)), cfg.init_std, dtype=cfg.param_dtype)
        block = nnx.eval_shape(lambda: Block(cfg, init, kind, program))
    return nnx.split(block, nnx.Param, RouterBias)[0]


@functools.lru_cache(maxsize=32)
def _run(cfg: ModelConfig, kind: Kind, program: Program) -> Callable:
    """The jitted function (params, bias, x, state, inputs) → (x, state, late) of a block."""
    definition = _definition(cfg, kind, program)

    @jax.jit
    def run(params, bias, x, state, inputs):
        out = nnx.merge(definition, params, bias)(x, state, None, inputs, None, None)
        return out.x, out.state, out.late

    return run


@functools.lru_cache(maxsize=32)
def _run_watched(cfg: ModelConfig, kind: Kind, program: Program, gated: bool, slots: Slots | None) -> Callable:
    """The same of a block and its statistics, added to those of earlier batches if there are any."""
    definition = _definition(cfg, kind, program)

    @functools.partial(jax.jit, donate_argnames="before")
    def run(params, bias, x, state, inputs, counts, before):
        block = nnx.merge(definition, params, bias)
        out, found = taps_lib.run_block(block, x, state, inputs, gated=gated, slots=slots, counts=counts)
        return (out.x, out.state, out.late), found if before is None else taps_lib.joined(before, found)

    return run


@functools.lru_cache(maxsize=32)
def _run_compared(cfg: ModelConfig, kind: Kind, program: Program) -> Callable:
    """The jitted function to `BlockTaps.change` of one batch, added to that of earlier ones if there are any."""
    definition = _definition(cfg, kind, program)

    @jax.jit
    def run(params, bias, x, state, inputs, others, before):
        found = taps_lib.run_block(nnx.merge(definition, params, bias), x, state, inputs, others=others)[1]
        return found.change if before is None else before + found.change

    return run


def _changes(cfg, kind, program, compared, bias, streams, batches) -> Float[Array, "E B"]:
    """What other matrices of experts change, over all batches. compared: the result of `Others`."""
    params, sets = compared
    run, columns = _run_compared(cfg, kind, program), []
    for others in sets:
        total = None
        for stream, batch in zip(streams, batches, strict=True):
            total = run(params, bias, stream.x, stream.state, batch, others, total)
        columns.append(total)
    return jnp.concatenate(columns, axis=1)


def _pass(cfg, kind, program, own, bias, streams, batches, gated, slots, counts) -> tuple[list, BlockTaps]:
    """What a block makes of all batches, and its statistics over them."""
    run, outs, total = _run_watched(cfg, kind, program, gated, slots), [], None
    for stream, batch in zip(streams, batches, strict=True):
        out, total = run(own, bias, stream.x, stream.state, batch, counts, total)
        outs.append(out)
    return outs, total


@jax.jit
def _slice(tree: dict, index: Int[Array, ""]) -> dict:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, 0, keepdims=False), tree)


@functools.partial(jax.jit, donate_argnums=0)
def _update(tree: dict, new: dict, index: Int[Array, ""]) -> dict:
    put = lambda x, n: jax.lax.dynamic_update_index_in_dim(x, n.astype(x.dtype), index, 0)
    return jax.tree.map(put, tree, new)


def _take(tree: dict, place: Place) -> dict:
    """The parameters, or selection biases, of the block at a place, without the leading axis."""
    own = at_path(tree, place.path)
    return _slice(own, jnp.int32(place.index)) if own else {}


def _put(tree: dict, place: Place, new: dict) -> dict:
    """The parameters with those of one block replaced. Those that have not changed are not copied."""
    return update_at(tree, place.path, lambda old: _update(old, new, jnp.int32(place.index)))
