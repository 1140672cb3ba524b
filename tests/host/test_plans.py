"""Runs whose evaluations were laid down beforehand: FRDiff's mixing, and policies."""
from dataclasses import replace

import comfy.model_sampling
import comfy.samplers
import pytest
import torch
from fastercache_pack.fastercache_core.guidance import GuidanceSettings
from fastercache_pack.fastercache_core.jump import JumpSettings
from fastercache_pack.fastercache_core.mixing import MixSettings
from fastercache_pack.fastercache_core.policy import FULL, Point, Policy, Setup, Step
from fastercache_pack.fastercache_core.reuse import ReuseSettings
from fastercache_pack.fastercache_core.schedule import Interval
from fastercache_pack.fastercache_core.settings import CacheSettings
from fastercache_pack.nodes.host.attach import attach, last_report
from fastercache_pack.nodes.host.output_space import SlopeSpace
from fastercache_pack.nodes.host.plans import make_plan
from tiny import sample

ALWAYS = Interval(10 ** 6)
FAMILIES = {"sd15": "branch", "sd3": "self", "flux": "stack"}


def frdiff(kind, **mixing):
    """FRDiff as its node sets it up."""
    return CacheSettings("FRDiff", GuidanceSettings(ALWAYS, "hold"), ReuseSettings({kind: ALWAYS}, "hold"),
                         JumpSettings(ALWAYS, "hold"), plan=MixSettings(**mixing))


def planned(plan, kind="self"):
    return CacheSettings("policy", GuidanceSettings(ALWAYS), ReuseSettings({kind: ALWAYS}, "hold"),
                         JumpSettings(ALWAYS), plan=plan)


def policy(steps, sigmas):
    return Policy(Setup("tiny", "euler", "simple", len(sigmas), 4.0), tuple(sigmas), (Point(0.0, tuple(steps)),))


def evaluations(model):
    return last_report(model)["totals"]["evaluations"]


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux"])
def test_held_scores_are_exactly_the_same_sampler_on_the_key_steps_alone(tiny_models, name):
    """First-order deterministic steps telescope: lambda = 0 is nothing but fewer steps."""
    model = attach(tiny_models(name), frdiff(FAMILIES[name], mixing="scores"))
    jumped = sample(model, name, steps=9)
    assert evaluations(model) == {"FULL": 5, "JUMP": 4}
    sigmas = torch.tensor([*last_report(model)["run"]["sigmas"]])
    coarse = sample(tiny_models(name), name, sigmas=torch.cat([sigmas[:-1:2], sigmas[-1:]]))
    assert relative(jumped, coarse) < 1e-4


@pytest.mark.parametrize("name", list(FAMILIES))
def test_between_key_steps_the_network_runs_with_reused_features(tiny_models, name):
    model = attach(tiny_models(name), frdiff(FAMILIES[name], mixing="features"))
    reused, full = sample(model, name, steps=9), sample(tiny_models(name), name, steps=9)
    assert evaluations(model) == {"FULL": 5, "REUSE": 4}
    assert 0 < relative(reused, full) < 0.5 * relative(sample(tiny_models(name), name, steps=9, seed=4), full)


def test_the_papers_schedule_begins_with_held_scores_mixes_and_ends_with_features(tiny_models):
    model = attach(tiny_models("sd15"), frdiff("branch"))
    sample(model, "sd15", steps=50, scheduler="ddim_uniform")
    actions = [r["actions"]["cond"] for r in last_report(model)["evaluations"]]
    assert actions[::2] == ["FULL"] * 25
    between = [a for a in actions[1::2] if a != "FULL"]
    assert between == sorted(between, key=["JUMP", "MIX", "REUSE"].index), "in this order, never back"
    assert between.count("JUMP") == 11 and between.count("MIX") == 3, "as the released code does it"


def test_a_mix_lies_between_what_it_mixes(tiny_models):
    full = sample(tiny_models("sd15"), "sd15", steps=9)
    middle = sample(attach(tiny_models("sd15"), frdiff("branch", tau=0.0)), "sd15", steps=9)  # lambda = 1/2
    ends = [sample(attach(tiny_models("sd15"), frdiff("branch", mixing=mixing)), "sd15", steps=9)
            for mixing in ("scores", "features")]
    assert relative(middle, full) < max(relative(end, full) for end in ends)
    assert all(relative(middle, end) > 0 for end in ends)


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_ancestral", "heun", "dpmpp_sde"])
def test_samplers_that_cannot_hold_scores_reuse_features_instead(tiny_models, sampler):
    model = attach(tiny_models("sd15"), frdiff("branch", mixing="scores"))
    assert torch.isfinite(sample(model, "sd15", steps=8, sampler=sampler)).all()
    assert evaluations(model).get("REUSE", 0) >= 3 and "JUMP" not in evaluations(model)


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "uni_pc", "res_multistep"])
def test_automatic_leaves_samplers_alone_with_which_fewer_steps_are_better(tiny_models, sampler):
    model = attach(tiny_models("sd15"), frdiff("branch", mixing="automatic"))
    full = sample(tiny_models("sd15"), "sd15", steps=6, sampler=sampler)
    assert torch.equal(sample(model, "sd15", steps=6, sampler=sampler), full)
    assert any("fewer steps can be better" in note for note in last_report(model)["notes"])


@pytest.mark.parametrize("sampler, cfg, says", [
    ("euler_cfg_pp", 3.0, "a cfg of about 1, this run has 3"), ("euler_cfg_pp", 1.0, None),
    ("euler_ancestral_cfg_pp", 3.0, "a cfg of about 1"), ("dpmpp_2m_cfg_pp", 1.0, "outputs of the negative pass"),
    ("dpmpp_2s_ancestral_cfg_pp", 1.0, "outputs of the negative pass"),
])
def test_samplers_of_cfg_pp_are_left_alone_where_skipping_harms_them(tiny_models, sampler, cfg, says):
    model = attach(tiny_models("sd15"), frdiff("branch"))
    full = sample(tiny_models("sd15"), "sd15", steps=6, sampler=sampler, cfg=cfg)
    assert torch.equal(sample(model, "sd15", steps=6, sampler=sampler, cfg=cfg), full) == bool(says)
    assert not says or any(says in note for note in last_report(model)["notes"])


def test_samplers_with_two_calls_a_step_have_their_key_at_the_second(tiny_models):
    model = attach(tiny_models("sd15"), frdiff("branch"))
    sample(model, "sd15", steps=6, sampler="heun")
    actions = [r["actions"]["cond"] for r in last_report(model)["evaluations"]]
    assert all(action == "FULL" for action in actions[1::2]) and "REUSE" in actions[2::2]


@pytest.mark.parametrize("sampler", ["dpm_adaptive", "dpm_fast"])
def test_samplers_that_cannot_be_foreseen_run_in_full(tiny_models, sampler):
    model = attach(tiny_models("sd15"), frdiff("branch"))
    full = sample(tiny_models("sd15"), "sd15", steps=4, sampler=sampler)
    assert torch.equal(sample(model, "sd15", steps=4, sampler=sampler), full)
    assert "cannot be foreseen" in last_report(model)["notes"][0]


def test_a_policy_is_followed_evaluation_by_evaluation(tiny_models):
    model = attach(tiny_models("sd3"), CacheSettings("any"))
    sample(model, "sd3", steps=10)
    sigmas = last_report(model)["run"]["sigmas"][:-1]
    steps = [FULL, FULL, FULL, Step("JUMP"), Step("ESTIMATE", 0.5), FULL, Step("REUSE", 1.0),
             Step("JUMP", cond=(1.5, -0.5), difference=(1.0,)), Step("MIX", 1.0, 0.5), FULL]
    model = attach(tiny_models("sd3"), planned(policy(steps, sigmas)))
    assert torch.isfinite(sample(model, "sd3", steps=10)).all()
    done = [r["actions"] for r in last_report(model)["evaluations"]]
    assert [r["uncond"] for r in done] == [step.action for step in steps]
    assert done[4]["cond"] == "FULL"


def test_a_policy_of_nothing_but_full_is_bit_identical(tiny_models):
    sigmas = [1.0 - 0.1 * i for i in range(10)]
    model = attach(tiny_models("sd3"), planned(policy([FULL] * 10, sigmas)))
    assert torch.equal(sample(model, "sd3", steps=10), sample(tiny_models("sd3"), "sd3", steps=10))


def plan_of(model, found, steps=10, cfg=4.0, sampler="euler", sigmas=None, shape=(1, 16, 16, 16)):
    """The plan of a policy in a run with these settings."""
    guider = comfy.samplers.CFGGuider(model)
    guider.set_cfg(cfg)
    grid = [*(sigmas or [1.0 - i / steps for i in range(steps)]), 0.0]
    return make_plan(planned(found), guider, comfy.samplers.sampler_object(sampler), grid, shape)


def weighted():
    steps = [FULL, FULL, FULL, *[Step("JUMP", cond=(1.5, -0.5), difference=(1.0,)), FULL] * 3, FULL]
    return policy(steps, [1.0 - 0.1 * i for i in range(10)])


def test_a_run_like_the_one_it_was_found_for_is_told_nothing(tiny_models):
    plan = plan_of(tiny_models("sd3"), weighted())
    assert plan.notes == [] and plan.expected[3][1].cond == (1.5, -0.5)


@pytest.mark.parametrize("cfg, kept", [(1.5, False), (3.0, True), (4.2, True), (6.0, False)])
def test_at_another_cfg_the_actions_stay_and_the_weights_where_it_is_near_or_lower(tiny_models, cfg, kept):
    plan = plan_of(tiny_models("sd3"), weighted(), cfg=cfg)
    assert [step.action for _, step in plan.expected] == [step.action for step in weighted().steps]
    assert any(step.cond or step.difference for _, step in plan.expected) == kept
    [note] = plan.notes
    assert f"found at cfg 4, this run has {cfg:g}" in note and ("left out" in note) != kept


@pytest.mark.parametrize("changes, says", [
    ({"sampler": "heun"}, "with sampler euler, this run has sample_heun"),
    ({"steps": 20}, "found for 10 steps, this run has 20"), ({"steps": 7}, "plain fewer steps may be as good"),
    ({"sigmas": [0.9 ** i for i in range(10)]}, "other noise levels"),
])
def test_what_else_differs_is_told(tiny_models, changes, says):
    assert any(says in note for note in plan_of(tiny_models("sd3"), weighted(), **changes).notes)


@pytest.mark.parametrize("found, steps, doubted", [(30, 26, False), (30, 22, True), (20, 16, True), (10, 20, False)])
def test_a_policy_moved_to_few_steps_says_that_fewer_steps_may_be_as_good(tiny_models, found, steps, doubted):
    told = replace(weighted(), setup=replace(weighted().setup, steps=found))
    [note] = plan_of(tiny_models("sd3"), told, steps=steps).notes
    assert f"found for {found} steps, this run has {steps}" in note and ("may be as good" in note) == doubted


@pytest.mark.parametrize("found, shape, told", [
    ("128x128", (1, 16, 64, 64), True), ("128x128", (2, 16, 128, 176), True), ("21x60x104", (1, 16, 5, 60, 104), True),
    ("128x128", (2, 16, 104, 152), False), ("128x128", (1, 4, 128, 128), False), ("", (1, 16, 64, 64), False),
    ("21x60x104", (1, 16, 17, 60, 104), False), ("9" * 400 + "x", (1, 16, 64, 64), False)])
def test_another_size_is_told_and_another_proportion_is_not(tiny_models, found, shape, told):
    old = replace(weighted(), setup=replace(weighted().setup, resolution=found))
    plan = plan_of(tiny_models("sd3"), old, shape=shape)
    assert bool(plan.notes) == told and plan.expected[3][1].cond == (1.5, -0.5), "weights stay"
    assert not told or f"found at latent size {found}, this run has {'x'.join(map(str, shape[2:]))}" in plan.notes[0]


def test_the_report_of_a_run_tells_the_other_size(tiny_models):
    found = replace(weighted(), setup=replace(weighted().setup, resolution="32x32"))
    model = attach(tiny_models("sd3"), planned(found))
    sample(model, "sd3", steps=10)
    assert any("latent size 32x32, this run has 16x16" in note for note in last_report(model)["notes"])


def test_ddim_is_euler_under_another_name(tiny_models):
    assert plan_of(tiny_models("sd3"), weighted(), sampler="ddim").notes == []


def test_a_policy_with_the_name_of_no_sampler_is_just_another_sampler(tiny_models):
    hostile = replace(weighted(), setup=replace(weighted().setup, sampler="__class__"))
    assert "with sampler __class__" in plan_of(tiny_models("sd3"), hostile).notes[0]


def test_a_policy_for_other_steps_is_fitted_to_these(tiny_models):
    steps = [FULL, FULL, FULL] + [Step("JUMP"), FULL] * 4
    model = attach(tiny_models("sd3"), planned(policy(steps, [1.0 - 0.09 * i for i in range(11)])))
    sample(model, "sd3", steps=22)
    assert 6 <= evaluations(model)["JUMP"] <= 10


@pytest.mark.parametrize("prediction", ["EPS", "V_PREDICTION", "EDM", "CONST"])
def test_the_slope_is_the_samplers_own(prediction):
    kind = getattr(comfy.model_sampling, prediction)
    sampling = type("Sampling", (comfy.model_sampling.ModelSamplingContinuousEDM, kind), {})()
    x, output = torch.randn(2, 2, 4, 8, 8, dtype=torch.float64)
    sigma = torch.tensor([0.7, 0.7], dtype=torch.float64)
    denoised = sampling.calculate_denoised(sigma, output, x)
    space = SlopeSpace(sampling, sigma, x)
    assert torch.allclose(space.output(denoised), (x - denoised) / 0.7)
    assert torch.allclose(space.denoised(space.output(denoised)), denoised)
