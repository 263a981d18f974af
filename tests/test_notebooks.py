"""Every notebook runs from top to bottom with the Python that runs the tests, and is stored without outputs.

`pytest -m slow -rP tests/test_notebooks.py` also prints how long each takes.
"""

import time
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks():
    wanted = {"finetuning", "moe_layer", "muon", "quickstart", "specialisation", "upcycling"}
    assert wanted <= {path.stem for path in NOTEBOOKS}


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

    monkeypatch.delenv("XLA_FLAGS")  # the tests' quick compilation: notebooks compute more than they compile
    monkeypatch.setenv("MOE_JAX_NOTEBOOK_STEPS", "12")  # two more than they warm up
    monkeypatch.setenv("MOE_JAX_NOTEBOOK_WORKDIR", str(tmp_path / "run"))
    notebook = nbformat.read(path, as_version=4)
    # Without directories to search, "python3" is the running Python and not whatever kernel the user has installed.
    kernel = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    resources = {"metadata": {"path": str(path.parent)}}
    began = time.perf_counter()
    nbclient.NotebookClient(notebook, km=kernel, timeout=1200, resources=resources).execute()  # raises on an error
    print(f"{path.name}: {time.perf_counter() - began:.0f} s")
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
