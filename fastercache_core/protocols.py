"""What the engine asks of its parts, and what it hands to them. Forecaster is in `forecast`, Solver in `solvers`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

from torch import Tensor

from .actions import Action, Step
from .clock import Evaluation
from .features.probe import Probe
from .signal import Signal
from .solvers import Solver


class Space(Protocol):
    """Between denoised latents and the network's own output space at one evaluation.

    scale: [batch, 1, ...], of the affine map denoised = skip(x) + scale * output; parts: elements of each of several
    latents that are packed into one, whose errors count by themselves.
    """

    scale: Tensor
    parts: tuple[int, ...]

    def output(self, denoised: Tensor) -> Tensor:
        """The network output behind `denoised`, same shape."""

    def denoised(self, output: Tensor) -> Tensor:
        """The denoised latent of a network output, same shape."""

    def unit(self, latent: Tensor) -> Tensor:
        """Factor [batch] from an error of the output to that of the slope (x - denoised) / sigma, over `latent`; with
        several parts [batch, parts]."""

    def add(self, denoised: Tensor, output: Tensor) -> Tensor:
        """A denoised latent moved by a difference in output space."""

    def difference(self, denoised: Tensor, reference: Tensor) -> Tensor:
        """Difference of two denoised latents, in output space."""


@dataclass(frozen=True)
class Pass:
    """All branches of one region at one evaluation.

    branches: conditionings as the network knows them, None for one that does not run; reference: index of the branch
    that the others are estimated from; active: indices of those that the network would run; x: the latent
    [batch, ...]; fingerprint: what must stay the same for cached values to be valid.
    """

    evaluation: Evaluation
    branches: Sequence[Any]
    reference: int
    active: Sequence[int]
    x: Tensor
    space: Space
    fingerprint: Any

    @property
    def others(self) -> list[int]:
        """The active branches beside the reference."""
        return [i for i in self.active if i != self.reference]

    @property
    def has_reference(self) -> bool:
        """True when the reference is active."""
        return self.reference in self.active


class FeatureUse(Enum):
    """What a run of the network does with cached features."""

    STORE = "store"  # compute everything, store what will be of use
    REUSE = "reuse"  # take what is fresh from the cache, store the rest
    PROBE = "probe"  # take what is fresh, leave no trace; run nothing where nothing is fresh


@dataclass(frozen=True)
class Result:
    """What a run of the network gave.

    outputs: denoised latents, one a branch; reused: indices of branches that took features from the cache; rows: what
    entered the network, pictures x branches; deep: features left out more than half of it.
    """

    outputs: list[Tensor]
    reused: frozenset[int] = frozenset()
    rows: int = 0
    deep: bool = False


class Network(Protocol):
    """The network of one evaluation of one region."""

    def run(self, pass_: Pass, branches: Sequence[Any], features: FeatureUse) -> Result:
        """Run `branches`: those of the pass, None for one that must not run."""


@dataclass(frozen=True)
class RunContext:
    """What a run is, as far as controllers ask.

    sigmas: of the run, noisiest first; late: never let the host wait for the device, see `readback`; predicts,
    estimates, reuses: which actions the run allows.
    """

    percent_to_sigma: Callable[[float], float]
    solver: Solver
    sigmas: tuple[float, ...]
    late: bool = False
    predicts: bool = True
    estimates: bool = True
    reuses: bool = False


@dataclass(frozen=True)
class Signals:
    """What a controller decides by: the signals of a region, as they are before an evaluation.

    output: of the conditional branch, None where evaluations are not predicted; differences: of the other active
    branches, None for one that was never computed; probe: errors of reused features, where they are probed. weights():
    how far the guided result moves for one unit of an error of each, the output's first; None: all count the same.
    estimates: of the other branches once more, as CFG-Cache of another node carries them forward; empty without one.
    """

    output: Signal | None
    differences: Sequence[Signal | None]
    probe: Probe | None = None
    weights: Callable[[], Sequence[float]] | None = None
    estimates: Sequence[Signal | None] = ()

    def weighed(self, output: bool = True) -> list[tuple[Signal, float]]:
        """Those that were computed, with their weights; output: with that of the conditional branch."""
        signals = [self.output, *self.differences]
        weights = self.weights() if self.weights else [1.0] * len(signals)
        pairs = list(zip(signals, weights, strict=True))
        return [(signal, weight) for signal, weight in pairs[not output :] if signal]


class Controller(Protocol):
    """Decides what every evaluation of one region does, during one run."""

    def choose(self, evaluation: Evaluation, signals: Signals) -> Step:
        """What `evaluation` does."""

    def unit(self, pass_: Pass, cond: Tensor) -> Tensor | None:
        """What makes errors of signals relative, [batch]; None where it asks for none. cond: denoised, [batch, ...]."""

    def took(self, evaluation: Evaluation, action: Action) -> None:
        """The action that was carried out: not the one chosen where nothing could be reused."""

    def reset(self) -> None:
        """Forget the past, so that the next evaluation is computed."""

    def finish(self, signals: Signals) -> float | None:
        """The run is over: the sum of its squared errors, relative to the latent; None where they are not estimated."""


class ControllerSettings(Protocol):
    """The settings of a controller, what makes it, and what a run under it is like.

    corrects: errors of predicted steps are corrected where the solver allows it. probes: features are probed, and
    reused by their error up to `longest_reuse` evaluations on (None: up to their own interval). reference_only: beside
    estimated branches only the reference uses features. holds_slope: signals are slopes, not the network's outputs.
    uses_errors: nothing is skipped before forecasts are good enough. weighs: its steps may bring weights, which correct
    errors by themselves.
    """

    @property
    def corrects(self) -> bool: ...
    @property
    def probes(self) -> bool: ...
    @property
    def longest_reuse(self) -> int | None: ...
    @property
    def reference_only(self) -> bool: ...
    @property
    def holds_slope(self) -> bool: ...
    @property
    def uses_errors(self) -> bool: ...
    @property
    def weighs(self) -> bool: ...

    def served(self, solver: Solver, sampler: str) -> tuple[ControllerSettings, str | None]:
        """The same as far as `solver`, of the `sampler` of this name, serves it, and a note where it does not."""

    def controller(self, context: RunContext) -> Controller:
        """The controller of one region of a run."""


class Observer(Protocol):
    """Looks at every evaluation of a run, for calibration."""

    def before(self, pass_: Pass, network: Network) -> Network:
        """An evaluation begins; returns the network to run it with."""

    def weigh(self, step: Step, pass_: Pass, signals: Signals, outputs: Sequence[Tensor]) -> Step:
        """`step` with the weights to predict with, or to correct what was computed. outputs: denoised, of what has run
        already, else empty."""

    def after(self, pass_: Pass, action: Action, outputs: Sequence[Tensor]) -> None:
        """An evaluation took `action` and gave denoised `outputs`."""
