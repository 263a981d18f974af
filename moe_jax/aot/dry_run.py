"""Says what a run will take before it begins: parameters, memory, schedule, epochs. Nothing is compiled or trained.

`train.py --config=… --dry_run` needs no --workdir and none of the devices that the config's mesh names. Memory is what
formulas and shapes tell: the state, and what automatic differentiation keeps of a micro-batch until the backward pass.
A compiler needs work space beside that and saves some of it; `--compile_only` tells the sum, for a chip that it names.
The data is prepared last, as train.py does it, for the size of an epoch.
"""

import dataclasses
import math
import sys
from collections.abc import Iterator
from typing import NamedTuple

import jax

from moe_jax import config, data, model, optim
from moe_jax.nn import packed
from moe_jax.nn.attend import choose_attention
from moe_jax.nn.layers import weight
from moe_jax.optim import groups
from moe_jax.parallel import sharding
from moe_jax.run import teacher
from moe_jax.train import cross_entropy, gradients, prediction
from moe_jax.train.state import abstract_batch, abstract_state, choose_program, parts_of
from moe_jax.tree import flatten

TRACED = (2, 4)  # sequences of the two traces whose difference is the memory of further sequences


class Memory(NamedTuple):
    """Bytes on one device."""

    parameters: int
    moments: int
    average: int
    gradients: int
    activations: int
    teacher: int


def mesh_shape(cfg: config.RunConfig) -> tuple[int, int, int]:
    """The mesh of a run: the sizes in the config, and for an axis of −1 the devices present. Raises ConfigError."""
    sizes = [cfg.mesh.data, cfg.mesh.fsdp, cfg.mesh.expert]
    known = math.prod(size for size in sizes if size != -1)
    devices = known * max(1, jax.device_count() // known) if -1 in sizes else known
    return config.check_devices(_anywhere(cfg), devices, jax.devices()[0].platform)


def _anywhere(cfg: config.RunConfig) -> config.RunConfig:
    """The config with the back ends of the devices that are here. What attention's kernels keep, "chunked" does too.

    Only cuDNN keeps more of packed rows (`_more_logsumexps`).
    """
    moe = dataclasses.replace(cfg.model.moe, grouped_matmul="auto", exchange="auto")
    attention = "xla" if cfg.model.attention == "xla" else "chunked"
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, attention=attention, moe=moe))


# --- memory ----------------------------------------------------------------------------------------------------------


def _bytes(shape: tuple[int, ...], dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _shares(cfg: config.ModelConfig, sizes: dict[str, int]) -> dict[str, int]:
    """The number of parts that each parameter, by path, is cut into on a mesh with these axis sizes."""
    graph = model.abstract(cfg)
    axes = flatten(jax.tree.map(" ".join, graph.axes, is_leaf=lambda x: isinstance(x, tuple)))
    parts = {}
    for path, x in flatten(graph.shapes).items():
        spec = sharding.weight_spec(tuple(axes[path].split()), x.shape, sizes)
        names = [name for entry in spec if entry is not None for name in ([entry] if isinstance(entry, str) else entry)]
        parts[path] = math.prod(sizes[name] for name in names)
    return parts


def activations(cfg: config.RunConfig) -> float:
    """Bytes that automatic differentiation keeps for each sequence.

    They are the difference of two traces of the loss, with `TRACED` sequences: what does not grow with the batch, such
    as casts of weights, is not in it. Router losses keep sums only.
    """
    fewer, more = (_residuals(_anywhere(cfg), rows) for rows in TRACED)
    return (more - fewer) / (TRACED[1] - TRACED[0]) + _more_logsumexps(cfg)


def _more_logsumexps(cfg: config.RunConfig) -> int:
    """Bytes of logsumexps that cuDNN's attention keeps of a packed row, beyond the one for each query and head."""
    m, device, length = cfg.model, jax.devices()[0], cfg.data.seq_len
    chosen, _ = choose_attention(m, device.platform, device.device_kind, length)
    if chosen != "cudnn" or not m.segment_mask or m.remat not in ("none", "selective"):
        return 0
    return 4 * m.num_layers * m.num_heads * (packed.logsumexps(length) - length)


def _residuals(cfg: config.RunConfig, rows: int) -> int:
    loss = dataclasses.replace(cfg.loss, balance_batch="global", more={}, shuffle_tokens=False)
    cfg = dataclasses.replace(
        cfg,
        data=dataclasses.replace(cfg.data, batch_size=rows),
        loss=loss,
        train=dataclasses.replace(cfg.train, micro_batches=1),
    )
    mesh = sharding.make_mesh((1, 1, 1))
    state = abstract_state(cfg, mesh)
    frozen = optim.frozen_paths(cfg.optim, flatten(state.params))
    program = dataclasses.replace(choose_program(cfg, mesh), frozen=frozen, mtp=cfg.model.mtp_layers > 0)
    graph = model.abstract(cfg.trained, program)

    def kept(params, bias, batch):
        trained, fixed = groups.split(params, frozen)

        def loss(trained):
            out, matrix = gradients.forward(graph, groups.join(trained, fixed), bias, batch)
            matrix = weight(matrix, out.hidden.dtype)
            nll = cross_entropy.summed_nll(out.hidden, matrix, batch.targets, batch.weights)
            return nll if out.ahead is None else (nll, prediction.sums(out.ahead, matrix, batch).nll)

        return jax.vjp(loss, trained)[1]

    with jax.set_mesh(mesh):
        leaves = jax.tree.leaves(jax.eval_shape(kept, state.params, state.router_bias, abstract_batch(cfg, mesh)))
    return sum(_bytes(x.shape, x.dtype) for x in leaves)


def memory(cfg: config.RunConfig, shape: tuple[int, int, int], taught_by: config.ModelConfig | None = None) -> Memory:
    """The memory of a run on one device of a mesh of this shape, without work space and buffers of exchanges.

    taught_by: the model of its teacher.
    """
    sizes = dict(zip(sharding.AXES, shape, strict=True))
    parts = _shares(cfg.model, sizes)
    state = abstract_state(cfg, sharding.make_mesh((1, 1, 1)))
    frozen = optim.frozen_paths(cfg.optim, flatten(state.params))

    def held(tree) -> int:
        """Bytes of a tree, each leaf cut as the parameter at the end of its path."""
        total = 0
        for path, x in flatten(tree).items():
            ends = [path.split("/", i)[-1] for i in range(path.count("/") + 1)]
            total += _bytes(x.shape, x.dtype) // next((parts[end] for end in ends if end in parts), 1)
        return total

    opt = parts_of(state.opt_state)
    trained = {path: x for path, x in flatten(state.params).items() if path not in frozen}
    width = 4 if cfg.train.micro_batches > 1 else 0  # gradients of micro-batches are summed in float32
    grads = sum(math.prod(x.shape) * (width or x.dtype.itemsize) // parts.get(path, 1) for path, x in trained.items())
    if cfg.mixture.takes_gradients:  # a source's and the targets', in float32, between two steps
        grads = max(grads, 2 * sum(4 * math.prod(x.shape) // parts.get(path, 1) for path, x in trained.items()))
    rows = cfg.data.batch_size // (math.prod(shape) * cfg.train.micro_batches)
    # Each layer of multi-token prediction keeps a gradient of the whole output matrix until the backward pass.
    output = "embed" if cfg.model.tie_embeddings else "head"
    heads = 0 if output in frozen else 4 * cfg.model.mtp_layers * cfg.model.vocab_size * cfg.model.d_model
    return Memory(
        held(state.params) + held(state.router_bias), held(opt.optimizer) + held(opt.controllers), held(opt.ema), grads,
        round(activations(cfg) * rows) + heads, _of_teacher(taught_by, sizes) if taught_by else 0,
    )  # fmt: skip


def _of_teacher(cfg: config.ModelConfig, sizes: dict[str, int]) -> int:
    """Bytes of a teacher's weights on one device."""
    parts = _shares(cfg, sizes)
    return sum(_bytes(x.shape, x.dtype) // parts[path] for path, x in flatten(model.abstract(cfg).shapes).items())


# --- the report ------------------------------------------------------------------------------------------------------


def _size(n: float) -> str:
    return f"{n / 1e9:,.2f} GB" if n >= 1e9 else f"{n / 1e6:,.2f} MB"


def _of_schedule(cfg: config.RunConfig) -> Iterator[str]:
    t, o, tokens = cfg.train, cfg.optim, cfg.data.batch_size * cfg.data.seq_len
    yield f"steps: {t.steps:,} of {tokens:,} tokens, {t.steps * tokens:,} in all"
    rate = optim.schedule(o, t.steps)
    at = [0, max(o.warmup_steps - 1, 0), t.steps // 2, t.steps - 1]
    points = ", ".join(f"{float(rate(n)):.3g} in step {n + 1:,}" for n in dict.fromkeys(at))
    yield f"learning rate ({o.schedule}): {points}"
    checkpoints = -(-t.steps // t.checkpoint_every)
    evaluations = f"every {t.eval_every:,} steps and at the end" if t.eval_every else "at the end"
    limit = f" on {t.eval_batches:,} batches" if t.eval_batches else ""
    yield f"checkpoints: {checkpoints:,}; evaluation {evaluations}{limit}"


def lines(cfg: config.RunConfig) -> Iterator[str]:
    """Yields the lines of the report, the data last. Raises ConfigError."""
    shape = mesh_shape(cfg)
    devices, a = math.prod(shape), cfg.train.micro_batches
    rows = cfg.data.batch_size // (devices * a)
    counts, shapes = model.count_parameters(cfg.model), flatten(model.abstract(cfg.model).shapes)
    flops = model.flops_per_token(cfg.trained, cfg.data.seq_len, optim.frozen_paths(cfg.optim, shapes))
    mesh = dict(zip(sharding.AXES, shape, strict=True))
    yield "dry run: nothing is compiled or trained"
    yield f"devices: {devices}, mesh {mesh}; {rows} sequences of {cfg.data.seq_len} tokens each, {a} micro-batches"
    no_tables = f"{counts.active_no_embedding:,} without embedding and head"
    yield f"parameters: {counts.total:,} total, {counts.active:,} active ({no_tables})"
    if cfg.model.num_moe_layers and cfg.model.moe.expert_weights == "ternary":
        sizes = [_size(model.stored_bytes(cfg.model, packed=packed)) for packed in (True, False)]
        yield (f"weights in {cfg.model.compute_dtype}: {sizes[0]} with ternary experts packed, two bits a number and a "
               f"scale a matrix; {sizes[1]} as they are computed")  # fmt: skip
    total = flops * cfg.train.steps * cfg.data.batch_size * cfg.data.seq_len
    yield f"FLOPs by formula: {flops / 1e6:,.2f} MFLOP a token, {total:.3g} FLOP in the run"
    taught = teacher.find(cfg, experts=shape[2])
    if taught:
        yield teacher.describe(cfg, taught)
    found = memory(cfg, shape, taught.model if taught else None)
    average = f"average of the weights {_size(found.average)}, " if found.average else ""
    average += f"teacher {_size(found.teacher)}, " if taught else ""
    state = f"parameters {_size(found.parameters)}, moments {_size(found.moments)}, {average}"
    kept = f"gradients {_size(found.gradients)}, activations {_size(found.activations)} (remat {cfg.model.remat})"
    yield f"memory of a device: {state}{kept}"
    yield f"together {_size(sum(found))}, without the compiler's work space; --compile_only tells that, for a chip"
    yield from _of_schedule(cfg)
    corpus = data.prepare(cfg.data, workdir=None, seed=cfg.seed, progress=sys.stderr.isatty(), init_from=cfg.init_from)
    config.check_vocabulary(cfg, corpus.vocab_size)
    if not cfg.init_from:
        corpus.check_labels()
    if cfg.mixture.observes:
        corpus.targets(cfg.mixture)
    yield from teacher.check_tokenizer(taught, corpus.tokenizer) if taught else []
    yield corpus.table(cfg.train.steps, cfg.mixture.stages)
    yield from [*corpus.notes(), *cfg.mixture.notes(cfg.train.steps)]
    epochs = corpus.epochs(cfg.train.steps, cfg.mixture.stages)
    rows = {
        name: round(share * cfg.train.steps * cfg.data.batch_size / times) for name, (share, times) in epochs.items()
    }
    yield "tokens of an epoch: " + ", ".join(f"{name} {n * cfg.data.seq_len:,}" for name, n in rows.items())


def main(cfg: config.RunConfig) -> None:
    """Prints the report. Raises ConfigError."""
    for line in lines(cfg):
        print(line, flush=True)
