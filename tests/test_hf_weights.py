"""Which weights are read of a model's files, and which are refused: against transformers where it reads the same."""

import json

import numpy as np
import pytest
from test_hf_files import CONFIG, EMBED, edit_index, mesh, shards, write

from moe_jax.errors import CheckpointError, FormatError
from moe_jax.hf import export_run, import_model, read_model
from moe_jax.hf import safetensors as files
from moe_jax.run import weights
from moe_jax.train.state import abstract_weights

HEAD, SECOND = "lm_head.weight", "model-00002-of-00002.safetensors"


def imported(folder, workdir):
    """Embedding and head as imported, and what was printed."""
    said = []
    cfg = import_model(folder, workdir, mesh=mesh(), echo=said.append)
    params, _, _ = weights.load_weights(workdir, *abstract_weights(cfg.model, mesh()))
    return np.asarray(params["embed"]), np.asarray(params.get("head", params["embed"])), "\n".join(said)


def tied(numbers):
    numbers[HEAD] = numbers[EMBED]


def without_head(folder):
    """A tied model in shards, of which no file has the head that the index lists."""
    write(folder, lambda numbers: numbers.pop(HEAD), tie_word_embeddings=True)
    numbers = {name: entry.read() for name, entry in files.open_model(folder).items()}
    specs = [files.Spec(name, x.dtype, x.shape) for name, x in numbers.items()]
    (folder / files.SINGLE).unlink()
    files.write_model(folder, specs, numbers.values(), max_file=sum(s.size for s in specs) // 2 + 4000)
    edit_index(
        folder, lambda owners: owners.update({HEAD: SECOND, "model.layers.0.self_attn.rotary_emb.inv_freq": SECOND})
    )


def beside_old_shards(folder):
    """One file beside the index and the shards of other weights, as saving anew leaves them."""
    shards(folder)
    other = folder.with_name("other")
    write(other, lambda numbers: numbers.update({EMBED: 2 * numbers[EMBED]}))
    (other / files.SINGLE).rename(folder / files.SINGLE)


def beside_old_index(folder):
    """The same, with the old shards removed: what transformers 5.24 leaves of them."""
    beside_old_shards(folder)
    for file in folder.glob("model-*.safetensors"):
        file.unlink()


FOUND = {
    "one file": (write, ""),
    "shards": (shards, ""),
    "an old index and its shards": (beside_old_shards, f"{files.INDEX} is not read, because there is {files.SINGLE}"),
    "an old index": (beside_old_index, f"{files.INDEX} is not read, because there is {files.SINGLE}"),
    "a head that is only in the index": (
        without_head,
        f"{HEAD} is listed in {files.INDEX} but missing; it is not needed",
    ),
    "a tensor that is not in the index": (lambda f: edit_index(shards(f), lambda owners: owners.pop(HEAD)), ""),
}


@pytest.mark.parametrize("what", FOUND)
def test_the_weights_are_those_that_transformers_loads(tmp_path, what):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    make, line = FOUND[what]
    make(tmp_path / "in")
    there = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "in")
    embed, head, said = imported(tmp_path / "in", tmp_path / "run")
    np.testing.assert_array_equal(embed, there.model.embed_tokens.weight.detach().numpy())
    np.testing.assert_array_equal(head, there.lm_head.weight.detach().numpy())
    assert line in said and (line or "not read" not in said)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_json_of_other_editors_is_read(tmp_path, encoding):
    """A byte-order mark, and what a shell of Windows writes."""
    shards(tmp_path / "in")
    for name in ("config.json", files.INDEX):
        path = tmp_path / "in" / name
        path.write_text(path.read_text(encoding="utf-8"), encoding=encoding)
    imported(tmp_path / "in", tmp_path / "run")
    (tmp_path / "in" / "config.json").write_bytes(b"\xff\xfe" + json.dumps(CONFIG).encode()[:-1])
    with pytest.raises(FormatError, match=r"config\.json: is not valid JSON"):
        imported(tmp_path / "in", tmp_path / "run2")


# --- numbers that are none -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype,value", [("float32", np.nan), ("bfloat16", -np.inf), ("float16", np.nan)])
def test_weights_that_are_no_numbers_are_refused(tmp_path, dtype, value):
    def spoil(numbers):
        for name in numbers:
            numbers[name] = numbers[name].astype(files.DTYPES[{"float32": "F32", "bfloat16": "BF16"}.get(dtype, "F16")])
        numbers["model.layers.1.mlp.up_proj.weight"][3, 2] = value
        numbers[EMBED][0, 0] = np.finfo(np.float16).max  # the largest numbers are numbers

    write(tmp_path / "in", spoil)
    with pytest.raises(FormatError, match=r"layers\.1\.mlp\.up_proj\.weight has 1 value that is NaN or infinite"):
        imported(tmp_path / "in", tmp_path / "run")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_an_export_that_overflows_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    """65,519 is 65,504 in float16, the largest there; 65,520 is infinite."""
    for value, name in ((65_519.0, "fits"), (65_520.0, "large")):
        write(tmp_path / "in" / name, lambda numbers, value=value: numbers[EMBED].__setitem__((7, 1), -value))
        imported(tmp_path / "in" / name, tmp_path / name)
    export_run(tmp_path / "fits", tmp_path / "out", dtype="float16", mesh=mesh(), echo=lambda line: None)
    numbers = {name: entry.read() for name, entry in files.open_model(tmp_path / "out").items()}
    assert numbers[EMBED][7, 1] == -65_504 and all(np.isfinite(x).all() for x in numbers.values())
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr("pathlib.Path.mkdir", lambda *_, **__: 1 / 0)
    with pytest.raises(FormatError, match=r"embed is not finite in float16, whose largest number is 65,504"):
        export_run(tmp_path / "large", tmp_path / "out2", dtype="float16", mesh=mesh())
    assert sorted(tmp_path.iterdir()) == before


# --- where the result goes -------------------------------------------------------------------------------------------


def test_into_links_and_home(tmp_path, monkeypatch):
    """A link to an empty directory, one to nothing yet, and `~`: what is written is where they point."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    write(tmp_path / "home" / "in")
    (tmp_path / "disk" / "empty").mkdir(parents=True)
    (tmp_path / "full").symlink_to(tmp_path / "disk" / "empty")
    (tmp_path / "dangling").symlink_to(tmp_path / "disk" / "new")
    imported("~/in", tmp_path / "full")
    export_run(tmp_path / "full", tmp_path / "dangling", mesh=mesh(), echo=lambda line: None)
    assert sorted(p.name for p in (tmp_path / "disk" / "new").iterdir()) == ["config.json", files.SINGLE]
    cfg = import_model(tmp_path / "dangling", "~/run", mesh=mesh(), echo=lambda line: None)
    assert cfg.data.tokenizer.path == str(tmp_path / "home" / "run" / "tokenizer.json")
    export_run("~/run", "~/out", mesh=mesh(), echo=lambda line: None)
    assert sorted(p.name for p in (tmp_path / "home").iterdir()) == ["in", "out", "run"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dangling", "disk", "full", "home"]


def test_a_place_that_cannot_be_made_is_refused_before_any_work(tmp_path, monkeypatch):
    write(tmp_path / "in")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("x", encoding="utf-8")
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: str(path).endswith("disk"))
    monkeypatch.setattr("moe_jax.hf.safetensors.read_json", lambda path: 1 / 0)
    for name, message in (("loop", "loop"), ("file/run", "file is not a directory"), ("disk", "is a mount point")):
        with pytest.raises(CheckpointError, match=message):
            import_model(tmp_path / "in", tmp_path / name, mesh=mesh())
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(CheckpointError, match=f"{tmp_path.name} may not be written to"):
        import_model(tmp_path / "in", tmp_path / "run", mesh=mesh())


# --- float8 with scales of blocks ------------------------------------------------------------------------------------

BLOCK = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [5, 4], "activation_scheme": "dynamic"}
SCALES = "model.layers.1.mlp.up_proj.weight_scale_inv"


def in_blocks(numbers):
    """Makes float8 of all matrices of layers, and adds the scales of their blocks of 5 × 4. Returns what they mean."""
    rng, meant = np.random.default_rng(1), {}
    for name, x in list(numbers.items()):
        if x.ndim == 2 and ".layers." in name:
            scales = rng.uniform(0.01, 3.0, (-(-x.shape[0] // 5), -(-x.shape[1] // 4))).astype(np.float32)
            numbers[name], numbers[f"{name}_scale_inv"] = x.astype(files.FLOAT8), scales
            whole = np.kron(scales, np.ones((5, 4), np.float32))[: x.shape[0], : x.shape[1]]
            meant[name] = numbers[name].astype(np.float32) * whole
    return meant


def test_float8_blocks_are_read_as_float32(tmp_path, monkeypatch):
    """Each number times the scale of its block, those at the edges included; what is not so is refused."""
    monkeypatch.setitem(files.CODES, files.FLOAT8, "F8_E4M3")
    meant = {}
    write(tmp_path / "in", lambda n: meant.update(in_blocks(n)), quantization_config=BLOCK)
    write(tmp_path / "plain", lambda n: n.update(meant))
    (*_, said), _ = imported(tmp_path / "in", tmp_path / "run"), imported(tmp_path / "plain", tmp_path / "run_plain")
    assert len(meant) == 14 and "14 tensors in float8 with blocks of 5 × 4 are read as float32" in said
    for name, folder in (("out", "run"), ("out_plain", "run_plain")):
        export_run(tmp_path / folder, tmp_path / name, mesh=mesh(), echo=lambda line: None)
    one, other = ((tmp_path / name / files.SINGLE).read_bytes() for name in ("out", "out_plain"))
    assert one == other

    def nan(numbers):
        in_blocks(numbers)
        numbers[SCALES.removesuffix("_scale_inv")][0, 0] = np.nan

    broken = {
        "is float8, but has no .*scale_inv": lambda n: (in_blocks(n), n.pop(SCALES)),
        r"is \[2, 2\] in float32; with blocks of 5 × 4 of \[12, 8\] it must be \[3, 2\]": lambda n: (
            in_blocks(n),
            n.update({SCALES: np.ones((2, 2), np.float32)}),
        ),
        "has 1 value that is NaN": nan,
        "of shape .* is float8; only matrices": lambda n: n.update(
            {
                "model.norm.weight": n["model.norm.weight"].astype(files.FLOAT8),
                "model.norm.weight_scale_inv": np.ones((2, 1), np.float32),
            }
        ),
    }
    for i, (message, change) in enumerate(broken.items()):
        write(tmp_path / f"broken{i}", change, quantization_config=BLOCK)
        with pytest.raises(FormatError, match=message):
            imported(tmp_path / f"broken{i}", tmp_path / "no")
    for more in ({"quant_method": "gptq"}, {"weight_block_size": None}, {"fmt": "e5m2"}):
        write(tmp_path / "other", quantization_config=BLOCK | more)
        with pytest.raises(FormatError, match=r"quantization_config=.* is not supported; nearest valid: quant_method"):
            imported(tmp_path / "other", tmp_path / "no")


# --- layers of multi-token prediction --------------------------------------------------------------------------------

DEEPSEEK = CONFIG | {
    "architectures": ["DeepseekV3ForCausalLM"], "num_key_value_heads": 2, "kv_lora_rank": 4, "q_lora_rank": None,
    "qk_rope_head_dim": 2, "qk_nope_head_dim": 2, "v_head_dim": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
    "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 6, "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.0, "norm_topk_prob": True,
}  # fmt: skip


def test_layers_of_prediction_are_dropped_with_a_line(tmp_path):
    """… where config.json has their number; one more layer than that is a tensor without a rule."""
    names = ("eh_proj", "mlp.experts.0.up_proj", "embed_tokens")
    numbers = np.ones((8, 16), np.float32)
    more = lambda layer: lambda n: n.update({f"model.layers.{layer}.{name}.weight": numbers for name in names})
    write(tmp_path / "in", more(2), base=DEEPSEEK, num_nextn_predict_layers=1)
    *_, said = imported(tmp_path / "in", tmp_path / "run")
    assert "3 tensors of multi-token prediction (layer 2) are not used: no logits need them; --mtp keeps them" in said
    write(tmp_path / "default", more(2), base=DEEPSEEK)  # the default of transformers' class is 1
    of_load = []  # which has no such flag
    read_model(tmp_path / "default", lambda _: mesh(), echo=of_load.append)
    assert any("(layer 2)" in line for line in of_load) and "--mtp" not in "".join(of_load)
    export_run(tmp_path / "run", tmp_path / "out", mesh=mesh(), echo=lambda line: None)
    assert json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["num_nextn_predict_layers"] == 0
    write(tmp_path / "without", base=DEEPSEEK)
    assert (tmp_path / "out" / files.SINGLE).read_bytes() == (tmp_path / "without" / files.SINGLE).read_bytes()
    for i, (layer, number) in enumerate([(2, 0), (3, 1)]):
        write(tmp_path / f"in{i}", more(layer), base=DEEPSEEK, num_nextn_predict_layers=number)
        with pytest.raises(FormatError, match=rf"model\.layers\.{layer}\.eh_proj\.weight, for which there is no rule"):
            imported(tmp_path / f"in{i}", tmp_path / "no")
