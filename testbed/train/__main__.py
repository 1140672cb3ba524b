"""Train or distil one of the models: python -m testbed.train NAME, then its options (--help lists them)."""

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import distill
import training

SCRIPTS = {"emoji_mmdit": "mmdit", "emoji_unet": "unet", "emoji_wan": "wan", "photos_lumina": "photos"}


def main() -> None:
    """Run what the command line names."""
    name = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if name in SCRIPTS:
        training.main(importlib.import_module(SCRIPTS[name]).RECIPE)
    elif name in distill.STUDENTS:
        distill.main(name)
    else:
        sys.exit(f"{__doc__}\nModels: {', '.join([*SCRIPTS, *distill.STUDENTS])}")


if __name__ == "__main__":
    main()
