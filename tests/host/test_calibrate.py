"""Policies are found on a model as it samples, and calibration changes nothing."""

from dataclasses import replace
from itertools import pairwise

import comfy.model_management
import folder_paths
import pytest
import torch
from fastercache_pack.fastercache_core import messages
from fastercache_pack.fastercache_core.actions import COMPUTE, Action, Step
from fastercache_pack.fastercache_core.calibration.policy import DEPTH, Point, Policy, Setup
from fastercache_pack.fastercache_core.calibration.policy_file import dumps, loads
from fastercache_pack.fastercache_core.controllers.planned import StepsSettings
from fastercache_pack.fastercache_core.features.storage import StorageSettings
from fastercache_pack.fastercache_core.forecast import BANDS
from fastercache_pack.nodes.auto_fr import CHOSEN, LINE, METHODS, FasterCacheAutoFR, curve
from fastercache_pack.nodes.frdiff import policy_settings
from fastercache_pack.nodes.host.calibrate import (
    CalibrationError,
    FeatureRecorder,
    Fitter,
    Recorder,
    Sampling,
    find_policy,
    recorded,
    sample,
    setup,
)
from fastercache_pack.nodes.host.families import Family
from fastercache_pack.nodes.host.fingerprint import model_fingerprint
from fastercache_pack.nodes.host.wrappers import attach, last_report

from support.guidance import windowed, with_steps
from support.runs import evaluations
from support.tiny import SPECS, conditioning
from support.tiny import sample as sample_tiny

STEPS = 10


def sampling(name, **changes):
    given = dict(
        positive=conditioning(name, 1),
        negative=conditioning(name, 2),
        latent=torch.zeros((1, *SPECS[name]["lat"])),
        seed=3,
        steps=STEPS,
        cfg=4.0,
        sampler="euler",
        scheduler="simple",
    )
    return Sampling(**{**given, **changes})


def sampled(model, settings):
    """The latent of a recorded run, and its recorder."""
    recorder = Recorder(settings.cfg, lambda: None)
    return sample(model, settings, recorder), recorder


def fitted(model, settings, reference, steps, kind=Fitter):
    """The latent of a run that takes `steps`, and the Fitter that watched it."""
    fitter = kind(reference, Point(0.0, tuple(steps)), lambda: None)
    plan = StepsSettings(list(zip(reference.sigmas, steps)), fewest=1)
    return sample(model, settings, fitter, plan), fitter


def actions(policy):
    return {step.action for step in policy.steps}


def test_recording_leaves_the_picture_as_it_is_and_counts_the_progress(tiny_models):
    ticks, recorder = [], Recorder(4.0, lambda: ticks.append(1))
    latent = sample(tiny_models("sd3"), sampling("sd3"), recorder)
    assert torch.equal(latent, sample_tiny(tiny_models("sd3"), "sd3", steps=STEPS))
    assert len(recorder.reference.sigmas) == len(ticks) == STEPS and not recorder.refused


def test_a_cache_node_on_the_model_is_left_out_and_reports_nothing(tiny_models):
    cached = attach(tiny_models("sd3"), with_steps())
    latent, _ = sampled(cached, sampling("sd3"))
    assert torch.equal(latent, sample_tiny(tiny_models("sd3"), "sd3", steps=STEPS))
    assert last_report(cached) is None


@pytest.mark.parametrize("name", ["sd3", "sd15", "wan"])
def test_the_recorded_outputs_lead_from_latent_to_latent(tiny_models, name):
    """Euler by hand, from what was recorded: the guided output times its gain is the slope."""
    _, recorder = sampled(tiny_models(name), sampling(name))
    full = recorder.reference
    for m in range(STEPS - 1):
        moved = full.x[m] - full.steps[m] * full.slope[m]
        assert torch.allclose(moved, full.x[m + 1], atol=1e-3 * float(full.x[m].abs().max()))
    change = (full.cond[3] - full.cond[2]) + (1 - 4.0) * (full.difference[3] - full.difference[2])
    assert change.abs().max() > 0


@pytest.mark.parametrize("name", ["sd3", "sd15"])
def test_fitting_a_run_that_skips_nothing_ends_at_the_same_latent(tiny_models, name):
    _, recorder = sampled(tiny_models(name), sampling(name))
    latent, fitter = fitted(tiny_models(name), sampling(name), recorder.reference, [COMPUTE] * STEPS)
    assert torch.equal(latent, sample_tiny(tiny_models(name), name, steps=STEPS))
    assert fitter.error < 1e-6


@pytest.mark.parametrize("name", ["sd3", "sd15"])
def test_a_policy_is_found_with_weights_at_its_chosen_point(tiny_models, name):
    policy = find_policy(tiny_models(name), sampling(name), 0.6)
    assert policy.cost <= 0.6 and policy.setup.steps == STEPS
    predicted = [step for step in policy.steps if step.action is Action.PREDICT]
    assert predicted and all(len(step.cond) == len(step.difference) > 0 for step in predicted)
    skipped = [i for i, step in enumerate(policy.steps) if step in predicted]
    after = [step for step in policy.steps[skipped[0] :] if step.action is Action.COMPUTE]
    assert all(step.weighs for step in after), "what is computed later corrects"
    assert 0.0 < policy.error < 1.0 and loads(dumps(policy)) == policy


class Holder(Fitter):
    """Holds the last values, where a Fitter fits weights to all that it has."""

    def weigh(self, step, pass_, signals, outputs):
        return replace(step, cond=(1.0,) * BANDS, difference=(1.0,) * BANDS)


def test_fitted_weights_are_nearer_to_full_sampling_than_holding(tiny_models):
    settings, model = sampling("sd3"), tiny_models("sd3")
    _, recorder = sampled(model, settings)
    steps = [COMPUTE] * 3 + [Step(Action.PREDICT), COMPUTE] * 3 + [COMPUTE]
    _, weighs = fitted(model, settings, recorder.reference, steps)
    _, holds = fitted(model, settings, recorder.reference, steps, Holder)
    assert 0 < weighs.error < holds.error


@pytest.mark.parametrize("budget", [0.4, 0.5, 0.6])
def test_minimax_keeps_the_largest_error_below_that_of_the_least_sum(tiny_models, budget):
    reference, losses = recorded(tiny_models("sd15"), sampling("sd15"))

    def parts(method):
        """Squared errors of the gaps of its policy, and the error that it predicts."""
        points = METHODS[method](reference, losses)
        point = max((p for p in points if p.cost <= budget), key=lambda p: p.cost)
        keys = [i for i, step in enumerate(point.steps) if step.action is Action.COMPUTE]
        gaps = [
            losses.choices(tuple(reversed(keys[: i + 1]))[:DEPTH], after)[0].loss
            for i, (key, after) in enumerate(pairwise(keys))
            if after > key + 1
        ]
        return gaps, point.error

    (least_sum, error), (minimax, predicted) = parts("exact search"), parts("minimax search")
    assert max(minimax) <= max(least_sum) and sum(minimax) >= sum(least_sum) * (1 - 1e-9)
    assert predicted / error == pytest.approx((sum(minimax) / sum(least_sum)) ** 0.5), "errors are counted alike"


def test_where_steps_may_not_be_skipped_the_negative_pass_is(tiny_models):
    policy = find_policy(tiny_models("sd3"), sampling("sd3", sampler="deis"), 0.8)
    assert actions(policy) == {Action.COMPUTE, Action.ESTIMATE} and policy.cost <= 0.8
    assert all(step.difference and not step.cond for step in policy.steps if step.action is Action.ESTIMATE)


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_testing_reused_features_leaves_the_picture_as_it_is(tiny_models, name):
    recorder = FeatureRecorder(4.0, lambda: None)
    latent = sample(tiny_models(name), sampling(name), recorder)
    assert torch.equal(latent, sample_tiny(tiny_models(name), name, steps=STEPS))
    full = recorder.reference
    assert {m - k for k, m in full.reused} == {1, 2, 3} and 0.1 < full.reuse_cost < 0.95
    errors = [
        sum(
            (full.reused[m - gap, m] - full.guided(full.cond[m], full.difference[m])).norm()
            for m in range(3, STEPS - 1)
        )
        for gap in (1, 2, 3)
    ]
    assert 0 < errors[0] < errors[1] < errors[2], "older features are worse"


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_a_policy_with_reused_features_does_in_a_run_what_it_did_in_calibration(tiny_models, name):
    settings, model = sampling(name), tiny_models(name)
    reference, _ = recorded(model, settings, features=True)
    reuse, mix = Step(Action.REUSE, 0.5), Step(Action.MIX, 0.5, 0.5)
    steps = [COMPUTE, COMPUTE, COMPUTE, reuse, COMPUTE, mix, COMPUTE, reuse, COMPUTE, COMPUTE]
    latent, fitter = fitted(model, settings, reference, steps)
    assert fitter.steps[5].cond and not fitter.steps[3].cond and 0 < fitter.error < 0.2
    point = Point(0.0, tuple(fitter.steps))
    policy = Policy(Setup("any", "euler", "simple", STEPS, 4.0), tuple(reference.sigmas), (point,))
    run = attach(model, policy_settings(policy, StorageSettings()))
    assert torch.allclose(sample_tiny(run, name, steps=STEPS), latent, atol=1e-3)
    assert evaluations(run) == {"computed": 7, "reused": 2, "mixed": 1}


def test_where_no_step_may_be_skipped_and_there_is_no_negative_features_are_reused(tiny_models):
    settings = sampling("sd15", sampler="deis", cfg=1.0)
    policy = find_policy(tiny_models("sd15"), settings, 0.8, features=True)
    assert actions(policy) == {Action.COMPUTE, Action.REUSE} and policy.cost <= 0.8


def test_a_model_without_such_features_is_refused_with_the_reason(tiny_models, monkeypatch):
    monkeypatch.setattr("fastercache_pack.nodes.host.compatibility.find_family", lambda network: Family("Odd", ()))
    with pytest.raises(CalibrationError, match=messages.no_feature_kinds("Odd", ["branch"])):
        find_policy(tiny_models("sd3"), sampling("sd3"), 0.5, features=True)


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "res_multistep"])
def test_solvers_of_second_order_with_known_steps_have_whole_steps_predicted(tiny_models, sampler):
    policy = find_policy(tiny_models("sd3"), sampling("sd3", sampler=sampler), 0.6)
    assert actions(policy) == {Action.COMPUTE, Action.PREDICT} and 0 < policy.error < 0.2
    run = attach(tiny_models("sd3"), policy_settings(policy, StorageSettings()))
    sample_tiny(run, "sd3", steps=STEPS, sampler=sampler)
    assert evaluations(run)["predicted"] == policy.points[policy.chosen].actions().count("P")


def test_without_guidance_there_is_one_branch_to_predict(tiny_models):
    policy = find_policy(tiny_models("sd3"), sampling("sd3", cfg=1.0), 0.6)
    assert actions(policy) == {Action.COMPUTE, Action.PREDICT}
    assert all(step.cond and not step.difference for step in policy.steps if step.action is Action.PREDICT)


def test_a_sampler_whose_calls_are_not_known_is_refused_with_the_reason(tiny_models):
    with pytest.raises(CalibrationError, match=r"sampler \w*dpm_adaptive\w* chooses its steps"):
        find_policy(tiny_models("sd3"), sampling("sd3", sampler="dpm_adaptive"), 0.5)


def test_with_nothing_to_skip_it_says_so(tiny_models):
    reason = messages.nothing_to_skip(messages.builds_on_differences("sample_deis"))
    with pytest.raises(CalibrationError, match=reason):
        find_policy(tiny_models("sd3"), sampling("sd3", sampler="deis", cfg=1.0), 0.5)


def test_a_positive_that_begins_late_cannot_be_recorded(tiny_models):
    settings = sampling("sd3", positive=conditioning("sd3", 1, start_percent=0.4, end_percent=1.0))
    with pytest.raises(CalibrationError, match=messages.ONE_NEGATIVE):
        find_policy(tiny_models("sd3"), settings, 0.5)


def test_context_windows_cannot_be_recorded(tiny_models):
    model = windowed(tiny_models("wan"))
    with pytest.raises(CalibrationError, match=messages.CONTEXT_WINDOWS):
        find_policy(model, sampling("wan", latent=torch.zeros(1, 16, 6, 8, 8)), 0.5)


def test_cancelling_ends_it_and_leaves_the_model_usable(tiny_models):
    model = tiny_models("sd3")
    recorder = Recorder(4.0, lambda: comfy.model_management.interrupt_current_processing(True))
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(model, sampling("sd3"), recorder)
    assert len(recorder.reference.sigmas) == 1, "at the next evaluation, not at the end"
    assert torch.equal(sample_tiny(model, "sd3", steps=STEPS), sample_tiny(tiny_models("sd3"), "sd3", steps=STEPS))


def test_the_size_is_that_of_the_latent_as_the_model_samples_it(tiny_models):
    """An empty latent of a picture, given to a video model, becomes a clip of one frame."""
    settings = sampling("wan", latent=torch.zeros(1, 16, 16, 12))
    assert setup(tiny_models("wan"), settings).resolution == "1x16x12"


def test_a_fingerprint_tells_architectures_apart_and_not_loras(tiny_models):
    model = tiny_models("sd3")
    name = next(key for key in model.model.state_dict() if key.endswith("qkv.weight"))
    patched = model.clone()
    patched.add_patches({name: ("diff", (torch.zeros_like(model.model.state_dict()[name]),))})
    assert model_fingerprint(patched) == model_fingerprint(model) != model_fingerprint(tiny_models("sd15"))


def node_inputs(method, **changes):
    """Inputs of the node beside its model."""
    settings = sampling("sd3")
    given = dict(positive=settings.positive, negative=settings.negative, latent_image={"samples": settings.latent})
    numbers = dict(seed=3, steps=STEPS, cfg=4.0, denoise=1.0, budget=0.6, pictures=2)
    return {**given, **numbers, "sampler_name": "euler", "scheduler": "simple", "method": method, **changes}


@pytest.mark.parametrize("method", list(METHODS))
def test_the_node_gives_a_policy_a_report_and_its_curve(tiny_models, method, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    with torch.inference_mode():  # as the host runs it
        policy, report, picture = FasterCacheAutoFR.execute(tiny_models("sd3"), **node_inputs(method)).result
    assert policy.cost <= 0.6 and policy.points[policy.chosen].actions() in report
    assert all(point.actions() in report for point in policy.points)
    assert picture.shape[0] == 1 and picture.shape[-1] == 3 and torch.equal(picture, curve(policy))


def places(picture, colour):
    """(columns, rows) of the pixels of a colour like "#5bc0de", rows counted upwards."""
    wanted = torch.tensor(list(bytes.fromhex(colour[1:]))) / 255
    rows, columns = (picture[0] - wanted).abs().amax(-1).lt(1e-3).nonzero().T.float()
    return columns, picture.shape[1] - rows


def test_the_curve_falls_from_the_cheapest_point_to_the_dearest_and_marks_the_chosen_one():
    """At three costs, errors of 10, 1 and 0.1 percent: on a scale of powers of ten a straight line."""
    found = Policy(
        Setup("any", "euler", "simple", 10, 4.0),
        tuple(1 - i / 10 for i in range(10)),
        tuple(
            Point(error, (COMPUTE,) * computed + (Step(Action.PREDICT),) * (10 - computed))
            for error, computed in ((0.1, 2), (0.01, 5), (0.001, 8))
        ),
    )
    line, dots = [], []
    for i in range(3):
        picture = curve(replace(found, chosen=i))
        line.append(places(picture, LINE))
        dots.append([float(place.mean()) for place in places(picture, CHOSEN)])
    (left, high), (middle, half), (right, low) = dots
    assert left < middle < right and high > half > low
    assert middle == pytest.approx((left + right) / 2, abs=1) and half == pytest.approx((high + low) / 2, abs=1)
    columns, rows = line[1]
    ends = [(columns.min(), left), (columns.max(), right), (rows.max(), high), (rows.min(), low)]
    assert all(float(end) == pytest.approx(dot, abs=3) for end, dot in ends), "the line ends where the points are"
    assert places(curve(replace(found, points=found.points[:1])), LINE)[0].numel() == 0, "one point is no line"


@pytest.mark.parametrize("method", METHODS)
def test_reused_features_are_tested_for_every_method(tiny_models, monkeypatch, method):
    """No method drops the input in silence."""
    kinds, close = [], Recorder.closed
    for kind in (Recorder, FeatureRecorder):
        monkeypatch.setattr(kind, "closed", lambda self: kinds.append(type(self)) or close(self))
    FasterCacheAutoFR.execute(tiny_models("sd3"), **node_inputs(method, features=True, steps=4, pictures=1))
    assert kinds[0] is FeatureRecorder


def test_the_node_refuses_a_method_that_does_not_exist():
    with pytest.raises(ValueError, match="FasterCacheAutoFR: method"):
        FasterCacheAutoFR.execute(None, **node_inputs("magic"))
