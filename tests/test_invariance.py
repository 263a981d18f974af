"""The invariance matrix: how a batch is computed never changes what is computed.

For one tiny model and one batch, loss, every loss part, every gradient leaf, RouterStats and the parameters after one
optimizer step are equal across meshes, micro-batches, rematerialisation, layers in a loop or unrolled, expert compute,
exchange (where the mesh has an expert axis) and both with and without padding; every two of these settings meet in
some program. The oracle is one device, one batch, every expert dense.
"""

import functools
import itertools

import jax
import numpy as np
import optax
import pytest

from moe_jax import config, optim
from moe_jax.parallel import sharding
from moe_jax.train import losses
from moe_jax.train.gradients import make_gradients
from moe_jax.train.state import abstract_state, init_state, put_batch
from tests.pairs import covering

B, S, V = 32, 8, 48
BIAS = np.linspace(-0.05, 0.05, 4, dtype=np.float32)
MESHES = [(1, 1, 1), (8, 1, 1), (2, 2, 2), (1, 2, 4)]
MICRO, COMPUTE, PADDING = [1, 2, 4], ["dense", "grouped"], (0.0, 0.25)
REMAT = ["none", "selective", "full"]
EXCHANGE = ["ring", "all_to_all"]


def wanted(mesh, micro, remat, compute, exchange) -> bool:
    """Not the whole product: another exchange only where there is something to exchange, with grouped experts; what
    lies between no recomputation and all with two micro-batches, where layers are unrolled."""
    if remat == "selective" and micro != 2:
        return False
    return exchange == "ring" or (mesh[2] > 1 and compute == "grouped" and remat != "full")


# Programs; each runs with every padding, which is data.
EVERYTHING = [case for case in itertools.product(MESHES, MICRO, REMAT, COMPUTE, EXCHANGE) if wanted(*case)]
# The fast part, beside the oracle, which computes densely on one device.
FAST = [((2, 2, 2), 2, "selective", "grouped", "all_to_all")]
PAIRS = FAST + covering(EVERYTHING, FAST)  # every two settings that can meet do so


def run_config(micro=1, remat="none", compute="dense", balance_batch="8", lb_coef=0.5, z_coef=0.1,
               exchange="auto", unroll=1) -> config.RunConfig:  # fmt: skip
    c = config.default_config()
    c.model.update(vocab_size=V, d_model=16, num_layers=3, num_dense_layers=1, d_ff=24, num_heads=4, num_kv_heads=2,
                   head_dim=4, qk_norm=True, compute_dtype="float32", init_std=0.3)  # fmt: skip
    c.model.update(remat=remat, unroll=unroll)
    c.model.moe.update(num_experts=4, top_k=2, d_expert=8, num_shared_experts=1, compute=compute, selection_bias=True,
                       exchange=exchange)  # fmt: skip
    c.loss.update(load_balance_coef=lb_coef, router_z_coef=z_coef, balance_batch=balance_batch)
    # A large eps: AdamW's first step divides a gradient by itself, which would turn rounding into ±1.
    c.optim.update(lr=0.02, newton_schulz_dtype="float32", newton_schulz_steps=2, eps=1e-3)
    c.data.update(batch_size=B, seq_len=S)
    c.data.tokenizer.kind = "huggingface"
    c.data.tokenizer.path = "none"
    c.train.micro_batches = micro
    return config.build(c)


def batch_rows(padding: float) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    # Sequences of unlike vocabulary, so that micro-batches and balance groups route differently.
    low = rng.integers(0, V - 16, (B, 1))
    tokens = (low + rng.integers(0, 16, (B, S + 1))).astype(np.int32)
    segments = np.ones((B, S), np.int32)
    segments[:, S // 2 :] = 2
    kept = np.ones((B, S), bool)
    kept[: B // 2, S - round(2 * padding * S) :] = False  # half the sequences carry all the padding
    weights = np.where(kept, rng.random((B, S)) + 0.5, 0.0).astype(np.float32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": weights,
        "segment_ids": np.where(kept, segments, 0).astype(np.int32),
        "positions": np.tile(np.arange(S, dtype=np.int32) % (S // 2), (B, 1)),
        "sequence_ids": np.arange(B, dtype=np.int32),
    }


@functools.cache
def initial_state(mesh_shape) -> tuple:
    """The mesh and a fresh state on it; the values are those of one device."""
    mesh = sharding.make_mesh(mesh_shape, jax.devices()[: int(np.prod(mesh_shape))])
    if mesh.size == 1:
        state = init_state(run_config(), mesh)
        # A selection bias that is not zero, so that it takes part.
        return mesh, state._replace(router_bias=jax.tree.map(lambda b: b + BIAS[None], state.router_bias))
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(run_config(), mesh))
    return mesh, jax.device_put(jax.device_get(initial_state((1, 1, 1))[1]), shardings)


@functools.cache
def optimizer_step(mesh_shape):
    """(params, opt_state, gradients) → params. On a mesh one program for the whole matrix, which has one optimizer."""
    optimizer = optim.make_optimizer(run_config().optim, run_config().train.steps)

    @jax.jit
    def after(params, opt_state, grads):
        updates, _ = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates)

    return after


def everything(cfg: config.RunConfig, mesh_shape, paddings: tuple[float, ...], update=True) -> list[dict]:
    """All that the matrix compares, on the host, for batches with so much padding. One program of gradients.

    update: parameters after one step are among it. The fast part has them in test_golden.py.
    """
    mesh, state = initial_state(mesh_shape)
    assert cfg.optim == run_config().optim and cfg.train.steps == run_config().train.steps
    gradients = make_gradients(cfg, mesh)

    @jax.jit
    def one(params, bias, batch):
        loss, parts, sums, grads = gradients(params, bias, batch, 0)
        return {"loss": loss, "parts": parts, "sums": sums, "grads": grads}

    found = []
    with jax.set_mesh(mesh):
        for padding in paddings:
            out = one(state.params, state.router_bias, put_batch(batch_rows(padding), mesh, cfg))
            if update:
                out["params"] = optimizer_step(mesh_shape)(state.params, state.opt_state, out["grads"])
            found.append(jax.device_get(out))
    return found


@functools.cache
def oracles(balance_batch: str, update: bool) -> dict[float, dict]:
    found = everything(run_config(balance_batch=balance_batch), (1, 1, 1), PADDING, update)
    return dict(zip(PADDING, found, strict=True))


def oracle(padding: float, balance_batch="8", update=True) -> dict:
    return oracles(balance_batch, update)[padding]


def assert_same(got: dict, want: dict) -> None:
    def same(path, a, b):
        # Relative to the largest entry of the leaf: rounding of a sum does not shrink with a single entry.
        scale = np.abs(b).max()
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * scale + 1e-9, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(same, got, want)


def check(mesh, micro, remat, compute, exchange, update=True):
    unroll = 2 if micro == 2 else 1  # both layers in one turn
    cfg = run_config(micro, remat, compute, exchange=exchange, unroll=unroll)
    for padding, got in zip(PADDING, everything(cfg, mesh, PADDING, update), strict=True):
        assert_same(got, oracle(padding, update=update))


@pytest.mark.parametrize(("mesh", "micro", "remat", "compute", "exchange"), FAST)
def test_invariance(mesh, micro, remat, compute, exchange):
    check(mesh, micro, remat, compute, exchange, update=False)


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "micro", "remat", "compute", "exchange"), PAIRS)
def test_invariance_full(mesh, micro, remat, compute, exchange):
    check(mesh, micro, remat, compute, exchange)


@pytest.mark.slow
@pytest.mark.parametrize("balance_batch", ["1", "global"])
def test_balance_scope_does_not_depend_on_mesh_or_micro_batches(balance_batch):
    """Per sequence, and the whole optimizer batch; a micro-batch of 8 sequences is neither."""
    (got,) = everything(run_config(4, "none", "grouped", balance_batch), (2, 2, 2), (0.25,))
    assert_same(got, oracle(0.25, balance_batch))


@pytest.mark.slow
def test_scopes_differ():
    """The same batch has another load-balancing loss in every scope: nothing above is equal by accident."""
    values = [oracle(0.25, scope)["parts"].router["load_balance"] for scope in ("1", "8", "global")]
    assert values[0] > 1.02 * values[1] > 1.02**2 * values[2]


@pytest.fixture(scope="module")
def router_gradient():
    """The router's gradient from the load-balancing loss alone: tokens weigh nothing, the z-loss is off."""
    mesh, state = initial_state((2, 2, 2))

    def of(lb_coef: float):
        cfg = run_config(2, "none", "grouped", lb_coef=lb_coef, z_coef=0.0)
        rows = batch_rows(0.25)
        with jax.set_mesh(mesh):
            batch = put_batch(rows | {"weights": np.zeros_like(rows["weights"])}, mesh, cfg)
            grads = jax.jit(make_gradients(cfg, mesh))(state.params, state.router_bias, batch, 0).grads
        return np.asarray(grads["layers"]["moe"]["w_router"])

    return of


@pytest.mark.slow
def test_load_balancing_gradient_reaches_every_router(router_gradient):
    grads = router_gradient(0.5)
    assert (np.abs(grads).max(axis=(1, 2)) > 1e-4).all()


@pytest.mark.slow
def test_coefficient_zero_is_exactly_zero(router_gradient):
    assert (router_gradient(0.0) == 0).all()


def test_dropping_the_group_dimension_is_another_loss():
    """Guards the guard: stats summed over groups give the global loss, which the matrix' G = 4 is not."""
    sums = oracle(0.25, update=False)["sums"]
    merged = sums._replace(router=jax.tree.map(lambda x: x.sum(1, keepdims=True), sums.router))
    cfg = run_config().loss
    value = jax.jit(lambda sums: losses.total_loss(sums, cfg)[1].router["load_balance"])
    parts = [value(s) for s in (sums, merged)]
    assert abs(parts[0] - parts[1]) > 1e-3
