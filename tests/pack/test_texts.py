"""Help pages and translations say what the nodes say."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEADINGS = ["## Inputs", "## Outputs", "## When quality drops"]
CHINESE = re.compile("[\u4e00-\u9fff]")
SYNTAX = re.compile(r"[{}@|]")  # the page's translation reads these as commands


def translation(language):
    return json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))


def help_page(name, language):
    path = f"{name}.md" if language == "en" else f"{name}/{language}.md"
    return (ROOT / "web" / "docs" / path).read_text(encoding="utf-8")


def leaves(texts, path=""):
    """Every (path, text) of a translation."""
    for key, value in texts.items():
        yield from leaves(value, f"{path}/{key}") if isinstance(value, dict) else [(f"{path}/{key}", value)]


def headings(page):
    return re.findall("^## .*", page, re.MULTILINE)


def rows(section):
    """The first cells of a section's table."""
    return re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)


def test_english_is_the_nodes_own(english):
    assert translation("en") == english, "run: python dev.py test tests/pack/make_english.py"


def test_chinese_is_complete(english):
    wanted, found = dict(leaves(english)), dict(leaves(translation("zh")))
    assert found.keys() == wanted.keys()
    assert [path for path, text in found.items() if not CHINESE.search(text) and not path.endswith("cfg/name")] == []


@pytest.mark.parametrize("language", ["en", "zh"])
def test_no_text_is_read_as_a_command(language):
    assert [path for path, text in leaves(translation(language)) if SYNTAX.search(text)] == []


@pytest.mark.parametrize("language", ["en", "zh"])
def test_help_page_explains_every_input_and_output(schema, language):
    page = help_page(schema.node_id, language)
    assert page.startswith(f"# {translation(language)[schema.node_id]['display_name']}\n\n")
    assert headings(page) == (HEADINGS if language == "en" else headings(help_page("FasterCache", language)))
    _, inputs, outputs, advice = re.split("^## .*", page, flags=re.MULTILINE)
    assert rows(inputs) == [entry.id for entry in schema.inputs]
    assert rows(outputs) == [entry.display_name or entry.id for entry in schema.outputs]
    assert len(advice.strip()) > 40


@pytest.mark.parametrize("language", ["en", "zh"])
def test_help_page_explains_every_choice(schema, language, english):
    page = help_page(schema.node_id, language)
    choices = [option for texts in english[schema.node_id]["inputs"].values() for option in texts.get("options", [])]
    assert [choice for choice in choices if f"`{choice}`" not in page] == []
