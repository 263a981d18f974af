"""The state of a training run, and its batches, as global arrays."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from moe_jax import model, optim
from moe_jax.config import ModelConfig, RunConfig
from moe_jax.moe import balance, router_losses
from moe_jax.moe.program import Program
from moe_jax.moe.stats import ChoiceSums, RouterStats
from moe_jax.nn.lora import is_adapter
from moe_jax.optim import groups
from moe_jax.parallel import sharding
from moe_jax.train import average
from moe_jax.tree import flatten, join, nest


class TrainState(NamedTuple):
    """Everything that a step changes, and that a checkpoint keeps."""

    step: Int[Array, ""]
    params: dict
    router_bias: dict  # selection biases and the tables of table blocks; {} without any
    opt_state: Any  # see `parts_of`


class Parts(NamedTuple):
    """The parts of `TrainState.opt_state`. All but the first are {} unless something that is on needs them."""

    optimizer: Any  # of the parameters that are trained (`groups.split`)
    controllers: dict  # the states of the controllers of selection biases, in the tree of `router_bias`
    ema: dict  # the average of the weights, in the tree of the parameters that are trained


def parts_of(opt_state: Any) -> Parts:
    """The parts of `TrainState.opt_state`."""
    if not isinstance(opt_state, dict):
        return Parts(opt_state, {}, {})
    return Parts(opt_state["optimizer"], opt_state.get("controllers", {}), opt_state.get("ema", {}))


def join_parts(optimizer: Any, controllers: dict | None = None, ema: dict | None = None) -> Any:
    """Makes `TrainState.opt_state` of its parts, the inverse of `parts_of`.

    A part that is empty is not there. Without any it is the optimizer's state alone, as in checkpoints of versions that
    had none: Orbax refuses a checkpoint that lacks a field, even an empty one.
    """
    more = {name: part for name, part in (("controllers", controllers), ("ema", ema)) if part}
    return {"optimizer": optimizer, **more} if more else optimizer


class Batch(NamedTuple):
    """One optimizer batch. Padding has segment 0 and weight 0."""

    tokens: Int[Array, "B S"]
    targets: Int[Array, "B S"]
    weights: Float[Array, "B S"]
    segment_ids: Int[Array, "B S"]
    positions: Int[Array, "B S"]
    group: Int[Array, "B S"]  # balance group; in evaluation the domain
    index: Int[Array, "B S"] | None = None  # number of each token in the batch, where the step draws noise
    label: Int[Array, "B S"] | None = None  # with data.labels


def _from_data(cfg: RunConfig) -> tuple[str, ...]:
    """The fields of a batch that the data pipeline fills."""
    always = ("tokens", "targets", "weights", "segment_ids", "positions", "group")
    return (*always, *(("label",) if cfg.data.labels else ()))


class EvalSums(NamedTuple):
    """Sums over an evaluation batch by domain: its balance groups G are the domains."""

    nll: Float[Array, " G"]
    tokens: Float[Array, " G"]  # Σ weight
    router: dict[str, RouterStats]  # by block
    choices: dict[str, ChoiceSums] | None  # None unless recorded
    left_out: Float[Array, " G"] | None = None  # Σ weight of prefixes, which are not scored; None without pool_prefix


def choose_program(cfg: RunConfig, mesh: Mesh) -> Program:
    """Chooses how the model of a run is computed on a mesh, in training."""
    tokens = cfg.data.batch_size * cfg.data.seq_len // (mesh.size * cfg.train.micro_batches)
    chosen = Program.choose(cfg.trained, mesh, tokens, cfg.data.seq_len)
    labels = router_losses.counted_labels(cfg)
    return dataclasses.replace(chosen, balance_groups=cfg.balance_groups, labels=labels)


def under_mesh(mesh: Mesh, fn: Callable) -> Callable:
    """Wraps fn so that it runs with this mesh set."""

    @functools.wraps(fn)
    def run(*args):
        with jax.set_mesh(mesh):
            return fn(*args)

    return run


def init_state(cfg: RunConfig, mesh: Mesh, weights: tuple[dict, dict] | None = None) -> TrainState:
    """A fresh state, created sharded: no device ever holds all of it.

    weights: (params, router_bias) to start from. Adapters and layers of multi-token prediction that are not among
        them are fresh.
    """
    with jax.set_mesh(mesh):
        return _init(cfg, jax.jit, weights)


def _init(cfg: RunConfig, jit: Callable, weights: tuple[dict, dict] | None = None) -> TrainState:
    params, bias = weights or model.init(cfg.model, jax.random.key(cfg.seed))
    if weights and cfg.model.lora.rank and not any(map(is_adapter, flatten(params))):
        params = join(params, model.init_adapters(cfg.model, jax.random.key(cfg.seed)))
    if weights and cfg.model.mtp_layers and not any(map(model.is_prediction, flatten(params))):
        params, bias = map(join, (params, bias), model.init_prediction(cfg.model, jax.random.key(cfg.seed)))
    frozen = optim.frozen_paths(cfg.optim, flatten(params))
    trained, _ = groups.split(params, frozen)
    opt_state = jit(optim.make_optimizer(cfg.optim, cfg.train.steps, cfg.model.head_dim).init)(trained)
    controllers = {}
    if cfg.loss.bias_update in balance.WITH_STATE:
        start, fixed = jit(balance.CONTROLLERS[cfg.loss.bias_update].init), groups.fixed_biases(frozen, params, bias)
        moves = lambda path: path.endswith("/router_bias") and path not in fixed
        controllers = nest({path: start(b) for path, b in flatten(bias).items() if moves(path)})
    ema = jit(average.start)(trained) if cfg.optim.ema else {}
    return TrainState(jnp.zeros((), jnp.int32), params, bias, join_parts(opt_state, controllers, ema))


def abstract_state(cfg: RunConfig, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, into which a checkpoint is restored."""
    return _abstract(mesh, functools.partial(_init, cfg, lambda f: f))


def abstract_weights(cfg: ModelConfig, mesh: Mesh) -> tuple[dict, dict]:
    """Shapes, dtypes and shardings of parameters and router biases, as `weights.load_weights` takes them."""
    return _abstract(mesh, functools.partial(model.init, cfg, jax.random.key(0)))


def _abstract(mesh: Mesh, fn: Callable) -> Any:
    abstract = under_mesh(mesh, functools.partial(jax.eval_shape, fn))()
    concrete = lambda x: jax.sharding.NamedSharding(mesh, x.sharding.spec if x.sharding is not None else P())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=concrete(x)), abstract)


def put_batch(rows: dict, mesh: Mesh, cfg: RunConfig, *, by_domain: bool = False) -> Batch:
    """Makes global arrays of this process's rows of a batch (numpy, from the data pipeline).

    `by_domain` groups statistics by the domain of each token instead of by balance group.
    """
    group = rows["domain_ids"] if by_domain else rows["sequence_ids"] // cfg.balance_unit
    # Only numpy here: an operation on the device would wait for the step that is running there.
    rows = {**rows, "group": group if by_domain else np.broadcast_to(group[:, None], rows["tokens"].shape)}
    to_global = functools.partial(jax.make_array_from_process_local_data, sharding.batch_sharding(mesh))
    return Batch(**{name: to_global(np.ascontiguousarray(rows[name])) for name in _from_data(cfg)})


def abstract_batch(cfg: RunConfig, mesh: Mesh) -> Batch:
    """Shapes, dtypes and shardings of a batch."""
    shape, by_row = (cfg.data.batch_size, cfg.data.seq_len), sharding.batch_sharding(mesh)
    dtype = lambda name: jnp.float32 if name == "weights" else jnp.int32
    return Batch(**{name: jax.ShapeDtypeStruct(shape, dtype(name), sharding=by_row) for name in _from_data(cfg)})


def process_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """The rows of a global batch that this process supplies."""
    indices = sharding.batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for (rows,) in indices for row in range(*rows.indices(batch_size))})


def split_micro_batches(batch: Batch, count: int) -> Batch:
    """Splits `[B, S]` into `[count, B/count, S]`. Sequence i goes to micro-batch i mod count: none changes device."""
    out = P(sharding.AXES, None, None)

    def split(x):
        x = x.reshape(x.shape[0] // count, count, *x.shape[1:], out_sharding=out)
        return jnp.swapaxes(x, 0, 1)

    return jax.tree.map(split, batch)
