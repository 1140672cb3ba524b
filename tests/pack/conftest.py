"""What the pack's nodes say about themselves."""

import sys

import pytest

from testbed.pack import PACK, load_pack

# Options that are not the pack's to translate: the host's own, and the user's files.
HOST_LISTS = ("sampler_name", "scheduler", "filename")

load_pack()

SCHEMAS = {node.GET_SCHEMA().node_id: node.GET_SCHEMA() for node in sys.modules[f"{PACK}.nodes"].NODES}


def pytest_generate_tests(metafunc):
    """Run a test that asks for `schema` once for each node."""
    if "schema" in metafunc.fixturenames:
        metafunc.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS.keys())


@pytest.fixture
def schemas():
    """{node id: schema} of every node."""
    return SCHEMAS


@pytest.fixture
def english():
    """locales/en/nodeDefs.json as it has to be."""
    return {name: texts(schema) for name, schema in SCHEMAS.items()}


def texts(schema):
    """All that a person reads on a node, as the page's translations have it."""
    return {
        "display_name": schema.display_name,
        "description": schema.description,
        "inputs": {entry.id: input_texts(entry) for entry in schema.inputs},
        "outputs": {str(i): slot_texts(entry) for i, entry in enumerate(schema.outputs)},
    }


def input_texts(entry):
    options = [] if entry.id in HOST_LISTS else getattr(entry, "options", None) or []
    return {**slot_texts(entry), **({"options": {option: option for option in options}} if options else {})}


def slot_texts(entry):
    return {"name": entry.display_name or entry.id, "tooltip": entry.tooltip}
