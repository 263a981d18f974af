"""The pages: links and anchors lead somewhere, pages that the sources name exist, and those of a user stay short."""

import json
import re
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
PAGES = sorted([*REPO.glob("*.md"), *REPO.glob("docs/*.md"), *REPO.glob("notebooks/*.ipynb")])
SOURCES = [p for folder in ("moe_jax", "configs", "benchmarks", "experiments", "tests", ".") for p in
           (REPO / folder).glob("*.py" if folder == "." else "**/*.py")]  # fmt: skip


def prose(path: Path) -> str:
    """The text of a page, or of a notebook's cells, without its blocks of code."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ +(.*)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    lost = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        target, _, anchor = link.partition("#")
        if "://" in link:
            continue
        file = (path.parent / target).resolve() if target else path
        if not file.exists() or (anchor and anchor not in anchors(file)):
            lost.append(link)
    assert not lost


def test_pages_that_sources_name_exist():
    named = {(p.name, page) for p in SOURCES for page in re.findall(r"docs/\w+\.\w+", p.read_text(encoding="utf-8"))}
    assert len(named) > 15 and not [(name, page) for name, page in named if not (REPO / page).exists()]


def test_every_page_is_in_the_index():
    listed = re.findall(r"\]\((\w+\.md)\)", (REPO / "docs" / "index.md").read_text(encoding="utf-8"))
    assert sorted({*listed, "index.md"}) == sorted(p.name for p in REPO.glob("docs/*.md"))


def test_pages_of_a_user_are_short():
    assert len((REPO / "README.md").read_text(encoding="utf-8").split()) <= 700
    for name in ("performance", "scaling"):
        assert len((REPO / "docs" / f"{name}.md").read_text(encoding="utf-8").splitlines()) <= 90, name
