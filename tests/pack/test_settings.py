"""What the nodes make of their inputs."""

import pytest
import torch
from fastercache_pack.fastercache_core.clock import Interval, Window
from fastercache_pack.fastercache_core.controllers.adaptive import AdaptiveSettings
from fastercache_pack.fastercache_core.controllers.interval import IntervalSettings
from fastercache_pack.fastercache_core.settings import CacheSettings
from fastercache_pack.fastercache_core.signal import DifferenceSettings, OutputSettings
from fastercache_pack.nodes.fastercache import PRESETS, FasterCache
from fastercache_pack.nodes.features import DEPTHS, SAVING, feature_settings, intervals, storage_settings

SPAN = Window(0.1, 0.9)
STORAGE = {"memory_gb": 0.0, "memory_device": "same", "memory_dtype": "native"}


@pytest.mark.parametrize("preset, target", [("exact-looking", 50.0), ("balanced", 42.0), ("fast", 36.0)])
def test_presets_have_a_target(preset, target):
    wanted = CacheSettings(preset, AdaptiveSettings(target, SPAN), DifferenceSettings(), OutputSettings())
    assert PRESETS[preset](SPAN) == wanted


@pytest.mark.parametrize("start, late", [(0.1, 1 / 3), (0.5, 0.5)])
def test_paper_estimates_four_of_five_after_a_third_and_reuses_every_second_attention(start, late):
    settings = PRESETS["paper"](Window(start, 0.9))
    assert settings.controller == IntervalSettings(estimate=Interval(5, Window(late, 0.9)))
    assert (settings.difference.forecast, settings.difference.weights, settings.output) == ("hold", "paper", None)
    assert settings.reuse.intervals == dict.fromkeys(("self", "temporal"), Interval(2, Window(start, 0.9)))
    assert (settings.reuse.weight, settings.reuse.w) == ("ramp", 1.0)


def reuse(weight, depth="automatic", preset=None, **storage):
    inputs = {"feature_reuse": weight, "reuse_depth": depth, **STORAGE, **storage}
    return feature_settings(FasterCache, inputs, preset, SPAN)


def test_features_are_those_of_the_preset_or_none():
    paper = PRESETS["paper"](SPAN).reuse
    assert reuse("as preset") is None and reuse("off", preset=paper) is None
    kept = reuse("as preset", preset=paper, memory_gb=1.5, memory_dtype="fp8")
    assert kept.intervals == paper.intervals and (kept.storage.budget, kept.storage.dtype) == (1_500_000_000, "fp8")


@pytest.mark.parametrize("weight, w", [("fitted", 0.5), ("ramp", 1.0), ("hold", 0.5)])
def test_automatic_depth_tries_all_that_save(weight, w):
    found = reuse(weight)
    assert (found.weight, found.w) == (weight, w)
    assert found.depths == tuple((name, intervals(name, SPAN)) for name in SAVING)


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_depth_stays_inside_the_window_and_ends_before_it(depth):
    found = reuse("fitted", depth)
    assert found.depths == () and found.intervals
    windows = [interval.window for interval in found.intervals.values()]
    assert all(SPAN.start <= w.start < w.end < SPAN.end for w in windows)


@pytest.mark.parametrize("name, value", [("feature_reuse", "measured"), ("reuse_depth", ""), ("memory_dtype", "fp4")])
def test_a_wrong_choice_is_named(name, value):
    with pytest.raises(ValueError, match=f"^FasterCache: {name} is '{value}'; it must be one of: "):
        FasterCache.execute(None, **{name: value})


def test_a_second_gpu_must_be_there(monkeypatch):
    inputs = {**STORAGE, "memory_device": "second gpu"}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"^FasterCache: memory_device is 'second gpu', but .* 1 GPU"):
        storage_settings(FasterCache, inputs)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert storage_settings(FasterCache, inputs).device == "cuda:1"
