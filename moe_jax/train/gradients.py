"""Loss and gradients of one optimizer batch, in one micro-batch or many.

The loss is defined on the optimizer batch; micro-batches save memory and do not change it. A first pass through the
layers sums the expert counts of all micro-batches. A second pass computes each micro-batch with the frequencies of the
whole batch in its loss, which is then linear in the micro-batch's sums. So the loss and gradients of all micro-batches
add up to those of the whole batch, for any number of micro-batches.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from moe_jax import model
from moe_jax.config import RunConfig
from moe_jax.moe import quantile
from moe_jax.moe.layer import TokenInfo
from moe_jax.moe.program import Program
from moe_jax.moe.routing import Knobs
from moe_jax.moe.stats import RouterStats
from moe_jax.nn.layers import weight
from moe_jax.nn.qk_clip import Maxima
from moe_jax.parallel import sharding
from moe_jax.train import cross_entropy, knobs, losses
from moe_jax.train.losses import BatchStatistics, BatchSums, LossParts
from moe_jax.train.state import Batch, choose_program, split_micro_batches


class Gradients(NamedTuple):
    """Loss and gradients of an optimizer batch, or the part of them that one micro-batch contributes."""

    loss: Float[Array, ""]
    parts: LossParts
    sums: BatchSums
    grads: dict  # in the tree of the parameters


def make_gradients(cfg: RunConfig, mesh: Mesh, program: Program | None = None) -> Callable[..., Gradients]:
    """Makes the function (params, router_bias, batch, step) → `Gradients` of the optimizer batch.

    program: by default `choose_program`.
    """
    program = program or choose_program(cfg, mesh)
    count_graph, count = model.abstract(cfg.trained, program), cfg.train.micro_batches
    bins = quantile.BINS if cfg.loss.bias_update == "quantile" else 0
    training = dataclasses.replace(program, max_logit=cfg.optim.qk_clip > 0, histogram_bins=bins)
    graph = model.abstract(cfg.trained, training)

    def gradients(params: dict, bias: dict, batch: Batch, step: Int[Array, ""]) -> Gradients:
        if cfg.loss.shuffle_tokens:
            batch = batch._replace(group=_random_groups(cfg, batch.group.shape, step))
        if knobs.draws_noise(cfg):
            batch = batch._replace(index=knobs.number_tokens(batch.tokens.shape))
        gradients_of = functools.partial(_micro_batch_gradients, cfg, graph, params, bias, step)
        weights = jnp.sum(batch.weights)
        if count == 1:
            return gradients_of(batch, functools.partial(losses.exact_statistics, weights))
        micro = split_micro_batches(batch, count)
        if cfg.loss.accumulation == "exact":
            stats_of = functools.partial(_router_stats, cfg, count_graph, params, bias, step)
            total = _exact(gradients_of, stats_of, micro, weights)
        else:
            total = _running(gradients_of, micro, weights, count)
        return total._replace(grads=jax.tree.map(lambda g, p: g.astype(p.dtype), total.grads, params))

    return gradients


# --- one micro-batch -------------------------------------------------------------------------------------------------


def forward(
    cfg: RunConfig, graph: model.Graph, params: dict, bias: dict, batch: Batch, moving: Knobs | None = None
) -> tuple[model.Output, Float[Array, "V D"]]:
    """Runs the model on a batch. Returns its output, and the matrix that maps hidden states to logits.

    moving: the knobs of the step, in training.
    """
    net = graph.bind(params, bias)
    segments = batch.segment_ids if cfg.model.segment_mask else None
    info = TokenInfo(counted=batch.segment_ids > 0, group=batch.group, index=batch.index)
    return net(model.Inputs(batch.tokens, batch.positions, segments, info, moving)), net.output_matrix


def _router_stats(
    cfg: RunConfig, graph: model.Graph, params: dict, bias: dict, step: Int[Array, ""], batch: Batch
) -> dict[str, RouterStats]:
    return forward(cfg, graph, params, bias, batch, knobs.of_step(cfg, step))[0].stats


def _micro_batch_gradients(
    cfg: RunConfig,
    graph: model.Graph,
    params: dict,
    bias: dict,
    step: Int[Array, ""],
    batch: Batch,
    batch_statistics: Callable[[dict[str, RouterStats]], BatchStatistics],
) -> Gradients:
    """Loss and gradients of one (micro-)batch. `batch_statistics(its stats)` gives those of the optimizer batch."""

    def loss(params):
        out, matrix = forward(cfg, graph, params, bias, batch, knobs.of_step(cfg, step))
        with jax.named_scope("output"):
            nll = cross_entropy.summed_nll(out.hidden, weight(matrix, out.hidden.dtype), batch.targets, batch.weights)
        maxima = Maxima(out.max_logit) if out.max_logit else None
        sums = BatchSums(nll, jnp.sum(batch.weights), out.stats, maxima)
        value, parts = losses.total_loss(sums, cfg.loss, step, batch_statistics(out.stats))
        return value, (parts, sums)

    (value, (parts, sums)), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return Gradients(value, parts, sums, grads)


def _cast_gradients(part: Gradients) -> Gradients:
    """Casts gradients to float32, in which micro-batches are summed."""
    return part._replace(grads=optax.tree.cast(part.grads, jnp.float32))


# --- sums over micro-batches -----------------------------------------------------------------------------------------


def _exact(gradients_of: Callable, stats_of: Callable, micro: Batch, weights: Float[Array, ""]) -> Gradients:
    """Sums micro-batches, each with the statistics of the whole batch. A first pass finds these: `stats_of`, which
    computes no logits and no gradients."""
    statistics = losses.exact_statistics(weights, _sum_over(lambda _, part: stats_of(part), micro))
    return _sum_over(lambda _, part: _cast_gradients(gradients_of(part, lambda stats: statistics)), micro)


def _running(gradients_of: Callable, micro: Batch, weights: Float[Array, ""], count: int) -> Gradients:
    """Averages micro-batches as in arXiv:2501.11873, algorithm 1: f from the counts so far, P of the micro-batch."""
    tokens = jnp.sum(micro.segment_ids > 0).astype(jnp.float32)

    def next_part(so_far: Gradients | None, part: Batch) -> Gradients:
        def batch_statistics(own: dict[str, RouterStats]) -> BatchStatistics:
            before = jax.tree.map(jnp.zeros_like, own) if so_far is None else so_far.sums.router
            return BatchStatistics(
                weights=weights,
                tokens=tokens,
                load={path: before[path].tokens_per_expert + s.tokens_per_expert for path, s in own.items()},
                prob_tokens={path: s.tokens for path, s in own.items()},
                share=1.0 / count,
            )

        return _cast_gradients(gradients_of(part, batch_statistics))

    return _sum_over(next_part, micro)


def _sum_over(fn: Callable, micro: Batch) -> Any:
    """Sums fn(sum so far, micro-batch), a pytree, over micro-batches. `Maxima` in it are combined by maximum instead.

    The first call, under eval_shape, passes None for the sum.
    """
    is_max = lambda node: isinstance(node, Maxima)

    def empty(node):
        fill = -jnp.inf if is_max(node) else 0
        return jax.tree.map(lambda x: jnp.full(x.shape, fill, x.dtype, out_sharding=x.sharding), node)

    join = lambda a, b: jax.tree.map(jnp.maximum if is_max(a) else jnp.add, a, b)
    like = jax.eval_shape(lambda part: fn(None, part), jax.tree.map(lambda x: x[0], micro))
    start = jax.tree.map(empty, like, is_leaf=is_max)
    step = lambda acc, part: (jax.tree.map(join, acc, fn(acc, part), is_leaf=is_max), None)
    return jax.lax.scan(step, start, micro)[0]


def _random_groups(cfg: RunConfig, shape: tuple[int, int], step: Int[Array, ""]) -> Int[Array, "B S"]:
    """Draws a balance group for each token (`loss.shuffle_tokens`). A group has as many as `balance_unit` sequences."""
    key = jax.random.fold_in(jax.random.key(cfg.seed), step)
    groups = jax.random.permutation(key, shape[0] * shape[1]) // (cfg.balance_unit * shape[1])
    return jax.sharding.reshard(groups.astype(jnp.int32).reshape(shape), P(sharding.AXES, None))
