"""The train state and the two jitted steps.

The loss is defined on the optimizer batch. A micro-batch is a rematerialisation policy: a first pass through the layers
sums the expert counts of all micro-batches, a second one computes each with the final frequencies in its loss, which is
then linear in the micro-batch's sums. So loss and gradient are those of the whole batch for any number of them.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from moe_jax import attention, guard, losses, mla, model, optim, routing, sharding
from moe_jax.config import ModelConfig, RunConfig
from moe_jax.layers import weight
from moe_jax.losses import BatchSums, Maxima
from moe_jax.moe import TokenInfo
from moe_jax.program import Program
from moe_jax.routing import ChoiceSums, RouterStats


class TrainState(NamedTuple):
    step: Int[Array, ""]
    params: dict
    router_bias: dict  # {} without model.moe.selection_bias
    opt_state: Any


class Batch(NamedTuple):
    """One optimizer batch. Padding has segment 0 and weight 0."""

    tokens: Int[Array, "B S"]
    targets: Int[Array, "B S"]
    weights: Float[Array, "B S"]
    segment_ids: Int[Array, "B S"]
    positions: Int[Array, "B S"]
    group: Int[Array, "B S"]  # statistics group: balance group in training, domain in evaluation


class EvalSums(NamedTuple):
    """Sums by domain (G = domains)."""

    nll: Float[Array, " G"]
    tokens: Float[Array, " G"]
    router: RouterStats
    choices: ChoiceSums | None  # None unless recorded


def choose_program(cfg: RunConfig, mesh: Mesh) -> Program:
    """How the model of a run is computed on a mesh, in training."""
    tokens = cfg.data.batch_size * cfg.data.seq_len // (mesh.size * cfg.train.micro_batches)
    chosen = Program.choose(cfg.model, mesh, tokens, cfg.data.seq_len)
    return dataclasses.replace(chosen, num_groups=cfg.balance_groups)


def _under(mesh: Mesh, fn: Callable) -> Callable:
    @functools.wraps(fn)
    def run(*args):
        with jax.set_mesh(mesh):
            return fn(*args)

    return run


# --- state -----------------------------------------------------------------------------------------------------------


def init_state(cfg: RunConfig, mesh: Mesh, weights: tuple[dict, dict] | None = None) -> TrainState:
    """A fresh state, born sharded: no device ever holds all of it. weights: (params, router_bias) to start from."""
    with jax.set_mesh(mesh):
        return _init(cfg, jax.jit, weights)


def _init(cfg: RunConfig, jit: Callable, weights: tuple[dict, dict] | None = None) -> TrainState:
    params, bias = weights or model.init(cfg.model, jax.random.key(cfg.seed))
    opt_state = jit(optim.make_optimizer(cfg.optim, cfg.train.steps, cfg.model.head_dim).init)(params)
    return TrainState(jnp.zeros((), jnp.int32), params, bias, opt_state)


def abstract_state(cfg: RunConfig, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state: what a checkpoint is restored into."""
    return _abstract(mesh, functools.partial(_init, cfg, lambda f: f))


def abstract_weights(cfg: ModelConfig, mesh: Mesh) -> tuple[dict, dict]:
    """The same of parameters and router biases only: what `weights.load_weights` takes."""
    return _abstract(mesh, functools.partial(model.init, cfg, jax.random.key(0)))


def _abstract(mesh: Mesh, fn: Callable) -> Any:
    abstract = _under(mesh, functools.partial(jax.eval_shape, fn))()
    concrete = lambda x: jax.sharding.NamedSharding(mesh, x.sharding.spec if x.sharding is not None else P())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=concrete(x)), abstract)


# --- batches ---------------------------------------------------------------------------------------------------------


def put_batch(rows: dict, mesh: Mesh, cfg: RunConfig, *, by_domain: bool = False) -> Batch:
    """This process's rows of a batch (numpy, from the data pipeline) → the global arrays.

    `by_domain` groups statistics by the domain of each token instead of by balance group.
    """
    group = rows["domain_ids"] if by_domain else rows["sequence_ids"] // cfg.balance_unit
    # numpy all the way: a detour over the device would wait for the step that is running there.
    rows = {**rows, "group": group if by_domain else np.broadcast_to(group[:, None], rows["tokens"].shape)}
    to_global = functools.partial(jax.make_array_from_process_local_data, sharding.batch_sharding(mesh))
    return Batch(*(to_global(np.ascontiguousarray(rows[name])) for name in Batch._fields))


def process_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """The rows of a global batch that this process has to supply."""
    indices = sharding.batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for (rows,) in indices for row in range(*rows.indices(batch_size))})


def split_micro_batches(batch: Batch, count: int) -> Batch:
    """`[B, S]` → `[A, B/A, S]`: sequence i goes to micro-batch i mod A, so no sequence changes device."""
    out = P(sharding.AXES, None, None)

    def split(x):
        x = x.reshape(x.shape[0] // count, count, *x.shape[1:], out_sharding=out)
        return jnp.swapaxes(x, 0, 1)

    return jax.tree.map(split, batch)


# --- forward ---------------------------------------------------------------------------------------------------------


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
            nll = losses.summed_nll(out.hidden, weight(matrix, out.hidden.dtype), batch.targets, batch.weights)
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


# --- steps -----------------------------------------------------------------------------------------------------------


def make_train_step(
    cfg: RunConfig, mesh: Mesh, program: Program | None = None
) -> Callable[..., tuple[TrainState, dict]]:
    """Jitted (state, batch[, limits]) → (new state, what metrics.py names). The old state's buffers are donated.

    program: by default `choose_program`.

    A bad step (moe_jax/guard.py; limits: `Watch.limits`) counts as one and changes nothing else of the state.
    """
    gradients = make_gradients(cfg, mesh, program)
    optimizer = optim.make_optimizer(cfg.optim, cfg.train.steps, cfg.model.head_dim)
    lr = optim.schedule(cfg.optim, cfg.train.steps)

    def train_step(state: TrainState, batch: Batch, limits=None):
        (loss, (parts, sums)), grads = gradients(state.params, state.router_bias, batch, state.step)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params, clipping = _clip_logits(optax.apply_updates(state.params, updates), sums.maxima, cfg.optim.qk_clip)
        counts = jnp.sum(sums.router.tokens_per_expert, axis=1)
        update = (cfg.loss.bias_update_rate, cfg.loss.bias_update, cfg.loss.bias_target)
        bias = jax.tree.map(lambda b: routing.update_bias(b, counts, *update), state.router_bias)
        aux = {
            "loss": loss,
            **parts.scalars(),
            **parts.raw,
            "grad_norm": optax.tree.norm(grads),
            "lr": jnp.asarray(lr(_updates(state)), jnp.float32),
            "tokens": sums.tokens,
            "router": sums.router,
            **clipping,
        }
        made = (params, bias, opt_state)
        if cfg.train.skip_nonfinite:
            bad = guard.is_bad(loss, aux["grad_norm"], limits)
            made, aux["tokens"] = guard.unless(bad, (made, sums.tokens), (tuple(state[1:]), 0.0))
            aux["skipped"] = bad.astype(jnp.float32)
        return TrainState(state.step + 1, *made), aux

    return _under(mesh, jax.jit(train_step, donate_argnums=0, compiler_options=sharding.compiler_options(mesh)))


def _updates(state: TrainState) -> Int[Array, ""]:
    """How often the optimizer has been applied: the step, less those skipped."""
    counts = optax.tree_utils.tree_get_all_with_path(state.opt_state, "count")
    return counts[0][1] if counts else state.step


def _clip_logits(params: dict, maxima: Maxima | None, threshold: float) -> tuple[dict, dict]:
    """QK-clip of all layers, from the maxima of the step's own forward pass, and what is logged of it."""
    if maxima is None:
        return params, {}
    of = lambda weights: mla.qk_clip if "w_kv_down" in weights else attention.qk_clip
    clip = lambda name, top: {
        **params[name],
        "attention": of(params[name]["attention"])(params[name]["attention"], top, threshold),
    }
    tops = jnp.concatenate(list(maxima.logit.values()))
    scalars = {"max_logit": jnp.max(tops), "clipped_heads": jnp.sum(tops > threshold).astype(jnp.float32)}
    return {**params, **{name: clip(name, top) for name, top in maxima.logit.items()}}, scalars


def make_eval_step(
    cfg: RunConfig, mesh: Mesh, num_domains: int, record: bool = False, program: Program | None = None
) -> Callable[..., EvalSums]:
    """Jitted (params, router_bias, batch grouped by domain[, earlier]) → sums by domain.

    `record` adds `EvalSums.choices`, and `earlier`, (params, router_bias) of another checkpoint, `choices.kept`.
    """
    program = program or choose_program(cfg, mesh)
    graph = model.abstract(cfg.model, dataclasses.replace(program, num_groups=num_domains, record=record))

    def eval_step(params, bias, batch, earlier=None) -> EvalSums:
        out, matrix = _hidden(graph, cfg, params, bias, batch)
        with jax.named_scope("output"):
            nll = losses.token_nll(out.hidden, weight(matrix, out.hidden.dtype), batch.targets)
        member = jax.nn.one_hot(batch.group, num_domains, dtype=jnp.float32) * batch.weights[:, :, None]
        choices = None
        if record:
            before = _hidden(graph, cfg, *earlier, batch)[0].choices if earlier else None
            counted, experts = batch.segment_ids > 0, cfg.model.moe.num_experts
            choices = routing.choice_sums(out.choices, before, counted, batch.group, num_domains, experts)
        return EvalSums(
            jnp.sum(member * nll[:, :, None], axis=(0, 1)), jnp.sum(member, axis=(0, 1)), out.stats, choices
        )

    return _under(mesh, jax.jit(eval_step))
