"""Every name of the host that shipped files use, looked up in trees of ComfyUI without importing them.

python -m testbed.host_names PATH ...    says which names a tree lacks; needs only plain Python

A name is what an import or an attribute of something imported says: `comfy.samplers.KSampler.SAMPLERS`. What is tried
for (`except ImportError`, `hasattr`) may be missing. So may the classes that the table of families names; those that
none of the trees has are said.
"""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from testbed.hosts import ROOT, version

SHIPPED = ("__init__.py", "nodes", "fastercache_core")
CLASS_PATH = re.compile(r"comfy(_extras)?(\.\w+){2,}")
MISSING_ERRORS = {"ImportError", "ModuleNotFoundError", "AttributeError"}
GIVEN = {"__dataclass_fields__", "__name__", "__qualname__", "__module__", "__mro__", "__subclasses__", "__dict__"}
EMPTY_BASES = ("object", "ABC", "Generic", "Protocol")
Definition = ast.AST | str  # a class, a function or a value of the module itself; else the dotted name it stands for


@dataclass
class Uses:
    """Dotted names that a source needs, those that it tries for, and those of classes that it holds as text."""

    needed: set[str] = field(default_factory=set)
    tried: set[str] = field(default_factory=set)
    classes: set[str] = field(default_factory=set)

    def __or__(self, other: Uses) -> Uses:
        return Uses(self.needed | other.needed, self.tried | other.tried, self.classes | other.classes)


def uses(source: str) -> Uses:
    """What a Python source uses of anything that it imports absolutely."""
    tree = ast.parse(source)
    aliases = dict(pair for node in ast.walk(tree) for pair in bound(node))
    found = Uses()
    for node, tried in walk(tree, False):
        names = [dotted for _, dotted in bound(node)] if isinstance(node, ast.ImportFrom) else imported(node)
        if isinstance(node, ast.Attribute):
            names = chain(node, aliases)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("hasattr", "getattr"):
            found.tried |= {f"{name}.{of_text(node.args[1])}" for name in chain(node.args[0], aliases)}
        (found.tried if tried else found.needed).update(names)
        if CLASS_PATH.fullmatch(of_text(node)):
            found.classes.add(of_text(node))
    found.needed = {name for name in found.needed if not any((name + ".").startswith(t + ".") for t in found.tried)}
    return found


def walk(node: ast.AST, tried: bool) -> Iterator[tuple[ast.AST, bool]]:
    """Every node below, an attribute of an attribute only with the outer one; and whether its lack is caught."""
    yield node, tried
    if isinstance(node, ast.Attribute):
        while isinstance(node, ast.Attribute):
            node = node.value
        if isinstance(node, ast.Name):
            return
        yield from walk(node, tried)
        return
    caught = isinstance(node, ast.Try) and any(MISSING_ERRORS & named(handler.type) for handler in node.handlers)
    for child in ast.iter_child_nodes(node):
        yield from walk(child, tried or (caught and child in node.body))  # type: ignore[attr-defined]


def named(node: ast.AST | None) -> set[str]:
    """The plain names in an expression."""
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)} if node else set()


def of_text(node: ast.AST) -> str:
    """A literal text; "" for anything else."""
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def bound(node: ast.AST) -> list[tuple[str, str]]:
    """What an absolute import binds: pairs of a name here and the dotted name that it stands for."""
    if isinstance(node, ast.Import):
        return [(n.asname or n.name.split(".")[0], n.name if n.asname else n.name.split(".")[0]) for n in node.names]
    if isinstance(node, ast.ImportFrom) and not node.level:
        return [(n.asname or n.name, f"{node.module}.{n.name}") for n in node.names]
    return []


def imported(node: ast.AST) -> list[str]:
    """The modules that an `import` names."""
    return [name.name for name in node.names] if isinstance(node, ast.Import) else []


def chain(node: ast.AST, aliases: dict[str, str]) -> list[str]:
    """The dotted name that `a.b.c` stands for, where `a` was imported."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    if isinstance(node, ast.Name) and node.id in aliases:
        return [".".join([aliases[node.id], *parts])]
    return []


class Tree:
    """A tree of Python packages; `has` looks a dotted name up in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.module = functools.cache(self._module)

    def owns(self, name: str) -> bool:
        """Does the name begin with a module of this tree?"""
        return self.module(name.split(".")[0]) is not None

    def has(self, name: str) -> bool:
        """Is there such a module, or such a thing in a module, as far as can be read?"""
        parts = name.split(".")
        return self.module(parts[0]) is not None and self._in_module(parts[0], parts[1:], frozenset())

    def _module(self, name: str) -> dict[str, list[Definition]] | None:
        """What a module's source defines; None where there is no such module."""
        path = self.root.joinpath(*name.split("."))
        for file, package in ((path / "__init__.py", name), (path.with_suffix(".py"), name.rpartition(".")[0])):
            if file.is_file():
                return definitions(ast.parse(file.read_text(encoding="utf-8")), package)
        return {} if path.is_dir() else None

    def _in_module(self, module: str, rest: list[str], seen: frozenset[str]) -> bool:
        inside = self.module(module)
        if not rest or inside is None:
            return inside is not None
        here, question = f"{module}.{rest[0]}", f"{module}: {'.'.join(rest)}"
        if question in seen:  # modules that import all of each other
            return False
        seen |= {question}
        if rest[0] in inside:
            return any(self._leads_on(module, each, rest[1:], seen) for each in inside[rest[0]])
        if self.module(here) is not None:
            return self._in_module(here, rest[1:], seen)
        return any(self._named(f"{each}.{rest[0]}", rest[1:], seen) for each in inside.get("*", []))

    def _named(self, name: str, rest: list[str], seen: frozenset[str]) -> bool:
        """Is there `rest` in what this dotted name stands for? Yes where that is not of this tree."""
        parts = [*name.split("."), *rest]
        return not self.owns(name) or self._in_module(parts[0], parts[1:], seen)

    def _leads_on(self, module: str, definition: Definition, rest: list[str], seen: frozenset[str]) -> bool:
        """Is there `rest` in a thing that a module defines? Of values nothing is known, so anything may be."""
        if isinstance(definition, str):
            return self._named(definition, rest, seen)
        if not rest or not isinstance(definition, ast.ClassDef):
            return True
        members = definitions(definition, "")
        if rest[0] in members:
            return any(self._leads_on(module, each, rest[1:], seen) for each in members[rest[0]])
        bases = [ast.unparse(base) for base in definition.bases]
        return rest[0] in attributes_of(definition) or any(self._base_has(module, base, rest, seen) for base in bases)

    def _base_has(self, module: str, base: str, rest: list[str], seen: frozenset[str]) -> bool:
        """Is there `rest` in a base class, as the module names it? Bases from elsewhere count as having anything."""
        if base.split("[")[0] in EMPTY_BASES:
            return False
        known = base.split(".")[0] in (self.module(module) or {})
        return not known or self._in_module(module, [*base.split("."), *rest], seen)


def attributes_of(definition: ast.ClassDef) -> set[str]:
    """Those that a class gives itself (`self.x = ...`), and those that Python gives every class."""
    nodes = [node for node in ast.walk(definition) if isinstance(node, ast.Attribute)]
    return {node.attr for node in nodes if isinstance(node.ctx, ast.Store)} | GIVEN


def definitions(scope: ast.Module | ast.ClassDef, package: str) -> dict[str, list[Definition]]:
    """What the statements of a module or a class bind; "*" has the modules of which all is imported."""
    found: dict[str, list[Definition]] = {}
    for node in statements(scope):
        for name, what in bindings(node, package):
            found.setdefault(name, []).append(what)
    return found


def statements(scope: ast.AST) -> Iterator[ast.AST]:
    """The statements of a scope, also those under `if`, `try` and `with`."""
    for node in ast.iter_child_nodes(scope):
        yield node
        if not isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef, ast.expr)):
            yield from statements(node)


def bindings(node: ast.AST, package: str) -> Iterator[tuple[str, Definition]]:
    """The names that one statement binds, with what they are."""
    if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        yield node.name, node
    elif isinstance(node, ast.ImportFrom):
        above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        source = ".".join([*above, *filter(None, [node.module])])
        yield from (("*", source) if n.name == "*" else (n.asname or n.name, f"{source}.{n.name}") for n in node.names)
    elif isinstance(node, ast.Import):
        yield from bound(node)
    elif isinstance(node, (ast.Assign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        yield from ((n.id, node) for target in targets for n in ast.walk(target) if isinstance(n, ast.Name))


def shipped() -> Uses:
    """What all shipped files use."""
    files = [
        file for name in SHIPPED for file in ([ROOT / name] if name.endswith(".py") else (ROOT / name).rglob("*.py"))
    ]
    return functools.reduce(Uses.__or__, (uses(file.read_text(encoding="utf-8")) for file in files))


def missing(found: Uses, trees: list[Tree]) -> dict[str, list[Tree]]:
    """The names that are lacking, with the trees that lack them."""
    known = [name for name in sorted(found.needed) if any(tree.owns(name) for tree in trees)]
    lacking = {name: [tree for tree in trees if not tree.has(name)] for name in known}
    return {name: without for name, without in lacking.items() if without}


def nowhere(found: Uses, trees: list[Tree]) -> list[str]:
    """The classes named as text that no tree has: misspelt, or of another version."""
    return [name for name in sorted(found.classes) if not any(tree.has(name) for tree in trees)]


def main() -> None:
    """Say what is lacking where; the exit code is 0 when nothing that is needed is."""
    trees = [Tree(Path(path)) for path in sys.argv[1:]]
    if not trees:
        sys.exit(__doc__)
    found = shipped()
    lacking = missing(found, trees)
    for name, without in lacking.items():
        print(f"{name} is not in ComfyUI {', '.join(version(tree.root) for tree in without)}")
    for name in nowhere(found, trees):
        print(f"{name}, the class of a family, is in none of these")
    if not lacking:
        print(f"Every name of the host that shipped files need is in {', '.join(version(t.root) for t in trees)}.")
    sys.exit(bool(lacking))


if __name__ == "__main__":
    main()
