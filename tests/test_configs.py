"""Every file of configs/: what its docstring promises, its parameter counts, and that the tables cover its weights."""

import functools
import importlib.util
import inspect
import json
import math
import re
import tempfile
from pathlib import Path

import jax
import pytest

from moe_jax import config as config_lib
from moe_jax import model, optim
from moe_jax.config import ModelConfig, MoEConfig, RunConfig
from moe_jax.parallel import sharding
from moe_jax.run import config_file
from moe_jax.tree import flatten, nest, path_of

FILES = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))
NAMES = [f.stem for f in FILES]
OF_A_RUN = ("continued", "finetune")  # take their model from a run directory
MESH = dict(data=2, fsdp=8, expert=8)
LARGE = 2**20  # elements; a weight beyond this must be split over the mesh

# Total and active parameters in arXiv:2501.11873.
PAPER = {"demons_3b": (3.4e9, 0.6e9), "demons_15b": (15e9, 2.54e9), "demons_43b": (42.8e9, 6.6e9)}


@functools.cache
def load(name: str) -> tuple[str, RunConfig]:
    """The docstring and the built config of configs/<name>.py, loaded by path as `--config` does."""
    spec = importlib.util.spec_from_file_location(f"configs_{name}", FILES[NAMES.index(name)])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not inspect.signature(module.get_config).parameters:
        return module.__doc__, config_lib.build(module.get_config())
    if name in OF_A_RUN:
        with tempfile.TemporaryDirectory() as folder:
            config_file.save_config(folder, RunConfig())
            answers = Path(folder, "answers.jsonl")
            answers.write_text('{"question": "a", "answer": "b"}\n', encoding="utf-8")
            where = f"{folder},{answers}" if name == "finetune" else folder
            return module.__doc__, config_lib.build(module.get_config(where))
    with tempfile.TemporaryDirectory() as folder:  # a config of a folder of text
        for domain in ("law", "prose"):
            Path(folder, f"{domain}.txt").write_text(f"{domain}\n", encoding="utf-8")
        Path(folder, "sources.json").write_text('{"tokens": 1000}', encoding="utf-8")  # as of a folder of images
        where = f"{folder},{folder}" if name == "modalities" else folder
        return module.__doc__, config_lib.build(module.get_config(where))


@functools.cache
def leaves(name: str) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """Logical axes and shape of every weight, by path."""
    graph = model.abstract(load(name)[1].model)
    axes = jax.tree.leaves(graph.axes, is_leaf=lambda x: isinstance(x, tuple))
    shapes, _ = jax.tree_util.tree_flatten_with_path(graph.shapes)
    return {path_of(path): (a, x.shape) for a, (path, x) in zip(axes, shapes, strict=True)}


def entry(name: str, key: str) -> str:
    """The rest of the docstring's one `key:` line."""
    found = re.findall(rf"^{key}: +(\S.*)$", load(name)[0], re.MULTILINE)
    assert len(found) == 1, f"configs/{name}.py: {len(found)} lines `{key}: …`"
    return found[0]


def test_discovered():
    assert set(PAPER) <= set(NAMES) and len(NAMES) >= 4


@pytest.mark.parametrize("name", NAMES)
def test_docstring(name):
    commands = re.findall(
        r"^ {4}python train\.py --config=([^\s:]+)(?::\S+)? --workdir=\S+$", load(name)[0], re.MULTILINE
    )
    assert commands == [f"configs/{name}.py"]
    for key in ("Hardware", "Time", "Parameters", "Expect"):
        entry(name, key)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_line(name):
    form = r"([\d,]+) total, ([\d,]+) active(?: \(([\d,]+) without embedding and head\))?"
    match = re.fullmatch(form, entry(name, "Parameters"))
    assert match or name in OF_A_RUN
    if not match:
        return
    total, active, rest = (int(x.replace(",", "")) if x else None for x in match.groups())
    counts = model.count_parameters(load(name)[1].model)
    assert (total, active) == (counts.total, counts.active)
    assert rest in (None, counts.active_no_embedding)


@pytest.mark.parametrize("name", PAPER)
def test_counts_of_the_paper(name):
    counts = model.count_parameters(load(name)[1].model)
    assert (counts.total, counts.active) == pytest.approx(PAPER[name], rel=0.02)


def test_counts_of_moonlight():
    """15.29B and 2.24B, as released: without the embedding and the head."""
    cfg = load("moonlight_16b_a3b")[1].model
    counts = model.count_parameters(cfg)
    assert counts.total - 2 * cfg.vocab_size * cfg.d_model == 15_289_019_904
    assert counts.active_no_embedding == 2_243_685_888


def test_counts_of_olmoe():
    assert model.count_parameters(load("olmoe_1b_7b")[1].model).total == 6_919_161_856  # as released


@pytest.mark.parametrize("name", NAMES)
def test_round_trip(name):
    cfg = load(name)[1]
    assert config_lib.build(config_lib.to_dict(cfg)) == cfg
    assert config_lib.build(json.loads(json.dumps(config_lib.to_dict(cfg)))) == cfg


@pytest.mark.parametrize("name", NAMES)
def test_mesh_fits_the_hardware(name):
    hardware = entry(name, "Hardware")
    many = re.search(r"(\d+) accelerators", hardware)
    devices = int(many[1]) if many else 1
    shape = config_lib.check_devices(load(name)[1], devices, "cpu" if "CPU" in hardware else "gpu")
    assert math.prod(shape) == devices
    assert devices == 128 or name not in PAPER


@pytest.mark.parametrize("name", NAMES)
def test_sharding_is_total(name):
    replicated = set()
    for path, (axes, shape) in leaves(name).items():
        spec = sharding.weight_spec(axes, shape, MESH)
        assert len(spec) == len(shape), path
        if math.prod(shape) <= LARGE:
            continue
        groups = [() if s is None else (s,) if isinstance(s, str) else s for s in spec]
        used = [a for group in groups for a in group]
        assert len(used) == len(set(used)), f"{path}: {spec} uses a mesh axis twice"
        for size, group in zip(shape, groups, strict=True):
            assert size % math.prod(MESH[a] for a in group) == 0, f"{path}: {spec} does not divide {shape}"
        if not used:
            replicated.add(path)
    # The table of moe_jax/parallel/sharding.py replicates the router on purpose; nothing else this large may be.
    assert replicated <= {"layers/moe/w_router"}


@pytest.mark.parametrize("name", NAMES)
def test_optimizer_labels_are_total(name):
    shapes = model.abstract(load(name)[1].model).shapes
    labels = optim.label_params(shapes)
    assert jax.tree.structure(labels) == jax.tree.structure(shapes)
    by_path = {path_of(path): x for path, x in jax.tree_util.tree_flatten_with_path(labels)[0]}
    for path, label in by_path.items():
        leaf = path.rsplit("/", 1)[-1]
        wanted = "router" if leaf == "w_router" else "matrix" if leaf.startswith("w_") else "adamw"
        assert label == wanted, path


SMALL = ModelConfig(
    vocab_size=97,
    d_model=20,
    num_layers=4,
    num_dense_layers=1,
    d_ff=36,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    qk_norm=True,
    tie_embeddings=False,
    moe=MoEConfig(num_experts=10, top_k=3, d_expert=14, num_shared_experts=2),
)


def test_unknown_parameter_has_no_label():
    shapes = model.abstract(SMALL).shapes
    with pytest.raises(ValueError, match="no optimizer rule for the parameter layers/w_new"):
        optim.label_params({**shapes, "layers": {**shapes["layers"], "w_new": shapes["embed"]}})


def test_rule_without_parameter():
    shapes = flatten(model.abstract(SMALL).shapes)
    with pytest.raises(ValueError, match=r"match no parameter: \['norm\$'\]"):
        optim.label_params(nest({path: x for path, x in shapes.items() if not path.endswith("norm")}))


def test_unknown_axis_has_no_spec():
    with pytest.raises(ValueError, match="no sharding rule for the logical axis 'new'"):
        sharding.weight_spec(("embed", "new"), (8, 8), MESH)


def test_counts_by_hand():
    attention = 20 * (6 * 8) + 2 * 20 * (2 * 8) + (6 * 8) * 20  # q; k and v; o
    norms = 2 * 20 + 2 * 8  # before attention and feed-forward; of queries and keys, one head wide
    dense = 3 * 20 * 36
    expert = 3 * 20 * 14
    router = 20 * 10
    tables = 2 * 97 * 20
    final_norm = 20
    rest = 4 * (attention + norms) + dense + 3 * (router + 2 * expert) + final_norm
    counts = model.count_parameters(SMALL)
    assert counts.total == rest + tables + 3 * 10 * expert
    assert counts.active == rest + tables + 3 * 3 * expert
    assert counts.active_no_embedding == rest + 3 * 3 * expert


def test_flops_by_hand():
    L, D, F, K, E, V, S, N, H = 8, 2048, 1024, 8, 64, 50_304, 4096, 16, 128
    matmul_weights = L * (4 * D * D + 3 * D * F * K + D * E) + V * D
    cfg = load("olmoe_8l_bench")[1]
    assert cfg.data.seq_len == S
    assert model.flops_per_token(cfg.model, S) == 6 * matmul_weights + 6 * L * S * N * H
