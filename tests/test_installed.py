"""The package installed: its wheel has its data files and works from another folder, as does `pip install -e`."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import pytest
from test_opened import config_of, write_run

from moe_jax import model
from moe_jax.run import weights

REPO = Path(__file__).parents[1]
SOURCES = ("moe_jax", "pyproject.toml", "README.md", "LICENSE", "requirements.txt")
# What a user would type: every method, and where the package came from.
METHODS = """
import pathlib, sys
import moe_jax
assert "jax" not in sys.modules
run = moe_jax.load("runs/quickstart")
from moe_jax.kernels import tiles
print(pathlib.Path(moe_jax.__file__).parent)
print(run.cfg.data.seq_len, run.params["embed"].shape, run.logits("a").shape, run.hidden(["a", "bc"], 1)[1].shape)
print(run.routing("ab").experts.shape, len(run.score("a", "b")[0]), run.generate("the ", 3, temperature=0.0)[:4])
layer = moe_jax.MoELayer(8, num_experts=2, top_k=1, d_expert=4, rngs=__import__("flax").nnx.Rngs(0))
print(layer(__import__("jax").numpy.ones((1, 2, 8))).y.shape)
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """A folder that is not the repository, with a run where the README has one."""
    root = tmp_path_factory.mktemp("elsewhere")
    cfg = config_of(write_run(root / "texts"))
    weights.save_weights(root / "runs" / "quickstart", cfg, *model.init(cfg.model, jax.random.key(0)), [])
    return root


def call(*command: str, cwd: Path, **more: str) -> str:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"JAX_PLATFORMS": "cpu", "MOE_JAX_CACHE": str(cwd / "cache"), "PIP_DISABLE_PIP_VERSION_CHECK": "1"} | more
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, encoding="utf-8", timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (REPO / page).read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.slow
def test_the_examples_of_the_pages(elsewhere):
    """The examples run as they are printed, from another folder."""
    (example,) = (block for block in blocks("README.md") if "moe_jax.load" in block)
    assert len(example.strip().splitlines()) <= 6
    out = call(sys.executable, "-c", example, cwd=elsewhere, PYTHONPATH=str(REPO))
    assert re.search(r"^-\d+\.\d+$", out, re.MULTILINE) and len(out.splitlines()) >= 3
    whole = "\n".join(blocks("docs/python.md"))
    assert all(f"run.{name}(" in whole + example for name in ("logits", "routing", "score", "generate"))
    before, near, after = call(sys.executable, "-c", whole, cwd=elsewhere, PYTHONPATH=str(REPO)).splitlines()[-3:]
    assert float(after) < float(before) and 0.9 < float(near) < 1.5


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A copy, because a build writes beside what it builds."""
    copy = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        if (REPO / name).is_dir():
            shutil.copytree(REPO / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(REPO / name, copy / name)
    return copy


@pytest.mark.slow
@pytest.mark.parametrize("how", ["wheel", "editable"])
def test_installed(elsewhere, sources, tmp_path, how):
    pip = [sys.executable, "-m", "pip", "--quiet"]
    install = [*pip, "install", "--no-deps", "--no-build-isolation", "--no-index", f"--prefix={tmp_path / 'prefix'}"]
    if how == "wheel":
        call(*pip, "wheel", "--no-deps", "--no-build-isolation", f"--wheel-dir={tmp_path}", str(sources), cwd=tmp_path)
        (wheel,) = tmp_path.glob("moe_jax-*.whl")
        here = {str(p.relative_to(REPO)) for p in (REPO / "moe_jax").rglob("*") if p.is_file() and p.suffix != ".pyc"}
        there = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
        assert there == here and any(name.endswith(".json") for name in there)
        call(*install, "--ignore-installed", str(wheel), cwd=tmp_path)
    else:
        call(*install, "--editable", str(sources), cwd=tmp_path)
    (site,) = {p.parent for p in (tmp_path / "prefix").rglob("moe_jax-*.dist-info")}
    begin = f"import site; site.addsitedir({str(site)!r})\n"
    out = call(sys.executable, "-c", begin + METHODS, cwd=elsewhere).splitlines()
    assert Path(out[0]) == (site if how == "wheel" else sources) / "moe_jax"
    assert out[1:] == ["32 (260, 32) (2, 260) (3, 32)", "(2, 3, 2) 1 the ", "(1, 2, 8)"]
    helps = (
        begin + "import runpy, sys; sys.argv = ['hf', '--help']; runpy.run_module('moe_jax.hf', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", helps], cwd=elsewhere, capture_output=True, encoding="utf-8")
    assert "--workdir" in done.stdout and "Traceback" not in done.stderr
    assert json.loads((sources / "moe_jax" / "kernels" / "hopper_tilings.json").read_text(encoding="utf-8"))
