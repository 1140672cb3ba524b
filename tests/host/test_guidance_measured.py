"""Guiders as other packs have them: their scale is measured by what they make of the branches, never read."""

import json

import comfy.sample
import comfy.samplers
import pytest
import torch
from fastercache_pack.fastercache_core import messages
from fastercache_pack.fastercache_core.clock import Window
from fastercache_pack.nodes.fastercache import PRESETS
from fastercache_pack.nodes.host.wrappers import attach, last_report

from support.others import Named, Scheduled
from support.runs import evaluations, notes, relative, totals
from support.tiny import conditioning
from support.trained import Painter, decibels

BALANCED = PRESETS["balanced"](Window())
STEPS = 30


class Jumps(Scheduled):
    """Hardly guides at first, and strongly later on."""

    def scale(self, sigma):
        return 1.5 if sigma > 0.7 else 9.0


class Odd(comfy.samplers.CFGGuider):
    """Its attributes are of kinds that nobody expects."""

    cfg1, cfg2 = {"at": 1}, None

    def set_cfg(self, cfg):
        self.cfg = [cfg, cfg]

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        conds = self.conds["negative"], self.conds["positive"]
        return comfy.samplers.sampling_function(self.inner_model, x, timestep, *conds, 4.5, model_options, seed)


def guided_by_itself(model, guider_of):
    """A node that guides at cfg 1, by a pass of its own."""

    def post(args):
        conds = [guider_of().conds["negative"]]
        (uncond,) = comfy.samplers.calc_cond_batch(
            args["model"], conds, args["input"], args["sigma"], args["model_options"]
        )
        return args["denoised"] + 3.5 * (args["cond_denoised"] - uncond)

    model.set_model_sampler_post_cfg_function(post)
    return model


@pytest.fixture(scope="module")
def painter():
    return Painter()


def sampled(painter, guider, steps=STEPS):
    """Pictures by a guider of a MODEL."""
    latent = painter.bed.empty(3)
    noise = comfy.sample.prepare_noise(latent, 7)
    guider.set_conds(painter.bed.conditioning(painter.prompts[:3]), painter.bed.conditioning([""]))
    sampling = guider.model_patcher.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, painter.bed.scheduler, steps)
    samples = guider.sample(noise, latent, comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=7)
    return painter.bed.decode(guider.model_patcher, samples)


@pytest.mark.parametrize("kind, gain", [(Scheduled, 4.0), (Jumps, 4.0), (Named, 6.0)])
def test_beside_a_guider_of_another_pack_the_default_is_far_above_fewer_steps(painter, kind, gain):
    full, model = sampled(painter, kind(painter.model)), attach(painter.model, BALANCED)
    ours = decibels(sampled(painter, kind(model)), full)
    steps = -(-STEPS * totals(model)["rows"] // totals(model)["rows_full"])
    assert totals(model)["cost"] < 0.85 and ours > 42.0
    assert ours > decibels(sampled(painter, kind(painter.model), steps), full) + gain
    assert notes(model) == []


def test_beside_a_node_that_guides_at_cfg_1_by_passes_of_its_own_no_step_is_predicted(painter):
    guiders = []

    def guider(model):
        guiders.append(comfy.samplers.CFGGuider(guided_by_itself(model, lambda: guiders[-1])))
        guiders[-1].set_cfg(1.0)
        return guiders[-1]

    model = attach(painter.model, BALANCED)
    ours, full = sampled(painter, guider(model), 12), sampled(painter, guider(painter.model.clone()), 12)
    assert torch.equal(ours, full) and evaluations(model) == {"computed": 12}
    assert messages.CROWDED in notes(model)


class Unseen(Scheduled):
    """Adds what no pass of the network shows."""

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        guided = super().predict_noise(x, timestep, model_options, seed)
        return torch.roll(guided, 3, -1)


def tiny_run(guider):
    guider.set_conds(conditioning("sd3", 1), conditioning("sd3", 2))
    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(3))
    sigmas = torch.linspace(1.0, 0.0, 13)
    return guider.sample(noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"), sigmas)


def test_a_scale_that_cannot_be_found_counts_as_large_and_that_is_said(tiny_models):
    model = attach(tiny_models("sd3"), BALANCED)
    assert relative(tiny_run(Unseen(model)), tiny_run(Unseen(tiny_models("sd3")))) < 0.01
    assert messages.GUIDANCE_UNKNOWN in notes(model)


def test_no_attribute_of_a_guider_ends_a_run(tiny_models):
    ours, theirs = [Odd(attach(tiny_models("sd3"), PRESETS[name](Window()))) for name in ("fast", "none")]
    for guider in (ours, theirs):
        guider.set_cfg(4.5)
    assert relative(tiny_run(ours), tiny_run(theirs)) < 0.1
    json.dumps(last_report(ours.model_patcher))
