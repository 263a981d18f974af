"""Every file of configs/systems: what its docstring promises, that it traces on a mesh, a step, and its upcycling.

The folder is the list: a new file is tested as soon as it is there. Its exact oracle is in test_systems.py, unless
another test has it.
"""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from test_model import init

from moe_jax import config, model, optim, upcycle
from moe_jax.config import RunConfig
from moe_jax.run import config_file, weights
from moe_jax.train import step
from moe_jax.train.state import abstract_batch, abstract_state, abstract_weights, init_state, put_batch
from moe_jax.tree import flatten
from tests.systems import CHAINS, MESH, NAMES, REPO, SOURCE, batch_rows, load, mesh_of, of_shapes, teacher_of, toy
from tests.upcycle_source import chain_of

# Files that are traced in the fast part: a pyramid, identity experts in pairs of blocks, a router with a state, knobs.
TRACED_FAST = ("pr_moe", "longcat", "zaya1", "evomoe")
TRAIN = r"^    (python train\.py --config=configs/systems/(\w+)\.py(?: --config\.init_from=(\S+))? --workdir=(\S+))$"
UPCYCLE = r"^    python -m moe_jax\.upcycle --from=(\S+) --workdir=(\S+) (.+)$"

# --- every file ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_docstring(name):
    """One command that trains, before it one that upcycles where weights are needed; the paper; true counts."""
    doc, cfg = load(name)
    ((_, file, init_from, workdir),) = re.findall(TRAIN, doc, re.MULTILINE)
    assert file == name and bool(init_from) == (name in CHAINS)
    made = re.findall(UPCYCLE, doc, re.MULTILINE)
    assert [(start, folder) for start, folder, _ in made] == ([("runs/dense", init_from)] if init_from else [])
    assert [chain_of(options) for *_, options in made] == ([CHAINS[name]] if init_from else [])
    counts = model.count_parameters(cfg.model)
    assert f"\nParameters: {counts.total:,} total, {counts.active:,} active\n" in doc
    if name == SOURCE:
        assert workdir == "runs/dense"
        return
    for key in ("Paper: .*\\barXiv:\\d{4}\\.\\d{5}$", "Exact: ", "Not reproduced: "):
        assert len(re.findall(f"^{key}", doc.replace("\n    ", " "), re.MULTILINE)) == 1, key
    assert all((REPO / file).is_file() for file in re.findall(r"tests/\w+\.py", doc))
    assert f"configs/systems/{name}.py" in (REPO / "docs" / "systems.md").read_text(encoding="utf-8")


def check_router_sums(cfg: RunConfig, router: dict) -> None:
    """Every bank has sums, with a column for each expert and each identity expert."""
    identity = cfg.model.moe.identity_experts
    columns = {place.path: place.kind.experts + identity for place in cfg.model.places if place.kind.experts}
    assert {path: sums.tokens_per_expert.shape[-1] for path, sums in router.items()} == columns


@pytest.mark.parametrize("name", TRACED_FAST)
def test_traced_on_a_mesh(name):
    """The others are in `test_a_step`, which runs what it traces."""
    cfg, mesh = toy(name), mesh_of(*MESH)
    state, taught = abstract_state(cfg, mesh), teacher_of(cfg)
    arguments = state, abstract_batch(cfg, mesh), None, abstract_weights(taught, mesh) if taught else None
    with jax.set_mesh(mesh):
        new, report = jax.eval_shape(step.make_train_step(cfg, mesh, None, taught).__wrapped__, *arguments)
    assert of_shapes(new) == of_shapes(state)
    check_router_sums(cfg, report.router)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_step(name):
    """Changes every parameter that is not frozen, routes every token, and ends with finite numbers."""
    cfg, mesh = toy(name), mesh_of(*MESH)
    state, taught = init_state(cfg, mesh), teacher_of(cfg)
    before, shapes = jax.device_get(state.params), of_shapes(state)
    with jax.set_mesh(mesh):
        lesson = model.init(taught, jax.random.key(1)) if taught else None
    run = step.make_train_step(cfg, mesh, None, taught)
    after, report = run(state, put_batch(batch_rows(cfg), mesh, cfg), None, lesson)
    assert {"distill", "distill_raw"} <= set(report.terms) or not taught
    assert np.isfinite(report.loss) and report.grad_norm > 0
    assert of_shapes(after) == shapes
    check_router_sums(cfg, report.router)
    moe, tokens = cfg.trained.moe, 8 * 16
    for path, sums in report.router.items():
        made = np.sum(sums.tokens_per_expert, (1, 2))
        least = 1 if cfg.explore.threshold else moe.top_k
        assert (made >= least * tokens).all() and (made <= moe.top_k * tokens).all(), path
        assert moe.compute == "capacity" or not np.any(sums.dropped), path
    frozen = optim.frozen_paths(cfg.optim, flatten(before))
    for path, w in flatten(jax.device_get(after.params)).items():
        assert np.isfinite(w).all() and (w != flatten(before)[path]).any() == (path not in frozen), path


# --- upcycled systems ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHAINS)
def test_the_model_is_the_one_that_the_command_makes(name):
    """The same function of the same weights, so that `config.init_from` takes them."""
    made = upcycle.final_config(CHAINS[name], load(SOURCE)[1].model)
    assert config.plain(load(name)[1].model) == config.plain(made)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with the weights of the dense model, as its command would leave them."""
    folder = tmp_path_factory.mktemp("runs")
    cfg = toy(SOURCE)
    params, _ = init(cfg.model)
    weights.save_weights(folder / "dense", cfg, params, {}, [], {})
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAINS)
def test_the_upcycling_command(name, runs):
    """It is the chain above, and the training command takes what it makes. Copies and zeros are the dense function."""
    ((start, folder, options),) = re.findall(UPCYCLE, load(name)[0], re.MULTILINE)
    made = runs / Path(folder).name
    command = [sys.executable, "-m", "moe_jax.upcycle", f"--from={runs / Path(start).name}", f"--workdir={made}"]
    ran = subprocess.run([*command, *options.split()], cwd=REPO, capture_output=True, encoding="utf-8", check=False)
    assert ran.returncode == 0, ran.stderr
    cfg = config_file.load_config(made)
    assert config.plain(cfg.model) == config.plain(toy(name).model)
    assert weights.check_same_model(dataclasses.replace(toy(name), init_from=str(made))) == []
    with jax.set_mesh(mesh_of(1, 1, 1)):
        *_, origin = weights.load_weights(made, *abstract_weights(cfg.model, mesh_of(1, 1, 1)))
    assert origin[-1]["chain"] == json.loads(json.dumps(upcycle.describe(CHAINS[name])))
    error = float(re.search(r"relative error of the logits on random tokens: (\S+)", ran.stdout)[1])
    exact = name in ("cpm2", "llama3_meets_moe", "mixda")
    assert (error < 1e-5) == exact == ("function: the same as that of the dense model" in ran.stdout)
