"""Samplers that are not known here, samplers around a known one, and runs whose noise levels are not known."""

import itertools

import comfy.k_diffusion.sampling as k_diffusion
import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.samplers import KSAMPLER
from fastercache_pack.fastercache_core import messages
from fastercache_pack.fastercache_core.clock import Window
from fastercache_pack.fastercache_core.settings import CacheSettings
from fastercache_pack.nodes.fastercache import PRESETS, automatic
from fastercache_pack.nodes.host.wrappers import attach, last_report

from support import tiny
from support.features import chosen_by_node
from support.runs import evaluations, notes, relative
from support.trained import Painter, decibels

SIGMAS = torch.tensor([1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0])


def wish(target: float = 36.0, features: bool = True) -> CacheSettings:
    settings = automatic("test", target, Window())
    reuse = chosen_by_node(forecast="fitted").reuse if features else None
    return CacheSettings("test", settings.controller, settings.difference, settings.output, reuse)


def run(model, sampler, name="sd3", cfg=4.0, sigmas=SIGMAS):
    """The latent of a SAMPLER object's run."""
    latent = torch.zeros(1, *tiny.SPECS[name]["lat"])
    noise = comfy.sample.prepare_noise(latent, 3)
    both = tiny.conditioning(name, 1), tiny.conditioning(name, 2)
    return comfy.sample.sample_custom(model, noise, cfg, sampler, sigmas, *both, latent, disable_pbar=True, seed=3)


def sample_midpoint(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Two calls a step, the second one half way."""
    for sigma, following in itertools.pairwise(sigmas):
        middle = (sigma + following) / 2
        half = x + (x - model(x, sigma.expand(len(x)), **extra_args)) / sigma * (middle - sigma)
        x = x + (half - model(half, middle.expand(len(x)), **extra_args)) / middle * (following - sigma)
    return x


def sample_with_sigmas_of_its_own(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """As samplers that are handed [0, 0] and walk other noise levels."""
    return k_diffusion.sample_euler(model, x, SIGMAS, extra_args, callback, disable)


def around(sampler, lie=0.97, push=0.0):
    """A sampler as other packs have them: asks the model at other sigmas and leaves the walk to the one it holds."""

    def lying(model, x, sigmas, *, inner, extra_args=None, callback=None, disable=None):
        def lied(x, sigma, **kwargs):
            return model(x + push, sigma * lie if sigma[0] < 1 else sigma, **kwargs)

        lied.inner_model = model.inner_model
        return inner.sampler_function(lied, x, sigmas, extra_args=extra_args, callback=callback, disable=disable)

    return KSAMPLER(lying, {"inner": sampler})


MIDPOINT, OWN = KSAMPLER(sample_midpoint), KSAMPLER(sample_with_sigmas_of_its_own)
EULER = comfy.samplers.sampler_object("euler")


@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_with_a_sampler_from_elsewhere_only_features_are_reused_and_that_is_said(tiny_models, cfg):
    full, model = run(tiny_models("sd3"), MIDPOINT, cfg=cfg), attach(tiny_models("sd3"), wish())
    result = run(model, MIDPOINT, cfg=cfg)
    assert set(evaluations(model)) <= {"computed", "reused"} and relative(result, full) < 0.02
    assert messages.unknown_reuses("sample_midpoint") in notes(model)
    assert last_report(model)["evaluations"][-1]["actions"]["cond"] == "computed"


@pytest.mark.parametrize("settings", [wish(features=False), PRESETS["paper"](Window())], ids=["no features", "paper"])
def test_with_a_sampler_from_elsewhere_nothing_else_is_skipped(tiny_models, settings):
    full, model = run(tiny_models("sd3"), MIDPOINT), attach(tiny_models("sd3"), settings)
    assert torch.equal(run(model, MIDPOINT), full)
    assert messages.unknown_sampler("sample_midpoint") in notes(model)


@pytest.mark.parametrize("sampler", ["er_sde", "lcm", "euler_ancestral", "dpmpp_2m_sde", "uni_pc", "dpm_fast"])
@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_every_sampler_runs_with_features_and_computes_its_last_evaluation(tiny_models, sampler, cfg):
    full = tiny.sample(tiny_models("sd3"), "sd3", steps=12, sampler=sampler, cfg=cfg)
    model = attach(tiny_models("sd3"), wish())
    result = tiny.sample(model, "sd3", steps=12, sampler=sampler, cfg=cfg)
    assert torch.isfinite(result).all() and relative(result, full) < 0.1
    assert cfg == 1.0 or "predicted" not in evaluations(model)
    assert set(last_report(model)["evaluations"][-1]["actions"].values()) == {"computed"}


@pytest.mark.parametrize("sampler", ["euler_ancestral", "er_sde", "dpmpp_2m_sde"])
def test_without_guidance_steps_of_samplers_that_add_noise_are_predicted(sampler):
    """The clean picture behind the noise changes slowly."""
    painter = Painter("wan")
    full = painter.full(steps=20, cfg=1.0, sampler=sampler)
    model = attach(painter.model, automatic("test", 36.0, Window()))
    assert decibels(painter.paint(model, steps=20, cfg=1.0, sampler=sampler), full) > 36.0
    assert evaluations(model)["predicted"] >= 3


@pytest.mark.parametrize("sampler", ["euler_ancestral", "er_sde"])
def test_with_guidance_they_are_not_and_that_is_said(tiny_models, sampler):
    model = attach(tiny_models("sd3"), wish())
    tiny.sample(model, "sd3", steps=8, sampler=sampler, cfg=4.0)
    name = last_report(model)["run"]["sampler"]
    assert "predicted" not in evaluations(model) and messages.adds_noise_guided(name) in notes(model)


def test_a_sampler_that_chooses_its_steps_by_the_network_is_left_alone(tiny_models):
    full = tiny.sample(tiny_models("sd3"), "sd3", steps=6, sampler="dpm_adaptive")
    model = attach(tiny_models("sd3"), wish())
    assert torch.equal(tiny.sample(model, "sd3", steps=6, sampler="dpm_adaptive"), full)
    assert messages.sampler_adapts("dpm_adaptive_function") in notes(model)


@pytest.mark.parametrize("handed", [[0.0, 0.0], [0.0], [0.5]])
@pytest.mark.parametrize("settings", [wish(), wish(features=False), PRESETS["paper"](Window())])
def test_without_noise_levels_of_the_run_no_step_is_predicted_and_the_last_is_computed(tiny_models, handed, settings):
    sigmas = torch.tensor(handed)
    full, model = run(tiny_models("sd3"), OWN, sigmas=sigmas), attach(tiny_models("sd3"), settings)
    result = run(model, OWN, sigmas=sigmas)
    assert relative(result, full) < 0.02 and set(evaluations(model)) <= {"computed", "reused"}
    assert (settings.reuse and settings.controller.probes) or torch.equal(result, full)
    assert messages.NO_SIGMAS in notes(model)
    assert set(last_report(model)["evaluations"][-1]["actions"].values()) == {"computed"}


def test_a_sampler_around_a_known_one_counts_as_that(tiny_models):
    sampler = around(EULER)
    full, model = run(tiny_models("sd3"), sampler, cfg=1.0), attach(tiny_models("sd3"), wish(30.0))
    result = run(model, sampler, cfg=1.0)
    assert evaluations(model)["predicted"] > 2 and relative(result, full) < 0.1
    assert messages.wraps("lying", "sample_euler") in notes(model)


def test_a_sampler_around_a_known_one_that_moves_the_latent_itself_is_found_out(tiny_models):
    sampler = around(EULER, push=0.05)
    full, model = run(tiny_models("sd3"), sampler), attach(tiny_models("sd3"), wish())
    assert torch.equal(run(model, sampler), full)
    assert messages.not_wrapped("lying", "sample_euler") in notes(model) and set(evaluations(model)) == {"computed"}


@pytest.mark.parametrize("inner", ["heun", "euler_ancestral", "uni_pc"])
def test_a_sampler_around_one_whose_steps_are_not_known_is_not_known_either(tiny_models, inner):
    sampler = around(comfy.samplers.sampler_object(inner))
    model = attach(tiny_models("sd3"), wish())
    assert torch.isfinite(run(model, sampler)).all() and set(evaluations(model)) <= {"computed", "reused"}
    assert messages.unknown_reuses("lying") in notes(model)
