"""Windows of attention and layers without RoPE: back ends, a plain loop over layers, the cache, meshes."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_attend import mesh_of as attend_mesh
from test_attend import operands, put, with_gradients
from test_invariance import PADDING, assert_same, batch_rows, run_config
from test_model import EVERYTHING, biased, init, inputs_of, mesh_of, packed, plain_rope, score, under_mesh
from test_stacks import plain_forward

from moe_jax import config, model, optim, upcycle
from moe_jax.config import ModelConfig
from moe_jax.config.layers import Kind
from moe_jax.config.positions import Attends, read_layers, write_layers
from moe_jax.errors import ConfigError
from moe_jax.evaluate.generate import generate
from moe_jax.moe.program import Program
from moe_jax.nn import attend, chunked
from moe_jax.nn.qk_clip import max_logits
from moe_jax.parallel import sharding
from moe_jax.train import step
from moe_jax.train.gradients import make_gradients
from moe_jax.train.state import abstract_state, init_state, put_batch
from moe_jax.tree import flatten

# --- back ends -------------------------------------------------------------------------------------------------------


def by_hand(q, k, v, segments, window):
    """One query at a time, in float64."""
    y = np.zeros((*q.shape[:3], v.shape[-1]))
    group = q.shape[2] // k.shape[2]
    for b, i, n in np.ndindex(*q.shape[:3]):
        seen = [j for j in range(max(0, i - window + 1), i + 1) if segments is None or segments[b, i] == segments[b, j]]
        logits = k[b, seen, n // group].astype(float) @ q[b, i, n] / q.shape[-1] ** 0.5
        p = np.exp(logits - logits.max())
        y[b, i, n] = p / p.sum() @ v[b, seen, n // group]
    return y


def test_xla_by_hand():
    (q, k, v), dy, ids = operands(s=24)
    y = with_gradients(functools.partial(attend.attend, backend="xla", window=5), (q, k, v), dy, ids)[1]
    np.testing.assert_allclose(y, by_hand(q, k, v, ids, 5), atol=2e-6)


def check(fn, qkv, dy, segments, window):
    got = with_gradients(fn, qkv, dy, segments)
    xla = functools.partial(attend.attend, backend="xla", window=window)
    want = with_gradients(xla, qkv, dy, segments)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.abs(b).max() > 0.1
        np.testing.assert_allclose(a, b, atol=2e-6 * np.abs(b).max())


SLOW = pytest.mark.slow


@pytest.mark.parametrize("segmented", [pytest.param(False, marks=SLOW), True])
@pytest.mark.parametrize(
    ("length", "window", "cut"),
    [
        pytest.param(40, 9, [(0, 40, 40, None)], marks=SLOW),  # one block: a mask
        pytest.param(92, 2, [(0, 96, 16, 1)], marks=SLOW),  # its own token and one more
        (92, 37, [(0, 96, 16, 36)]),  # more keys than a block; the last block ends on padding
        # Nearly all keys: spans, and a mask.
        pytest.param(92, 80, [(0, 32, 16, None), (32, 64, 16, None), (64, 96, 16, None)], marks=SLOW),
    ],
)
def test_chunked_equals_xla(monkeypatch, length, window, cut, segmented):
    if length > 40:
        monkeypatch.setattr(chunked, "SPANS", 3)
        monkeypatch.setattr(chunked, "BLOCK", (16, 16))
    assert chunked.spans(length, window) == cut
    qkv, dy, ids = operands(s=length, w=8)
    fn = functools.partial(attend.attend, backend="chunked", window=window)
    check(fn, qkv, dy, ids if segmented else None, window)


def test_chunked_computes_the_keys_of_a_window_only():
    """The logits of a block, in the program of the gradient: its keys and the window's, however long the sequence."""

    def logits(length):
        x = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
        loss = lambda x: jnp.sum(attend.attend(x, x, x, None, "chunked", window=100))
        return set(re.findall(r"f32\[1,2,1,(\d+),(\d+)\]", str(jax.make_jaxpr(jax.grad(loss))(x)))) - {("256", "1")}

    assert logits(2048) == logits(8192) == {("256", "355")}


@pytest.mark.parametrize(
    ("segmented", "window", "w"),
    [pytest.param(False, 100, 16, marks=SLOW), (True, 100, 8), pytest.param(True, 200, 16, marks=SLOW)],
)
def test_splash_equals_xla(segmented, window, w):
    """Runs in Pallas' interpreter, with 2 blocks of 128."""
    qkv, dy, ids = operands(w=w)
    local = functools.partial(attend._splash, window=window, interpret=True)
    fn = lambda *args: sharding.per_device(local, 4, check_vma=False)(*args)
    check(fn, qkv, dy, ids if segmented else None, window)


@pytest.mark.parametrize(
    ("segmented", "h", "w"),
    [(False, 64, 64), (True, 64, 64), *(pytest.param(False, h, w, marks=SLOW) for h, w in ((192, 192), (64, 48)))],
)
def test_cudnn_is_told_of_the_window(monkeypatch, segmented, h, w):
    """Every call of the program for a GPU, forward and backward; benchmarks/attention.py compares on one."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91_000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda _: False)
    qkv, dy, ids = operands(h=h, w=w)
    loss = lambda qkv, dy, segments: jnp.sum(attend.attend(*qkv, segments, "cudnn", window=100) * dy)
    with jax.set_mesh(attend_mesh(2, 1, 1)):
        args = put((*jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), (qkv, dy)), ids if segmented else None))
        text = jax.jit(jax.grad(loss)).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "__cudnn$fmhaSoftmax" in line]
    assert len(calls) >= 2 and all(r"sliding_window_length\22: 100," in call for call in calls)


def test_largest_logits_are_those_of_the_window(monkeypatch):
    monkeypatch.setattr("moe_jax.nn.qk_clip.BLOCK", 8)
    (q, k, _), _, ids = operands(s=40)
    counted = np.random.default_rng(1).random(ids.shape) < 0.7
    for window in (1, 20):
        want = np.full((2, 4), -np.inf)
        for b, i, n in np.ndindex(2, 40, 4):
            seen = [j for j in range(max(0, i - window + 1), i + 1) if ids[b, i] == ids[b, j]]
            top = max(float(k[b, j, n // 2] @ q[b, i, n]) / 4 for j in seen)
            want[b, n] = max(want[b, n], top) if counted[b, i] else want[b, n]
        with jax.set_mesh(attend_mesh(2, 1, 1)):
            got = jax.jit(functools.partial(max_logits, window=window))(*put((q, k, ids, counted)))
        np.testing.assert_allclose(got, want, rtol=1e-5)


# --- the list of layers ----------------------------------------------------------------------------------------------


def test_what_is_read_and_how_it_is_written():
    window, full, nope = Attends(True), Attends(), Attends(rope=False)
    assert read_layers("2*window full  3*full:nope") == (window, window, full, nope, nope, nope)
    assert write_layers((window, full, window, full, window)) == "window full"
    assert write_layers((full, full, nope, full)) == "2*full full:nope"
    made = config.build_model({"num_layers": 8, "window": 9, "attention_layers": "window window 1*window full"})
    assert made.attention_layers == "3*window full" and made.attends[:4] == (window, window, window, full)
    assert config.build_model({"window": 9, "attention_layers": "window"}).attention_layers == ""
    listed = lambda layers, text: config.build_model({"num_layers": layers, "window": 9, "attention_layers": text})
    assert listed(6, "window full window").attends == (window, full, window) * 2  # not every second one
    assert listed(3, "window full window 5*full:nope").attention_layers == "window full"


def test_units_grow_to_the_list():
    """A loop over equal units; what is left over, and a list as long as the model, follow as runs."""
    of = lambda **fields: [
        (s.name, s.repeat, "".join("w" if kind.attends.window else "f" for kind in s.unit))
        for s in ModelConfig(window=9, **fields).stacks
    ]
    assert of(num_layers=8, attention_layers="3*window full") == [("layers", 2, "wwwf")]
    assert of(num_layers=11, num_dense_layers=1, attention_layers="3*window full") == [
        ("dense_layers", 1, "w"), ("layers", 2, "wwfw"), ("layers_2", 2, "w")]  # fmt: skip
    assert of(num_layers=8, attention_layers="6*full 2*window") == [("layers", 6, "f"), ("layers_2", 2, "w")]
    assert of(num_layers=4) == [("layers", 4, "w")]
    assert of(num_layers=8, layers="4*(dense moe)", attention_layers="window full") == [("layers", 4, "wf")]
    assert of(num_layers=12, layers="6*(dense moe)", attention_layers="2*window full") == [("layers", 2, "wwfwwf")]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"attention_layers": "full windw"}, "at character 6, 'windw': must be one of full, window"),
        ({"attention_layers": "0*full"}, "a count must be in [1, 9999]"),
        ({"attention_layers": "2* full * window"}, "a count must be in [1, 9999]"),
        ({"attention_layers": "window full"}, "window=0: must be > 0 for the windows"),
        ({"attention_layers": "full", "window": 4}, "window=4: has no effect"),
        ({"attention_layers": "4*full window", "window": 4}, "window=4: has no effect"),
        (
            {"attention_layers": "4*window full", "window": 4, "rope_scaling": {"factor": 2.0, "layers": "full"}},
            "layers='full': needs layers with a window and layers without",
        ),
        ({"attention_layers": "full full:nope", "layers": "2*(late moe)"}, "must have one word with late blocks"),
        ({"rope_dim": 33}, "rope_dim=33: must be ≤ head_dim=32"),
        ({"rope_dim": 3}, "rope_dim=3: must be even"),
    ],
)
def test_refusals(fields, says):
    with pytest.raises(ConfigError) as raised:
        config.build_model({"num_layers": 4, **fields})
    assert says in str(raised.value) and "\n" not in str(raised.value)


# --- the model -------------------------------------------------------------------------------------------------------

# A unit of two blocks that differ, a part of a head; the window is shorter than the documents of `packed`.
MIXED = dataclasses.replace(
    EVERYTHING, num_layers=4, num_dense_layers=0, layers="", rope_dim=4, window=3,
    attention_layers="window full:nope", qk_norm=False,
)  # fmt: skip


def plain_windowed(cfg, w, x, inputs, attends):
    """As `test_model.plain_attention`, with a window, a part of a head, and without rotation."""
    b, s = x.shape[:2]
    q, k, v = ((x @ w[f"w_{n}"]).reshape(b, s, -1, cfg.head_dim) for n in "qkv")
    if attends.rope:
        turned = lambda a: jnp.concatenate(
            [plain_rope(a[..., : cfg.rope_dim], inputs.positions, cfg.rope_theta), a[..., cfg.rope_dim :]], -1
        )
        q, k = turned(q), turned(k)
    at, out = jnp.arange(s), []
    for n in range(cfg.num_heads):
        m = n // (cfg.num_heads // cfg.num_kv_heads)
        scores = jnp.einsum("bsh,bzh->bsz", q[:, :, n], k[:, :, m]) / cfg.head_dim**0.5
        seen = (at[:, None] >= at[None])[None] & (inputs.segments[:, :, None] == inputs.segments[:, None])
        if attends.window:
            seen &= (at[:, None] - at[None] < cfg.window)[None]
        out.append(jax.nn.softmax(jnp.where(seen, scores, -1e30), -1) @ v[:, :, m])
    return jnp.concatenate(out, -1) @ w["w_o"]


@functools.cache
def gradients(cfg, backend="chunked"):
    params, bias = init(cfg)
    run = lambda cfg, params, bias, inputs: model.abstract(cfg, Program(attention=backend)).bind(params, bias)(inputs)[
        :2
    ]
    with jax.set_mesh(mesh_of(1, 1, 1)):
        return jax.jit(jax.value_and_grad(functools.partial(score, run, cfg), has_aux=True))(
            params, biased(bias), packed()[0]
        )


def test_a_windowed_model_equals_a_plain_loop(monkeypatch):
    """Hidden states, expert loads, and the gradient of a function of the logits in every parameter."""
    (_, (hidden, stats)), grads = gradients(MIXED)
    attends = iter([])

    def attention(cfg, w, x, inputs):
        return plain_windowed(cfg, w, x, inputs, next(attends))

    monkeypatch.setattr("test_stacks.plain_attention", attention)
    units = [[(place.path, place.index, place.kind.name)] for place in MIXED.places]
    params, bias = init(MIXED)
    local = jax.tree.map(jnp.asarray, jax.device_get((params, biased(bias), packed()[0])))

    def plain(cfg, *args):
        nonlocal attends
        attends = iter(cfg.attends)
        return plain_forward(units, cfg, *args)

    (_, (want, loads)), want_grads = jax.jit(jax.value_and_grad(functools.partial(score, plain, MIXED), has_aux=True))(
        *local
    )
    np.testing.assert_allclose(hidden, want, rtol=1e-5, atol=2e-5)
    for (path, index), load in loads.items():
        np.testing.assert_array_equal(stats[path].tokens_per_expert[index, 0], load)
    for (path, g), w in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(want_grads), strict=True):
        scale = np.abs(w).max()
        assert scale > 1e-4, path
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=2e-5 * scale, err_msg=jax.tree_util.keystr(path))


LATENT = dataclasses.replace(
    MIXED, rope_dim=0, num_kv_heads=4, head_dim=8, mla=config.MLAConfig(6, 0, 4, 6), attention_layers="window full"
)


@pytest.mark.slow
@pytest.mark.parametrize("cfg", [MIXED, LATENT], ids=["heads", "latent"])
def test_generation_with_a_cache_of_the_window(cfg):
    """Greedy samples are the argmax of the full forward pass over them; prompts are longer than the window."""
    params, bias = init(cfg)
    cache = jax.eval_shape(lambda: model.abstract(cfg).bind(params, bias).empty_cache(2, 20))
    lengths = {path: kept.k.shape[2] for path, kept in cache.items()}
    assert lengths == {p.path: 3 if p.kind.attends.window else 20 for p in cfg.places}
    prompts = [[5, 1, 7, 2, 11, 4], [3, 9, 14, 2, 2, 8, 1]]
    out = generate(cfg, mesh_of(1, 1, 1), params, bias, prompts, [14, 13])
    run = under_mesh(lambda params, bias, inputs: model.abstract(cfg).bind(params, bias)(inputs).hidden)
    best = np.asarray(np.asarray(run(params, bias, inputs_of(out))) @ np.asarray(params["embed"]).T).argmax(-1).tolist()
    for tokens, prompt, chosen in zip(out, prompts, best, strict=True):
        assert tokens[len(prompt) :] == chosen[len(prompt) - 1 : -1]


def test_flops_count_the_keys_of_a_window():
    of = lambda **fields: model.flops_per_token(ModelConfig(num_layers=2, **fields), 100)
    heads = 4 * (32 + 32)
    keys = sum(min(i + 1, 10) for i in range(100)) / 100
    saved = of() - of(window=10, attention_layers="window full")
    assert saved == 6 * heads * (50 - (10 - 10**2 / 200)) and abs(keys - (10 - 10**2 / 200)) < 0.1
    assert of(window=100) == of()


@pytest.mark.slow
def test_an_upcycled_model_keeps_its_window():
    dense = dataclasses.replace(MIXED, num_dense_layers=4, attention_layers="", moe=config.MoEConfig())
    params, _ = init(dense)
    with jax.set_mesh(mesh_of(1, 1, 1)):
        after, made = upcycle.apply([upcycle.VirtualGroups(4, 2, 2, dense_layers=1)], dense, params)
    assert (after.window, after.rope_dim, after.num_moe_layers) == (3, 4, 3)
    assert upcycle.logits_error((dense, params), (after, made), mesh_of(1, 1, 1)) < 1e-5


def test_every_block_of_a_unit_gets_adapters():
    shapes = flatten(model.abstract(dataclasses.replace(MIXED, lora=config.LoRAConfig(rank=2))).shapes)
    paths = {place.path for place in MIXED.places}
    assert len(paths) == 2 and all(any(name.startswith(f"{path}/attention/w_q_") for name in shapes) for path in paths)


def test_unlike_layers_are_not_upcycled():
    dense = dataclasses.replace(MIXED, num_dense_layers=4, moe=config.MoEConfig())
    with pytest.raises(ConfigError, match=r"upcycle.from=.*window full:nope.*do not attend alike"):
        upcycle.final_config([upcycle.VirtualGroups(2, 1, 1)], dense)


# --- the invariance matrix -------------------------------------------------------------------------------------------


def windowed(*args, qk_clip: float = 0.0, **kwargs) -> config.RunConfig:
    cfg = run_config(*args, **kwargs)
    ordered = dataclasses.replace(
        cfg.model, num_layers=5, window=2, attention_layers="window full:nope", qk_norm=False, rope_dim=2,
        attention="chunked",
    )  # fmt: skip
    return dataclasses.replace(cfg, model=ordered, optim=dataclasses.replace(cfg.optim, qk_clip=qk_clip))


@functools.cache
def state_on(shape):
    mesh = sharding.make_mesh(shape, jax.devices()[: int(np.prod(shape))])
    if mesh.size == 1:
        state = init_state(windowed(), mesh)
        slope = lambda b: b + jnp.linspace(-0.05, 0.05, b.shape[-1])[None]
        return mesh, state._replace(router_bias=jax.tree.map(slope, state.router_bias))
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(windowed(), mesh))
    return mesh, jax.device_put(jax.device_get(state_on((1, 1, 1))[1]), shardings)


def everything(shape, *args, paddings=PADDING, **kwargs) -> list[dict]:
    """Loss, parts, sums, gradients, and parameters after a step of Muon with QK-clip, for each padding."""
    mesh, state = state_on(shape)
    cfg = windowed(*args, qk_clip=0.5, **kwargs)
    gradients = make_gradients(cfg, mesh)
    optimizer = optim.make_optimizer(cfg.optim, cfg.train.steps)

    @jax.jit
    def one(state, batch):
        loss, parts, sums, grads = gradients(state.params, state.router_bias, batch, 0)
        updates, _ = optimizer.update(grads, state.opt_state, state.params)
        params = jax.tree.map(jnp.add, state.params, updates)
        params, clipping = step.qk_clip.clip(params, sums.maxima, cfg.optim.qk_clip)
        return {"loss": loss, "parts": parts, "sums": sums, "grads": grads, "params": params} | clipping

    with jax.set_mesh(mesh):
        return [jax.device_get(one(state, put_batch(batch_rows(p), mesh, cfg))) for p in paddings]


oracle = functools.cache(lambda: everything((1, 1, 1)))
CASES = [
    ((2, 2, 2), 2, "full", "grouped", "ring"),
    ((1, 2, 4), 4, "selective", "grouped", "all_to_all"),
    ((8, 1, 1), 1, "none", "grouped", "ring"),
]


@pytest.mark.slow  # the fast part has units of blocks in test_routers_models.py
@pytest.mark.parametrize("case", CASES)
def test_invariance(case):
    shape, micro, remat, compute, exchange = case
    got = everything(shape, micro, remat, compute, exchange=exchange)
    for a, b in zip(got, oracle(), strict=True):
        assert_same(a, b)
    assert got[0]["clipped_heads"] > 0
    for path in {place.path for place in windowed().model.places}:
        assert np.abs(flatten(got[0]["grads"])[f"{path}/attention/w_q"]).max() > 1e-6


@pytest.mark.slow
def test_the_window_and_the_missing_rotation_matter():
    """The same weights with every layer full, or rotated, have another loss: nothing above is equal by accident."""
    kinds = {kind for stack in windowed().model.stacks for kind in stack.unit}
    assert kinds == {
        Kind("dense", 0, Attends(True)),
        Kind("moe", 4, Attends(True)),
        Kind("moe", 4, Attends(rope=False)),
    }
    losses = []
    mesh, state = state_on((1, 1, 1))
    for window in (1, 2, 4):
        cfg = windowed()
        cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, window=window))
        with jax.set_mesh(mesh):
            batch = put_batch(batch_rows(0.0), mesh, cfg)
            losses.append(float(jax.jit(make_gradients(cfg, mesh))(state.params, state.router_bias, batch, 0).loss))
    assert abs(losses[0] - losses[1]) > 1e-4 and abs(losses[1] - losses[2]) > 1e-4
