"""What meets ComfyUI, tried on a tree of it: does the pack load, and which tests pass. Needs only plain Python.

python dev.py hosts PATH ...
"""

from __future__ import annotations

import datetime
import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
# What depends on the host: the pack in a server and in this process, its nodes and graphs.
SUITE = ("tests/api", "tests/workflows", "tests/pack/test_nodes.py", "tests/pack/test_settings.py", "tests/host")
LOADS = "test_every_node_is_there"
HEADINGS = ("ComfyUI", "torch", "loads", "passed", "failed", "skipped", "date")


@dataclass
class Result:
    """What was seen on one host; `reasons` says of skipped tests how many there were for each reason."""

    version: str
    torch: str
    date: str
    loads: bool = False
    passed: int = 0
    failed: list[str] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)

    @property
    def good(self) -> bool:
        """It loads, and no test failed."""
        return self.loads and not self.failed

    def row(self) -> tuple[str, ...]:
        """Its cells, in the order of HEADINGS."""
        counts = (self.passed, len(self.failed), self.reasons.total())
        return (self.version, self.torch, "yes" if self.loads else "no", *map(str, counts), self.date)


def version(tree: Path) -> str:
    """The version that a ComfyUI tree says it has."""
    file = tree / "comfyui_version.py"
    found = re.search(r'__version__ = "(.+?)"', file.read_text()) if file.is_file() else None
    return found[1] if found else "unknown"


def settings(tree: Path | str) -> dict[str, str]:
    """The environment variables of a process that uses a ComfyUI tree."""
    return {"OMP_NUM_THREADS": "1", **os.environ, "COMFYUI_PATH": str(tree)}


def try_out(python: Path, tree: Path, options: list[str]) -> Result:
    """Run SUITE with this Python on this tree; `options` go to pytest."""
    print(f"ComfyUI {version(tree)} ...", flush=True)
    ask = [str(python), "-c", "import importlib.metadata; print(importlib.metadata.version('torch'))"]
    torch = subprocess.run(ask, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    result = Result(version(tree), torch, datetime.date.today().isoformat())
    with tempfile.TemporaryDirectory() as scratch:
        seen = Path(scratch, "seen.xml")
        command = [str(python), "-m", "pytest", "-q", f"--junitxml={seen}", *SUITE, *options]
        subprocess.call(command, cwd=ROOT, env=settings(tree))
        if seen.is_file():
            read(result, ElementTree.parse(seen).getroot())
    return result


def read(result: Result, seen: ElementTree.Element) -> None:
    """Count what pytest wrote about its tests."""
    for case in seen.iter("testcase"):
        name = "::".join(filter(None, (case.get("classname"), case.get("name"))))
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            result.failed.append(name)
        elif skipped is not None:
            result.reasons[skipped.get("message") or "no reason"] += 1
        else:
            result.passed += 1
            result.loads |= case.get("name") == LOADS


def summary(results: list[Result]) -> str:
    """A table of the hosts, then what failed and why tests were skipped."""
    lines = [" | ".join(cells) for cells in (HEADINGS, ("---",) * len(HEADINGS), *(each.row() for each in results))]
    text = ["", *(f"| {line} |" for line in lines), ""]
    for each in results:
        text += [f"{each.version}, torch {each.torch}:"] if each.failed or each.reasons else []
        text += [f"- failed: {name}" for name in each.failed]
        text += [f"- {count} skipped: {reason}" for reason, count in sorted(each.reasons.items())]
    return "\n".join(text)
