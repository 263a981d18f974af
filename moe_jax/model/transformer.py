"""The decoder: stacks of units of blocks, each scanned over its units.

`Transformer` is an NNX module; NNX ends at the `jit` border. `abstract(cfg)` gives the graph and the shapes once,
`init(cfg, seed)` the parameters as plain nested dicts, and `Graph.bind` joins the two inside a jitted function.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from moe_jax.config import ModelConfig
from moe_jax.config.layers import MTP_BLOCK, Stack
from moe_jax.model import prediction
from moe_jax.model.blocks import Block, BlockOutput, Inputs, Unit, blocks_of
from moe_jax.model.prediction import Prediction, is_prediction
from moe_jax.moe.layer import RouterBias
from moe_jax.moe.program import Program
from moe_jax.moe.routers import ROUTERS
from moe_jax.moe.stats import Choices, RouterStats
from moe_jax.nn import lora, untied
from moe_jax.nn.cache import KVCache
from moe_jax.nn.layers import Init, Keys, rms_norm, times, unit_rows, weight
from moe_jax.nn.remat import POLICIES
from moe_jax.nn.residual import shifted
from moe_jax.parallel import overlap, sharding
from moe_jax.tree import flatten, nest, split


class Output(NamedTuple):
    """The result of the decoder. Dicts have the block's path in the parameters as key, and a leading L, its units."""

    hidden: Float[Array, "B S D"]  # after the last norm, divided by `logits_divisor`
    stats: dict[str, RouterStats]  # of blocks with experts
    cache: dict[str, KVCache | None]  # with the new tokens
    choices: dict[str, Choices] | None  # None unless the program records them
    max_logit: dict[str, Float[Array, "L N"]] | None  # None unless the program asks for it
    residual: dict[str, Float[Array, "L B S D"]] | None  # after each block; None unless the program asks for it
    # What the head reads for each layer of multi-token prediction; None unless the program asks for it.
    ahead: Float[Array, "K B S D"] | None = None


class Transformer(nnx.Module):
    """The decoder: embedding, the stacks of `ModelConfig.stacks`, and the last norm."""

    def __init__(self, cfg: ModelConfig, keys: Keys, program: Program):
        self.cfg, self.program = cfg, program
        init = Init(keys, cfg.init_std, dtype=cfg.param_dtype)
        self.embed = init.normal((cfg.vocab_size, cfg.d_model), "vocab embed")
        if cfg.residual_scale:
            self.embed_bias = init.filled((cfg.d_model,), "norm", 0.0)
            self.embed_scale = init.ones((cfg.d_model,), "norm")
        for stack in cfg.stacks:
            blocks = [Block(cfg, init.stack(stack.repeat), kind, program) for kind in stack.unit]
            setattr(self, stack.name, blocks[0] if len(blocks) == 1 else Unit(blocks))
        self.final_norm = init.ones((cfg.d_model,), "norm")
        if not cfg.tie_embeddings:
            self.head = init.normal((cfg.vocab_size, cfg.d_model), "vocab embed")
        if cfg.mtp_layers:
            self.mtp = Prediction(cfg, init.stack(cfg.mtp_layers), program)
        if cfg.lora.rank:
            self._adapt(init)  # last, so that the other weights are those of a model without adapters

    def _adapt(self, init: Init) -> None:
        matched, possible = [], []
        for stack in self.cfg.stacks:
            found = lora.adapt(getattr(self, stack.name), self.cfg.lora, stack.name, init.stack(stack.repeat))
            matched, possible = matched + found[0], possible + found[1]
        lora.check_matched(self.cfg.lora, matched, possible)

    def __call__(
        self, inputs: Inputs, cache: dict[str, KVCache] | None = None, start: Int[Array, ""] | None = None
    ) -> Output:
        x = self.embedded(inputs.tokens)
        if self.cfg.untie > 1:
            inputs = inputs._replace(by=untied.sort(inputs.info.label, self.cfg.untie))
        found: dict[str, BlockOutput] = {}
        state, first = self._router_state(x), 0
        for stack in self.cfg.stacks:
            caches = tuple((cache or {}).get(path) for path in stack.paths)
            (x, state), outputs = self._scan(stack, (x, state), inputs, caches, start, first)
            found |= dict(zip(stack.paths, outputs, strict=True))
            first += stack.repeat * len(stack.unit)
        hidden, normed = self.normed(x, self.final_norm)
        ahead = None
        if self.program.mtp:
            with jax.named_scope("mtp"):
                ahead, found[MTP_BLOCK] = prediction.run(self, normed, inputs)
        all_of = lambda name: {path: getattr(out, name) for path, out in found.items()}
        routed = lambda name: {path: getattr(out, name) for path, out in found.items() if out.stats is not None}
        over_batch = lambda by_block: {path: jnp.max(x, axis=1) for path, x in by_block.items()}
        return Output(
            hidden=hidden,
            stats=routed("stats"),
            cache=all_of("cache"),
            choices=routed("choices") if self.program.record else None,
            max_logit=over_batch(all_of("max_logit")) if self.program.max_logit else None,
            residual=all_of("x") if self.program.residual else None,
            ahead=ahead,
        )

    def normed(self, x: Float[Array, "B S D"], norm: nnx.Param) -> tuple[Float[Array, "B S D"], Float[Array, "B S D"]]:
        """Returns what the head reads, the normed x divided by `logits_divisor`, and the normed x itself."""
        scale, divisor = norm[...].astype(jnp.float32), self.cfg.logits_divisor
        # Divides the logits where it costs nothing and is rounded once, in float32: in the scale of the norm.
        hidden = rms_norm(x, times(scale, 1 / divisor), self.cfg.norm_eps)
        is_same = divisor == 1 or not self.program.mtp  # which alone needs the other
        return hidden, hidden if is_same else rms_norm(x, scale, self.cfg.norm_eps)

    @jax.named_scope("embedding")
    def embedded(self, tokens: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        """Returns what the first block reads."""
        dtype = jnp.dtype(self.cfg.compute_dtype)
        out = P(sharding.AXES, None, None) if sharding.current_sizes() else None
        x = times(weight(self.embed, dtype).at[tokens].get(out_sharding=out), self.cfg.embedding_multiplier)
        return shifted(x, self.embed_bias[...], self.embed_scale[...]).astype(dtype) if self.cfg.residual_scale else x

    def _router_state(self, x: Float[Array, "B S D"]) -> Float[Array, "B S R"] | None:
        """The state that the router of the first layer is given: zeros, if routers have one."""
        if not (self.cfg.num_moe_layers and ROUTERS[self.cfg.moe.router].has_state):
            return None
        shape = (*x.shape[:2], self.cfg.moe.router_width)
        return jnp.zeros(shape, jnp.float32, out_sharding=jax.typeof(x).sharding.spec)

    def _scan(
        self, stack: Stack, carry: tuple, inputs: Inputs, caches: tuple, start, first: int
    ) -> tuple[tuple, tuple[BlockOutput, ...]]:
        """Runs a stack. carry: x, and the state of its routers. caches, and the outputs beside the new carry: one for
        each block of the unit. first: number of the stack's first block in the decoder."""
        is_trained = lambda path: "/".join((stack.name, *map(str, path))) not in self.program.frozen
        waits = lambda path, variable: _is_expert_weight(variable) and is_trained(path)
        graph, experts, others = nnx.split(getattr(self, stack.name), waits, ...)
        reduces = sharding.current_sizes().get("fsdp", 1) > 1  # the experts' gradients are summed over devices
        policy, unroll = POLICIES[self.cfg.remat], min(self.cfg.unroll, stack.repeat)
        recompute = lambda fn, prevent_cse: jax.checkpoint(fn, policy=policy, prevent_cse=prevent_cse)
        several, keeps = len(stack.unit) > 1, self.program.residual

        size = len(stack.unit)
        switches = tuple((inputs.switches or {}).get(path) for path in stack.paths)
        firsts = jnp.arange(first, first + size * stack.repeat, size) if inputs.knobs is not None else None

        def body(carry, unit):
            (x, state), (experts, others, caches, at, switches) = carry, unit
            if reduces and jax.tree.leaves(experts):
                x, experts = overlap.reduce_first(x, experts)
            waiting, outputs = [], []
            blocks = blocks_of(nnx.merge(graph, experts, others))
            for i, (block, cache, own) in enumerate(zip(blocks, caches, switches, strict=True)):
                run = functools.partial(block, inputs=inputs, start=start)
                # Block by block, so that the backward pass has one block's activations in memory, not those of a unit.
                run = recompute(run, True) if policy is not None and several else run
                out = run(x, state, None if at is None else at + i, cache=cache, switches=own)
                x, state = out.x, out.state
                if out.late is not None:
                    waiting.append(out.late)
                outputs.append(out._replace(x=x if keeps else None, state=None, late=None))
            x = sum(waiting, x)
            if keeps:
                outputs[-1] = outputs[-1]._replace(x=x)
            return (x, state), tuple(outputs)

        if policy is not None and not several:
            # XLA cannot merge the recomputation of a layer with its forward pass across loop iterations of one layer
            # each, so that the barriers of prevent_cse would only cost time.
            body = recompute(body, unroll > 1)
        return jax.lax.scan(body, carry, (experts, others, caches, firsts, switches), unroll=unroll)

    @property
    def output_matrix(self) -> nnx.Param | Float[Array, "V D"]:
        """The matrix `[V, D]` that maps hidden states to logits. With `norm_head` its rows have length 1."""
        matrix = self.embed if self.cfg.tie_embeddings else self.head
        return unit_rows(matrix[...]) if self.cfg.norm_head else matrix

    def empty_cache(self, batch: int, length: int) -> dict[str, KVCache]:
        """A cache of zeros for `length` tokens of `batch` sequences, by block; in one with a window for at most its."""
        cfg = self.cfg
        out = P(None, sharding.AXES, None, None, None) if sharding.current_sizes() else None

        def zeros_for(layers, kind):
            latent = (1, cfg.mla.kv_rank + cfg.mla.rope_dim)
            tokens = min(length, cfg.window) if kind.attends.window else length
            shape = (layers, batch, tokens, *(latent if cfg.mla.kv_rank else (cfg.num_kv_heads, cfg.head_dim)))
            zeros = lambda: jnp.zeros(shape, cfg.compute_dtype, out_sharding=out)
            pool = None
            if cfg.moe.takes_pools and kind.experts:
                by_row = out and P(None, sharding.AXES, None)
                pool = jnp.zeros((layers, batch, kind.experts), bool, out_sharding=by_row)
            return KVCache(zeros(), None if cfg.mla.kv_rank else zeros(), pool)

        return {
            path: zeros_for(stack.repeat, kind)
            for stack in cfg.stacks
            for path, kind in zip(stack.paths, stack.unit, strict=True)
        }


class Graph(NamedTuple):
    """A model without its weights: its structure, and the axes and shapes of its parameters."""

    definition: Any
    axes: dict  # logical axes of every parameter, in the tree of `params`
    shapes: dict  # ShapeDtypeStruct of every parameter

    def bind(self, params: dict, router_bias: dict) -> Transformer:
        """The module with these weights, for use inside a traced function."""
        return nnx.merge(self.definition, params, router_bias)


def _is_expert_weight(variable: nnx.Variable) -> bool:
    return "experts" in variable.get_metadata().get("axes", ())


def _split(model: Transformer):
    definition, params, bias = nnx.split(model, nnx.Param, RouterBias)
    return definition, params, bias


REFERENCE = Program()  # runs anywhere


def abstract(cfg: ModelConfig, program: Program = REFERENCE) -> Graph:
    """The graph and shapes of a model; nothing is allocated."""
    definition, axes, shapes = _abstract(cfg, program)
    return Graph(definition, nest(axes), nest(shapes))  # dicts of the caller's own


@functools.lru_cache(maxsize=32)  # a training step, its checks and its description ask for the same model
def _abstract(cfg: ModelConfig, program: Program) -> tuple[Any, dict, dict]:
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        model = nnx.eval_shape(lambda: Transformer(cfg, Keys(jax.random.key(0)), program))
    definition, params, _ = _split(model)
    axes = {"/".join(map(str, path)): v.get_metadata()["axes"] for path, v in nnx.to_flat_state(params)}
    return definition, axes, flatten(nnx.to_pure_dict(params))


def init_adapters(cfg: ModelConfig, seed: Array) -> dict:
    """The parameters of fresh adapters alone, as `init` makes them. Nothing else is allocated."""
    made = jax.jit(lambda seed: split(init(cfg, seed)[0], lora.is_adapter)[0])
    return made(seed)


def init_prediction(cfg: ModelConfig, seed: Array) -> tuple[dict, dict]:
    """The parameters and router biases of fresh layers of multi-token prediction alone, as `init` makes them."""
    made = jax.jit(lambda seed: tuple(split(tree, is_prediction)[0] for tree in init(cfg, seed)))
    return made(seed)


def init(cfg: ModelConfig, seed: Array) -> tuple[dict, dict]:
    """Parameters and router biases as nested dicts, created sharded. The values do not depend on the mesh.

    Do not jit this as a whole: outside `jit`, weights of one shape share one compilation.
    """
    model = Transformer(cfg, Keys(seed), REFERENCE)
    _, params, bias = _split(model)
    return nnx.to_pure_dict(params), nnx.to_pure_dict(bias)
