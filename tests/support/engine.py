"""Whole sampling runs of the engine in milliseconds: a flow model that is a formula, and a cache of its features."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastercache_core.actions import Action
from fastercache_core.clock import Clock
from fastercache_core.engine import Engine, Outcome
from fastercache_core.features.reuse import planned_reuse
from fastercache_core.protocols import FeatureUse, Observer, Pass, Result, RunContext
from fastercache_core.settings import CacheSettings
from fastercache_core.signal import DifferenceSettings, OutputSettings, rms
from fastercache_core.solvers import SOLVERS, Solver

from .grids import even
from .samplers import SAMPLERS, Sampler

SHAPE = (4, 8, 8)
FULL = CacheSettings("everything computed")


def all_on(controller: Any, forecast: str = "fitted", reuse: bool = False) -> CacheSettings:
    """`controller` with predicted outputs and differences; reuse: and with features."""
    features = planned_reuse() if reuse else None
    return CacheSettings("test", controller, DifferenceSettings(forecast), OutputSettings(forecast), features)


class FlowSpace:
    """The output space of a flow model: denoised = x - sigma * velocity. See protocols.Space."""

    def __init__(self, sigma: float, x: Tensor, parts: tuple[int, ...] = ()) -> None:
        self.sigma, self.x, self.parts = sigma, x, parts
        self.scale = x.new_full((len(x), *[1] * (x.ndim - 1)), -sigma)

    def output(self, denoised: Tensor) -> Tensor:
        """The velocity behind `denoised`."""
        return (denoised - self.x) / self.scale

    def denoised(self, output: Tensor) -> Tensor:
        """The denoised latent of a velocity."""
        return self.x + self.scale * output

    def unit(self, latent: Tensor) -> Tensor:
        """What makes errors of the velocity relative to `latent`."""
        size = rms(latent, self.parts)
        return self.scale.reshape(-1, *[1] * (size.ndim - 1)).abs() / (self.sigma * size).clamp_min(1e-9)

    def add(self, denoised: Tensor, output: Tensor) -> Tensor:
        """A denoised latent moved by a difference of velocities."""
        return torch.addcmul(denoised, self.scale, output.to(denoised.dtype))

    def difference(self, denoised: Tensor, reference: Tensor) -> Tensor:
        """The difference of the velocities behind two denoised latents."""
        return (denoised - reference) / self.scale


class Model:
    """Velocities that are smooth in sigma and in the latent, for every branch: 0 is the conditional one.

    feature_error: how fast the deep part, which a cache may hold, moves with sigma; surprise(sigma): how much of every
    velocity cannot be predicted; difference_surprise: how much of the differences between branches cannot.
    """

    def __init__(
        self,
        pictures: Sequence[int] = (0, 1),
        feature_error: float = 1.0,
        surprise: Callable[[float], float] = lambda sigma: 0.0,
        difference_surprise: float = 0.0,
        dtype: torch.dtype = torch.float32,
        shape: Sequence[int] = SHAPE,
    ) -> None:
        self.feature_error, self.surprise, self.difference_surprise = feature_error, surprise, difference_surprise
        self.pictures, self.dtype, self.shape = pictures, dtype, shape
        self.noise, self.start, self.turn, *self.changes = self.fields(6)

    def fields(self, count: int, seed: int = 0) -> Tensor:
        """Noise [count, batch, ...], for every picture by itself."""
        generators = (torch.Generator().manual_seed(1000 * seed + picture) for picture in self.pictures)
        noise = [torch.randn(count, *self.shape, generator=generator) for generator in generators]
        return torch.stack(noise, 1).to(self.dtype)

    def shallow(self, branch: int, sigma: float, x: Tensor) -> Tensor:
        """The part of a velocity that is always computed."""
        smooth = self.turn * math.sin(3 * sigma) + 0.3 * torch.tanh(x)
        if branch:
            smooth = smooth + self.changes[branch - 1] * (0.5 - 0.4 * sigma) + 0.1 * torch.tanh(x)
        amount = self.surprise(sigma) + (self.difference_surprise if branch else 0.0)
        return smooth + amount * self.fields(1, 1 + round(1e4 * sigma))[0] if amount else smooth

    def deep(self, branch: int, sigma: float, x: Tensor) -> Tensor:
        """The part of a velocity that a cache may hold."""
        return self.start * math.cos(2 * self.feature_error * sigma)


@dataclass
class Network:
    """The network of a run, with a cache of deep parts by branch; see protocols.Network.

    caches: features are cached; deep: they leave out more than half of a pass; calls: what was asked for: (use,
    branches that ran); rows: what entered the network.
    """

    model: Model
    caches: bool = False
    deep: bool = True
    cache: dict[int, Tensor] = field(default_factory=dict)
    calls: list[tuple[FeatureUse, tuple[int, ...]]] = field(default_factory=list)
    rows: int = 0

    def run(self, pass_: Pass, branches: Sequence[Any], features: FeatureUse) -> Result:
        """Run `branches`; see protocols.Network."""
        running = tuple(i for i in pass_.active if branches[i] is not None)
        asked = self.caches and features is not FeatureUse.STORE
        reuse = asked and all(i in self.cache for i in running)
        if features is FeatureUse.PROBE and not reuse:
            return Result([])
        self.calls.append((features, running))
        self.rows += len(pass_.x) * len(running)
        outputs = [torch.zeros_like(pass_.x) for _ in branches]
        for i in running:
            outputs[i] = pass_.space.denoised(self._velocity(i, pass_, reuse))
        reused = frozenset(running if reuse else ())
        return Result(outputs, reused, len(pass_.x) * len(running), self.deep and reuse)

    def _velocity(self, branch: int, pass_: Pass, reuse: bool) -> Tensor:
        sigma, x = pass_.evaluation.sigma, pass_.x
        if not reuse:
            self.cache[branch] = self.model.deep(branch, sigma, x)
        return self.model.shallow(branch, sigma, x) + self.cache[branch]


def cond_and_uncond(sigma: float) -> Sequence[int]:
    """Both branches are active throughout."""
    return (0, 1)


@dataclass
class Sampling:
    """How a run samples.

    active(sigma): the branches that are active; fingerprint(sigma): of the conditionings; reference: None where the
    positive conditioning is none of the branches; solver: what the engine knows of the sampler, None for its own row;
    parts: elements of each of several latents that are packed into one.
    """

    model: Model = field(default_factory=Model)
    sampler: str = "sample_euler"
    sigmas: Sequence[float] = field(default_factory=lambda: even(30))
    cfg: float = 3.0
    active: Callable[[float], Sequence[int]] = cond_and_uncond
    fingerprint: Callable[[float], Any] = lambda sigma: None
    reference: int | None = 0
    solver: Solver | None = None
    observer: Observer | None = None
    late: bool = False
    deep: bool = True
    parts: tuple[int, ...] = ()

    def run(self, settings: CacheSettings = FULL) -> Run:
        """A run under `settings`."""
        run = Run(self, settings)
        sampler: Sampler = SAMPLERS[self.sampler]
        run.latent = sampler(run.denoise, self.model.noise, self.sigmas)
        return run

    def full(self) -> Tensor:
        """The final latent where no engine is at work."""
        run = Run(self, FULL)
        return SAMPLERS[self.sampler](run.plain, self.model.noise, self.sigmas)


class Run:
    """One run: what its evaluations did, the engine and the network at its end, and the final latent [batch, ...]."""

    latent: Tensor

    def __init__(self, sampling: Sampling, settings: CacheSettings) -> None:
        self.sampling, self.clock = sampling, Clock(sampling.sigmas)
        self.network = Network(sampling.model, settings.reuse is not None, sampling.deep)
        self.outcomes: list[Outcome] = []
        self.latents: list[Tensor] = []  # at every evaluation
        context = RunContext(
            lambda percent: 1 - percent,
            sampling.solver or SOLVERS[sampling.sampler],
            tuple(sampling.sigmas),
            late=sampling.late,
            predicts=settings.output is not None,
            estimates=settings.difference is not None,
            reuses=settings.reuse is not None,
        )
        self.engine = Engine(settings, context, sampling.observer)

    def denoise(self, x: Tensor, sigma: float) -> Tensor:
        """The guided denoised latent, by the engine."""
        self.latents.append(x)
        outcome = self.engine.evaluate(self._pass(x, sigma), self.network)
        self.outcomes.append(outcome)
        guided = self._guided(outcome.outputs, sigma)
        self.engine.guided(guided)
        return guided

    def plain(self, x: Tensor, sigma: float) -> Tensor:
        """The guided denoised latent, by the network alone."""
        pass_ = self._pass(x, sigma)
        return self._guided(self.network.run(pass_, pass_.branches, FeatureUse.STORE).outputs, sigma)

    @property
    def letters(self) -> str:
        """One letter for the action of every evaluation."""
        return "".join(outcome.action.letter for outcome in self.outcomes)

    @property
    def rows(self) -> int:
        """What entered the network, pictures x branches."""
        return self.network.rows

    def count(self, action: Action) -> int:
        """How many evaluations took `action`."""
        return sum(outcome.action is action for outcome in self.outcomes)

    def _pass(self, x: Tensor, sigma: float) -> Pass:
        sampling, active = self.sampling, self.sampling.active(sigma)
        branches = [f"branch {i}" for i in range(1 + max([1, *active]))]
        reference = -1 if sampling.reference is None else sampling.reference
        space, fingerprint = FlowSpace(sigma, x, sampling.parts), sampling.fingerprint(sigma)
        return Pass(self.clock.tick(sigma), branches, reference, active, x, space, fingerprint)

    def _guided(self, outputs: Sequence[Tensor], sigma: float) -> Tensor:
        active = self.sampling.active(sigma)
        if 0 not in active:
            return outputs[active[0] if active else 0]  # of nothing the host makes zeros
        changes = [outputs[0] - outputs[i] for i in active if i]
        return outputs[0] + (self.sampling.cfg - 1) * sum(changes) if changes else outputs[0]


def error(run: Run, full: Tensor | None = None) -> float:
    """Distance of the final latent to full sampling, relative. full: the latent of full sampling, None to sample it."""
    full = run.sampling.full() if full is None else full
    return ((run.latent - full).norm() / full.norm()).item()
