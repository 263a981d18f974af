"""The layout is the architecture: rooms in an order, and no import back up. CONTRIBUTING.md has the map."""

import ast
import re
from pathlib import Path

REPO = Path(__file__).parents[1]
PACKAGE = REPO / "moe_jax"
MAP = dict(re.findall(r"^\| `(\S+)` \| (`[^|]*) \|", (REPO / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.M))
ORDER = list(MAP)


def room(module: str) -> str:
    """Of a dotted name; "." for what lies in no room."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and (PACKAGE / parts[1]).is_dir() else "."


def imported(path: Path) -> set[str]:
    """The modules of the package that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "moe_jax":
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "moe_jax"}
    return found


def backwards(files: list[Path]) -> list[str]:
    place = lambda module: ORDER.index(room(module))
    name = lambda path: ".".join(path.relative_to(REPO).with_suffix("").parts)
    return [f"{name(p)} imports {m}" for p in files for m in sorted(imported(p)) if place(m) > place(name(p))]


def test_the_map_is_the_folder():
    """Every room and every file of it is in the map; "…" stands for more."""
    there = {p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert set(ORDER) == there | {"."} and len(ORDER) <= 20
    for folder, cell in MAP.items():
        files = {p.stem for p in (PACKAGE / folder).glob("*.py")} - {"__init__", "__main__"}
        named = set(re.findall(r"`(\w+)`", cell))
        assert named == files or ("…" in cell and named < files), folder


def test_no_room_imports_from_one_below_it():
    assert not backwards(sorted(PACKAGE.rglob("*.py")))


def test_an_import_back_up_is_seen(tmp_path, monkeypatch):
    source = PACKAGE / "config" / "schema.py"
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "def f():\n    from moe_jax.train import step\n")
    assert backwards([source]) == ["moe_jax.config.schema imports moe_jax.train.step"]


def test_files_are_short():
    long = {p.name: n for p in PACKAGE.rglob("*.py") if (n := len(p.read_text(encoding="utf-8").splitlines())) > 400}
    assert not long
