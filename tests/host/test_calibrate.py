"""Policies are found on a model as it samples, and calibration changes nothing."""
import comfy.model_management
import pytest
import torch
from fastercache_pack.fastercache_core.calibration import DEPTH, Losses
from fastercache_pack.fastercache_core.guidance import GuidanceSettings
from fastercache_pack.fastercache_core.jump import JumpSettings
from fastercache_pack.fastercache_core.policy import FULL, Point, Policy, Setup, Step, dumps, loads
from fastercache_pack.fastercache_core.settings import CacheSettings
from fastercache_pack.fastercache_core.storage import StorageSettings
from fastercache_pack.nodes.auto_fr import METHODS, FasterCacheAutoFR
from fastercache_pack.nodes.frdiff import policy_settings
from fastercache_pack.nodes.host.attach import attach, last_report
from fastercache_pack.nodes.host.calibrate import (
    CalibrationError,
    FeatureRecorder,
    Fitter,
    Recorder,
    Sampling,
    find_policy,
    sample,
    setup,
)
from fastercache_pack.nodes.host.families import Family
from fastercache_pack.nodes.host.identity import model_fingerprint
from tiny import SPECS, conditioning
from tiny import sample as sample_tiny

STEPS = 10


def sampling(name, **changes):
    latent = torch.zeros((1, *SPECS[name]["lat"]))
    told = dict(positive=conditioning(name, 1), negative=conditioning(name, 2), latent=latent, seed=3, steps=STEPS,
                cfg=4.0, sampler="euler", scheduler="simple")
    return Sampling(**{**told, **changes})


def recorded(model, told):
    recorder = Recorder(told.cfg, lambda: None)
    return sample(model, told, recorder), recorder


def test_recording_leaves_the_picture_as_it_is(tiny_models):
    latent, recorder = recorded(tiny_models("sd3"), sampling("sd3"))
    assert torch.equal(latent, sample_tiny(tiny_models("sd3"), "sd3", steps=STEPS))
    assert len(recorder.reference.sigmas) == STEPS and not recorder.refused


def test_a_cache_node_on_the_model_is_left_out(tiny_models):
    cached = attach(tiny_models("sd3"), CacheSettings("any", GuidanceSettings(), jump=JumpSettings()))
    latent, _ = recorded(cached, sampling("sd3"))
    assert torch.equal(latent, sample_tiny(tiny_models("sd3"), "sd3", steps=STEPS))


@pytest.mark.parametrize("name", ["sd3", "sd15", "wan"])
def test_the_recorded_outputs_lead_from_latent_to_latent(tiny_models, name):
    """Euler by hand, from what was recorded: the guided output times its gain is the slope."""
    _, recorder = recorded(tiny_models(name), sampling(name))
    full = recorder.reference
    for m in range(STEPS - 1):
        moved = full.x[m] - full.steps[m] * full.slope[m]
        assert torch.allclose(moved, full.x[m + 1], atol=1e-3 * float(full.x[m].abs().max()))
    change = (full.cond[3] - full.cond[2]) + (1 - 4.0) * (full.difference[3] - full.difference[2])
    assert change.abs().max() > 0


@pytest.mark.parametrize("name", ["sd3", "sd15"])
def test_fitting_a_run_that_skips_nothing_ends_at_the_same_latent(tiny_models, name):
    told = sampling(name)
    _, recorder = recorded(tiny_models(name), told)
    fitter = Fitter(recorder.reference, Point(0.0, tuple(Step("FULL", 1.0) for _ in range(STEPS))), lambda: None)
    sample(tiny_models(name), told, fitter)
    assert fitter.error < 1e-6


@pytest.mark.parametrize("name", ["sd3", "sd15"])
def test_a_policy_is_found_with_weights_at_its_chosen_point(tiny_models, name):
    policy = find_policy(tiny_models(name), sampling(name), 0.6)
    assert policy.cost <= 0.6 and policy.setup.steps == STEPS
    jumps = [step for step in policy.steps if step.action == "JUMP"]
    assert jumps and all(len(step.cond) == len(step.difference) > 0 for step in jumps)
    assert 0.0 < policy.error < 1.0 and loads(dumps(policy)) == policy


def test_fitted_weights_are_nearer_to_full_sampling_than_holding(tiny_models):
    told = sampling("sd3")
    model = tiny_models("sd3")
    policy = find_policy(model, told, 0.6)
    _, recorder = recorded(model, told)

    class Holder(Fitter):
        def _fit(self, *args):
            held = [1.0, *[0.0] * (len(self.known) - 1)]
            return held, held

    holder = Holder(recorder.reference, policy.points[policy.chosen], lambda: None)
    sample(model, told, holder)
    assert policy.error < holder.error


@pytest.mark.parametrize("budget", [0.4, 0.5, 0.6])
def test_minimax_keeps_the_largest_error_below_that_of_the_least_sum(tiny_models, budget):
    _, recorder = recorded(tiny_models("sd15"), sampling("sd15"))
    losses = Losses(recorder.reference)

    def parts(method):
        """Squared errors of the gaps of its policy."""
        points = METHODS[method](recorder.reference, losses)
        point = max((p for p in points if p.cost <= budget), key=lambda p: p.cost)
        keys = [i for i, step in enumerate(point.steps) if step.action == "FULL"]
        return [losses.choices(tuple(reversed(keys[:i + 1]))[:DEPTH], after)[0].loss
                for i, (key, after) in enumerate(zip(keys, keys[1:])) if after > key + 1], point.error

    (least_sum, error), (minimax, told) = parts("exact search"), parts("minimax search")
    assert max(minimax) <= max(least_sum) and sum(minimax) >= sum(least_sum) * (1 - 1e-9)
    assert told / error == pytest.approx((sum(minimax) / sum(least_sum)) ** 0.5), "errors are told alike"


def test_where_steps_may_not_be_skipped_the_negative_pass_is(tiny_models):
    policy = find_policy(tiny_models("sd3"), sampling("sd3", sampler="dpmpp_2m"), 0.8)
    assert {step.action for step in policy.steps} == {"FULL", "ESTIMATE"} and policy.cost <= 0.8
    assert all(step.difference and not step.cond for step in policy.steps if step.action == "ESTIMATE")


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_trying_reused_features_leaves_the_picture_as_it_is(tiny_models, name):
    told, recorder = sampling(name), FeatureRecorder(4.0, lambda: None)
    latent = sample(tiny_models(name), told, recorder)
    assert torch.equal(latent, sample_tiny(tiny_models(name), name, steps=STEPS))
    full = recorder.reference
    assert {m - k for k, m in full.reused} == {1, 2, 3} and 0.1 < full.reuse_cost < 0.95
    wrong = [sum((full.reused[m - gap, m] - full.guided(full.cond[m], full.difference[m])).norm()
                 for m in range(3, STEPS - 1)) for gap in (1, 2, 3)]
    assert 0 < wrong[0] < wrong[1] < wrong[2], "older features are worse"


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_a_policy_with_reused_features_does_in_a_run_what_was_foreseen(tiny_models, name):
    told, model = sampling(name), tiny_models(name)
    recorder = FeatureRecorder(4.0, lambda: None)
    sample(model, told, recorder)
    steps = [FULL, FULL, FULL, Step("REUSE", 0.5), FULL, Step("MIX", 0.5, 0.5), FULL, Step("REUSE", 0.5), FULL, FULL]
    fitter = Fitter(recorder.reference, Point(0.0, tuple(steps)), lambda: None)
    fitted = sample(model, told, fitter)
    assert fitter.steps[5].cond and not fitter.steps[3].cond and 0 < fitter.error < 0.2
    policy = Policy(Setup("any", "euler", "simple", STEPS, 4.0), tuple(recorder.reference.sigmas),
                    (Point(0.0, tuple(fitter.steps)),))
    run = attach(model, policy_settings(policy, StorageSettings()))
    assert torch.allclose(sample_tiny(run, name, steps=STEPS), fitted, atol=1e-3)
    counted = last_report(run)["totals"]["evaluations"]
    assert counted == {"FULL": 7, "REUSE": 2, "MIX": 1}


def test_where_no_step_may_be_skipped_and_there_is_no_negative_features_are_reused(tiny_models):
    told = sampling("sd15", sampler="dpmpp_2m", cfg=1.0)
    policy = find_policy(tiny_models("sd15"), told, 0.8, features=True)
    assert {step.action for step in policy.steps} == {"FULL", "REUSE"} and policy.cost <= 0.8


def test_a_model_without_such_features_is_refused_with_the_reason(tiny_models, monkeypatch):
    monkeypatch.setattr("fastercache_pack.nodes.host.refusals.find_family", lambda network: Family("Odd", ()))
    with pytest.raises(CalibrationError, match="Odd has no branch features"):
        find_policy(tiny_models("sd3"), sampling("sd3"), 0.5, features=True)


def test_without_guidance_there_is_one_branch_to_foresee(tiny_models):
    policy = find_policy(tiny_models("sd3"), sampling("sd3", cfg=1.0), 0.6)
    assert all(step.cond and not step.difference for step in policy.steps if step.action == "JUMP")


def test_a_sampler_that_cannot_be_foreseen_is_refused_with_the_reason(tiny_models):
    with pytest.raises(CalibrationError, match="dpm_adaptive"):
        find_policy(tiny_models("sd3"), sampling("sd3", sampler="dpm_adaptive"), 0.5)


def test_with_nothing_to_skip_it_says_so(tiny_models):
    with pytest.raises(CalibrationError, match="nothing to skip"):
        find_policy(tiny_models("sd3"), sampling("sd3", sampler="dpmpp_2m", cfg=1.0), 0.5)


def test_cancelling_ends_it_and_leaves_the_model_usable(tiny_models):
    model, told = tiny_models("sd3"), sampling("sd3")
    recorder = Recorder(4.0, lambda: comfy.model_management.interrupt_current_processing(True))
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(model, told, recorder)
    assert torch.equal(sample_tiny(model, "sd3", steps=STEPS), sample_tiny(tiny_models("sd3"), "sd3", steps=STEPS))


def test_the_size_is_that_of_the_latent_as_the_model_samples_it(tiny_models):
    """An empty latent of a picture, given to a video model, becomes a clip of one frame."""
    told = sampling("wan", latent=torch.zeros(1, 16, 16, 12))
    assert setup(tiny_models("wan"), told).resolution == "1x16x12"


def test_a_fingerprint_tells_architectures_apart_and_not_loras(tiny_models):
    model = tiny_models("sd3")
    name = next(key for key in model.model.state_dict() if key.endswith("qkv.weight"))
    patched = model.clone()
    patched.add_patches({name: ("diff", (torch.zeros_like(model.model.state_dict()[name]),))})
    assert model_fingerprint(patched) == model_fingerprint(model) != model_fingerprint(tiny_models("sd15"))


@pytest.mark.parametrize("method", list(METHODS))
def test_the_node_gives_a_policy_a_report_and_a_curve(tiny_models, method):
    told = sampling("sd3")
    with torch.inference_mode():  # as the host runs it
        policy, report, curve = FasterCacheAutoFR.execute(
            tiny_models("sd3"), told.positive, told.negative, {"samples": told.latent}, 3, STEPS, 4.0, "euler",
            "simple", 1.0, 0.6, method, 2).result
    assert policy.cost <= 0.6 and policy.points[policy.chosen].actions() in report
    assert curve.shape[0] == 1 and curve.shape[-1] == 3 and 0 < curve.min() + curve.max() <= 2


@pytest.mark.parametrize("method, tried", [("exact search", True), ("minimax search", True), ("gradient", False)])
def test_reused_features_are_tried_for_the_methods_that_can_choose_them(monkeypatch, method, tried):
    found = []
    monkeypatch.setattr("fastercache_pack.nodes.auto_fr.find_policy", lambda *told: found.append(told) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        FasterCacheAutoFR.execute(None, None, None, {"samples": torch.zeros(1, 4, 8, 8)}, 0, 10, 4.0, "euler",
                                  "simple", 1.0, 0.5, method, 1, features=True)
    assert found[0][-1] == tried


def test_the_node_refuses_a_method_that_does_not_exist():
    with pytest.raises(ValueError, match="FasterCacheAutoFR: method"):
        FasterCacheAutoFR.execute(None, None, None, None, 0, 10, 4.0, "euler", "simple", 1.0, 0.5, "magic", 1)
