"""The MoE layer: router, routed experts, shared experts. Only `_region` is manual code (`shard_map`)."""

import dataclasses
import functools
from typing import NamedTuple

import jax
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from moe_jax.config import ModelConfig
from moe_jax.moe.exchange import run_experts
from moe_jax.moe.experts import ExpertCompute, ExpertWeights
from moe_jax.moe.program import Program
from moe_jax.moe.routing import route, router_logits
from moe_jax.moe.stats import Choices, RouterStats, choices_of, router_stats
from moe_jax.nn.layers import ACTIVATIONS, GLU, Init
from moe_jax.nn.remat import keep
from moe_jax.parallel import sharding
from moe_jax.parallel.axes import as_tuple


class RouterBias(nnx.Variable):
    """Selection bias of each expert: a part of the train state that is updated from counts, not by an optimizer."""


class TokenInfo(NamedTuple):
    """Facts about the tokens of an MoE layer, besides their activations."""

    counted: Bool[Array, "B S"]  # False: padding, which uses no expert and enters no statistic
    group: Int[Array, "B S"]  # balance group of each token


class MoE(nnx.Module):
    """Routed experts plus shared experts, and the statistics of the router."""

    def __init__(self, model: ModelConfig, num_experts: int, init: Init, out_std: float, program: Program):
        """out_std: standard deviation of the initial weights that write to the residual stream."""
        cfg = self.cfg = dataclasses.replace(model.moe, num_experts=num_experts)
        self.program, activation = program, model.activation
        self.compute = ExpertCompute(cfg, program.grouped_matmul, activation, cfg.mean_slots / cfg.top_k)
        e, c, d, f = cfg.num_experts, cfg.router_columns, model.d_model, cfg.d_expert
        self.w_router = init.as_float32().normal((d, c), "router_embed router_experts")
        self.w_gate = init.normal((e, d, f), "experts embed mlp") if ACTIVATIONS[activation].gated else None
        self.w_up = init.normal((e, d, f), "experts embed mlp")
        self.w_down = init.normal((e, f, d), "experts mlp embed", out_std)
        shared = cfg.num_shared_experts * f
        self.shared = GLU(d, shared, init, out_std, activation) if shared else None
        self.router_bias = RouterBias(init.zeros((c,))) if cfg.selection_bias else None

    def __call__(
        self, x: Float[Array, "B S D"], info: TokenInfo
    ) -> tuple[Float[Array, "B S D"], RouterStats, Choices | None]:
        """Returns routed plus shared experts, router statistics summed over the whole mesh, and choices if recorded."""
        if not sharding.current_sizes():
            raise ValueError("MoE needs a mesh: call it under jax.set_mesh(sharding.make_mesh((1, 1, 1)))")
        gate = self.w_gate[...] if self.w_gate is not None else None
        w = ExpertWeights(gate, self.w_up[...], self.w_down[...])
        bias = self.router_bias[...] if self.router_bias is not None else None
        specs = jax.tree.map(lambda a: jax.typeof(a).sharding.spec, w)
        region = jax.shard_map(
            functools.partial(self._region, specs),
            in_specs=(sharding.BATCH, sharding.BATCH, P(), P(), specs),
            out_specs=(sharding.BATCH, P(), sharding.BATCH),
            check_vma=True,
        )
        y, stats, choices = region(x, info, self.w_router[...], bias, w)
        if self.shared is not None:
            y = y + self.shared(x)
        return y, stats, choices

    def _region(self, specs, x_bSD, info, w_router, bias, w):
        """Routes and computes the tokens of one device, b = B / devices sequences, and sums statistics over all."""
        shape = x_bSD.shape
        x = x_bSD.reshape(-1, shape[-1])
        counted, group = info.counted.reshape(-1), info.group.reshape(-1)
        with jax.named_scope("router"):
            logits = keep(router_logits(x, w_router), "router")
            routing, probs = route(logits, bias, counted, self.cfg)
        w = jax.tree.map(functools.partial(_own_experts, x.dtype), w, specs)
        y, computed = run_experts(x, routing, w, self.program.exchange, self.compute)
        choices = choices_of(routing, probs, shape[:2]) if self.program.record else None
        with jax.named_scope("statistics"):
            stats = router_stats(logits, probs, routing, computed, counted, group, self.program.balance_groups)
            # Sums over all devices: G·(2C+3) numbers a layer. This psum makes the balance global.
            return y.reshape(shape), jax.lax.psum(stats, sharding.AXES), choices


def _own_experts(dtype, w: Array, spec: P) -> Array:
    """Gathers this device's experts as whole matrices, in the compute dtype. The backward pass sums gradients over
    replicas in float32 and reduce-scatters them over `fsdp`."""
    used = [as_tuple(entry) for entry in spec]
    missing = tuple(a for a in sharding.AXES if not any(a in names for names in used))
    w = jax.lax.pcast(w, missing, to="varying").astype(dtype)
    for axis, names in enumerate(used):
        if "fsdp" in names:
            w = jax.lax.all_gather(w, "fsdp", axis=axis, tiled=True)
    return w
