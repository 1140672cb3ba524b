"""Generated runs on tiny real models through the host's samplers: whatever is combined, a run does no harm.

The same 150 combinations every time, of family, number format, node, sampler, scheduler or sigmas, cfg, batch,
conditionings and context windows.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from fastercache_pack.fastercache_core.actions import COMPUTE, Action, Step
from fastercache_pack.fastercache_core.calibration.policy import Point, Policy, Setup
from fastercache_pack.fastercache_core.clock import Window
from fastercache_pack.fastercache_core.controllers.planned import MIXINGS, MixSettings
from fastercache_pack.fastercache_core.engine import Engine
from fastercache_pack.fastercache_core.features.storage import StorageSettings
from fastercache_pack.fastercache_core.settings import CacheSettings
from fastercache_pack.nodes.fastercache import PRESETS, automatic
from fastercache_pack.nodes.frdiff import frdiff_settings, policy_settings
from fastercache_pack.nodes.host.feature_pass import FeaturePass
from fastercache_pack.nodes.host.run import CacheRun
from fastercache_pack.nodes.host.wrappers import attach, last_report
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from support.generated import noise_levels, repeatable
from support.guidance import area, cfg_cache, windowed, with_steps
from support.inputs import feature_reuse
from support.tiny import SPECS, build, conditioning

RUNS = 150
FAMILIES = ["sd15", "flux", "wan", "sd3", "sdxl", "chroma", "ltxv", "lumina2", "qwen", "aura", "hydit", "hunyuan3d"]
WHOLE = Window()
BOLD = automatic("bold", 1.0, WHOLE)
POLICY = Policy(
    Setup("another", "euler", "simple", 8, 4.5),
    (1.0, 0.9, 0.8, 0.65, 0.5, 0.35, 0.2, 0.1),
    (Point(0.01, (COMPUTE, COMPUTE, *[Step(Action.PREDICT), COMPUTE] * 3)),),
)
NODES: dict[str, CacheSettings] = {
    **{name: preset(WHOLE) for name, preset in PRESETS.items()},
    "bold": BOLD,
    "bold with attention": replace(BOLD, reuse=feature_reuse("fitted", "all attention")),
    "bold with features": replace(BOLD, reuse=feature_reuse("hold", "automatic")),
    "features": CacheSettings("features", reuse=feature_reuse("fitted", "automatic")),
    "CFG-Cache": cfg_cache(tolerance=0.016),
    "CFG-Cache, published": cfg_cache(5, Window(0.3, 1.0), "hold", "paper"),
    "steps": with_steps(3),
    **{f"FRDiff {mixing}": frdiff_settings(MixSettings(2, mixing), StorageSettings()) for mixing in MIXINGS},
    "a policy": policy_settings(POLICY, StorageSettings()),
}
CONDITIONS = ["plain", "plain", "two", "area", "no negative", "ends early", "begins late"]
SAMPLERS = comfy.samplers.KSampler.SAMPLERS
# The host may never end with these: at sigmas that do not fall, since it splits intervals of its noise for ever; and
# with as many steps as a random network makes it want.
FALLING_ONLY, ENDLESS = [name for name in SAMPLERS if "sde" in name], ["dpm_adaptive"]
SCHEDULED = st.tuples(st.sampled_from(comfy.samplers.KSampler.SCHEDULERS), st.sampled_from([6, 8, 4, 2, 1]))


@dataclass(frozen=True)
class Sampling:
    """One sampling of the host. walk: a sampler, and a scheduler with its steps or sigmas as parts of the largest."""

    family: str
    dtype: torch.dtype
    walk: tuple[str, Any]
    cfg: float
    batch: int
    conditions: str
    windows: str | None = None

    def run(self, model: Any) -> tuple[Tensor, int]:
        """(latent, rows that entered the network)."""
        rows = [0]

        def counted(executor: Any, *args: Any, **kwargs: Any) -> Any:
            rows[0] += args[0].shape[0]
            return executor(*args, **kwargs)

        model = windowed(model, self.windows) if self.windows else model.clone()
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "counted", counted)
        latent, noise = torch.zeros(self.batch, *self.shape), torch.randn(self.batch, *self.shape)
        before, conds = (noise.clone(), latent.clone()), self.conds()
        sampler = comfy.samplers.sampler_object(self.walk[0])
        given = noise, self.cfg, sampler, self.sigmas(model), *conds, latent
        result = comfy.sample.sample_custom(model, *given, disable_pbar=True, seed=3)
        assert all(torch.equal(a, b) for a, b in zip(before, (noise, latent))), "an input was written to"
        assert all(torch.equal(a[0][0], b[0][0]) for a, b in zip(conds, self.conds()) if a)
        return result, rows[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one latent."""
        channels, *size = SPECS[self.family]["lat"]
        return (channels, 5, 8, 8) if self.windows else (channels, *size)

    def conds(self) -> tuple[Any, Any]:
        """(positive, negative)."""
        first, second, third = (conditioning(self.family, seed) for seed in (1, 2, 3))
        return {
            "plain": lambda: (first, second),
            "two": lambda: (first + third, second),
            "area": lambda: (first + area(third, 0, 0), second),
            "no negative": lambda: (first, []),
            "ends early": lambda: (first, conditioning(self.family, 2, end_percent=0.5)),
            "begins late": lambda: (first + conditioning(self.family, 3, start_percent=0.4), second),
        }[self.conditions]()

    def sigmas(self, model: Any) -> Tensor:
        """Sigmas within the model's own range."""
        sampling = model.get_model_object("model_sampling")
        _, levels = self.walk
        if isinstance(levels, tuple):
            return comfy.samplers.calculate_sigmas(sampling, *levels)
        return torch.tensor(levels) * float(sampling.sigma_max)


def among(without: list[str]) -> st.SearchStrategy[str]:
    """A sampler, half of the time Euler."""
    return st.just("euler") | st.sampled_from([name for name in SAMPLERS if name not in without])


PICTURES = st.builds(
    Sampling,
    st.sampled_from(FAMILIES),
    st.sampled_from([torch.float32, torch.float32, torch.bfloat16]),
    st.tuples(among(ENDLESS), SCHEDULED) | st.tuples(among(ENDLESS + FALLING_ONLY), noise_levels([6, 4, 3, 8, 2, 1])),
    st.sampled_from([4.5, 1.0, 0.0, 12.0]),
    st.sampled_from([1, 2]),
    st.sampled_from(CONDITIONS),
)
CLIPS = st.builds(
    Sampling,
    st.just("wan"),
    st.just(torch.float32),
    st.tuples(st.sampled_from(["euler", "dpmpp_2m", "heun", "euler_ancestral"]), SCHEDULED),
    st.sampled_from([4.5, 1.0]),
    st.just(1),
    st.sampled_from(["plain", "two", "no negative"]),
    st.sampled_from(["standard_static", "standard_uniform"]),
)
SAMPLINGS = st.integers(0, 4).flatmap(lambda number: PICTURES if number else CLIPS)


@pytest.fixture(scope="module")
def models() -> Iterator[Any]:
    """Tiny models by family and number format, built once. What was there before is not looked through for leaks."""
    gc.freeze()
    yield cache(lambda family, dtype: build(family, dtype=dtype))
    gc.unfreeze()


def left(model: Any) -> list[Any]:
    """What a run left behind: objects of ours, functions on modules of the network."""
    gc.collect()
    ours = [one for one in gc.get_objects() if isinstance(one, (CacheRun, Engine, FeaturePass))]
    return ours + [module for module in model.model.diffusion_model.modules() if "forward" in vars(module)]


def outcome(sampling: Sampling, model: Any) -> tuple[Tensor, int] | str:
    """What a sampling gives, or how it fails."""
    torch.manual_seed(3)
    try:
        return sampling.run(model)
    except AssertionError:
        raise
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@repeatable(RUNS)
@given(SAMPLINGS, st.sampled_from(sorted(NODES)))
def test_a_run_does_no_harm(models: Any, sampling: Sampling, name: str) -> None:
    model = models(sampling.family, sampling.dtype)
    written = [parameter._version for parameter in model.model.diffusion_model.parameters()]
    theirs, cached = outcome(sampling, model), attach(model, NODES[name])
    ours, again = outcome(sampling, cached), outcome(sampling, cached)
    assert left(model) == []
    assert written == [parameter._version for parameter in model.model.diffusion_model.parameters()]
    if isinstance(theirs, str):  # the host cannot do this at all
        assert isinstance(ours, str)
        return
    assert not isinstance(ours, str) and not isinstance(again, str), ours
    assert ours[0].isfinite().all() or not theirs[0].isfinite().all()
    report = last_report(cached)  # none where nothing was sampled
    assert ours[1] - (report["totals"]["probe_rows"] if report else 0) <= theirs[1]
    assert torch.equal(ours[0].nan_to_num(), again[0].nan_to_num()) and ours[1] == again[1]
