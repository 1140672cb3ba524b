"""What users get: only what belongs there, and nothing that the registry's scanner flags."""

import ast
import re
import subprocess
from pathlib import Path

import pathspec
import pytest

ROOT = Path(__file__).parents[2]
SHIPPED = {
    "__init__.py",
    "fastercache_core",
    "nodes",
    "web",
    "workflows",
    "locales",
    "LICENSE",
    "README.md",
    "README_zh.md",
    "CHANGELOG.md",
    "pyproject.toml",
    "requirements.txt",
}
TEXT = {".py", ".js", ".json", ".md", ".toml", ".txt", ""}
FLAGGED = re.compile(
    r"""
    \b(subprocess|marshal|pickle|sqlite3)\b | os\.(system|popen|environ|getenv) | \bgetenv\(
    | requests\.\w+\( | \burllib\b | \baiohttp\b | socket\.socket | \.(connect|bind|send|sendall|recv)\(
    | import_module | __import__ | (?<![\w.])(eval|exec|compile)\( | raw\.githubusercontent
    | \.cuda\( | (?<!\.type\ [!=]=\ )["']cuda["'] | torch\.(autocast|load)\b | (?<!soft_)empty_cache
    | basicConfig | sys\.path
    """,
    re.VERBOSE,
)


def packed():
    """Paths of the files that are published: git's files without those that .comfyignore names."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        names = subprocess.run(listing, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("the file list needs git and a clone of the repository")
    ignored = pathspec.GitIgnoreSpec.from_lines((ROOT / ".comfyignore").read_text().splitlines())
    kept = (Path(name) for name in names.split("\0") if name and not ignored.match_file(name))
    return [path for path in kept if (ROOT / path).is_file()]


@pytest.fixture(scope="module")
def files():
    """{path: text} of every published text file."""
    return {path: (ROOT / path).read_text(encoding="utf-8") for path in packed() if path.suffix in TEXT}


def test_only_what_belongs_there_is_published():
    paths = packed()
    assert {path.parts[0] for path in paths} <= SHIPPED
    assert {path.suffix for path in paths} <= TEXT | {".jpg"}


def test_nothing_is_flagged(files):
    found = [f"{path}: {match.group()}" for path, text in files.items() for match in FLAGGED.finditer(text)]
    assert found == []


def test_python_files_are_plain(files):
    """ASCII, so that every Windows code page reads them; logging instead of print."""
    code = {path: text for path, text in files.items() if path.suffix == ".py"}
    calls = [
        (path, node)
        for path, text in code.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    ]
    assert [path for path, text in code.items() if not text.isascii()] == []
    assert [path for path, call in calls if call.func.id == "print"] == []


def test_the_page_gets_one_script(files):
    """Every script under web/ is loaded into everybody's page."""
    assert [path.name for path in files if path.suffix == ".js"] == ["fastercache.js"]


def test_the_version_stands_in_one_place(files):
    version = re.search(r'^version = "(\d+\.\d+\.\d+)"$', files[Path("pyproject.toml")], re.MULTILINE).group(1)
    assert re.search(r"^## (\S+)", files[Path("CHANGELOG.md")], re.MULTILINE).group(1) == version
    assert [path for path, text in files.items() if path.suffix != ".json" and version in text] == [
        Path("CHANGELOG.md"),
        Path("pyproject.toml"),
    ]


def test_the_registry_understands_the_metadata():
    tomllib = pytest.importorskip("tomllib", reason="this Python has no TOML reader")
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project, comfy = data["project"], data["tool"]["comfy"]
    assert re.fullmatch(r"[a-z][a-z0-9-]*", project["name"]) and "comfyui" not in project["name"]
    assert (ROOT / project["license"]["file"]).read_text().lstrip().startswith("GNU GENERAL PUBLIC LICENSE")
    assert project["dependencies"] == [] and project["urls"]["Repository"] and comfy["PublisherId"]
    assert re.fullmatch(r"(>=|<|==)\d+\.\d+\.\d+", comfy["requires-comfyui"])
    assert all(entry.startswith(("Operating System :: ", "Environment :: GPU :: ")) for entry in project["classifiers"])
