"""Loss and gradients of one optimizer batch, in one micro-batch or many.

The loss is a function of the sums of the optimizer batch, and need not be linear in them; micro-batches save memory and
do not change it. A first pass through the layers sums the router statistics of all micro-batches, and the slopes of the
loss, its derivatives by each sum, are taken there. A second pass adds up, over micro-batches, the gradient of
Σ slope · the micro-batch's own sum. By the chain rule that is the gradient of the whole batch, for any loss and any
number of micro-batches. Losses say of themselves whether they need that (`losses.needs_whole_batch`). One that is
linear in the sums has the same slopes everywhere, and one that balances each sequence needs the sums of a sequence
alone, which one micro-batch has.
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

from moe_jax import model, optim
from moe_jax.config import ModelConfig, RunConfig
from moe_jax.moe import pools, quantile, router_losses
from moe_jax.moe.layer import TokenInfo
from moe_jax.moe.program import Program
from moe_jax.moe.routing import Knobs
from moe_jax.moe.stats import RouterStats
from moe_jax.nn.layers import weight
from moe_jax.nn.qk_clip import Maxima
from moe_jax.optim import groups
from moe_jax.parallel import sharding
from moe_jax.train import cross_entropy, distillation, knobs, losses, prediction
from moe_jax.train.distillation import Lesson
from moe_jax.train.losses import BatchSums, LossParts
from moe_jax.train.prediction import PredictionSums
from moe_jax.train.state import Batch, choose_program, split_micro_batches
from moe_jax.tree import flatten


class Gradients(NamedTuple):
    """Loss and gradients of an optimizer batch, or the part of them that one micro-batch contributes."""

    loss: Float[Array, ""] | None  # None in a part, where only the whole batch has one
    parts: LossParts | None
    sums: BatchSums
    grads: dict  # in the tree of the parameters, without the frozen ones (`groups.split`)


def make_gradients(
    cfg: RunConfig, mesh: Mesh, program: Program | None = None, teacher: ModelConfig | None = None
) -> Callable[..., Gradients]:
    """Makes the function (params, router_bias, batch, step[, teacher]) → `Gradients` of the optimizer batch.

    program: by default `choose_program`.
    teacher: the model of `cfg.distill.teacher`; the function takes its weights, (params, router_bias), or None for a
        step without it.
    Raises ConfigError for a router loss that is not in the table, and for a group of parameters that matches none.
    """
    router_losses.check(cfg)
    optim.check_groups(cfg)
    program = program or choose_program(cfg, mesh)
    program = dataclasses.replace(program, mtp=cfg.model.mtp_layers > 0)
    count_graph, count = model.abstract(cfg.trained, program), cfg.train.micro_batches
    bins = quantile.BINS if cfg.loss.bias_update == "quantile" else 0
    frozen = optim.frozen_paths(cfg.optim, flatten(count_graph.shapes))
    training = dataclasses.replace(program, max_logit=cfg.optim.qk_clip > 0, histogram_bins=bins, frozen=frozen)
    training = dataclasses.replace(training, residual=teacher is not None and cfg.distill.hidden_coef > 0)
    graph = model.abstract(cfg.trained, training)
    teach = _make_teacher(cfg, mesh, teacher) if teacher else None

    def gradients(
        params: dict, bias: dict, batch: Batch, step: Int[Array, ""], of_teacher: tuple[dict, dict] | None = None
    ) -> Gradients:
        if cfg.loss.shuffle_tokens:
            batch = batch._replace(group=_random_groups(cfg, batch.group.shape, step))
        if knobs.draws_noise(cfg):
            batch = batch._replace(index=knobs.number_tokens(batch.tokens.shape))
        moving = knobs.of_step(cfg, step)
        total_loss = functools.partial(
            losses.total_loss, cfg=cfg.loss, step=step, model=cfg.trained, distill=cfg.distill
        )
        trained, fixed = groups.split(params, frozen)
        lesson_of = functools.partial(teach, of_teacher) if of_teacher else None
        gradients_of = functools.partial(_gradients_of, cfg, graph, trained, fixed, bias, moving, lesson_of)
        if count == 1:
            return gradients_of(batch, total_loss)
        micro = split_micro_batches(batch, count)
        first_pass = cfg.model.num_moe_layers > 0 and losses.needs_whole_batch(cfg.loss)
        if first_pass and cfg.loss.accumulation == "running":
            total = _running(gradients_of, total_loss, micro, count, cfg.model.mtp_layers)
        else:
            stats_of = functools.partial(_router_stats, count_graph, params, bias, moving)
            terms = {name: jnp.zeros(()) for name in cfg.distill.factors} if of_teacher else None
            sequences = losses.balances_sequences(cfg.loss)
            total = _exact(
                gradients_of,
                total_loss,
                micro,
                stats_of if first_pass else None,
                terms,
                cfg.model.mtp_layers,
                sequences,
            )
        return total._replace(grads=jax.tree.map(lambda g, p: g.astype(p.dtype), total.grads, trained))

    return gradients


# --- one micro-batch -------------------------------------------------------------------------------------------------


def forward(
    graph: model.Graph,
    params: dict,
    bias: dict,
    batch: Batch,
    moving: Knobs | None = None,
    switches: dict[str, Array] | None = None,
) -> tuple[model.Output, Float[Array, "V D"]]:
    """Runs the model on a batch. Returns its output, and the matrix that maps hidden states to logits.

    moving: the knobs of the step, in training. switches: of experts, in evaluation (`model.Inputs`).
    """
    net = graph.bind(params, bias)
    segments = batch.segment_ids if net.cfg.segment_mask else None
    own = pools.documents_of(net.cfg.moe, batch.segment_ids, batch.positions, training=moving is not None)
    info = TokenInfo(batch.segment_ids > 0, batch.group, batch.index, own, batch.label)
    ahead = prediction.ahead(batch, net.cfg.mtp_layers) if net.program.mtp else None
    return net(model.Inputs(batch.tokens, batch.positions, segments, info, moving, ahead, switches)), net.output_matrix


def _router_stats(
    graph: model.Graph, params: dict, bias: dict, moving: Knobs | None, batch: Batch
) -> dict[str, RouterStats]:
    return forward(graph, params, bias, batch, moving)[0].stats


def _gradients_of(
    cfg: RunConfig,
    graph: model.Graph,
    trained: dict,
    fixed: dict,
    bias: dict,
    moving: Knobs | None,
    lesson_of: Callable[[Batch], Lesson] | None,
    batch: Batch,
    loss_of: Callable[[BatchSums], tuple[Float[Array, ""], LossParts | None]],
) -> Gradients:
    """Loss and gradients of one (micro-)batch. loss_of: sums of this batch → the loss, and its parts.

    trained, fixed: the parameters, of which only the former have gradients. lesson_of: what a teacher makes of the
    batch; None without one.
    """
    lesson = lesson_of(batch) if lesson_of else None

    def loss(trained):
        out, matrix = forward(graph, groups.join(trained, fixed), bias, batch, moving)
        with jax.named_scope("output"):
            outputs = (out.hidden, weight(matrix, out.hidden.dtype), batch.targets, batch.weights)
            if lesson:
                nll, terms = _with_teacher(cfg, out, outputs, lesson)
            else:
                nll, terms = cross_entropy.summed_nll(*outputs), None
            mtp = None if out.ahead is None else prediction.sums(out.ahead, outputs[1], batch)
        maxima = Maxima(out.max_logit) if out.max_logit else None
        sums = BatchSums(nll, jnp.sum(batch.weights), out.stats, maxima, terms, mtp)
        value, parts = loss_of(sums)
        return value, (parts, sums)

    (value, (parts, sums)), grads = jax.value_and_grad(loss, has_aux=True)(trained)
    return Gradients(value, parts, sums, grads)


# --- a teacher -------------------------------------------------------------------------------------------------------


def _make_teacher(cfg: RunConfig, mesh: Mesh, teacher: ModelConfig) -> Callable[[tuple[dict, dict], Batch], Lesson]:
    """Makes the function (weights of the teacher, batch) → `Lesson`. It routes as in evaluation, without noise."""
    tokens = cfg.data.batch_size * cfg.data.seq_len // (mesh.size * cfg.train.micro_batches)
    program = Program.choose(teacher, mesh, tokens, cfg.data.seq_len)
    compared = cfg.distill.hidden_coef > 0
    program = dataclasses.replace(program, balance_groups=cfg.balance_groups, residual=compared)
    graph = model.abstract(teacher, program)

    def lesson(weights: tuple[dict, dict], batch: Batch) -> Lesson:
        with jax.named_scope("teacher"):
            out, matrix = forward(graph, *weights, batch)
            blocks = _in_order(teacher, out.residual) if compared else None
            return Lesson(out.hidden, weight(matrix, out.hidden.dtype), blocks)

    return lesson


def _with_teacher(
    cfg: RunConfig, out: model.Output, outputs: tuple, lesson: Lesson
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The summed negative log-likelihood, and the sums of the terms that are on (`DistillConfig.factors`)."""
    distill, terms = cfg.distill, {}
    if distill.coef:
        symmetric = distill.divergence == "symmetric"
        nll, terms["distill"] = distillation.summed_losses(*outputs, lesson, distill.temperature, symmetric)
    else:
        nll = cross_entropy.summed_nll(*outputs)
    if distill.hidden_coef:
        weights = outputs[-1]
        blocks = _in_order(cfg.model, out.residual)
        terms["distill_hidden"] = distillation.summed_distance(blocks, lesson.blocks, weights)
    return nll, terms


def _in_order(cfg: ModelConfig, residual: dict[str, Float[Array, "L B S D"]]) -> list[Float[Array, "B S D"]]:
    """The residual stream after each block, from the first block to the last."""
    return [residual[place.path][place.index] for place in cfg.places]


def _cast_gradients(part: Gradients) -> Gradients:
    """Casts gradients to float32, in which micro-batches are summed."""
    return part._replace(grads=optax.tree.cast(part.grads, jnp.float32))


# --- sums over micro-batches -----------------------------------------------------------------------------------------


def _exact(
    gradients_of: Callable, total_loss: Callable, micro: Batch, stats_of: Callable | None, terms: dict | None,
    mtp_layers: int, by_sequence: bool,
) -> Gradients:  # fmt: skip
    """Sums the gradients of micro-batches, each with the slopes of the loss at the sums of the whole batch.

    stats_of: the first pass of a micro-batch, which computes no logits and no gradients; None where the slopes do not
        depend on other micro-batches.
    terms: zeros in place of the terms of a teacher, if there is one.
    by_sequence: `losses.balances_sequences`.
    """
    weights, ahead = jnp.sum(micro.weights), prediction.without_nll(micro, mtp_layers)
    if stats_of:
        stats = _sum_over(lambda _, part: stats_of(part), micro)
        whole = BatchSums(jnp.zeros(()), weights, stats, teacher=terms, mtp=ahead)
        slopes = jax.grad(lambda sums: total_loss(sums)[0], allow_int=True)(whole)
        loss_of = lambda sums: (losses.dot(slopes, sums), None)
    else:
        whole = {"tokens": _counted(micro)}
        whole |= {"sequences": prediction.sequences(micro, mtp_layers)} if by_sequence else {}
        of_batch = lambda sums: sums._replace(weights=weights, mtp=_of_batch(sums.mtp, ahead))
        loss_of = lambda sums: (total_loss(of_batch(sums), **whole)[0], None)
    only_sums = lambda part: _cast_gradients(gradients_of(part, loss_of))._replace(loss=None, parts=None)
    total = _sum_over(lambda _, part: only_sums(part), micro)
    loss, parts = total_loss(total.sums)
    return total._replace(loss=loss, parts=parts)


def _running(gradients_of: Callable, total_loss: Callable, micro: Batch, count: int, mtp_layers: int) -> Gradients:
    """Averages micro-batches as in arXiv:2501.11873, algorithm 1: f from the counts so far, P of the micro-batch."""
    weights, tokens = jnp.sum(micro.weights), _counted(micro)
    ahead = prediction.without_nll(micro, mtp_layers)

    def next_part(so_far: Gradients | None, part: Batch) -> Gradients:
        def loss_of(sums: BatchSums):
            before = jax.tree.map(jnp.zeros_like, sums.router) if so_far is None else so_far.sums.router
            counts = {path: before[path].tokens_per_expert + s.tokens_per_expert for path, s in sums.router.items()}
            router = {path: s._replace(tokens_per_expert=counts[path]) for path, s in sums.router.items()}
            sums = sums._replace(weights=weights, router=router, mtp=_of_batch(sums.mtp, ahead))
            return total_loss(sums, tokens=tokens, share=1.0 / count)

        return _cast_gradients(gradients_of(part, loss_of))

    return _sum_over(next_part, micro)


def _of_batch(sums: PredictionSums | None, whole: PredictionSums | None) -> PredictionSums | None:
    """The sums of a micro-batch, with the numbers of targets and tokens of the whole batch."""
    return None if whole is None else whole._replace(nll=sums.nll)


def _counted(batch: Batch) -> Float[Array, ""]:
    """The number of counted tokens, as in `RouterStats` of one layer."""
    return jnp.sum(batch.segment_ids > 0).astype(jnp.float32)


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
