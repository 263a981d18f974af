"""Latent attention and dense models in training: meshes, micro-batches, Muon, QK-clip, remat, no MoE layer at all."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_invariance import batch_rows, run_config
from test_remat import MOE as REMAT_MOE
from test_remat import of_a_token

from moe_jax import config, model, optim
from moe_jax.config import MLAConfig, ModelConfig, RopeScalingConfig
from moe_jax.errors import ConfigError
from moe_jax.evaluate import analysis, spectra
from moe_jax.moe.program import Program
from moe_jax.nn.qk_clip import clip_mla
from moe_jax.nn.rope import rope, rope_frequencies
from moe_jax.parallel import sharding
from moe_jax.train import losses, metrics, step
from moe_jax.train.gradients import forward
from moe_jax.train.state import init_state, put_batch
from moe_jax.tree import path_of

BASE = run_config().model
LATENT = dataclasses.replace(BASE, qk_norm=False, num_kv_heads=4, head_dim=8, mla=MLAConfig(6, 0, 4, 6))
VARIANTS = {
    "mla": LATENT,
    "dense mla": dataclasses.replace(LATENT, num_layers=2, num_dense_layers=2, mla=MLAConfig(6, 10, 4, 6)),
    "dense": dataclasses.replace(BASE, num_dense_layers=3, moe=config.MoEConfig()),
    "norm over projection": dataclasses.replace(BASE, qk_norm_over="projection"),
}


@functools.cache
def mesh_of(*shape):
    return sharding.make_mesh(shape, jax.devices()[: math.prod(shape)])


@functools.cache
def after_a_step(name, shape, micro):
    """(state, aux) after one step of Muon, on the host; fresh values do not depend on the mesh."""
    cfg = run_config(micro)
    clip = 0.5 if VARIANTS[name].mla.kv_rank else 0.0
    cfg = dataclasses.replace(cfg, model=VARIANTS[name], optim=dataclasses.replace(cfg.optim, qk_clip=clip))
    mesh = mesh_of(*shape)
    state = init_state(cfg, mesh)
    train_step = step.make_train_step(cfg, mesh)
    return jax.device_get(train_step(state, put_batch(batch_rows(0.25), mesh, cfg)))


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_mesh_and_micro_batches_change_nothing(name):
    (one, aux), (other, aux_2) = after_a_step(name, (1, 1, 1), 1), after_a_step(name, (2, 2, 2), 2)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)
    jax.tree.map(close, one.params, other.params)
    jax.tree.map(close, aux, aux_2)
    assert np.isfinite(aux.loss) and aux.grad_norm > 0
    if VARIANTS[name].mla.kv_rank:
        assert aux.clipping["clipped_heads"] > 0 and np.isfinite(aux.clipping["max_logit"])


@pytest.mark.slow
def test_no_moe_layer_is_no_nan():
    """L = 0: the loss is the cross-entropy, there is no router metric, and nothing is NaN."""
    state, aux = after_a_step("dense mla", (1, 1, 1), 1)
    assert set(state.params) == {"embed", "dense_layers", "final_norm", "head"} and not state.router_bias
    assert aux.loss == aux.terms["xent"] and aux.terms["load_balance"] == aux.terms["router_z"] == 0
    assert aux.router == {}
    rates = dict.fromkeys(("tokens", "tokens_per_second", "step_seconds", "flops_per_token", "peak"), 1.0)
    row = metrics.train_metrics(1, aux, router={}, **rates)
    assert all(math.isfinite(v) for v in row.values()) and "max_load" not in row
    sums = losses.BatchSums(jnp.float32(6), jnp.float32(3), {})
    for layers in ("mean", "sum"):
        value, parts = losses.total_loss(sums, config.LossConfig(router_loss_layers=layers))
        assert float(value) == 2 and not parts.router["router_z"]


def test_no_moe_layer_in_evaluation():
    cfg = dataclasses.replace(run_config(), model=VARIANTS["dense"])
    mesh = mesh_of(1, 1, 1)
    state = init_state(cfg, mesh)
    batch = batch_rows(0.25) | {"domain_ids": np.zeros((32, 8), np.int32)}
    sums = step.make_eval_step(cfg, mesh, 2, record=True)(
        state.params, state.router_bias, put_batch(batch, mesh, cfg, by_domain=True)
    )
    assert np.isfinite(sums.nll).all() and sums.router == sums.choices == {}
    assert analysis.analyse(cfg.model.places, {}, {}, ("a", "b"), 2) == {}


# --- latent attention ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("q_rank", [0, 10])
def test_qk_clip_brings_every_head_to_the_threshold(q_rank):
    """In one layer, whose inputs it does not change: a head's largest logit S becomes min(S, τ), or keeps its bits."""
    cfg = dataclasses.replace(LATENT, num_layers=1, num_dense_layers=1, mla=MLAConfig(6, q_rank, 4, 6))
    run = dataclasses.replace(run_config(), model=cfg)
    mesh, graph = mesh_of(1, 1, 1), model.abstract(cfg, Program(max_logit=True))
    params = init_state(run, mesh).params
    with jax.set_mesh(mesh):
        batch = put_batch(batch_rows(0.25), mesh, run)
        top = jax.jit(lambda p: forward(graph, p, {}, batch)[0].max_logit["dense_layers"])
        before = np.asarray(top(params))
        limit = float(np.median(before))
        w = params["dense_layers"]["attention"]
        clipped = jax.jit(clip_mla)(w, jnp.asarray(before), limit)
        after = np.asarray(top({**params, "dense_layers": {**params["dense_layers"], "attention": clipped}}))
    np.testing.assert_allclose(after, np.minimum(before, limit), rtol=1e-5)
    changed = {name for name in w if not np.array_equal(w[name], clipped[name])}
    assert changed == {"w_q_up" if q_rank else "w_q", "w_k_up"}  # never the key that all heads share
    kept = np.flatnonzero(before[0] <= limit)
    for name in changed:
        heads = lambda x: np.asarray(x)[0].reshape(x.shape[1], 4, -1)[:, kept]
        np.testing.assert_array_equal(heads(w[name]), heads(clipped[name]))


@pytest.mark.slow
def test_selective_remat_keeps_what_its_table_says():
    cfg = ModelConfig(vocab_size=32, d_model=20, num_layers=3, num_dense_layers=1, d_ff=36, num_heads=4, num_kv_heads=4,
                      head_dim=12, mla=MLAConfig(10, 14, 4, 6), remat="selective", moe=REMAT_MOE)  # fmt: skip
    qkv = 10 + 4 + 4 * (2 * 12 - 4 + 6) + 14
    assert of_a_token(cfg, num_layers=4, num_dense_layers=2) == 2 * (20 + qkv + 4 * 6 + 20 + 2 * 36)


def test_counts_and_flops_by_hand():
    cfg = dataclasses.replace(LATENT, num_layers=2, num_dense_layers=2)
    attention = 16 * 4 * 8 + 16 * 6 + 16 * 4 + 6 * 4 * 4 + 6 * 4 * 6 + 4 * 6 * 16  # q; latent; its rope; k; v; o
    rest, norms, tables = 2 * (attention + 3 * 16 * 24), 2 * (2 * 16 + 6) + 16, 2 * 48 * 16
    counts = model.count_parameters(cfg)
    assert counts.total == counts.active == rest + norms + tables
    assert model.flops_per_token(cfg, 10) == 6 * (rest + 48 * 16) + 3 * 2 * 10 * 4 * (8 + 6)


def test_refusals():
    for change, message in (
        ({"qk_norm": True}, r"model\.qk_norm=True: is not available with mla"),
        ({"num_kv_heads": 2}, r"num_kv_heads=2: must be num_heads=4"),
        ({"head_dim": 4}, r"head_dim=4: must be > mla\.rope_dim=4"),
        ({"mla": {"q_rank": 4}}, r"mla\.q_rank=4: needs kv_rank > 0"),
        ({"rope_scaling": {"factor": 2.0, "high_freq_factor": 0.5}}, r"high_freq_factor=0\.5: must be > low"),
    ):
        with pytest.raises(ConfigError, match=message):
            config.build_model(config.to_dict(LATENT) | change)
    with pytest.raises(ConfigError, match=r"optim\.per_head=True: is not available with model\.mla"):
        dataclasses.replace(run_config(), model=LATENT, optim=config.OptimConfig(per_head=True))


def test_optimizer_rules_cover_dense_and_latent_models():
    for cfg in VARIANTS.values():
        shapes = model.abstract(cfg).shapes
        labels = {path_of(p): x for p, x in jax.tree_util.tree_leaves_with_path(optim.label_params(shapes))}
        rule = optim.matrices_of(config.OptimConfig())
        for path, x in jax.tree_util.tree_leaves_with_path(shapes):
            name = path_of(path)
            assert (labels[name] == "matrix") == (name.split("/")[-1].startswith("w_") and "router" not in name)
            if labels[name] != "adamw":
                rule(name, x)
            assert (spectra.kind_of(name) is None) == name.endswith("norm")


def test_llama_3_scaling_by_hand():
    """Slow turns divided by the factor, fast ones as they are, a line between."""
    plain = ModelConfig(rope_theta=1e4)
    scaled = dataclasses.replace(plain, rope_scaling=RopeScalingConfig(factor=8.0, original_length=1000))
    a, b = rope_frequencies(plain, 16), rope_frequencies(scaled, 16)
    turns = 1000 * a.astype(float) / (2 * np.pi)
    assert (turns > 4).any() and (turns < 1).any() and ((turns > 1) & (turns < 4)).any()
    for f, g, t in zip(a, b, turns, strict=True):
        share = min(max((t - 1) / 3, 0), 1)
        assert g == pytest.approx(f * share + f / 8 * (1 - share), rel=1e-6)


def test_rotation_of_bfloat16_is_exact_at_far_positions():
    """In bfloat16, position 16,001 would be 16,000, and its angles those of another token."""
    freq, x = rope_frequencies(ModelConfig(), 16), np.random.default_rng(0).normal(size=16).astype(jnp.bfloat16)
    got = np.asarray(rope(jnp.asarray(x)[None, None, None], jnp.full((1, 1), 16_001), freq), float).ravel()
    a, b = x.astype(float)[:8], x.astype(float)[8:]
    c, s = np.cos(16_001 * freq.astype(float)), np.sin(16_001 * freq.astype(float))
    np.testing.assert_allclose(got, np.concatenate([a * c - b * s, b * c + a * s]), atol=0.01)
