"""Text is UTF-8 everywhere: every place of the repository that opens a text file says so, whatever the locale is."""

import ast
import json
import re
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
SOURCES = [p for p in sorted(REPO.rglob("*")) if p.suffix in (".py", ".ipynb") and not {"runs", ".git"} & {*p.parts}]
# Of a call, by the name called: the place of its mode among positional arguments, and of its encoding.
CALLS = {"open": (1, 3), "fdopen": (1, 3)}
METHODS = {"open": (0, 2), "read_text": (None, 0), "write_text": (None, 1)}  # of a Path
MODULES = {"os", "io", "gzip", "bz2", "lzma", "codecs", "tarfile", "zipfile", "tokenize", "webbrowser", "Image"}
SUBPROCESS = {"run", "Popen", "check_output", "getoutput"}


def programs(path: Path) -> list[str]:
    if path.suffix == ".py":
        return [path.read_text(encoding="utf-8")]
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    return [
        "\n".join("" if line.lstrip()[:1] in "!%" and line.strip() else line for line in c.split("\n")) for c in code
    ]


def text(call: ast.Call, at: int | None, default: str) -> str | None:
    """The mode of a call, None if it is not written out."""
    given = [k.value for k in call.keywords if k.arg == "mode"] + (call.args[at : at + 1] if at is not None else [])
    return (given[0].value if isinstance(given[0], ast.Constant) else None) if given else default


def lacks_encoding(call: ast.Call) -> bool:
    """Whether the call opens a text file, or the text of a process, without naming an encoding."""
    keywords = {k.arg for k in call.keywords}
    if "encoding" in keywords:
        return False
    if isinstance(call.func, ast.Name):
        name, owner, of = call.func.id, "", CALLS
    elif isinstance(call.func, ast.Attribute):
        name, owner = call.func.attr, call.func.value.id if isinstance(call.func.value, ast.Name) else ""
        of = CALLS if owner in MODULES else METHODS
        if owner == "subprocess" and name in SUBPROCESS:
            return bool({"text", "universal_newlines"} & keywords)
        if name == "NamedTemporaryFile" or name == "TemporaryFile":
            return "b" not in (text(call, 0, "w+b") or "b")
    else:
        return False
    if name not in of or (owner in ("os", "tarfile", "zipfile", "tokenize", "webbrowser", "Image") and name == "open"):
        return False
    mode_at, encoding_at = of[name]
    if len(call.args) > encoding_at:
        return False
    if name in ("read_text", "write_text"):
        return True
    mode = text(call, mode_at, "rb" if owner in ("gzip", "bz2", "lzma") else "r")
    return mode is not None and "b" not in mode and set(mode) <= set("rwaxt+")


def strings(tree: ast.AST) -> list[str]:
    """Programs that a test keeps in a string."""
    texts = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return [s for s in texts if any(f"{name}(" in s for name in CALLS | METHODS) and "\n" in s and is_program(s)]


def found(source: str, where: str) -> list[str]:
    tree = ast.parse(source)
    lines = [f"{where}:{n.lineno}" for n in ast.walk(tree) if isinstance(n, ast.Call) and lacks_encoding(n)]
    return lines + [line for s in strings(tree) for line in found(s, f"{where} in a string")]


def is_program(text: str) -> bool:
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


@pytest.mark.parametrize(
    ("code", "lacks"),
    [
        ("open(p)", True),
        ("open(p, 'w')", True),
        ("open(p, mode='a')", True),
        ("open(p, 'rb')", False),
        ("open(p, 'w', encoding='utf-8')", False),
        ("open(p, 'w', 1, 'utf-8')", False),
        ("p.open()", True),
        ("(p / 'x').open('wb')", False),
        ("p.read_text()", True),
        ("p.read_text('utf-8')", False),
        ("(p / 'x').write_text(s)", True),
        ("p.write_text(s, 'utf-8')", False),
        ("gzip.open(p, 'wt')", True),
        ("gzip.open(p)", False),
        ("os.open(p, flags)", False),
        ("os.fdopen(handle, 'w')", True),
        ("self.open()", True),
        ("tarfile.open(p)", False),
        ("subprocess.run(c, text=True)", True),
        ("subprocess.run(c)", False),
        ("tempfile.NamedTemporaryFile('w')", True),
        ("tempfile.NamedTemporaryFile()", False),
    ],
)
def test_the_scan_knows_text_from_bytes(code, lacks):
    assert bool(found(code, "")) == lacks


def test_every_text_file_is_opened_as_utf_8():
    assert len(SOURCES) > 150
    bad = [line for path in SOURCES for code in programs(path) for line in found(code, str(path.relative_to(REPO)))]
    assert not bad, "without encoding=: " + ", ".join(bad)


def test_every_command_replaces_what_it_cannot_print():
    files = [
        p for folder in ("", "benchmarks", "experiments", "moe_jax/*") for p in REPO.glob(f"{folder}/*.py".strip("/"))
    ]
    sources = {path.relative_to(REPO).as_posix(): path.read_text(encoding="utf-8") for path in files}
    commands = {name: text for name, text in sources.items() if '\nif __name__ == "__main__":' in text}
    careful = re.compile(
        r"cli\.run\(main[,)]|terminal\.replace_unprintable\(\)|sys\.stdout\.reconfigure\((errors=\"replace\"|encoding=\"utf-8\")\)"
    )
    assert len(commands) > 25 and not [name for name, text in commands.items() if not careful.search(text)]
