"""Every notebook runs from top to bottom with the Python that runs the tests, and is stored without outputs.

`pytest -m slow -rP tests/test_notebooks.py` also prints how long each takes.
"""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import programs

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks():
    wanted = {"finetuning", "moe_layer", "muon", "quickstart", "specialisation", "tpu", "upcycling"}
    assert wanted <= {path.stem for path in NOTEBOOKS}


def setup_of(path: Path) -> str:
    """The first code cell, which finds the repository or fetches it."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "".join(next(cell["source"] for cell in cells if cell["cell_type"] == "code"))


def test_the_address_is_in_one_place():
    """The address is in a variable, in a cell that is the same in all notebooks: a fork changes that line."""
    assert len({setup_of(path) for path in NOTEBOOKS}) == 1
    for path in NOTEBOOKS:
        (address,) = re.findall(r'^REPOSITORY = "(.*)"', setup_of(path), re.M)
        text = path.read_text(encoding="utf-8")
        assert text.count(address) == 1 and text.count(address.removeprefix("https://github.com/")) == 1


@pytest.mark.parametrize(
    ("driver", "devices", "package"),
    [
        ("580.65.06", [], "jax[cuda13]"),
        ("550.54.15", [], "jax[cuda12]"),
        ("", [], "jax[cuda12]"),  # nvidia-smi that fails
        (None, ["accel0"], "jax[tpu]"),
        (None, ["vfio/0", "vfio/vfio"], "jax[tpu]"),
        (None, ["vfio/vfio"], "jax"),
        (None, [], "jax"),
    ],
)
def test_the_setup_installs_the_jax_of_the_machine(tmp_path, monkeypatch, driver, devices, package):
    """The cell fetches the code where the repository is not, and installs the jax of the chips."""
    (tmp_path / "here").mkdir()
    for name in devices:
        (tmp_path / "dev" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "dev" / name).touch()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "path", list(sys.path))
    commands = []

    def run(command, **_):
        commands.append(command)
        if command[0] == "git":
            Path(command[-1]).mkdir()
        return subprocess.CompletedProcess(command, 0, stdout=driver)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/nvidia-smi" if driver is not None else None)
    source = setup_of(NOTEBOOKS[0]).replace('"/dev', f'"{tmp_path}/dev')
    exec(compile(source, "setup", "exec"), {})
    (clone,) = (c for c in commands if c[0] == "git")
    assert clone[-2].startswith("https://") and commands[-1][-1] == package and "install" in commands[-1]
    assert Path.cwd() == Path(clone[-1]) == Path(sys.path[0])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_without_outputs(path):
    nbformat = pytest.importorskip("nbformat")
    for cell in nbformat.read(path, as_version=4).cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None, cell.source


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpecManager

    if path.stem == "quickstart":
        monkeypatch.delenv("XLA_FLAGS")  # the tests' quick compilation: this one evaluates all held-out text
    for name, value in programs.environment().items():  # the same initialisation is compiled once for all of them
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MOE_JAX_NOTEBOOK_STEPS", "12")  # two more than they warm up: so few that compiling takes longer
    monkeypatch.setenv("MOE_JAX_NOTEBOOK_WORKDIR", str(tmp_path / "run"))
    notebook = nbformat.read(path, as_version=4)
    # Without directories to search, "python3" is the running Python and not whatever kernel the user has installed.
    kernel = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    resources = {"metadata": {"path": str(path.parent)}}
    began = time.perf_counter()
    client = nbclient.NotebookClient(notebook, km=kernel, timeout=1200, resources=resources)
    client.execute(cleanup_kc=True)  # raises on an error; a kernel that is given would live on, with its memory
    print(f"{path.name}: {time.perf_counter() - began:.0f} s")
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
