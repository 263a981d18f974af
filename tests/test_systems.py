"""Every file of configs/systems: what its docstring promises, that it traces on a mesh, a step, and its exact oracle.

The folder is the list: a new file is tested as soon as it is there. Its own oracle comes below, unless another test has
it.
"""

import dataclasses
import functools
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_resume
import two_processes
from test_model import forward, init, inputs_of, plain_attention, plain_glu, plain_norm, under_mesh
from test_resume import write_text

from moe_jax import config, model, upcycle
from moe_jax.config import ModelConfig, RunConfig
from moe_jax.config.layers import Place
from moe_jax.errors import FormatError
from moe_jax.hf.architectures import write_config
from moe_jax.moe.stats import by_depth
from moe_jax.parallel import sharding
from moe_jax.run import checkpoint, config_file, weights
from moe_jax.train import metrics, step
from moe_jax.train.state import abstract_batch, abstract_state, abstract_weights, init_state, process_rows, put_batch
from moe_jax.tree import flatten
from moe_jax.upcycle import Cluster, Depth, Drop, Transform, VirtualGroups, Width

REPO = Path(__file__).parents[1]
NAMES = sorted(path.stem for path in (REPO / "configs" / "systems").glob("*.py"))
SOURCE = "base"  # the dense model that upcycling starts from
# What the first command of an upcycled system does to it.
CHAINS: dict[str, list[Transform]] = {
    "aquila": [Depth(6), Width(256, 512, 4), VirtualGroups(8, 1, 2)],
    "drop_upcycling": [VirtualGroups(8, 1, 2), Drop(0.5)],
    "emoe": [Cluster(16, 4, dense_layers=2)],
    "llama3_meets_moe": [VirtualGroups(8, 1, 2)],
}
MESH = (2, 2, 2)
TRAIN = r"^    (python train\.py --config=configs/systems/(\w+)\.py(?: --config\.init_from=(\S+))? --workdir=(\S+))$"
UPCYCLE = r"^    python -m moe_jax\.upcycle --from=(\S+) --workdir=(\S+) (.+)$"


@functools.cache
def load(name: str) -> tuple[str, RunConfig]:
    """The docstring and the built config."""
    module = importlib.import_module(f"configs.systems.{name}")
    return module.__doc__, config.build(module.get_config())


def toy(name: str) -> RunConfig:
    """The system on little text of a small vocabulary."""
    cfg = load(name)[1]
    small = dataclasses.replace(cfg.model, vocab_size=512)
    data = dataclasses.replace(cfg.data, batch_size=8, seq_len=16, tokenizer=config.TokenizerConfig())
    return dataclasses.replace(cfg, model=small, data=data)


@functools.cache
def mesh_of(*shape):
    return sharding.make_mesh(shape, jax.devices()[: int(np.prod(shape))])


def batch_rows(cfg: RunConfig) -> dict[str, np.ndarray]:
    """Random tokens, each sequence one document."""
    b, s = cfg.data.batch_size, cfg.data.seq_len
    tokens = np.random.default_rng(0).integers(0, cfg.model.vocab_size, (b, s + 1)).astype(np.int32)
    ones, positions = np.ones((b, s), np.int32), np.tile(np.arange(s, dtype=np.int32), (b, 1))
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": ones.astype(np.float32),
            "segment_ids": ones, "positions": positions, "sequence_ids": np.arange(b, dtype=np.int32)}  # fmt: skip


# --- every file ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_docstring(name):
    """One command that trains, before it one that upcycles where weights are needed; the paper; true counts."""
    doc, cfg = load(name)
    ((_, file, init_from, workdir),) = re.findall(TRAIN, doc, re.MULTILINE)
    assert file == name and bool(init_from) == (name in CHAINS)
    made = re.findall(UPCYCLE, doc, re.MULTILINE)
    assert [(start, folder) for start, folder, _ in made] == ([("runs/dense", init_from)] if init_from else [])
    counts = model.count_parameters(cfg.model)
    assert f"\nParameters: {counts.total:,} total, {counts.active:,} active\n" in doc
    if name == SOURCE:
        assert workdir == "runs/dense"
        return
    for key in ("Paper: .*\\barXiv:\\d{4}\\.\\d{5}$", "Exact: ", "Not reproduced: "):
        assert len(re.findall(f"^{key}", doc.replace("\n    ", " "), re.MULTILINE)) == 1, key
    assert all((REPO / file).is_file() for file in re.findall(r"tests/\w+\.py", doc))
    assert f"configs/systems/{name}.py" in (REPO / "docs" / "systems.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_traced_on_a_mesh(name):
    cfg, mesh = toy(name), mesh_of(*MESH)
    state = abstract_state(cfg, mesh)
    with jax.set_mesh(mesh):
        new, report = jax.eval_shape(step.make_train_step(cfg, mesh).__wrapped__, state, abstract_batch(cfg, mesh))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    experts = {place.path: place.kind.experts for place in cfg.model.places if place.kind.experts}
    assert {path: sums.tokens_per_expert.shape[-1] for path, sums in report.router.items()} == experts


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_step(name):
    """Changes every parameter, routes every token, and ends with finite numbers."""
    cfg, mesh = toy(name), mesh_of(*MESH)
    state = init_state(cfg, mesh)
    before = jax.device_get(state.params)
    after, report = step.make_train_step(cfg, mesh)(state, put_batch(batch_rows(cfg), mesh, cfg))
    assert np.isfinite(report.loss) and report.grad_norm > 0
    for path, sums in report.router.items():
        np.testing.assert_allclose(np.sum(sums.tokens_per_expert, (1, 2)), cfg.model.moe.top_k * 8 * 16, err_msg=path)
        assert not np.any(sums.dropped)
    for path, w in flatten(jax.device_get(after.params)).items():
        assert np.isfinite(w).all() and (w != flatten(before)[path]).any(), path


# --- upcycled systems ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHAINS)
def test_the_model_is_the_one_that_the_command_makes(name):
    """The same function of the same weights, so that `config.init_from` takes them."""
    made = upcycle.final_config(CHAINS[name], load(SOURCE)[1].model)
    assert config.plain(load(name)[1].model) == config.plain(made)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with the weights of the dense model, as its command would leave them."""
    folder = tmp_path_factory.mktemp("runs")
    cfg = toy(SOURCE)
    params, _ = init(cfg.model)
    weights.save_weights(folder / "dense", cfg, params, {}, [], {})
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAINS)
def test_the_upcycling_command(name, runs):
    """It is the chain above, and the training command takes what it makes. Nothing but copies is the dense function."""
    ((start, folder, options),) = re.findall(UPCYCLE, load(name)[0], re.MULTILINE)
    made = runs / Path(folder).name
    command = [sys.executable, "-m", "moe_jax.upcycle", f"--from={runs / Path(start).name}", f"--workdir={made}"]
    ran = subprocess.run([*command, *options.split()], cwd=REPO, capture_output=True, encoding="utf-8", check=False)
    assert ran.returncode == 0, ran.stderr
    cfg = config_file.load_config(made)
    assert config.plain(cfg.model) == config.plain(toy(name).model)
    assert weights.check_same_model(dataclasses.replace(toy(name), init_from=str(made))) == []
    with jax.set_mesh(mesh_of(1, 1, 1)):
        *_, origin = weights.load_weights(made, *abstract_weights(cfg.model, mesh_of(1, 1, 1)))
    assert origin[-1]["chain"] == json.loads(json.dumps(upcycle.describe(CHAINS[name])))
    error = float(re.search(r"relative error of the logits on random tokens: (\S+)", ran.stdout)[1])
    exact = name == "llama3_meets_moe"
    assert (error < 1e-5) == exact == ("function: the same as that of the dense model" in ran.stdout)


# --- exact oracles ---------------------------------------------------------------------------------------------------


def experts_by_depth(name: str) -> list[int]:
    return [place.kind.experts for place in load(name)[1].model.places]


def test_efficient_lm_has_experts_in_every_second_layer():
    assert experts_by_depth("efficient_lm") == [0, 8, 0, 8]
    shapes = flatten(model.abstract(load("efficient_lm")[1].model).shapes)
    assert shapes["layers/block_0/mlp/w_up"].shape == (2, 128, 256)
    assert shapes["layers/block_1/moe/w_up"].shape == (2, 8, 128, 256)
    assert not [path for path in shapes if path.startswith(("layers/block_0/moe", "layers/block_1/mlp/"))]


def test_pr_moe_is_a_pyramid():
    """Both banks by hand: experts, a router column each, and the shared expert."""
    cfg = load("pr_moe")[1].model
    assert experts_by_depth("pr_moe") == [0, 8, 0, 8, 0, 16, 0, 16]
    assert [place for place in cfg.places if place.kind.experts == 16] == [
        Place("layers_2/block_1", i, cfg.places[-1].kind) for i in (0, 1)
    ]
    shapes = flatten(model.abstract(cfg).shapes)
    glu = 3 * 128 * 256
    for stack, experts in (("layers", 8), ("layers_2", 16)):
        bank = sum(x.size for path, x in shapes.items() if path.startswith(f"{stack}/block_1/moe/"))
        assert bank == 2 * (experts * (glu + 128) + glu)
    counts, idle = model.count_parameters(cfg), 2 * (7 + 15) * glu
    assert counts.total - counts.active == idle


@pytest.mark.slow
def test_longcat_is_the_report_s_loop():
    """The equations of a pair of blocks, in float32: two attentions, two dense layers, and the experts between them."""
    cfg = dataclasses.replace(toy("longcat").model, init_std=0.3)
    params, bias = init(cfg)
    bias = jax.tree.map(lambda b: jnp.linspace(-0.1, 0.1, b.size, dtype=b.dtype).reshape(b.shape), bias)
    tokens = np.random.default_rng(0).integers(0, 512, (2, 8))
    inputs = inputs_of(tokens, segments=np.ones((2, 8), np.int32))
    hidden, stats = under_mesh(functools.partial(forward, cfg))(params, bias, inputs)

    def experts(w, b, u):
        scores = jax.nn.softmax(u @ w["w_router"])
        ranked = scores + jnp.broadcast_to(b, scores.shape)
        c = jnp.where(ranked >= jnp.sort(ranked, -1)[..., -4][..., None], scores, 0)
        each = jax.vmap(plain_glu, (0, None))({n: w[n] for n in ("w_gate", "w_up", "w_down")}, u)
        return jnp.einsum("bse,ebsd->bsd", c, each), jnp.sum(c > 0, (0, 1))

    @jax.jit
    def loop(params, bias, inputs):
        x, loads = params["embed"][inputs.tokens], []
        for i in range(2):
            a, b = (jax.tree.map(lambda w, i=i: w[i], params["layers"][f"block_{n}"]) for n in (0, 1))
            h = x + plain_attention(cfg, a["attention"], plain_norm(x, a["attention_norm"]), inputs)
            u = plain_norm(h, a["mlp_norm"])
            m, load = experts(a["moe"], bias["layers"]["block_0"]["moe"]["router_bias"][i], u)
            h = h + plain_glu(a["mlp"], u)
            h = h + plain_attention(cfg, b["attention"], plain_norm(h, b["attention_norm"]), inputs)
            v = plain_norm(h, b["mlp_norm"])
            x, loads = h + plain_glu(b["mlp"], v) + m, [*loads, load]
        return plain_norm(x, params["final_norm"]), jnp.stack(loads)

    want, loads = loop(*jax.tree.map(jnp.asarray, jax.device_get((params, bias, inputs))))  # which knows of no mesh
    np.testing.assert_allclose(hidden, want, rtol=1e-4, atol=1e-4)
    (found,) = stats.values()
    np.testing.assert_array_equal(found.tokens_per_expert[:, 0], loads)


@pytest.mark.slow
def test_quantile_makes_loads_equal():
    """On one batch again and again, of weights that do not move: the worst layer's largest load falls to the mean's."""
    cfg, mesh = toy("quantile"), mesh_of(1, 1, 1)
    assert not any(term.coef for term in cfg.loss.load_balance.values()) and cfg.loss.bias_update == "quantile"
    cfg = dataclasses.replace(cfg, optim=dataclasses.replace(cfg.optim, lr=0.0))
    train_step, state, worst = step.make_train_step(cfg, mesh), init_state(cfg, mesh), []
    for _ in range(5):
        state, report = train_step(state, put_batch(batch_rows(cfg), mesh, cfg))
        worst.append(metrics.router_metrics(by_depth(cfg.model.places, report.router))["max_load"])
    assert worst[0] > 1.5 > 1.2 > worst[1] >= worst[-1], worst
    for bias in jax.tree.leaves(state.router_bias):
        np.testing.assert_allclose(np.mean(bias, -1), 0, atol=1e-6)


# --- what an order of blocks does with the rest of the library; more of it in test_stacks.py and test_places.py -------

MIXED = ModelConfig(
    vocab_size=512, d_model=16, num_layers=7, layers="2*(late dense moe:8) moe", d_ff=32, num_heads=2, num_kv_heads=1,
    head_dim=8, qk_norm=True, compute_dtype="float32",
    moe=config.MoEConfig(num_experts=4, top_k=2, d_expert=8, renormalize=True, selection_bias=True),
)  # fmt: skip


@pytest.mark.parametrize(("layers", "num_layers"), [("dense moe dense moe:8", 4), ("2*(late dense)", 4)])
def test_export_refuses(layers, num_layers):
    """Export names the field that it cannot write, before it writes anything."""
    moe = dataclasses.replace(MIXED.moe, selection_bias=False)
    cfg = dataclasses.replace(MIXED, layers=layers, num_layers=num_layers, moe=moe)
    with pytest.raises(FormatError, match=rf"differs in layers \({re.escape(layers)} here"):
        write_config(cfg, 16)


def one_step() -> list[float]:
    """Numbers after a step on (2, 2, 2): loss, gradient, weights, and the load of each expert."""
    cfg, mesh = dataclasses.replace(toy(SOURCE), model=MIXED), mesh_of(*MESH)
    mine = process_rows(mesh, cfg.data.batch_size)
    rows = {name: values[mine] for name, values in batch_rows(cfg).items()}
    state, report = step.make_train_step(cfg, mesh)(init_state(cfg, mesh), put_batch(rows, mesh, cfg))
    with jax.set_mesh(mesh):
        size = jax.jit(lambda params: sum(jnp.sum(jnp.square(w)) for w in jax.tree.leaves(params)))(state.params)
    loads = [np.asarray(sums.tokens_per_expert).ravel() for _, sums in sorted(report.router.items())]
    return [float(report.loss), float(report.grad_norm), float(size), *np.concatenate(loads).tolist()]


@pytest.mark.slow
def test_two_processes():
    numbers = one_step()
    code = f"""
import sys
sys.path.insert(0, "tests")
import numpy as np
import test_systems
np.testing.assert_allclose(test_systems.one_step(), {numbers}, rtol=1e-5)
"""
    two_processes.run(code)


@pytest.mark.slow
def test_resumed(tmp_path):
    """Two steps, and two of a run that was saved after them, are four, bit for bit."""
    write_text(tmp_path)
    cfg = dataclasses.replace(test_resume.run_config(tmp_path), model=MIXED)
    straight = test_resume.Run(tmp_path, cfg, MESH).start().go(2)
    with checkpoint.Checkpoints(tmp_path / "run", keep=2) as checkpoints:
        straight.save(checkpoints)
        straight.go(2)
        resumed = test_resume.Run(tmp_path, cfg, MESH).restore(checkpoints, 2).go(2)
    assert resumed.losses == straight.losses[2:]
    test_resume.assert_same_bits(test_resume.leaves(resumed.state), test_resume.leaves(straight.state))
