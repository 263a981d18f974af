"""Rounds the matrices of one block by its statistics, and measures what bits cost each expert.

Matrices that read the same are rounded side by side. Experts, or else columns, are spread over the devices: neither
depends on another.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from moe_jax.parallel import sharding
from moe_jax.quant.gptq import column_errors, gptq
from moe_jax.quant.grid import fake_quant
from moe_jax.quant.taps import EXPERT_MATRICES, BlockTaps, Tap, is_dense
from moe_jax.tree import flatten, nest

LEAST_SHARE = 0.05  # of the mean number of rows of a layer's experts, below which GPTQ would trust too few rows


class Method(NamedTuple):
    """How matrices are rounded to a given number of bits."""

    name: Literal["rtn", "gptq"]
    group: int
    symmetric: bool = False


class Matrix(NamedTuple):
    """How a matrix, or each of a stack of experts, was rounded. numpy, on the host."""

    bits: Int[np.ndarray, "*E"]
    error: Float[np.ndarray, "*E"]  # ‖X·(Q − W)‖² / ‖X·W‖² over the calibration rows; 0 where there are none
    nearest: np.ndarray  # [*E] bool: rounded to nearest, because too few rows were there for GPTQ
    damping: Float[np.ndarray, "*E"]  # 0 where it was rounded to nearest
    dead: Int[np.ndarray, "*E"]  # inputs that were always 0


class LayerStats(NamedTuple):
    """What an allocation of bits may know of the experts of one layer: sums over the calibration text, numpy.

    Letters: E experts of the layer, B choices of bits, in increasing order.
    """

    number: int  # of the block among all blocks, from 0
    tokens: float  # of the calibration text
    counts: Float[np.ndarray, " E"]  # tokens that chose each expert
    weights: Float[np.ndarray, " E"]  # Σ of their combine weights
    # Σ‖w·(E'(x) − E(x))‖² over the expert's tokens: its result with its matrices, and with them rounded to each choice,
    # times the combine weight. None where it was not measured.
    loss: Float[np.ndarray, "E B"] | None
    importance: float  # 1 − the mean cosine between the residual stream before and after the feed-forward layer
    outliers: Float[np.ndarray, "E M"]  # outlier score of each of the expert's M matrices: gate, up, down


def enough_rows(counts: Float[Array, " E"]) -> np.ndarray:
    """Whether each expert of a layer has the rows that GPTQ needs, at least one and `LEAST_SHARE` of the mean."""
    counts = np.asarray(counts)
    return (counts >= 1) & (counts >= LEAST_SHARE * counts.mean())


def round_block(
    own: dict, taps: BlockTaps, bits_of: Callable[[str], int | np.ndarray | None], method: Method
) -> tuple[dict, dict[str, Matrix]]:
    """The parameters of a block with rounded matrices, and how each was rounded, by path. Call it under the mesh.

    own: nested dicts. bits_of: of the path of a matrix in the block: a number, or one for each expert; None leaves it.
    """
    flat, made = flatten(own), {}
    for paths, tap, counts in _sets(flat, taps):
        bits = bits_of(paths[0])
        if bits is None:
            continue
        lead = flat[paths[0]].shape[:-2]
        bits = np.broadcast_to(np.asarray(bits, np.int32), lead)
        trusted = np.broadcast_to(True if counts is None else enough_rows(counts), lead)
        found = _rounded(tuple(flat[path] for path in paths), tap.gram, bits, trusted, method)
        is_near = np.full(lead, method.name == "rtn") | ~trusted
        for path, w, errors, before in zip(paths, found.ws, *jax.device_get((found.errors, found.norms)), strict=True):
            damping, dead = (np.where(is_near, 0, np.asarray(x)) for x in (found.damping, found.dead))
            relative = np.divide(errors, before, out=np.zeros_like(errors), where=before > 0)
            made[path], flat[path] = Matrix(bits, relative, is_near, damping, dead), w
    return nest(flat), made


def rounded_experts(own: dict, taps: BlockTaps, bits: int, method: Method) -> tuple[Float[Array, "E I O"], ...]:
    """The matrices of experts rounded to some bits, in the order of `EXPERT_MATRICES`. Call it under the mesh."""
    flat, made = flatten(own), {}
    trusted = enough_rows(taps.counts)
    for paths, tap, counts in _sets(flat, taps):
        if counts is not None:
            ws = tuple(flat[path] for path in paths)
            found = _rounded(ws, tap.gram, np.full(trusted.shape, bits, np.int32), trusted, method)
            made |= zip(paths, found.ws, strict=True)
    return tuple(made[path] for name in EXPERT_MATRICES if (path := f"moe/{name}") in made)


def measure_block(number: int, own: dict, taps: BlockTaps) -> LayerStats:
    """The statistics of a layer with experts that allocations use. Call it under the mesh.

    Their loss is `taps.change`, of a walk that compares the experts with rounded ones.
    """
    flat = flatten(own)
    found = [outlier_score(flat[path]) for name in EXPERT_MATRICES if (path := f"moe/{name}") in flat]
    wanted = (taps.counts, taps.weights, taps.tokens, taps.cosine, taps.change, found)
    counts, weights, tokens, cosine, loss, outliers = jax.device_get(wanted)
    importance = 1 - float(cosine / max(tokens, 1.0))
    return LayerStats(number, float(tokens), counts, weights, loss, importance, np.stack(outliers, axis=1))


@jax.jit
def outlier_score(w: Float[Array, "*E I O"]) -> Float[Array, "*E"]:
    """The largest max|w| / mean|w| of an input's weights. Source: QuantMoE-Bench, arXiv:2406.08155."""
    size = jnp.abs(w.astype(jnp.float32))
    # Replicated: every process reads the scores of all experts.
    return sharding.replicate(jnp.max(jnp.max(size, axis=-1) / jnp.maximum(jnp.mean(size, axis=-1), 1e-30), axis=-1))


def _sets(flat: dict[str, Array], taps: BlockTaps) -> Iterator[tuple[list[str], Tap, Float[Array, " E"] | None]]:
    """Yields the paths of matrices that read the same, what they read, and the rows of each if they are experts."""
    for path in filter(is_dense, flat):
        yield [path], taps.dense[path], None
    if taps.expert_in is not None:
        *reading, down = (f"moe/{name}" for name in EXPERT_MATRICES if f"moe/{name}" in flat)
        yield reading, taps.expert_in, taps.counts
        yield [down], taps.expert_hidden, taps.counts


class _Found(NamedTuple):
    ws: tuple[Float[Array, "*E I O"], ...]
    errors: tuple[Float[Array, "*E"], ...]  # Σ‖x·(Q − W)‖²
    norms: tuple[Float[Array, "*E"], ...]  # Σ‖x·W‖²
    damping: Float[Array, "*E"]
    dead: Int[Array, "*E"]


@functools.partial(jax.jit, static_argnames="method")
def _rounded(ws: tuple, gram: Array, bits: Array, trusted: Array, method: Method) -> _Found:
    """Rounds matrices of one input. trusted: whether the rows behind a Gram matrix are enough for GPTQ."""

    def run(w, gram, bits, trusted):
        q = fake_quant(w, bits, method.group, method.symmetric)
        damping, dead = 0.0 * bits, 0 * bits
        if method.name == "gptq":
            found = gptq(w, gram, bits, method.group, method.symmetric)
            q = jnp.where(trusted[..., None, None], found.w, q)
            damping, dead = found.damping, found.dead
        return q, column_errors(w, q, gram), column_errors(jnp.zeros_like(w), w, gram), damping, dead

    widths = [w.shape[-1] for w in ws]
    if not sharding.current_sizes():
        q, errors, norms, damping, dead = run(jnp.concatenate(ws, axis=-1), gram, bits, trusted)
    else:
        specs = _specs(ws[0].ndim == 3, ws[0].shape[0], sum(widths))
        whole = jnp.concatenate([sharding.replicate(w) for w in ws], axis=-1)
        given = (jax.sharding.reshard(a, spec) for a, spec in zip((whole, gram, bits, trusted), specs[0], strict=True))
        found = jax.shard_map(run, in_specs=specs[0], out_specs=specs[1], check_vma=True)(*given)
        q, errors, norms, damping, dead = map(sharding.replicate, found)
    split = lambda x: jnp.split(x, np.cumsum(widths)[:-1], axis=-1)
    sums = lambda columns: tuple(jnp.sum(x, axis=-1) for x in split(columns))
    alike = lambda x, w: jax.sharding.reshard(x, jax.typeof(w).sharding.spec) if sharding.current_sizes() else x
    return _Found(tuple(map(alike, split(q), ws)), sums(errors), sums(norms), damping, dead)


def _specs(stacked: bool, experts: int, columns: int) -> tuple[tuple[P, ...], tuple[P, ...]]:
    """How (w, gram, bits, trusted) and (q, errors, norms, damping, dead) lie on the devices: each has some of the
    experts, or else some of the columns, where their number divides."""
    devices = math.prod(sharding.current_sizes().values())
    if stacked:
        e = sharding.AXES if experts % devices == 0 else None
        return (P(e, None, None),) * 2 + (P(e),) * 2, (P(e, None, None), P(e, None), P(e, None), P(e), P(e))
    o = sharding.AXES if columns % devices == 0 else None
    return (P(None, o), P(None, None), P(), P()), (P(None, o), P(o), P(o), P(), P())
