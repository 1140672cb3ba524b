"""The shipped workflows on a real, headless server, as a program posts them."""

import copy
import io
import json

import pytest
from PIL import Image

from testbed.server import ROOT, HostError

WORKFLOWS = {path.stem: json.loads(path.read_text()) for path in sorted((ROOT / "tests" / "workflows").glob("*.json"))}
DEMO = WORKFLOWS["FasterCache demo"]


def on_testbed(workflow):
    """The same graph with the test bed's model, prompts and decoder where a user's checkpoint would be."""
    graph = copy.deepcopy(workflow)
    for node in graph.values():
        inputs, kind = node["inputs"], node["class_type"]
        if kind == "CheckpointLoaderSimple":
            node.update(class_type="UNETLoader", inputs=find(DEMO, "UNETLoader")["inputs"])
        elif kind == "CLIPTextEncode":
            node.update(class_type="EmojiPrompt", inputs={"prompts": inputs["text"]})
        elif kind == "VAEDecode":
            node.update(class_type="EmojiDecode", inputs={"samples": inputs["samples"], "scale": 1})
        elif kind == "EmptyMochiLatentVideo":
            node.update(class_type="EmptySD3LatentImage", inputs={"width": 128, "height": 128, "batch_size": 1})
        elif "width" in inputs:
            inputs.update(width=128, height=128)
    return graph


def find(graph, kind, title=None):
    """The one node of a class, or of a class and title."""
    [node] = [node for node in graph.values() if node["class_type"] == kind and title in (None, node["_meta"]["title"])]
    return node


def demo(**inputs):
    """The demo graph with other inputs for its FasterCache node."""
    graph = copy.deepcopy(DEMO)
    find(graph, "FasterCache")["inputs"].update(inputs)
    return graph


def with_seed(seed):
    """The demo graph with another seed."""
    graph = copy.deepcopy(DEMO)
    find(graph, "PrimitiveInt")["inputs"]["value"] = seed
    return graph


def pictures(host, outputs):
    return [
        Image.open(io.BytesIO(host.image(ref))).convert("RGB")
        for _, output in sorted(outputs.items())
        for ref in output.get("images", [])
    ]


def totals(outputs):
    [report] = [output["fastercache_report"][0] for output in outputs.values() if "fastercache_report" in output]
    return json.loads(report)["totals"]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_shipped_workflow_runs_and_saves_work(host, name):
    steps = []
    outputs = host.run(on_testbed(WORKFLOWS[name]), lambda value, maximum: steps.append((value, maximum)))
    shown = pictures(host, outputs)
    assert shown and all(len(picture.getcolors(1 << 24)) > 10 for picture in shown), "a blank picture"
    assert steps[-1][0] == steps[-1][1]
    kinds = {node["class_type"] for node in WORKFLOWS[name].values()}
    if "FasterCacheReport" in kinds:
        done = totals(outputs)
        assert done["rows"] < done["rows_full"] or any("reused" in action for action in done["evaluations"])
    if "FasterCacheKSampler" in kinds:
        [text] = [output["text"][0] for output in outputs.values() if "text" in output]
        assert "of the network rows run" in text and "100% of" not in text


def test_another_seed_samples_again_and_counts_afresh(host):
    first, second, again = (host.run(with_seed(seed)) for seed in (20, 21, 20))
    for outputs in (first, second, again):
        assert sum(totals(outputs)["evaluations"].values()) == find(DEMO, "KSampler", "In full")["inputs"]["steps"]
    assert pictures(host, first)[0].tobytes() != pictures(host, second)[0].tobytes()
    assert pictures(host, first)[0].tobytes() == pictures(host, again)[0].tobytes()


@pytest.mark.parametrize(
    "inputs, words",
    [
        ({"preset": "nonsense"}, ["FasterCache", "preset", "nonsense"]),
        ({"start_percent": 2.0}, ["FasterCache", "start_percent", "1.0"]),
        ({"start_percent": 0.9, "end_percent": 0.5}, ["FasterCache", "start_percent", "end_percent"]),
        ({"model": ["5", 0]}, ["FasterCache", "model", "LATENT"]),
    ],
)
def test_a_wrong_input_is_named(host, inputs, words):
    with pytest.raises(HostError) as error:
        host.run(demo(**inputs))
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_node_that_does_not_exist_is_named(host):
    graph = demo()
    find(graph, "FasterCache").update(class_type="NoSuchNode", _meta={"title": "NoSuchNode"})
    with pytest.raises(HostError, match="NoSuchNode"):
        host.run(graph)
