"""The pack as the host loads it, for tests on tiny models inside this process."""
import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACK = "fastercache_pack"

if PACK not in sys.modules:
    spec = importlib.util.spec_from_file_location(PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    sys.modules[PACK] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[PACK])


@pytest.fixture(scope="session")
def tiny_models():
    """Tiny models by family name, built once; tests work on clones."""
    from tiny import build
    built = {}

    def get(name):
        if name not in built:
            built[name] = build(name)
        return built[name].clone()

    return get
