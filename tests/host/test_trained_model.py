"""Pictures of a trained model: what is skipped must cost less quality than fewer steps at the same cost."""

import pytest
from comfy_extras import (
    nodes_apg,
    nodes_cfg,
    nodes_eps,
    nodes_fresca,
    nodes_mahiro,
    nodes_model_advanced,
    nodes_slg,
    nodes_tcfg,
)
from fastercache_pack.fastercache_core.clock import Interval, Window
from fastercache_pack.fastercache_core.features.reuse import ReuseSettings
from fastercache_pack.fastercache_core.settings import CacheSettings
from fastercache_pack.nodes.fastercache import PRESETS
from fastercache_pack.nodes.host.wrappers import attach
from fastercache_pack.nodes.ksampler import FasterCacheKSampler

from support.guidance import cfg_cache
from support.runs import evaluations, totals
from support.trained import Painter, decibels
from testbed.beds import BEDS

BALANCED = PRESETS["balanced"](Window())

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


@pytest.fixture(scope="module")
def painter():
    return Painter()


@pytest.mark.parametrize(
    "sampler, most, least", [("euler", 0.6, 7.0), ("dpmpp_2m", 0.8, 5.0), ("res_multistep", 0.8, 5.0)]
)
def test_the_default_is_far_above_fewer_steps(painter, sampler, most, least):
    """Also with solvers that build on the evaluation before. most: cost; least: dB above fewer steps."""
    gain, cost = painter.gain(BALANCED, sampler=sampler)
    assert cost < most and gain > least


@pytest.mark.parametrize("steps, cfg, most, least", [(20, 4.5, 0.75, 5.0), (30, 9.0, 0.85, 7.0)])
def test_elsewhere_it_skips_less_and_gains_as_well(painter, steps, cfg, most, least):
    gain, cost = painter.gain(BALANCED, steps=steps, cfg=cfg)
    assert cost < most and gain > least


@pytest.mark.parametrize("bed", ["mmdit", "unet", "wan"])
def test_the_ksampler_saves_work_as_it_comes(bed):
    """At its own default steps and cfg."""
    own = {entry.id: entry.default for entry in FasterCacheKSampler.define_schema().inputs if hasattr(entry, "default")}
    assert own["preset"] == "balanced" and own["method"] == "automatic"
    gain, cost = Painter(bed, BEDS[bed].prompts("tuning")[:2]).gain(BALANCED, steps=own["steps"], cfg=own["cfg"])
    assert cost < 0.8 and gain > 3.0


def test_with_too_few_steps_it_stays_out(painter):
    model = attach(painter.model, BALANCED)
    assert decibels(painter.paint(model, steps=12), painter.full(steps=12)) == 100.0
    assert evaluations(model) == {"computed": 12}


def test_an_extrapolated_difference_beats_a_held_one_and_fewer_steps(painter):
    """At every second evaluation from a tenth of sampling on, whatever the error."""
    full, late = painter.full(), Window(0.1, 1.0)
    held = decibels(painter.paint(attach(painter.model, cfg_cache(window=late, forecast="hold"))), full)
    linear = attach(painter.model, cfg_cache(window=late, forecast="linear"))
    near = decibels(painter.paint(linear), full)
    fewer = painter.full(steps=-(-30 * totals(linear)["rows"] // totals(linear)["rows_full"]))
    assert totals(linear)["cost"] < 0.8
    assert near > held + 3.0 and near > decibels(fewer, full) + 2.0


def test_extrapolated_attention_beats_held_attention(painter):
    def near(weight):
        model = attach(painter.model, CacheSettings(weight, reuse=ReuseSettings({"self": Interval(2)}, weight)))
        picture = painter.paint(model)
        assert evaluations(model)["reused"] >= 10
        return decibels(picture, painter.full())

    assert near("fitted") > near("hold") + 5.0


@pytest.mark.parametrize("name", sorted(GUIDANCE_NODES))
def test_beside_every_guidance_node_the_estimate_beats_fewer_steps(painter, name):
    def put(model):
        result = GUIDANCE_NODES[name](model)
        return (result.result if hasattr(result, "result") else result)[0]

    gain, cost = painter.gain(cfg_cache(tolerance=16e-3), put)
    assert cost < 0.85 and gain > 1.0
