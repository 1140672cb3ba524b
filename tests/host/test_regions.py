"""Latents that are sampled in parts: windows and tiles are known by what they are, or computed."""

import comfy.sample
import comfy.samplers
import pytest
import torch
from fastercache_pack.fastercache_core import messages
from fastercache_pack.fastercache_core.clock import Interval, Window
from fastercache_pack.fastercache_core.features.reuse import ReuseSettings
from fastercache_pack.fastercache_core.settings import CacheSettings
from fastercache_pack.nodes.fastercache import PRESETS
from fastercache_pack.nodes.host.wrappers import attach

from support.guidance import cfg_cache, windowed, with_steps
from support.others import in_tiles, in_windows
from support.runs import actions, evaluations, notes, relative, totals
from support.tiny import conditioning, sample
from support.trained import Painter
from testbed.beds import BEDS

STEPS = 16
REUSE = CacheSettings("reuse", reuse=ReuseSettings({"self": Interval(2)}, "hold"))
VIDEO = torch.zeros(1, 16, 6, 8, 8)


BATCH = torch.zeros(6, 16, 8, 8)


@pytest.mark.parametrize("settings", [cfg_cache(), with_steps(), REUSE], ids=["cfg", "steps", "features"])
@pytest.mark.parametrize("moving", [False, True])
def test_windows_that_another_pack_tells_are_kept_apart(tiny_models, settings, moving):
    put = in_windows("its own", moving, dim=0)
    theirs = sample(put(tiny_models("sd3")), "sd3", steps=STEPS, latent=BATCH)
    for model in (put(attach(tiny_models("sd3"), settings)), attach(put(tiny_models("sd3")), settings)):
        ours = sample(model, "sd3", steps=STEPS, latent=BATCH)
        assert 0 < relative(ours, theirs) < 0.15 or (moving and torch.equal(ours, theirs))
        assert moving or set(evaluations(model)) != {"computed"}


@pytest.mark.parametrize("settings", [cfg_cache(), with_steps(), REUSE], ids=["cfg", "steps", "features"])
def test_parts_that_nobody_tells_are_computed_and_that_is_said(tiny_models, settings):
    put = in_windows("nowhere", moving=True, dim=0)
    theirs = sample(put(tiny_models("sd3")), "sd3", steps=STEPS, latent=BATCH)
    model = attach(put(tiny_models("sd3")), settings)
    assert torch.equal(sample(model, "sd3", steps=STEPS, latent=BATCH), theirs)
    assert evaluations(model) == {"computed": STEPS} and totals(model)["cost"] == 1.0
    assert notes(model) == [messages.UNKNOWN_REGION]


@pytest.mark.parametrize("family", ["sd3", "sd15"])
@pytest.mark.parametrize("moving", [False, True], ids=["still", "moving"])
def test_features_of_tiles_are_reused_only_where_the_tiles_stay(tiny_models, family, moving):
    theirs = sample(in_tiles(tiny_models(family), moving), family, steps=STEPS)
    model = attach(in_tiles(tiny_models(family), moving), REUSE)
    ours = sample(model, family, steps=STEPS)
    assert torch.equal(ours, theirs) is moving and relative(ours, theirs) < 0.05
    assert (evaluations(model).get("reused", 0) > 5) is not moving
    assert messages.TILES_MOVE in notes(model) or not moving


@pytest.mark.parametrize("schedule", ["standard_static", "standard_uniform"])
def test_the_hosts_windows_are_kept_apart_where_they_move(tiny_models, schedule):
    for settings in (cfg_cache(), REUSE):
        theirs = sample(windowed(tiny_models("wan"), schedule), "wan", steps=STEPS, latent=VIDEO)
        model = attach(windowed(tiny_models("wan"), schedule), settings)
        assert relative(sample(model, "wan", steps=STEPS, latent=VIDEO), theirs) < 0.05
        assert messages.UNKNOWN_REGION not in notes(model)


@pytest.mark.parametrize("schedule", ["standard_static", "standard_uniform", "looped_uniform"])
def test_a_trained_model_in_windows_is_never_below_fewer_steps(schedule):
    bed = BEDS["wan"]  # the host's windows take one clip at a time
    painter = Painter("wan", prompts=bed.prompts("tuning")[:1])
    gain, cost = painter.gain(PRESETS["balanced"](Window()), lambda m: windowed(m, schedule))
    assert gain >= 0.0 and cost <= 1.0


def test_where_something_else_moves_the_latent_what_was_known_is_dropped(tiny_models):
    """A node that rolls the latent half way, unseen by anybody."""

    def rolled(settings=None):
        model = tiny_models("sd3")
        model = attach(model, settings) if settings else model
        at = [0]

        def sampler(net, x, sigmas, extra_args=None, callback=None, disable=None):
            for i in range(len(sigmas) - 1):
                at[0] += 1
                x = x.roll(4, -1) if i == 7 else x
                denoised = net(x, sigmas[i] * x.new_ones([len(x)]), **extra_args)
                x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
            return x

        sampler.__name__ = "sample_euler"
        latent = torch.zeros(1, 16, 16, 16)
        noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(3))
        both = conditioning("sd3", 1), conditioning("sd3", 2)
        sigmas = torch.linspace(1, 0, STEPS + 1)
        made = comfy.sample.sample_custom(
            model, noise, 4.0, comfy.samplers.KSAMPLER(sampler), sigmas, *both, latent, disable_pbar=True, seed=3
        )
        return made, model

    theirs = rolled()[0]
    ours, model = rolled(with_steps())
    assert relative(ours, theirs) < 0.2 and evaluations(model)["predicted"] > 2
    assert actions(model)[7:10] == ["computed"] * 3
    assert messages.LATENT_MOVED in notes(model)
