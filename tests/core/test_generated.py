"""Generated runs of the engine: whatever is combined, a run does no harm.

The same 2000 combinations every time, of a model's shape and roughness, sampler, sigmas, cfg, branches that come and
go, and settings.
"""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastercache_core.actions import COSTS, Action, Step
from fastercache_core.clock import Interval, Window
from fastercache_core.controllers.adaptive import AdaptiveSettings
from fastercache_core.controllers.interval import IntervalSettings
from fastercache_core.controllers.planned import MIXINGS, MixSettings, StepsSettings
from fastercache_core.features.reuse import planned_reuse
from fastercache_core.forecast import FORECASTERS
from fastercache_core.law import Law
from fastercache_core.paper_weights import WEIGHTS
from fastercache_core.protocols import FeatureUse
from fastercache_core.settings import CacheSettings
from fastercache_core.signal import DifferenceSettings, OutputSettings
from fastercache_core.solvers import SOLVERS, UNKNOWN
from support.engine import FULL, Model, Run, Sampling
from support.generated import noise_levels, repeatable
from support.samplers import SAMPLERS

RUNS = 2000
SHAPES = [(4, 4, 4), (2, 2, 4, 4), (8, 6), (1, 1, 1)]  # a picture, a clip, a list of tokens, a single number
DTYPES = [torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16]
BOTH, OTHERS = (0, 1), ((0,), (1,), (0, 1, 2), ())  # branches that are active
LETTERS = {action.letter: Step(action, COSTS.get(action, 0.5), 0.5) for action in Action}
# Errors of forecasts seem to do no harm, so that as much is skipped as can be.
BOLD = replace(SOLVERS["sample_euler"], law=Law(120.0, 0.0, 0.0))

COUNTS = [8, 12, 10, 6, 7, 9, 5, 3, 2, 1]  # of steps
FRACTIONS = st.integers(0, 20).map(lambda part: part / 20)
WINDOWS = st.one_of(st.just(Window()), st.just(Window()), st.builds(Window, FRACTIONS, FRACTIONS))
INTERVALS = st.builds(Interval, st.integers(1, 6), WINDOWS)
FORECASTS = st.sampled_from(FORECASTERS)
DIFFERENCES = st.builds(
    DifferenceSettings, FORECASTS, st.sampled_from(WEIGHTS), st.sampled_from([0.2, 0.0, 0.5]), st.integers(1, 8)
)
OUTPUTS = st.builds(OutputSettings, FORECASTS)
# Steps of a policy, of which each run takes as many as it has: by letters, and what they need to be taken.
PLANS = st.tuples(st.text("CCMREP", min_size=20, max_size=20), st.sampled_from([None, 1]))
CONTROLLERS = st.one_of(
    st.builds(AdaptiveSettings, st.sampled_from([0.0, 20.0, 36.0, 50.0]), WINDOWS, st.integers(1, 8)),
    st.builds(
        IntervalSettings, INTERVALS | st.none(), INTERVALS | st.none(), st.sampled_from([None, None, 0.0, 0.016, 1.0])
    ),
    st.builds(MixSettings, st.integers(1, 5), st.sampled_from(MIXINGS), bias=FRACTIONS, window=WINDOWS),
    PLANS,
)
METHODS = st.sampled_from([(True, True)] * 4 + [(True, False), (False, True), (False, False)])
SETTINGS = st.tuples(CONTROLLERS, METHODS, DIFFERENCES, OUTPUTS, st.sampled_from([None, planned_reuse()]))


def settings_of(drawn: Any, sigmas: Sequence[float]) -> CacheSettings:
    """The settings that were drawn, for a run at `sigmas`."""
    controller, (differs, predicts), difference, output, reuse = drawn
    if isinstance(controller, tuple):
        letters, fewest = controller
        controller = StepsSettings(list(zip(sigmas, map(LETTERS.get, "CC" + letters))), fewest)
    return CacheSettings("generated", controller, difference if differs else None, output if predicts else None, reuse)


@dataclass(frozen=True)
class Switch:
    """One value above a sigma, another one from there on."""

    at: float
    before: Any
    after: Any

    def __call__(self, sigma: float) -> Any:
        return self.before if sigma > self.at else self.after


MODELS = st.builds(
    lambda batch, shape, dtype, drift, rough: Model(range(batch), drift, lambda sigma: rough, rough, dtype, shape),
    st.integers(1, 3),
    st.sampled_from(SHAPES),
    st.sampled_from(DTYPES),
    st.sampled_from([1.0, 0.0, 4.0]),
    st.sampled_from([0.0, 0.0, 0.01, 1.0]),
)
ACTIVE = st.builds(
    Switch, FRACTIONS, st.sampled_from([BOTH] * 20 + [*OTHERS]), st.sampled_from([BOTH] * 20 + [*OTHERS])
)
SAMPLINGS = st.builds(
    Sampling,
    MODELS,
    st.sampled_from(sorted(SAMPLERS)),
    noise_levels(COUNTS),
    st.sampled_from([4.5, 1.0, 1.001, 0.0, -2.0, 12.0, 100.0]),
    ACTIVE,
    st.builds(Switch, st.sampled_from([2.0, 2.0, 0.5, 0.2]), st.just("before"), st.just("after")),
    st.sampled_from([0] * 8 + [1, None]),
    st.sampled_from([None, None, BOLD, BOLD, UNKNOWN, *SOLVERS.values()]),
    late=st.booleans(),
    deep=st.booleans(),
)


@pytest.fixture(scope="module", autouse=True)
def nothing_else_to_collect() -> Iterator[None]:
    """What was there before is not looked through after every run."""
    gc.freeze()
    yield
    gc.unfreeze()


def in_full(sampling: Sampling) -> Run:
    """The run in which no engine is at work."""
    run = Run(sampling, FULL)
    run.latent = SAMPLERS[sampling.sampler](run.plain, sampling.model.noise, sampling.sigmas)
    return run


def rows(run: Run) -> int:
    """Rows that entered the network, but for those of probes."""
    return sum(len(running) for use, running in run.network.calls if use is not FeatureUse.PROBE)


def same(a: Tensor, b: Tensor) -> bool:
    """True for equal bits, where what is no number counts as equal."""
    return torch.equal(a.nan_to_num(), b.nan_to_num())


@repeatable(RUNS)
@given(SAMPLINGS, SETTINGS)
def test_a_run_does_no_harm(sampling: Sampling, drawn: Any) -> None:
    settings, noise = settings_of(drawn, sampling.sigmas), sampling.model.noise
    written, sigmas = noise._version, [*sampling.sigmas]
    full, run, again = in_full(sampling), sampling.run(settings), sampling.run(settings)
    assert run.latent.isfinite().all() or not full.latent.isfinite().all()
    assert rows(run) <= rows(full) and (settings.reuse or run.rows <= full.rows)
    assert run.letters == again.letters and same(run.latent, again.latent)
    assert same(run.latent, full.latent) or set(run.letters) != {"C"}
    assert noise._version == written and sampling.sigmas == sigmas
    spent = run.engine.finish()
    assert spent is None or spent >= 0 or math.isnan(spent)
    run.engine.reset()
    assert run.engine.tensors() == []
    engine = weakref.ref(run.engine)
    del run
    gc.collect()
    assert engine() is None
