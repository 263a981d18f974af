"""Rounding the weights of a model: statistics of a block against loops over tokens, one device against many, and the
command's run directory against the weights in memory."""

import dataclasses
import functools
import importlib
import json
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_quant import GROUP, fake_quant

import moe_jax
from moe_jax import config, data, model
from moe_jax.errors import CheckpointError, ConfigError
from moe_jax.evaluate import held_out
from moe_jax.moe.layer import TokenInfo
from moe_jax.moe.pools import documents_of
from moe_jax.nn.layers import rms_norm
from moe_jax.parallel import sharding
from moe_jax.quant import (
    Method,
    Settings,
    convert,
    measure_block,
    quantise,
    round_block,
    rounded,
    rounded_experts,
)
from moe_jax.quant.calibrate import calibration_rows
from moe_jax.quant.walk import walk
from moe_jax.run import config_file, weights
from moe_jax.tree import flatten, split
from moe_jax.upcycle.chain import is_fixed
from tests import programs
from tests.command_server import REPO, Server
from tests.test_opened import config_of, write_run
from tests.upcycle_source import PLAIN, bank, mesh_of

# --- statistics of one block -----------------------------------------------------------------------------------------


ROWS, LENGTH = 8, 12
LAYER = dataclasses.replace(
    PLAIN, num_layers=1,
    moe=dataclasses.replace(PLAIN.moe, shared_gate="sigmoid", identity_experts=1, selection_bias=False),
)  # fmt: skip


POOLS = {
    "identity_experts": 0,
    "pool_min": 2,
    "pool_from": "document",
    "pool_size": 2,
}  # experts as evaluation has them


def text_rows(seed=0) -> dict[str, np.ndarray]:
    """Rows of random tokens. The last quarter of each is padding."""
    tokens = np.random.default_rng(seed).integers(0, 32, (ROWS, LENGTH)).astype(np.int32)
    places = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    return {"tokens": tokens, "positions": places, "segment_ids": (places < 9).astype(np.int32)}


def opened(cfg, shape=(1, 1, 1)) -> tuple[dict, dict]:
    """Parameters, which may be used up, and selection biases of a model of random weights."""
    fixed, params = split(bank(shape, cfg=cfg)[1], is_fixed)
    with jax.set_mesh(mesh_of(*shape)):
        return jax.tree.map(jnp.copy, params), fixed


def statistics(cfg, shape=(1, 1, 1), **how) -> list:
    found = []
    note = lambda number, place, own, taps: found.append(jax.device_get(taps))
    walk(cfg, mesh_of(*shape), *opened(cfg, shape), text_rows(), note, **how)
    return found


def parts_of(cfg):
    """The parameters of the block of a model of one layer, and what its parts read and make, without a mesh."""
    params, bias = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), opened(cfg))
    program = dataclasses.replace(model.transformer.REFERENCE, record=True)

    @jax.jit
    def run(params, bias, tokens, positions, segments):
        counted = segments > 0
        net = model.abstract(cfg, program).bind(params, bias)
        block = jax.tree.map(lambda x: x[0], net.layers)
        x = net.embedded(tokens)
        h = rms_norm(x, block.attention_norm[...], cfg.norm_eps)
        y, _, _ = block.attention(h, positions, None)
        fed = rms_norm(x + y, block.mlp_norm[...], cfg.norm_eps)
        documents = documents_of(cfg.moe, segments, positions, training=False)
        out = block.moe(fed, TokenInfo(counted, jnp.zeros_like(tokens), documents=documents))
        return h, y, x + y, fed, x + y + out.y, counted, out.choices

    rows = text_rows()
    own = {path.removeprefix("layers/"): np.asarray(w)[0] for path, w in flatten(params).items() if "layers/" in path}
    return own, *jax.device_get(run(params, bias, rows["tokens"], rows["positions"], rows["segment_ids"]))


def silu(x):
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize(
    ("gated", "gate", "pools"),
    [
        (True, "sigmoid", False),
        *(pytest.param(*c, marks=pytest.mark.slow) for c in ((False, "sigmoid", True), (True, "softmax", False))),
    ],
)
def test_statistics_are_loops_over_tokens(monkeypatch, gated, gate, pools):
    """Padding and identity experts are in none of them; gated rows are weighted by what their result is.

    Sums of two batches, the second of which padding fills. Also what other matrices change in the results of experts.
    """
    monkeypatch.setattr(importlib.import_module("moe_jax.quant.walk"), "TOKENS", 5 * LENGTH)
    own = {"shared_gate": gate} | (POOLS if pools else {})
    layer = dataclasses.replace(LAYER, moe=dataclasses.replace(LAYER.moe, **own))
    changed = {}  # the experts' matrices, some of them less by a part

    def others(own, taps):
        ws = {name: own["moe"][name] for name in ("w_gate", "w_up", "w_down")}
        for name, part in (("w_gate", 0.5), ("w_down", 0.25)):
            changed[name] = ws | {name: ws[name] * (1 - part)}
        return own, (tuple(new.values()) for new in changed.values())

    (found,) = statistics(layer, gated=gated, others=others)
    own, h, attended, middle, fed, after, counted, choices = parts_of(layer)
    expert_in, hidden, change = np.zeros((4, 16, 16)), np.zeros((4, 16, 16)), np.zeros((4, 2))
    shared_in, counts, weights, largest = np.zeros((16, 16)), np.zeros(4), np.zeros(4), np.zeros((4, 16))
    w_gate, w_up, w_down = (own[f"moe/{name}"] for name in ("w_gate", "w_up", "w_down"))
    for b, s in np.argwhere(counted):
        x = fed[b, s]
        logits = np.exp(x @ own["moe/w_shared_gate"])
        both = logits / logits.sum() if gate == "softmax" else (1, logits[0] / (1 + logits[0]))
        shared_in += (both[1] if gated else 1) * np.outer(x, x)
        for expert, weight in zip(choices.experts[b, s], choices.weights[b, s], strict=True):
            if expert < 4:
                weight = weight * both[0]
                made, c = silu(x @ w_gate[expert]) * (x @ w_up[expert]), weight if gated else 1
                less = silu(x @ w_gate[expert] / 2) * (x @ w_up[expert])
                moved = ((made - less) @ w_down[expert], made @ w_down[expert] / 4)
                change[expert] += [np.sum(np.square(weight * m)) for m in moved]
                expert_in[expert] += c * np.outer(x, x)
                hidden[expert] += c * np.outer(made, made)
                counts[expert] += 1
                weights[expert] += weight
                largest[expert] = np.maximum(largest[expert], np.abs(made))
    close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-4)
    close(found.expert_in.gram, expert_in), close(found.expert_hidden.gram, hidden)
    close(found.change, change), np.testing.assert_allclose(found.change, change, rtol=1e-3)
    close(found.counts, counts), close(found.weights, weights), close(found.expert_hidden.largest, largest)
    assert 0 < counts.sum() <= 2 * counted.sum() == 2 * found.tokens
    assert (counts.sum() == 2 * counted.sum()) == pools  # which no layer with identity experts has
    if pools:
        assert all(len(set(row[mask].ravel())) == 2 for row, mask in zip(choices.experts, counted, strict=True))
    close(found.dense["moe/shared/w_up"].gram, shared_in), close(found.fed, np.abs(fed[counted]).max(0))
    close(found.dense["attention/w_q"].gram, h[counted].T @ h[counted])
    w_o, y = own["attention/w_o"], attended[counted]
    close(w_o.T @ found.dense["attention/w_o"].gram @ w_o, y.T @ y)  # its input is not seen from outside
    length = functools.partial(np.linalg.norm, axis=-1)
    cosine = (middle * after).sum(-1) / length(middle) / length(after)
    close(found.cosine, cosine[counted].sum())


# --- from block to block ---------------------------------------------------------------------------------------------


TO_TWO = lambda path: 2 if path.startswith("moe/w_") else 4
GPTQ = Method("gptq", GROUP)


def walked(shape) -> tuple[dict, list, list, list]:
    """Rounded parameters of a model of two layers, their statistics, and how they were rounded and measured."""
    seen, made, measured = [], [], []

    def visit(number, place, own, taps):
        seen.append(jax.device_get(taps))
        if place.kind.experts:
            measured.append(measure_block(number, own, taps))
        own, found = round_block(own, taps, TO_TWO, GPTQ)
        made.append(found)
        return own

    others = lambda own, taps: (own, (rounded_experts(own, taps, bits, GPTQ) for bits in (1, 2, 3)))
    params = walk(PLAIN, mesh_of(*shape), *opened(PLAIN, shape), text_rows(), visit, others=others)
    return jax.device_get(params), seen, made, measured


@pytest.mark.slow
def test_on_many_devices():
    """Statistics, losses and rounded weights are those of one device. Each block has read what rounded ones make."""
    params, seen, made, measured = walked((1, 1, 1))
    for shape in ((2, 2, 2), (8, 1, 1)):
        others, their_seen, their_made, their_measured = walked(shape)
        near = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3)
        jax.tree.map(near, (seen[0], measured[0]), (their_seen[0], their_measured[0]))
        for path, w in flatten(params).items():  # a tie may be rounded to the other side
            assert np.mean(np.abs(flatten(others)[path] - w) > 1e-5 * np.abs(w).max()) < 0.01, path
        assert [found.keys() for found in their_made] == [found.keys() for found in made]
    # A second walk, without rounding: the inputs of every block are those that calibrated it.
    again = []
    note = lambda number, place, own, taps: again.append(jax.device_get(taps))
    with jax.set_mesh(mesh_of(1, 1, 1)):
        placed = jax.device_put(params, sharding.NamedSharding(mesh_of(1, 1, 1), sharding.PartitionSpec()))
    walk(PLAIN, mesh_of(1, 1, 1), placed, opened(PLAIN)[1], text_rows(), note)
    for one, other in zip(seen, again, strict=True):
        np.testing.assert_allclose(one.dense["attention/w_q"].gram, other.dense["attention/w_q"].gram, rtol=1e-4)
    assert np.abs(seen[0].expert_in.gram - again[0].expert_in.gram).max() > 1e-2  # after rounded attention
    assert (np.diff(measured[0].loss, axis=1) < 0).all() and measured[0].loss.shape == (4, 3)


KINDS = dataclasses.replace(
    PLAIN, num_layers=4, layers="(late dense) memory table", num_kv_heads=2, qk_norm=False,
    mla=config.MLAConfig(kv_rank=8, rope_dim=4, q_rank=8),
    memory=config.MemoryConfig(keys=4, key_dim=8, heads=1, top=2),
    moe=dataclasses.replace(PLAIN.moe, latent=8, expert_inputs="int8"),
)  # fmt: skip


@pytest.mark.slow
def test_what_is_rounded():
    """Rounding to nearest changes the matrices of attention, feed-forward layers and experts, and no other weight."""
    settings = Settings("rtn", 2, group=4, attention_bits=3, dense_bits=5, symmetric=True)
    before = jax.device_get(opened(KINDS)[0])
    params, report = rounded(KINDS, mesh_of(1, 1, 1), *opened(KINDS), text_rows(), settings)
    body, kept = report.to_dict(), set()
    for path, w in flatten(before).items():
        bits = 2 if re.search(r"/moe/w_(gate|up|down)$", path) else 3 if "/attention/w_" in path else 5
        own = flatten(params)[path]
        if path in body["matrices"]:
            np.testing.assert_array_equal(own, fake_quant(w, np.full(w.shape[:-2], bits), 4, True))
            assert np.unique(body["matrices"][path]["bits"]).tolist() == [bits]
        else:
            np.testing.assert_array_equal(own, w)
            kept.add(path.rpartition("/")[2])
    assert kept == {"embed", "head", "final_norm", "attention_norm", "mlp_norm", "kv_norm", "q_norm", "w_router",
                    "w_query", "b_query", "query_norm", "keys", "values"}  # fmt: skip
    bits = lambda path: body["matrices"][path]["packed_bytes"] * 8
    size = np.prod(flatten(before)["layers/block_0/moe/w_up"].shape)
    assert bits("layers/block_0/moe/w_up") == size * (2 + 16 / 4)
    assert body["experts"]["bits"] == 2 and body["experts"]["packed_bits"] == 6
    sizes = {p: np.prod(w.shape) * 32 for p, w in flatten(before).items() if p not in body["matrices"]}
    total = sum(sizes.values()) + sum(map(bits, body["matrices"]))
    assert body["file"]["packed_bytes"] * 8 == total and body["rounded_to_nearest"] == []


# --- a run directory -------------------------------------------------------------------------------------------------


ONE = lambda **fields: Settings(**({"bits": 2, "group": 16, "rows": 4} | fields))
MISTAKES = {
    "bits=0.5": (ONE(bits=0.5), "bits=0.5: must be in [1, 8]; nearest valid: 1"),
    "bits=2.5": (ONE(bits=2.5), "bits=2.5: must be a whole number with allocate='uniform'", "nearest valid: 2"),
    "choices": (ONE(choices=(1, 2)), "choices=(1, 2): has no effect with allocate='uniform'"),
    "nan": (ONE(bits=float("nan")), "bits=nan: must be a number; nearest valid: 3"),
    "half a row": (ONE(rows=2.5), "rows=2.5: must be a whole number; nearest valid: 64"),
    "gated": (ONE(method="rtn", gated=True), "gated=True: has no effect with method='rtn'"),
    "no dense": (ONE(dense_bits=8), "dense_bits=8: has no effect on a model without dense layers"),
    "attention_bits": (ONE(attention_bits=9), "attention_bits=9: must be in [1, 8], or 16", "nearest valid: 8"),
    "dense_bits": (ONE(dense_bits=0), "dense_bits=0: must be in [1, 8]", "nearest valid: 1"),
    "group": (ONE(group=128), "group=128: must divide the input widths", "layers/attention/w_k has 16", "valid: 16"),
    "rows": (ONE(rows=0), "rows=0: must be ≥ 1; nearest valid: 1"),
    "method": (ONE(method="awq"), "method='awq': must be one of rtn, gptq"),
    "allocate": (ONE(allocate="uniforn"), "allocate='uniforn': must be one of uniform"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_the_settings(name):
    settings, *says = MISTAKES[name]
    shared = 0 if name == "no dense" else 1
    cfg = dataclasses.replace(PLAIN, moe=dataclasses.replace(PLAIN.moe, num_shared_experts=shared))
    with pytest.raises(ConfigError) as e:
        convert.check(settings, cfg)
    assert all(part in str(e.value) for part in says), str(e.value)


BY_LABEL = dataclasses.replace(PLAIN.moe, label_groups=2, top_k=2, selection_bias=False)
UNWRITTEN = config.SampleConfig(tokens=0)


def test_runs_that_cannot_be_rounded(tmp_path):
    """Each says what it is; nothing is compiled or written."""
    cases = {
        "dense": ({"num_dense_layers": 2}, "has no layer with experts (model.num_moe_layers is 0)"),
        "ternary": ({"moe": dataclasses.replace(PLAIN.moe, expert_weights="ternary")}, "has experts of three values"),
        "lora": ({"lora": config.LoRAConfig(rank=2)}, "merge them first: python -m moe_jax.upcycle"),
        "untied": ({"untie": 2}, "model.untie=2: depends on labels"),
        "groups": ({"moe": BY_LABEL}, "model.moe.label_groups=2: depends on labels"),
    }
    files = config.DataConfig(tokenizer=config.TokenizerConfig(kind="huggingface", path="tokenizer.json"))
    for name, (fields, says) in cases.items():
        own = dataclasses.replace(files, labels={"code": 1}) if name in ("untied", "groups") else files
        run_config = config.RunConfig(
            model=dataclasses.replace(PLAIN, **fields), data=own, sample=UNWRITTEN, init_from="runs/base"
        )
        config_file.save_config(tmp_path / name, run_config)
        with pytest.raises((ConfigError, CheckpointError), match=re.escape(says)):
            quantise(str(tmp_path / name), tmp_path / "new", ONE())
    with pytest.raises(CheckpointError, match="no such run directory"):
        quantise(str(tmp_path / "none"), tmp_path / "new", ONE())
    assert not (tmp_path / "new").exists()
    with pytest.raises(ConfigError, match=r"model\.moe\.label_groups=2: depends on labels"):
        statistics(dataclasses.replace(PLAIN, moe=BY_LABEL))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run directory whose second layer has an expert that no token chooses, with text beside it."""
    root = write_run(tmp_path_factory.mktemp("quant"))
    cfg = config_of(root, selection_bias=True)
    params, bias = model.init(cfg.model, jax.random.key(0))
    bias["layers"]["moe"]["router_bias"] = bias["layers"]["moe"]["router_bias"].at[0, 2].set(-100.0)
    weights.save_weights(root / "biased", cfg, params, bias, [{"event": "test"}])
    return root


@pytest.mark.slow
def test_command(folder):
    """It writes a run directory that eval.py reads. Its weights are those in memory, and quant.json describes them."""
    environ = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONDONTWRITEBYTECODE": "1"} | programs.environment()
    (folder / "out").mkdir()
    server, made = Server(folder / "out", environ), folder / "made"
    options = ["--bits=2", "--group=16", "--rows=4", "--seed=3", "--gated"]
    command = (
        str(REPO / "moe_jax" / "quant" / "__main__.py"),
        f"--from={folder}/biased",
        f"--workdir={made}",
        *options,
    )
    status, stdout, stderr, _ = server(*command)
    assert status == 0, stderr
    said = "layer 1, expert 2: no token, so it was rounded to nearest"
    assert said in stdout and "experts: 2 bits a weight, 3.125 with scales" in stdout
    cfg = convert._source_config(folder / "biased")
    rows, _ = calibration_rows(cfg, folder / "biased", 4, 3)
    source = moe_jax.load(folder / "biased", mesh=mesh_of(1, 1, 1))
    params, report = rounded(source.model, source.mesh, source.params, source.router_bias, rows, ONE(gated=True))
    run_made = moe_jax.load(made, mesh=mesh_of(1, 1, 1))
    body = json.loads((made / "quant.json").read_text(encoding="utf-8"))
    jax.tree.map(np.testing.assert_array_equal, run_made.params, params)
    assert body["rounded_to_nearest"] == report.unused() == [{"layer": 1, "expert": 2, "tokens": 0}]
    assert body["matrices"]["layers/moe/w_up"]["bits"] == [[2] * 4] * 2
    assert body["tokens_per_expert"]["1"][2] == 0 < min(body["tokens_per_expert"]["2"])
    event = run_made.origin[-1]
    assert (event["event"], event["from"], event["bits"]) == ("quantize", f"{folder}/biased@0", 2)
    status, _, stderr, _ = server(str(REPO / "eval.py"), f"--workdir={made}")
    assert status == 0, stderr
    evaluated, _ = config.for_evaluation(run_made.cfg, 1)
    corpus = data.prepare(evaluated.data, workdir=None, seed=cfg.seed)
    result = held_out.evaluate(evaluated, source.mesh, params, source.router_bias, corpus, progress=False)
    found = json.loads((made / "eval.json").read_text(encoding="utf-8"))["domains"]
    for row, want in zip(found, result.rows(), strict=True):
        assert row["xent"] == pytest.approx(want["xent"], rel=1e-6)
    # Mistakes: one line, before anything is computed.
    for option, says in {
        "--rows=4000": "--rows=4000: needs 4000 rows of 32 tokens, but the text of numbers, prose has",
        "--calibrate=prosa": "'prosa' is neither a source of the run nor a file; nearest valid: 'prose'",
        "--calibrate=none/*.txt": "--calibrate=none/*.txt: ",
        "--group=15": "--group=15: must divide the input widths",
        "--choices=a": "--choices=a: must be whole numbers",
    }.items():
        status, _, stderr, compiled = server(*command[:2], f"--workdir={folder}/other", *options[:3], option)
        assert status == 2 and says in stderr and stderr.count("\n") == 1 and not compiled, stderr
    server.process.stdin.close()
    server.process.stdout.close()
    server.process.wait(10)
    # Training may go on from rounded weights, but not with adapters.
    goes_on = dataclasses.replace(run_made.cfg, init_from=str(made))
    assert weights.check_same_model(goes_on) == [
        f"config.init_from: the weights of {made} are rounded; training moves them off their grids"
    ]
    adapted = dataclasses.replace(goes_on.model, lora=config.LoRAConfig(rank=2))
    with pytest.raises(ConfigError, match=re.escape(f"nearest valid: --config.init_from={folder}/biased, which was")):
        weights.check_same_model(dataclasses.replace(goes_on, model=adapted))
