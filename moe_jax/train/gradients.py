"""Loss and gradients of one optimizer batch, in one micro-batch or many.

The loss is defined on the optimizer batch. A micro-batch is a rematerialisation policy: a first pass through the layers
sums the expert counts of all micro-batches, a second one computes each with the final frequencies in its loss, which is
then linear in the micro-batch's sums. So loss and gradient are those of the whole batch for any number of them.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Int

from moe_jax import model
from moe_jax.config import RunConfig
from moe_jax.moe.layer import TokenInfo
from moe_jax.moe.program import Program
from moe_jax.nn.layers import weight
from moe_jax.nn.qk_clip import Maxima
from moe_jax.parallel import sharding
from moe_jax.train import cross_entropy, losses
from moe_jax.train.losses import BatchSums
from moe_jax.train.state import Batch, choose_program, split_micro_batches


def _hidden(graph: model.Graph, cfg: RunConfig, params: dict, bias: dict, batch: Batch):
    """All that the model returns, and the matrix from hidden states to logits."""
    net = graph.bind(params, bias)
    counted: Bool[Array, "B S"] = batch.segment_ids > 0
    inputs = model.Inputs(
        batch.tokens,
        batch.positions,
        batch.segment_ids if cfg.model.segment_mask else None,
        TokenInfo(counted, batch.group),
    )
    return net(inputs), net.output_matrix


def make_gradients(cfg: RunConfig, mesh: Mesh, program: Program | None = None) -> Callable:
    """(params, router_bias, batch, step) → ((loss, (parts, sums)), gradients) of the optimizer batch.

    program: by default `choose_program`.
    """
    program = program or choose_program(cfg, mesh)
    first_pass, count = model.abstract(cfg.model, program), cfg.train.micro_batches
    graph = model.abstract(cfg.model, dataclasses.replace(program, max_logit=cfg.optim.qk_clip > 0))

    def loss(params, bias, batch, step, frame_of: Callable):
        """Of a (micro-)batch, in the frame that `frame_of` makes from its router statistics."""
        out, matrix = _hidden(graph, cfg, params, bias, batch)
        with jax.named_scope("output"):
            nll = cross_entropy.summed_nll(out.hidden, weight(matrix, out.hidden.dtype), batch.targets, batch.weights)
        maxima = Maxima(out.max_logit) if out.max_logit else None
        sums = BatchSums(nll, jnp.sum(batch.weights), out.stats, maxima)
        value, parts = losses.total_loss(sums, cfg.loss, cfg.model.moe.top_k, step, frame_of(out.stats))
        return value, (parts, sums)

    value_and_gradients = jax.value_and_grad(loss, has_aux=True)

    def in_float32(*args):
        """For a sum over micro-batches."""
        value, grads = value_and_gradients(*args)
        return value, optax.tree.cast(grads, jnp.float32)

    def exact(params, bias, micro, step, weights):
        """First pass: the statistics of all micro-batches, without logits or gradients."""
        stats_of = lambda part: _hidden(first_pass, cfg, params, bias, part)[0].stats
        frame = losses.exact_frame(weights, _sum_over(lambda _, part: stats_of(part), micro))
        return _sum_over(lambda _, part: in_float32(params, bias, part, step, lambda stats: frame), micro)

    def running(params, bias, micro, step, weights):
        """arXiv:2501.11873, algorithm 1: f from the counts so far, P of the micro-batch, a mean over micro-batches."""
        counted = jnp.sum(micro.segment_ids > 0).astype(jnp.float32)

        def one(so_far, part):
            def frame_of(own):
                before = jax.tree.map(jnp.zeros_like, own) if so_far is None else so_far[0][1][1].router
                load = before.tokens_per_expert + own.tokens_per_expert
                return losses.Frame(weights, counted, load, before.tokens + own.tokens, own.tokens, 1.0 / count)

            return in_float32(params, bias, part, step, frame_of)

        return _sum_over(one, micro)

    def gradients(params, bias, batch, step):
        if cfg.loss.shuffle_tokens:
            batch = batch._replace(group=_deal_tokens(cfg, batch.group.shape, step))
        weights = jnp.sum(batch.weights)
        if count == 1:
            return value_and_gradients(params, bias, batch, step, functools.partial(losses.exact_frame, weights))
        accumulate = exact if cfg.loss.accumulation == "exact" else running
        value, grads = accumulate(params, bias, split_micro_batches(batch, count), step, weights)
        return value, jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)

    return gradients


def _sum_over(fn: Callable, micro: Batch) -> Any:
    """Σ over micro-batches of fn(sum so far, micro-batch), any pytree; None stands for no sum, to learn its shape.

    Of `Maxima` in it, the largest instead.
    """
    is_max = lambda node: isinstance(node, Maxima)

    def empty(node):
        fill = -jnp.inf if is_max(node) else 0
        return jax.tree.map(lambda x: jnp.full(x.shape, fill, x.dtype, out_sharding=x.sharding), node)

    join = lambda a, b: jax.tree.map(jnp.maximum if is_max(a) else jnp.add, a, b)
    first = jax.tree.map(lambda x: x[0], micro)
    like = jax.eval_shape(lambda part: fn(None, part), first)
    start = jax.tree.map(empty, like, is_leaf=is_max)
    step = lambda acc, part: (jax.tree.map(join, acc, fn(acc, part), is_leaf=is_max), None)
    return jax.lax.scan(step, start, micro)[0]


def _deal_tokens(cfg: RunConfig, shape: tuple[int, int], step: Int[Array, ""]) -> Int[Array, "B S"]:
    """`loss.shuffle_tokens`: a random balance group for each token, all of `balance_unit` sequences' size."""
    key = jax.random.fold_in(jax.random.key(cfg.seed), step)
    dealt = jax.random.permutation(key, shape[0] * shape[1]) // (cfg.balance_unit * shape[1])
    return jax.sharding.reshard(dealt.astype(jnp.int32).reshape(shape), P(sharding.AXES, None))
