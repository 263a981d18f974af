"""Adapters as PEFT writes them: its formula in NumPy, its files both ways, and a merged model in transformers."""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from test_hf import QUIET, error, imported, logits_of, mesh_of

from configs import moonlight_16b_a3b
from moe_jax.config import LoRAConfig, ModelConfig, MoEConfig
from moe_jax.config import build as build_config
from moe_jax.errors import ConfigError, FormatError
from moe_jax.hf import export_run, peft, safetensors, tables
from moe_jax.hf.peft import export_adapter, fuse, stack, unfuse, unstack
from moe_jax.hf.peft_import import Adapter, _oriented, compare_names, import_adapter, read_adapter
from moe_jax.nn import lora
from moe_jax.run import base, weights
from moe_jax.run.checkpoint import Checkpoints
from moe_jax.run.config_file import load_config, save_config
from moe_jax.train.state import abstract_state, abstract_weights
from moe_jax.tree import flatten, nest

hf_models = pytest.importorskip("tests.hf_models" if __package__ else "hf_models")
TOKENS, build, forward, saved = hf_models.TOKENS, hf_models.build, hf_models.forward, hf_models.saved
torch, transformers = hf_models.torch, hf_models.transformers

EXPERTS, INNER, OUTER, RANK = 3, 5, 8, 2


def draw(*shape):
    return np.random.default_rng(sum(shape)).normal(0, 1, shape).astype(np.float32)


def by_the_formula(a, b, experts):
    """ΔW_e [out, in] = Σ_ρ B[:, ρ·E + e] ⊗ A[e·r + ρ, :], as peft's ParamWrapper has it."""
    rank = len(a) // experts
    return [sum(np.outer(b[:, p * experts + e], a[e * rank + p]) for p in range(rank)) for e in range(experts)]


def test_stacks_are_expert_major_in_a_and_rank_major_in_b():
    parts = [(draw(INNER, RANK) + e, draw(RANK, OUTER) - e) for e in range(EXPERTS)]
    a, b = stack(parts)
    assert a.shape == (EXPERTS * RANK, INNER) and b.shape == (OUTER, RANK * EXPERTS)
    for delta, (one, two) in zip(by_the_formula(a, b, EXPERTS), parts, strict=True):
        np.testing.assert_allclose(delta, (one @ two).T, rtol=1e-5, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, unstack(a, b, EXPERTS), parts)


def test_gate_and_up_are_one_of_twice_the_rank():
    gate, up = ((draw(INNER, RANK) + x, draw(RANK, OUTER) + x) for x in (0, 1))
    a, b = fuse(gate, up, OUTER)
    np.testing.assert_allclose(a @ b, np.concatenate([gate[0] @ gate[1], up[0] @ up[1]], axis=1), rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, unfuse(a, b), (gate, up))
    alone = fuse(None, up, OUTER)
    np.testing.assert_array_equal(alone[1][:, :OUTER], 0)
    shared = (a, draw(2 * RANK, 2 * OUTER))  # not block diagonal: both have the whole A
    got = unfuse(*shared)
    np.testing.assert_allclose(np.concatenate([x @ y for x, y in got], axis=1), shared[0] @ shared[1], rtol=1e-4)


# --- whole models ----------------------------------------------------------------------------------------------------

MATCH = {"olmoe": "/(attention|moe)/", "qwen3_moe": "/(attention|moe)/", "moonlight": "/(w_q|w_o|mlp|moe|shared)"}


def adapted(name, root):
    """A run of adapters, drawn so that they matter, for an imported model: its folder, and model in float32."""
    folder, _ = imported(name)
    cfg = load_config(folder)
    lora_cfg = LoRAConfig(rank=RANK, alpha=3.0, match=MATCH[name])
    cfg = dataclasses.replace(
        cfg, init_from=str(folder), model=dataclasses.replace(cfg.model, lora=lora_cfg, compute_dtype="float32")
    )
    mesh = mesh_of(1, 1, 1)
    *_, origin, record = weights.load_base(root / "run", cfg, *abstract_weights(cfg.model.base, mesh))
    state = base.kept(cfg, abstract_state(cfg, mesh))
    rng = np.random.default_rng(3)
    new = {path: rng.normal(0, 0.3, x.shape).astype(np.float32) for path, x in flatten(state.params).items()}
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state)._replace(params=nest(new))
    save_config(root / "run", cfg)
    with Checkpoints(root / "run", keep=1) as checkpoints:
        saved_data = {"origin": origin, "tokens": 1.0, "base": record}
        checkpoints.save(1, state, saved_data, wait=True)
    return root / "run", cfg.model


def load(folder, model):
    params, bias, _ = weights.load_weights(folder, *abstract_weights(model, mesh_of(1, 1, 1)))
    return params, bias


def adapters_of(folder):
    params, _ = weights.load_adapters(folder, load_config(folder), mesh_of(1, 1, 1))
    return {path: np.asarray(x) for path, x in flatten(params).items()}


@pytest.fixture(
    scope="module", params=["olmoe", *(pytest.param(n, marks=pytest.mark.slow) for n in ("qwen3_moe", "moonlight"))]
)
def run(request, tmp_path_factory):
    """(name, folder of the run, model in float32, PEFT's folder)."""
    root = tmp_path_factory.mktemp("peft")
    folder, model = adapted(request.param, root)
    lines = []
    export_adapter(folder, root / "out", mesh=mesh_of(1, 1, 1), echo=lines.append)
    named = json.loads((root / "out" / peft.CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
    assert named == str(saved(request.param))
    assert len(lines) == 1 + (request.param == "moonlight") and "adapters of" in lines[-1]
    return request.param, folder, model, root / "out"


def test_files_hold_what_is_merged(run, tmp_path):
    """By PEFT's formula the files give W + ΔW of the merged export, and reading them back gives the adapters' bits."""
    name, folder, model, out = run
    export_run(folder, tmp_path / "merged", mesh=mesh_of(1, 1, 1), echo=QUIET)
    before, after = (safetensors.open_model(f) for f in (saved(name), tmp_path / "merged"))
    settings = json.loads((out / peft.CONFIG).read_text(encoding="utf-8"))
    entries = {k.removeprefix(peft.PREFIX): e.read() for k, e in safetensors.read_header(out / peft.TENSORS).items()}
    scale, checked = settings["lora_alpha"] / settings["r"], 0
    for key, entry in after.items():
        delta = entry.read().astype(np.float64) - before[key].read()
        module, layer = key.removesuffix(".weight"), ".".join(key.split(".")[:3])
        want = np.zeros_like(delta)
        if f"{module}.lora_A.weight" in entries:
            want = scale * entries[f"{module}.lora_B.weight"] @ entries[f"{module}.lora_A.weight"]
        elif ".experts." in key:
            down = "down_proj" in key
            stem = f"{layer}.mlp.experts{'' if down else '.base_layer'}"
            stacked = by_the_formula(*(entries[f"{stem}.lora_{x}.weight"] for x in "AB"), model.moe.num_experts)
            want = scale * stacked[int(key.split(".experts.")[1].split(".")[0])]
            half = len(want) // 2
            want = want if down else want[:half] if "gate_proj" in key else want[half:]
        checked += want.any()
        np.testing.assert_allclose(delta, want, atol=2e-6, err_msg=key)
    assert checked > 50
    import_adapter(out, load_config(folder).init_from, tmp_path / "back", mesh=mesh_of(1, 1, 1), echo=QUIET)
    back, own = adapters_of(tmp_path / "back"), adapters_of(folder)
    assert set(back) == set(own)
    for path, x in own.items():
        np.testing.assert_array_equal(back[path], x, err_msg=path)
    made = load_config(tmp_path / "back").model.lora
    assert made.rank == RANK and math.isclose(made.scale, model.lora.scale)
    # A run with the same adapters starts from them.
    more = dataclasses.replace(load_config(folder), init_from=str(tmp_path / "back"))
    params, _, _, record = weights.load_start(tmp_path / "more", more, mesh_of(1, 1, 1))
    assert record["from"] == load_config(folder).init_from
    for path, x in own.items():
        np.testing.assert_array_equal(flatten(params)[path], x, err_msg=path)


@pytest.mark.slow
def test_merged_export_in_transformers_gives_our_logits(run, tmp_path):
    name, folder, model, _ = run
    export_run(folder, tmp_path / "merged", mesh=mesh_of(1, 1, 1), echo=QUIET)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    want, _ = forward(theirs, TOKENS)
    got, _ = logits_of(model, *load(folder, model), TOKENS)
    assert error(got, want) < 1e-5
    plain, _ = forward(build(name), TOKENS)
    assert error(plain, want) > 0.01


@pytest.mark.slow
def test_peft_loads_and_writes(run, tmp_path):
    """PEFT itself: the same logits with our files, and files that it saves come back as the same adapters."""
    pytest.importorskip("peft")
    from peft import PeftModel

    name, folder, model, out = run
    if name == "moonlight":
        pytest.skip("PEFT takes its dense layers for experts, which export says")
    theirs = PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(saved(name), dtype=torch.float32), str(out)
    ).eval()
    want, _ = forward(theirs, TOKENS)
    got, _ = logits_of(model, *load(folder, model), TOKENS)
    assert error(got, want) < 1e-5
    theirs.save_pretrained(tmp_path / "peft")
    import_adapter(
        tmp_path / "peft", load_config(folder).init_from, tmp_path / "back", mesh=mesh_of(1, 1, 1), echo=QUIET
    )
    back, own = adapters_of(tmp_path / "back"), adapters_of(folder)
    for path, x in own.items():
        np.testing.assert_array_equal(back[path], x, err_msg=path)


def rewrite(out, target, change, settings=None):
    """A copy of an adapter with other tensors or settings."""
    shutil.copytree(out, target)
    entries = {k: e.read() for k, e in safetensors.read_header(out / peft.TENSORS).items()}
    entries = change(entries)
    specs = [safetensors.Spec(k, x.dtype, x.shape) for k, x in entries.items()]
    safetensors.write_file(target / peft.TENSORS, specs, entries.values())
    old = json.loads((out / peft.CONFIG).read_text(encoding="utf-8"))
    (target / peft.CONFIG).write_text(json.dumps(old | (settings or {})), encoding="utf-8")
    return target


def old_layout(entries):
    """As PEFT ≤ 0.19.0 stores the experts: for the transposed matrix."""
    out = dict(entries)
    for key in [k for k in entries if ".experts." in k and "lora_A" in k]:
        other = key.replace("lora_A", "lora_B")
        parts = unstack(entries[key], entries[other], 8)
        out[key], out[other] = stack([(b.T, a.T) for a, b in parts])
    return out


def linear_experts(entries):
    """As PEFT stores the experts of transformers 4: a linear layer each."""
    out = {k: x for k, x in entries.items() if ".experts." not in k}
    for layer in range(3):
        module = f"{peft.PREFIX}model.layers.{layer}.mlp.experts"
        pairs = [unstack(*(entries[f"{module}{w}.lora_{x}.weight"] for x in "AB"), 8) for w in (".base_layer", "")]
        for e, (gate_up, down) in enumerate(zip(*pairs, strict=True)):
            parts = zip(("gate_proj", "up_proj", "down_proj"), (*unfuse(*gate_up), down), strict=True)
            for name, (a, b) in parts:
                out |= {
                    f"{module}.{e}.{name}.lora_A.weight": a.T.copy(),
                    f"{module}.{e}.{name}.lora_B.weight": b.T.copy(),
                }
    return out


@pytest.mark.parametrize(
    ("change", "settings"),
    [
        (old_layout, {"peft_version": "0.18.1"}),
        (linear_experts, {"rank_pattern": {}, "alpha_pattern": {}, "target_parameters": None}),
    ],
)
def test_files_of_older_versions_are_told_apart(run, change, settings, tmp_path):
    name, folder, _, out = run
    if name != "olmoe":
        pytest.skip("one model is enough: this does not depend on it")
    base_run = load_config(folder).init_from
    old = rewrite(out, tmp_path / "old", change, settings)
    import_adapter(old, base_run, tmp_path / "back", mesh=mesh_of(1, 1, 1), echo=QUIET)
    back = adapters_of(tmp_path / "back")
    for path, x in adapters_of(folder).items():
        np.testing.assert_array_equal(back[path], x, err_msg=path)


BAD = {
    "unknown": (lambda e: e | {"x.lora_A.weight": np.zeros((2, 2), np.float32)}, {}, "for which there is no rule"),
    "one half": (
        lambda e: {k: x for k, x in e.items() if not k.endswith("layers.1.self_attn.q_proj.lora_B.weight")}, {},
        "but not both of",
    ),
    "a layer": (
        lambda e: {k: x for k, x in e.items() if "layers.1.self_attn.q_proj" not in k}, {},
        r"layers/attention/w_q \[0\] has an adapter, but layers/attention/w_q \[1\] has none",
    ),
    "NaN": (lambda e: {k: x * np.float32("nan") for k, x in e.items()}, {}, "NaN or infinite"),
    "shape": (
        lambda e: {k: x[:, :-1] if k.endswith("1.self_attn.q_proj.lora_A.weight") else x for k, x in e.items()}, {},
        "have shapes .* the base's matrix is",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_adapters_are_refused_in_one_line(run, case, tmp_path):
    name, folder, _, out = run
    if name != "olmoe":
        pytest.skip("one model is enough: this does not depend on it")
    change, settings, message = BAD[case]
    bad = rewrite(out, tmp_path / "bad", change, settings)
    with pytest.raises(FormatError, match=message) as e:
        import_adapter(bad, load_config(folder).init_from, tmp_path / "back", mesh=mesh_of(1, 1, 1), echo=QUIET)
    assert "\n" not in str(e.value) and not (tmp_path / "back").exists()


def test_another_base_is_said():
    """A base that was trained after its import is not named in the files; names that differ are a warning."""
    trained = [event := {"event": "import", "from": "org/a"}, {"event": "train"}]
    assert base.imported_from([event]) == "org/a"
    assert base.imported_from(trained) is base.imported_from([]) is base.imported_from([*trained, event | {"from": ""}])
    line = lambda name, origin: compare_names(
        Adapter(Path("x"), {"base_model_name_or_path": name}, {}), Path("runs/a"), origin
    )
    assert line("org/b", [event]).startswith(
        "warning: the adapter is of 'org/b', and runs/a was imported from 'org/a'; the shapes fit"
    )
    assert "'org/a' and has changed since" in line("org/a", trained)
    assert line("org/a", [event]) == line(None, [event]) == line("org/b", []) == line("org/b", trained) == ""


def test_a_base_that_was_trained_has_no_name(run, tmp_path):
    name, folder, _, _ = run
    if name != "olmoe":
        pytest.skip("one model is enough: this does not depend on it")
    cfg, lines = load_config(folder), []
    adapters, data = weights.load_adapters(folder, cfg, mesh_of(1, 1, 1))
    record = data["base"] | {"imported_from": base.imported_from([*data["origin"], {"event": "train"}])}
    weights.save_weights(tmp_path / "other", cfg, adapters, {}, data["origin"], record=record)
    export_adapter(tmp_path / "other", tmp_path / "out", mesh=mesh_of(1, 1, 1), echo=lines.append)
    settings = json.loads((tmp_path / "out" / peft.CONFIG).read_text(encoding="utf-8"))
    assert settings["base_model_name_or_path"] is None
    assert f"is null, since {cfg.init_from} is no unchanged import: export the base too" in lines[-1]
    of_base = load_config(cfg.init_from)
    *loaded, origin = weights.load_weights(cfg.init_from, *abstract_weights(of_base.model, mesh_of(1, 1, 1)))
    event = {"event": "quantize", "from": "runs/a@3"}
    weights.save_weights(tmp_path / "rounded", of_base, *loaded, [*origin, event, {"event": "upcycle", "chain": []}])
    with pytest.raises(ConfigError, match=r"lora.rank=\d: must be 0 with the rounded .* --config.init_from=runs/a,"):
        import_adapter(run[3], tmp_path / "rounded", tmp_path / "back", mesh=mesh_of(1, 1, 1), echo=QUIET)
    assert base.rounded_by([event, {"event": "train"}]) is None and not (tmp_path / "back").exists()


def test_a_gate_has_no_adapter():
    """PEFT gives Qwen2-MoE's gate of the shared experts one, if it is asked for all linear layers."""
    moe = MoEConfig(num_experts=4, d_expert=8, num_shared_experts=1, shared_gate="sigmoid")
    model = ModelConfig(vocab_size=8, d_model=8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8, moe=moe)
    module = "model.layers.0.mlp.shared_expert_gate"
    sizes = {
        f"{peft.PREFIX}{module}.lora_{part}.weight": draw(*shape) for part, shape in {"A": (2, 8), "B": (1, 2)}.items()
    }
    adapter = Adapter(Path("adapter"), {}, {key: SimpleNamespace(read=lambda x=x: x) for key, x in sizes.items()})
    with pytest.raises(
        FormatError, match=f"has an adapter of {module}, which is layers/moe/w_shared_gate here and has"
    ):
        read_adapter(adapter, "Qwen2MoeForCausalLM", model)


def test_square_matrices_need_the_version():
    adapter = lambda **settings: Adapter(Path("adapter"), settings, {})
    a, b = stack([(draw(4, RANK), draw(RANK, 4))] * EXPERTS)
    new = _oriented(adapter(peft_version="0.21.2"), "experts.down_proj", a, b, EXPERTS, (4, 4))
    old = _oriented(adapter(peft_version="0.19.0"), "experts.down_proj", a, b, EXPERTS, (4, 4))
    np.testing.assert_array_equal(new[0][0] @ new[0][1], (old[0][0] @ old[0][1]).T)
    with pytest.raises(FormatError, match=r'square, .* nearest valid: add "peft_version", such as "0.19.1"'):
        _oriented(adapter(), "experts.down_proj", a, b, EXPERTS, (4, 4))


def test_latents_of_mla_have_no_name_in_peft():
    model = build_config(moonlight_16b_a3b.get_config()).model
    model = dataclasses.replace(model, lora=LoRAConfig(rank=RANK, match="/attention/"))
    shapes = peft.shapes_of(model.base)
    fake = {
        f"{p}_adapter/{n}": np.zeros((*shapes[p][:-2], 1, 1))
        for p in shapes
        if "/attention/w_" in p
        for n in lora.NAMES
    }
    with pytest.raises(FormatError, match=r"is one matrix in the files and .*w_kv_down and .*w_k_rope here"):
        peft.wrapped("DeepseekV3ForCausalLM", model, fake)


def test_experts_in_one_tensor_have_no_name_in_peft():
    name = "model.layers.0.block_sparse_moe.output_linear.weight"
    one = tables.Tensor(name, (4, 8, 6), True, (tables.Target("layers/moe/w_down", (0,), None),))
    with pytest.raises(FormatError, match=r"output_linear\.weight is one tensor of all experts .*moe/w_down here"):
        peft.single(one)
