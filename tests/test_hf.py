"""Import and export against transformers: logits, chosen experts, the KV cache, bit-identical files. CPU, float32."""

import copy
import dataclasses
import functools
import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

hf_models = pytest.importorskip("tests.hf_models" if __package__ else "hf_models")

from hf_models import MODELS, TOKENS, build, forward, saved, torch, transformers  # noqa: E402

from moe_jax import model  # noqa: E402
from moe_jax.config import MoEConfig  # noqa: E402
from moe_jax.evaluate.generate import generate  # noqa: E402
from moe_jax.hf import export_run, import_model  # noqa: E402
from moe_jax.hf import safetensors as files  # noqa: E402
from moe_jax.moe import routing  # noqa: E402
from moe_jax.moe.layer import TokenInfo  # noqa: E402
from moe_jax.moe.program import Program  # noqa: E402
from moe_jax.moe.routing import Facts  # noqa: E402
from moe_jax.moe.stats import by_depth  # noqa: E402
from moe_jax.nn.layers import weight  # noqa: E402
from moe_jax.parallel import sharding  # noqa: E402
from moe_jax.run import weights  # noqa: E402
from moe_jax.train.state import abstract_weights  # noqa: E402
from moe_jax.upcycle import Noise, VirtualGroups, convert  # noqa: E402

# Compiling is what takes time: the fast tests have models of most architectures, two with a cache.
SLOW = {
    "qwen2", "llama", "smollm2", "mistral", "deepseek_v3", "qwen3_moe, every second", "olmo2", "flex_olmo",
    "deepseek_v2, greedy", "smollm3", "glm4_moe", "linear", "dynamic", "yarn", "longrope", "deepseek_v2", "qwen2_moe",
    "qwen3", "mixtral",
}  # fmt: skip
# Scalings that depend on the length so far: keys stay in the cache as they were rotated, so that logits are others.
BY_LENGTH = {"dynamic", "longrope"}
some = lambda slow: [pytest.param(n, marks=pytest.mark.slow if n in slow else ()) for n in sorted(MODELS)]
QUIET = lambda line: None


@functools.cache
def mesh_of(*shape):
    return sharding.make_mesh(shape, jax.devices()[: int(np.prod(shape))])


@functools.cache
def imported(name, shape=(1, 1, 1)):
    """The run directory of a model, and its configuration in float32."""
    workdir = Path(tempfile.mkdtemp(prefix=f"run-{name.partition(',')[0]}-")) / "run"
    cfg = import_model(saved(name), workdir, mesh=mesh_of(*shape), echo=QUIET)
    return workdir, dataclasses.replace(cfg.model, compute_dtype="float32")


@functools.cache
def load(name):
    workdir, cfg = imported(name)
    params, bias, _ = weights.load_weights(workdir, *abstract_weights(cfg, mesh_of(1, 1, 1)))
    return cfg, params, bias


def logits_of(cfg, params, bias, tokens, prefill=None):
    """`[B, S, V]`, and all choices; with `prefill`, through a cache: so many tokens, then one at a time."""
    graph, mesh = model.abstract(cfg, Program(record=True)), mesh_of(1, 1, 1)

    @jax.jit
    def run(params, bias, tokens, cache, start):
        net = graph.bind(params, bias)
        at = start + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        positions = jax.sharding.reshard(jnp.broadcast_to(at[None], tokens.shape), sharding.BATCH)
        info = TokenInfo(tokens >= 0, jnp.zeros_like(tokens))
        out = net(model.Inputs(tokens, positions, None, info), cache, start if cache else None)
        head = weight(net.output_matrix, "float32")
        experts = [choices.experts for choices in by_depth(cfg.places, out.choices)]
        logits = jnp.einsum("bsd,vd->bsv", out.hidden, head)
        return logits, out.cache, jnp.stack(experts) if experts else jnp.zeros((0,))

    with jax.set_mesh(mesh):
        tokens = jax.device_put(tokens, sharding.batch_sharding(mesh))
        if prefill is None:
            logits, _, experts = run(params, bias, tokens, None, jnp.int32(0))
            return np.asarray(logits), np.asarray(experts)
        cache, parts = graph.bind(params, bias).empty_cache(*tokens.shape), []
        for start, stop in [(0, prefill), *((i, i + 1) for i in range(prefill, tokens.shape[1]))]:
            logits, cache, _ = run(params, bias, tokens[:, start:stop], cache, jnp.int32(start))
            parts.append(np.asarray(logits))
    return np.concatenate(parts, axis=1), None


def error(got, want):
    return np.abs(got - want).max() / np.abs(want).max()


@pytest.mark.parametrize("name", some(SLOW))
def test_same_logits_and_experts(name):
    want, chosen = forward(build(name), TOKENS)
    cfg, params, bias = load(name)
    got, experts = logits_of(cfg, params, bias, TOKENS)
    assert experts.shape[0] == cfg.num_moe_layers == len(chosen)
    for mine, theirs in zip(experts, chosen, strict=True):
        np.testing.assert_array_equal(np.sort(mine, axis=-1).reshape(theirs.shape), theirs)
    assert error(got, want) < 1e-5 and want.std() > 0.1


@pytest.mark.parametrize(
    "name", [p for p in some(set(MODELS) - {"moonlight", "llama3"}) if p.values[0] not in BY_LENGTH]
)
def test_same_logits_through_the_cache(name):
    want, _ = forward(build(name), TOKENS)
    assert error(logits_of(*load(name), TOKENS, prefill=9)[0], want) < 1e-5


# Their cache has windows, a context that is extended, latents, multipliers, or another order of blocks. That of the
# others is compared logit by logit above.
WRITES = sorted({"llama", "llama3", "mistral", "qwen2", "olmo3", "smollm3", "moonlight", "deepseek_v2", "granite",
                 "yarn", "qwen3_moe, every second"} | BY_LENGTH)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITES)
def test_the_same_20_tokens(name):
    """Greedily, through the cache, beyond windows and the context before it was extended: what transformers writes."""
    prompts = [TOKENS[i, : 4 + i].tolist() for i in range(3)]
    got = generate(load(name)[0], mesh_of(1, 1, 1), *load(name)[1:], prompts, 20)
    for prompt, mine in zip(prompts, got, strict=True):
        hf_models.reset(build(name))
        with torch.no_grad():
            theirs = build(name).generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)
        assert len(mine) == len(prompt) + 20 and mine == theirs[0].tolist()


def tensors(folder):
    return {name: entry.read() for name, entry in files.open_model(folder).items()}


@pytest.mark.parametrize("name", some(SLOW))
def test_export_is_bit_identical_and_loads(name, tmp_path):
    workdir, _ = imported(name)
    mesh = mesh_of(2, 2, 2) if name == "moonlight" else mesh_of(1, 1, 1)
    architecture = export_run(workdir, tmp_path / "out", mesh=mesh, max_file=60_000, echo=QUIET)
    assert architecture == f"{MODELS[name][0]}ForCausalLM"
    got, want = tensors(tmp_path / "out"), tensors(saved(name))
    assert set(got) == set(want) and (tmp_path / "out" / files.INDEX).exists()
    for tensor in want:
        assert got[tensor].dtype == want[tensor].dtype
        np.testing.assert_array_equal(got[tensor], want[tensor], err_msg=tensor)
    back, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(back) is type(build(name)) and back.dtype == torch.float32
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    np.testing.assert_array_equal(forward(back.eval(), TOKENS)[0], forward(build(name), TOKENS)[0])


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("name", ["moonlight", "smollm2"])
def test_any_mesh_imports_the_same(name, shape):
    """Every leaf of the run directory, read back onto one mesh."""
    one, other = imported(name)[0], imported(name, shape)[0]
    cfg = imported(name)[1]
    abstract = abstract_weights(cfg, mesh_of(1, 1, 1))
    a, b = (weights.load_weights(folder, *abstract) for folder in (one, other))
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a[:2], b[:2])
    assert (one / "config.json").read_text(encoding="utf-8").replace(str(one), "") == (
        (other / "config.json").read_text(encoding="utf-8").replace(str(other), "")
    )


def test_origin_says_where_they_came_from():
    workdir, cfg = imported("moonlight")
    _, _, origin = weights.load_weights(workdir, *abstract_weights(cfg, mesh_of(1, 1, 1)))
    assert [event["event"] for event in origin] == ["import"]
    assert origin[0]["architecture"] == "DeepseekV3ForCausalLM" and origin[0]["from"] == str(saved("moonlight"))


def test_bfloat16_stays_bfloat16(tmp_path):
    """… and the router's weights, which are float32 here, come back as they were."""
    copy.deepcopy(build("qwen3_moe")).to(torch.bfloat16).save_pretrained(tmp_path / "in")  # other tests share the model
    cfg = import_model(tmp_path / "in", tmp_path / "run", mesh=mesh_of(1, 1, 1), echo=QUIET)
    assert cfg.model.param_dtype == "bfloat16"
    export_run(tmp_path / "run", tmp_path / "out", mesh=mesh_of(1, 1, 1), echo=QUIET)
    got, want = tensors(tmp_path / "out"), tensors(tmp_path / "in")
    assert set(got) == set(want) and {x.dtype.name for x in got.values()} == {"bfloat16"}
    for name in want:
        np.testing.assert_array_equal(got[name].view(np.uint16), want[name].view(np.uint16))
    assert json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"


@pytest.mark.slow
@pytest.mark.parametrize("name,architecture", [("llama", "MixtralForCausalLM"), ("qwen3", "Qwen3MoeForCausalLM"),
                                                ("olmo2", "FlexOlmoForCausalLM")])  # fmt: skip
def test_an_upcycled_model_is_exported_and_computes_the_same(name, architecture, tmp_path):
    """Softmax over the chosen, as upcycling has it by default, is what these renormalise to. Experts are disturbed."""
    source, _ = imported(name)
    chain = [VirtualGroups(expansion=3, granularity=2, top_k=4), Noise(0.2)]
    made = convert([str(source)], tmp_path / "run", chain, check=False, echo=QUIET)
    cfg = dataclasses.replace(made.cfg.model, compute_dtype="float32")
    assert export_run(tmp_path / "run", tmp_path / "out", mesh=mesh_of(1, 1, 1), echo=QUIET) == architecture
    there = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    params, bias, _ = weights.load_weights(tmp_path / "run", *abstract_weights(cfg, mesh_of(1, 1, 1)))
    got, experts = logits_of(cfg, params, bias, TOKENS)
    want, chosen = forward(there, TOKENS)
    for mine, theirs in zip(experts, chosen, strict=True):
        np.testing.assert_array_equal(np.sort(mine, axis=-1).reshape(theirs.shape), theirs)
    assert error(got, want) < 1e-5
    assert error(want, forward(build(name), TOKENS)[0]) > 1e-2  # it is another function than the dense one


# --- groups of experts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "groups", [pytest.param(2, marks=pytest.mark.slow), 4, pytest.param(8, marks=pytest.mark.slow)]
)
def test_group_limited_selection_is_that_of_transformers(groups):
    """Sixteen experts in so many groups: every number of groups kept, one to as many experts a token as they have."""
    rng, size = np.random.default_rng(groups), 16 // groups
    logits = rng.normal(size=(200, 16)).astype(np.float32)
    for kept in range(1, groups + 1):
        for top_k in sorted({k for k in (1, 2, 3, size * kept) if k <= size * kept}):
            bias = (0.2 * rng.normal(size=16) - 3.0 * (top_k % 2)).astype(np.float32)  # below zero, or both signs
            there = transformers.models.deepseek_v3.modeling_deepseek_v3.DeepseekV3TopkRouter(
                transformers.DeepseekV3Config(hidden_size=16, n_routed_experts=16, n_group=groups, topk_group=kept,
                                              num_experts_per_tok=top_k, norm_topk_prob=top_k > 1))  # fmt: skip
            with torch.no_grad():
                there.weight.copy_(torch.eye(16))
                there.e_score_correction_bias.copy_(torch.tensor(bias))
                _, weights_TK, experts_TK = there(torch.tensor(logits))
            want = np.zeros_like(logits)
            np.put_along_axis(want, experts_TK.numpy(), weights_TK.numpy(), axis=1)
            cfg = MoEConfig(num_experts=16, top_k=top_k, num_groups=groups, top_groups=kept, score="sigmoid",
                            selection_bias=True, renormalize=top_k > 1, routed_scaling=2.5)  # fmt: skip
            plan, _ = routing.route(jnp.asarray(logits), jnp.asarray(bias), Facts(jnp.ones(200, bool)), cfg)
            got = np.zeros_like(logits)
            np.put_along_axis(got, np.asarray(plan.experts), np.asarray(plan.weights), axis=1)
            np.testing.assert_allclose(got, want, rtol=1e-5, err_msg=f"{kept} groups kept, {top_k} experts")
