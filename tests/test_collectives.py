"""What a compiled training step sends: for load balancing expert statistics, to the experts tokens, never weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax import config
from moe_jax.aot import compile_only, hlo
from moe_jax.parallel import overlap, sharding
from moe_jax.train.state import abstract_state

B, S, K, D, F, GROUPS = 32, 28, 3, 16, 12, 4
# Twenty or ten of nothing else: such a dimension is the experts'. fsdp · expert = 4 does not divide ten, so each of
# their matrices is cut.
WHOLE, CUT = 20, 10


def collectives(e: int, micro_batches: int, accumulation: str, exchange: str) -> list[tuple[str, list[tuple], str]]:
    """(operation, shapes, JAX name) of every collective in the HLO of a step on 8 devices."""
    c = config.default_config()
    c.model.update(vocab_size=48, d_model=D, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=4)
    c.model.moe.update(num_experts=e, top_k=K, d_expert=F, selection_bias=True, exchange=exchange)
    c.loss.update(balance_batch=str(B // GROUPS), accumulation=accumulation)
    c.optim.name = "adamw"  # Muon exchanges the routers' momentum: tests/test_muon_mesh.py
    c.data.update(batch_size=B, seq_len=S)
    c.data.tokenizer.update(kind="huggingface", path="none")
    c.train.micro_batches = micro_batches
    cfg, mesh = config.build(c), sharding.make_mesh((2, 2, 2))
    state, compiled = abstract_state(cfg, mesh), compile_only.compile_step(cfg, mesh)
    # The new state takes the old one's place: all of it, and nothing else, is donated.
    assert compiled.memory_analysis().alias_size_in_bytes == compile_only.bytes_of_device(state)
    found = hlo.collectives(compiled.as_text(), dict(mesh.shape))
    return [(c.kind, c.shapes, c.name) for c in found if c.name]


@pytest.mark.parametrize(
    ("e", "micro_batches", "accumulation", "exchange"),
    [
        pytest.param(CUT, 1, "exact", "all_to_all", marks=pytest.mark.slow),
        (WHOLE, 2, "exact", "ring"),
        pytest.param(WHOLE, 2, "running", "all_to_all", marks=pytest.mark.slow),
    ],
)
def test_what_is_sent(e, micro_batches, accumulation, exchange):
    found = collectives(e, micro_batches, accumulation, exchange)
    assert len(found) > 20
    two_passes = accumulation == "exact" and micro_batches > 1
    check_statistics(found, e, 2 if two_passes else 1)
    check_exchange(found, e, exchange, B * S // 8 // micro_batches)


def check_statistics(found, e: int, passes: int):
    """Load balancing sends the expert statistics and nothing else."""
    about_experts = [(kind, shapes, name) for kind, shapes, name in found if any(e in s for s in shapes)]
    statistics = [(kind, shapes) for kind, shapes, name in about_experts if (GROUPS, e) in shapes]
    # Assignments and probabilities [G, E], tokens and z [G], in the layer loop, so G·(2E + 2) numbers a layer (nothing
    # was dropped for want of capacity, and XLA knows); under exact accumulation once more, in the first pass.
    assert len(statistics) == passes
    for kind, shapes in statistics:
        assert kind == "all-reduce"
        assert set(shapes) <= {(GROUPS, e), (GROUPS,)} and shapes.count((GROUPS, e)) <= 2 and len(shapes) <= 5
    # All else with an expert dimension is the gradient of the router's weights, one all-reduce for all uses.
    assert {s for _, shapes, _ in about_experts for s in shapes if e in s} == {(GROUPS, e), (D, e)}


def check_exchange(found, e: int, exchange: str, t: int):
    """Over `fsdp` a device gathers its own experts, half of them; over `expert` what says who needs which token, and
    the t tokens themselves only by `ring`. Weights of other devices' experts are never sent."""
    of_moe = [(kind, shapes) for kind, shapes, name in found if "shard_map" in name]
    gathered = {s for kind, shapes in of_moe if kind == "all-gather" for s in shapes if len(s) > 1}
    tokens = {(2 * t, D)} if exchange == "ring" else set()
    assert gathered == {(e // 2, D, F), (e // 2, F, D), (2 * t, K)} | tokens
    # Their gradients, each part to the device that keeps it: whole matrices, where there are enough.
    pieces = {(e // 4, D, F), (e // 4, F, D)} if e == WHOLE else {(e // 2, D // 2, F), (e // 2, F, D // 2)}
    assert {s for kind, shapes in of_moe if kind == "reduce-scatter" for s in shapes if F in s} == pieces
    # Rows out and home, and the gradients of both. The CPU's padded exchange sends whole blocks, of t rows.
    sent = [shapes for kind, shapes in of_moe if kind == "all-to-all"]
    assert sent == [[(1, t, D)] * 2] * (4 if exchange == "all_to_all" else 0)


@pytest.mark.parametrize("first", [1.0, np.inf])
def test_what_waits_is_the_same(monkeypatch, first):
    """As on a GPU, where the gradient of x waits for that of w: both are what they were; an infinity is not lost."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, cuda, default: cuda(*args))
    mesh = sharding.make_mesh((2, 2, 2))
    x = jax.random.normal(jax.random.key(0), (8, 4, 6), jnp.bfloat16)
    w = jax.random.normal(jax.random.key(1), (4, 6, 5)).at[0].set(first)

    def loss(x, w, use):
        x, (w,) = use(x, [w])
        y = jnp.einsum("bsd,edf->", x, jax.sharding.reshard(w, P()).astype(x.dtype), out_sharding=P())
        return y.astype(jnp.float32) + jnp.sum(w * w)

    with jax.set_mesh(mesh):
        x, w = (jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in ((x, sharding.BATCH), (w, P("expert"))))
        gradients = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
        (dx, dw), (waited, dw2) = (gradients(x, w, use) for use in (lambda x, w: (x, w), overlap.reduce_first))
    np.testing.assert_array_equal(dw, dw2)
    assert waited.dtype == dx.dtype
    if np.isfinite(first):
        np.testing.assert_array_equal(dx, waited)
    else:
        assert not np.isfinite(dx.astype(np.float32)).all() and np.isnan(waited.astype(np.float32)).any()
