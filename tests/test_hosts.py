"""The pack on several versions of ComfyUI: the table of them, and the names of the host that shipped files use."""

import sys
from pathlib import Path

import pytest

from testbed import hosts
from testbed.host_names import Tree, missing, nowhere, shipped, uses
from testbed.server import comfyui_path

SUITE = """
import pytest

def test_every_node_is_there(): pass
def test_wrong(): assert not "right"
@pytest.fixture
def broken(): raise ValueError
def test_error(broken): pass
@pytest.mark.parametrize("n", [1, 2])
def test_not_here(n): pytest.skip("this host has no Flux2")
"""


@pytest.fixture
def seen(tmp_path, monkeypatch):
    """What a small suite gives on a tree that says it is 9.1."""
    (tmp_path / "test_it.py").write_text(SUITE)
    (tmp_path / "comfyui_version.py").write_text('__version__ = "9.1"\n')
    monkeypatch.setattr(hosts, "ROOT", tmp_path)
    monkeypatch.setattr(hosts, "SUITE", ["test_it.py"])
    return lambda *options: hosts.try_out(sys.executable, tmp_path, list(options))


def test_a_row_says_whether_it_loads_and_how_many_tests_passed(seen):
    result = seen()
    assert result.row()[0] == "9.1" and result.row()[2:6] == ("yes", "1", "2", "2")
    assert not result.good


def test_the_table_is_followed_by_what_failed_and_why_tests_were_skipped(seen):
    table = hosts.summary([seen()])
    assert "| ComfyUI | torch | loads | passed | failed | skipped | date |\n|" in table
    assert "failed: test_it::test_wrong" in table and "2 skipped: this host has no Flux2" in table


def test_options_choose_tests_as_they_do_for_pytest(seen):
    result = seen("-k", "every_node")
    assert result.good and result.row()[2:6] == ("yes", "1", "0", "0")


def test_a_host_that_does_not_load_says_so(seen):
    assert seen("-k", "not_here").row()[2:6] == ("no", "0", "0", "2")


def test_tests_that_cannot_even_begin_are_no_success(seen, tmp_path):
    (tmp_path / "conftest.py").write_text("import a_module_that_is_missing")
    assert not seen().good


@pytest.fixture
def tree(tmp_path):
    """A tree with one package, as ComfyUI's are made."""
    files = {
        "comfy/samplers.py": "import torch\nclass Base:\n    A = 1\nclass Sampler(Base):\n    def __init__(self):\n"
        "        self.cfg = 1\nclass Module(torch.nn.Module):\n    pass\nif torch:\n    LATER = Sampler()\n",
        "comfy_api/latest/__init__.py": "from . import _io_public as io\nfrom ._io import *\n",
        "comfy_api/latest/_io_public.py": "from ._io import *\n",
        "comfy_api/latest/_io.py": "from . import io\nclass Schema:\n    pass\n",
        "server.py": "class PromptServer:\n    instance = None\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return Tree(tmp_path)


def lacking(source, *trees):
    return set(missing(uses(source), list(trees)))


@pytest.mark.parametrize(
    "source",
    [
        "import comfy.samplers\ncomfy.samplers.Sampler.A",
        "import comfy.samplers as s\ns.Sampler.cfg, s.LATER.anything, s.Module.forward",
        "from comfy_api.latest import io, Schema\nio.Schema",
        "import torch, os\ntorch.nn.nothing, os.nothing",
        "from .comfy import nothing",
    ],
)
def test_what_is_there_is_found(tree, source):
    assert lacking(source, tree) == set()


@pytest.mark.parametrize(
    "source, name",
    [
        ("import comfy.nothing", "comfy.nothing"),
        ("from comfy import samplers\nsamplers.Nothing(1).more", "comfy.samplers.Nothing"),
        ("import comfy.samplers\ndef f(x):\n    return comfy.samplers.Sampler.B[x]", "comfy.samplers.Sampler.B"),
        ("from comfy_api.latest import io\nx: io.Nothing", "comfy_api.latest.io.Nothing"),
        ("from server import Nothing", "server.Nothing"),
    ],
)
def test_what_is_not_there_is_named(tree, source, name):
    assert lacking(source, tree) == {name}


@pytest.mark.parametrize(
    "source",
    [
        "try:\n    from comfy.new import thing\nexcept ImportError:\n    thing = None",
        "import comfy.samplers as s\nif hasattr(s, 'new'):\n    s.new.thing()",
        "import comfy.samplers as s\nnew = getattr(s, 'new', None)",
    ],
)
def test_what_is_tried_for_may_be_missing(tree, source):
    assert lacking(source, tree) == set()


def test_what_handles_the_lack_may_not_be_missing(tree):
    source = "try:\n    from comfy.new import a\nexcept ImportError:\n    from comfy.newer import a"
    assert lacking(source, tree) == {"comfy.newer.a"}


def test_a_class_that_a_text_names_may_be_missing_and_is_said_where_no_tree_has_it(tree, tmp_path):
    trees, found = [Tree(tmp_path / "comfy"), tree], uses("'comfy.samplers.Sampler', 'comfy.samplers.Gone'")
    assert nowhere(found, trees) == ["comfy.samplers.Gone"] and missing(found, trees) == {}


def test_this_host_has_every_name_that_shipped_files_need():
    found = shipped()
    assert {"comfy.samplers.CFGGuider", "server.PromptServer"} <= found.needed and found.classes
    assert missing(found, [Tree(Path(comfyui_path()))]) == {}
