"""Calibration in the host: full runs that are recorded, and runs that fit a policy's weights.

Both sample as a KSampler does, on a clone of the model, with an observer of the engine. Nothing of them outlives the
call but plain data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.utils
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ...fastercache_core import messages
from ...fastercache_core.actions import Action, Step
from ...fastercache_core.calibration import search as exact
from ...fastercache_core.calibration.losses import Losses, Reference, fit, overall_rms, subsample
from ...fastercache_core.calibration.policy import Point, Policy, Setup
from ...fastercache_core.clock import Evaluation
from ...fastercache_core.controllers.planned import StepsSettings
from ...fastercache_core.features.reuse import planned_reuse
from ...fastercache_core.forecast import BANDS
from ...fastercache_core.protocols import FeatureUse, Network, Pass, Result, Signals
from ...fastercache_core.settings import CacheSettings
from ...fastercache_core.signal import DifferenceSettings, OutputSettings, Signal
from .compatibility import RunSetup, refusals
from .compiler import nothing_repeated
from .conditioning import Window
from .feature_pass import FeaturePass
from .fingerprint import model_fingerprint, size_of
from .network import HostNetwork
from .policy_checks import with_weights
from .wrappers import observed

# Features are tried at so many evaluations after the one that computed them: each try is a pass.
TRIES = 3

Search = Callable[[Reference, Losses], list[Point]]
Progress = Callable[[], Any]


@dataclass(frozen=True)
class Sampling:
    """What a KSampler is given. latent: [batch, ...], as in LATENT["samples"]."""

    positive: list[Any]
    negative: list[Any]
    latent: Tensor
    seed: int
    steps: int
    cfg: float
    sampler: str
    scheduler: str
    denoise: float = 1.0


class CalibrationError(ValueError):
    """Why this model or this sampling cannot be calibrated, in one sentence."""


class Recorder:
    """Observes one full run, kept as `reference`. Raises CalibrationError where it cannot be recorded."""

    def __init__(self, guidance_scale: float, progress: Progress) -> None:
        """progress: called without arguments after every evaluation."""
        self.reference, self.progress = Reference(guidance_scale), progress
        self.refused: dict[str, str] = {}
        self.guided = False
        self._computed: tuple[float, Tensor, Tensor | None] | None = None

    def started(self, setup: RunSetup) -> None:
        """See RunObserver."""
        self.setup = setup
        if setup.solver:
            self.reference.solver = setup.solver
        everything = _settings(StepsSettings(()), features=True)
        self.refused = refusals(everything, setup)
        if "difference" in self.refused:
            raise CalibrationError(self.refused["difference"])

    def check(self, pass_: Pass | None, window: Window) -> None:
        """See RunObserver."""
        if window is not None:
            raise CalibrationError(messages.CONTEXT_WINDOWS)
        if pass_ is None or not pass_.has_reference or len(pass_.others) > 1:
            raise CalibrationError(messages.ONE_NEGATIVE)

    def before(self, pass_: Pass, network: Network) -> Network:
        """See Observer."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        return network

    def weigh(self, step: Step, pass_: Pass, signals: Signals, outputs: Sequence[Tensor]) -> Step:
        """See Observer."""
        return step

    def after(self, pass_: Pass, action: Action, outputs: Sequence[Tensor]) -> None:
        """See Observer."""
        self.guided |= bool(pass_.others)
        self._computed = float(pass_.space.scale.flatten()[0]), *in_output_space(outputs, pass_)

    def done(self, evaluation: Evaluation, x: Tensor, denoised: Tensor) -> None:
        """See RunObserver."""
        if self._computed is None:
            raise CalibrationError(messages.NOT_RUN_BY_HOST)
        scale, cond, difference = self._computed
        self.reference.add(evaluation, scale, x, denoised, cond, difference)
        self._computed = None
        self.progress()

    def closed(self) -> None:
        """See RunObserver."""

    def forecasts(self) -> tuple[Action, ...]:
        """What may be skipped under this sampler. Raises CalibrationError when nothing may be."""
        if "output" not in self.refused:
            return (Action.PREDICT,)
        if not self.guided and not self.reference.reused:
            raise CalibrationError(messages.nothing_to_skip(self.refused["output"]))
        return (Action.ESTIMATE,) if self.guided else ()


class FeatureRecorder(Recorder):
    """Observes one full run, at whose evaluations the features of the TRIES last ones are tried as well."""

    def __init__(self, guidance_scale: float, progress: Progress) -> None:
        super().__init__(guidance_scale, progress)
        self.caches: list[tuple[int, FeaturePass]] = []  # with the ordinal they were stored at, newest first
        self.flops: dict[FeatureUse, int] = {}  # of a pass that computes everything, and of one with reused features

    def before(self, pass_: Pass, network: Network) -> Network:
        """See Observer."""
        assert isinstance(network, HostNetwork)
        evaluation = pass_.evaluation
        for key, cache in [] if evaluation.is_last else self.caches:
            cache.begin(evaluation, pass_.x)
            result = CountedNetwork(network.using(cache), self.flops).run(pass_, pass_.branches, FeatureUse.REUSE)
            if not result.reused:
                raise CalibrationError(messages.NOT_REUSABLE)
            self.reference.add_reused(key, evaluation.ordinal, *in_output_space(result.outputs, pass_))
        cache = self.caches.pop()[1] if len(self.caches) == TRIES else self._new_cache()
        self.caches.insert(0, (evaluation.ordinal, cache))
        cache.begin(evaluation, pass_.x)
        return CountedNetwork(super().before(pass_, network.using(cache)), self.flops)

    def closed(self) -> None:
        """See RunObserver."""
        for _, cache in self.caches:
            cache.close()
        reused, computed = self.flops.get(FeatureUse.REUSE), self.flops.get(FeatureUse.STORE)
        if reused and computed:
            self.reference.reuse_cost = min(reused / computed, 1.0)

    def _new_cache(self) -> FeaturePass:
        if "reuse" in self.refused:
            raise CalibrationError(self.refused["reuse"])
        return FeaturePass(planned_reuse(), self.setup.guider.model_patcher, self.setup.model_sampling.percent_to_sigma)


@dataclass
class CountedNetwork:
    """A network whose FLOPs are counted the first time that it is run with each use of features."""

    network: Network
    flops: dict[FeatureUse, int]

    def run(self, pass_: Pass, branches: Sequence[Any], features: FeatureUse) -> Result:
        """See Network."""
        if features in self.flops:
            return self.network.run(pass_, branches, features)
        with FlopCounterMode(display=False) as counter:
            result = self.network.run(pass_, branches, features)
        self.flops[features] = counter.get_total_flops()
        return result


class Fitter(Recorder):
    """Observes one run under a point of the curve, and fits the weights of every skipped evaluation.

    steps: the Steps with weights; error: of the final latent, root mean square, relative to its own.
    """

    def __init__(self, reference: Reference, point: Point, progress: Progress) -> None:
        """reference: the full run of the same sampling; point: a Point whose steps are followed."""
        super().__init__(reference.guidance_scale, progress)
        self.reference, self.steps, self.error = reference, list(point.steps), 0.0
        self.skipped = False
        self.strayed: Tensor | None = None  # the last denoised latent, from that of full sampling

    def weigh(self, step: Step, pass_: Pass, signals: Signals, outputs: Sequence[Tensor]) -> Step:
        """See Observer: weights that lead the latent back to the one of full sampling."""
        if step.action is Action.COMPUTE and not (self.skipped and self.reference.solver.corrects):
            return step
        target, predicts = self._target(step, pass_, outputs), step.action is not Action.ESTIMATE
        output, differences = signals.output if predicts else None, signals.differences
        conds = _bands(output) if output else []
        known = differences[0] if differences else output
        assert known is not None
        guided = 1 - self.reference.guidance_scale
        changes = [band * guided for band in _bands(known)] if differences else []
        nodes = [node for node in known.forecaster.nodes for _ in range(BANDS)]
        weights = fit([*conds, *changes], target, nodes, pass_.evaluation.sigma)
        step = replace(step, cond=tuple(weights[: len(conds)]), difference=tuple(weights[len(conds) :]))
        self.steps[pass_.evaluation.ordinal] = step
        return step

    def after(self, pass_: Pass, action: Action, outputs: Sequence[Tensor]) -> None:
        """See Observer."""
        self.skipped |= action is not Action.COMPUTE

    def done(self, evaluation: Evaluation, x: Tensor, denoised: Tensor) -> None:
        """See RunObserver."""
        self.strayed = subsample(denoised) - self.reference.denoised(evaluation.ordinal)
        if evaluation.is_last:
            full = self.reference.final
            self.error = overall_rms(subsample(denoised) - full) / overall_rms(full)
        self.progress()

    def _target(self, step: Step, pass_: Pass, outputs: Sequence[Tensor]) -> Tensor:
        """What the weighted values must add up to, [batch, elements]."""
        space, x = pass_.space, pass_.x
        skip, scale = space.denoised(torch.zeros_like(x)), float(space.scale.flatten()[0])
        target = self.reference.target(pass_.evaluation.ordinal, x, skip, scale, self.strayed)
        if step.action is Action.ESTIMATE:
            return target - subsample(space.output(outputs[pass_.reference]))
        if step.action is Action.MIX:
            return (target - step.mix * self.reference.guided(*in_output_space(outputs, pass_))) / (1 - step.mix)
        return target


def _bands(signal: Signal) -> list[Tensor]:
    """All bands of all values of a signal, each [batch, elements]."""
    return [subsample(band) for value in signal.forecaster.values() for band in value]


def in_output_space(outputs: Sequence[Tensor], pass_: Pass) -> tuple[Tensor, Tensor | None]:
    """(cond, difference) of denoised outputs of all branches, in output space; difference None without others."""
    cond, others = outputs[pass_.reference], pass_.others
    return pass_.space.output(cond), pass_.space.difference(outputs[others[0]], cond) if others else None


def find_policy(
    model: Any, sampling: Sampling, budget: float, search: Search | None = None, features: bool = False
) -> Policy:
    """The policy for `sampling` of `model` (ModelPatcher), at the best point within `budget`.

    search: None for the exact one. The whole batch of the latent is sampled twice: in full, and to fit the weights of
    the point. features: reused features are tried as well, TRIES passes more at every evaluation. Raises
    CalibrationError where calibration is not possible.
    """
    bar = comfy.utils.ProgressBar(2 * sampling.steps)
    reference, losses = recorded(model, sampling, features, lambda: bar.update(1))
    points = (search or exact.find_points)(reference, losses)
    return chosen(model, sampling, reference, points, budget, lambda: bar.update(1))


def recorded(
    model: Any, sampling: Sampling, features: bool = False, progress: Progress = lambda: None
) -> tuple[Reference, Losses]:
    """One full run, and what skipping would cost; see `find_policy`. progress: called after every evaluation."""
    recorder = (FeatureRecorder if features else Recorder)(sampling.cfg, progress)
    with nothing_repeated() if features else nullcontext():
        sample(model, sampling, recorder)
    return recorder.reference, Losses(recorder.reference, recorder.forecasts())


def chosen(
    model: Any,
    sampling: Sampling,
    reference: Reference,
    points: Sequence[Point],
    budget: float,
    progress: Progress = lambda: None,
) -> Policy:
    """The policy of `points` at the best one within `budget`, fitted and measured in one more run."""
    policy = Policy(setup(model, sampling), tuple(reference.sigmas), tuple(points)).at(budget)
    return fitted(model, sampling, reference, policy, progress)


def fitted(model: Any, sampling: Sampling, reference: Reference, policy: Policy, progress: Progress) -> Policy:
    """The policy with weights for its chosen point, and with the error that was measured there."""
    fitter = Fitter(reference, policy.points[policy.chosen], progress)
    sample(model, sampling, fitter, StepsSettings(list(zip(reference.sigmas, fitter.steps, strict=True)), fewest=1))
    points = list(policy.points)
    points[policy.chosen] = replace(points[policy.chosen], error=fitter.error, steps=tuple(fitter.steps))
    return replace(policy, points=tuple(points))


def sample(model: Any, sampling: Sampling, observer: Recorder, plan: StepsSettings = StepsSettings(())) -> Tensor:
    """Sample under a plan as a KSampler does, whatever nodes of this pack are on the model."""
    reuses = any(step.action.reuses for _, step in plan.steps)
    watched = observed(model, _settings(plan, reuses), observer)
    latent = comfy.sample.fix_empty_latent_channels(watched, sampling.latent)
    return comfy.sample.sample(
        watched,
        comfy.sample.prepare_noise(latent, sampling.seed),
        sampling.steps,
        sampling.cfg,
        sampling.sampler,
        sampling.scheduler,
        sampling.positive,
        sampling.negative,
        latent,
        denoise=sampling.denoise,
        disable_pbar=True,
        seed=sampling.seed,
    )


def setup(model: Any, sampling: Sampling) -> Setup:
    """What a policy found for `sampling` of `model` is for."""
    shift = getattr(model.get_model_object("model_sampling"), "shift", None)
    size = size_of(comfy.sample.fix_empty_latent_channels(model, sampling.latent).shape)
    return Setup(
        model_fingerprint(model),
        sampling.sampler,
        sampling.scheduler,
        sampling.steps,
        sampling.cfg,
        None if shift is None else float(shift),
        size,
    )


def _settings(plan: StepsSettings, features: bool) -> CacheSettings:
    reuse = planned_reuse() if features else None
    return with_weights(CacheSettings("calibration", plan, DifferenceSettings(), OutputSettings(), reuse))
