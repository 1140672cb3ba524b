"""Features from the cache as an action of the adaptive controller: with samplers that let no step be predicted."""

from dataclasses import replace

import comfy.sample
import pytest
import torch
from fastercache_pack.fastercache_core import messages
from fastercache_pack.fastercache_core.clock import Window
from fastercache_pack.fastercache_core.features.probe import Probe
from fastercache_pack.fastercache_core.metrics import psnr
from fastercache_pack.fastercache_core.signal import Signal
from fastercache_pack.nodes.fastercache import automatic
from fastercache_pack.nodes.host.wrappers import attach, last_report

from support import tiny
from support.features import chosen_by_node
from support.guidance import area, windowed
from support.runs import evaluations, notes, totals
from testbed.beds import BEDS

STEPS, PICTURES = 30, 4


class Studio:
    """A bed's model with tuning prompts; counts the passes of its network, and those of its middle."""

    def __init__(self, bed):
        self.bed, self.model = BEDS[bed], BEDS[bed].load()
        self.prompts = self.bed.prompts("tuning")[8 : 8 + PICTURES]
        self.passes = self.middles = 0
        network = self.model.model.diffusion_model
        network.register_forward_pre_hook(lambda *_: self._count("passes"))
        if hasattr(network, "middle_block"):
            network.middle_block[0].in_layers[-1].register_forward_pre_hook(lambda *_: self._count("middles"))

    def paint(self, model, sampler="euler_ancestral", cfg=4.5, steps=STEPS, seed=11):
        """Pictures [PICTURES, ...] in 0..1, counted anew."""
        self.passes = self.middles = 0
        latent = self.bed.empty(PICTURES)
        noise = comfy.sample.prepare_noise(latent, seed)
        result = comfy.sample.sample(
            model,
            noise,
            steps,
            cfg,
            sampler,
            self.bed.scheduler,
            self.bed.conditioning(self.prompts),
            self.bed.conditioning([""]),
            latent,
            seed=seed,
            disable_pbar=True,
        )
        return self.bed.decode(model, result)

    def _count(self, what):
        setattr(self, what, getattr(self, what) + 1)


def with_features(settings, forecast="fitted", **options):
    return replace(settings, reuse=chosen_by_node(forecast=forecast, **options).reuse)


def wanted(target):
    return automatic(f"{target} dB", float(target), Window())


def decibels(pictures, full):
    return psnr(pictures.flatten(1), full.flatten(1))


def probes(model):
    """How often features were probed in the last run."""
    rows, probed = (totals(model)[name] for name in ("rows_full", "probe_rows"))
    return probed * STEPS // rows


@pytest.fixture(scope="module")
def unet():
    return Studio("unet")


@pytest.fixture(scope="module")
def mmdit():
    return Studio("mmdit")


@pytest.fixture(scope="module")
def painted(unet):
    """Full sampling, the automatic mode alone and with features, on the UNet with a sampler that adds noise."""
    full = unet.paint(unet.model)
    alone, both = attach(unet.model, wanted(42)), attach(unet.model, with_features(wanted(42)))
    skipped, reused = unet.paint(alone), unet.paint(both)
    return full, (alone, skipped), (both, reused), (unet.passes, unet.middles)


def test_with_a_sampler_that_adds_noise_features_save_more_than_the_negative_pass_does(painted):
    full, (alone, _), (both, reused), (_, middles) = painted
    close = decibels(reused, full)
    assert evaluations(both)["reused"] >= 4 and close.mean() > 42 and close.min() > 36
    assert 2 * middles < evaluations(alone)["computed"] * 2 + evaluations(alone)["estimated"], (
        "the middle runs for fewer rows"
    )


def test_every_pass_is_in_the_report(painted):
    _, _, (both, _), (passes, middles) = painted
    assert passes == STEPS + probes(both) and 0 < probes(both) <= 3
    assert middles == STEPS - evaluations(both)["reused"], "neither reused passes nor probes run what they leave out"


def test_features_make_no_difference_where_nothing_is_reused(mmdit):
    """An MMDiT answers to noise: its output changes so much that no probe is worth its cost, and that is said."""
    full = mmdit.paint(mmdit.model)
    model = attach(mmdit.model, with_features(wanted(42)))
    assert torch.equal(mmdit.paint(model), full)
    assert "reused" not in evaluations(model) and totals(model)["cost"] == 1.0
    assert messages.features_not_reused(were_probed=False, steps=last_report(model)["run"]["steps"]) in notes(model)


def test_where_steps_can_be_predicted_no_feature_is_cached_and_that_is_said(mmdit):
    alone, both = attach(mmdit.model, wanted(36)), attach(mmdit.model, with_features(wanted(36)))
    assert torch.equal(mmdit.paint(alone, "euler"), mmdit.paint(both, "euler")) and "predicted" in evaluations(both)
    assert totals(both)["peak_cache_bytes"] == totals(alone)["peak_cache_bytes"] and not probes(both)
    assert messages.features_not_needed("sample_euler") in notes(both)


def test_without_negative_pass_features_fill_what_cannot_be_predicted(unet):
    full = unet.paint(unet.model, cfg=1.0)
    model = attach(unet.model, with_features(wanted(36)))
    assert decibels(unet.paint(model, cfg=1.0), full).min() > 33
    assert evaluations(model)["reused"] > 2 and evaluations(model)["computed"] < STEPS - 3


def test_without_room_for_features_nothing_runs_twice(unet):
    alone, cramped = attach(unet.model, wanted(42)), attach(unet.model, with_features(wanted(42), memory_gb=1e-6))
    expected = unet.paint(alone)
    passes = unet.passes
    assert torch.equal(unet.paint(cramped), expected) and unet.passes == passes and not probes(cramped)


def test_a_second_run_is_the_same_as_the_first(unet, painted):
    _, _, (both, reused), _ = painted
    assert torch.equal(unet.paint(both), reused)


@pytest.fixture
def only_features(monkeypatch):
    """Forecasts are useless and features perfect: these are reused wherever they can be."""
    observe, probed = Signal.observe, Probe.observe

    def useless(self, *args):
        observe(self, *args)
        if self.error is not None:
            self.error = 1e6 * torch.ones_like(self.error)

    monkeypatch.setattr(Signal, "observe", useless)
    monkeypatch.setattr(Probe, "observe", lambda self, at, error, age, deep: probed(self, at, 0 * error, age, True))


# Steps so short that the latent hardly moves: what is held is what would be computed. The step after the last reuse is
# long, so that the picture shows what was held.
STEADY = torch.tensor([0.7 - 1e-5 * i for i in range(6)] + [0.4, 0.0])
AREAS = tiny.conditioning("sd15", 1) + area(tiny.conditioning("sd15", 6), 0, 0)
CASES = {name: dict(name=name) for name in ("sd15", "sdxl", "sd3", "flux", "chroma", "wan", "ltxv", "lumina2", "qwen")}
CASES |= {
    "a batch": dict(name="sd15", batch=2),
    "areas": dict(name="sd15", positive=AREAS),
    "windows": dict(name="wan", latent=torch.zeros(1, 16, 7, 8, 8), make=windowed),
    "no negative": dict(name="flux", cfg=1.0),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_reused_is_what_the_host_would_compute_while_the_latent_stands_still(tiny_models, only_features, case):
    options = {"make": lambda model: model, **CASES[case]}
    name, make = options.pop("name"), options.pop("make")
    theirs = tiny.sample(make(tiny_models(name)), name, sampler="gradient_estimation", sigmas=STEADY, **options)
    model = attach(make(tiny_models(name)), with_features(wanted(42), "hold"))
    result = tiny.sample(model, name, sampler="gradient_estimation", sigmas=STEADY, **options)
    assert (result - theirs).norm() < 3e-3 * theirs.norm()
    assert evaluations(model)["reused"] >= 2 and set(evaluations(model)) == {"computed", "reused"}
