"""Muon on meshes: the update of a float64 loop over matrices, by few collectives and none inside the iteration."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax import config, model, optim
from moe_jax.optim import muon, shares
from moe_jax.optim.plan import Plan, make_plan
from moe_jax.optim.spread import Matrices, layout
from moe_jax.parallel import sharding
from moe_jax.tree import path_of
from tests import two_processes
from tests.muon_reference import directions, error, gaussian

MESHES = [(1, 1, 1), (8, 1, 1), (2, 2, 2), (1, 2, 4)]
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}  # of the Frobenius norm of a leaf's update
EVERY = ("fsdp", "expert")
# Shape, placement (logical axes as the model declares them, or a spec), and which axes are matrices.
LEAVES = {
    "wide": ((24, 64), "embed mlp", Matrices()),
    "tall": ((64, 24), "embed mlp", Matrices()),
    "square": ((3, 64, 64), "layers heads embed", Matrices()),
    "experts": ((3, 8, 16, 40), "layers experts embed mlp", Matrices()),
    "experts_down": ((3, 8, 40, 16), "layers experts mlp embed", Matrices()),
    "router": ((3, 40, 8), "layers router_embed router_experts", Matrices()),  # every device does all three itself
    "few": ((6, 96, 160), "layers router_embed router_experts", Matrices()),  # two devices share them, if they can
    "enough": ((9, 40, 12), "layers router_embed router_experts", Matrices()),
    "both_cut": ((3, 16, 40), P(None, "fsdp", "expert"), Matrices()),
    "both_cut_transposed": ((3, 40, 16), P(None, "expert", "fsdp"), Matrices()),
    "all_cut": ((3, 64, 48), P(None, ("data", "fsdp"), "expert"), Matrices()),
    "reversed_axes": ((24, 64), P(None, ("expert", "fsdp")), Matrices()),
    "layers_cut": ((8, 16, 24), P(EVERY, None, None), Matrices()),
    "between": ((16, 3, 40), P("fsdp", None, None), Matrices(axes=(0, 2))),
    "outputs_first": ((3, 40, 16), P(None, "fsdp", None), Matrices(axes=(-1, -2))),
    "q_heads": ((3, 40, 64), "layers embed heads", Matrices(heads=(1, 16))),
    "o_heads": ((3, 64, 40), "layers heads embed", Matrices(heads=(0, 16))),
    "q_heads_cut": ((3, 40, 64), P(None, None, EVERY), Matrices(heads=(1, 16))),  # 16 columns a device, or half a head
    "o_heads_cut": ((3, 64, 40), P(None, EVERY, None), Matrices(heads=(0, 32))),  # half a head a device, or a quarter
}
IDLE_EXPERT = (1, 5)
# No gradient in the second step, while there is momentum: a leaf and a place in it, of experts and of heads.
DEAD = [("experts", np.s_[2, 3]), ("experts_down", np.s_[0, 7]), ("both_cut", np.s_[1]), ("few", np.s_[4]),
        ("between", np.s_[:, 1]), ("q_heads", np.s_[2, :, 16:32]), ("q_heads_cut", np.s_[0, :, 48:]),
        ("o_heads_cut", np.s_[1, 32:]), ("wide", np.s_[:])]  # fmt: skip
# Of these matrices and heads one device has no gradient in the second step, but another one has.
HALF_DEAD = [("square", np.s_[0, :, :16]), ("q_heads_cut", np.s_[1, :, 16:24]), ("o_heads_cut", np.s_[0, 32:48])]
rule = lambda path, leaf: LEAVES[path][2]


def gradients(step: int) -> dict[str, np.ndarray]:
    """Of sizes from 1e-20 to 1e20, each leaf and each expert another."""
    out = {name: gaussian(shape, 100 * step + i) for i, (name, (shape, _, _)) in enumerate(LEAVES.items())}
    for name, size in zip(LEAVES, np.logspace(-20, 20, len(LEAVES), dtype=np.float32), strict=True):
        out[name] *= size
    out["experts"] *= np.logspace(-20, 20, 8, dtype=np.float32)[:, None, None] / np.abs(out["experts"]).max()
    out["experts"][IDLE_EXPERT] = 0.0
    for name, place in [*DEAD, *HALF_DEAD] if step else ():
        out[name][place] = 0.0
    return out


@functools.cache
def expected() -> list[dict[str, np.ndarray]]:
    both = [gradients(0), gradients(1)]
    by_leaf = {name: directions([g[name] for g in both], where) for name, (_, _, where) in LEAVES.items()}
    return [{name: by_leaf[name][step] for name in LEAVES} for step in range(2)]


def shardings(mesh) -> dict[str, NamedSharding]:
    sizes = dict(mesh.shape)
    spec = lambda shape, where: (
        where if isinstance(where, P) else sharding.weight_spec(tuple(where.split()), shape, sizes)
    )
    return {name: NamedSharding(mesh, spec(shape, where)) for name, (shape, where, _) in LEAVES.items()}


def abstract(mesh) -> dict[str, jax.ShapeDtypeStruct]:
    where = shardings(mesh)
    return {name: jax.ShapeDtypeStruct(s, jnp.float32, sharding=where[name]) for name, (s, _, _) in LEAVES.items()}


def make_mesh(shape):
    return sharding.make_mesh(shape, jax.devices()[: math.prod(shape)])


def to_host(tree):
    if jax.process_count() > 1:
        tree = jax.jit(lambda t: jax.tree.map(lambda x: jax.sharding.reshard(x, P()), t))(tree)
    return jax.tree.map(lambda x: np.asarray(x.addressable_data(0)) if jax.process_count() > 1 else np.asarray(x), tree)


def check(mesh_shape, dtype) -> str:
    """Two steps, the second with momentum; updates and state lie as their parameters. Returns the program."""
    mesh = make_mesh(mesh_shape)
    tx = muon.scale_by_muon(dtype=jnp.dtype(dtype), matrices=rule)
    where = shardings(mesh)
    put = lambda x, to: jax.make_array_from_callback(x.shape, to, lambda index: x[index])
    with jax.set_mesh(mesh):
        grads = [jax.tree.map(put, gradients(step), where) for step in range(2)]
        state = tx.init(grads[0])
        update = jax.jit(tx.update).lower(grads[0], state).compile()
        for step, want in enumerate(expected()):
            got, state = update(grads[step], state)
            whole = to_host(got)
            for name in LEAVES:
                spec = grads[0][name].sharding.spec
                assert got[name].sharding.spec == state.momentum[name].sharding.spec == spec, name
                if want[name].any():
                    assert error(whole[name], want[name]) <= TOLERANCE[dtype], (name, error(whole[name], want[name]))
            assert not whole["experts"][IDLE_EXPERT].any()
            for name, place in DEAD:
                assert bool(whole[name][place].any()) == (step == 0), name
    return update.as_text()


@pytest.mark.parametrize("mesh", [pytest.param(m, marks=[] if m == (2, 2, 2) else pytest.mark.slow) for m in MESHES])
def test_update_is_that_of_a_loop_over_matrices(mesh):
    text = check(mesh, "float32")
    if mesh != (1, 1, 1):
        tree = abstract(make_mesh(mesh))
        groups = layout(tree, rule)
        assert sum(len(group.leaves) for group in groups) == len(LEAVES) > len(groups)
        check_program(text, groups, make_plan(tree, rule, dtype=jnp.float32))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_update_in_bfloat16(mesh):
    check(mesh, "bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_update_in_float16(mesh, monkeypatch):
    """Matrices are scaled before they move, each by one power of two on all devices. As if batches and bytes cost
    nothing, devices get different numbers of matrices: of one group, other devices in one row than in the next."""
    share_all_out(monkeypatch.setattr)
    text, tree = check(mesh, "float16"), abstract(make_mesh(mesh))
    if mesh != (1, 1, 1):
        groups, plan = layout(tree, rule, 5, jnp.float16), make_plan(tree, rule, dtype="float16")
        check_program(text, groups, plan)
        assert sum(g.shares is not None and g.fewest < g.per_device for g in groups) >= 2
        rows = [np.unique(g.shares.held, axis=0) for g in groups if g.shares]
        assert any(len(row) > 1 for row in rows) == (mesh == (2, 2, 2))


def share_all_out(set_to=setattr) -> None:
    set_to(shares, "FLOPS_PER_BYTE_TO_EVEN_OUT", 0)
    set_to(shares, "PARTS", 10**9)


WORKER = """
from tests import test_muon_mesh as t
t.check((2, 2, 2), "float32")
t.check((1, 2, 4), "float32")
t.check((8, 1, 1), "bfloat16")
t.share_all_out()
t.check((2, 2, 2), "float16")
t.check((1, 2, 4), "float16")
"""


@pytest.mark.slow
def test_two_processes():
    two_processes.run(WORKER)


# --- elsewhere -------------------------------------------------------------------------------------------------------

OUTSIDE = {"w": (3, 16, 40)}
stack = muon.scale_by_muon(dtype=jnp.float32, matrices=lambda path, leaf: Matrices())


@functools.cache
def outside() -> tuple[np.ndarray, np.ndarray]:
    g = gaussian(OUTSIDE["w"], 7)
    return g, directions([g], Matrices())[0]


def test_without_a_mesh_in_use():
    """The arrays' own sharding is enough, without `jax.set_mesh`."""
    g, want = outside()
    put = jax.device_put(g, NamedSharding(make_mesh((2, 2, 2)), P(None, "fsdp", "expert")))
    for x in (jnp.asarray(g), put):
        got, _ = jax.jit(stack.update)(x, stack.init(x))
        assert error(got, want) < 1e-5
        assert got.sharding == x.sharding


@pytest.mark.parametrize("kinds", [(AxisType.Auto, AxisType.Auto), (AxisType.Auto, AxisType.Explicit)])
def test_auto_axes(kinds):
    """Right, though the partitioner decides what moves."""
    g, want = outside()
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=kinds)
    x = jax.device_put(g, NamedSharding(mesh, P(None, "a", "b")))
    with jax.set_mesh(mesh):
        got, _ = jax.jit(stack.update)(x, stack.init(x))
    assert error(got, want) < 1e-5


def test_inside_shard_map():
    """Every device has its own whole matrices and updates those."""
    g = np.stack([outside()[0]] * 8)
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x = jax.device_put(g, NamedSharding(mesh, P("a")))
        got = jax.jit(jax.shard_map(lambda x: stack.update(x, stack.init(x))[0], out_specs=P("a")))(x)
    assert error(np.asarray(got)[3], outside()[1]) < 1e-5


# --- the compiled program --------------------------------------------------------------------------------------------

COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")
SHAPE = re.compile(r"\w+\[([\d,]*)\]")


def collectives(text: str) -> tuple[list[tuple[str, int]], list[str]]:
    """(kind, elements of the result) of each collective of the entry computation, and those of all others."""
    entry, elsewhere, inside = [], [], False
    for line in text.splitlines():
        if line.endswith("{"):
            inside = line.startswith("ENTRY")
        found = COLLECTIVE.search(line)
        if found and inside:
            shapes = SHAPE.findall(found[1])
            entry.append((found[2], sum(math.prod(int(n) for n in dims.split(",") if n) for dims in shapes)))
        elif found:
            elsewhere.append(line)
    return entry, elsewhere


def check_program(text: str, groups, plan: Plan) -> None:
    """At most one all-to-all in, one out and one all-gather a group, all outside the iteration, of the plan's bytes.

    And for cut matrices an all-reduce of a number each: whether it has a gradient. Of heads that are cut, a number for
    each row or column. In float16 the size of the largest entry is another number. XLA joins those over the same
    devices.
    """
    entry, elsewhere = collectives(text)
    assert not elsewhere and " while(" in text  # a loop is another computation
    cut = [math.prod(group.parts) for group in groups]
    count = lambda kind: sum(k == kind for k, _ in entry)
    assert count("all-to-all") == 2 * sum(parts > 1 for parts in cut)
    assert count("all-gather") == sum(group.replicas > 1 for group in groups)
    assert count("all-reduce") <= sum(parts > 1 for parts in cut)
    assert len(entry) == count("all-to-all") + count("all-gather") + count("all-reduce")
    long = lambda leaf: leaf.whole[leaf.heads_after[0]] if leaf.heads_after else 1
    numbers = sum(leaf.pieces * long(leaf) for g in groups if math.prod(g.parts) > 1 for leaf in g.leaves)
    numbers *= 2 if plan.dtype == "float16" else 1
    assert sum(n for k, n in entry if k == "all-reduce") == numbers
    # Elements, as the CPU back end widens bf16. A device keeps 1/parts of an all-to-all, 1/replicas of an all-gather.
    exchanged = sum(2 * g.per_device * math.prod(g.shape) for g in groups if math.prod(g.parts) > 1)
    gathered = sum(g.per_device * math.prod(g.shape) * g.replicas for g in groups if g.replicas > 1)
    assert sum(n for k, n in entry if k == "all-to-all") == exchanged
    assert sum(n for k, n in entry if k == "all-gather") == gathered
    sent = sum(2 * g.per_device * math.prod(g.shape) * (p - 1) // p for g, p in zip(groups, cut, strict=True))
    sent += sum(g.per_device * math.prod(g.shape) * (g.replicas - 1) for g in groups)
    assert plan.bytes == jnp.dtype(plan.dtype).itemsize * sent


def model_config(**optimizer) -> config.RunConfig:
    c = config.default_config()
    c.model.update(vocab_size=512, d_model=64, num_layers=8, num_heads=4, num_kv_heads=2, head_dim=16, qk_norm=True)
    c.model.moe.update(num_experts=8, top_k=2, d_expert=32, num_shared_experts=1)
    c.optim.update(clip_norm=0.0, **optimizer)  # without the all-reduce of the gradients' norm
    return config.build(c)


@pytest.mark.parametrize(
    "shape", [(2, 2, 2), *(pytest.param(m, marks=pytest.mark.slow) for m in ((8, 1, 1), (1, 2, 4)))]
)
def test_a_whole_model(shape, capfd):
    """With AdamW's part. Traffic ≤ 1.25 of AdamW's, half of its state, nothing rematerialised by the partitioner."""
    cfg, mesh = model_config(newton_schulz_dtype="float16"), make_mesh(shape)
    graph, sizes = model.abstract(cfg.model), dict(mesh.shape)
    to = lambda x, axes: NamedSharding(mesh, sharding.weight_spec(axes, x.shape, sizes))
    params = jax.tree.map(
        lambda x, axes: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to(x, axes)), graph.shapes, graph.axes
    )
    tx = optim.make_optimizer(cfg.optim, 10)
    with jax.set_mesh(mesh):
        state = jax.eval_shape(tx.init, params)
        lowered = jax.jit(tx.update).lower(params, state, params)
    assert not re.search(r"all_to_all.*xf32|all_gather.*xf32", lowered.as_text())  # 16 bits on the wire
    text = lowered.compile().as_text()
    assert "rematerialization" not in capfd.readouterr().err
    plan = optim.muon_plan(cfg.optim, graph, sizes)
    matrix = optim.matrices_of(cfg.optim)
    mine = {}
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        if "/w_" in path_of(path):
            mine[path_of(path)] = x
    groups = layout(mine, matrix, 5, jnp.float16)
    check_program(text, groups, plan)
    for row in plan.rows:  # spread over all devices: no matrix twice
        assert row.per_device == -(-row.matrices // 8) and row.padding == 1 - row.matrices / (8 * row.per_device)
    assert plan.ratio <= 1.25
    # The states, from the shardings that the optimizer's own init gives them.
    local = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    on_device = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, x.sharding.spec))
    held = sum(local(on_device(x)) for x in jax.tree.leaves(state) if x.ndim)
    assert held == plan.state_bytes
    matrices = sum(local(x) for x in mine.values())
    assert plan.adamw_state_bytes - plan.state_bytes == matrices


def test_plan_of_whole_experts():
    """[4, 8, 64, 128], experts over 4 × 2 devices, 2 replicas: they do not move for Muon, and fsdp gathers them."""
    mesh = jax.sharding.AbstractMesh((2, 2, 4), sharding.AXES, axis_types=(AxisType.Explicit,) * 3)
    spec = sharding.weight_spec(("layers", "experts", "embed", "mlp"), (4, 8, 64, 128), dict(mesh.shape))
    assert spec == P(None, ("expert", "fsdp"), None, None)
    up = jax.ShapeDtypeStruct((4, 8, 64, 128), jnp.float32, sharding=NamedSharding(mesh, spec))
    plan = make_plan({"up": up}, lambda path, leaf: Matrices(), in_place=("expert",))
    (row,) = plan.rows
    assert (row.matrices, row.per_device, row.padding, row.bytes_in, row.bytes_out) == (32, 2, 0.0, 0, 0)
    assert plan.adamw_bytes == 4 * 64 * 128 * (8 * 1 + 8 / 2)  # a device's 4 matrices: fsdp, and all-reduce over data


def test_plan_by_hand():
    """[4, 8, 64, 128], experts over 4 devices, rows over 2, and 2 replicas; a leaf of AdamW's; a router."""
    mesh = jax.sharding.AbstractMesh((2, 2, 4), sharding.AXES, axis_types=(AxisType.Explicit,) * 3)
    leaf = lambda shape, *spec: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))
    params = {
        "embed": leaf((512, 64), EVERY),
        "router": leaf((3, 64, 8)),
        "down": leaf((4, 8, 128, 64), None, "expert", None, "fsdp"),
        "up": leaf((4, 8, 64, 128), None, "expert", "fsdp"),
    }
    rule = lambda path, leaf: None if path == "embed" else Matrices()
    plan = make_plan(params, rule, in_place=("expert",), dtype="bfloat16")
    assert plan.devices == 16 and [row.leaves for row in plan.rows] == [("down", "up"), ("router",)]
    up, router = plan.rows
    assert (up.matrices, up.shape, up.per_device, up.padding) == (64, (64, 128), 4, 0.0)
    assert up.flops == 4 * 5 * (4 * 64 * 64 * 128 + 2 * 64**3)
    assert up.bytes_in == up.bytes_out == 4 * 64 * 128 * 2 / 2
    assert up.bytes_gather == 4 * 64 * 128 * 2  # what the other replica computed, as shards
    assert (router.matrices, router.per_device, router.padding) == (3, 3, 15 / 16)  # every device does them all
    assert (router.bytes_in, router.bytes_gather) == (0, 0)
    shard = 64 * 64 * 128 / 8
    embed = 512 * 64 / 8
    assert plan.adamw_bytes == (
        shard * (8 * 1 + 8 / 2)  # reduce-scatter and gather over fsdp, all-reduce over data
        + embed * (8 * 7 + 8 / 2)
        + 3 * 64 * 8 * 8 * 15 / 16
    )
    assert plan.state_bytes == 4 * (shard + 2 * embed + 3 * 64 * 8)
    assert plan.adamw_state_bytes == 8 * (shard + embed + 3 * 64 * 8)
    text = str(plan)
    assert f"{plan.ratio:.2f} of AdamW's" in text and "64×128" in text and "93.8%" in text


@pytest.mark.parametrize(
    ("shape", "spec", "axes", "per_device"),
    [
        ((42, 4096, 160), (), ("expert",), 6),  # less of the work than 1 % repeated, a sixth of the bytes
        ((42, 4096, 16), (), (), 42),  # cheaper to do than to gather
        ((256, 4096, 16), (), EVERY, 1),  # a matrix for every device: no work is repeated
        ((42, 4096, 4096), (), ("fsdp",), 2),
        ((1, 4096, 4096), (), (), 1),  # nothing to share
        ((84, 4096, 8192), (None, "fsdp"), ("expert",), 1),
        ((30, 4096, 8192), (None, "fsdp"), (), 1),  # 32 devices are enough, and nothing needs to be gathered
    ],
)
def test_who_shares_the_work(shape, spec, axes, per_device):
    """32 × 8 devices. Fewer matrices than devices are shared by those that take least, FLOPs and bytes together."""
    mesh = jax.sharding.AbstractMesh((1, 32, 8), sharding.AXES, axis_types=(AxisType.Explicit,) * 3)
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))
    (group,) = layout({"w": x}, lambda path, leaf: Matrices())
    assert (group.sharing, group.per_device) == (axes, per_device)
    assert group.replicas == math.prod(dict(mesh.shape)[name] for name in axes)
