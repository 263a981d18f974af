"""The decoder: blocks stacked and scanned, and what it counts: parameters and FLOPs.

`Transformer` is an NNX module; NNX ends at the `jit` border. `abstract(cfg)` gives the graph and the shapes once,
`init(cfg, seed)` the parameters as plain nested dicts, `bind(...)` puts them together inside a jitted function.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from moe_jax import sharding
from moe_jax.attention import Attention, KVCache
from moe_jax.config import ModelConfig
from moe_jax.layers import ACTIVATIONS, GLU, Init, rms_norm, weight
from moe_jax.mla import MLA
from moe_jax.moe import MoE, RouterBias, TokenInfo
from moe_jax.program import Program
from moe_jax.remat import POLICIES, keep
from moe_jax.routing import Choices, RouterStats
from moe_jax.tree import nest


class Inputs(NamedTuple):
    """One (micro-)batch as the model sees it."""

    tokens: Int[Array, "B S"]
    positions: Int[Array, "B S"]
    segments: Int[Array, "B S"] | None
    info: TokenInfo


class Output(NamedTuple):
    """L: MoE layers."""

    hidden: Float[Array, "B S D"]  # after the last norm
    stats: RouterStats  # [L, G, …]
    cache: list[KVCache | None]  # the new one: of the dense layers, of the MoE layers
    choices: Choices | None  # [L, B, S, …] if the graph records them
    max_logit: dict[str, Float[Array, "L N"]] | None  # by stack of layers as in the parameters, if the graph asks


class BlockOutput(NamedTuple):
    """What one block gives; of a scan over blocks all but `x` have a leading axis of layers."""

    x: Float[Array, "B S D"]
    stats: RouterStats | None  # None of a block without experts
    cache: KVCache | None
    choices: Choices | None
    max_logit: Float[Array, "B N"] | None


class Block(nnx.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)); the feed-forward is a GLU or an MoE."""

    def __init__(self, cfg: ModelConfig, init: Init, sparse: bool, program: Program):
        out_std = cfg.init_std / (2 * cfg.num_layers) ** 0.5  # residual branches add up over 2·L writes
        self.eps, self.max_logit = cfg.norm_eps, program.max_logit
        self.attention_norm = init.ones((cfg.d_model,), "norm")
        self.attention = (MLA if cfg.mla.kv_rank else Attention)(cfg, init, out_std, program.attention)
        self.mlp_norm = init.ones((cfg.d_model,), "norm")
        self.moe = MoE(cfg, init, out_std, program) if sparse else None
        self.mlp = None if sparse else GLU(cfg.d_model, cfg.d_ff, init, out_std, cfg.activation)

    def __call__(
        self, x: Float[Array, "B S D"], inputs: Inputs, cache: KVCache | None, start: Int[Array, ""] | None
    ) -> "BlockOutput":
        h = rms_norm(x, self.attention_norm[...], self.eps)
        counted = inputs.info.counted if self.max_logit else None
        with jax.named_scope("attention"):
            y, cache, top = self.attention(h, inputs.positions, inputs.segments, cache, start, counted)
        x = keep(x + y, "residual")
        h = rms_norm(x, self.mlp_norm[...], self.eps)
        with jax.named_scope("mlp" if self.moe is None else "moe"):
            y, stats, choices = (self.mlp(h), None, None) if self.moe is None else self.moe(h, inputs.info)
        return BlockOutput(x + y, stats, cache, choices, top)


class Transformer(nnx.Module):
    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs, program: Program):
        self.cfg, self.program = cfg, program
        init = Init(rngs, cfg.init_std, dtype=cfg.param_dtype)
        self.embed = init.normal((cfg.vocab_size, cfg.d_model), "vocab embed")
        if cfg.num_dense_layers:
            self.dense_layers = Block(cfg, init.stack(cfg.num_dense_layers), sparse=False, program=program)
        if cfg.num_moe_layers:
            self.layers = Block(cfg, init.stack(cfg.num_moe_layers), sparse=True, program=program)
        self.final_norm = init.ones((cfg.d_model,), "norm")
        if not cfg.tie_embeddings:
            self.head = init.normal((cfg.vocab_size, cfg.d_model), "vocab embed")

    def __call__(
        self, inputs: Inputs, cache: list[KVCache | None] | None = None, start: Int[Array, ""] | None = None
    ) -> Output:
        dtype = jnp.dtype(self.cfg.compute_dtype)
        out = P(sharding.AXES, None, None) if sharding.current_sizes() else None
        with jax.named_scope("embedding"):
            x = weight(self.embed, dtype).at[inputs.tokens].get(out_sharding=out)
        dense_cache, moe_cache = cache or (None, None)
        max_logit, (stats, choices) = {}, self._no_layers(inputs)
        if self.cfg.num_dense_layers:
            x, _, dense_cache, _, max_logit["dense_layers"] = self._scan(
                self.dense_layers, x, inputs, dense_cache, start
            )
        if self.cfg.num_moe_layers:
            x, stats, moe_cache, choices, max_logit["layers"] = self._scan(self.layers, x, inputs, moe_cache, start)
        hidden = rms_norm(x, self.final_norm[...], self.cfg.norm_eps)
        largest = {name: jnp.max(of, axis=1) for name, of in max_logit.items()} if self.program.max_logit else None
        return Output(hidden, stats, [dense_cache, moe_cache], choices, largest)

    def _no_layers(self, inputs: Inputs) -> tuple[RouterStats, Choices | None]:
        """What no MoE layer counts and chooses: L = 0."""
        g, moe = self.program.num_groups, self.cfg.moe
        stats = RouterStats(
            *(jnp.zeros((0, g, *more)) for more in ((), (moe.num_experts,), (moe.num_experts,), (), ()))
        )
        if not self.program.record:
            return stats, None
        shape = (0, *inputs.tokens.shape)
        return stats, Choices(jnp.zeros((*shape, moe.top_k), jnp.int32), jnp.zeros(shape))

    def _scan(self, blocks: Block, x, inputs: Inputs, cache: KVCache | None, start) -> BlockOutput:
        graph, experts, others = nnx.split(blocks, _of_experts, ...)
        scattered = sharding.current_sizes().get("fsdp", 1) > 1  # the experts' gradients

        def body(x, layer):
            experts, others, layer_cache = layer
            if scattered and jax.tree.leaves(experts):
                x, experts = sharding.reduce_first(x, experts)
            out = nnx.merge(graph, experts, others)(x, inputs, layer_cache, start)
            return out.x, out._replace(x=None)

        policy, unroll = POLICIES[self.cfg.remat], min(self.cfg.unroll, len(jax.tree.leaves(others)[0]))
        if policy is not None:
            # In a loop of one layer a turn XLA cannot see that it is computed twice, and a barrier would only cost.
            body = jax.checkpoint(body, policy=policy, prevent_cse=unroll > 1)
        x, out = jax.lax.scan(body, x, (experts, others, cache), unroll=unroll)
        return out._replace(x=x)

    @property
    def output_matrix(self) -> nnx.Param:
        """`[V, D]`: maps hidden states to logits."""
        return self.embed if self.cfg.tie_embeddings else self.head

    def empty_cache(self, batch: int, length: int) -> list[KVCache | None]:
        cfg = self.cfg
        out = P(None, sharding.AXES, None, None, None) if sharding.current_sizes() else None

        def of(layers):
            latent = (1, cfg.mla.kv_rank + cfg.mla.rope_dim)
            shape = (layers, batch, length, *(latent if cfg.mla.kv_rank else (cfg.num_kv_heads, cfg.head_dim)))
            zeros = lambda: jnp.zeros(shape, cfg.compute_dtype, out_sharding=out)
            return KVCache(zeros(), None if cfg.mla.kv_rank else zeros()) if layers else None

        return [of(cfg.num_dense_layers), of(cfg.num_moe_layers)]


class Graph(NamedTuple):
    """A model without its weights."""

    definition: Any
    axes: dict  # logical axes of every parameter, in the tree of `params`
    shapes: dict  # ShapeDtypeStruct of every parameter

    def bind(self, params: dict, router_bias: dict) -> Transformer:
        """The module with these weights, for use inside a traced function."""
        return nnx.merge(self.definition, params, router_bias)


def _of_experts(_, variable: nnx.Variable) -> bool:
    return "experts" in variable.get_metadata().get("axes", ())


def _split(model: Transformer):
    definition, params, bias = nnx.split(model, nnx.Param, RouterBias)
    return definition, params, bias


REFERENCE = Program()  # runs anywhere


def abstract(cfg: ModelConfig, program: Program = REFERENCE) -> Graph:
    """The graph and shapes of a model; nothing is allocated."""
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        model = nnx.eval_shape(lambda: Transformer(cfg, nnx.Rngs(0), program))
    definition, params, _ = _split(model)
    axes = {"/".join(map(str, path)): v.get_metadata()["axes"] for path, v in nnx.to_flat_state(params)}
    shapes = nnx.to_pure_dict(params)
    return Graph(definition, nest(axes), shapes)


def init(cfg: ModelConfig, seed: Array) -> tuple[dict, dict]:
    """Parameters and router biases as nested dicts, born sharded. The values do not depend on the mesh.

    Not to be jitted as a whole: weights of one shape share one compilation.
    """
    model = Transformer(cfg, nnx.Rngs(params=seed), REFERENCE)
    _, params, bias = _split(model)
    return nnx.to_pure_dict(params), nnx.to_pure_dict(bias)


@dataclasses.dataclass(frozen=True)
class Counts:
    """Numbers of parameters. Active: used for one token, that is without the routed experts it does not choose."""

    total: int
    active: int
    active_no_embedding: int  # … and without the embedding and output tables


def count_parameters(cfg: ModelConfig) -> Counts:
    shapes = abstract(cfg).shapes
    total = sum(x.size for x in jax.tree.leaves(shapes))
    expert = (2 + ACTIVATIONS[cfg.activation].gated) * cfg.d_model * cfg.moe.d_expert
    idle = cfg.num_moe_layers * (cfg.moe.num_experts - cfg.moe.top_k) * expert
    tables = cfg.vocab_size * cfg.d_model * (1 if cfg.tie_embeddings else 2)
    return Counts(total, total - idle, total - idle - tables)


def flops_per_token(cfg: ModelConfig, seq_len: int) -> float:
    """Model FLOPs of one training token, forward and backward: 6 per active matmul weight, plus causal attention.

    The embedding look-up is no matmul, the output matrix is. Attention: 2 products of S/2 keys on average, 6·S·N·H a
    layer, of which values have their own H in MLA. Recomputation is not counted (this is MFU's numerator, not the
    hardware's).
    """
    matmul = count_parameters(cfg).active_no_embedding + cfg.vocab_size * cfg.d_model
    leaves = jax.tree_util.tree_leaves_with_path(abstract(cfg).shapes)
    norms = sum(x.size for path, x in leaves if path[-1].key.endswith("norm"))
    heads = cfg.num_heads * (cfg.head_dim + cfg.v_dim)
    return 6.0 * (matmul - norms) + 3.0 * cfg.num_layers * seq_len * heads
