"""The linter, the formatter and the type checker on this checkout; all three are configured in pyproject.toml.

python dev.py check
"""

from __future__ import annotations

import subprocess
import sys

from testbed.server import ROOT, link_folder

CHECKS = {
    "lint": ["ruff", "check", "."],
    "format": ["ruff", "format", "--check", "."],
    "types": ["mypy"],
}
# The checkout is a package whose name is that of its folder, which need not be one that Python knows. The type checker
# sees the shipped packages under the name below, so that relative imports across the root are found.
PACKAGES = ("fastercache_core", "nodes")
TYPED = ROOT / ".cache" / "types" / "fastercache_pack"


def link_packages() -> None:
    """Make the shipped packages stand in TYPED."""
    TYPED.mkdir(parents=True, exist_ok=True)
    for name in PACKAGES:
        if not (TYPED / name).exists():
            link_folder(TYPED / name, ROOT / name)


def check(name: str) -> subprocess.CompletedProcess[str]:
    """What one of CHECKS says."""
    link_packages()
    command = [sys.executable, "-m", *CHECKS[name]]
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def main() -> None:
    """Show what all checks say; the exit code is 0 when they are content."""
    results = [check(name) for name in CHECKS]
    print("".join(result.stdout for result in results), end="")
    sys.exit(any(result.returncode for result in results))


if __name__ == "__main__":
    main()
