"""Several nodes of the pack on one model, and the KSampler that keeps what came with it: run on a tiny model."""

from itertools import permutations
from types import SimpleNamespace

import pytest
import torch
from fastercache_pack.fastercache_core.actions import COMPUTE, Action, Step
from fastercache_pack.fastercache_core.calibration.policy import Point, Policy, Setup
from fastercache_pack.nodes.cfg_cache import FasterCacheCFG
from fastercache_pack.nodes.fastercache import FasterCache
from fastercache_pack.nodes.frdiff import FasterCacheFRDiff
from fastercache_pack.nodes.host.fingerprint import model_fingerprint
from fastercache_pack.nodes.host.wrappers import last_report
from fastercache_pack.nodes.ksampler import METHODS, FasterCacheKSampler

from support.runs import actions, evaluations, notes
from support.tiny import conditioning, sample

STEPS = 12
SETTINGS = {"steps": STEPS, "cfg": 4.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0, "seed": 3}
PREDICT, ESTIMATE = Step(Action.PREDICT), Step(Action.ESTIMATE, 0.5)


def defaults(node):
    """The default of every widget of a node."""
    inputs = node.define_schema().inputs
    values = {entry.id: getattr(entry, "default", None) for entry in inputs}
    return {name: value for name, value in values.items() if value is not None}


def execute(node, **inputs):
    """What a node gives, its other widgets as they come."""
    told = type(node.__name__, (node,), {"hidden": SimpleNamespace(unique_id=None)})
    return told.execute(**{**defaults(node), **inputs}).result


def on(model, node, **inputs):
    return execute(node, model=model, **inputs)[0]


FEATURES = (FasterCache, {"preset": "none", "feature_reuse": "constant", "reuse_depth": "attention"})
GUIDANCE = (FasterCacheCFG, {"interval": 5, "tolerance": 0.0, "forecast": "hold", "weights": "released"})
PREDICTED = (FasterCache, {"preset": "fast"})
FRDIFF = (FasterCacheFRDiff, {})


def chain(model, *nodes):
    for node, inputs in nodes:
        model = on(model, node, **inputs)
    return model


@pytest.mark.parametrize("nodes", [*permutations([FEATURES, GUIDANCE])], ids=["features first", "guidance first"])
def test_dynamic_feature_reuse_with_the_released_weights_is_fastercache_on_cogvideox(tiny_models, nodes):
    """What no single node gives: attention from the cache where the positive branch runs alone."""
    model = chain(tiny_models("sd3"), *nodes)
    sample(model, "sd3", steps=STEPS)
    cond, uncond = actions(model), actions(model, "uncond")
    assert uncond.count("estimated") >= 8 and "reused" in cond and "reused" not in uncond
    assert all(b == "estimated" for a, b in zip(cond, uncond, strict=True) if a == "reused")
    assert notes(model) == []


@pytest.mark.parametrize("nodes", [*permutations([PREDICTED, GUIDANCE, FEATURES]), *permutations([FRDIFF, GUIDANCE])])
def test_any_order_runs_and_each_gives_its_part(tiny_models, nodes):
    model = chain(tiny_models("sd3"), *nodes)
    assert torch.isfinite(sample(model, "sd3", steps=STEPS)).all()
    assert not any("both are on it" in note for note in notes(model))
    label = last_report(model)["run"]["settings"]
    assert label.count(" + ") == len(nodes) - 1


def test_the_same_parts_in_another_order_give_the_same_picture(tiny_models):
    pictures = [
        sample(chain(tiny_models("sd3"), *nodes), "sd3", steps=STEPS)
        for nodes in permutations([PREDICTED, GUIDANCE, FEATURES])
    ]
    assert all(torch.equal(picture, pictures[0]) for picture in pictures)


def test_a_second_node_for_the_same_part_is_named_with_the_first(tiny_models):
    model = chain(tiny_models("sd3"), GUIDANCE, (FasterCacheCFG, {"interval": 3}))
    sample(model, "sd3", steps=STEPS)
    [note] = [note for note in notes(model) if "both are on it" in note]
    assert "1 in 3" in note and "1 in 5" in note and note.index("1 in 3") < note.index("1 in 5")


def test_every_node_of_a_chain_has_the_report_of_the_run(tiny_models):
    first = chain(tiny_models("sd3"), FEATURES)
    second = chain(first, GUIDANCE)
    sample(second, "sd3", steps=STEPS)
    assert last_report(first) == last_report(second) is not None


# The KSampler


def policy_for(model):
    steps = [COMPUTE] * 3 + [PREDICT, COMPUTE, ESTIMATE, COMPUTE] * 2 + [COMPUTE]
    probe = on(model, FasterCacheCFG)
    sample(probe, "sd3", steps=STEPS)
    sigmas = last_report(probe)["run"]["sigmas"][:-1]
    setup = Setup(model_fingerprint(model), "euler", "simple", STEPS, 4.0, None, "16x16")
    return Policy(setup, tuple(sigmas), (Point(0.01, tuple(steps)),))


def ksampler(model, **inputs):
    latent = {"samples": torch.zeros(1, 16, 16, 16)}
    prompts = {"positive": conditioning("sd3", 1), "negative": conditioning("sd3", 2)}
    latent, report = execute(FasterCacheKSampler, model=model, latent_image=latent, **{**SETTINGS, **prompts, **inputs})
    return latent["samples"], report


def test_a_policy_that_comes_in_is_the_policy_alone_to_the_bit(tiny_models):
    """Through its own input, or on the model."""
    policy = policy_for(tiny_models("sd3"))
    alone = on(tiny_models("sd3"), FasterCacheFRDiff, policy=policy)
    expected = sample(alone, "sd3", steps=STEPS)
    assert evaluations(alone)["predicted"] == 2 and evaluations(alone)["estimated"] == 2
    for model, inputs in [
        (tiny_models("sd3"), {"policy": policy}),
        (tiny_models("sd3"), {"policy": policy, "method": "policy"}),
        (on(tiny_models("sd3"), FasterCacheFRDiff, policy=policy), {}),
        (on(tiny_models("sd3"), FasterCacheFRDiff, policy=policy), {"method": "FRDiff"}),
    ]:
        assert torch.equal(ksampler(model, **inputs)[0], expected)


@pytest.mark.parametrize("node", [GUIDANCE, FRDIFF, PREDICTED], ids=["CFG-Cache", "FRDiff", "FasterCache"])
def test_what_came_with_the_model_is_kept(tiny_models, node):
    model = chain(tiny_models("sd3"), node)
    expected = sample(model, "sd3", steps=STEPS)
    method = {FasterCacheCFG: "CFG-Cache as measured", FasterCacheFRDiff: "FRDiff"}.get(node[0], "automatic")
    latent, report = ksampler(chain(tiny_models("sd3"), node), method=method)
    assert torch.equal(latent, expected)
    assert "FasterCache KSampler" in report and "both are on it" in report


@pytest.mark.parametrize("method", [name for name in METHODS if name != "policy"])
def test_every_method_runs_and_reports(tiny_models, method):
    latent, report = ksampler(tiny_models("sd3"), method=method)
    assert torch.isfinite(latent).all()
    assert {"FRDiff": "FRDiff 1 in 2, paper", "automatic": "balanced"}.get(method, "CFG-Cache") in report
    if method in ("FRDiff", "CFG-Cache as published"):  # errors of random weights may leave the others nothing
        assert "100% of the network rows" not in report


def test_a_method_without_what_it_needs_says_so(tiny_models):
    with pytest.raises(ValueError, match=r"^FasterCacheKSampler: .*'policy'.*not connected"):
        ksampler(tiny_models("sd3"), method="policy")
    with pytest.raises(ValueError, match=r"^FasterCacheKSampler: a policy is connected, but the method is 'FRDiff'"):
        ksampler(tiny_models("sd3"), method="FRDiff", policy=policy_for(tiny_models("sd3")))


# FRDiff and the papers' knobs


def test_frdiff_by_default_holds_mixes_and_reuses(tiny_models):
    model = on(tiny_models("sd15"), FasterCacheFRDiff)
    sample(model, "sd15", steps=50, latent=torch.zeros(1, 4, 8, 8))
    assert evaluations(model) == {"computed": 26, "predicted": 11, "mixed": 3, "reused": 10}


def test_frdiff_skips_the_last_step_where_that_is_asked_for(tiny_models):
    model = on(tiny_models("sd15"), FasterCacheFRDiff, skip_last=True)
    sample(model, "sd15", steps=12, latent=torch.zeros(1, 4, 8, 8))
    assert actions(model)[-1] == "reused"


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "uni_pc", "heun"])
def test_frdiff_reuses_features_with_solvers_of_second_order(tiny_models, sampler):
    model = on(tiny_models("sd15"), FasterCacheFRDiff)
    sample(model, "sd15", steps=12, sampler=sampler, latent=torch.zeros(1, 4, 8, 8))
    assert evaluations(model)["reused"] >= 5 and "predicted" not in evaluations(model)


@pytest.mark.parametrize("interval, reused", [(2, 5), (3, 7), (5, 8)])
def test_the_interval_of_reuse_is_what_is_typed(tiny_models, interval, reused):
    inputs = {**FEATURES[1], "reuse_interval": interval, "feature_reuse": "hold", "reuse_end_percent": 1.0}
    model = on(tiny_models("sd3"), FasterCache, **inputs)
    sample(model, "sd3", steps=STEPS)
    assert evaluations(model)["reused"] == reused


def test_only_so_many_blocks_reuse_attention(tiny_models):
    model = on(tiny_models("sd3"), FasterCache, **{**FEATURES[1], "reuse_blocks": 2})
    sample(model, "sd3", steps=STEPS)
    assert last_report(model)["run"]["features"]["blocks"] == {"self": {"joint_blocks": "0-1 of 3"}}


def test_features_are_reused_from_the_part_that_is_typed_on(tiny_models):
    model = on(tiny_models("sd3"), FasterCache, **{**FEATURES[1], "reuse_start_percent": 0.5})
    sample(model, "sd3", steps=STEPS)
    assert set(actions(model)[:6]) == {"computed"} and "reused" in actions(model)


@pytest.mark.parametrize("family, row", [("mochi", "Mochi"), ("sd3", "paper")])
def test_the_preset_paper_takes_the_row_of_the_models_family_and_says_so(tiny_models, family, row):
    model = on(tiny_models(family), FasterCache, preset="paper")
    latent = torch.zeros(1, 12, 1, 4, 4) if family == "mochi" else None
    sample(model, family, steps=6, latent=latent)
    assert any(note.startswith(f"published settings: {row} (") for note in notes(model))
