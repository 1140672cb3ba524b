"""The shipped code is linted, formatted, typed and small."""

import ast
from pathlib import Path

import pytest

from testbed.check import CHECKS, PACKAGES, check

ROOT = Path(__file__).parents[2]
SHORT, LONGEST, SHORT_SHARE = 22, 45, 0.9  # lines: short functions have fewer than SHORT
PARAMETERS = 6  # at most, beside self and cls
CODE = 5922  # lines of shipped code in all, without blank lines, imports, comments and docstrings


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


def lines_of_code(text: str) -> int:
    """Lines that are neither blank nor a comment, nor part of an import or a docstring."""
    nodes = list(ast.walk(ast.parse(text)))
    left_out = [node for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom)) or is_docstring(node)]
    skipped = {line for node in left_out for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    lines = enumerate(text.splitlines(), 1)
    return sum(bool(line.strip()) and line.strip()[0] != "#" and n not in skipped for n, line in lines)


def is_docstring(node: ast.AST) -> bool:
    """True for a text that stands alone."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


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
    assert sum(lines_of_code(path.read_text(encoding="utf-8")) for path in shipped()) <= CODE
