"""Every router loss in every scope, value and gradient, equals a float64 NumPy reference on the whole batch.

Whatever computes it: meshes × micro-batches × rematerialisation × padding, one process or two. Weights of zero switch
cross-entropy off, so the gradient is the router losses' own, through router, attention and embedding.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import config
from moe_jax.parallel import sharding
from moe_jax.train.gradients import _random_groups, make_gradients
from moe_jax.train.state import abstract_state, init_state, process_rows, put_batch
from tests import balance_reference as reference
from tests import two_processes
from tests.pairs import covering

B, S, V, E, K, HEAD = 64, 5, 11, 4, 2, 4
SCOPES = {"load_balance": "global", "load_balance/eight": "8", "load_balance/each": "1"}
ALONE, *OTHERS = SCOPES
OVER = {"load_balance/pairs": 2}  # groups of experts
ROWS = (*SCOPES, "load_balance/pairs", "mutual_information/apart", "label_information/labels", "router_z")
SCOPES |= {"load_balance/pairs": "8", "mutual_information/apart": "16", "label_information/labels": "global"}
COEFS = {"load_balance": 0.7, "load_balance/eight": 0.9, "load_balance/each": 1.1, "load_balance/pairs": 1.3,
         "mutual_information/apart": 0.8, "label_information/labels": 0.6, "router_z": 0.05}  # fmt: skip
MESHES = [(1, 1, 1), (8, 1, 1), (2, 2, 2), (1, 2, 4)]
EVERYTHING = list(itertools.product(MESHES, [1, 2, 4, 8], ["none", "full"]))
FAST = [((2, 2, 2), 2, "full")]
LEAVES = ("embed", "layers/attention/w_k", "layers/attention/w_o", "layers/attention/w_q", "layers/attention/w_v",
          "layers/attention_norm", "layers/mlp_norm", "layers/moe/w_router")  # fmt: skip


def run_config(micro=1, remat="none", accumulation="exact", rows=ROWS, shuffle=False) -> config.RunConfig:
    c = config.default_config()
    c.model.update(vocab_size=V, d_model=6, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=HEAD,
                   compute_dtype="float32", remat=remat, init_std=0.6)  # fmt: skip
    c.model.moe.update(num_experts=E, top_k=K, d_expert=4)
    first, *more = rows
    c.loss.update(load_balance_coef=COEFS[first], balance_batch=SCOPES[first], router_z_coef=0.0)
    c.loss.update(accumulation=accumulation, shuffle_tokens=shuffle)
    if "router_z" in more:
        c.loss.router_z_coef = COEFS[more.pop(more.index("router_z"))]
    entry = lambda kind, name: config.router_loss(
        kind=kind, coef=COEFS[name], balance_batch=SCOPES[name], over=OVER.get(name, 0)
    )
    c.loss.more = {name.split("/")[1]: entry(name.split("/")[0], name) for name in more}
    c.data.update(batch_size=B, seq_len=S)
    c.data.labels = {"b": 1, "c": 2} if "labels" in c.loss.more else {}
    c.data.tokenizer.update(kind="huggingface", path="none")
    c.train.micro_batches = micro
    return config.build(c)


def batch_rows(padding: bool) -> dict[str, np.ndarray]:
    """Sequences of unlike vocabulary. Padding: 25 % of the tokens, among them four whole sequences."""
    rng = np.random.default_rng(3)
    tokens = (rng.integers(0, V - 4, (B, 1)) + rng.integers(0, 4, (B, S))).astype(np.int32)
    segments = np.ones((B, S), np.int32)
    if padding:
        segments[5::16] = 0
        segments[7::8, 1:] = 0
        segments[2::4, 3:] = 0
        assert (segments == 0).mean() == 84 / 320
    return {
        "tokens": tokens,
        "targets": tokens,
        "weights": np.zeros((B, S), np.float32),
        "segment_ids": segments,
        "positions": np.tile(np.arange(S, dtype=np.int32), (B, 1)),
        "sequence_ids": np.arange(B, dtype=np.int32),
        "label": (np.arange(B)[:, None] // 2 % 3 * (np.arange(S)[None, :] < 4)).astype(np.int32),
    }


def flatten(tree) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(str(k.key) for k in path): np.asarray(leaf) for path, leaf in leaves}


@functools.cache
def initial_params():
    mesh = sharding.make_mesh((1, 1, 1), jax.local_devices()[:1])
    return jax.device_get(init_state(run_config(), mesh).params)


@functools.cache
def expected(padding: bool, names: tuple[str, ...], micro_batches: int = 0) -> tuple[dict, dict]:
    """Each term's value with its coefficient, and the gradients of their sum; `micro_batches`: of Algorithm 1."""
    rows = batch_rows(padding)
    params = {name: leaf.astype(np.float64) for name, leaf in flatten(initial_params()).items() if name in LEAVES}
    assert len(params) == len(LEAVES)
    counted = rows["segment_ids"] > 0
    inputs = (rows["tokens"], rows["positions"], rows["segment_ids"], HEAD)
    prob_of = lambda p: reference.router_probabilities(p, *inputs)
    chosen = reference.choices(prob_of(params), K)

    def value(name, p, prob):
        size = B if SCOPES.get(name) in ("global", None) else int(SCOPES[name])
        if name == "router_z":
            return reference.router_z(reference.router_logits(p, *inputs), counted)
        if name.startswith("mutual_information"):
            return reference.mutual_information(prob, counted, size)
        if name.startswith("label_information"):
            return reference.label_information(prob, counted, rows["label"])
        groups = OVER.get(name, E)
        of = (reference.in_groups(x, groups) for x in (prob, chosen))
        return reference.loss_of_scope(*of, counted, size)

    def terms(p):
        prob = prob_of(p)
        if micro_batches:
            return {"load_balance": COEFS["load_balance"] * reference.algorithm_1(prob, chosen, counted, micro_batches)}
        return {name: COEFS[name] * value(name, p, prob) for name in names}

    return terms(params), reference.gradients(lambda p: sum(terms(p).values()), params)


@functools.cache
def compiled(mesh_shape, cfg_arguments):
    """The mesh, parameters on it, and the jitted gradients: the one of training steps."""
    return programs(mesh_shape, run_config(*cfg_arguments))


def programs(mesh_shape, cfg: config.RunConfig):
    """As `compiled`, of a configuration."""
    mesh = sharding.make_mesh(mesh_shape, jax.devices()[: int(np.prod(mesh_shape))])
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(cfg, mesh).params)
    put = lambda x, to: jax.make_array_from_callback(x.shape, to, lambda index: x[index])
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    gradients = make_gradients(cfg, mesh)

    @jax.jit
    def run(params, batch):
        found = gradients(params, {}, batch, 0)
        return found.parts, jax.tree.map(lambda g: jax.sharding.reshard(g, replicated.spec), found.grads)

    return cfg, mesh, jax.tree.map(put, initial_params(), shardings), run


def check(mesh_shape, cfg_arguments, padding: bool, want: tuple[dict, dict]) -> None:
    compare(mesh_shape, compiled(mesh_shape, cfg_arguments), padding, want)


def compare(mesh_shape, program: tuple, padding: bool, want: tuple[dict, dict]) -> None:
    """program: of `programs`. want: the terms of the loss that are not 0, and the gradients of their sum."""
    cfg, mesh, params, run = program
    rows = batch_rows(padding)
    mine = process_rows(mesh, B)
    with jax.set_mesh(mesh):
        parts, grads = run(params, put_batch({k: v[mine] for k, v in rows.items()}, mesh, cfg))
    values, want_grads = want
    assert set(values) <= set(parts.scalars())
    for name, value in ((name, values.get(name, 0.0)) for name in parts.scalars()):
        np.testing.assert_allclose(parts.scalars()[name], value, rtol=1e-6, atol=5e-7, err_msg=name)
    largest = max(np.abs(g).max() for g in want_grads.values())
    for name, grad in flatten(jax.tree.map(lambda g: g.addressable_data(0), grads)).items():
        if name in LEAVES:
            scale = np.abs(want_grads[name]).max()
            assert scale > 1e-4, name
            # Of the model's largest gradient entry, and of the leaf's own: some leaves are sums that cancel.
            np.testing.assert_allclose(grad, want_grads[name], rtol=0, atol=1e-6 * largest, err_msg=name)
            np.testing.assert_allclose(grad, want_grads[name], rtol=0, atol=3e-6 * scale, err_msg=name)
        else:  # experts, output, last norm: not in this loss
            assert not grad.any(), name


def check_all(mesh_shape, micro, remat) -> None:
    for padding in (False, True):
        check(mesh_shape, (micro, remat), padding, expected(padding, ROWS))


@pytest.mark.parametrize(("mesh", "micro", "remat"), FAST)
def test_every_loss(mesh, micro, remat):
    check_all(mesh, micro, remat)


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "micro", "remat"), covering(EVERYTHING, FAST))
def test_every_loss_full(mesh, micro, remat):
    check_all(mesh, micro, remat)


@pytest.mark.slow
@pytest.mark.parametrize("name", [ALONE, *OTHERS])
def test_one_scope_alone(name):
    """Without the finer groups that several scopes share."""
    values, grads = expected(True, (name,))
    check((2, 2, 2), (4, "none", "exact", (name,)), True, ({"load_balance": values[name]}, grads))


@pytest.mark.parametrize(
    ("mesh", "micro", "padding"),
    [
        pytest.param((1, 1, 1), 8, True, marks=pytest.mark.slow),
        pytest.param((2, 2, 2), 4, False, marks=pytest.mark.slow),
        pytest.param((8, 1, 1), 2, True, marks=pytest.mark.slow),
        pytest.param((1, 2, 4), 1, False, marks=pytest.mark.slow),
    ],
)
def test_running_is_algorithm_1(mesh, micro, padding):
    want = expected(padding, ("load_balance",), micro)
    check(mesh, (micro, "none", "running", ("load_balance",)), padding, want)
    exact = expected(padding, ("load_balance",))[0]["load_balance"]
    assert (abs(want[0]["load_balance"] / exact - 1) > 1e-4) == (micro > 1)  # an approximation, seen as one


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "micro"), [((1, 1, 1), 1), ((2, 2, 2), 4)])
def test_shuffled_tokens(mesh, micro):
    """Every group gets as many random tokens as 8 sequences have, others at each step, whatever computes them."""
    arguments = (micro, "none", "exact", ("load_balance/eight",), True)
    cfg, device_mesh, _, _ = compiled(mesh, arguments)
    with jax.set_mesh(device_mesh):
        groups = [np.asarray(_random_groups(cfg, (B, S), jnp.int32(n))) for n in (0, 1)]
    assert (groups[0] != groups[1]).mean() > 0.5
    assert all((np.bincount(g.ravel()) == 8 * S).all() for g in groups)
    rows = batch_rows(True)
    params = {name: leaf.astype(np.float64) for name, leaf in flatten(initial_params()).items() if name in LEAVES}
    counted = rows["segment_ids"] > 0

    def loss(p):
        prob = reference.router_probabilities(p, rows["tokens"], rows["positions"], rows["segment_ids"], HEAD)
        chosen = reference.choices(prob, K)
        flat = lambda x: np.stack([x[groups[0] == g] for g in range(B // 8)])  # [groups, tokens of a group, …]
        return COEFS["load_balance/eight"] * reference.loss_of_scope(flat(prob), flat(chosen), flat(counted), 1)

    check(mesh, arguments, True, ({"load_balance": loss(params)}, reference.gradients(loss, params)))


def test_scopes_differ():
    """The narrower the scope, the higher the loss of the same batch: nothing above is equal by accident."""
    values = [expected(True, ROWS)[0][n] / COEFS[n] for n in (ALONE, *OTHERS)]
    assert values[0] > 1.0 and values[1] > 1.02 * values[0] and values[2] > 1.02 * values[1]


WORKER = """
from tests import test_balance_exact as t
for mesh, micro in (((8, 1, 1), 8), ((2, 2, 2), 2), ((1, 2, 4), 4)):
    t.check_all(mesh, micro, "none")
"""


@pytest.mark.slow
def test_two_processes():
    two_processes.run(WORKER)
