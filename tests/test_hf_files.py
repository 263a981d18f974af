"""Files that are not what they should be: each is refused in one line, and nothing is left behind. No torch needed."""

import json
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from moe_jax.errors import CheckpointError, FormatError
from moe_jax.hf import export_run, import_model, tables
from moe_jax.hf import safetensors as files
from moe_jax.hf.architectures import read_config
from moe_jax.hf.convert import check_size
from moe_jax.parallel import sharding
from moe_jax.train.state import abstract_weights
from moe_jax.tree import flatten

REPO = Path(__file__).parents[1]
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 300, "hidden_size": 8,
    "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12, "max_position_embeddings": 16,
    "rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": False, "hidden_act": "silu", "eos_token_id": 2,
}  # fmt: skip
# Of the release, with the keys that say nothing about how it computes left out.
MOONLIGHT = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 11264, "kv_lora_rank": 512,
    "max_position_embeddings": 8192, "model_type": "deepseek_v3", "moe_intermediate_size": 1408, "moe_layer_freq": 1,
    "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": True, "num_attention_heads": 16,
    "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16, "q_lora_rank": None,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446, "scoring_func": "sigmoid", "tie_word_embeddings": False, "topk_group": 1,
    "topk_method": "noaux_tc", "v_head_dim": 128, "vocab_size": 163840,
}  # fmt: skip
EMBED = "model.embed_tokens.weight"


def mesh():
    return sharding.make_mesh((1, 1, 1), jax.devices()[:1])


def shapes_of(model):
    return {path: x.shape for tree in abstract_weights(model, mesh()) for path, x in flatten(tree).items()}


def write(folder, change=None, base=CONFIG, **hf):
    """A whole Llama in one file, its tensors changed by `change(dict)`, its config.json by keywords.

    base: the config.json of another model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name, model, _ = read_config(base, "here")
    rng = np.random.default_rng(0)
    numbers = {
        t.name: rng.normal(size=t.shape).astype(np.float32) for t in tables.tensors(name, model, shapes_of(model))
    }
    if change:
        change(numbers)
    specs = [files.Spec(name, x.dtype, x.shape) for name, x in numbers.items()]
    files.write_model(folder, specs, numbers.values())
    (folder / "config.json").write_text(json.dumps(base | hf), encoding="utf-8")
    return folder


def shards(folder):
    """… in two files with an index."""
    write(folder)
    numbers = {name: entry.read() for name, entry in files.open_model(folder).items()}
    (folder / files.SINGLE).unlink()
    specs = [files.Spec(name, x.dtype, x.shape) for name, x in numbers.items()]
    files.write_model(folder, specs, numbers.values(), max_file=sum(s.size for s in specs) // 2 + 4000)
    assert len(list(folder.glob("*.safetensors"))) == 2
    return folder


def edit_index(folder, edit):
    path = folder / files.INDEX
    index = json.loads(path.read_text(encoding="utf-8"))
    edit(index["weight_map"])
    path.write_text(json.dumps(index), encoding="utf-8")


def header(folder, edit=None, length=None, name=files.SINGLE):
    """Writes the file anew with another header."""
    path = folder / name
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    text = data[8 : 8 + size]
    if edit:
        text = edit(text)
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data[8 + size :])


def as_json(edit):
    def of(text):
        body = json.loads(text)
        edit(body)
        return json.dumps(body).encode()

    return of


def truncated(folder):
    path = write(folder) / files.SINGLE
    path.write_bytes(path.read_bytes()[:-10])


def pickled(folder):
    (write(folder) / files.SINGLE).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(CONFIG))


def with_tokenizer(folder):
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({str(i): i for i in range(301)}, unk_token="0"))
    (write(folder) / "tokenizer.json").write_text(made.to_str(), encoding="utf-8")


# Ways to break a whole model: its header, one entry of it, the index, its tensors, its config.json.
head = lambda edit: lambda f: header(write(f), edit)
entry = lambda **fields: head(as_json(lambda h: h[EMBED].update(fields)))
index = lambda **owners: lambda f: edit_index(shards(f), lambda m: m.update(owners))
embed_in = lambda file: index(**{EMBED: file})
held = lambda change: lambda f: write(f, change)
said = lambda **hf: lambda f: write(f, **hf)
file = lambda name, edit: lambda f: edit(write(f) / name)
SECOND = "model-00002-of-00002.safetensors"
OUTSIDE = "is not the name of a .safetensors file beside it"

BROKEN = {
    "cut short": (truncated, "model.safetensors: is incomplete: .* ends at byte"),
    "empty file": (file(files.SINGLE, lambda p: p.write_bytes(b"abc")), "its header has .* bytes"),
    "absurd header": (lambda f: header(write(f), length=2**62), r"its header has 4,611,686,018,427,387,904 bytes"),
    "header no JSON": (head(lambda t: t[:-30]), "header is not valid JSON"),
    "deep header": (head(lambda t: b"[" * 100_000), "header is not valid JSON"),
    "doubled name": (
        head(lambda t: t.replace(b"layers.1.mlp.up", b"layers.0.mlp.up")),
        "its header names a tensor twice",
    ),
    "negative offset": (entry(data_offsets=[-8, 9592]), "entry of .* is not valid"),
    "beyond the end": (entry(data_offsets=[10**9, 10**9 + 9600]), "is incomplete"),
    "wrong size": (entry(shape=[301, 8]), r"is 9,632 bytes, not 9,600"),
    "huge shape": (entry(shape=[2**40, 2**40]), "bytes, not 9,600"),
    "unknown dtype": (entry(dtype="F8_E5M2"), "is of type F8_E5M2; must be"),
    "float8 alone": (entry(dtype="F8_E4M3", shape=[1200, 8]), "is float8, but config.json has no quantization_config"),
    "missing shard": (lambda f: next(shards(f).glob("*2.safetensors")).unlink(), "of-00002.safetensors is missing"),
    "shard outside": (embed_in("../model.safetensors"), OUTSIDE),
    "absolute shard": (embed_in("/etc/x.safetensors"), OUTSIDE),
    "pickled shard": (embed_in("model.bin"), OUTSIDE),
    "index lies": (embed_in(SECOND), "says that"),
    "index asks for more": (index(x=SECOND), "has no x, which"),
    "index no map": (lambda f: (shards(f) / files.INDEX).write_text("{}", encoding="utf-8"), "must have a weight_map"),
    "pickle": (pickled, "pytorch_model.bin is a pickle, .* never opened"),
    "no weights": (file(files.SINGLE, Path.unlink), "has neither model.safetensors nor"),
    "missing tensor": (held(lambda n: n.pop("model.layers.1.mlp.up_proj.weight")), "has no model.layers.1.mlp.up_proj"),
    "missing head": (held(lambda n: n.pop("lm_head.weight")), "it must have tie_word_embeddings=true"),
    "unknown tensor": (held(lambda n: n.update({"model.extra": np.zeros(3, np.float32)})), "model.extra, .* no rule"),
    "wrong shape": (held(lambda n: n.update({"model.norm.weight": np.zeros(9, np.float32)})), r"shape \[9\]; .* \[8\]"),
    "another vocabulary": (said(vocab_size=299), r"has shape \[300, 8\]; .* must be \[299, 8\]"),
    "another tokenizer": (with_tokenizer, "has token 300, but config.json says vocab_size=300"),
    "untied after all": (said(tie_word_embeddings=True), "lm_head.weight differs from model.embed_tokens.weight"),
    "unknown architecture": (
        said(architectures=["GPT2LMHeadModel"]),
        r"'GPT2LMHeadModel'\] is not supported; .* LlamaF",
    ),
    "no architecture": (said(architectures=None), "architectures=None is not supported"),
    "other activation": (said(hidden_act="gelu"), "hidden_act='gelu' is not supported; .* 'silu'"),
    "biases": (said(attention_bias=True), "attention_bias=True is not supported"),
    "quantised": (said(quantization_config={"bits": 4}), "quantization_config=.* is not supported"),
    "another scaling": (said(rope_scaling={"type": "mrope"}), "rope_type='mrope' is not supported; must be one of"),
    "half a yarn": (said(rope_scaling={"type": "yarn"}), "RoPE scaling: factor is missing"),
    "a factor on logits": (
        said(
            architectures=["DeepseekV3ForCausalLM"],
            num_key_value_heads=2,
            rope_scaling={"type": "linear", "factor": 2.0, "mscale_all_dim": 1.0},
        ),
        "mscale_all_dim=1.0 with rope_type='linear' is not supported; nearest valid: null",
    ),
    "no latent": (
        said(architectures=["DeepseekV3ForCausalLM"], kv_lora_rank=0, num_key_value_heads=2),
        "kv_lora_rank=0 must be ≥ 1",
    ),
    "odd number": (said(hidden_size="8"), "hidden_size must be a number"),
    "broken rule": (said(num_key_value_heads=3), "num_kv_heads=3: must divide num_heads=2"),
    "no config": (file("config.json", Path.unlink), "config.json: no such file"),
    "config cut short": (file("config.json", lambda p: p.write_bytes(b'{"a": ')), "config.json: is not valid JSON"),
    "no directory": (lambda f: None, "no such directory"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_input_is_one_line_and_leaves_nothing(tmp_path, what):
    make, message = BROKEN[what]
    make(tmp_path / "in")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(FormatError, match=message) as error:
        import_model(tmp_path / "in", tmp_path / "run", mesh=mesh(), echo=lambda line: None)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    assert sorted(tmp_path.iterdir()) == before


def test_no_value_in_config_json_is_a_traceback():
    """Every key with values of every kind: refused in one line, or a model of a size that is looked at."""
    values = (None, "x", -1, 0, 1.5, float("nan"), True, [], [1], {}, {"type": 3}, 10**12,
              {"type": "dynamic", "factor": float("nan")})  # fmt: skip
    accepted = 0
    for base in (CONFIG, MOONLIGHT):
        for key in (*base, "rope_parameters", "mlp_only_layers", "sliding_window", "rope_scaling", "head_dim"):
            for value in values:
                try:
                    name, model, _ = read_config(base | {key: value}, "here")
                    check_size(Path("here"), model, 2000, tables.rules(name, model)[1], "config.json")
                    accepted += 1
                except FormatError as e:
                    assert "\n" not in str(e)
    assert accepted < 400


def test_command_line(tmp_path):
    """The way in. What it refuses is in test_cli.py."""
    write(tmp_path / "in", strange_key=1)
    command = [
        sys.executable,
        "-m",
        "moe_jax.hf",
        "import",
        f"--from={tmp_path / 'in'}",
        f"--workdir={tmp_path / 'run'}",
    ]
    done = subprocess.run(command, cwd=REPO, capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr
    assert "strange_key=1 in config.json is unknown" in done.stdout
    assert "the model has no tokenizer files" in done.stdout and "next: python eval.py" in done.stdout
    cfg = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert cfg["data"]["seq_len"] == 16 and cfg["model"]["num_dense_layers"] == 2


def test_nothing_is_overwritten(tmp_path):
    write(tmp_path / "in")
    import_model(tmp_path / "in", tmp_path / "run", mesh=mesh(), echo=lambda line: None)
    for call in (
        lambda: import_model(tmp_path / "in", tmp_path / "run", mesh=mesh()),
        lambda: export_run(tmp_path / "run", tmp_path / "in", mesh=mesh()),
    ):
        with pytest.raises(CheckpointError, match="is not empty"):
            call()


def test_tokenizer_files_travel(tmp_path):
    write(tmp_path / "in")
    for name, text in (
        ("tokenizer_config.json", '{"eos_token": {"content": "</s>"}}'),
        ("merges.txt", "a b"),
        ("x.py", "1"),
    ):
        (tmp_path / "in" / name).write_text(text, encoding="utf-8")
    cfg = import_model(tmp_path / "in", tmp_path / "run", mesh=mesh(), echo=lambda line: None)
    assert cfg.data.tokenizer.kind == "huggingface" and cfg.data.tokenizer.end_of_text == "</s>"
    assert cfg.data.tokenizer.path == str(tmp_path / "run" / "tokenizer.json")
    export_run(tmp_path / "run", tmp_path / "out", mesh=mesh(), echo=lambda line: None)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json", "merges.txt", "model.safetensors", "tokenizer_config.json",
    ]  # fmt: skip
    assert json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["eos_token_id"] == 2


def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch):
    write(tmp_path / "in")
    import_model(tmp_path / "in", tmp_path / "run", mesh=mesh(), echo=lambda line: None)
    monkeypatch.setattr("moe_jax.hf.convert.fetch", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_run(tmp_path / "run", tmp_path / "out", mesh=mesh())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "run"]
