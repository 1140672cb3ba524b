"""The page on what happens beside others says what runs show."""

from pathlib import Path

import pytest

from support.beside import CASES, FOOT, HEAD, PAGE, row

ROOT = Path(__file__).parents[2]
NAMED = [(part, name) for part, cases in CASES.items() for name in cases]


@pytest.mark.parametrize("part, name", NAMED, ids=[name for _, name in NAMED])
def test_the_page_says_what_a_run_shows(tiny_models, part, name):
    assert row(name, CASES[part][name].outcome(tiny_models)) in (ROOT / PAGE).read_text(encoding="utf-8")


def test_the_page_has_no_other_rows():
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    assert text.startswith(HEAD) and text.endswith(FOOT)
    rows = [line for line in text.removesuffix(FOOT).splitlines() if line.startswith("| ")]
    assert len(rows) == len(NAMED) + len(CASES), "a row each, and a head for each part"
