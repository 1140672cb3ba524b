"""The shipped workflows on a real, headless server, as a program posts them."""
import copy
import io
import json
from pathlib import Path

import pytest
from PIL import Image
from testbed.server import HostError

WORKFLOWS = sorted((Path(__file__).parent / "workflows").glob("*.json"))
DEMO = json.loads((Path(__file__).parent / "workflows" / "demo.json").read_text())
STEPS = 12


def demo(**changes):
    """The demo graph with few steps; `changes` maps a node to the inputs to change."""
    graph = copy.deepcopy(DEMO)
    for name in ("sample", "sample full"):
        graph[name]["inputs"]["steps"] = STEPS
    for name, inputs in changes.items():
        graph[name]["inputs"].update(inputs)
    return graph


def pictures(host, output):
    return [Image.open(io.BytesIO(host.image(ref))).convert("RGB") for ref in output["images"]]


def report(outputs):
    return json.loads(outputs["report"]["fastercache_report"][0])


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_shipped_workflow_runs(host, path):
    steps = []
    outputs = host.run(json.loads(path.read_text()), lambda value, maximum: steps.append((value, maximum)))
    shown = [picture for output in outputs.values() if "images" in output for picture in pictures(host, output)]
    assert shown and all(len(set(picture.get_flattened_data())) > 10 for picture in shown), "a blank picture"
    assert steps[-1][0] == steps[-1][1]


def test_the_report_and_the_picture_agree_with_full_sampling(host):
    outputs = host.run(demo())
    totals = report(outputs)["totals"]
    assert totals["rows_full"] == 2 * 2 * STEPS
    assert totals["rows"] < totals["rows_full"]
    assert "PSNR" in outputs["compare"]["text"][0]


def test_the_same_graph_with_another_seed_samples_again_and_counts_afresh(host):
    first = host.run(demo())
    second = host.run(demo(sample={"seed": 21}))
    assert report(first)["totals"]["evaluations"] == report(second)["totals"]["evaluations"]
    assert pictures(host, first["ours"])[0].tobytes() != pictures(host, second["ours"])[0].tobytes()
    again = host.run(demo())
    assert pictures(host, first["ours"])[0].tobytes() == pictures(host, again["ours"])[0].tobytes()


@pytest.mark.parametrize("inputs, words", [
    ({"preset": "nonsense"}, ["FasterCache", "preset", "nonsense"]),
    ({"start_percent": 2.0}, ["FasterCache (node cache)", "start_percent", "1.0"]),
    ({"start_percent": 0.9, "end_percent": 0.5}, ["FasterCache", "start_percent", "end_percent"]),
    ({"model": ["empty", 0]}, ["FasterCache (node cache)", "model", "LATENT"]),
])
def test_a_wrong_input_is_named(host, inputs, words):
    with pytest.raises(HostError) as error:
        host.run(demo(cache=inputs))
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_node_that_does_not_exist_is_named(host):
    graph = demo()
    graph["cache"]["class_type"] = "NoSuchNode"
    with pytest.raises(HostError, match="NoSuchNode"):
        host.run(graph)
