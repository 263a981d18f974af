"""Files and configurations of others: whatever is in them, a reader returns or says what is wrong in one line.

Each case damages something that was whole: bytes flipped, cut, doubled, put in; numbers made absurd; JSON of any shape.
No hang, no other exception, nothing written. A few hundred cases here, more than ten thousand among the slow tests.
"""

import copy
import gzip
import importlib.util
import json
import os
import random
import shutil
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_jax import cli, config
from moe_jax.data import answers, corpus, roles, sources, tokenizers
from moe_jax.data.packing import WholeRows
from moe_jax.data.rows import PackedRows
from moe_jax.errors import CheckpointError, ConfigError, FileError, UserError
from moe_jax.evaluate import analysis
from moe_jax.hf import convert, gguf, safetensors
from moe_jax.hf.architectures import read_config
from moe_jax.mixtures import design, forms, laws, measured, merges
from moe_jax.run import config_file, log
from moe_jax.upcycle import scores

SAID = (ConfigError, FileError, CheckpointError, UserError)  # cli.run prints these as one line
SECONDS = 20.0  # far more than any case takes, on a machine that has other work
FEW, MANY = 40, 500


def of_count(n):
    health = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    return settings(max_examples=n, deadline=None, derandomize=True, database=None, suppress_health_check=health)


# --- damage ----------------------------------------------------------------------------------------------------------

ABSURD = [b"9" * 30, b"-1", b"1e999", b"NaN", b"null", b'""', b"[]", b"{}", b"\xff\xfe", b"\0" * 9, b"../../x",
          b"[" * 9999, b"\xff" * 8, (2**62).to_bytes(8, "little"), b"true", b"0"]  # fmt: skip


def damaged(data: bytes, seed: int) -> bytes:
    rng, out = random.Random(seed), bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5, 20))):
        at, span = rng.randrange(len(out) + 1), rng.choice((1, 1, 2, 4, 8, 64, 4096))
        what = rng.randrange(6)
        if what == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif what == 1:
            del out[at : at + span]
        elif what == 2:
            out[at:at] = rng.choice(ABSURD)
        elif what == 3:
            out[at : at + span] = rng.choice(ABSURD)
        elif what == 4:
            out[at:at] = out[max(0, at - span) : at]
        elif rng.random() < 0.3:
            del out[at:]
        elif numbers := [i for i, c in enumerate(out) if 48 <= c <= 57]:
            i = rng.choice(numbers)
            out[i : i + 1] = rng.choice(ABSURD)
    return bytes(out)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(10**8, 10**400) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def tree_of(folder: Path) -> dict:
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(folder.rglob("*"))}


def check(read, folder: Path, expected=SAID):
    """read() returns or raises one of `expected`, in one line, soon, and leaves the folder alone."""
    before, began = tree_of(folder), time.monotonic()
    try:
        read()
    except expected as e:
        assert str(e).strip()
    assert time.monotonic() - began < SECONDS
    assert tree_of(folder) == before


# --- whole files -----------------------------------------------------------------------------------------------------


def hf_config() -> dict:
    return {"architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "vocab_size": 32, "hidden_size": 16,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 64, "intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2,
            "norm_topk_prob": False, "rope_theta": 10000.0, "sliding_window": None}  # fmt: skip


def write_shards(folder: Path) -> None:
    numbers = [np.ones((2, 3), np.float32), np.ones(4, jnp.bfloat16)]
    specs = [safetensors.Spec(f"t{i}", x.dtype, x.shape) for i, x in enumerate(numbers)]
    safetensors.write_model(folder, specs, numbers, max_file=24)


def write_store(folder: Path) -> None:
    folder.mkdir()
    documents = [{"text": "one " * i, "domain": "ab"[i % 2]} for i in range(1, 9)]
    corpus._write_store(folder, documents, tokenizers.BytesTokenizer(), "x", False)


def write_answers(folder: Path) -> None:
    folder.mkdir()
    tokenizer, fields = tokenizers.BytesTokenizer(), config.SourceConfig(name="x", prompt="{q}", completion="{a}")
    made = roles.Roles("s", fields)
    documents = [made.document({"q": "one " * i, "a": "two" * i}, "d", "x") for i in range(1, 9)]
    encode = answers.EncodeAnswers("s", fields, tokenizer, None)
    corpus._write_store(folder, documents, tokenizer, "x", False, False, encode)


def write_analysis(path: Path) -> None:
    fields = {name: np.ones((2, 2)) for name in analysis.Analysis._fields}
    np.savez_compressed(path, **fields | {"domains": np.array(["a", "b"]), "top_k": 2, "earlier_step": 1})


def write_gguf(path: Path) -> None:
    text = lambda s: len(s).to_bytes(8, "little") + s
    n = lambda value, size=4: value.to_bytes(size, "little")
    values = text(b"general.architecture") + n(8) + text(b"llama") + text(b"llama.block_count") + n(4) + n(1)
    values += text(b"tokenizer.ggml.tokens") + n(9) + n(8) + n(2, 8) + text(b"a") + text(b"b")
    values += text(b"scores") + n(9) + n(6) + n(2, 8) + bytes(8)
    tensor = text(b"token_embd.weight") + n(2) + n(4, 8) + n(2, 8) + n(0) + n(0, 8)
    path.write_bytes(b"GGUF" + n(3) + n(1, 8) + n(4, 8) + values + tensor + bytes(64))


def write_mixtures(folder: Path) -> None:
    weights = [{"a": 0.1 * i, "b": 1 - 0.1 * i} for i in range(1, 7)]
    mixtures = [design.Mixture(f"m{i}", w) for i, w in enumerate(weights)]
    (folder / "mix.jsonl").write_text(design.lines(mixtures), encoding="utf-8")
    runs = [measured.Measured(f"m{i}", w, {"a": 1.0 + i}, 1e9) for i, w in enumerate(weights)]
    fit = measured.make_fit(runs, "ridge", None, 0)
    (folder / "fit.json").write_text(measured.to_json(fit, {}), encoding="utf-8")
    (folder / "runs.json").write_text(json.dumps([run._asdict() for run in runs]), encoding="utf-8")
    (folder / "prior.json").write_text('{"a": 3, "b": 4.5}', encoding="utf-8")
    points = "".join(f"{n}e7,{d}e9,{3 - 0.1 * n - 0.1 * d}\n" for n in (1, 2, 4) for d in (1, 2, 4))
    (folder / "points.csv").write_text("params,tokens,loss\n" + points, encoding="utf-8")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    write_shards(folder)
    (folder / "hf.json").write_text(json.dumps(hf_config()), encoding="utf-8")
    made = tokenizers.train_bpe(["some text, and more text; numbers 1 2 3"] * 3, 300)
    made.save(folder)
    shutil.copy(folder / "tokenizer.json", folder / "merges.json")
    (folder / "tokenizer_settings.json").write_text(
        json.dumps({"kind": "huggingface", "end_of_text": ""}), encoding="utf-8"
    )
    (folder / "config.json").write_text(json.dumps(config.to_dict(config.RunConfig())), encoding="utf-8")
    rows = [{"kind": "train", "step": i, "loss": 1.0 / i} for i in range(1, 5)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    write_analysis(folder / "analysis.npz")
    counts = {"step": 3, "tokens_per_expert": [[[1, 2], [3, 4]], [[5, 6], [7, 8]]]}
    (folder / "eval.json").write_text(json.dumps(counts), encoding="utf-8")
    np.save(folder / "units.npy", np.ones((2, 3), np.float32))
    write_store(folder / "store")
    write_answers(folder / "answers")
    write_gguf(folder / "m.gguf")
    write_mixtures(folder)
    lines = "".join(json.dumps({"text": f"line {i}", "domain": "d"}) + "\n" for i in range(9))
    (folder / "a.jsonl").write_text(lines, encoding="utf-8")
    (folder / "a.csv").write_text('text,domain\n"one, two",d\n' + "x,y\n" * 9, encoding="utf-8")
    (folder / "a.txt").write_text("some text\n\nmore\n" * 9, encoding="utf-8")
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": ["a", "bc"] * 20, "domain": ["d", "e"] * 20})
    pyarrow.parquet.write_table(table, folder / "a.parquet")
    return folder


def read_source(path: Path):
    cfg = config.SourceConfig(kind="files", path=str(path), text_field="text", validation_fraction=0.5)
    source = sources.open_source("s", cfg, path.parent.with_name("cache"))  # not in the watched folder
    return [source.documents(split) for split in sources.SPLITS]


def read_prior(text: str, epochs=15.0, tokens=None):
    return design.make_prior(design.numbers(text, "--prior", "a:1"), epochs, tokens)


def read_law(path: Path):
    return forms.chinchilla(laws.read_points(path, ("params", "tokens", "loss")))


def read_all(entries):
    return [e.read() for e in entries.values()]


TWO_EXPERTS = config.ModelConfig(num_layers=2, moe=config.MoEConfig(num_experts=2))
READERS = {  # file → what reads it, given its folder
    "model-00001-of-00002.safetensors": lambda folder: read_all(safetensors.open_model(folder)),
    "model.safetensors.index.json": lambda folder: read_all(safetensors.open_model(folder)),
    "hf.json": lambda folder: read_config(safetensors.read_json(folder / "hf.json"), "x"),
    "tokenizer.json": lambda folder: tokenizers.load(folder),
    "tokenizer_settings.json": lambda folder: tokenizers.load(folder),
    "config.json": lambda folder: config_file.load_config(folder),
    "metrics.jsonl": lambda folder: log.read_metrics(folder),
    "analysis.npz": lambda folder: analysis.load(folder / "analysis.npz"),
    "eval.json": lambda folder: scores.read_counts(folder, TWO_EXPERTS),
    "units.npy": lambda folder: scores.read_units(folder / "units.npy"),
    **{name: lambda folder, name=name: read_source(folder / name)
       for name in ("a.jsonl", "a.csv", "a.txt", "b.jsonl.gz", "a.parquet")},
    "mix.jsonl": lambda folder: design.read(folder / "mix.jsonl"),
    "fit.json": lambda folder: measured.read_fit(folder / "fit.json").losses,
    "runs.json": lambda folder: measured.read_runs([folder / "runs.json"]),
    "prior.json": lambda folder: read_prior(str(folder / "prior.json")),
    "points.csv": lambda folder: read_law(folder / "points.csv"),
    "merges.json": lambda folder: merges.read_tokenizer(folder / "merges.json"),
    "m.gguf": lambda folder: gguf._check_lengths(folder / "m.gguf"),
    **{f"store/{name}": lambda folder: rows_of(folder / "store")
       for name in ("meta.json", "offsets.npy", "domains.npy", "tokens.npy", "bytes.npy")},
    **{f"answers/{name}": lambda folder: rows_of(folder / "answers", WholeRows)
       for name in ("meta.json", "offsets.npy", "learned.npy", "sizes.npy")},
}  # fmt: skip
EXPECTED = {"m.gguf": (*SAID, KeyError, ValueError)}  # an unknown type, no bytes: open_model says it


def rows_of(folder: Path, kind=PackedRows):
    try:
        rows = kind(corpus.TokenStore(folder), 4, 0)
    except ValueError as e:  # the caller prepares the store anew
        raise FileError(str(e)) from None
    return [rows[i] for i in range(min(len(rows), 50))]


def check_file(whole: Path, tmp_path: Path, name: str, data: bytes):
    folder = tmp_path / "case"
    if not folder.exists():
        folder.mkdir()
        (folder / "store").mkdir()
        (folder / "answers").mkdir()
        for path in whole.rglob("*"):
            if path.is_file():
                os.link(path, folder / path.relative_to(whole))
    target = folder / name
    target.unlink(missing_ok=True)
    target.write_bytes(data)
    check(lambda: READERS[name](folder), folder, EXPECTED.get(name, SAID))


def check_reader(whole, tmp_path, name, count):
    data = (whole / name).read_bytes()
    READERS[name](whole)  # whole, it can be read

    @of_count(count)
    @given(st.integers(0, 2**40))
    def bytes_(seed):
        check_file(whole, tmp_path, name, damaged(data, seed))

    @of_count(count // 2)
    @given(anything)
    def json_(value):
        check_file(whole, tmp_path, name, json.dumps(value).encode() + b"\n")

    bytes_()
    if "json" in name:
        json_()


@pytest.mark.parametrize("name", READERS)
def test_damaged_files(whole, tmp_path, name):
    check_reader(whole, tmp_path, name, FEW)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_damaged_files_thousands(whole, tmp_path, name):
    check_reader(whole, tmp_path, name, MANY)


def test_one_field_of_any_value(whole, tmp_path):
    """JSON that is whole but for one value, which gets further into a reader than broken syntax."""

    @of_count(4 * FEW)
    @given(st.sampled_from(["hf.json", "config.json", "tokenizer_settings.json", "store/meta.json"]), st.data())
    def case(name, data):
        value = json.loads((whole / name).read_bytes())
        replace_one(value, data)
        check_file(whole, tmp_path, name, json.dumps(value).encode())

    case()


def replace_one(value: dict, data) -> None:
    while True:
        key = data.draw(st.sampled_from(sorted(value)))
        if isinstance(value[key], dict) and value[key] and data.draw(st.booleans()):
            value = value[key]
            continue
        value[key] = data.draw(anything)
        return


# --- configurations --------------------------------------------------------------------------------------------------


def check_config(count):
    base = config.to_dict(config.RunConfig())
    numbers = st.integers(-2, 10) | st.integers(10**6, 10**30) | st.floats()

    @of_count(count)
    @given(st.data(), st.integers(1, 4), st.sampled_from([1, 8, 64]))
    def case(data, changes, devices):
        values = copy.deepcopy(base)
        for _ in range(changes):
            group = values
            while True:
                key = data.draw(st.sampled_from(sorted(group)))
                if not (isinstance(group[key], dict) and group[key]):
                    break
                group = group[key]
            group[key] = data.draw(numbers | anything)
        check(lambda: config.check_devices(config.build(values), devices, "cpu"), Path("/nonexistent"))

    case()


def test_configurations():
    check_config(300)


@pytest.mark.slow
def test_configurations_thousands():
    check_config(2000)


@of_count(200)
@given(st.text("ab:,.0123456789e-+inf ", max_size=20), st.floats(), st.none() | st.floats())
def test_priors(text, epochs, tokens):
    """What --prior, --epochs and --tokens may be: a prior within its bounds, or one line."""

    def read():
        made = read_prior(text, epochs, tokens)
        assert made.most.sum() >= 1 and abs(made.shares.sum() - 1) < 1e-9

    check(read, Path("/nonexistent"))


@of_count(200)
@given(st.sampled_from(["train.steps", "optim.lr", "mesh.fsdp", "model", "data.x", "a[", ""]) | st.text(max_size=12),
       st.text(max_size=12) | st.none() | st.lists(st.text(max_size=4), max_size=1))  # fmt: skip
def test_overrides(name, value):
    check(lambda: cli.check_override(config.default_config(), name, value), Path("/nonexistent"))


# --- what must be refused --------------------------------------------------------------------------------------------


def test_paths_do_not_leave_their_folder(tmp_path):
    write_shards(tmp_path)
    where = tmp_path / safetensors.INDEX
    index = json.loads(where.read_text(encoding="utf-8"))
    for name in ("../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..", ""):
        where.write_text(json.dumps(index | {"weight_map": {"t0": name}}), encoding="utf-8")
        with pytest.raises(CheckpointError, match="is not the name of"):
            safetensors.open_model(tmp_path)


def test_absurd_sizes(tmp_path, monkeypatch):
    (tmp_path / "tokenizer_settings.json").write_text('{"kind": "huggingface"}', encoding="utf-8")
    with open(tmp_path / "tokenizer.json", "wb") as f:
        f.truncate(10**12)  # sparse
    with pytest.raises(FileError, match="a tokenizer has at most"):
        tokenizers.load(tmp_path)
    with open(tmp_path / "model.safetensors", "wb") as f:
        f.write((10**11).to_bytes(8, "little"))
        f.truncate(10**12)
    with pytest.raises(CheckpointError, match=r"its header has 100,000,000,000 bytes"):
        safetensors.open_model(tmp_path)
    write_gguf(tmp_path / "m.gguf")
    data = (tmp_path / "m.gguf").read_bytes().replace((2).to_bytes(8, "little"), (2**60).to_bytes(8, "little"))
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match="is impossible"):
        gguf._check_lengths(tmp_path / "m.gguf")
    assert config.nearest_divisor(2**61 - 1, 10**17) == 1


def test_no_pickle_and_no_code():
    """In the text of all that reads: nothing that runs what it reads, but for the user's own --config."""
    root = Path(importlib.util.find_spec("moe_jax").submodule_search_locations[0])
    for path in root.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "allow_pickle=True" not in text and "import pickle" not in text, path
        assert text.count("exec(") == (path.name == "cli.py"), path
        assert " eval(" not in text, path
    assert convert.TOKENIZER_FILES and not any(n.endswith((".py", ".bin", ".pt")) for n in convert.TOKENIZER_FILES)
