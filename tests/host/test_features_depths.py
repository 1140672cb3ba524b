"""The depth that is chosen automatically: what saves most of what a model has and memory holds."""

from itertools import pairwise

import pytest
import torch
from comfy_extras import nodes_freelunch
from fastercache_pack.nodes.host import families
from fastercache_pack.nodes.host.wrappers import attach, last_report

from support.features import Watch, chosen_by_node, out_of_memory
from support.tiny import SPECS, sample

STEPS = 12
# Families whose blocks cannot be taken as a whole, and the one that has no place to begin.
CHOSEN = {"sd15": "inside of a UNet", "sdxl": "inside of a UNet", "svd": "inside of a UNet"}


def run(model, name, settings):
    """(features of the report but their budget, its notes, evaluations by action) of a run."""
    model = attach(model, settings)
    sample(model, name, steps=STEPS)
    report = last_report(model)
    del report["run"]["features"]["budget"]  # half of what this machine has free, at each run
    return report["run"]["features"], "; ".join(report["notes"]), report["totals"]["evaluations"]


@pytest.mark.parametrize("name", list(SPECS))
def test_every_family_gets_the_depth_that_saves_most_and_reuses_it(tiny_models, name):
    """As the user would have got it by name; and the report says which, and why."""
    wanted = CHOSEN.get(name, "all blocks")
    chosen, notes, counted = run(tiny_models(name), name, chosen_by_node())
    named, _, expected = run(tiny_models(name), name, chosen_by_node(depth=wanted))
    assert chosen.pop("depth") == wanted and chosen == named and counted == expected
    assert counted["reused"] >= 4
    assert f"automatic depth: {wanted} saves most of what" in notes and "instead" not in notes


@pytest.mark.parametrize(
    "name, depth, kinds", [("wan", "all blocks", ["stack"]), ("cosmos", "all attention", ["self", "cross"])]
)
def test_a_model_of_no_family_gets_its_blocks_or_attention(tiny_models, monkeypatch, name, depth, kinds):
    monkeypatch.setattr(families, "FAMILIES", ())
    chosen, notes, counted = run(tiny_models(name), name, chosen_by_node())
    assert chosen["depth"] == depth and chosen["kinds"] == kinds and counted["reused"] >= 4
    assert "feature reuse does not know" in notes


def test_what_does_not_fit_is_passed_over_for_what_does(tiny_models, monkeypatch):
    """On a UNet with one attention over few tokens, that takes less room than what lies below its first level."""
    monkeypatch.setitem(
        SPECS,
        "one attention",
        {
            **SPECS["sdxl"],
            "cfg": {**SPECS["sdxl"]["cfg"], "transformer_depth_output": [0, 0, 0, 0], "transformer_depth_middle": -1},
        },
    )

    def run_one(settings):
        return run(tiny_models("one attention"), "one attention", settings)

    every = {
        depth: run_one(chosen_by_node(depth=depth))[0]["bytes"]
        for depth in ("inside of a UNet", "all attention", "attention")
    }
    assert every["attention"] < every["all attention"] < every["inside of a UNet"]
    larger = ["inside of a UNet"]
    for depth in ("all attention", "attention"):
        chosen, notes, counted = run_one(chosen_by_node(every[depth] / 1e9))
        assert (chosen["depth"], chosen["bytes"]) == (depth, every[depth])
        assert all(f"{other}: not enough memory" in notes for other in larger)
        assert counted == run_one(chosen_by_node(every[depth] / 1e9, depth=depth))[2], (
            "no evaluation is lost with trying"
        )
        larger.append(depth)


def test_where_nothing_fits_as_a_whole_the_shallowest_takes_what_room_there_is(tiny_models):
    deep = run(tiny_models("sdxl"), "sdxl", chosen_by_node(depth="inside of a UNet"))[0]
    chosen, _, counted = run(tiny_models("sdxl"), "sdxl", chosen_by_node((deep["bytes"] - 1) / 1e9))
    assert chosen["depth"] == "attention" and 0 < chosen["sites"] < chosen["of"] and counted["reused"]
    _, notes, counted = run(tiny_models("sdxl"), "sdxl", chosen_by_node(1e-9))
    assert set(counted) == {"computed"} and "no self feature fits" in notes


def ran(watch, part):
    """For each pass, whether a layer ran whose name has `part` in it."""
    return [any(part in layer for layer in calls) for _, calls in watch.passes]


def test_pyramid_attention_computes_each_kind_of_attention_as_often_as_pab_does(tiny_models):
    """Space at every second evaluation, time at every fourth, the prompt at every sixth, in the middle of sampling."""
    model = attach(tiny_models("svd"), chosen_by_node(depth="pyramid attention"))
    sampling = model.get_model_object("model_sampling")
    percents = [0.0, 0.05, 0.1, *(0.16 + 0.04 * i for i in range(16)), 0.9, 0.95]
    sigmas = torch.tensor([*map(sampling.percent_to_sigma, percents), 0.0]).clamp_max(sampling.sigma_max)
    with Watch(model) as watch:
        sample(model, "svd", sigmas=sigmas)
    middle = slice(3, 3 + 16)
    for part, every in ((".transformer_blocks.0.attn1", 2), (".time_stack.0.attn1", 4), (".attn2", 6)):
        computed = ran(watch, part)
        assert all(computed[:3]) and all(computed[-2:]), "the first and last 15%"
        at = [i for i, yes in enumerate(computed) if yes and i >= 2][:-2]
        assert {later - earlier for earlier, later in pairwise(at)} == {every}, computed[middle]


@pytest.mark.parametrize("depth", ["attention", "all attention"])
def test_attention_over_time_is_reused_with_that_over_space(tiny_models, depth):
    features, _, _ = run(tiny_models("svd"), "svd", chosen_by_node(depth=depth))
    kinds = ["self", "temporal", "cross"][: 2 if depth == "attention" else 3]
    assert features["kinds"] == kinds and set(features["blocks"]) == set(kinds)
    features, notes, _ = run(tiny_models("wan"), "wan", chosen_by_node(depth=depth))
    assert "temporal" not in features["kinds"] and "temporal" not in notes, "there it is part of self"


def test_a_unet_of_one_level_gets_attention(tiny_models, monkeypatch):
    """It has nothing below its first downsampling."""
    monkeypatch.setitem(
        SPECS,
        "one level",
        {
            **SPECS["sd15"],
            "cfg": {
                **SPECS["sd15"]["cfg"],
                "channel_mult": [1],
                "num_res_blocks": [1],
                "transformer_depth": [1],
                "transformer_depth_output": [1, 1],
            },
        },
    )
    chosen, notes, counted = run(tiny_models("one level"), "one level", chosen_by_node())
    assert chosen["depth"] == "all attention" and "inside of a UNet: not in this model" in notes
    assert counted["reused"] >= 3


def test_what_another_node_works_on_is_passed_over(tiny_models):
    """FreeU changes the inside of a UNet, that a deep feature would leave out."""
    model = nodes_freelunch.FreeU_V2().patch(tiny_models("sd15"), 1.3, 1.4, 0.9, 0.2)[0]
    chosen, notes, counted = run(model, "sd15", chosen_by_node())
    assert chosen["depth"] == "all attention" and counted["reused"] >= 4
    assert "inside of a UNet: patched by another node" in notes


def test_after_memory_ran_out_no_other_depth_is_tried(tiny_models):
    model = tiny_models("flux")
    with out_of_memory(model.model.diffusion_model.final_layer, 2):
        _, notes, counted = run(model, "flux", chosen_by_node())
    assert set(counted) == {"computed"} and "memory ran out" in notes


def test_the_log_says_which_depth_was_chosen_and_why(tiny_models, caplog):
    with caplog.at_level("INFO"):
        run(tiny_models("sd3"), "sd3", chosen_by_node())
    [line] = [record.message for record in caplog.records if "sites" in record.message]
    assert "1 of 1 sites (stack: joint_blocks 1-2 of 3)" in line
    assert "automatic depth: all blocks saves most of what SD3 has" in line
