"""What nodes say of inputs that cannot be: one sentence that names node, input, value and what is allowed."""

import re
from types import SimpleNamespace

import pytest
import torch
from comfy_api.latest import io
from fastercache_pack.fastercache_core.actions import COMPUTE
from fastercache_pack.fastercache_core.calibration.policy import Point, Policy, Setup
from fastercache_pack.nodes import NODES, auto_fr
from fastercache_pack.nodes.kinds import CachePolicy

from support.tiny import SPECS, conditioning

NAN, INFINITE, LINK = float("nan"), float("inf"), ["1", 0]
POLICY = Policy(Setup("SD3", "euler", "simple", 1, 4.5), (1.0,), (Point(0.01, (COMPUTE,)),))
EMPTY = {"samples": torch.zeros(0, 4, 8, 8)}
# What programs post, and what links bring, in place of each kind of input.
BAD = {
    io.Combo.Input: ["nonsense", "", "Euler", 3, None, {}, [], NAN],
    io.Int.Input: [-1, 10**20, 2.5, NAN, INFINITE, "2", None, True, {}, torch.zeros(2)],
    io.Float.Input: [-0.1, 1e6, NAN, INFINITE, -INFINITE, "0.5", None, False, {}, []],
    io.Boolean.Input: [None, "yes", 2, NAN, {}],
    io.String.Input: [None, 3, {}, LINK],
    io.Model.Input: [None, "model", 3, {}, LINK, torch.zeros(1)],
    io.Conditioning.Input: [None, "a dog", 3, {}, torch.zeros(1, 77, 48), [torch.zeros(1)], ["positive", "negative"]],
    io.Latent.Input: [None, "latent", torch.zeros(1, 4, 8, 8), {}, {"samples": None}, EMPTY],
    CachePolicy.Input: ["policy", 3, {}, LINK],
    io.MultiType.Input: [None, "picture", {}, EMPTY, torch.zeros(0, 8, 8, 3), torch.zeros(8)],
}
INPUTS = [
    (node, entry, values)
    for node in NODES
    if "validate_inputs" not in vars(node)
    for entry in node.define_schema().inputs
    for kind, values in BAD.items()
    if isinstance(entry, kind)
]
NAMES = [f"{node.__name__} {entry.id}" for node, entry, _ in INPUTS]
FILES = ("FasterCachePolicyLoad", "FasterCachePolicySave", "FasterCacheReport")  # want a file, or a run before them


def execute(node, model, changed):
    """Run a node as the host does: all inputs by name, those that are not `changed` with what they take."""
    latent = {"samples": torch.zeros(1, *SPECS["sd3"]["lat"])}
    sockets = {io.Model.Input: model, io.Conditioning.Input: conditioning("sd3", 1)}
    sockets |= dict.fromkeys((io.Latent.Input, io.MultiType.Input), latent)
    sockets |= {} if node.__name__ == "FasterCacheFRDiff" else {CachePolicy.Input: POLICY}
    inputs = {}
    for entry in node.define_schema().inputs:
        default, choices = getattr(entry, "default", None), getattr(entry, "options", None)
        [*given] = (value for kind, value in sockets.items() if isinstance(entry, kind))
        inputs[entry.id] = given[0] if given else choices[0] if default is None and choices else default
    hosted = type(node.__name__, (node,), {"hidden": SimpleNamespace(unique_id=None)})
    return hosted.execute(**{**inputs, **changed})


@pytest.mark.parametrize("node, entry, values", INPUTS, ids=NAMES)
def test_what_cannot_be_is_refused_with_one_sentence(tiny_models, node, entry, values):
    model, choices = tiny_models("sd3"), getattr(entry, "options", None) or []
    for value in values:
        with pytest.raises(ValueError) as error:
            execute(node, model, {entry.id: value})
        sentence = str(error.value)
        assert re.fullmatch(rf"{node.define_schema().node_id}: {entry.id} is .+; it must be .+\.", sentence), sentence
        assert len(sentence) < 250 + sum(len(choice) + 2 for choice in choices)


def test_every_node_takes_what_it_has_by_default(tiny_models, monkeypatch):
    """So that the refusals above are those of the bad value."""
    monkeypatch.setattr(auto_fr, "keep", lambda policy: "a file")
    quick = {"steps": 4, "pictures": 1, "sampler_name": "euler", "scheduler": "simple"}
    for node in NODES:
        if node.__name__ not in FILES:
            wanted = {entry.id for entry in node.define_schema().inputs}
            given = {name: value for name, value in quick.items() if name in wanted}
            if node.__name__ == "FasterCacheKSampler":
                given["policy"] = None  # the test's own was found on another model
            execute(node, tiny_models("sd3"), given)
