"""Gradients and losses of the cross-entropy alone, which controllers observe beside the batches of the run.

Rows are drawn by (seed, number of steps, source) from all rows of a source, also from those that the run trains on, and
no cursor of the training data moves. So a resumed run observes the same numbers, on the same machine bit for bit.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from moe_jax.config import DistillConfig, ExploreConfig, RunConfig
from moe_jax.config.fields import require
from moe_jax.data import Corpus
from moe_jax.data.batches import with_labels
from moe_jax.data.rows import random_number
from moe_jax.data.sources import Split
from moe_jax.evaluate.held_out import check_held_out
from moe_jax.moe.program import Program
from moe_jax.train.gradients import make_gradients
from moe_jax.train.state import Batch, TrainState, parts_of, process_rows, put_batch, under_mesh
from moe_jax.train.step import make_eval_step
from moe_jax.tree import flatten, nest, path_of


def cross_entropy_alone(cfg: RunConfig) -> RunConfig:
    """The configuration whose training loss is the cross-entropy, of the model as it is evaluated: without losses of
    routers, noise and a teacher. Where experts take a random part of too many tokens, here they take the first."""
    update = "sign" if cfg.loss.bias_update == "quantile" else cfg.loss.bias_update
    loss = dataclasses.replace(
        cfg.loss, load_balance_coef=0.0, router_z_coef=0.0, more={}, shuffle_tokens=False, bias_update=update
    )
    optim, model = dataclasses.replace(cfg.optim, qk_clip=0.0), cfg.model
    if model.moe.overflow == "random":
        model = dataclasses.replace(model, moe=dataclasses.replace(model.moe, overflow="first"))
    if not model.moe.takes_pools:  # those of training are drawn; with others no controller has gradients
        none = {"pool_min": 0, "pool_max": 0, "pool_from": "", "pool_prefix": 0}
        model = dataclasses.replace(model, moe=dataclasses.replace(model.moe, **none))
    data = cfg.data if model.labels else dataclasses.replace(cfg.data, labels={})
    return dataclasses.replace(
        cfg, model=model, data=data, loss=loss, explore=ExploreConfig(), distill=DistillConfig(), optim=optim
    )


class Probe:
    """Observes a run. Every process makes one and calls the same methods in the same order.

    Targets are the sources whose held-out text counts: `mixture.target`, or all that are trained on and have some.
    Raises ConfigError if there is no such text.
    """

    def __init__(self, cfg: RunConfig, mesh: Mesh, corpus: Corpus, program: Program | None = None):
        self._cfg, self._mesh, self._corpus = cross_entropy_alone(cfg), mesh, corpus
        self._program = program and dataclasses.replace(program, labels=0)  # which a loss of the run may count
        self._rows = process_rows(mesh, cfg.data.batch_size)
        self.targets = corpus.targets(cfg.mixture)
        for name in self.targets:
            check_held_out(corpus, self._cfg.model.moe.pool_prefix, (name,))

    def _batches(self, step: int, name: str, split: Split, by_domain: bool = False) -> Iterator[Batch]:
        """Yields `mixture.probe_batches` batches of a source, spread evenly over all its rows from a random one on."""
        rows, size = self._corpus.rows_of(name, split), self._cfg.data.batch_size
        count = size * self._cfg.mixture.probe_batches
        first = random_number("probe", self._cfg.seed, step, name, split) % len(rows)
        for begin in range(0, count, size):
            found = [rows[(first + (begin + j) * len(rows) // count) % len(rows)] for j in self._rows]
            stacked = {key: np.stack([row[key] for row in found]) for key in found[0]}
            stacked["sequence_ids"] = np.array(self._rows, np.int32)
            stacked = with_labels(stacked, self._corpus.labels)
            yield put_batch(stacked, self._mesh, self._cfg, by_domain=by_domain)

    def make_alignment(self, by_second_moment: bool = False) -> Callable[[int, TrainState], dict[str, float]]:
        """Makes the function (steps so far, state) → ⟨∇L_i, ∇L_target⟩ of each source i that is trained on.

        L is the mean cross-entropy of a batch in nats a token, a mean over the batches drawn, or over those of all
        targets alike. Two gradients are in memory beside the state, in float32; those of bfloat16 parameters were
        rounded to bfloat16.
        by_second_moment: divides each product of two entries by √v + ε, the divisor of AdamW's update, so that a sum is
            by how much the loss of the targets falls with one AdamW step on source i, to first order and up to the
            learning rate. Parameters without a second moment do not count.
        """
        gradients, optim = make_gradients(self._cfg, self._mesh), self._cfg.optim
        jit = lambda f, **how: under_mesh(self._mesh, jax.jit(f, **how))

        @jit
        def gradient(params: dict, bias: dict, batch: Batch) -> dict:
            return optax.tree.cast(gradients(params, bias, batch, jnp.zeros((), jnp.int32)).grads, jnp.float32)

        @functools.partial(jit, donate_argnums=0)
        def divided(total: dict, count: int, opt_state: optax.OptState) -> dict:
            mean = optax.tree.scale(1 / count, total)
            if not by_second_moment:
                return mean
            moments = second_moments(parts_of(opt_state).optimizer, optim.beta2)
            by = lambda g, v: jnp.where(v > 0, g / (jnp.sqrt(v) + optim.eps), 0.0)
            return nest({path: by(g, moments[path]) for path, g in flatten(mean).items()})

        @jit
        def product(one: dict, other: dict) -> Float[Array, ""]:
            return sum(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.sum(a * b), one, other)))

        add = jit(optax.tree.add, donate_argnums=0)

        def observe(step: int, state: TrainState) -> dict[str, float]:
            of = lambda batch: gradient(state.params, state.router_bias, batch)
            target, count, found = None, 0, {}
            for name in self.targets:
                for batch in self._batches(step, name, "validation"):
                    target, count = of(batch) if target is None else add(target, of(batch)), count + 1
            target = divided(target, count, state.opt_state)
            for name in self._corpus.trained:
                products = [product(of(batch), target) for batch in self._batches(step, name, "train")]
                found[name] = float(np.mean(jax.device_get(products)))
            return found

        return observe

    def make_losses(self) -> Callable[[int, TrainState], dict[str, float]]:
        """Makes the function (steps so far, state) → the cross-entropy of each target's held-out text, in nats a token.

        The rows are the same at all steps, so that differences of two steps are those of the model.
        """
        run = make_eval_step(self._cfg, self._mesh, len(self._corpus.domains), program=self._program)

        def observe(step: int, state: TrainState) -> dict[str, float]:
            found = {}
            for name in self.targets:
                total = np.zeros(2)  # nats, and tokens
                for batch in self._batches(0, name, "validation", by_domain=True):
                    sums = run(state.params, state.router_bias, batch)
                    total += [np.sum(x, dtype=np.float64) for x in jax.device_get((sums.nll, sums.tokens))]
                prefix, rule = (
                    self._cfg.model.moe.pool_prefix,
                    f"leaves nothing to score of {name}'s held-out rows here",
                )
                require(total[1] > 0, "model.moe.pool_prefix", prefix, rule, "a smaller one, or more probe_batches")
                found[name] = float(total[0] / total[1])
            return found

        return observe


def second_moments(state: optax.OptState, beta2: float) -> dict[str, jax.Array]:
    """AdamW's second moment of each parameter by path, without its bias towards 0; 1 before the first update."""
    found, count = {}, optax.tree_utils.tree_get_all_with_path(state, "count")[0][1]
    for _, nu in optax.tree_utils.tree_get_all_with_path(state, "nu"):
        for path, v in jax.tree_util.tree_leaves_with_path(nu):
            found[path_of(path)] = jnp.where(count > 0, v / (1 - beta2 ** jnp.maximum(count, 1)), 1.0)
    return found
