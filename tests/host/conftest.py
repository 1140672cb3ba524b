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


@pytest.fixture
def family_names(tiny_models, monkeypatch):
    """The name of the family of a tiny model."""
    from fastercache_pack.nodes.host.families import family_of

    from support.further import know_further

    know_further(monkeypatch)
    return lambda name: family_of(tiny_models(name)).name
