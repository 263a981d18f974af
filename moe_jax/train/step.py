"""The jitted train step and evaluation step."""

import dataclasses
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int

from moe_jax import model, optim
from moe_jax.config import ModelConfig, RunConfig
from moe_jax.moe import balance, quantile
from moe_jax.moe.program import Program
from moe_jax.moe.stats import RouterStats, choice_sums
from moe_jax.nn import qk_clip
from moe_jax.nn.layers import weight
from moe_jax.optim import groups
from moe_jax.parallel import overlap
from moe_jax.train import average, cross_entropy, guard
from moe_jax.train.gradients import forward, make_gradients
from moe_jax.train.metrics import StepMetrics
from moe_jax.train.state import (
    Batch,
    EvalSums,
    TrainState,
    abstract_batch,
    abstract_state,
    abstract_weights,
    choose_program,
    join_parts,
    parts_of,
    under_mesh,
)
from moe_jax.tree import at_path, flatten, nest


def make_train_step(
    cfg: RunConfig, mesh: Mesh, program: Program | None = None, teacher: ModelConfig | None = None
) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """Makes the jitted train step: (state, batch[, limits[, teacher]]) → (new state, `StepMetrics`). It donates the old
    state.

    program: by default `choose_program`.
    teacher: the model of `cfg.distill.teacher`, whose weights, (params, router_bias), the step takes. None in their
        place gives the step without a teacher, another program.
    limits: see `Watch.limits`. A bad step (moe_jax/train/guard.py) adds 1 to `state.step` and changes nothing else.
    """
    gradients = make_gradients(cfg, mesh, program, teacher)
    optimizer = optim.make_optimizer(cfg.optim, cfg.train.steps, cfg.model.head_dim)
    lr = optim.schedule(cfg.optim, cfg.train.steps)

    def train_step(state: TrainState, batch: Batch, limits=None, of_teacher=None):
        loss, parts, sums, grads = gradients(state.params, state.router_bias, batch, state.step, of_teacher)
        with jax.named_scope("optimizer"):
            moments, controllers, ema = parts_of(state.opt_state)
            frozen = optim.frozen_paths(cfg.optim, flatten(state.params))
            trained, fixed = groups.split(state.params, frozen)
            updates, moments = optimizer.update(grads, moments, trained)
            params = groups.join(optax.apply_updates(trained, updates), fixed)
            params, clipping = qk_clip.clip(params, sums.maxima, cfg.optim.qk_clip, frozen)
            if cfg.optim.ema:
                ema = average.update(ema, groups.split(params, frozen)[0], cfg.optim.ema, _updates(state))
        biases = groups.fixed_biases(frozen, state.params, state.router_bias)
        bias, controllers = update_biases(cfg, state.router_bias, sums.router, controllers, biases)
        seen = jnp.sum(batch.segment_ids > 0, dtype=jnp.float32) if cfg.data.has_roles else None
        report = StepMetrics(
            loss=loss,
            terms={**parts.scalars(), **parts.raw},
            grad_norm=optax.tree.norm(grads),
            lr=jnp.asarray(lr(_updates(state)), jnp.float32),
            tokens=sums.weights,
            router={path: stats._replace(histogram=None, by_label=None) for path, stats in sums.router.items()},
            clipping=clipping or None,
            seen=seen,
        )
        new = (params, bias, join_parts(moments, controllers, ema))
        if cfg.train.skip_nonfinite:
            bad = guard.is_bad(loss, report.grad_norm, limits)
            new, tokens = guard.unless(bad, (new, sums.weights), (tuple(state[1:]), 0.0))
            seen = seen if seen is None else jnp.where(bad, 0.0, seen)
            report = report._replace(tokens=tokens, seen=seen, skipped=bad.astype(jnp.float32))
        return TrainState(state.step + 1, *new), report

    return under_mesh(mesh, jax.jit(train_step, donate_argnums=0, compiler_options=overlap.compiler_options(mesh)))


def compile_ahead(train_step: Callable, cfg: RunConfig, mesh: Mesh, teacher: ModelConfig | None = None) -> Future:
    """Compiles a step of `make_train_step` in another thread, for a state and batches of this configuration.

    Wait for the result before the first step, which then compiles nothing. Until then it would compile the same
    program a second time. With several processes nothing is compiled ahead, so that all do the same in the same order.
    teacher: the one that the step was made for.
    """
    limits = jax.ShapeDtypeStruct((2,), jnp.float32) if cfg.train.spike else None

    def compile_it():
        if jax.process_count() == 1:
            lower = under_mesh(mesh, train_step.__wrapped__.lower)
            lesson = abstract_weights(teacher, mesh) if teacher else None
            lower(abstract_state(cfg, mesh), abstract_batch(cfg, mesh), limits, lesson).compile()

    return ThreadPoolExecutor(1).submit(compile_it)


def update_biases(
    cfg: RunConfig, router_bias: dict, stats: dict[str, RouterStats], controllers: dict,
    fixed: frozenset[str] = groups.NOTHING,
) -> tuple[dict, dict]:  # fmt: skip
    """Updates the selection bias of each block from the sums of the optimizer batch. The next step uses the result.

    controllers: the states of those with one (`parts_of`). Returns the biases and these states.
    fixed: the paths of biases that are not updated (`groups.fixed_biases`).
    """
    loss, moe, new, states = cfg.loss, cfg.trained.moe, flatten(router_bias), {}
    experts = {place.path: place.kind.experts for place in (*cfg.model.places, *cfg.model.mtp_places)}
    for name, bias in new.items():
        if not name.endswith("/router_bias") or name in fixed:  # a table, or the bias of a frozen router
            continue
        path = name.removesuffix("/moe/router_bias")
        if loss.bias_update == "quantile":
            new[name] = quantile.update_bias(bias, stats[path].histogram, moe.top_k)
            continue
        target, moved = loss.bias_target, 0
        if moe.expert_budget:
            moved = experts[path]
            target = balance.budget_target(bias.shape[-1], moved, moe.top_k, moe.expert_budget)
        load, before = jnp.sum(stats[path].tokens_per_expert, axis=1), at_path(controllers, name)
        update = (loss.bias_update_rate, loss.bias_update, target, moved)
        new[name], states[name] = balance.update_bias(bias, load, *update, before)
    return nest(new), nest({name: state for name, state in states.items() if state is not None})


def _updates(state: TrainState) -> Int[Array, ""]:
    """The number of optimizer updates so far: steps that were not skipped."""
    counted = groups.updates_so_far(parts_of(state.opt_state).optimizer)  # a controller has a count of its own
    return state.step if counted is None else counted


def make_eval_step(
    cfg: RunConfig, mesh: Mesh, num_domains: int, record: bool = False, program: Program | None = None
) -> Callable[..., EvalSums]:
    """Makes the jitted evaluation step: (params, router_bias, batch grouped by domain[, earlier[, switches]]) → sums
    by domain.

    `record` adds `EvalSums.choices`. `earlier`, (params, router_bias) of another checkpoint, adds `choices.kept`.
    `switches` turn experts off or on, of both checkpoints (`model.Inputs`).
    """
    program = program or choose_program(cfg, mesh)
    graph = model.abstract(cfg.model, dataclasses.replace(program, balance_groups=num_domains, record=record, labels=0))

    def eval_step(params, bias, batch, earlier=None, switches=None) -> EvalSums:
        out, matrix = forward(graph, params, bias, batch, None, switches)
        with jax.named_scope("output"):
            nll = cross_entropy.token_nll(out.hidden, weight(matrix, out.hidden.dtype), batch.targets)
        domain = jax.nn.one_hot(batch.group, num_domains, dtype=jnp.float32)
        weights, left_out = batch.weights, None
        if cfg.model.moe.pool_prefix:  # the tokens that give a document's pool: targets are a place further
            given = batch.positions < cfg.model.moe.pool_prefix - 1
            left_out = jnp.sum(domain * jnp.where(given, weights, 0.0)[:, :, None], axis=(0, 1))
            weights = jnp.where(given, 0.0, weights)
        member = domain * weights[:, :, None]
        choices = None
        if record:
            before = forward(graph, *earlier, batch, None, switches)[0].choices if earlier else {}
            choices = {
                path: choice_sums(
                    chosen,
                    before.get(path),
                    batch.segment_ids > 0,
                    batch.group,
                    num_domains,
                    out.stats[path].tokens_per_expert.shape[-1],
                    in_order=cfg.model.moe.choice == "expert" and path not in cfg.model.table_paths,
                )
                for path, chosen in out.choices.items()
            }
        return EvalSums(
            jnp.sum(member * nll[:, :, None], axis=(0, 1)), jnp.sum(member, axis=(0, 1)), out.stats, choices, left_out
        )

    return under_mesh(mesh, jax.jit(eval_step))
