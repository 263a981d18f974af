"""The MoE layer: router, routed experts, shared experts. Only `_region` is manual code (`shard_map`).

With `moe.latent` routed experts read and write rows of a smaller width, and only these are sent between devices. The
two matrices that make them, and a token's whole row again, are outside the region, like shared experts.

Without a mesh the same code runs as it is, on one device. alone.py has the layer for a model of one's own.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from moe_jax.config import ModelConfig, MoEConfig
from moe_jax.config.layers import Kind
from moe_jax.moe import pools, quantile
from moe_jax.moe.exchange import run_experts
from moe_jax.moe.experts import ExpertCompute, ExpertWeights
from moe_jax.moe.program import Program
from moe_jax.moe.routers import ROUTERS, RouterWeights, draw_table, linear_by_label
from moe_jax.moe.routing import Facts, Knobs, Routing, allowed_by_label, route
from moe_jax.moe.stats import Choices, RouterStats, choices_of, router_stats
from moe_jax.nn.fake_quant import int8, ternary
from moe_jax.nn.layers import ACTIVATIONS, GLU, Init, linear, rms_norm
from moe_jax.nn.lora import adapter_of
from moe_jax.nn.remat import keep
from moe_jax.parallel import sharding
from moe_jax.parallel.axes import as_tuple, varying_like

AXES = "router_embed router_experts"  # of w_router
TOKENS = P(sharding.AXES, None, None)


class RouterBias(nnx.Variable):
    """A part of the train state that no optimizer updates: a selection bias, which counts update, or a fixed table."""


class TokenInfo(NamedTuple):
    """Facts about the tokens of an MoE layer, besides their activations."""

    counted: Bool[Array, "B S"]  # False: padding, which uses no expert and enters no statistic
    group: Int[Array, "B S"]  # balance group of each token
    index: Int[Array, "B S"] | None = None  # number of each token in the optimizer batch, for noise
    documents: pools.Documents | None = None  # of which routers take pools
    label: Int[Array, "B S"] | None = None  # of each token, for a model that needs it (config/labels.py)


class MoEOutput(NamedTuple):
    """The result of an MoE layer."""

    y: Float[Array, "B S D"]  # routed plus shared experts
    stats: RouterStats  # of the router, summed over the whole mesh
    choices: Choices | None  # None unless recorded
    state: Float[Array, "B S R"] | None  # for the router of the next layer; None if no router has one
    pool: Bool[Array, "B C"] | None = None  # of each sequence's last document; None unless a pool was given


class MoE(nnx.Module):
    """Routed experts plus shared experts, and the statistics of the router."""

    def __init__(self, model: ModelConfig, kind: Kind, init: Init, out_std: float, program: Program):
        """out_std: standard deviation of the initial weights that write to the residual stream."""
        cfg = self.cfg = dataclasses.replace(model.moe, num_experts=kind.experts)
        by_table = kind.name == "table"
        if by_table:
            free = {"num_groups": 1, "top_groups": 1, "shard_groups": 1, "label_groups": 1, "routers": 1}
            cfg = self.cfg = dataclasses.replace(cfg, choice="token", selection_bias=False, **free)
        self.program, activation = program, model.activation
        self.compute = ExpertCompute(cfg, program.grouped_matmul, activation, cfg.mean_slots / cfg.slots)
        e, c, d, f, width = cfg.num_experts, cfg.router_columns, model.d_model, cfg.d_expert, model.expert_dim
        router, exact = ROUTERS[cfg.router], init.as_float32()
        # A table with weights of one leaves nothing for logits to decide.
        shape, axes = _router_shape(cfg, router.width(cfg, d))
        self.w_router = None if by_table and cfg.combine == "one" else exact.normal(shape, axes)
        weights = router.weights(cfg, d, exact) if self.w_router is not None else {}
        self.router = RouterWeights(weights) if weights else None
        self.w_gate = init.normal((e, width, f), "experts embed mlp") if ACTIVATIONS[activation].gated else None
        self.w_up = init.normal((e, width, f), "experts embed mlp")
        self.w_down = init.normal((e, f, width), "experts mlp embed", None if cfg.latent else out_std)
        self.w_in = init.normal((d, width), "embed latent") if cfg.latent else None
        self.w_out = init.normal((width, d), "latent embed", out_std) if cfg.latent else None
        self.latent_norm, self.eps = init.ones((width,), "norm") if cfg.latent_norm else None, model.norm_eps
        shared = cfg.num_shared_experts * f
        self.shared = GLU(d, shared, init, out_std, activation) if shared else None
        logits = {"none": 0, "sigmoid": 1, "softmax": 2}[cfg.shared_gate]
        self.w_shared_gate = init.filled((d, logits), "router_embed router_experts", 0.0) if logits else None
        self.b_shared_gate = init.filled((2,), "norm", 0.0) if logits == 2 else None
        self.router_bias = RouterBias(init.zeros((c,))) if cfg.selection_bias else None
        draw = functools.partial(draw_table, vocab=model.vocab_size, experts=e, top_k=cfg.top_k)
        self.by_label = by_table and cfg.table == "label"
        self.table = RouterBias(init.drawn(draw)) if by_table and not self.by_label else None

    def __call__(
        self,
        x: Float[Array, "B S D"],
        info: TokenInfo,
        tokens: Int[Array, "B S"] | None = None,
        state: Float[Array, "B S R"] | None = None,
        knobs: Knobs | None = None,
        switches: Int[Array, " C"] | None = None,
        pool: Bool[Array, "B C"] | None = None,
    ) -> MoEOutput:
        """Applies the layer. tokens: ids, for a table. state: of the layer before. knobs: of this layer.

        switches: −1 for an expert that is off, 1 for one that every token uses, 0 for one that the router decides on.
        pool: that of each sequence, for tokens without `info.documents`.
        """
        # On each device's part of the float32 matrices, before they are cast and gathered.
        rounded = ternary if self.cfg.expert_weights == "ternary" else lambda w: w
        gate = rounded(self.w_gate[...]) if self.w_gate is not None else None
        w = ExpertWeights(gate, rounded(self.w_up[...]), rounded(self.w_down[...]), self._adapters())
        router = {"w_router": self.w_router[...]} if self.w_router is not None else {}
        router |= nnx.to_pure_dict(nnx.state(self.router)) if self.router is not None else {}
        bias = self.router_bias[...] if self.router_bias is not None else None
        meshed = bool(sharding.current_sizes())
        by_token = TOKENS if meshed else None
        named = self.table[...].at[tokens].get(out_sharding=by_token) if self.table is not None else None
        named = info.label[:, :, None] if self.by_label else named
        z = keep(linear(x, self, "w_in"), "latent") if self.w_in is not None else None
        region = functools.partial(self._region, None)
        if meshed:
            specs = jax.tree.map(lambda a: jax.typeof(a).sharding.spec, w)
            region = jax.shard_map(
                functools.partial(self._region, specs),
                in_specs=(sharding.BATCH,) * 6 + (P(), P(), P(), P(), specs),
                out_specs=(MoEOutput(sharding.BATCH, P(), *(sharding.BATCH,) * 3), sharding.BATCH),
                check_vma=True,
            )
        out, kept = region(x, z, info, named, state, pool, router, bias, knobs, switches, w)
        return out._replace(y=self._joined(x, out.y, kept))

    def _joined(
        self, x: Float[Array, "B S D"], y: Float[Array, "B S width"], kept: Float[Array, "B S"] | None
    ) -> Float[Array, "B S D"]:
        """The sum over routed experts y, brought to the width of x, plus identity experts and shared experts.

        kept: the combine weights of a token's identity experts; None without any.
        """
        if self.w_out is not None:
            y = keep(y, "latent")
            y = rms_norm(y, self.latent_norm[...], self.eps) if self.latent_norm is not None else y
            y = linear(y, self, "w_out")
        if kept is not None:
            y = (y.astype(jnp.float32) + kept[:, :, None] * x.astype(jnp.float32)).astype(y.dtype)
        if self.shared is None:
            return y
        shared = self.shared(x)
        if self.w_shared_gate is None:
            return y + shared
        y, shared = keep((y, shared), "branches")
        with jax.named_scope("shared_gate"):
            logits = linear(x, self, "w_shared_gate").astype(jnp.float32)
            if self.cfg.shared_gate == "sigmoid":
                return (y + jax.nn.sigmoid(logits) * shared).astype(x.dtype)
            share = jax.nn.softmax(logits)
            return (share[:, :, :1] * y + share[:, :, 1:] * shared).astype(x.dtype)

    def _adapters(self) -> dict[str, tuple[Array, Array]] | None:
        """The factors of the routed experts' adapters; None without any."""
        found = {name: adapter_of(self, f"w_{name}") for name in ("gate", "up", "down")}
        return {name: adapter.factors for name, adapter in found.items() if adapter is not None} or None

    def _region(self, specs, x_bSD, z, info, named, state, pool, router, bias, knobs, switches, w):
        """Routes and computes the tokens of one device, b = B / devices sequences, and sums statistics over all.

        specs: of the experts' matrices; None without a mesh, where nothing is communicated. z: what routed experts
        read; None: x.
        Also returns the combine weights of identity experts, as `_joined` takes them.
        """
        shape = x_bSD.shape
        flat = lambda a: None if a is None else a.reshape(shape[0] * shape[1], *a.shape[2:])
        x, info = flat(x_bSD), jax.tree.map(flat, info)
        facts = Facts(info.counted, info.index, flat(named), shape[0], switches)
        facts = facts._replace(label=info.label) if self.cfg.label_groups > 1 else facts
        with jax.named_scope("router"):
            if self.cfg.routers > 1:
                logits, state_TR = linear_by_label(router["w_router"], x, info.label), flat(state)
            elif router:
                logits, state_TR = ROUTERS[self.cfg.router].logits(router, x, flat(state))
            else:
                logits, state_TR = varying_like(jnp.zeros((x.shape[0], self.cfg.router_columns)), x), flat(state)
            logits = keep(logits, "router")
            if (pool_TC := self._pools(logits, info, facts, pool, knobs)) is not None:
                logits, facts = pools.confine(logits, pool_TC), facts._replace(pool=pool_TC)
            routing, probs = route(logits, bias, facts, self.cfg, knobs)
        if specs is None:
            w = jax.tree.map(lambda a: a.astype(x.dtype), w)
        else:
            w = jax.tree.map(functools.partial(_own_experts, x.dtype), w, specs)
        y, computed, kept = self._experts(x if z is None else flat(z), routing, w)
        choices = choices_of(routing, probs, shape[:2]) if self.program.record else None
        state = None if state is None else state_TR.reshape(state.shape)
        with jax.named_scope("statistics"):
            groups = self.program.balance_groups
            in_order = self.cfg.choice == "expert"
            of_label = info.label, self.program.labels
            stats = router_stats(
                logits, probs, routing, computed, info.counted, info.group, groups, in_order, *of_label
            )
            if (bins := self.program.histogram_bins) and bias is not None:
                asked = quantile.histogram(logits, bias, routing.experts, info.counted, bins)
                stats = stats._replace(histogram=asked)
            # Sums over all devices: G·(2C+3) numbers a layer. This psum makes the balance global.
            stats = stats if specs is None else jax.lax.psum(stats, sharding.AXES)
            kept = None if kept is None else kept.reshape(shape[:2])
            last = None if pool is None else pool_TC.reshape(*shape[:2], -1)[:, -1]
            return MoEOutput(y.reshape(*shape[:2], y.shape[1]), stats, choices, state, last), kept

    def _pools(
        self, logits: Float[Array, "T C"], info: TokenInfo, facts: Facts, pool: Bool[Array, "b C"] | None,
        knobs: Knobs | None,
    ) -> Bool[Array, "T C"] | None:  # fmt: skip
        """The experts that each token may choose: those of its label's group, of its document's pool, or of the pool
        that its sequence was given; None without any."""
        if self.cfg.label_groups > 1:
            return allowed_by_label(info.label, logits.shape[1], self.cfg)
        if knobs is not None and self.cfg.pool_min == self.cfg.num_experts:
            return None  # every pool has all experts: the program of a model without pools
        if info.documents is not None:
            return pools.document_pools(logits, info.documents, facts, self.cfg, knobs)
        return None if pool is None else jnp.repeat(pool, logits.shape[0] // facts.sequences, axis=0)

    def _experts(
        self, x: Float[Array, "T width"], routing: Routing, w: ExpertWeights
    ) -> tuple[Float[Array, "T width"], Bool[Array, "T K"], Float[Array, " T"] | None]:
        """The sum over routed experts, which slots were not dropped, and the weight of the token itself in the sum.

        Slots of identity experts are not sent anywhere and are never dropped.
        """
        x = int8(x) if self.cfg.expert_inputs == "int8" else x
        run = functools.partial(run_experts, w=w, exchange=self.program.exchange, compute=self.compute)
        if not self.cfg.identity_experts:
            return *run(x, routing), None
        free = routing.experts >= self.cfg.num_experts
        sent = routing._replace(experts=jnp.where(free, 0, routing.experts), valid=routing.valid & ~free)
        y, computed = run(x, sent)
        if self.cfg.identity_output == "nothing":
            return y, computed | free, None
        return y, computed | free, jnp.sum(jnp.where(free & routing.valid, routing.weights, 0.0), axis=-1)


def _router_shape(cfg: MoEConfig, width: int) -> tuple[tuple[int, ...], str]:
    """The shape and the logical axes of `w_router`."""
    if cfg.routers == 1:
        return (width, cfg.router_columns), AXES
    return (cfg.routers, width, cfg.router_columns), f"labels {AXES}"


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
