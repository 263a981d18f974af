"""Exchange of tokens between the devices of the `expert` axis: values and gradients against every expert on one device.

Letters: T tokens of all devices, E experts, K experts per token, D model, F hidden width, P devices of the axis.
"""

import functools
import itertools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax import config
from moe_jax.config import MoEConfig
from moe_jax.errors import ConfigError
from moe_jax.moe import exchange, experts
from moe_jax.moe.experts import ExpertCompute, ExpertWeights
from moe_jax.moe.program import Program
from moe_jax.moe.routing import Routing
from moe_jax.parallel import sharding
from tests import two_processes
from tests.pairs import covering

T, E, D, F = 48, 16, 6, 4
MESHES = [(1, 2, 4), (2, 2, 2), (1, 1, 8)]
TOP_K = [1, 3, 10]  # 10: more than there are devices
CHUNKS = [1, 2, 6]
# Every mesh and K with both exchanges, in one piece and in 2 or 6 chunks by turns.
EVERYTHING = [
    (mesh, k, name, "grouped", chunks)
    for (i, mesh), (j, k), name, chunks in itertools.product(
        enumerate(MESHES), enumerate(TOP_K), ["ring", "all_to_all"], CHUNKS
    )
    if chunks in (1, CHUNKS[1 + (i + j) % 2])
]
FAST = [
    ((2, 2, 2), 10, "all_to_all", "grouped", 2),
    ((1, 2, 4), 3, "ring", "dense", 2),
]
SLOW = [((1, 1, 8), k, "all_to_all", "dense", chunks) for k, chunks in ((1, 1), (10, 3))]
SLOW += covering(EVERYTHING, FAST)


def draw(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).normal(size=shape).astype(np.float32)


def arguments(k: int):
    """x, the combine weights, expert weights, and a cotangent."""
    w = ExpertWeights(draw(E, D, F), draw(E, D, F, seed=1), draw(E, F, D))
    return draw(T, D), np.random.default_rng(k).random((T, k)).astype(np.float32), w, draw(T, D, seed=2)


def cases(k: int, peers: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Expert ids and valid slots."""
    rng = np.random.default_rng(k)
    ids = np.stack([rng.permutation(E)[:k] for _ in range(T)]).astype(np.int32)
    everything, local = np.ones(ids.shape, bool), E // peers
    padded = rng.random(ids.shape) < 0.7
    padded[rng.random(T) < 0.3] = False
    padded[: T // 8] = False  # a device with nothing but padding
    return {
        "random": (ids, everything),
        "padding": (ids, padded),
        "all to the last device": (E - local + ids % local, everything),  # an expert may be chosen more than once
        "a device without tokens": (np.where(ids // local == 1, ids % local, ids), padded),
        "nothing": (ids, np.zeros_like(everything)),
    }


@functools.cache
def oracle(k: int):
    """Every expert on every token, on one device."""
    cfg = MoEConfig(num_experts=E, top_k=k, compute="dense")

    @jax.jit
    def run(x, weights, w, dy, ids, valid):
        f = lambda x, weights, w: experts.dense(x, Routing(ids, weights, valid), w, ExpertCompute(cfg))[0]
        y, vjp = jax.vjp(f, x, weights, w)
        return y, vjp(dy)

    return run


def on_mesh(mesh, cfg: MoEConfig, name: str):
    """Of arrays on a mesh: (x, combine weights, expert weights, cotangent, ids, valid) → y, kept, gradients."""

    def region(x, weights, w, ids, valid):
        w = jax.tree.map(lambda a: jax.lax.pcast(a, ("data", "fsdp"), to="varying"), w)
        return exchange.run_experts(x, Routing(ids, weights, valid), w, name, ExpertCompute(cfg))

    specs = (sharding.BATCH, sharding.BATCH, P("expert"), sharding.BATCH, sharding.BATCH)
    both = jax.shard_map(region, mesh=mesh, in_specs=specs, out_specs=sharding.BATCH, check_vma=True)

    @jax.jit
    def run(x, weights, w, dy, ids, valid):
        y, vjp, kept = jax.vjp(lambda *args: both(*args, ids, valid), x, weights, w, has_aux=True)
        return y, kept, vjp(dy)

    return run


def put(mesh, *args):
    spec = lambda a: P("expert") if a.ndim == 3 else sharding.BATCH
    return jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, spec(a))), args)


def fetch(tree):
    return multihost_utils.process_allgather(tree, tiled=True) if jax.process_count() > 1 else jax.device_get(tree)


def check(shape, k, name, compute, chunks):
    mesh, args = sharding.make_mesh(shape), arguments(k)
    run = on_mesh(mesh, MoEConfig(num_experts=E, top_k=k, compute=compute, exchange_chunks=chunks), name)
    with jax.set_mesh(mesh):
        for case, (ids, valid) in cases(k, shape[2]).items():
            y, kept, grads = fetch(run(*put(mesh, *args, ids, valid)))
            want_y, want = oracle(k)(*args, ids, valid)
            assert np.abs(want_y).max() > 1 or case == "nothing"
            np.testing.assert_array_equal(kept | ~valid, True)  # nothing is dropped
            np.testing.assert_allclose(y, want_y, rtol=1e-5, atol=2e-5, err_msg=case)
            for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(want), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * max(1, np.abs(b).max()), err_msg=case)


@pytest.mark.parametrize(("shape", "k", "name", "compute", "chunks"), FAST)
def test_equals_the_oracle(shape, k, name, compute, chunks):
    check(shape, k, name, compute, chunks)


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "k", "name", "compute", "chunks"), SLOW)
def test_equals_the_oracle_full(shape, k, name, compute, chunks):
    check(shape, k, name, compute, chunks)


WORKER = """
from tests import test_exchange as t
for name in t.exchange.EXCHANGE:
    t.check((1, 2, 4), 3, name, "dense", 1)
    t.check((1, 1, 8), 3, name, "grouped", 2)
"""


@pytest.mark.slow
def test_two_processes():
    two_processes.run(WORKER)


@pytest.mark.slow
@pytest.mark.parametrize("shape", MESHES)
def test_capacity_drops_the_same_rows_with_both(shape):
    mesh, args = sharding.make_mesh(shape), arguments(3)
    cfg = MoEConfig(num_experts=E, top_k=3, compute="capacity", capacity_factor=0.4)
    ids, valid = cases(3, shape[2])["padding"]
    with jax.set_mesh(mesh):
        out = [jax.device_get(on_mesh(mesh, cfg, name)(*put(mesh, *args, ids, valid))) for name in exchange.EXCHANGE]
    assert (~out[0][1] & valid).sum() > 3
    for a, b in zip(*map(jax.tree.leaves, out), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


# --- the ragged all-to-all, which CPU does not have ------------------------------------------------------------------


def documented_ragged_all_to_all(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """What the documentation of `jax.lax.ragged_all_to_all` says, by gathering everything everywhere."""
    me, peers = jax.lax.axis_index(axis_name), jax.lax.axis_size(axis_name)
    everyone = [jax.lax.all_gather(a, axis_name) for a in (operand, input_offsets, send_sizes, output_offsets)]
    awaited, free = recv_sizes.reshape(peers, -1), jnp.ones(output.shape[:1], bool)
    for peer, (rows, *pieces) in enumerate(zip(*everyone, strict=True)):
        for first, size, to, expected in zip(*(a.reshape(peers, -1)[me] for a in pieces), awaited[peer], strict=True):
            place = jnp.arange(output.shape[0]) - to
            taken = rows[jnp.clip(first + place, 0, rows.shape[0] - 1)]
            there = (place >= 0) & (place < size)
            # Sender and receiver must agree on the sizes, and no row may be written twice: which one stays is not said.
            agreed = jnp.where((size == expected) & jnp.all(free | ~there), 1.0, jnp.nan)
            output, free = jnp.where(there[:, None], taken * agreed, output), free & ~there
    return output


@pytest.mark.parametrize("pieces", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_ragged_exchange_is_the_padded_one(monkeypatch, pieces):
    """Offsets and sizes handed to `jax.lax.ragged_all_to_all`, forward and backward."""
    mesh, k = sharding.make_mesh((1, 1, 8)), 3
    args, cfg = arguments(k), MoEConfig(num_experts=E, top_k=k, compute="dense")
    ids, valid = cases(k, 8)["padding"]
    with jax.set_mesh(mesh):
        want = jax.device_get(on_mesh(mesh, cfg, "all_to_all")(*put(mesh, *args, ids, valid)))
        monkeypatch.setattr(jax.lax, "ragged_all_to_all", documented_ragged_all_to_all)
        # A function that JAX has not traced yet, and so cannot know by its earlier trace.
        monkeypatch.setattr(exchange, "_swap_padded", lambda *args: exchange._swap_ragged(*args, pieces=pieces))
        got = jax.device_get(on_mesh(mesh, cfg, "all_to_all")(*put(mesh, *args, ids, valid)))
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_accelerators_send_rows_by_ragged_all_to_all_and_gather_none(platform):
    """Lowered for a platform that is not here: rows out and home, and their gradients."""
    mesh, chunks = sharding.make_mesh((1, 2, 4)), 2
    cfg = MoEConfig(num_experts=E, top_k=3, compute="dense", exchange_chunks=chunks)
    with jax.set_mesh(mesh):
        args = put(mesh, *arguments(3), *cases(3, 4)["random"])
        text = on_mesh(mesh, cfg, "all_to_all").trace(*args).lower(lowering_platforms=(platform,)).as_text()
    calls = re.findall(r"@ragged_all_to_all\(.*tensor<(\d+)xi32>\) ->", text)
    pieces = {"cuda": exchange.PIECES, "tpu": 4}[platform]  # to the 4 peers together
    assert calls == [str(pieces)] * 4 * chunks
    assert text.count('"stablehlo.all_to_all"') == 0
    rows = mesh.shape["expert"] * T // mesh.size // chunks
    gathered = re.findall(r'"stablehlo\.all_gather".*-> tensor<(\w+)>', text)
    assert set(gathered) == {f"{rows}x3x{kind}" for kind in ("i32", "f32", "i1")}  # no activations


# --- which one -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("e", "k", "peers"), [(16, 3, 4), (8, 8, 4), (64, 1, 8), (12, 5, 2)])
def test_devices_per_token(e, k, peers):
    """Against drawing K of E experts."""
    rng = np.random.default_rng(0)
    drawn = [len(set(rng.permutation(e)[:k] // (e // peers))) for _ in range(4000)]
    mean = exchange.devices_per_token(MoEConfig(num_experts=e, top_k=k), peers)
    assert mean == pytest.approx(np.mean(drawn), rel=0.03)
    assert 1 <= mean <= min(k, peers) + 1e-9


def test_auto_sends_less_and_says_what():
    cfg = MoEConfig(num_experts=64, top_k=8)
    name, why = exchange.choose_exchange(cfg, "tpu", 8, 2048, 4096, 2)
    # t·D numbers, forward and backward: 7 others × (2 + 4 and 2 + 2) bytes, against 5.43 · 7/8 rows × (2 + 2) bytes.
    assert name == "all_to_all"
    assert why == (
        "all_to_all (sends less), 319 MB a layer and device against 587 MB for ring, "
        "room for 134 MB received, chunks: 1"
    )
    name, why = exchange.choose_exchange(cfg, "cpu", 8, 2048, 4096, 2)
    assert name == "ring" and why.startswith(
        "ring (no ragged all-to-all on CPU), 587 MB a layer and device against 470"
    )
    name, why = exchange.choose_exchange(cfg, "gpu", 8, 2048, 4096, 2)
    assert name == "ring" and why.startswith("ring (faster on two H200s), 587 MB")
    assert exchange.choose_exchange(cfg, "gpu", 1, 2048, 4096, 2) == ("ring", "none (mesh.expert=1)")
    for name in exchange.EXCHANGE:
        chosen, why = exchange.choose_exchange(
            MoEConfig(num_experts=64, top_k=8, exchange=name), "gpu", 8, 2048, 4096, 2
        )
        assert chosen == name and why.startswith(f"{name} (set in the config)")
    # Every token goes everywhere, in float32: nothing is saved.
    every = MoEConfig(num_experts=8, top_k=8)
    sent = exchange.bytes_sent(every, "gpu", 4, 16, 100, 4)
    assert sent["ring"] == sent["all_to_all"] == 2 * 100 * 16 * 3 * 8
    assert exchange.choose_exchange(every, "tpu", 4, 16, 100, 4)[0] == "ring"


def test_the_choice_is_part_of_the_printed_line():
    cfg = config.ModelConfig(moe=MoEConfig(num_experts=16, exchange_chunks=4))
    device = types.SimpleNamespace(platform="tpu", device_kind="")
    mesh = types.SimpleNamespace(devices=np.array([device]), shape={"expert": 8})
    program = Program.choose(cfg, mesh, tokens=4096)
    assert program.exchange == "all_to_all" and "; exchange: all_to_all (sends less), " in program.why
    assert program.why.endswith("chunks: 4")


def mistake(**fields) -> str:
    c = config.default_config()
    c.data.update(batch_size=16, seq_len=6)
    c.model.moe.update(**fields)
    with pytest.raises(ConfigError) as e:
        config.check_devices(config.build(c), 8, "cpu")
    return str(e.value)


def test_mistakes_are_told_before_compilation():
    text = mistake(exchange="all_to_al")
    assert "model.moe.exchange='all_to_al'" in text and "nearest valid: 'all_to_all'" in text
    assert "exchange_chunks=0: must be ≥ 1" in mistake(exchange_chunks=0)
    text = mistake(exchange_chunks=5)
    assert "exchange_chunks=5: must divide a device's 12 tokens" in text and "nearest valid: 4" in text
    assert "drops" in mistake(exchange_chunks=2, compute="capacity")
