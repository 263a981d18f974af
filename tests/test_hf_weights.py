"""Which weights are read of a model's files, and which are refused: against transformers where it reads the same."""

import json

import numpy as np
import pytest
from test_hf_files import CONFIG, EMBED, edit_index, mesh, shards, write

from moe_jax.errors import CheckpointError, FormatError
from moe_jax.hf import export_run, import_model
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
