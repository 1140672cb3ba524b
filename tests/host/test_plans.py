"""Runs whose evaluations were laid down beforehand: FRDiff's mixing, and policies."""

from dataclasses import replace

import comfy.model_sampling
import comfy.samplers
import pytest
import torch
from fastercache_pack.fastercache_core import messages
from fastercache_pack.fastercache_core.actions import COMPUTE, Action, Step
from fastercache_pack.fastercache_core.calibration.policy import MAX_EVALUATIONS, Point, Policy, Setup
from fastercache_pack.fastercache_core.clock import Interval
from fastercache_pack.fastercache_core.controllers.planned import MixSettings, PolicySettings
from fastercache_pack.fastercache_core.features.reuse import ReuseSettings
from fastercache_pack.fastercache_core.forecast import BANDS
from fastercache_pack.fastercache_core.settings import CacheSettings
from fastercache_pack.fastercache_core.signal import DifferenceSettings, OutputSettings
from fastercache_pack.nodes.host.compatibility import RunSetup
from fastercache_pack.nodes.host.policy_checks import planned
from fastercache_pack.nodes.host.prediction import SlopeSpace
from fastercache_pack.nodes.host.wrappers import attach, last_report

from support.runs import actions, evaluations, notes, relative
from support.tiny import sample

ALWAYS = Interval(10**6)
FAMILIES = {"sd15": "branch", "sd3": "self", "flux": "stack"}
PREDICT, ESTIMATE = Step(Action.PREDICT), Step(Action.ESTIMATE, 0.5)
WEIGHED = Step(Action.PREDICT, cond=(1.5,) * BANDS + (-0.5,) * BANDS, difference=(1.0,) * BANDS)


def frdiff(kind, **mixing):
    """FRDiff as its node sets it up, with features that the family has."""
    reuse = ReuseSettings({kind: ALWAYS}, "hold")
    return CacheSettings("FRDiff", MixSettings(**mixing), DifferenceSettings("hold"), OutputSettings("hold"), reuse)


def following(policy, kind="self"):
    reuse = ReuseSettings({kind: ALWAYS}, "hold")
    return CacheSettings("policy", PolicySettings(policy), DifferenceSettings(), OutputSettings(), reuse)


def policy(steps, sigmas):
    return Policy(Setup("tiny", "euler", "simple", len(sigmas), 4.0), tuple(sigmas), (Point(0.0, tuple(steps)),))


@pytest.mark.parametrize("name", list(FAMILIES))
def test_held_scores_are_exactly_the_same_sampler_on_the_keyframes_alone(tiny_models, name):
    """First-order deterministic steps telescope: lambda = 0 is nothing but fewer steps."""
    model = attach(tiny_models(name), frdiff(FAMILIES[name], mixing="scores"))
    held = sample(model, name, steps=9)
    assert evaluations(model) == {"computed": 5, "predicted": 4}
    sigmas = torch.tensor([*last_report(model)["run"]["sigmas"]])
    coarse = sample(tiny_models(name), name, sigmas=torch.cat([sigmas[:-1:2], sigmas[-1:]]))
    assert relative(held, coarse) < 1e-4


@pytest.mark.parametrize("name", list(FAMILIES))
def test_between_keyframes_the_network_runs_with_reused_features(tiny_models, name):
    model = attach(tiny_models(name), frdiff(FAMILIES[name], mixing="features"))
    reused, full = sample(model, name, steps=9), sample(tiny_models(name), name, steps=9)
    assert evaluations(model) == {"computed": 5, "reused": 4}
    assert 0 < relative(reused, full) < 0.5 * relative(sample(tiny_models(name), name, steps=9, seed=4), full)


def test_the_papers_schedule_begins_with_held_scores_mixes_and_ends_with_features(tiny_models):
    model = attach(tiny_models("sd15"), frdiff("branch"))
    sample(model, "sd15", steps=50, scheduler="ddim_uniform")
    done = actions(model)
    assert done[::2] == ["computed"] * 25
    between = [action for action in done[1::2] if action != "computed"]
    assert between == sorted(between, key=["predicted", "mixed", "reused"].index), "in this order, never back"
    assert between.count("predicted") == 11 and between.count("mixed") == 3, "as the released code does it"


def test_a_mix_lies_between_what_it_mixes(tiny_models):
    full = sample(tiny_models("sd15"), "sd15", steps=9)
    middle = sample(attach(tiny_models("sd15"), frdiff("branch", tau=0.0)), "sd15", steps=9)  # lambda = 1/2
    ends = [
        sample(attach(tiny_models("sd15"), frdiff("branch", mixing=mixing)), "sd15", steps=9)
        for mixing in ("scores", "features")
    ]
    assert relative(middle, full) < max(relative(end, full) for end in ends)
    assert all(relative(middle, end) > 0 for end in ends)


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_ancestral", "heun", "dpmpp_sde"])
def test_samplers_that_cannot_hold_scores_reuse_features_instead(tiny_models, sampler):
    model = attach(tiny_models("sd15"), frdiff("branch", mixing="scores"))
    assert torch.isfinite(sample(model, "sd15", steps=8, sampler=sampler)).all()
    assert evaluations(model).get("reused", 0) >= 3 and "predicted" not in evaluations(model)


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "uni_pc", "res_multistep"])
def test_measured_leaves_samplers_alone_with_which_fewer_steps_are_better(tiny_models, sampler):
    model = attach(tiny_models("sd15"), frdiff("branch", mixing="measured"))
    full = sample(tiny_models("sd15"), "sd15", steps=6, sampler=sampler)
    assert torch.equal(sample(model, "sd15", steps=6, sampler=sampler), full)
    assert messages.frdiff_multistep(last_report(model)["run"]["sampler"]) in notes(model)


@pytest.mark.parametrize(
    "sampler, cfg, says",
    [
        ("euler_cfg_pp", 3.0, messages.frdiff_cfg_pp_cfg("sample_euler_cfg_pp", 3.0)),
        ("euler_cfg_pp", 1.0, None),
        ("euler_ancestral_cfg_pp", 3.0, messages.frdiff_cfg_pp_cfg("sample_euler_ancestral_cfg_pp", 3.0)),
        ("dpmpp_2m_cfg_pp", 1.0, messages.frdiff_cfg_pp_order("sample_dpmpp_2m_cfg_pp")),
        ("dpmpp_2s_ancestral_cfg_pp", 1.0, messages.frdiff_cfg_pp_order("sample_dpmpp_2s_ancestral_cfg_pp")),
    ],
)
def test_samplers_of_cfg_pp_are_left_alone_where_skipping_harms_them(tiny_models, sampler, cfg, says):
    model = attach(tiny_models("sd15"), frdiff("branch"))
    full = sample(tiny_models("sd15"), "sd15", steps=6, sampler=sampler, cfg=cfg)
    assert torch.equal(sample(model, "sd15", steps=6, sampler=sampler, cfg=cfg), full) == bool(says)
    assert not says or says in notes(model)


def test_samplers_with_two_calls_a_step_have_their_keyframe_at_the_second(tiny_models):
    model = attach(tiny_models("sd15"), frdiff("branch"))
    sample(model, "sd15", steps=6, sampler="heun")
    assert set(actions(model)[1::2]) == {"computed"} and "reused" in actions(model)[2::2]


@pytest.mark.parametrize("sampler", ["dpm_adaptive", "dpm_fast"])
def test_samplers_whose_calls_are_not_known_run_in_full(tiny_models, sampler):
    model = attach(tiny_models("sd15"), frdiff("branch"))
    full = sample(tiny_models("sd15"), "sd15", steps=4, sampler=sampler)
    assert torch.equal(sample(model, "sd15", steps=4, sampler=sampler), full)
    says = messages.sampler_adapts if sampler == "dpm_adaptive" else messages.unknown_sampler
    assert notes(model)[0] == says(last_report(model)["run"]["sampler"])


def test_a_policy_is_followed_evaluation_by_evaluation(tiny_models):
    model = attach(tiny_models("sd3"), CacheSettings("any"))
    sample(model, "sd3", steps=10)
    sigmas = last_report(model)["run"]["sigmas"][:-1]
    reuse, mix = Step(Action.REUSE, 1.0), Step(Action.MIX, 1.0, 0.5)
    steps = [COMPUTE, COMPUTE, COMPUTE, PREDICT, ESTIMATE, COMPUTE, reuse, WEIGHED, mix, COMPUTE]
    model = attach(tiny_models("sd3"), following(policy(steps, sigmas)))
    assert torch.isfinite(sample(model, "sd3", steps=10)).all()
    assert actions(model, "uncond") == [step.action.value for step in steps]
    assert actions(model)[4] == "computed"


def test_a_policy_that_computes_everything_is_bit_identical(tiny_models):
    sigmas = [1.0 - 0.1 * i for i in range(10)]
    model = attach(tiny_models("sd3"), following(policy([COMPUTE] * 10, sigmas)))
    assert torch.equal(sample(model, "sd3", steps=10), sample(tiny_models("sd3"), "sd3", steps=10))


def moved(model, found, steps=10, cfg=4.0, sampler="euler", sigmas=None, shape=(1, 16, 16, 16)):
    """The Steps and the notes of a run under a policy, with these settings."""
    guider = comfy.samplers.CFGGuider(model)
    guider.set_cfg(cfg)
    grid = (*(sigmas or [1.0 - i / steps for i in range(steps)]), 0.0)
    settings, told = planned(following(found), RunSetup(guider, comfy.samplers.sampler_object(sampler), grid, shape))
    return [step for _, step in settings.controller.steps], told


def weighted(steps=10, **setup):
    """A policy with weights; setup: what it says that it was found for."""
    found = policy([COMPUTE] * 3 + [WEIGHED, COMPUTE] * 3 + [COMPUTE], [1.0 - 0.1 * i for i in range(10)])
    return replace(found, setup=replace(found.setup, steps=steps, **setup))


def test_a_run_like_the_one_it_was_found_for_has_no_notes(tiny_models):
    assert moved(tiny_models("sd3"), weighted()) == (list(weighted().steps), [])


@pytest.mark.parametrize("cfg, fit", [(1.5, False), (3.0, True), (4.2, True), (6.0, False)])
def test_at_another_cfg_the_actions_stay_and_the_weights_where_it_is_near_or_lower(tiny_models, cfg, fit):
    steps, [note] = moved(tiny_models("sd3"), weighted(), cfg=cfg)
    assert [step.action for step in steps] == [step.action for step in weighted().steps]
    assert any(step.cond or step.difference for step in steps) == fit
    assert note == messages.other_cfg(4.0, cfg, fit)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"sampler": "heun"}, messages.other_sampler("euler", "sample_heun")),
        ({"steps": 20}, messages.other_grid(10, 20, False)),
        ({"steps": 7}, messages.other_grid(10, 7, True)),
        ({"sigmas": [0.9**i for i in range(10)]}, messages.other_sigmas("simple")),
    ],
)
def test_what_else_differs_is_said(tiny_models, changes, says):
    assert says in moved(tiny_models("sd3"), weighted(), **changes)[1]


@pytest.mark.parametrize("found, steps, doubted", [(30, 26, False), (30, 22, True), (20, 16, True), (10, 20, False)])
def test_a_policy_moved_to_few_steps_says_that_fewer_steps_may_be_as_good(tiny_models, found, steps, doubted):
    assert moved(tiny_models("sd3"), weighted(found), steps=steps)[1] == [messages.other_grid(found, steps, doubted)]


@pytest.mark.parametrize(
    "found, shape, said",
    [
        ("128x128", (1, 16, 64, 64), True),
        ("128x128", (2, 16, 128, 176), True),
        ("21x60x104", (1, 16, 5, 60, 104), True),
        ("128x128", (2, 16, 104, 152), False),
        ("128x128", (1, 4, 128, 128), False),
        ("", (1, 16, 64, 64), False),
        ("21x60x104", (1, 16, 17, 60, 104), False),
        ("9" * 400 + "x", (1, 16, 64, 64), False),
    ],
)
def test_another_size_is_said_and_another_proportion_is_not(tiny_models, found, shape, said):
    steps, told = moved(tiny_models("sd3"), weighted(resolution=found), shape=shape)
    assert told == ([messages.other_size(found, "x".join(map(str, shape[2:])))] if said else [])
    assert steps == list(weighted().steps), "weights stay"


def test_the_report_of_a_run_says_the_other_size(tiny_models):
    model = attach(tiny_models("sd3"), following(weighted(resolution="32x32")))
    sample(model, "sd3", steps=10)
    assert messages.other_size("32x32", "16x16") in notes(model)


def test_ddim_is_euler_under_another_name(tiny_models):
    assert moved(tiny_models("sd3"), weighted(), sampler="ddim")[1] == []


def test_a_policy_with_the_name_of_no_sampler_is_just_another_sampler(tiny_models):
    hostile = weighted(sampler="__class__")
    assert moved(tiny_models("sd3"), hostile)[1] == [messages.other_sampler("__class__", "sample_euler")]


def test_a_policy_for_other_steps_is_moved_to_these(tiny_models):
    steps = [COMPUTE] * 3 + [PREDICT, COMPUTE] * 4
    model = attach(tiny_models("sd3"), following(policy(steps, [1.0 - 0.09 * i for i in range(11)])))
    sample(model, "sd3", steps=22)
    assert 6 <= evaluations(model)["predicted"] <= 10


GRIDS = {
    "too many": torch.linspace(1.0, 0.0, MAX_EVALUATIONS + 201),
    "zero in the middle": torch.tensor([1.0, 0.8, 0.5, 0.0, 0.4, 0.2, 0.0]),
}


@pytest.mark.parametrize("grid", list(GRIDS))
def test_a_policy_that_cannot_be_moved_to_a_run_computes_everything_and_says_why(tiny_models, grid):
    """The network answers nothing here: it is the plan that is looked at."""

    def answering(model):
        model.set_model_unet_function_wrapper(lambda apply_model, args: args["input"] * 0.1)
        return model

    model = answering(attach(tiny_models("sd3"), following(weighted())))
    options = dict(sigmas=GRIDS[grid], latent=torch.zeros(1, 16, 8, 8))
    ours, theirs = sample(model, "sd3", **options), sample(answering(tiny_models("sd3")), "sd3", **options)
    assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())
    assert evaluations(model) == {"computed": len(GRIDS[grid]) - 1}
    assert notes(model)[0] == messages.POLICY_NOT_MOVED


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
