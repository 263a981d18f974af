"""EMoE: clusters the hidden units of a dense layer into experts, without new parameters. Source: arXiv:2310.10908.

Letters: L layers, D model, F hidden units, E experts, f = F/E.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from moe_jax import model
from moe_jax.config import ModelConfig, nearest_divisor
from moe_jax.nn.layers import ACTIVATIONS
from moe_jax.tree import flatten
from moe_jax.upcycle.chain import Transform, by_table, require, require_dense
from moe_jax.upcycle.experts import BLOCK, Blocks, moe_config, with_experts


def assign(distance: Float[Array, "F E"]) -> Int[Array, " F"]:
    """The cluster of each unit. Every cluster gets F/E units, and shorter distances have priority.

    Units propose: each asks its nearest cluster, a cluster keeps the F/E nearest units, and a refused unit asks its
    next cluster. The result is the same as accepting all F·E pairs in the order of their distance.
    """
    units, clusters = distance.shape
    size_limit = units // clusters
    preference = jnp.argsort(distance, axis=1)

    def refused(asked):
        """Whether the cluster that a unit asks refuses it."""
        cluster = jnp.take_along_axis(preference, asked[:, None], axis=1)[:, 0]
        order = jnp.lexsort((jnp.take_along_axis(distance, cluster[:, None], axis=1)[:, 0], cluster))
        place = jnp.zeros(units, jnp.int32).at[order].set(jnp.arange(units, dtype=jnp.int32))
        size = jnp.zeros(clusters, jnp.int32).at[cluster].add(1)
        return place - (jnp.cumsum(size) - size)[cluster] >= size_limit

    step = lambda state: (state[0] + state[1], refused(state[0] + state[1]))
    start = jnp.zeros(units, jnp.int32)
    asked, _ = jax.lax.while_loop(lambda state: jnp.any(state[1]), step, (start, refused(start)))
    return jnp.take_along_axis(preference, asked[:, None], axis=1)[:, 0]


def cluster(keys: Float[Array, "D F"], experts: int, rounds: int, key: Key[Array, ""]) -> Int[Array, " F"]:
    """The units in the order of their experts, from balanced k-means of their keys scaled to length 1."""
    x_FD = (keys / (jnp.linalg.norm(keys, axis=0, keepdims=True) + 1e-20)).T
    first = x_FD[jax.random.permutation(key, x_FD.shape[0])[:experts]]

    def step(_, centre_ED):
        one_hot = jax.nn.one_hot(labels(centre_ED), experts)
        return jnp.einsum("fe,fd->ed", one_hot, x_FD) / (x_FD.shape[0] // experts)

    # ‖x − c‖² − ‖x‖², where ‖x‖² = 1 for all.
    labels = lambda c_ED: assign(jnp.sum(jnp.square(c_ED), axis=1)[None] - 2 * jnp.einsum("fd,ed->fe", x_FD, c_ED))
    return jnp.argsort(labels(jax.lax.fori_loop(0, rounds, step, first)), stable=True)


@dataclass(frozen=True)
class Cluster(Transform):
    """Emergent MoE: F hidden units in E equal clusters by their keys (the columns of gate, or of up without a gate).

    An expert's router row is the mean of its keys, and every chosen expert weighs 1 (`moe.combine="one"`): with all
    experts chosen the layer is the dense one.
    """

    num_experts: int = 64
    top_k: int = 16
    dense_layers: int = 0  # number of layers at the start that stay dense
    layers: str = ""  # which layers get experts, as `model.layers` of the result; "": all but dense_layers
    rounds: int = 10  # iterations of k-means

    def config(self, cfg: ModelConfig) -> ModelConfig:
        require_dense(cfg)
        f, e = cfg.d_ff, self.num_experts
        require(e >= 1, "num_experts", e, "must be ≥ 1", "nearest valid: 1")
        nearest = nearest_divisor(f, e)
        require(f % e == 0, "num_experts", e, f"must divide the dense d_ff={f}", f"nearest valid: {nearest}")
        moe = moe_config(num_experts=e, top_k=self.top_k, d_expert=f // e, combine="one")
        final = with_experts(cfg, moe, self.dense_layers, self.layers)
        rule = f"a layer's hidden units are cut into num_experts={e} clusters, in each layer with experts"
        require(final.expert_counts == (e,), "layers", self.layers, rule, "nearest valid: moe without a number")
        return final

    def params(self, cfg: ModelConfig, params: dict[str, Array], key: Key[Array, ""]) -> dict[str, Array]:
        final, e = self.config(cfg), self.num_experts
        blocks, gate = Blocks.of(final), "w_gate" if ACTIVATIONS[cfg.activation].gated else "w_up"
        of_layer = lambda pair: cluster(pair[0], e, self.rounds, pair[1])

        @functools.cache
        def units(block):
            """The hidden units of each layer of a block [L, F], in the order of their experts."""
            keys = blocks.take(params[f"dense_layers/mlp/{gate}"], block).astype(jnp.float32)
            return jax.lax.map(of_layer, (keys, jax.random.split(blocks.key(key, block), keys.shape[0])))

        def experts(w, path):
            unit_LF, w = units(path.split("/moe/")[0]), blocks.take(w, path)
            layers, rows, columns = w.shape
            if path.endswith("w_down"):
                return jnp.take_along_axis(w, unit_LF[..., None], axis=1).reshape(layers, e, rows // e, columns)
            ordered = jnp.take_along_axis(w, unit_LF[:, None], axis=2)
            return jnp.moveaxis(ordered.reshape(layers, rows, e, columns // e), 2, 1)

        rules = (
            *blocks.carried(),
            (rf"{BLOCK}/moe/(w_gate|w_up|w_down)", r"dense_layers/mlp/\1", experts),
            (rf"{BLOCK}/moe/w_router", f"dense_layers/mlp/{gate}",
             lambda w, path: jnp.mean(experts(w, path).astype(jnp.float32), axis=-1).swapaxes(1, 2)),
        )  # fmt: skip
        return by_table(rules, flatten(model.abstract(final).shapes), params)

    def changes(self, cfg: ModelConfig) -> str:
        k, e = self.top_k, self.num_experts
        return f"a token uses {k} of the {e} clusters of its layer" if k < e else ""
