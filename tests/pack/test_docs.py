"""Pages for people: what they link to and which files they name is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\((?!https?:)([^)\s#]*)(?:#([^)\s]+))?\)")
FILE = re.compile(r"`((?:fastercache_core|nodes|tests|testbed|benchmarks|docs|web|locales)/[\w./-]*)`")
ANCHOR = re.compile(r'<a id="([^"]+)">')


def anchors(page: Path) -> set[str]:
    """The names that a link to a part of `page` may have: those of its headings, and its own."""
    text = page.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings} | {*ANCHOR.findall(text)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = [(page.parent / path if path else page, part) for path, part in LINK.findall(page.read_text("utf-8"))]
    assert [str(path) for path, _ in links if not path.exists()] == []
    assert [f"{path}#{part}" for path, part in links if part and part not in anchors(path)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_are_there(page: Path) -> None:
    assert [name for name in FILE.findall(page.read_text("utf-8")) if not (ROOT / name).exists()] == []


def test_every_module_of_the_maps_is_there_and_none_is_missing() -> None:
    """The docstrings of the packages name their modules."""
    for package in ("fastercache_core", "nodes/host"):
        text = (ROOT / package / "__init__.py").read_text(encoding="utf-8")
        names = set(re.findall(r"^(\w+)  ", text, re.MULTILINE))
        modules = {path.stem for path in (ROOT / package).glob("*.py")} | {
            path.parent.name for path in (ROOT / package).glob("*/__init__.py")
        }
        assert names == modules - {"__init__"}, package
