"""Pictures of a trained model: what is skipped must cost less quality than fewer steps at the same cost."""
import json
import sys
from pathlib import Path

import comfy.sample
import comfy.sd
import pytest
import torch
from comfy_extras import (nodes_apg, nodes_cfg, nodes_eps, nodes_fresca, nodes_mahiro,
                          nodes_model_advanced, nodes_slg, nodes_tcfg)
from fastercache_pack.fastercache_core.clock import Window
from fastercache_pack.fastercache_core.gate import GateSettings
from fastercache_pack.fastercache_core.guidance import GuidanceSettings
from fastercache_pack.fastercache_core.metrics import psnr
from fastercache_pack.fastercache_core.reuse import ReuseSettings
from fastercache_pack.fastercache_core.schedule import Interval
from fastercache_pack.fastercache_core.settings import CacheSettings
from fastercache_pack.nodes.fastercache import PRESETS
from fastercache_pack.nodes.host.attach import attach, last_report

TESTBED = Path(__file__).parents[2] / "testbed"
MODEL = TESTBED / "models" / "emoji_mmdit"
sys.path.insert(0, str(TESTBED / "nodes"))
import emoji  # noqa: E402

STEPS, PICTURES = 30, 6
CFG_CACHE = CacheSettings("cfg", GuidanceSettings(Interval(2)), gate=GateSettings())

# Guidance nodes of the host that take a batch of pictures on this model: name -> what puts them on it.
GUIDANCE_NODES = {
    "APG": lambda m: nodes_apg.APG.execute(m, 1.0, 15.0, 0.0),
    "TCFG": lambda m: nodes_tcfg.TCFG.execute(m),
    "CFGZeroStar": lambda m: nodes_cfg.CFGZeroStar.execute(m),
    "CFGNorm": lambda m: nodes_cfg.CFGNorm.execute(m, 1.0),
    "Mahiro": lambda m: nodes_mahiro.Mahiro.execute(m),
    "FreSca": lambda m: nodes_fresca.FreSca.execute(m, 1.0, 1.25, 4),
    "EpsilonScaling": lambda m: nodes_eps.EpsilonScaling.execute(m, 1.005),
    "SLG": lambda m: nodes_slg.SkipLayerGuidanceDiT.execute(m, 1.0, 0.0, 0.3, "2", ""),
    "RescaleCFG": lambda m: nodes_model_advanced.RescaleCFG().patch(m, 0.7),
}


class Painter:
    """The test bed's model with six tuning prompts."""

    def __init__(self):
        self.model = comfy.sd.load_diffusion_model(str(MODEL / "emoji_mmdit.safetensors"))
        self.codec = emoji.Codec.load(MODEL / "emoji_text.safetensors")
        prompts = json.loads((TESTBED / "prompts.json").read_text())["tuning"][:PICTURES]
        self.positive, self.negative = self.encode(prompts), self.encode([""])

    def encode(self, prompts):
        """A CONDITIONING with one row per prompt."""
        context, pooled = self.codec.embed(self.codec.tokens(prompts))
        return [[context.detach(), {"pooled_output": pooled.detach()}]]

    def paint(self, model, steps=STEPS, cfg=4.5, seed=7, sampler="euler"):
        """Pictures [6, 3, 64, 64] in 0..1."""
        latent = torch.zeros(PICTURES, 16, 16, 16)
        noise = comfy.sample.prepare_noise(latent, seed)
        samples = comfy.sample.sample(model, noise, steps, cfg, sampler, "simple", self.positive, self.negative,
                                      latent, seed=seed, disable_pbar=True)
        return self.codec.decode(model.get_model_object("latent_format").process_in(samples))

    def gain(self, settings, node=lambda m: m, **options):
        """(dB above fewer steps at equal cost, cost) of `settings`, both against full sampling."""
        base = node(self.model.clone())
        cached = attach(base, settings)
        full, ours = self.paint(base, **options), self.paint(cached, **options)
        totals = last_report(cached)["totals"]
        steps = -(-options.get("steps", STEPS) * totals["rows"] // totals["rows_full"])
        fewer = self.paint(base, **{**options, "steps": steps})
        return (decibels(ours, full) - decibels(fewer, full)), totals["cost"]


def decibels(a, b):
    """Mean PSNR, 100 for equal pictures."""
    return psnr(a, b).clamp(max=100.0).mean().item()


@pytest.fixture(scope="module")
def painter():
    return Painter()


def settings(weights="none", forecast="linear"):
    """Uncond estimated at every second evaluation from a tenth of sampling on, without a gate."""
    return CacheSettings("fixed", GuidanceSettings(Interval(2, Window(0.1, 1.0)), forecast, weights))


def test_the_default_is_far_above_fewer_steps_at_about_half_the_work(painter):
    gain, cost = painter.gain(PRESETS["balanced"](Window()))
    assert cost < 0.6 and gain > 7.0


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "res_multistep"])
def test_solvers_that_build_on_the_evaluation_before_skip_as_well(painter, sampler):
    gain, cost = painter.gain(PRESETS["balanced"](Window()), sampler=sampler)
    assert cost < 0.8 and gain > 5.0


@pytest.mark.parametrize("steps, cfg", [(12, 4.5), (20, 4.5), (30, 9.0)])
def test_elsewhere_it_gains_or_stays_out(painter, steps, cfg):
    gain, cost = painter.gain(PRESETS["balanced"](Window()), steps=steps, cfg=cfg)
    assert gain > 0.0 or cost == 1.0


def test_an_extrapolated_difference_beats_a_held_one_and_fewer_steps(painter):
    full = painter.paint(painter.model)
    held, linear = (decibels(painter.paint(attach(painter.model, settings(forecast=f))), full)
                    for f in ("hold", "linear"))
    assert linear > held + 3.0
    assert painter.gain(settings())[0] > 0.0


def test_extrapolated_attention_beats_held_attention(painter):
    full = painter.paint(painter.model)
    reused = lambda weight: CacheSettings(weight, reuse=ReuseSettings({"self": Interval(2)}, weight))
    held, extrapolated = (decibels(painter.paint(attach(painter.model, reused(weight))), full)
                          for weight in ("hold", "measured"))
    assert extrapolated > held + 5.0


@pytest.mark.parametrize("name", sorted(GUIDANCE_NODES))
def test_beside_every_guidance_node_the_estimate_beats_fewer_steps_or_stays_out(painter, name):
    def put(model):
        result = GUIDANCE_NODES[name](model)
        return (result.result if hasattr(result, "result") else result)[0]

    gain, cost = painter.gain(CFG_CACHE, put)
    assert gain > 0.0 or cost == 1.0
