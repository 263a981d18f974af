"""LoRA: adapters compute what merged weights do, alone are trained, and alone are saved."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_invariance import BIAS, batch_rows
from test_invariance import run_config as plain_config

from moe_jax import config, model, optim
from moe_jax.aot import compile_only
from moe_jax.config import LoRAConfig
from moe_jax.config.schema import GroupConfig
from moe_jax.errors import CheckpointError, ConfigError
from moe_jax.evaluate.generate import generate
from moe_jax.moe import balance
from moe_jax.nn import lora
from moe_jax.parallel import sharding
from moe_jax.run import base, weights
from moe_jax.run.checkpoint import Checkpoints
from moe_jax.run.config_file import save_config
from moe_jax.train import step
from moe_jax.train.gradients import forward, make_gradients
from moe_jax.train.state import abstract_state, abstract_weights, init_state, parts_of, put_batch
from moe_jax.tree import flatten, join, nest, split

RANK, ALPHA = 3, 4.5
LORA = LoRAConfig(rank=RANK, alpha=ALPHA)


def run_config(room: float = 1.25, init_from: str = "base", layers: int = 3, **fields) -> config.RunConfig:
    """The model of tests/test_invariance.py with adapters. layers: 3, the first of them dense, or one with experts."""
    cfg = plain_config(**fields)
    moe = dataclasses.replace(cfg.model.moe, room=room)
    fields = dict(num_layers=layers, num_dense_layers=int(layers > 1), lora=LORA, moe=moe)
    return dataclasses.replace(cfg, init_from=init_from, model=dataclasses.replace(cfg.model, **fields))


def base_config(cfg: config.RunConfig) -> config.RunConfig:
    return dataclasses.replace(cfg, init_from="", model=cfg.model.base)


def mesh_of(shape):
    return sharding.make_mesh(shape, jax.devices()[: math.prod(shape)])


@functools.cache
def start(layers: int = 3):
    """A state in NumPy, whose adapters are not zero, and whose biases take part."""
    state = abstract_state(run_config(layers=layers), mesh_of((1, 1, 1)))
    rng = np.random.default_rng(7)
    drawn = lambda path, x: (path.endswith("norm") + rng.normal(0, 0.3, x.shape)).astype(x.dtype)
    params = nest({path: drawn(path, x) for path, x in flatten(state.params).items()})
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state)
    return state._replace(params=params, router_bias=jax.tree.map(lambda b: b + BIAS[None], state.router_bias))


def placed(cfg, mesh):
    """The same state on a mesh."""
    return jax.device_put(start(cfg.model.num_layers), jax.tree.map(lambda x: x.sharding, abstract_state(cfg, mesh)))


def gradients(cfg, mesh, params, bias) -> dict:
    with jax.set_mesh(mesh):
        batch = put_batch(batch_rows(0.25), mesh, cfg)
        out = jax.jit(make_gradients(cfg, mesh))(params, bias, batch, 0)
        return jax.device_get({"loss": out.loss, "sums": out.sums, "grads": out.grads})


@functools.cache
def oracle(layers: int) -> dict:
    """Loss and gradients by the chain rule from a dense model with merged weights, which knows no adapters.

    dA = scale · dW · Bᵀ and dB = scale · Aᵀ · dW.
    """
    cfg, mesh = run_config(layers=layers), mesh_of((1, 1, 1))
    params, adapters = start(layers).params, split(start(layers).params, lora.is_adapter)
    flat, merged = flatten(params), flatten(adapters[1])
    for path in {lora.matrix_of(path) for path in flatten(adapters[0])}:
        a, b = (np.asarray(flat[f"{path}_adapter/{name}"], np.float64) for name in lora.NAMES)
        merged[path] = jnp.asarray(np.asarray(flat[path], np.float64) + ALPHA / RANK * (a @ b), jnp.float32)
    got = gradients(base_config(cfg), mesh, nest(merged), start(layers).router_bias)
    dw, grads = flatten(got["grads"]), {}
    for path in flatten(adapters[0]):
        a, b = (np.asarray(flat[f"{lora.matrix_of(path)}_adapter/{name}"], np.float64) for name in lora.NAMES)
        g = ALPHA / RANK * np.asarray(dw[lora.matrix_of(path)], np.float64)
        grads[path] = g @ np.swapaxes(b, -1, -2) if path.endswith("lora_a") else np.swapaxes(a, -1, -2) @ g
    return got | {"grads": grads}


def assert_close(got, want, name=""):
    scale = np.abs(want).max()
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * scale + 1e-9, err_msg=name)


CASES = [  # mesh, room, what is computed how
    ((2, 2, 2), 8.0, dict(micro=2, remat="full", compute="grouped", exchange="ring", layers=1)),
    ((2, 2, 2), 1.25, dict(micro=2, remat="full", compute="grouped", exchange="all_to_all")),
    ((1, 2, 4), 0.3, dict(compute="grouped", exchange="all_to_all")),  # most rows in further passes
    ((1, 2, 4), 0.3, dict(compute="grouped", exchange="ring", micro=2, remat="selective", unroll=2)),
    ((1, 1, 1), 1.25, dict(compute="dense")),
    ((8, 1, 1), 1.25, dict(compute="grouped", micro=4)),
]


@pytest.mark.parametrize(
    ("mesh", "room", "fields"), [CASES[0], *(pytest.param(*c, marks=pytest.mark.slow) for c in CASES[1:])]
)
def test_gradients_are_those_of_merged_weights(mesh, room, fields):
    cfg, mesh = run_config(room, **fields), mesh_of(mesh)
    state = placed(cfg, mesh)
    got, want = gradients(cfg, mesh, state.params, state.router_bias), oracle(cfg.model.num_layers)
    assert_close(got["loss"], want["loss"])
    grads = flatten(got["grads"])
    matrices = 4 + 3 + 3 if cfg.model.num_layers == 1 else 2 * 4 + 3 + 3 + 3
    assert set(grads) == set(want["grads"]) and len(grads) == 2 * matrices
    for path, g in want["grads"].items():
        assert np.abs(g).max() > 0
        assert_close(grads[path], g, path)
    jax.tree.map(assert_close, got["sums"].router, want["sums"].router)


def hidden(cfg, mesh, params, bias):
    graph = model.abstract(cfg.model)
    with jax.set_mesh(mesh):
        batch = put_batch(batch_rows(0.25), mesh, cfg)
        run = jax.jit(lambda params, bias: forward(graph, params, bias, batch)[0].hidden)
        return np.asarray(run(params, bias))


@pytest.mark.slow
def test_a_fresh_adapter_changes_no_bit_and_a_merged_one_only_rounding():
    cfg, mesh = run_config(compute="grouped"), mesh_of((2, 2, 2))
    state = placed(cfg, mesh)
    adapters, rest = split(state.params, lora.is_adapter)
    with jax.set_mesh(mesh):
        fresh = model.init_adapters(cfg.model, jax.random.key(0))
        merged = lora.merge(rest, adapters, cfg.model.lora.scale)
    for path, x in flatten(fresh).items():
        bound = x.shape[-2] ** -0.5
        assert x.dtype == jnp.float32 and x.sharding == flatten(adapters)[path].sharding
        assert not np.asarray(x).any() if path.endswith("b") else 0.8 * bound < np.abs(x).max() <= bound
    plain = base_config(cfg)
    np.testing.assert_array_equal(
        hidden(cfg, mesh, join(rest, fresh), state.router_bias), hidden(plain, mesh, rest, state.router_bias)
    )
    got, want = (hidden(c, mesh, p, state.router_bias) for c, p in ((cfg, state.params), (plain, merged)))
    assert_close(got, want)
    assert np.abs(got - hidden(plain, mesh, rest, state.router_bias)).max() > 0.1
    jax.tree.map(lambda a, b: None if a.sharding == b.sharding else pytest.fail(str(a)), merged, rest)


@pytest.mark.slow
def test_only_adapters_are_trained():
    cfg, mesh = run_config(micro=2, compute="grouped"), mesh_of((2, 2, 2))
    state = placed(cfg, mesh)
    before, bias = jax.device_get((state.params, state.router_bias))
    assert not [path for path in flatten(state.opt_state) if "embed" in path or path.endswith("w_q")]
    run = step.make_train_step(cfg, mesh)
    for _ in range(2):
        state, report = run(state, put_batch(batch_rows(0.25), mesh, cfg))
    after = jax.device_get(state.params)
    for path, x in flatten(after).items():
        assert (x != flatten(before)[path]).any() == lora.is_adapter(path), path
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.router_bias), bias)
    assert not report.skipped
    text = optim.describe(cfg.optim, model.abstract(cfg.model), dict(mesh.shape))
    sizes = {path: x.size for path, x in flatten(after).items()}
    mine = sum(n for path, n in sizes.items() if lora.is_adapter(path))
    assert text.startswith(f"adamw: adamw, {mine:,} parameters; router: muon, 0")
    assert f"frozen: {sum(sizes.values()) - mine:,} parameters" in text


# --- files -----------------------------------------------------------------------------------------------------------


IMPORTED = [{"event": "import", "from": "org/model"}]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return write_runs(tmp_path_factory.mktemp("lora"))


def write_runs(root):
    """Writes a base of weights, and a run of adapters for it at step 1."""
    mesh = mesh_of((1, 1, 1))
    cfg = run_config(init_from=str(root / "base"), layers=1)
    state = placed(cfg, mesh)
    _, rest = split(state.params, lora.is_adapter)
    weights.save_weights(root / "base", base_config(cfg), rest, state.router_bias, IMPORTED)
    abstract = abstract_weights(cfg.model.base, mesh)
    _, bias, origin, record = weights.load_base(root / "run", cfg, *abstract)
    save_config(root / "run", cfg)
    with Checkpoints(root / "run", keep=1) as checkpoints:
        saved = {"origin": origin, "tokens": 1.0, "base": record}
        checkpoints.save(1, base.kept(cfg, state._replace(router_bias=bias)), saved, wait=True)
    return root, cfg, mesh, jax.device_get(state)


def test_checkpoints_hold_the_adapters_alone(runs):
    root, cfg, mesh, state = runs
    with Checkpoints(root / "run") as checkpoints:
        _, saved = checkpoints.contents()
        record = checkpoints.data_state()["base"]
    assert all(map(lora.is_adapter, flatten(saved["params"]))) and not flatten(saved.get("router_bias") or {})
    assert record["from"] == str(root / "base") and record["step"] == 0 and record["imported_from"] == "org/model"
    lines = weights.check_same_model(cfg)
    assert [line.split(":")[0] for line in lines] == ["config.model.lora.rank", "config.model.lora.alpha"]
    params, bias, origin = weights.load_weights(root / "run", *abstract_weights(cfg.model, mesh))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get((params, bias)), (state.params, state.router_bias))
    assert [event["event"] for event in origin] == ["import", "train"]


@pytest.mark.slow
def test_a_run_is_loaded_on_any_mesh_and_merged(runs):
    root, cfg, _, state = runs
    other = mesh_of((2, 2, 2))  # with the same fingerprint
    params, bias, _ = weights.load_weights(root / "run", *abstract_weights(cfg.model, other))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get((params, bias)), (state.params, state.router_bias))
    merged, _, _ = weights.load_weights(root / "run", *abstract_weights(cfg.model.base, other))
    a, b = (flatten(params)[f"layers/moe/w_up_adapter/{name}"] for name in lora.NAMES)
    want = np.asarray(params["layers"]["moe"]["w_up"]) + ALPHA / RANK * np.einsum("ledr,lerf->ledf", a, b)
    np.testing.assert_allclose(np.asarray(merged["layers"]["moe"]["w_up"]), want, atol=1e-6)
    half = dataclasses.replace(cfg.model.base, param_dtype="bfloat16")
    rounded, _, _ = weights.load_weights(root / "run", *abstract_weights(half, other), cast=True)
    np.testing.assert_array_equal(rounded["embed"], params["embed"].astype("bfloat16"))
    prompts = [[1, 2, 3]]
    texts = [generate(c, other, p, bias, prompts, 6) for c, p in ((cfg.model, params), (cfg.model.base, merged))]
    assert texts[0] == texts[1]


def test_a_run_trains_on_the_adapters_of_another(runs):
    """With the same rank, scale and matrices a run starts from A and B; otherwise they are merged into its base."""
    root, cfg, mesh, state = runs
    with Checkpoints(root / "run") as checkpoints:
        record = checkpoints.data_state()["base"]
    cfg = dataclasses.replace(cfg, init_from=str(root / "run"))
    params, bias, origin, reference = weights.load_start(root / "more", cfg, mesh)
    made = abstract_state(cfg, mesh)
    assert jax.tree.structure(params) == jax.tree.structure(made.params)  # no adapter is fresh
    jax.tree.map(np.testing.assert_array_equal, jax.device_get((params, bias)), (state.params, state.router_bias))
    assert reference == record and [e["event"] for e in origin] == ["import", "adapters"]
    assert weights.describe_start(cfg, False).startswith(
        f"starting from the adapters of {root / 'run'} and their base,"
    )
    weights.load_base(root / "more", cfg, *abstract_weights(cfg.model.base, mesh), reference)  # as a resumed run does
    for change in (dict(rank=2), dict(alpha=1.0), dict(match="w_q")):
        other = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, lora=dataclasses.replace(LORA, **change)))
        assert not weights.continues(other)
    line = weights.describe_start(other, True)
    assert (
        line.startswith("starting from the average of the weights of") and "its adapters merged, with fresh ad" in line
    )


def test_the_fingerprint_of_adapters_is_of_what_is_stored(runs):
    """Merged weights differ in their last bits by mesh and device, so they have no part in it."""
    root, cfg, mesh, _ = runs
    with Checkpoints(root / "run") as checkpoints:
        below = f"{checkpoints.data_state()['base']['fingerprint']} {cfg.model.lora.scale}"
    adapters = split(placed(cfg, mesh).params, lora.is_adapter)[0]
    as_base = dataclasses.replace(cfg, init_from=str(root / "run"), model=cfg.model.base)
    _, _, origin, record = weights.load_base(root / "outer", as_base, *abstract_weights(cfg.model.base, mesh))
    assert record["fingerprint"] == base.fingerprint(adapters, {}, below) != base.fingerprint(adapters, {})
    assert record["imported_from"] is None and origin[-1]["event"] == "train"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_of_merged_adapters_are_loaded_on_any_mesh(runs, dtype):
    root, cfg, _, _ = runs
    cfg = dataclasses.replace(cfg, init_from=str(root / "run"))
    plain, record = dataclasses.replace(cfg.model.base, param_dtype=dtype), None
    for shape in ((2, 2, 2), (1, 1, 1), (1, 2, 4), (1, 4, 2)):
        _, _, _, record = weights.load_base(root / "outer", cfg, *abstract_weights(plain, mesh_of(shape)), record)


def test_what_is_printed_is_true(runs):
    _, cfg, mesh, state = runs
    line = lora.describe(cfg.model, flatten(abstract_weights(cfg.model, mesh)[0]))
    assert "on attention/w_k, attention/w_o, " in line and "; none on embed, head, moe/w_router; all weights" in line
    frozen = optim.frozen_paths(cfg.optim, flatten(state.params))
    fixed, moving = optim.split_biases(frozen, state.params, state.router_bias)
    assert fixed == {"layers/moe/router_bias"} and not moving
    assert balance.describe(cfg.loss, cfg.model, fixed, bool(moving)).startswith("selection bias: stays as it is")
    assert optim.split_biases(frozenset(), state.params, state.router_bias) == (set(), {"layers/moe/router_bias"})


def test_gradients_of_adapters_are_counted_in_bytes():
    cfg = run_config(layers=1)
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, param_dtype="bfloat16"))
    shapes = flatten(model.abstract(cfg.model).shapes)
    mine = sum(4 * x.size for path, x in shapes.items() if lora.is_adapter(path))
    total = sum(x.size * x.dtype.itemsize for x in shapes.values())
    assert shapes["layers/moe/w_up"].dtype.itemsize == 2
    report = compile_only.Report("v5e:2x2", {}, True, {"parameters": total}, 16.0, 1.0, [], "")
    assert compile_only.bytes_of_state(cfg, report)[1] == pytest.approx(mine)


def test_an_upcycled_run_has_no_groups_of_adapters():
    groups = {"b": GroupConfig(match="lora_b", lr=2.0), "q": GroupConfig(match="w_q", lr=0.5)}
    cfg = run_config(layers=1)
    cfg = dataclasses.replace(cfg, optim=dataclasses.replace(cfg.optim, groups=groups))
    made, lines = optim.groups.without_lost(base_config(cfg))
    assert list(made.optim.groups) == ["q"] and lines == [
        "optim.groups.b is left out: it matches no parameter of the new model"
    ]


@pytest.mark.slow
def test_the_average_of_adapters(runs, tmp_path):
    _, cfg, mesh, state = runs
    cfg = dataclasses.replace(cfg, optim=dataclasses.replace(cfg.optim, ema=0.9))
    abstract = abstract_weights(cfg.model.base, mesh)
    params, bias, _, record = weights.load_base(tmp_path / "run", cfg, *abstract)
    made = init_state(cfg, mesh, (params, bias))
    ema = parts_of(made.opt_state).ema
    assert set(flatten(ema)) == {path for path in flatten(state.params) if lora.is_adapter(path)}
    opt_state = made.opt_state | {"ema": jax.tree.map(lambda x: x + 1, ema)}
    save_config(tmp_path / "run", cfg)
    with Checkpoints(tmp_path / "run", keep=1) as checkpoints:
        checkpoints.save(1, base.kept(cfg, made._replace(opt_state=opt_state)), {"base": record}, wait=True)
    averaged, _, _ = weights.load_weights(tmp_path / "run", *abstract_weights(cfg.model, mesh), average=True)
    for path, x in flatten(made.params).items():
        np.testing.assert_array_equal(flatten(averaged)[path], x + lora.is_adapter(path), err_msg=path)


def test_another_base_is_refused(runs, tmp_path):
    root, cfg, mesh, state = runs
    abstract = abstract_weights(cfg.model, mesh)
    load = lambda: weights.load_weights(root / "run", *abstract)
    (root / "base").rename(root / "moved")
    try:
        with pytest.raises(
            CheckpointError, match=r"holds adapters of the base .*, which is not there; nearest valid: a link"
        ):
            load()
        (root / "run" / "base").symlink_to(root / "moved")
        load()
        (root / "run" / "base").unlink()
        changed = dict(state.params, embed=state.params["embed"] + 1e-6)
        rest = jax.device_put(split(changed, lora.is_adapter)[1], mesh_of((1, 1, 1)).devices.flat[0])
        bias = jax.device_put(state.router_bias, mesh_of((1, 1, 1)).devices.flat[0])
        weights.save_weights(root / "base", base_config(cfg), rest, bias, [])
        with pytest.raises(CheckpointError, match=r"is not the base of the adapters in .* fingerprint"):
            load()
    finally:
        if (root / "base").is_dir():
            (root / "base").rename(tmp_path / "other")
        (root / "moved").rename(root / "base")


def test_fields_are_checked():
    cfg = run_config()
    for change, error in (
        (dict(init_from=""), "config.init_from='': must name the run directory of the base"),
        (dict(optim=dataclasses.replace(cfg.optim, qk_clip=100.0)), "config.optim.qk_clip=100.0"),
    ):
        with pytest.raises(ConfigError) as e:
            dataclasses.replace(cfg, **change, model=dataclasses.replace(cfg.model, qk_norm=False))
        assert error in str(e.value)
    with pytest.raises(ConfigError, match=r"match='\(': is not a regular expression"):
        LoRAConfig(match="(")
    with pytest.raises(ConfigError, match=r"alpha=0\.0: must be > 0"):
        LoRAConfig(rank=2, alpha=0.0)
    for field in (dict(alpha=8.0), dict(rslora=True), dict(match="w_q")):
        with pytest.raises(ConfigError, match=r"has no effect without rank; nearest valid: .*, or a rank > 0"):
            LoRAConfig(**field)
    some = lambda match: dataclasses.replace(cfg.model, lora=LoRAConfig(rank=2, match=match))
    with pytest.raises(
        ConfigError, match=r"lora\.match='router': matches none of the 17 matrices .* nearest valid: '.*/w_"
    ):
        model.abstract(some("router"))
    assert len([p for p in flatten(model.abstract(some("/attention/w_(q|v)$")).shapes) if lora.is_adapter(p)]) == 8
    assert LoRAConfig(rank=4, alpha=8.0).scale == 2.0 and LoRAConfig(rank=4, alpha=8.0, rslora=True).scale == 4.0


def test_counts():
    cfg = run_config().model
    shapes = {path: x.shape for path, x in flatten(model.abstract(cfg).shapes).items()}
    extra = sum(math.prod(shape) for path, shape in shapes.items() if lora.is_adapter(path))
    assert model.count_parameters(cfg).total == model.count_parameters(cfg.base).total + extra
    frozen = optim.frozen_paths(run_config().optim, list(shapes))
    assert set(shapes) - frozen == {path for path in shapes if lora.is_adapter(path)}
    assert model.flops_per_token(cfg, 8, frozen) < model.flops_per_token(cfg, 8)
    json.dumps(config.to_dict(run_config()))
