"""The shipped code is linted, formatted, typed and small."""

import ast
from pathlib import Path

import pytest

from testbed.check import CHECKS, PACKAGES, check

ROOT = Path(__file__).parents[2]
SHORT, LONGEST, SHORT_SHARE = 22, 45, 0.9  # lines: short functions have fewer than SHORT
PARAMETERS = 6  # at most, beside self and cls
LINES = 6350  # of shipped code in all


def shipped() -> list[Path]:
    """The Python files of the shipped packages."""
    return [path for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py"))]


def functions() -> list[tuple[str, int, int]]:
    """(place, lines, parameters beside self and cls) of every shipped function."""
    return [
        (f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", length(node), parameters(node))
        for path in shipped()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]


def length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its decorators."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Parameters of a function; *args and **kwargs count as one each."""
    named = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return len([n for n in named if n not in ("self", "cls")]) + bool(node.args.vararg) + bool(node.args.kwarg)


@pytest.mark.parametrize("name", CHECKS)
def test_the_check_is_content(name: str) -> None:
    result = check(name)
    assert result.returncode == 0, result.stdout


def test_functions_are_short() -> None:
    lengths = {place: lines for place, lines, _ in functions()}
    short = sum(lines < SHORT for lines in lengths.values()) / len(lengths)
    longer = [place for place, lines in lengths.items() if lines > LONGEST]
    assert longer == [] and short >= SHORT_SHARE, (longer, short)


def test_functions_take_few_parameters() -> None:
    assert [place for place, _, count in functions() if count > PARAMETERS] == []


def test_shipped_code_does_not_grow() -> None:
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in shipped()) <= LINES
