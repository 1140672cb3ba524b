"""The pack as the host loads it, for tests on tiny models inside this process."""

import pytest

from testbed.pack import load_pack

load_pack()


@pytest.fixture(scope="session")
def tiny_models():
    """Tiny models by family name, built once; tests work on clones."""
    from support.tiny import build

    built = {}

    def get(name):
        if name not in built:
            built[name] = build(name)
        return built[name].clone()

    return get
