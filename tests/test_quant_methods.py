"""Allocations, smoothing and balance of calibration where a whole model is rounded."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_model import PLAIN, forward, inputs_of, mesh_of
from test_smooth import model_of, rows_of

from moe_jax.errors import ConfigError
from moe_jax.quant import balance
from moe_jax.quant.allocate import METHODS
from moe_jax.quant.convert import Settings, check, rounded
from moe_jax.tree import flatten
from tests import two_processes

MOE = dataclasses.replace(PLAIN.moe, num_shared_experts=1, selection_bias=True)
CFG = dataclasses.replace(PLAIN, layers="moe moe:6", moe=MOE)
ONE = dataclasses.replace(CFG, layers="", num_layers=1)
PLAN = Settings(bits=2.5, choices=(1, 2, 3), group=4, rows=8)


def uneven(mesh=(1, 1, 1), cfg=CFG):
    """Weights, and selection biases with which all tokens choose the first expert of a layer and none the last."""
    params, bias = model_of(cfg, mesh)
    tilt = lambda b: jax.device_put(np.float32([[9.0, *np.zeros(b.shape[-1] - 2), -9.0]]), b.sharding)
    return params, jax.tree.map(tilt, bias)


def run(mesh=(1, 1, 1), cfg=CFG, **changes):
    """The rounded parameters, and the content of quant.json."""
    params, bias = uneven(mesh, cfg)
    settings = dataclasses.replace(PLAN, **changes)
    params, found = rounded(cfg, mesh_of(*mesh), jax.tree.map(jnp.copy, params), bias, rows_of(cfg), settings)
    return jax.device_get(params), found.to_dict()


def bits_of(body):
    """Bits of the experts of each layer, the same in their matrices."""
    rows = {path: m["bits"][0] for path, m in body["matrices"].items() if np.ndim(m["bits"][0])}
    layers = sorted({path.split("/moe/")[0] for path in rows})
    for layer in layers:
        assert len({tuple(row) for path, row in rows.items() if path.startswith(f"{layer}/")}) == 1
    return [np.array(rows[f"{layer}/moe/w_up"]) for layer in layers]


@pytest.mark.slow
def test_every_allocation_spends_the_same():
    """2.5 bits a weight of 4 and of 6 experts, in each layer, but where layers are ranked."""
    for method in METHODS:
        _, body = run(method="rtn", allocate=method)
        bits = bits_of(body)
        assert body["experts"]["bits"] == pytest.approx(2.5) and body["unspent_bits"] == 0, method
        assert [len(row) for row in bits] == [4, 6]
        by_layer = method in ("blocks", "importance")
        assert by_layer or [row.mean() for row in bits] == [2.5, 2.5], method
    _, body = run(method="rtn", allocate="mc", scope="model", choices=(2, 4))
    assert body["experts"]["bits"] == pytest.approx(2.4) and body["unspent_bits"] == 1


@pytest.mark.slow
def test_smoothing_leaves_eight_bits_what_they_are():
    """A model with hidden units that stand out loses as little where they have moved."""
    params, bias = uneven()
    rows = rows_of(CFG)
    inputs = inputs_of(rows["tokens"], rows["positions"], None, rows["segment_ids"] > 0)
    net = jax.jit(lambda p, b, x: forward(CFG, p, b, x))
    errors = {}
    with jax.set_mesh(mesh_of(1, 1, 1)):
        want, _ = net(params, bias, inputs)
        for smooth in (False, True):
            made, _ = run(method="rtn", allocate="uniform", bits=8, choices=(), dense_bits=8, attention_bits=16,
                          smooth=smooth)  # fmt: skip
            got, _ = net(jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), made, params), bias, inputs)
            errors[smooth] = float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))
    assert errors[True] < 0.01 and errors[False] < 0.01 and errors[True] != errors[False], errors
    norms = {
        path for path, w in flatten(made).items() if np.any(w != flatten(params)[path]) and path.endswith("mlp_norm")
    }
    assert len(norms) == 2  # `made` is smoothed


@pytest.mark.slow
def test_on_any_mesh():
    """Every expert has its minimum of calibration, nobody more than twice an equal share but for what the starved read;
    tokens and the factors of smoothing are the same on any mesh."""
    same = {"balance": True, "smooth": True, "allocate": "turns"}
    (made, one), (made_many, many) = (run(mesh, ONE, **same) for mesh in ((1, 1, 1), (2, 2, 2)))
    _, plain = run(cfg=ONE, allocate="turns", method="rtn")
    assert one["tokens_per_expert"] == many["tokens_per_expert"] != plain["tokens_per_expert"]
    flat, before = flatten(made_many), flatten(jax.device_get(uneven(cfg=ONE)[0]))
    for path, w in flatten(made).items():
        if path.endswith(("mlp_norm", "w_router")):
            assert (w != before[path]).any(), path
            np.testing.assert_array_equal(w, flat[path], err_msg=path)
    for layer, tokens in one["tokens_per_expert"].items():
        share = np.mean(plain["tokens_per_expert"][layer])
        before = plain["tokens_per_expert"][layer]
        assert before[-1] == 0 and before[0] == plain["calibration_tokens"]
        assert min(tokens) >= balance.LEAST * share and tokens[-1] == plain["calibration_tokens"], layer
        assert max(tokens[:-1]) <= balance.MOST * share, layer


WORKER = """
sys.path.insert(0, "tests")
import test_quant_methods as t
from test_model import init
cfg = t.dataclasses.replace(t.ONE, moe=t.dataclasses.replace(t.MOE, num_experts=8))
settings = t.dataclasses.replace(t.PLAN, allocate="mc", smooth=True, gated=True)
found = t.rounded(cfg, t.mesh_of(1, 1, 8), *init(cfg, (1, 1, 8)), t.rows_of(cfg), settings)[1].to_dict()
assert found["experts"]["bits"] == 2.5 and found["unspent_bits"] == 0, found
"""


@pytest.mark.slow
def test_two_processes():
    """Experts lie in both of them, which allocate their bits alike."""
    two_processes.run(WORKER)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"allocate": "mcmoe"}, "quant.allocate='mcmoe': must be one of uniform, turns, frequency"),
        ({"allocate": "blocks", "scope": "model"}, "quant.scope='model': has no effect with allocate='blocks'"),
        ({"allocate": "mc", "scope": "block"}, "quant.scope='block': must be one of layer, model"),
    ],
)
def test_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        check(dataclasses.replace(PLAN, **changes), CFG)


def test_smoothing_is_refused():
    with pytest.raises(ConfigError, match="norm='post'"):
        check(dataclasses.replace(PLAN, allocate="mc", smooth=True), dataclasses.replace(CFG, norm="post"))


def test_the_commands_of_systems_are_valid():
    """Those of docs/systems.md, for a model of the usual widths."""
    text = (Path(__file__).parents[1] / "docs" / "systems.md").read_text(encoding="utf-8")
    commands = re.findall(r"`python -m moe_jax\.quant --from=runs/moe --workdir=runs/\w+ (--[^`]+)`", text)
    wide = dataclasses.replace(CFG, d_model=256, num_heads=2, num_kv_heads=2, head_dim=128,
                               moe=dataclasses.replace(CFG.moe, d_expert=128))  # fmt: skip
    kinds = {f.name: f.type for f in dataclasses.fields(Settings)}
    assert len(commands) == 4
    for command in commands:
        options = [option.removeprefix("--").partition("=") for option in command.split()]
        typed = {
            name: True if kinds[name] is bool else kinds[name](value) for name, _, value in options if name != "choices"
        }
        choices = {n: tuple(map(int, value.split(","))) for n, _, value in options if n == "choices"}
        check(Settings(**typed, **choices), wide)
