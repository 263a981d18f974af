"""Export to GGUF: bit for bit in float32, as transformers and the package gguf read it, and what it cannot hold."""

import functools

import jax
import numpy as np
import pytest
from test_hf_files import write
from test_hf_gguf import ROUTED, SMALL, english, mesh

from moe_jax import config, model
from moe_jax.data import tokenizers
from moe_jax.data.tokenizers import load_or_make
from moe_jax.data.vocabularies import train_bpe
from moe_jax.errors import CheckpointError, FormatError
from moe_jax.hf import export_gguf, export_run, import_model
from moe_jax.hf.gguf_export import TYPES
from moe_jax.quant import fake_quant
from moe_jax.quant.taps import is_dense, is_routed
from moe_jax.run import weights
from moe_jax.run.config_file import load_config
from moe_jax.train.state import abstract_weights
from moe_jax.tree import flatten, nest

WIDE = SMALL | {"hidden_size": 64, "head_dim": 32, "intermediate_size": 96}
WRITTEN = {
    "llama": WIDE | {"architectures": ["LlamaForCausalLM"], "rope_theta": 5e5},
    "qwen3": WIDE | {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True},
    "mixtral": WIDE | ROUTED | {"architectures": ["MixtralForCausalLM"]},
    "qwen3moe": WIDE | ROUTED | {
        "architectures": ["Qwen3MoeForCausalLM"], "moe_intermediate_size": 32, "norm_topk_prob": True,
    },
}  # fmt: skip
BITS = {"F32": 32, "F16": 16, "BF16": 16, "Q8_0": 8.5, "Q5_1": 6, "Q5_0": 5.5, "Q4_1": 5, "Q4_0": 4.5}


def quiet(line):
    """Takes a line."""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Makes the run directory of an entry of `WRITTEN`."""
    pytest.importorskip("gguf")
    root = tmp_path_factory.mktemp("written")

    @functools.cache
    def made(kind):
        import_model(write(root / f"{kind}_files", base=WRITTEN[kind]), root / kind, mesh=mesh(), echo=quiet)
        return root / kind

    return made


def parameters(workdir):
    cfg = load_config(workdir)
    return jax.tree.map(np.asarray, weights.load_weights(workdir, *abstract_weights(cfg.model, mesh()))[0])


def slow_but(*names):
    return lambda every: [pytest.param(name, marks=() if name in names else pytest.mark.slow) for name in every]


@pytest.mark.parametrize("kind", slow_but("mixtral")(WRITTEN))
def test_an_export_in_float32_comes_back_bit_for_bit(written, tmp_path, kind):
    """The file is the same model, under the name that llama.cpp has for it."""
    from gguf import GGUFReader

    said = []
    export_gguf(written(kind), tmp_path / "a.gguf", mesh=mesh(), echo=said.append)
    reader = GGUFReader(str(tmp_path / "a.gguf"))
    assert reader.fields["general.architecture"].contents() == {"mixtral": "llama"}.get(kind, kind)
    assert "32.00 bits a weight" in said[-1] and "the tokenizer is not written" in said[0]
    back = import_model(tmp_path / "a.gguf", tmp_path / "back", mesh=mesh(), echo=quiet)
    assert config.plain(back.model) == config.plain(load_config(written(kind)).model)
    jax.tree.map(np.testing.assert_array_equal, parameters(tmp_path / "back"), parameters(written(kind)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.gguf", "back"]


@pytest.mark.slow
def test_transformers_reads_the_same_model(written, tmp_path):
    """Rows of queries and keys are in the order that llama.cpp has: the logits are those of the safetensors.

    Of the other files it reads neither the size of a head nor the width of an expert, or takes them for a Llama's.
    """
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    export_gguf(written("llama"), tmp_path / "gguf" / "a.gguf", mesh=mesh(), echo=quiet)
    export_run(written("llama"), tmp_path / "plain", mesh=mesh(), echo=quiet)
    load = functools.partial(transformers.AutoModelForCausalLM.from_pretrained, dtype=torch.float32)
    ids = torch.tensor([[1, 5, 7, 200, 3, 9]])
    with torch.no_grad():
        got, want = (one.eval()(ids).logits for one in (load(tmp_path / "gguf", gguf_file="a.gguf"),
                                                        load(tmp_path / "plain")))  # fmt: skip
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", slow_but("q4_0")(TYPES))
def test_types_are_as_the_package_rounds_them(written, tmp_path, dtype):
    """Each tensor is the package's quantize of the float32 tensor; import has its dequantize; experts have their own
    type, norms and routers none; bytes are the bits of the types."""
    from gguf import GGMLQuantizationType, GGUFReader
    from gguf.quants import dequantize, quantize

    export_gguf(written("mixtral"), tmp_path / "whole.gguf", dtype="float32", mesh=mesh(), echo=quiet)
    experts = {"q4_0": "q8_0"}.get(dtype, "q4_0")
    said = []
    export_gguf(written("mixtral"), tmp_path / "a.gguf", dtype=dtype, experts_dtype=experts, mesh=mesh(),
                echo=said.append)  # fmt: skip
    read = lambda name: {t.name: t for t in GGUFReader(str(tmp_path / name)).tensors}
    whole, bits, names = read("whole.gguf"), 0, set()
    for name, t in read("a.gguf").items():
        plain = len(whole[name].shape) == 1 or "ffn_gate_inp" in name
        wanted = "F32" if plain else TYPES[experts if "_exps" in name else dtype]
        kind = GGMLQuantizationType[wanted]
        names.add(wanted)
        rounded = quantize(np.asarray(whole[name].data), kind)
        assert t.tensor_type == kind and t.n_bytes == t.n_elements * BITS[wanted] / 8
        bits += t.n_elements * BITS[wanted]
        np.testing.assert_array_equal(np.asarray(t.data), rounded)
        x = dequantize(rounded, kind)
        assert np.abs(x - whole[name].data).max() <= np.abs(whole[name].data).max() / {"F32": 1e9, "F16": 1000,
               "BF16": 250, "Q8_0": 200, "Q5_1": 25, "Q5_0": 15, "Q4_1": 12, "Q4_0": 7}[wanted]  # fmt: skip
    if dtype == "q4_0":  # a program calls the file by the type that most numbers have
        sizes = {kind: 0 for kind in names}
        for t in read("a.gguf").values():
            sizes[t.tensor_type.name] += t.n_elements
        number = GGUFReader(str(tmp_path / "a.gguf")).fields["general.file_type"].contents()
        assert max(sizes, key=sizes.get) == "Q8_0" and number == 7
    assert names == {"F32", TYPES[dtype], TYPES[experts]} and f"{bits // 8:,.0f} bytes" in said[-1]
    import_model(tmp_path / "a.gguf", tmp_path / "back", mesh=mesh(), echo=quiet)
    ours, tensors = parameters(tmp_path / "back"), read("a.gguf")
    stack = dequantize(tensors["blk.1.ffn_down_exps.weight"].data, tensors["blk.1.ffn_down_exps.weight"].tensor_type)
    np.testing.assert_array_equal(ours["layers"]["moe"]["w_down"][1], stack.swapaxes(1, 2))
    exact = parameters(written("mixtral"))
    np.testing.assert_array_equal(ours["layers"]["moe"]["w_router"], exact["layers"]["moe"]["w_router"])


@pytest.mark.slow
def test_what_gguf_cannot_hold_is_refused(tmp_path):
    pytest.importorskip("gguf")
    target = tmp_path / "a.gguf"
    olmoe = SMALL | ROUTED | {"architectures": ["OlmoeForCausalLM"], "norm_topk_prob": False}
    import_model(write(tmp_path / "olmoe_files", base=olmoe), tmp_path / "olmoe", mesh=mesh(), echo=quiet)
    narrow = WRITTEN["llama"] | {"intermediate_size": 80}
    import_model(write(tmp_path / "narrow_files", base=narrow), tmp_path / "narrow", mesh=mesh(), echo=quiet)
    scaled = WRITTEN["llama"] | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    import_model(write(tmp_path / "scaled_files", base=scaled), tmp_path / "scaled", mesh=mesh(), echo=quiet)
    huge = lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"].__setitem__((0, 0), 1e5)
    import_model(write(tmp_path / "huge_files", huge, WRITTEN["llama"]), tmp_path / "huge", mesh=mesh(), echo=quiet)
    rows = r"ffn_down\.weight has rows of 80, but --dtype=q4_0 has blocks of 32; nearest valid: --dtype=float16"
    for run, dtype, words in (
        ("olmoe", "", r"none of LlamaForCausalLM, Qwen3ForCausalLM, Qwen3MoeForCausalLM, MixtralForCausalLM computes"),
        ("narrow", "q4_0", rows),
        ("scaled", "", r"differs in .*rope_scaling\.type \(linear here"),
        ("huge", "q8_0", r"mlp/w_up is not finite in float16, whose largest number is 65,504"),
    ):  # fmt: skip
        with pytest.raises(FormatError, match=words):
            export_gguf(tmp_path / run, target, dtype=dtype, mesh=mesh(), echo=quiet)
    with pytest.raises(FormatError, match=r"--experts_dtype=q4_0: the model has no experts; leave it out"):
        export_gguf(tmp_path / "narrow", target, dtype="float16", experts_dtype="q4_0", mesh=mesh(), echo=quiet)
    assert not target.exists() and not list(tmp_path.glob(".*"))
    export_gguf(tmp_path / "narrow", target, dtype="float16", mesh=mesh(), echo=quiet)
    with pytest.raises(CheckpointError, match="is not empty"):
        export_gguf(tmp_path / "narrow", target, mesh=mesh(), echo=quiet)


@pytest.mark.slow
def test_a_tokenizer_that_was_trained_here_travels(tmp_path):
    """A tokenizer may have ids without a word, which no text has."""
    pytest.importorskip("gguf")
    made = train_bpe([english()[:20_000]], 290)
    cfg = config.default_config()
    cfg.model.update(vocab_size=300, d_model=32, num_layers=1, num_dense_layers=1, num_heads=1, num_kv_heads=1)
    cfg.model.update(head_dim=32, d_ff=32)
    cfg.data.tokenizer.update(kind="bpe", vocab_size=290)
    cfg = config.build(cfg)
    with jax.set_mesh(mesh()):
        params, bias = model.init(cfg.model, jax.random.key(0))
    weights.save_weights(tmp_path / "run", cfg, params, bias, [{"event": "test"}])
    tokenizers.save(made, cfg.data.tokenizer, tmp_path / "run")
    export_gguf(tmp_path / "run", tmp_path / "a.gguf", dtype="q8_0", mesh=mesh(), echo=quiet)
    back = import_model(tmp_path / "a.gguf", tmp_path / "back", mesh=mesh(), echo=quiet)
    again, text = load_or_make(back.data.tokenizer, tmp_path / "back", None), english()[20_000:21_000]
    assert again.encode([text])[0].tolist() == made.encode([text])[0].tolist()
    assert again.end_of_text == made.end_of_text and again.vocab_size == made.vocab_size <= 290


@pytest.mark.parametrize(
    ("bits", "dtype", "bound"),
    [(4, "q4_1", 1 / 2048), pytest.param(8, "q8_0", 1 / 254 + 1 / 2048, marks=pytest.mark.slow)],
)
def test_a_rounded_run(written, tmp_path, bits, dtype, bound):
    """Weights on grids of groups of 32 change by at most this share of their block's largest, but for few."""
    cfg = load_config(written("mixtral"))
    params, bias, origin = weights.load_weights(written("mixtral"), *abstract_weights(cfg.model, mesh()))
    on_grid = jax.jit(lambda w: fake_quant(w, bits, 32))
    matrix = lambda path: is_dense(path.removeprefix("layers/")) or is_routed(path.removeprefix("layers/"))
    flat = {path: on_grid(w) if matrix(path) else w for path, w in flatten(params).items()}
    weights.save_weights(tmp_path / "rounded", cfg, nest(flat), bias, origin)
    export_gguf(tmp_path / "rounded", tmp_path / "a.gguf", dtype=dtype, mesh=mesh(), echo=quiet)
    import_model(tmp_path / "a.gguf", tmp_path / "back", mesh=mesh(), echo=quiet)
    back = flatten(parameters(tmp_path / "back"))
    for path in filter(matrix, flat):
        groups = lambda x: np.asarray(x).reshape(*x.shape[:-2], -1, 32, x.shape[-1])
        most = np.abs(groups(flat[path])).max(-2, keepdims=True)
        error = np.abs(groups(back[path]) - groups(flat[path]))
        # A tie may leave one end of a grid of four bits unused: then the error is up to half a step.
        assert (error <= 1.01 * max(bound, 1 / (2**bits - 1)) * most).all() and np.mean(
            error > 1.001 * bound * most
        ) < 0.02, path
    assert sum(map(matrix, flat)) == 7
