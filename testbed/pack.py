"""This pack as a package of the running process, as the host loads it; the host must be importable."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACK = "fastercache_pack"


def load_pack():
    """The package, loaded once."""
    if PACK not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        sys.modules[PACK] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[PACK])
    return sys.modules[PACK]
