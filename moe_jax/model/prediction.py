"""Layers of multi-token prediction: a head for training that predicts tokens after the next one, one after another.

Layer k reads, at the place of token t, the hidden state of layer k − 1 and the embedding of the token t + k, and
predicts the token t + k + 1:

    x_k = w_join · [norm(embedding of t + k) ; norm(h_{k−1})]      h_k = norm(block(x_k))      logits_k = head · h_k

h_0 is the normed state of the decoder, which its own head reads. Embedding and head are the model's own, which divides
all logits alike by `logits_divisor`; the block has the form of the model's last one. Source: arXiv:2412.19437, §2.2,
eqs. 21–23.

The order of the parts is that of the released `eh_proj`, whose first columns belong to the embedding; the paper writes
them the other way round. The paper leaves open whether h is taken before or after the norm in front of the head. Here
it is after, at all depths: so do transformers, which drafts with released weights, and Megatron. torchtitan takes it
before.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moe_jax.config import ModelConfig
from moe_jax.model.blocks import Block, BlockOutput, Inputs
from moe_jax.moe.program import Program
from moe_jax.nn.layers import Init, rms_norm, weight
from moe_jax.nn.remat import POLICIES, keep


def is_prediction(path: str) -> bool:
    """Whether a path is that of a parameter, or of a selection bias, of a layer of multi-token prediction."""
    return path.startswith("mtp/")


class Prediction(nnx.Module):
    """The layers of multi-token prediction of a model, as one stack with a leading axis of depths."""

    def __init__(self, cfg: ModelConfig, init: Init, program: Program):
        self.eps, d = cfg.norm_eps, cfg.d_model
        self.embed_norm, self.hidden_norm = init.ones((d,), "norm"), init.ones((d,), "norm")
        self.w_join = init.normal((2 * d, d), "embed embed")
        self.block = Block(cfg, init, cfg.mtp_places[0].kind, program)
        self.final_norm = init.ones((d,), "norm")

    def __call__(
        self,
        x: Float[Array, "B S D"],
        embedded: Float[Array, "B S D"],
        layer: Array | None,
        inputs: Inputs,
    ) -> BlockOutput:
        """Runs one depth, without its last norm. x: the normed state of the depth before.

        embedded: the tokens that it reads. layer: number of the block, for noise.
        """
        parts = [rms_norm(embedded, self.embed_norm[...], self.eps), rms_norm(x, self.hidden_norm[...], self.eps)]
        joined = jnp.concatenate(parts, axis=-1)
        return self.block(keep(joined @ weight(self.w_join, x.dtype), "residual"), None, layer, inputs, None, None)


def run(net: Any, x: Float[Array, "B S D"], inputs: Inputs) -> tuple[Float[Array, "K B S D"], BlockOutput]:
    """Runs all depths of a `Transformer`. Returns what its head reads at each, and what their blocks return.

    x: the normed state of the decoder.
    """
    cfg, policy = net.cfg, POLICIES[net.cfg.remat]
    graph, weights = nnx.split(net.mtp)
    layers = cfg.num_layers + jnp.arange(cfg.mtp_layers) if inputs.knobs is not None else None

    def depth(x, one):
        weights, ahead, layer = one
        own = inputs._replace(tokens=ahead.tokens, info=inputs.info._replace(counted=ahead.counted), ahead=None)
        layer_of = nnx.merge(graph, weights)
        out = layer_of(x, net.embedded(ahead.tokens), layer, own)
        hidden, normed = net.normed(out.x, layer_of.final_norm)
        return normed, (hidden, out._replace(x=None, cache=None))

    # With barriers: XLA makes no loop of one turn, in which it could merge the recomputation with the forward pass.
    depth = depth if policy is None else jax.checkpoint(depth, policy=policy, prevent_cse=True)
    return jax.lax.scan(depth, x, (weights, inputs.ahead, layers))[1]
