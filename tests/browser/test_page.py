"""ComfyUI's page with this pack, in both of its renderers."""

import itertools
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TITLES = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
STEPS = 8
SEEDS = itertools.count(1000)  # the server would not sample the same thing again
QUIET = "not run yet"
WITHOUT_BOX = ("FasterCacheAutoFR", "FasterCachePolicyLoad")  # they hand their text on
PACK_NODES = "() => Object.keys(LiteGraph.registered_node_types).filter((type) => type.startsWith('FasterCache'))"
MISSING = "() => app.graph.nodes.filter((node) => !LiteGraph.registered_node_types[node.type]).map((node) => node.type)"
INTO_SUBGRAPH = """(type) => {
    const node = app.graph.nodes.find((node) => node.type === type);
    app.graph.convertToSubgraph(new Set([node]));
}"""
INSIDE = """() => [...app.graph.subgraphs.values()].flatMap((graph) => graph.nodes)
    .map((node) => node.widgets.find((widget) => widget.name === "fastercache_text").element.textContent)"""
VISIBLE = """() => [...document.querySelectorAll("[role=status].widget-expands")]
    .map((box) => box.getBoundingClientRect()).map(({ width, height }) => [width, height])"""


@pytest.fixture(autouse=True)
def nothing_went_wrong(editor):
    yield
    errors, editor.errors[:] = list(editor.errors), []
    assert errors == []


def workflow(title, folder="workflows"):
    return json.loads((ROOT / folder / f"{title}.json").read_text())


@pytest.fixture
def demo(editor):
    """The page with the demo graph, set to few steps."""
    editor.load(workflow("FasterCache demo"))
    for title in ("With FasterCache", "In full"):
        editor.set(title, steps=STEPS)
    editor.set("Seed for both", value=next(SEEDS))
    return editor


def widgets(saved):
    """What a saved workflow keeps of each node's widgets."""
    return {node["id"]: node.get("widgets_values") for node in saved["nodes"]}


def sizes(saved):
    """Sizes of the nodes that show text and no picture."""
    kinds = ("FasterCache", "FasterCacheCompare")
    return {node["id"]: node["size"] for node in saved["nodes"] if node["type"] in kinds}


def test_every_node_can_be_added_and_those_that_tell_show_their_box(editor):
    types = editor.page.evaluate(PACK_NODES)
    assert len(types) >= 10
    editor.add(*types)
    telling = [type for type in types if type not in WITHOUT_BOX]
    assert editor.texts() == dict.fromkeys(telling, QUIET)
    boxes = editor.page.evaluate(VISIBLE)
    assert len(boxes) == len(telling) and all(width > 50 and height > 20 for width, height in boxes)


@pytest.mark.parametrize("title", TITLES)
def test_workflow_loads_without_missing_nodes(editor, title):
    editor.load(workflow(title))
    assert editor.page.evaluate(MISSING) == [] and editor.complaints() == []
    assert len(editor.saved()["nodes"]) == len(workflow(title)["nodes"])


@pytest.mark.parametrize("title", TITLES)
def test_the_api_twin_is_what_the_page_exports(editor, title):
    editor.load(workflow(title))
    _, prompt = editor.exported()
    assert prompt == workflow(title, "tests/workflows"), "run: python dev.py test tests/browser/make_workflows.py"


def test_a_run_is_told_on_the_nodes_and_leaves_the_workflow_alone(demo):
    before = demo.saved()
    demo.run()
    texts, after = demo.texts(), demo.saved()
    assert "of the network rows run" in texts["FasterCache"]
    assert "sigma" in texts["FasterCacheReport"] and "PSNR" in texts["FasterCacheCompare"]
    assert widgets(after) == widgets(before) and sizes(after) == sizes(before)


def test_a_node_in_a_subgraph_is_told_too(demo):
    demo.page.evaluate(INTO_SUBGRAPH, "FasterCache")
    demo.run()
    [text] = demo.page.evaluate(INSIDE)
    assert "of the network rows run" in text


@pytest.mark.parametrize("node", ["999", "1:2:3", "2:1", "", None])
def test_an_event_for_a_node_that_is_not_here_does_nothing(demo, node):
    demo.send("fastercache.report", {"node": node, "text": "nobody's"})
    demo.send("executed", {"node": node, "output": {"text": ["nobody's"]}})
    demo.send("executed", {"node": node, "output": {"text": "not a list"}})
    demo.send("executed", {"node": node, "output": None})
    assert set(demo.texts().values()) == {QUIET}


def test_text_is_shown_as_text(demo):
    node = next(node["id"] for node in demo.saved()["nodes"] if node["type"] == "FasterCache")
    demo.send("fastercache.report", {"node": node, "text": "<img src=x> & more"})
    assert demo.texts()["FasterCache"] == "<img src=x> & more"


SHOWN = """() => app.graph.nodes.find((node) => node.type === "FasterCacheKSampler").widgets
    .filter((widget) => !widget.hidden).map((widget) => widget.name)"""
CHOOSE = """(method) => {
    const node = app.graph.nodes.find((node) => node.type === "FasterCacheKSampler");
    const widget = node.widgets.find((widget) => widget.name === "method");
    widget.value = method;
    widget.callback(method);
}"""


def test_the_ksampler_shows_the_inputs_of_its_method(editor):
    editor.add("FasterCacheKSampler")
    assert {"preset", "closeness", "start_percent"} <= set(editor.page.evaluate(SHOWN))
    assert not {"interval", "published", "score_mixing"} & set(editor.page.evaluate(SHOWN))
    editor.page.evaluate(CHOOSE, "FRDiff")
    assert {"interval", "score_mixing"} <= set(editor.page.evaluate(SHOWN))
    assert not {"preset", "published", "learn"} & set(editor.page.evaluate(SHOWN))
    editor.load(editor.saved())
    assert "interval" in editor.page.evaluate(SHOWN) and "preset" not in editor.page.evaluate(SHOWN)


def test_the_page_is_given_help_translations_and_templates(editor):
    def fetch(path):
        return editor.page.request.get(f"{editor.url}/{path}")

    for name in editor.page.evaluate(PACK_NODES):
        assert fetch(f"extensions/ComfyUI-FasterCache/docs/{name}.md").ok
        assert fetch(f"extensions/ComfyUI-FasterCache/docs/{name}/zh.md").ok
        assert all(name in fetch("i18n").json()[language]["nodeDefs"] for language in ("en", "zh"))
    assert sorted(fetch("workflow_templates").json()["ComfyUI-FasterCache"]) == TITLES
