"""Shared parts of the benchmarks: batches, timing, the step and the layer that they time, routers with a given load."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax import config
from moe_jax.config.layers import Kind
from moe_jax.moe import balance
from moe_jax.moe.layer import MoE, TokenInfo
from moe_jax.moe.program import Program
from moe_jax.moe.stats import RouterStats
from moe_jax.nn.layers import Init
from moe_jax.parallel import sharding
from moe_jax.train import step
from moe_jax.train.state import abstract_state, init_state, process_rows, put_batch


def random_rows(cfg: config.RunConfig, rows: list[int]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shape = (len(rows), cfg.data.seq_len)
    tokens = rng.integers(0, cfg.model.vocab_size, (shape[0], shape[1] + 1), dtype=np.int32)
    labels = {"label": rng.integers(0, cfg.data.num_labels, shape, np.int32)} if cfg.data.labels else {}
    return labels | {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": np.ones(shape, np.float32),
        "segment_ids": np.ones(shape, np.int32),
        "positions": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape).copy(),
        "sequence_ids": np.asarray(rows, np.int32),
        "domain_ids": np.zeros(shape, np.int32),
    }


def seconds(fn: Callable, args: tuple, steps: int, *, carry: bool = True) -> tuple[float, tuple]:
    """Of one call, after one to warm up. carry: what fn returns is what it takes next."""
    out = jax.block_until_ready(fn(*args))
    args = out if carry else args
    began = time.perf_counter()
    for _ in range(steps):
        out = fn(*args)
        args = out if carry else args
    jax.block_until_ready(out)
    return (time.perf_counter() - began) / steps, args


def milliseconds(turns: list[float]) -> str:
    """Median, least and most of turns in seconds."""
    reach = f" ({1e3 * min(turns):.2f} to {1e3 * max(turns):.2f})" if len(turns) > 1 else ""
    return f"{1e3 * statistics.median(turns):9.2f} ms{reach}"


def where(used: int | None = None) -> str:
    """The devices and the version that every row or table names. used: how many of them; None: all."""
    return f"{used or jax.device_count()} × {jax.devices()[0].device_kind}, jax {jax.__version__}"


# --- what is timed ---------------------------------------------------------------------------------------------------


class Timed(NamedTuple):
    start: Callable[[], tuple]  # the arguments of the first call
    call: Callable[..., tuple]  # takes what it returned before, of which the last is {"value", "norm", "router"}
    temporaries: int  # bytes a device


def training_step(cfg: config.RunConfig, mesh: Any) -> Timed:
    """A whole training step on random tokens, compiled."""
    batch = put_batch(random_rows(cfg, process_rows(mesh, cfg.data.batch_size)), mesh, cfg)
    lowered = step.make_train_step(cfg, mesh).__wrapped__.lower(abstract_state(cfg, mesh), batch)
    compiled = lowered.compile()

    def call(state, *_):
        state, aux = compiled(state, batch)
        return state, {"value": aux.loss, "norm": aux.grad_norm, "router": aux.router}

    return Timed(lambda: (init_state(cfg, mesh),), call, compiled.memory_analysis().temp_size_in_bytes)


class Layer(NamedTuple):
    """One MoE layer of a config, under the mesh in use."""

    make: Callable[[], tuple]  # graph, parameters, the rest (router bias)
    apply: Callable[..., tuple[jax.Array, RouterStats]]  # parameters, x [B, S, D], graph, rest → y, [L=1, …]
    draw: Callable[[], jax.Array]  # random activations of one micro-batch


def moe_layer(cfg: config.RunConfig, mesh: Any) -> Layer:
    shape = (cfg.data.batch_size // cfg.train.micro_batches, cfg.data.seq_len, cfg.model.d_model)

    def make():
        init, kind = Init(nnx.Rngs(0), cfg.model.init_std), Kind("moe", cfg.model.moe.num_experts)
        layer = MoE(cfg.model, kind, init, cfg.model.init_std, Program.choose(cfg.model, mesh))
        return nnx.split(layer, nnx.Param, ...)

    def apply(params, x, graph, rest):
        zeros = jnp.zeros_like(x[:, :, 0], jnp.int32)
        label = zeros + jnp.arange(zeros.shape[1]) % cfg.model.labels if cfg.model.labels else None
        info = TokenInfo(jnp.ones_like(zeros, bool), zeros, label=label)
        out = nnx.merge(graph, params, rest)(x, info)
        return out.y, jax.tree.map(lambda a: a[None], out.stats)

    dtype = cfg.model.compute_dtype
    draw = jax.jit(lambda: jax.random.normal(jax.random.key(0), shape, dtype, out_sharding=sharding.BATCH))
    return Layer(make, apply, draw)


# --- routers under a chosen load -------------------------------------------------------------------------------------


def steer(bias: Any, stats: Callable[[Any], RouterStats], cfg: config.MoEConfig, max_load: float) -> Any:
    """Selection biases under which the first expert of each layer has `max_load` times the mean load, the others alike.

    Tokens still choose, by their scores. bias: a pytree of `[…, E]`; stats: what the router does under it, `[L, G, …]`.
    This is loss-free balancing towards a target (`routing.update_bias`), in ever smaller steps.
    """
    rest = (cfg.num_experts - max_load) / max(cfg.num_experts - 1, 1)
    target = (max_load, *(rest,) * (cfg.num_experts - 1))
    rate = 0.3 / cfg.num_experts if cfg.score == "softmax" and cfg.score_order == "score_topk" else 0.1
    for i in range(100):
        counts = jnp.sum(stats(bias).tokens_per_expert, axis=1)
        move = lambda b, c=counts, i=i: balance.update_bias(b, c.reshape(b.shape), rate * 0.94**i, target=target)[0]
        bias = jax.tree.map(move, bias)
    return bias
