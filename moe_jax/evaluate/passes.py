"""Passes of a model over texts of any length: logits, hidden states, choices of experts.

Letters: S tokens of a text, V rows of the output matrix, D model width, L layers with experts, K slots of a token.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from moe_jax import model
from moe_jax.config import ModelConfig
from moe_jax.config.labels import check_label
from moe_jax.evaluate.switches import Switches
from moe_jax.moe.layer import TokenInfo
from moe_jax.moe.pools import documents_of
from moe_jax.moe.program import Program
from moe_jax.moe.stats import by_depth
from moe_jax.nn.layers import weight
from moe_jax.parallel import sharding

TOKENS = 4096  # of one pass over all devices, padding included, unless a text has more
SHORTEST = 16  # tokens to which texts are padded at least, so that few programs are compiled


def run(
    cfg: ModelConfig,
    mesh: Mesh,
    params: dict,
    router_bias: dict,
    all_ids: list[list[int]],
    what: str,
    layer: int = -1,
    switches: Switches | None = None,
    label: int | None = None,
) -> list[Any]:
    """An entry of `READ` for each text, given as token ids. layer: for "hidden". switches: of experts. label: of the
    texts, for a model that needs one; ConfigError for a wrong one.

    A result does not depend on the other texts. Every process of several calls this with the same texts.
    """
    label = check_label(cfg, label)
    out: list = [None] * len(all_ids)
    for rows, table, lengths in _batches(cfg, mesh.size, all_ids):
        program = _program(cfg, mesh, table.shape[1], what, layer)
        with jax.set_mesh(mesh):
            made = jax.device_get(program(params, router_bias, table, lengths, switches, label))
        for place, row in enumerate(rows):
            out[row] = READ[what].of_row(made, place, len(all_ids[row]))
    return out


def _batches(
    cfg: ModelConfig, devices: int, all_ids: list[list[int]]
) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """Batches of texts of similar length: their numbers, ids `[B, S]`, and lengths `[B]`, 0 for a row of padding.

    Their sizes are few, because a program is compiled for each. With expert choice, and with RoPE that depends on the
    length, a text has no padding, which would be a part of its sequence.
    """
    exact = (cfg.num_moe_layers > 0 and cfg.moe.choice == "expert") or cfg.rope_scaling.by_length
    padded = lambda n: n if exact else max(SHORTEST, 1 << (n - 1).bit_length())
    order = sorted(range(len(all_ids)), key=lambda i: len(all_ids[i]))
    while order:
        length = padded(len(all_ids[order[0]]))
        most = devices * max(1, TOKENS // (length * devices))
        rows = [i for i in order if padded(len(all_ids[i])) == length][:most]
        order = order[len(rows) :]
        size = devices << (-(-len(rows) // devices) - 1).bit_length()
        table, lengths = np.zeros((size, length), np.int32), np.zeros(size, np.int32)
        for place, row in enumerate(rows):
            lengths[place] = len(all_ids[row])
            table[place, : lengths[place]] = all_ids[row]
        yield rows, table, lengths


# --- the programs --------------------------------------------------------------------------------------------------


def _logits(net, out, ids, layer):
    matrix = weight(net.output_matrix, out.hidden.dtype)
    return jnp.einsum("bsd,vd->bsv", out.hidden, matrix, preferred_element_type=jnp.float32)


def _hidden(net, out, ids, layer):
    if layer == 0:
        return net.embedded(ids).astype(jnp.float32)
    if layer == -1:
        return out.hidden.astype(jnp.float32)
    place = net.cfg.places[layer - 1]
    return out.residual[place.path][place.index].astype(jnp.float32)


def _routing(net, out, ids, layer):
    return by_depth(net.cfg.places, out.choices)


def _routing_of_row(layers, row, length):
    """Experts and weights `[L, S, K]`; layers with fewer slots than others are filled."""
    slots = max(one.experts.shape[-1] for one in layers)
    fill = lambda a, value: np.pad(a[row, :length], ((0, 0), (0, slots - a.shape[-1])), constant_values=value)
    return np.stack([fill(one.experts, -1) for one in layers]), np.stack([fill(one.weights, 0) for one in layers])


class Read(NamedTuple):
    """A pair of functions: what is taken from a pass on the devices, and from that the result of one text."""

    of_pass: Callable  # (module, its output, ids [B, S], layer) → arrays
    of_row: Callable  # (these arrays on the host, row, tokens) → the result of a text


_only = lambda made, row, length: made[row, :length]
READ = {
    "logits": Read(_logits, _only),
    "hidden": Read(_hidden, _only),
    "routing": Read(_routing, _routing_of_row),
}


@functools.lru_cache(maxsize=64)
def _program(cfg: ModelConfig, mesh: Mesh, length: int, what: str, layer: int) -> Callable:
    """The jitted function (params, bias, ids [B, S], lengths [B], switches, label) → arrays of `READ[what]`,
    replicated."""
    chosen = Program.choose(cfg, mesh, seq_len=length)
    program = dataclasses.replace(chosen, record=what == "routing", residual=what == "hidden" and layer > 0)
    graph, rows = model.abstract(cfg, program), P(sharding.AXES, None)

    def run(params, bias, table, lengths, switches, label):
        net = graph.bind(params, bias)
        place = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], table.shape)
        counted = place < lengths[:, None]
        ids, place, counted = (jax.sharding.reshard(a, rows) for a in (table, place, counted))
        own = None if label is None else jnp.full_like(ids, label)
        info = TokenInfo(counted, jnp.zeros_like(ids), label=own)
        info = info._replace(documents=documents_of(cfg.moe, jnp.ones_like(ids), place, training=False))
        out = net(model.Inputs(ids, place, None, info, switches=switches))
        return jax.tree.map(sharding.replicate, READ[what].of_pass(net, out, ids, layer))

    return jax.jit(run)
