"""The decoder: stacked blocks, scanned over layers.

`Transformer` is an NNX module; NNX ends at the `jit` border. `abstract(cfg)` gives the graph and the shapes once,
`init(cfg, seed)` the parameters as plain nested dicts, and `Graph.bind` joins the two inside a jitted function.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from moe_jax.config import ModelConfig
from moe_jax.model.blocks import Block, BlockOutput, Inputs
from moe_jax.moe.layer import RouterBias
from moe_jax.moe.program import Program
from moe_jax.moe.stats import Choices, RouterStats
from moe_jax.nn.attention import KVCache
from moe_jax.nn.layers import Init, rms_norm, weight
from moe_jax.nn.remat import POLICIES
from moe_jax.parallel import overlap, sharding
from moe_jax.tree import nest


class Output(NamedTuple):
    """The result of the decoder. L counts MoE layers, but for `max_logit`, where it counts the layers of a stack."""

    hidden: Float[Array, "B S D"]  # after the last norm
    stats: RouterStats  # [L, G, …]
    cache: list[KVCache | None]  # with the new tokens: of the dense layers, of the MoE layers
    choices: Choices | None  # [L, B, S, …]; None unless the program records them
    max_logit: dict[str, Float[Array, "L N"]] | None  # by stack of layers; None unless the program asks for it


class Transformer(nnx.Module):
    """The decoder: embedding, a stack of dense layers, a stack of MoE layers, and the last norm."""

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
        max_logit, (stats, choices) = {}, self._without_moe(inputs)
        if self.cfg.num_dense_layers:
            x, _, dense_cache, _, max_logit["dense_layers"] = self._scan(
                self.dense_layers, x, inputs, dense_cache, start
            )
        if self.cfg.num_moe_layers:
            x, stats, moe_cache, choices, max_logit["layers"] = self._scan(self.layers, x, inputs, moe_cache, start)
        hidden = rms_norm(x, self.final_norm[...], self.cfg.norm_eps)
        over_batch = {name: jnp.max(x, axis=1) for name, x in max_logit.items()} if self.program.max_logit else None
        return Output(hidden, stats, [dense_cache, moe_cache], choices, over_batch)

    def _without_moe(self, inputs: Inputs) -> tuple[RouterStats, Choices | None]:
        """Statistics and choices of a model without MoE layers: arrays with L = 0."""
        g, moe = self.program.balance_groups, self.cfg.moe
        stats = RouterStats(
            *(jnp.zeros((0, g, *more)) for more in ((), (moe.num_experts,), (moe.num_experts,), (), ()))
        )
        if not self.program.record:
            return stats, None
        shape = (0, *inputs.tokens.shape)
        return stats, Choices(jnp.zeros((*shape, moe.top_k), jnp.int32), jnp.zeros(shape))

    def _scan(self, blocks: Block, x, inputs: Inputs, cache: KVCache | None, start) -> BlockOutput:
        graph, experts, others = nnx.split(blocks, _is_expert_weight, ...)
        reduces = sharding.current_sizes().get("fsdp", 1) > 1  # the experts' gradients are summed over devices

        def body(x, layer):
            experts, others, layer_cache = layer
            if reduces and jax.tree.leaves(experts):
                x, experts = overlap.reduce_first(x, experts)
            out = nnx.merge(graph, experts, others)(x, inputs, layer_cache, start)
            return out.x, out._replace(x=None)

        policy, unroll = POLICIES[self.cfg.remat], min(self.cfg.unroll, len(jax.tree.leaves(others)[0]))
        if policy is not None:
            # XLA cannot merge the recomputation of a layer with its forward pass across loop iterations of one layer
            # each, so that the barriers of prevent_cse would only cost time.
            body = jax.checkpoint(body, policy=policy, prevent_cse=unroll > 1)
        x, out = jax.lax.scan(body, x, (experts, others, cache), unroll=unroll)
        return out._replace(x=x)

    @property
    def output_matrix(self) -> nnx.Param:
        """The matrix `[V, D]` that maps hidden states to logits."""
        return self.embed if self.cfg.tie_embeddings else self.head

    def empty_cache(self, batch: int, length: int) -> list[KVCache | None]:
        """A cache of zeros for `length` tokens of `batch` sequences: of the dense layers, of the MoE layers."""
        cfg = self.cfg
        out = P(None, sharding.AXES, None, None, None) if sharding.current_sizes() else None

        def zeros_for(layers):
            latent = (1, cfg.mla.kv_rank + cfg.mla.rope_dim)
            shape = (layers, batch, length, *(latent if cfg.mla.kv_rank else (cfg.num_kv_heads, cfg.head_dim)))
            zeros = lambda: jnp.zeros(shape, cfg.compute_dtype, out_sharding=out)
            return KVCache(zeros(), None if cfg.mla.kv_rank else zeros()) if layers else None

        return [zeros_for(cfg.num_dense_layers), zeros_for(cfg.num_moe_layers)]


class Graph(NamedTuple):
    """A model without its weights: its structure, and the axes and shapes of its parameters."""

    definition: Any
    axes: dict  # logical axes of every parameter, in the tree of `params`
    shapes: dict  # ShapeDtypeStruct of every parameter

    def bind(self, params: dict, router_bias: dict) -> Transformer:
        """The module with these weights, for use inside a traced function."""
        return nnx.merge(self.definition, params, router_bias)


def _is_expert_weight(_, variable: nnx.Variable) -> bool:
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
    """Parameters and router biases as nested dicts, created sharded. The values do not depend on the mesh.

    Do not jit this as a whole: outside `jit`, weights of one shape share one compilation.
    """
    model = Transformer(cfg, nnx.Rngs(params=seed), REFERENCE)
    _, params, bias = _split(model)
    return nnx.to_pure_dict(params), nnx.to_pure_dict(bias)
